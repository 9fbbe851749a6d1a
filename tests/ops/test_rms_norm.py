from __future__ import annotations

import backends
import pytest
import reference
import torch
from tolerance import DTYPES, assert_close

from mistral_ext import ops

SHAPES = [
    *((0, 64), (1, 1), (1, 4096), (2, 7), (3, 16), (5, 17), (13, 31), (9, 333), (4, 8192)),
    *((1, 5003), (1, 33008)),  # longer than a block of the CUDA kernel holds
]


def rows(tokens: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of very different magnitude, as slices of a matrix that is NaN around them.

    They are aligned as wide vectors want it if `dim` allows that, else not at all.
    """
    scale = 10 ** torch.linspace(-2, 2, tokens)[:, None]
    before, after = (16, 16) if dim % 16 == 0 else (2, 3)
    around = torch.full((tokens, before + dim + after), float("nan"), dtype=dtype)
    around[:, before:-after] = torch.randn(tokens, dim, generator=generator) * scale
    return around[:, before:-after]


def check(out, h, weight, eps):
    wide = reference.rms_norm(h.double(), weight.double(), eps)
    assert_close(out, wide, reference.rms_norm(h, weight, eps), dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(backend, shape, dtype, generator):
    x = rows(*shape, dtype, generator)
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    before = x.clone()
    check(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_updated_and_then_normalised(backend, shape, dtype, generator):
    x, residual = rows(*shape, dtype, generator), rows(*shape, dtype, generator)
    weight = torch.randn(shape[1], generator=generator).to(dtype)
    expected = residual + x
    out = ops.rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(residual, expected)
    assert torch.equal(out, ops.rms_norm(residual, weight, 1e-6)), "fused and not must agree"
    check(out, expected, weight, 1e-6)


def test_zero_rows_are_kept_from_division_by_zero(backend):
    x, weight = torch.zeros(2, 40), torch.ones(40)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), x)
    assert ops.rms_norm(x, weight, 0.0).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_rows_of_a_strided_output_and_no_others(backend, dtype, generator):
    x = rows(7, 37, dtype, generator)
    residual = torch.zeros_like(x)
    weight = torch.randn(37, generator=generator).to(dtype)
    around = torch.full((9, 60), float("nan"), dtype=dtype)
    out = around[1:-1, 10:47]
    backends.in_use().rms_norm(x, weight, residual, out, 1e-5, 2)
    check(out, x, weight, 1e-5)
    assert around.isnan().sum() == around.numel() - out.numel()


def strided(*shape):
    return torch.zeros(*shape, 2)[..., 0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x has shape [8], expected [any, any]"),
        ({"x": strided(3, 8)}, ValueError, "x has strides [16, 2], expected the last to be 1"),
        (
            {"x": torch.zeros(3, 8).double()},
            TypeError,
            "x has dtype torch.float64, expected torch.float32, torch.bfloat16 or torch.float16",
        ),
        ({"weight": torch.zeros(9)}, ValueError, "weight has shape [9], expected [8]"),
        ({"weight": torch.zeros(8, 1)}, ValueError, "weight has shape [8, 1], expected [8]"),
        ({"weight": strided(8)}, ValueError, "weight has strides [2], expected it to be contig"),
        (
            {"weight": torch.zeros(8).bfloat16()},
            TypeError,
            "weight has dtype torch.bfloat16, expected torch.float32 like x",
        ),
        ({"eps": -1e-5}, ValueError, "eps is -0.000010, expected 0 or more"),
        ({"eps": float("nan")}, ValueError, "eps is nan, expected 0 or more"),
        (
            {"residual": torch.zeros(2, 8)},
            ValueError,
            "residual has shape [2, 8], expected [3, 8]",
        ),
        ({"residual": strided(3, 8)}, ValueError, "residual has strides [16, 2], expected the"),
        (
            {"residual": torch.zeros(8).expand(3, 8)},
            ValueError,
            "residual has strides [0, 1] and shape [3, 8], expected no elements that share memory",
        ),
        (
            {"residual": torch.zeros(20).as_strided((3, 8), (6, 1))},
            ValueError,
            "residual has strides [6, 1] and shape [3, 8], expected no elements that share memory",
        ),
        (
            {"residual": torch.zeros(3, 8).half()},
            TypeError,
            "residual has dtype torch.float16, expected torch.float32 like x",
        ),
    ],
)
def test_argument_checks(changes, error, message):
    given = {"x": torch.zeros(3, 8), "weight": torch.zeros(8)} | changes
    with pytest.raises(error) as caught:
        ops.rms_norm(**given)
    assert f"rms_norm: {message}" in str(caught.value)
