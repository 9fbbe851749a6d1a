"""Weights for products: plain tensors, and `Quantized` weights, which name their format.

csrc/formats.h lists the formats. This file adds how Python unpacks their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mistral_ext import _C

VALUES_PER_WORD = 8  # 4-bit values in an int32
# Value i of a word begins at bit 4 * (i // 2) + 16 * (i % 2). A shift by 4 j and the mask
# 0x000f000f then give values 2 j and 2 j + 1, one in each half of the word.
_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device="cpu")


class Format(NamedTuple):
    """How a format stores a weight [N, K]."""

    value_dtype: torch.dtype
    scale_dtype: torch.dtype
    bits: int  # bits of a value
    element_values: int  # values in an element
    least_group: int  # values that share a scale: powers of two from here ...
    most_group: int  # ... to here; 0: a whole row


def _formats() -> dict[str, Format]:
    return {
        name: Format(
            getattr(torch, facts["value_dtype"]),
            getattr(torch, facts["scale_dtype"]),
            facts["bits"],
            facts["element_values"],
            facts["least_group"],
            facts["most_group"],
        )
        for name, facts in _C.weight_formats().items()
        if facts["scale_dtype"] is not None
    }


FORMATS = _formats()
PLAIN = "plain"  # the format of a tensor


class Quantized(NamedTuple):
    """A weight [N, K] whose values have scales.

    "int8": values int8 [N, K], -127 to 127; scales bfloat16 [N, 1].
    "int4": values int32 [N, K / 8]; scales bfloat16 [N, K / group], of either sign. Value k of a
    row, -8 to 7 in two's complement, is in word k // 8 at bit 4 * (i // 2) + 16 * (i % 2) with
    i = k % 8. Groups of 32, 64 or 128.
    "q8_0": values int8 [N, K]; scales float16 [N, K / 32]: groups of 32. The numbers are those of
    GGUF's Q8_0, with values and scales in separate tensors.
    """

    values: Tensor
    scales: Tensor
    format: str

    @property
    def shape(self) -> torch.Size:
        """[N, K], the shape of the weight."""
        rows, elements = self.values.shape
        return torch.Size((rows, elements * FORMATS[self.format].element_values))

    @property
    def group(self) -> int:
        """Number of values that share a scale; K for "int8"."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as a tensor [N, K]: values times scales in fp32, then rounded to `dtype`."""
        values = unpack(self.values) if self.format == "int4" else self.values
        groups = values.float().unflatten(1, (-1, self.group))
        weight: Tensor = groups * self.scales.float().unsqueeze(2)
        return weight.flatten(1).to(dtype)

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(self.values.to(device), self.scales.to(device), self.format)


Weight: TypeAlias = Tensor | Quantized


class JoinedWeight(NamedTuple):
    """Plain weights that lie one below the other, so that torch multiplies them as one."""

    whole: Tensor  # [N, K], contiguous
    parts: tuple[Tensor, ...]  # [rows of the part, K], views of `whole`

    @classmethod
    def join(cls, weights: Sequence[Tensor], device: torch.device) -> JoinedWeight:
        """Copies weights [rows, K] of the same dtype to a device, one below the other."""
        rows = [len(weight) for weight in weights]
        whole = weights[0].new_empty((sum(rows), weights[0].shape[1]), device=device)
        parts = whole.split(rows)
        for part, weight in zip(parts, weights, strict=True):
            part.copy_(weight)
        return cls(whole, parts)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes


# Weights that are multiplied in one pass, as if they lay one below the other.
Weights: TypeAlias = Sequence[Weight] | JoinedWeight


def pack(values: Tensor, out: Tensor) -> None:
    """Packs [N, K] integers from -8 to 7, of any dtype, into [N, K / 8] words."""
    nibbles = values.to(torch.int32).bitwise_and_(15).unflatten(1, (-1, VALUES_PER_WORD))
    # The shifted values have no bit in common, so their sum is their union.
    torch.sum(nibbles << _SHIFTS.to(out.device), dim=2, dtype=torch.int32, out=out)


def unpack(words: Tensor) -> Tensor:
    """Unpacks [N, K / 8] words into [N, K] int32, -8 to 7."""
    nibbles = (words.unsqueeze(2) >> _SHIFTS.to(words.device)) & 15
    return ((nibbles ^ 8) - 8).flatten(1)


class Parts(NamedTuple):
    """Weights in the form of the ops' schemas: for each weight its values, its scales (None for a
    plain weight) and its format; and the whole, if they are the parts of a `JoinedWeight`."""

    values: list[Tensor]
    scales: list[Tensor | None]
    formats: list[str]
    whole: Tensor | None

    @property
    def outputs(self) -> int:
        """Rows of all weights together."""
        return sum(map(len, self.values))


def parts_of(weights: Weights) -> Parts:
    if isinstance(weights, JoinedWeight):
        count = len(weights.parts)
        return Parts(list(weights.parts), [None] * count, [PLAIN] * count, weights.whole)
    parts = Parts([], [], [], None)
    for weight in weights:
        if isinstance(weight, Tensor):
            parts.values.append(weight)
            parts.scales.append(None)
            parts.formats.append(PLAIN)
        else:
            parts.values.append(weight.values)
            parts.scales.append(weight.scales)
            parts.formats.append(weight.format)
    return parts
