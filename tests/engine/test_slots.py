from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_ext import ops
from mistral_ext.engine.slots import SlotPool, slots_needed
from mistral_ext.model import rope
from mistral_ext.model.config import MistralConfig


def config(window: int | None, **changes) -> MistralConfig:
    fields = {
        "vocab_size": 32,
        "dim": 128,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 32,
        "hidden_dim": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": window,
        "max_positions": 1000,
        "bos_id": 1,
        "eos_ids": (2,),
    }
    return MistralConfig(**fields | changes)


def pool(window: int | None, slots: int) -> SlotPool:
    return SlotPool(config(window), slots, torch.float32)


def test_a_sequence_needs_the_window_with_slack_or_its_longest_length():
    assert slots_needed(4096, 10**6) == 4096 + 512
    assert slots_needed(4096, 4100) == 4100
    assert slots_needed(16, 100) == 16 + 64
    assert slots_needed(16, 10) == 10
    assert slots_needed(None, 100) == 100


def test_mistral_7b_takes_128_kib_a_token():
    shape = {"n_layers": 32, "n_kv_heads": 8, "n_heads": 32, "head_dim": 128}
    slots = slots_needed(4096, 32768)
    rings = SlotPool(config(4096, **shape), slots, torch.bfloat16)
    assert rings.nbytes == (512 + 64) * 2**20


def test_sequence_table():
    slots = pool(None, 900)
    a, b, c = (slots.allocate(1, most) for most in (4, 2, 300))
    slots.advance(b, 1)
    assert slots.table({c: 3, a: 2, b: 0}).tolist() == [
        [0, 3, 0, 12, 256],
        [3, 2, 0, 0, 4],
        [5, 0, 1, 8, 2],
    ]
    assert slots.table({a: 1}).dtype == torch.int64
    assert [tuple(layer.shape) for layer in (*slots.k, *slots.v)] == [(1800, 32)] * 4


@pytest.mark.parametrize(
    ("window", "capacity", "length", "room"),
    [
        (None, 256, 250, 5),
        (None, 256, 255, 0),
        (None, 256, 256, 0),
        (48, 112, 100, 64),  # a ring: what is older than the window may go
        (48, 112, 30, 81),  # not full yet
        (48, 50, 49, 2),
        (48, 40, 30, 9),
        (48, 40, 39, 0),
    ],
)
def test_room_for_drafts(window, capacity, length, room):
    slots = pool(window, 512)
    extent = slots.allocate(capacity, most=capacity)
    extent.length = length
    assert slots.room_for_drafts(extent) == room


def test_drafts_have_rows_of_their_own():
    slots = pool(None, 512)
    one, other = slots.allocate(20, most=20), slots.allocate(9, most=9)
    slots.advance(one, 5)
    table = slots.draft_table([one, other], [3, 1])
    heads = 2
    assert table.tolist() == [
        [0, 1, 5, 0, 20],
        [1, 1, 6, 0, 20],
        [2, 1, 7, 0, 20],
        [3, 1, 0, heads * 20, 9],
    ]


def test_drafts_take_slots():
    slots = pool(4, 512)
    extent = slots.allocate(10, most=10)
    slots.advance(extent, 12)  # 2 to 11 are stored
    assert slots.can_rewind(extent, 5)
    slots.note_drafts(extent, 2)  # 13 and 14, behind 12, take the slots of 3 and 4
    assert extent.length == 12
    assert not slots.can_rewind(extent, 7)  # it sees 4
    assert slots.can_rewind(extent, 8)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="slots is 0, expected 1 or more"):
        pool(4, 0)


def fill(slots: SlotPool, extent, positions) -> None:
    """Stores the numbers of positions as keys, and their negatives as values."""
    for layer in range(2):
        for pool, sign in ((slots.k, 1), (slots.v, -1)):
            rows = slots._view(pool[layer], extent)
            for p in positions:
                rows[:, p % extent.capacity] = sign * p


def stored(slots: SlotPool, extent, position) -> set[float]:
    views = [slots._view(layer, extent) for layer in (*slots.k, *slots.v)]
    return {abs(x) for view in views for x in view[:, position % extent.capacity].unique().tolist()}


@st.composite
def lives(draw):
    """What happens to sequences that share a pool."""
    window = draw(st.none() | st.integers(1, 400))
    names = st.integers(0, 4)
    allocate = st.tuples(st.just("allocate"), names, st.integers(1, 700))
    append = st.tuples(st.just("append"), names, st.integers(1, 300))
    rewind = st.tuples(st.just("rewind"), names, st.floats(0, 1))
    copy = st.tuples(st.just("copy"), names, names)
    release = st.tuples(st.just("release"), names, st.none())
    steps = st.lists(allocate | append | append | rewind | copy | release, max_size=25)
    return window, draw(steps)


