"""Unpacks the values and scales of quantised weights with torch. csrc/formats.h has the formulas.

The products of values and scales are computed in fp32, in the same order as in ggml. So a weight
from a GGUF file has exactly the numbers that ggml computes from its blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VALUES_PER_WORD = 8  # the number of 4-bit values in an int32
# Value i of a word begins at bit 4 * (i // 2) + 16 * (i % 2). A shift by 4 j and the mask
# 0x000f000f therefore give values 2 j and 2 j + 1, one in each half of the word.
_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device="cpu")

SUPER_BLOCK = 256  # the number of values that share scales in q4_k, q5_k, q6_k and iq4_xs
_BLOCKS = 8  # the number of blocks of 32 values in a super-block

# The table from which iq4_nl and iq4_xs take their values (kTable4 of csrc/formats.h).
TABLE = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    dtype=torch.float32,
    device="cpu",
)


def pack(values: Tensor, out: Tensor) -> None:
    """Packs [N, K] integers, -8 to 7 or 0 to 15, of any dtype, into [N, K / 8] words."""
    # Arithmetic on bytes is several times as fast as on words. Value 4 i + 2 j + k of a word (i, j
    # and k are 0 or 1) is nibble j of byte 2 k + i.
    nibbles = values.to(torch.int8).view(torch.uint8).unflatten(1, (-1, 2, 2, 2)) & 15
    low, high = nibbles.unbind(3)  # [N, K / 8, i, k]
    packed = (low | high << 4).transpose(2, 3)
    out.view(torch.uint8).unflatten(1, (-1, 2, 2)).copy_(packed)


def unpack(words: Tensor) -> Tensor:
    """Unpacks [N, K / 8] words into [N, K] int32, signed: -8 to 7."""
    return (unpack_unsigned(words) ^ 8) - 8


def unpack_unsigned(words: Tensor) -> Tensor:
    """Unpacks [N, K / 8] words into [N, K] int32, unsigned: 0 to 15."""
    return ((words.unsqueeze(2) >> _SHIFTS.to(words.device)) & 15).flatten(1)


def unpack_wide(words: Tensor, bits: int) -> Tensor:
    """Unpacks the values of "q5_k" (bits = 5) or "q6_k" (bits = 6), [N, bits * K / 32] words, into
    [N, K] int32. Each super-block has first the words with the low 4 bits of its values, then
    *further words* with their other bits."""
    of_block = SUPER_BLOCK // VALUES_PER_WORD
    rows = words.unflatten(1, (-1, bits * SUPER_BLOCK // 32))
    low = unpack_unsigned(rows[..., :of_block].flatten(0, 1)).view(*rows.shape[:2], SUPER_BLOCK)
    shifts = _further_shifts(bits, words.device)
    further = rows[..., of_block:].view(*rows.shape[:2], len(shifts), _BLOCKS, 1)
    high = (further >> shifts.unsqueeze(1)) & (2 ** (bits - 4) - 1)
    values: Tensor = low | high.transpose(2, 3).flatten(2) << 4
    return values.flatten(1)


def _further_shifts(bits: int, device: torch.device) -> Tensor:
    """Returns for each value of a block of 32 where its other bits begin in their further word
    (`fifth_bit_shift` and `high_bits_shift` in csrc/formats.h).

    The result has a row for each further word of the block (one for "q5_k", two for "q6_k"), with
    an element for each value that has bits in this word.
    """
    per_value = bits - 4
    word = torch.arange(4, dtype=torch.int32, device="cpu").unsqueeze(1)
    within = _SHIFTS % 8 // 4 * per_value
    if bits == 5:
        shifts = _SHIFTS // 8 * 8 + 2 * word + within
    else:
        shifts = _SHIFTS // 8 * 8 + 4 * (word % 2) + within
    return shifts.view(per_value, -1).to(device)


def scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpacks the scales and minima of "q4_k" and "q5_k", [..., 8] each and 0 to 63, from 12 bytes
    [..., 12].

    For i from 0 to 3, the bytes hold, from the lowest bit on:

        byte i      scale i (6 bits), the high 2 bits of scale i + 4
        byte i + 4  minimum i (6 bits), the high 2 bits of minimum i + 4
        byte i + 8  the low 4 bits of scale i + 4, the low 4 bits of minimum i + 4
    """
    first_scales, first_minima, low = torch.split(packed, 4, dim=-1)
    last_scales = low & 15 | (first_scales >> 6) << 4
    last_minima = low >> 4 | (first_minima >> 6) << 4
    return (
        torch.cat([first_scales & 63, last_scales], dim=-1),
        torch.cat([first_minima & 63, last_minima], dim=-1),
    )


