"""LangChain's ChatOpenAI as a client."""

from __future__ import annotations

import pytest

langchain = pytest.importorskip("langchain_openai")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS}
QUESTION = "How is it in Paris?"


def chat(server, model: str, **options):
    options = {"max_tokens": 40, "seed": 1, "max_retries": 0, "timeout": 200, **options}
    return langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=model, **options)


def test_whole_and_streamed_replies(demo):
    model = chat(demo, "demo")
    whole = model.invoke("Once upon a time")
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == 40
    assert "".join(chunk.content for chunk in model.stream("Once upon a time")) == whole.content


def test_replies_with_a_schema(demo):
    schema = {"title": "city", **PARAMETERS, "additionalProperties": False}
    model = chat(demo, "demo").with_structured_output(schema, method="json_schema")
    assert model.invoke("Once upon a time")["city"] in ("Paris", "Rome")


def test_tools(tiny):
    model = chat(tiny, "tiny").bind_tools([WEATHER], tool_choice="any", parallel_tool_calls=False)
    whole = model.invoke(QUESTION)
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]["city"] in ("Paris", "Rome")) == ("weather", True)
    chunks = list(model.stream(QUESTION))
    streamed = sum(chunks[1:], chunks[0])
    (same,) = streamed.tool_calls
    assert (same["name"], same["args"]) == (call["name"], call["args"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}
    answer = chat(tiny, "tiny", max_tokens=3).invoke([("human", QUESTION), whole, result])
    assert answer.usage_metadata["output_tokens"] <= 3
