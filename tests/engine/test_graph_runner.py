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
from mistral_ext.engine.cache import RingCache
from mistral_ext.engine.decoding import Decoder, GraphDecoder
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_ext import Mistral
from mistral_ext.engine import scheduler
from mistral_ext.engine.sampling import Sampler, SamplingParams

PROMPTS = ["Once", "The quick brown fox jumps over the lazy dog, and then", "é ü 漢字 🙂", "a b"]


class Replays:
    """In the place of CudaGraphs."""

    name = torch.device("cpu")

    def __init__(self):
        self.captures = 0

    def capture(self, work):
        self.captures += 1
        return work

    def host_copy(self, size):
        return HostCopy()


class HostCopy:
    def start(self, values):
        self._values = values.clone()

    def wait(self):
        return self._values.tolist()


class Counted(GraphDecoder):
    """Notes what it launches, and whether the host knew the tokens by then. Is not kept."""

    captures = False
    launched: list[tuple[list[int], bool]]

    def launch(self, rings, token_ids):
        self.launched.append((list(rings), token_ids is not None))
        return super().launch(rings, token_ids)


@pytest.fixture
def ahead(monkeypatch):
    """Has decode steps launched one ahead; the list of them."""
    launched = []

    def decoder(model, cache, sampler):
        counted = Counted(model, cache, sampler, Replays())
        counted.launched = launched
        return counted

    monkeypatch.setattr(scheduler, "decoder", decoder)
    return launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return Mistral.from_pretrained(folder)


def in_time(llm, monkeypatch, *args, **options):
    with monkeypatch.context() as undone:
        undone.setattr(scheduler, "decoder", Decoder)
        return llm.generate(*args, **options)


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
    llm = Mistral.from_pretrained(folder, max_batch=max_batch, prefill_chunk=7)
    options = {"max_tokens": 40, "ignore_eos": True} | options
    expected = in_time(llm, monkeypatch, PROMPTS, **options)
    assert content(llm.generate(PROMPTS, **options)) == content(expected)
    assert any(not known for _, known in ahead)


def test_ends_are_exact(llm, ahead, monkeypatch):
    """Each at a token of its own, of which the host learns when the next step is under way."""
    free = llm.generate(PROMPTS, max_tokens=20, ignore_eos=True)
    ends = [free[0].token_ids[3], free[1].token_ids[9], free[3].token_ids[5]]
    config = llm.config.__class__(**{**vars(llm.config), "eos_ids": tuple(ends)})
    monkeypatch.setattr(llm, "config", config)
    options = {"max_tokens": 20, "stop": [free[2].text[5:9]]}
    expected = in_time(llm, monkeypatch, PROMPTS, **options)
    assert {c.finish_reason for c in expected} == {"stop"}
    assert content(llm.generate(PROMPTS, **options)) == content(expected)


def test_a_known_end_wastes_no_step(llm, ahead):
    llm.generate("Once", max_tokens=10, ignore_eos=True)
    assert len(ahead) == 9  # the prompt gives the first token
    assert [known for _, known in ahead] == [True] + 8 * [False]


def test_an_unknown_end_wastes_one(llm, ahead, monkeypatch):
    free = llm.generate("Once", max_tokens=10, ignore_eos=True)[0]
    config = llm.config.__class__(**{**vars(llm.config), "eos_ids": (free.token_ids[4],)})
    assert free.token_ids.index(free.token_ids[4]) == 4
    monkeypatch.setattr(llm, "config", config)
    ahead.clear()
    assert len(llm.generate("Once", max_tokens=10)[0].token_ids) == 5
    assert len(ahead) == 5


def test_a_ring_goes_on_after_an_end(folder, ahead, monkeypatch):
    """What a wasted step stored is as if it had not been: past the window, on the same ring."""
    llm = Mistral.from_pretrained(folder)
    ids = llm.tokenizer.encode(PROMPTS[1])

    def conversation():
        cache = RingCache(llm.config, [llm.config.sliding_window], llm.model.dtype)
        serving = scheduler.Scheduler(llm.model, cache, llm.tokenizer.vocab_size)
        request = llm._request(ids, SamplingParams(max_tokens=60))
        stop = llm.generate([ids], max_tokens=60, ignore_eos=True)[0].token_ids[45]
        request._eos_ids = (stop,)
        list(serving.run([request], 512))
        assert request.finish_reason == "stop"
        assert cache.lengths == [len(request.ids) - 1]
        more = llm._request([*request.ids, 5, 6, 7], SamplingParams(max_tokens=8))
        list(serving.run([more], 512))
        return more.ids

    launched_ahead = conversation()
    monkeypatch.setattr(scheduler, "decoder", Decoder)
    assert conversation() == launched_ahead


