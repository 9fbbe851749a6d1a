"""Processes that a test starts and that may not outlive it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer


@contextmanager
def child(command: list[str], seconds: float = 120, **options) -> Iterator[subprocess.Popen]:
    """Starts a process that is ended at the end of the block, or if it takes longer than that: who
    waits for its output then sees the end of it.

    Ctrl-C reaches it, whatever this process does with it: a shell has what it starts in the
    background, as in `pytest &`, ignore SIGINT, and that would be inherited.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    limit = Timer(seconds, process.kill)
    limit.start()
    with process:
        try:
            yield process
        finally:
            limit.cancel()
            process.kill()
