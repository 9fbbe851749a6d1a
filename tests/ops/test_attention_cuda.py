"""The CUDA attention kernels: the lists of tokens again, at the shapes where tiles, splits and
rings meet, and what the kernels are designed to move through memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backends import GPU, HOPPER_GPU, attention_of, configure, use
from ragged import RaggedBatch

from mistral_ext import ops
from mistral_ext.ops import workspace

PREFILLS = ["", ", sm90"]  # the kernels that prefill: that of sm_80, and of sm_90a
EMULATED = [f"emulator, {copies}{prefill}" for copies in ("late", "early") for prefill in PREFILLS]
cuda_kernels = pytest.mark.parametrize("backend", [*EMULATED, GPU, HOPPER_GPU], indirect=True)


@cuda_kernels
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 64), (torch.float16, 128)],
)
def test_prompts_and_decodes_in_one_call(backend, dtype, dim):
    batch = RaggedBatch([16, 40, 16], 16, heads=8, kv_heads=2, dim=dim, dtype=dtype)
    for counts in ((5, 40, 0), (1, 1, 1), (20, 1, 4), (0, 3, 1), (2, 33, 17), (1, 1, 1)):
        batch.step(counts)


@cuda_kernels
@pytest.mark.parametrize("window", [1, 2, 15, 63, 64, 65, None])
def test_windows_around_the_tiles(backend, window):
    lengths = [70, 129, 1]
    capacities = [min(window or 200, 200)] * 3
    batch = RaggedBatch(capacities, window, 4, 1, 64, torch.bfloat16)
    batch.step(lengths)
    batch.step((1, 1, 4))
    batch.step((33, 1, 5))


@cuda_kernels
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (16, 1), (17, 1), (48, 2)])
def test_groups(backend, heads, kv_heads):
    """Up to 16 query rows of a sequence and key/value head are decoded, more are prefilled."""
    batch = RaggedBatch([9, 24], 9, heads, kv_heads, 64, torch.float16)
    for counts in ((1, 16), (2, 1), (20, 3)):
        batch.step(counts)


@cuda_kernels
@pytest.mark.parametrize("dim", [64, 128])
def test_each_tensor_has_strides_of_its_own(backend, dim):
    """Decodes and prompts, tokens that fit the rings and those that are stored after attention."""
    batch = RaggedBatch(
        [20, 300, 20], 20, 6, 2, dim, torch.bfloat16, positions=[33, 0, 100], layout="apart"
    )
    for counts in ((1, 1, 1), (3, 140, 0), (21, 1, 45)):
        batch.step(counts)


@cuda_kernels
@pytest.mark.parametrize("window", [17, 65, 129])
def test_edges_of_the_window_in_the_last_tile(backend, window):
    """Which has 1 to 3 tokens, and as many keys as they can see: of the first tile of keys, which
    tiles of more tokens have to mask anyway, the last token may not see the first key or two. With
    fewer tokens, the same in the kernel that decodes."""
    batch = RaggedBatch([window] * 3, window, 4, 1, 64, torch.bfloat16, positions=[777, 999, 5000])
    batch.step((33, 34, 35))
    batch.step((1, 2, 3))


@pytest.mark.parametrize("window", [33, 64, None])
def test_rows_that_share_a_ring(backend, window):
    """Each token of a sequence has a row of the table, and sees those before it: without a window,
    and across the end of a ring with slots to spare."""
    capacities = [300, 300] if window is None else [window + 7, window + 13]
    positions = [97, 5] if window is None else [10 * (window + 7) - 4, 5]
    batch = RaggedBatch(capacities, window, 8, 2, 64, torch.bfloat16, positions=positions)
    for counts in ((8, 1), (3, 5), (1, 7), (0, 8), (8, 2)):
        batch.step(counts, tokens_apart=True)


@pytest.mark.parametrize("backend", EMULATED, indirect=True)
def test_strided_inputs_far_positions_and_split_keys(backend, request):
    """Enough multiprocessors that a decode is divided among several blocks."""
    emulator = request.getfixturevalue("emulator")
    configure(emulator, backend, seed=3, multiprocessors=40)
    batch = RaggedBatch(
        [300, 310],
        300,
        4,
        1,
        64,
        torch.bfloat16,
        positions=[10**9 + 7, 299],
        layout="heads first",
        scale=0.3,
    )
    emulator.take_launches()
    for counts in ((1, 1), (4, 2), (1, 30), (3, 1)):
        batch.step(counts)
    splits = {r["grid"][0] for r in emulator.take_launches() if "decode" in r["kernel"]}
    assert max(splits) > 1


@pytest.mark.parametrize("copies", ["late", "early"])
def test_each_warp_decodes_several_tiles(emulator, copies):
    """One block for a key/value head: its warps fill their stages again and again."""
    backend = f"emulator, {copies}"
    configure(emulator, backend, multiprocessors=1)
    with use(emulator):
        batch = RaggedBatch([310], None, 8, 2, 64, torch.bfloat16, positions=[300])
        for counts in ((1,), (4,)):
            batch.step(counts)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_threads(emulator, seed, prefill):
    for copies in ("late", "early"):
        backend = f"emulator, {copies}{prefill}"
        configure(emulator, backend, seed=seed, multiprocessors=20)
        with use(emulator), attention_of(backend, emulator):
            batch = RaggedBatch([70, 70], 70, 4, 1, 64, torch.bfloat16, seed=seed)
            for counts in ((3, 90), (1, 1), (4, 70)):
                batch.step(counts)


def launches(emulator, counts, positions, window, heads=4, kv_heads=1, dim=64, max_count=None):
    """The records of one attention call in which sequence i, at positions[i], adds counts[i]."""
    capacity = window or max(map(sum, zip(counts, positions, strict=True)))
    batch = RaggedBatch(
        [capacity] * len(counts), window, heads, kv_heads, dim, torch.bfloat16, positions=positions
    )
    q, k, v = batch.inputs(sum(counts))
    emulator.configure(multiprocessors=1)  # no reason to divide a decode
    emulator.take_launches()
    with use(emulator):
        pools = batch.k_pool, batch.v_pool
        ops.attention(q, k, v, *pools, batch.table(counts), window, max_count=max_count)
    return emulator.take_launches()


@pytest.mark.parametrize("kv_heads", [2, 3])
@pytest.mark.parametrize(("position", "window"), [(0, None), (100, None), (1000, 90), (37, 90)])
def test_decode_reads_each_key_and_value_once(emulator, kv_heads, position, window):
    """For all heads of a group together; besides, the queries, and nothing outside the window."""
    heads, dim = 4 * kv_heads, 64
    (record,) = launches(emulator, (1,), (position,), window, heads, kv_heads, dim, max_count=1)
    keys = min(position + 1, window or position + 1)
    assert "decode" in record["kernel"]
    assert record["loaded_bytes"] == 2 * dim * (2 * keys * kv_heads + heads)
    assert record["stored_bytes"] == 2 * dim * heads
    assert record["shared_conflicts"] == 0


def test_prefill_reads_no_tile_outside_the_window(emulator):
    """Its traffic grows with the length times the window, not with the length squared."""
    dim, window, group = 64, 64, 4
    rows, keys = 128, 64  # of a tile: kPrefillRows, kPrefillKeys
    for length in (128, 512):
        _, record = launches(emulator, (length,), (0,), window, group, 1, dim)
        tokens = rows // group
        seen = [
            min(last, tokens + window - 1)  # by a tile of queries that ends before `last`
            for last in range(tokens, length + 1, tokens)
        ]
        late = window  # tokens that could not be stored in the ring before
        assert record["loaded_bytes"] == 2 * dim * (2 * sum(seen) + group * length + 2 * late)
        counter = 4  # bytes
        assert record["stored_bytes"] == 2 * dim * (group * length + 2 * late) + counter
        assert record["shared_conflicts"] == 0
        # 4 warps, 2 x 8 products of 16 x 8 x 16 for each 16 of D and tile of keys, and as many of
        # probabilities and values
        tiles = sum(-(-n // keys) for n in seen)
        assert record["mma"] == 4 * 2 * (2 * 8 * dim // 16) * tiles


def test_the_launches_of_a_call(emulator):
    """One for all decodes, one for all prompts; a call that only decodes can say so."""
    mixed = launches(emulator, (1, 40, 1), (5, 0, 70), 64)
    assert [("decode" in r["kernel"], "prefill" in r["kernel"]) for r in mixed] == [
        (True, False),
        (False, True),
    ]
    assert len(launches(emulator, (1, 1), (5, 70), 64, max_count=1)) == 1
    assert len(launches(emulator, (4, 0), (5, 70), 64, max_count=4)) == 1


def test_counters_belong_to_a_stream_or_to_a_graph(monkeypatch):
    """Zeroed anew for each graph that is captured, and for it once."""
    graph = 0
    monkeypatch.setattr(workspace, "_C", SimpleNamespace(capture_id=lambda stream: graph))
    monkeypatch.setattr(workspace, "_counters", {})

    def counters(stream=7, count=5000):
        return workspace._zeroed_counters(torch.device("cpu"), stream, count)

    eager = counters()
    assert eager.tolist() == [0] * 5000
    assert counters(count=3000) is eager
    assert counters(stream=8) is not eager
    # Those of attention serve the argmax of the same step.
    assert counters(stream=9, count=2) is counters(stream=9, count=129)
    graph = 1
    captured = counters()
    assert captured is not eager
    assert counters(count=4000) is captured
    assert len(counters(count=9000)) == 9000
    graph = 2
    assert counters() is not captured
    graph = 0
    assert counters() is eager


def test_sizes_without_a_kernel_are_refused(emulator):
    """Here by the launch; on a GPU the bindings say why."""
    for dim, dtype in ((32, torch.bfloat16), (64, torch.float32)):
        with use(emulator), pytest.raises(RuntimeError, match="attention: launch failed"):
            RaggedBatch([8], 8, dim=dim, dtype=dtype).step((3,))
