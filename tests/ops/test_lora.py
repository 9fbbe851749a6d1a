from __future__ import annotations

import pytest
import reference
import torch
from tolerance import DTYPES, assert_close

from mistral_ext import ops

NAN = float("nan")


def stack(generator, dtype, inputs, parts, ranks):
    """Adapters with the given ranks, a list of one for each part; NaN in the padding."""
    most = max(max(of_adapter) for of_adapter in ranks)
    a = torch.full((len(ranks), len(parts), most, inputs), NAN, dtype=dtype)
    b = torch.full((len(ranks), most, sum(parts)), NAN, dtype=dtype)
    for adapter, of_adapter in enumerate(ranks):
        columns = b[adapter].split(parts, dim=1)
        for part, rank in enumerate(of_adapter):
            a[adapter, part, :rank] = torch.randn(rank, inputs, generator=generator)
            columns[part][:rank] = torch.randn(rank, parts[part], generator=generator)
    scales = torch.rand(len(ranks), len(parts), generator=generator) * inputs**-0.5
    return a, b, scales, torch.tensor(ranks, dtype=torch.int32)


def strided(generator, dtype, *shape):
    """A matrix with NaN around it. It is aligned as wide vectors want it if its rows are."""
    left, right = (8, 8) if shape[1] % 8 == 0 else (3, 2)
    around = torch.full((shape[0] + 2, left + shape[1] + right), NAN, dtype=dtype)
    matrix = around[1:-1, left : left + shape[1]]
    matrix.copy_(torch.randn(shape, generator=generator))
    return matrix, around


def index(*adapters):
    return torch.tensor(adapters, dtype=torch.int32)


