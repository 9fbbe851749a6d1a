"""Conversations, by OpenAI's client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

HELLO = [{"role": "user", "content": "Once upon a time there was"}]
OPTIONS = {"model": "demo", "messages": HELLO, "max_completion_tokens": 24, "seed": 5}


def streamed(chunks, index: int = 0) -> str:
    return "".join(
        choice.delta.content or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def test_reply(demo):
    reply = demo.client().chat.completions.create(**OPTIONS)
    (choice,) = reply.choices
    assert reply.object == "chat.completion"
    assert reply.model == "demo"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage.completion_tokens == 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 24
    assert reply._request_id == reply.id


def test_a_seed_gives_the_same_reply_and_another_another(demo):
    client = demo.client().chat.completions
    replies = [client.create(**{**OPTIONS, "seed": seed}) for seed in (5, 5, 6, -5)]
    texts = [reply.choices[0].message.content for reply in replies]
    assert texts[0] == texts[1]
    assert len({*texts}) == 3


def test_stream_is_the_reply_in_pieces(demo):
    client = demo.client().chat.completions
    whole = client.create(**OPTIONS).choices[0].message.content
    chunks = list(client.create(**OPTIONS, stream=True))
    assert streamed(chunks) == whole
    assert len(chunks) > 12
    assert len({chunk.id for chunk in chunks}) == 1
    roles = [choice.delta.role for chunk in chunks for choice in chunk.choices]
    assert roles == ["assistant"] + [None] * (len(roles) - 1)
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_frames_of_a_stream(demo):
    options = {"include_usage": True, "include_obfuscation": None}
    body = {**OPTIONS, "stream": True, "stream_options": options}
    with demo.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode()
    *frames, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(f.removeprefix("data: ")) for f in frames if f != ": ping"]
    assert {type(chunk["usage"]) for chunk in chunks[:-1]} == {type(None)}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_stream_helper_puts_the_reply_together(demo):
    client = demo.client().chat.completions
    stop = client.create(**OPTIONS).choices[0].message.content[30:34]  # the helper wants an end
    whole = client.create(**OPTIONS, logprobs=True, stop=stop)
    with client.stream(**OPTIONS, logprobs=True, stop=stop) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content
    assert final.choices[0].finish_reason == "stop"


def test_several_replies(demo):
    client = demo.client().chat.completions
    whole = client.create(**OPTIONS, n=3)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({*texts}) == 3
    assert whole.usage.completion_tokens == 3 * 24
    chunks = list(client.create(**OPTIONS, n=3, stream=True))
    assert [streamed(chunks, i) for i in range(3)] == texts
    assert [chunk.choices[0].index for chunk in chunks[:3]] == [0, 1, 2]
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3


def test_async_client_and_many_at_once(demo):
    async def all_of_them():
        async with demo.client(openai.AsyncOpenAI) as client:

            async def stream(seed: int) -> str:
                chunks = await client.chat.completions.create(
                    **{**OPTIONS, "seed": seed}, stream=True
                )
                return streamed([chunk async for chunk in chunks])

            async def whole(seed: int) -> str:
                reply = await client.chat.completions.create(**{**OPTIONS, "seed": seed})
                return reply.choices[0].message.content

            streams = asyncio.gather(*map(stream, range(12)))
            wholes = asyncio.gather(*map(whole, range(12)))
            return await streams, await wholes

    streams, wholes = asyncio.run(all_of_them())
    assert streams == wholes
    assert len({*wholes}) == 12


def test_stop_strings_end_a_reply(demo):
    client = demo.client().chat.completions
    text = client.create(**OPTIONS).choices[0].message.content
    stop = text[20:24]
    reply = client.create(**OPTIONS, stop=[stop, "never"])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert streamed(client.create(**OPTIONS, stop=stop, stream=True)) == text[: text.index(stop)]


def test_stop_token_ids_end_a_reply(demo):
    client = demo.client().chat.completions
    logprobs = client.create(**OPTIONS, logprobs=True, temperature=0).choices[0].logprobs
    fifth = logprobs.content[4].token
    (token_id,) = demo.post(
        "/tokenize", {"prompt": fifth.strip(), "add_special_tokens": False}
    ).json()["tokens"]
    reply = client.create(**OPTIONS, temperature=0, extra_body={"stop_token_ids": [token_id]})
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens <= 5


def test_logprobs_spell_the_reply(demo):
    client = demo.client().chat.completions
    options = {**OPTIONS, "logprobs": True, "top_logprobs": 3}
    (choice,) = client.create(**options).choices
    content = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == choice.message.content
    assert len(content) == 24
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        ordered = [top.logprob for top in entry.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
    chunks = list(client.create(**options, stream=True))
    found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [entry for logprobs in found for entry in logprobs.content] == content


def test_no_logprobs_may_be_asked_for_in_full(demo):
    reply = demo.client().chat.completions.create(**OPTIONS, logprobs=False, top_logprobs=0)
    assert reply.choices[0].logprobs is None


def test_greedy_takes_the_most_likely_and_bias_forbids_it(demo):
    client = demo.client().chat.completions
    options = {**OPTIONS, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    first = client.create(**options, max_tokens=1).choices[0].logprobs.content[0]
    assert first.token == first.top_logprobs[0].token
    token = {"prompt": first.token, "add_special_tokens": False}
    (token_id,) = demo.post("/tokenize", token).json()["tokens"]
    biased = client.create(**options, logit_bias={str(token_id): -100})
    assert biased.choices[0].logprobs.content[0].token != first.token


def test_content_may_come_in_parts_and_roles_may_be_newer(demo):
    client = demo.client().chat.completions
    parts = [{"type": "text", "text": "Once upon a time "}, {"type": "text", "text": "there was"}]
    plain = client.create(**OPTIONS)
    in_parts = client.create(**{**OPTIONS, "messages": [{"role": "user", "content": parts}]})
    assert in_parts.choices[0].message.content == plain.choices[0].message.content
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    reply = client.create(**{**OPTIONS, "messages": messages})
    assert reply.usage.prompt_tokens > plain.usage.prompt_tokens


def test_what_clients_send_and_nothing_needs_is_ignored(demo):
    reply = demo.client().chat.completions.create(
        **OPTIONS,
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=False,
        tool_choice="none",
        tools=[],
        response_format={"type": "text"},
    )
    assert reply.choices[0].message.content == (
        demo.client().chat.completions.create(**OPTIONS).choices[0].message.content
    )


def test_templates_of_instruct_models(tiny):
    reply = tiny.client().chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "Hello?"},
        ],
        max_tokens=3,
    )
    assert reply.usage.completion_tokens <= 3


def test_a_reply_may_fill_the_context(tiny_folder):
    from servers import serving

    with serving("--model", tiny_folder, "--max-positions", "64") as server:
        reply = server.chat("Hello", ignore_eos=True).json()
        assert reply["usage"]["total_tokens"] == 64
        assert reply["choices"][0]["finish_reason"] == "length"


def test_sampling_defaults_of_the_model(tiny, tiny_folder, tmp_path):
    from servers import serving

    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.8, "top_k": 3, "max_new_tokens": 20}')
    with serving("--model", tiny_folder, "--generation-config", str(file)) as server:
        reply, asked = (
            each.chat(seed=1, ignore_eos=True, **fields).json()
            for each, fields in (
                (server, {"temperature": None}),
                (tiny, {"temperature": 0.8, "top_k": 3, "max_tokens": 20}),
            )
        )
        assert reply["usage"]["completion_tokens"] == 20
        assert reply["choices"] == asked["choices"]
        wins = server.chat(seed=1, ignore_eos=True, max_completion_tokens=2, temperature=0).json()
        assert wins["usage"]["completion_tokens"] == 2
        text = server.post("/v1/completions", {"prompt": "Hello", "ignore_eos": True}).json()
        assert text["usage"]["completion_tokens"] == 16
    file.write_text('{"max_new_tokens": 60}')
    length = ["--model", tiny_folder, "--generation-config", str(file), "--max-positions", "64"]
    with serving(*length) as server:  # a default that does not fit is no reason to refuse
        reply = server.chat("Hello " * 20, ignore_eos=True).json()
        assert reply["usage"]["total_tokens"] == 64
    with serving(*length, "--max-tokens", "5") as server:
        reply = server.chat("Hello", ignore_eos=True).json()
        assert reply["usage"]["completion_tokens"] == 5


def test_options_change_the_reply(demo):
    client = demo.client().chat.completions
    plain = client.create(**OPTIONS).choices[0].message.content
    for option in (
        {"temperature": 2},
        {"top_p": 0.1},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"extra_body": {"top_k": 1}},
        {"extra_body": {"min_p": 0.9}},
        {"extra_body": {"repetition_penalty": 3}},
    ):
        assert client.create(**OPTIONS, **option).choices[0].message.content != plain, option


@pytest.mark.parametrize("client", [openai.OpenAI, openai.AsyncOpenAI])
def test_wrong_fields_raise_openais_errors(demo, client):
    async def fail():
        result = demo.client(client).chat.completions.create(**{**OPTIONS, "temperature": -1})
        return await result if asyncio.iscoroutine(result) else result

    with pytest.raises(openai.BadRequestError, match="temperature is -1") as error:
        asyncio.run(fail())
    assert error.value.param == "temperature"
