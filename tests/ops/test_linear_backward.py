from __future__ import annotations

import re

import gradients
import pytest
import reference
import torch
from packed_weights import random_weight, random_weights
from tolerance import DTYPES, assert_close
from torch.nn import functional

from mistral_ext import _C, ops
from mistral_ext.ops import JoinedWeight, Quantized, torch_products
from mistral_ext.ops.weight import parts_of
from mistral_ext.weights.quantize import quantize

# (T, K, N): one, primes, tails of every vector, tile and block; 513 tokens, and 1157 in AMX tiles,
# are more than are packed at a time, and 530 outputs more than a block along the sum.
SHAPES = [(1, 1, 1), (3, 7, 33), (13, 257, 66), (9, 130, 530), (513, 33, 13), (40, 96, 3)]
SHAPES += [(1157, 32, 13)]
SHAPES += [(12, 256, 70), (35, 768, 98)]  # whole super-blocks of GGUF's formats

pytestmark = pytest.mark.usefixtures("exact_products")


def weights(shape, dtype, generator) -> dict[str, torch.Tensor | Quantized]:
    """One weight [N, K] in every format that K allows."""
    exact = torch.randn(shape, generator=generator)
    made = {"plain": exact.to(dtype), "int8": quantize(exact, "int8")}
    if shape[1] % 32 == 0:
        made |= {"q8_0": quantize(exact, "q8_0"), "int4": quantize(exact, "int4", 32)}
    return made | random_weights(shape, generator)


def exact_weight(weight: torch.Tensor | Quantized) -> torch.Tensor:
    return weight.dequantize(torch.float64) if isinstance(weight, Quantized) else weight.double()


