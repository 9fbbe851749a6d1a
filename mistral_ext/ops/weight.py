"""The weights of products: plain tensors, and `Quantized` weights, which name their format.

csrc/formats.h lists the formats. dequantize.py unpacks their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops import memory
from mistral_ext.ops.dequantize import DEQUANTIZE
from mistral_ext.ops.workspace import execution_target


class Format(NamedTuple):
    """How a format stores a weight [N, K]."""

    value_dtype: torch.dtype
    scale_dtype: torch.dtype
    bits: int  # the number of bits of a value
    group_scales: int  # the number of elements of the tensor `scales` for each group
    # The sizes of the smallest and of the largest group (values of a row that share scales). They
    # are powers of two, or both 0 if a group is always a whole row.
    least_group: int
    most_group: int

    def elements(self, size: int) -> int:
        """Returns how many elements the tensor `values` has for a row of `size` values (K)."""
        return size * self.bits // (8 * self.value_dtype.itemsize)

    def size(self, elements: int) -> int:
        """Returns K, the number of values of a row, if the tensor `values` has `elements` elements
        for it."""
        return elements * 8 * self.value_dtype.itemsize // self.bits


def _formats() -> dict[str, Format]:
    return {
        name: Format(
            getattr(torch, facts["value_dtype"]),
            getattr(torch, facts["scale_dtype"]),
            facts["bits"],
            facts["group_scales"],
            facts["least_group"],
            facts["most_group"],
        )
        for name, facts in _C.weight_formats().items()
        if facts["scale_dtype"] is not None
    }


FORMATS = _formats()
PLAIN = "plain"  # the format of a plain tensor


class Quantized(NamedTuple):
    """A weight [N, K] as integer values and scales. The formats are:

    "int8": values int8 [N, K], -127 to 127; scales bfloat16 [N, 1].
    "int4": words; scales bfloat16 [N, K / group], of either sign. Groups of 32, 64 or 128.
    "q8_0": values int8 [N, K]; scales float16 [N, K / 32]: groups of 32.
    "q4_0": words; scales float16 [N, K / group]. Groups of 32, 64 or 128.
    "q4_1": words; scales float16 [N, 2 K / 32]: a scale and a minimum in turn.
    "q4_z": words; scales float16 [N, 2 K / group]: a scale and a zero point, 0 to 16, in turn.
    Groups of 32, 64 or 128.
    "q4_k": words; scales uint8 [N, 16 K / 256]: 16 bytes for each 256 values.
    "q5_k": values int32 [N, 5 K / 32]; scales as in "q4_k".
    "q6_k": values int32 [N, 6 K / 32]; scales uint8 [N, 20 K / 256]: 20 bytes for each 256 values.
    "iq4_nl": words; scales float16 [N, K / 32].
    "iq4_xs": words; scales uint8 [N, 8 K / 256]: 8 bytes for each 256 values.

    "Words" stands for values of 4 bits, packed into int32 [N, K / 8]. Value k of a row is in word
    k // 8. With i = k % 8, it begins at bit 4 * (i // 2) + 16 * (i % 2). So a shift and a mask take
    out two neighbours at once, each in a half of the word. In "int4" and "q4_0" a value is in two's
    complement (-8 to 7), in other formats it is unsigned.

    A format with the name of a GGUF type holds the numbers of this type, with values and scales in
    separate tensors. csrc/formats.h has the formulas and the places of bits.
    """

    values: Tensor
    scales: Tensor
    format: str
    # [K] int64: in a product with x, value k of a row is multiplied by column order[k] of x. None:
    # by column k. Checkpoints of GPTQ with "act-order" need an order, because there the values that
    # share scales belong to columns that are not neighbours.
    order: Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        format: str,
        group: int | None = None,
        device: torch.device | None = None,
    ) -> Quantized:
        """Makes a weight whose tensors the caller has to fill.

        Args:
            shape: (N, K), the shape of the weight.
            format: a key of `FORMATS`.
            group: the number of values that share scales, a divisor of K. None: the smallest number
                that the format allows.
            device: the device of the tensors. None: torch's default device.
        """
        facts, (rows, size) = FORMATS[format], shape
        groups = size // (group or facts.least_group or size)
        device = device or torch.get_default_device()

        def empty(columns: int, dtype: torch.dtype) -> Tensor:
            if device.type == "cpu":
                return memory.empty((rows, columns), dtype)
            return torch.empty(rows, columns, dtype=dtype, device=device)

        return cls(
            empty(facts.elements(size), facts.value_dtype),
            empty(groups * facts.group_scales, facts.scale_dtype),
            format,
        )

    @property
    def shape(self) -> torch.Size:
        """[N, K], the shape of the weight."""
        rows, elements = self.values.shape
        return torch.Size((rows, FORMATS[self.format].size(elements)))

    @property
    def group(self) -> int:
        """The number of values that share scales. It is K for "int8"."""
        return self.shape[1] * FORMATS[self.format].group_scales // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight as a tensor [N, K], computed in fp32 and then rounded to `dtype`. Its
        columns are in the order of the columns of x, whatever `order` is."""
        if self.values.is_cuda:
            weight = torch.empty(self.shape, dtype=dtype, device=self.values.device)
            _C.dequantize(*self[:3], weight, execution_target(weight))
        else:
            weight = DEQUANTIZE[self.format](self.values, self.scales).to(dtype)
        return self.in_order_of_inputs(weight)

    def in_order_of_inputs(self, rows: Tensor) -> Tensor:
        """Puts the columns of dequantised rows [T, K] into the order of the columns of x."""
        return rows if self.order is None else rows.index_select(1, self.order.argsort())

    def to(self, device: torch.device | str) -> Quantized:
        order = None if self.order is None else self.order.to(device)
        return Quantized(self.values.to(device), self.scales.to(device), self.format, order)


