from __future__ import annotations

import pytest
import reference
import torch
from packed_weights import GROUPS, random_weight, random_weights
from tolerance import DTYPES, assert_close
from torch.nn import functional

from mistral_ext import _C, ops
from mistral_ext.ops import Quantized
from mistral_ext.ops.weight import parts_of
from mistral_ext.weights.quantize import quantize

NAN = float("nan")
# (T, K, N): none, one, primes, tails of every vector and tile; up to 8 tokens and more take
# different kernels, 257 tokens are more than a block of them, and rows of 70016 more than the least
# that a thread takes.
SHAPES = [(0, 8, 4), (1, 64, 1), (1, 257, 31), (3, 7, 33), (7, 96, 130), (8, 1, 4), (9, 1, 4)]
SHAPES += [(13, 65, 66), (40, 320, 97), (47, 515, 100), (257, 33, 13)]
SHAPES += [(2, 8, 3), (2, 70016, 9), (3, 2616, 20), (18, 1040, 35), (64, 208, 50), (70, 48, 9)]
# K is a multiple of the groups.
SHAPES_INT4 = [(1, 32, 1), (1, 352, 31), (2, 96, 5), (5, 640, 130), (8, 288, 4), (9, 32, 3)]
SHAPES_INT4 += [(33, 544, 97), (100, 160, 200)]
# ... and of the super-blocks of GGUF's formats.
SHAPES_PACKED = [(1, 256, 5), (4, 1280, 19), (35, 768, 98)]
_OTHER_GROUPS = {
    f"{form}, groups of {group}" for form, all_of in GROUPS.items() for group in all_of[1:]
}

# test_linear_bytes.py tests the others.
pytestmark = pytest.mark.usefixtures("exact_products")


