"""The ops of linear.py with products of torch: see routing.py.

Weights in 8 or 4 bits are widened for them, one after the other: of many tokens that costs less
than products slower than the vendor's would.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.rms_norm import rms_norm
from mistral_ext.ops.swiglu import swiglu
from mistral_ext.ops.weight import Quantized
from mistral_ext.ops.workspace import lane_of


def linear(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _side_by_side(_products("linear", x, values, scales, norm, eps))


def linear_residual(
    x: Tensor, values: list[Tensor], scales: list[Tensor], residual: Tensor
) -> None:
    _C.check_linear("linear_residual", x, values, scales, None, 0.0, residual)
    (weight,) = _plain_weights(values, scales, x.dtype)
    residual.addmm_(x, weight.T)


def linear_rope(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> Tensor:
    _C.check_linear_rope(x, values, scales, norm, eps, k_pool)
    out = _side_by_side(_products("linear_rope", x, values, scales, norm, eps))
    heads = [len(weight) // k_pool.shape[1] for weight in values]
    q, k, v = out.unflatten(1, (sum(heads), -1)).split(heads, dim=1)
    _C.rope(q, k, v, k_pool, v_pool, sequences, frequencies, window, lane_of(x))
    return out


def linear_argmax(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    _C.check_linear_argmax(x, values, scales, norm, eps, limit)
    out = _side_by_side(_products("linear_argmax", x, values, scales, norm, eps))
    largest, token_ids = out[:, :limit].max(dim=1)  # a NaN, if there is one
    return out, token_ids.where(largest > -torch.inf, -1)


def linear_swiglu(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    products = _products("linear_swiglu", x, values, scales, norm, eps)
    return swiglu(*(products if len(products) == 2 else products[0].chunk(2, dim=1)))


def _products(
    op: str,
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    norm: Tensor | None,
    eps: float,
) -> list[Tensor]:
    _C.check_linear(op, x, values, scales, norm, eps, None)
    x = x if norm is None else rms_norm(x, norm, eps)
    return [
        torch.nn.functional.linear(x, weight) for weight in _plain_weights(values, scales, x.dtype)
    ]


def _side_by_side(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _plain_weights(
    values: list[Tensor], scales: list[Tensor], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Of all formats, one after the other, so that no two widened ones take memory. Those that lie
    one below the other (`model.move_weights`) come as one."""
    if scales:
        yield from (_dequantize(*weight, dtype) for weight in zip(values, scales, strict=True))
    elif _adjacent(values):
        shape = (sum(map(len, values)), values[0].shape[1])
        yield values[0].as_strided(shape, values[0].stride())
    else:
        yield from values


def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    weight = Quantized(values, scales)
    out = torch.empty(weight.shape, dtype=dtype, device=values.device)
    _C.dequantize(values, scales, out, lane_of(values))
    return out


def _adjacent(weights: list[Tensor]) -> bool:
    first = weights[0].untyped_storage().data_ptr()
    return all(
        after.untyped_storage().data_ptr() == first
        and after.data_ptr() == before.data_ptr() + before.nbytes
        for before, after in itertools.pairwise(weights)
    )
