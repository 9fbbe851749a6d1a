"""The kernels as functions on torch tensors, and as `torch.ops.mistral_ext.*`.

Inference only: no op has a gradient. Tensors are float32, bfloat16 or float16, all arguments of
a call of one dtype; arithmetic is done in float32. Nothing is copied or made contiguous behind
the caller's back: the last axis must have stride 1 (the weights and pools must be contiguous),
other strides are free, so q, k and v may be slices of one matrix. Wrong arguments raise
ValueError (shapes, strides, numbers) or TypeError (dtypes, devices, not a tensor) with the op, the
argument, what was expected and what was given.

Shape letters: T new tokens of all sequences, packed one after another; S sequences; E model
dimension; F hidden dimension; Hq query heads; Hkv key/value heads, a divisor of Hq; D head
dimension, a multiple of 32 up to 256; R rows of a layer's key or value pool.

The *sequence table*, int64 [S, 5], says for each sequence what the call adds to it and where its
ring is (`mistral_ext.cache.RingCache` makes it; csrc/ring.h defines it):

    first_token  index of its first new token among the T
    count        how many new tokens it has: 1 in decode, more for a prompt chunk, 0 if idle
    position     absolute position of the first of them
    ring_row     first row of its ring in the pools
    capacity     C, slots of its ring: the window, or its longest length if that is less

The ring is [Hkv, C, D] and holds position p in slot p mod C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext import _C


def supported_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use on this machine, slowest first."""
    return _C.supported_isas()


def active_isa() -> str:
    """The one that they use: what `select_isa` or MISTRAL_EXT_ISA asked for, else the fastest.

    ValueError, as from every op, if the environment variable names one that this machine lacks.
    """
    return _C.active_isa()


def select_isa(name: str) -> None:
    """Makes the CPU kernels use instruction set `name`; ValueError if this machine cannot."""
    _C.select_isa(name)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last axis, with an optional residual add before it.

    With a residual, `residual += x` in place (rounded to the dtype) and the sum is normalised;
    without, x is. The normalised value is rounded to the dtype before it is multiplied by weight,
    as Mistral was trained.

    Args:
        x: [T, E].
        weight: [E].
        eps: added to the mean square.
        residual: [T, E], updated in place.

    Returns:
        [T, E].

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    return torch.ops.mistral_ext.rms_norm(x, weight, eps, residual)


def rope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    theta: float,
    window: int | None = None,
) -> None:
    """Rotates q and k in place, and appends k and v to the rings.

    Elements i and i + D/2 of a head are a pair, rotated by position * theta^(-2i/D): the order of
    Hugging Face checkpoints. A token whose slot still holds what a query of the same chunk
    attends to is appended by `attention` instead; call both, in this order, with the same table
    and window, and all new tokens are in the rings.

    Args:
        q: [T, Hq, D], rotated in place.
        k: [T, Hkv, D], rotated in place.
        v: [T, Hkv, D].
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        theta: base of the angles.
        window: W, keys that a query sees, itself included; None: all.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34.
    """
    torch.ops.mistral_ext.rope(q, k, v, k_pool, v_pool, sequences, theta, window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal sliding-window grouped-query attention of a ragged batch over ring caches.

    The query at position p attends to positions p - W + 1 to p: those before the chunk in its
    sequence's ring, the others in k and v. Query head h reads key/value head h * Hkv // Hq. Then
    the tokens that `rope` had to leave out are appended to the rings.

    Args:
        q: [T, Hq, D], rotated.
        k: [T, Hkv, D], rotated.
        v: [T, Hkv, D].
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        window: W, keys that a query sees, itself included; None: all.
        scale: factor of the scores; None: 1 / sqrt(D).

    Returns:
        [T, Hq, D].

    Source: Jiang et al. 2023, arXiv:2310.06825, section 2; Milakov and Gimelshein 2018,
    arXiv:1805.02867 (online softmax).
    """
    return torch.ops.mistral_ext.attention(q, k, v, k_pool, v_pool, sequences, window, scale)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate, up: [T, F].

    Returns:
        [T, F].

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    return torch.ops.mistral_ext.swiglu(gate, up)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: a layer without bias.

    Up to 8 tokens are limited by reading the weights, which a kernel of ours does once, and come
    out the same to the bit whatever their number; more are left to torch's matrix product.

    Args:
        x: [T, K].
        weight: [N, K], contiguous.

    Returns:
        [T, N].
    """
    return torch.ops.mistral_ext.linear(x, weight)


# torch.library: schemas (mutated arguments marked), CPU implementations, and fake kernels, which
# give torch.compile and torch.export the shapes without running anything.

_library = torch.library.Library("mistral_ext", "DEF")

_FEW_TOKENS = 8  # as many as a product may have for `_C.linear`

_library.define(
    "rms_norm(Tensor x, Tensor weight, float eps=1e-05, Tensor(a!)? residual=None) -> Tensor"
)
_library.define(
    "rope(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_pool, Tensor(d!) v_pool, "
    "Tensor sequences, float theta, int? window=None) -> ()"
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, "
    "Tensor sequences, int? window=None, float? scale=None) -> Tensor"
)
_library.define("swiglu(Tensor gate, Tensor up) -> Tensor")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl(_library, "rms_norm", "CPU")
def _(x, weight, eps=1e-5, residual=None):
    out = torch.empty(x.shape, dtype=x.dtype)
    _C.rms_norm(x, weight, residual, out, eps, torch.get_num_threads())
    return out


@torch.library.impl(_library, "rope", "CPU")
def _(q, k, v, k_pool, v_pool, sequences, theta, window=None):
    _C.rope(q, k, v, k_pool, v_pool, sequences, theta, window, torch.get_num_threads())


@torch.library.impl(_library, "attention", "CPU")
def _(q, k, v, k_pool, v_pool, sequences, window=None, scale=None):
    out = torch.empty(q.shape, dtype=q.dtype)
    threads = torch.get_num_threads()
    _C.attention(q, k, v, k_pool, v_pool, sequences, out, window, scale, threads)
    return out


@torch.library.impl(_library, "swiglu", "CPU")
def _(gate, up):
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _C.swiglu(gate, up, out, torch.get_num_threads())
    return out


@torch.library.impl(_library, "linear", "CPU")
def _(x, weight):
    if len(x) > _FEW_TOKENS:
        _C.check_linear(x, weight)
        return torch.nn.functional.linear(x, weight)
    out = torch.empty((len(x), len(weight)), dtype=x.dtype)
    _C.linear(x, weight, out, torch.get_num_threads())
    return out


@torch.library.register_fake("mistral_ext::rms_norm")
def _(x, weight, eps=1e-5, residual=None):
    return x.new_empty(x.shape)


@torch.library.register_fake("mistral_ext::rope")
def _(q, k, v, k_pool, v_pool, sequences, theta, window=None):
    return None


@torch.library.register_fake("mistral_ext::attention")
def _(q, k, v, k_pool, v_pool, sequences, window=None, scale=None):
    return q.new_empty(q.shape)


@torch.library.register_fake("mistral_ext::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("mistral_ext::linear")
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))
