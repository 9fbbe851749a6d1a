"""Products with weights of 4 to 6 bits, in which activations have 8 bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from packed_weights import random_weights

from mistral_ext import ops
from mistral_ext.weights.quantize import quantize

NAN = float("nan")
# (T, K, N): tails of super-blocks and of groups, and rows of several blocks of the kernels. That
# of more than 8 tokens has panels of 16 rows, 2048 values and 256 tokens. With AVX-512 and VNNI, 17
# tokens and more (28 with 5 and 6 bits) have panels of 96 rows and 512 values.
SHAPES = [(1, 32, 1), (2, 96, 5), (3, 576, 33), (8, 512, 9), (1, 768, 17), (5, 14336 + 256, 11)]
SHAPES += [(9, 32, 1), (10, 96, 17), (17, 576, 33), (13, 4608, 5), (259, 288, 3), (33, 256, 230)]
SHAPES += [(3, 640, 33), (11, 384, 18), (26, 640, 50)]  # groups of 128 in a part of a super-block


@pytest.fixture(autouse=True)
def rounding(isa):
    """Skips the set without these kernels; int4 has others with AVX-512."""
    if isa == "scalar":
        pytest.skip("the scalar kernels are exact")
    before = ops.exact_products()
    ops.set_exact_products(False)
    yield
    ops.set_exact_products(before)


def weights(shape, isa, generator):
    made = random_weights(shape, generator)
    if not isa.startswith("avx512") and isa != "amx":
        for group in (32, 64, 128):
            if shape[1] % group == 0:
                exact = torch.randn(shape, generator=generator)
                made[f"int4, groups of {group}"] = quantize(exact, "int4", group)
    return made


def is_rounded(name: str, tokens: int, isa: str, dtype: torch.dtype = torch.float32) -> bool:
    """More than 8 tokens are not rounded in bf16 in tiles; nor, on x86 without VNNI, where weights
    are values of a table."""
    if tokens <= 8:
        return True
    if isa == "amx":
        return dtype != torch.bfloat16
    return isa not in ("avx2", "avx512") or not name.startswith("iq4")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each block of 32 in units of a 127th of its largest magnitude, in float64."""
    blocks = x.float().unflatten(1, (-1, 32))
    unit = blocks.abs().amax(2, keepdim=True) / 127
    integers = torch.where(unit > 0, blocks / unit, 0).round()
    return (integers.double() * unit).flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_of_rounded_activations(isa, shape, generator):
    tokens, size, outputs = shape
    x = torch.randn(tokens, size, generator=generator)
    for name, weight in weights((outputs, size), isa, generator).items():
        out = ops.linear(x, weight)
        seen = rounded(x) if is_rounded(name, tokens, isa) else x.double()
        exact = seen @ weight.dequantize(torch.float64).T
        assert (out - exact).abs().max() <= 2e-6 * exact.abs().max(), name


def test_no_tokens(isa, generator):
    for name, weight in weights((9, 512), isa, generator).items():
        assert ops.linear(torch.empty(0, 512), weight).shape == (0, 9), name


def test_no_outputs(isa, generator):
    for name, weight in weights((0, 512), isa, generator).items():
        assert ops.linear(torch.ones(9, 512), weight).shape == (9, 0), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_number_of_tokens_gives_the_same_bits(isa, dtype, generator):
    x = torch.randn(8, 2304, generator=generator).to(dtype)
    for name, weight in weights((35, 2304), isa, generator).items():
        alone = torch.cat([ops.linear(row, weight) for row in x.split(1)])
        for tokens in (2, 3, 5, 8):
            assert torch.equal(ops.linear(x[:tokens], weight), alone[:tokens]), name
        for tokens in (9, 16, 17, 23, 28, 33):
            if is_rounded(name, tokens, isa, dtype):
                prompt = ops.linear(x.repeat(5, 1)[:tokens], weight)
                assert torch.equal(prompt, alone.repeat(5, 1)[:tokens]), name


@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("size", [96, 2304])
def test_a_row_gets_the_same_bits_at_any_place(isa, tokens, size, generator):
    """Kernels multiply rows in groups, which may begin at any row."""
    x = torch.randn(tokens, size, generator=generator).bfloat16()
    made = weights((39, size), isa, generator)
    made["q8_0"] = quantize(torch.randn(39, size, generator=generator), "q8_0")
    for name, weight in made.items():
        out = ops.linear(x, weight)
        for first in (1, 2, 3, 38):
            some = weight._replace(values=weight.values[first:], scales=weight.scales[first:])
            assert torch.equal(ops.linear(x, some), out[:, first:]), name
            some = weight._replace(values=weight.values[:first], scales=weight.scales[:first])
            assert torch.equal(ops.linear(x, some), out[:, :first]), name


@pytest.mark.parametrize("tokens", [2, 19])
def test_exact_products_are_asked_for(isa, tokens, generator):
    x = torch.randn(tokens, 256, generator=generator)
    for name, weight in weights((9, 256), isa, generator).items():
        exact = x.double() @ weight.dequantize(torch.float64).T
        largest = exact.abs().max()
        ops.set_exact_products(True)
        assert ops.exact_products() is True
        assert (ops.linear(x, weight) - exact).abs().max() < 1e-5 * largest, name
        ops.set_exact_products(False)
        error = (ops.linear(x, weight) - exact).abs().max()
        assert error < 0.02 * largest, name
        assert (error > 1e-4 * largest) == is_rounded(name, tokens, isa), name


