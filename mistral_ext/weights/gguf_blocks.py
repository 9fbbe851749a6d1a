"""Decodes the blocks in which GGUF files store weights.

A row of a matrix is a sequence of blocks of 32 or 256 neighbouring values. Each block has its own
scales, and an integer q for each value. In types with a minimum, a value is scale * q + minimum
(Q4_1, Q5_1) or scale * q - minimum (Q2_K, Q4_K, Q5_K). In the other types it is
scale * (q - offset), with one offset for each type. In IQ4_NL and IQ4_XS a table of 16 numbers,
indexed by q, takes the place of q - offset. The types Q2_K to Q6_K and IQ4_XS have two levels of
scales: a scale of 4, 6 or 8 bits for each 16 or 32 values, and an fp16 factor of these scales for
the block.

Decoding gives the same numbers as ggml's: values, scales and their products are computed in fp32,
in the same order.

Source: ggml's ggml-quants.c (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext.ops.dequantize import halves, looked_up, scaled, scales_and_minima

# The number of values that are decoded at a time. Intermediate results of so few values stay in the
# caches. From 2**15 values on, torch splits the work among threads, which here would wait for each
# other longer than they work.
_AT_ONCE = 2**15 - 1


@dataclass(frozen=True)
class BlockType:
    """One type of tensor data.

    Attributes:
        name: ggml's name of the type.
        values: the number of values in a block. The length of a row is a multiple of this number.
        nbytes: the number of bytes of a block.
        dtype: torch's dtype, if the type is not quantised. None for a quantised type.
        decode: a function from blocks [B, nbytes] uint8 to their values [B, values] fp32.
    """

    name: str
    values: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None

    def row_bytes(self, columns: int) -> int:
        """The bytes of a row of `columns` values. `columns` is a multiple of `values`."""
        return columns // self.values * self.nbytes


def decode(rows: Tensor, block_type: BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decodes a matrix, a few rows at a time.

    Args:
        rows: [N, bytes of a row] uint8, contiguous.
        block_type: the type of its blocks.
        dtype: the dtype of the result. Values are computed in fp32 and rounded to this dtype.

    Returns:
        [N, K], contiguous.
    """
    n_rows, n_bytes = rows.shape
    columns = n_bytes // block_type.nbytes * block_type.values
    decoded = torch.empty(n_rows, columns, dtype=dtype, device=rows.device)
    step = max(1, _AT_ONCE // max(1, columns))
    for some, out in zip(torch.split(rows, step), torch.split(decoded, step), strict=True):
        blocks = some.view(-1, block_type.nbytes)
        out.view(-1, block_type.values).copy_(block_type.decode(blocks))
    return decoded


# Functions that decode blocks. They take B blocks, each a row of bytes.


def _fields(data: Tensor, bits: int, run: int) -> Tensor:
    """Unpacks values of 1, 2 or 4 bits from data [B, bytes]. Returns [B, 8 / bits * bytes] uint8.

    Of every `run` bytes, the lowest bits hold the first `run` values, the next higher bits hold the
    next `run` values, and so on.
    """
    runs = data.reshape(len(data), -1, run)
    # A shift by a tensor of shifts would be slower, because torch computes it value by value.
    fields = torch.stack([runs >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim=2)
    return fields.flatten(1)


# Blocks of 32 values


def _q4_0(blocks: Tensor) -> Tensor:
    return halves(blocks, 0) * (_fields(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return halves(blocks, 0) * _fields(blocks[:, 4:], 4, 16) + halves(blocks, 2)


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    return _fields(low, 4, 16) | _fields(high, 1, 1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    values = _five_bits(blocks[:, 2:6], blocks[:, 6:])
    return halves(blocks, 0) * (values.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return halves(blocks, 0) * values + halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return halves(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return halves(blocks, 0) * looked_up(_fields(blocks[:, 2:], 4, 16))


# Blocks of 256 values


def _q2_k(blocks: Tensor) -> Tensor:
    packed, d, dmin = blocks[:, :16], halves(blocks, 80), halves(blocks, 82)
    return scaled(_fields(blocks[:, 16:80], 2, 32), d * (packed & 15), dmin * (packed >> 4))


def _q3_k(blocks: Tensor) -> Tensor:
    values = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    scales = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4
    return scaled(values.float() - 4, halves(blocks, 108) * (scales.float() - 32))


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    d, dmin = halves(blocks, 0), halves(blocks, 2)
    return scaled(_fields(blocks[:, 16:], 4, 32), d * scales, dmin * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    d, dmin = halves(blocks, 0), halves(blocks, 2)
    values = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return scaled(values, d * scales, dmin * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    values = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].view(torch.int8)
    return scaled(values.float() - 32, halves(blocks, 208) * scales)


def _iq4_xs(blocks: Tensor) -> Tensor:
    scales = _fields(blocks[:, 4:8], 4, 1) | _fields(blocks[:, 2:4], 2, 1) << 4
    values = looked_up(_fields(blocks[:, 8:], 4, 16))
    return scaled(values, halves(blocks, 0) * (scales.float() - 32))


def _plain(name: str, dtype: torch.dtype) -> BlockType:
    return BlockType(name, 1, dtype.itemsize, lambda blocks: blocks.view(dtype).float(), dtype)


# The key is the number of the type in files.
BLOCK_TYPES = {
    0: _plain("F32", torch.float32),
    1: _plain("F16", torch.float16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    30: _plain("BF16", torch.bfloat16),
}

# The names, for messages, of types that cannot be read.
OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
