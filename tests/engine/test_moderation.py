"""A model that judges contents."""

from __future__ import annotations

import pytest
import torch

from mistral_ext import Mistral
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.guardrails import SAFE_PROMPT, label_ids, question

USER = {"role": "user", "content": "Hello"}


@pytest.fixture
def llm(instruct_llm):
    return instruct_llm


@pytest.mark.parametrize("content", ["How to kill a process?", [USER, USER]])
def test_scores_are_those_of_the_logits(llm, content):
    found = llm.moderate(content)
    _, following = label_ids(llm.tokenizer)
    logits = llm.logits(llm.encode_chat(question(content)))[-1]
    shares = torch.stack([logits[i] for i in following.values()]).softmax(0).tolist()
    expected = dict(zip(following, shares, strict=True))
    assert found.category == max(expected, key=expected.get)
    del expected["acceptable"]
    assert found.scores == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_judged(llm):
    with pytest.raises(ValueError, match=r"content has .* tokens, expected fewer than 4096"):
        llm.moderate("king " * 5000)
    with pytest.raises(ValueError, match="base model"):
        Mistral.from_pretrained(DEMO_MODEL).moderate("a")


def test_the_safe_prompt(llm):
    safe = [{"role": "system", "content": SAFE_PROMPT}, USER]
    options = {"max_tokens": 8, "temperature": 1.0, "seed": 1}
    reply = llm.chat([USER], safe_prompt=True, **options)
    assert reply.token_ids == llm.chat(safe, **options).token_ids
    assert reply.token_ids != llm.chat([USER], **options).token_ids
    chat = llm.start_chat("Be brief.", safe_prompt=True)
    chat.send("Hello", **options)
    assert chat.prompt_ids == llm.encode_chat(
        [{"role": "system", "content": f"{SAFE_PROMPT}\n\nBe brief."}, USER]
    )
