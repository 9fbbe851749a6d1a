"""Runs programs that a model wrote, each in a process of its own with limits.

The limits keep a program that loops, hogs memory or writes without end from harming the machine by
accident. They are no wall against a program that means harm: it has the rights of this user, reads
the user's files and reaches the network. Run unknown models in a container or a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_RUNNER = Path(__file__).with_name("run_program.py")

SECONDS = 5  # of processor time; a program that waits has some times as many
MEMORY = 2**30  # bytes
_WALL = 4
_REPORT = 200  # bytes at most

PASSED = "passed"
OUT_OF_TIME = "out of time"
ENDED = "ended before its end"


def run_program(source: str, seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Runs a Python program in an empty folder, with an empty environment and this interpreter.

    Args:
        source: the program. What it prints is dropped.
        seconds: of processor time.
        memory: bytes of its address space, the interpreter's included.

    Returns:
        `PASSED`: it ran to its end. Else why not: the name of the exception, `OUT_OF_TIME`, or
        `ENDED` for a program that ended the process.
    """
    key = secrets.token_hex()
    command = [sys.executable, "-I", str(_RUNNER), str(seconds), str(memory)]
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as report,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=report,  # a file, whose size has a limit, and no pipe
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        ) as process,
    ):
        try:
            process.communicate(f"{key}\n{source}".encode(), timeout=_WALL * seconds)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _kill(process)
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return OUT_OF_TIME
        report.seek(0)
        given, _, result = report.read(_REPORT).decode("utf-8", "replace").partition(" ")
    return result if given == key and result else ENDED


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and those that it started and left in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
