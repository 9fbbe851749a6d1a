"""Rotary position embedding, and the append of keys and values to the rings."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import register
from mistral_ext.ops.workspace import execution_target


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> None:
    """Rotates q and k in place, and appends k and v to the rings.

    Elements i and i + D/2 of a head are a pair, rotated by the angle position * frequencies[i].
    Hugging Face checkpoints have this order of elements.

    The slot of a new token may hold an older token. If another new token's query still sees the
    older token, `rope` does not append the new token, and `attention` appends it later. So call
    `rope` and then `attention` with the same table and window. After both, the rings have the new
    tokens. If a sequence has more new tokens than its ring has slots (C), its ring has the last C.

    Scaled RoPE needs other frequencies. If a model also multiplies cosine and sine by a factor m,
    as YaRN does, give `attention` the scale m^2 / sqrt(D).

    Args:
        q: [T, Hq, D], rotated in place.
        k: [T, Hkv, D], rotated in place.
        v: [T, Hkv, D].
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        frequencies: [D/2] float64, radians per position, the result of
            `mistral_ext.model.rope.frequencies`.
        window: W, the number of keys that a query sees, including its own key. None: a query sees
            all keys up to its own.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    torch.ops.mistral_ext.rope(q, k, v, k_pool, v_pool, sequences, frequencies, window)


_SCHEMA = (
    "rope(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_pool, Tensor(d!) v_pool, "
    "Tensor sequences, Tensor frequencies, int? window=None) -> ()"
)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> None:
    _C.rope(q, k, v, k_pool, v_pool, sequences, frequencies, window, execution_target(q))


def _fake(*_: object) -> None:
    return None


register(_SCHEMA, _run, _fake)
