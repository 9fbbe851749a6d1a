"""The words of guardrails, and what a model's answer says."""

import math

import pytest

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.guardrails import (
    CATEGORIES,
    LABELS,
    SAFE_PROMPT,
    Moderation,
    label_ids,
    question,
    with_safe_prompt,
)
from mistral_ext.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hello"}


def test_the_safe_prompt_comes_first():
    safe = {"role": "system", "content": SAFE_PROMPT}
    assert with_safe_prompt([USER]) == [safe, USER]
    assert with_safe_prompt([]) == [safe]
    system = {"role": "system", "content": "Be brief."}
    first, second = with_safe_prompt([system, USER])
    assert first == {"role": "system", "content": f"{SAFE_PROMPT}\n\nBe brief."}
    assert second is USER
    assert system["content"] == "Be brief."


def test_a_question_holds_the_content_between_fences():
    (message,) = question("a\n====\nb ====== c")
    text = message["content"]
    assert text.count("\n=======\n") == 2
    assert "\na\n====\nb ====== c\n" in text
    assert all(f"\n{label}: " in text for label in LABELS)
    (message,) = question([USER, {"role": "assistant", "content": None}])
    assert "\nuser: Hello\n\nassistant: \n====" in message["content"]


def test_scores_are_shares_of_the_labels():
    following = {label: 10 + i for i, label in enumerate(LABELS)}
    logprobs = {10 + i: math.log(share) for i, share in enumerate((0.05, 0.01, 0.1, 0.04))}
    found = Moderation.of(following, {**logprobs, 3: math.log(0.8)})
    assert found.scores == pytest.approx({"illegal": 0.05, "hateful": 0.5, "unqualified": 0.2})
    assert (found.category, found.flagged) == ("hateful", True)
    found = Moderation.of(following, {**logprobs, 10: -1.0, 11: -math.inf})
    assert found.scores["illegal"] == 0
    assert (found.category, found.flagged) == ("acceptable", False)


def test_the_tokens_of_labels():
    tokenizer = Tokenizer.from_folder(DEMO_MODEL)
    begin, following = label_ids(tokenizer)
    assert {*following} == {"acceptable", *CATEGORIES}
    for label, token_id in following.items():
        ids = [*begin, token_id]
        assert tokenizer.encode(label, bos=False)[: len(ids)] == ids


class Letters:
    """A tokenizer that writes a space of its own before each text."""

    path = "letters"

    def encode(self, text: str, bos: bool) -> list[int]:
        return [0, *map(ord, text[:1])]


def test_labels_that_begin_with_the_same_token(monkeypatch):
    begin, following = label_ids(Letters())
    assert (begin, following["hateful"]) == ([0], ord("h"))
    monkeypatch.setattr(Letters, "encode", lambda self, text, bos: [len(text) > 7, 5])
    with pytest.raises(ValueError, match="letters has no tokens that tell acceptable, illegal"):
        label_ids(Letters())
