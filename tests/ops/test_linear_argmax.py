"""The product with the argmax behind: to the bit what linear and a greedy sample come to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from backends import use
from test_linear import formats, inputs, weights
from tolerance import DTYPES

from mistral_ext import _C, ops

INF, NAN = math.inf, math.nan
GREEDY = (0, 0, 1, 0, 1, 0, 0)  # options of a sample
# (T, K, N, limit): one, tails of every tile, several passes; limits within a tile and at its end.
SHAPES = [(0, 16, 4, None), (1, 16, 1, 1), (1, 64, 130, None), (3, 416, 33, 32), (8, 32, 16, 9)]
SHAPES += [(9, 96, 47, 46), (16, 64, 200, 1), (17, 160, 35, 34), (40, 32, 97, None)]
SHAPES += [(64, 64, 50, 17), (65, 32, 20, 18), (130, 64, 19, None)]

# test_linear_bytes.py tests the others.
pytestmark = pytest.mark.usefixtures("exact_products")


def chosen(logits, limit=None):
    """By the specification of sample."""
    history = np.zeros(logits[:, :limit].shape[1], dtype=np.int32)
    rows = logits[:, :limit].float().numpy()
    return [reference.sample(row, GREEDY, (0, 0, 0), history) for row in rows]


def sampled(logits, limit=None):
    logits = logits[:, :limit].float().contiguous()
    tokens, vocab_size = logits.shape
    options = torch.tensor([GREEDY] * tokens, dtype=torch.float64).view(tokens, len(GREEDY))
    state = torch.zeros(tokens, 3, dtype=torch.int64), torch.zeros(tokens, vocab_size).int()
    return ops.sample(logits, torch.arange(tokens), options, *state).tolist()


def check(x, weight, norm=None, limit=None):
    logits, token_ids = ops.linear_argmax(x, weight, norm, 1e-3, limit)
    expected = ops.linear(x, weight, norm, 1e-3)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
    assert token_ids.dtype == torch.int64
    assert token_ids.tolist() == chosen(expected, limit) == sampled(expected, limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_linear_and_then_sample(backend, shape, dtype, generator):
    tokens, size, outputs, limit = shape
    x = inputs(tokens, size, dtype, generator)
    norm = torch.randn(size, generator=generator).to(dtype)
    for weight in formats(weights((outputs, size), dtype, generator), backend).values():
        check(x, weight, limit=limit)
        check(x, weight, norm, limit)


def with_logits(logits, tokens, dtype=torch.bfloat16):
    """(x, weight) whose product has these logits for every token, and 0 for the others of 150."""
    weight = torch.zeros(150, 16)
    for i, logit in logits.items():
        weight[i, 0] = logit
    x = torch.zeros(tokens, 16)
    x[:, 0] = 1
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("tokens", [1, 5, 12, 30, 64, 70])
@pytest.mark.parametrize(
    ("logits", "limit", "expected"),
    [
        ({}, None, 0),
        ({77: 2.0, 140: 2.0, 139: 1.0}, None, 77),  # of equals the first
        ({8: 2.0, 15: 2.0}, None, 8),
        (dict.fromkeys(range(150), -1.0) | {31: -0.0, 90: 0.0}, None, 31),
        ({140: INF, 149: INF, 3: 9.0}, None, 140),
        (dict.fromkeys(range(150), -INF), None, -1),
        (dict.fromkeys(range(150), -INF) | {149: -3e38}, None, 149),
        ({3: NAN, 60: 5.0}, None, -1),
        ({60: 5.0, 149: NAN}, None, -1),
        ({60: 5.0, 149: NAN, 140: INF}, 140, 60),  # what is not to be chosen does not matter
        ({1: 5.0, 2: NAN}, 2, 1),
        (dict.fromkeys(range(100), -INF), 100, -1),
    ],
)
def test_ties_and_what_is_not_finite(backend, logits, limit, expected, tokens):
    x, weight = with_logits(logits, tokens)
    token_ids = ops.linear_argmax(x, weight, limit=limit)[1]
    assert token_ids.tolist() == [expected] * tokens
    check(x, weight, limit=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [None, 512, 513, 1030, 1555])
def test_more_outputs_than_the_cpu_compares_at_once(isa, dtype, limit, generator):
    """Most logits are a tie: they are small integers."""
    x = torch.randint(-1, 2, (5, 16), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (1555, 16), generator=generator).to(dtype)
    check(x, weight, limit=limit)
    weight[: (limit or 1555) - 2] = 0  # the largest may be one of the last two
    check(x, weight, limit=limit)
    weight[1030, 0] = NAN
    check(x, weight, limit=limit)


@pytest.mark.parametrize("tokens", [2, 20])
def test_what_is_not_finite_stays_in_its_token(backend, tokens, generator):
    x = torch.randn(tokens, 64, generator=generator).bfloat16()
    weight = torch.randn(40, 64, generator=generator).bfloat16()
    x[1, 3] = NAN
    check(x, weight)
    assert (ops.linear_argmax(x, weight)[1] == -1).tolist() == [i == 1 for i in range(tokens)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_logits_are_compared_as_they_are_rounded(backend, tokens, dtype):
    """The second is larger by less than bfloat16 tells, and by what float16 does."""
    x, weight = with_logits({5: 1.0, 70: 1.0}, tokens, dtype)
    x[:, 1] = weight[70, 1] = 2.0**-5
    expected = 5 if dtype == torch.bfloat16 else 70
    assert ops.linear_argmax(x, weight)[1].tolist() == [expected] * tokens


READ = ("loaded_bytes", "load_sectors", "mma", "shared_bytes", "shared_conflicts")


@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
def test_launches_read_what_those_of_the_product_do(emulator, tokens, generator):
    """There is one launch, but for some formats, whose kernels take up to 32 tokens."""
    x = inputs(tokens, 256, torch.bfloat16, generator)
    for weight in formats(weights((50, 256), torch.bfloat16, generator), "emulator").values():
        with use(emulator):
            ops.linear(x, weight)
            ops.linear_argmax(x, weight)
        launches = emulator.take_launches()
        passes = len(launches) // 2
        assert passes == 1 or (tokens > 32 and passes == 2)
        for product, fused in zip(launches[:passes], launches[passes:], strict=True):
            for count in READ:
                assert fused[count] == product[count], count
            # The tokens, and the counter of blocks that goes back to zero.
            assert fused["stored_bytes"] == product["stored_bytes"] + 8 * tokens // passes + 4


@pytest.mark.parametrize("tokens", [3, 12, 64, 70])
def test_any_order_of_threads_gives_the_same_tokens(emulator, tokens, generator):
    """And any number of multiprocessors: one block for all rows, or one for each tile. Most logits
    are a tie: they are small integers."""
    x = torch.randint(-1, 2, (tokens, 16), generator=generator).bfloat16()
    weight = torch.randint(-1, 2, (500, 16), generator=generator).bfloat16()
    for seed, (multiprocessors, copies) in enumerate([(1, "late"), (3, "early"), (40, "late")]):
        emulator.configure(seed=seed, copies=copies, multiprocessors=multiprocessors)
        with use(emulator):
            check(x, weight)


def test_any_number_of_threads_gives_the_same_tokens(isa, generator):
    x = torch.randn(30, 96, generator=generator).bfloat16()
    weight = torch.randn(300, 96, generator=generator).bfloat16()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        check(x, weight)


@pytest.mark.parametrize(
    ("weight", "limit", "error", "message"),
    [
        (torch.zeros(4, 8), 0, ValueError, "limit is 0, expected 1 to 4"),
        (torch.zeros(4, 8), 5, ValueError, "limit is 5, expected 1 to 4"),
        (torch.zeros(0, 8), None, ValueError, "limit is 0, expected 1 to 0"),
        (torch.zeros(4, 9), None, ValueError, "weight has shape [4, 9], expected [any, 8]"),
    ],
)
def test_checks(weight, limit, error, message):
    with pytest.raises(error) as caught:
        ops.linear_argmax(torch.zeros(3, 8), weight, limit=limit)
    assert f"linear_argmax: {message}" in str(caught.value)


def test_ids_with_gaps_are_refused():
    x, weight = torch.zeros(3, 8), torch.zeros(4, 8)
    given = x, [weight], [None], ["plain"], None, 0, None, torch.zeros(3, 4)
    message = r"linear_argmax: token_ids has strides \[2\], expected it to be contiguous"
    with pytest.raises(ValueError, match=message):
        _C.linear_argmax(*given, torch.zeros(6, dtype=torch.int64)[::2])
