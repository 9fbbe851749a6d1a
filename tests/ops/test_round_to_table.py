"""Weights in iq4_nl and iq4_xs: the search for scales, and the step of GPTQ within a block."""

from __future__ import annotations

import pytest
import torch
from reference import round_to_table as reference
from torch import Tensor

from mistral_ext.ops import Quantized
from mistral_ext.ops.dequantize import TABLE
from mistral_ext.ops.quantize import round_to_table, round_with_feedback
from mistral_ext.weights.quantize import quantize

FORMATS = ["iq4_nl", "iq4_xs"]


def rounded(weight: Tensor, form: str, importance: Tensor | None = None) -> Quantized:
    out = Quantized.empty(weight.shape, form)
    assert torch.equal(round_to_table(weight, out, importance), weight.float().abs().amax(1))
    return out


def weighted_error(found: Tensor, weight: Tensor, importance: Tensor | None) -> Tensor:
    """[N]: what the search makes small, of each row, in double precision."""
    exact = weight.double()
    blocks = exact.abs().unflatten(1, (-1, min(256, exact.shape[1])))
    counts = (blocks + blocks.mean(2, keepdim=True)).flatten(1)
    if importance is not None:
        counts = counts * importance
    return (counts * (found.double() - exact).square()).sum(1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_good_as_the_reference(isa, form, dtype, generator):
    """In float64, a value at a time. Other sums may choose another scale that is as good."""
    weight = (torch.randn(6, 512, generator=generator) * 0.02).to(dtype)
    weight[2, 7] = 1.0  # far from its neighbours
    importance = torch.rand(512, generator=generator) ** 4
    for counts in (None, importance):
        ours = weighted_error(rounded(weight, form, counts).dequantize(), weight, counts)
        best = weighted_error(reference(weight, counts, form == "iq4_xs"), weight, counts)
        assert (ours <= best * 1.001).all()


@pytest.mark.parametrize("form", FORMATS)
def test_every_weight_gets_the_nearest_value(isa, form, generator):
    weight = torch.randn(33, 256, generator=generator)
    quantized = rounded(weight, form)
    found = quantized.dequantize()
    extremes = Quantized(torch.full_like(quantized.values, 0), quantized.scales, form)
    scales = extremes.dequantize() / TABLE[0]  # value 0 in all places
    allowed = (weight.unsqueeze(2) - scales.unsqueeze(2) * TABLE).abs().amin(2)
    # Weights over scales are rounded to integers first: half-way, either neighbour will do.
    assert ((found - weight).abs() <= allowed + scales.abs() * 1.01).all()
    assert ((found - weight).abs() <= allowed * 1.001).float().mean() > 0.95


@pytest.mark.parametrize("form", FORMATS)
def test_representable_weights_come_back_to_the_bit(isa, form, generator):
    """Any value in any place, and scales of either sign."""
    values = TABLE[torch.randint(0, 16, (40, 8, 32), generator=generator)]
    values[..., 5] = -127
    factors = torch.randint(-32, 32, (40, 8, 1), generator=generator).float()
    factors[:, 3], factors[factors == 0] = -32, 1
    scale = (torch.rand(40, 1, 1, generator=generator) / 64 + 0.01).half().float()
    weight = (values * (factors * scale).half()).flatten(1)
    if form == "iq4_xs":
        weight = (values * (factors * scale)).flatten(1)
    assert torch.equal(rounded(weight, form).dequantize(), weight)


def test_rms_error_of_normal_weights(generator):
    """The figures of mistral_ext.weights.quantize."""
    weight = torch.randn(64, 4096, generator=generator) * 0.02
    for form, expected in (("iq4_xs", 0.0750), ("iq4_nl", 0.0745)):
        error = (rounded(weight, form).dequantize() - weight).norm() / weight.norm()
        assert error.item() == pytest.approx(expected, abs=4e-4)


@pytest.mark.parametrize("form", FORMATS)
def test_shapes_strides_and_zeros(isa, form, generator):
    whole = torch.randn(5, 600, generator=generator)
    part = whole[:, 40:552]
    assert torch.equal(rounded(part, form).values, rounded(part.contiguous(), form).values)
    assert rounded(part[:0], form).values.shape == (0, 64)
    zeros = torch.zeros(2, 256)
    zeros[1, 70] = 0.5
    assert torch.equal(rounded(zeros, form).dequantize()[0], zeros[0])
    assert rounded(zeros, form).dequantize()[1, 70] == pytest.approx(0.5, rel=1e-3)
    if form == "iq4_nl":
        assert rounded(whole[:, :96], form).dequantize().shape == (5, 96)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_is_seen(isa, form, value):
    weight = torch.ones(3, 512)
    weight[1, 300] = value
    largest = round_to_table(weight, Quantized.empty(weight.shape, form))
    assert largest.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1e-8, 1e-3, 1e4])
