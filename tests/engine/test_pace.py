"""Passes over prompts that pause between layers, and how long they may be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_engine import alone, assert_empty, content, engine_of, prompt, request, run

from mistral_ext.engine.pace import Pace
from mistral_ext.engine.prompt_reader import PromptReader
from mistral_ext.engine.runner import Reading, Runner


@pytest.fixture
def hurried(unhurried, monkeypatch):
    """Passes pause after each layer while other sequences generate."""
    monkeypatch.setattr(Pace, "layers", lambda pace: 1)


def started(engine, tokens=200):
    """Adds a request that generates."""
    request_id = engine.add(request(prompt(10), tokens))
    engine.step()
    assert engine.scheduler.decoding
    return request_id


def rest(engine, results=None):
    """The completions of all requests, with their ids."""
    results = {} if results is None else results
    while engine.has_work:
        for output in engine.step():
            assert not output.error
            if output.completion:
                results[output.request_id] = content(output.completion)
    return results


@pytest.mark.parametrize("window", [None, 48])
def test_pauses_change_no_bit(models, window, hurried):
    requests = [request(prompt(n, n), 40, seed=n) for n in (1, 5, 8, 9, 31, 32, 33, 70, 200)]
    engine = engine_of(models[window])
    assert [content(c) for c in run(engine, requests)] == alone(models[window], *requests)
    assert_empty(engine)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_passes_pause_only_where_their_time_can_be_measured(device):
    model = SimpleNamespace(device=torch.device(device))
    assert Runner(model, None, None).pauses == (device == "cpu")


@pytest.mark.parametrize("window", [None, 48])
def test_a_stream_goes_on_between_two_layers(models, window, hurried):
    engine = engine_of(models[window])
    stream = started(engine)
    long = engine.add(request(prompt(100), 5))
    layers = len(models[window].layers)
    assert layers > 1
    for passed in range(1, 3 * layers):  # 100 tokens take three passes
        (output,) = engine.step()
        assert output.request_id == stream
        assert bool(engine._reader.paused) == (passed % layers > 0)
    assert {output.request_id for output in engine.step()} == {stream, long}


def test_many_waiting_prompts_share_a_pass_beside_a_stream(models, hurried):
    engine = engine_of(models[None], max_batch=8)
    started(engine)
    requests = [request(prompt(40, n), 5) for n in range(5)]
    for sent in requests:
        engine.add(sent)
    engine.step()
    assert len(engine._reader.paused) == 3  # 4 times 32 tokens, by 40
    while engine._reader.paused:
        engine.step()
    assert len(engine.scheduler.decoding) == 4
    engine.step()
    assert len(engine._reader.paused) == 1  # 2 prompts wait for 4 streams: 32 tokens


def test_sequences_without_a_row_do_not_count_as_waiting(models, hurried):
    engine = engine_of(models[None], max_batch=2)
    started(engine)
    for n in range(9):
        engine.add(request(prompt(40, n), 5))
    engine.step()
    assert engine.scheduler.busy_chunk == 32  # a prompt and a stream have the two rows


def test_a_pass_that_paused_ends_at_once_if_nobody_generates(models, hurried):
    engine = engine_of(models[None])
    stream = started(engine)
    engine.add(request(prompt(30), 5))
    engine.step()
    assert engine._reader.paused
    engine.abort(stream)
    (output,) = engine.step()[:1]
    assert output.token_ids
    assert not engine._reader.paused
    rest(engine)
    assert_empty(engine)


def test_abort_of_a_prompt_that_paused_frees_its_memory_at_the_next_step(models, hurried):
    engine = engine_of(models[None])
    started(engine, 20)
    victim = engine.add(request(prompt(200), 5))
    engine.step()
    assert engine._reader.paused
    sequence = engine._sequences[victim]
    engine.abort(victim)
    engine.step()
    assert sequence.extent is None
    assert not engine._reader.paused
    rest(engine)
    assert_empty(engine)


@pytest.mark.parametrize("window", [None, 48])
def test_abort_of_a_prompt_leaves_the_others_of_its_pass(models, window, hurried):
    """The pass ends before the memory is given to a request that waits."""
    engine = engine_of(models[window], prefill_chunk=256)
    engine.scheduler.busy_chunk = 256
    engine._reader.pace.tokens = 256
    kept = request(prompt(60, 1), 20)
    started(engine, 20)
    victim, other = engine.add(request(prompt(50, 2), 20)), engine.add(kept)
    engine.step()
    assert len(engine._reader.paused) == 2
    sequence = engine._sequences[victim]
    engine.abort(victim)
    late = request(prompt(70, 3), 20)
    late_id = engine.add(late)
    engine.step()
    engine.step()
    assert sequence.extent is None
    results = rest(engine)
    assert [results[other], results[late_id]] == alone(models[window], kept, late)
    assert_empty(engine)


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("common", [40, 90, 200])
def test_a_prompt_that_paused_lends_its_beginning(models, window, common, hurried):
    """A pass that has paused may have replaced the keys of early tokens in some layers."""
    engine = engine_of(models[window])
    first = request([*prompt(common), *prompt(120, 1)], 20)
    second = request([*prompt(common), *prompt(50, 2)], 20)
    started(engine)
    ids = [engine.add(first)]
    for _ in range(7):
        engine.step()
    ids.append(engine.add(second))
    results = rest(engine)
    assert [results[i] for i in ids] == alone(models[window], first, second)
    assert_empty(engine)


def test_a_prompt_that_paused_is_put_back(models, hurried, monkeypatch):
    """A stream grows into the memory of a prompt that is being read, in some step of its pass."""
    requests = [request(prompt(200, 1), 300, seed=1), request(prompt(500, 2), 20, seed=2)]
    expected, lost = alone(models[None], *requests), []
    check = PromptReader.forget_if_lost

    def noted(reader):
        paused = reader.paused
        check(reader)
        lost.extend(paused if not reader.paused else [])

    monkeypatch.setattr(PromptReader, "forget_if_lost", noted)
    for begin in (250, 251):
        engine = engine_of(models[None], cache_tokens=800)
        first = engine.add(requests[0])
        while len(engine._sequences[first].ids) < begin:
            engine.step()
        second = engine.add(requests[1])
        results = rest(engine)
        assert engine.scheduler.preemptions > 0
        assert [results[i] for i in (first, second)] == expected
        assert_empty(engine)
    assert lost


def test_ctrl_c_in_a_pass_that_paused(models, hurried, monkeypatch):
    engine = engine_of(models[48])
    requests = [request(prompt(10), 30), request(prompt(200), 10)]
    ids = [engine.add(requests[0])]
    engine.step()
    ids.append(engine.add(requests[1]))
    engine.step()
    advance, interrupted = Reading.advance, []

    def interrupt(*args):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(Reading, "advance", interrupt)
    results = {}
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not engine._reader.paused
    assert [rest(engine, results)[i] for i in ids] == alone(models[48], *requests)
    assert_empty(engine)


class TestPace:
    """Of a model of 8 layers; a decode step takes one second."""

    @pytest.fixture
    def pace(self, monkeypatch):
        monkeypatch.undo()  # of `unhurried`
        pace = Pace(8, 32, 512)
        pace.note_step(1.0)
        return pace

    def read(self, pace, tokens, seconds):
        """A pass over tokens, whose layers take so many seconds each; the layers of its parts."""
        pace.begin(tokens)
        parts, left = [], 8
        while left:
            parts.append(min(pace.layers(), left))
            pace.note_read(parts[-1], seconds * parts[-1])
            left -= parts[-1]
        pace.end()
        return parts

    def test_parts_take_as_long_as_a_step(self, pace):
        assert self.read(pace, 32, 0.4) == [1, 2, 2, 2, 1]
        assert self.read(pace, 32, 0.4) == [2, 2, 2, 2]
        assert pace.tokens == 32

    def test_passes_grow_while_their_layers_take_little(self, pace):
        sizes = []
        for _ in range(6):
            sizes.append(pace.tokens)
            self.read(pace, pace.tokens, pace.tokens / 2500)
        assert sizes == [32, 64, 128, 256, 512, 512]

    def test_a_short_pass_says_nothing_about_longer_ones(self, pace):
        pace.tokens = 64
        self.read(pace, 40, 0.001)
        assert pace.tokens == 64

    def test_passes_shrink_when_a_layer_takes_too_long(self, pace):
        pace.tokens = 128
        for expected in (64, 32, 32):
            assert self.read(pace, pace.tokens, 2.0)[-1] == 1
            assert pace.tokens == expected

    def test_a_longer_pass_begins_with_fewer_layers(self, pace):
        self.read(pace, 32, 0.1)
        assert self.read(pace, 320, 0.2)[0] == 1

    def test_prompts_get_more_time_if_more_sequences_wait_than_generate(self, pace):
        pace.note_step(1.0)
        sizes = {(1, 1): 32, (2, 4): 32, (3, 2): 32, (3, 1): 96, (4, 1): 128, (100, 1): 128}
        for numbers, tokens in sizes.items():
            pace.divide(*numbers)
            assert pace.most_tokens == tokens
        assert self.read(pace, 128, 1.0) == [1, 4, 3]
        pace.divide(1, 1)
        assert self.read(pace, 32, 0.4)[-2:] == [2, 1]

    def test_a_pass_has_no_more_tokens_than_the_engine_allows(self, pace):
        pace.tokens = 256
        pace.divide(3, 1)
        assert pace.most_tokens == 512

    def test_passes_grow_with_the_time_that_prompts_get(self, pace):
        pace.divide(4, 1)
        assert self.read(pace, 128, 1.0)
        assert pace.tokens == 64  # four layers of 128 tokens fitted into a part
        assert self.read(pace, 256, 2.0)
        assert pace.tokens == 64

    def test_parts_get_shorter_at_once_if_sequences_wait_no_more(self, pace):
        pace.divide(4, 1)
        pace.begin(128)
        pace.note_read(1, 0.5)
        assert pace.layers() == 8
        pace.divide(1, 1)
        assert pace.layers() == 2
        pace.end()
        assert pace.tokens == 64  # as was planned when the pass began

    def test_a_step_that_was_held_up_counts_little(self, pace):
        pace.note_step(100.0)
        assert self.read(pace, 32, 0.35)[1] == 3
