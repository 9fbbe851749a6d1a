"""Attention, and rope's and attention's share of the ring: against lists of tokens."""

from __future__ import annotations

import re

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import RaggedBatch
from tolerance import DTYPES, assert_close

from mistral_ext import _C, ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_decodes_and_idle_sequences_in_one_call(isa, dtype):
    # Capacities: the window; the longest length, less than the window; more than the window.
    batch = RaggedBatch([8, 6, 8, 21, 8], window=8, dtype=dtype)
    for counts in (
        (13, 1, 3, 0, 7),
        (1, 1, 1, 1, 1),
        (5, 0, 8, 30, 9),
        (1, 3, 17, 1, 1),
        (0, 1, 1, 22, 2),
        (0, 0, 0, 0, 0),
        (2, 0, 1, 1, 16),
    ):
        batch.step(counts)


@pytest.mark.parametrize("window", [1, 7, None])
def test_lengths_and_chunks_around_the_window(isa, window):
    w = window or 7
    lengths = sorted({max(1, n) for n in (w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1)})
    chunks = sorted({max(1, n) for n in (1, w - 1, w, w + 1, 2 * w)})
    cases = [(length, chunk) for length in lengths for chunk in chunks]
    batch = RaggedBatch([min(window or n, n) for n, _ in cases], window, heads=2, kv_heads=1)
    for begin in range(2 * w + 1):  # those that have ended stay idle
        batch.step([min(chunk, max(0, length - begin * chunk)) for length, chunk in cases])
    assert batch.positions == [length for length, _ in cases]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [
        (1, 1, 32),
        (4, 2, 64),
        (8, 2, 128),
        (8, 1, 256),
        (6, 2, 96),
        (7, 1, 64),
        (65, 1, 32),
        (260, 2, 32),
    ],
)
def test_head_shapes(isa, heads, kv_heads, dim):
    batch = RaggedBatch([5, 9], 5, heads, kv_heads, dim)
    for counts in ((7, 3), (1, 1), (4, 5)):
        batch.step(counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_has_strides_of_its_own(isa, dtype):
    """Few tokens and many, those that fit the rings and those that are stored after attention."""
    batch = RaggedBatch([8, 30, 8], 8, 6, 2, 64, dtype, positions=[9, 0, 100], layout="apart")
    for counts in ((1, 1, 1), (5, 29, 0), (9, 0, 20)):
        batch.step(counts)


@pytest.mark.parametrize(
    ("window", "dtype", "layout"),
    [
        (100, torch.float32, "fused"),
        (100, torch.float16, "heads first"),
        (None, torch.float32, "heads first"),
        (None, torch.bfloat16, "fused"),
    ],
)
def test_longer_than_the_kernels_tiles(isa, window, dtype, layout):
    batch = RaggedBatch([window or 301, window or 165], window, 6, 2, 64, dtype, layout=layout)
    for counts in ((131, 2), (1, 131), (67, 1), (101, 31), (1, 0)):
        batch.step(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_after_the_window_was_passed(dtype):
    positions = [1_000_003, 10**9 + 7, 31]
    batch = RaggedBatch([16, 16, 19], 16, dtype=dtype, theta=1e6, positions=positions)
    for counts in ((1, 1, 1), (5, 20, 3), (16, 1, 35)):
        batch.step(counts)


def test_new_keys_that_fill_a_block_of_the_decode_kernel(isa):
    """16 tokens with a query row each: only the last of them sees all keys of the block."""
    batch = RaggedBatch([40, 40], 40, 2, 2, 64)
    for counts in ((16, 3), (16, 16)):
        batch.step(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 128])
def test_few_tokens_and_many_keys(isa, dtype, dim):
    """The keys of few tokens are divided among tasks: rings that have wrapped, and have not."""
    positions = [1499, 2200, 7777, 1024, 1]
    batch = RaggedBatch([1500, 2300, 1500, 1500, 1500], 1500, 4, 2, dim, dtype, positions=positions)
    for counts in ((1, 2, 1, 1, 1), (3, 1, 4, 0, 1), (1, 8, 9, 1, 2)):
        batch.step(counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_prompt_of_thousands_of_tokens_without_a_window(isa, dim, dtype):
    """The values of so many keys must not be added to one number one by one: rounding adds up."""
    batch = RaggedBatch([9000], None, 2, 1, dim, dtype, theta=1e5, positions=[8150])
    for counts in ((70,), (1,)):
        batch.step(counts)


def test_divided_keys_give_the_same_bits_alone_and_on_any_number_of_threads(isa):
    positions = [5000, 3333, 1200]
    together = RaggedBatch([4096, 4096, 4096], 4096, positions=positions)
    q, k, v = together.inputs(1 + 2 + 1)
    pools, table = (together.k_pool, together.v_pool), together.table((1, 2, 1))
    out = ops.attention(q, k, v, *pools, table, 4096)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(ops.attention(q, k, v, *pools, table, 4096), out)
    middle = table[1:2].clone()
    middle[0, 0] = 0
    new = slice(1, 3)
    assert torch.equal(ops.attention(q[new], k[new], v[new], *pools, middle, 4096), out[new])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "capacity"),
    [(4, 2, 64, None, 300), (8, 2, 32, 50, 70), (4, 4, 64, 100, 100), (4, 2, 128, 64, 200)],
)
def test_the_cut_of_a_prompt_changes_no_bit(
    isa, heads, kv_heads, dim, window, capacity, dtype, generator
):
    """Whether a key comes from the ring or from the chunk, and across both ends of the ring."""
    length = 300
    shapes = ((length, heads, dim), (length, kv_heads, dim), (length, kv_heads, dim))
    qkv = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def out(chunks):
        k_pool = torch.full((kv_heads * capacity, dim), float("nan"), dtype=dtype)
        v_pool, results = k_pool.clone(), []
        for chunk in zip(*(x.split(chunks) for x in qkv), strict=True):
            q, k, v = (x.clone() for x in chunk)
            position = sum(map(len, results))
            table = torch.tensor([[0, len(q), position, 0, capacity]])
            ops.rope(q, k, v, k_pool, v_pool, table, reference.frequencies(1e4, dim), window)
            results.append(ops.attention(q, k, v, k_pool, v_pool, table, window))
        return torch.cat(results)

    whole = out([length])
    for chunks in ([64] * 4 + [44], [17, 100, 33, 150], [250, 50], [18] * 15 + [30]):
        assert torch.equal(out(chunks), whole)


