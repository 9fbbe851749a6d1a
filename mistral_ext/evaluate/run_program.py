"""Runs a program with limits. `programs.run_program` starts this file in a separate process, as a
script and not as a module. The arguments are the limits, the size of the program in bytes and the
size of a key in bytes. The program and the key come from the input. The key is a secret, which
shows that a report comes from this file and not from the program.

A program passes if it runs to its end. This file then reports the key and "passed". If the program
ends earlier, even by `exit(0)`, this file reports the key and a failure, or nothing if the process
itself has ended. The key is read only after the program has run. So a program could get the key,
and report that it has passed, only if it searched the open files for the key.
"""

from __future__ import annotations

import os
import resource
import sys

_FILE_BYTES = 2**20  # the most bytes of a file that the program writes
_FILES = 64  # the most open files


def main() -> None:
    seconds, memory, program_bytes, key_bytes = (int(argument) for argument in sys.argv[1:])
    source = _read(0, program_bytes).decode("utf-8", "surrogatepass")
    report, key = os.dup(1), os.dup(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_NPROC, 0),  # no other processes; this has no effect for root
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
        result = "passed"
    except BaseException as error:  # includes SystemExit
        result = f"failed: {type(error).__name__}"
    os.write(report, _read(key, key_bytes) + f" {result}".encode())
    os._exit(0)  # skips exit handlers that the program has registered


def _read(file: int, size: int) -> bytes:
    """Reads `size` bytes, or fewer at the end of the file. (A buffered file would read more, and so
    read the key too early.)"""
    data = b""
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data


if __name__ == "__main__":
    main()