@pytest.mark.parametrize("tokens", [3, 10])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(isa, value, tokens, generator):
    x = torch.randn(tokens, 512, generator=generator)
    x[1, 300] = value
    for name, weight in weights((7, 512), isa, generator).items():
        finite = ops.linear(x, weight).isfinite()
        assert finite[[0, *range(2, tokens)]].all(), name
        assert not finite[1].any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(isa, dtype, generator):
    x = torch.randn(3, 576, generator=generator).to(dtype)
    for name, weight in weights((33, 576), isa, generator).items():
        exact = (rounded(x) @ weight.dequantize(torch.float64).T).float()
        torch.testing.assert_close(ops.linear(x, weight).float(), exact.to(dtype).float(), msg=name)


@pytest.mark.parametrize(("tokens", "outputs"), [(3, 25), (11, 25), (11, 101)])
def test_fused_ops_round_alike(isa, tokens, outputs, generator):
    """What comes before a product and after it, and several weights, of one format or of two.

    The last tile of floats reaches past these outputs, where sums of the next part in bytes are;
    101 are more than a block of floats has.
    """
    x, norm = torch.randn(tokens, 512, generator=generator), torch.randn(512, generator=generator)
    made = weights((outputs, 512), isa, generator)
    made["plain"] = torch.randn(outputs, 512, generator=generator)
    others = [*made.values()][1:] + [*made.values()][:1]
    for (name, one), other in zip(made.items(), others, strict=True):
        alone = [ops.linear(x, weight) for weight in (one, other)]
        assert torch.equal(ops.linear(x, [one, other, one]), torch.cat([*alone, alone[0]], 1)), name
        normed = ops.linear(ops.rms_norm(x, norm, 1e-5), one)
        torch.testing.assert_close(ops.linear(x, one, norm, 1e-5), normed, msg=name)
        torch.testing.assert_close(ops.linear_swiglu(x, [one, other]), ops.swiglu(*alone), msg=name)
        residual = torch.randn(tokens, outputs, generator=generator)
        expected = residual + alone[0]
        ops.linear_residual(x, one, residual)
        torch.testing.assert_close(residual, expected, msg=name)
        logits, token_ids = ops.linear_argmax(x, one)
        assert torch.equal(logits, alone[0]), name
        assert torch.equal(token_ids, alone[0].argmax(1)), name


@pytest.mark.parametrize("exponent", [-100, 60])
def test_any_size_of_activations(isa, exponent, generator):
    x = torch.randn(2, 512, generator=generator)
    for name, weight in weights((7, 512), isa, generator).items():
        expected = ops.linear(x, weight) * 2.0**exponent
        assert torch.equal(ops.linear(x * 2.0**exponent, weight), expected), name
        assert not ops.linear(torch.zeros_like(x), weight).any(), name


def test_small_and_large_blocks_in_a_row(isa, generator):
    """A block whose unit has no inverse counts as zeros, and leaves its neighbours as they are."""
    x = torch.randn(1, 512, generator=generator)
    for exponent in (-121, -149, 118):
        mixed = x.clone()
        mixed[:, :32] = 2.0**exponent
        only = torch.where(torch.arange(512) < 32, mixed, 0)
        for name, weight in weights((7, 512), isa, generator).items():
            out = ops.linear(mixed, weight)
            if exponent < 0:
                rest = ops.linear(mixed - only, weight)
                assert torch.equal(out, rest), name
            else:
                exact = rounded(mixed) @ weight.dequantize(torch.float64).T
                assert ((out - exact).abs() <= 2e-6 * exact.abs().max()).all(), name


def test_memory_beside_the_operands_is_left_alone(isa, generator):
    """Rows of x and of the output that lie apart, with NaN between them, which stays there."""
    for name, weight in weights((35, 576), isa, generator).items():
        x, out = torch.full((21, 640), NAN), torch.full((21, 64), NAN)
        x[:, 32:608] = torch.randn(21, 576, generator=generator)
        out[:, 16:51] = 0
        ops.linear_residual(x[:, 32:608], weight, out[:, 16:51])
        assert torch.equal(out[:, 16:51], ops.linear(x[:, 32:608].contiguous(), weight)), name
        assert out[:, 16:51].isfinite().all(), name
        assert out[:, :16].isnan().all(), name
        assert out[:, 51:].isnan().all(), name


def test_threads_change_no_bits(isa, generator):
    x = torch.randn(40, 768, generator=generator)
    for name, weight in weights((230, 768), isa, generator).items():
        torch.set_num_threads(1)
        alone = ops.linear(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(ops.linear(x, weight), alone), name


def test_largest_values_do_not_overflow(isa, generator):
    """All values and activations at the ends of their ranges, where 16-bit sums are largest."""
    for word in (-1, 0, 0x77777777, -0x77777778):
        for name, weight in weights((3, 512), isa, generator).items():
            weight = weight._replace(values=torch.full_like(weight.values, word))
            for tokens, activation in itertools.product((1, 9), (3.0, -3.0)):
                x = torch.full((tokens, 512), activation)
                exact = x.double() @ weight.dequantize(torch.float64).T
                out = ops.linear(x, weight)
                # Offsets, of up to 32 values' size, may cancel the products.
                sizes = weight._replace(values=torch.full_like(weight.values, 0x33333333))
                sizes = sizes.dequantize(torch.float64).abs() + weight.dequantize().abs()
                allowed = 3e-6 * (x.double().abs() @ sizes.T)
                assert ((out - exact).abs() <= allowed).all(), name
