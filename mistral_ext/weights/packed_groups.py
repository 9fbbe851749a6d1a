"""Converts matrices of packed checkpoints to the formats of our kernels. Nothing is lost, except
that bfloat16 scales near 0 may be rounded, if the format has float16 scales.

In GPTQ, AWQ and compressed-tensors a weight is scale * (q - zero), with a scale, and perhaps a zero
point, for each group of neighbours in a row. The three differ in the order of bits, and in how they
store zero points. Our formats have groups of 32, 64 or 128. A larger group becomes several of our
groups, which all have its scale and zero point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mistral_ext.ops import Quantized, memory

_log = logging.getLogger("mistral_ext")

_GROUPS = (128, 64, 32)  # group sizes of our formats
# A word of `Quantized` has 8 values of 4 bits. _LOW has the indices of the values in the low halves
# of its four bytes, _HIGH those of the values in the high halves.
_LOW, _HIGH = [0, 4, 1, 5], [2, 6, 3, 7]
# The number of values that are converted at a time. Intermediate results of so few values stay in
# the caches. In words of 8 values these are fewer than 2**15 words. From 2**15 words on, torch
# would use several threads, which here would wait for each other longer than they work.
_AT_ONCE = 2**18 - 1
# In AWQ the values of 8 rows share words, so the number of rows that are read at a time is a
# multiple of 8.
_ROWS = 8
# In this int32 word each of the 8 values of 4 bits is 8. If q is a value from 0 to 15, the bits of
# q ^ 8 are those of q - 8 in two's complement. So `^ _MIDDLES` subtracts 8 from all values of a
# word.
_MIDDLES = 0x88888888 - 2**32


@dataclass(frozen=True)
class GroupedMatrix:
    """A matrix [N, K] of integers with scales for groups. It knows how to read itself from a file.

    Attributes:
        name: the name of the matrix, for error messages.
        shape: the shape [N, K] of the matrix.
        bits: the bits of an integer, 4 or 8.
        group: the number of integers of a row that share a scale. It divides K.
        words: a function that reads the integers of a range of rows, as [rows, K * bits / 32] int32
            words. The first integer of a word is in its lowest bits.
        scale: a function that reads the scales, [N, K / group] float16 or bfloat16.
        scale_dtype: the dtype of the scales.
        zero: a function that reads the zero points, [N, K / group] integers from 0 to 15. None: all
            zero points are 2^(bits - 1).
        order: [K] int64, indices of stored columns: first those of group 0, then those of group 1,
            and so on. None: the columns are stored in this order already.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    words: Callable[[slice], Tensor]
    scale: Callable[[], Tensor]
    scale_dtype: torch.dtype
    zero: Callable[[], Tensor] | None = None
    order: Tensor | None = None

    @cached_property
    def form(self) -> Quantized:
        """The matrix as `Quantized`, on the meta device (dtypes and shapes only).

        Raises:
            ValueError: the group size is no multiple of 32.
        """
        group = next((group for group in _GROUPS if self.group % group == 0), None)
        if group is None:
            raise ValueError(
                f"{self.name!r} has groups of {self.group}, expected a multiple of {_GROUPS[-1]}"
            )
        if self.bits == 8:
            format, group = "q8_0", 32
        elif self.zero is not None:
            format = "q4_z"
        else:
            format = "int4" if self.scale_dtype == torch.bfloat16 else "q4_0"
        empty = Quantized.empty(self.shape, format, group, torch.device("meta"))
        return empty._replace(order=self.order)

    def values(self) -> Tensor:
        """Reads the integers, and returns them as the `values` of a `Quantized`."""
        rows, size = self.shape
        out = memory.empty(self.form.values.shape, self.form.values.dtype)
        step = max(_ROWS, _AT_ONCE // size // _ROWS * _ROWS)
        for begin in range(0, rows, step):
            block = slice(begin, min(rows, begin + step))
            self._convert(self.words(block), out[block])
        return out

    def _convert(self, words: Tensor, out: Tensor) -> None:
        if self.bits == 8:
            integers = words.view(torch.uint8)
            if self.order is not None:
                integers = integers.index_select(1, self.order)
            # If q is a value from 0 to 255, inverting its highest bit gives the bits of q - 128.
            torch.bitwise_xor(integers.view(torch.int8), -128, out=out)
            return
        out.copy_(_pairs_apart(words) if self.order is None else _reordered(words, self._places))
        if self.zero is None:
            out ^= _MIDDLES

    @cached_property
    def _places(self) -> np.ndarray:
        """The argument `places` with which `_reordered` puts the integers of a row into `order`."""
        assert self.order is not None
        evens_then_odds = self.order // 2 + self.order % 2 * (len(self.order) // 2)
        eights = evens_then_odds.view(-1, 8)
        return torch.cat([eights[:, _LOW].flatten(), eights[:, _HIGH].flatten()]).numpy()

    def scales(self) -> Tensor:
        """Reads the scales and zero points, and returns them as the `scales` of a `Quantized`.

        Raises:
            ValueError: a scale is not finite, or too large for fp16.
        """
        stored = self.scale()
        scale = stored.to(self.form.scales.dtype)
        if not scale.isfinite().all():
            raise ValueError(
                f"{self.name!r} has scales that are not finite or too large for {scale.dtype}"
            )
        if not torch.equal(scale.to(stored.dtype), stored):
            _log.warning("%r has scales so small that %s rounds them", self.name, scale.dtype)
        numbers = [scale] if self.zero is None else [scale, self.zero().to(scale.dtype)]
        return (
            torch.stack(numbers, dim=2)
            .repeat_interleave(self.group // self.form.group, dim=1)
            .flatten(1)
        )

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Reads the matrix and decodes it. Values are computed in fp32 and rounded to `dtype`."""
        weight = self.form._replace(values=self.values(), scales=self.scales())
        out = memory.empty(self.shape, dtype)
        step = max(1, _AT_ONCE // self.shape[1])
        for begin in range(0, self.shape[0], step):
            rows = slice(begin, begin + step)
            some = weight._replace(values=weight.values[rows], scales=weight.scales[rows])
            out[rows] = some.dequantize()
        return out


def sorted_order(g_idx: Tensor, group: int) -> Tensor | None:
    """The order of columns in which the columns of each group are neighbours.

    Args:
        g_idx: [K], the group of each column.
        group: the number of columns of a group.

    Returns:
        [K] int64, the places of the columns, or None if the columns are already in this order.

    Raises:
        ValueError: a group does not have `group` columns.
    """
    in_order = torch.arange(len(g_idx), device=g_idx.device) // group
    if torch.equal(g_idx.long(), in_order):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), in_order):
        raise ValueError(f"has groups of several sizes, expected {group} columns in each")
    return order


# Functions for int32 words of 8 values of 4 bits. The first value is in the lowest bits.


def unpack_along(words: Tensor, dim: int) -> Tensor:
    """Unpacks words of 8 values of 4 bits: the axis `dim` becomes 8 times as long."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    shifts = shifts.view(-1, *[1] * (words.dim() - dim - 1))
    fields: Tensor = words.unsqueeze(dim + 1) >> shifts & 15
    return fields.flatten(dim, dim + 1)


def swap_nibbles(words: Tensor) -> None:
    """Exchanges value j of words[i] with value i of words[j], for all i and j, in place. `words` is
    [8, ...]."""
    for half, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        low, high = words.unflatten(0, (-1, 2, half)).unbind(1)
        differing = ((low >> 4 * half) ^ high) & mask
        high ^= differing
        low ^= differing << 4 * half


def _reordered(words: Tensor, places: np.ndarray) -> Tensor:
    """Puts the values of words into the order `places`, and packs them as `Quantized` does.

    numpy selects columns several times as fast as torch.

    Args:
        words: [N, K / 8], with 8 values of 4 bits each.
        places: [K], indices of a row's values. The index counts the values in even columns first,
            then those in odd columns. The first K / 2 places choose the values for the low halves
            of the result's bytes, and the other places choose the values for the high halves.
    """
    pairs = words.numpy().view(np.uint8)
    values = np.concatenate([pairs & 15, pairs >> 4], axis=1).take(places, axis=1, mode="clip")
    low, high = np.split(values.view(np.int32), 2, axis=1)
    return torch.from_numpy(low | high << 4)


def _pairs_apart(words: Tensor) -> Tensor:
    """Puts the values of each word into the order of `Quantized`: values at even places go into the
    low half of the word, values at odd places into the high half."""
    return _gather(words) | _gather(words >> 4) << 16


def _gather(words: Tensor) -> Tensor:
    """Moves the low 4 bits of each byte into the low half of the word."""
    words = words & 0x0F0F0F0F
    words = (words | words >> 4) & 0x00FF00FF
    return (words | words >> 8) & 0x0000FFFF
