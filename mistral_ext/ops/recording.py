"""Work of ops on the CPU that is done once, and then again without Python.

Python, torch's dispatcher and the checks of the arguments take tens of microseconds a call. A
kernel of a small model takes no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_ext import _C
from mistral_ext.ops import workspace


class Recording:
    """The calls of a piece of work, on the memory that it used when it was recorded.

    What may differ when it is repeated are the values in its tensors: tables are checked anew.
    """

    def __init__(self) -> None:
        self._calls = _C.Recording()
        self._kept: list[object] = []  # tensors that the calls read and write
        self._settings = _settings()

    @property
    def is_valid(self) -> bool:
        """Whether the kernels are still chosen as they were: workspaces are sized for them."""
        return self._settings == _settings()

    def run(self) -> None:
        """Repeats the work.

        Raises:
            ValueError: a sequence table is not valid.
        """
        memory = workspace.memory_on_cpu(self._calls.recheck())
        self._calls.run(memory, torch.get_num_threads())


def record(work: Callable[[], object]) -> Recording | None:
    """Does the work, and records it.

    Args:
        work: on the CPU, without gradients. What it does depends on no value of a tensor.

    Returns:
        The recording; None: the work has operations of torch that compute something, or ops without
        a workspace, which cannot be repeated.
    """
    recorder = _Recorder()
    with recorder:
        work()
    return recorder.recording if recorder.is_complete else None


class _Recorder(TorchDispatchMode):
    """Notes the calls of our kernels, and keeps the tensors of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.is_complete = True

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        calls: list[_C.Call] = []
        with workspace.noting(calls):
            result = func(*args, **(kwargs or {}))
        if func.namespace == "mistral_ext":
            is_repeatable = bool(calls)
        else:
            is_repeatable = not func._schema.is_mutable and _is_view(args, result)
        self.is_complete &= is_repeatable
        for call in calls:
            self.recording._calls.add(call)
        self.recording._kept += [args, kwargs, result]
        return result


def _is_view(args: Sequence[Any], result: Any) -> bool:
    """Whether all tensors of a result lie in the memory of the arguments."""
    given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    results = result if isinstance(result, list | tuple) else [result]
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in given for x in results)


def _settings() -> tuple[str, bool]:
    return _C.active_isa(), _C.exact_products()
