"""Handles tools in OpenAI's API: the fields that offer tools, and the calls in answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ext.serve.errors import bad_request
from mistral_ext.serve.schema import Schema
from mistral_ext.text.tool_calls import MOST_TOOLS, ToolDelta, ToolFormat, ToolUse

_TEXT: Schema = {"type": "string"}
_KIND: Schema = {"type": "string", "enum": ["function"]}


def _of_function(properties: Mapping[str, Schema], *required: str) -> dict[str, Any]:
    """The schema of an object of type "function", whose function has these properties."""
    function = {"type": "object", "properties": properties, "required": list(required)}
    return {
        "type": "object",
        "properties": {"type": _KIND, "function": function},
        "required": ["type", "function"],
    }


TOOLS: Schema = {
    "type": "array",
    "items": _of_function(
        {
            "name": _TEXT,
            "description": {"type": ["string", "null"]},
            "parameters": {"type": ["object", "null"], "description": "a JSON schema"},
            "strict": {
                "type": ["boolean", "null"],
                "description": "false permits any object as arguments",
            },
        },
        "name",
    ),
    "maxItems": MOST_TOOLS,
}

# Fields of a request.
FIELDS: dict[str, Schema] = {
    "tools": TOOLS,
    "tool_choice": {
        "anyOf": [
            {"type": "string", "enum": ["none", "auto", "required"]},
            _of_function({"name": _TEXT}, "name"),
        ]
    },
    "parallel_tool_calls": {"type": "boolean", "default": True},
}

_CALL = _of_function({"name": _TEXT, "arguments": _TEXT}, "name", "arguments")
_CALL["properties"]["id"] = _TEXT
_CALL["required"] += ["id"]

# Fields of a message.
OF_MESSAGE: dict[str, Schema] = {
    "tool_calls": {"type": ["array", "null"], "items": _CALL, "maxItems": MOST_TOOLS},
    "tool_call_id": {"type": ["string", "null"]},
}


def tool_use_of(given: Mapping[str, Any], form: ToolFormat | None) -> ToolUse | None:
    """Returns the use of tools that a request asks for, or None if it asks for none.

    Args:
        given: the fields of a request, checked against `FIELDS`.
        form: how the model writes tool calls. None: the model takes no tools.

    Raises:
        ApiError: 400, if a tool or the choice is wrong, or if the model takes no tools.
    """
    choice = given.get("tool_choice", "auto")
    parallel = given.get("parallel_tool_calls", True)
    try:
        return ToolUse.of(form, given.get("tools"), choice, parallel)
    except ValueError as error:
        field = "tool_choice" if str(error).startswith("tool_choice") else "tools"
        raise bad_request(str(error), field) from error


def delta_of(piece: ToolDelta) -> dict[str, Any]:
    """Makes the element of "tool_calls" that brings new text of a call to the client of a stream.
    The client joins all texts that it gets for a call, so the id, the type and the name must come
    only once."""
    if piece.call:
        return {"index": piece.index, **piece.call.as_message()}
    return {"index": piece.index, "function": {"arguments": piece.arguments}}
