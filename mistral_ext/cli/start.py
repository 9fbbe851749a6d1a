"""Starts a command: imports torch, sets its threads, and decides what Ctrl-C does."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mistral_ext.cli.threads import default_threads

_Handler = Callable[[int, Any], Any]

# Whether a command may end this process at once. Only `end_on_ctrl_c` says so, which is called if
# the process is that of the command, and not another program that calls `main`.
_may_end = False


def end_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process at once, until `start` has imported torch and the library.

    During imports a KeyboardInterrupt would not work, because some modules swallow it and others
    print it. It is not needed either, because no work has begun that must be ended in order.
    """
    global _may_end
    _may_end = True
    _replace_handler(signal.default_int_handler, _end)


def _end(signal_number: int, frame: object) -> None:
    os.write(2, b"\n")
    os._exit(130)


def start(args: argparse.Namespace) -> None:
    """Imports torch and the library, sets torch's threads, and makes Ctrl-C a KeyboardInterrupt
    again."""
    import torch

    import mistral_ext.llm  # noqa: F401

    torch.set_num_threads(args.threads or default_threads(torch.get_num_threads()))
    _replace_handler(_end, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Makes Ctrl-C end this process at once again, for imports that only some commands need, if
    `end_on_ctrl_c` was called."""
    if _may_end:
        _replace_handler(signal.default_int_handler, _end)
    try:
        yield
    finally:
        _replace_handler(_end, signal.default_int_handler)


def _replace_handler(before: _Handler, after: _Handler) -> None:
    """Replaces the handler of Ctrl-C, if it is `before`."""
    if signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)
