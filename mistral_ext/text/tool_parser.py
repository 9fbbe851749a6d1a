"""Reads tool calls while a model writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mistral_ext.text.tool_calls import HEAD, ToolCall, ToolDelta, ToolFormat, new_call_id

_HEAD = re.compile(re.escape(HEAD.format("NAME")).replace("NAME", '"([^"]+)"'))


class ToolParser:
    """Divides one completion into text and calls.

    The engine permits only tokens that fit the grammar of `ToolUse.constraint`. So a text that
    begins like a call is a call.

    Args:
        form: how the model writes calls.

    Attributes:
        content: the text so far, without calls.
        calls: the calls so far. The last call may be incomplete.
    """

    def __init__(self, form: ToolFormat) -> None:
        self.content = ""
        self.calls: list[ToolCall] = []
        self._form = form
        self._held = ""  # text that may belong to a call, or be the white space before one
        self._is_text = True  # no call has begun yet
        self._arguments: _Object | None = None  # the arguments of the unfinished call

    def push(self, token_ids: Sequence[int], text: str, is_last: bool) -> Iterator[str | ToolDelta]:
        """Takes the new tokens and text of an output of the engine.

        Args:
            token_ids: the new tokens.
            text: the text that became final with them.
            is_last: whether this is the last output.

        Yields:
            New pieces of the text (str), and of calls (`ToolDelta`).
        """
        self._held += text
        if self._is_text:
            yield from self._text(token_ids, is_last)
        if not self._is_text:
            yield from self._more_calls()

    def reason(self, finish_reason: str) -> str:
        """Why the completion ended, in OpenAI's words: "tool_calls" if the engine's reason is
        "stop" and the last call is complete. Otherwise this is the engine's reason,
        `finish_reason`, for instance if a stop string cut the last call off."""
        is_whole = self.calls and self._arguments is None
        return "tool_calls" if is_whole and finish_reason == "stop" else finish_reason

    def _text(self, token_ids: Sequence[int], is_last: bool) -> Iterator[str]:
        begin = self._form.begin
        if isinstance(begin, int):
            self._is_text = begin not in token_ids
            cut = 0 if not self._is_text and self._form.end is None else len(self._held)
        else:
            cut = self._held.find(begin)
            self._is_text = cut < 0
            if self._is_text:
                cut = len(self._held) if is_last else _before_part(self._held, begin)
        if not is_last:  # hold white space at the end: before a call it is not text
            cut = len(self._held[:cut].rstrip())
        piece, self._held = self._held[:cut], self._held[cut:]
        if piece:
            self.content += piece
            yield piece

    def _more_calls(self) -> Iterator[ToolDelta]:
        while True:
            if self._arguments is None:
                head = _HEAD.search(self._held)
                if head is None:
                    return
                self._held = self._held[head.end() :]
                self._arguments = _Object()
                self.calls.append(ToolCall(new_call_id(), head[1], ""))
                yield ToolDelta(len(self.calls) - 1, self.calls[-1])
            size = self._arguments.length_in(self._held)
            piece, self._held = self._held[:size], self._held[size:]
            if piece:
                call = self.calls[-1]
                self.calls[-1] = ToolCall(call.call_id, call.name, call.arguments + piece)
                yield ToolDelta(len(self.calls) - 1, arguments=piece)
            if not self._arguments.is_whole:
                return
            self._arguments = None


class _Object:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.is_whole = False
        self._depth = 0
        self._is_string = self._is_escaped = False

    def length_in(self, text: str) -> int:
        """Reads the next text. Returns the number of characters at its beginning that belong to the
        object."""
        for i, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_string = not self._is_string
            elif not self._is_string and character in "{}":
                self._depth += 1 if character == "{" else -1
                if self._depth == 0:
                    self.is_whole = True
                    return i + 1
        return len(text)


def _before_part(text: str, mark: str) -> int:
    """The text up to the returned index cannot be a part of a mark. The rest is a beginning of
    `mark`, so it waits for what follows. It is empty if the text does not end with a beginning."""
    starts = range(max(0, len(text) - len(mark) + 1), len(text))
    return next((i for i in starts if mark.startswith(text[i:])), len(text))
