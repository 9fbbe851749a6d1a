"""Work that is repeated without Python: the same bits for new values, and what is refused."""

from __future__ import annotations

import pytest
import torch
from packed_weights import random_weight

from mistral_ext import ops
from mistral_ext.ops import Quantized, workspace
from mistral_ext.ops.recording import record
from mistral_ext.weights.quantize import quantize

HEADS, KV_HEADS, DIM, SIZE, TOKENS = 4, 2, 32, 256, 3
CAPACITY = 2500  # more than two segments of the keys that a task attends to


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class Layer:
    """The attention of a layer, on tensors that stay where they are."""

    def __init__(self, generator: torch.Generator) -> None:
        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.wq = random_weight("q4_k", (HEADS * DIM, SIZE), 256, generator)
        self.wk, self.wv = random(KV_HEADS * DIM, SIZE), random(KV_HEADS * DIM, SIZE)
        self.wo = random(SIZE, HEADS * DIM)
        self.norm = random(SIZE)
        self.frequencies = torch.rand(DIM // 2, generator=generator, dtype=torch.float64)
        self.rings = [random(TOKENS * KV_HEADS * CAPACITY, DIM) for _ in range(2)]
        self.table = torch.zeros(TOKENS, 5, dtype=torch.int64)
        self.h = random(TOKENS, SIZE)
        self.set_positions(0, 5, 70)

    def set_positions(self, *positions: int) -> None:
        for i, position in enumerate(positions):
            row = i, 1, position, i * KV_HEADS * CAPACITY, CAPACITY
            self.table[i] = torch.tensor(row)

    def work(self) -> None:
        """Adds to h, and to the rings."""
        rings = *self.rings, self.table
        weights = self.wq, self.wk, self.wv
        qkv = ops.linear_rope(self.h, weights, self.norm, 1e-5, *rings, self.frequencies)
        q, k, v = qkv.unflatten(1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        x = ops.attention(q, k, v, *rings, max_count=1)
        ops.linear_residual(x.flatten(1), self.wo, self.h)

    def state(self) -> list[torch.Tensor]:
        return [self.h.clone(), *(ring.clone() for ring in self.rings)]

    def restore(self, state: list[torch.Tensor]) -> None:
        for tensor, value in zip((self.h, *self.rings), state, strict=True):
            tensor.copy_(value)


def take_freed_memory() -> list[torch.Tensor]:
    """Tensors where the results of `work` lay, if these are gone."""
    return [
        torch.full((TOKENS, columns), 7.0, dtype=torch.bfloat16)
        for columns in (HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM)
        for _ in range(64)
    ]


def test_new_values_have_the_bits_of_new_calls(isa, generator):
    """Also where attention needs more memory than when it was recorded."""
    layer = Layer(generator)
    recording = record(layer.work, [layer.h])
    assert recording is not None
    others = take_freed_memory()
    for positions in ((1, 6, 71), (1023, 2048, 12), (2499, 2499, 2499)):
        layer.set_positions(*positions)
        before = layer.state()
        layer.work()
        expected = layer.state()
        layer.restore(before)
        recording.run()
        assert all(map(torch.equal, layer.state(), expected))
        assert not torch.equal(layer.h, before[0])
    assert all((other == 7).all() for other in others)


def test_a_table_is_checked_each_time(generator):
    layer = Layer(generator)
    recording = record(layer.work, [layer.h])
    layer.table[1, 4] = CAPACITY + 1
    before = layer.state()
    with pytest.raises(
        ValueError, match="linear_rope: sequences has a ring at row 10000, expected"
    ):
        recording.run()
    assert all(map(torch.equal, layer.state(), before))

    layer.set_positions(0, 5, 70)
    rings = *layer.rings, layer.table
    q = torch.randn(TOKENS, HEADS, DIM, generator=generator).bfloat16()
    recording = record(lambda: ops.attention(q, q[:, :2], q[:, :2], *rings), [q])
    layer.table[2, 1] = 2
    with pytest.raises(ValueError, match=r"attention: sequences\[2\].count is 2, expected 0 to 1"):
        recording.run()


@pytest.mark.parametrize("form", [None, "q8_0", "q4_k"])
def test_ids_are_data_and_checked_each_time(form, generator):
    weight = torch.randn(9, SIZE, generator=generator)
    if form == "q4_k":
        weight = random_weight(form, weight.shape, SIZE, generator)
    elif form is not None:
        weight = quantize(weight, form)
    ids, results = torch.tensor([1, 8, 0]), []
    recording = record(lambda: results.append(ops.embedding(ids, weight)), [ids])
    (out,) = results
    for values in ([3, 3, 8], [0, 1, 2]):
        ids.copy_(torch.tensor(values))
        recording.run()
        expected = ops.embedding(ids, weight)
        assert torch.equal(out, expected)
    ids.copy_(torch.tensor([3, 9, 1]))
    with pytest.raises(ValueError, match=r"embedding: token_ids\[1\] is 9, expected 0 to 8"):
        recording.run()
    assert torch.equal(out, expected)


def test_ids_that_a_call_makes_cannot_be_repeated(generator):
    """A repetition would read rows that the weight does not have: it checks ids before it runs."""
    x, weight = torch.zeros(1, SIZE), torch.randn(2, SIZE, generator=generator)
    made = torch.zeros(1, 2)
    given = made.view(torch.int64)[0]

    def embed(ids):
        return ops.embedding(ids, weight)

    assert record(lambda: embed(given), [x, given]) is not None
    assert record(lambda: embed(ops.linear(x, weight).view(torch.int64)[0]), [x]) is None

    def change_given():
        ops.linear_residual(x, weight, made)
        return embed(given)

    assert record(change_given, [x, given]) is None


def test_other_kernels_need_a_new_recording(generator):
    layer = Layer(generator)
    recording = record(layer.work, [layer.h])
    assert recording.is_valid
    isa, exact = ops.active_isa(), ops.exact_products()
    try:
        ops.set_exact_products(not exact)
        assert not recording.is_valid
        ops.set_exact_products(exact)
        for other in ops.supported_isas():
            ops.select_isa(other)
            assert recording.is_valid == (other == isa)
    finally:
        ops.set_exact_products(exact)
        ops.select_isa(isa)
    assert recording.is_valid


def packed(weight: torch.Tensor) -> tuple:
    return quantize(weight, "int8")[:3]


def heads(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.unflatten(1, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)


@pytest.mark.parametrize(
    "work",
    [
        lambda x, w: ops.linear(x.clone(), w),
        lambda x, w: ops.linear(ops.linear(x, w) + 1, w),
        lambda x, w: ops.linear(torch.zeros_like(x), w),
        lambda x, w: ops.rms_norm(x, x[0], 1e-5),  # does not call `run`
        lambda x, w: ops.linear(x, Quantized(*packed(w), torch.arange(SIZE).flip(0))),
        lambda x, w: ops.linear_swiglu(x, [w, w], added=torch.zeros(TOKENS, 2 * len(w))),
        lambda x, w: ops.linear_argmax(x, w),
        lambda x, w: ops.attention(*heads(x), None, None, torch.tensor([[0, TOKENS, 0, 0, 0]])),
        lambda x, w: ops.linear_cross_entropy(x, w, torch.zeros(TOKENS, dtype=torch.int64)),
    ],
)
def test_what_cannot_be_repeated(work, generator):
    x = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.bfloat16)
    assert record(lambda: ops.linear(x, weight), [x]) is not None
    assert record(lambda: work(x, weight), [x]) is None


def test_work_that_fails_is_not_recorded(generator):
    x = torch.randn(TOKENS, SIZE, generator=generator)
    with pytest.raises(ValueError, match=r"expected \[any, 256\]"):
        record(lambda: ops.linear(x, x[:, 1:]), [x])
    ops.linear(x, x)
    assert workspace._of_thread.recorder is None
