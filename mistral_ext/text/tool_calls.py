"""Describes tools: the functions that a model may call, and the calls that it writes.

A model writes calls in the format that it was trained with. Mistral's models write the control
token [TOOL_CALLS] and a JSON list of all calls. The Hermes models write each call between
<tool_call> and </tool_call>. A completion with tools has a grammar (`ToolUse.constraint`). So a
call that is not cut off is valid JSON, and names a function that exists. Its arguments match the
function's parameters, or are any object if the function says `"strict": false`. `tool_parser`
relies on the grammar.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_ext.text.constraint import Constraint, guided
from mistral_ext.text.schema_copies import closed, without_notes

MOST_TOOLS = 128  # OpenAI's limit
ID_LENGTH = 9  # the number of characters in the id of a call, as Mistral writes it
ID_CHARACTERS = string.ascii_letters + string.digits

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
HEAD = '{{"name": {}, "arguments": '  # the beginning of a call


@dataclass(frozen=True)
class ToolCall:
    """A call of a function.

    Attributes:
        call_id: 9 letters and digits.
        name: the name of the function.
        arguments: a JSON object. It is incomplete if `max_tokens` or a stop string cut it off.
    """

    call_id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, Any]:
        """The call in OpenAI's format, as an assistant's message has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolDelta:
    """New text of a call: first its id and name, then pieces of its arguments."""

    index: int  # the number of the call in the completion, from 0
    call: ToolCall | None = None  # set only at the beginning of a call; its arguments are empty
    arguments: str = ""  # the new text of the arguments


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        begin: the id of a control token, or the text, that comes before calls.
        end: the id of a control token, or the text, that comes after each call. None: one list has
            all calls, and nothing comes after the list.
    """

    begin: int | str
    end: int | str | None = None


@dataclass(frozen=True)
class ToolUse:
    """The functions that a completion may or must call.

    Attributes:
        form: how the model writes calls.
        tools: the functions in OpenAI's format, for the chat template.
        must_call: whether the completion must consist of calls, without text.
        names: the functions that may be called.
        parallel: whether a completion may have several calls.
    """

    form: ToolFormat
    tools: Sequence[Mapping[str, Any]]
    must_call: bool
    names: Sequence[str]
    parallel: bool

    @classmethod
    def of(
        cls,
        form: ToolFormat | None,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str | Mapping[str, Any] = "auto",
        parallel: bool = True,
    ) -> ToolUse | None:
        """The use of tools that a conversation asks for, or None if it asks for none.

        Args:
            form: how the model writes calls. None: the model takes no tools.
            tools: functions in OpenAI's format.
            choice: "none"; "auto": the model decides; "required": it must call a function; or
                {"type": "function", "function": {"name": ...}}: it must call this function.
            parallel: whether the model may make several calls.

        Raises:
            ValueError, TypeError: a tool or an option is wrong, or the model takes no tools. The
                message names the tool or option.
        """
        tools = tools or ()
        names = check_tools(tools)
        must_call = choice not in ("none", "auto")
        if must_call and choice != "required":
            name = _chosen(choice)
            if name not in names:
                given = ", ".join(names) or "none"
                raise ValueError(f"tool_choice is {name!r}, expected one of the tools: {given}")
            names = [name]
        if must_call and not tools:
            raise ValueError(f"tool_choice is {choice!r}, expected tools to choose from")
        if not tools or choice == "none":
            return None
        if form is None:
            raise ValueError(
                f"tools has {len(tools)} tools, expected none: the model's chat template takes no "
                "tools, or writes calls in a format that is not known"
            )
        return cls(form, tools, must_call, names, parallel)

    @property
    def divider(self) -> int | None:
        """The control token that divides text from calls, or None if the format marks calls by
        text."""
        return self.form.begin if isinstance(self.form.begin, int) else None

    def constraint(self, content: Constraint | None) -> Constraint:
        """Makes the rule for a completion: it has calls. If `must_call` is False, it may have text
        instead, and in the Hermes format also text before calls.

        Args:
            content: the constraint of the text. None: the text may be anything.

        Raises:
            ValueError: `content` is given, and text may come before calls. Or the tools are nested
                too deep.
        """
        if content and self.form.end is not None and not self.must_call:
            raise ValueError(
                "tools are given with a constraint of the text, expected one of them: this model "
                "marks calls by text, which could be a part of both"
            )
        try:
            grammar = self._grammar(content is None)
        except RecursionError:
            raise ValueError("tools are nested too deep") from None
        return Constraint("tools", grammar, None if self.must_call else content)

    def _grammar(self, is_free: bool) -> str:
        """Writes the grammar in llguidance's Lark. `is_free`: the text may be anything. If False,
        @content stands for the constraint of the text."""
        form, start, text = self.form, "start: calls", ["content: @content"]
        begin, end = _in_lark(form.begin), _in_lark(form.end or "")
        free = "(?s:.*)"
        if form.end is None:
            more = ' (", " call)*' if self.parallel else ""
            rules = [f'calls: {begin} " "? "[" call{more} "]"']
        else:
            more = f" (SPACE {begin} body)*" if self.parallel else ""
            rules = [
                f"calls: SPACE {begin} body{more}",
                f"body: SPACE call SPACE {end}",
                r"SPACE: /[ \n]{0,8}/",
            ]
            if not self.must_call:  # text may come before calls
                rules[0] = f"calls: lead body{more}"
                is_text = isinstance(form.begin, str)
                rules.append(
                    f"lead[lazy]: /{free}{form.begin}/" if is_text else f"lead: FREE {begin}"
                )
        if not self.must_call:
            start = "start: content | calls"
            if is_free:
                text = ["content: FREE", f"FREE: /{free}/"]
                if form.end is not None and isinstance(form.begin, str):
                    text[1] += f" & ~/{free}{form.begin}{free}/"
            rules += text
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(self.names))))
        schemas = [without_notes(self._parameters(name)) for name in self.names]
        # This raises an error if the schemas are too large. It comes before they are closed,
        # because closing can make them far larger.
        Constraint("tools", "".join(json.dumps(schema, ensure_ascii=False) for schema in schemas))
        for i, (name, schema) in enumerate(zip(self.names, schemas, strict=True)):
            head = json.dumps(HEAD.format(json.dumps(name)))
            parameters = json.dumps(guided(closed(schema)), ensure_ascii=False)
            rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: %json {parameters}"]
        return "\n".join([start, *rules])

    def _parameters(self, name: str) -> dict[str, Any]:
        """The JSON schema of a function's arguments, which is not closed yet."""
        function = next(t["function"] for t in self.tools if t["function"]["name"] == name)
        if function.get("strict") is False:
            return {"type": "object"}
        # A function takes only the parameters that it lists, and no parameters if it lists none.
        return {"type": "object", "properties": {}, **(function.get("parameters") or {})}


