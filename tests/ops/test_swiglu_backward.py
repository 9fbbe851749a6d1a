from __future__ import annotations

import gradients
import pytest
import reference
import torch
from tolerance import DTYPES

from mistral_ext import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 16), (5, 31), (2, 14336)])
def test_gradients(backend, shape, dtype, generator):
    """gate and up are the halves of one matrix, with NaN between them."""
    tokens, dim = shape
    gap = 16 if dim % 16 == 0 else 3
    both = torch.full((tokens, 2 * dim + gap), float("nan"), dtype=dtype)
    gate, up = both[:, :dim], both[:, dim + gap :]
    gate.copy_(3 * torch.randn(shape, generator=generator))
    up.copy_(torch.randn(shape, generator=generator))
    d_out = torch.randn(shape, generator=generator).to(dtype)
    gradients.check(ops.swiglu, reference.swiglu, [gate, up], d_out)


def test_every_magnitude_of_the_gate(backend):
    """Each element on its own."""
    gate = torch.linspace(-80, 80, 20_003)[None]
    up = torch.ones_like(gate)
    actual = gradients.differentiate(ops.swiglu, [gate, up], up)
    exact = gradients.differentiate(reference.swiglu, [gate.double(), up.double()], up.double())
    for one, wide in zip(actual, exact, strict=True):
        torch.testing.assert_close(one.double(), wide, rtol=2e-6, atol=3e-7)


def test_extremes_of_the_gate(backend):
    gate = torch.tensor([[0.0, 1e4, 3e38, -1e4, -3e38, float("nan")]])
    up = torch.full_like(gate, 0.5)
    d_gate, d_up = gradients.differentiate(ops.swiglu, [gate, up], torch.ones_like(gate))
    nan = float("nan")
    expected = torch.tensor([[0.25, 0.5, 0.5, 0.0, 0.0, nan]])
    torch.testing.assert_close(d_gate, expected, equal_nan=True)
    expected = torch.tensor([[0.0, 1e4, 3e38, 0.0, 0.0, nan]])
    torch.testing.assert_close(d_up, expected, equal_nan=True)
