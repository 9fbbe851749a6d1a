"""Measures the limits of this machine's processor with peaks.cpp. Benchmarks give speeds as shares
of these limits.

The first limit is how fast the threads read memory beyond the caches. Two simple loops are tried,
because the processor decides which is faster. The other limits are how fast the threads multiply
and add with all operands in registers. There is one for each of `INSTRUCTIONS` that the processor
has. peaks.cpp is compiled for this machine when it is first needed, which takes some seconds.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

# A size in bytes, larger than the last-level cache of known machines. A model reads its weights
# from memory, not from a cache. So a benchmark of a single op uses several inputs in turn, which
# together have this size.
BEYOND_CACHES = 256 * 2**20

PASSES = 8  # the number of passes of a measurement, by default

# Names of instructions and their descriptions, from slow to fast. The function in peaks.cpp is
# "<name>_rate".
INSTRUCTIONS = {
    "fp32": "fp32 multiply-add",
    "bf16": "vdpbf16ps",
    "int8": "vpdpbusd",
    "amx_bf16": "AMX bf16 tiles",
    "amx_int8": "AMX int8 tiles",
}

_OF_MATRICES = ("amx_bf16", "bf16", "fp32")  # instructions for bf16 matrices, from fast to slow

_log = logging.getLogger(__name__)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Compiles peaks.cpp for this machine, and loads it. Returns None, with a warning, if this is
    not possible."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        _log.warning("no C++ compiler (set CXX): the peaks of arithmetic are not measured")
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "peaks.so")
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        command = [compiler, *flags, "-o", str(library), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            _log.warning(
                "%s does not compile: the peaks of arithmetic are not measured\n%s",
                source.name,
                result.stderr,
            )
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.read_bandwidth.restype = ctypes.c_double
    sizes = ctypes.c_void_p, ctypes.c_size_t
    loaded.read_bandwidth.argtypes = [*sizes, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    for name in INSTRUCTIONS:
        rate = getattr(loaded, f"{name}_rate")
        rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int]
    return loaded


@functools.cache
def _buffer() -> torch.Tensor:
    # Writing ones makes the system provide pages of memory. For zeros it may provide one page in
    # place of all, which would then be read from a cache.
    return torch.ones(2 * BEYOND_CACHES, dtype=torch.uint8, device="cpu")


def buffer_bytes() -> int:
    """Returns how many bytes of memory `read_bandwidth` keeps for its next call. This is 0 before
    its first call."""
    return _buffer().nbytes if _buffer.cache_info().currsize else 0


def _read(library: ctypes.CDLL, passes: int, loop: int) -> float:
    buffer = _buffer()
    threads = torch.get_num_threads()
    rate: float = library.read_bandwidth(buffer.data_ptr(), buffer.nbytes, threads, passes, loop)
    return rate


@functools.cache
def _faster_loop(library: ctypes.CDLL) -> int:
    """Returns the number of the faster of the two loops in peaks.cpp. The loops take turns, and the
    best pass of each counts."""
    found = [(_read(library, 1, loop), loop) for _ in range(PASSES) for loop in (0, 1)]
    return max(found)[1]


def read_bandwidth(passes: int = PASSES) -> float:
    """Returns the bytes per second that the threads read from memory. There are as many threads as
    torch uses.

    All passes count, not only the best. The result is compared with a decode step, which takes as
    long as several passes. The memory of a virtual machine does not keep its best speed for so
    long. Without a C++ compiler, torch's sum reads the memory, which is up to a tenth slower.
    """
    library = _library()
    if library is not None:
        return _read(library, passes, _faster_loop(library))
    buffer = _buffer()
    begin = time.perf_counter()
    for _ in range(passes):
        buffer.view(torch.int64).sum()
    return passes * buffer.nbytes / (time.perf_counter() - begin)


def rates(passes: int = PASSES, names: Iterable[str] = tuple(INSTRUCTIONS)) -> dict[str, float]:
    """Measures instructions by their names. Returns the operations per second of each that this
    processor has. The result is empty if there is no C++ compiler.

    A multiplication and an addition are two operations. A pass takes some milliseconds. Only the
    best pass counts, because a pass that reads no memory is slower only if the machine does other
    work.
    """
    library = _library()
    if library is None:
        return {}
    threads = torch.get_num_threads()
    measured = {name: getattr(library, f"{name}_rate")(threads, passes) for name in names}
    return {name: rate for name, rate in measured.items() if rate}


def matrix_rate(passes: int = PASSES) -> float:
    """Returns the operations per second of the fastest instruction for bf16 matrices that this
    processor has. If it has no such instruction, the fp32 instruction is taken. Returns 0 if there
    is no C++ compiler."""
    measured = (rates(passes, (name,)) for name in _OF_MATRICES)
    return matrix_rate_of(next(filter(None, measured), {}))


def matrix_rate_of(measured: Mapping[str, float]) -> float:
    """Computes `matrix_rate` from the result of `rates`."""
    return next((measured[name] for name in _OF_MATRICES if name in measured), 0.0)
