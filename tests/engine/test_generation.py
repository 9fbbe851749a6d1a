"""Generation on a random model with the real v1 tokenizer: the API, batches, stops, limits."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint

import mistral_ext
from mistral_ext import Mistral

PROMPTS = ["Once", "The quick brown fox jumps over the lazy dog, and then", "é ü 漢字 🙂", "a b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return Mistral.from_pretrained(folder)


@pytest.fixture(scope="module")
def llm_without_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    write_checkpoint(folder, sliding_window=None, max_position_embeddings=40)
    return Mistral.from_pretrained(folder)


def naive_greedy(llm, ids, count):
    """Without a cache: all logits anew for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(llm.logits(ids)[-1].argmax()))
    return ids[-count:]


def test_greedy_is_the_argmax_of_the_logits(llm):
    prompt = llm.tokenizer.encode(PROMPTS[1])
    completion = llm.generate(PROMPTS[1], max_tokens=40, ignore_eos=True)[0]
    assert completion.token_ids == naive_greedy(llm, prompt, 40)
    assert completion.text == llm.tokenizer.decode(completion.token_ids, strip_first_space=False)
    assert completion.finish_reason == "length"
    assert completion.logprobs is None


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
@pytest.mark.parametrize(("max_batch", "prefill_chunk"), [(8, 512), (2, 3), (1, 1), (3, 5)])
def test_batch_is_each_alone(folder, llm, options, max_batch, prefill_chunk):
    """Whatever else is in the batch, however prompts are cut, whichever ring is reused."""
    batch = Mistral.from_pretrained(folder, max_batch=max_batch, prefill_chunk=prefill_chunk)
    together = batch.generate(PROMPTS, max_tokens=25, ignore_eos=True, **options)
    alone = [
        llm.generate(prompt, max_tokens=25, ignore_eos=True, **options)[0] for prompt in PROMPTS
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_batch_is_each_alone_to_the_bit(folder, dtype):
    """Else a near tie would make another text of it, sooner or later."""
    llm = Mistral.from_pretrained(folder, dtype=dtype, prefill_chunk=16)
    prompts = [*PROMPTS, list(range(5, 60)), list(range(900, 920)), "x", "one two"]
    options = {"max_tokens": 12, "ignore_eos": True, "logprobs": 1, "temperature": 1.0, "seed": 2}
    together = llm.generate(prompts, **options)
    for prompt, completion in zip(prompts, together, strict=True):
        (alone,) = llm.generate([prompt], **options)
        assert completion.token_ids == alone.token_ids
        assert completion.logprobs == alone.logprobs


def test_an_ended_sequence_stays_ended(llm, monkeypatch):
    """Each ends at its own end-of-text token; the others go on as if alone."""
    free = llm.generate(PROMPTS, max_tokens=20, ignore_eos=True)
    eos = free[0].token_ids[3]
    config = llm.config.__class__(**{**vars(llm.config), "eos_ids": (2, eos)})
    monkeypatch.setattr(llm, "config", config)
    ended = llm.generate(PROMPTS, max_tokens=20)
    for with_end, without in zip(ended, free, strict=True):
        ids = without.token_ids
        stop = min((ids.index(i) for i in (2, eos) if i in ids), default=None)
        assert with_end.token_ids == (ids if stop is None else ids[: stop + 1])
        assert with_end.finish_reason == ("length" if stop is None else "stop")
    assert ended[0].token_ids[-1] == eos
    ignored = llm.generate(PROMPTS, max_tokens=20, ignore_eos=True)
    assert [c.token_ids for c in ignored] == [c.token_ids for c in free]


def test_n_completions_of_each_prompt_in_order(llm):
    options = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    three = llm.generate(PROMPTS[:2], n=3, **options)
    one = llm.generate(PROMPTS[:2], **options)
    assert [c.token_ids for c in three[::3]] == [c.token_ids for c in one]
    assert len({tuple(c.token_ids) for c in three}) == 6


def test_stop_string_across_tokens(llm):
    free = llm.generate("Once", max_tokens=30, ignore_eos=True)[0]
    stop = free.text[7:13]  # begins and ends inside tokens
    assert free.text.index(stop) == 7
    stopped = llm.generate("Once", max_tokens=30, ignore_eos=True, stop=["never", stop])[0]
    assert stopped.text == free.text[:7]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 30


def test_stream_is_generate_in_pieces(llm):
    options = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    stream = llm.stream("Once", **options)
    assert stream.completion is None
    pieces = list(stream)
    whole = llm.generate("Once", **options)[0]
    assert "".join(pieces) == whole.text == stream.completion.text
    assert len(pieces) > 5
    assert stream.completion.token_ids == whole.token_ids


def test_stream_broken_off_leaves_the_model_usable(llm):
    before = llm.generate("Once", max_tokens=5)[0].token_ids
    stream = llm.stream("Once", max_tokens=1000, ignore_eos=True)
    next(stream)
    del stream
    assert llm.generate("Once", max_tokens=5)[0].token_ids == before


def test_keyboard_interrupt_leaves_the_model_usable(llm, monkeypatch):
    before = llm.generate(PROMPTS, max_tokens=5)
    step, calls = llm.engine.runner._step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, max_tokens=5)
    after = llm.generate(PROMPTS, max_tokens=5)
    assert [c.token_ids for c in after] == [c.token_ids for c in before]


