"""The sampling op against plain numpy, which is the specification: the CPU kernel and, in the
emulator, the CUDA kernel choose the same tokens as it does, and so as each other."""

from __future__ import annotations

import math
from zlib import crc32

import backends
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral_ext import _C, ops

GREEDY = (0, 0, 1, 0, 1, 0, 0)
PLAIN = (1, 0, 1, 0, 1, 0, 0)  # temperature 1, no filter, no penalty
WORDS = st.integers(0, 2**64 - 1)


@pytest.fixture(params=["cpu", "emulator", backends.GPU])
def kernel(request):
    """Runs the test once with each implementation of the op."""
    if request.param == "cpu":
        yield request.param
        return
    if request.param == "cuda":
        with backends.use_gpu():
            yield request.param
        return
    emulator = request.getfixturevalue("emulator")
    emulator.configure(seed=crc32(request.node.nodeid.encode()))
    with backends.use(emulator):
        yield request.param


class Batch:
    """N rows of logits, and tables of M >= N rows in which they are at random places."""

    def __init__(self, logits, options, seeds=None, history=None, bias=None, spare=1):
        self.logits = torch.tensor(np.asarray(logits, dtype=np.float32))
        n, vocab_size = self.logits.shape
        rng = np.random.default_rng(n)
        self.rows = torch.from_numpy(rng.permutation(n + spare)[:n])
        self.options = torch.full((n + spare, 7), math.nan, dtype=torch.float64)
        self.noise = torch.full((n + spare, 3), -1)
        self.history = torch.zeros((n + spare, vocab_size), dtype=torch.int32)
        self.bias = None
        self.options[self.rows] = torch.tensor(options, dtype=torch.float64).expand(n, 7)
        seeds = range(n) if seeds is None else seeds
        for i, (row, seed) in enumerate(zip(self.rows, seeds, strict=True)):
            self.noise[row] = torch.tensor([seed, i % 3, i])
        if history is not None:
            self.history[self.rows] = torch.from_numpy(history)
        if bias is not None:
            self.bias = torch.full((n + spare, vocab_size), math.nan)
            self.bias[self.rows] = torch.from_numpy(bias)

    def arguments(self):
        return self.logits, self.rows, self.options, self.noise, self.history, self.bias

    def sample(self) -> list[int]:
        return ops.sample(*self.arguments()).tolist()

    def expected(self) -> list[int]:
        return [
            reference.sample(
                logits,
                self.options[row].tolist(),
                [word % 2**64 for word in self.noise[row].tolist()],
                self.history[row].numpy(),
                None if self.bias is None else self.bias[row].numpy(),
            )
            for logits, row in zip(self.logits.numpy(), self.rows.tolist(), strict=True)
        ]

    def check(self) -> list[int]:
        """Samples; asserts that tokens and state are as they have to be."""
        expected, noise, history = self.expected(), self.noise.clone(), self.history.clone()
        for row, token_id in zip(self.rows, expected, strict=True):
            if token_id >= 0:
                noise[row, 2] += 1
                history[row, token_id] += 2
        logits = self.logits.clone()
        assert self.sample() == expected
        assert torch.equal(self.noise, noise)
        assert torch.equal(self.history, history)
        assert torch.equal(self.logits.view(torch.int32), logits.view(torch.int32))
        return expected


def random_logits(rng, shape):
    """Smooth, with many equal values, banned tokens, far apart, close together, or all equal."""
    logits = rng.normal(0, 3, shape).astype(np.float32)
    for row, kind in zip(logits, rng.integers(0, 6, len(logits)), strict=True):
        if kind == 1:
            row[:] = np.round(row)
        elif kind == 2:
            row[rng.random(len(row)) < 0.7] = -np.inf
        elif kind == 3:
            row *= 1e30
        elif kind == 4:
            row[:] = 5 + 1e-6 * row
        elif kind == 5:
            row[:] = row[0]
    return logits


def random_options(rng):
    return (
        rng.choice([0, 0.1, 0.7, 1, 1.3, 5]),
        rng.choice([0, 0, 1, 2, 7, 50, 1000, 10**6]),
        rng.choice([1, 1, 1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-6]),
        rng.choice([0, 0, 0.01, 0.3, 1]),
        rng.choice([1, 1, 0.5, 1.3]),
        rng.choice([0, 0, -1.5, 0.7]),
        rng.choice([0, 0, -0.3, 0.4]),
    )


