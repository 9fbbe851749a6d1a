from __future__ import annotations

import re

import gradients
import pytest
import reference
import torch
from backends import GPU, attention_of, configure, use
from tolerance import DTYPES, assert_close

from mistral_ext import _C, ops

# The backends of CUDA kernels, which take fewer dtypes and head dimensions.
cuda_kernels = pytest.mark.parametrize(
    "backend", ["emulator, late", "emulator, early", GPU], indirect=True
)


def table(counts):
    """Positions, rings and capacities that nobody may use."""
    first = [sum(counts[:i]) for i in range(len(counts))]
    rows = [(at, count, 9, -1, -1) for at, count in zip(first, counts, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def plain(counts, window, scale=None):
    """The reference, one sequence after the other."""

    def attend(q, k, v):
        apart = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
        return torch.cat([reference.attention(*one, window, scale) for one in apart])

    return attend


def inputs(tokens, heads, kv_heads, dim, dtype, generator):
    """q, k and v as slices of one matrix, with NaN between the tokens."""
    fused = torch.full((tokens, heads + 2 * kv_heads + 1, dim), float("nan"), dtype=dtype)
    fused[:, :-1] = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator)
    return fused[:, :-1].split([heads, kv_heads, kv_heads], dim=1)


# counts of tokens, window, query and key/value heads, head dimension
CASES = {
    "ragged": ([5, 1, 0, 70, 3], None, 4, 2, 64),
    "a window below the length": ([40, 9], 7, 4, 1, 64),
    "a window of several tiles": ([200], 90, 2, 2, 64),
    "a window of several AMX tiles": ([430], 290, 2, 1, 32),
    "large heads": ([130, 17], None, 4, 1, 128),
    "larger heads": ([19], 5, 3, 3, 160),
    "groups of three": ([67], 64, 6, 2, 96),
    "no token": ([0], None, 2, 1, 32),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_whole_sequences(isa, name, dtype, generator):
    counts, window, heads, kv_heads, dim = CASES[name]
    given = inputs(sum(counts), heads, kv_heads, dim, dtype, generator)
    d_out = torch.randn(sum(counts), heads, dim, generator=generator).to(dtype)
    gradients.check(
        lambda q, k, v: ops.attention(q, k, v, None, None, table(counts), window),
        plain(counts, window),
        given,
        d_out,
    )


CUDA_CASES = {
    "ragged": ([5, 1, 0, 70, 3], None, 4, 2, 64),
    "large heads": ([66, 17], None, 4, 1, 128),
    "groups of three": ([45], 40, 6, 2, 128),
    "a group that is never decoded": ([2, 35], 20, 17, 1, 64),
    "W - 1, W and W + 1 tokens": ([30, 31, 32], 31, 2, 1, 64),
}


@cuda_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CUDA_CASES)
def test_gradients_by_cuda_kernels(backend, name, dtype, generator):
    counts, window, heads, kv_heads, dim = CUDA_CASES[name]
    given = inputs(sum(counts), heads, kv_heads, dim, dtype, generator)
    d_out = torch.randn(sum(counts), heads, dim, generator=generator).to(dtype)
    gradients.check(
        lambda q, k, v: ops.attention(q, k, v, None, None, table(counts), window, 0.2),
        plain(counts, window, 0.2),
        given,
        d_out,
    )


@cuda_kernels
@pytest.mark.parametrize("window", [2, 31, 32, 33, 63, 64, 65, 96])
def test_windows_around_the_tiles_of_cuda_kernels(backend, window, generator):
    """64 keys or query rows of a block, 32 that it walks at a time."""
    given = inputs(129, 2, 1, 64, torch.bfloat16, generator)
    d_out = torch.randn(129, 2, 64, generator=generator).bfloat16()
    gradients.check(
        lambda q, k, v: ops.attention(q, k, v, None, None, table([129]), window),
        plain([129], window),
        given,
        d_out,
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("prefill", ["", ", sm90"])
@pytest.mark.parametrize("window", [None, 9])
def test_log_sum_exp(emulator, prefill, window, generator):
    """Of decodes and prompts. The kernel of sm_90a does not write it, so that of sm_80 runs."""
    counts, dtype = [4, 70, 1, 12], torch.float16
    q, k, v = inputs(sum(counts), 8, 2, 64, dtype, generator)
    configure(emulator, f"emulator, late{prefill}")
    with use(emulator), attention_of(f"emulator{prefill}", emulator):
        _, lse = torch.ops.mistral_ext.attention.whole(q, k, v, table(counts), window, 0.3)
    keys = k.repeat_interleave(4, 1).double()
    for rows, q_rows, k_rows in zip(*(x.split(counts) for x in (lse, q, keys)), strict=True):
        scores = 0.3 * torch.einsum("qhd,khd->qhk", q_rows.double(), k_rows)
        hidden = torch.ones(len(rows), len(rows)).triu(1).bool()
        if window is not None:
            hidden |= torch.ones(len(rows), len(rows)).tril(-window).bool()
        exact = scores.masked_fill(hidden[:, None], -torch.inf).logsumexp(2)
        torch.testing.assert_close(rows, exact.float(), rtol=0, atol=2e-5)


def check_rows_that_see_one_key(count, window, dtype, generator):
    """Their probability is 1 whatever q and k are: the parts of their gradients cancel, but for the
    rounding of float32."""
    given = inputs(count, 4, 2, 64, dtype, generator)
    d_out = torch.randn(count, 4, 64, generator=generator).to(dtype)
    d_q, d_k, d_v = gradients.differentiate(
        lambda q, k, v: ops.attention(q, k, v, None, None, table([count]), window), given, d_out
    )
    for gradient in (d_q, d_k):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)
    assert_close(d_v, d_out.double().unflatten(1, (2, 2)).sum(2), d_out.unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "window"), [(1, None), (33, 1)])