@settings(max_examples=150)
@given(lives())
def test_nothing_overlaps_or_leaks_or_is_lost(life):
    """Every token that the next one sees is where the table says, however extents grow and move."""
    window, steps = life
    slots = pool(window, 2000)
    extents = {}

    def check():
        owned = sorted((e.first, e.first + e.capacity) for e in extents.values())
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(owned))
        assert slots.free_slots == 2000 - sum(end - begin for begin, end in owned)
        for extent in extents.values():
            oldest = max(0, extent.length - (window or extent.length + 1) + 1)
            assert slots.can_rewind(extent, extent.length)
            for p in {oldest, (oldest + extent.length) // 2, extent.length - 1}:
                if oldest <= p < extent.length:
                    assert stored(slots, extent, p) == {p}

    for action, name, amount in steps:
        extent = extents.get(name)
        if action == "allocate" and extent is None:
            extent = slots.allocate(min(amount, 300), slots_needed(window, amount))
            if extent is not None:
                extents[name] = extent
        elif extent is None:
            continue
        elif action == "append":
            if extent.capacity == extent.most and not window:
                amount = min(amount, extent.most - extent.length)
            if window and extent.most < slots_needed(window, 10**6):
                amount = min(amount, extent.most - extent.length)
            if slots.has_room(extent, amount) or slots.grow(extent, amount):
                fill(slots, extent, range(extent.length, extent.length + amount))
                slots.advance(extent, amount)
        elif action == "rewind":
            length = int(amount * extent.length)
            if slots.can_rewind(extent, length):
                slots.rewind(extent, length)
        elif action == "copy" and name != amount and amount in extents:
            source, length = extents[amount], extents[amount].length
            if length and (copied := slots.allocate(length, slots_needed(window, length + 50))):
                slots.release(extents.pop(name))
                slots.copy(source, copied, length)
                extents[name] = copied
        elif action == "release":
            slots.release(extents.pop(name))
        check()
    for extent in extents.values():
        slots.release(extent)
    assert slots._free == [(0, 2000)]


def test_rewind_twice():
    """Position 1 has gone when 5 came; that 5 was forgotten does not bring it back."""
    slots = pool(4, 4)
    ring = slots.allocate(4, 4)
    slots.advance(ring, 6)
    assert slots.can_rewind(ring, 5)
    slots.rewind(ring, 5)
    assert not slots.can_rewind(ring, 4)


@st.composite
def histories(draw):
    """(window, capacity, [("append", count) or ("rewind", to this share of the length)])"""
    window = draw(st.none() | st.integers(1, 6))
    capacity = (window or 24) + draw(st.integers(0, 3))
    append = st.tuples(st.just("append"), st.integers(0, 9))
    rewind = st.tuples(st.just("rewind"), st.floats(0, 1))
    return window, capacity, draw(st.lists(append | rewind, max_size=12))


@settings(max_examples=200)
@given(histories())
def test_rewind_succeeds_whenever_the_slots_still_hold_what_is_seen(history):
    window, capacity, steps = history
    pool_ = pool(window, capacity)
    ring = pool_.allocate(capacity, capacity)
    slots: dict[int, int] = {}  # slot -> position of the token it holds
    length = 0
    for action, amount in steps:
        if action == "append":
            if window is None:
                amount = min(amount, capacity - length)
            pool_.advance(ring, amount)
            slots |= {p % capacity: p for p in range(length, length + amount)}
            length += amount
        else:
            target = int(amount * length)
            seen = range(max(0, target - (window or target + 1) + 1), target)
            kept = all(slots[p % capacity] == p for p in seen)
            assert pool_.can_rewind(ring, target) == kept
            if kept:
                pool_.rewind(ring, target)
                length = target
        assert ring.length == length


@settings(max_examples=40)
@given(
    window=st.none() | st.integers(1, 6),
    slack=st.integers(0, 5),
    lengths=st.tuples(*[st.integers(1, 20)] * 2),
    back=st.integers(0, 20),
)
def test_new_tokens_after_a_rewind_are_as_on_a_fresh_ring(window, slack, lengths, back):
    first, more = lengths
    kept = max(0, first - back)
    capacity = (window or 40) + slack
    generator = torch.Generator().manual_seed(first)
    tokens = torch.randn(3, 8, first + more, 32, generator=generator)  # old, new, other

    def run(slots, ring, new):
        qkv = new.transpose(0, 1).clone()  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split([4, 2, 2], dim=1)
        given = (q, k, v, slots.k[0], slots.v[0], slots.table({ring: len(q)}))
        slots.advance(ring, len(q))
        ops.rope(*given, rope.frequencies(1e4, 32), window)
        return ops.attention(*given, window)

    fresh = pool(window, capacity)
    ring = fresh.allocate(capacity, capacity)
    run(fresh, ring, tokens[0, :, :kept])
    expected = run(fresh, ring, tokens[1, :, :more])

    rewound = pool(window, capacity)
    ring = rewound.allocate(capacity, capacity)
    run(rewound, ring, torch.cat([tokens[0, :, :kept], tokens[2, :, kept:first]], dim=1))
    if not rewound.can_rewind(ring, kept):
        return
    rewound.rewind(ring, kept)
    torch.testing.assert_close(run(rewound, ring, tokens[1, :, :more]), expected)
