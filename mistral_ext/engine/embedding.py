"""Computes the embedding of a text from the hidden states of its tokens."""

from __future__ import annotations

from torch import Tensor

POOLINGS = ("last", "mean")


def pool(pooled: Tensor, hidden: Tensor, pooling: str) -> None:
    """Adds the next tokens of a text to its embedding.

    Args:
        pooled: [E] fp32, the embedding so far, which is changed. Before the first tokens it must be
            0. After the last tokens it has the direction of the embedding, but not its length. The
            caller normalises it.
        hidden: [n, E] fp32, the tokens' hidden states.
        pooling: one of `POOLINGS`.
    """
    if pooling == "last":
        pooled.copy_(hidden[-1])
    else:
        pooled.add_(hidden.sum(0))