def test_rows_that_see_one_key(isa, count, window, dtype, generator):
    check_rows_that_see_one_key(count, window, dtype, generator)


@cuda_kernels
@pytest.mark.parametrize(("count", "window"), [(1, None), (33, 1)])
def test_rows_that_see_one_key_by_cuda_kernels(backend, count, window, generator):
    check_rows_that_see_one_key(count, window, torch.float16, generator)


def test_scale_and_strided_gradient(isa, generator):
    # So many tokens that the largest error of torch is no lucky draw.
    given = inputs(100, 4, 2, 32, torch.float32, generator)
    d_out = torch.randn(4, 100, 32, generator=generator).transpose(0, 1)
    gradients.check(
        lambda q, k, v: ops.attention(q, k, v, None, None, table([100]), 6, 0.5),
        plain([100], 6, 0.5),
        given,
        d_out,
    )


def test_large_scores(isa, generator):
    """exp of them does not fit a float. A probability is as exact as its score, and the parts of a
    gradient that cancel are as exact as float32."""
    q, k, v = inputs(12, 2, 1, 32, torch.float32, generator)
    given, d_out = [7 * q, 7 * k, v], torch.randn(12, 2, 32, generator=generator)
    scale, eps = 32**-0.5, torch.finfo(torch.float32).eps
    largest = (given[0] @ given[1].mT).abs().max() * scale
    assert largest > 100
    cancelling = (d_out @ v.mT).abs().max() * scale * max(x.abs().max() for x in given)
    actual = gradients.differentiate(
        lambda q, k, v: ops.attention(q, k, v, None, None, table([12])), given, d_out
    )
    exact = gradients.differentiate(plain([12], None), [x.double() for x in given], d_out.double())
    for one, wide in zip(actual, exact, strict=True):
        error = (one.double() - wide).abs().max()
        assert error <= eps * (largest * wide.abs().max() + cancelling)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("counts", [[3, 20, 1], [90]])
def test_whole_sequences_get_the_bits_of_rings(backend, counts, window, generator):
    """The forward of training is that of inference."""
    dtype = torch.bfloat16
    q, k, v = (x.contiguous() for x in inputs(sum(counts), 4, 2, 64, dtype, generator))
    rings, row = table(counts), 0
    for i, count in enumerate(counts):
        rings[i, 2:] = torch.tensor([0, row, count])
        row += 2 * count
    pools = torch.zeros(2, row, 64, dtype=dtype)
    expected = ops.attention(q, k, v, *pools, rings, window)
    assert torch.equal(ops.attention(q, k, v, None, None, table(counts), window), expected)


