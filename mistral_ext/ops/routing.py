"""Decides whether our kernels or torch compute a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mistral_ext.ops.weight import Parts

# The most tokens that our CUDA kernels (gemv) multiply. The kernels are made for few tokens, for
# which reading the weights takes most of the time. On CUDA devices torch multiplies more tokens
# than this, and any number of float32 tokens.
MOST_TOKENS_ON_CUDA = 64


def _is_for_torch(x: Tensor) -> bool:
    return x.is_cuda and (len(x) > MOST_TOKENS_ON_CUDA or x.dtype == torch.float32)


def routed(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an op that multiplies x with weights, by our kernels (`ours`) or by torch (`theirs`).

    Both functions take x, the weights as `Parts`, and the other arguments of the op's schema.
    """

    def run(
        x: Tensor,
        values: list[Tensor],
        scales: list[Tensor | None],
        formats: list[str],
        whole: Tensor | None,
        *arguments: Any,
    ) -> Any:
        parts = Parts(values, scales, formats, whole)
        return (theirs if _is_for_torch(x) else ours)(x, parts, *arguments)

    return run
