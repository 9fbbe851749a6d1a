"""The stream or threads of a kernel, and memory for its intermediate results."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from mistral_ext import _C


class Recorder(Protocol):
    """An object that is told which kernels a thread runs on the CPU: see `recording`."""

    def note(self, call: _C.Call, x: Tensor, out: Tensor) -> None:
        """Called after a call was made that reads x and writes to `out`."""

    def give_up(self) -> None:
        """Called if a kernel was run that cannot be repeated."""


@contextmanager
def heard_by(recorder: Recorder) -> Iterator[None]:
    """Tells a recorder of the kernels that this thread runs in the block."""
    before = _of_thread.recorder
    try:
        _of_thread.recorder = recorder
        yield
    finally:
        _of_thread.recorder = before


def execution_target(x: Tensor) -> int:
    """Where a kernel on x runs: on a CPU the number of threads, on a GPU the current stream.

    This function is for ops without a workspace. Their kernels cannot be repeated, so a recorder
    gives up.
    """
    if _of_thread.recorder is not None:
        _of_thread.recorder.give_up()
    return _target(x)


def _target(x: Tensor) -> int:
    if x.is_cuda:
        return torch.cuda.current_stream(x.device).cuda_stream
    return torch.get_num_threads()


def run(call: _C.Call, x: Tensor, out: Tensor | None = None) -> None:
    """Runs a checked call on the device of x, its first argument, with the workspace that it needs.

    The caller keeps all tensors of the call alive.

    Args:
        out: the tensor that the call writes to, if the call can be repeated. x and `out` must then
            be the only tensors of the call that a recorder has to keep alive.
    """
    target = _target(x)
    recorder = _of_thread.recorder
    if recorder is not None:
        if out is None or x.is_cuda:
            recorder.give_up()
        else:
            recorder.note(call, x, out)
    if not x.is_cuda:
        call.run(memory_on_cpu(call.workspace_bytes), 0, target)
        return
    # This reference is held until the launch: memory freed earlier could go to another call.
    memory = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=x.device)
    counters = _zeroed_counters(x.device, target, call.counters) if call.counters else None
    call.run(memory.data_ptr(), 0 if counters is None else counters.data_ptr(), target)


class _OfThread(threading.local):
    """The workspace of a thread's calls, as large as the largest call so far has needed: new pages
    for every call would cost time. And who hears of its kernels, if anybody does."""

    recorder: Recorder | None = None

    def __init__(self) -> None:
        self.grow(0)

    def grow(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor = torch.empty(nbytes + 64, dtype=torch.uint8, device="cpu")
        self.address = -(-self._tensor.data_ptr() // 64) * 64  # the start of a cache line


_of_thread = _OfThread()


def memory_on_cpu(nbytes: int) -> int:
    """The address of this thread's workspace, which has at least `nbytes` bytes."""
    memory = _of_thread
    if memory.nbytes < nbytes:
        memory.grow(nbytes)
    return memory.address


# (device, stream, whether the stream is being captured) -> the graph (0: none) and zeroed counters
# for the blocks of a call. A call leaves its counters zeroed.
_counters: dict[tuple[torch.device, int, bool], tuple[int, Tensor]] = {}


def _zeroed_counters(device: torch.device, target: int, count: int) -> Tensor:
    # A graph has its own counters, zeroed once in each replay: graphs may run at the same time.
    graph = _C.capture_id(target)
    key = (device, target, graph != 0)
    kept = _counters.get(key)
    if kept is None or kept[0] != graph or len(kept[1]) < count:
        # 1024 are enough for a decode step, so that its counters are allocated only once.
        kept = graph, torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _counters[key] = kept
    return kept[1]
