"""mistral_ext.weights.quantize: the format to the bit, and the error that it leaves."""

from __future__ import annotations

import re

import pytest
import torch

from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Quantized
from mistral_ext.weights import quantize as quantize_module
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.quantize import Quantization, groups_of, quantize

GROUPS = [("int8", None), ("q8_0", 32), *(("int4", group) for group in (32, 64, 128))]
FORMATS = ["int8", "q8_0", "int4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=GROUPS, ids=lambda f: f"{f[0]}-{f[1]}")
def form_and_group(request):
    return request.param


def decode(quantized: Quantized, form: str, group: int | None) -> list[list[float]]:
    """The specification, a weight at a time."""
    rows = []
    for words, scales in zip(quantized.values.tolist(), quantized.scales.tolist(), strict=True):
        row = []
        for k in range(len(words) * (8 if form == "int4" else 1)):
            scale = scales[k // group] if group else scales[0]
            if form != "int4":
                row.append(words[k] * scale)
                continue
            i = k % 8
            nibble = ((words[k // 8] + 2**32) >> (4 * (i // 2) + 16 * (i % 2))) & 15
            value = nibble - 16 if nibble > 7 else nibble
            row.append(value * scale)
        rows.append(row)
    return rows


def relative_error(quantized: Quantized, weight: torch.Tensor) -> float:
    exact = weight.double()
    return ((quantized.dequantize().double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_format(form_and_group, rows, dtype, generator):
    form, group = form_and_group
    weight = torch.randn(rows, 384, generator=generator).to(dtype)
    quantized = quantize(weight, form, group)
    int4 = form == "int4"
    assert quantized.format == form
    assert quantized.shape == (rows, 384)
    assert quantized.group == (group or 384)
    assert quantized.values.dtype == (torch.int32 if int4 else torch.int8)
    assert quantized.values.shape == ((rows, 48) if int4 else (rows, 384))
    assert quantized.scales.dtype == (torch.float16 if form == "q8_0" else torch.bfloat16)
    assert quantized.scales.shape == (rows, 384 // (group or 384))
    assert quantized.values.is_contiguous()
    assert quantized.scales.is_contiguous()
    assert quantized.nbytes == rows * 384 // (2 if int4 else 1) + quantized.scales.numel() * 2
    assert quantized.dequantize().tolist() == decode(quantized, form, group)
    rounded = quantized.dequantize(torch.bfloat16)
    assert torch.equal(rounded, quantized.dequantize().bfloat16())


def test_representable_weights_come_back_to_the_bit(form_and_group, generator):
    """Any value in any place, and any scale."""
    form, group = form_and_group
    low, high = (-8, 7) if form == "int4" else (-127, 127)
    shape = (33, 256 // (group or 256), group or 256)
    values = torch.randint(low, high + 1, shape, generator=generator)
    values[..., 5] = low  # as a scale is the largest magnitude over that
    scales = torch.randn(*shape[:2], 1, generator=generator).bfloat16().float()
    if form != "int4":
        scales.abs_()
    quantized = quantize((values * scales).flatten(1), form, group)
    assert torch.equal(quantized.scales.float(), scales.squeeze(2))
    assert torch.equal(quantized.dequantize(), (values * scales).flatten(1))
    again = quantize(quantized.dequantize(), form, group)
    assert torch.equal(again.values, quantized.values)
    assert torch.equal(again.scales, quantized.scales)


def test_no_weight_is_off_by_more_than_half_a_step(form_and_group, generator):
    """But for those cut off on purpose, which have the outermost value."""
    form, group = form_and_group
    weight = torch.randn(64, 512, generator=generator)
    quantized = quantize(weight, form, group)
    step = quantized.scales.float().abs().repeat_interleave(quantized.group, dim=1)
    error = (quantized.dequantize() - weight).abs() / step
    allowed = torch.full_like(error, 0.5 + 1e-4)
    if form == "int4":
        value = quantized.dequantize() / quantized.scales.float().repeat_interleave(group, dim=1)
        allowed[(value == -8) | (value == 7)] = 8 * (1 / 0.7 - 1) + 1  # 0.7: the least scale tried
    assert (error <= allowed).all()


def test_search_leaves_less_error_than_rounding(generator):
    """The figures in the module's documentation."""
    weight = torch.randn(256, 4096, generator=generator)
    scale = (weight.unflatten(1, (-1, 64)).abs().amax(2, keepdim=True) / 7).bfloat16().float()
    plain = ((weight.unflatten(1, (-1, 64)) / scale).round().clamp(-8, 7) * scale).flatten(1)
    assert ((plain - weight).norm() / weight.norm()).item() == pytest.approx(0.108, abs=5e-4)
    assert relative_error(quantize(weight, "int4"), weight) == pytest.approx(0.090, abs=5e-4)


def test_search_finds_the_best_scale_of_those_tried(generator):
    """Against every scale and value in turn, in double precision."""
    weight = torch.randn(8, 64, generator=generator)
    quantized = quantize(weight, "int4", 32)
    for group, found in zip(
        weight.view(-1, 32).double(), quantized.dequantize().view(-1, 32).double(), strict=True
    ):
        largest = group[group.abs().argmax()]
        errors = []
        for tried in (0.70, 0.76, 0.82, 0.88, 0.94, 1.00, 1.06):
            values = (group / (largest / -8 * tried)).round().clamp(-8, 7)
            scale = (group @ values) / (values @ values)
            errors.append((group - scale * values).square().sum())
        # more only by what rounding the scale to bfloat16 does
        assert (group - found).square().sum() <= min(errors) * 1.02


@pytest.mark.parametrize("form", FORMATS)
def test_zeros(form):
    weight = torch.zeros(3, 128)
    weight[1, 70] = 127 / 64
    quantized = quantize(weight, form)
    assert torch.equal(quantized.dequantize(), weight)
    assert quantized.scales[0].eq(0).all()
    assert quantized.values[0].eq(0).all()


EXTREMES = [
    *((form, m) for form in ("int8", "int4") for m in (1e-45, 1e-39, 1e-37, 1e30, 1e38)),
    *(("q8_0", m) for m in (1e-45, 1e-8, 1e-3, 1e6)),
]


@pytest.mark.parametrize(("form", "magnitude"), EXTREMES)
def test_extreme_magnitudes_stay_finite(form, magnitude, generator):
    weight = torch.randn(4, 64, generator=generator).clamp(-3, 3) * magnitude
    dequantized = quantize(weight, form).dequantize()
    assert dequantized.isfinite().all()
    if magnitude > (1e-7 if form == "q8_0" else 1e-36):
        assert ((dequantized - weight) / magnitude).abs().max() < 0.4


def test_scales_beyond_fp16_are_refused_by_name():
    weight = torch.ones(4, 64)
    weight[2, 5] = 1e7
    with pytest.raises(ValueError, match=r"tensor 'layers.3.x' holds 1e\+07, whose scale"):
        quantize(weight, "q8_0", name="layers.3.x")


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (5, 128), (301, 384)])
def test_blocks_do_not_matter(form_and_group, shape, generator, monkeypatch):
    form, group = form_and_group
    weight = torch.randn(shape, generator=generator)
    whole = quantize(weight, form, group)
    for block in (1, 1000):
        monkeypatch.setattr(quantize_module, "_BLOCK", block)
        in_blocks = quantize(weight, form, group)
        assert torch.equal(in_blocks.values, whole.values)
        assert torch.equal(in_blocks.scales, whole.scales)


def test_any_strides_and_eight_bits_of_any_width(generator):
    weight = torch.randn(96, 64, generator=generator).T
    assert torch.equal(
        quantize(weight, "int4", 32).values, quantize(weight.contiguous(), "int4", 32).values
    )
    odd = torch.randn(5, 37, generator=generator)
    assert relative_error(quantize(odd, "int8"), odd) < 0.01


@pytest.mark.parametrize("form", [*FORMATS, "iq4_nl", "iq4_xs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_is_refused_by_name(form, value, dtype):
    weight = torch.ones(600, 1024, dtype=dtype)
    weight[517, 1001] = value
    with pytest.raises(ValueError, match=r"tensor 'layers.3.x' holds NaN or infinity"):
        quantize(weight, form, name="layers.3.x")


@pytest.mark.parametrize(
    ("shape", "form", "group", "message"),
    [
        ((4, 96), "int4", 64, r"tensor 'w' of shape \(4, 96\) has rows of 96, .* of 64"),
        ((4, 96), "int4", None, "groups of 64"),
        ((4, 80), "q8_0", None, "has rows of 80, expected a multiple of 32"),
        ((4, 64), "int4", 48, "group is 48, expected 32, 64, 128, with format 'int4'"),
        (
            (4, 64),
            "int8",
            64,
            "group is 64, expected None: a row has one scale, with format 'int8'",
        ),
        (
            (4, 64),
            "int3",
            None,
            "format is 'int3', expected one of int8, int4, q8_0, iq4_xs, iq",
        ),
        (
            (4, 256),
            "q4_k",
            None,
            "format is 'q4_k', expected one of int8, .*, iq4_xs, iq4_nl$",
        ),
        ((4, 288), "iq4_xs", None, "has rows of 288, expected a multiple of 256"),
        ((4, 80), "iq4_nl", None, "has rows of 80, expected a multiple of 32"),
        ((64,), "iq4_nl", None, r"tensor 'w' has shape \(64,\), expected a matrix"),
        ((64,), "int8", None, r"tensor 'w' has shape \(64,\), expected a matrix"),
        ((4, 0), "int8", None, r"tensor 'w' has shape \(4, 0\), expected a matrix"),
    ],
)
def test_bad_arguments_are_named(shape, form, group, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(shape), form, group, "w")


def test_names():
    assert Quantization.from_name("int8") == Quantization("q8_0") == Quantization.from_bits(8)
    assert Quantization.from_name("int4") == Quantization("iq4_xs") == Quantization.from_bits(4)
    assert Quantization.from_bits(4, 64) == Quantization("int4", 64) == Quantization("int4")
    assert [groups_of(form) for form in FORMATS] == [(), (32,), (32, 64, 128)]
    with pytest.raises(ValueError, match="quantize is 'int5', expected 'int8', 'int4' or None"):
        Quantization.from_name("int5")
    with pytest.raises(ValueError, match="bits is 3, expected 8 or 4"):
        Quantization.from_bits(3)


@pytest.mark.parametrize(("name", "gigabytes"), [("int8", 7.82), ("int4", 4.12)])
def test_what_a_7b_takes(name, gigabytes):
    config = MistralConfig(
        vocab_size=32768,
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        max_positions=32768,
        bos_id=1,
        eos_ids=(2,),
    )
    quantization = Quantization.from_name(name)
    n_bytes, formats = 0, {}
    for tensor, shape in tensor_shapes(config).items():
        parts = quantization.parts(tensor, shape)
        n_bytes += parts.nbytes if parts else 2 * torch.Size(shape).numel()
        in_layer = re.sub(r"layers\.\d+\.", "", tensor)
        formats[in_layer] = parts.format if parts else None
    assert n_bytes / 1e9 == pytest.approx(gigabytes, abs=0.01)
    of_layers = quantization.format
    assert formats == {
        "tok_embeddings.weight": None,
        "attention_norm.weight": None,
        "attention.wq.weight": of_layers,
        "attention.wk.weight": of_layers,
        "attention.wv.weight": of_layers,
        "attention.wo.weight": of_layers,
        "ffn_norm.weight": None,
        "feed_forward.w1.weight": of_layers,
        "feed_forward.w2.weight": of_layers,
        "feed_forward.w3.weight": of_layers,
        "norm.weight": None,
        "output.weight": "q8_0",
    }


def test_rows_that_no_256_divide_get_a_scale_for_each_32(generator):
    quantization = Quantization.from_name("int4")
    for columns, form, bits in ((512, "iq4_xs", 4.25), (288, "iq4_nl", 4.5)):
        weight = torch.randn(4, columns, generator=generator)
        made = quantization.quantize("layers.0.attention.wq.weight", weight, "w")
        parts = quantization.parts("layers.0.attention.wq.weight", (4, columns))
        assert made.format == parts.format == form
        assert made.nbytes == parts.nbytes == 4 * columns * bits / 8
        assert relative_error(made, weight) < 0.085
    with pytest.raises(ValueError, match="has rows of 80, expected a multiple of 32"):
        quantization.parts("layers.0.attention.wq.weight", (4, 80))
    assert quantization.quantize("output.weight", weight, "w").format == "q8_0"
    assert quantization.quantize("norm.weight", weight[0], "w") is None


def test_any_strides_with_a_table(generator):
    weight = torch.randn(256, 64, generator=generator).T
    expected = quantize(weight.contiguous(), "iq4_xs")
    assert torch.equal(quantize(weight, "iq4_xs").values, expected.values)
