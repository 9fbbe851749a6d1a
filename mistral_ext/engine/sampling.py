"""From logits to the next token: the options, and the state that `ops.sample` works on.

The order of the steps is that of vLLM: logit bias, penalties, temperature, min_p, top_k, top_p.
The noise of a draw is a pure function of (seed, index of the completion, step, token), so a
completion depends on its own seed alone: not on what else is in the batch, nor on what was drawn
before.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from mistral_ext import ops


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop: names and meanings of the OpenAI API and vLLM.

    Raises:
        TypeError, ValueError: naming the option, its value and what was expected.
    """

    max_tokens: int = 128  # generated at most, >= 1
    temperature: float = 0.0  # >= 0; 0: greedy, the most likely token
    top_p: float = 1.0  # (0, 1]: the fewest most likely tokens whose probabilities reach this
    top_k: int = 0  # >= 0: the k most likely tokens; 0: all
    min_p: float = 0.0  # [0, 1]: tokens at least this likely relative to the most likely one
    repetition_penalty: float = 1.0  # > 0: divides the logits of tokens in prompt and completion
    presence_penalty: float = 0.0  # [-2, 2]: subtracted once for a token in the completion
    frequency_penalty: float = 0.0  # [-2, 2]: subtracted for each time it is there
    seed: int | None = None  # [0, 2^64); None: a fresh one
    stop: str | Sequence[str] | None = None  # strings that end the completion, not part of it
    logit_bias: Mapping[int, float] | None = None  # added to the logits of these token ids
    logprobs: int | None = None  # report the log-probability of each token and this many others
    n: int = 1  # completions of each prompt, >= 1
    ignore_eos: bool = False  # do not end at the end-of-text token

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> SamplingParams:
        """From keyword arguments; TypeError for one that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"unknown option {name!r}, expected one of {', '.join(names)}")
        return cls(**options)

    def __post_init__(self) -> None:
        self._check("max_tokens", Integral, "an integer, 1 or more", lambda x: x >= 1)
        self._check("temperature", Real, "a number, 0 or more", lambda x: 0 <= x < math.inf)
        self._check("top_p", Real, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        self._check("top_k", Integral, "an integer, 0 (all) or more", lambda x: x >= 0)
        self._check("min_p", Real, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", Real, "a number above 0", lambda x: 0 < x < math.inf)
        self._check("presence_penalty", Real, "a number from -2 to 2", lambda x: -2 <= x <= 2)
        self._check("frequency_penalty", Real, "a number from -2 to 2", lambda x: -2 <= x <= 2)
        self._check("n", Integral, "an integer, 1 or more", lambda x: x >= 1)
        self._check("ignore_eos", bool, "True or False", lambda x: True)
        if self.seed is not None:
            self._check("seed", Integral, "an integer from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64)
        if self.logprobs is not None:
            self._check("logprobs", Integral, "an integer, 0 or more", lambda x: x >= 0)
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        self._check("stop", Sequence, "non-empty strings", lambda x: all(_is_text(s) for s in x))
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        self._check("logit_bias", Mapping, "a number for each token id", _is_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def plainly_greedy(self) -> bool:
        """Whether each token is the most likely one by the model's own logits."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return self.temperature == 0 and not any(penalties) and not self.logit_bias

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if logit_bias has a token that is not among the first `vocab_size`."""
        for token_id in self.logit_bias:
            if token_id >= vocab_size:
                raise ValueError(
                    f"logit_bias has token id {token_id}, expected less than {vocab_size}"
                )

    def _check(self, name, kind, expected, valid) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not valid(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bias(bias: Mapping) -> bool:
    # Minus infinity is useful: it bans a token.
    return all(
        isinstance(i, Integral) and i >= 0 and isinstance(b, Real) and not math.isnan(b)
        for i, b in bias.items()
    )


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities under the model itself: before bias, penalties and temperature."""

    token_id: int
    logprob: float
    top: dict[int, float]  # the most likely tokens, most likely first


