"""What the demo model writes for schemas of every kind is valid, at temperature 1.

`tools/check_schemas.py` does the same with hundreds of them, JSON Schema's own test suite.
"""

from __future__ import annotations

import json

from check_schemas import check, schemas_of

from mistral_ext import Mistral
from mistral_ext.llm import DEMO_MODEL

SHORT = {"type": "string", "maxLength": 6}


def closed(**properties):
    required = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def listed(items, most=3, **more):
    return {"type": "array", "items": items, "maxItems": most, **more}


# None of them has texts without an end, so max_tokens cuts none.
SCHEMAS = [
    {"type": "null"},
    {"type": "boolean"},
    {"const": {"a": [1, "é", None]}},
    {"enum": [1, "two", None, False, [3], {"four": 5}]},
    {"type": "integer", "minimum": -7, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1001},
    {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    {"type": "number", "minimum": 0.25, "maximum": 0.5},
    {"type": ["boolean", "null"]},
    SHORT,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    {"type": "string", "pattern": "^(a|b)+c?$", "maxLength": 9},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    listed({"type": "boolean"}),
    listed(SHORT, minItems=2),
    listed(listed({"enum": [0, 1]}, 2, minItems=2), 2, minItems=2),
    {"type": "array", "prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2},
    {
        "type": "array",
        "prefixItems": [{"const": "go"}],
        "items": {"enum": ["left", "right"]},
        "minItems": 2,
        "maxItems": 4,
    },
    closed(),
    closed(a=SHORT),
    closed(**{'a "b"\n': {"type": "boolean"}, "é": {"type": "null"}}),
    closed(a=closed(b=closed(c=listed({"type": "integer", "minimum": 0, "maximum": 9})))),
    {**closed(a=SHORT, b={"type": "boolean"}), "required": ["b"]},
    {**closed(a=SHORT, b=SHORT, c=SHORT), "required": []},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
    {"type": "object", "patternProperties": {"^x[0-9]$": SHORT}, "maxProperties": 0},
    {"anyOf": [SHORT, {"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]},
    {"anyOf": [closed(kind={"const": "a"}, x=SHORT), closed(kind={"const": "b"})]},
    {"oneOf": [closed(kind={"const": "a"}, x=SHORT), closed(kind={"const": "b"})]},
    {"oneOf": [{"type": "boolean"}, SHORT]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 20}]},
    {
        "type": "object",
        "allOf": [
            {"properties": {"a": SHORT}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "unknownToAll": True,
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    {"$defs": {"name": SHORT}, **closed(first={"$ref": "#/$defs/name"})},
    {"definitions": {"name": SHORT}, **listed({"$ref": "#/definitions/name"}, 2)},
    {"$id": "https://example.org/a", "$ref": "#here", "$defs": {"x": {"$anchor": "here", **SHORT}}},
    {"title": "T", "description": "D", "default": 1, "examples": [1], **closed(a={"const": 1})},
    {**closed(a={"type": ["string", "null"], "maxLength": 3}), "$comment": "nullable"},
]


def test_all_that_is_written_is_valid():
    llm = Mistral.from_pretrained(DEMO_MODEL)
    counts, wrong = check(llm, map(json.dumps, SCHEMAS), n=2, max_tokens=400, seed=0)
    assert not wrong
    assert counts == {"compiled": len(SCHEMAS), "valid": 2 * len(SCHEMAS)}


def test_what_is_not_valid_is_found(tmp_path):
    """By the check itself."""
    folder = tmp_path / "draft7"
    folder.mkdir()
    groups = [{"schema": {"type": "integer", "maximum": 5}}, {"schema": True}, {"schema": {}}] * 2
    (folder / "a.json").write_text(json.dumps(groups))
    texts = list(schemas_of(folder))
    assert [json.loads(text)["$schema"][:30] for text in texts] == [
        "http://json-schema.org/draft-0"
    ] * 2

    class Deaf(Mistral):
        def grammar(self, params, *options):
            return super().grammar(type(params)(regex="[6-9]"), *options)

    counts, wrong = check(Deaf.from_pretrained(DEMO_MODEL), iter(texts[:1]), n=1)
    assert counts == {"compiled": 1, "INVALID": 1}
    assert "maximum" in wrong[0]