@pytest.mark.parametrize(("temperatures", "captures"), [((0, 0, 0), 2), ((1, 0, 0), 3)])
def test_each_size_is_captured_once(llm, temperatures, captures):
    """And once more for completions that are greedy all of them."""
    device = Replays()
    cache = RingCache(llm.config, [16, 16, 16], llm.model.dtype)
    sampler = Sampler(3, llm.config.vocab_size)
    for ring, temperature in enumerate(temperatures):
        sampler.start(ring, SamplingParams(temperature=temperature), [1])
    steps = GraphDecoder(llm.model, cache, sampler, device)
    for rings in ([0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2], [1, 2], [0, 1], [1, 2], [2]):
        steps.launch(rings, [5 for _ in rings]).token_ids()
    assert device.captures == captures


@pytest.mark.parametrize("launched", [Decoder, None], ids=["in time", "ahead"])
def test_the_largest_logit_is_what_sampling_takes(llm, ahead, monkeypatch, launched):
    """And the logits are the same: a greedy step differs in its launches alone."""
    if launched:
        monkeypatch.setattr(scheduler, "decoder", launched)
    options = {"max_tokens": 30, "ignore_eos": True, "logprobs": 2}
    greedy = llm.generate(PROMPTS, **options)
    monkeypatch.setattr(Sampler, "needs_no_draw", lambda self, rows: False)
    assert content(llm.generate(PROMPTS, **options)) == content(greedy)


@pytest.fixture
def device(monkeypatch):
    """Of all decoders, which are those of a GPU."""
    device = Replays()
    monkeypatch.setattr(scheduler, "decoder", lambda *args: GraphDecoder(*args, device))
    return device


OPTIONS = {"max_tokens": 6, "ignore_eos": True}


def test_captured_steps_serve_the_next_call(folder, device, monkeypatch):
    llm = Mistral.from_pretrained(folder, sliding_window=2048, max_batch=2)
    expected = in_time(llm, monkeypatch, PROMPTS[:2], **OPTIONS)
    assert content(llm.generate(PROMPTS[:2], **OPTIONS)) == content(expected)
    captured = device.captures
    assert captured == 2  # of two completions, and of one when the other has ended
    # Other prompts, of other lengths, more of them; then the first ones again.
    assert len(llm.generate([[5] * 900, PROMPTS[2], "x"], max_tokens=9, ignore_eos=True)) == 3
    assert content(llm.generate(PROMPTS[:2], **OPTIONS)) == content(expected)
    assert device.captures == captured
    # One alone has one ring; one that is longer another.
    list(llm.stream(PROMPTS[0], **OPTIONS))
    list(llm.stream(PROMPTS[1], **OPTIONS))
    assert device.captures == captured + 1
    llm.generate([5] * 1100, **OPTIONS)
    assert device.captures == captured + 2


def test_other_options_leave_the_captured_steps_right(folder, device, monkeypatch):
    llm = Mistral.from_pretrained(folder)
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


def test_a_conversation_captures_its_steps_once(folder, device):
    chat = Mistral.from_pretrained(folder).start_chat(template="v1")
    "".join(chat.send("a b", **OPTIONS))
    captured = device.captures
    "".join(chat.send("Once", **OPTIONS))
    assert device.captures == captured == 1


def test_rings_in_use_are_not_shared(folder, device, monkeypatch):
    llm = Mistral.from_pretrained(folder)
    expected = in_time(llm, monkeypatch, PROMPTS[:2], **OPTIONS)
    streams = [llm.stream(prompt, **OPTIONS) for prompt in PROMPTS[:2]]
    for _ in zip(*streams, strict=False):  # piece by piece in turn
        pass
    for stream in streams:
        list(stream)
    assert content(stream.completion for stream in streams) == content(expected)


def test_what_was_broken_off_is_not_used_again(folder, device, monkeypatch):
    llm = Mistral.from_pretrained(folder)
    expected = in_time(llm, monkeypatch, PROMPTS[0], **OPTIONS)
    stream = llm.stream(PROMPTS[0], max_tokens=1000, ignore_eos=True)
    next(stream)
    del stream
    assert llm._kept is None
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "step", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(PROMPTS[0], **OPTIONS)
    assert llm._kept is None
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
    """Five a layer, in this order, and the norms of more than 16 apart; one for logits and greedy
    tokens, two if they are drawn; and no other work, nothing that waits, nothing from the host."""
    write_checkpoint(tmp_path)
    llm = Mistral.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cache = RingCache(llm.config, [16] * completions, torch.bfloat16)
    sampler = Sampler(completions, llm.config.vocab_size)
    rings = list(range(completions))
    for ring in rings:
        sampler.start(ring, SamplingParams(temperature=temperature), [1])
    decoder = GraphDecoder(llm.model, cache, sampler, Replays())
    with use(emulator):
        decoder.launch(rings, [5] * completions)
        emulator.take_launches()
        (batch,) = decoder._batches.values()
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
    assert names == [*llm.config.n_layers * layer, *norm, "linear_kernel", *draw]
    work = [name.split("::")[1] for name in asked.names if name.startswith("aten::")]
    work = [name for name in work if name not in NO_WORK]
    # The embeddings before the layers, for a draw the conversion of the logits, then the state.
    assert work == ["index_select", *(["to"] if temperature else []), "clamp", "add_"]
