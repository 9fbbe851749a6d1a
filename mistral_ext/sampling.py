"""From logits to the next token.

The order of the steps is that of vLLM: logit bias, penalties, temperature, min_p, top_k, top_p.
What is left is sampled by the Gumbel-max rule (Gumbel 1954; Maddison et al. 2014,
arXiv:1411.0030): the token with the largest logit + g, each token with its own Gumbel noise g.
The noise is a pure function of (seed, index of the completion, step, token), made by a counter
based generator (Philox, Salmon et al. 2011), so a completion depends on its own seed alone: not on
what else is in the batch, nor on what was drawn before.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np


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
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        self._check("stop", tuple, "non-empty strings", lambda x: all(_is_text(s) for s in x))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check("logit_bias", dict, "a number for each token id", _is_bias)

    def _check(self, name, kind, expected, valid) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not valid(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bias(bias: dict) -> bool:
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
    """Chooses the tokens of one completion.

    Args:
        params: the options.
        prompt_ids: tokens of the prompt, for the repetition penalty.
        vocab_size: V.
        index: which of the prompt's n completions this is.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, index: int = 0
    ) -> None:
        for token_id in params.logit_bias:
            if token_id >= vocab_size:
                raise ValueError(
                    f"logit_bias has token id {token_id}, expected less than {vocab_size}"
                )
        self._params = params
        self._key = np.array(
            [secrets.randbits(64) if params.seed is None else params.seed, index], dtype=np.uint64
        )
        self._step = 0
        self._seen = np.zeros(vocab_size, dtype=bool)  # in prompt or completion
        self._seen[np.asarray(prompt_ids, dtype=np.int64)] = True
        self._counts = np.zeros(vocab_size, dtype=np.float32)  # in the completion

    def sample(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """Chooses the next token.

        Args:
            logits: [V] fp32, not changed.

        Returns:
            The token id, and its log-probability if `logprobs` asked for it.

        Raises:
            ValueError: the logits are NaN.
        """
        params = self._params
        if np.isnan(logits).any():
            raise ValueError("the model's logits are NaN: its weights may be damaged")
        adjusted = self._adjust(logits)
        if params.temperature == 0:
            token_id = int(adjusted.argmax())
        else:
            token_id = self._draw(adjusted.astype(np.float64) / params.temperature)
        self._step += 1
        self._seen[token_id] = True
        self._counts[token_id] += 1
        if params.logprobs is None:
            return token_id, None
        return token_id, _logprob(logits, token_id, params.logprobs)

    def _adjust(self, logits: np.ndarray) -> np.ndarray:
        params = self._params
        if params.logit_bias:
            logits = logits.copy()
            for token_id, bias in params.logit_bias.items():
                logits[token_id] += bias
        if params.repetition_penalty != 1:
            # Keskar et al. 2019, arXiv:1909.05858: towards less likely, whatever the sign.
            penalised = np.where(
                logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
            )
            logits = np.where(self._seen, penalised, logits)
        if params.presence_penalty or params.frequency_penalty:
            logits = logits - (
                params.presence_penalty * (self._counts > 0)
                + params.frequency_penalty * self._counts
            )
        return logits

    def _draw(self, logits: np.ndarray) -> int:
        candidates = _most_likely(logits, self._params)
        # Word 0 of the counter runs over the vocabulary, four tokens a step.
        generator = np.random.Philox(key=self._key, counter=[0, self._step, 0, 0])
        uniform = np.random.Generator(generator).random(len(logits))[candidates]
        with np.errstate(divide="ignore"):  # a uniform 0 gives noise -inf: never chosen
            noise = -np.log(-np.log(uniform))
        return int(candidates[(logits[candidates] + noise).argmax()])


def _most_likely(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Token ids that min_p, top_k and top_p leave; ties go to the lower id."""
    candidates = np.flatnonzero(logits > -np.inf)
    if params.min_p > 0:
        candidates = np.flatnonzero(logits >= logits.max() + math.log(params.min_p))
    if params.top_k or params.top_p < 1:
        candidates = candidates[np.argsort(-logits[candidates], kind="stable")]
    if params.top_k:
        candidates = candidates[: params.top_k]
    if params.top_p < 1:
        probabilities = np.exp(logits[candidates] - logits[candidates[0]])
        reached = np.cumsum(probabilities) / probabilities.sum()
        candidates = candidates[: np.searchsorted(reached, params.top_p) + 1]
    return candidates


def _logprob(logits: np.ndarray, token_id: int, count: int) -> TokenLogprob:
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - math.log(np.exp(shifted).sum())
    top = np.argsort(-logprobs, kind="stable")[:count]
    return TokenLogprob(
        token_id, float(logprobs[token_id]), {int(i): float(logprobs[i]) for i in top}
    )
