"""Drafts change nothing but the speed: every completion is what it is without them."""

from __future__ import annotations

import random

import pytest
import torch
from drafting import (
    WINDOW,
    Oracle,
    assert_empty,
    check_adapters,
    content,
    engine_of,
    of_every_kind,
    plainly,
    prompt,
    request,
    run,
)

from mistral_ext import Mistral, SamplingParams
from mistral_ext.engine import passes as passes_module
from mistral_ext.engine.drafts import Drafter
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.params import MOST_DRAFTS
from mistral_ext.engine.pass_costs import PassCosts
from mistral_ext.engine.proposer import Proposer
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.grammar import Ahead


@pytest.fixture(scope="module")
def llm():
    return Mistral.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_else_changes(models, window, seed):
    """With every option, in batches, beyond where a ring wraps and an extent grows."""
    requests = of_every_kind(seed)
    make = lambda: engine_of(models[window])  # noqa: E731
    plain, known = plainly(make, requests)
    engine = make()
    engine.passes.drafter = Oracle(known, (0.5, 0.8, 0.97)[seed % 3], seed)
    drafted = run(engine, requests)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    timings = [c.timing for c in drafted]
    accepted = sum(t.accepted_tokens for t in timings)
    assert 20 < accepted < sum(t.drafted_tokens for t in timings)
    assert all(c.timing.drafted_tokens == 0 for c in plain)
    assert_empty(engine)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_of_few_bits(quantize):
    """Products in integers take several tokens at a time."""
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, quantize=quantize).model
    requests = [request(prompt(n, n), 40, temperature=t) for n, t in ((9, 0.0), (40, 1.0))]
    plain, known = plainly(lambda: engine_of(model), requests)
    engine = engine_of(model)
    engine.passes.drafter = Oracle(known)
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
    assert engine.passes.drafter.passes > 5


def test_each_draft_has_the_adapter_of_its_sequence(tmp_path):
    check_adapters(tmp_path)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_draft_saves_a_pass(models, window, monkeypatch):
    requests = [request(prompt(40), 110, temperature=0.0)]
    _, known = plainly(lambda: engine_of(models[window]), requests)
    engine = engine_of(models[window])
    engine.passes.drafter = Oracle(known, share=1.0)
    engine.passes.drafter.random.choice = lambda choices: choices[0]  # all for which there is room
    monkeypatch.setattr(engine.runner, "launch", None)  # no pass is without drafts
    (completion,) = run(engine, requests)
    # The first token is of the prompt; 13 passes of 8 tokens and one of 5 give the others.
    assert engine.passes.drafter.passes == 14
    assert completion.timing.drafted_tokens == completion.timing.accepted_tokens == 13 * 7 + 4


@pytest.mark.parametrize("window", [None, WINDOW])
def test_what_is_put_back_is_the_same(models, window):
    """Too little memory for all."""
    requests = [request(prompt(n, n), 150, seed=n) for n in (120, 130)]
    plain, known = plainly(lambda: engine_of(models[window]), requests)
    engine = engine_of(models[window], cache_tokens=520 if window is None else 300)
    engine.passes.drafter = Oracle(known)
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
    assert engine.passes.drafter.passes > 30
    assert (engine.scheduler.preemptions > 0) == (window is None)
    assert_empty(engine)


@pytest.mark.parametrize("more", [0, 6])
def test_a_later_request_finds_a_sound_cache(models, more):
    """Wrong drafts behind the end of a sequence have taken slots of its ring."""
    ids = prompt(150)
    (free,), _ = plainly(lambda: engine_of(models[WINDOW]), [request(ids)])
    end = free.token_ids[20]
    length = len(ids) + free.token_ids.index(end)  # tokens that are stored at the end
    least = length - (WINDOW + 64) + WINDOW - 1  # tokens after which a ring of these may go on
    first = request(ids, eos_ids=(end,))
    later = request([*ids[: least + more], *prompt(40, 1)], 8)
    plain, known = plainly(lambda: engine_of(models[WINDOW], max_batch=1), [first, later])
    engine = engine_of(models[WINDOW], max_batch=1)
    engine.passes.drafter = Oracle(known, share=0.0)
    engine.passes.drafter.random.choice = lambda choices: choices[0]
    assert [content(c) for c in run(engine, [first, later])] == [content(c) for c in plain]
    assert plain[1].timing.cached_tokens == least + more


