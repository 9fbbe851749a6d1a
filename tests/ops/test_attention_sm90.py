"""The prefill kernel of sm_90a: at the shapes where its tiles, runs of keys and parts of the work
meet, and how much of its work is useful. test_attention_cuda.py has the cases of all kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import GPU, HOPPER_GPU, attention_of, configure, use
from ragged import RaggedBatch

from mistral_ext import _C, ops
from mistral_ext.ops import workspace

EMULATED = ["emulator, late, sm90", "emulator, early, sm90"]
hopper = pytest.mark.parametrize("backend", [*EMULATED, HOPPER_GPU], indirect=True)

ROWS, KEYS = 128, 128  # of a tile: kPrefillRows, kHopperKeys
LAYOUTS = ["fused", "heads first"]


@hopper
@pytest.mark.parametrize(
    ("window", "dim", "layout"),
    [
        case
        for i, window in enumerate([127, 128, 129, 300, None])
        for case in [(window, 64, LAYOUTS[i % 2]), (window, 128, LAYOUTS[(i + 1) % 2])]
    ],
)
def test_runs_of_keys(backend, window, dim, layout):
    """Rings that have wrapped, so that tiles lie in each run, across their ends, and in the chunk;
    chunks below, at and above the window."""
    positions = [1000, 10**9 + 7, 3, 0]
    capacities = [min(window or 1800, 1800), min(window or 10**9, 10**9), 700, 700]
    if window is None:
        positions, capacities = positions[:1] + positions[2:], capacities[:1] + capacities[2:]
    batch = RaggedBatch(
        capacities, window, 4, 1, dim, torch.bfloat16, positions=positions, layout=layout
    )
    for counts in ((40, 128, 300, 17), (300, 129, 1, 260), (127, 5, 31, 33)):
        batch.step(counts[: len(positions)])


@hopper
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 1), (130, 1)])
def test_groups_and_tiles(backend, heads, kv_heads):
    """Several tokens of a tile, one, and less than one; groups that do not divide its rows."""
    batch = RaggedBatch([150, 300], 150, heads, kv_heads, 64, torch.float16, positions=[140, 0])
    for counts in ((35, 3), (0, 19)):
        batch.step(counts)


@pytest.mark.sanitize
@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("seed", range(2))
def test_keys_divided_among_blocks(emulator, seed, copies):
    """A short chunk after a long history, on a machine with blocks to spare."""
    backend = f"emulator, {copies}, sm90"
    configure(emulator, backend, seed=seed, multiprocessors=40)
    emulator.take_launches()
    with use(emulator), attention_of(backend, emulator):
        batch = RaggedBatch(
            [1500, 900, 2000], 1500, 8, 2, 128, torch.bfloat16, positions=[4000, 800, 5], seed=seed
        )
        for counts in ((20, 33, 40), (5, 1, 64)):
            batch.step(counts)
    blocks = [r["grid"][0] for r in emulator.take_launches() if "hopper" in r["kernel"]]
    tiles = 2 * (93 * 4 // ROWS + 3)
    assert blocks[0] > tiles


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("seed", range(2))
def test_any_order_of_threads(emulator, seed, copies):
    backend = f"emulator, {copies}, sm90"
    for multiprocessors in (1, 3, 132):
        configure(emulator, backend, seed=seed, multiprocessors=multiprocessors)
        with use(emulator), attention_of(backend, emulator):
            batch = RaggedBatch(
                [200, 200], 200, 8, 2, 64, torch.bfloat16, positions=[77, 5000], seed=seed
            )
            for counts in ((150, 7), (9, 230)):
                batch.step(counts)


@hopper
def test_many_tokens(backend):
    """More than kTokensInL2: one head after the other."""
    batch = RaggedBatch([40, 40], 40, 4, 2, 64, torch.bfloat16)
    q, k, v = batch.inputs(4100 + 17)
    given = q, k, v, batch.k_pool, batch.v_pool, batch.table((4100, 17))
    out, expected = ops.attention(*given, 40), torch.empty_like(q)
    workspace.run(_C.attention(*given, expected, 40, None, None), q)  # on the CPU
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.01)


@hopper
def test_infinities_stay_in_their_sequence(backend):
    """What lies after a sequence's keys in its last tile is another one's."""
    batch = RaggedBatch([200, 300, 200], None, 4, 1, 64, torch.bfloat16)
    q, k, v = batch.inputs(40 + 200 + 50)
    table = batch.table((40, 200, 50))
    expected = ops.attention(q, k, v, batch.k_pool, batch.v_pool, table)
    k[40:240], v[40:240] = float("nan"), float("inf")
    out = ops.attention(q, k, v, batch.k_pool, batch.v_pool, table)
    assert torch.equal(out[:40], expected[:40])
    assert torch.equal(out[240:], expected[240:])


@hopper
@pytest.mark.parametrize("tokens", [1, 40])
def test_any_stride_of_an_axis_of_size_1(backend, tokens):
    """One key/value head, and one token, which a group of more than 16 heads prefills."""
    batch = RaggedBatch([40], None, 17, 1, 64, torch.bfloat16)
    q, k, v = batch.inputs(tokens)
    given = batch.k_pool, batch.v_pool, batch.table((tokens,))
    expected = ops.attention(q, k, v, *given)
    k, v = (x.as_strided(x.shape, (x.stride(0) if tokens > 1 else 3, 5, 1)) for x in (k, v))
    assert torch.equal(ops.attention(q, k, v, *given), expected)


def prefill(emulator, count, position=0, window=None, heads=4, kv_heads=1, dim=64):
    """The record of the prefill of one chunk."""
    capacity = window or position + count
    batch = RaggedBatch(
        [capacity], window, heads, kv_heads, dim, torch.bfloat16, positions=[position]
    )
    q, k, v = batch.inputs(count)
    configure(emulator, "emulator, late, sm90", multiprocessors=2)
    emulator.take_launches()
    with use(emulator), attention_of("emulator, late, sm90", emulator):
        ops.attention(q, k, v, batch.k_pool, batch.v_pool, batch.table((count,)), window)
    *_, record = emulator.take_launches()
    assert "hopper" in record["kernel"]
    return record


def tiles_of_keys(count, window, group):
    """Of each tile of a prompt's query rows, for one key/value head."""
    tiles = []
    for row in range(0, count * group, ROWS):
        first, last = row // group, (min(row + ROWS, count * group) - 1) // group
        begin = max(0, first - window + 1) if window else 0
        tiles.append(-(-(last + 1 - begin) // KEYS))
    return tiles


def issued_flops(count, window, group, dim):
    """Of the products of a prompt, for one key/value head: of queries with keys, of probabilities
    with values, 2 for each pair of elements."""
    return sum(2 * 2 * ROWS * KEYS * dim * tiles for tiles in tiles_of_keys(count, window, group))


def useful_flops(count, window, group, dim):
    return 2 * 2 * dim * group * sum(min(p + 1, window or p + 1) for p in range(count))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (8, 2, 128), (3, 1, 64)])
