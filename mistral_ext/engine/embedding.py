"""From the hidden states of a text's tokens to the embedding of the text."""

from __future__ import annotations

from torch import Tensor

POOLINGS = ("last", "mean")


def pool(pooled: Tensor, hidden: Tensor, pooling: str) -> None:
    """Takes the next tokens of a text.

    Args:
        pooled: [E] fp32, changed; 0 before the first tokens. In the end it has the direction of the
            embedding.
        hidden: [n, E] fp32, the tokens' hidden states.
        pooling: one of `POOLINGS`.
    """
    if pooling == "last":
        pooled.copy_(hidden[-1])
    else:
        pooled.add_(hidden.sum(0))
