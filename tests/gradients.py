"""Compares the gradient of an op with that of its reference, which torch differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tolerance import assert_close
from torch import Tensor


def differentiate(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor
) -> list[Tensor]:
    """The gradients of f(*inputs) for each input, given the gradient of its result."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(f(*leaves), leaves, d_out))


def check(
    f: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    d_out: Tensor,
    dim: int | None = None,
) -> None:
    """Applies the rule of `assert_close` to each gradient of f.

    The reference gets copies: with AMX torch's products read past the end of rows of an odd size,
    where there may be NaN.
    """
    actual = differentiate(f, inputs, d_out)
    inputs, d_out = [x.contiguous() for x in inputs], d_out.contiguous()
    exact = differentiate(reference, [x.double() for x in inputs], d_out.double())
    # torch's product with AMX reads past the end of rows of an odd size.
    plain = differentiate(reference, [x.contiguous() for x in inputs], d_out.contiguous())
    for given, one, wide, narrow in zip(inputs, actual, exact, plain, strict=True):
        assert one.dtype == given.dtype
        assert_close(one, wide, narrow, dim)
