"""Reads from a request the rule that its completions must match, such as a JSON schema.

OpenAI and vLLM have different fields for it. This module reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mistral_ext.serve.errors import bad_request
from mistral_ext.serve.schema import Schema, or_null

_SOURCE: Schema = {"type": "string", "minLength": 1}
_JSON_SCHEMA: Schema = {"anyOf": [{"type": "object"}, _SOURCE]}
_CHOICE: Schema = {"type": "array", "items": _SOURCE, "minItems": 1, "maxItems": 1024}

FIELDS: dict[str, Schema] = {
    "response_format": {
        "type": "object",
        "properties": {
            "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
            "json_schema": {
                "type": ["object", "null"],
                "properties": {
                    "name": {"type": ["string", "null"]},
                    "description": {"type": ["string", "null"]},
                    "schema": {"type": "object"},
                    "strict": {"type": ["boolean", "null"]},
                },
                "required": ["schema"],
                "additionalProperties": False,
            },
        },
        "required": ["type"],
        "additionalProperties": False,
    },
    "guided_json": _JSON_SCHEMA,
    "guided_regex": _SOURCE,
    "guided_grammar": {**_SOURCE, "description": "in Lark"},
    "guided_choice": _CHOICE,
    "structured_outputs": {
        "type": "object",
        "properties": {
            "json": or_null(_JSON_SCHEMA),
            "json_object": {"type": ["boolean", "null"]},
            "regex": or_null(_SOURCE),
            "grammar": or_null(_SOURCE),
            "choice": or_null(_CHOICE),
        },
        "additionalProperties": False,
    },
}

_ANY_OBJECT = {"type": "object"}


class Structure(NamedTuple):
    """A constraint: the rule that completions must match.

    Attributes:
        field: the field of the request that has the constraint, for error messages.
        option: the option of `SamplingParams` that the constraint becomes.
        value: the value of the option.
    """

    field: str
    option: str
    value: Any


def structure_of(given: Mapping[str, Any]) -> Structure | None:
    """Returns the constraint of a request's completions, or None if the request has none.

    Args:
        given: the fields of a request, checked against `FIELDS`.

    Raises:
        ApiError: 400, if `response_format` has the type json_schema without a schema or a schema
            without this type, or if there are several constraints.
    """
    found = [*_of_format(given.get("response_format"))]
    for name in ("json", "regex", "grammar", "choice"):
        if (field := f"guided_{name}") in given:
            found.append(_structure(field, name, given[field]))
    for name, value in given.get("structured_outputs", {}).items():
        field = f"structured_outputs.{name}"
        if value and name == "json_object":
            found.append(Structure(field, "schema", _ANY_OBJECT))
        elif value is not None and name != "json_object":
            found.append(_structure(field, name, value))
    if len(found) > 1:
        fields = " and ".join(structure.field for structure in found)
        raise bad_request(f"{fields} are given, expected one of them", found[1].field)
    return found[0] if found else None


def _of_format(response_format: Mapping[str, Any] | None) -> list[Structure]:
    field = "response_format"
    kind = (response_format or {}).get("type", "text")
    schema = (response_format or {}).get("json_schema")
    if (kind == "json_schema") != (schema is not None):
        text = f"{field}.json_schema goes with type json_schema, and with no other"
        raise bad_request(text, f"{field}.json_schema")
    if schema is not None:
        return [Structure(f"{field}.json_schema.schema", "schema", schema["schema"])]
    return [Structure(field, "schema", _ANY_OBJECT)] if kind == "json_object" else []


def _structure(field: str, name: str, value: Any) -> Structure:
    if name == "choice":
        words = (json.dumps(word, ensure_ascii=False) for word in value)
        return Structure(field, "grammar", f"start: {' | '.join(words)}")
    return Structure(field, "schema" if name == "json" else name, value)
