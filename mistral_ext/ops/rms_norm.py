"""RMSNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import Gradient, fake_empty, register, with_rows
from mistral_ext.ops.workspace import execution_target


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """Computes RMSNorm over the last axis, with an optional residual add before it.

    With a residual the op computes `residual += x` in place, rounded to the dtype, and normalises
    the sum. Without a residual it normalises x. The normalised value is rounded to the dtype before
    it is multiplied by the weight, because Mistral was trained in this way.

    Only without a residual does the op have a gradient, for x. The gradient ignores the rounding.

    Args:
        x: [T, E].
        weight: [E].
        eps: a number that is added to the mean square.
        residual: [T, E], updated in place. None: the op normalises x itself.

    Returns:
        [T, E].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    if residual is None:
        out: Tensor = torch.ops.mistral_ext.rms_norm.default(x, weight, eps)
    else:
        out = torch.ops.mistral_ext.rms_norm.residual(x, weight, eps, residual)
    return out


def _run(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Tensor:
    out = x.new_empty(x.shape)
    _C.rms_norm(x, weight, residual, out, eps, execution_target(x))
    return out


def _run_backward(x: Tensor, weight: Tensor, d_out: Tensor, eps: float) -> Tensor:
    d_x = x.new_empty(x.shape)
    _C.rms_norm_backward(x, weight, with_rows(d_out), d_x, eps, execution_target(x))
    return d_x


def _fake(x: Tensor, *_: object) -> Tensor:
    return fake_empty(x, x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return torch.ops.mistral_ext.rms_norm_backward(x, weight, d_out, ctx.eps), None, None


register(
    "rms_norm(Tensor x, Tensor weight, float eps=1e-05) -> Tensor",
    _run,
    _fake,
    Gradient(("x",), _save, _differentiate),
)
register(
    "rms_norm.residual(Tensor x, Tensor weight, float eps, Tensor(a!) residual) -> Tensor",
    _run,
    _fake,
)
register(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor d_out, float eps) -> Tensor",
    _run_backward,
    _fake,
)
