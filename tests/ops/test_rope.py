"""Rotation, and the tokens that rope appends itself; test_attention.py tests the two ops as one."""

from __future__ import annotations

import pytest
import reference
import torch
from ragged import RaggedBatch
from tolerance import DTYPES, assert_close

from mistral_ext import ops

FREQUENCIES = reference.frequencies(1e4, 64)


def rotate(q, k, positions, frequencies):
    """ops.rope with one sequence of one token per position; returns its rotated q and k."""
    q, k = q.clone(), k.clone()
    tokens, kv_heads, dim = k.shape
    pool = torch.full((tokens * kv_heads, dim), float("nan"), dtype=q.dtype)
    table = [(i, 1, p, i * kv_heads, 1) for i, p in enumerate(positions)]
    ops.rope(q, k, k.clone(), pool, pool.clone(), torch.tensor(table), frequencies, window=1)
    return q, k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_rotation(backend, dtype, dim, generator):
    positions = [0, 1, 2, 17, 4095, 4096, 32768, 131071, 10**6 + 3, 10**7 + 1, 2**31 + 5]
    q = torch.randn(len(positions), 5, dim, generator=generator).to(dtype)
    k = torch.randn(len(positions), 1, dim, generator=generator).to(dtype)
    scaled = reference.frequencies(1e6, dim) * torch.linspace(1 / 8, 1, dim // 2).double()
    for frequencies in (reference.frequencies(1e4, dim), reference.frequencies(1e6, dim), scaled):
        for x, rotated in zip((q, k), rotate(q, k, positions, frequencies), strict=True):
            exact = reference.rotate(x.double(), torch.tensor(positions), frequencies)
            plain = reference.rotate(x, torch.tensor(positions), frequencies)
            assert_close(rotated.flatten(1), exact.flatten(1), plain.flatten(1), dim=1)


def test_position_zero_is_not_rotated(backend, generator):
    q = torch.randn(1, 3, 64, generator=generator)
    k = torch.randn(1, 3, 64, generator=generator)
    rotated_q, rotated_k = rotate(q, k, [0], FREQUENCIES)
    assert torch.equal(rotated_q, q)
    assert torch.equal(rotated_k, k)


def test_scores_depend_on_the_distance_alone(backend, generator):
    """What RoPE is for; off by a position, a pair or a sign, it would not hold."""
    q = torch.randn(1, 1, 64, generator=generator).expand(3, 1, 64)
    k = torch.randn(1, 1, 64, generator=generator).expand(3, 1, 64)
    rotated_q, _ = rotate(q, k, [9, 1009, 100_009], FREQUENCIES)
    _, rotated_k = rotate(q, k, [2, 1002, 100_002], FREQUENCIES)
    scores = (rotated_q * rotated_k).sum((1, 2))
    torch.testing.assert_close(scores, scores[:1].expand(3), rtol=0, atol=2e-4)
    _, other = rotate(q, k, [3, 1003, 100_003], FREQUENCIES)
    assert ((rotated_q * other).sum((1, 2)) - scores).abs().min() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_stores_what_no_query_of_the_chunk_needs_any_more(backend, dtype):
    """A chunk of 3 in a ring of 4 that is full: its first query still sees all but one slot."""
    batch = RaggedBatch([4, 4], window=4, dtype=dtype, positions=[6, 6])
    q, k, v = batch.inputs(4)
    before = batch.k_pool.clone()
    ops.rope(q, k, v, batch.k_pool, batch.v_pool, batch.table((3, 1)), batch.frequencies, 4)

    def slots(i, position):
        return batch.rows[i] + torch.arange(batch.kv_heads) * 4 + position % 4

    for i, token in ((0, 0), (1, 3)):
        assert torch.equal(batch.k_pool[slots(i, 6)], k[token])
        assert torch.equal(batch.v_pool[slots(i, 6)], v[token])
    for position in (3, 4, 5):
        assert torch.equal(batch.k_pool[slots(0, position)], before[slots(0, position)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned(backend, dtype):
    """Bit for bit what aligned ones come to."""
    batch = RaggedBatch([6, 4], window=4, dtype=dtype, positions=[5, 0])
    table = batch.table((2, 3))
    q, k, v = batch.inputs(5)
    results = []
    for offset in (0, 1):
        tensors = []
        for x in (q, k, v, batch.k_pool, batch.v_pool):
            moved = torch.zeros(x.numel() + offset, dtype=dtype)[offset:].view(x.shape)
            tensors.append(moved.copy_(x))
        ops.rope(*tensors, table, batch.frequencies, 4)
        results.append(tensors)
    for aligned, moved in zip(*results, strict=True):
        torch.testing.assert_close(moved, aligned, rtol=0, atol=0, equal_nan=True)


def test_frequencies_of_zero_leave_their_pairs(backend, generator):
    """As a model has them that rotates a part of its heads."""
    q, k = torch.randn(2, 2, 1, 64, generator=generator)
    frequencies = FREQUENCIES.clone()
    frequencies[20:] = 0
    rotated, _ = rotate(q, k, [5, 2**31 + 5], frequencies)
    first, second = rotated.unflatten(-1, (2, 32)).unbind(-2)
    for part, before in zip((first, second), q.unflatten(-1, (2, 32)).unbind(-2), strict=True):
        assert torch.equal(part[..., 20:], before[..., 20:])
        assert not torch.isclose(part[..., :20], before[..., :20]).all()


@pytest.mark.parametrize(
    ("frequencies", "error", "message"),
    [
        (torch.zeros(15).double(), ValueError, "has shape [15], expected [16]"),
        (torch.zeros(16, 1).double(), ValueError, "has shape [16, 1], expected [16]"),
        (torch.zeros(32).double()[::2], ValueError, "has strides [2], expected it to be contig"),
        (torch.zeros(16), TypeError, "has dtype torch.float32, expected torch.float64"),
        (torch.zeros(16).double() - 1, ValueError, "[0] is -1.000000, expected 0 to 1000000"),
        (torch.zeros(16).double() / 0, ValueError, "nan, expected 0 to 1000000"),
        (torch.ones(16).double() / 0, ValueError, "[0] is inf, expected 0 to 1000000"),
    ],
)
def test_frequencies_are_checked(frequencies, error, message):
    batch = RaggedBatch([4], 4)
    given = (*batch.inputs(1), batch.k_pool, batch.v_pool, batch.table((1,)))
    with pytest.raises(error) as caught:
        ops.rope(*given, frequencies)
    assert str(caught.value).startswith("rope: frequencies")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["q", "k"])
def test_heads_that_share_memory_are_not_rotated(name):
    """Each of them would rotate the same elements again."""
    q, k, v = RaggedBatch([4], 4).inputs(3)
    given = {"q": q, "k": k, "v": v}
    given[name] = given[name][:, :1].expand_as(given[name])
    pool, table = torch.zeros(64, k.shape[2]), torch.tensor([[0, 3, 0, 0, 4]])
    message = rf"rope: {name} has strides .* expected no elements that share memory"
    with pytest.raises(ValueError, match=message):
        ops.rope(*given.values(), pool, pool.clone(), table, torch.ones(k.shape[2] // 2).double())
