"""Measures the limits of a GPU with torch. Benchmarks give speeds as shares of these limits."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_TIMES = 20


def copy_bandwidth(device: torch.device, nbytes: int) -> float:
    """Returns the bytes per second that a copy of `nbytes` bytes moves. Each byte counts twice,
    because it is read and written."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, size: int) -> float:
    """Returns the operations per second of the product of two bf16 matrices of size x size."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=product), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of one call of `run`, the mean of several calls that are queued
    together."""
    run()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(_TIMES):
        run()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / _TIMES
