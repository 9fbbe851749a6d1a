"""Fields against their schemas, and what is said of those that are wrong."""

from __future__ import annotations

import pytest

from mistral_ext.serve import fields
from mistral_ext.serve.errors import ApiError
from mistral_ext.serve.schema import check, describe

IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1}


def problem(value, schema) -> str | None:
    try:
        check(value, schema, "x")
    except ApiError as error:
        return error.message
    return None


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        ([0, 9, 3.0], IDS, None),
        ([0, 9], IDS, None),
        ([0, 10], IDS, "x[1] is 10, expected an integer from 0 to 9"),
        ([-1, 0], IDS, "x[0] is -1, expected an integer from 0 to 9"),
        ([0, True], IDS, "x[1] is true, expected an integer from 0 to 9"),
        ([0, 1.5], IDS, "x[1] is 1.5, expected an integer from 0 to 9"),
        ([], IDS, "x is [], expected a non-empty list of (an integer from 0 to 9)"),
        (1e300, {"type": "number"}, None),
        (-(10**400), {"type": "number", "exclusiveMinimum": 0}, "x is -1000"),
        (0, {"type": "number", "exclusiveMinimum": 0}, "x is 0, expected a number above 0"),
        (True, {"type": "integer"}, "x is true, expected an integer"),
        (1, {"type": "boolean"}, "x is 1, expected true or false"),
        (None, {"type": ["string", "null"]}, None),
        ("abc", {"type": "string", "maxLength": 2}, 'x is "abc", expected text of at most 2'),
        ("b", {"type": "string", "enum": ["a"]}, 'x is "b", expected "a"'),
        ({"a": 1}, {"type": "object", "required": ["b"]}, "x.b is missing"),
        (
            {"c": 1},
            {"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False},
            "unknown field 'x.c', expected one of a, b",
        ),
        ({"a": 1}, {"type": "object", "additionalProperties": {"type": "string"}}, "x.a is 1"),
        (3, {"anyOf": [{"type": "string"}, IDS]}, "x is 3, expected text or a non-empty list"),
        ([10], {"anyOf": [{"type": "string"}, IDS]}, "x[0] is 10"),
        (
            {"type": "image_url", "image_url": {}},
            fields.MESSAGES["items"]["properties"]["content"]["anyOf"][2]["items"],
            'x.type is "image_url", expected "text"',
        ),
    ],
)
def test_values(value, schema, expected):
    found = problem(value, schema)
    assert found == expected if expected is None else found.startswith(expected)


def test_null_is_not_offered_in_the_message():
    schema = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert problem("a", schema) == 'x is "a", expected an integer'


def test_what_is_long_is_cut_in_the_message():
    assert len(problem("a" * 10**6, {"type": "integer"})) < 120


@pytest.mark.parametrize("table", [fields.CHAT, fields.COMPLETION, fields.NEUTRAL])
def test_every_field_can_be_described(table):
    for name, schema in table.items():
        assert describe(schema) or schema == {"type": "null"}, name


def test_every_keyword_is_one_that_is_checked():
    known = {"type", "enum", "anyOf", "minimum", "exclusiveMinimum", "maximum", "minLength"}
    known |= {"maxLength", "items", "minItems", "maxItems", "properties", "required"}
    known |= {"additionalProperties", "maxProperties", "description", "default"}

    def visit(schema) -> None:
        if not isinstance(schema, dict):
            return
        assert {*schema} <= known
        for part in (*schema.get("properties", {}).values(), *schema.get("anyOf", ())):
            visit(part)
        visit(schema.get("items"))
        visit(schema.get("additionalProperties"))

    for table in (fields.CHAT, fields.COMPLETION, fields.TOKENIZE, fields.DETOKENIZE):
        visit(fields.request_schema(table))
