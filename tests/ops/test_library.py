"""The ops as torch operators: schemas, declared mutations, fake kernels, torch.compile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import reference
import torch
from ragged import RaggedBatch

from mistral_ext import _C, ops
from mistral_ext.ops import library


def samples():
    """(op, arguments, keyword arguments)"""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight = random(3, 40), random(40)
    batch = RaggedBatch([8, 8], 8, positions=[0, 9])
    table = batch.table((5, 1))
    q, k, v = (new.contiguous() for new in batch.inputs(6))
    adapters = (
        x,
        random(2, 1, 3, 40),
        random(2, 3, 5),
        random(2, 1),
        torch.tensor([[3], [1]], dtype=torch.int32),
        torch.tensor([1, -1, 0], dtype=torch.int32),
        [5],
    )
    plain, targets = ([None], ["plain"], None), torch.tensor([4, -100, 0])
    int4 = ([torch.ones(5, 8, dtype=torch.int32)], [torch.ones(5, 2).bfloat16()], ["int4"], None)
    heads = [random(64, 40), random(32, 40), random(32, 40)]
    pools = random(2, 16, 32)
    two_rings = torch.tensor([[0, 2, 5, 0, 8], [2, 1, 0, 8, 8]])
    rows = torch.tensor([2, 0])
    options = torch.tensor([0.0, 0, 1, 0, 1, 0, 0]).double().repeat(3, 1)
    noise, history = torch.ones(3, 3, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int32)
    sampling = (random(2, 7), rows, options, noise, history)
    frequencies = reference.frequencies(1e4, 32)
    ring = (q, k, v, random(*batch.k_pool.shape), random(*batch.v_pool.shape), table)
    return [
        ("rms_norm", (x, weight), {}),
        ("rms_norm.residual", (x, weight, 1e-6, random(3, 40)), {}),
        ("rms_norm_backward", (x, weight, random(3, 40), 1e-5), {}),
        ("rms_norm", (random(3, 80)[:, 40:].bfloat16(), weight.bfloat16()), {}),
        ("rms_norm", (random(0, 40), weight), {}),
        ("embedding", (rows, weight.view(4, 10), None, "plain", torch.float32), {}),
        (
            "embedding",
            (rows, int4[0][0], int4[1][0], "int4", torch.bfloat16),
            {},
        ),
        ("rope", (*ring, frequencies, 8), {}),
        ("rotate", (q, table, frequencies), {}),
        ("attention", (*ring, 8), {}),
        ("attention", ring, {"window": 8, "scale": 0.5}),
        ("attention.whole", (q, k, v, table, 8), {}),
        (
            "attention_backward",
            (q, k, v, random(*q.shape), random(*q.shape), random(6, 4), table, 8),
            {},
        ),
        ("swiglu", (random(2, 7), random(2, 7)), {}),
        ("swiglu_backward", (random(2, 7), random(2, 7), random(2, 7)), {}),
        ("lora", (*adapters, random(3, 5)), {}),
        ("lora.added", adapters, {}),
        ("lora_backward", (random(3, 5), random(3, 1, 3), *adapters), {}),
        ("linear", (x, [random(5, 40)], [None], ["plain"], None), {}),
        (
            "linear",
            (x, [random(5, 40), random(2, 40)], [None] * 2, ["plain"] * 2, None, weight, 1e-5),
            {},
        ),
        ("linear", (random(9, 64), *int4), {}),
        ("linear_backward", (random(3, 5), *int4), {}),
        ("linear_cross_entropy", (x, [random(5, 40)], *plain, targets, random(3), True), {}),
        ("linear_cross_entropy", (random(3, 64), *int4, targets, None, True), {}),
        ("linear_residual", (x, [random(5, 40)], [None], ["plain"], None, random(3, 5)), {}),
        (
            "linear_rope",
            (
                x,
                heads,
                [None] * 3,
                ["plain"] * 3,
                None,
                weight,
                1e-5,
                *pools,
                two_rings,
                frequencies,
                8,
            ),
            {},
        ),
        (
            "linear_argmax",
            (x, [random(5, 40)], [None], ["plain"], None, weight, 1e-5),
            {"limit": 4},
        ),
        (
            "linear_swiglu",
            (x, [random(5, 40), random(5, 40)], [None] * 2, ["plain"] * 2, None, weight, 1e-5),
            {},
        ),
        ("sample", sampling, {}),
        ("sample", (*sampling, random(3, 7)), {}),
    ]


# The places of the arguments that may require a gradient.
DIFFERENTIABLE = {
    "rms_norm": (0,),
    "rotate": (0,),
    "attention.whole": (0, 1, 2),
    "swiglu": (0, 1),
    "lora.added": (0, 1, 2),
    "linear": (0,),
    "linear_cross_entropy": (0,),
}


def op_of(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.mistral_ext, packet), overload or "default")


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(samples())],
)
def test_opcheck(name, arguments, options, exact_products):
    torch.library.opcheck(op_of(name), arguments, options)
    if differentiable := DIFFERENTIABLE.get(name, ()):
        given = list(arguments)
        for i in differentiable:
            given[i] = given[i].clone().requires_grad_()
        torch.library.opcheck(op_of(name), given, options)


def test_an_op_with_a_gradient_compiles(generator):
    """The gradients of a step of training, compiled and not."""
    table, turns = torch.tensor([[0, 9, 0, 0, 9]]), reference.frequencies(1e4, 32)
    weights = [torch.randn(n, 64, generator=generator) / 8 for n in (128, 128, 50)]
    adapters = torch.zeros(9, dtype=torch.int32)
    scales, ranks = torch.ones(1, 1), torch.full((1, 1), 2, dtype=torch.int32)
    targets = torch.arange(9)

    def loss(x, a, b):
        y = ops.rms_norm(x, torch.ones(64))
        qkv = ops.linear(y, weights[0]) + ops.lora(y, a, b, scales, ranks, adapters, [128])
        q, k, v = qkv.unflatten(1, (4, 32)).split([2, 1, 1], dim=1)
        q, k = ops.rotate(q, table, turns), ops.rotate(k, table, turns)
        x = x + ops.attention(q, k, v, None, None, table, 4).flatten(1)
        x = x + ops.swiglu(*ops.linear(x, weights[1], torch.ones(64)).chunk(2, dim=1))
        return ops.linear_cross_entropy(x, weights[2], targets)[0]

    shapes = (9, 64), (1, 1, 2, 64), (1, 2, 128)
    given = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    expected = torch.autograd.grad(loss(*given), given)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_compiles_once_for_any_number_of_tokens(generator):
    weight = torch.randn(8, 64, generator=generator)
    product = torch.compile(ops.linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 20):
        x = torch.randn(tokens, 64, generator=generator).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=tokens > 12):
            product(x, weight).sum().backward()


def block(x, weight, residual, w, k_pool, v_pool, table, frequencies, sampling):
    """A small layer that uses every op."""
    x = ops.rms_norm(x, weight, residual=residual)
    q, k, v = ops.linear(x, w).unflatten(1, (4, 32)).split([2, 1, 1], dim=1)
    ops.rope(q, k, v, k_pool, v_pool, table, frequencies, 8)
    x = ops.attention(q, k, v, k_pool, v_pool, table, 8).flatten(1)
    ops.linear_residual(x, w[:64], residual)
    rings = k_pool, v_pool, table + torch.tensor([0, 0, 6, 0, 0]), frequencies, 8
    qkv = ops.linear_rope(residual, w.split([64, 32, 32]), weight, 1e-5, *rings)
    x = ops.swiglu(x, ops.linear_swiglu(residual, [w[:64], w[64:]], weight)) + qkv[:, :64]
    logits, greedy = ops.linear_argmax(x, w)
    return logits, greedy, ops.sample(logits[:2], *sampling)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, generator):
    def arguments():
        generator.manual_seed(0)
        x, residual = torch.randn(2, 6, 64, generator=generator)
        w = torch.randn(128, 64, generator=generator)
        pools = torch.zeros(2, 16, 32)
        table = torch.tensor([[0, 5, 0, 8, 8], [5, 1, 9, 0, 8]])
        options = torch.tensor([[0.0, 0, 1, 0, 1, 0, 0], [1.0, 0, 1, 0, 1.5, 0, 0]]).double()
        noise = torch.tensor([[1, 0, 0], [2, 0, 3]])
        history = torch.randint(0, 3, (2, 128), dtype=torch.int32, generator=generator)
        frequencies = reference.frequencies(1e4, 32)
        sampling = torch.tensor([1, 0]), options, noise, history
        return [x, torch.ones(64), residual, w, *pools.unbind(), table, frequencies, sampling]

    eager, compiled = arguments(), arguments()
    expected = block(*eager)
    actual = torch.compile(block, fullgraph=True, backend=backend)(*compiled)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)  # mutated alike


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_made_of_constants_is_not_a_constant(backend):
    """torch.compile took the token, which the fake of `sample` made like `rows`, for a constant of
    memory that nobody had written."""
    torch._dynamo.reset()

    def token_ids():
        options = torch.tensor([[0.0, 0, 1, 0, 1, 0, 0]]).double()
        noise, history = torch.tensor([[1, 0, 0]]), torch.zeros(1, 3, dtype=torch.int32)
        logits, rows = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0])
        return ops.sample(logits, rows, options, noise, history).tolist()

    assert torch.compile(token_ids, backend=backend)() == token_ids() == [1]


def test_fake_tensors_get_shapes_without_running():
    meta = [torch.empty(shape, device="meta") for shape in ((6, 40), (40,), (9, 40))]
    x, weight, matrix = meta
    assert ops.rms_norm(x, weight).shape == (6, 40)
    assert ops.embedding(weight.long(), matrix).shape == (40, 40)
    assert ops.linear(x, matrix).shape == (6, 9)
    assert ops.linear(x, [matrix, matrix], weight).shape == (6, 18)
    assert [out.shape for out in ops.linear_argmax(x, matrix)] == [(6, 9), (6,)]
    assert ops.linear_swiglu(x, [matrix, matrix]).shape == (6, 9)
    assert ops.swiglu(x, x).shape == (6, 40)
    assert ops.linear_rope(x, [matrix] * 3, weight, 1e-5, x, x, x, x).shape == (6, 27)
    q = torch.empty(6, 4, 32, device="meta")
    assert ops.attention(q, q, q, x, x, x).shape == (6, 4, 32)
    assert ops.attention(q, q, q, None, None, x).shape == (6, 4, 32)
    assert ops.rotate(q, x, x).shape == (6, 4, 32)
    assert [out.shape for out in ops.linear_cross_entropy(x, matrix, x)] == [(), (6,)]


def test_what_is_no_tensor_of_a_device_with_kernels_is_refused():
    """By the compiled module too, which torch's dispatcher usually spares from it."""
    x = torch.zeros(1, 4)
    with pytest.raises(TypeError, match=r"swiglu: up is a <class 'list'>, expected a torch.Tensor"):
        _C.swiglu(x, [0.0] * 4, x, 1)
    with pytest.raises(TypeError, match=r"swiglu: up is on meta, expected cpu or cuda"):
        _C.swiglu(x, x.to("meta"), x, 1)
    with pytest.raises(RuntimeError, match="weight"):
        ops.rms_norm(x, [1.0] * 4)


