"""Computes the learning rate of each step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, warmup_steps: int, highest: float) -> float:
    """Returns the learning rate of a step. During warm-up the rate rises in a straight line, and
    then it falls to 0 as a cosine.

    Args:
        step: the number of the step, from 0.
        steps: the number of steps in the run.
        warmup_steps: the number of warm-up steps. The first of them has the rate highest /
            warmup_steps.
        highest: the rate at the end of warm-up.

    Source: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5, without restarts.
    """
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return highest * (1 + math.cos(math.pi * share)) / 2
