"""Types of command line arguments, which refuse wrong values before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: an integer of `least` or more."""

    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number}, expected {least} or more")
        return number

    return integer
