"""Reads the embeddings of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import fake_empty, register
from mistral_ext.ops.weight import FORMATS, PLAIN, Weight
from mistral_ext.ops.workspace import run


def embedding(token_ids: Tensor, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Reads rows of a matrix, the embeddings of tokens.

    The values of a quantised weight are computed in fp32 and rounded once. They equal those of the
    same rows of `weight.dequantize(dtype)`; only a zero may have the other sign.

    Args:
        token_ids: [T] int64, contiguous. Each must be the number of a row. On the CPU any other
            number raises ValueError. On a GPU it gives a row of NaN: to raise an error, the call
            would have to wait for the GPU.
        weight: [V, E], plain or `Quantized`. For a quantised weight on a CUDA device, E must be a
            multiple of 8.
        dtype: the dtype of the result. A plain weight must have this dtype. None: the dtype of a
            plain weight, or float32 for a quantised weight.

    Returns:
        [T, E].
    """
    if isinstance(weight, Tensor):
        out: Tensor = torch.ops.mistral_ext.embedding(
            token_ids, weight, None, PLAIN, dtype or weight.dtype
        )
        return out
    out = torch.ops.mistral_ext.embedding(token_ids, *weight[:3], dtype or torch.float32)
    return weight.in_order_of_inputs(out)


def _shape(token_ids: Tensor, values: Tensor, format: str) -> tuple[int, int]:
    elements = values.shape[-1]
    size = elements if format == PLAIN else FORMATS[format].size(elements)
    return token_ids.numel(), size


def _run(
    token_ids: Tensor, values: Tensor, scales: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(_shape(token_ids, values, format), dtype=dtype, device=values.device)
    run(_C.embedding(token_ids, values, scales, format, out), token_ids, out)
    return out


def _fake(
    token_ids: Tensor, values: Tensor, scales: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    return fake_empty(values, _shape(token_ids, values, format), dtype)


register(
    "embedding(Tensor token_ids, Tensor values, Tensor? scales, str format, ScalarType dtype) "
    "-> Tensor",
    _run,
    _fake,
)
