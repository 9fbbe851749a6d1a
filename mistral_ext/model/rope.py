"""The frequencies of RoPE, by which `ops.rope` rotates queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext.model.rope_scaling import RopeScaling


def frequencies(
    theta: float,
    head_dim: int,
    device: torch.device | str = "cpu",
    scaling: RopeScaling | None = None,
) -> Tensor:
    """Returns [D/2] float64, radians per position: theta^(-2i/D), the fastest first, then scaled.

    Other implementations round the frequencies to float32, which makes errors of up to 0.003 in the
    angles at position 10^5.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    half = head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=device) / half
    plain = theta**-exponents
    return plain if scaling is None else scaling.scaled(plain, theta)
