"""The options of a training run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

# Mistral's names of the linear layers of a block. model.adapters.GROUPS has the same names, but its
# module imports torch, which the command line should not need to read options.
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train an adapter.

    Args:
        rank: the rank of the two matrices, A and B, that are learned for each weight.
        alpha: the update of a weight is alpha / rank * B A. None: alpha is 2 * rank.
        targets: the weights of each layer that get an update: some of wq, wk, wv, wo, w1, w3 and
            w2.
        epochs: the number of passes over the data.
        max_steps: the most steps of the run. The run ends after them even if the epochs have more
            steps. None: the run ends after the epochs.
        batch_size: the number of samples in a step. The loss of a step is the mean over all its
            tokens, weighted by `weight` in the data.
        tokens_per_pass: the most tokens that go through the model at once, and the most tokens of a
            sample. This number determines the memory that is needed. It changes what is learned
            only by rounding.
        learning_rate: the highest learning rate. The rate rises to this one in a straight line, and
            then falls to 0 as a cosine.
        warmup: the share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: the weight decay of AdamW.
        betas: the two betas of AdamW.
        max_grad_norm: the greatest norm of the gradients. If the norm is greater, the gradients are
            scaled down to this norm. None: they are not scaled.
        eval_every: the number of steps between two evaluations. None: an evaluation follows each
            epoch.
        patience: the run ends after so many evaluations in a row without a new lowest loss. This
            needs held-out data. None: the run does not end early.
        checkpoint_every: the number of steps between two checkpoints. None: a checkpoint follows
            each epoch.
        sample_tokens: the most tokens of the text that the model writes at each evaluation. 0: it
            writes no text.
        seed: the seed for the first values of the adapter and for the order of the samples.
        tensorboard: whether to write the metrics also for TensorBoard.

    Raises:
        ValueError: an option is out of range. The message names the option.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 16
    tokens_per_pass: int = 2048
    learning_rate: float = 2e-4
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = 1.0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    sample_tokens: int = 64
    seed: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size", "tokens_per_pass"):
            self._expect_integer(name, 1)
        for name in ("max_steps", "eval_every", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                self._expect_integer(name, 1)
        self._expect_integer("sample_tokens", 0)
        self._expect_integer("seed", 0, 2**63 - 1)
        self._expect("learning_rate", _is_number(self.learning_rate, above=0), "a number above 0")
        for name in ("alpha", "max_grad_norm"):
            value = getattr(self, name)
            self._expect(name, value is None or _is_number(value, above=0), "a number above 0")
        self._expect("weight_decay", _is_number(self.weight_decay), "a number, 0 or more")
        self._expect("warmup", _is_number(self.warmup) and self.warmup <= 1, "0 to 1")
        self._expect(
            "betas",
            isinstance(self.betas, (tuple, list))
            and len(self.betas) == 2
            and all(_is_number(beta) and beta < 1 for beta in self.betas),
            "two numbers from 0 to below 1",
        )
        self._expect(
            "targets",
            isinstance(self.targets, (tuple, list))
            and bool(self.targets)
            and all(target in TARGETS for target in self.targets),
            f"some of {', '.join(TARGETS)}",
        )

    @property
    def scale(self) -> float:
        """The factor of B A in the update of a weight."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def what_is_learned(self) -> dict[str, Any]:
        """The options that change the adapter, with values that JSON can hold. A resumed run must
        keep them."""
        free = {"checkpoint_every", "sample_tokens", "tensorboard"}
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in free
        }

    def _expect_integer(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        is_valid = is_integer and value >= least and (most is None or value <= most)
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        self._expect(name, is_valid, f"an integer, {expected}")

    def _expect(self, name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name} is {getattr(self, name)!r:.60}, expected {expected}")


def _is_number(value: object, above: float | None = None) -> bool:
    """Whether a value is a finite int or float and greater than `above`. If `above` is None, it
    must be 0 or greater."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return (value >= 0 if above is None else value > above) and value <= sys.float_info.max
