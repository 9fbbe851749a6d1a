"""Completions that match what a request asks for. The numbers are those of complaints about other
servers."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pydantic
import pytest

USER = {"role": "user", "content": "Once upon a time there was"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "friends": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "friends"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
OPTIONS = {"model": "demo", "messages": [USER], "max_tokens": 400}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)


def reply(server, **fields):
    (choice,) = server.client().chat.completions.create(**{**OPTIONS, **fields}).choices
    return choice


@pytest.mark.parametrize("stream", [False, True])
def test_response_format(demo, stream):
    for seed in range(3):
        options = {**OPTIONS, "seed": seed, "response_format": FORMAT}
        if stream:
            chunks = list(demo.client().chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = reply(demo, seed=seed, response_format=FORMAT)
            text, reason = choice.message.content, choice.finish_reason
        assert reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_json_object(demo):
    """Its texts have no end of their own."""
    bias = {str(demo.post("/tokenize", {"prompt": "a}"}).json()["tokens"][-1]): 20}
    choice = reply(demo, response_format={"type": "json_object"}, logit_bias=bias)
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content), dict)


def test_the_clients_own_parser(demo):
    client = demo.client().chat.completions
    parsed = client.parse(**OPTIONS, seed=1, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person)


CONSTRAINTS = {
    "guided_json": ({"guided_json": PERSON}, None),
    "guided_json as text": ({"guided_json": json.dumps(PERSON)}, None),
    "guided_regex": ({"guided_regex": "(king|queen) [0-9]{2}"}, r"(king|queen) [0-9]{2}"),
    "guided_choice": ({"guided_choice": ["a (b", 'c"\n', "é"]}, 'a \\(b|c"\n|é'),
    "guided_grammar": ({"guided_grammar": 'start: "a" b+\nb: "x" | "y!"'}, "a(x|y!)+"),
    "json": ({"structured_outputs": {"json": PERSON}}, None),
    "nulls": (
        {"structured_outputs": {"json": None, "json_object": None, "regex": "[ab]{3}"}},
        "[ab]{3}",
    ),
    "json_object": (
        {"structured_outputs": {"json_object": False, "regex": "[ab]{3}"}},
        "[ab]{3}",
    ),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "grammar": ({"structured_outputs": {"grammar": 'start: " a" | " b"'}}, " [ab]"),
}


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_names_of_vllm(demo, name, is_chat):
    fields, pattern = CONSTRAINTS[name]
    if is_chat:
        choice = reply(demo, extra_body=fields)
        text = choice.message.content
    else:
        body = {"prompt": USER["content"], "max_tokens": 400, "temperature": 1, **fields}
        (answer,) = demo.post("/v1/completions", body).json()["choices"]
        text = answer["text"]
    if pattern is None:
        jsonschema.validate(json.loads(text), PERSON)
    else:
        assert re.fullmatch(pattern, text)


def test_8_rows_with_and_without_masks_and_penalties_in_a_batch(demo):
    """Each gets what it gets alone."""
    kinds = [
        {},
        {"response_format": FORMAT},
        {"frequency_penalty": 1.5},
        {"response_format": FORMAT, "presence_penalty": 1.0, "logit_bias": {"300": 2}},
        {"temperature": 0},
        {"extra_body": {"guided_regex": "[a-z]{40}"}, "top_p": 0.9},
    ]

    def ask(i: int):
        choice = reply(demo, seed=i, max_tokens=60, logprobs=True, **kinds[i])
        return choice.message.content, choice.logprobs.content

    alone = [ask(i) for i in range(len(kinds))]
    with ThreadPoolExecutor(len(kinds)) as pool:
        assert list(pool.map(ask, range(len(kinds)))) == alone


def test_9_nothing_leaks_over_a_slot(demo):
    """Free, constrained, free, constrained: one after the other, they get the same row."""
    kinds = {"seed": 1}, {"seed": 2, "response_format": FORMAT}, {"temperature": 0}
    first, second = ([reply(demo, max_tokens=30, **kind) for kind in kinds] for _ in range(2))
    assert first == second
    assert not first[2].message.content.startswith("{")


NOT_COMPILED = {
    "type": {"guided_json": {"type": "objekt"}},
    "no JSON": {"guided_json": "{"},
    "not an object": {"guided_json": "[]"},
    "keyword": {"guided_json": {"type": "array", "uniqueItems": True}},
    "not": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
    "reference": {"guided_json": {"$ref": "#/nowhere"}},
    "another's": {"guided_json": {"$ref": "http://127.0.0.1:1/a.json"}},
    "itself": {"guided_json": {"$ref": "#"}},
    "nothing": {"guided_json": {"enum": []}},
    "lenient": {"guided_json": {"x-guidance": {"lenient": True}, "not": {"type": "null"}}},
    "oneOf": {
        "guided_json": {
            "x-guidance": {"coerce_one_of": True},
            "oneOf": [{"type": "integer"}, {"type": "number"}],
        }
    },
    "regex": {"guided_regex": "("},
    "look-ahead": {"guided_regex": "(?=a)b"},
    "grammar": {"guided_grammar": "start: ?"},
    "no start": {"guided_grammar": 'begin: "a"'},
    "no end": {"guided_grammar": "start: start"},
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_17_what_does_not_compile_is_400(demo, name):
    with pytest.raises(openai.BadRequestError) as caught:
        reply(demo, extra_body=NOT_COMPILED[name])
    assert "cannot be used" in caught.value.message or "schema is" in caught.value.message
    assert caught.value.param.split(".")[0] in NOT_COMPILED[name]


def _nested(levels: int):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


TOO_MUCH = {
    "deep": ({"guided_json": _nested(200)}, "levels"),
    "deep text": ({"guided_json": "[" * 30_000}, "levels"),
    "deep regex": ({"guided_regex": "(" * 1000 + "a" + ")" * 1000}, "levels"),
    "deep grammar": ({"guided_grammar": "start: " + "(" * 1000 + '"a"' + ")" * 1000}, "levels"),
    "long": ({"guided_json": {"enum": [f"{i:0100}" for i in range(1000)]}}, "bytes"),
    "repeated": ({"guided_regex": "((a{1000}){1000}){1000}"}, "cannot be used"),
    "product": (
        {
            "guided_json": {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        },
        "cannot be used",
    ),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_18_depth_size_and_work_are_bounded(demo, name):
    fields, words = TOO_MUCH[name]
    with pytest.raises(openai.BadRequestError, match=words):
        reply(demo, extra_body=fields)
    assert httpx.get(f"{demo.url}/health").status_code == 200


def test_19_white_space_ends(demo):
    """Even of a model that wants nothing else."""
    ids = {token for text in ("a \n", "a\n\t \r", "a   ") for token in tokens(demo, text)}
    texts = {i: demo.post("/detokenize", {"tokens": [i]}).json()["prompt"] for i in ids}
    bias = {str(i): 100 for i, text in texts.items() if not text.strip()}
    choice = reply(demo, response_format=FORMAT, logit_bias=bias, temperature=0)
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    jsonschema.validate(value, PERSON)
    outside = re.sub(r'"[^"]*"', "_", choice.message.content)
    assert max(map(len, re.findall(r"\s+", outside))) == 8


def tokens(server, text: str) -> list[int]:
    return server.post("/tokenize", {"prompt": text}).json()["tokens"]


def test_max_tokens_cuts_and_says_so(demo):
    choice = reply(demo, extra_body={"guided_regex": "[a-z]{500}"}, max_completion_tokens=5)
    assert choice.finish_reason == "length"
    assert re.fullmatch("[a-z]+", choice.message.content)


def test_stop_strings_and_n(demo):
    choices = demo.client().chat.completions.create(
        **OPTIONS, n=3, stop="7", extra_body={"guided_regex": "([a-z][0-9])*"}, seed=3
    )
    assert len({choice.message.content for choice in choices.choices}) == 3
    for choice in choices.choices:
        assert re.fullmatch("([a-z][0-68-9])*[a-z]?", choice.message.content)
