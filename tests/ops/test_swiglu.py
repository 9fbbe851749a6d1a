from __future__ import annotations

import backends
import pytest
import reference
import torch
from tolerance import DTYPES, assert_close

from mistral_ext import ops


def fused(tokens: int, dim: int, dtype: torch.dtype, generator: torch.Generator):
    """gate and up as the halves of one matrix, NaN between them.

    They are aligned as wide vectors want it if `dim` allows that, else not at all.
    """
    gap = 16 if dim % 16 == 0 else 3
    both = torch.full((tokens, 2 * dim + gap), float("nan"), dtype=dtype)
    both[:, :dim] = 3 * torch.randn(tokens, dim, generator=generator)
    both[:, dim + gap :] = torch.randn(tokens, dim, generator=generator)
    return both[:, :dim], both[:, dim + gap :]


def check(out, gate, up):
    assert_close(out, reference.swiglu(gate.double(), up.double()), reference.swiglu(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 16), (5, 31), (7, 257), (2, 14336)])
def test_swiglu(backend, shape, dtype, generator):
    gate, up = fused(*shape, dtype, generator)
    before = gate.clone(), up.clone()
    check(ops.swiglu(gate, up), gate, up)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


def test_every_magnitude_of_the_gate(backend):
    """Each element on its own: exp is accurate to a few units in the last place everywhere."""
    gate = torch.linspace(-87, 88, 100_003)[None]
    up = torch.ones_like(gate)
    exact = reference.swiglu(gate.double(), up.double())
    assert_close(ops.swiglu(gate, up).T, exact.T, torch.nn.functional.silu(gate).T, dim=1)


def test_extremes_of_the_gate(backend):
    gate = torch.tensor([[0.0, 1e4, 3e38, -1e4, -3e38, float("inf"), float("nan")]])
    out = ops.swiglu(gate, torch.full_like(gate, 0.5))
    expected = torch.tensor([[0.0, 5e3, 1.5e38, 0.0, 0.0, float("inf"), float("nan")]])
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_rows_of_a_strided_output_and_no_others(backend, dtype, generator):
    gate, up = fused(7, 37, dtype, generator)
    around = torch.full((9, 60), float("nan"), dtype=dtype)
    out = around[1:-1, 10:47]
    backends.in_use().swiglu(gate, up, out, 2)
    check(out, gate, up)
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": torch.zeros(8)}, ValueError, "gate has shape [8], expected [any, any]"),
        ({"gate": torch.zeros(3, 8).T}, ValueError, "gate has strides [1, 8], expected the last"),
        ({"gate": torch.zeros(3, 8).long()}, TypeError, "gate has dtype torch.int64, expected"),
        ({"up": torch.zeros(3, 9)}, ValueError, "up has shape [3, 9], expected [3, 8]"),
        ({"up": torch.zeros(8, 3).T}, ValueError, "up has strides [1, 3], expected the last to"),
        (
            {"up": torch.zeros(3, 8).half()},
            TypeError,
            "up has dtype torch.float16, expected torch.float32 like gate",
        ),
    ],
)
def test_argument_checks(changes, error, message):
    given = {"gate": torch.zeros(3, 8), "up": torch.zeros(3, 8)} | changes
    with pytest.raises(error) as caught:
        ops.swiglu(**given)
    assert f"swiglu: {message}" in str(caught.value)
