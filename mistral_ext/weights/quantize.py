"""Quantises weights: chooses their values and scales.

A weight is stored as a value, which is multiplied by a scale. `Quantization.format_of` gives the
format of each matrix (csrc/formats.h). The caller chooses the format of the layers' matrices, and
some of them may have another format (mixed.py). The output matrix gets 8 bits, because it decides
which token is chosen. Embeddings (a token reads only one row) and norms are not quantised.

With 8 bits the scale is the largest magnitude / 127. 32 neighbours in a row share a scale ("q8_0",
8.5 bits with the scales), or the whole row does ("int8", the format of older folders). Some GPUs
multiply floating point numbers of 8 bits (e4m3). Weights in e4m3 would be no faster: the bytes that
a decode step reads limit its speed, and e4m3 takes as many. They would lose more: on the demo
model, with a scale for each row, the KL divergence with e4m3 is 13 times that with "int8"
(`bench/quality.py`), because e4m3 spends bits on a range that weights do not need.

With 4 bits values come from a table of 16 values, denser near 0, where most weights are. In
"iq4_xs" (4.25 bits) 32 neighbours share a scale of 6 bits, and 256 neighbours share an fp16 number
by which these scales are multiplied. If the length of a row is no multiple of 256, the format is
"iq4_nl", with an fp16 scale for each 32 values (4.5 bits). A kernel (csrc/cpu/quantize.cpp) tries
several scales, and takes the scale with the least squared error. Errors of large weights count
more. On normally distributed weights this leaves an error of 7.5 % (root mean square, relative to
that of the weights).

"int4" is the format of older folders, and the format if a caller sets `group`. Its values are in
equal steps, and each group of neighbours in a row has a scale. The weight with the largest
magnitude becomes -8, the value with the largest magnitude, so a scale may be negative. Other scales
are tried, too. Smaller ones clip the largest weights and round all others finer. In groups of 64
(4.25 bits) this leaves an error of 9.0 %.

A scale is rounded to its stored dtype before values are computed with it. So the values compensate
the rounding of the scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mistral_ext.ops.dequantize import pack
from mistral_ext.ops.quantize import round_to_table
from mistral_ext.ops.weight import FORMATS, Quantized
from mistral_ext.weights.names import mistral_name

# The formats that a caller's quantize="int8" or "int4" chooses. The formats "int8" and "int4" are
# older ones.
NAMES = {"int8": "q8_0", "int4": "iq4_xs"}
_OF_TABLE = ("iq4_xs", "iq4_nl")
# The formats that `quantize` makes. Other formats come only from files.
_MADE = ("int8", "int4", "q8_0", *_OF_TABLE)
# If rows do not divide into the groups of a format (the key), they get another format (the value).
_FOR_OTHER_ROWS = {"iq4_xs": "iq4_nl"}
_DEFAULT_GROUPS = {"int4": 64}
_OUTPUT_FORMAT = "q8_0"

# Scales to try, relative to the scale of the largest magnitude. Twice as many scales would reduce
# the error only by 0.3 %.
_TRIED = (0.70, 0.76, 0.82, 0.88, 0.94, 1.00, 1.06)

# The number of weights that are rounded at a time. Intermediate results of so few weights stay in
# the caches.
_BLOCK = 2**18


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantised.

    Raises:
        ValueError: a field is wrong; the message names it.
    """

    format: str  # the format of the layers' matrices, a key of FORMATS
    # The number of weights that share a scale. None is replaced by the default of the format, but
    # stays None if a whole row shares a scale.
    group: int | None = None
    output_format: str = _OUTPUT_FORMAT
    # Formats of single weights, by Mistral's names (names.py). They replace the two formats above.
    formats: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (self.format, self.output_format, *self.formats.values()):
            if name not in FORMATS:
                raise ValueError(f"format is {name!r}, expected one of {', '.join(FORMATS)}")
        sizes = groups_of(self.format)
        if self.group is None:
            only = sizes[0] if len(sizes) == 1 else None
            object.__setattr__(self, "group", _DEFAULT_GROUPS.get(self.format, only))
        elif self.group not in sizes:
            expected = ", ".join(map(str, sizes)) or "None: a row has one scale"
            raise ValueError(
                f"group is {self.group!r}, expected {expected}, with format {self.format!r}"
            )

    @classmethod
    def from_name(cls, name: str) -> Quantization:
        """The quantisation for a caller's `quantize`: "int8" or "int4"."""
        if name not in NAMES:
            raise ValueError(f"quantize is {name!r}, expected 'int8', 'int4' or None")
        return cls(NAMES[name])

    @classmethod
    def from_bits(cls, bits: int, group: int | None = None) -> Quantization:
        """The quantisation for 8 bits ("q8_0") or 4 bits ("iq4_xs", or "int4" if `group` is
        given)."""
        if bits not in (8, 4):
            raise ValueError(f"bits is {bits!r}, expected 8 or 4")
        return cls("int4" if bits == 4 and group is not None else NAMES[f"int{bits}"], group)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Quantization:
        """Reads the quantisation from a `quantization_config`. Folders of version 0.1 or before
        have `bits` instead of `format`. Their formats are "int8" (a scale for each row) and
        "int4"."""
        group = settings.get("group_size")
        if "format" in settings:
            output_format = settings.get("output_format", _OUTPUT_FORMAT)
            return cls(settings["format"], group, output_format, _formats_of(settings))
        bits = settings.get("bits")
        if bits not in (8, 4):
            raise ValueError(f"bits is {bits!r}, expected 8 or 4")
        return cls(f"int{bits}", group, "int8")

    @property
    def bits(self) -> int:
        """The bits of a value in the layers, without the scales."""
        return FORMATS[self.format].bits

    def __str__(self) -> str:
        whole_rows = not groups_of(self.format)
        shown = self.format if whole_rows else f"{self.format} in groups of {self.group}"
        counts = Counter(self.formats.values())
        return ", ".join([shown, *(f"{count} matrices {name}" for name, count in counts.items())])

    def format_of(self, name: str, columns: int) -> str | None:
        """The format of a weight, by Mistral's name and the length of its rows. If the rows do not
        divide into groups of "iq4_xs", the format is "iq4_nl" instead. Returns None if the weight
        is not quantised."""
        if name in self.formats:
            wanted = self.formats[name]
        elif name == "output.weight":
            wanted = self.output_format
        elif name.startswith("layers.") and not name.endswith("_norm.weight"):
            wanted = self.format
        else:
            return None
        divides = columns % max(1, FORMATS[wanted].least_group) == 0
        return wanted if divides else _FOR_OTHER_ROWS.get(wanted, wanted)

    def group_of(self, format: str) -> int | None:
        """The number of neighbours that share scales in a format that `format_of` returned. None: a
        whole row shares them."""
        return self.group if format == self.format else Quantization(format).group

    def parts(self, name: str, shape: tuple[int, ...]) -> Quantized | None:
        """The result that `quantize` would return, as tensors on the meta device (dtypes and shapes
        only). Returns None if the weight is not quantised.

        Raises:
            ValueError: the weight does not divide into groups.
        """
        return self.empty(name, shape, torch.device("meta"))

    def empty(self, name: str, shape: tuple[int, ...], device: torch.device) -> Quantized | None:
        """Makes the tensors that `parts` describes, on a device, without setting their values.
        Returns None if the weight is not quantised."""
        chosen = self.format_of(name, shape[-1])
        if chosen is None:
            return None
        return _empty(name, shape, chosen, self.group_of(chosen), device)

    def quantize(
        self, name: str, weight: Tensor, stored_name: str, importance: Tensor | None = None
    ) -> Quantized | None:
        """Quantises the weight whose Mistral name is `name`. Returns None if this weight is not to
        be quantised. `stored_name` is for error messages. The function `quantize` explains
        `importance` and the errors."""
        chosen = self.format_of(name, weight.shape[-1])
        if chosen is None:
            return None
        return quantize(weight, chosen, self.group_of(chosen), stored_name, importance)


