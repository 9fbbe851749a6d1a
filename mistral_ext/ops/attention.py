"""Attention over ring caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import Gradient, fake_empty, register
from mistral_ext.ops.workspace import run


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor | None,
    v_pool: Tensor | None,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
    max_count: int | None = None,
) -> Tensor:
    """Computes causal sliding-window grouped-query attention over ring caches. Each sequence of the
    batch may have its own number of new tokens.

    The query at position p attends to positions p - W + 1 to p. The keys and values of the new
    tokens are in k and v, those of earlier positions are in the ring of the sequence. Query head h
    reads key/value head h * Hkv // Hq.

    `rope` must be called first. It appends the new tokens to the rings, except those that would
    replace an older token that a query of this call still reads. This op appends the exceptions at
    its end.

    Without pools the sequences are whole: each begins in this call, and the position, ring and
    capacity in the table are not used. Only without pools does the op have a gradient, for q, k and
    v.

    Args:
        q: [T, Hq, D], rotated.
        k: [T, Hkv, D], rotated.
        v: [T, Hkv, D].
        k_pool, v_pool: [R, D], the rings of all sequences. None: the sequences are whole.
        sequences: [S, 5] int64, the sequence table.
        window: W, the number of keys that a query sees, including its own key. None: a query sees
            all keys up to its own.
        scale: the factor of the scores, more than 0. None: 1 / sqrt(D).
        max_count: an upper bound of the number of new tokens of any sequence. It saves a launch on
            CUDA devices when all sequences decode. None: the bound is not known.

    Returns:
        [T, Hq, D].

    Source: Jiang et al. 2023, arXiv:2310.06825, section 2; Milakov and Gimelshein 2018,
    arXiv:1805.02867 (online softmax); Dao et al. 2022, arXiv:2205.14135, appendix B (gradient).
    """
    if k_pool is None and v_pool is None:
        whole: Tensor
        whole, _ = torch.ops.mistral_ext.attention.whole(q, k, v, sequences, window, scale)
        return whole
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
    run(_C.attention(*given, window, scale, max_count), q, out)
    return out


def _fake(q: Tensor, *_: object) -> Tensor:
    return fake_empty(q, q.shape)


register(_SCHEMA, _run, _fake)


def _run_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the result of attention, and for the gradient the log-sum-exp of the scores of each
    token and head, [T, Hq] fp32."""
    _expect("q", q, q.ndim == 3, "[T, Hq, D]")
    _expect("k", k, k.ndim == 3, "[T, Hkv, D]")
    is_table = sequences.ndim == 2 and sequences.shape[1] == 5
    _expect("sequences", sequences, is_table, "[S, 5]")
    kv_heads, dim = k.shape[1:]
    # The kernel needs rings. But it does not read the rings of whole sequences, and it does not
    # write to rings with a slot for each token. So the values in the pool do not matter. A ring has
    # one more slot, because a ring without slots is an error, even for a sequence without tokens.
    table = sequences.clone()
    number = torch.arange(len(table), device=table.device)
    table[:, 2] = 0
    table[:, 3] = (table[:, 0] + number) * kv_heads
    table[:, 4] = table[:, 1] + 1
    pool = k.new_empty((len(k) + len(table)) * kv_heads, dim)
    out = q.new_empty(q.shape)
    lse = _empty_lse(q)
    given = q, k, v, pool, pool, table, out, window, scale, None
    run(_C.attention(*given, lse), q)
    return out, lse


def _expect(name: str, tensor: Tensor, is_valid: bool, shape: str) -> None:
    """Raises ValueError if `is_valid` is False. `_run_whole` needs this check, because it uses
    sizes before the kernel checks shapes."""
    if not is_valid:
        raise ValueError(f"attention: {name} has shape {list(tensor.shape)}, expected {shape}")


def _empty_lse(q: Tensor) -> Tensor:
    return fake_empty(q, q.shape[:2], dtype=torch.float32)


def _fake_whole(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return fake_empty(q, q.shape), _empty_lse(q)


def _run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    given = q, k, v, out, d_out.contiguous(), lse, sequences
    run(_C.attention_backward(*given, *gradients, window, scale), q)
    return gradients


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return fake_empty(q, q.shape), fake_empty(k, k.shape), fake_empty(v, v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sequences, ctx.window, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, sequences)


def _differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sequences = ctx.saved_tensors
    given = q, k, v, out, d_out, lse, sequences, ctx.window, ctx.scale
    return *torch.ops.mistral_ext.attention_backward(*given), None, None, None


register(
    "attention.whole(Tensor q, Tensor k, Tensor v, Tensor sequences, int? window=None, "
    "float? scale=None) -> (Tensor, Tensor)",
    _run_whole,
    _fake_whole,
    Gradient(("q", "k", "v"), _save, _differentiate),
)
register(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor d_out, Tensor lse, "
    "Tensor sequences, int? window=None, float? scale=None) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
