"""A real model keeps to what it has to match, and means what it writes."""

from __future__ import annotations

import json

from check_schemas import check


def closed(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def test_the_likeliest_of_some_answers(llm):
    prompt = "The capital of France is"
    (completion,) = llm.generate(prompt, regex=" (London|Rome|Paris|Berlin)", max_tokens=8)
    assert (completion.text, completion.finish_reason) == (" Paris", "stop")


def test_json_of_a_real_model_is_valid(llm):
    text = {"type": "string", "maxLength": 40}
    number = {"type": "integer", "minimum": 0, "maximum": 3000}
    schemas = [
        closed(name=text, year=number),
        closed(city=text, sights={"type": "array", "items": text, "minItems": 1, "maxItems": 3}),
        closed(kind={"enum": ["bird", "fish", None]}, size={"type": "number", "maximum": 9}),
        {"anyOf": [closed(error=text), closed(answer=text)]},
    ]
    counts, wrong = check(llm, map(json.dumps, schemas), n=3, max_tokens=150, seed=0)
    assert not wrong
    assert counts["valid"] >= 10
    assert counts["valid"] + counts["cut"] == 12
