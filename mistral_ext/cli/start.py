"""Starts a command: imports torch, sets its threads, and decides what Ctrl-C does."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_ext.cli.threads import default_threads


def end_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process at once, until `start` has imported torch and the library.

    During imports a KeyboardInterrupt would not work, because some modules swallow it and others
    print it. It is not needed either, because no work has begun that must be ended in order.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(signal_number: int, frame: object) -> None:
    os.write(2, b"\n")
    os._exit(130)


def start(args: argparse.Namespace) -> None:
    """Imports torch and the library, sets torch's threads, and makes Ctrl-C a KeyboardInterrupt
    again."""
    import torch

    import mistral_ext.llm  # noqa: F401

    torch.set_num_threads(args.threads or default_threads(torch.get_num_threads()))
    _interrupt_on_ctrl_c()


@contextmanager
def importing() -> Iterator[None]:
    """Makes Ctrl-C end this process at once, as `end_on_ctrl_c` does, for imports that only some
    commands need."""
    end_on_ctrl_c()
    try:
        yield
    finally:
        _interrupt_on_ctrl_c()


def _interrupt_on_ctrl_c() -> None:
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
