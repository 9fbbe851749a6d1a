"""Random weights in the formats that come from files: random bits, and scales of a likely size."""

from __future__ import annotations

import torch

from mistral_ext.ops import Quantized
from mistral_ext.ops.weight import FORMATS

# The formats and the groups of each.
GROUPS = {
    "q4_0": (32, 64, 128),
    "q4_1": (32,),
    "q4_z": (32, 64, 128),
    "q4_k": (256,),
    "q5_k": (256,),
    "q6_k": (256,),
    "iq4_nl": (32,),
    "iq4_xs": (256,),
}
# Where the bytes of scales hold fp16 numbers, and how many bytes come before the next group.
_HALVES = {"q4_k": ((0, 2), 16), "q5_k": ((0, 2), 16), "q6_k": ((16,), 20), "iq4_xs": ((0,), 8)}


def random_weight(
    form: str, shape: tuple[int, int], group: int, generator: torch.Generator
) -> Quantized:
    facts, (rows, size) = FORMATS[form], shape
    values = torch.randint(
        -(2**31), 2**31, (rows, facts.elements(size)), generator=generator, dtype=torch.int64
    )
    count = size // group
    if form not in _HALVES:
        scales = torch.randn(rows, count, facts.group_scales, generator=generator) / 8
        if form == "q4_z":
            scales[..., 1] = torch.randint(0, 17, (rows, count), generator=generator)
        return Quantized(values.to(torch.int32), scales.half().flatten(1), form)
    places, nbytes = _HALVES[form]
    scales = torch.randint(0, 256, (rows, count, nbytes), generator=generator, dtype=torch.uint8)
    for place in places:
        halves = torch.randn(rows, count, 1, generator=generator).half() / 512
        scales[..., place : place + 2] = halves.view(torch.uint8)
    if form == "q6_k":
        scales[..., 18:] = 0
    return Quantized(values.to(torch.int32), scales.flatten(1), form)


def random_weights(shape: tuple[int, int], generator: torch.Generator) -> dict[str, Quantized]:
    """One in every format and group that K allows."""
    return {
        f"{form}, groups of {group}": random_weight(form, shape, group, generator)
        for form, groups in GROUPS.items()
        for group in groups
        if shape[1] % group == 0
    }
