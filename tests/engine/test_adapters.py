"""Adapters in the engine: mixed batches, caches, and changes while requests run."""

from __future__ import annotations

import threading

import pytest
import torch
from adapters import write_peft
from checkpoints import write_checkpoint
from replays import Replays

import mistral_ext.engine.engine as engine_module
from mistral_ext import Mistral
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.params import SamplingParams
from mistral_ext.ops import LowRank
from mistral_ext.weights.adapters import read_adapter

GENERATOR = torch.Generator().manual_seed(7)
PROMPTS = [torch.randint(3, 131, (n,), generator=GENERATOR).tolist() for n in (5, 40, 3, 70, 9)]
NAMES = ["a", None, "b", "a", None]
OPTIONS = {"max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, intermediate_size=256)
    for name, settings in {"a": {}, "b": {"r": 9, "target_modules": ["v_proj", "up_proj"]}}.items():
        write_peft(
            write_checkpoint(folder / "base", intermediate_size=256),
            folder / name,
            seed=ord(name),
            **settings,
        )
    return folder


def load(folder, dtype=torch.bfloat16, names="ab", **options):
    given = {name: folder / name for name in names}
    return Mistral.from_pretrained(folder, dtype=dtype, adapters=given, **options)


def ids_of(completions):
    return [completion.token_ids for completion in completions]


@pytest.fixture(scope="module")
def alone(folder):
    """Each prompt by itself, those without an adapter in a model that has none."""
    completions = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        llm = load(folder, names=name or "")
        completions += ids_of(llm.generate([prompt], adapter=name, **OPTIONS))
    return completions


def test_adapters_change_the_text(folder, alone):
    without = ids_of(load(folder).generate(PROMPTS, **OPTIONS))
    same = [x == y for x, y in zip(without, alone, strict=True)]
    assert same == [name is None for name in NAMES]


@pytest.mark.parametrize("max_batch", [8, 2])
def test_a_mixed_batch_is_each_alone(folder, alone, max_batch):
    llm = load(folder, max_batch=max_batch)
    assert ids_of(llm.generate(PROMPTS, adapter=NAMES, **OPTIONS)) == alone


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_a_mixed_pass_has_the_bits_of_each_alone(folder, tokens, quantize):
    """Over weights of any format, with few tokens and with many. Without an adapter the bits are
    those of a pass in which no token has one."""
    llm = load(folder, quantize=quantize)
    pool, ids = llm.engine.pool, torch.tensor(PROMPTS[3][:tokens])
    slots = [-1, *(llm.adapters.find(name).slot for name in "ab")]

    def run(slots):
        extents = [pool.allocate(tokens, 128) for _ in slots]
        table = pool.append(dict.fromkeys(extents, tokens))
        adapters = torch.tensor(slots, dtype=torch.int32).repeat_interleave(tokens)
        given = adapters if max(slots) >= 0 else None
        h = llm.model.step(ids.repeat(len(slots)), table, pool, tokens, adapters=given)
        for extent in extents:
            pool.release(extent)
        return h.split(tokens)

    mixed, alone = run(slots), [run([slot])[0] for slot in slots]
    assert all(map(torch.equal, mixed, alone))
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])


def test_captured_graphs_serve_any_adapter(folder, alone, monkeypatch):
    """Also after stacks were replaced, whose memory an old graph would read."""
    monkeypatch.setattr(engine_module, "make_runner", lambda *given: GraphRunner(*given, Replays()))
    llm = load(folder, names="a")
    first = llm.generate(
        PROMPTS, adapter=["a" if name == "a" else None for name in NAMES], **OPTIONS
    )
    assert ids_of(first)[0] == alone[0]
    llm.load_adapter(folder / "b", "b")
    assert ids_of(llm.generate(PROMPTS, adapter=NAMES, **OPTIONS)) == alone
    assert ids_of(llm.generate(PROMPTS, adapter=NAMES, **OPTIONS)) == alone


def test_a_cached_prefix_belongs_to_its_adapter(folder):
    llm = load(folder)
    cached = []
    for name in (None, "a", None, "a", "b"):
        (completion,) = llm.generate([PROMPTS[3]], adapter=name, **OPTIONS)
        cached.append(completion.timing.cached_tokens > 0)
    assert cached == [False, False, True, True, False]


