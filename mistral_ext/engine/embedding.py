"""From the hidden states of a text's tokens to the embedding of the text."""

from __future__ import annotations

from torch import Tensor

POOLINGS = ("last", "mean")


def pool(pooled: Tensor, hidden: Tensor, pooling: str) -> None:
    """Adds the next tokens of a text to its embedding.

    Args:
        pooled: [E] fp32, the embedding so far, which is changed. It is 0 before the first tokens,
            and has the direction of the embedding after the last.
        hidden: [n, E] fp32, the tokens' hidden states.
        pooling: one of `POOLINGS`.
    """
    if pooling == "last":
        pooled.copy_(hidden[-1])
    else:
        pooled.add_(hidden.sum(0))
