"""Sampling against direct computation of the distributions that the options define."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mistral_ext.engine.sampling import Sampler, SamplingParams, token_logprob

VOCAB = 50
LOGITS = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class Completion:
    """One completion in a sampler of its own."""

    def __init__(self, params=None, prompt=(), vocab_size=VOCAB, index=0):
        self.sampler = Sampler(1, vocab_size)
        self.sampler.start(0, params or SamplingParams(), prompt, index)

    def next(self, logits):
        return self.sampler.sample([0], torch.from_numpy(logits)[None])[0]


def draws(count, logits=LOGITS, **options):
    """Token ids of `count` first steps, with a seed each."""
    sampler = Sampler(count, VOCAB)
    for seed in range(count):
        sampler.start(seed, SamplingParams(seed=seed, **options), ())
    return sampler.sample(range(count), torch.from_numpy(logits).expand(count, -1))


def support(count=400, **options):
    return set(draws(count, temperature=1.0, **options))


def test_greedy_is_argmax_and_lowest_id_on_a_tie():
    tied = np.zeros(VOCAB, dtype=np.float32)
    tied[[7, 30]] = 3
    assert draws(3, tied) == [7, 7, 7]
    assert draws(1, LOGITS) == [int(LOGITS.argmax())]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    """Chi-squared of 4000 draws; 96 is the 0.01 % quantile for 49 degrees of freedom."""
    count = 4000
    seen = np.bincount(draws(count, temperature=temperature), minlength=VOCAB)
    expected = count * softmax(LOGITS.astype(np.float64) / temperature)
    common = expected > 5
    chi2 = ((seen - expected) ** 2 / expected)[common].sum()
    rare, expected_rare = seen[~common].sum(), expected[~common].sum()
    assert chi2 < 96
    assert rare <= expected_rare + 5 * math.sqrt(expected_rare + 1)


def test_successive_steps_are_independent_draws():
    completion = Completion(SamplingParams(temperature=1.0, seed=1), vocab_size=2)
    flat = np.zeros(2, dtype=np.float32)
    tokens = [completion.next(flat) for _ in range(2000)]
    pairs = np.bincount([2 * a + b for a, b in itertools.pairwise(tokens)], minlength=4)
    assert (abs(pairs - 500) < 110).all()


def test_top_k_keeps_the_k_most_likely():
    best = set(np.argsort(-LOGITS)[:4].tolist())
    assert support(top_k=4) == best
    assert support(top_k=1) == {int(LOGITS.argmax())}
    assert draws(30, temperature=1.0, top_k=VOCAB + 7) == draws(30, temperature=1.0)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8])
def test_top_p_keeps_the_smallest_nucleus(top_p):
    order = np.argsort(-LOGITS)
    reached = np.cumsum(softmax(LOGITS.astype(np.float64))[order])
    nucleus = set(order[: int((reached < top_p).sum()) + 1].tolist())
    kept = support(count=2000, top_p=top_p)
    assert kept <= nucleus
    assert len(kept) >= len(nucleus) - 2  # the least likely may not have come up


def test_top_p_reached_exactly_adds_no_token():
    logits = np.full(VOCAB, -np.inf, dtype=np.float32)
    logits[[3, 9, 11, 20]] = 0  # a quarter each
    assert support(logits=logits, top_p=0.5) == {3, 9}


def test_min_p_is_relative_to_the_most_likely():
    p = softmax(LOGITS)
    assert support(count=1500, min_p=0.2) == set(np.flatnonzero(p >= 0.2 * p.max()).tolist())


def test_filters_combine_in_order():
    """min_p leaves some, top_k some of those, and top_p is of what top_k left."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCAB - 4))).astype(np.float32)
    assert support(logits=logits, top_k=2, top_p=0.57) == {0}  # 0.4 of 0.7 is 0.571
    assert support(logits=logits, top_k=2, top_p=0.58) == {0, 1}
    assert support(logits=logits, min_p=0.6, top_k=3) == {0, 1}


def test_repetition_penalty_covers_prompt_and_completion():
    logits = np.array([2.0, 1.5, -1.0, -1.2], dtype=np.float32)
    options = SamplingParams(repetition_penalty=2.0)
    assert Completion(options, [0], 4).next(logits) == 1
    completion = Completion(options, [], 4)
    assert [completion.next(logits) for _ in range(3)] == [0, 1, 0]
    # A negative logit is multiplied: repeating never becomes more likely.
    assert Completion(options, [0, 1, 2], 4).next(np.array([-9, -9, -1, -1.2], np.float32)) == 3


