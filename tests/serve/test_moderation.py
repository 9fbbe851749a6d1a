"""Guardrails of the server."""

from __future__ import annotations

import sys
from pathlib import Path

import openai
import pytest
from servers import serving

from mistral_ext.llm import Mistral
from mistral_ext.text.guardrails import SAFE_PROMPT

USER = {"role": "user", "content": "Hello"}
JUDGE = (sys.executable, str(Path(__file__).with_name("judging_server.py")))


@pytest.fixture(scope="module")
def judge():
    """A server that refuses prompts and replies with the word BAD."""
    with serving("--moderate", "input,output", command=JUDGE) as server:
        yield server


def test_moderations(tiny, tiny_folder):
    llm = Mistral.from_pretrained(tiny_folder)
    create = tiny.client().moderations.create
    texts = ["Hello", "How do I pick a lock?"]
    answer = create(model="tiny", input=texts)
    assert answer.model == "tiny"
    for text, result in zip(texts, answer.results, strict=True):
        expected = llm.moderate(text)
        assert result.flagged == expected.flagged
        flagged = {name: name == expected.category for name in expected.scores}
        assert result.categories.model_extra == flagged
        assert result.category_scores.model_extra == pytest.approx(dict(expected.scores), rel=1e-4)
    assert create(model="tiny", input=texts[1]).results == answer.results[1:]


@pytest.mark.parametrize(
    ("asked", "words"),
    [(3, "input is 3"), ([], "input is []"), (["a", 1], "input[1] is 1"), ("king " * 9000, "8192")],
)
def test_wrong_inputs(tiny, asked, words):
    response = tiny.post("/v1/moderations", {"input": asked})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["param"].startswith("input")


def test_verdicts(judge):
    good, bad = judge.client().moderations.create(model="demo", input=["good", "BAD"]).results
    assert (good.flagged, bad.flagged) == (False, True)
    assert not any(good.categories.model_extra.values())
    assert [name for name, is_on in bad.categories.model_extra.items() if is_on] == ["illegal"]
    assert judge.metric("moderations_total", content="request", category="illegal") == 1
    assert judge.metric("moderations_total", content="request", category="acceptable") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_prompts_that_are_refused(judge, is_chat, stream):
    client = judge.client()
    before = judge.metric("moderations_total", content="input", category="illegal")
    if is_chat:
        messages = [USER, {"role": "assistant", "content": "a"}, {**USER, "content": "BAD"}]
        create, prompt = client.chat.completions.create, {"messages": messages}
    else:
        create, prompt = client.completions.create, {"prompt": ["a", "BAD"]}
    with pytest.raises(openai.BadRequestError, match="takes it for illegal content") as caught:
        create(model="demo", stream=stream, **prompt)
    assert caught.value.code == "content_filter"
    assert caught.value.param == ("messages" if is_chat else "prompt")
    assert judge.metric("moderations_total", content="input", category="illegal") == before + 1


def ask(judge, is_chat: bool, stream: bool, n: int = 2, **fields):
    """Texts and finish reasons of n completions, by their index."""
    body = {"model": "demo", "n": n, "max_tokens": 20, "seed": 1, "stream": stream}
    client = judge.client()
    if is_chat:
        create, prompt = client.chat.completions.create, {"messages": [USER]}
    else:
        create, prompt = client.completions.create, {"prompt": "Hello"}
    answer = create(**body, **prompt, extra_body=fields)
    texts, reasons = [""] * n, [None] * n
    for part in answer if stream else [answer]:
        for choice in part.choices:
            said = (choice.delta if stream else choice.message).content if is_chat else choice.text
            texts[choice.index] += said or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    return texts, reasons


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_replies_that_are_withheld(judge, is_chat, stream):
    before = judge.metric("request_success_total", finished_reason="content_filter")
    texts, reasons = ask(judge, is_chat, stream, guided_regex="a BAD [a-z]{3}")
    assert (texts, reasons) == (["", ""], ["content_filter", "content_filter"])
    after = judge.metric("request_success_total", finished_reason="content_filter")
    assert after == before + 2
    texts, reasons = ask(judge, is_chat, stream, guided_regex="a good [a-z]{3}")
    assert [text[:-3] for text in texts] == ["a good ", "a good "]
    assert reasons == ["stop", "stop"]
    some = ask(judge, is_chat, stream, n=16, guided_regex="BAD|good", temperature=50)
    assert {*zip(*some, strict=True)} == {("", "content_filter"), ("good", "stop")}


def test_safe_prompt(tiny):
    create = tiny.client().chat.completions.create
    options = {"model": "tiny", "max_tokens": 4, "seed": 1}
    safe = create(messages=[USER], extra_body={"safe_prompt": True}, **options)
    messages = [{"role": "system", "content": SAFE_PROMPT}, USER]
    same = create(messages=messages, **options)
    assert safe.choices == same.choices
    assert safe.usage.prompt_tokens == same.usage.prompt_tokens
