"""Runs a program with limits of its process: `programs.run_program` starts this file, not as a
module, in a process of its own. The arguments are the limits, the size of the program in bytes and
the size of a key in bytes. The program and the key come as the input.

The program has passed if it runs to its end. Only then is that reported, with the key. A program
that ends the process before that, even by `exit(0)`, has not passed. The key is read after the
program has run. So a program could only get the key if it searched the open files for it.
"""

from __future__ import annotations

import os
import resource
import sys

_FILE_BYTES = 2**20  # of a file that the program writes
_FILES = 64  # open at once


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
        (resource.RLIMIT_NPROC, 0),  # no other processes; root may have them
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        exec(compile(source, "program", "exec"), {"__name__": "program"})
        result = "passed"
    except BaseException as error:  # SystemExit too
        result = f"failed: {type(error).__name__}"
    os.write(report, _read(key, key_bytes) + f" {result}".encode())
    os._exit(0)  # nothing that the program has registered runs after this


def _read(file: int, size: int) -> bytes:
    """Reads `size` bytes, and none beyond them. A buffered file would read more."""
    data = b""
    while len(data) < size and (more := os.read(file, size - len(data))):
        data += more
    return data


if __name__ == "__main__":
    main()
