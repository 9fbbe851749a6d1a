"""Converts messages with tool calls from OpenAI's format to that of chat templates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mistral_ext.text.tool_calls import ID_CHARACTERS, ID_LENGTH

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.messages import ChatMessage

_ID = re.compile(f"[{ID_CHARACTERS}]{{{ID_LENGTH}}}")

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]


def mistral_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """Converts messages to the classes of mistral-common.

    If the id of a call does not have Mistral's form, it is replaced by an id that is computed from
    it. So a call and its result still have the same id. Text beside calls is dropped, because
    Mistral's templates have no place for it.

    Raises:
        ValueError: a message is wrong. The error names the message.
    """
    from mistral_common.protocol.instruct import messages as protocol
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall

    # The names of the functions that were called, by the ids of the calls.
    names: dict[str, str] = {}
    converted: list[ChatMessage] = []
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "system":
            converted.append(protocol.SystemMessage(content=content))
        elif message["role"] == "user":
            converted.append(protocol.UserMessage(content=content))
        elif message["role"] == "tool":
            given = _text(message, "tool_call_id", f"messages[{i}]")
            if given not in names:
                raise ValueError(
                    f"messages[{i}] has tool_call_id {given!r:.60}, expected the id of a call "
                    "before it"
                )
            converted.append(
                protocol.ToolMessage(content=content, tool_call_id=_id(given), name=names[given])
            )
        elif message.get("tool_calls"):
            calls = []
            for j, call in enumerate(message["tool_calls"]):
                place = f"messages[{i}]['tool_calls'][{j}]"
                given, name, arguments = _call(call, place)
                names[given] = name
                function = FunctionCall(name=name, arguments=arguments)
                calls.append(ToolCall(id=_id(given), function=function))
            converted.append(protocol.AssistantMessage(content=None, tool_calls=calls))
        else:
            converted.append(protocol.AssistantMessage(content=content))
    return converted


def with_parsed_arguments(messages: Sequence[Message]) -> list[Message]:
    """Parses the arguments of calls, given as JSON text, to objects. Templates themselves write
    arguments as JSON, and would quote JSON text once more."""
    return [
        {**message, "tool_calls": [_parsed(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), Sequence)
        else message
        for message in messages
    ]


def _parsed(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:  # the call was cut off, so its arguments are not JSON
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _call(call: Any, place: str) -> tuple[str, str, str]:
    """Returns the id, the name and the arguments (JSON) of a call in OpenAI's format."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f"{place} is {call!r:.60}, expected {{'id': ..., 'type': 'function', 'function': "
            "{'name': ..., 'arguments': ...}}"
        )
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return _text(call, "id", place), _text(function, "name", place), arguments


def _text(values: Mapping[str, Any], key: str, place: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place} has {key} {value!r:.60}, expected text")
    return value


def _id(given: str) -> str:
    """Returns an id in Mistral's form: the given id, or an id that is computed from it."""
    if _ID.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.sha256(given.encode()).digest(), "big")
    characters = []
    for _ in range(ID_LENGTH):
        number, digit = divmod(number, len(ID_CHARACTERS))
        characters.append(ID_CHARACTERS[digit])
    return "".join(characters)