def test_scores_are_multiplied_by_scale(isa):
    RaggedBatch([9], 9, scale=0.5).step((9,))


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-60, 1e60])
@pytest.mark.parametrize("pooled", [True, False])
def test_scales_that_are_no_positive_float_are_refused(scale, pooled):
    """Hidden scores of -inf would become inf or NaN."""
    given = arguments(scale=scale) | ({} if pooled else {"k_pool": None, "v_pool": None})
    with pytest.raises(ValueError, match=rf"^attention: scale is {re.escape(f'{scale:g}')}, expe"):
        ops.attention(**given)


def test_large_scores_do_not_overflow(isa, generator):
    """Scores of hundreds, whose exp does not fit a float. Whole numbers, so that they are exact."""
    batch = RaggedBatch([70], None)
    shapes = (70, 4, 32), (70, 2, 32)
    q, k = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    v = torch.randn(70, 2, 32, generator=generator)
    out = ops.attention(q, k, v, batch.k_pool, batch.v_pool, batch.table((70,)), scale=8.0)
    wide = [x.double() for x in (q, k, v)]
    assert_close(
        out, reference.attention(*wide, None, 8.0), reference.attention(q, k, v, None, 8.0)
    )


def test_no_tokens_and_no_sequences():
    batch = RaggedBatch([], 4)
    assert batch.step(()).shape == (0, 4, 32)
    assert RaggedBatch([3, 3], 4).step((0, 0)).shape == (0, 4, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_its_rows_of_a_strided_output_and_no_others(isa, dtype):
    batch = RaggedBatch([7], 7, dtype=dtype)
    q, k, v = batch.inputs(7)
    table = batch.table((7,))
    around = torch.full((9, 6, 40), float("nan"), dtype=dtype)
    out = around[1:-1, 1:-1, 4:-4]
    call = _C.attention(q, k, v, batch.k_pool, batch.v_pool, table, out, 7, 0.25, None)
    call.run(0, 0, 2)
    exact = reference.attention(q.double(), k.double(), v.double(), 7, 0.25)
    assert_close(out, exact, reference.attention(q, k, v, 7, 0.25))
    assert around.isnan().sum() == around.numel() - out.numel()


def test_does_not_depend_on_the_rest_of_the_batch(isa):
    """Bit for bit: a sequence's result may not change with its neighbours."""
    together = RaggedBatch([8, 8, 8], 8)
    q, k, v = together.inputs(3 + 11 + 1)
    out = ops.attention(q, k, v, together.k_pool, together.v_pool, together.table((3, 11, 1)), 8)
    alone = RaggedBatch([8], 8)
    new = slice(3, 14)
    pools = alone.k_pool, alone.v_pool
    assert torch.equal(
        out[new], ops.attention(q[new], k[new], v[new], *pools, alone.table((11,)), 8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capacity", "window"), [(12, 8), (15, 8), (40, None), (600, 512)])
def test_rows_that_share_a_ring_are_steps_of_one_token(isa, capacity, window, dtype):
    """Bit for bit, beside another sequence, wherever the ring wraps."""
    for position in {0, 3, 35, 11 if window == 8 else 20, 595}:
        if window is None and position + 5 > capacity:
            continue
        batch = RaggedBatch([capacity, 40], window, dtype=dtype, positions=[position, 9])
        tokens = batch.inputs(6)  # five of the first sequence, then one of the second
        table = batch.table((1, 1))[[0] * 5 + [1]]
        table[:, 0] = torch.arange(6)
        table[:5, 2] += torch.arange(5)

        def run(rows, pools, table=table, tokens=tokens, batch=batch):
            q, k, v = (x[rows].clone() for x in tokens)
            given = table[rows] - table[rows][:1] * torch.tensor([1, 0, 0, 0, 0])
            ops.rope(q, k, v, *pools, given, batch.frequencies, window)
            return ops.attention(q, k, v, *pools, given, window)

        pools = [pool.clone() for pool in (batch.k_pool, batch.v_pool)]
        apart = [pool.clone() for pool in pools]
        together = run(slice(0, 6), pools)
        for i in range(6):
            assert torch.equal(run(slice(i, i + 1), apart)[0], together[i])
        for one, other in zip(pools, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def sharing(*rows):
    """Rows of one token each: (position, first row of the ring, capacity)."""
    q, k, v = (torch.zeros(len(rows), heads, 32) for heads in (4, 2, 2))
    sequences = torch.tensor([[i, 1, *row] for i, row in enumerate(rows)])
    return {"q": q, "k": k, "v": v, "sequences": sequences}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # The window is 4: a ring of 5 slots has room for one more row.
        ([(5, 0, 5), (6, 0, 5)], None),
        ([(2, 0, 5), (3, 0, 5), (4, 0, 5)], None),
        ([(2, 16, 6), (3, 16, 6), (3, 0, 5), (4, 0, 5)], None),
        (
            [(5, 0, 5), (6, 0, 5), (7, 0, 5)],
            "sequences[2].capacity is 5, expected the window and 2 more, one for each row before "
            "it in its ring, or 8, the sequence's length, or more",
        ),
        ([(3, 0, 5), (4, 0, 5), (5, 0, 5)], "sequences[2].capacity is 5"),
        ([(5, 0, 5), (7, 0, 5)], "a ring at row 0, expected 10 or more"),  # not consecutive
        ([(5, 0, 5), (5, 0, 5)], "a ring at row 0, expected 10 or more"),
        ([(5, 0, 5), (6, 0, 6)], "a ring at row 0, expected 10 or more"),
        ([(5, 0, 5), (6, 1, 5)], "a ring at row 1, expected 10 or more"),
        ([(5, 0, 5), (0, 10, 5), (6, 0, 5)], "a ring at row 0, expected 10 or more"),
    ],
)
def test_rows_that_may_share_a_ring(rows, message):
    given = arguments(**sharing(*rows))
    if message is None:
        ops.attention(**given)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attention(**given)


@st.composite
def schedules(draw):
    """(window, capacities, [counts of a step])"""
    window = draw(st.none() | st.integers(1, 12))
    count = st.one_of(st.just(0), st.just(1), st.integers(0, 20))
    sequences = draw(st.integers(1, 3))
    steps = draw(st.lists(st.tuples(*[count] * sequences), min_size=1, max_size=5))
    capacities = []
    for counts in zip(*steps, strict=True):
        length = max(1, sum(counts))
        least = min(window or length, length)
        capacities.append(draw(st.integers(least, least + 5)))
    return window, capacities, steps


@settings(max_examples=200)
@given(schedule=schedules(), seed=st.integers(0, 99))
def test_any_schedule(schedule, seed):
    window, capacities, steps = schedule
    batch = RaggedBatch(capacities, window, seed=seed)
    for counts in steps:
        batch.step(counts)


def arguments(**changes):
    """Two sequences, of 3 and 2 new tokens and rings of 8 slots; window 4."""
    given = {
        "q": torch.zeros(5, 4, 32),
        "k": torch.zeros(5, 2, 32),
        "v": torch.zeros(5, 2, 32),
        "k_pool": torch.zeros(32, 32),
        "v_pool": torch.zeros(32, 32),
        "sequences": torch.tensor([[0, 3, 0, 0, 8], [3, 2, 6, 16, 8]]),
        "window": 4,
    }
    return given | changes


def table(**changes):
    """The sequence table of `arguments` with one row's columns changed; `row` is 1 by default."""
    columns = ["first_token", "count", "position", "ring_row", "capacity"]
    sequences = arguments()["sequences"]
    row = changes.pop("row", 1)
    for column, value in changes.items():
        sequences[row, columns.index(column)] = value
    return {"sequences": sequences}


def strided(*shape):
    """A tensor whose last axis does not have stride 1."""
    return torch.zeros(*shape, 2)[..., 0]


INT64_MAX = 2**63 - 1


@pytest.mark.parametrize("op", ["rope", "attention"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(5, 128)}, ValueError, "q has shape [5, 128], expected [any, any, any]"),
        (
            {"q": torch.zeros(5, 4, 48), "k": torch.zeros(5, 2, 48), "v": torch.zeros(5, 2, 48)},
            ValueError,
            "q has head dimension 48, expected a multiple of 32 up to 256",
        ),
        ({"q": torch.zeros(5, 4, 288)}, ValueError, "q has head dimension 288, expected a mult"),
        ({"q": torch.zeros(5, 4, 0)}, ValueError, "q has head dimension 0, expected a multiple"),
        ({"q": strided(5, 4, 32)}, ValueError, "q has strides [256, 64, 2], expected the last to"),
        ({"q": torch.zeros(5, 4, 32).int()}, TypeError, "q has dtype torch.int32, expected torch"),
        ({"q": torch.zeros(5, 3, 32)}, ValueError, "q has 3 heads, expected a multiple of the 2"),
        ({"k": torch.zeros(4, 2, 32)}, ValueError, "k has shape [4, 2, 32], expected [5, any, 32]"),
        ({"k": torch.zeros(5, 0, 32)}, ValueError, "q has 4 heads, expected a multiple of the 0"),
        ({"k": strided(5, 2, 32)}, ValueError, "k has strides [128, 64, 2], expected the last to"),
        (
            {"k": torch.zeros(5, 2, 32).half()},
            TypeError,
            "k has dtype torch.float16, expected torch.float32 like q",
        ),
        ({"v": torch.zeros(5, 1, 32)}, ValueError, "v has shape [5, 1, 32], expected [5, 2, 32]"),
        ({"v": strided(5, 2, 32)}, ValueError, "v has strides [128, 64, 2], expected the last to"),
        (
            {"v": torch.zeros(5, 2, 32).bfloat16()},
            TypeError,
            "v has dtype torch.bfloat16, expected torch.float32 like q",
        ),
        (
            {"k_pool": torch.zeros(32, 64)},
            ValueError,
            "k_pool has shape [32, 64], expected [any, 32]",
        ),
        ({"k_pool": torch.zeros(64, 32)[::2]}, ValueError, "k_pool has strides [64, 1], expected"),
        ({"k_pool": torch.zeros(32, 32).half()}, TypeError, "k_pool has dtype torch.float16, exp"),
        (
            {"v_pool": torch.zeros(31, 32)},
            ValueError,
            "v_pool has shape [31, 32], expected [32, 32]",
        ),
        ({"v_pool": torch.zeros(64, 32)[::2]}, ValueError, "v_pool has strides [64, 1], expected"),
        ({"v_pool": torch.zeros(32, 32).half()}, TypeError, "v_pool has dtype torch.float16, exp"),
        (
            {"sequences": torch.zeros(2, 4).long()},
            ValueError,
            "sequences has shape [2, 4], expected [any, 5]",
        ),
        (
            {"sequences": torch.zeros(2, 5)},
            TypeError,
            "sequences has dtype torch.float32, expected torch.int64",
        ),
        (
            {"sequences": torch.zeros(5, 2).long().T},
            ValueError,
            "sequences has strides [1, 2], expected it to be contiguous",
        ),
        (
            {"sequences": torch.zeros(0, 5).long()},
            ValueError,
            "sequences has 0 rows, expected 1 or more for the 5 tokens of q",
        ),
        ({"window": 0}, ValueError, "window is 0, expected 1 or more or None"),
        (
            table(first_token=2),
            ValueError,
            "sequences[1].first_token is 2, expected 3: tokens are packed in the order of",
        ),
        (table(count=-1), ValueError, "sequences[1].count is -1, expected 0"),
        (
            table(count=3),
            ValueError,
            "sequences[1].count is 3, expected 0 to 2: there are 5 tokens",
        ),
        (table(count=1), ValueError, "sequences has 4 new tokens, expected 5 like q"),
        (table(position=-1), ValueError, "sequences[1].position is -1, expected 0"),
        (table(capacity=0), ValueError, "sequences[1].capacity is 0, expected 1 or more"),
        (
            table(capacity=3),
            ValueError,
            "sequences[1].capacity is 3, expected the window or 8, the sequence's length, or",
        ),
        (
            table(position=7) | {"window": None},
            ValueError,
            "sequences[1].capacity is 8, expected the window or 9, the sequence's length, or",
        ),
        (table(ring_row=-1), ValueError, "sequences[1].ring_row is -1 and its"),
        (table(ring_row=17), ValueError, "sequences[1].ring_row is 17 and its"),
        (
            table(ring_row=15),
            ValueError,
            "a ring at row 15, expected 16 or more: the ring at row 0 ends there",
        ),
        # Sums that do not fit an int64 are no way around the checks.
        (table(capacity=2**62), ValueError, "sequences[1].ring_row is 16 and its"),
        (table(ring_row=INT64_MAX), ValueError, f"sequences[1].ring_row is {INT64_MAX} and its"),
        (table(position=INT64_MAX), ValueError, f"sequences[1].position is {INT64_MAX}, expected"),
        (table(row=0, count=INT64_MAX), ValueError, "sequences"),
    ],
)
def test_argument_checks(op, changes, error, message):
    given = arguments(**changes)
    if op == "rope":
        given["frequencies"] = reference.frequencies(1e4, given["q"].shape[-1])
    with pytest.raises(error) as caught:
        getattr(ops, op)(**given)
    assert str(caught.value).startswith(f"{op}: ")
    assert message in str(caught.value)
