"""The start of a command. Importing torch takes most of its time."""

from __future__ import annotations

import argparse
import os
import signal


def end_on_ctrl_c() -> None:
    """Makes Ctrl-C end this process at once, until `start` has imported the command's modules.

    A KeyboardInterrupt would not work during imports: some modules swallow it, others print it.
    Nothing is under way yet that would need an orderly end.
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

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_threads(threads: int | None) -> None:
    """ValueError for a number of threads below 1, or far above the number of processors."""
    most = max(16, 4 * (os.cpu_count() or 1))  # as csrc/cpu/parallel.cpp
    if threads is not None and not 1 <= threads <= most:
        raise ValueError(f"--threads is {threads}, expected 1 to {most}")