Weight: TypeAlias = Tensor | Quantized


class JoinedWeight(NamedTuple):
    """Plain weights that are stacked, so that torch multiplies them as one matrix."""

    whole: Tensor  # [N, K], contiguous
    parts: tuple[Tensor, ...]  # [rows of the part, K], views of `whole`

    @classmethod
    def join(cls, weights: Sequence[Tensor], device: torch.device) -> JoinedWeight:
        """Copies weights [rows, K] of the same dtype to a device and stacks them."""
        rows = [len(weight) for weight in weights]
        whole = weights[0].new_empty((sum(rows), weights[0].shape[1]), device=device)
        parts = whole.split(rows)
        for part, weight in zip(parts, weights, strict=True):
            part.copy_(weight)
        return cls(whole, parts)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes


# Weights that are multiplied in one pass, as if they were stacked.
Weights: TypeAlias = Sequence[Weight] | JoinedWeight


def in_order(
    x: Tensor, weights: Weights, norm: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Puts the columns of x [T, K], and the weight `norm` [K] of an RMSNorm of x, into the order of
    the weights' values (`Quantized.order`).

    All weights of a call must have the same order. On a GPU and under torch.compile, orders are not
    compared: the call would have to wait for the GPU, and torch.compile cannot follow what depends
    on values.

    Raises:
        ValueError: the weights have different orders, or only some of them have an order.
    """
    given = [weight.order if isinstance(weight, Quantized) else None for weight in weights]
    orders = [order for order in given if order is not None]
    if not orders:
        return x, norm
    if len(orders) < len(given):
        raise ValueError("weights have an order in part, expected the same order or none")
    order = orders[0]
    if order.is_cpu and not torch.compiler.is_compiling():
        for i, other in enumerate(orders):
            if other is not order and not torch.equal(other, order):
                raise ValueError(
                    f"weights[{i}] has another order than weights[0], expected the same"
                )
    return x.index_select(1, order), None if norm is None else norm.index_select(0, order)


class Parts(NamedTuple):
    """Weights as arguments of torch's operators, which take tensors and texts, but not `Quantized`.
    Each weight has an element of `values`, of `scales` (None for a plain weight) and of `formats`.
    `whole` is the matrix of a `JoinedWeight`, or None for other weights."""

    values: list[Tensor]
    scales: list[Tensor | None]
    formats: list[str]
    whole: Tensor | None

    @property
    def outputs(self) -> int:
        """N, the number of rows of all weights together."""
        return sum(map(len, self.values))

    @property
    def inputs(self) -> int:
        """K, the length of a row."""
        elements = self.values[0].shape[1]
        name = self.formats[0]
        return elements if name == PLAIN else FORMATS[name].size(elements)


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
