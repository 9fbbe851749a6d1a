"""Matrices of GGUF files in the formats of our kernels, without loss.

A file has the scales of each block beside its values; a `Quantized` weight has them apart, and its
values in another order. Q5_0 becomes "q8_0" and Q3_K "q6_k", which have more bits for the same
numbers; all other types become the format of their own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mistral_ext.ops.dequantize import pack, pack_wide
from mistral_ext.ops.weight import FORMATS
from mistral_ext.weights import gguf_blocks
from mistral_ext.weights.gguf_blocks import BlockType, in_steps

_Part = Callable[[Tensor], Tensor]  # from blocks [B, bytes of a block] uint8


@dataclass(frozen=True)
class Planes:
    """How the blocks of a type are taken apart.

    Attributes:
        format: a key of `FORMATS`.
        values: [B, bytes of a block] uint8 to [B, elements of the values].
        scales: [B, bytes of a block] uint8 to [B, elements of the scales].
    """

    format: str
    values: _Part
    scales: _Part


def values_of(rows: Tensor, block_type: BlockType) -> Tensor:
    """The values of a matrix as `Quantized` has them.

    Args:
        rows: [N, bytes of a row] uint8, contiguous.
        block_type: the type of its blocks, one of `PLANES`.
    """
    planes = PLANES[block_type.name]
    facts = FORMATS[planes.format]
    return in_steps(
        rows, block_type, planes.values, facts.elements(block_type.values), facts.value_dtype
    )


def scales_of(rows: Tensor, block_type: BlockType) -> Tensor:
    """The scales of a matrix as `Quantized` has them; arguments as for `values_of`."""
    planes = PLANES[block_type.name]
    facts = FORMATS[planes.format]
    elements = block_type.values // facts.least_group * facts.group_scales
    return in_steps(rows, block_type, planes.scales, elements, facts.scale_dtype)


def _words(integers: _Part) -> _Part:
    def words(blocks: Tensor) -> Tensor:
        values = integers(blocks)
        size = len(values), values.shape[1] // 8
        out = torch.empty(size, dtype=torch.int32, device=values.device)
        pack(values, out)
        return out

    return words


def _wide(integers: _Part, bits: int) -> _Part:
    return lambda blocks: pack_wide(integers(blocks), bits)


def _first(count: int, dtype: torch.dtype) -> _Part:
    """The first `count` bytes of each block."""
    return lambda blocks: blocks[:, :count].contiguous().view(dtype)


def _q4_0_signed(blocks: Tensor) -> Tensor:
    return gguf_blocks.q4_0_integers(blocks) ^ 8  # q - 8 in two's complement


def _q5_0_signed(blocks: Tensor) -> Tensor:
    return gguf_blocks.q5_0_integers(blocks).view(torch.int8) - 16


def _q8_0_signed(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8)


def _q3_k_integers(blocks: Tensor) -> Tensor:
    return gguf_blocks.q3_k_integers(blocks) + 28  # q - 4 is (q + 28) - 32


def _q6_k_scales(blocks: Tensor) -> Tensor:
    return functional.pad(blocks[:, 192:210], (0, 2))


def _q3_k_scales(blocks: Tensor) -> Tensor:
    scales = (gguf_blocks.q3_k_scales(blocks).view(torch.int8) - 32).view(torch.uint8)
    return functional.pad(torch.cat([scales, blocks[:, 108:110]], dim=1), (0, 2))


_HALF = _first(2, torch.float16)
_K_SCALES = _first(16, torch.uint8)

# By the names of types.
PLANES = {
    "Q4_0": Planes("q4_0", _words(_q4_0_signed), _HALF),
    "Q4_1": Planes("q4_1", _words(gguf_blocks.q4_1_integers), _first(4, torch.float16)),
    "Q5_0": Planes("q8_0", _q5_0_signed, _HALF),
    "Q8_0": Planes("q8_0", _q8_0_signed, _HALF),
    "Q3_K": Planes("q6_k", _wide(_q3_k_integers, 6), _q3_k_scales),
    "Q4_K": Planes("q4_k", _words(gguf_blocks.q4_k_integers), _K_SCALES),
    "Q5_K": Planes("q5_k", _wide(gguf_blocks.q5_k_integers, 5), _K_SCALES),
    "Q6_K": Planes("q6_k", _wide(gguf_blocks.q6_k_integers, 6), _q6_k_scales),
    "IQ4_NL": Planes("iq4_nl", _words(gguf_blocks.iq4_nl_integers), _HALF),
    "IQ4_XS": Planes("iq4_xs", _words(gguf_blocks.iq4_xs_integers), _first(8, torch.uint8)),
}