def test_memory_does_not_grow_past_the_window(folder):
    llm = Mistral.from_pretrained(folder, max_batch=1)
    for length in (16, 200, 400):
        llm.generate([5] * length, max_tokens=3, ignore_eos=True)
    # A window of 16 slots with 64 of slack, 2 layers, keys and values, 2 heads of 64 floats
    assert llm.engine.pool.nbytes == 80 * 2 * 2 * 2 * 64 * 4


def test_threads_are_served_together(llm):
    """One engine serves all calls; each gets what it gets alone."""
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 4, "ignore_eos": True}
    expected = [llm.generate(prompt, **options)[0].token_ids for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        together = list(threads.map(lambda p: llm.generate(p, **options)[0].token_ids, PROMPTS))
    assert together == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("busy", ["nothing", "the engine", "making an engine", "a grammar"])
def test_a_forked_child_can_generate(llm, busy):
    """Also if a thread of its parent did something for which it held a lock. The child copies the
    lock, and has no such thread."""

    def texts() -> list[str | None]:
        options = ({}, {"regex": "[a-z]{3}"})
        return [llm.generate("Once upon", max_tokens=5, **more)[0].text for more in options]

    expected, engine = texts(), llm.engine
    lock = {
        "nothing": threading.Lock(),
        "the engine": engine._stepping,
        "making an engine": llm._making_engine,
        "a grammar": llm._grammars._lock,
    }[busy]
    assert lock.acquire(timeout=10)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)  # ends a child that hangs
            is_new = llm.engine is not engine
            code = 0 if texts() == expected and is_new == (busy == "the engine") else 1
        finally:  # an error must not return to pytest, which would run the other tests twice
            os._exit(code)
    lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.engine is engine
    assert texts() == expected


def test_inference_mode_around_a_call_does_not_matter(folder):
    """Whether it is the call that makes the engine, or the next, or only that of a bias."""
    for first in (True, False):
        llm = Mistral.from_pretrained(folder)
        for mode in (first, not first, first):
            with torch.inference_mode(mode):
                llm.generate("Once", max_tokens=3, temperature=1.0, logit_bias={5: 1.0})
                logits = llm.logits([1, 2, 3])
                assert not logits.is_inference()
    logits[:, 5] = -torch.inf
    (torch.ones(3, 32000, requires_grad=True) * llm.logits([1, 2, 3])).sum().backward()


def test_a_completion_that_the_cache_cannot_hold_is_refused(folder):
    llm = Mistral.from_pretrained(folder, sliding_window=None, cache_tokens=100)
    with pytest.raises(ValueError, match="needs 128 tokens of cache"):
        llm.generate([5] * 28, max_tokens=100)
    assert llm.generate([5] * 28, max_tokens=72)


def test_timing_counts_tokens(llm):
    timing = llm.generate("Once", max_tokens=6, ignore_eos=True)[0].timing
    assert timing.prompt_tokens == len(llm.tokenizer.encode("Once"))
    assert timing.decode_tokens == 5
    assert timing.prompt_rate > 0
    assert timing.decode_rate == pytest.approx(5 / timing.decode_seconds)
    assert llm.generate("Once", max_tokens=1)[0].timing.decode_rate == 0


def test_logprobs_come_with_every_token(llm):
    completion = llm.generate("Once", max_tokens=4, ignore_eos=True, logprobs=2)[0]
    prompt = llm.tokenizer.encode("Once")
    expected = llm.logits(prompt + completion.token_ids)[len(prompt) - 1 : -1].log_softmax(-1)
    for row, token_id, entry in zip(
        expected, completion.token_ids, completion.logprobs, strict=True
    ):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert list(entry.top) == row.topk(2).indices.tolist()


def test_token_ids_without_a_tokenizer(llm_without_tokenizer):
    llm = llm_without_tokenizer
    completion = llm.generate([5, 6, 7], max_tokens=5, ignore_eos=True)[0]
    assert completion.token_ids == naive_greedy(llm, [5, 6, 7], 5)
    assert completion.text is None


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate("text"),
        lambda llm: llm.generate([5], stop="x"),
        lambda llm: llm.stream([5]),
        lambda llm: llm.chat([{"role": "user", "content": "Hi"}]),
        lambda llm: mistral_ext.generate([5], model=llm),
    ],
)
def test_text_without_a_tokenizer_is_a_clear_error(llm_without_tokenizer, call):
    with pytest.raises(ValueError, match="has no tokenizer"):
        call(llm_without_tokenizer)


