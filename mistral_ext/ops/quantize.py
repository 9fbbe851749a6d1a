"""Rounds weights to the formats whose values come from a table (csrc/quantize.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.weight import Quantized
from mistral_ext.ops.workspace import execution_target


def round_to_table(weight: Tensor, out: Quantized, importance: Tensor | None = None) -> Tensor:
    """Chooses the values and scales of a weight in "iq4_nl" or "iq4_xs".

    For every 32 neighbours a few scales are tried, and the scale with the least sum of squared
    errors is taken. In this sum, errors of large weights and of important inputs count more.

    Args:
        weight: [N, K] on the CPU, float32, bfloat16 or float16, the last axis contiguous.
        out: the weight to fill, on the CPU.
        importance: [K] float32, for each input how much an error of its weights counts, such as the
            mean square of the input. None: all inputs count the same. If the importances of 32
            neighbours are all 0, or so small that products underflow, these 32 count the same.

    Returns:
        [N] float32, the largest magnitude in each row. It is not finite if the row holds NaN or
        infinity.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device; the message names it.
    """
    largest = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    target = execution_target(weight)
    _C.quantize(weight, importance, out.values, out.scales, largest, target)
    return largest


def round_with_feedback(
    weight: Tensor, factor: Tensor, out: Quantized, importance: Tensor | None = None
) -> None:
    """Rounds a block of up to 256 columns of a weight, one column after another. The error of each
    column is compensated in the later columns of the block.

    This is the step of GPTQ within a block (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).
    The caller has to correct the columns after the block, as weights/error_feedback.py does. The
    caller must also check that the errors (see `weight`) are finite. They are not if a weight is
    NaN or infinite, if the factor has a 0 on its diagonal, or if fp16 cannot hold a scale.

    Args:
        weight: [N, B] float32 on the CPU, B at most 256, the last axis contiguous. On return it
            holds the errors, each divided by the diagonal element of the factor.
        factor: [B, B] float32, upper triangular: the block of the Cholesky factor of the inverse
            Hessian.
        out: the columns to fill, in "iq4_nl" or, if B is 256, "iq4_xs". There may be gaps between
            rows.
        importance: [B] float32 or None, as in `round_to_table`. It affects only the choice of
            scales.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device. The message names it.
    """
    target = execution_target(weight)
    _C.quantize_feedback(weight, factor, importance, out.values, out.scales, target)
