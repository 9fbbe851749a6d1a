"""Registers every op as a torch operator, `torch.ops.mistral_ext.<name>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("mistral_ext", "DEF")
_DEVICES = ("cpu", "cuda")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op with torch.library.

    Args:
        schema: name, arguments, and which of them the op changes.
        run: the op, on the CPU and on CUDA devices, with the arguments of the schema.
        fake: gives torch.compile and torch.export the shapes without running anything.
    """
    name = _library.define(schema)
    torch.library.impl(f"mistral_ext::{name}", _DEVICES, run, lib=_library)
    torch.library.register_fake(f"mistral_ext::{name}", fake, lib=_library)
    _library.impl(name, _guard(name), "Autograd")


def _guard(name: str) -> Callable[..., Any]:
    """The implementation that torch calls where it records gradients; it refuses to.

    Otherwise `backward` would silently leave out this op's gradient. Gradients of other operations
    that need tensors which this op has changed in place would be wrong.
    """

    def run(*arguments: Any) -> Any:
        op = getattr(torch.ops.mistral_ext, name).default
        given = list(zip(op._schema.arguments, arguments, strict=False))
        if torch.is_grad_enabled():
            for argument, value in given:
                tensors = value if isinstance(value, list) else [value]
                if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
                    is_weight = argument.name in ("values", "whole")
                    shown = "weight" if is_weight else argument.name
                    raise RuntimeError(
                        f"{name}: {shown} requires a gradient, but the op has none: call it in "
                        "torch.no_grad() or torch.inference_mode(), or detach the tensor"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*arguments)
        for argument, value in given:
            if argument.is_write and value is not None:
                torch.autograd.graph.increment_version(value)
        return result

    return run


def fake_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A result for a fake: an empty tensor with the device (and by default the dtype) of `like`.

    `like.new_empty` would not do: if `like` is a constant, such as `torch.tensor([0])`,
    torch.compile takes the new tensor for a constant too, with its uninitialised memory as values.
    """
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