@pytest.mark.parametrize("when", ["read", "heard"])
def test_abort(models, when, monkeypatch):
    """Another thread does so while a pass with drafts is made; a listener between two passes."""
    requests = [request(prompt(40), 60), request(prompt(50, 1), 60, temperature=0.0)]
    plain, known = plainly(lambda: engine_of(models[None]), requests)
    engine = engine_of(models[None])
    engine.passes.drafter = Oracle(known)
    heard = []
    kept = engine.add(requests[0], heard.append)
    victim = engine.add(requests[1])
    verify, passes = engine.runner.verify, iter(range(100))

    def abort_and_verify(*args):
        if next(passes) == 4:
            if when == "read":
                engine.abort(victim)
            else:
                monkeypatch.setattr(engine.passes, "_choose", abort_and_choose)
        return verify(*args)

    choose = engine.passes._choose

    def abort_and_choose(*args):
        engine.abort(victim)
        return choose(*args)

    monkeypatch.setattr(engine.runner, "verify", abort_and_verify)
    while engine.has_work:
        assert victim not in {o.request_id for o in engine.step()} or next(passes) <= 5
    assert content(heard[-1].completion) == content(plain[0])
    assert [o.request_id for o in heard] == [kept] * 60
    assert_empty(engine)


def test_a_pass_that_fails_fails_its_requests_and_the_next_ones_run(models, monkeypatch):
    requests = [request(prompt(9)), request(prompt(10))]
    plain, known = plainly(lambda: engine_of(models[None]), requests)
    for broken in ("verify", "_choose"):
        engine = engine_of(models[None])
        engine.passes.drafter = Oracle(known)
        place = engine.passes if broken == "_choose" else engine.runner

        def breaks(*args):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(place, broken, breaks)
            assert [str(e) for e in run(engine, requests)] == ["out of memory"] * 2
        assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
        assert_empty(engine)


def test_a_proposer_that_fails_leaves_its_sequence_without_drafts(models, eager, caplog):
    ids = [20, 21, 22, 23, 24, 25, 26, 27, 28, 20, 21]
    again = dict.fromkeys(ids, 100.0)
    requests = [request(ids, 60, temperature=0.0, logit_bias=again, seed=i) for i in range(2)]
    plain, _ = plainly(lambda: engine_of(models[None]), requests)
    engine = engine_of(models[None])
    broken, sound = (engine.add(r) for r in requests)
    engine._sequences[broken].proposer.propose = None
    results = {}
    while engine.has_work:
        results |= {o.request_id: o.completion for o in engine.step() if o.is_last}
    assert [content(results[i]) for i in (broken, sound)] == [content(c) for c in plain]
    assert results[broken].timing.drafted_tokens == 0 < results[sound].timing.drafted_tokens
    assert [r.message for r in caplog.records] == [
        "a completion goes on without drafts: 'NoneType' object is not callable"
    ]


def test_the_time_of_a_pass_is_not_that_of_the_guesses(models, monkeypatch):
    """The first guess reads the whole text."""
    clock = [0.0]
    monkeypatch.setattr(passes_module.time, "perf_counter", lambda: clock[0])
    engine, seconds = engine_of(models[None]), []
    launch = engine.runner.launch

    def later(by, result):
        clock[0] += by
        return result

    engine.passes.drafter.choose = lambda *_: later(100, {})
    engine.passes.drafter.note = lambda plain, took, *_: seconds.append(took)
    monkeypatch.setattr(engine.runner, "launch", lambda *args: later(1, launch(*args)))
    run(engine, [request(prompt(9), 5)])
    assert seconds == [None, 1.0, 1.0, 1.0]  # the first step is recorded