def needs_gradient(value):
    if isinstance(value, list):
        return [needs_gradient(x) for x in value]
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.clone().requires_grad_() if is_float else value


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(samples())],
)
def test_an_op_that_would_need_a_gradient_is_refused(name, arguments, options):
    """It would be missing from `backward`. One at a time; unrecorded, all may."""
    op, packet = op_of(name), name.split(".")[0]
    for i, argument in enumerate(op._schema.arguments[: len(arguments)]):
        value = needs_gradient(arguments[i])
        tensors = value if isinstance(value, list) else [value]
        if i in DIFFERENTIABLE.get(name, ()):
            continue
        if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
            shown = "weight" if argument.name == "values" else argument.name
            with pytest.raises(RuntimeError, match=f"^{packet}: {shown} requires a gradient, but"):
                op(*arguments[:i], value, *arguments[i + 1 :], **options)
    with torch.no_grad():
        op(*map(needs_gradient, arguments), **options)
    with torch.inference_mode():
        op(*map(needs_gradient, arguments), **options)


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [pytest.param(*s, id=f"{s[0]}-{i}") for i, s in enumerate(samples())],
)
def test_a_derivative_in_forward_mode_is_refused(name, arguments, options):
    """Torch would take it for 0, also while it records no gradients."""
    op = op_of(name)
    message = f"^{name.split('.')[0]} has no derivative in forward mode"
    for i, value in enumerate(arguments):
        tensors = value if isinstance(value, list) else [value]
        if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors):
            continue

        def run(*given, i=i, value=value):
            made = list(given) if isinstance(value, list) else given[0]
            return op(*arguments[:i], made, *arguments[i + 1 :], **options)

        for records in (True, False):
            with torch.set_grad_enabled(records), pytest.raises(RuntimeError, match=message):
                torch.func.jvp(run, tuple(tensors), tuple(tensors))


def test_backward_sees_what_an_op_has_changed():
    """Else the gradient of w would be that of the new x, without a word."""
    x, w = torch.ones(1, 4), torch.ones(4, requires_grad=True)
    product = (x * w).sum()
    ops.rms_norm(torch.ones(1, 4), torch.ones(4), residual=x)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        product.backward()


def test_writes_are_seen_in_schemas_of_the_oldest_torch(monkeypatch):
    """In torch 2.4 an argument of a schema has `alias_info`, and no `is_write`."""

    def op(x, out):
        out.add_(x)

    write = SimpleNamespace(is_write=True)
    arguments = [("x", None), ("out", write)]
    op._schema = SimpleNamespace(
        arguments=[SimpleNamespace(name=name, alias_info=alias) for name, alias in arguments]
    )
    monkeypatch.setattr(library, "_find", lambda name: op)
    x, out = torch.ones(2), torch.zeros(2)
    with torch.inference_mode(False):
        library._guard("op")(x, out)
    assert (x._version, out._version) == (0, 2)  # that of add_, and that of the guard
