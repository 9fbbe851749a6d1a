"""Timing on a GPU: calls as CUDA graphs, in turns with their peers; the ceilings of the machine."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import GPU, scaled

from mistral_ext import _C
from mistral_ext.bench.peaks_cuda import copy_bandwidth, product_rate

MOST_INPUTS = 64  # in one graph
SECONDS = 0.15  # of replays for each function, within bounds:
LEAST, MOST = 5, 50

Call = Callable[[Any], Any]  # of one set of inputs


@dataclass
class Case:
    """One row of the table.

    Args:
        make: a function that returns a new set of inputs.
        ours: a function that calls the op with a set of inputs.
        peers: for each name a function that makes a function which does the same as `ours`. Making
            it may fail.
        nbytes: the bytes that a call moves, each counted once.
        flops: the FLOPs of a call, if they and not the bytes are the limit.
    """

    op: str
    shape: str
    make: Callable[[], Any]
    ours: Call
    nbytes: int
    flops: int = 0
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)


# ---- Timing


def capture(call: Call, inputs: list[Any]) -> Callable[[], None]:
    """Captures calls on all inputs as one CUDA graph. Returns a function that replays the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, loads and plans what happens once
        for one in inputs[:3]:
            call(one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the end, so that each call writes to memory of its own.
        results = [call(one) for one in inputs]
    del results
    return graph.replay


def elapsed(run: Callable[[], None], times: int) -> float:
    """The seconds of one run: the mean of `times` runs that are queued one after the other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / times


def median_seconds(runs: list[Callable[[], None]]) -> list[float]:
    """The median time of each of the runs, which take turns."""
    plans = []
    for run in runs:
        run()
        one = max(elapsed(run, 2), 1e-6)
        times = max(1, math.ceil(1e-3 / one))  # a millisecond, against the latency of events
        rounds = min(max(LEAST, round(SECONDS / (times * one))), MOST)
        plans.append((run, times, rounds, []))
    for turn in range(MOST):
        for run, times, rounds, samples in plans:
            if turn < rounds:
                samples.append(elapsed(run, times))
    return [statistics.median(samples) for _, _, _, samples in plans]


def beyond_cache() -> int:
    """A number of bytes that is far too large for the L2 cache."""
    return 4 * torch.cuda.get_device_properties(GPU).L2_cache_size


def measure(case: Case, facts: dict[str, Any]) -> dict[str, Any]:
    count = min(max(2, math.ceil(beyond_cache() / case.nbytes)), MOST_INPUTS)
    inputs = [case.make() for _ in range(count)]
    runs, failures = {"ours": capture(case.ours, inputs)}, {}
    for name, build in case.peers.items():
        try:
            runs[name] = capture(build(), inputs)
        except Exception as error:  # whatever it is, it is the peer's
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.synchronize()
    seconds = dict(zip(runs, median_seconds(list(runs.values())), strict=True))
    ours = seconds.pop("ours") / count
    rate, peak = (
        (case.flops, facts["matmul_flops"]) if case.flops else (case.nbytes, facts["copy_bytes"])
    )
    return {
        "op": case.op,
        "shape": case.shape,
        "us": ours * 1e6,
        "GB/s": None if case.flops else case.nbytes / ours / 1e9,
        "TFLOP/s": case.flops / ours / 1e12 if case.flops else None,
        "of_peak": rate / ours / peak,
        "peers_us": {name: time / count * 1e6 for name, time in seconds.items()},
        "failures": failures,
    }


def machine() -> dict[str, Any]:
    """The facts that figures depend on, and the machine's limits: bytes and operations per
    second."""
    device = torch.cuda.get_device_properties(GPU)
    return {
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "memory_bytes": device.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": _C.cuda_architectures,
        **ceilings(min(2**31, device.total_memory // 8)),
    }


def ceilings(nbytes: int) -> dict[str, float]:
    device = torch.device(GPU)
    return {
        "copy_bytes": copy_bandwidth(device, scaled(nbytes)),
        "matmul_flops": product_rate(device, scaled(8192)),
    }


# ---- Peers


COMPILED = ("compiled", "flex")  # peers whose compilation takes longer than all else


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def eager_and_compiled(
    function: Callable, arguments: Callable[[Any], tuple]
) -> dict[str, Callable[[], Call]]:
    """Two peers: a function of tensors as it is, and compiled. `arguments` takes the function's
    arguments from a set of inputs."""

    def peer(function):
        return lambda given: function(*arguments(given))

    return {"eager": lambda: peer(function), "compiled": lambda: peer(compiled(function))}


def flashinfer():
    import flashinfer

    return flashinfer
