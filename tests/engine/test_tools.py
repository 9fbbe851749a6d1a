"""Replies of a model that may call functions."""

from __future__ import annotations

import json

import jsonschema
import pytest

from mistral_ext.engine.params import SamplingParams
from mistral_ext.text.tool_calls import ToolFormat, ToolUse
from mistral_ext.text.tool_parser import ToolParser

pytest.importorskip("llguidance")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "day": {"type": "integer", "maximum": 9}},
    "required": ["city", "day"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
MESSAGES = [{"role": "user", "content": "How is it in Paris?"}]
OPTIONS = {"max_tokens": 300, "temperature": 1.0}
ONE = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def llm(instruct_llm):
    """It writes whatever its grammar permits."""
    return instruct_llm


@pytest.mark.parametrize("choice", ["required", ONE])
def test_calls_fit_the_functions(llm, choice):
    names = set()
    for seed in range(6):
        reply = llm.chat(
            MESSAGES,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=seed,
            **OPTIONS,
        )
        (call,) = reply.tool_calls
        names.add(call.name)
        arguments = json.loads(call.arguments)
        jsonschema.validate(
            arguments, PARAMETERS if call.name == "weather" else {"maxProperties": 0}
        )
        assert (reply.text, reply.finish_reason) == ("", "tool_calls")
    assert names == ({"weather"} if choice is ONE else {"weather", "now"})


def test_the_model_decides(llm):
    """The bias of a model towards calls stands in for its training."""
    for bias, is_call in ((50.0, True), (-50.0, False)):
        options = {**OPTIONS, "logit_bias": {5: bias}, "seed": 1}
        reply = llm.chat(MESSAGES, tools=TOOLS[1:], parallel_tool_calls=False, **options)
        assert bool(reply.tool_calls) == is_call
        assert bool(reply.text) != is_call


def test_several_calls(llm):
    comma = llm.tokenizer.encode("a,", bos=False)[-1]
    replies = [
        llm.chat(
            MESSAGES,
            tools=TOOLS[1:],
            tool_choice="required",
            logit_bias={comma: 9.0},
            seed=i,
            **OPTIONS,
        )
        for i in range(4)
    ]
    assert max(len(reply.tool_calls) for reply in replies) > 1
    calls = [call for reply in replies for call in reply.tool_calls[:-1]]
    assert all((call.name, json.loads(call.arguments)) == ("now", {}) for call in calls)


def test_no_tools(llm):
    plain = llm.chat(MESSAGES, seed=3, **OPTIONS)
    for options in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        assert llm.chat(MESSAGES, **options, seed=3, **OPTIONS).token_ids == plain.token_ids
    assert plain.tool_calls == ()


def test_a_reply_that_is_cut_off(llm):
    options = {**OPTIONS, "max_tokens": 16, "seed": 1}
    reply = llm.chat(MESSAGES, tools=TOOLS, tool_choice=ONE, **options)
    assert reply.finish_reason == "length"
    (call,) = reply.tool_calls
    assert call.name == "weather"
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(call.arguments)


def test_results_go_back_to_the_model(llm):
    reply = llm.chat(MESSAGES, tools=TOOLS, tool_choice=ONE, parallel_tool_calls=False, **OPTIONS)
    calls = [call.as_message() for call in reply.tool_calls]
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": reply.text, "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "12 degrees"},
    ]
    assert calls[0]["id"] in llm.tokenizer.decode(llm.encode_chat(turns, TOOLS))
    assert llm.chat(turns, tools=TOOLS, max_tokens=3).token_ids


def test_models_that_take_none(llm):
    with pytest.raises(ValueError, match="tools has 2 tools, expected none"):
        llm.chat(MESSAGES, template="v1", tools=TOOLS)
    with pytest.raises(ValueError, match="tool_choice is 'x', expected none, auto"):
        llm.chat(MESSAGES, tools=TOOLS, tool_choice="x")


def test_text_that_a_stop_string_holds_back_before_a_call(llm):
    """It is final when the control token comes, and no part of the call."""
    begin, end = 5, 6  # two of the control tokens of v3
    use = ToolUse.of(ToolFormat(begin, end), TOOLS[1:])
    letters = [llm.tokenizer.encode(letter, bos=False)[-1] for letter in "abc"]
    params = SamplingParams(
        max_tokens=200,
        temperature=1.0,
        seed=1,
        logit_bias={begin: 39.0, **dict.fromkeys(letters, 40.0)},
        stop=[f"{letter}\0" for letter in "abc"],
    )
    prompt = llm.encode_chat(MESSAGES, use.tools)
    request = llm.request(prompt, params, starts_text=True, tools=use)
    parser = ToolParser(use.form)
    for output in llm.engine.outputs([request]):
        list(parser.push(output.token_ids, output.text, output.is_last))
    ids = output.completion.token_ids
    lead = llm.tokenizer.decode(ids[: ids.index(begin)])
    assert lead.strip()[-1] in "abc"
    assert (parser.content, parser.calls[0].name) == (lead.strip(), "now")