def test_presence_and_frequency_penalties_cover_the_completion_only():
    logits = np.array([1.0, 0.5, -5.0], dtype=np.float32)
    presence = Completion(SamplingParams(presence_penalty=0.6), [0, 0], 3)
    assert [presence.next(logits) for _ in range(4)] == [0, 1, 0, 0]
    frequency = Completion(SamplingParams(frequency_penalty=0.3), [0, 0], 3)
    # 1.0 | 0.7 | 0.4 < 0.5 | 0.4 > 0.2 | 0.1 < 0.2
    assert [frequency.next(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_logit_bias_bans_and_forces():
    best = int(LOGITS.argmax())
    assert best not in support(logit_bias={best: -math.inf})
    assert draws(1, logit_bias={5: 100.0}) == [5]


def test_same_seed_same_tokens_and_every_completion_its_own():
    def tokens(seed, index):
        completion = Completion(SamplingParams(temperature=1.0, seed=seed), index=index)
        return [completion.next(LOGITS) for _ in range(20)]

    assert tokens(7, 0) == tokens(7, 0)
    assert len({tuple(tokens(seed, index)) for seed in (7, 8, 2**64 - 1) for index in (0, 1)}) == 6


def test_without_a_seed_draws_differ():
    first, second = (
        [Completion(SamplingParams(temperature=1.0)).next(LOGITS) for _ in range(40)]
        for _ in range(2)
    )
    assert first != second


@pytest.mark.parametrize(
    ("options", "greedy"),
    [
        ({}, True),
        ({"seed": 3, "top_p": 0.5, "top_k": 2, "min_p": 0.1, "logprobs": 2, "n": 2}, True),
        ({"temperature": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": -0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"logit_bias": {1: 0.5}}, False),
    ],
)
def test_what_needs_no_draw(options, greedy):
    sampler = Sampler(3, VOCAB)
    sampler.start(0, SamplingParams(), [1])
    sampler.start(2, SamplingParams(**options), [1])
    assert sampler.needs_no_draw([0])
    assert sampler.needs_no_draw([0, 2]) == sampler.needs_no_draw([2]) == greedy
    sampler.start(2, SamplingParams(), [1])
    assert sampler.needs_no_draw([0, 2])


def test_a_row_is_like_new_for_its_next_completion():
    used = {"seed": 1, "repetition_penalty": 3.0, "frequency_penalty": 2.0, "logit_bias": {2: 50.0}}
    sampler = Sampler(2, VOCAB)
    sampler.start(1, SamplingParams(**used), range(VOCAB))
    logits = torch.from_numpy(LOGITS)[None]
    assert sampler.sample([1], logits) == [2]
    params = SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.5, presence_penalty=1.0)
    sampler.start(1, params, [3, 4])
    fresh = Completion(params, [3, 4])
    assert [sampler.sample([1], logits)[0] for _ in range(20)] == [
        fresh.next(LOGITS) for _ in range(20)
    ]


def test_completions_of_one_sampler_do_not_matter_to_each_other():
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (30, 3, VOCAB))).float()
    params = [
        SamplingParams(temperature=1.0, seed=1, top_p=0.9, repetition_penalty=1.2),
        SamplingParams(frequency_penalty=1.0, logit_bias={4: 2.0}),
        SamplingParams(temperature=0.7, seed=1, top_k=9, min_p=0.01),
    ]
    together = Sampler(3, VOCAB)
    alone = [Completion(p, [5, 6]) for p in params]
    for row, p in enumerate(params):
        together.start(row, p, [5, 6])
    for step, rows in enumerate(itertools.islice(itertools.cycle([[0, 1, 2], [2, 0], [1]]), 30)):
        expected = [alone[row].next(logits[step, row].numpy()) for row in rows]
        assert together.sample(rows, logits[step, rows]) == expected


def test_columns_past_the_vocabulary_are_never_chosen():
    """A model may have more rows than its tokenizer has tokens, and a prompt such ids."""
    logits = np.zeros(VOCAB + 3, dtype=np.float32)
    logits[VOCAB:] = [100, np.nan, np.inf]
    logits[7] = 1
    params = SamplingParams(repetition_penalty=1.1)
    assert Completion(params, [0, VOCAB + 1]).next(logits) == 7


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logit_bias": {5: 1.0}}], ids=str)
def test_holes_are_never_chosen(options):
    """Nor when their row of the sampler is another completion's next."""
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, [7, 30]] = 100
    logits[0, 9] = 50
    sampler = Sampler(1, VOCAB, holes=[7, 30])
    for _ in range(2):
        sampler.start(0, SamplingParams(**options), ())
        assert not sampler.needs_no_draw([0])
        assert sampler.sample([0], torch.from_numpy(logits)) == [9]
    with pytest.raises(ValueError, match=r"logit_bias has token id 30, expected the id of"):
        sampler.start(0, SamplingParams(logit_bias={30: 1.0}), ())


