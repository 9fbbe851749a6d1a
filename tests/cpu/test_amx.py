"""The kernels that use AMX, with its instructions emulated on a processor without them (tests/amx):
the tests of these ops, the traffic of tiles, and the emulation itself."""

from __future__ import annotations

import shutil
import struct
import subprocess

import backends
import pytest
import reference
import torch
from ragged import RaggedBatch
from skipped import X86_SETS
from test_attention import (
    test_each_tensor_has_strides_of_its_own,  # noqa: F401
    test_large_scores_do_not_overflow,  # noqa: F401
    test_longer_than_the_kernels_tiles,  # noqa: F401
    test_the_cut_of_a_prompt_changes_no_bit,  # noqa: F401
)
from test_linear import (  # collected here again, with this file's `isa` and `backend`
    check,
    inputs,
    test_any_number_of_threads_gives_the_same_bits,  # noqa: F401
    test_any_size_of_activations,  # noqa: F401
    test_few_tokens_get_the_same_bits_alone_and_together,  # noqa: F401
    test_int4_of_every_value_and_place,  # noqa: F401
    test_linear,  # noqa: F401
    test_linear_residual,  # noqa: F401
    test_linear_swiglu,  # noqa: F401
    test_long_rows,  # noqa: F401
    test_several_weights_with_a_norm_are_the_plain_steps,  # noqa: F401
    test_swiglu_of_two_formats_in_large_tasks,  # noqa: F401
    test_what_is_not_finite_stays_in_its_row_and_token,  # noqa: F401
)
from test_linear_backward import test_gradient_of_x_by_every_format  # noqa: F401
from tolerance import assert_close

from mistral_ext import _C, ops
from mistral_ext.weights.quantize import quantize

pytestmark = pytest.mark.usefixtures("exact_products")  # as in the files of these tests


@pytest.fixture(scope="session")
def amx():
    if "avx512_bf16" not in ops.supported_isas():
        needs = X86_SETS["avx512_bf16"]
        pytest.skip(f"AMX, emulated: this processor lacks {needs}, which the rest needs")
    return backends.build_emulator("amx")


@pytest.fixture(params=["amx in the emulator"])
def isa(amx):
    if "amx" in ops.supported_isas():
        pytest.skip("this processor has AMX: it needs no emulation")
    amx.take_counts()
    with backends.use_amx(amx):
        yield "amx"


@pytest.fixture
def backend(isa):
    return isa


@pytest.fixture
def tiles(amx):
    """The instructions, in a thread whose tiles are configured."""
    amx.configure_whole_tiles()
    yield amx
    amx.release()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# (T, K, N), with an odd vector of tokens and not, of one block and several in every direction.
SHAPES = [(9, 128, 1), (64, 256, 96), (80, 1000, 200), (20, 384, 700), (530, 130, 900)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["plain", "int8", "q8_0"])
def test_products_and_traffic_of_tiles(isa, amx, shape, form, generator):
    """Each product of 16 x 32 weights and 32 x 16 activations is one instruction, with one load of
    a tile for it where two vectors of tokens go together; sums are loaded and stored once per 128
    values of k."""
    tokens, size, outputs = shape
    x = inputs(tokens, size, torch.bfloat16, generator)
    weight = torch.randn(outputs, size, generator=generator)
    if form == "q8_0" and size % 32:
        pytest.skip("K is no multiple of a group")
    weight = weight.bfloat16() if form == "plain" else quantize(weight, form)
    check(ops.linear(x, weight), x, weight)
    counts = amx.take_counts()
    blocks = ceil_div(size, 128)
    # Tasks have up to 288 rows and 512 tokens, if with fewer there are not 4 for each thread.
    tasks = ceil_div(tokens, 512)
    rows = next((r for r in (288, 192) if ceil_div(outputs, r) * tasks >= 4), 96)
    row_pairs = sum(ceil_div(min(96, outputs - row), 32) for row in range(0, outputs, 96))
    vectors = ceil_div(tokens, 16)
    odd = vectors % 2
    assert counts == {
        "configured": ceil_div(outputs, rows) * tasks,
        "dots": row_pairs * 2 * vectors * blocks * 4,
        "stores": row_pairs * 2 * vectors * blocks,
        "loads": row_pairs * ((2 * vectors + odd) * blocks * 4 + 2 * vectors * (blocks - 1)),
    }


