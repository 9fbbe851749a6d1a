"""Guardrails of the server."""

from __future__ import annotations

import sys
from pathlib import Path

import openai
import pytest
from servers import serving

from mistral_ext.llm import DEMO_MODEL, Mistral
from mistral_ext.text.guardrails import SAFE_PROMPT, question

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


def test_judging_reads_and_does_not_generate(tiny):
    before = tiny.metric("time_to_first_token_seconds_count")
    texts = [f"What is {i} and {i}?" for i in range(100)]  # more than the queue has places
    answer = tiny.client().moderations.create(model="tiny", input=texts)
    assert len(answer.results) == 100
    assert tiny.metric("time_to_first_token_seconds_count") == before
    assert "prompt=0 " not in tiny.next_line(0, answer.id)


def test_a_salt_hides_what_is_judged(judge):
    """Nobody else can learn from the cache what a request with a salt has asked."""

    def cached(ids, **fields):
        body = {"prompt": ids, "max_tokens": 1, **fields}
        usage = judge.post("/v1/completions", body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    secrets = [f"{name} buried all the gold below the old tower. " * 9 for name in "AB"]
    messages = [{**USER, "content": secrets[0]}]
    for path, body, read in (
        ("chat/completions", {"messages": messages}, {"messages": question(messages)}),
        ("moderations", {"input": secrets[1]}, {"messages": question(secrets[1])}),
    ):
        assert judge.post(f"/v1/{path}", {**body, "cache_salt": path}).status_code == 200
        ids = judge.post("/tokenize", read).json()["tokens"]
        assert cached(ids) < len(ids) / 2
        assert cached(ids, cache_salt=path) > len(ids) / 2
    assert judge.post("/v1/embeddings", {"input": "a", "cache_salt": "b"}).status_code == 200


@pytest.fixture(scope="module")
def patient():
    """A server that judges, with a short context, and whose streams are never silent for long."""
    options = "--max-positions", "4096", "--ping-seconds", "0.02"
    with serving("--moderate", "input,output", *options, command=JUDGE) as server:
        yield server


def test_a_reply_that_fills_the_context_is_judged(patient):
    fields = {"prompt": [5] * 4000, "max_tokens": 96, "ignore_eos": True}
    reply = patient.post("/v1/completions", fields)
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["finish_reason"] == "length"
    llm = Mistral.from_pretrained(DEMO_MODEL)
    bad = llm.tokenizer.encode("king " * 5000)[:4090] + llm.tokenizer.encode(" BAD", bos=False)
    refused = patient.post("/v1/completions", {"prompt": bad, "max_tokens": 1}).json()["error"]
    assert (refused["code"], refused["param"]) == ("content_filter", "prompt")


def test_a_stream_pings_while_its_prompt_is_judged(patient):
    reply = patient.chat("king " * 1500 + "BAD", stream=True, max_tokens=1)
    assert reply.text.startswith(": ping\n\n")
    assert "content_filter" in reply.text


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
    def counted(category: str) -> float:
        return judge.metric("moderations_total", content="request", category=category)

    before = counted("illegal"), counted("acceptable")
    good, bad = judge.client().moderations.create(model="demo", input=["good", "BAD"]).results
    assert (good.flagged, bad.flagged) == (False, True)
    assert not any(good.categories.model_extra.values())
    assert [name for name, is_on in bad.categories.model_extra.items() if is_on] == ["illegal"]
    assert (counted("illegal"), counted("acceptable")) == (before[0] + 1, before[1] + 1)


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
    counted = tiny.post("/tokenize", {"messages": [USER], "safe_prompt": True}).json()["count"]
    assert counted == safe.usage.prompt_tokens
