"""Where a kernel runs, and memory for what it computes in between."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from mistral_ext import _C


def lane_of(x: Tensor) -> int:
    """Where a kernel on x runs: how many threads on the CPU, on which stream on a GPU."""
    if x.is_cuda:
        return torch.cuda.current_stream(x.device).cuda_stream
    return torch.get_num_threads()


# (device, stream, whether it is being captured) -> the graph (0: none), and zeroed counters for the
# blocks of a call, which leave them zeroed.
_counters: dict[tuple[torch.device, int, bool], tuple[int, Tensor]] = {}


def zeroed_counters(device: torch.device, lane: int, count: int) -> Tensor:
    # A graph has its own, zeroed once in each replay: it may run at the same time as others.
    graph = _C.capture_id(lane)
    key = (device, lane, graph != 0)
    known, counters = _counters.get(key, (None, None))
    if known != graph or len(counters) < count:
        # At least so many that those of a decode step are zeroed only once.
        counters = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _counters[key] = graph, counters
    return counters


_scratch_of_thread = threading.local()


def scratch_on_cpu(nbytes: int) -> int:
    """The address of memory that a thread's calls use one after another, aligned to a cache line.

    It is kept, as large as the largest call has needed: fresh pages would cost every call time.
    """
    scratch = getattr(_scratch_of_thread, "bytes", None)
    if scratch is None or len(scratch) < nbytes + 64:
        scratch = _scratch_of_thread.bytes = torch.empty(nbytes + 64, dtype=torch.uint8)
    return -(-scratch.data_ptr() // 64) * 64


def scratch_for(x: Tensor) -> Callable[[int], int]:
    """What gives a product of x its scratch, to be kept until the launch: see `attention`."""
    held = []

    def scratch(nbytes: int) -> int:
        if not x.is_cuda:
            return scratch_on_cpu(nbytes)
        held.append(torch.empty(nbytes, dtype=torch.uint8, device=x.device))
        return held[0].data_ptr()

    return scratch
