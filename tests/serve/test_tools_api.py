"""Tools, by OpenAI's client. The model is random: it writes whatever its grammar permits."""

from __future__ import annotations

import asyncio
import json
import re

import jsonschema
import openai
import pytest

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
USER = {"role": "user", "content": "How is it in Paris?"}
OPTIONS = {"model": "tiny", "messages": [USER], "tools": [WEATHER, NOW], "max_tokens": 300}
ONE = {"type": "function", "function": {"name": "weather"}}
CALLS_BEGIN = 5  # the control token [TOOL_CALLS]
COMMA = 29493  # between calls


def test_a_call(tiny):
    create = tiny.client().chat.completions.create
    for choice in ("required", ONE):
        reply = create(**OPTIONS, tool_choice=choice, parallel_tool_calls=False, seed=1)
        assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == (
            "tool_calls",
            None,
        )
        (call,) = reply.choices[0].message.tool_calls
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
        assert call.type == "function"
        assert " 200 tool_calls " in tiny.next_line(0, reply.id)
        if choice is ONE:
            jsonschema.validate(json.loads(call.function.arguments), CITY)
            assert call.function.name == "weather"


def joined(chunks, index: int = 0) -> list[list]:
    """Id, name and arguments of each call of a streamed completion."""
    calls: list[list] = []
    for chunk in chunks:
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or () if choice.index == index else ():
                if delta.index == len(calls):
                    assert delta.type == "function"
                    calls.append([delta.id, delta.function.name, ""])
                else:
                    assert (delta.id, delta.type, delta.function.name) == (None, None, None)
                calls[delta.index][2] += delta.function.arguments
    return calls


def test_a_stream_has_the_same_calls(tiny):
    """Several completions with several calls each."""
    create = tiny.client().chat.completions.create
    options = {**OPTIONS, "tool_choice": "required", "seed": 3, "n": 2, "logprobs": True}
    options |= {"logit_bias": {str(COMMA): 9}}
    whole = create(**options)
    chunks = list(create(**options, stream=True))
    for choice in whole.choices:
        calls = joined(chunks, choice.index)
        assert [call[1:] for call in calls] == [
            [call.function.name, call.function.arguments] for call in choice.message.tool_calls
        ]
        assert len({call[0] for call in calls}) == len(calls)
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        reasons = [c.finish_reason for c in own]
        assert reasons == [None] * (len(own) - 1) + [choice.finish_reason]
        assert [c.delta.role for c in own] == ["assistant"] + [None] * (len(own) - 1)
        assert {c.delta.content for c in own} == {None}
        found = [entry for c in own if c.logprobs for entry in c.logprobs.content]
        assert found == choice.logprobs.content
    assert max(len(choice.message.tool_calls) for choice in whole.choices) > 1


def test_stream_helpers_of_the_client(tiny):
    options = {**OPTIONS, "tool_choice": ONE, "parallel_tool_calls": False, "seed": 2}

    async def by_the_async_client():
        completions = tiny.client(openai.AsyncOpenAI).chat.completions
        async with completions.stream(**options) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    with tiny.client().chat.completions.stream(**options) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        found = stream.get_final_completion()
    for final in (found, asyncio.run(by_the_async_client())):
        (call,) = final.choices[0].message.tool_calls
        jsonschema.validate(call.function.parsed_arguments, CITY)  # strict functions are parsed
        assert final.choices[0].finish_reason == "tool_calls"
    assert [event.name for event in events] == ["weather"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_decides(tiny, stream):
    """The bias of a model towards calls stands in for its training."""
    create = tiny.client().chat.completions.create
    for bias, is_call in ((50, True), (-50, False)):
        options = {**OPTIONS, "tools": [NOW], "parallel_tool_calls": False, "max_tokens": 60}
        options |= {"logit_bias": {str(CALLS_BEGIN): bias}, "seed": 1}
        if stream:
            chunks = list(create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            calls, reason = joined(chunks), chunks[-1].choices[0].finish_reason
        else:
            (choice,) = create(**options).choices
            text, calls = choice.message.content, choice.message.tool_calls
            reason = choice.finish_reason
        assert bool(calls) == (not text) == is_call
        assert reason == ("tool_calls" if is_call else "length")


def test_no_calls_where_none_are_wanted(tiny):
    create = tiny.client().chat.completions.create
    plain = create(model="tiny", messages=[USER], max_tokens=20, seed=1)
    none = create(**{**OPTIONS, "max_tokens": 20}, tool_choice="none", seed=1)
    assert none.choices == plain.choices
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_call_that_is_cut_off(tiny):
    options = {**OPTIONS, "max_tokens": 14, "tool_choice": ONE, "seed": 1}
    (choice,) = tiny.client().chat.completions.create(**options).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.name == "weather"


def test_results_go_back_to_the_model(tiny):
    """With the ids of another server, too."""
    create = tiny.client().chat.completions.create
    reply = create(**OPTIONS, tool_choice=ONE, parallel_tool_calls=False, seed=1)
    said = reply.choices[0].message.model_dump(exclude_none=True)
    for call_id in (said["tool_calls"][0]["id"], "call_0123456789"):
        said["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "tool_call_id": call_id, "content": "12 degrees"}
        messages = [USER, said, result]
        answer = create(**{**OPTIONS, "messages": messages, "max_tokens": 4})
        asked = {"messages": messages, "tools": OPTIONS["tools"]}
        count = tiny.post("/tokenize", asked).json()["count"]
        assert answer.usage.prompt_tokens == count
        assert count > tiny.post("/tokenize", {"messages": messages}).json()["count"]


WRONG = {
    "choice of nothing": (
        {"tools": [], "tool_choice": "required"},
        "tool_choice",
        "to choose from",
    ),
    "another function": (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "expected one of the tools: weather, now",
    ),
    "two of a name": ({"tools": [NOW, NOW]}, "tools", "expected a new name"),
    "no schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]},
        "tools",
        "tools cannot be used",
    ),
    "a call of nothing": (
        {"messages": [USER, {"role": "tool", "tool_call_id": "a", "content": "b"}]},
        "messages",
        "expected the id of a call",
    ),
    "kind": ({"tools": [{**NOW, "type": "custom"}]}, "tools[0].type", '"custom", expected'),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tools(tiny, name):
    fields, param, words = WRONG[name]
    with pytest.raises(openai.BadRequestError, match=re.escape(words)) as caught:
        tiny.client().chat.completions.create(**{**OPTIONS, **fields})
    assert caught.value.param == param


def test_a_model_that_takes_none(demo):
    response = demo.chat(tools=[NOW])
    assert response.status_code == 400
    assert "tools has 1 tools, expected none" in response.json()["error"]["message"]