def inputs(tokens: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """x as a slice of a matrix that is NaN around it.

    Rows are aligned as 16-byte accesses want it if the size allows that, else not at all.
    """
    before, after = (16, 16) if size % 8 == 0 else (2, 3)
    around = torch.full((tokens + 1, before + size + after), NAN, dtype=dtype)
    around[:-1, before:-after] = torch.randn(tokens, size, generator=generator)
    return around[:-1, before:-after]


def formats(made: dict[str, torch.Tensor | Quantized], backend: str) -> dict:
    """Those of the weights that the backend multiplies by itself.

    On CUDA devices packed formats have one group each; test_linear_packed_cuda.py tests the others.
    """
    if backend in ops.supported_isas():
        return made
    plain = made["plain"]
    if plain.dtype == torch.float32:
        pytest.skip("on CUDA devices, products of float32 are torch's")
    units = {"plain": 8, "int8": 16, "q8_0": 32}
    fit = {
        name: w
        for name, w in made.items()
        if plain.shape[1] % units.get(name, 8) == 0 and name not in _OTHER_GROUPS
    }
    if not fit:
        pytest.skip("CUDA kernels read rows by 16 bytes")
    return fit


def weights(shape, dtype, generator) -> dict[str, torch.Tensor | Quantized]:
    """One weight [N, K] in every format that K allows.

    The plain one lies between NaNs; what is read past the others, the sanitizer finds.
    """
    outputs, size = shape
    around = torch.full((outputs * size + 256,), NAN, dtype=dtype)
    plain = around[128:-128].view(outputs, size)
    exact = torch.randn(outputs, size, generator=generator)
    made = {"plain": plain.copy_(exact), "int8": quantize(exact, "int8")}
    if size % 32 == 0:
        made["q8_0"] = quantize(exact, "q8_0")
    for group in (32, 64, 128):
        if size % group == 0:
            made[f"int4, groups of {group}"] = quantize(exact, "int4", group)
    return made | random_weights(shape, generator)


def normalised_by(backend, x, norm):
    """x as the fused products normalise it; on CUDA devices a product with ones shows it."""
    if backend in ops.supported_isas():
        return ops.rms_norm(x, norm, 1e-3)
    rows = ops.linear(x, torch.eye(x.shape[1], dtype=x.dtype), norm, 1e-3)
    exact = reference.rms_norm(x.double(), norm.double(), 1e-3)
    assert_close(rows, exact, reference.rms_norm(x, norm, 1e-3), dim=1)
    return rows


def exact_weight(weight: torch.Tensor | Quantized) -> torch.Tensor:
    if isinstance(weight, Quantized):
        return weight.dequantize(torch.float64)
    return weight.double()


def check(out, x, weight):
    """The plain computation of a quantised weight rounds it to the dtype first."""
    wide = exact_weight(weight)
    exact = functional.linear(x.double(), wide)
    assert_close(out, exact, plain_linear(x, wide.to(x.dtype)))


def plain_linear(x, weight):
    """torch's product of a copy of x: with AMX it reads past the end of rows of an odd size."""
    return functional.linear(x.contiguous(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_INT4 + SHAPES_PACKED)
def test_linear(backend, shape, dtype, generator):
    tokens, size, outputs = shape
    x = inputs(tokens, size, dtype, generator)
    for weight in formats(weights((outputs, size), dtype, generator), backend).values():
        check(ops.linear(x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [2, 7, 9])
def test_long_rows(backend, tokens, dtype, generator):
    size = 14336 + 128  # several blocks of the CPU kernel for few tokens, and a part of one
    x = inputs(tokens, size, dtype, generator)
    for weight in formats(weights((35, size), dtype, generator), backend).values():
        out = ops.linear(x, weight)
        check(out, x, weight)
        if tokens <= 8:  # the same bits as alone
            assert torch.equal(ops.linear(x[:1], weight), out[:1])
            assert torch.equal(ops.linear(x[-1:], weight), out[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_get_the_same_bits_alone_and_together(backend, dtype, generator):
    """Each token that is the last of some is computed alone as well."""
    together = range(2, 9) if backend in ops.supported_isas() else (2, 3, 5, 8, 9, 16, 29, 64)
    rows = [0, *(tokens - 1 for tokens in together)]
    x = inputs(max(together), 416, dtype, generator)
    for weight in formats(weights((35, 416), dtype, generator), backend).values():
        for norm in (None, torch.randn(416, generator=generator).to(dtype)):
            alone = {row: ops.linear(x[row : row + 1], weight, norm)[0] for row in rows}
            for tokens in together:
                out = ops.linear(x[:tokens], weight, norm)
                for row in rows[: rows.index(tokens - 1) + 1]:
                    assert torch.equal(out[row], alone[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_get_the_same_bits_whatever_their_number(isa, dtype, generator):
    x = inputs(300, 416, dtype, generator)
    for weight in formats(weights((131, 416), dtype, generator), isa).values():
        together = ops.linear(x, weight)
        for tokens in (9, 17, 32, 33, 256, 257):
            assert torch.equal(ops.linear(x[:tokens], weight), together[:tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 160), (5, 160), (8, 72), (9, 264), (11, 32), (13, 352), (16, 8), (30, 160)],
)
def test_several_weights_with_a_norm_are_the_plain_steps(backend, tokens, size, dtype, generator):
    """To the bit: the same products, of the same normalised rows."""
    x = inputs(tokens, size, dtype, generator)
    norm = torch.randn(size, generator=generator).to(dtype)
    made = [formats(weights((rows, size), dtype, generator), backend) for rows in (70, 1, 33)]
    normalised = normalised_by(backend, x, norm)
    for parts in zip(*(w.values() for w in made), strict=True):
        separate = torch.cat([ops.linear(normalised, weight) for weight in parts], dim=1)
        assert torch.equal(ops.linear(x, parts, norm, 1e-3), separate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 13, 30])
def test_weights_of_a_pass_may_have_different_formats(backend, tokens, dtype, generator):
    """To the bit the same as one after another, with SwiGLU as its steps."""
    size = 256
    x = inputs(tokens, size, dtype, generator)
    norm = torch.randn(size, generator=generator).to(dtype)
    made = [formats(weights((rows, size), dtype, generator), backend) for rows in (70, 33, 33)]
    names = list(made[0])
    normalised = normalised_by(backend, x, norm)
    for i, name in enumerate(names):
        parts = [made[part][names[(i + part) % len(names)]] for part in range(3)]
        separate = torch.cat([ops.linear(normalised, weight) for weight in parts], dim=1)
        assert torch.equal(ops.linear(x, parts, norm, 1e-3), separate), name
        gate, up = parts[1:]
        exact = reference.swiglu(*(x.double() @ exact_weight(w).T for w in (gate, up)))
        rounded = [ops.linear(x, weight) for weight in (gate, up)]
        assert_close(ops.linear_swiglu(x, [gate, up]), exact, reference.swiglu(*rounded))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [3, 30])
def test_formats_of_words_share_packed_activations(isa, tokens, exact, generator):
    ops.set_exact_products(exact)
    x = inputs(tokens, 256, torch.float32, generator)

    def workspace(*names):
        parts = [random_weight(name, (4, 256), GROUPS[name][0], generator) for name in names]
        values, scales, formats, _ = parts_of(parts)
        out = torch.empty(tokens, 4 * len(parts))
        return _C.linear("linear", x, values, scales, formats, None, 0.0, out).workspace_bytes

    # Without VNNI many tokens stay floats by values of a table.
    names = ["q4_k", "q6_k", *(["iq4_nl"] if exact or tokens <= 8 else [])]
    assert workspace(*names) == workspace("q4_k")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_linear_residual(backend, tokens, dtype, generator):
    x = inputs(tokens, 160, dtype, generator)
    for weight in formats(weights((97, 160), dtype, generator), backend).values():
        around = torch.full((tokens + 2, 110), NAN, dtype=dtype)
        residual = around[1:-1, 9:106]
        residual.copy_(torch.randn(tokens, 97, generator=generator))
        wide = exact_weight(weight)
        exact = residual.double() + functional.linear(x.double(), wide)
        plain = residual + plain_linear(x, wide.to(dtype))
        ops.linear_residual(x, weight, residual)
        assert_close(residual, exact, plain)
        assert around.isnan().sum() == around.numel() - residual.numel()


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_can_be_added_apart_from_the_product(isa, tokens, dtype, generator):
    """By the norm after it, so that an adapter or a sum over devices can come between."""
    x, residual = inputs(tokens, 96, dtype, generator), inputs(tokens, 64, dtype, generator)
    weight = torch.randn(64, 96, generator=generator).to(dtype)
    norm = torch.randn(64, generator=generator).to(dtype)
    apart = residual.clone()
    normalised = ops.rms_norm(ops.linear(x, weight), norm, residual=apart)
    ops.linear_residual(x, weight, residual)
    # Apart, the product is rounded by up to half a unit, and that may take the sum to the next one.
    product = x.double() @ weight.double().T
    allowed = torch.finfo(dtype).eps * (product.abs() + residual.double().abs() + 1e-3)
    assert ((apart.double() - residual.double()).abs() <= allowed).all()
    assert torch.equal(normalised, ops.rms_norm(apart, norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 12, 30])
def test_linear_swiglu(backend, tokens, dtype, generator):
    x = inputs(tokens, 160, dtype, generator) / 8
    norm = torch.randn(160, generator=generator).to(dtype)
    made = [formats(weights((137, 160), dtype, generator), backend) for _ in range(2)]
    for gate, up in zip(*(w.values() for w in made), strict=True):
        exact_gate, exact_up = exact_weight(gate), exact_weight(up)
        exact = reference.swiglu(x.double() @ exact_gate.T, x.double() @ exact_up.T)
        plain = reference.swiglu(x @ exact_gate.to(dtype).T, x @ exact_up.to(dtype).T)
        assert_close(ops.linear_swiglu(x, [gate, up]), exact, plain)
        normalised = normalised_by(backend, x, norm)
        fused = ops.linear_swiglu(x, [gate, up], norm, 1e-3)
        assert torch.equal(fused, ops.linear_swiglu(normalised, [gate, up]))


@pytest.mark.parametrize("tokens", [40, 512])
def test_swiglu_of_two_formats_in_large_tasks(isa, tokens, generator):
    """On one thread a task has the most rows, and ends with the rows of the second format."""
    size, rows = 128, 720
    x = inputs(tokens, size, torch.bfloat16, generator) / 8
    gate = torch.randn(rows, size, generator=generator).bfloat16()
    up = quantize(torch.randn(rows, size, generator=generator), "q8_0")
    rounded = [ops.linear(x, weight) for weight in (gate, up)]
    exact = reference.swiglu(*(x.double() @ exact_weight(w).T for w in (gate, up)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_close(ops.linear_swiglu(x, [gate, up]), exact, reference.swiglu(*rounded))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [3, 30])
def test_any_number_of_threads_gives_the_same_bits(isa, tokens, generator):
    x = inputs(tokens, 96, torch.bfloat16, generator)
    for weight in weights((300, 96), torch.bfloat16, generator).values():
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            residual = torch.ones(tokens, 300, dtype=torch.bfloat16)
            ops.linear_residual(x, weight, residual)
            results.append(
                (ops.linear(x, weight), ops.linear_swiglu(x, [weight, weight]), residual)
            )
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("tokens", [2, 12, 20])
def test_what_is_not_finite_stays_in_its_row_and_token(backend, tokens, generator):
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    weight = torch.randn(40, 64, generator=generator).bfloat16()
    x[1, 3], x[-1, 63], weight[7, 5], weight[8, 60] = NAN, NAN, float("inf"), NAN
    expected = torch.ones(tokens, 40, dtype=torch.bool)
    expected[1], expected[-1], expected[:, 7:9] = False, False, False
    for norm in (None, torch.ones(64).bfloat16()):
        assert torch.equal(ops.linear(x, weight, norm).isfinite(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_any_size_of_activations(isa, dtype, tokens, generator):
    """One far larger than the others, at any place; and all of them near the ends of the range,
    where a power of two changes nothing else."""
    x = torch.randn(tokens, 192, generator=generator)
    x = ((x * 64).round() / 64).to(dtype)  # no scale makes a subnormal number of one
    exponents = [-100, 100] if dtype == torch.bfloat16 else [-6, 6]
    for weight in weights((20, 192), dtype, generator).values():
        for place in (0, 77, 191):
            outlier = x.clone()
            outlier[:, place] *= 500
            exact = outlier.double() @ exact_weight(weight).T
            plain = outlier @ exact_weight(weight).to(dtype).T
            assert_close(ops.linear(outlier, weight), exact, plain)
        for exponent in exponents:
            scaled = ops.linear(x * 2.0**exponent, weight)
            expected = ops.linear(x, weight) * 2.0**exponent
            normal = expected.abs() >= torch.finfo(dtype).smallest_normal
            assert torch.equal(scaled[normal], expected[normal])
        assert not ops.linear(torch.zeros_like(x), weight).any()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_rounded_weights_spread_what_is_not_finite(isa, value, generator):
    x = torch.randn(3, 192, generator=generator).bfloat16()
    x[1, 100] = value
    for name, weight in weights((20, 192), torch.bfloat16, generator).items():
        out = ops.linear(x, weight)
        assert out[[0, 2]].isfinite().all(), name
        assert not out[1].isfinite().any(), name


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_longest_row_of_int8(isa, tokens):
    size = 2**20
    values = torch.full((2, size), 127, dtype=torch.int8)
    values[1] = -127
    weight = Quantized(values, torch.full((2, 1), 2.0**-7, dtype=torch.bfloat16), "int8")
    for x in (1.0, -255.0):
        out = ops.linear(torch.full((tokens, size), x, dtype=torch.bfloat16), weight)
        expected = torch.tensor([127, -127]) * x * size / 2**7
        assert torch.equal(out, expected.bfloat16().expand(tokens, 2))
    longer = zeros((1, size + 1), (1, 1), torch.int8)
    with pytest.raises(ValueError, match="1048577 inputs, expected at most 1048576 as int8"):
        ops.linear(torch.zeros(tokens, size + 1).bfloat16(), longer)


def test_int4_of_every_value_and_place(backend):
    """Unpacking alone: each of the 8 places of a word with each of the 16 values."""
    values = torch.arange(-8, 8).repeat(8).view(8, 16).T.reshape(1, 128)
    weight = quantize(values * 0.5, "int4", 128)
    assert torch.equal(weight.dequantize(), values * 0.5)
    for tokens in (1, 128):
        x = torch.eye(128, dtype=torch.bfloat16)[:tokens]
        out = ops.linear(x, weight)
        assert torch.equal(out.float(), values[:, :tokens].T * 0.5)


@pytest.mark.parametrize("tokens", [3, 30])
def test_a_sum_of_nothing_is_zero(isa, tokens):
    x = torch.zeros(tokens, 0)
    for weight in (torch.zeros(4, 0), zeros((4, 0), (4, 1), torch.int8)):
        assert torch.equal(ops.linear(x, weight), torch.zeros(tokens, 4))


@pytest.mark.parametrize("tokens", [3, 30])
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
        ([torch.zeros(4, 8)] * 4, ValueError, "number of weights is 4, expected 1 to 3"),
        ([], ValueError, "number of weights is 0, expected 1 to 3"),
        (
            [torch.zeros(4, 8), torch.zeros(4, 7)],
            ValueError,
            "weight[1] has shape [4, 7], expected [any, 8]",
        ),
    ],
)
def test_weight_checks(tokens, weight, error, message):
    with pytest.raises(error) as caught:
        ops.linear(torch.zeros(tokens, 8), weight)
    assert f"linear: {message}" in str(caught.value)


def zeros(values, scales, dtype=torch.int32, scales_dtype=torch.bfloat16, form=None):
    form = form or ("int8" if dtype == torch.int8 else "int4")
    values, scales = torch.zeros(values, dtype=dtype), torch.zeros(scales, dtype=scales_dtype)
    return Quantized(values, scales, form)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (zeros((4, 9), (4, 1)), ValueError, "weight has shape [4, 9], expected [any, 12]"),
        (
            zeros((4, 12), (4, 3))._replace(format="int5"),
            ValueError,
            "format of weight is 'int5', expected one of plain, int8, int4, q8_0, q4_0, q4_1, ",
        ),
        (
            zeros((4, 96), (4, 2), torch.int8, torch.float16, "q8_0"),
            ValueError,
            "weight has 96 inputs and 2 scales a row, expected groups of 32 inputs",
        ),
        (
            zeros((4, 12), (4, 3), scales_dtype=torch.float16, form="q4_1"),
            ValueError,
            "weight has 96 inputs and 3 scales a row, expected groups of 32 inputs with 2 scales",
        ),
        (
            zeros((4, 12), (4, 6), scales_dtype=torch.uint8, form="q4_k"),
            ValueError,
            "weight has 96 inputs and 6 scales a row, expected groups of 256 inputs with 16 scales",
        ),
        (
            zeros((4, 18), (4, 6), scales_dtype=torch.float16, form="q6_k"),
            TypeError,
            "scales of weight has dtype torch.float16, expected torch.uint8",
        ),
        (
            zeros((4, 12), (4, 16), scales_dtype=torch.uint8, form="q5_k"),
            ValueError,
            "weight has shape [4, 12], expected [any, 15]",
        ),
        (
            zeros((4, 96), (4, 3), torch.int8, form="q8_0"),
            TypeError,
            "scales of weight has dtype torch.bfloat16, expected torch.float16",
        ),
        (
            zeros((4, 12), (5, 3)),
            ValueError,
            "scales of weight has shape [5, 3], expected [4, any]",
        ),
        (
            zeros((4, 12), (4, 2)),
            ValueError,
            "weight has 96 inputs and 2 scales a row, expected groups of 32, 64 or 128 inputs",
        ),
        (zeros((4, 12), (4, 0)), ValueError, "weight has 96 inputs and 0 scales a row"),
        (
            zeros((4, 12), (4, 3), scales_dtype=torch.float32),
            TypeError,
            "scales of weight has dtype torch.float32, expected torch.bfloat16",
        ),
        (
            zeros((4, 96), (4, 3), torch.int8),
            ValueError,
            "scales of weight has shape [4, 3], expected [4, 1]",
        ),
        (
            zeros((4, 12), (4, 3), torch.int64),
            TypeError,
            "weight has dtype torch.int64, expected torch.int32",
        ),
    ],
)
def test_quantised_weight_checks(weight, error, message):
    with pytest.raises(error) as caught:
        ops.linear(torch.zeros(3, 96), weight)
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


def test_checks_of_the_other_arguments():
    x, weight, norm = torch.zeros(3, 8), torch.zeros(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"linear: norm has shape \[7\], expected \[8\]"):
        ops.linear(x, weight, norm[:7])
    with pytest.raises(ValueError, match=r"linear: eps is -1.0*, expected 0 or more"):
        ops.linear(x, weight, norm, -1.0)
    with pytest.raises(ValueError, match=r"linear_residual: residual has shape \[3, 5\], expected"):
        ops.linear_residual(x, weight, torch.zeros(3, 5))
    with pytest.raises(TypeError, match=r"linear_residual: residual has dtype torch.bfloat16"):
        ops.linear_residual(x, weight, torch.zeros(3, 4).bfloat16())
    with pytest.raises(
        ValueError, match=r"linear_residual: residual has strides \[0, 1\] and shape"
    ):
        ops.linear_residual(x, weight, torch.zeros(4).expand(3, 4))
    with pytest.raises(ValueError, match=r"linear_swiglu: up has 5 outputs, expected 4 like gate"):
        ops.linear_swiglu(x, [weight, torch.zeros(5, 8)])
    with pytest.raises(ValueError, match=r"linear_swiglu: gate has shape \[4, 9\]"):
        ops.linear_swiglu(x, [torch.zeros(4, 9), weight])