def test_any_number_of_threads_gives_the_same_bits(isa, generator):
    given = inputs(150, 4, 2, 64, torch.bfloat16, generator)
    d_out = torch.randn(150, 4, 64, generator=generator).bfloat16()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(
            gradients.differentiate(
                lambda q, k, v: ops.attention(q, k, v, None, None, table([50, 100]), 30),
                given,
                d_out,
            )
        )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_nothing_leaks_between_sequences(backend, generator):
    """The gradient of a sequence does not depend on its neighbours, to the bit."""
    given = inputs(60, 2, 1, 64, torch.bfloat16, generator)
    d_out = torch.randn(60, 2, 64, generator=generator).bfloat16()

    def attend(counts):
        return lambda q, k, v: ops.attention(q, k, v, None, None, table(counts))

    together = gradients.differentiate(attend([13, 37, 10]), given, d_out)
    alone = gradients.differentiate(attend([37]), [x[13:50] for x in given], d_out[13:50])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[13:50], other)


def test_rings_have_no_gradient():
    q = torch.zeros(2, 1, 32, requires_grad=True)
    pools = torch.zeros(2, 8, 32)
    rings = torch.tensor([[0, 2, 0, 0, 8]])
    with pytest.raises(RuntimeError, match="attention: q requires a gradient, but"):
        ops.attention(q, q, q, *pools, rings)


def test_rows_after_a_history_have_no_lse():
    q, pool, lse = torch.zeros(2, 1, 32), torch.zeros(8, 32), torch.empty(2, 1)
    rings = torch.tensor([[0, 1, 0, 0, 4], [1, 1, 3, 4, 4]])
    with pytest.raises(
        ValueError, match=re.escape("attention: sequences[1].position is 3, expected 0 with lse")
    ):
        _C.attention(q, q, q, pool, pool, rings, torch.empty_like(q), None, None, None, lse)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU, for checks before any kernel runs."""

    is_cpu = False
    device = torch.device("cuda", 0)


@pytest.mark.parametrize("device", [torch.Tensor, OnCuda])
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), 1e-60])
def test_kernels_take_positive_scales_alone(device, scale):
    """They multiply a hidden score of -inf by it."""
    q, lse = (torch.zeros(shape).as_subclass(device) for shape in ((2, 1, 64), (2, 1)))
    q = q.bfloat16()
    message = f"attention_backward: scale is {scale:g}, expected a number above 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _C.attention_backward(
            *(q,) * 5, lse, table([2]).as_subclass(device), *(q,) * 3, None, scale
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 2, 32)}, "k has shape [2, 1, 32], expected [3, any, 32]"),
        ({"k": torch.zeros(2, 3, 32), "v": torch.zeros(2, 3, 32)}, "q has 2 heads, expected a mul"),
        ({"q": torch.zeros(2, 32)}, "q has shape [2, 32], expected [T, Hq, D]"),
        ({"k": torch.zeros(2, 32)}, "k has shape [2, 32], expected [T, Hkv, D]"),
        ({"sequences": torch.zeros(5).long()}, "sequences has shape [5], expected [S, 5]"),
        ({"sequences": table([2])[:, :3]}, "sequences has shape [1, 3], expected [S, 5]"),
        ({"sequences": table([3])}, "sequences[0].count is 3, expected 0 to 2"),
        ({"sequences": table([1])}, "sequences has 1 new tokens, expected 2 like q"),
        ({"window": 0}, "window is 0, expected 1 or more or None"),
    ],
)
def test_argument_checks(changes, message):
    given = {
        "q": torch.zeros(2, 2, 32),
        "k": torch.zeros(2, 1, 32),
        "v": torch.zeros(2, 1, 32),
        "k_pool": None,
        "v_pool": None,
        "sequences": table([2]),
    }
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        ops.attention(**given | changes)
