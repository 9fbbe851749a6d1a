"""Splits blocks of GGUF files into the values and scales of our formats (csrc/repack.h)."""

from __future__ import annotations

from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.workspace import execution_target

# ggml's name of a block type -> our format for it. Block types without such a format are missing.
BLOCK_FORMATS: dict[str, str] = _C.block_formats()


def repack(
    blocks: Tensor, type: str, values: Tensor | None = None, scales: Tensor | None = None
) -> None:
    """Fills the values or the scales of a `Quantized` weight, or both, from blocks of a GGUF file.
    Nothing is rounded.

    The weight is [N, K] in the format `BLOCK_FORMATS[type]`. The number of values that share scales
    is the least that the format allows (`Format.least_group`).

    Args:
        blocks: [N, bytes of a row] uint8 on the CPU, at any address, such as the rows of a mapped
            file. The last axis is contiguous.
        type: the type of the blocks, a key of `BLOCK_FORMATS`.
        values, scales: the tensors of the weight to fill, on the CPU, contiguous. None: this tensor
            is not filled.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device, or the type has no
            format; the message names it.
    """
    _C.repack(blocks, type, values, scales, execution_target(blocks))