def check_tools(tools: object) -> list[str]:
    """Checks functions in OpenAI's format, and returns their names.

    Raises:
        ValueError, TypeError: `tools` or one of the tools is wrong. The message names it.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise TypeError(f"tools is {tools!r:.60}, expected a list of dicts")
    if len(tools) > MOST_TOOLS:
        raise ValueError(f"tools has {len(tools)} tools, expected at most {MOST_TOOLS}")
    names: list[str] = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(
                f"tools[{i}] is {tool!r:.60}, expected "
                "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
            )
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in names:
            raise ValueError(
                f"tools[{i}] has name {name!r:.80}, expected a new name of 1 to 64 letters, "
                "digits, _ and -"
            )
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"tools[{i}] has parameters {parameters!r:.60}, expected a schema")
        names.append(name)
    return names


def new_call_id() -> str:
    """Makes a new id of a call, in Mistral's form."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(ID_LENGTH))


def _chosen(choice: object) -> str:
    """The name of the function that a choice names."""
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return str(function["name"])
    raise ValueError(
        f"tool_choice is {choice!r:.80}, expected none, auto, required or "
        "{'type': 'function', 'function': {'name': ...}}"
    )


def _in_lark(mark: int | str) -> str:
    return f"<[{mark}]>" if isinstance(mark, int) else json.dumps(mark)
