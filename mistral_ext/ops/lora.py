"""Low-rank adapters of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import register
from mistral_ext.ops.workspace import execution_target


class LowRank(NamedTuple):
    """The update of a weight [N, K] by an adapter: scale * b @ a."""

    a: Tensor  # [rank, K]
    b: Tensor  # [N, rank]
    scale: float


def lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
    out: Tensor,
) -> None:
    """out += scale * (x @ A.T) @ B, in place, with the adapter of each token.

    The adapters of a weight are stacked and padded to the largest rank. Weights that are multiplied
    with the same x (query, key and value, say) are *parts*: they share a call, and their outputs
    lie side by side. x @ A.T stays in fp32, and `out` is rounded once. Rows of tokens without an
    adapter stay as they are. A token's result does not depend, to the bit, on other tokens or on
    other adapters.

    Args:
        x: [T, K].
        a: [adapters, parts, max_rank, K], contiguous.
        b: [adapters, max_rank, N], contiguous; N is the sum of `parts`.
        scales: [adapters, parts] float32.
        ranks: [adapters, parts] int32, 0 (the part has none) to max_rank. Values of a and b beyond
            the rank are not read.
        adapters: [T] int32, the adapter of each token; negative: none.
        parts: the outputs of each part; up to 3 parts.
        out: [T, N], with the dtype of x or float32, updated in place.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    torch.ops.mistral_ext.lora(x, a, b, scales, ranks, adapters, parts, out)


_SCHEMA = (
    "lora(Tensor x, Tensor a, Tensor b, Tensor scales, Tensor ranks, Tensor adapters, "
    "int[] parts, Tensor(a!) out) -> ()"
)


def _run(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
    out: Tensor,
) -> None:
    hidden = x.new_empty((len(x), *a.shape[1:3]), dtype=torch.float32)
    target = execution_target(x)
    _C.lora(x, a, b, scales, ranks, adapters, list(parts), hidden, out, target)


def _fake(*_: object) -> None:
    return None


register(_SCHEMA, _run, _fake)
