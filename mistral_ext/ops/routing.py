"""Which products are ours, and which are torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Our products on a CUDA device are made for few tokens, which reading the weights limits; those of
# more, and of float32, are torch's.
MOST_TOKENS_ON_CUDA = 64


def _is_for_torch(x: Tensor) -> bool:
    return x.is_cuda and (len(x) > MOST_TOKENS_ON_CUDA or x.dtype == torch.float32)


def routed(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """An op that multiplies x, its first argument, with our kernels or with torch's."""

    def run(x: Tensor, *arguments: Any) -> Any:
        return (theirs if _is_for_torch(x) else ours)(x, *arguments)

    return run
