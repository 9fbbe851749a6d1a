"""Query, key and value with RoPE and the append behind: to the bit what linear and rope come to."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from backends import use
from ragged import RaggedBatch
from tolerance import DTYPES
from torch import Tensor

from mistral_ext import ops
from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import quantize

INPUTS, EPS = 160, 1e-3
FORMATS = ["plain", "int8", "int4", "q8_0"]
MIXED = ("q8_0", "int4", "int4")  # of query, key and value
# (capacities, window, positions, new tokens of each sequence)
BATCHES = {
    "nothing": ([4], 4, [2], [0]),
    "one token": ([8], 8, [10**6 + 3], [1]),
    "no window": ([9], None, [5], [1]),
    "decode at every place of a ring": ([4, 4, 6], 4, [9, 3, 0], [1, 1, 1]),
    "idle ones between": ([5, 5, 9, 5], 5, [7, 0, 2, 12], [0, 1, 3, 0]),
    "chunks, of which one wraps": ([4, 4], 4, [6, 0], [6, 2]),
    "12 tokens": ([9, 20], 20, [3, 0], [5, 7]),
    "17 tokens": ([8, 20, 8], 8, [100, 0, 5], [4, 13, 0]),
    "27 tokens, no window": ([30, 6], None, [3, 0], [21, 6]),
    "64 tokens": ([16, 64, 16], 16, [30, 0, 2**31], [23, 40, 1]),
    "more than a pass": ([16, 90], 16, [5, 0], [1, 70]),
}


@dataclass
class Given:
    """The arguments of linear_rope: NaN around the rings, and in every slot without a token."""

    x: Tensor
    weights: list[Tensor | Quantized]
    norm: Tensor | None
    batch: RaggedBatch
    table: Tensor

    def rings(self) -> tuple:
        batch = self.batch
        return batch.k_pool, batch.v_pool, self.table, batch.frequencies, batch.window

    def linear_rope(self) -> Tensor:
        return ops.linear_rope(self.x, self.weights, self.norm, EPS, *self.rings())

    def linear_then_rope(self) -> tuple[Tensor, Tensor, Tensor]:
        """(all heads, k_pool, v_pool), the pools as copies."""
        out = ops.linear(self.x, self.weights, self.norm, EPS)
        batch, pools = self.batch, (self.batch.k_pool.clone(), self.batch.v_pool.clone())
        heads = [batch.heads, batch.kv_heads, batch.kv_heads]
        q, k, v = out.unflatten(1, (sum(heads), batch.dim)).split(heads, dim=1)
        ops.rope(q, k, v, *pools, self.table, batch.frequencies, batch.window)
        return out, *pools


# test_linear_bytes.py tests the others.
pytestmark = pytest.mark.usefixtures("exact_products")


def make(batch, generator, form="plain", dtype=torch.bfloat16, dim=64, norm=True, inputs=INPUTS):
    capacities, window, positions, counts = BATCHES[batch]
    batch = RaggedBatch(capacities, window, dim=dim, dtype=dtype, positions=positions)
    weights = []
    heads = batch.heads, batch.kv_heads, batch.kv_heads
    for count, one in zip(heads, (form,) * 3 if isinstance(form, str) else form, strict=True):
        exact = torch.randn(count * dim, inputs, generator=generator) / 8
        if one == "plain":
            weights.append(exact.to(dtype))
        else:
            weights.append(quantize(exact, one, 32 if one == "int4" else None))
    x = torch.randn(sum(counts) + 1, inputs, generator=generator).to(dtype)[1:]
    weight = torch.randn(inputs, generator=generator).to(dtype) if norm else None
    return Given(x, weights, weight, batch, batch.table(counts))


def check(given):
    expected = given.linear_then_rope()
    out = given.linear_rope()
    for actual, wanted in zip((out, given.batch.k_pool, given.batch.v_pool), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def skip_without_kernel(backend, dtype):
    if dtype == torch.float32 and backend not in ops.supported_isas():
        pytest.skip("on CUDA devices, products of float32 are torch's")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", [*FORMATS, MIXED], ids=str)
def test_is_linear_and_then_rope(backend, batch, form, generator):
    check(make(batch, generator, form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 96, 128, 256])
@pytest.mark.parametrize("batch", ["idle ones between", "17 tokens"])
def test_head_dimensions(backend, batch, dim, dtype, generator):
    """A tile holds rows of both halves of a head, two tiles in a row with 17 tokens."""
    skip_without_kernel(backend, dtype)
    check(make(batch, generator, dtype=dtype, dim=dim, norm=False))


def test_what_is_not_stored_stays(backend, generator):
    """A chunk of 6 in a ring of 4: the first 2 of it are never in the ring, 3 are seen no more."""
    given = make("chunks, of which one wraps", generator)
    before = given.batch.k_pool.clone()
    given.linear_rope()
    changed = (given.batch.k_pool.nan_to_num() != before.nan_to_num()).any(1).nonzero()[:, 0]
    first, second = given.batch.rows
    # Of the first ring only what position 6 - 4 = 2 had, which token 6 does not see any more, and
    # that token 10 takes; of the second the slots of 0 and 1.
    kept = {first + 4 * head + slot for head in range(2) for slot in (3 % 4, 4 % 4, 5 % 4)}
    assert not kept & set(changed.tolist())
    assert {second + 4 * head + slot for head in range(2) for slot in (0, 1)} <= set(
        changed.tolist()
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("batch", ["one token", "idle ones between", "12 tokens"])
def test_one_launch_that_reads_what_the_product_does(emulator, batch, form, generator):
    given = make(batch, generator, form, inputs=256)
    with use(emulator):
        given.linear_then_rope()
        given.linear_rope()
    product, _, fused = emulator.take_launches()
    assert fused["kernel"].split("<")[0].endswith("linear_rope_kernel")
    assert fused["mma"] == product["mma"]
    frequencies = fused["grid"][0] * given.batch.frequencies.nbytes  # of each block
    assert fused["loaded_bytes"] == product["loaded_bytes"] + frequencies
    assert fused["load_sectors"] == product["load_sectors"] + frequencies // 32
    assert fused["shared_conflicts"] == 0
    appended = len(given.x) * 2 * given.batch.kv_heads * given.batch.dim * 2
    assert fused["stored_bytes"] == product["stored_bytes"] + appended


def test_the_launches_of_a_call(emulator, generator):
    """One more where x has to be normalised before; of more than 64 tokens, and of weights of
    different formats, those of two ops."""

    def launches_of(batch, form="plain"):
        given = make(batch, generator, form)
        with use(emulator):
            given.linear_rope()
        names = [record["kernel"] for record in emulator.take_launches()]
        return [name.split("<")[0].split("::")[-1] for name in names]

    batches = ("nothing", "12 tokens", "17 tokens", "more than a pass")
    assert {batch: launches_of(batch) for batch in batches} == {
        "nothing": [],
        "12 tokens": ["linear_rope_kernel"],
        "17 tokens": ["linear_norm_kernel", "linear_rope_kernel"],
        "more than a pass": ["linear_norm_kernel", *["linear_kernel"] * 2, "rope_kernel"],
    }
    assert launches_of("nothing", MIXED) == []
    assert launches_of("12 tokens", MIXED) == [*["linear_kernel"] * 2, "rope_kernel"]
    before = ["linear_norm_kernel"]
    assert launches_of("17 tokens", MIXED) == [*before, *["linear_kernel"] * 2, "rope_kernel"]


@pytest.mark.parametrize("batch", ["one token", "12 tokens", "17 tokens", "more than a pass"])
def test_any_order_of_threads_gives_the_same_bits(emulator, batch, generator):
    """And any number of multiprocessors: one block for all heads, or one for each tile."""
    given = make(batch, generator)
    pools = given.batch.k_pool, given.batch.v_pool
    before, results = [pool.clone() for pool in pools], []
    for seed, (multiprocessors, copies) in enumerate([(1, "late"), (3, "early"), (40, "late")]):
        emulator.configure(seed=seed, copies=copies, multiprocessors=multiprocessors)
        for pool, old in zip(pools, before, strict=True):
            pool.copy_(old)
        with use(emulator):
            out = given.linear_rope()
        results.append([x.clone().nan_to_num(123.0) for x in (out, *pools)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": 2}, ValueError, "number of weights is 2, expected 3: query, key and value"),
        ({"wq": 250}, ValueError, "wq has 250 outputs, expected a multiple of the head dim"),
        ({"wk": 100}, ValueError, "wk has 100 outputs, expected a multiple of the head dim"),
        ({"wv": 64}, ValueError, "wv has 64 outputs, expected 128 like wk"),
        ({"wq": 192}, ValueError, "q has 3 heads, expected a multiple of the 2 heads of k"),
        ({"dim": 48}, ValueError, "k_pool has head dimension 48, expected a multiple of 32 up to"),
        ({"v_pool": torch.zeros(7, 64)}, ValueError, "v_pool has shape [7, 64], expected ["),
        (
            {"frequencies": torch.zeros(3).double()},
            ValueError,
            "frequencies has shape [3], expected [32]",
        ),
        ({"window": 0}, ValueError, "window is 0, expected 1 or more or None"),
        ({"count": 3}, ValueError, "sequences[0].count is 3, expected 0 to 1"),
        ({"norm": torch.zeros(7)}, ValueError, "norm has shape [7], expected [160]"),
    ],
)
def test_checks(change, error, message, generator):
    given = make("one token", generator, dtype=torch.float32)
    k_pool, v_pool, table, frequencies, window = given.rings()
    weights = given.weights[: change.get("weights", 3)]
    for i, name in enumerate(("wq", "wk", "wv")):
        if name in change:
            weights[i] = weights[i][:1].repeat(change[name], 1)
    if "dim" in change:
        k_pool = torch.zeros(len(k_pool), change["dim"])
    table[0, 1] = change.get("count", 1)
    rings = k_pool, change.get("v_pool", v_pool), table
    angles = change.get("frequencies", frequencies), change.get("window", window)
    with pytest.raises(error) as caught:
        ops.linear_rope(given.x, weights, change.get("norm", given.norm), EPS, *rings, *angles)
    assert f"linear_rope: {message}" in str(caught.value)
