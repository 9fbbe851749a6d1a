from __future__ import annotations

import gradients
import pytest
import torch
from tolerance import DTYPES

from mistral_ext.ops.low_rank_update import low_rank_update

PARTS = [40, 7, 33]
SCALE = 1.5


def matrices(dtype, generator):
    """a and b in float32 of the first and the last part. They are exact in `dtype`, so that the
    reference need not round them."""
    shapes = [(5, 48), (40, 5), (3, 48), (33, 3)]
    return [0.3 * torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]


def by_op(out, x, a, b, c, d):
    return low_rank_update(out.clone(), x, [(a, b), None, (c, d)], SCALE, PARTS)


def plain(out, x, a, b, c, d):
    wide = x.to(a.dtype)
    added = [wide @ a.T @ b.T, wide.new_zeros(len(x), PARTS[1]), wide @ c.T @ d.T]
    return (out + SCALE * torch.cat(added, dim=1)).to(out.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_update_and_gradients(isa, dtype, tokens, generator):
    out, x = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (sum(PARTS), 48))
    d_out = torch.randn(tokens, sum(PARTS), generator=generator).to(dtype)
    given = [out, x, *(matrix.to(dtype).float() for matrix in matrices(dtype, generator))]
    expected = plain(*(tensor.double() for tensor in given))
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(by_op(*given).double(), expected, rtol=0, atol=tolerance)
    gradients.check(by_op, plain, given, d_out)


def test_one_part_and_no_token(isa):
    a, b = torch.ones(2, 8, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    low_rank_update(torch.zeros(0, 3), torch.zeros(0, 8), [(a, b)], 1.0, [3]).sum().backward()
    assert a.grad.tolist() == torch.zeros(2, 8).tolist()
    assert b.grad.tolist() == torch.zeros(3, 2).tolist()


def test_an_adapter_is_rounded_as_it_is_when_it_runs(isa):
    """Its gradients are not: 1 + 2^-12 is 1 in bfloat16."""
    a = torch.full((1, 8), 1 + 2.0**-12, requires_grad=True)
    b = torch.full((1, 1), 1 + 2.0**-12, requires_grad=True)
    x = torch.ones(3, 8).bfloat16()
    out = low_rank_update(torch.zeros(3, 1).bfloat16(), x, [(a, b)], 1 + 2.0**-12, [1])
    assert out.flatten().tolist() == [8.0] * 3
    out.sum().backward()
    assert a.grad.flatten().tolist() == [3 * (1 + 2.0**-12)] * 8
    assert b.grad.item() == 24 * (1 + 2.0**-12)