class Sampler:
    """Chooses the tokens of several completions, all that a step needs in one call.

    The state of each is a row of a few tensors on the device: see `ops.sample`.

    Args:
        rows: completions at a time.
        vocab_size: V, ids that may be chosen.
        device: where the logits are.

    Attributes:
        vocab_size: as given.
    """

    def __init__(
        self, rows: int, vocab_size: int, device: torch.device | str | None = None
    ) -> None:
        self.vocab_size = vocab_size
        self._options = torch.zeros(rows, 7, dtype=torch.float64, device=device)
        self._noise = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        self._history = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)
        self._bias: Tensor | None = None  # made when first needed
        self._plainly_greedy = [False] * rows

    def start(
        self, row: int, params: SamplingParams, prompt_ids: Sequence[int], index: int = 0
    ) -> None:
        """Gives a row to a new completion.

        Args:
            row: 0 to rows - 1; its last completion has ended.
            params: the options.
            prompt_ids: tokens of the prompt, for the repetition penalty.
            index: which of the prompt's n completions this is.

        Raises:
            ValueError: logit_bias has a token that is not in the vocabulary.
        """
        params.check_vocabulary(self.vocab_size)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        options = (
            params.temperature,
            min(params.top_k, self.vocab_size),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._options[row] = torch.tensor(options, dtype=torch.float64)
        self._plainly_greedy[row] = params.plainly_greedy
        signed_seed = seed - 2**64 if seed >= 2**63 else seed  # of the same 64 bits
        self._noise[row] = torch.tensor([signed_seed, index, 0])
        self._history[row] = 0
        prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=self._history.device)
        self._history[row, prompt[prompt < self.vocab_size]] = 1
        if params.logit_bias and self._bias is None:
            self._bias = torch.zeros_like(self._history, dtype=torch.float32)
        if self._bias is not None:
            self._bias[row] = 0
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
            biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self._bias[row, ids.to(self._bias.device)] = biases.to(self._bias.device)

    @property
    def biased(self) -> bool:
        """Whether a completion has had a logit_bias: draws then read one for all."""
        return self._bias is not None

    def needs_no_draw(self, rows: Sequence[int]) -> bool:
        """Whether for all these completions the largest logit will do, and no state."""
        return all(self._plainly_greedy[row] for row in rows)

    def sample(self, rows: Sequence[int], logits: Tensor) -> list[int]:
        """Chooses the next token of some of the completions.

        Args:
            rows: N of them.
            logits: [N, V or more] fp32, not changed; columns past V are never chosen.

        Returns:
            The N token ids.

        Raises:
            ValueError: there is nothing to choose from.
        """
        rows = torch.tensor(rows, dtype=torch.int64, device=logits.device)
        return self.checked(self.draw(rows, logits).tolist(), logits)

    def draw(self, rows: Tensor, logits: Tensor) -> Tensor:
        """The same for rows on the device, without waiting for it; -1 where `sample` raises."""
        logits = logits[:, : self.vocab_size]
        return ops.sample(logits, rows, self._options, self._noise, self._history, self._bias)

    def checked(self, token_ids: list[int], logits: Tensor) -> list[int]:
        """What was drawn from the logits, if there was something to choose from everywhere."""
        if -1 in token_ids:
            if logits[token_ids.index(-1), : self.vocab_size].isnan().any():
                raise ValueError("the model's logits are NaN: its weights may be damaged")
            raise ValueError("all logits are -inf, with logit_bias: no token is left to choose")
        return token_ids


def token_logprob(logits: Tensor, token_id: int, count: int) -> TokenLogprob:
    """The log-probability of a token.

    Args:
        logits: [V] fp32.
        token_id: the token.
        count: report this many of the most likely tokens too.
    """
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.sort(descending=True, stable=True)
    ids, values = top.indices[:count].tolist(), top.values[:count].tolist()
    return TokenLogprob(token_id, logprobs[token_id].item(), dict(zip(ids, values, strict=True)))
