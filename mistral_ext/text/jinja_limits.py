"""Limits the rendering of a template: its steps, its time, and the size of what it makes.

`jinja_sandbox` counts each step and measures each result here. If a short expression can make a
large result, a function `before_...` counts the size before the result is made.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from string import Formatter
from typing import Any

import jinja2

MAX_STEPS = 300_000
MAX_SECONDS = 10.0
# The number of characters that a rendering may make is MAX_MADE, plus MAX_MADE_PER_CHARACTER for
# each character of its input: a message may pass through several filters, and each result counts.
MAX_MADE = 2**24
MAX_MADE_PER_CHARACTER = 64

_MAX_ARGUMENT = 1_000_000  # the largest integer that a template may pass to a function or filter
_MAX_BITS = 2048  # the most bits of an integer that a template may make
ITEM = 16  # an element of a list or dict counts as this many characters


class LimitError(jinja2.TemplateError):
    """The template exceeds a limit."""


class Meter:
    """The steps, time and characters that are left for a rendering."""

    def __init__(self, given: int) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_MADE + MAX_MADE_PER_CHARACTER * given
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise LimitError(f"it takes longer than {MAX_SECONDS} seconds")

    def made(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise LimitError("it makes too much text")


METER: ContextVar[Meter] = ContextVar("meter")


def text_size(value: Any) -> int:
    """The approximate number of characters of str(value). Raises LimitError if they are more than
    the rendering may still make.

    A list may contain another list twice, which contains a third list twice, and so on. Such a
    value is small in memory, but its text is huge.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict)):
        return ITEM
    size, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        size += len(item) + ITEM if isinstance(item, str) else ITEM
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        meter = METER.get(None)
        if meter and size > meter._characters:
            raise LimitError("it makes too much text")
    return size


def measured(value: Any) -> Any:
    """Counts the size of a result, and returns the result."""
    meter = METER.get()
    if isinstance(value, str):
        meter.made(len(value))
    elif isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise LimitError("it makes too large a number")
    elif isinstance(value, (list, tuple, dict)):
        waiting = [value]
        while waiting:
            item = waiting.pop()
            meter.made(ITEM)
            if isinstance(item, dict):
                waiting += item.values()
            elif isinstance(item, (list, tuple)):
                waiting += item
    return value


def check_arguments(*arguments: Any) -> None:
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > _MAX_ARGUMENT:
            raise LimitError(f"it passes a number above {_MAX_ARGUMENT}")


# Checks before a short expression makes a large result


def before_replace(text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    times = str(text).count(old) if old else len(str(text)) + 1
    METER.get().made(times * len(str(new)))


def before_format(text: str, arguments: Any) -> None:
    bare = text.replace("{{", "").replace("}}", "")
    if re.search(r"\d{4}|%[^%a-zA-Z]*\*|\{[^{}]*\{", bare):
        raise LimitError("it formats with a width of four digits or more, or a computed one")
    METER.get().made((text.count("{") + text.count("%")) * text_size(arguments))


def before_fields(text: str, arguments: Any) -> None:
    for _, field, _, _ in Formatter().parse(text):
        if field and "." in field:
            raise LimitError("it formats an attribute")  # an attribute's text may have any size
    before_format(text, arguments)


def before_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    text = str(text)
    width = len(width) if isinstance(width, str) else width
    METER.get().made((text.count("\n") + 1) * width + text.count("\n"))


def before_tabs(text: str, tabsize: Any = 8) -> None:
    METER.get().made(text.count("\t") * max(0, tabsize))


def before_rows(*arguments: Any) -> None:
    count = sum(abs(argument) for argument in arguments if isinstance(argument, int))
    METER.get().made(ITEM * count)


def before_join(separator: str, items: list[Any]) -> None:
    METER.get().made(len(separator) * len(items) + text_size(items))
