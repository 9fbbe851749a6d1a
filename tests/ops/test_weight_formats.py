"""What the bits of each format mean, read one by one, as csrc/formats.h says it."""

from __future__ import annotations

import struct

import pytest
import torch
from packed_weights import GROUPS, random_weight

from mistral_ext.ops import Quantized
from mistral_ext.ops.weight import FORMATS

TABLE = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def value_at(words: list[int], k: int, bits: int) -> int:
    """The unsigned value k of a row of words."""
    super_block, within = divmod(k, 256)
    words = words[super_block * 8 * bits :][: 8 * bits]
    block, i, e = within // 32, within // 8 % 4, within % 8
    shift = 4 * (e // 2) + 16 * (e % 2)
    value = words[4 * block + i] >> shift & 15
    if bits == 5:
        value |= (words[32 + block] >> (shift // 8 * 8 + 2 * i + shift % 8 // 4) & 1) << 4
    if bits == 6:
        further = words[32 + 8 * (i // 2) + block]
        value |= (further >> (shift // 8 * 8 + 4 * (i % 2) + shift % 8 // 2) & 3) << 4
    return value


def six_bits(raw: bytes, block: int) -> tuple[int, int]:
    """GGUF's get_scale_min_k4."""
    if block < 4:
        return raw[block] & 63, raw[block + 4] & 63
    low, scale, minimum = raw[block + 4], raw[block - 4], raw[block]
    return low & 15 | scale >> 6 << 4, low >> 4 | minimum >> 6 << 4


def decoded(weight: Quantized, k: int) -> float:
    """Value k of the first row."""
    words = [word & 0xFFFFFFFF for word in weight.values[0].tolist()]
    raw = weight.scales[0].contiguous().view(torch.uint8).numpy().tobytes()
    facts, form = FORMATS[weight.format], weight.format
    group_bytes = facts.group_scales * facts.scale_dtype.itemsize
    raw = raw[k // weight.group * group_bytes :][:group_bytes]
    block, q = k % 256 // 32, value_at(words, k, facts.bits)
    if form == "q4_0":
        return half(raw, 0) * (q - 16 if q > 7 else q)
    if form == "q4_1":
        return half(raw, 0) * q + half(raw, 2)
    if form == "q4_z":
        return half(raw, 0) * (q - half(raw, 2))
    if form in ("q4_k", "q5_k"):
        scale, minimum = six_bits(raw[4:], block)
        return half(raw, 0) * scale * q - half(raw, 2) * minimum
    if form == "q6_k":
        (scale,) = struct.unpack_from("b", raw, k % 256 // 16)
        return half(raw, 16) * scale * (q - 32)
    if form == "iq4_nl":
        return half(raw, 0) * TABLE[q]
    scale = raw[4 + block // 2] >> 4 * (block % 2) & 15
    scale |= (raw[2 + block // 4] >> 2 * (block % 4) & 3) << 4
    return half(raw, 0) * (scale - 32) * TABLE[q]


@pytest.mark.parametrize(("form", "group"), [(f, g) for f, all_g in GROUPS.items() for g in all_g])
def test_dequantize(form, group, generator):
    size = 1024
    weight = random_weight(form, (2, size), group, generator)
    assert weight.shape == (2, size)
    assert weight.group == group
    expected = torch.tensor([decoded(weight, k) for k in range(size)], dtype=torch.float64)
    # The formula is rounded to fp32 once.
    assert torch.equal(weight.dequantize()[0], expected.float())
