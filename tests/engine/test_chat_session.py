"""Conversations that keep their cache: the same replies as reading everything again."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_templates import MISTRAL_V1
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral

OPTIONS = {"max_tokens": 12, "temperature": 1.0, "seed": 4}
TURNS = ["Hello there", "What about the second one?", "And 3 🙂?", "Fine."]


@pytest.fixture(scope="module", params=["v1-window16", "v3-window16", "v3-nowindow"])
def llm(request, tmp_path_factory):
    version, window = request.param.split("-")
    folder = tmp_path_factory.mktemp("instruct")
    write_checkpoint(
        folder,
        vocab_size=32000 if version == "v1" else 32768,
        sliding_window=16 if window == "window16" else None,
    )
    shutil.copy(TOKENIZERS[version], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": MISTRAL_V1}))
    return Mistral.from_pretrained(folder)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_replies_are_those_of_reading_everything_again(llm, system):
    chat = llm.start_chat(system=system)
    for turn in TURNS:
        reply = "".join(chat.send(turn, **OPTIONS))
        prompt = chat.prompt_ids
        anew = Mistral.from_pretrained(llm.folder).generate([prompt], **OPTIONS)[0]
        assert chat.completion.token_ids == anew.token_ids
        assert chat.messages[-1] == {"role": "assistant", "content": reply}
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == TURNS


def test_a_turn_reads_only_what_is_new(llm):
    words = [i for i in range(3, 31000) if llm.tokenizer.token_bytes(i).startswith(b" the")]
    chat = llm.start_chat()
    for turn in TURNS:
        before = len(chat.ids)
        list(chat.send(turn, **OPTIONS, logit_bias=dict.fromkeys(words, 100.0)))
        # All of the prompt but the conversation so far, whose last token was sampled, not read.
        # Pieces of fewer than 32 tokens are neither read nor reused.
        cached = min(before - 1, len(chat.prompt_ids) - 32)
        assert chat.completion.timing.cached_tokens == (cached if cached >= 32 else 0)
    assert chat.completion.timing.cached_tokens > 0


def test_a_reply_broken_off_stays_in_the_conversation(llm):
    chat = llm.start_chat()
    reply = chat.send(TURNS[0], **OPTIONS)
    first = next(reply)
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    assert chat.completion is None
    list(chat.send(TURNS[1], **OPTIONS))
    anew = llm.generate([chat.prompt_ids], **OPTIONS)[0]
    assert chat.completion.token_ids == anew.token_ids


def test_interrupt_within_a_step_leaves_the_chat_usable(llm, monkeypatch):
    chat = llm.start_chat()
    list(chat.send(TURNS[0], **OPTIONS))
    step = llm.engine.runner._step

    def interrupted(*args, **kwargs):
        step(*args, **kwargs)
        (sequence,) = llm.engine.scheduler.running()
        for pool in llm.engine.pool.k:  # as bad as a step cut short can be
            llm.engine.pool._view(pool, sequence.extent).fill_(float("nan"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.send(TURNS[1], **OPTIONS))
    list(chat.send(TURNS[2], **OPTIONS))
    anew = llm.generate([chat.prompt_ids], **OPTIONS)[0]
    assert chat.completion.token_ids == anew.token_ids


def test_chat_is_one_turn_of_a_conversation(llm):
    chat = llm.start_chat(system="Be brief.")
    reply = "".join(chat.send(TURNS[0], **OPTIONS))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TURNS[0]},
    ]
    assert llm.chat(messages, **OPTIONS).text == reply
    assert not reply.startswith(" ")


def test_a_base_model_has_no_chat(tmp_path):
    write_checkpoint(tmp_path, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    llm = Mistral.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base model"):
        llm.chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match="base model"):
        llm.start_chat()
    assert llm.chat([{"role": "user", "content": "Hi"}], template="v1", max_tokens=3).text


def test_the_next_turn_ends_the_reply_before(llm):
    chat = llm.start_chat()
    first = chat.send(TURNS[0], **OPTIONS)
    piece = next(first)
    second = "".join(chat.send(TURNS[1], **OPTIONS))
    assert list(first) == []
    assert [m["content"] for m in chat.messages] == [TURNS[0], piece, TURNS[1], second]
    first.close()
    assert len(chat.messages) == 4
    assert not llm.engine.has_work


def test_a_turn_without_a_reply_is_forgotten(llm):
    chat = llm.start_chat(system="Be brief.")
    chat.send(TURNS[0], **OPTIONS)
    reply = "".join(chat.send(TURNS[1], **OPTIONS))
    assert [m["content"] for m in chat.messages] == ["Be brief.", TURNS[1], reply]


def test_threads_may_share_a_conversation(llm):
    chat = llm.start_chat()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda turn: list(chat.send(turn, **OPTIONS)), TURNS * 3))
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
