from __future__ import annotations

import pytest
import torch
from tolerance import DTYPES, assert_close
from torch.nn import functional

from mistral_ext import _C, ops


def inputs(tokens: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """x as a slice of a matrix that is NaN around it."""
    around = torch.full((tokens + 1, size + 5), float("nan"), dtype=dtype)
    around[:-1, 2:-3] = torch.randn(tokens, size, generator=generator)
    return around[:-1, 2:-3]


def check(out, x, weight):
    exact = functional.linear(x.double(), weight.double())
    assert_close(out, exact, functional.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",  # T, K, N
    [(0, 8, 4), (1, 64, 1), (1, 257, 31), (3, 7, 33), (7, 96, 130), (8, 1, 4), (13, 65, 66)],
)
def test_linear(isa, shape, dtype, generator):
    tokens, size, outputs = shape
    x = inputs(tokens, size, dtype, generator)
    weight = torch.randn(outputs, size, generator=generator).to(dtype)
    check(ops.linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(isa, dtype, generator):
    x = inputs(2, 14336, dtype, generator)
    weight = torch.randn(65, 14336, generator=generator).to(dtype)
    check(ops.linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_get_the_same_bits_alone_and_together(isa, dtype, generator):
    x = inputs(8, 301, dtype, generator)
    weight = torch.randn(70, 301, generator=generator).to(dtype)
    alone = torch.cat([ops.linear(row, weight) for row in x.split(1)])
    for tokens in range(2, 9):
        assert torch.equal(ops.linear(x[:tokens], weight), alone[:tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_rows_of_a_strided_output_and_no_others(isa, dtype, generator):
    x = inputs(7, 37, dtype, generator)
    weight = torch.randn(39, 37, generator=generator).to(dtype)
    around = torch.full((9, 60), float("nan"), dtype=dtype)
    out = around[1:-1, 10:49]
    _C.linear(x, weight, out, 2)
    check(out, x, weight)
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("tokens", [3, 30])  # the kernel's and torch's product check alike
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(4, 9), ValueError, "weight has shape [4, 9], expected [any, 8]"),
        (torch.zeros(8), ValueError, "weight has shape [8], expected [any, 8]"),
        (torch.zeros(2, 4, 8), ValueError, "weight has shape [2, 4, 8], expected [any, 8]"),
        (torch.zeros(8, 4).T, ValueError, "weight has strides [1, 4], expected it to be contig"),
        (
            torch.zeros(4, 8).half(),
            TypeError,
            "weight has dtype torch.float16, expected torch.float32 like x",
        ),
    ],
)
def test_weight_checks(tokens, weight, error, message):
    with pytest.raises(error) as caught:
        ops.linear(torch.zeros(tokens, 8), weight)
    assert f"linear: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(8), ValueError, "x has shape [8], expected [any, any]"),
        (torch.zeros(2, 3, 8), ValueError, "x has shape [2, 3, 8], expected [any, any]"),
        (torch.zeros(30, 3, 8), ValueError, "x has shape [30, 3, 8], expected [any, any]"),
        (torch.zeros(8, 3).T, ValueError, "x has strides [1, 3], expected the last to be 1"),
        (torch.zeros(8, 30).T, ValueError, "x has strides [1, 30], expected the last to be 1"),
        (torch.zeros(3, 8).long(), TypeError, "x has dtype torch.int64, expected torch.float32"),
    ],
)
def test_x_checks(x, error, message):
    with pytest.raises(error) as caught:
        ops.linear(x, torch.zeros(4, 8))
    assert f"linear: {message}" in str(caught.value)
