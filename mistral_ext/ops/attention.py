"""Attention over ring caches."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import fake_empty, register
from mistral_ext.ops.workspace import run


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
    max_count: int | None = None,
) -> Tensor:
    """Causal sliding-window grouped-query attention of a ragged batch over ring caches.

    The query at position p attends to positions p - W + 1 to p. Positions before the chunk are read
    from its sequence's ring, positions of the chunk from k and v. Query head h reads key/value head
    h * Hkv // Hq. At the end the op appends the tokens that `rope` had to leave out to the rings.

    Args:
        q: [T, Hq, D], rotated.
        k: [T, Hkv, D], rotated.
        v: [T, Hkv, D].
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        window: W, keys that a query sees, itself included; None: all.
        scale: factor of the scores; None: 1 / sqrt(D).
        max_count: upper bound of the new tokens of any sequence; None: not known. It saves a
            launch on CUDA devices when all sequences decode.

    Returns:
        [T, Hq, D].

    Source: Jiang et al. 2023, arXiv:2310.06825, section 2; Milakov and Gimelshein 2018,
    arXiv:1805.02867 (online softmax).
    """
    given = q, k, v, k_pool, v_pool, sequences, window, scale, max_count
    out: Tensor = torch.ops.mistral_ext.attention(*given)
    return out


_SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, "
    "Tensor sequences, int? window=None, float? scale=None, int? max_count=None) -> Tensor"
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
    max_count: int | None = None,
) -> Tensor:
    out = q.new_empty(q.shape)
    given = q, k, v, k_pool, v_pool, sequences, out
    run(_C.attention(*given, window, scale, max_count), q)
    return out


def _fake(q: Tensor, *_: object) -> Tensor:
    return fake_empty(q, q.shape)


register(_SCHEMA, _run, _fake)
