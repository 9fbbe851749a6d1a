"""SwiGLU's product."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import fake_empty, register
from mistral_ext.ops.workspace import execution_target


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate, up: [T, F].

    Returns:
        [T, F].

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    out: Tensor = torch.ops.mistral_ext.swiglu(gate, up)
    return out


_SCHEMA = "swiglu(Tensor gate, Tensor up) -> Tensor"


def _run(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    _C.swiglu(gate, up, out, execution_target(gate))
    return out


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return fake_empty(gate, gate.shape)


register(_SCHEMA, _run, _fake)
