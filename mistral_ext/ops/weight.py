"""Weights as the products take them: plain tensors, and `Quantized` ones of 8 or 4 bits."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

VALUES_PER_WORD = 8  # 4-bit values in an int32
# Value i of a word is at bit 4 * (i // 2) + 16 * (i % 2): a shift by 4 j and the mask 0x000f000f
# give the pair 2 j, 2 j + 1, each in a half of its own.
_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device="cpu")


class Quantized(NamedTuple):
    """A weight [N, K] in 8 or 4 bits.

    8 bits: values int8 [N, K], -127 to 127; scales bfloat16 [N, 1].
    4 bits: values int32 [N, K / 8]; scales bfloat16 [N, K / group], of either sign. Value k of a
    row, -8 to 7 in two's complement, is in word k // 8 at bit 4 * (i // 2) + 16 * (i % 2) with
    i = k % 8.
    """

    values: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        """[N, K], of the weight."""
        rows, columns = self.values.shape
        return torch.Size((rows, columns if self.bits == 8 else columns * VALUES_PER_WORD))

    @property
    def group(self) -> int:
        """Weights that share a scale: K for 8 bits."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for, [N, K]; computed in fp32, then rounded to `dtype`."""
        values = self.values if self.bits == 8 else unpack(self.values)
        groups: Tensor = values.float().unflatten(1, (-1, self.group))
        return (groups * self.scales.float().unsqueeze(2)).flatten(1).to(dtype)

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(self.values.to(device), self.scales.to(device))


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
