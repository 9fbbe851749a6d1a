"""Closed schemas permit what the schema permits, without properties that it does not list. Schemas
without notes permit the same values, and so do schemas in known keywords. Schemas with inclusive
bounds permit no other values."""

import uuid

import pytest
from jsonschema import Draft202012Validator

from mistral_ext.text.schema_copies import closed, in_known_keywords, inclusive, without_notes


def listing(**properties):
    return {"type": "object", "properties": properties}


TEXT = {"type": "string"}
A, B = listing(a=TEXT), listing(b=TEXT)
DEFINED = {"$defs": {"A": A, "B/%": B}}


def refer(name: str) -> dict:
    return {"$ref": f"#/$defs/{name}"}


# A schema, values that match it closed, and values that do not.
CASES = [
    (A, [{}, {"a": "x"}], [{"a": 1}, {"b": "x"}]),
    ({"type": "object"}, [{"b": "x"}], []),
    ({**A, "type": ["object", "null"]}, [None, {"a": "x"}], [{"b": "x"}]),
    ({**A, "additionalProperties": TEXT}, [{"b": "x"}], [{"b": 1}]),
    # one schema for an object, in another place
    ({**DEFINED, **refer("A")}, [{"a": "x"}], [{"b": "x"}]),
    ({**DEFINED, **refer("A"), **listing()}, [{"a": "x"}], [{"b": "x"}]),
    ({**DEFINED, "allOf": [refer("A")], "title": "T"}, [{"a": "x"}], [{"b": "x"}]),
    ({"anyOf": [A, B], **listing()}, [{"a": "x"}, {"b": "x"}], [{"a": "x", "b": "x"}, {"c": 1}]),
    # several schemas for an object
    ({"allOf": [A, B]}, [{"a": "x", "b": "x"}], [{"a": 1}, {"b": 1}, {"c": 1}]),
    ({**DEFINED, "allOf": [refer("A"), B]}, [{"a": "x", "b": "x"}], [{"b": 1}, {"c": 1}]),
    ({**DEFINED, **A, **refer("B~1%25")}, [{"a": "x", "b": "x"}], [{"b": 1}, {"c": 1}]),
    ({**A, "allOf": [{"allOf": [B]}]}, [{"a": "x", "b": "x"}], [{"b": 1}, {"c": 1}]),
    ({**A, "allOf": [listing(a={"const": "x"})]}, [{"a": "x"}], [{"a": "y"}, {"c": 1}]),
    ({**A, "oneOf": [B, listing(c=TEXT)]}, [], [{"d": 1}]),
    ({**A, "anyOf": [B, listing(c=TEXT)]}, [{"a": "x", "c": "x"}], [{"b": 1, "c": 1}, {"d": 1}]),
    ({"anyOf": [A, B], "allOf": [listing(c=TEXT)]}, [{"a": "x", "c": "x"}], [{"d": 1}]),
    (listing(o={"allOf": [A, B]}), [{"o": {"a": "x", "b": "x"}}], [{"o": {"c": 1}}, {"c": 1}]),
    ({**listing(a=TEXT, b=TEXT), "anyOf": [{"required": ["a"]}]}, [{"a": "x"}], [{"b": "x"}]),
    ({**A, "allOf": [listing()]}, [{"a": "x"}], [{"b": "x"}]),
    # a schema that is a part in one place, and whole in another
    (
        {**DEFINED, **listing(o=refer("A"), p={"allOf": [refer("A"), B]})},
        [{"o": {"a": "x"}, "p": {"a": "x", "b": "x"}}],
        [{"o": {"b": "x"}}, {"p": {"a": 1}}, {"p": {"c": 1}}],
    ),
    (listing(o=A, p={"allOf": [A, B]}), [{"p": {"a": "x", "b": "x"}}], [{"o": {"b": "x"}}]),
    (
        listing(o=A, p={"allOf": [{"$ref": "#/properties/o"}, B]}),
        [{"p": {"a": "x", "b": "x"}}],
        [{"o": {"b": "x"}}, {"p": {"a": 1}}],
    ),
    # a part, or the schema that combines them, says which other properties it permits
    ({**A, "additionalProperties": False, "allOf": [B]}, [{"a": "x"}], [{"b": "x"}]),
    ({**A, "additionalProperties": TEXT, "allOf": [listing(b={})]}, [{"c": "x"}], [{"b": 1}]),
    ({"allOf": [A, {**B, "additionalProperties": True}]}, [{"c": 1}], [{"a": 1}]),
    ({"allOf": [A, {**B, "patternProperties": {"^x": TEXT}}]}, [{"xy": "x"}], [{"xy": 1}]),
    # names and values that look like keywords
    (listing(enum=A, allOf=B), [{"enum": {"a": "x"}}], [{"enum": {"b": "x"}}, {"allOf": {"a": 1}}]),
    (listing(a={"const": A}), [{"a": A}], [{"a": {**A, "additionalProperties": False}}]),
    # schemas that refer to themselves
    ({**listing(a={"$ref": "#"})}, [{"a": {"a": {}}}], [{"a": {"b": 1}}]),
    ({**listing(a={"$ref": "#"}), "allOf": [B]}, [{"a": {"b": "x"}}], [{"a": {"c": 1}}]),
    (
        {**A, "$defs": {"B": listing(b={"$ref": "#/$defs/B"})}, "allOf": [refer("B")]},
        [{"a": "x", "b": {"b": {}}}],
        [{"b": {"a": "x"}}, {"c": 1}],
    ),
    (
        listing(a=TEXT, o={"allOf": [{"$ref": "#"}, B]}),
        [{"o": {"a": "x", "b": "x", "o": {"b": "x"}}}],
        [{"b": "x"}, {"o": {"c": 1}}, {"o": {"o": {"c": 1}}}],
    ),
    # names of definitions that the copies could take
    (
        {"$defs": {"open-0": TEXT, "A": A}, **listing(b=refer("open-0")), "allOf": [refer("A")]},
        [{"a": "x", "b": "x"}],
        [{"b": 1}, {"a": 1}],
    ),
    # references to names ($anchor) are not followed
    ({**A, "$ref": "#A", "$defs": {"A": {"$anchor": "A"}}}, [{"a": "x"}], [{"b": "x"}]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES)
def test_closed_schemas(schema, right, wrong):
    for value in right:
        assert Draft202012Validator(closed(schema)).is_valid(value), value
    for value in wrong:
        assert not Draft202012Validator(closed(schema)).is_valid(value), value


@pytest.mark.parametrize("wrong", [5, "x", None, True, [1], {"b": 1}])
@pytest.mark.parametrize("key", ["properties", "allOf", "anyOf", "$ref", "$defs", "enum"])
def test_keywords_with_wrong_values_stay(key, wrong):
    schema = {"allOf": [A, {**B, key: wrong}]}
    assert closed(schema)["allOf"][1][key] == wrong
    closed({**A, "anyOf": [B], key: wrong})


def test_a_schema_that_is_a_part_of_itself():
    """No value could be checked against it, but the copy is finite."""
    copy = closed({**A, "allOf": [{"$ref": "#"}]})
    assert copy["allOf"] == copy["$defs"]["open-0"]["allOf"] == [{"$ref": "#/$defs/open-0"}]


def test_notes_are_left_out():
    notes = {"title": "T", "description": "D", "default": 1, "examples": [{"a": 1}]}
    notes |= {"$comment": "C", "deprecated": True, "readOnly": True, "writeOnly": False}
    schema = {"properties": {"title": {"format": "date"}, "format": TEXT}, "enum": [notes]}
    noted = {
        **notes,
        "properties": {"title": {**notes, "format": "date"}, "format": {**TEXT, **notes}},
        "enum": [notes],
    }
    assert without_notes(noted) == schema


def test_formats_that_any_text_has_are_left_out():
    for name in ("path", "password", "binary", "file-path", "directory-path"):
        assert without_notes({"anyOf": [{**TEXT, "format": name}]}) == {"anyOf": [TEXT]}
    for schema in ({"format": "uri"}, {"format": 5}, {"format": ["path"]}, True, 3):
        assert without_notes(schema) == schema


def test_formats_become_patterns():
    formats = {
        "uuid4": (str(uuid.uuid4()), str(uuid.uuid1())),
        "uuid1": (str(uuid.uuid1()).upper(), str(uuid.uuid4())),
        "base64": ("aGk/", "aGk_"),
        "byte": ("", "aGk"),
        "base64url": ("aGk_aA==", "aGk/"),
    }
    for name, (right, wrong) in formats.items():
        schema = {"items": {**TEXT, "format": name}}
        valid = Draft202012Validator(in_known_keywords(schema)).is_valid
        assert valid([right]), name
        assert not valid([wrong]), name
    for schema in ({"format": "uri"}, {"format": ["byte"]}, {"format": "byte", "pattern": "a"}):
        assert in_known_keywords(schema) == schema


NAMES = {"enum": ["a", "b"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"propertyNames": NAMES, "additionalProperties": TEXT},
        {"propertyNames": NAMES},
        {"propertyNames": {"type": "string", **NAMES}, **A, "required": ["a"]},
        {"propertyNames": NAMES, **A, "additionalProperties": False},
        {"propertyNames": refer("N"), "additionalProperties": TEXT, "$defs": {"N": NAMES}},
        {"propertyNames": {"const": "a"}},
    ],
)
def test_names_to_choose_from_become_properties(schema):
    copy = in_known_keywords(schema)
    assert "propertyNames" not in copy
    for value in ({}, {"a": "x"}, {"b": "x"}, {"a": 1}, {"c": "x"}, {"a": "x", "b": "x"}):
        expected = Draft202012Validator(schema).is_valid(value)
        assert Draft202012Validator(copy).is_valid(value) == expected, value