def test_extreme_magnitudes(isa, form, magnitude, generator):
    weight = torch.randn(4, 256, generator=generator).clamp(-3, 3) * magnitude
    error = (rounded(weight, form).dequantize() - weight).abs() / magnitude
    assert (error < (0.5 if magnitude > 1e-4 else 3.1)).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("magnitude", [1e10, 1e30, 1e38])
def test_scales_beyond_fp16_are_refused(isa, form, magnitude):
    weight = torch.ones(4, 256)
    weight[2, 5] = magnitude
    with pytest.raises(ValueError, match=r"tensor 'w' holds 1e\+\d\d, whose scale torch.float16"):
        quantize(weight, form, name="w")


def correlated(count: int, columns: int, generator: torch.Generator) -> Tensor:
    """[columns, columns] float32: the mean product of inputs that depend on each other."""
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    mixed += torch.eye(columns)
    x = torch.randn(count, columns, generator=generator) @ mixed
    return x.T @ x / count


@pytest.mark.parametrize(("form", "columns"), [("iq4_nl", 96), ("iq4_xs", 256)])
def test_feedback_leaves_less_error_in_the_products(isa, form, columns, generator):
    weight = torch.randn(16, columns, generator=generator) * 0.02
    hessian = correlated(2000, columns, generator)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True).contiguous()
    importance = hessian.diagonal().contiguous()
    out, errors = Quantized.empty(weight.shape, form), weight.clone()
    round_with_feedback(errors, factor, out, importance)

    def loss(found: Tensor) -> Tensor:
        difference = (found - weight).double()
        return ((difference @ hessian.double()) * difference).sum()

    assert loss(out.dequantize()) < 0.8 * loss(rounded(weight, form, importance).dequantize())
    # What each column was rounded from: the weight minus what earlier columns have left for it.
    changed = weight - torch.tril(torch.ones(columns, columns), -1).T.mul(factor).T.mm(errors.T).T
    expected = (changed - out.dequantize()) / factor.diagonal()
    assert torch.allclose(errors, expected, atol=1e-5)


@pytest.mark.parametrize(("form", "columns"), [("iq4_nl", 64), ("iq4_xs", 256)])
def test_feedback_without_dependence_is_rounding(isa, form, columns, generator):
    weight = torch.randn(5, columns, generator=generator)
    out, errors = Quantized.empty(weight.shape, form), weight.clone()
    round_with_feedback(errors, torch.eye(columns), out)
    assert torch.equal(errors, weight - out.dequantize())
    close = weighted_error(out.dequantize(), weight, None)
    assert (close <= weighted_error(rounded(weight, form).dequantize(), weight, None) * 1.02).all()


def test_wrong_arguments_are_named():
    out = Quantized.empty((2, 256), "iq4_xs")
    with pytest.raises(ValueError, match="weight has 64 columns, expected a multiple of 256"):
        round_to_table(torch.zeros(2, 64), out)
    with pytest.raises(ValueError, match="quantize: values"):
        round_to_table(torch.zeros(2, 512), Quantized(out.values, torch.zeros(2, 16).byte(), ""))
    with pytest.raises(ValueError, match="quantize: importance"):
        round_to_table(torch.zeros(2, 256), out, torch.zeros(255))
    with pytest.raises(TypeError, match="quantize: weight"):
        round_to_table(torch.zeros(2, 256, dtype=torch.int32), out)
    wide = Quantized.empty((2, 288), "iq4_nl")
    with pytest.raises(ValueError, match="weight has 288 columns, expected at most 256"):
        round_with_feedback(torch.zeros(2, 288), torch.eye(288), wide)
    with pytest.raises(ValueError, match="quantize_feedback: factor"):
        round_with_feedback(torch.zeros(2, 256), torch.eye(255), out)
