"""Measures the limits of this machine with peaks.cpp. Shares in the benchmarks refer to them.

    python bench/peaks.py [--threads N]

prints how fast the threads read memory beyond the caches, with the best plain loop, and how fast
they multiply and add with all operands in registers, for each instruction that the processor has.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

# More than the last-level cache of the machines at hand; inputs that a model would read from
# memory are rotated over this much.
BEYOND_CACHES = 256 * 2**20  # bytes

PASSES = 8

# Name -> what it is, from slow to fast; "<name>_rate" in peaks.cpp.
INSTRUCTIONS = {
    "fp32": "fp32 multiply-add",
    "bf16": "vdpbf16ps",
    "int8": "vpdpbusd",
    "amx_bf16": "AMX bf16 tiles",
    "amx_int8": "AMX int8 tiles",
}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """peaks.cpp, compiled for this very machine; None, with a message, if that is impossible."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        print("No C++ compiler (set CXX): no peaks of arithmetic.")
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peaks.so")
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        command = [compiler, *flags, "-o", str(library), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(f"{source.name} does not compile: no peaks of arithmetic.\n{result.stderr}")
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.read_bandwidth.restype = ctypes.c_double
    loaded.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int]
    for name in INSTRUCTIONS:
        rate = getattr(loaded, f"{name}_rate")
        rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int]
    return loaded


@functools.cache
def _buffer() -> torch.Tensor:
    return torch.ones(2 * BEYOND_CACHES, dtype=torch.uint8)  # ones: pages that exist


def _read(passes: int, loop: int) -> float:
    buffer = _buffer()
    threads = torch.get_num_threads()
    return _library().read_bandwidth(buffer.data_ptr(), buffer.nbytes, threads, passes, loop)


@functools.cache
def _faster_loop() -> int:
    """The faster of the loops in peaks.cpp, by the best of passes that take turns."""
    found = [(_read(1, loop), loop) for _ in range(PASSES) for loop in (0, 1)]
    return max(found)[1]


def read_bandwidth(passes: int = PASSES) -> float:
    """Bytes per second that as many threads as torch has read from memory, over all passes.

    Not the best pass: what is compared with it, a decode step for instance, takes as long as
    several, in which the memory of a virtual machine is not at its best all the time. Without a C++
    compiler it is torch's sum that reads, which is up to a tenth slower.
    """
    if _library() is not None:
        return _read(passes, _faster_loop())
    buffer = _buffer()
    begin = time.perf_counter()
    for _ in range(passes):
        buffer.view(torch.int64).sum()
    return passes * buffer.nbytes / (time.perf_counter() - begin)


def rates(passes: int = PASSES, names: Iterable[str] = tuple(INSTRUCTIONS)) -> dict[str, float]:
    """Operations per second of each of these instructions that there is, by its name.

    A multiplication and an addition are two operations. A pass takes some milliseconds; here the
    best one counts, as what registers allow does not depend on what else the machine does.
    """
    if _library() is None:
        return {}
    threads = torch.get_num_threads()
    measured = {name: getattr(_library(), f"{name}_rate")(threads, passes) for name in names}
    return {name: rate for name, rate in measured.items() if rate}


def matrix_rate(passes: int = PASSES) -> float:
    """Operations per second of the best instruction for bf16 matrices that there is; without any,
    of fp32's; 0 without a C++ compiler."""
    measured = rates(passes, ("amx_bf16",)) or rates(passes, ("bf16",)) or rates(passes, ("fp32",))
    return next(iter(measured.values()), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads read {read_bandwidth() / 1e9:.1f} GB/s")
    for name, rate in rates().items():
        print(f"{INSTRUCTIONS[name]:<18}  {rate / 1e9:8.0f} GFLOP/s")


if __name__ == "__main__":
    main()
