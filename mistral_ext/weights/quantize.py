"""Weights in 8 or 4 bits: how their values and scales are chosen.

A weight is its value times a scale. Which matrix gets how many bits is in `bits_of`: those of the
layers as many as wanted; the output matrix 8 in any case, because a token is chosen by it;
embeddings, of which a token reads one row, and norms stay as they are.

8 bits: one scale for each row, the largest magnitude over 127. Not floating point numbers (e4m3),
although some GPUs multiply them: they take as many bytes, which is what limits a decode step, and
leave 13 times the divergence on the demo (`bench/quality.py`), because weights need no more range
than a scale gives them.

4 bits: one scale for each group of neighbours in a row. A group's largest magnitude becomes -8,
the one value that is farther from zero than all others; so a scale may be negative. Then a few
smaller scales are tried, which cut off the largest weights and round all others finer, and the one
with the least squared error is taken. On normally distributed weights that leaves an error of 9.0 %
(root mean square) in groups of 64, where rounding to the largest magnitude over 7 leaves 10.8 %.

Scales are rounded to bfloat16 before values are computed from them, so that no error of theirs is
left in all values of a group alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext.ops.weight import VALUES_PER_WORD, Quantized, pack

GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64  # Mistral 7B takes 4.11 GB; groups of 32 are a little better and take 4.33 GB

# Scales to try, relative to that of the largest magnitude. Twice as many gain 0.3 % of the error.
_TRIED = (0.70, 0.76, 0.82, 0.88, 0.94, 1.00, 1.06)

# Weights worked on at a time: what is computed from them stays in the caches.
_BLOCK = 2**18

# Smaller scales would have an infinite inverse; the weights below them count as zeros.
_LEAST_SCALE = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantised.

    Raises:
        ValueError: naming what is wrong.
    """

    bits: int  # 8 or 4
    group: int | None = None  # weights that share a scale; only for 4 bits: None means the default

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits is {self.bits!r}, expected 8 or 4")
        if self.bits == 4 and self.group is None:
            object.__setattr__(self, "group", DEFAULT_GROUP)
        if self.bits == 8 and self.group is not None:
            raise ValueError(f"group is {self.group!r}, but 8-bit weights have one scale per row")
        if self.bits == 4 and self.group not in GROUPS:
            raise ValueError(f"group is {self.group!r}, expected 32, 64 or 128")

    @classmethod
    def from_name(cls, name: str) -> Quantization:
        """Of what callers give as `quantize`: "int8" or "int4"."""
        if name not in ("int8", "int4"):
            raise ValueError(f"quantize is {name!r}, expected 'int8', 'int4' or None")
        return cls(int(name.removeprefix("int")))

    def __str__(self) -> str:
        return f"int{self.bits}" if self.bits == 8 else f"int4 in groups of {self.group}"

    def bits_of(self, name: str) -> int | None:
        """Bits of a weight, by Mistral's name; None: it is not quantised."""
        if name == "output.weight":
            return 8
        is_matrix = name.startswith("layers.") and not name.endswith("_norm.weight")
        return self.bits if is_matrix else None

    def parts(self, name: str, shape: tuple[int, ...]) -> Quantized | None:
        """What `quantize` would make of a weight, as tensors on the meta device, which have dtypes
        and shapes only. None: it is not quantised.

        Raises:
            ValueError: the weight does not divide into groups.
        """
        bits = self.bits_of(name)
        if bits is None:
            return None
        group = self.group if bits == 4 else None
        return _empty(name, shape, group, torch.device("meta"))


def quantize(
    weight: Tensor, bits: int, group: int | None = None, name: str = "weight"
) -> Quantized:
    """Rounds a weight to 8 or 4 bits.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        bits: 8 or 4.
        group: 32, 64 or 128, for 4 bits; None: 64.
        name: for messages.

    Raises:
        ValueError: K is no multiple of the group, or a weight is NaN or infinite.
    """
    group = Quantization(bits, group).group
    quantized = _empty(name, tuple(weight.shape), group, weight.device)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    for block, values, scales in zip(
        weight.split(rows), quantized.values.split(rows), quantized.scales.split(rows), strict=True
    ):
        groups = block.float().unflatten(1, (scales.shape[1], -1))  # [rows, K / group, group]
        low, high = torch.aminmax(groups, dim=2, keepdim=True)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError(f"tensor {name!r} holds NaN or infinity and cannot be quantised")
        if bits == 8:
            rounded_scales = _rounded(torch.maximum(-low, high) / 127)
            values.copy_(_divide(groups, rounded_scales).clamp_(-127, 127).flatten(1))
        else:
            rounded_scales = _rounded(_best_scales(groups, low, high))
            pack(_divide(groups, rounded_scales).clamp_(-8, 7).flatten(1), out=values)
        scales.copy_(rounded_scales.squeeze(2))
    return quantized


def _empty(name: str, shape: tuple[int, ...], group: int | None, device: torch.device) -> Quantized:
    """Memory for a weight in 4 bits; without a group, in 8."""
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tensor {name!r} of shape {shape}: expected a matrix [N, K], K > 0")
    rows, columns = shape
    if group is None:
        values = torch.empty(shape, dtype=torch.int8, device=device)
        return Quantized(values, torch.empty(rows, 1, dtype=torch.bfloat16, device=device))
    if columns % group:
        raise ValueError(
            f"tensor {name!r} of shape {shape} cannot be quantised to 4 bits in groups of {group}: "
            f"its rows of {columns} are no multiple of that"
        )
    values = torch.empty(rows, columns // VALUES_PER_WORD, dtype=torch.int32, device=device)
    scales = torch.empty(rows, columns // group, dtype=torch.bfloat16, device=device)
    return Quantized(values, scales)


def _rounded(scales: Tensor) -> Tensor:
    """As bfloat16 will hold them, still in fp32; those that are too small become 0."""
    scales = scales.bfloat16().float()
    return torch.where(scales.abs() < _LEAST_SCALE, 0, scales)


def _divide(groups: Tensor, scales: Tensor) -> Tensor:
    """The nearest integers to weight / scale; 0 where the scale is 0."""
    inverse = torch.where(scales == 0, 0, scales.reciprocal())
    return (groups * inverse).round_()


def _best_scales(groups: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """[..., 1] scales for 4 bits, with the least squared error of those tried.

    With u the weights of a group and q the values that a tried scale gives, the best scale for
    these values is u.q / q.q, and it leaves the squared error u.u - (u.q)^2 / q.q.
    """
    largest = torch.where(high > -low, high, low)
    base = _rounded(largest / -8)
    u = groups * torch.where(base == 0, 0, base.reciprocal())  # -8 to 8
    q, product = torch.empty_like(u), torch.empty_like(u)
    most_gained = torch.zeros_like(base)
    best = torch.zeros_like(base)
    for tried in _TRIED:
        torch.mul(u, 1 / tried, out=q).round_().clamp_(-8, 7)
        uq = torch.mul(u, q, out=product).sum(2, keepdim=True)
        qq = torch.mul(q, q, out=product).sum(2, keepdim=True)
        gained = uq.square() / qq  # NaN for a group of zeros, which keeps the scale 0
        better = gained > most_gained
        most_gained = torch.where(better, gained, most_gained)
        best = torch.where(better, uq / qq, best)
    return base * best
