"""The learning rate of each step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, warmup_steps: int, highest: float) -> float:
    """Rises in a straight line, and falls to 0 as a cosine.

    Args:
        step: counts from 0.
        steps: of the run.
        warmup_steps: in which it rises; the first has highest / warmup_steps.
        highest: the learning rate after warm-up.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5, without restarts.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return highest * (1 + math.cos(math.pi * share)) / 2
