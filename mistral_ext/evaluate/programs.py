"""Runs programs that a model wrote, each in a separate process with limits.

The limits protect the machine from accidents: a program that loops, uses too much memory or writes
a file without end. They do not stop a program that means harm. It has the rights of this user, and
can read the user's files and reach the network. Run unknown models in a container or a virtual
machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_RUNNER = Path(__file__).with_name("run_program.py")

SECONDS = 5  # the seconds of processor time that a program may take
MEMORY = 2**30  # the most bytes of the program's address space
_WALL = 4  # the limit by the wall clock, in multiples of the limit of processor time
_REPORT = 200  # the most bytes of a report that are read

PASSED = "passed"
OUT_OF_TIME = "out of time"
ENDED = "ended before its end"


def run_program(source: str, seconds: int = SECONDS, memory: int = MEMORY) -> str:
    """Runs a Python program in an empty folder, with an empty environment and this interpreter.

    Args:
        source: the program. Its output is dropped.
        seconds: the seconds of processor time that the program may take. A program that waits is
            ended after 4 times as many seconds.
        memory: the bytes of its address space, including the interpreter's.

    Returns:
        `PASSED` if the program ran to its end. Otherwise the reason: "failed: " and the name of the
        exception; `OUT_OF_TIME` for a program that was killed, by its time limit or otherwise; or
        `ENDED` for a program that ended the process in another way.
    """
    key = secrets.token_hex()
    program = source.encode("utf-8", "surrogatepass")
    arguments = map(str, (seconds, memory, len(program), len(key)))
    with (
        _own_folder() as folder,
        tempfile.TemporaryFile() as report,
        subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER), *arguments],
            stdin=subprocess.PIPE,
            stdout=report,  # a file and not a pipe, because its size can be limited
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        ) as process,
    ):
        end = threading.Timer(_WALL * seconds, _kill, [process])
        end.start()
        try:
            _write(process, program + key.encode())
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            end.cancel()
            end.join()
            _kill(process)  # before `wait`, after which another process may get this one's id
        if process.wait() in (-signal.SIGXCPU, -signal.SIGKILL):
            return OUT_OF_TIME
        report.seek(0)
        given, _, result = report.read(_REPORT).decode("utf-8", "replace").partition(" ")
    return result if given == key and result else ENDED


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """Makes an empty folder, and removes it after the block. Files that cannot be removed, such as
    folders nested deeper than Python can handle, stay without an error, so that the evaluation
    continues."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)


def _write(process: subprocess.Popen[bytes], given: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(given)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, and the processes in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
