"""Drafts where decode steps are launched ahead: passes with drafts are captured as steps are.

Graphs are stood in for: what was captured is run again by Python, on the CPU or in the emulator.
"""

from __future__ import annotations

import pytest
import torch
from backends import use
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
from replays import Replays

from mistral_ext import SamplingParams
from mistral_ext.engine import engine as engine_module
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.pass_costs import PassCosts
from mistral_ext.engine.proposer import Proposer
from mistral_ext.engine.runner import Piece, Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool


@pytest.fixture
def graphs(monkeypatch):
    """Has new engines launch steps ahead."""
    device = Replays()
    monkeypatch.setattr(engine_module, "make_runner", lambda *args: GraphRunner(*args, device))
    return device


def in_time(model, requests, monkeypatch):
    """`plainly`, of an engine that launches nothing ahead."""
    with monkeypatch.context() as undone:
        undone.setattr(engine_module, "make_runner", Runner)
        return plainly(lambda: engine_of(model), requests)


def launches_of(engine):
    """Whether each step from now on is launched ahead."""
    launch, ahead = engine.runner.launch, []

    def counted(extents, rows, token_ids, adapters):
        ahead.append(token_ids is None)
        return launch(extents, rows, token_ids, adapters)

    engine.runner.launch = counted
    return ahead


@pytest.mark.parametrize("window", [None, WINDOW])
def test_nothing_else_changes(models, graphs, monkeypatch, window):
    """With every option, in batches, and between steps that are launched ahead."""
    requests = of_every_kind(1)
    plain, known = in_time(models[window], requests, monkeypatch)
    engine = engine_of(models[window])
    engine.passes.drafter = Oracle(known, idle=0.6)
    ahead = launches_of(engine)
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in plain]
    assert engine.passes.drafter.passes > 20
    assert sum(ahead) > 10
    assert_empty(engine)


def test_each_number_of_tokens_is_captured_once(models):
    """And for greedy sequences, it is the step of as many sequences."""
    device, pool = Replays(), SlotPool(models[None].config, 512, torch.bfloat16)
    extents = [pool.allocate(16, 16) for _ in range(3)]
    sampler = Sampler(3, 131)
    for row, temperature in enumerate((0.0, 0.0, 1.0)):
        sampler.start(row, SamplingParams(temperature=temperature), [1])
    runner = GraphRunner(models[None], pool, sampler, device)

    def verify(*counts):
        rows = range(len(counts))
        runner.verify(extents[: len(rows)], rows, [[5] * n for n in counts], [-1] * len(rows))

    for counts in ((3,), (3,), (1, 2), (2, 1)):
        verify(*counts)
    assert device.captures == 1
    verify(1, 3)
    verify(4)
    assert device.captures == 2
    for counts in ((1, 1, 1), (1, 1, 2), (2, 1, 1)):  # the third one draws
        verify(*counts)
    assert device.captures == 3
    for row in range(3):
        sampler.start(row, SamplingParams(), [1])
    runner.launch(extents, range(3), [5] * 3)
    assert device.captures == 3


def test_each_draft_has_the_adapter_of_its_sequence(tmp_path, graphs):
    check_adapters(tmp_path)


AGAIN = [20, 21, 22, 23, 24, 25, 26, 27, 28, 20, 21]


@pytest.fixture
def eager(monkeypatch):
    """Passes cost the same whatever their rows."""
    monkeypatch.setattr(PassCosts, "seconds", lambda self, rows: 1.0)


def repeating(**options):
    return request(AGAIN, 60, temperature=0.0, logit_bias=dict.fromkeys(AGAIN, 100.0), **options)


def test_what_is_under_way_is_waited_for_where_the_text_repeats_itself(
    models, graphs, eager, monkeypatch
):
    plain, _ = in_time(models[None], [repeating()], monkeypatch)
    engine = engine_of(models[None])
    ahead = launches_of(engine)
    (drafted,) = run(engine, [repeating()])
    assert content(drafted) == content(plain[0])
    assert drafted.timing.accepted_tokens > 10
    (none,) = run(engine, [repeating(drafts=0)])
    assert none.timing.drafted_tokens == 0
    assert sum(ahead) >= 58  # of those without drafts, all but the first


def test_nothing_waits_for_a_draft_model_that_cannot_guess(models, graphs, eager, monkeypatch):
    """It has no room, or has not read the prompt; it reads on while steps are launched ahead."""
    monkeypatch.setattr(ModelGuesses, "_seconds", lambda self, rows: 0.01)
    monkeypatch.setattr(Proposer, "_repeated", lambda self, most: [])
    engine = engine_of(models[None], draft_model=models[None])
    pool, ahead = engine.passes.drafter._model._model.pool, launches_of(engine)
    taken = pool.allocate(pool.slots, pool.slots)
    run(engine, [request(prompt(40), 30)])
    assert sum(ahead) == 28  # all but the first
    pool.release(taken)
    ahead.clear()
    (completion,) = run(engine, [request(prompt(320), 60)])
    assert sum(ahead) >= 9  # while the prompt is read
    assert completion.timing.accepted_tokens > 30


def test_a_wait_counts_against_guesses():
    """The sequence loses what the GPU could have done meanwhile, and learns from the guess."""
    shares = []
    for token_id in (3, 9):
        ids = [1, 2, 3, 4, 1, 2]
        proposer = Proposer(ids)
        ((guess, before), _) = proposer.propose(2, None)
        assert guess == 3
        ids.append(token_id)
        proposer.note_wait()
        assert proposer.gain == -0.1
        ids += [1, 2]
        ((_, after),) = proposer.propose(1, None)
        shares.append(after - before)
    assert shares[1] < 0 < shares[0]


def test_only_replays_say_what_a_pass_costs(models, graphs):
    """Not a pass that loads kernels or captures them, and not one that nobody waits for."""
    engine = engine_of(models[None])
    noted = []
    engine.passes.drafter.note = lambda plain, seconds, *rest: noted.append(seconds is not None)
    run(engine, [request(prompt(9), 8)])
    assert noted == [False, False, *[True] * 5]


def test_rows_that_share_a_ring_in_the_emulator(models, emulator):
    """Through all kernels of a step, in a ring that has wrapped: tokens of which each is read in a
    pass of its own have the same logits, to the bit if their keys are divided alike."""
    model, emulated = models[WINDOW], prompt(WINDOW + 70, 1)
    emulator.configure(multiprocessors=1)
    sampler = Sampler(1, 131)
    sampler.start(0, SamplingParams(), emulated)

    def read(*counts):
        """The logits of the last tokens, in passes of so many, and the kernels of each pass."""
        pool = SlotPool(model.config, 112, torch.bfloat16)
        for slots in (*pool.k, *pool.v):
            slots.fill_(float("nan"))
        extent, runner = pool.allocate(112, 112), GraphRunner(model, pool, sampler, Replays())
        begin = len(emulated) - sum(counts)
        runner.read([Piece(extent, emulated[:begin], 0)])
        pool.advance(extent, begin)
        logits, launches = [], []
        for count in counts:
            emulator.take_launches()
            step = runner.verify([extent], [0], [emulated[begin : begin + count]], [-1])
            launches.append([launch["kernel"] for launch in emulator.take_launches()])
            logits.append(step.logits.clone())
            assert step.largest == step.logits.argmax(1).tolist()
            pool.advance(extent, count)
            begin += count
        return torch.cat(logits), launches

    with use(emulator):
        apart, of_one = read(*[1] * 5)
        together, of_five = read(5)
    assert torch.equal(together, apart)
    assert of_five == of_one[:1]
