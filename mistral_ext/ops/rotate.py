"""Rotary position embedding without rings, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import Gradient, fake_empty, register, with_rows
from mistral_ext.ops.workspace import execution_target


def rotate(x: Tensor, sequences: Tensor, frequencies: Tensor) -> Tensor:
    """Rotates the heads of x as `rope` rotates q and k, but into a new tensor.

    The op has a gradient for x, and needs no rings.

    Args:
        x: [T, H, D], with any number H of heads.
        sequences: [S, 5] int64, the sequence table. Its columns for rings are not used.
        frequencies: [D/2] float64, radians per position, the result of
            `mistral_ext.model.rope.frequencies`.

    Returns:
        [T, H, D].

    Source: Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    out: Tensor = torch.ops.mistral_ext.rotate(x, sequences, frequencies)
    return out


def _run(x: Tensor, sequences: Tensor, frequencies: Tensor, backward: bool = False) -> Tensor:
    out = x.new_empty(x.shape)
    _C.rotate(x, sequences, frequencies, backward, out, execution_target(x))
    return out


def _fake(x: Tensor, *_: object) -> Tensor:
    return fake_empty(x, x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    _, sequences, frequencies, ctx.backward = inputs
    ctx.save_for_backward(sequences, frequencies)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradient of a rotation: d_out, rotated by the negated angles."""
    d_x = torch.ops.mistral_ext.rotate(with_rows(d_out), *ctx.saved_tensors, not ctx.backward)
    return d_x, None, None, None


register(
    "rotate(Tensor x, Tensor sequences, Tensor frequencies, bool backward=False) -> Tensor",
    _run,
    _fake,
    Gradient(("x",), _save, _differentiate),
)
