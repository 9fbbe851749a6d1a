"""The decode step of a CUDA device: what is launched, and that launching it ahead changes nothing.

Graphs are stood in for: what was captured is run again by Python, on the CPU or in the emulator.
"""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from backends import use
from checkpoints import TOKENIZERS, write_checkpoint
from replays import Replays
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_ext import Mistral
from mistral_ext.engine import engine
from mistral_ext.engine.graph_runner import GraphRunner
from mistral_ext.engine.params import SamplingParams
from mistral_ext.engine.runner import Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import SlotPool

PROMPTS = ["Once", "The quick brown fox jumps over the lazy dog, and then", "é ü 漢字 🙂", "a b"]


class Counted(GraphRunner):
    """Notes what it launches, and whether the host knew the tokens by then."""

    launched: list[tuple[int, bool]]

    def launch(self, extents, rows, token_ids, adapters=()):
        self.launched.append((len(rows), token_ids is not None))
        return super().launch(extents, rows, token_ids, adapters)


@pytest.fixture
def ahead(monkeypatch):
    """Has new engines launch decode steps one ahead; the list of them."""
    launched = []

    def runner(model, pool, sampler):
        counted = Counted(model, pool, sampler, Replays())
        counted.launched = launched
        return counted

    monkeypatch.setattr(engine, "make_runner", runner)
    return launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    return folder


@pytest.fixture
def llm(folder):
    return Mistral.from_pretrained(folder)


def in_time(llm, monkeypatch, *args, **options):
    """What the plain runner gives."""
    with monkeypatch.context() as undone:
        undone.setattr(engine, "make_runner", Runner)
        return Mistral.from_pretrained(llm.folder).generate(*args, **options)


def content(completions):
    return [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in completions]


@pytest.mark.parametrize("max_batch", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "seed": 6, "logit_bias": {5: 3.0}, "n": 3},
    ],
)
def test_what_is_launched_ahead_is_the_same(folder, ahead, monkeypatch, max_batch, options):
    """Far past the window, with more prompts than rings."""
    llm = Mistral.from_pretrained(folder, max_batch=max_batch)
    options = {"max_tokens": 40, "ignore_eos": True} | options
    expected = in_time(llm, monkeypatch, PROMPTS, **options)
    assert content(llm.generate(PROMPTS, **options)) == content(expected)
    assert any(not known for _, known in ahead)


def with_ends(llm, *eos_ids):
    return Mistral.from_pretrained(llm.folder, eos_ids=tuple(eos_ids))


def test_ends_are_exact(llm, ahead, monkeypatch):
    """Each at a token of its own, of which the host learns when the next step is under way."""
    free = llm.generate(PROMPTS, max_tokens=20, ignore_eos=True)
    llm = with_ends(llm, free[0].token_ids[3], free[1].token_ids[9], free[3].token_ids[5])
    options = {"max_tokens": 20, "stop": [free[2].text[5:9]]}
    with monkeypatch.context() as undone:
        undone.setattr(engine, "make_runner", Runner)
        expected = with_ends(llm, *llm.config.eos_ids).generate(PROMPTS, **options)
    assert {c.finish_reason for c in expected} == {"stop"}
    assert content(llm.generate(PROMPTS, **options)) == content(expected)


def test_a_known_end_wastes_no_step(llm, ahead):
    llm.generate("Once", max_tokens=10, ignore_eos=True)
    assert len(ahead) == 9  # the prompt gives the first token
    assert [known for _, known in ahead] == [True] + 8 * [False]


def test_an_unknown_end_wastes_one(llm, ahead):
    free = llm.generate("Once", max_tokens=10, ignore_eos=True)[0]
    assert free.token_ids.index(free.token_ids[4]) == 4
    llm = with_ends(llm, free.token_ids[4])
    ahead.clear()
    assert len(llm.generate("Once", max_tokens=10)[0].token_ids) == 5
    assert len(ahead) == 5


