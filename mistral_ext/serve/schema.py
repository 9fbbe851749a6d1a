"""Checks JSON values against the part of JSON Schema that `fields.py` uses.

The keywords are type, enum, anyOf, minimum, exclusiveMinimum, maximum, minLength, maxLength, items,
minItems, maxItems, properties, required, additionalProperties and maxProperties.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from mistral_ext.serve.errors import ApiError, bad_request

Schema: TypeAlias = Mapping[str, Any]


def or_null(schema: Schema) -> Schema:
    """The schema of a value that may be null instead."""
    return {"anyOf": [schema, {"type": "null"}]}


def check(value: Any, schema: Schema, name: str) -> None:
    """Raises ApiError 400 unless a value fits the schema. The message names the field and what was
    expected."""
    if "anyOf" in schema:
        _check_any(value, schema, name)
        return
    if "type" in schema and not any(_is_a(value, kind) for kind in _types(schema)):
        raise _wrong(value, schema, name)
    if "enum" in schema and not any(value == one for one in schema["enum"]):
        raise _wrong(value, schema, name)
    if isinstance(value, str):
        _check_between(value, len(value), schema, name, "minLength", "maxLength")
    elif isinstance(value, list):
        _check_between(value, len(value), schema, name, "minItems", "maxItems")
        if "items" in schema and not _are_integers(value, schema["items"]):
            for i, item in enumerate(value):
                check(item, schema["items"], f"{name}[{i}]")
    elif isinstance(value, dict):
        _check_object(value, schema, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_between(value, value, schema, name, "minimum", "maximum")
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            raise _wrong(value, schema, name)


def _are_integers(values: list[Any], schema: Schema) -> bool:
    """Whether all values are ints that fit the schema of an integer. There may be a million values,
    so they are checked together. If the result is False, the caller must check them one by one:
    values such as 1.0 may fit, too."""
    if schema.get("type") != "integer" or {*map(type, values)} != {int}:
        return False
    least, most = min(values), max(values)
    return bool(schema.get("minimum", least) <= least and most <= schema.get("maximum", most))


def _check_any(value: Any, schema: Schema, name: str) -> None:
    errors = []
    for option in schema["anyOf"]:
        if "type" in option and not any(_is_a(value, kind) for kind in _types(option)):
            continue
        try:
            return check(value, option, name)
        except ApiError as error:
            errors.append(error)
    # If exactly one alternative has the right type, its own error is raised, because it names the
    # place inside the value.
    raise errors[0] if len(errors) == 1 else _wrong(value, schema, name)


def _check_object(value: dict[str, Any], schema: Schema, name: str) -> None:
    _check_between(value, len(value), schema, name, "", "maxProperties")
    others = schema.get("additionalProperties", True)
    for key, item in value.items():
        of_key = schema.get("properties", {}).get(key, others)
        if of_key is False:
            known = ", ".join(sorted(schema["properties"]))
            text = f"unknown field {_join(name, key)!r:.100}, expected one of {known}"
            raise bad_request(text, _join(name, key), "unknown_parameter")
        if of_key is not True:
            check(item, of_key, _join(name, key))
    # A field that is there may say why another is missing, such as a type that is not supported.
    for key in schema.get("required", ()):
        if key not in value:
            raise bad_request(f"{_join(name, key)} is missing", _join(name, key))


def _check_between(
    value: Any, size: float, schema: Schema, name: str, least: str, most: str
) -> None:
    if not schema.get(least, size) <= size <= schema.get(most, size):
        raise _wrong(value, schema, name)


def _types(schema: Schema) -> list[str]:
    kinds = schema["type"]
    return kinds if isinstance(kinds, list) else [kinds]


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and value == value // 1)
    return isinstance(value, {"string": str, "array": list, "object": dict}.get(kind, ()))


def _wrong(value: Any, schema: Schema, name: str) -> ApiError:
    shown = json.dumps(value)
    if len(shown) > 60:
        shown = f"{shown[:60]}..."
    return bad_request(f"{name} is {shown}, expected {describe(schema)}", name)


def describe(schema: Schema) -> str:
    """Describes in words what a schema expects."""
    if "anyOf" in schema:
        return " or ".join(words for option in schema["anyOf"] if (words := describe(option)))
    if "enum" in schema:
        return " or ".join(json.dumps(one) for one in schema["enum"])
    return " or ".join(_WORDS[kind](schema) for kind in _types(schema) if kind != "null")


def _number(word: str, schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if "exclusiveMinimum" in schema:
        word += f" above {schema['exclusiveMinimum']}"
    if least is not None and most is not None:
        return f"{word} from {least} to {most}"
    if least is not None:
        return f"{word}, {least} or more"
    return word if most is None else f"{word}, at most {most}"


def _sized(word: str, unit: str, least: int, most: int | None) -> str:
    if least:
        word = f"non-empty {word}"
    return word if most is None else f"{word} of at most {most} {unit}"


def _list(schema: Schema) -> str:
    word = f"list of ({describe(schema['items'])})" if "items" in schema else "list"
    word = _sized(word, "items", schema.get("minItems", 0), schema.get("maxItems"))
    return f"a {word}"


_WORDS: dict[str, Callable[[Schema], str]] = {
    "null": lambda schema: "null",
    "boolean": lambda schema: "true or false",
    "integer": lambda schema: _number("an integer", schema),
    "number": lambda schema: _number("a number", schema),
    "string": lambda schema: _sized(
        "text", "characters", schema.get("minLength", 0), schema.get("maxLength")
    ),
    "array": _list,
    "object": lambda schema: _sized("an object", "fields", 0, schema.get("maxProperties")),
}


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
