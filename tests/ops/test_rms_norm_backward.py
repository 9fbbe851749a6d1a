from __future__ import annotations

import gradients
import pytest
import reference
import torch
from tolerance import DTYPES

from mistral_ext import ops

NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 64), (1, 1), (2, 7), (5, 17), (9, 333), (3, 4096), (1, 5003)]
)
def test_gradient_of_x(backend, shape, dtype, generator):
    """Rows of very different magnitude, between rows of NaN."""
    tokens, dim = shape
    before = 16 if dim % 16 == 0 else 3  # aligned as wide vectors want it, or not at all
    around = torch.full((tokens + 2, before + dim + 16), NAN, dtype=dtype)
    x = around[1:-1, before:-16]
    scale = 10 ** torch.linspace(-2, 2, tokens)[:, None]
    x.copy_(torch.randn(shape, generator=generator) * scale)
    weight = torch.randn(dim, generator=generator).to(dtype)
    d_out = torch.randn(shape, generator=generator).to(dtype)
    gradients.check(
        lambda x: ops.rms_norm(x, weight, 1e-5),
        lambda x: reference.rms_norm(x, weight.to(x.dtype), 1e-5),
        [x],
        d_out,
        dim=1,
    )


def test_gradient_of_an_expanded_result(generator):
    """The gradient of a sum has strides 0."""
    x, weight = torch.randn(3, 40, generator=generator), torch.ones(40)
    x.requires_grad_()
    (d_x,) = torch.autograd.grad(ops.rms_norm(x, weight).sum(), x)
    (expected,) = torch.autograd.grad(reference.rms_norm(x, weight, 1e-5).sum(), x)
    torch.testing.assert_close(d_x, expected)


def test_zero_rows(backend):
    x = torch.zeros(2, 40)
    (d_x,) = gradients.differentiate(lambda x: ops.rms_norm(x, torch.ones(40)), [x], x + 1)
    torch.testing.assert_close(d_x, torch.full((2, 40), 1e5**0.5))