@pytest.mark.parametrize("when", ["verified", "second token", "after an end"])
def test_ctrl_c_leaves_the_engine_as_it_was(models, when, monkeypatch):
    """Every output reaches its listener, those that the interrupted step had already made too."""
    requests = [request(prompt(n, n), 20 + n // 3) for n in (20, 70)]
    plain, known = plainly(lambda: engine_of(models[WINDOW]), requests)
    engine = engine_of(models[WINDOW])
    engine.passes.drafter = Oracle(known)
    verify, choose, passes, interruptions = engine.runner.verify, engine.passes._choose, [], []

    def interrupt(now):
        if now and not interruptions:
            interruptions.append(when)
            raise KeyboardInterrupt

    def verify_or_not(*args):
        step = verify(*args)  # its tokens are stored, and nobody knows
        passes.append(0)
        interrupt(when == "verified" and len(passes) == 4)
        return step

    def choose_or_not(step, waiting):
        passes[-1] += 1
        running = len(engine.scheduler.decoding)
        interrupt(passes[-1] == 2 and running == (2 if when == "second token" else 1))
        return choose(step, waiting)

    monkeypatch.setattr(engine.runner, "verify", verify_or_not)
    if when != "verified":
        monkeypatch.setattr(engine.passes, "_choose", choose_or_not)
    heard = [[] for _ in requests]
    for one, outputs in zip(requests, heard, strict=True):
        engine.add(one, outputs.append)
    for _ in range(200):
        try:
            engine.step()
        except KeyboardInterrupt:
            assert when != "after an end" or heard[0][-1].is_last
    assert interruptions == [when]
    for outputs, expected in zip(heard, plain, strict=True):
        assert [i for o in outputs for i in o.token_ids] == expected.token_ids
        assert [o.is_last for o in outputs] == [False] * (len(outputs) - 1) + [True]
        assert content(outputs[-1].completion) == content(expected)
    assert not engine.has_work
    assert_empty(engine)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "small": {"type": "boolean"}},
    "required": ["name", "small"],
    "additionalProperties": False,
}
TEXTS = [
    {"stop": ["the ", "and"], "max_tokens": 80},
    {"stop": "a", "temperature": 1.0, "logprobs": 0},
    {"schema": SCHEMA, "temperature": 1.0, "logprobs": 1},
    {"regex": "[a-z]{3,30}", "temperature": 0.7, "top_p": 0.9},
    {"grammar": 'start: "a" | "b" start', "repetition_penalty": 0.8, "temperature": 1.0},
    {"temperature": 1.0, "max_tokens": 50},
]


@pytest.mark.parametrize("seed", range(3))
def test_texts_and_what_they_have_to_match(llm, seed):
    ids = llm.tokenizer.encode("Once upon a time there was a small")
    options = [{"max_tokens": 60, "seed": 7 * seed + i} | o for i, o in enumerate(TEXTS)]

    def requests():  # a request's text remembers what it was given
        given = [SamplingParams(**o) for o in options]
        return [llm.request(ids[: 3 + i], p, index=i % 2) for i, p in enumerate(given)]

    def make():
        return Engine(llm.model, llm.vocabulary.sampled, cache_tokens=4096, holes=llm._holes)

    plain, known = plainly(make, requests())
    engine = make()
    engine.passes.drafter = Oracle(known, seed=seed)
    drafted = run(engine, requests())
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    assert {c.finish_reason for c in plain} == {"stop", "length"}
    assert sum(c.timing.accepted_tokens for c in drafted) > 30


@pytest.fixture
def eager(monkeypatch):
    """Passes cost the same whatever their rows."""
    monkeypatch.setattr(PassCosts, "seconds", lambda self, rows: 1.0)


def test_repeated_text_is_drafted(models, eager):
    """A bias has a sequence repeat itself; of another with the same tokens it learns nothing."""
    ids = [20, 21, 22, 23, 24, 25, 26, 27, 28, 20, 21]
    again = dict.fromkeys(ids, 100.0)
    requests = [request(ids, 60, temperature=0.0, logit_bias=again, seed=i) for i in range(2)]
    plain, _ = plainly(lambda: engine_of(models[None]), requests)
    drafted = run(engine_of(models[None]), requests)
    assert [content(c) for c in drafted] == [content(c) for c in plain]
    for completion in drafted:
        assert 10 < completion.timing.accepted_tokens < 60


def test_the_text_of_another_request_is_no_source(models, eager):
    """Neither while both run, nor after the other has ended."""
    ids = [20, 21, 22, 23, 24, 25, 26, 27, 28, 20, 21]
    repeats = request(ids, 60, temperature=0.0, logit_bias=dict.fromkeys(ids, 100.0))
    begins_the_same = request([40, 41, 42, 20, 21], 3, temperature=0.0, logit_bias={22: 100.0})
    engine = engine_of(models[None])
    for given in ([repeats, begins_the_same], [begins_the_same]):
        *others, completion = run(engine, given)
        assert completion.token_ids == [22] * 3
        assert completion.timing.drafted_tokens == 0
        assert all(c.timing.drafted_tokens > 0 for c in others)


