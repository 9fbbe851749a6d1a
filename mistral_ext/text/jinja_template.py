"""Encodes conversations with a model's own chat template, a Jinja program, which `jinja_sandbox`
renders.

Control tokens that the template writes are encoded as control tokens. The same text in a message is
encoded as text, so that a user who writes <|im_end|> or </s> cannot end a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_ext.text.jinja_sandbox import SandboxedTemplate
from mistral_ext.text.tokenizer import Tokenizer, check_text
from mistral_ext.text.tool_messages import Message, Tools


class JinjaTemplate:
    """A chat template in Jinja, such as fine-tunes bring.

    Args:
        path: the file of the template, for error messages.
        sources: templates by name. "default" is used, or with tools "tool_use" if there is one.
        tokenizer: encodes what the template writes. The template gets the texts of the tokenizer's
            special tokens as variables, such as `bos_token`.

    Raises:
        ValueError: no template has the name "default", or a template is not valid.
    """

    def __init__(self, path: Path, sources: Mapping[str, str], tokenizer: Tokenizer) -> None:
        if "default" not in sources:
            raise ValueError(
                f"{path} has chat templates {', '.join(sorted(sources))}, expected one of the name "
                "default"
            )
        self.path = path
        self._templates = {
            name: SandboxedTemplate(source, str(path)) for name, source in sources.items()
        }
        name_of = {i: name for name, i in tokenizer.control_ids.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        names: dict[str, str | None] = {key: name_of[i] for key, i in ids.items() if i in name_of}
        names |= tokenizer.names
        self._tokens = {key: name for key, name in names.items() if name is not None}
        self._tokenizer = tokenizer

    def __str__(self) -> str:
        return str(self.path)

    def source(self, tools: Tools | None = None) -> str:
        """The text of the template that is used with or without tools."""
        return self._template(tools).source

    def render(self, messages: Sequence[Message], tools: Tools | None = None) -> str:
        """The text of a conversation, as transformers' apply_chat_template writes it."""
        text, unmarked = self._render(messages, tools)
        return unmarked(text)

    def encode(
        self, messages: Sequence[Message], tools: Tools | None = None, asks: bool = True
    ) -> list[int]:
        """The token ids of a conversation. Messages and tools are encoded as text, even where they
        spell out a control token.

        Args:
            asks: whether to end with the text that the template writes before a reply.
        """
        text, unmarked = self._render(messages, tools, asks)
        pieces = self._tokenizer.split_control_tokens(text)
        return self._tokenizer.encode_pieces(
            [unmarked(piece) if isinstance(piece, str) else piece for piece in pieces]
        )

    def _template(self, tools: Tools | None) -> SandboxedTemplate:
        return self._templates["tool_use" if tools and "tool_use" in self._templates else "default"]

    def _render(
        self, messages: Sequence[Message], tools: Tools | None, asks: bool = True
    ) -> tuple[str, Callable[[str], str]]:
        """Renders a conversation. Returns the text with marks, and a function that removes the
        marks.

        If a message spells out a control token, a mark replaces the token's first character, so
        that the template's output does not have this token. The mark is a character that occurs
        nowhere else. It is as long as what it replaces, so a template may cut and measure messages.
        """
        template = self._template(tools)
        messages = _plain(list(messages), "messages")
        tools = _plain(list(tools), "tools") if tools else None
        starts = self._tokenizer.control_token_starts()
        given = list(_strings([messages, tools]))
        spelled = {character for text in given for character in starts.findall(text)}
        marks = {}
        if spelled:
            used = {*template.source, *"".join(given)}
            free = (c for c in map(chr, range(0x10FFFD, 0xFFFFF, -1)) if c not in used)
            marks = dict(zip(sorted(spelled), free, strict=False))
            messages, tools = (
                _replaced(value, lambda text: starts.sub(lambda m: marks[m[0]], text))
                for value in (messages, tools)
            )

        def unmarked(text: str) -> str:
            for character, mark in marks.items():
                # A template may have written the mark as JSON in ASCII.
                text = text.replace(mark, character).replace(json.dumps(mark)[1:-1], character)
            return text

        variables = {
            **self._tokens,
            "messages": [
                {key: value for key, value in message.items() if value is not None}
                for message in messages
            ],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": asks,
        }
        try:
            return template.render(variables), unmarked
        except ValueError as error:
            raise ValueError(unmarked(str(error))) from error.__cause__


def _plain(value: Any, name: str) -> Any:
    """A copy of a value made of lists, dicts, strings and numbers. Raises TypeError for other
    objects, because a template could call their methods."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        check_text(value, name)
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{name} is a {type(value).__name__}, expected text, numbers, lists and dicts")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _replaced(value: Any, replace: Callable[[str], str]) -> Any:
    """A copy of a value, with `replace` applied to every string."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {_replaced(k, replace): _replaced(v, replace) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(item, replace) for item in value]
    return value
