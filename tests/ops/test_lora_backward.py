from __future__ import annotations

import gradients
import pytest
import torch
from tolerance import DTYPES, assert_close

from mistral_ext import ops

# inputs, outputs of the parts, ranks of each adapter's parts, the adapter of each token
CASES = {
    "one adapter": (40, [24], [[4]], [0] * 5),
    "query, key and value": (64, [32, 16, 16], [[3, 0, 8], [8, 5, 1]], [1, -1, 0, 0, 1]),
    "odd sizes": (37, [13, 5], [[2, 7], [1, 1], [9, 3]], [2, 2, 2, 0, 1, -1, 2]),
    "many tokens": (72, [48, 264], [[6, 2], [0, 16]], ([0] * 21 + [1] * 7 + [-1] * 9) * 8),
    "no token": (8, [8], [[1]], []),
    "no adapter": (16, [8], [[2]], [-1, -1]),
}


def stack(inputs, parts, ranks, dtype, generator):
    """Random a and b, with zeros in the padding, scales and ranks."""
    most = max(max(of_adapter) for of_adapter in ranks)
    a = torch.zeros(len(ranks), len(parts), most, inputs, dtype=dtype)
    b = torch.zeros(len(ranks), most, sum(parts), dtype=dtype)
    for adapter, of_adapter in enumerate(ranks):
        columns = b[adapter].split(parts, dim=1)
        for part, rank in enumerate(of_adapter):
            a[adapter, part, :rank] = torch.randn(rank, inputs, generator=generator)
            columns[part][:rank] = torch.randn(rank, parts[part], generator=generator)
    scales = torch.rand(len(ranks), len(parts), generator=generator) * inputs**-0.5
    return a, b, scales, torch.tensor(ranks, dtype=torch.int32)


def plain(scales, adapters, parts):
    """reference.lora on all ranks: those that do not exist are zeros."""

    def add(x, a, b):
        used = adapters.long().clamp(min=0)
        of_token = scales.to(x.dtype)[used] * (adapters >= 0)[:, None]
        hidden = torch.einsum("tk,tprk->tpr", x, a[used]) * of_token[:, :, None]
        columns = [columns[used] for columns in b.split(parts, dim=2)]
        products = [
            torch.einsum("tr,trn->tn", hidden[:, i], of_part) for i, of_part in enumerate(columns)
        ]
        return torch.cat(products, dim=1)

    return add


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients(backend, name, dtype, generator):
    """Ranks that do not exist have gradients of 0."""
    inputs, parts, ranks, adapters = CASES[name]
    adapters = torch.tensor(adapters, dtype=torch.int32)
    a, b, scales, ranks = stack(inputs, parts, ranks, dtype, generator)
    x = torch.randn(len(adapters), inputs, generator=generator).to(dtype)
    d_out = torch.randn(len(adapters), sum(parts), generator=generator).to(dtype)

    def of_ranks(f):  # what the padding would get, if it were part of the adapter
        there = torch.arange(a.shape[2]) < ranks[:, :, None]  # [adapters, parts, rank]
        columns = there.repeat_interleave(torch.tensor(parts), dim=1).mT
        return lambda x, a, b: f(x, a * there[..., None], b * columns)

    gradients.check(
        lambda x, a, b: ops.lora(x, a, b, scales, ranks, adapters, parts),
        of_ranks(plain(scales, adapters, parts)),
        [x, a, b],
        d_out,
    )


def test_float32_adapters_of_16_bit_activations(isa, generator):
    """They are rounded for the product. Their gradients are not rounded to 16 bits."""
    adapters, parts = torch.zeros(30, dtype=torch.int32), [24, 8]
    a, b, scales, ranks = stack(48, parts, [[4, 4]], torch.float32, generator)
    x = torch.randn(30, 48, generator=generator).bfloat16()
    d_out = torch.randn(30, 32, generator=generator).bfloat16()
    narrow = a.bfloat16(), b.bfloat16()
    rest = scales, ranks, adapters, parts
    assert torch.equal(ops.lora(x, a, b, *rest), ops.lora(x, *narrow, *rest))
    d_x, d_a, d_b = gradients.differentiate(
        lambda x, a, b: ops.lora(x, a, b, *rest), [x, a, b], d_out
    )
    exact = gradients.differentiate(
        plain(scales, adapters, parts),
        [x.double(), *(stack.double() for stack in narrow)],
        d_out.double(),
    )
    assert (d_x.dtype, d_a.dtype, d_b.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    for one, wide in ((d_a, exact[1]), (d_b, exact[2])):
        assert_close(one, wide, wide.float())


def test_adds_what_the_op_in_place_adds(backend, generator):
    adapters, parts = torch.tensor([0, -1, 1], dtype=torch.int32), [8]
    a, b, scales, ranks = stack(16, parts, [[3], [2]], torch.float32, generator)
    x, out = torch.randn(3, 16, generator=generator), torch.zeros(3, 8)
    added = ops.lora(x, a, b, scales, ranks, adapters, parts)
    assert ops.lora(x, a, b, scales, ranks, adapters, parts, out) is None
    assert torch.equal(added, out)


def test_in_place_it_has_no_gradient():
    a = torch.zeros(1, 1, 2, 8, requires_grad=True)
    ranks, adapters = torch.zeros(1, 1).int(), torch.zeros(3).int()
    given = torch.zeros(3, 8), a, torch.zeros(1, 2, 4), torch.zeros(1, 1), ranks, adapters, [4]
    with pytest.raises(RuntimeError, match="lora: a requires a gradient, but"):
        ops.lora(*given, torch.zeros(3, 4))
