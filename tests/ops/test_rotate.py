from __future__ import annotations

import re

import gradients
import pytest
import reference
import torch
from tolerance import DTYPES, assert_close

from mistral_ext import ops

# first token, count, position; rings that do not exist are not looked at
TABLE = torch.tensor([[0, 3, 0, -1, -1], [3, 0, 7, -1, -1], [3, 4, 100_000, -1, -1]])
POSITIONS = torch.tensor([0, 1, 2, 100_000, 100_001, 100_002, 100_003])


def heads(dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[7, 3, dim], with NaN between the heads and tokens."""
    gap = 8 if dim == 64 else 3
    around = torch.full((7, 5, dim + gap), float("nan"), dtype=dtype)
    around[:, 1:4, :dim] = torch.randn(7, 3, dim, generator=generator)
    return around[:, 1:4, :dim]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_rotate(backend, dim, dtype, generator):
    x, turns = heads(dim, dtype, generator), reference.frequencies(1e4, dim)
    before = x.clone()
    out = ops.rotate(x, TABLE, turns)
    exact = reference.rotate(x.double(), POSITIONS, turns)
    assert_close(out, exact, reference.rotate(x, POSITIONS, turns))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64])
def test_gradient(backend, dim, dtype, generator):
    x, turns = heads(dim, dtype, generator), reference.frequencies(1e4, dim)
    gradients.check(
        lambda x: ops.rotate(x, TABLE, turns),
        lambda x: reference.rotate(x, POSITIONS, turns),
        [x],
        torch.randn(x.shape, generator=generator).to(dtype),
    )


def test_rotates_as_rope_does(backend, generator):
    q, k = (torch.randn(5, 2, 64, generator=generator) for _ in range(2))
    turns, table = reference.frequencies(1e4, 64), torch.tensor([[0, 5, 9, 0, 16]])
    expected = ops.rotate(q, table, turns), ops.rotate(k, table, turns)
    pools = torch.zeros(2, 32, 64)
    ops.rope(q, k, k.clone(), *pools, table, turns)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(7, 64)}, "x has shape [7, 64], expected [any, any, any]"),
        ({"x": torch.zeros(7, 1, 48)}, "x has head dimension 48, expected a multiple of 32 up to"),
        (
            {"x": torch.zeros(64, 1, 7).permute(2, 1, 0)},
            "x has strides [1, 7, 7], expected the last to be 1",
        ),
        ({"sequences": TABLE[:, :4]}, "sequences has shape [3, 4], expected [any, 5]"),
        ({"sequences": TABLE[:1]}, "sequences has 3 tokens, expected 7"),
        ({"sequences": TABLE[1:]}, "sequences[0].first_token is 3, expected 0"),
        ({"sequences": TABLE + torch.tensor([0, 9, 0, 0, 0])}, "sequences[0].count is 12, expect"),
        ({"sequences": TABLE - torch.tensor([0, 0, 1, 0, 0])}, "sequences[0].position is -1, exp"),
        ({"frequencies": torch.zeros(31).double()}, "frequencies has shape [31], expected [32]"),
    ],
)
def test_argument_checks(changes, message):
    given = {
        "x": torch.zeros(7, 1, 64),
        "sequences": TABLE,
        "frequencies": torch.zeros(32).double(),
    }
    with pytest.raises(ValueError, match=re.escape(f"rotate: {message}")):
        ops.rotate(**given | changes)
