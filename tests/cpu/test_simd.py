"""Loads and stores of the 16-bit types, exhaustively, through the simplest op that has them."""

from __future__ import annotations

import pytest
import torch

from mistral_ext import ops

HALVES = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """All NaNs are alike."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [1 << 16, 1 << 5, 1 << 2])  # whole vectors, and tails alone
def test_every_value_survives_a_load_and_a_store(isa, dtype, dim):
    values = every_value(dtype)
    residual = values.clone().view(-1, dim)
    # x + -0 is x, for x = -0 too
    ops.rms_norm(torch.full_like(residual, -0.0), torch.ones(dim, dtype=dtype), residual=residual)
    assert_same_bits(residual.flatten(), values)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ulps", [0.25, 0.5, 0.75, -0.25, -0.5])
def test_sums_are_rounded_to_nearest_even(isa, dtype, ulps):
    values = every_value(dtype)
    values = values[values.isfinite()]
    step = (values.view(torch.int16) + 1).view(dtype).float() - values.float()
    part = (step * ulps).to(dtype)[None]
    residual = values.clone()[None]
    expected = (residual.float() + part.float()).to(dtype)
    ops.rms_norm(part, torch.ones(part.shape[1], dtype=dtype), residual=residual)
    assert_same_bits(residual, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("eps", [0.3, 1e7, 1e30])
def test_results_are_rounded_to_nearest_even(isa, dtype, eps):
    """Rows of one element: x / sqrt(x^2 + eps) in fp32; a large eps makes subnormal results."""
    x = every_value(dtype)[:, None]
    wide = x.float()
    factor = 1 / (wide * wide + torch.tensor(eps, dtype=torch.float32)).sqrt()
    out = ops.rms_norm(x, torch.ones(1, dtype=dtype), eps)
    assert_same_bits(out, (wide * factor).to(dtype))
