"""Runs a program with limits of its process: `programs.run_program` starts this file, not as a
module, in a process of its own, with limits as arguments and the program as its input.

The program has passed if it runs to its end. Only then is that reported, with a key that the
program was not given: what ends the process before, `exit(0)` too, has not passed.
"""

from __future__ import annotations

import os
import resource
import sys

_FILE_BYTES = 2**20  # of a file that the program writes
_FILES = 64  # open at once


def main() -> None:
    seconds, memory = (int(argument) for argument in sys.argv[1:])
    key, _, source = sys.stdin.buffer.read().decode().partition("\n")
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, 0),  # no other processes; root may have them
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
        result = "passed"
    except BaseException as error:  # SystemExit too
        result = type(error).__name__
    os.write(report, f"{key} {result}".encode())
    os._exit(0)  # nothing that the program has registered runs after this


if __name__ == "__main__":
    main()