@pytest.mark.parametrize("drafts", [0, 2, None])
def test_forced_text_is_drafted(llm, eager, drafts):
    options = {"regex": "The quick brown fox jumps over the lazy dog", "max_tokens": 60}
    (plain,) = llm.generate("Hi", drafts=0, **options)
    (drafted,) = llm.generate("Hi", drafts=drafts, temperature=0.0, **options)
    assert content(drafted) == content(plain)
    timing = drafted.timing
    assert timing.accepted_tokens <= timing.drafted_tokens
    assert (timing.accepted_tokens > 5) == (drafts != 0)


NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
FLAGS = {
    "type": "object",
    "properties": {name: {"type": "boolean"} for name in NAMES},
    "required": NAMES,
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(2))
def test_white_space_is_guessed_as_it_was_written_before(llm, eager, seed):
    """A grammar forces none of it. With guesses of what is forced or repeated alone it takes 44
    passes and more."""
    options = {"schema": FLAGS, "max_tokens": 200, "seed": seed, "temperature": float(seed)}
    (plain,) = llm.generate("Once", drafts=0, **options)
    (drafted,) = llm.generate("Once", **options)
    assert content(drafted) == content(plain)
    assert drafted.timing.decode_tokens - drafted.timing.accepted_tokens < 40


def test_guesses_that_are_too_much_work_change_nothing(llm, eager, monkeypatch):
    monkeypatch.setattr(Ahead, "take", lambda *_: None)
    options = {"schema": FLAGS, "max_tokens": 200}
    (plain,) = llm.generate("Once", drafts=0, **options)
    (drafted,) = llm.generate("Once", **options)
    assert content(drafted) == content(plain)
    assert drafted.timing.drafted_tokens > 20


def test_a_model_may_be_loaded_without_drafts(eager):
    llm = Mistral.from_pretrained(DEMO_MODEL, drafts=0)
    options = {"regex": "The quick brown fox jumps over the lazy dog", "max_tokens": 60}
    assert llm.generate("Hi", **options)[0].timing.drafted_tokens == 0
    assert llm.generate("Hi", drafts=1, **options)[0].timing.drafted_tokens > 5


@pytest.mark.parametrize(
    "make", [SamplingParams, lambda drafts: Mistral.from_pretrained(DEMO_MODEL, drafts=drafts)]
)
def test_a_wrong_number_is_refused(make):
    with pytest.raises(ValueError, match="drafts is 8, expected an integer from 0 to 7"):
        make(drafts=8)
    with pytest.raises(ValueError, match="drafts is -1, expected"):
        make(drafts=-1)
    with pytest.raises(TypeError, match="drafts is True, expected"):
        make(drafts=True)


