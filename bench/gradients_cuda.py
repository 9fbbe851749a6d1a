"""The rows of gradients for ops_cuda.py: a pass of training, beside torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from attention_cuda import visible_pairs
from measure_cuda import Case
from shapes import DIM, GPU, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCABULARY, WINDOW, random, scaled
from torch.nn import functional

from mistral_ext import _C
from mistral_ext.ops.workspace import execution_target

GRADIENTS = "gradients"  # the name of the rows, which are run by this name alone
RANK = 16
CHUNK = 256  # rows of logits that exist at a time


def gradient_cases(dtype: torch.dtype) -> Iterator[Case]:
    yield from _attention(dtype)
    yield _logits(dtype)
    for columns in (DIM, HIDDEN):
        yield _adapter(dtype, columns)


def _attention(dtype: torch.dtype) -> Iterator[Case]:
    """Cases of attention's gradient. The peer is the gradient of torch's attention, which has no
    window."""

    def ours(given):
        return torch.ops.mistral_ext.attention_backward(*given.whole, given.table, WINDOW)

    def theirs(given):
        return torch.autograd.grad(given.out, given.leaves, given.d_out, retain_graph=True)

    for tokens in (scaled(2048), scaled(8192)):

        def make(tokens=tokens):
            q, d_out = random(2, tokens, HEADS, HEAD_DIM, dtype=dtype, device=GPU)
            k, v = random(2, tokens, KV_HEADS, HEAD_DIM, dtype=dtype, device=GPU)
            table = torch.tensor([[0, tokens, 0, 0, tokens]], device=GPU)
            out, lse = torch.ops.mistral_ext.attention.whole(q, k, v, table, WINDOW)
            leaves = [x.transpose(0, 1)[None].clone().requires_grad_() for x in (q, k, v)]
            return SimpleNamespace(
                whole=(q, k, v, out, d_out, lse),
                table=table,
                leaves=leaves,
                out=functional.scaled_dot_product_attention(
                    *leaves, is_causal=True, enable_gqa=True
                ),
                d_out=d_out.transpose(0, 1)[None],
            )

        heads = 4 * HEADS + 4 * KV_HEADS  # q, out, d_out, d_q, and k, v, d_k, d_v
        nbytes = tokens * (heads * HEAD_DIM * dtype.itemsize + HEADS * 4)
        flops = 10 * HEADS * HEAD_DIM * visible_pairs(tokens, 0, WINDOW)  # 5 products
        peers = {"sdpa": lambda: theirs} if tokens <= WINDOW else {}
        yield Case(GRADIENTS, f"attention, {tokens}", make, ours, nbytes, flops, peers=peers)


def _logits(dtype: torch.dtype) -> Case:
    """The case of the logits' gradient. Its bytes count one read and one write of the logits. The
    kernel reads them a second time."""

    def make():
        return SimpleNamespace(
            logits=random(CHUNK, VOCABULARY, dtype=dtype, device=GPU),
            targets=torch.arange(CHUNK, device=GPU),
            factors=torch.ones(CHUNK, device=GPU),
            losses=torch.empty(CHUNK, device=GPU),
        )

    def ours(given):
        target = execution_target(given.logits)
        _C.cross_entropy(given.logits, given.targets, given.factors, given.losses, target)

    nbytes = 2 * CHUNK * VOCABULARY * dtype.itemsize
    return Case(GRADIENTS, f"cross_entropy, {CHUNK} x {VOCABULARY}", make, ours, nbytes)


def _adapter(dtype: torch.dtype, columns: int) -> Case:
    tokens = scaled(2048)

    def make():
        return SimpleNamespace(
            hidden=torch.randn(tokens, RANK, device=GPU),
            x=random(tokens, columns, dtype=dtype, device=GPU),
            adapters=torch.zeros(tokens, dtype=torch.int32, device=GPU),
            out=torch.empty(1, RANK, columns, device=GPU),
        )

    def ours(given):
        target = execution_target(given.x)
        _C.lora_gradient(given.hidden, given.x, given.adapters, given.out, target)

    def theirs(given):
        return given.hidden.T @ given.x.float()

    nbytes = tokens * columns * dtype.itemsize + 4 * RANK * (tokens + columns)
    shape = f"lora_gradient, {tokens} x {columns}, rank {RANK}"
    peers = {"torch": lambda: theirs}
    return Case(GRADIENTS, shape, make, ours, nbytes, peers=peers)
