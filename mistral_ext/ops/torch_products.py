"""The ops of linear.py with products of torch: see routing.py.

Weights with scales are widened for them, one after the other: of many tokens that costs less
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
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _side_by_side(_products("linear", x, values, scales, formats, norm, eps))


def linear_residual(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    residual: Tensor,
) -> None:
    _C.check_linear("linear_residual", x, values, scales, formats, None, 0.0, residual)
    (weight,) = _plain_weights(values, scales, formats, x.dtype)
    residual.addmm_(x, weight.T)


def linear_rope(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> Tensor:
    _C.check_linear_rope(x, values, scales, formats, norm, eps, k_pool)
    out = _side_by_side(_products("linear_rope", x, values, scales, formats, norm, eps))
    heads = [len(weight) // k_pool.shape[1] for weight in values]
    q, k, v = out.unflatten(1, (sum(heads), -1)).split(heads, dim=1)
    _C.rope(q, k, v, k_pool, v_pool, sequences, frequencies, window, lane_of(x))
    return out


def linear_argmax(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    _C.check_linear_argmax(x, values, scales, formats, norm, eps, limit)
    out = _side_by_side(_products("linear_argmax", x, values, scales, formats, norm, eps))
    largest, token_ids = out[:, :limit].max(dim=1)  # a NaN, if there is one
    return out, token_ids.where(largest > -torch.inf, -1)


def linear_swiglu(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    products = _products("linear_swiglu", x, values, scales, formats, norm, eps)
    return swiglu(*(products if len(products) == 2 else products[0].chunk(2, dim=1)))


def _products(
    op: str,
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    norm: Tensor | None,
    eps: float,
) -> list[Tensor]:
    _C.check_linear(op, x, values, scales, formats, norm, eps, None)
    x = x if norm is None else rms_norm(x, norm, eps)
    return [
        torch.nn.functional.linear(x, weight)
        for weight in _plain_weights(values, scales, formats, x.dtype)
    ]


def _side_by_side(products: list[Tensor]) -> Tensor:
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _plain_weights(
    values: list[Tensor], scales: list[Tensor | None], formats: list[str], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Of all formats, one after the other, so that no two widened ones take memory. Those that lie
    one below the other (`model.move_weights`) come as one."""
    if all(scale is None for scale in scales) and _adjacent(values):
        shape = (sum(map(len, values)), values[0].shape[1])
        yield values[0].as_strided(shape, values[0].stride())
        return
    for value, scale, name in zip(values, scales, formats, strict=True):
        yield value if scale is None else _dequantize(Quantized(value, scale, name), dtype)


def _dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    _C.dequantize(*weight, out, lane_of(out))
    return out


def _adjacent(weights: list[Tensor]) -> bool:
    first = weights[0].untyped_storage().data_ptr()
    return all(
        after.untyped_storage().data_ptr() == first
        and after.data_ptr() == before.data_ptr() + before.nbytes
        for before, after in itertools.pairwise(weights)
    )
