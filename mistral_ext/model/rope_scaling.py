"""Changes the frequencies of RoPE, so that models can read longer texts than in their first
training.

The kinds of scaling are those of Hugging Face's `rope_scaling` (`rope_parameters` in newer files).
The frequencies are computed as in transformers, but in float64. One more kind comes from GGUF
files, which hold a divisor for each frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
# The `rope_type` of the kind that comes from GGUF files, and the key of its factors in a
# config.json that we write. transformers does not know this kind.
_FACTORS = "factors"


@dataclass(frozen=True)
class Linear:
    """Divides all frequencies by one factor, as if the positions were closer together.

    Source: Chen et al. 2023, arXiv:2306.15595.
    """

    factor: float

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": "linear", "factor": self.factor}


@dataclass(frozen=True)
class Llama3:
    """Divides low frequencies by a factor, and keeps high frequencies. The *turns* of a frequency
    decide whether it is low or high: how many times its angle goes round in the original positions.
    Frequencies in between become a mixture, which is linear in the turns.

    Source: Llama 3.1, as implemented in transformers (`rope_type: llama3`).
    """

    factor: float
    low: float  # frequencies with fewer turns are divided
    high: float  # frequencies with more turns are kept
    original_positions: int  # how many positions the first training had

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        turns = self.original_positions * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original_positions,
        }


@dataclass(frozen=True)
class Yarn:
    """Divides low frequencies by a factor, and keeps high frequencies. The turns of a frequency
    (see `Llama3`) decide whether it is low or high. Frequencies in between become a mixture, which
    is linear in the index of the frequency.

    transformers multiplies queries and keys by `attention_factor`. Here its square is a factor of
    the scores (`MistralConfig.attention_scale`).

    Source: Peng et al. 2023, arXiv:2309.00071.
    """

    factor: float
    original_positions: int  # how many positions the first training had
    attention_factor: float
    beta_fast: float = 32  # frequencies with more turns in the original positions are kept
    beta_slow: float = 1  # frequencies with fewer turns are divided
    truncate: bool = True  # whether the mixture begins and ends at whole indices

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        half = len(frequencies)
        turns = self.beta_fast, self.beta_slow
        begin, end = (self._dimension(some, half, theta) for some in turns)
        if self.truncate:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, 2 * half - 1)
        dimensions = torch.arange(half, dtype=torch.float64, device=frequencies.device)
        divided = ((dimensions - begin) / max(end - begin, 0.001)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, divided)

    def _dimension(self, turns: float, half: int, theta: float) -> float:
        """Returns the index, not rounded, of the frequency that makes this many turns in the
        original positions."""
        positions = self.original_positions / (turns * 2 * math.pi)
        return half * math.log(positions) / math.log(theta)

    def to_hf(self) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_positions,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }


@dataclass(frozen=True)
class Factors:
    """Divides each frequency by a factor of its own, as `rope_freqs.weight` of GGUF files does."""

    factors: tuple[float, ...]  # D/2 factors

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / torch.tensor(self.factors, dtype=torch.float64).to(frequencies.device)

    def to_hf(self) -> dict[str, Any]:
        return {"rope_type": _FACTORS, _FACTORS: list(self.factors)}


RopeScaling: TypeAlias = Linear | Llama3 | Yarn | Factors


def scaling_from_hf(rope: dict[str, Any], max_positions: int) -> RopeScaling | None:
    """Reads `rope_scaling` or `rope_parameters` of a ``config.json``. Returns None if RoPE is not
    scaled.

    Dynamic scaling counts as no scaling. It changes only texts longer than `max_positions`, which
    the engine does not allow.

    Args:
        rope: the object with the settings.
        max_positions: the most positions of the model. It is also the number of original positions,
            if `rope` does not have that number.

    Raises:
        ValueError: the kind is not supported, or a number is missing or impossible.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default", "dynamic"):
        return None
    if kind == _FACTORS:
        factors = rope.get(_FACTORS)
        if not isinstance(factors, list) or not all(is_positive(factor) for factor in factors):
            raise ValueError(
                f"factors of rope_scaling is {factors!r:.60}, expected positive numbers"
            )
        return Factors(tuple(map(float, factors)))
    if kind not in _KINDS:
        raise ValueError(f"rope_type is {kind!r}, expected one of {', '.join(_KINDS)}")
    if kind == "linear":
        return Linear(_number(rope, "factor"))
    original = int(_number(rope, "original_max_position_embeddings", max_positions))
    if kind == "yarn":
        return _yarn(rope, original)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if high <= low:
        raise ValueError(f"high_freq_factor is {high}, expected more than low_freq_factor, {low}")
    return Llama3(_number(rope, "factor"), low, high, original)


def _yarn(rope: dict[str, Any], original: int) -> Yarn:
    factor = _number(rope, "factor")
    default = _attention_factor(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        default = _attention_factor(factor, _number(rope, "mscale"))
        default /= _attention_factor(factor, _number(rope, "mscale_all_dim"))
    return Yarn(
        factor,
        original,
        _number(rope, "attention_factor", default),
        # transformers takes the default not only for a missing number, but also for 0.
        _number(rope, "beta_fast", 32) if rope.get("beta_fast") else 32,
        _number(rope, "beta_slow", 1) if rope.get("beta_slow") else 1,
        bool(rope.get("truncate", True)),
    )


def _attention_factor(factor: float, scale: float = 1) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _number(rope: dict[str, Any], key: str, default: float | None = None) -> float:
    value: Any = rope.get(key)
    value = default if value is None else value
    if not is_positive(value):
        raise ValueError(f"{key} of rope_scaling is {value!r}, expected a positive number")
    return float(value)


def is_positive(value: Any) -> bool:
    """Whether a value of a file is a finite number above 0. A bool is no number here."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
