"""The engine: requests that come and go at any time get what each gets alone."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_ext import Mistral, SamplingParams
from mistral_ext.engine.engine import Engine
from mistral_ext.engine.request import Request
from mistral_ext.llm import DEMO_MODEL

VOCABULARY = 131


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """window -> a model, in bfloat16, the dtype that rounds most."""
    models = {}
    for window in (None, 48):
        folder = tmp_path_factory.mktemp("model")
        write_checkpoint(folder, sliding_window=window, max_position_embeddings=4096)
        models[window] = Mistral.from_pretrained(folder, dtype=torch.bfloat16).model
    return models


def engine_of(model, **options) -> Engine:
    return Engine(model, VOCABULARY, **{"max_batch": 4, "cache_tokens": 4096} | options)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


def request(ids, max_tokens=8, temperature=1.0, seed=5, **options) -> Request:
    sampling = {"stop", "logit_bias", "repetition_penalty", "ignore_eos", "logprobs"}
    given = {name: options.pop(name) for name in sampling & set(options)}
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, **{"logprobs": 1} | given
    )
    return Request(ids, params, max_length=len(ids) + max_tokens, **options)


def run(engine: Engine, requests) -> list:
    """The completion of each request, or its error."""
    ids = [engine.add(r) for r in requests]
    results = {}
    while engine.has_work:
        for output in engine.step():
            if output.is_last:
                assert output.request_id not in results
                results[output.request_id] = output.completion or output.error
    return [results[i] for i in ids]


def content(completion):
    return completion.token_ids, completion.finish_reason, completion.logprobs


def alone(model, *requests):
    return [content(run(engine_of(model), [r])[0]) for r in requests]


def assert_empty(engine: Engine) -> None:
    """Nothing is left but what the prefix cache keeps, and that can go."""
    assert not engine.has_work
    assert not list(engine.scheduler.running())
    while engine.scheduler.prefixes.drop_oldest():
        pass
    assert engine.pool.free_slots == engine.pool.slots
    assert sorted(engine.scheduler._free_rows) == list(range(4))
    assert not engine._listeners
    assert not engine._sequences


@pytest.mark.parametrize("window", [None, 48])
def test_together_is_each_alone(models, window):
    requests = [request(prompt(n, n), 40, seed=n) for n in (1, 5, 8, 9, 31, 32, 33, 70, 200)]
    engine = engine_of(models[window])
    assert [content(c) for c in run(engine, requests)] == alone(models[window], *requests)
    assert_empty(engine)


def test_a_late_request_is_served_as_soon_as_a_row_is_free(models):
    engine = engine_of(models[None], max_batch=2)
    for length in (30, 60):
        engine.add(request(prompt(5, length), length))
    for _ in range(10):
        engine.step()
    late = engine.add(request(prompt(6), 5))
    first_ends = late_begins = None
    for step in range(10, 100):
        for output in engine.step():
            if output.request_id == 0 and output.is_last:
                first_ends = step
            if output.request_id == late and late_begins is None:
                late_begins = step
    assert late_begins == first_ends + 1


def test_a_request_that_fails_leaves_its_neighbours_alone(models):
    ban = {i: -float("inf") for i in range(VOCABULARY)}
    good = [request(prompt(40, i), 30, seed=i) for i in range(2)]
    engine = engine_of(models[None])
    first, error, second = run(engine, [good[0], request(prompt(7), logit_bias=ban), good[1]])
    assert isinstance(error, ValueError)
    assert "no token is left to choose" in str(error)
    assert [content(first), content(second)] == alone(models[None], *good)
    assert_empty(engine)


def test_a_pass_that_fails_fails_its_requests_and_the_next_ones_run(models, monkeypatch):
    engine = engine_of(models[None])
    runner = engine.runner
    whole, launch = run(engine, [request(prompt(9))]), runner.launch
    calls = iter(range(100))

    def breaks(*args):
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        return launch(*args)

    monkeypatch.setattr(runner, "launch", breaks)
    failed = run(engine, [request(prompt(9)), request(prompt(10))])
    assert [str(e) for e in failed] == ["out of memory"] * 2
    assert content(run(engine, [request(prompt(9))])[0]) == content(whole[0])
    assert_empty(engine)


@pytest.mark.parametrize("phase", ["waiting", "reading", "decoding"])
def test_abort_frees_at_the_next_step(models, phase):
    engine = engine_of(models[None], max_batch=4, prefill_chunk=32)
    others = [request(prompt(20, i), 30) for i in range(4 if phase == "waiting" else 2)]
    ids = [engine.add(r) for r in others]
    engine.step()
    victim = engine.add(request(prompt(200), 50))
    for _ in range({"waiting": 1, "reading": 2, "decoding": 12}[phase]):
        engine.step()
    sequence = engine._sequences[victim]
    assert (sequence in engine.scheduler.waiting) == (phase == "waiting")
    assert (sequence in engine.scheduler.reading) == (phase == "reading")
    assert (sequence in engine.scheduler.decoding) == (phase == "decoding")
    engine.abort(victim)
    results = {}
    while engine.has_work:
        for output in engine.step():
            assert sequence.extent is None
            assert output.request_id != victim
            if output.completion:
                results[output.request_id] = content(output.completion)
    assert [results[i] for i in ids] == alone(models[None], *others)
    engine.abort(victim)  # once more does no harm
    assert_empty(engine)


@pytest.mark.parametrize("work", ["begin", "launch"])
def test_abort_while_a_pass_is_made(models, work, monkeypatch):
    """Another thread may do so at any time."""
    engine = engine_of(models[None])
    kept = engine.add(request(prompt(40), 20))
    victim = engine.add(request(prompt(50, 1), 20))
    do = getattr(engine.runner, work)

    def abort_and_do(*args):
        engine.abort(victim)
        return do(*args)

    monkeypatch.setattr(engine.runner, work, abort_and_do)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].request_id == kept
    (expected,) = alone(models[None], request(prompt(40), 20))
    assert content(outputs[-1].completion) == expected
    assert_empty(engine)


def test_a_listener_hears_all_of_its_request_and_may_abort_another(models):
    engine = engine_of(models[None])
    heard, steps = [], []
    engine.add(request(prompt(40), 6), heard.append)
    victim = engine.add(request(prompt(50, 1), 20), lambda output: engine.abort(victim))
    while engine.has_work:
        assert engine.load.running + engine.load.waiting <= 2
        steps += engine.step()
    assert [token for output in heard for token in output.token_ids] == (
        heard[-1].completion.token_ids
    )
    assert [output.logprobs[0] for output in heard] == heard[-1].completion.logprobs
    assert all(output in steps for output in heard)
    assert engine.load.running == engine.load.waiting == 0
    assert_empty(engine)


def test_outputs_have_no_log_probabilities_unless_they_are_requested(models):
    engine = engine_of(models[None])
    heard = []
    engine.add(request(prompt(40), 3, logprobs=None), heard.append)
    while engine.has_work:
        engine.step()
    assert {output.logprobs for output in heard} == {None}


def test_what_can_never_fit_is_refused(models):
    engine = engine_of(models[None], cache_tokens=500)
    message = r"needs 501 tokens of cache \(400 of prompt, 501 with its completion\).* are 500"
    with pytest.raises(ValueError, match=message):
        engine.add(request(prompt(400), 101))
    assert_empty(engine)
    # With a window a sequence needs no more than a ring, however long it gets.
    ring = engine_of(models[48], cache_tokens=112)
    ring.add(request(prompt(400), 101))
    with pytest.raises(ValueError, match="needs 112 tokens"):
        engine_of(models[48], cache_tokens=111).add(request(prompt(40), 390))


def test_a_pool_that_is_too_small_for_all_serves_all(models):
    """By growth and by putting back: eight requests of up to 1000 tokens share 3000."""
    lengths = (700, 15, 450, 5, 300, 550, 125, 1)
    totals = [1000, 1000, *(n + 20 + 12 * i for i, n in enumerate(lengths[2:], 2))]
    requests = [
        request(prompt(n, n), total - n, seed=n) for n, total in zip(lengths, totals, strict=True)
    ]
    engine = engine_of(models[None], max_batch=8, cache_tokens=3000, prefill_chunk=256)
    together = run(engine, requests)
    assert [content(c) for c in together] == alone(models[None], *requests)


def test_sequences_are_put_back_and_computed_again(models):
    requests = [request(prompt(200, i), 300, seed=i) for i in range(4)]
    engine = engine_of(models[None], cache_tokens=1100)
    assert [content(c) for c in run(engine, requests)] == alone(models[None], *requests)
    assert engine.scheduler.preemptions > 0
    assert_empty(engine)


@pytest.mark.parametrize("window", [None, 48])
def test_a_prompt_that_was_read_is_not_read_again(models, window):
    engine = engine_of(models[window])
    again = request(prompt(300), 20)
    cold, warm = (run(engine, [again])[0] for _ in range(2))
    assert content(warm) == content(cold)
    assert (cold.timing.prompt_tokens, cold.timing.cached_tokens) == (300, 0)
    assert (warm.timing.prompt_tokens, warm.timing.cached_tokens) == (32, 268)


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("common", [40, 47, 48, 100, 290])
def test_a_common_beginning_gives_the_same_bits(models, window, common):
    """Copied from a sequence that is running, or that has ended; past the window too."""
    model = models[window]
    first = request([*prompt(common), *prompt(60, 1)], 30)
    second = request([*prompt(common), *prompt(50, 2)], 30)
    engine = engine_of(model)
    assert [content(c) for c in run(engine, [first, second])] == alone(model, first, second)
    assert content(run(engine, [second])[0]) == alone(model, second)[0]
    assert content(run(engine, [first])[0]) == alone(model, first)[0]
    cached = run(engine, [second])[0].timing.cached_tokens
    assert cached == common + 18
    assert_empty(engine)


def test_a_hit_leaves_others_what_they_have(models):
    """Two conversations with the same system prompt, in turns."""
    model, system = models[None], prompt(100)
    engine = engine_of(model)
    a, b = [*system, *prompt(80, 1)], [*system, *prompt(90, 2)]
    for turn in range(3):
        for ids, beginning in ((a, len(a) if turn else 0), (b, len(b) if turn else len(system))):
            ids += prompt(60, 10 + turn)
            (completion,) = run(engine, [request(ids, 10)])
            assert content(completion) == alone(model, request(ids, 10))[0]
            assert completion.timing.cached_tokens == beginning


def test_generated_tokens_are_reused_where_that_is_wanted(models):
    engine = engine_of(models[None])
    begin = prompt(100)
    (reply,) = run(engine, [request(begin, 50)])
    following = [*begin, *reply.token_ids, *prompt(40, 1)]
    exact = run(engine, [request(following)])[0].timing
    assert exact.cached_tokens == 100
    (reply,) = run(engine, [request(prompt(100, 7), 50)])
    following = [*prompt(100, 7), *reply.token_ids, *prompt(40, 1)]
    timing = run(engine, [request(following, reuse_completions=True)])[0].timing
    assert timing.cached_tokens == 149  # the last token was never read


def test_different_salts_share_nothing(models):
    engine = engine_of(models[None])
    run(engine, [request(prompt(300), salt="a")])
    for salt, cached in (("b", 0), (None, 0), ("a", 268), ("b", 268)):
        (completion,) = run(engine, [request(prompt(300), salt=salt)])
        assert completion.timing.cached_tokens == cached


def test_the_same_prompt_several_times_at_once_is_read_once(models):
    engine = engine_of(models[None], prefill_chunk=64)
    requests = [request(prompt(500), 10, index=i) for i in range(4)]
    completions = run(engine, requests)
    assert [content(c) for c in completions] == alone(models[None], *requests)
    first, *others = [c.timing.cached_tokens for c in completions]
    assert first == 0
    assert min(others) > 468 - 32  # less than a piece is read twice


def test_a_long_prompt_holds_no_stream_up(models):
    """Between two tokens of a stream, no more than a small piece of a prompt is read."""
    engine = engine_of(models[None], prefill_chunk=512)
    engine.add(request(prompt(10), 50))
    engine.step()
    read, pieces = engine.runner.begin, []

    def counts(given):
        pieces.append(sum(len(piece.token_ids) for piece in given))
        return read(given)

    engine.runner.begin = counts
    engine.add(request(prompt(3000), 5))
    for _ in range(45):
        before = len(pieces)
        assert [o.request_id for o in engine.step()] == [0]
        assert len(pieces) == before + 1
    assert max(pieces) <= 63
    while engine.has_work:
        engine.step()
    assert max(pieces) == 512  # when nobody waits any more


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_short_prompt_gets_what_it_gets_alone(isa, quantize):
    """Also where products of few tokens round differently from products of many."""
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, quantize=quantize).model
    requests = [request(prompt(n, n), 3) for n in (40, 6, 12, 20, 31)]
    engine = engine_of(model, max_batch=len(requests))
    completions = [content(completion) for completion in run(engine, requests)]
    assert completions == alone(model, *requests)


@pytest.mark.parametrize("reports", ["prompt_logits", "hidden"])
def test_a_prompt_beside_a_text_with_results_gets_what_it_gets_alone(isa, reports):
    """Though the text needs more tokens of the last layer than products of few tokens take."""
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, quantize="int4").model
    asked = request(prompt(12), 3)
    text = Request(prompt(20, 1), None, max_length=20, **{reports: True})
    for requests in ([asked, text], [text, asked]):
        engine, found = engine_of(model), []
        for r in requests:
            engine.add(r)
        while engine.has_work:
            found += [o.completion for o in engine.step() if o.completion]
        assert [content(completion) for completion in found] == alone(model, asked)


def test_a_short_text_has_the_logits_that_it_has_alone(isa):
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, quantize="int4").model
    lengths = (40, 6, 20)

    def logits(*lengths):
        engine, found = engine_of(model), {}
        for n in lengths:
            engine.add(Request(prompt(n, n), None, max_length=n, prompt_logits=True))
        while engine.has_work:
            for output in engine.step():
                if output.prompt_logits is not None:
                    found[output.request_id] = output.prompt_logits.clone()
        return [found[i] for i in range(len(lengths))]

    together = logits(*lengths)
    for n, found in zip(lengths, together, strict=True):
        assert torch.equal(found, logits(n)[0])


def test_ctrl_c_leaves_the_engine_as_it_was(models, monkeypatch):
    requests = [request(prompt(n, n), 30) for n in (20, 50)]
    for when in range(1, 12, 2):
        engine = engine_of(models[48])
        calls = iter(range(1000))

        def interrupts(step, when=when, calls=calls):
            def interrupted(*args, **options):
                result = step(*args, **options)
                if next(calls) == when:  # its tokens are stored, and nobody knows
                    raise KeyboardInterrupt
                return result

            return interrupted

        with monkeypatch.context() as patch:
            patch.setattr(models[48], "step", interrupts(models[48].step))  # reads prompts
            patch.setattr(engine.runner, "_step", interrupts(engine.runner._step))
            ids = [engine.add(r) for r in requests]
            results = {}
            interruptions = 0
            while engine.has_work:
                try:
                    outputs = engine.step()
                except KeyboardInterrupt:
                    interruptions += 1
                    continue
                for output in outputs:
                    if output.completion:
                        results[output.request_id] = content(output.completion)
        assert interruptions == 1
        assert [results[i] for i in ids] == alone(models[48], *requests)
        assert_empty(engine)


def test_threads_share_an_engine(models):
    engine = engine_of(models[None])
    requests = [request(prompt(10 + i, i), 20, seed=i) for i in range(12)]
    results = {}

    def generate(i):
        for output in engine.outputs([requests[i]]):
            if output.completion:
                results[i] = content(output.completion)

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(requests))] == alone(models[None], *requests)
    assert_empty(engine)


def test_outputs_that_nobody_reads_any_more_end_their_requests(models):
    engine = engine_of(models[None])
    outputs = engine.outputs([request(prompt(10), 50), request(prompt(11), 50)])
    next(outputs)
    del outputs
    gc.collect()
    kept = engine.outputs([request(prompt(12), 5)])
    assert {output.request_id for output in kept} == {2}
    assert_empty(engine)


def test_a_refused_request_takes_the_others_of_its_call_along(models):
    engine = engine_of(models[None], cache_tokens=300)
    with pytest.raises(ValueError, match="tokens of cache"):
        engine.outputs([request(prompt(10)), request(prompt(1000))])
    engine.step()
    assert_empty(engine)


@st.composite
def traffic(draw):
    """Steps; what arrives before each, and which of the earlier requests is aborted."""
    arrival = st.tuples(
        st.sampled_from([1, 7, 20, 33, 80, 200]),  # of the prompt
        st.integers(0, 3),  # which prompt: they share beginnings
        st.integers(1, 40),  # tokens
        st.sampled_from([None, "a"]),  # salt
    )
    steps = st.lists(
        st.tuples(st.lists(arrival, max_size=3), st.none() | st.integers(0, 10)), max_size=12
    )
    return draw(st.sampled_from([None, 48])), draw(st.integers(256, 700)), draw(steps)


@settings(max_examples=60)
@given(traffic=traffic())
def test_any_traffic(models, traffic):
    """Random arrivals, lengths and aborts, in little memory: each gets what it gets alone."""
    window, slots, steps = traffic
    model = models[window]
    engine = engine_of(model, cache_tokens=slots, prefill_chunk=64)
    requests, results, aborted = {}, {}, set()

    def take(outputs):
        for output in outputs:
            assert output.request_id not in aborted
            if output.is_last:
                results[output.request_id] = content(output.completion)

    for arrivals, victim in steps:
        for length, which, tokens, salt in arrivals:
            ids = [*prompt(min(length, 60)), *prompt(max(0, length - 60), which)]
            new = request(ids, tokens, seed=which, salt=salt)
            requests[engine.add(new)] = new
        if victim in requests and victim not in results:
            engine.abort(victim)
            aborted.add(victim)
        take(engine.step())
    while engine.has_work:
        take(engine.step())
    assert set(results) == set(requests) - aborted
    for request_id, result in results.items():
        assert result == expected(model, requests[request_id])
    assert_empty(engine)


_alone: dict = {}


def expected(model, of: Request):
    key = model, tuple(of.prompt_ids), of.params.max_tokens, of.params.seed
    if key not in _alone:
        (_alone[key],) = alone(model, of)
    return _alone[key]


def test_thousands_of_arrivals_and_aborts_leave_nothing_behind(models):
    model, chance = models[48], random.Random(1)
    engine = engine_of(model, cache_tokens=1000, prefill_chunk=64)
    kinds = [request(prompt(n, n), tokens, seed=n) for n in (3, 9, 40, 100) for tokens in (1, 4)]
    running, arrived, objects = {}, 0, []
    while arrived < 3000 or engine.has_work:
        while arrived < 3000 and len(running) < 12:
            kind = chance.choice(kinds)
            running[engine.add(kind)] = kind
            arrived += 1
        if chance.random() < 0.3 and running:
            victim = chance.choice(list(running))
            engine.abort(victim)
            del running[victim]
        for output in engine.step():
            if output.is_last:
                kind = running.pop(output.request_id)
                assert content(output.completion) == expected(model, kind)
        if arrived in (1000, 3000):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert_empty(engine)
    assert objects[-1] < objects[0] + 300


def logits_of(engine, requests) -> list[torch.Tensor]:
    """The logits that requests without a completion get."""
    ids = [engine.add(r) for r in requests]
    results = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if output.prompt_logits is not None:
                results[output.request_id].append(output.prompt_logits)
    return [torch.cat(results[i]) for i in ids]


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("chunk", [64, 512])
def test_logits_of_the_end_of_a_prompt_take_its_beginning_from_the_cache(models, window, chunk):
    """Each of four prompts of 300 tokens has an end of its own, of 7, 8, 40 and 0 tokens."""
    context, counts = prompt(300), (7, 8, 40, 0)
    prompts = [[*context, *prompt(count, 1 + count)] for count in counts]
    given = {"params": None, "max_length": 340, "prompt_logits": True}
    whole = [logits_of(engine_of(models[window]), [Request(p, **given)])[0] for p in prompts]
    engine, tokens = engine_of(models[window], prefill_chunk=chunk), []
    read = engine.runner.begin
    engine.runner.begin = lambda pieces: (
        tokens.extend(len(p.token_ids) for p in pieces) or read(pieces)
    )
    ends = logits_of(engine, [Request(p, logits_from=299, **given) for p in prompts])
    for end, all_of_it, count in zip(ends, whole, counts, strict=True):
        assert end.shape == (count + 1, VOCABULARY)
        torch.testing.assert_close(end, all_of_it[299:], rtol=0, atol=2e-2)  # gemv and gemm round
    # With small chunks, less than a piece is read twice.
    assert sum(tokens) <= 307 + 32 + 41 + 32 + (3 * 32 if chunk == 64 else 0)
    assert_empty(engine)
    # A request for all logits leaves nothing and takes nothing.
    logits_of(engine, [Request(prompts[0], **given)] * 2)
    assert not engine.scheduler.prefixes.drop_oldest()


@pytest.mark.parametrize("kind", ["prompt_logits", "hidden"])
@pytest.mark.parametrize("first", [0, 100])
def test_what_is_put_back_reports_each_token_once(models, kind, first):
    """A completion, whose extent has to grow, takes the memory of a prompt that is half read."""
    asked = Request(prompt(600), None, 600, logits_from=first, **{kind: True})

    def report(engine):
        request_id, parts = engine.add(asked), []
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                if output.request_id == request_id and getattr(output, kind) is not None:
                    parts.append(getattr(output, kind))
        return torch.cat(parts)

    engine = engine_of(models[None], cache_tokens=1024)
    engine.add(request(prompt(240, 1), 60))
    engine.step()
    found = report(engine)
    assert engine.scheduler.preemptions == 1
    expected = report(engine_of(models[None]))
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    assert_empty(engine)
