"""Rounding with error feedback, against GPTQ as its paper has it, in float64."""

from __future__ import annotations

import pytest
import torch

from mistral_ext.ops import Quantized
from mistral_ext.ops.quantize import round_with_feedback
from mistral_ext.weights.error_feedback import factor_of, hessian_of, round_by

# A format and a number of columns: whole blocks of 256, and a rest.
SHAPES = [("iq4_xs", 256), ("iq4_xs", 1024), ("iq4_nl", 96), ("iq4_nl", 832)]


def inputs(columns: int, generator: torch.Generator, count: int = 700) -> torch.Tensor:
    """Inputs that depend on each other, of different sizes."""
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(
        columns, generator=generator
    ).pow(3)
    return torch.randn(count, columns, generator=generator) @ mixing / columns**0.5


def rounded_as_in_the_paper(weight, hessian, form) -> torch.Tensor:
    """Rounds with the Cholesky factor of the inverse Hessian (algorithm 1)."""
    size = len(hessian)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(size)
    factor = torch.linalg.cholesky(damped.inverse(), upper=True)
    importance = (hessian.diagonal() / hessian.diagonal().mean()).float()
    rest, parts = weight.double(), []
    for begin in range(0, size, 256):
        end = min(begin + 256, size)
        part, out = rest[:, begin:end].float(), Quantized.empty((len(rest), end - begin), form)
        block = factor[begin:end, begin:end].float().contiguous()
        round_with_feedback(part, block, out, importance[begin:end].contiguous())
        rest[:, end:] -= part.double() @ factor[begin:end, end:]
        parts.append(out.dequantize())
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("form", "columns"), SHAPES)
def test_rounds_as_the_paper_does(form, columns, generator):
    x = inputs(columns, generator)
    weight = torch.randn(40, columns, generator=generator)
    given, out = weight.clone(), Quantized.empty(weight.shape, form)
    errors = round_by(factor_of([x]), weight, out)
    assert torch.equal(weight, given)
    assert torch.equal(errors, weight - out.dequantize())

    hessian = x.double().T @ x.double()
    expected = rounded_as_in_the_paper(weight, hessian, form)

    def loss(rounded: torch.Tensor) -> float:
        difference = rounded.double() - weight
        return ((difference @ hessian) * difference).sum().item()

    # A weight between two values may become either of them, and those after it change with it.
    assert (out.dequantize() != expected).float().mean() < 0.05
    assert loss(out.dequantize()) == pytest.approx(loss(expected), rel=0.02)


@pytest.mark.parametrize("columns", [32, 512, 800, 1100])
@pytest.mark.parametrize("has_sizes", [False, True])
def test_hessians_are_sums_over_all_tokens(columns, has_sizes, generator):
    x = inputs(columns, generator)
    sizes = torch.rand(len(x), generator=generator) + 0.5 if has_sizes else torch.ones(len(x))
    splits = (513, 1, len(x) - 514)
    found = hessian_of(x.split(splits), sizes.split(splits) if has_sizes else None)
    x = x.double() / sizes[:, None]
    expected = x.T @ x
    lengths = expected.diagonal().sqrt()
    assert ((found - expected).tril().abs() <= 1e-5 * lengths[:, None] * lengths).all()


def test_inputs_that_are_always_zero_do_no_harm(generator):
    x = inputs(512, generator)
    x[:, 100:300] = 0
    weight, out = torch.randn(8, 512, generator=generator), Quantized.empty((8, 512), "iq4_xs")
    assert round_by(factor_of([x]), weight, out).isfinite().all()
    assert round_by(factor_of([x * 0]), weight, out).isfinite().all()


def test_inputs_that_are_not_finite_are_refused():
    x = torch.full((3, 64), 1e30)
    with pytest.raises(ValueError, match="the products of the inputs are not finite"):
        factor_of([x])
