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
    """Returns the D/2 frequencies of RoPE, theta^(-2i/D) for i from 0 on, after scaling.

    Other implementations round the frequencies to float32. This makes errors of up to 0.003 in the
    angles at position 10^5.

    Args:
        theta: the base of the frequencies.
        head_dim: D, the head dimension.
        device: the device of the result.
        scaling: changes the frequencies. None: they are not scaled.

    Returns:
        [D/2] float64, in radians per position.

    Source: Su et al. 2021, arXiv:2104.09864, equation 15.
    """
    half = head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=device) / half
    plain = theta**-exponents
    return plain if scaling is None else scaling.scaled(plain, theta)