def _formats_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The formats of single weights in a `quantization_config`, by Mistral's names."""
    formats = settings.get("formats", {})
    if not isinstance(formats, dict) or not all(isinstance(v, str) for v in formats.values()):
        raise ValueError(
            f"formats is {formats!r:.60}, expected an object from names of tensors to formats"
        )
    return {mistral_name(name): form for name, form in formats.items()}


def has_table(name: str) -> bool:
    """Whether the values of a format come from a table. If they do, the importance of inputs counts
    in the choice of scales."""
    return name in _OF_TABLE


def groups_of(name: str) -> tuple[int, ...]:
    """The sizes of groups that a format allows. Empty: a row has one scale."""
    size, sizes = FORMATS[name].least_group, []
    while 0 < size <= FORMATS[name].most_group:
        sizes.append(size)
        size *= 2
    return tuple(sizes)


def quantize(
    weight: Tensor,
    format: str,
    group: int | None = None,
    name: str = "weight",
    importance: Tensor | None = None,
) -> Quantized:
    """Rounds a weight to a format.

    Args:
        weight: [N, K], float32, bfloat16 or float16.
        format: "int8", "int4", "q8_0", "iq4_xs" or "iq4_nl", see `mistral_ext.ops.Quantized`.
        group: the number of weights that share scales: 32, 64 or 128 for "int4". None: 64 for
            "int4", a whole row for "int8", else the only number that the format allows.
        name: the name of the weight, for error messages.
        importance: [K] float32, how much an error in each input counts. None: all inputs count the
            same. Only formats with a table use it.

    Raises:
        ValueError: this module cannot round to the format, K is not a multiple of the group, or a
            weight is NaN, infinite, or too large for the scales.
    """
    if format not in _MADE:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(_MADE)}")
    group = Quantization(format, group).group
    if format in _OF_TABLE:
        return _from_table(weight, format, group, name, importance)
    quantized = _empty(name, tuple(weight.shape), format, group, weight.device)
    rows = max(1, _BLOCK // max(1, weight.shape[1]))
    for block, values, scales in zip(
        weight.split(rows), quantized.values.split(rows), quantized.scales.split(rows), strict=True
    ):
        groups = block.float().unflatten(1, (scales.shape[1], -1))  # [rows, K / group, group]
        low, high = torch.aminmax(groups, dim=2, keepdim=True)
        largest = torch.maximum(-low, high)
        expect_finite(largest, name)
        if format == "int4":
            chosen = _rounded(_best_scales(groups, low, high), scales.dtype)
            pack(_divide(groups, chosen).clamp_(-8, 7).flatten(1), out=values)
        else:
            chosen = _rounded(largest / 127, scales.dtype)
            values.copy_(_divide(groups, chosen).clamp_(-127, 127).flatten(1))
        _expect_finite_scales(chosen, largest, name, format, scales.dtype)
        scales.copy_(chosen.squeeze(2))
    return quantized


def _from_table(
    weight: Tensor, format: str, group: int | None, name: str, importance: Tensor | None
) -> Quantized:
    cpu = torch.device("cpu")
    quantized = _empty(name, tuple(weight.shape), format, group, cpu)
    rows = weight.to(cpu)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    largest = round_to_table(rows, quantized, None if importance is None else importance.to(cpu))
    expect_finite(largest, name)
    # In "iq4_nl" all scales are fp16. In "iq4_xs" the scales of 256 values take 8 bytes, and only
    # the first 2 of these bytes are an fp16 number.
    halves = quantized.scales.view(torch.float16)
    halves = halves if format == "iq4_nl" else halves[:, ::4]
    _expect_finite_scales(halves, largest, name, format, halves.dtype)
    return quantized.to(weight.device)


def expect_finite(largest: Tensor, name: str) -> None:
    if not largest.isfinite().all():
        raise ValueError(f"tensor {name!r} holds NaN or infinity and cannot be quantised")


def _expect_finite_scales(
    scales: Tensor, largest: Tensor, name: str, format: str, dtype: torch.dtype
) -> None:
    if not scales.isfinite().all():
        raise ValueError(
            f"tensor {name!r} holds {largest.max().item():g}, whose scale {dtype} cannot hold: it "
            f"cannot be quantised to {format!r}"
        )


def _empty(
    name: str, shape: tuple[int, ...], format: str, group: int | None, device: torch.device
) -> Quantized:
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tensor {name!r} has shape {shape}, expected a matrix [N, K], K > 0")
    columns = shape[1]
    if group is not None and columns % group:
        raise ValueError(
            f"tensor {name!r} of shape {shape} has rows of {columns}, expected a multiple of "
            f"{group} to quantise it to {format!r} in groups of {group}"
        )
    return Quantized.empty(shape, format, group, device)


def _rounded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales rounded to `dtype`, still in fp32.

    If a scale is so small that its inverse would be infinite, the scale and the weights of its
    group become 0.
    """
    scales = scales.to(dtype).float()
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 0, scales)


def _divide(groups: Tensor, scales: Tensor) -> Tensor:
    """Rounds weight / scale to integers. The result is 0 where the scale is 0."""
    inverse = torch.where(scales == 0, 0, scales.reciprocal())
    return (groups * inverse).round_()


def _best_scales(groups: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Chooses the scales [..., 1] for 4 bits by their squared error.

    Let u be the weights of a group, in units of `base`, and q the values to which a tried scale
    rounds them. The best scale for these values is u.q / q.q. It leaves the squared error
    u.u - (u.q)^2 / q.q. So the values with the largest (u.q)^2 / q.q win, and `base` times their
    u.q / q.q is returned.
    """
    largest = torch.where(high > -low, high, low)
    base = _rounded(largest / -8, torch.bfloat16)
    u = groups * torch.where(base == 0, 0, base.reciprocal())  # -8 to 8, in units of `base`
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
