"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import fake_empty, register
from mistral_ext.ops.workspace import execution_target


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last axis, with an optional residual add before it.

    With a residual the op computes `residual += x` in place, rounded to the dtype, and normalises
    the sum. Without, it normalises x. The normalised value is rounded to the dtype before it is
    multiplied by weight, because Mistral was trained so.

    Args:
        x: [T, E].
        weight: [E].
        eps: added to the mean square.
        residual: [T, E], updated in place.

    Returns:
        [T, E].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    out: Tensor = torch.ops.mistral_ext.rms_norm(x, weight, eps, residual)
    return out


_SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps=1e-05, Tensor(a!)? residual=None) -> Tensor"


def _run(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Tensor:
    out = x.new_empty(x.shape)
    _C.rms_norm(x, weight, residual, out, eps, execution_target(x))
    return out


def _fake(x: Tensor, *_: object) -> Tensor:
    return fake_empty(x, x.shape)


register(_SCHEMA, _run, _fake)