class TestProposer:
    """What it proposes, and how sure it is."""

    def tokens(self, ids, most=4):
        return [token for token, _ in Proposer(ids).propose(most, None)]

    def test_the_continuation_of_the_last_tokens(self):
        assert self.tokens([1, 2, 3, 4, 5, 6, 1, 2]) == [3, 4, 5, 6]
        assert self.tokens([1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1, 2, 4]  # the last one, and on
        assert self.tokens([7, 7, 7]) == [7, 7, 7, 7]
        assert self.tokens([9, 1, 2, 5, 8, 1, 2, 6, 9, 1, 2]) == [5, 8, 1, 2]  # of the longer match

    def test_the_text_behind_words_that_were_replaced(self):
        begin = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
        assert self.tokens([*begin, 9]) == []
        assert self.tokens([*begin, 9, 5]) == [6, 7, 8, 1]
        assert self.tokens([*begin, 9, 9, 7]) == [8, 1, 2, 3]
        assert self.tokens([*begin, 9, 8]) == []  # too far behind

    def test_nothing_for_what_is_new(self):
        assert self.tokens([]) == self.tokens([1]) == self.tokens([1, 2, 3]) == []
        assert self.tokens([1, 2, 3, 2]) == []

    def test_as_a_list_grows(self):
        chance = random.Random(3)
        ids: list[int] = []
        growing = Proposer(ids)
        for _ in range(300):
            ids.append(chance.randrange(12))
            given = growing.propose(5, None)
            assert [token for token, _ in given] == self.tokens(list(ids), 5)

    def test_what_was_right_counts(self):
        ids = [1, 2, 3, 1, 2]
        proposer = Proposer(ids)
        ((_, before),) = proposer.propose(1, None)
        ids += [3, 1, 2]
        ((_, after),) = proposer.propose(1, None)
        assert before < after < 1
        for new in range(10, 60):
            ids += [new, 1, 2]
            ((_, after),) = proposer.propose(1, None)
        assert after < 0.1

    def test_what_was_in_no_pass_counts_too(self):
        """Up to the first that was wrong, or that nobody knows yet."""
        checks = []
        for came in ([3, 4, 5], [3, 9, 5], [3]):
            ids = [1, 2, 3, 4, 5, 1, 2]
            proposer = Proposer(ids)
            proposer.propose(3, None)
            ids += came
            before = list(proposer._checked)
            proposer.propose(3, None)
            proposer.propose(3, None)  # which counts nothing again
            after = proposer._checked
            checks.append(sum(a != b for a, b in zip(after, before, strict=True)))
        assert checks == [3, 2, 1]

    def test_tokens_that_end_the_sequence_are_not_proposed(self):
        ids = [1, 2, 3, 4, 5, 6, 1, 2]
        for ends, tokens in (((5, 9), [3, 4]), ((3,), []), ((9,), [3, 4, 5, 6, 1])):
            given = Proposer(ids, ends).propose(5, None)
            assert [token for token, _ in given] == tokens

    def test_what_drafts_gain_and_cost(self):
        proposer = Proposer([1])
        proposer.note(1, 0.25)
        assert proposer.gain == 0.75
        for _ in range(50):
            proposer.note(0, 0.25)
        assert proposer.gain < -10
        proposer.gain = 3.0
        proposer.note(7, 0.5)
        assert proposer.gain == 4.0


class Given:
    """A sequence that proposes these tokens with these chances."""

    matcher, prompt_length = None, 0

    def __init__(self, chances, gain=0.0, generated=0):
        self.ids = [0] * generated
        self.chances = chances
        self.proposer = self
        self.gain = gain

    def propose(self, most, matcher):
        return [(10 + i, chance) for i, chance in enumerate(self.chances[:most])]


class TestDrafter:
    """How many drafts a pass gets."""

    def counts(self, sequences, seconds, room=MOST_DRAFTS):
        drafter = Drafter()
        for rows, of_pass in enumerate(seconds, 1):
            drafter.note(rows, of_pass, {}, {})
        drafts = drafter.choose(sequences, [room] * len(sequences))
        return [len(drafts.get(sequence, ())) for sequence in sequences]

    def test_rows_that_cost_nothing_are_all_used(self):
        free = [1.0] * 8
        assert self.counts([Given([0.9] * 7)], free) == [7]
        assert self.counts([Given([0.9] * 7)], free, room=3) == [3]
        assert self.counts([Given([0.9] * 7), Given([0.6] * 7)], free) == [5, 1]
        assert self.counts([Given([0.9] * 7)] * 8, free) == [0] * 8  # no row is left

    def test_a_row_is_used_if_it_gains_more_than_it_costs(self):
        dear = [1 + 0.6 * more for more in range(8)]
        assert self.counts([Given([0.5] * 7)], dear) == [0]
        assert self.counts([Given([0.9, 0.8, 0.3, 0.9])], dear) == [2]
        assert self.counts([Given([0.9] * 7)], [1.0, 1.9, *[2.0] * 6]) == [7]

    def test_nothing_is_drafted_before_a_pass_was_measured(self):
        assert self.counts([Given([0.9] * 7)], []) == [0]

    def test_a_sequence_that_lost_too_much_gets_none(self):
        free = [1.0] * 8
        assert self.counts([Given([0.9] * 7, gain=-0.6)], free) == [0]
        assert self.counts([Given([0.9] * 7, gain=-0.6, generated=20)], free) == [7]

    def test_what_was_not_measured_is_estimated(self):
        costs = PassCosts()
        assert costs.seconds(1) is None
        costs.note(2, 1.0)
        assert costs.seconds(1) < costs.seconds(2) == 1.0 < costs.seconds(3) < costs.seconds(4)
        costs.note(4, 3.0)
        assert costs.seconds(4) == 3.0
        for _ in range(600):
            costs.forget()
            costs.note(2, 1.5)
        assert costs.seconds(2) == pytest.approx(1.5)
        assert costs.seconds(4) < 2.5  # it is so long ago that it is forgotten