def test_another_adapter_of_the_same_name_finds_no_prefix_of_the_first(folder):
    llm = load(folder, names="a")
    llm.generate([PROMPTS[3]], adapter="a", **OPTIONS)
    llm.unload_adapter("a")
    llm.load_adapter(folder / "b", "a")
    (completion,) = llm.generate([PROMPTS[3]], adapter="a", **OPTIONS)
    assert completion.timing.cached_tokens == 0
    expected = load(folder).generate([PROMPTS[3]], adapter="b", **OPTIONS)
    assert completion.token_ids == expected[0].token_ids


def test_a_removed_adapter_serves_its_requests_to_the_end(folder, alone):
    llm = load(folder, names="a")
    engine = llm.engine
    params = SamplingParams(**OPTIONS)
    outputs = engine.outputs([llm.request(PROMPTS[0], params, adapter="a")])
    next(outputs)
    llm.unload_adapter("a")
    llm.load_adapter(folder / "b", "b")  # must not take the slot
    assert [o.completion.token_ids for o in outputs if o.completion] == [alone[0]]
    with pytest.raises(ValueError, match="adapter is 'a', expected one of b"):
        llm.generate([PROMPTS[0]], adapter="a")
    assert ids_of(llm.generate([PROMPTS[2]], adapter="b", **OPTIONS)) == [alone[2]]


def test_a_request_whose_adapter_was_removed_before_it_came_is_refused(folder):
    llm = load(folder, names="a")
    request = llm.request(PROMPTS[0], SamplingParams(), adapter="a")
    llm.unload_adapter("a")
    with pytest.raises(ValueError, match="adapter 'a' was removed"):
        llm.engine.add(request)


def test_adapters_come_and_go_while_another_thread_steps(folder, alone):
    llm = load(folder, names="a")
    engine, stop = llm.engine, threading.Event()

    def work():
        while not stop.is_set():
            assert ids_of(llm.generate([PROMPTS[0]], adapter="a", **OPTIONS)) == [alone[0]]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            llm.load_adapter(folder / "b", "b")
            assert ids_of(llm.generate([PROMPTS[2]], adapter="b", **OPTIONS)) == [alone[2]]
            llm.unload_adapter("b")
    finally:
        stop.set()
        thread.join()
    assert not engine.has_work


def test_memory_is_free_when_an_adapter_goes(folder, alone):
    llm = load(folder, names="b")
    nbytes, generation = llm.model.adapters.nbytes, llm.model.adapters.generation
    llm.load_adapter(folder / "a", "a")
    llm.unload_adapter("b")  # "a" takes its slot
    assert ids_of(llm.generate([PROMPTS[0]], adapter="a", **OPTIONS)) == [alone[0]]
    llm.load_adapter(folder / "b", "b")
    llm.unload_adapter("a")
    assert llm.model.adapters.nbytes == nbytes
    assert llm.model.adapters.generation > generation
    assert ids_of(llm.generate([PROMPTS[2]], adapter="b", **OPTIONS)) == [alone[2]]
    llm.unload_adapter("b")
    assert llm.model.adapters.nbytes == 0
    assert llm.model.nbytes == load(folder, names="").model.nbytes


@pytest.mark.parametrize("ends", [True, False])
def test_memory_is_free_after_the_last_request_of_a_removed_adapter(folder, alone, ends):
    llm = load(folder, names="ab")
    outputs = llm.engine.outputs([llm.request(PROMPTS[0], SamplingParams(**OPTIONS), adapter="a")])
    next(outputs)
    llm.unload_adapter("a")
    both = llm.model.adapters.nbytes
    if ends:
        assert [o.completion.token_ids for o in outputs if o.completion] == [alone[0]]
    else:
        outputs.close()
        llm.engine.step()
    assert llm.model.adapters.nbytes < both
    assert ids_of(llm.generate([PROMPTS[2]], adapter="b", **OPTIONS)) == [alone[2]]
    llm.unload_adapter("b")
    assert llm.model.adapters.nbytes == 0


@pytest.mark.parametrize("remaining", ["b", ""])
def test_memory_is_free_after_the_last_request_of_an_adapter_in_a_later_slot(folder, remaining):
    llm = load(folder, names="ab")
    outputs = llm.engine.outputs([llm.request(PROMPTS[2], SamplingParams(**OPTIONS), adapter="b")])
    next(outputs)
    llm.unload_adapter("a")
    if not remaining:
        llm.unload_adapter("b")
    list(outputs)
    assert llm.model.adapters.nbytes == load(folder, names=remaining).model.adapters.nbytes