def random_batch(rng, n, vocab_size):
    used = rng.random((n, vocab_size)) < 0.3
    bias = rng.normal(0, 2, (n, vocab_size)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.8] = 0
    bias[rng.random(bias.shape) < 0.05] = -np.inf
    return Batch(
        random_logits(rng, (n, vocab_size)),
        [random_options(rng) for _ in range(n)],
        seeds=rng.integers(-(2**63), 2**63 - 1, n),
        history=np.where(used, rng.integers(0, 9, used.shape), 0).astype(np.int32),
        bias=bias if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("n", "vocab_size"),
    [(20, 1), (40, 2), (60, 31), (60, 36), (40, 1000), (12, 2051), (4, 32768)],
)
def test_chooses_the_tokens_of_the_reference(kernel, seed, n, vocab_size):
    random_batch(np.random.default_rng([seed, vocab_size]), n, vocab_size).check()


@given(
    WORDS,
    st.integers(1, 300),
    st.tuples(
        st.floats(0.01, 100),
        st.integers(0, 300),
        st.floats(0, 1, exclude_min=True),
        st.floats(0, 1),
        st.floats(0.1, 10),
        st.floats(-2, 2),
        st.floats(-2, 2),
    ),
)
def test_any_options(seed, vocab_size, options):
    batch = random_batch(np.random.default_rng(seed), 6, vocab_size)
    batch.options[batch.rows] = torch.tensor(options, dtype=torch.float64)
    batch.check()


def test_a_completion_of_many_steps(kernel):
    rng = np.random.default_rng(5)
    batch = random_batch(rng, 5, 333)
    for _ in range(12):
        batch.check()
        batch.logits = torch.from_numpy(random_logits(rng, (5, 333)))


@given(
    st.tuples(WORDS, WORDS),
    st.tuples(st.integers(0, 2**64 - 2), WORDS, WORDS, WORDS),
)
def test_philox_is_that_of_numpy(key, counter):
    words = np.array(key, dtype=np.uint64), np.array(counter, dtype=np.uint64)
    numbers = np.random.Philox(key=words[0], counter=words[1]).random_raw(4)
    following = (counter[0] + 1, *counter[1:])  # numpy counts up before it uses the counter
    assert _C.philox(key, following) == numbers.tolist()


def test_noise_is_that_of_numpy(kernel):
    """With equal logits, the token is that of the largest of the uniform numbers."""
    n, vocab_size = 50, 4001
    seeds = np.random.default_rng(6).integers(0, 2**64, n, dtype=np.uint64)
    batch = Batch(np.zeros((n, vocab_size)), PLAIN, seeds=seeds.view(np.int64))
    for i, token_id in enumerate(batch.sample()):
        key = np.array([seeds[i], i % 3], dtype=np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key, counter=[0, i, 0, 0])).random
        assert token_id == np.argmax(uniform(vocab_size))


def test_a_row_does_not_depend_on_the_batch(kernel):
    batch = random_batch(np.random.default_rng(7), 16, 100)
    batch.bias = None
    tables = [t.clone() for t in (batch.options, batch.noise, batch.history)]
    together = batch.sample()
    rows, logits = batch.rows.flip(0), batch.logits.flip(0)
    alone = [
        ops.sample(logits[i : i + 1], rows[i : i + 1], *tables).item() for i in range(len(rows))
    ]
    assert alone[::-1] == together


def test_threads_and_schedules_do_not_matter(kernel, request):
    def tokens(run):
        if kernel == "emulator":
            request.getfixturevalue("emulator").configure(seed=run)
        torch.set_num_threads(run + 1)
        return random_batch(np.random.default_rng(8), 24, 150).sample()

    assert tokens(0) == tokens(1) == tokens(2)


@pytest.mark.parametrize(("offset", "stride"), [(0, 40), (3, 40), (4, 43), (0, 36)])
def test_strided_logits(kernel, offset, stride):
    batch = random_batch(np.random.default_rng(9), 7, 36)
    around = torch.full((7 * stride + offset,), math.nan)
    logits = around[offset:].view(7, stride)[:, :36]
    batch.logits = logits.copy_(batch.logits)
    batch.check()