def test_a_conversation_goes_on_after_an_end(llm, ahead, monkeypatch):
    """What a wasted step stored is as if it had not been: past the window, in the same slots."""
    free = llm.generate(PROMPTS[1], max_tokens=60, ignore_eos=True)[0]
    llm = with_ends(llm, free.token_ids[45])
    (reply,) = llm.generate(PROMPTS[1], max_tokens=60)
    assert reply.finish_reason == "stop"
    following = [*llm.tokenizer.encode(PROMPTS[1]), *reply.token_ids, *range(5, 50)]
    request = llm.request(following, SamplingParams(max_tokens=8), reuse_completions=True)
    (*_, last) = llm.engine.outputs([request])
    assert last.completion.timing.cached_tokens > len(reply.token_ids)
    assert (
        last.completion.token_ids
        == in_time(llm, monkeypatch, [following], max_tokens=8)[0].token_ids
    )


@pytest.mark.parametrize(("temperatures", "captures"), [((0, 0, 0), 2), ((1, 0, 0), 3)])
def test_each_size_is_captured_once(llm, temperatures, captures):
    """And once more for completions that are greedy all of them."""
    device = Replays()
    pool = SlotPool(llm.config, 48, llm.model.dtype)
    extents = [pool.allocate(16, 16) for _ in range(3)]
    sampler = Sampler(3, llm.config.vocab_size)
    for row, temperature in enumerate(temperatures):
        sampler.start(row, SamplingParams(temperature=temperature), [1])
    runner = GraphRunner(llm.model, pool, sampler, device)
    for rows in ([0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2], [1, 2], [0, 1], [1, 2], [2]):
        runner.launch([extents[row] for row in rows], rows, [5 for _ in rows]).token_ids()
    assert device.captures == captures


@pytest.mark.parametrize("is_ahead", [False, True], ids=["in time", "ahead"])
def test_the_largest_logit_is_what_sampling_takes(llm, ahead, monkeypatch, is_ahead):
    """And the logits are the same: a greedy step differs in its launches alone."""
    if not is_ahead:
        monkeypatch.setattr(engine, "make_runner", Runner)
    options = {"max_tokens": 30, "ignore_eos": True, "logprobs": 2}
    greedy = llm.generate(PROMPTS, **options)
    monkeypatch.setattr(Sampler, "needs_no_draw", lambda self, rows: False)
    assert content(llm.generate(PROMPTS, **options)) == content(greedy)


@pytest.fixture
def device(monkeypatch):
    """Of new engines, whose runners are those of a GPU."""
    device = Replays()
    monkeypatch.setattr(engine, "make_runner", lambda *args: GraphRunner(*args, device))
    return device


OPTIONS = {"max_tokens": 6, "ignore_eos": True}


def test_captured_steps_serve_the_next_call(llm, device, monkeypatch):
    expected = in_time(llm, monkeypatch, PROMPTS[:2], **OPTIONS)
    assert content(llm.generate(PROMPTS[:2], **OPTIONS)) == content(expected)
    captured = device.captures
    # Other prompts, of other lengths, more of them; then the first ones again.
    assert len(llm.generate([[5] * 900, "x"], max_tokens=9, ignore_eos=True)) == 2
    assert content(llm.generate(PROMPTS[:2], **OPTIONS)) == content(expected)
    assert device.captures == captured
    list(llm.stream(PROMPTS[0], **OPTIONS))
    list(llm.stream(PROMPTS[1], **OPTIONS))
    chat = llm.start_chat(template="v1")
    for turn in ("a b", "Once"):
        "".join(chat.send(turn, **OPTIONS))
    assert device.captures <= captured + 1  # one sequence alone


def test_other_options_leave_the_captured_steps_right(llm, device, monkeypatch):
    drawn = OPTIONS | {"temperature": 1.0, "seed": 7}
    expected = [in_time(llm, monkeypatch, PROMPTS[0], **options) for options in (OPTIONS, drawn)]
    llm.generate(PROMPTS[0], **OPTIONS)
    captured = device.captures
    llm.generate(PROMPTS[0], **OPTIONS, logit_bias={7: 100.0}, repetition_penalty=1.5)
    assert device.captures == captured + 1
    assert content(llm.generate(PROMPTS[0], **OPTIONS)) == content(expected[0])
    assert device.captures == captured + 1
    # A bias of nothing is not another choice.
    assert content(llm.generate(PROMPTS[0], **drawn)) == content(expected[1])
    assert device.captures == captured + 1