@pytest.mark.parametrize(("count", "window"), [(128, None), (300, None), (512, 200), (500, 64)])
def test_issues_these_products_and_no_others(emulator, heads, kv_heads, dim, count, window):
    record = prefill(emulator, count, 0, window, heads, kv_heads, dim)
    flops = kv_heads * issued_flops(count, window, heads // kv_heads, dim)
    assert record["wgmma_flops"] == flops
    assert record["mma"] == 0


@pytest.mark.parametrize(
    ("count", "window", "least"),
    [
        (512, None, 0.80),
        (1024, None, 0.88),
        (2048, None, 0.94),
        (4096, None, 0.96),
        (8192, None, 0.98),
        (16384, None, 0.99),
        (4096, 1024, 0.88),
        (8192, 4096, 0.96),
        (16384, 4096, 0.96),
    ],
)
def test_most_products_are_useful(count, window, least):
    """Of Mistral's shape: tiles hold 32 tokens of 4 heads, and are masked at the edges only."""
    share = useful_flops(count, window, 4, 128) / issued_flops(count, window, 4, 128)
    assert least <= share < 1


def test_reads_no_tile_outside_the_window(emulator):
    """Keys and values of the tiles that are multiplied, whole ones, each once."""
    dim, window, group = 64, 64, 4
    for count in (128, 512):
        record = prefill(emulator, count, 0, window, group, 1, dim)
        assert record["tma_bytes"] == 2 * 2 * dim * KEYS * sum(tiles_of_keys(count, window, group))
        late = window  # tokens that could not be stored in the ring before
        stored = 2 * dim * (group * count + 2 * late)
        counters = 4 * 2  # of late tokens and of the queue
        assert record["stored_bytes"] == stored + counters
        assert record["shared_conflicts"] == 0


def test_copies_row_by_row_only_where_a_run_ends(emulator):
    """One tile of keys and values in which the ring wraps, one with the chunk's first tokens."""
    dim, window, position = 64, 1000, 5400
    record = prefill(emulator, 32, position, window, 4, 1, dim)
    # 999 tokens of history from slot (5400 - 999) % 1000 = 401 on: 599 to the end of the ring, 400
    # from its begin, 32 of the chunk; tiles from 0 to 1031.
    apart = 2  # 512 to 639, 896 to 1023; the last one, 1024 to 1151, ends with the last token
    assert record["tma_bytes"] == 2 * 2 * dim * KEYS * (-(-1031 // KEYS) - apart)


def child(name: str) -> subprocess.CompletedProcess[str]:
    """What the compiled module says with MISTRAL_EXT_ATTENTION set."""
    code = f"import sys; sys.path.insert(0, {str(Path(_C.__file__).parent)!r}); import _C\n"
    code += "print(_C.active_attention())"
    environment = os.environ | {"MISTRAL_EXT_ATTENTION": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


built_with_cuda = pytest.mark.skipif(_C.cuda_architectures is None, reason="a build without CUDA")


@built_with_cuda
@pytest.mark.parametrize(("name", "active"), [("", "sm80"), ("sm80", "sm80"), ("sm90", "sm90")])
def test_environment_variable(name, active):
    """sm80 is what all devices run, and the default: the other one has not run on hardware yet."""
    if active not in _C.attention_kernels():
        pytest.skip("a build without kernels for sm_90a")
    result = child(name)
    assert (result.returncode, result.stdout) == (0, f"{active}\n"), result.stderr


@built_with_cuda
def test_unknown_environment_variable():
    result = child("sm70")
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "ValueError: environment variable MISTRAL_EXT_ATTENTION: attention kernel is 'sm70', "
        f"expected one that this build has: {', '.join(_C.attention_kernels())}"
    )


@pytest.mark.parametrize("backend", [GPU], indirect=True)
def test_refused_by_other_devices(backend):
    if torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this device can run it")
    with (
        pytest.raises(ValueError, match=r"expected 9\.0 for attention kernel 'sm90'"),
        attention_of("cuda, sm90", _C),
    ):
        RaggedBatch([8], 8, dim=64, dtype=torch.bfloat16).step((3,))


def test_unknown_kernel_is_refused(emulator):
    with pytest.raises(ValueError, match=r"kernel is 'sm_90', expected one .*: sm80, sm90$"):
        emulator.select_attention("sm_90")
