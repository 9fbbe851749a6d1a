"""The shapes of Mistral 7B, and random inputs of them, for the benchmarks of the ops."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext.bench import DTYPES as TORCH_NAMES
from mistral_ext.bench.models import random_values
from mistral_ext.model import rope

DIM, HIDDEN = 4096, 14336
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
VOCABULARY = 32768
WINDOW, THETA, EPS = 4096, 1e4, 1e-5

# Changed by gpu_check/stand_in.py, which has all of it run on the CPU in seconds.
GPU = "cuda"  # the device of the benchmarks for GPUs
SHRINK = 1


def scaled(tokens: int) -> int:
    """The number of tokens, made smaller if a stand-in takes the place of a GPU."""
    return max(1, tokens // SHRINK)


DTYPES = {name: getattr(torch, dtype) for name, dtype in TORCH_NAMES.items()}


def random(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Random values."""
    return random_values(shape, dtype, torch.device(device))


def frequencies(device: str = "cpu") -> Tensor:
    """The frequencies of RoPE, [D/2]."""
    return rope.frequencies(THETA, HEAD_DIM, device)


class Rings:
    """Full rings for `sequences`, and the other arguments that rope and attention need."""

    def __init__(
        self,
        sequences: int,
        tokens: int,
        history: int,
        capacity: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ):
        shape = (sequences, KV_HEADS, capacity, HEAD_DIM)
        self.k_cache = random(*shape, dtype=dtype, device=device)
        self.v_cache = random(*shape, dtype=dtype, device=device)
        self.k_pool, self.v_pool = self.k_cache.view(-1, HEAD_DIM), self.v_cache.view(-1, HEAD_DIM)
        ring_rows = KV_HEADS * capacity
        self.table = torch.tensor(
            [(i * tokens, tokens, history, i * ring_rows, capacity) for i in range(sequences)],
            device=device,
        )
        new = sequences * tokens
        self.q = random(new, HEADS, HEAD_DIM, dtype=dtype, device=device)
        self.k = random(new, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
        self.v = random(new, KV_HEADS, HEAD_DIM, dtype=dtype, device=device)

    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.k_pool, self.v_pool, self.table
