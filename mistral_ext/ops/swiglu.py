"""SwiGLU, the activation in the feed-forward blocks of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import Gradient, fake_empty, register, with_rows
from mistral_ext.ops.workspace import execution_target


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) * up, with silu(x) = x / (1 + exp(-x)). The op has a gradient for gate
    and up.

    Args:
        gate, up: [T, F].

    Returns:
        [T, F].

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    out: Tensor = torch.ops.mistral_ext.swiglu(gate, up)
    return out


def _run(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    _C.swiglu(gate, up, out, execution_target(gate))
    return out


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return fake_empty(gate, gate.shape)


def _run_backward(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _C.swiglu_backward(gate, up, with_rows(d_out), d_gate, d_up, execution_target(gate))
    return d_gate, d_up


def _fake_backward(gate: Tensor, up: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return fake_empty(gate, gate.shape), fake_empty(up, up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = torch.ops.mistral_ext.swiglu_backward(
        *ctx.saved_tensors, d_out
    )
    return gradients


register(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _run,
    _fake,
    Gradient(("gate", "up"), _save, _differentiate),
)
register(
    "swiglu_backward(Tensor gate, Tensor up, Tensor d_out) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