def test_holes_have_no_log_probability():
    logits = torch.tensor([0.0, 9.0, 1.0, 9.0])
    logprob = token_logprob(logits, 2, 4, holes=[1, 3])
    expected = logits[[0, 2]].double().log_softmax(-1).tolist()
    assert logprob.top == pytest.approx({2: expected[1], 0: expected[0]})
    assert logprob.logprob == logprob.top[2]
    assert logits.tolist() == [0.0, 9.0, 1.0, 9.0]


def test_logprobs_are_of_the_unchanged_logits():
    best = int(LOGITS.argmax())
    token_id = draws(1, logit_bias={best: -100.0})[0]
    logprob = token_logprob(torch.from_numpy(LOGITS), token_id, 3)
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    order = np.argsort(-LOGITS)[:3].tolist()
    assert logprob.token_id == token_id == order[1]
    assert logprob.logprob == pytest.approx(expected[token_id])
    assert list(logprob.top) == order
    assert list(logprob.top.values()) == pytest.approx(expected[order].tolist())


def test_most_likely_tokens_are_in_order_and_ties_by_id():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0])
    assert list(token_logprob(logits, 0, 4).top) == [1, 3, 2, 4]
    assert token_logprob(logits, 0, 0).top == {}
    assert len(token_logprob(logits, 0, 99).top) == 5


def test_logits_are_not_changed():
    before = LOGITS.copy()
    options = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "logit_bias": {1: 3.0}}
    Completion(SamplingParams(temperature=1.0, **options), [1, 2]).next(LOGITS)
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("max_tokens", 0, ValueError),
        ("max_tokens", 1.5, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", "hot", TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("top_k", -1, ValueError),
        ("min_p", 1.5, ValueError),
        ("repetition_penalty", 0.0, ValueError),
        ("presence_penalty", 3.0, ValueError),
        ("frequency_penalty", -3.0, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("stop", ["x", ""], ValueError),
        ("stop", [3], ValueError),
        ("stop", 3, TypeError),
        ("logit_bias", {-1: 0.0}, ValueError),
        ("logit_bias", {1: "x"}, ValueError),
        ("logit_bias", [1], TypeError),
        ("logprobs", -1, ValueError),
        ("n", 0, ValueError),
        ("n", True, TypeError),
        ("ignore_eos", 1, TypeError),
    ],
)
def test_bad_options_are_named(option, value, error):
    with pytest.raises(error, match=f"^{option} is .*, expected "):
        SamplingParams(**{option: value})


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="unknown option 'temprature', expected one of max_tokens"):
        SamplingParams.from_options({"temprature": 1.0})


def test_logit_bias_past_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"logit_bias has token id 50, expected less than 50"):
        Completion(SamplingParams(logit_bias={50: 1.0}))


def test_nan_logits_are_an_error():
    broken = LOGITS.copy()
    broken[3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are NaN"):
            Completion(SamplingParams(temperature=temperature)).next(broken)


def test_a_bias_that_bans_every_token_is_an_error():
    params = SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), -math.inf))
    with pytest.raises(ValueError, match="all logits are -inf, with logit_bias"):
        Completion(params).next(LOGITS)


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "logit_bias"])
def test_integers_that_no_float_holds_are_wrong_values(name):
    """JSON may hold them."""
    value = {5: 10**400} if name == "logit_bias" else 10**400
    with pytest.raises(ValueError, match=rf"^{name} is .*10+.*, expected a number"):
        SamplingParams(**{name: value})