def test_growth_between_steps_is_known_to_the_device(folder, device, monkeypatch):
    """An extent that moves while its steps are replayed."""
    llm = Mistral.from_pretrained(folder, sliding_window=None, cache_tokens=2000)
    options = {"max_tokens": 300, "ignore_eos": True}
    with monkeypatch.context() as undone:
        undone.setattr(engine, "make_runner", Runner)
        plain = Mistral.from_pretrained(folder, sliding_window=None, cache_tokens=2000)
        expected = plain.generate(PROMPTS, **options)
    assert content(llm.generate(PROMPTS, **options)) == content(expected)


def test_streams_in_turns(llm, device, monkeypatch):
    expected = in_time(llm, monkeypatch, PROMPTS[:2], **OPTIONS)
    streams = [llm.stream(prompt, **OPTIONS) for prompt in PROMPTS[:2]]
    for _ in zip(*streams, strict=False):  # piece by piece in turn
        pass
    for stream in streams:
        list(stream)
    assert content(stream.completion for stream in streams) == content(expected)


def test_what_was_broken_off_does_not_matter(llm, device, monkeypatch):
    expected = in_time(llm, monkeypatch, PROMPTS[0], **OPTIONS)
    stream = llm.stream(PROMPTS[0], max_tokens=1000, ignore_eos=True)
    next(stream)
    del stream
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(PROMPTS[0], **OPTIONS)
    assert content(llm.generate(PROMPTS[0], **OPTIONS)) == content(expected)


def test_damaged_weights_are_an_error(folder, ahead):
    llm = Mistral.from_pretrained(folder)
    llm.model.norm = torch.full_like(llm.model.norm, float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        llm.generate(PROMPTS, max_tokens=5)


class Operators(TorchDispatchMode):
    """What torch is asked for."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


# Neither kernels nor copies: views, and memory, which a graph takes while it is captured.
NO_WORK = {"empty", "empty_like", "new_empty", "view", "unsafe_view", "slice", "select", "split"}
NO_WORK |= {
    "split_with_sizes",
    "detach",
    "alias",
    "reshape",
    "flatten",
    "unflatten",
    "_unsafe_view",
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("completions", [1, 3, 9, 16, 17])
def test_launches_of_a_step(tmp_path, emulator, completions, temperature):
    """One for the embeddings; five a layer, in this order, and the norms of more than 16 apart; one
    for logits and greedy tokens, two if they are drawn; and no other work, nothing that waits,
    nothing from the host."""
    write_checkpoint(tmp_path)
    llm = Mistral.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pool = SlotPool(llm.config, 16 * completions, torch.bfloat16)
    extents = [pool.allocate(16, 16) for _ in range(completions)]
    sampler = Sampler(completions, llm.config.vocab_size)
    rows = list(range(completions))
    for row in rows:
        sampler.start(row, SamplingParams(temperature=temperature), [1])
    runner = GraphRunner(llm.model, pool, sampler, Replays())
    with use(emulator):
        runner.launch(extents, rows, [5] * completions)
        emulator.take_launches()
        (batch,) = runner._captured.values()
        with Operators() as asked:
            batch.step()
    names = [
        re.match(r"(?:\w+::)*(?:\(anonymous namespace\)::)?(\w+)", launch["kernel"])[1]
        for launch in emulator.take_launches()
    ]
    norm = ["linear_norm_kernel"] if completions > 16 else []
    layer = [*norm, "linear_rope_kernel", "attention_decode", "linear_kernel"]
    layer += [*norm, "linear_kernel", "linear_kernel"]
    draw = ["sample_kernel"] if temperature else []
    layers = llm.config.n_layers * layer
    assert names == ["embedding_kernel", *layers, *norm, "linear_kernel", *draw]
    work = [name.split("::")[1] for name in asked.names if name.startswith("aten::")]
    work = [name for name in work if name not in NO_WORK]
    # For a draw the conversion of the logits, then the state.
    assert work == [*(["to"] if temperature else []), "clamp", "add_"]