def check(x, weight, d_out):
    """The plain computation of a quantised weight rounds it to the dtype first."""
    wide = exact_weight(weight)
    gradients.check(lambda x: ops.linear(x, weight), lambda x: x @ wide.to(x.dtype).T, [x], d_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_x_by_every_format(isa, shape, dtype, generator):
    tokens, size, outputs = shape
    x = torch.randn(tokens, size, generator=generator).to(dtype)
    # A slice of a matrix that is NaN around it.
    around = torch.full((tokens + 2, outputs + 5), float("nan"), dtype=dtype)
    d_out = around[1:-1, 2:-3]
    d_out.copy_(torch.randn(tokens, outputs, generator=generator))
    for weight in weights((outputs, size), dtype, generator).values():
        check(x, weight, d_out)


def test_no_tokens(isa):
    x = torch.zeros(0, 8, requires_grad=True)
    ops.linear(x, torch.ones(3, 8)).sum().backward()
    assert x.grad.shape == (0, 8)


def test_several_weights_of_different_formats(isa, generator):
    x = torch.randn(21, 256, generator=generator).bfloat16()
    parts = [
        torch.randn(300, 256, generator=generator).bfloat16(),
        random_weight("q4_k", (70, 256), 256, generator),
        random_weight("q6_k", (5, 256), 256, generator),
    ]
    d_out = torch.randn(21, 375, generator=generator).bfloat16()
    wide = torch.cat([exact_weight(part) for part in parts])
    gradients.check(lambda x: ops.linear(x, parts), lambda x: x @ wide.to(x.dtype).T, [x], d_out)


def test_joined_weights(isa, generator):
    x, d_out = torch.randn(10, 24, generator=generator), torch.randn(10, 14, generator=generator)
    parts = torch.randn(14, 24, generator=generator).split([8, 6])
    joined = JoinedWeight.join(parts, torch.device("cpu"))
    apart = gradients.differentiate(lambda x: ops.linear(x, parts), [x], d_out)
    together = gradients.differentiate(lambda x: ops.linear(x, joined), [x], d_out)
    assert torch.equal(apart[0], together[0])


def test_inputs_in_another_order(isa, generator):
    """As GPTQ may have them; x and its gradient are in order."""
    order = torch.randperm(64, generator=generator)
    weight = random_weight("q4_0", (20, 64), 32, generator)._replace(order=order)
    x = torch.randn(9, 64, generator=generator)
    check(x, weight, torch.randn(9, 20, generator=generator))
    targets = torch.arange(9)
    wide = weight.dequantize(torch.float64)
    gradients.check(
        lambda x: ops.linear_cross_entropy(x, weight, targets)[0],
        lambda x: functional.cross_entropy(x @ wide.to(x.dtype).T, targets, reduction="sum"),
        [x],
        torch.ones(()),
    )


def test_norm(isa, generator):
    x = 3 * torch.randn(11, 64, generator=generator)
    norm, weight = torch.rand(64, generator=generator), torch.randn(30, 64, generator=generator)

    def plain(x):
        return reference.rms_norm(x, norm.to(x.dtype), 1e-3) @ weight.to(x.dtype).T

    d_out = torch.randn(11, 30, generator=generator)
    gradients.check(lambda x: ops.linear(x, weight, norm, 1e-3), plain, [x], d_out, dim=1)


def test_any_number_of_threads_gives_the_same_bits(isa, generator):
    x = torch.randn(300, 512, generator=generator).bfloat16()
    weight = random_weight("q5_k", (90, 512), 256, generator)
    d_out = torch.randn(300, 90, generator=generator).bfloat16()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found += gradients.differentiate(lambda x: ops.linear(x, weight), [x], d_out)
    assert torch.equal(*found)


@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_have_a_gradient_unless_they_are_rounded(isa, dtype, tokens, generator):
    """Rounded products are those that exact ones differ from."""
    x = torch.randn(tokens, 256, generator=generator).to(dtype)
    plain = torch.zeros(5, 256, dtype=dtype)
    for weight in weights((30, 256), dtype, generator).values():
        given = x.clone().requires_grad_()
        exact = ops.linear(given, [plain, weight])
        ops.set_exact_products(False)  # the fixture of this file puts back what it was
        with torch.no_grad():
            rounded = not torch.equal(ops.linear(given, [plain, weight]), exact)
        if rounded:
            message = rf"linear: x requires .* a weight in '{weight.format}' rounds it to 8 bits"
            with pytest.raises(RuntimeError, match=message):
                ops.linear(given, [plain, weight])
        else:
            assert torch.equal(ops.linear(given, [plain, weight]), exact)
            assert ops.linear(given, [plain, weight]).requires_grad
        ops.set_exact_products(True)


@pytest.mark.parametrize(
    ("dtype", "form", "message"),
    [
        (torch.float64, "q4_0", "dtype is 'torch.float64', expected one that linear takes"),
        (torch.float32, "q9", "format is 'q9', expected one that linear takes"),
    ],
)
def test_rounding_of_what_has_no_kernel(dtype, form, message):
    with pytest.raises(ValueError, match=f"linear_rounds: {message}"):
        _C.linear_rounds(dtype, form, 1)


def test_which_products_are_rounded(isa):
    """The rules of docs/kernels.md, where the numbers of tokens change them."""

    def rounded(dtype, form):
        return [_C.linear_rounds(dtype, form, tokens) for tokens in (8, 9)]

    for dtype in DTYPES:
        for form in ("plain", "int8", "q8_0"):
            assert rounded(dtype, form) == [False, False]
        in_tiles = isa == "amx" and dtype == torch.bfloat16
        many = [isa != "scalar", isa != "scalar" and not in_tiles]
        assert rounded(dtype, "q4_k") == many
        adds_fours = isa not in ("avx2", "avx512")
        table = many if adds_fours else [True, False]
        assert rounded(dtype, "iq4_xs") == rounded(dtype, "iq4_nl") == table
        others = isa == "scalar" or isa.startswith("avx512") or isa == "amx"
        assert rounded(dtype, "int4") == [not others] * 2


@pytest.mark.parametrize("which", ["weight", "norm"])
def test_weights_have_no_gradient(which):
    given = {"weight": torch.zeros(5, 64), "norm": torch.zeros(64)}
    given[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"linear: {which} requires a gradient, but"):
        ops.linear(torch.zeros(9, 64, requires_grad=True), **given)


def test_of_a_cuda_device_with_torch(generator):
    """What routes there needs a device; what it computes does not."""
    plain = torch.randn(5, 256, generator=generator)
    parts = [plain, random_weight("q6_k", (9, 256), 256, generator)]
    d_out = torch.randn(6, 14, generator=generator)
    d_x = torch_products.linear_backward(d_out, parts_of(parts))
    wide = torch.cat([exact_weight(part) for part in parts])
    assert_close(d_x, d_out.double() @ wide, d_out @ wide.float())
    joined = JoinedWeight.join([plain, plain + 1], torch.device("cpu"))
    d_x = torch_products.linear_backward(d_out[:, :10], parts_of(joined))
    assert torch.equal(d_x, d_out[:, :10] @ torch.cat([plain, plain + 1]))


@pytest.mark.parametrize(
    ("d_out", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, "d_out has shape [3, 5], expected [3, 9]"),
        (torch.zeros(3), ValueError, "d_out has shape [3], expected [3, 9]"),
        (torch.zeros(3, 9).half(), TypeError, "d_out has dtype torch.float16, expected torch.flo"),
        (torch.zeros(9, 3).T, ValueError, "d_out has strides [1, 3], expected the last to be 1"),
    ],
)
def test_argument_checks(d_out, error, message):
    weight, d_x = torch.zeros(9, 4), torch.zeros(3, 4)
    with pytest.raises(error, match=re.escape(f"linear_backward: {message}")):
        _C.linear_backward(d_out, [weight], [None], ["plain"], d_x)