def test_other_names_stay():
    for schema in (
        {"propertyNames": {"maxLength": 3}},
        {"propertyNames": {**NAMES, "maxLength": 3}},
        {"propertyNames": NAMES, "patternProperties": {"a": TEXT}},
        {"propertyNames": NAMES, **listing(c=TEXT)},
        {"propertyNames": {"$ref": "#/missing"}},
        {"propertyNames": {"enum": ["a", 5]}},  # as pydantic writes numbers as keys
        {"propertyNames": {**NAMES, "type": "integer"}},
        {"propertyNames": NAMES, "unevaluatedProperties": False},
    ):
        assert in_known_keywords(schema) == schema


def test_rules_that_forbid_nothing_are_left_out():
    for rule in (
        {"uniqueItems": False},
        {"propertyNames": True},
        {"propertyNames": {}},
        {"propertyNames": {"type": "string", "title": "Name"}},
    ):
        assert without_notes({"items": {"type": "object", **rule}}) == {"items": {"type": "object"}}
    names = {"uniqueItems": TEXT, "propertyNames": TEXT}
    for schema in (
        {"uniqueItems": True},
        {"uniqueItems": 0},
        {"propertyNames": False},
        {"propertyNames": 1},
        {"propertyNames": {"type": "string", "minLength": 1}},
        {"properties": names},
    ):
        assert without_notes(schema) == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMinimum": 0},
        {"exclusiveMinimum": 0.5, "exclusiveMaximum": 1},
        {"exclusiveMinimum": -1},
        {"exclusiveMinimum": True},
        {"exclusiveMinimum": False, "minimum": 0},
        {"exclusiveMinimum": "0"},
        {"exclusiveMinimum": float("inf")},
        {"exclusiveMinimum": 2**60},
        {"exclusiveMinimum": 10**400},
        {"enum": [{"exclusiveMinimum": 0}]},
    ],
)
def test_bounds_that_stay(schema):
    assert inclusive(schema) == schema


def test_bounds_that_become_inclusive():
    changed = inclusive(
        {"anyOf": [{"exclusiveMinimum": 1}, {"exclusiveMaximum": 0, "maximum": -3}]}
    )
    first, second = changed["anyOf"]
    assert list(first) == ["minimum"]
    assert 1 < first["minimum"] < 1 + 1e-12
    assert second == {"maximum": -3}
