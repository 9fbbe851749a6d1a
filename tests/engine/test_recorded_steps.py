"""Decode steps that are recorded once: every completion is what Python's own steps give."""

from __future__ import annotations

import pytest
import torch
from drafting import (
    VOCABULARY,
    WINDOW,
    Oracle,
    content,
    engine_of,
    of_every_kind,
    plainly,
    request,
    run,
)
from drafting import prompt as prompt_of

from mistral_ext import Mistral, SamplingParams, ops
from mistral_ext.engine.recorded_steps import RecordedSteps
from mistral_ext.engine.runner import Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.ops.recording import Recording
from mistral_ext.weights.quantize import quantize


@pytest.fixture
def repeated(monkeypatch):
    """The recordings of the steps that are repeated."""
    runs = []
    run_recording = Recording.run

    def counted(recording):
        runs.append(recording)
        run_recording(recording)

    monkeypatch.setattr(Recording, "run", counted)
    return runs


def python_engine(model, monkeypatch):
    """An engine whose steps Python makes."""
    with monkeypatch.context() as changed:
        changed.setenv("MISTRAL_EXT_GRAPHS", "0")
        return engine_of(model)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_nothing_else_changes(models, window, repeated, monkeypatch):
    """With every option, in batches and with drafts, beyond where rings wrap and extents move."""
    requests = of_every_kind(3)
    expected, known = plainly(lambda: python_engine(models[window], monkeypatch), requests)
    assert not repeated
    engine = engine_of(models[window])
    engine.passes.drafter = Oracle(known, 0.8, idle=0.5)
    assert [content(c) for c in run(engine, requests)] == [content(c) for c in expected]
    assert len(set(map(id, repeated))) > 4, "each number of tokens has a recording"
    assert len(repeated) > 50


def test_a_change_of_kernels_makes_a_new_recording(models, repeated, monkeypatch):
    model, isa = models[None], ops.active_isa()
    other = next((name for name in ops.supported_isas() if name != isa), None)
    if other is None:
        pytest.skip("this processor runs the scalar kernels alone")
    engine, python = engine_of(model), python_engine(model, monkeypatch)
    requests = [request(prompt_of(5, 5), 6, temperature=1.0)]
    try:
        for chosen in (isa, other, isa):
            ops.select_isa(chosen)
            got, expected = run(engine, requests), run(python, requests)
            assert [content(c) for c in got] == [content(c) for c in expected]
    finally:
        ops.select_isa(isa)
    assert len(set(map(id, repeated))) == 3


def test_weights_with_an_order_are_not_recorded(repeated):
    """Torch brings their inputs into that order."""
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).model
    requests = [request(prompt_of(9, 9), 8, temperature=0.0)]
    for layer in model.layers:
        layer.wo = quantize(layer.wo, "int8")
    engine = engine_of(model)
    expected = run(engine, requests)
    assert repeated
    repeated.clear()
    for layer in model.layers:
        order = torch.randperm(layer.wo.shape[1])
        layer.wo = layer.wo._replace(values=layer.wo.values[:, order].contiguous(), order=order)
    got = run(engine, requests)
    assert not repeated
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]


@pytest.mark.parametrize("form", [None, "q8_0", "int4"])
def test_other_embeddings_make_a_new_recording(form, repeated):
    model = Mistral.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).model
    pool = SlotPool(model.config, 16, model.dtype)
    steps, table = RecordedSteps(model, pool), pool.table({pool.allocate(1, 16): 1})
    for _ in range(2):
        weight = torch.randn(model.embeddings.shape).bfloat16()
        model.embeddings = weight if form is None else quantize(weight.float(), form)
        for token in (3, 7):
            token_ids = torch.tensor([token])
            h = steps.run(token_ids, table, None)[0].clone()
            assert torch.equal(h, model.step(token_ids, table, pool, max_count=1))
    assert len(set(map(id, repeated))) == 2
    with pytest.raises(ValueError, match=r"token_ids\[0\] is -1, expected 0 to"):
        steps.run(torch.tensor([-1]), table, None)
    h = steps.run(token_ids, table, None)[0]
    assert torch.equal(h, model.step(token_ids, table, pool, max_count=1))


@pytest.mark.parametrize("has_drafts", [False, True])
def test_a_step_that_is_recorded_does_not_say_what_others_cost(models, has_drafts):
    model = models[None]
    pool, sampler = SlotPool(model.config, 16, model.dtype), Sampler(1, VOCABULARY)
    extent, runner = pool.allocate(16, 16), Runner(model, pool, sampler)
    for temperature in (0.0, 1.0):
        sampler.start(0, SamplingParams(temperature=temperature), [1])
        are_usual = []
        for _ in range(3):
            if has_drafts:
                step = runner.verify([extent], [0], [[5, 6]], [-1])
            else:
                step = runner.launch([extent], [0], [5])
            are_usual.append(step.is_usual)
        assert are_usual == [temperature == 1.0, True, True]


@pytest.mark.parametrize("tokens", [8, 9])
def test_steps_of_up_to_8_tokens_are_recorded(models, repeated, tokens):
    model = models[None]
    pool = SlotPool(model.config, 16 * tokens, model.dtype)
    steps = RecordedSteps(model, pool)
    table = pool.table(dict.fromkeys([pool.allocate(1, 16) for _ in range(tokens)], 1))
    token_ids = torch.arange(3, 3 + tokens)
    results, are_usual = [], []
    for _ in range(2):
        h, is_usual = steps.run(token_ids, table, None)
        results.append(h.clone())
        are_usual.append(is_usual)
    assert are_usual == [tokens > 8, True]
    assert len(repeated) == (tokens == 8)
    expected = model.step(token_ids, table, pool, max_count=1)
    assert torch.equal(results[0], expected)
    assert torch.equal(results[1], expected)