def test_swiglu_of_several_blocks(isa, amx, generator):
    x = inputs(40, 256, torch.bfloat16, generator) / 16
    gate, up = torch.randn(2, 400, 256, generator=generator).bfloat16()
    exact = reference.swiglu(x.double() @ gate.double().T, x.double() @ up.double().T)
    plain = reference.swiglu(x @ gate.T, x @ up.T)
    assert_close(ops.linear_swiglu(x, [gate, up]), exact, plain)
    assert amx.take_counts()["configured"] == 5  # tasks of 96 rows of each


def test_attention_of_prompts_uses_tiles(isa, amx):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        RaggedBatch([40], 8, 4, 2, 64, dtype).step((33,))
        counts = amx.take_counts()
        assert bool(counts["dots"]) == (dtype == torch.bfloat16)


def test_other_dtypes_use_no_tiles(isa, amx):
    for dtype in (torch.float32, torch.float16):
        ops.linear(torch.ones(30, 64, dtype=dtype), torch.ones(40, 64, dtype=dtype))
    assert not any(amx.take_counts().values())


def test_a_configuration_of_another_library_stays(isa, amx):
    """So few rows are one task, which runs on the calling thread."""
    others = config({0: 3, 1: 3, 2: 5}, {0: 16, 1: 20, 2: 16})
    amx.configure(others)
    try:
        ops.linear(torch.ones(30, 64).bfloat16(), torch.ones(40, 64).bfloat16())
        assert amx.configuration() == others
    finally:
        amx.release()


def load(amx, tile: int, values: torch.Tensor) -> None:
    amx.load(tile, values.data_ptr(), values.stride(0) * values.element_size())


