"""The CUDA kernels of products: what they are designed to move through memory, any order of
threads, any number of multiprocessors."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from backends import use
from tolerance import assert_close
from torch.nn import functional

from mistral_ext import ops
from mistral_ext.ops import Quantized
from mistral_ext.ops.weight import parts_of
from mistral_ext.weights.quantize import quantize

INT4 = {"int4, groups of 32": 32, "int4, groups of 64": 64, "int4, groups of 128": 128}
GROUPS = INT4 | {"q8_0": 32}
FORMATS = ["plain", "int8", *GROUPS]
STORED = {"plain": 2, "int8": 1, "q8_0": 1} | dict.fromkeys(INT4, 0.5)  # bytes of a value
VALUES = {form: int(128 / stored) for form, stored in STORED.items()}  # of a chunk of 128 bytes


def make_weight(form, rows, size, generator, dtype=torch.bfloat16):
    exact = torch.randn(rows, size, generator=generator)
    if form == "plain":
        return exact.to(dtype)
    return quantize(exact, form.partition(",")[0], GROUPS.get(form))


def make_x(tokens, size, generator, dtype=torch.bfloat16):
    return torch.randn(tokens, size, generator=generator).to(dtype)


def only_launch(emulator):
    (record,) = emulator.take_launches()
    return record


def chunks_of(form, size):
    return math.ceil(size / VALUES[form])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("size", [512, 1152])
def test_each_weight_is_read_once_by_whole_cache_lines(emulator, form, tokens, size, generator):
    rows = 48
    weight, x = make_weight(form, rows, size, generator), make_x(tokens, size, generator)
    with use(emulator):
        ops.linear(x, weight)
    record = only_launch(emulator)
    tiles = rows // 16
    values = int(rows * size * STORED[form])
    # Of x, each tile of 16 rows reads all tokens; lanes without a token repeat another's loads.
    of_x = tiles * 8 * size * 2
    scales = 0
    if form == "int8":
        scales = tiles * 16 * 4 * 2  # by the 4 lanes that have results of a row
    elif form in GROUPS:
        scales = rows * size // GROUPS[form] * 2
    rest = record["loaded_bytes"] - values - of_x - scales
    if form in GROUPS and size // GROUPS[form] % 2:
        # Every other row of scales begins within a word of 4 bytes: a chunk's may take one more.
        assert 0 < rest <= rows // 2 * chunks_of(form, size) * 4
    else:
        assert rest == 0
    assert record["stored_bytes"] == 2 * tokens * rows
    assert record["shared_conflicts"] == 0
    # Sectors of 32 bytes: those of the weights are read once and whole; those of x by one load, or
    # two for weights of 8 bits, whose lanes take every other 16 bytes.
    sectors = record["load_sectors"] - tiles * tokens * size * 2 // 32 * (1 + (form == "int8"))
    if form in GROUPS:  # of scales, what a tile's chunk has of a row may lie in two sectors
        assert values // 32 < sectors <= values // 32 + rows * chunks_of(form, size) * 2
    else:
        assert sectors == values // 32 + (2 * tiles if form == "int8" else 0)
    # 2 products for each 32 values of a chunk
    assert record["mma"] == tiles * chunks_of(form, size) * VALUES[form] // 32 * 2


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16])
def test_a_block_normalises_x_once(emulator, form, tokens, generator):
    """And then reads it from shared memory, while it reads the weights once."""
    rows, size = 16 * 7, 768
    weight, x = make_weight(form, rows, size, generator), make_x(tokens, size, generator)
    norm = make_x(1, size, generator)[0]
    emulator.configure(multiprocessors=2, capability=90)
    with use(emulator):
        ops.linear(x, weight, norm)
    record = only_launch(emulator)
    blocks = record["grid"][0]
    assert blocks in (2, 4)
    scales = 0
    if form == "int8":
        scales = rows * 4 * 2 * math.ceil(tokens / 8)  # for each 8 tokens, by 4 lanes
    elif form in GROUPS:
        scales = rows * size // GROUPS[form] * 2
    normalising = blocks * (tokens + math.ceil(tokens / 8)) * size * 2
    assert record["loaded_bytes"] == int(rows * size * STORED[form]) + scales + normalising
    assert record["stored_bytes"] == 2 * tokens * rows
    assert record["shared_conflicts"] == 0


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [16, 32, 64])
def test_more_tokens_read_the_weights_once_too(emulator, form, tokens, generator):
    rows, size = 64, 512
    weight, x = make_weight(form, rows, size, generator), make_x(tokens, size, generator)
    with use(emulator):
        ops.linear(x, weight)
    record = only_launch(emulator)
    rows_that_share_x = 16 if tokens == 16 else 32
    of_x = rows // rows_that_share_x * tokens * size * 2
    rest = record["loaded_bytes"] - of_x - int(rows * size * STORED[form])
    if form == "int8":
        assert rest == rows * 4 * 2 * tokens // 8  # scales, for each 8 tokens
    else:
        assert rest == (0 if form == "plain" else rows * size // GROUPS[form] * 2)
    assert record["shared_conflicts"] == 0


def test_the_launches_of_a_call(emulator, generator):
    """One, and one more where x has to be normalised before: of many tokens, or of long rows."""
    weight, norm = make_weight("plain", 40, 64, generator), make_x(1, 64, generator)[0]
    long_weight, long_norm = make_weight("plain", 8, 2816, generator), make_x(1, 2816, generator)[0]
    calls = [
        (make_x(1, 64, generator), weight, None, 1),
        (make_x(64, 64, generator), weight, None, 1),
        (make_x(8, 64, generator), weight, norm, 1),
        (make_x(16, 64, generator), weight, norm, 1),
        (make_x(17, 64, generator), weight, norm, 2),
        (make_x(4, 2816, generator), long_weight, long_norm, 1),
        (make_x(8, 2816, generator), long_weight, long_norm, 2),
        (make_x(0, 64, generator), weight, norm, 0),
    ]
    for x, w, n, launches in calls:
        with use(emulator):
            out = ops.linear(x, w, n)
        assert out.shape == (len(x), len(w))
        assert len(emulator.take_launches()) == launches


@pytest.mark.parametrize("form", ["plain", "int8", "int4, groups of 32"])
@pytest.mark.parametrize("tokens", [8, 9, 16])
def test_long_rows_are_normalised_alike_by_a_block_and_before(emulator, form, tokens, generator):
    """To the bit: such tokens fit in a block's shared memory with 227 KB of it, not with 99; each
    alone fits in both."""
    size = 4096  # that of Mistral 7B
    weight, x = make_weight(form, 8, size, generator), make_x(tokens, size, generator)
    norm = make_x(1, size, generator)[0]
    results = []
    for capability, launches in ((89, 2), (90, 1)):
        emulator.configure(capability=capability)
        with use(emulator):
            results.append(ops.linear(x, weight, norm))
        assert len(emulator.take_launches()) == launches
    with use(emulator):
        results.append(torch.cat([ops.linear(row, weight, norm) for row in x.split(1)]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tokens", [2, 12, 40])
def test_any_order_of_threads_gives_the_same_bits(emulator, form, tokens, generator):
    """And any number of multiprocessors: one block for all rows, or one for each tile."""
    x, norm = make_x(tokens, 1280, generator), make_x(1, 1280, generator)[0]
    gate, up = (make_weight(form, 52, 1280, generator) for _ in range(2))
    results = []
    for seed, (multiprocessors, copies) in enumerate([(1, "late"), (3, "early"), (40, "late")]):
        emulator.configure(seed=seed, copies=copies, multiprocessors=multiprocessors, capability=90)
        residual = torch.ones(tokens, 52, dtype=torch.bfloat16)
        with use(emulator):
            ops.linear_residual(x, gate, residual)
            results.append(
                (ops.linear(x, [gate, up], norm), ops.linear_swiglu(x, [gate, up]), residual)
            )
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("form", "size"),
    [(form, size) for form in INT4 for size in (128, 384, 640, 1152)]
    + [("q8_0", size) for size in (32, 96, 160, 1120)],
)
def test_any_number_of_scales(emulator, form, size, generator):
    """If it is odd, every other row of scales begins within a word of 4 bytes."""
    weight, x = make_weight(form, 37, size, generator), make_x(2, size, generator)
    around = torch.full((weight.scales.numel() + 4,), float("nan"), dtype=weight.scales.dtype)
    scales = around[2:-2].view(weight.scales.shape).copy_(weight.scales)
    with use(emulator):
        out = ops.linear(x, weight._replace(scales=scales))
    wide = weight.dequantize(torch.float64)
    plain = functional.linear(x, wide.bfloat16())
    assert_close(out, functional.linear(x.double(), wide), plain)


@pytest.mark.parametrize(("form", "scales"), [("int8", torch.bfloat16), ("q8_0", torch.float16)])
def test_8_bits_of_every_value_and_place(emulator, form, scales):
    """-128 too, though `quantize` makes none."""
    values = torch.arange(-128, 128).repeat(32).view(32, 256).T.roll(3, 1).contiguous()
    half = torch.full((256, 1), 0.5, dtype=scales)
    weight = Quantized(values.to(torch.int8), half, form)
    for dtype in (torch.bfloat16, torch.float16):
        with use(emulator):
            out = ops.linear(torch.eye(32, dtype=dtype), weight)
        assert torch.equal(out.float(), values.T * 0.5)


# Weights of one call, by their formats, and the launches that multiply them: neighbours of the same
# format and group share a launch.
MIXED = [
    (("q8_0", "int4, groups of 64", "int4, groups of 64"), 2),
    (("int8", "int8", "plain"), 2),
    (("int4, groups of 32", "int4, groups of 128", "int4, groups of 32"), 3),
    (("plain", "q8_0"), 2),
]


@pytest.mark.parametrize(("forms", "launches"), MIXED)
@pytest.mark.parametrize(("tokens", "capability"), [(1, 89), (9, 89), (9, 90), (17, 90), (65, 90)])
def test_formats_of_a_call_may_differ(emulator, forms, launches, tokens, capability, generator):
    """To the bit what each weight alone comes to; x is normalised before if any launch needs it:
    in 99 KB of shared memory, 9 rows of x find no room beside what int4 streams."""
    emulator.configure(capability=capability)
    x, norm = make_x(tokens, 384, generator), make_x(1, 384, generator)[0]
    rows = (40, 7, 33)[: len(forms)]
    made = [make_weight(*of, 384, generator) for of in zip(forms, rows, strict=True)]
    with use(emulator):
        apart = torch.cat([ops.linear(x, weight) for weight in made], dim=1)
        normalised = torch.cat([ops.linear(x, weight, norm) for weight in made], dim=1)
        emulator.take_launches()
        assert torch.equal(ops.linear(x, made), apart)
        passes = math.ceil(tokens / 64)
        assert len(emulator.take_launches()) == passes * launches
        assert torch.equal(ops.linear(x, made, norm), normalised)
    # The second pass of 65 has a single token.
    norms = tokens > 9 or (capability == 89 and tokens == 9 and not INT4.keys().isdisjoint(forms))
    assert len(emulator.take_launches()) == passes * launches + norms


@pytest.mark.parametrize(
    "forms", [("q8_0", "int4, groups of 64"), ("plain", "int8"), tuple(INT4)[:2]]
)
@pytest.mark.parametrize("rows", [40, 33])  # of scratch memory, rows aligned to 16 bytes or not
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_swiglu_of_two_formats(emulator, forms, rows, tokens, generator):
    """To the bit what two products and `swiglu` come to."""
    x, norm = make_x(tokens, 128, generator) / 8, make_x(1, 128, generator)[0]
    gate, up = (make_weight(form, rows, 128, generator) for form in forms)
    passes = math.ceil(tokens / 64)
    with use(emulator):
        for weight, norms in ((None, 0), (norm, tokens > 16)):
            parts = [ops.linear(x, part, weight) for part in (gate, up)]
            expected = ops.swiglu(*parts)
            emulator.take_launches()
            assert torch.equal(ops.linear_swiglu(x, [gate, up], weight), expected)
            assert len(emulator.take_launches()) == 3 * passes + norms


def test_an_argmax_of_two_formats_is_refused(emulator, generator):
    parts = [make_weight(form, 8, 64, generator) for form in ("plain", "q8_0")]
    with use(emulator), pytest.raises(RuntimeError, match="linear: launch failed"):
        torch.ops.mistral_ext.linear_argmax(make_x(2, 64, generator), *parts_of(parts))


def test_swiglu_of_extreme_gates(emulator):
    gate = torch.tensor([[0.0], [1e4], [3e38], [-1e4], [-3e38], [float("nan")]]).bfloat16()
    padded = functional.pad(gate, (0, 7))
    up = torch.full_like(padded, 0.5)
    x = torch.eye(8, dtype=torch.bfloat16)[:1]
    with use(emulator):
        out = ops.linear_swiglu(x, [padded, up])
    expected = reference.swiglu(gate.float(), torch.tensor(0.5)).bfloat16().T
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "form", "dtype"),
    [
        (12, "plain", torch.bfloat16),
        (24, "int8", torch.float16),
        (64, "plain", torch.float32),
        (64, "q8_0", torch.float32),
    ],
)
def test_what_has_no_kernel_is_refused(emulator, size, form, dtype, generator):
    """Here by the launch; on a GPU the bindings say why."""
    weight = make_weight(form, 4, size, generator, dtype)
    with use(emulator), pytest.raises(RuntimeError, match="linear: launch failed"):
        ops.linear(make_x(2, size, generator, dtype), weight)


def test_rows_of_every_part_are_read_by_16_bytes(emulator, generator):
    parts = [make_weight(form, 4, 24, generator) for form in ("plain", "int8")]
    with use(emulator), pytest.raises(RuntimeError, match="linear: launch failed"):
        ops.linear(make_x(2, 24, generator), parts)