def test_limit_without_a_window(llm_without_tokenizer):
    """max_positions is 40: the completion ends there, and a prompt must leave room for one."""
    completion = llm_without_tokenizer.generate([5] * 35, max_tokens=50, ignore_eos=True)[0]
    assert len(completion.token_ids) == 5
    assert completion.finish_reason == "length"
    with pytest.raises(ValueError, match="prompt has 40 tokens, expected fewer than 40"):
        llm_without_tokenizer.generate([5] * 40)


def test_no_limit_with_a_window(folder):
    llm = Mistral.from_pretrained(folder, max_positions=40)
    assert len(llm.generate([5] * 60, max_tokens=50, ignore_eos=True)[0].token_ids) == 50


def test_window_can_be_overridden(folder, llm):
    ids = llm.tokenizer.encode(PROMPTS[1] * 3)
    full = Mistral.from_pretrained(folder, sliding_window=None)
    assert full.config.sliding_window is None
    torch.testing.assert_close(full.logits(ids)[:16], llm.logits(ids)[:16])
    assert (full.logits(ids)[16:] - llm.logits(ids)[16:]).abs().max() > 0.01


def test_module_level_generate(folder, llm):
    options = {"max_tokens": 5, "ignore_eos": True}
    texts = [c.text for c in llm.generate(PROMPTS, **options)]
    assert mistral_ext.generate(PROMPTS[0], model=llm, **options) == texts[0]
    assert mistral_ext.generate(PROMPTS, model=folder, **options) == texts
    assert mistral_ext.generate(PROMPTS[:1], model=str(folder), **options) == texts[:1]
    assert len(mistral_ext.generate("Once", model=llm, n=2, **options)) == 2


@pytest.mark.parametrize("prompt", ["<s>Once</s>", "Once</s>"])
def test_control_tokens_of_a_prompt_are_text_unless_asked_for(llm, prompt):
    """And <s> stands once at the beginning, whoever wrote it."""
    options = {"max_tokens": 5, "ignore_eos": True}
    tokenizer = llm.tokenizer
    once, bos, eos = tokenizer.encode("Once", bos=False), tokenizer.bos_id, tokenizer.eos_id
    once = once if prompt.startswith("Once") else tokenizer.encode_pieces([bos, "Once"])[1:]
    expected = llm.generate([[bos, *once, eos]], **options)[0].token_ids
    assert llm.generate(prompt, special_tokens=True, **options)[0].token_ids == expected
    stream = llm.stream(prompt, special_tokens=True, **options)
    list(stream)
    assert stream.completion.token_ids == expected
    as_text = llm.generate([tokenizer.encode(prompt)], **options)[0].token_ids
    assert llm.generate(prompt, **options)[0].token_ids == as_text
    assert tokenizer.encode(prompt).count(eos) == 0


def test_no_prompts_no_completions(llm):
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt is empty"),
        (["x", ""], ValueError, r"prompts\[1\] is empty"),
        ([[]], ValueError, r"prompts\[0\] is empty"),
        ([3, 32000], ValueError, "prompt has token id 32000, expected 0 to 31999"),
        ([3, -1], ValueError, "prompt has token id -1"),
        (5, TypeError, "prompts is 5, expected text, token ids, or a list of those"),
        (torch.tensor([3, 5]), TypeError, r"prompts is tensor\(\[3, 5\]\), expected text"),
        (["x", 5], TypeError, r"prompts\[1\] is 5, expected text or a list of token ids"),
        ([3, "x"], TypeError, "expected text or a list of token ids"),
        (b"Once", TypeError, "prompt is b'Once', expected text or a list of token ids"),
        ([b"Once"], TypeError, r"prompts\[0\] is b'Once', expected text or a list of token ids"),
        (bytearray(b"x"), TypeError, "expected text or a list of token ids"),
        ([3, True], TypeError, r"prompt is \[3, True\], expected text or a list of token ids"),
    ],
)
def test_bad_prompts_are_named(llm, prompt, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompt)


def test_bad_options_are_named_before_anything_runs(llm):
    with pytest.raises(ValueError, match="temperature is -1"):
        llm.generate("x", temperature=-1)
    with pytest.raises(TypeError, match="unknown option 'best_of'"):
        llm.generate("x", best_of=2)
    with pytest.raises(ValueError, match="n is 2, expected 1"):
        llm.stream("x", n=2)
    with pytest.raises(TypeError, match="prompt is a list of prompts"):
        llm.stream(["x", "y"])


def test_bad_load_arguments_are_named(folder):
    with pytest.raises(ValueError, match="device is 'meta', expected 'cpu' or 'cuda'"):
        Mistral.from_pretrained(folder, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda', but"):
            Mistral.from_pretrained(folder, device="cuda")
    with pytest.raises(ValueError, match="max_batch is 0"):
        Mistral.from_pretrained(folder, max_batch=0)
    with pytest.raises(TypeError, match="sliding_windows"):
        Mistral.from_pretrained(folder, sliding_windows=3)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    shutil.copy(TOKENIZERS["v3"], tmp_path / "tokenizer.model.v3")
    with pytest.raises(ValueError, match=r"tokenizer.model.v3 has 32768 tokens.* only 131"):
        Mistral.from_pretrained(tmp_path)
