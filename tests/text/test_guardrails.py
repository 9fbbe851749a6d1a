"""The words of guardrails, and what a model's answer says."""

import math
import re

import pytest

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.guardrails import (
    CATEGORIES,
    LABELS,
    SAFE_PROMPT,
    Moderation,
    encode_question,
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


@pytest.mark.parametrize("text", ["a b " * 300 + "the end", "\N{SNOWMAN}" * 300, "x" * 700])
def test_a_question_shows_the_end_of_what_is_too_long(text):
    tokenizer = Tokenizer.from_folder(DEMO_MODEL)

    def encode(messages):
        return tokenizer.encode(messages[0]["content"])

    def asked(room, content=text):
        return encode_question(content, encode, tokenizer, room)

    whole = asked(None)
    assert whole == asked(len(whole)) == encode(question(text))
    least = len(asked(0))
    assert least == len(encode(question(""))) < len(whole) - 200
    for room in (least + 40, least + 150):
        ids = asked(room)
        assert room - 20 < len(ids) <= room
        (shown,) = re.findall("====\n(.*)\n====", tokenizer.decode(ids))
        assert text.endswith(shown)
    reply = {"role": "assistant", "content": "BAD"}
    assert "assistant: BAD\n" in tokenizer.decode(asked(room, [{**USER, "content": text}, reply]))


def test_the_role_of_a_message_is_text():
    for wrong in ({"role": 5}, {"role": None}, {}):
        with pytest.raises(TypeError, match=r"^role of messages\[0\] is (5|None), expected text$"):
            question([{**wrong, "content": "Hi"}])


def test_the_content_of_a_message_is_text():
    parts = [{"type": "text", "text": "Hello"}]
    with pytest.raises(TypeError, match=r"^content of messages\[1\] is a list, expected text"):
        question([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": parts}])
    calls = {"role": "assistant", "content": None, "tool_calls": []}
    assert "assistant: \n" in question([calls])[0]["content"]


def test_scores_are_shares_of_the_labels():
    shares = zip(LABELS, (0.05, 0.01, 0.1, 0.04), strict=True)
    logits = {label: math.log(share) + 3 for label, share in shares}
    found = Moderation.of(logits)
    assert found.scores == pytest.approx({"illegal": 0.05, "hateful": 0.5, "unqualified": 0.2})
    assert (found.category, found.flagged) == ("hateful", True)
    found = Moderation.of({**logits, "acceptable": 5.0, "illegal": -math.inf})
    assert found.scores["illegal"] == 0
    assert (found.category, found.flagged) == ("acceptable", False)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_judgement_follows_from_wrong_logits(place, wrong):
    """It must not be taken for the judgement that a content is acceptable."""
    logits = dict.fromkeys(LABELS, 1.0)
    logits[LABELS[place]] = wrong
    with pytest.raises(ValueError, match="logits are NaN"):
        Moderation.of(logits)
    with pytest.raises(ValueError, match="logits are NaN"):
        Moderation.of(dict.fromkeys(LABELS, -math.inf))


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