def unload_with_failing_memory(folder, monkeypatch, problem):
    """Removes the adapter of a request that runs; freeing the memory after its end will raise."""
    llm = load(folder, names="a")
    outputs = llm.engine.outputs([llm.request(PROMPTS[0], SamplingParams(**OPTIONS), adapter="a")])
    next(outputs)
    llm.unload_adapter("a")

    def fail(slots):
        raise problem

    monkeypatch.setattr(llm.model.adapters, "shrink", fail)
    return llm, outputs


def test_memory_that_cannot_be_freed_is_logged_and_freed_later(folder, monkeypatch, caplog):
    llm, outputs = unload_with_failing_memory(folder, monkeypatch, MemoryError("none left"))
    assert list(outputs)[-1].completion
    assert "was not freed" in caplog.text
    assert "none left" in caplog.text
    monkeypatch.undo()
    llm.load_adapter(folder / "b", "b")
    llm.unload_adapter("b")
    assert llm.model.adapters.nbytes == 0


def test_steps_go_on_after_an_interruption_between_them(folder, alone, monkeypatch):
    llm, outputs = unload_with_failing_memory(folder, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(outputs)
    assert [o.completion.token_ids for o in outputs if o.completion] == [alone[0]]

    def interrupt():
        raise KeyboardInterrupt

    llm.engine._between.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.between_steps(lambda: None)
    assert llm.generate([PROMPTS[0]], **OPTIONS)


def test_adapters_that_come_with_the_model_are_not_copied_for_their_number(folder):
    two, one = (load(folder, names=names).model.adapters for names in ("ab", "a"))
    larger = 2 * len(one.layers)  # "b" has a larger rank in two groups of each layer
    assert two.generation == one.generation + larger


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("c", "adapter is 'c', expected one of a, b"),
        (["a"], "adapter has 1 names, expected 5 like prompts"),
    ],
)
def test_wrong_names(folder, given, message):
    with pytest.raises(ValueError, match=message):
        load(folder).generate(PROMPTS, adapter=given)


UP = "layers.0.feed_forward.w3"  # [256, 128]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "adapter is empty, expected"),
        (
            {"layers.9.attention.wq": ((2, 128), (128, 2))},
            "adapter has 'layers.9.attention.wq', exp",
        ),
        (
            {UP: ((2, 129), (256, 2))},
            r"a \[2, 129\] of torch.float32 for '.*w3', expected \[2, 128\]",
        ),
        ({UP: ((2, 128), (255, 2))}, r"adapter has b \[255, 2\] .* expected \[256, 2\] of float32"),
        ({UP: ((2, 128), (256, 3))}, r"adapter has b \[256, 3\] .* expected \[256, 2\] of float32"),
        ({UP: ((0, 128), (256, 0))}, r"adapter has a \[0, 128\] .* expected \[1, 128\] of float32"),
        ({UP: ((2, 128), (256, 2), torch.int32)}, r"adapter has a \[2, 128\] of torch.int32"),
    ],
)
def test_adapters_in_memory_that_do_not_fit_are_refused(folder, given, message):
    adapter = {}
    for name, (a, b, *dtype) in given.items():
        dtype = dtype[0] if dtype else torch.float32
        adapter[name] = LowRank(torch.zeros(a, dtype=dtype), torch.zeros(b, dtype=dtype), 1.0)
    llm = load(folder, names="")
    with pytest.raises(ValueError, match=message):
        llm.load_adapter(adapter, "x")
    assert not llm.adapters.names
    assert llm.model.adapters.nbytes == 0
    with pytest.raises(ValueError, match=message):
        Mistral.from_pretrained(folder, adapters={"x": adapter})


def test_adapters_in_memory_are_those_of_their_files(folder, alone):
    given = {name: read_adapter(folder / name, load(folder, names="").config) for name in "ab"}
    llm = Mistral.from_pretrained(folder, dtype=torch.bfloat16, adapters=given)
    assert ids_of(llm.generate(PROMPTS, adapter=NAMES, **OPTIONS)) == alone


@pytest.mark.parametrize("name", ["a", "", 5])
def test_wrong_new_names(folder, name):
    llm = load(folder, names="a")
    with pytest.raises(ValueError, match=r"is loaded already|expected some text"):
        llm.load_adapter(folder / "b", name)
