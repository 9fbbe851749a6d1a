"""The options of a completion: how to choose tokens, and when to stop.

This module does not import torch, because that takes seconds. So the command line can report a
wrong option at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from mistral_ext.text.constraint import Constraint, schema_text

# The most drafts (guessed tokens) that a pass checks for one completion. The pass also reads the
# token before them. That makes 8 tokens, the most that the kernels for few tokens (gemv) take.
MOST_DRAFTS = 7

_LARGEST = sys.float_info.max  # Python's integers may be larger, and then become no float


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Options that OpenAI's API or vLLM have too are named
    as there, and mean the same. The comment of a number begins with its allowed values.

    Raises:
        TypeError, ValueError: an option is wrong. The message names the option, its value and what
        was expected.
    """

    max_tokens: int = 128  # >= 1: the most tokens to generate
    temperature: float = 0.0  # >= 0; 0: greedy, the most likely token
    top_p: float = 1.0  # (0, 1]: keep the most likely tokens up to this sum of probabilities
    top_k: int = 0  # >= 0: keep the k most likely tokens; 0: all
    min_p: float = 0.0  # [0, 1]: keep tokens with at least this share of the highest probability
    # > 0: divides positive logits of tokens in prompt and completion, and multiplies negative ones
    repetition_penalty: float = 1.0
    # [-2, 2]: subtracted from the logit of each token that the completion has
    presence_penalty: float = 0.0
    # [-2, 2]: subtracted from a token's logit for each time that the completion has the token
    frequency_penalty: float = 0.0
    seed: int | None = None  # [0, 2^64); None: a random seed
    stop: str | Sequence[str] | None = None  # strings that end the completion, without being in it
    logit_bias: Mapping[int, float] | None = None  # token id -> number to add to its logit
    # >= 0: report the log-probabilities of each generated token and of this many of the most likely
    # tokens; None: report none
    logprobs: int | None = None
    n: int = 1  # >= 1: the number of completions of each prompt
    ignore_eos: bool = False  # do not end at the end-of-text token
    # The whole completion has to match a constraint. At most one of these three may be given.
    schema: object = None  # a JSON schema: a dict, JSON text or a pydantic model
    regex: str | None = None  # a regular expression, in the syntax of Rust's regex
    grammar: str | None = None  # a grammar, in the syntax of Lark
    # [0, 7]: the most tokens to guess at a time. This changes the speed, and on a GPU perhaps the
    # text (see `engine.drafts`). None: the number with which the model was loaded.
    drafts: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Makes the options from keyword arguments. Raises TypeError for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(f"unknown option {name!r}, expected one of {', '.join(names)}")
        return cls(**options)

    def __post_init__(self) -> None:
        self._check("max_tokens", Integral, "an integer, 1 or more", lambda x: x >= 1)
        self._check("temperature", Real, "a number, 0 or more", lambda x: 0 <= x <= _LARGEST)
        self._check("top_p", Real, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        self._check("top_k", Integral, "an integer, 0 (all) or more", lambda x: x >= 0)
        self._check("min_p", Real, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check("repetition_penalty", Real, "a number above 0", lambda x: 0 < x <= _LARGEST)
        self._check("presence_penalty", Real, "a number from -2 to 2", lambda x: -2 <= x <= 2)
        self._check("frequency_penalty", Real, "a number from -2 to 2", lambda x: -2 <= x <= 2)
        self._check("n", Integral, "an integer, 1 or more", lambda x: x >= 1)
        self._check("ignore_eos", bool, "True or False", lambda x: True)
        if self.seed is not None:
            self._check("seed", Integral, "an integer from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64)
        if self.logprobs is not None:
            self._check("logprobs", Integral, "an integer, 0 or more", lambda x: x >= 0)
        if self.drafts is not None:
            expect_drafts(self.drafts)
        if self.stop is None or isinstance(self.stop, str):
            object.__setattr__(self, "stop", () if self.stop is None else (self.stop,))
        self._check("stop", Sequence, "non-empty strings", lambda x: all(_is_text(s) for s in x))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        self._check("logit_bias", Mapping, "a number for each token id", _is_bias)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.schema is not None:
            object.__setattr__(self, "schema", schema_text(self.schema))
        self._check_constraints()

    @functools.cached_property
    def constraint(self) -> Constraint | None:
        """The constraint of the completion, or None if the completion need not match anything."""
        texts = {"schema": self.schema, "regex": self.regex, "grammar": self.grammar}
        given = [Constraint(kind, str(text)) for kind, text in texts.items() if text is not None]
        return given[0] if given else None

    @property
    def plainly_greedy(self) -> bool:
        """Whether each token is the one to which the model gives the largest logit, of those that
        a constraint allows. Penalties and biases would change this."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return self.temperature == 0 and not any(penalties) and not self.logit_bias

    def check_vocabulary(self, vocab_size: int, holes: Collection[int] = ()) -> None:
        """Raises ValueError if logit_bias has an id that is not below `vocab_size`, or that is a
        hole: an id that no token has."""
        for token_id in self.logit_bias or ():
            if token_id >= vocab_size:
                raise ValueError(
                    f"logit_bias has token id {token_id}, expected less than {vocab_size}"
                )
            if token_id in holes:
                raise ValueError(f"logit_bias has token id {token_id}, expected the id of a token")

    def _check_constraints(self) -> None:
        """Raises TypeError or ValueError if a constraint is no text or too large, or if more than
        one is given."""
        given = [x for x in ("schema", "regex", "grammar") if getattr(self, x) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, expected one of them")
        for name in given:
            self._check(name, str, "text", lambda x: True)
        _ = self.constraint  # making the constraint also checks its size

    def _check(self, name: str, kind: type, expected: str, valid: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not valid(value):
            raise ValueError(f"{name} is {value!r}, expected {expected}")


def expect_drafts(drafts: object) -> None:
    """Raises TypeError or ValueError unless `drafts` is an integer from 0 to `MOST_DRAFTS`."""
    if isinstance(drafts, bool) or not isinstance(drafts, Integral):
        raise TypeError(f"drafts is {drafts!r}, expected an integer from 0 to {MOST_DRAFTS}")
    if not 0 <= int(drafts) <= MOST_DRAFTS:
        raise ValueError(f"drafts is {drafts!r}, expected an integer from 0 to {MOST_DRAFTS}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_bias(bias: Mapping[Any, Any]) -> bool:
    # Minus infinity is allowed: it bans a token.
    return all(
        isinstance(i, Integral)
        and not isinstance(i, bool)
        and int(i) >= 0
        and isinstance(b, Real)
        and _becomes_float(b)
        for i, b in bias.items()
    )


def _becomes_float(number: Any) -> bool:
    """Whether a number can be converted to a float and is not NaN. Infinity can."""
    return bool(-_LARGEST <= number <= _LARGEST) or number in (-math.inf, math.inf)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a generated token, and those of the most likely tokens. They are the
    model's own, before bias, constraint, penalties and temperature."""

    token_id: int
    logprob: float
    top: dict[int, float]  # token id -> log-probability; the most likely token is first
