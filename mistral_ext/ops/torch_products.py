"""Computes the ops of linear.py with torch's matrix products, and not with our kernels. routing.py
chooses between the two: torch multiplies many tokens on a GPU, and float32 there.

Quantised weights are dequantised first. With many tokens this takes little of the time. Torch then
uses the GPU vendor's products, which are faster than ours would be.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.rms_norm import rms_norm
from mistral_ext.ops.swiglu import swiglu
from mistral_ext.ops.weight import Parts, Quantized
from mistral_ext.ops.workspace import execution_target


def linear(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _side_by_side(_products("linear", x, parts, norm, eps))


def linear_residual(
    x: Tensor,
    parts: Parts,
    residual: Tensor,
) -> None:
    _C.check_linear("linear_residual", x, *parts[:3], None, 0.0, residual, None)
    (weight,) = plain_weights(parts, x.dtype)
    residual.addmm_(x, weight.T)


def linear_rope(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> Tensor:
    _C.check_linear_rope(x, *parts[:3], norm, eps, k_pool)
    out = _side_by_side(_products("linear_rope", x, parts, norm, eps))
    heads = [len(weight) // k_pool.shape[1] for weight in parts.values]
    q, k, v = out.unflatten(1, (sum(heads), -1)).split(heads, dim=1)
    _C.rope(q, k, v, k_pool, v_pool, sequences, frequencies, window, execution_target(x))
    return out


def linear_argmax(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    _C.check_linear_argmax(x, *parts[:3], norm, eps, limit)
    out = _side_by_side(_products("linear_argmax", x, parts, norm, eps))
    # A row with a NaN or with only -inf gets -1. `max` returns the NaN, which is not above -inf.
    largest, token_ids = out[:, :limit].max(dim=1)
    return out, token_ids.where(largest > -torch.inf, -1)


def linear_swiglu(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    added: Tensor | None = None,
) -> Tensor:
    products = _products("linear_swiglu", x, parts, norm, eps, added)
    gate, up = products if len(products) == 2 else products[0].chunk(2, dim=1)
    if added is not None:
        half = gate.shape[1]
        gate, up = gate.add_(added[:, :half]), up.add_(added[:, half:])
    return swiglu(gate, up)


def linear_backward(d_out: Tensor, parts: Parts) -> Tensor:
    """Returns the gradient of x, the product [T, K] of d_out [T, N] with the weights [N, K].

    On a GPU this is used for any number of tokens, because there is no CUDA kernel of ours for it.

    Quantised weights are dequantised to the dtype of d_out (see `plain_weights`).
    """
    d_x: Tensor | None = None
    begin = 0
    for weight in plain_weights(parts, d_out.dtype):
        columns = d_out[:, begin : begin + len(weight)]
        begin += len(weight)
        d_x = columns @ weight if d_x is None else d_x.addmm_(columns, weight)
    assert d_x is not None
    return d_x


def _products(
    op: str,
    x: Tensor,
    parts: Parts,
    norm: Tensor | None,
    eps: float,
    added: Tensor | None = None,
) -> list[Tensor]:
    _C.check_linear(op, x, *parts[:3], norm, eps, None, added)
    x = x if norm is None else rms_norm(x, norm, eps)
    return [torch.nn.functional.linear(x, weight) for weight in plain_weights(parts, x.dtype)]


def _side_by_side(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def plain_weights(parts: Parts, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the weights as plain tensors. The weights of a `JoinedWeight` come as one tensor.
    Quantised weights are dequantised to `dtype`.

    To save memory, a weight is dequantised only when the caller asks for it. So a loop holds at
    most two dequantised weights at a time: the previous one, and the one that is being made.
    """
    if parts.whole is not None:
        yield parts.whole
        return
    for values, scales, name in zip(*parts[:3], strict=True):
        yield values if scales is None else Quantized(values, scales, name).dequantize(dtype)
