"""The start of a command. Importing torch takes most of its time."""

from __future__ import annotations

import argparse
import os
import signal

from mistral_ext.cli.threads import default_threads


def end_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process at once, until `start` has imported the command's modules.

    A KeyboardInterrupt would not work during imports: some modules swallow it, others print it. At
    this time no work is under way that needs an orderly end.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(signal_number: int, frame: object) -> None:
    os.write(2, b"\n")
    os._exit(130)


def start(args: argparse.Namespace) -> None:
    """Imports torch and the model, sets the threads, and makes Ctrl-C a KeyboardInterrupt again."""
    import torch

    import mistral_ext.llm  # noqa: F401

    torch.set_num_threads(args.threads or default_threads(torch.get_num_threads()))
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
