"""Repeats the kernels of ops on the CPU without Python.

Python, torch's dispatcher and the checks of the arguments take tens of microseconds per call. In a
small model a kernel itself takes no longer than that (measured by `bench/serve.py` with one
client).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops import workspace


class Recording:
    """The calls of ops that a function (the *work*) made, with the memory that they used.

    When the work is repeated, it uses the same memory, in which only the values may differ. Only
    one thread at a time may repeat the work. Tensors that the work did not make itself (weights,
    rings, tables) have to live as long as the recording. The recording keeps all other tensors
    alive.
    """

    def __init__(self) -> None:
        self._calls = _C.Recording()
        self._kept: list[Tensor] = []
        self._settings = _settings()

    @property
    def is_valid(self) -> bool:
        """Whether the settings that choose kernels are the same as when the work was recorded. If
        not, another kernel may need a larger workspace than was recorded."""
        return self._settings == _settings()

    def run(self) -> None:
        """Repeats the work. Meanwhile no thread may choose other kernels (`select_isa`).

        Raises:
            ValueError: a sequence table or a token id is not valid.
        """
        memory = workspace.memory_on_cpu(self._calls.recheck())
        self._calls.run(memory, torch.get_num_threads())


def record(work: Callable[[], object], given: Sequence[Tensor]) -> Recording | None:
    """Does the work, and records it.

    Args:
        work: a function that calls ops, without gradients. Which calls it makes must not depend on
            the value of a tensor, and it must change tensors only by ops.
        given: the tensors that the first calls read. The caller may change their values between
            repetitions.

    Returns:
        The recording. None: the work cannot be repeated, because
        - an op does not call `workspace.run`, or calls it without `out`, so that the recording
          could not keep all memory of the op alive,
        - an op reads a tensor that torch has computed, or
        - an op reads token ids that are not those of a given tensor. A repetition checks all ids
          before its first call, so it would not check ids that one of its calls writes.
    """
    recorder = _Recorder(given)
    with workspace.heard_by(recorder):
        work()
    return recorder.recording if recorder.is_complete else None


class _Recorder:
    """Notes calls, and checks where their inputs come from. A repetition does not repeat what torch
    computes. So the input x of each call must lie in the memory of a given tensor, or of the result
    of an earlier call. Token ids must lie in a given tensor that no call has changed."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.recording = Recording()
        self.is_complete = True
        self._given = set(map(_address, given))
        self._results: set[int] = set()

    def note(self, call: _C.Call, x: Tensor, out: Tensor) -> None:
        unchanged = self._given - self._results
        known = unchanged if x.dtype == torch.int64 else self._given | self._results
        self.is_complete &= _address(x) in known
        self._results.add(_address(out))
        self.recording._calls.add(call)
        self.recording._kept += [x, out]

    def give_up(self) -> None:
        self.is_complete = False


def _address(x: Tensor) -> int:
    """The address at which the storage of x begins."""
    return x.untyped_storage().data_ptr()


def _settings() -> tuple[str, bool]:
    return _C.active_isa(), _C.exact_products()
