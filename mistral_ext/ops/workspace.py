"""Runs the kernels of ops, with memory for their intermediate results (the workspace), on the
current CUDA stream or with torch's number of CPU threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from mistral_ext import _C


class Recorder(Protocol):
    """Notes the kernels that a thread runs on the CPU, so that they can be repeated without Python
    (`mistral_ext.ops.recording`)."""

    def note(self, call: _C.Call, x: Tensor, out: Tensor) -> None:
        """Notes a call that has read x and written to `out`."""

    def give_up(self) -> None:
        """Notes that the thread has run a kernel that cannot be repeated."""


@contextmanager
def heard_by(recorder: Recorder) -> Iterator[None]:
    """Tells a recorder which kernels this thread runs in the `with` block."""
    before = _of_thread.recorder
    try:
        _of_thread.recorder = recorder
        yield
    finally:
        _of_thread.recorder = before


def execution_target(x: Tensor) -> int:
    """Returns where a kernel on x runs: the number of threads on a CPU, the current stream on a
    GPU.

    It is for ops that start a kernel themselves, not with `run`. A recorder cannot repeat such a
    kernel, so this function makes the thread's recorder give up.
    """
    if _of_thread.recorder is not None:
        _of_thread.recorder.give_up()
    return _target(x)


def _target(x: Tensor) -> int:
    if x.is_cuda:
        return torch.cuda.current_stream(x.device).cuda_stream
    return torch.get_num_threads()


def run(call: _C.Call, x: Tensor, out: Tensor | None = None) -> None:
    """Runs a checked call with the workspace that it needs.

    The caller keeps all tensors of the call alive until this function returns.

    Args:
        call: the call.
        x: a tensor of the call, on whose device the call runs. If `out` is given, x must be the
            tensor that the call reads.
        out: the tensor that the call writes to. If it is given, a recorder may repeat the call, and
            keeps x and `out` alive for that. All other tensors of the call, such as weights, must
            live that long by themselves. None: the call cannot be repeated.
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
    # `memory` is kept until the kernel is launched. After that torch may give it to a later call on
    # the same stream, whose kernel starts after this one has ended.
    memory = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=x.device)
    counters = _zeroed_counters(x.device, target, call.counters) if call.counters else None
    call.run(memory.data_ptr(), 0 if counters is None else counters.data_ptr(), target)


class _OfThread(threading.local):
    """What belongs to a thread: the workspace of its calls on the CPU, and the recorder of its
    kernels (None: there is none). The workspace is kept between calls, because new pages for each
    call would cost time. It grows when a call needs more."""

    recorder: Recorder | None = None

    def __init__(self) -> None:
        self.grow(0)

    def grow(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._tensor = torch.empty(nbytes + 64, dtype=torch.uint8, device="cpu")
        self.address = -(-self._tensor.data_ptr() // 64) * 64  # the start of a cache line


_of_thread = _OfThread()


def memory_on_cpu(nbytes: int) -> int:
    """Returns the address of this thread's workspace, after enlarging it to at least `nbytes`
    bytes."""
    memory = _of_thread
    if memory.nbytes < nbytes:
        memory.grow(nbytes)
    return memory.address


# Counters, by which the blocks of a kernel know what other blocks have done. A kernel finds them
# zeroed, and leaves them zeroed, so the next kernel on the stream can use them, too. The keys are
# (device, stream, whether a graph is being captured on the stream). The values are (the id of that
# graph, or 0 if there is none; the counters).
_counters: dict[tuple[torch.device, int, bool], tuple[int, Tensor]] = {}


def _zeroed_counters(device: torch.device, target: int, count: int) -> Tensor:
    # Two graphs may run at the same time, on different streams, so each graph has its own counters.
    # Capturing does not run `torch.zeros`, but makes it a part of the graph. So each replay zeros
    # the counters before their first use.
    graph = _C.capture_id(target)
    key = (device, target, graph != 0)
    kept = _counters.get(key)
    if kept is None or kept[0] != graph or len(kept[1]) < count:
        # 1024 are enough to decode 128 sequences with 8 key/value heads, so most calls find enough.
        kept = graph, torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _counters[key] = kept
    return kept[1]
