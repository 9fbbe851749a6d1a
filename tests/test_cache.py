from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_ext import ops
from mistral_ext.engine.cache import RingCache, ring_capacity
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


def cache(window: int | None, capacities: list[int]) -> RingCache:
    return RingCache(config(window), capacities, torch.float32)


def test_ring_capacity_is_the_window_or_the_longest_length():
    assert ring_capacity(config(16), 100) == 16
    assert ring_capacity(config(16), 10) == 10
    assert ring_capacity(config(None), 100) == 100


def test_mistral_7b_takes_512_mib():
    shape = {"n_layers": 32, "n_kv_heads": 8, "n_heads": 32, "head_dim": 128}
    rings = RingCache(config(4096, **shape), [4096], torch.bfloat16)
    assert rings.nbytes == 512 * 2**20


def test_sequence_table():
    rings = cache(4, [4, 2, 4])
    assert rings.append({2: 3, 0: 6}).tolist() == [[0, 3, 0, 12, 4], [3, 6, 0, 0, 4]]
    table = rings.append({0: 1, 1: 2, 2: 0})
    assert table.tolist() == [[0, 1, 6, 0, 4], [1, 2, 0, 8, 2], [3, 0, 3, 12, 4]]
    assert table.dtype == torch.int64
    assert rings.lengths == [7, 2, 3]
    assert [tuple(pool.shape) for pool in (*rings.k, *rings.v)] == [(20, 32)] * 4


def test_a_ring_shorter_than_the_window_has_an_end():
    for window in (8, None):
        rings = cache(window, [8, 5])
        rings.append({1: 4})
        with pytest.raises(ValueError, match=r"ring 1 has 5 slots and no room for 2 more tokens"):
            rings.append({0: 3, 1: 2})
        assert rings.lengths == [0, 4], "a refused append must change nothing"
        rings.append({0: 3, 1: 1})


@pytest.mark.parametrize("capacities", [[], [4, 0], [-1]])
def test_capacities_are_checked(capacities):
    with pytest.raises(ValueError, match=r"capacities is .*, expected one or more, each >= 1"):
        cache(4, capacities)


@pytest.mark.parametrize("length", [-1, 4])
def test_rewind_length_is_checked(length):
    rings = cache(4, [4])
    rings.append({0: 3})
    with pytest.raises(ValueError, match=rf"length is {length}, expected 0 to 3"):
        rings.rewind(0, length)


def test_rewind_twice():
    """Position 1 has gone when 5 came; that 5 was forgotten does not bring it back."""
    rings = cache(4, [4])
    rings.append({0: 6})
    assert rings.rewind(0, 5)
    assert not rings.rewind(0, 4)
    assert rings.lengths == [5]


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
    rings = cache(window, [capacity])
    slots: dict[int, int] = {}  # slot -> position of the token it holds
    length = 0
    for action, amount in steps:
        if action == "append":
            if window is None:
                amount = min(amount, capacity - length)
            rings.append({0: amount})
            slots |= {p % capacity: p for p in range(length, length + amount)}
            length += amount
        else:
            target = int(amount * length)
            seen = range(max(0, target - (window or target + 1) + 1), target)
            kept = all(slots[p % capacity] == p for p in seen)
            assert rings.rewind(0, target) == kept
            length = target if kept else length
        assert rings.lengths == [length]


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

    def run(rings, new):
        qkv = new.transpose(0, 1).clone()  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split([4, 2, 2], dim=1)
        given = (q, k, v, rings.k[0], rings.v[0], rings.append({0: len(q)}))
        ops.rope(*given, 1e4, window)
        return ops.attention(*given, window)

    fresh = cache(window, [capacity])
    run(fresh, tokens[0, :, :kept])
    expected = run(fresh, tokens[1, :, :more])

    rewound = cache(window, [capacity])
    run(rewound, torch.cat([tokens[0, :, :kept], tokens[2, :, kept:first]], dim=1))
    if not rewound.rewind(0, kept):
        return
    torch.testing.assert_close(run(rewound, tokens[1, :, :more]), expected)