def halves(data: Tensor, begin: int) -> Tensor:
    """Reads the fp16 number at byte `begin` of each row of `data` [..., bytes] uint8, as [..., 1]
    fp32."""
    return data[..., begin : begin + 2].contiguous().view(torch.float16).float()


def scaled(values: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """Returns scale * value - minimum, [N, K] fp32.

    Args:
        values: [N, K], of any dtype. If they are fp32 they are overwritten.
        scales: [N, ...], with a scale for each group of neighbours in a row.
        minima: [N, ...], with a minimum for each group. None: nothing is subtracted.
    """
    factors = scales.flatten(1)
    groups: Tensor = values.float().unflatten(1, (factors.shape[1], -1))
    groups.mul_(factors.unsqueeze(2))
    if minima is not None:
        groups.sub_(minima.flatten(1).unsqueeze(2))
    return groups.flatten(1)


def _signed(values: Tensor, scales: Tensor) -> Tensor:
    return scaled(unpack(values), scales.float())


def _bytes(values: Tensor, scales: Tensor) -> Tensor:
    return scaled(values, scales.float())


def _q4_1(values: Tensor, scales: Tensor) -> Tensor:
    pairs = scales.float().unflatten(1, (-1, 2))
    return scaled(unpack_unsigned(values), pairs[..., 0], -pairs[..., 1])


def _q4_z(values: Tensor, scales: Tensor) -> Tensor:
    d, zero = scales.float().unflatten(1, (-1, 2)).unbind(2)
    return scaled(unpack_unsigned(values), d, d * zero)


def _q4_k(values: Tensor, scales: Tensor) -> Tensor:
    return _with_minima(unpack_unsigned(values), scales)


def _q5_k(values: Tensor, scales: Tensor) -> Tensor:
    return _with_minima(unpack_wide(values, 5), scales)


def _with_minima(values: Tensor, packed: Tensor) -> Tensor:
    of_super_block = packed.unflatten(1, (-1, 16))
    scales, minima = scales_and_minima(of_super_block[..., 4:])
    d, dmin = halves(of_super_block, 0), halves(of_super_block, 2)
    return scaled(values, d * scales, dmin * minima)


def _q6_k(values: Tensor, scales: Tensor) -> Tensor:
    of_super_block = scales.unflatten(1, (-1, 20))
    factors = halves(of_super_block, 16) * of_super_block[..., :16].view(torch.int8)
    return scaled(unpack_wide(values, 6) - 32, factors)


def looked_up(indices: Tensor) -> Tensor:
    """Returns the values of iq4_nl and iq4_xs in fp32, given their indices in the table (0 to 15),
    of any shape and dtype."""
    return TABLE.to(indices.device).index_select(0, indices.flatten().int()).view(indices.shape)


def _iq4_nl(values: Tensor, scales: Tensor) -> Tensor:
    return scaled(looked_up(unpack_unsigned(values)), scales.float())


def _iq4_xs(values: Tensor, scales: Tensor) -> Tensor:
    of_super_block = scales.unflatten(1, (-1, 8))
    low, high = of_super_block[..., 4:], of_super_block[..., 2:4]
    steps = torch.arange(0, 8, 2, dtype=torch.uint8, device=scales.device)
    fours = torch.stack([low & 15, low >> 4], dim=-1).flatten(-2)
    twos = (high.unsqueeze(-1) >> steps & 3).flatten(-2)
    factors = halves(of_super_block, 0) * ((fours | twos << 4).float() - 32)
    return scaled(looked_up(unpack_unsigned(values)), factors)


# Each function takes values and scales as `Quantized` has them, and returns the weight [N, K] in
# fp32.
DEQUANTIZE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int8": _bytes,
    "int4": _signed,
    "q8_0": _bytes,
    "q4_0": _signed,
    "q4_1": _q4_1,
    "q4_z": _q4_z,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