def test_no_rows(kernel):
    batch = Batch(np.zeros((0, 9)), GREEDY)
    batch.logits = torch.zeros(0, 9)
    assert batch.check() == []


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_choice(kernel, temperature):
    logits = np.random.default_rng(10).normal(size=(5, 37)).astype(np.float32)
    logits[0, 36] = np.nan
    logits[1, 0] = -np.float32(np.nan)
    logits[2] = -np.inf
    bias = np.zeros_like(logits)
    logits[3, 5], bias[3, 5] = np.inf, -np.inf
    expected = Batch(logits, (temperature, 3, 0.5, 0.1, 1.2, 1, 1), bias=bias).check()
    assert expected[:4] == [-1] * 4
    assert expected[4] >= 0


@pytest.mark.parametrize("options", [GREEDY, PLAIN, (1, 3, 0.9, 0.1, 1, 0, 0)])
def test_infinite_logits_win(kernel, options):
    logits = np.zeros((2, 40))
    logits[:, [7, 30]] = np.inf
    logits[0, 7] = 3e38
    tokens = Batch(logits, options).sample()
    assert tokens[0] == 30
    assert tokens[1] in ([7] if options[0] == 0 else [7, 30])


def support(logits, options, count=60):
    """The tokens that come up, each draw with a seed of its own."""
    return set(Batch(np.tile(logits, (count, 1)), options).sample())


