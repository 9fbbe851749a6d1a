"""Weights as the products take them: plain tensors, and `Quantized` ones, whose format has a name.

The formats are the rows of csrc/formats.h; what Python adds is how their values are unpacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mistral_ext import _C

VALUES_PER_WORD = 8  # 4-bit values in an int32
# Value i of a word is at bit 4 * (i // 2) + 16 * (i % 2): a shift by 4 j and the mask 0x000f000f
# give the pair 2 j, 2 j + 1, each in a half of its own.
_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device="cpu")


class Format(NamedTuple):
    """How a format stores a weight [N, K]."""

    value_dtype: torch.dtype
    scale_dtype: torch.dtype
    bits: int  # of a value
    element_values: int  # values in an element
    least_group: int  # values that share a scale: powers of two from here ...
    most_group: int  # ... to here; 0: all of a row


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
    "q8_0": values int8 [N, K]; scales float16 [N, K / 32]. GGUF's Q8_0, values and scales apart.
    """

    values: Tensor
    scales: Tensor
    format: str

    @property
    def shape(self) -> torch.Size:
        """[N, K], of the weight."""
        rows, elements = self.values.shape
        return torch.Size((rows, elements * FORMATS[self.format].element_values))

    @property
    def group(self) -> int:
        """Weights that share a scale: K for "int8"."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for, [N, K]; computed in fp32, then rounded to `dtype`."""
        values = unpack(self.values) if self.format == "int4" else self.values
        groups = values.float().unflatten(1, (-1, self.group))
        weight: Tensor = groups * self.scales.float().unsqueeze(2)
        return weight.flatten(1).to(dtype)

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(self.values.to(device), self.scales.to(device), self.format)


Weight: TypeAlias = Tensor | Quantized


def pack(values: Tensor, out: Tensor) -> None:
    """[N, K] integers -8 to 7, in any dtype, to [N, K / 8] words."""
    nibbles = values.to(torch.int32).bitwise_and_(15).unflatten(1, (-1, VALUES_PER_WORD))
    # No two have a bit in common, so the sum is their union.
    torch.sum(nibbles << _SHIFTS.to(out.device), dim=2, dtype=torch.int32, out=out)


def unpack(words: Tensor) -> Tensor:
    """[N, K / 8] words to [N, K] int32, -8 to 7."""
    nibbles = (words.unsqueeze(2) >> _SHIFTS.to(words.device)) & 15
    return ((nibbles ^ 8) - 8).flatten(1)


def parts_of(weights: Sequence[Weight]) -> tuple[list[Tensor], list[Tensor | None], list[str]]:
    """Their values, scales (None: a plain one has none) and formats, as the ops take them."""
    values: list[Tensor] = []
    scales: list[Tensor | None] = []
    formats: list[str] = []
    for weight in weights:
        if isinstance(weight, Quantized):
            values.append(weight.values)
            scales.append(weight.scales)
            formats.append(weight.format)
        else:
            values.append(weight)
            scales.append(None)
            formats.append(PLAIN)
    return values, scales, formats
