"""Gradients on CUDA devices that have no kernel of their own there, in plain torch.

Quantised weights are dequantised, one after the other, for the vendor's products. Attention reads
the sequence table, so the call waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext.ops.torch_products import plain_weights
from mistral_ext.ops.weight import Parts

_QUERIES = 512  # rows of scores that exist at a time


def linear_backward(d_out: Tensor, parts: Parts) -> Tensor:
    """d_out [T, N] times the weights [N, K]: [T, K]."""
    d_x: Tensor | None = None
    begin = 0
    for weight in plain_weights(parts, d_out.dtype):
        columns = d_out[:, begin : begin + len(weight)]
        begin += len(weight)
        d_x = columns @ weight if d_x is None else d_x.addmm_(columns, weight)
    assert d_x is not None
    return d_x


def cross_entropy(logits: Tensor, targets: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The losses [T] fp32 of logits [T, V], and factors [T] times their gradients [T, V]."""
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if factors is None:
        return losses, logits
    gradients = log_probabilities.exp_()
    gradients[torch.arange(len(logits), device=logits.device), targets] -= 1
    return losses, gradients.mul_(factors[:, None]).to(logits.dtype)


def lora_gradient(hidden: Tensor, x: Tensor, adapters: Tensor, count: int) -> Tensor:
    """[count, R, N] fp32: for each adapter the sum of hidden^T [T, R] x [T, N] over its tokens."""
    wide = x.float()
    of_each = [(hidden * (adapters == i)[:, None]).T @ wide for i in range(count)]
    return torch.stack(of_each)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    sequences: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q [T, Hq, D], k and v [T, Hkv, D] of whole sequences, in fp32."""
    gradients = tuple(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for first, count, *_ in sequences.tolist():
        for begin in range(first, first + count, _QUERIES):
            queries = slice(begin, min(begin + _QUERIES, first + count))
            keys = slice(first if window is None else max(first, begin - window + 1), queries.stop)
            given = q[queries], k[keys], v[keys], d_out[queries]
            for sums, at, part in zip(
                gradients, (queries, keys, keys), _of_block(*given, window, scale), strict=True
            ):
                sums[at] += part
    d_q, d_k, d_v = (sums.to(x.dtype) for sums, x in zip(gradients, (q, k, v), strict=True))
    return d_q, d_k, d_v


def _of_block(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of the gradients that the last len(q) tokens of a sequence contribute."""
    grouped = k.shape[1], -1  # query heads by their key/value heads
    q, d_out = (x.float().unflatten(1, grouped) for x in (q, d_out))
    k, v = k.float(), v.float()
    last = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    hidden = key > last
    if window is not None:
        hidden |= key <= last - window
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * scale
    probabilities = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    d_v = torch.einsum("hgqk,qhgd->khd", probabilities, d_out)
    d_probabilities = torch.einsum("qhgd,khd->hgqk", d_out, v)
    delta = (probabilities * d_probabilities).sum(-1, keepdim=True)
    d_scores = probabilities * (d_probabilities - delta) * scale
    d_q = torch.einsum("hgqk,khd->qhgd", d_scores, k).flatten(1, 2)
    d_k = torch.einsum("hgqk,qhgd->khd", d_scores, q)
    return d_q, d_k, d_v