@pytest.mark.parametrize("total", [4, 10, 25])
def test_top_p_reached_exactly_adds_no_token(kernel, total):
    logits = np.full(60, -np.inf)
    ids = np.random.default_rng(total).permutation(60)[:total]
    logits[ids] = -3.25
    for kept in {1, total // 2, total - 1}:
        lowest = set(np.sort(ids)[:kept].tolist())
        assert support(logits, (0.3, 0, kept / total, 0, 1, 0, 0), 10 * kept) == lowest


def test_ties_go_to_the_lower_id(kernel):
    logits = np.array([0, 5, 3, 5, 3, 3, 3, 5, 0], dtype=np.float32)
    assert support(logits, GREEDY, 1) == {1}
    assert support(logits, (9, 2, 1, 0, 1, 0, 0)) == {1, 3}
    assert support(logits, (9, 5, 1, 0, 1, 0, 0)) == {1, 2, 3, 4, 7}
    assert support(np.array([-1, -0.0, 0.0]), GREEDY, 1) == {1}, "-0 and 0 are equal"
    assert support(np.array([-1, -0.0, 0.0]), (1, 1, 1, 0, 1, 0, 0)) == {1}
    # top_k cuts the ties before top_p does
    assert support(logits, (1e-3, 2, 0.999, 0, 1, 0, 0)) == {1, 3}


@pytest.mark.parametrize("vocab_size", [1, 31, 511, 512, 513, 1537])
def test_greedy_chooses_the_first_of_the_largest_in_every_instruction_set(isa, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rng.integers(-9, 9, (40, vocab_size)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] *= -0.0
    for row, value in enumerate([np.inf, -np.inf, np.nan, -np.nan]):
        logits[row] = -np.inf
        logits[row, rng.integers(vocab_size)] = value
    expected = np.argmax(logits, axis=1)  # the first NaN, if there is any
    expected[1:4] = -1
    assert Batch(logits, GREEDY).sample() == expected.tolist()
    assert Batch(-np.abs(logits[4:]), GREEDY).sample() == (-np.abs(logits[4:])).argmax(1).tolist()


def test_penalties_count_what_is_chosen(kernel):
    batch = Batch([[1.0, 0.5, -5.0]], (0, 0, 1, 0, 1, 0, 0.3), history=np.int32([[1, 0, 0]]))
    # 1.0 | 0.7 | 0.4 < 0.5 | 0.4 > 0.2 | 0.1 < 0.2
    assert [batch.check()[0] for _ in range(5)] == [0, 0, 1, 0, 1]
    assert batch.history[batch.rows].tolist() == [[7, 4, 0]]


def test_one_launch_reads_the_logits_once_if_greedy(emulator):
    n, vocab_size = 3, 2048
    batch = Batch(np.random.default_rng(11).normal(size=(n, vocab_size)), GREEDY)
    emulator.take_launches()
    with backends.use(emulator):
        batch.check()
    (launch,) = emulator.take_launches()
    assert launch["grid"] == (n, 1, 1)
    options = 512 * 8 * (1 + 7)  # every thread reads the row's number and the options
    counted = 4 + 8  # history and step
    assert launch["loaded_bytes"] == n * (4 * vocab_size + options + counted)
    assert launch["load_requests"] == n * (vocab_size / 128 + 16 * 8 + 2), "16-byte loads"


@pytest.mark.parametrize("bias", [None, torch.zeros(3, 8)])
def test_opcheck(bias):
    batch = Batch(np.zeros((2, 8)), (1, 5, 0.9, 0, 1.2, 0, 0), history=np.ones((2, 8), np.int32))
    batch.options[:] = torch.tensor([1, 5, 0.9, 0, 1.2, 0, 0])
    arguments = (batch.logits, batch.rows, batch.options, batch.noise, batch.history, bias)
    torch.library.opcheck(torch.ops.mistral_ext.sample.default, arguments)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("logits", torch.zeros(8), ValueError, "logits has shape [8], expected [any, any]"),
        ("logits", torch.zeros(2, 8).half(), TypeError, "logits has dtype torch.float16, expected"),
        ("logits", torch.zeros(8, 2).T, ValueError, "logits has strides [1, 2], expected the last"),
        ("rows", torch.zeros(3).long(), ValueError, "rows has shape [3], expected [2]"),
        ("rows", torch.zeros(2), TypeError, "rows has dtype torch.float32, expected torch.int64"),
        ("rows", torch.tensor([0, 3]), ValueError, "rows has 3, expected 0 to 2, a row of options"),
        ("rows", torch.tensor([-1, 1]), ValueError, "rows has -1, expected 0 to 2"),
        ("rows", torch.tensor([1, 1]), ValueError, "rows has 1 twice, expected each row once"),
        ("options", torch.zeros(3, 6).double(), ValueError, "options has shape [3, 6], expected"),
        ("options", torch.zeros(3, 7), TypeError, "options has dtype torch.float32, expected"),
        ("noise", torch.zeros(2, 3).long(), ValueError, "noise has shape [2, 3], expected [3, 3]"),
        ("noise", torch.zeros(3, 3).long().T, ValueError, "noise has strides [1, 3], expected"),
        ("history", torch.zeros(3, 7).int(), ValueError, "history has shape [3, 7], expected"),
        ("history", torch.zeros(3, 8).long(), TypeError, "history has dtype torch.int64, expected"),
        ("bias", torch.zeros(2, 8), ValueError, "bias has shape [2, 8], expected [3, 8]"),
        ("bias", torch.zeros(3, 8).double(), TypeError, "bias has dtype torch.float64, expected"),
    ],
)
def test_argument_checks(name, value, error, message):
    given = {
        "logits": torch.zeros(2, 8),
        "rows": torch.tensor([2, 0]),
        "options": torch.tensor(PLAIN).double().repeat(3, 1),
        "noise": torch.zeros(3, 3, dtype=torch.int64),
        "history": torch.zeros(3, 8, dtype=torch.int32),
    }
    with pytest.raises(error) as caught:
        ops.sample(**given | {name: value})
    assert f"sample: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "name", "value"),
    [
        (0, "temperature", -1.0),
        (0, "temperature", math.nan),
        (0, "temperature", math.inf),
        (1, "top_k", -1.0),
        (2, "top_p", 0.0),
        (2, "top_p", 1.5),
        (3, "min_p", 1.5),
        (4, "repetition_penalty", 0.0),
        (5, "presence_penalty", math.nan),
        (6, "frequency_penalty", math.inf),
    ],
)
def test_options_that_make_no_sense(column, name, value):
    batch = Batch(np.zeros((2, 8)), PLAIN)
    row = int(batch.rows[1])
    batch.options[row, column] = value
    with pytest.raises(ValueError, match=rf"sample: options\[{row}\].{name} is .*, expected "):
        batch.sample()


def test_a_vocabulary_beyond_the_limit_is_refused():
    batch = Batch(np.zeros((1, 1)), GREEDY)
    batch.logits = torch.empty(0, 2**24 + 1)
    with pytest.raises(ValueError, match=r"logits has 16777217 columns, expected at most 16777216"):
        batch.sample()