def dot(amx, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c + a @ b by the instructions; b [32, 16] goes in pairs of rows."""
    pairs = b.view(16, 2, 16).transpose(1, 2).contiguous().view(16, 32)
    load(amx, 0, c)
    load(amx, 1, a)
    load(amx, 2, pairs)
    amx.dot_bf16(0, 1, 2)
    out = torch.full((16, 16), float("nan"))
    amx.store(0, out.data_ptr(), 64)
    return out


def test_dot(tiles, generator):
    a = torch.randn(16, 80, generator=generator).bfloat16()[:, 7:39]  # rows of any stride
    b = torch.randn(32, 16, generator=generator).bfloat16()
    c = torch.randn(16, 16, generator=generator)
    expected = c.double() + a.double() @ b.double()
    torch.testing.assert_close(dot(tiles, a, b, c).double(), expected, rtol=0, atol=1e-5)


def test_order_and_rounding_of_a_dot(tiles):
    """As Intel's manual has it: sums of even and of odd k, from 0 on, are added to each other, then
    to c; what is subnormal counts as zero."""
    a = torch.zeros(16, 32, dtype=torch.bfloat16)
    b = torch.ones(32, 16, dtype=torch.bfloat16)
    c = torch.zeros(16, 16)
    a[0, :3] = torch.tensor([2.0**30, 1, -(2.0**30)])  # even ones cancel before the 1 is added
    a[1, :3] = torch.tensor([2.0**30, -(2.0**30), 1])  # the 1 is lost in 2^30
    c[2, :] = 2.0**30
    a[2, :2] = torch.tensor([1.0, -1])  # sums of products first
    a[3, 0] = 2.0**-127
    c[4, :] = 2.0**-130
    c[5, :] = 1.5 * 2.0**-126
    a[5, 0] = -(2.0**-126)
    out = dot(tiles, a, b, c)
    expected = torch.zeros(16, 16)
    expected[0], expected[2] = 1, 2.0**30
    assert torch.equal(out, expected)


def test_zero_and_configure_clear_tiles(tiles):
    ones, out = torch.ones(16, 16), torch.empty(16, 16)
    for clear in (lambda: tiles.zero(3), tiles.configure_whole_tiles):
        load(tiles, 3, ones)
        tiles.store(3, out.data_ptr(), 64)
        assert torch.equal(out, ones)
        clear()
        tiles.store(3, out.data_ptr(), 64)
        assert not out.any()


def config(rows: dict[int, int], row_bytes: dict[int, int], palette=1, start_row=0, reserved=0):
    reserved_bytes = [reserved] + [0] * 13
    return struct.pack(
        "<BB14B16H16B",
        palette,
        start_row,
        *reserved_bytes,
        *(row_bytes.get(tile, 0) for tile in range(16)),
        *(rows.get(tile, 0) for tile in range(16)),
    )


def test_smaller_tiles(amx, generator):
    """3 x 4 sums of 10 products; what lies outside the tiles is neither read nor written."""
    nan = float("nan")
    amx.configure(config({0: 3, 1: 3, 2: 5}, {0: 16, 1: 20, 2: 16}))
    a = torch.full((4, 16), nan, dtype=torch.bfloat16)
    a[:3, :10] = torch.randn(3, 10, generator=generator)
    b = torch.randn(10, 4, generator=generator).bfloat16()
    pairs = torch.full((6, 16), nan, dtype=torch.bfloat16)
    pairs[:5, :8] = b.view(5, 2, 4).transpose(1, 2).reshape(5, 8)
    out = torch.full((4, 8), nan)
    amx.zero(0)
    load(amx, 1, a)
    load(amx, 2, pairs)
    amx.dot_bf16(0, 1, 2)
    amx.store(0, out.data_ptr(), 32)
    amx.release()
    expected = a[:3, :10].double() @ b.double()
    torch.testing.assert_close(out[:3, :4].double(), expected, rtol=0, atol=1e-5)
    assert out.isnan().sum() == out.numel() - 12


@pytest.mark.parametrize(
    "configuration",
    [
        config({0: 17}, {0: 64}),
        config({0: 16}, {0: 65}),
        config({0: 16}, {}),
        config({}, {7: 4}),
        config({8: 16}, {8: 64}),
        config({0: 16}, {0: 64}, start_row=1),
        config({0: 16}, {0: 64}, reserved=1),
        config({0: 16}, {0: 64}, palette=2),
    ],
)
def test_configurations_that_are_not_valid(amx, configuration):
    with pytest.raises(RuntimeError, match="ldtilecfg"):
        amx.configure(configuration)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda amx, p: (amx.release(), amx.zero(0)), "tilezero of tile 0 in a thread that"),
        (lambda amx, p: (amx.release(), amx.load(1, p, 64)), "tileloadd of tile 1 in a thread"),
        (lambda amx, p: (amx.release(), amx.dot_bf16(0, 1, 2)), "tdpbf16ps of tile 0 in a thread"),
        (lambda amx, p: amx.store(6, p, 64), "tilestored of tile 6, which is not configured"),
        (lambda amx, p: amx.load(8, p, 64), "tileloadd of tile 8: there are 8 tiles"),
        (lambda amx, p: amx.dot_bf16(0, 1, 1), "tdpbf16ps: one tile is two operands"),
        (lambda amx, p: amx.dot_bf16(0, 1, 3), "tdpbf16ps: the operands' sizes do not match"),
        (lambda amx, p: amx.dot_bf16(3, 1, 2), "tdpbf16ps: the operands' sizes do not match"),
    ],
)
def test_mistakes_are_found(amx, mistake, message):
    amx.configure(config({0: 16, 1: 16, 2: 16, 3: 8}, {0: 64, 1: 64, 2: 64, 3: 64}))
    memory = torch.zeros(16, 16)
    try:
        with pytest.raises(RuntimeError, match=message):
            mistake(amx, memory.data_ptr())
    finally:
        amx.release()


@pytest.mark.skipif("neon" in ops.supported_isas(), reason="a build for other processors")
def test_the_compiled_module_holds_the_instructions():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump found")
    command = [objdump, "-d", "--no-show-raw-insn", _C.__file__]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "sttilecfg"):
        assert f"\t{name}" in text
