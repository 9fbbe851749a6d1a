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
@pytest.mark.parametrize("magnitude", [1, 3e-6, 1e-6])
def test_every_weight_gets_the_nearest_value(isa, form, magnitude, generator):
    """In float64. Half-way between two values either will do, as near as fp32 tells. Small scales
    are rounded to few numbers in fp16, so weights over scales are beyond the ends of the table."""
    weight = torch.randn(133, 256, generator=generator) * magnitude
    quantized = rounded(weight, form)
    found = quantized.dequantize().double()
    extremes = Quantized(torch.full_like(quantized.values, 0), quantized.scales, form)
    scales = extremes.dequantize().double() / TABLE[0]  # value 0 in all places
    allowed = (weight.double().unsqueeze(2) - scales.unsqueeze(2) * TABLE).abs().amin(2)
    assert ((found - weight).abs() <= allowed + scales.abs() * 2**-13).all()


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
    for form, expected in (("iq4_xs", 0.0748), ("iq4_nl", 0.0743)):
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
@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1e-8, 1e-5, 3e-4, 1e4])
def test_extreme_magnitudes(isa, form, magnitude, generator):
    """Small scales are subnormal numbers in fp16, which are rounded to multiples of 2^-24."""
    weight = torch.randn(4, 256, generator=generator).clamp(-3, 3) * magnitude
    step = 2**-24 * (32 if form == "iq4_xs" else 1)
    error = (rounded(weight, form).dequantize() - weight).abs()
    assert (error < 0.5 * magnitude + 127 * step / 2).all()


@pytest.mark.parametrize("form", FORMATS)
def test_inputs_without_importance_keep_their_weights(isa, form, generator):
    """A group of them, all of them, and importances so small that products become 0."""
    weight = torch.randn(4, 512, generator=generator) * 0.02
    weight[:, 40] = 0.3
    weight[:, 64:96] *= 0.05  # little, beside its neighbours' scales
    group = torch.ones(512)
    group[64:96] = 0
    expected = rounded(weight, form).dequantize()
    assert (expected[:, 64:96] != 0).any()
    for importance in (group, torch.zeros(512), torch.full((512,), 1e-45)):
        assert torch.equal(rounded(weight, form, importance).dequantize(), expected)


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
    for importance in (None, torch.zeros(columns)):
        out, errors = Quantized.empty(weight.shape, form), weight.clone()
        round_with_feedback(errors, torch.eye(columns), out, importance)
        assert torch.equal(errors, weight - out.dequantize())
        close = weighted_error(out.dequantize(), weight, None)
        best = weighted_error(rounded(weight, form).dequantize(), weight, None)
        assert (close <= best * 1.02).all()


@pytest.mark.parametrize(("form", "columns"), [("iq4_nl", 64), ("iq4_xs", 256)])
def test_feedback_shows_in_its_errors_that_numbers_are_not_finite(isa, form, columns):
    def finite(value=1.0, diagonal=1.0) -> list[bool]:
        weight, factor = torch.ones(2, columns), torch.eye(columns)
        weight[1, 5], factor[40, 40] = value, diagonal
        round_with_feedback(weight, factor, Quantized.empty(weight.shape, form))
        return weight.isfinite().all(1).tolist()

    assert finite() == [True, True]
    assert finite(diagonal=0.0) == [False, False]
    for value in (float("nan"), float("inf"), 1e10, 1e38):
        assert finite(value) == [True, False]


def call(op: str, **changes: object) -> None:
    """Rounds zeros [2, 256] to "iq4_xs", with some arguments changed."""
    given = {
        "weight": torch.zeros(2, 256),
        "factor": torch.eye(256),
        "values": torch.zeros(2, 32).int(),
        "scales": torch.zeros(2, 8).byte(),
        "importance": torch.ones(256),
    }
    given |= changes
    out = Quantized(given["values"], given["scales"], "iq4_xs")
    if op == "quantize":
        round_to_table(given["weight"], out, given["importance"])
    else:
        round_with_feedback(given["weight"], given["factor"], out, given["importance"])


@pytest.mark.parametrize("op", ["quantize", "quantize_feedback"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("weight", torch.zeros(2, 256).int()),
        ("weight", torch.zeros(256, 2).T),
        ("weight", torch.zeros(2, 256, 1)),
        ("values", torch.zeros(2, 32)),
        ("values", torch.zeros(2, 31).int()),
        ("values", torch.zeros(2, 64).int()[:, ::2]),
        ("scales", None),
        ("scales", torch.zeros(2, 8)),
        ("scales", torch.zeros(2, 7).byte()),
        ("scales", torch.zeros(3, 8).byte()),
        ("scales", torch.zeros(2, 1).half()),
        ("scales", torch.zeros(2, 16).byte()[:, ::2]),
        ("importance", torch.ones(255)),
        ("importance", torch.ones(256).double()),
        ("importance", torch.ones(512)[::2]),
        ("factor", torch.eye(255)),
        ("factor", torch.eye(256).double()),
        ("factor", torch.eye(512)[:256, ::2]),
    ],
)
def test_wrong_tensors_are_named(op, name, wrong):
    call(op)
    if name == "factor" and op == "quantize":
        return
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {name} "):
        call(op, **{name: wrong})


@pytest.mark.parametrize("op", ["quantize", "quantize_feedback"])
@pytest.mark.parametrize(
    ("form", "columns", "expected"),
    [
        ("iq4_xs", 0, "a positive multiple of 256"),
        ("iq4_nl", 0, "a positive multiple of 32"),
        ("iq4_xs", 64, "a positive multiple of 256"),
        ("iq4_nl", 48, "a positive multiple of 32"),
    ],
)
def test_wrong_numbers_of_columns_are_refused(op, form, columns, expected):
    scales = torch.zeros(2, columns // 32, dtype=torch.uint8 if form == "iq4_xs" else torch.half)
    parts = {"values": torch.zeros(2, columns // 8).int(), "scales": scales}
    parts |= {"weight": torch.zeros(2, columns), "factor": torch.eye(columns)}
    with pytest.raises(ValueError, match=f"weight has {columns} columns, expected {expected}"):
        call(op, **parts, importance=None)


def test_more_columns_than_a_block_are_refused():
    wide = Quantized.empty((2, 288), "iq4_nl")
    with pytest.raises(ValueError, match="weight has 288 columns, expected at most 256"):
        round_with_feedback(torch.zeros(2, 288), torch.eye(288), wide)
