"""Registers ops as torch operators, `torch.ops.mistral_ext.<name>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


class _Library(torch.library.Library):
    """A library whose ops refuse forward-mode differentiation. Torch would take the results of an
    op for constants, without an error."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        """Registers an implementation. With "Autograd" it is the one that torch calls outside
        inference mode; `torch.library.register_autograd` makes such an implementation."""
        if dispatch_key == "Autograd":
            fn = _without_tangents(str(op_name).rpartition("::")[2], fn)
        super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _without_tangents(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        for value in arguments:
            tensors = value if isinstance(value, list) else [value]
            if any(isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in tensors):
                raise RuntimeError(
                    f"{name.partition('.')[0]} has no derivative in forward mode (torch.func.jvp, "
                    "torch.autograd.forward_ad): differentiate with backward, or detach the tensor"
                )
        return run(*arguments)

    return checked


_library: Any = _Library("mistral_ext", "DEF")  # type: ignore[no-untyped-call]
_DEVICES = ("cpu", "cuda")


class Gradient(NamedTuple):
    """How to differentiate an op (see `torch.library.register_autograd`)."""

    of: tuple[str, ...]  # the arguments that may require a gradient
    save: Callable[[Any, tuple[Any, ...], Any], None]  # takes ctx, the arguments and the result
    backward: Callable[..., Any]  # takes ctx and the gradients of the result


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
) -> None:
    """Registers an op with torch.library.

    Args:
        schema: the op's name, its arguments, and which of them it changes, in torch's notation.
        run: the implementation on the CPU and on CUDA devices. It takes the arguments of the
            schema.
        fake: an implementation that computes only shapes, for torch.compile and torch.export.
        gradient: how the op is differentiated. None: the op refuses arguments that require a
            gradient. It must be None for an op that changes an argument.
    """
    name = schema.partition("(")[0]  # includes the overload, if there is one
    _library.define(schema)
    qualified = f"mistral_ext::{name}"
    torch.library.impl(qualified, _DEVICES, run, lib=_library)
    torch.library.register_fake(qualified, fake, lib=_library)
    if gradient is None:
        _library.impl(name, _guard(name), "Autograd")
        return

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _refuse_gradients(_find(name), inputs, gradient.of)
        gradient.save(ctx, inputs, output)

    def backward(ctx: Any, *d_out: Any) -> tuple[Any, ...]:
        # Torch leaves out arguments at the end that have their default values. The number of
        # gradients must be the number of arguments that are left.
        given: tuple[Any, ...] = gradient.backward(ctx, *d_out)[: len(ctx.needs_input_grad)]
        return given

    torch.library.register_autograd(qualified, backward, setup_context=save, lib=_library)


def _find(name: str) -> torch._ops.OpOverload:
    """Finds an op by its name. The name may include an overload, as in "rms_norm.residual"."""
    packet, _, overload = name.partition(".")
    op: torch._ops.OpOverload = getattr(
        getattr(torch.ops.mistral_ext, packet), overload or "default"
    )
    return op


def _guard(name: str) -> Callable[..., Any]:
    """Makes the function that torch calls outside inference mode for an op without a gradient.

    While torch records gradients, the function refuses arguments that require a gradient. Otherwise
    `backward` would leave out this op's gradient, for some ops without a warning.

    The function also tells torch which tensors the op has changed in place. Otherwise operations
    whose gradients need the old values of those tensors would compute wrong gradients.
    """

    def run(*arguments: Any) -> Any:
        op = _find(name)
        if torch.is_grad_enabled():
            _refuse_gradients(op, arguments)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*arguments)
        for argument, value in zip(op._schema.arguments, arguments, strict=False):
            alias = argument.alias_info  # torch 2.4 has no argument.is_write
            if alias is not None and alias.is_write and value is not None:
                torch.autograd.graph.increment_version(value)
        return result

    return run


def _refuse_gradients(
    op: torch._ops.OpOverload, arguments: Sequence[Any], but: Sequence[str] = ()
) -> None:
    """Raises RuntimeError if an argument that is not named in `but` requires a gradient."""
    for argument, value in zip(op._schema.arguments, arguments, strict=False):
        tensors = value if isinstance(value, list) else [value]
        if argument.name in but:
            continue
        if any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            shown = "weight" if argument.name in ("values", "whole") else argument.name
            raise RuntimeError(
                f"{op._schema.name.removeprefix('mistral_ext::')}: {shown} requires a gradient, "
                "but the op has none: call it in torch.no_grad() or torch.inference_mode(), or "
                "detach the tensor"
            )


def with_rows(gradient: Tensor) -> Tensor:
    """Returns a gradient that torch has made, or a contiguous copy if its last axis does not have
    stride 1. Kernels need that stride."""
    if gradient.stride(-1) == 1:
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def fake_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Makes the result of a fake implementation: an empty tensor with the device of `like`. If
    `dtype` is None it also has the dtype of `like`.

    `like.new_empty` would be wrong here. If `like` is a constant, such as `torch.tensor([0])`,
    torch.compile treats the new tensor as a constant too, with its uninitialised memory as value.
    """
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
