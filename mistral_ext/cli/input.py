"""Input of several commands: stdin and text files."""

from __future__ import annotations

import sys
from typing import TextIO

from mistral_ext.files import decode_text, read_text_file


def stdin() -> TextIO:
    """Returns standard input. Raises ValueError if it is closed."""
    if sys.stdin is None:
        raise ValueError("stdin is closed, expected text in it")
    return sys.stdin


def read_text(file: str) -> str:
    """Returns the text of a file, or of stdin if `file` is "-"."""
    if file == "-":
        return decode_text(stdin().buffer.read(), "stdin")
    return read_text_file(file)
