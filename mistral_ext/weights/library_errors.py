"""Shortens the messages of other libraries' errors."""

from __future__ import annotations

import re


def summary(error: BaseException) -> str:
    """The first line of a library's message, without the codes that colour terminals."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
    return text.partition("\n")[0] or type(error).__name__