CASES = {
    "one": (40, [24], [[4]], [0]),
    "query, key and value": (64, [32, 16, 16], [[3, 0, 8], [8, 5, 1]], [1, -1, 0, 0, 1]),
    "odd sizes": (37, [13, 5], [[2, 7], [1, 1], [9, 3]], [2, 2, 2, 0, 1, -1, 2]),
    "tails": (515, [1, 2, 1100], [[5, 5, 5]], [0] * 9 + [-1] * 3 + [0]),
    "many tokens": (72, [48, 32], [[6, 2], [0, 9]], [0] * 21 + [1] * 7 + [-1] * 9 + [0, 1] * 18),
    "no token": (8, [8], [[1]], []),
    "no adapter": (16, [8], [[2]], [-1, -1]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_lora(backend, name, dtype, generator):
    inputs, parts, ranks, adapters = CASES[name]
    adapters = index(*adapters)
    a, b, scales, ranks = stack(generator, dtype, inputs, parts, ranks)
    x, _ = strided(generator, dtype, len(adapters), inputs)
    x[adapters < 0] = NAN
    out, around = strided(generator, dtype, len(adapters), sum(parts))
    before = out.clone()
    ops.lora(x, a, b, scales, ranks, adapters, parts, out)
    given = scales.double(), ranks, adapters, parts
    exact = before.double() + reference.lora(x.double(), a.double(), b.double(), *given)
    plain = before + reference.lora(x, a, b, scales, ranks, adapters, parts)
    assert_close(out, exact, plain)
    assert torch.equal(out[adapters < 0], before[adapters < 0])
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adds_to_float32_without_rounding(backend, dtype, generator):
    parts, adapters = [24, 16], index(0, 0, 1, -1, 1)
    a, b, scales, ranks = stack(generator, dtype, 48, parts, [[4, 4], [3, 0]])
    x = torch.randn(5, 48, generator=generator).to(dtype)
    out = torch.zeros(5, 40)
    ops.lora(x, a, b, scales, ranks, adapters, parts, out)
    given = scales.double(), ranks, adapters, parts
    exact = reference.lora(x.double(), a.double(), b.double(), *given)
    plain = reference.lora(x.float(), a.float(), b.float(), scales, ranks, adapters, parts)
    assert_close(out, exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [40, 33])
def test_a_token_alone_and_in_any_batch_has_the_same_bits(backend, inputs, dtype, generator):
    """Also where the stack is padded to a larger rank, and where tiles of tokens are large."""
    parts, which = [40, 8], index(*[0] * 30, *[1, 0, -1, 1, 1] * 8)
    a, b, scales, ranks = stack(generator, dtype, inputs, parts, [[5, 4], [12, 1]])
    x = torch.randn(len(which), inputs, generator=generator).to(dtype)
    out = torch.randn(len(which), sum(parts), generator=generator).to(dtype)
    before = out.clone()
    ops.lora(x, a, b, scales, ranks, which, parts, out)
    for token in (0, 17, 29, 30, 31, 32, 69):
        adapter = int(which[token])
        alone = before[token : token + 1].clone()
        chosen = slice(max(adapter, 0), max(adapter, 0) + 1)
        most = int(ranks[chosen].max())
        ops.lora(
            x[token : token + 1],
            a[chosen, :, :most].contiguous(),
            b[chosen, :most].contiguous(),
            scales[chosen],
            ranks[chosen],
            index(min(adapter, 0)),
            parts,
            alone,
        )
        assert torch.equal(alone[0], out[token]), token


def test_threads_do_not_change_bits(isa, generator):
    a, b, scales, ranks = stack(generator, torch.bfloat16, 96, [2100, 64], [[16, 16], [7, 9]])
    x = torch.randn(19, 96, generator=generator).bfloat16()
    outs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = torch.zeros(19, 2164, dtype=torch.bfloat16)
        ops.lora(x, a, b, scales, ranks, index(*[0, 1, 1, -1] * 4, 0, 0, 0), [2100, 64], out)
        outs.append(out)
    assert torch.equal(*outs)


def test_hidden_is_not_rounded(backend):
    """x A^T needs more digits than bfloat16 has: 256 + 1 - 256 = 1."""
    x = torch.tensor([[256.0, 1.0] + [0.0] * 6]).bfloat16()
    a = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    a[0, 0, 0, :2], a[0, 0, 1, 0] = 1, 1
    b = torch.tensor([[[1.0] * 8, [-1.0] * 8]]).bfloat16()
    out = torch.zeros(1, 8, dtype=torch.bfloat16)
    ops.lora(x, a, b, torch.ones(1, 1), index(2)[None], index(0), [8], out)
    assert out.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_linear_swiglu_adds_before_it_rounds(backend, tokens, dtype, generator):
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    gate, up = (torch.randn(2, 40, 64, generator=generator) / 8).to(dtype)
    added = torch.randn(tokens, 80, generator=generator)
    out = ops.linear_swiglu(x, [gate, up], added=added)

    def products(x, gate, up, added):
        return reference.swiglu(x @ gate.T + added[:, :40], x @ up.T + added[:, 40:])

    exact = products(x.double(), gate.double(), up.double(), added.double())
    assert_close(out, exact, products(x, gate, up, added.to(dtype)))
    nothing = torch.full_like(added, -0.0)
    assert torch.equal(
        ops.linear_swiglu(x, [gate, up], added=nothing), ops.linear_swiglu(x, [gate, up])
    )


def test_linear_swiglu_adds_to_weights_of_different_formats(backend, generator):
    x = torch.randn(3, 64, generator=generator).bfloat16()
    gate = (torch.randn(40, 64, generator=generator) / 8).bfloat16()
    values = torch.randint(-127, 128, (40, 64), generator=generator, dtype=torch.int8)
    up = ops.Quantized(values, torch.full((40, 1), 2**-10, dtype=torch.bfloat16), "int8")
    added = torch.randn(3, 80, generator=generator)
    out = ops.linear_swiglu(x, [gate, up], added=added)
    apart = ops.linear(x, gate).float() + added[:, :40], ops.linear(x, up).float() + added[:, 40:]
    torch.testing.assert_close(out.float(), reference.swiglu(*apart), rtol=0.03, atol=0.03)


def valid():
    return {
        "x": torch.zeros(3, 8),
        "a": torch.zeros(2, 2, 4, 8),
        "b": torch.zeros(2, 4, 10),
        "scales": torch.zeros(2, 2),
        "ranks": torch.zeros(2, 2, dtype=torch.int32),
        "adapters": index(0, 1, -1),
        "parts": [6, 4],
        "out": torch.zeros(3, 10),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(8)}, ValueError, "x has shape [8], expected [any, any]"),
        ({"x": torch.zeros(8, 3).T}, ValueError, "x has strides [1, 3], expected the last to be"),
        (
            {"a": torch.zeros(2, 2, 4, 9)},
            ValueError,
            "a has shape [2, 2, 4, 9], expected [any, 2, any, 8]",
        ),
        ({"a": torch.zeros(2, 2, 4, 8).half()}, TypeError, "a has dtype torch.float16, expected"),
        ({"b": torch.zeros(2, 4, 9)}, ValueError, "b has shape [2, 4, 9], expected [2, 4, 10]"),
        ({"b": torch.zeros(2, 10, 4).mT}, ValueError, "b has strides [40, 1, 4], expected it to"),
        ({"parts": [6, 5]}, ValueError, "b has shape [2, 4, 10], expected [2, 4, 11]"),
        ({"parts": [12, -2]}, ValueError, "parts has -2, expected 0 or more"),
        ({"parts": []}, ValueError, "parts has 0 sizes, expected 1 to 3"),
        ({"scales": torch.zeros(2)}, ValueError, "scales has shape [2], expected [2, 2]"),
        ({"ranks": torch.zeros(2, 2)}, TypeError, "ranks has dtype torch.float32, expected torch."),
        ({"ranks": index(0, 5, 0, 0).view(2, 2)}, ValueError, "ranks has 5, expected 0 to 4"),
        ({"adapters": index(0, 1)}, ValueError, "adapters has shape [2], expected [3]"),
        ({"adapters": index(0, 1, 2)}, ValueError, "adapters has 2, expected -2147483648 to 1"),
        ({"out": torch.zeros(3, 9)}, ValueError, "out has shape [3, 9], expected [3, 10]"),
        ({"out": torch.zeros(3, 10).half()}, TypeError, "out has dtype torch.float16, expected"),
        ({"out": torch.zeros(10).expand(3, 10)}, ValueError, "out has strides [0, 1] and shape"),
    ],
)
def test_argument_checks(changes, error, message):
    with pytest.raises(error) as caught:
        ops.lora(**valid() | changes)
    assert f"lora: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        (torch.zeros(2, 8), ValueError, "added has shape [2, 8], expected [2, 12]"),
        (torch.zeros(2, 12).half(), TypeError, "added has dtype torch.float16, expected torch.f"),
    ],
)
def test_checks_of_what_linear_swiglu_adds(added, error, message):
    weights = [torch.zeros(6, 4)] * 2
    with pytest.raises(error) as caught:
        ops.linear_swiglu(torch.zeros(2, 4), weights, added=added)
    assert f"linear_swiglu: {message}" in str(caught.value)
