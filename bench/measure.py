"""Timing for the benchmarks: medians, inputs that are not in a cache, the machine's bandwidth."""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from mistral_ext.bench.machine import is_busy, software_and_processor
from mistral_ext.bench.peaks import BEYOND_CACHES, read_bandwidth

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h

PAUSE = 0.03  # seconds

T = TypeVar("T")


def median_seconds(
    functions: Sequence[Callable[[], Any]],
    seconds: float = 0.5,
    least: int = 5,
    most: int = 1000,
    calls: int = 1,
) -> list[float]:
    """The median time of one call of each function.

    The functions take turns, so that other work of the machine slows all of them alike. So their
    ratios are reliable even if the times alone are not. Each function begins after a pause, in
    which the threads of the function before, torch's above all, stop spinning on the cores that it
    needs.

    Args:
        functions: the functions to call. Each is called once more to warm up.
        seconds: how long to go on for each function, within the bounds `least` and `most`.
        least, most: bounds of the number of times of each function.
        calls: how many calls follow each other after a pause. The last of them is timed: with
            several, code and data of the function are in the caches by then.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    stop = time.perf_counter() + seconds * len(functions)
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() < stop):
        for function, samples in zip(functions, times, strict=True):
            spin(PAUSE)
            for _ in range(calls - 1):
                function()
            begin = time.perf_counter()
            function()
            samples.append(time.perf_counter() - begin)
    return [statistics.median(samples) for samples in times]


def spin(seconds: float) -> None:
    """Waits without letting the processor rest. A processor that has rested would begin the next
    call slowly."""
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        pass


def rotate(make: Callable[[], T], nbytes: int) -> Callable[[], T]:
    """Calls `make` several times, and returns a function that gives one of the results in turn. A
    result has `nbytes` bytes.

    There are so many results that each has left the caches when its turn comes again.
    """
    count = max(2, -(-BEYOND_CACHES // max(nbytes, 2**20)))
    turns = cycle([make() for _ in range(count)])
    return lambda: next(turns)


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, instead of returning large blocks to the system.

    Otherwise an op that allocates its result is timed with the page faults of fresh memory at some
    sizes and without them at others. That would say nothing about the op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def machine() -> dict[str, Any]:
    """The facts that the figures of a run depend on, for the head of a report."""
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        **software_and_processor(),
        "read_bandwidth": read_bandwidth(),
    }


def _commit() -> str | None:
    """The commit of the sources that this file belongs to. None: they are not a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def print_machine(facts: dict[str, Any]) -> None:
    print(
        f"{facts['cpu']}, {facts['cores']} cores; {facts['threads']} threads, "
        f"{facts['isa']} kernels, torch {facts['torch']}; "
        f"reads {facts['read_bandwidth'] / 1e9:.1f} GB/s"
    )
    if is_busy(facts):
        print(
            f"The machine is busy (load {facts['load']:.1f}): times are too long, and with "
            "several threads torch's most of all, because they wait for each other."
        )


def print_header(columns: Sequence[tuple[str, int]]) -> None:
    """Prints the head of a table. A column is (title, width). A negative width aligns the column to
    the left, for text."""
    print_row(columns, [title for title, _ in columns])


def print_row(columns: Sequence[tuple[str, int]], cells: Sequence[str]) -> None:
    aligned = (
        f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}"
        for (_, width), cell in zip(columns, cells, strict=True)
    )
    print("  ".join(aligned).rstrip(), flush=True)


def write_json(path: str | Path, report: dict[str, Any]) -> None:
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(path)
