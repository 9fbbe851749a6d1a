"""The kernels as functions on torch tensors, and as `torch.ops.mistral_ext.*`.

Inference only: no op has a gradient. Tensors are float32, bfloat16 or float16, all arguments of
a call of one dtype; arithmetic is done in float32 (in both, `sample` is different). Nothing is
copied or made contiguous behind the caller's back: the last axis must have stride 1 (the weights,
pools and tables must be contiguous), other strides are free, so q, k and v may be slices of one
matrix. Wrong arguments raise ValueError (shapes, strides, numbers) or TypeError (dtypes, devices,
not a tensor) with the op, the argument, what was expected and what was given.

Shape letters: T new tokens of all sequences, packed one after another; S sequences; E model
dimension; F hidden dimension; Hq query heads; Hkv key/value heads, a divisor of Hq; D head
dimension, a multiple of 32 up to 256; R rows of a layer's key or value pool.

The *sequence table*, int64 [S, 5], says for each sequence what the call adds to it and where its
ring is (`mistral_ext.engine.cache.RingCache` makes it; csrc/ring.h defines it):

    first_token  index of its first new token among the T
    count        how many new tokens it has: 1 in decode, more for a prompt chunk, 0 if idle
    position     absolute position of the first of them
    ring_row     first row of its ring in the pools
    capacity     C, slots of its ring: the window, or its longest length if that is less

The ring is [Hkv, C, D] and holds position p in slot p mod C.

What a table holds is checked on the CPU only: to read it back from a GPU would make a call wait.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.weights.quantize import Quantized


def supported_isas() -> list[str]:
    """The instruction sets that the CPU kernels can use on this machine, slowest first."""
    return _C.supported_isas()


def active_isa() -> str:
    """The one that they use: what `select_isa` or MISTRAL_EXT_ISA asked for, else the fastest.

    But for amx, which has to be asked for: on hardware, it has not been tested or measured yet.
    ValueError, as from every op, if the environment variable names one that this machine lacks.
    """
    return _C.active_isa()


def select_isa(name: str) -> None:
    """Makes the CPU kernels use instruction set `name`; ValueError if this machine cannot."""
    _C.select_isa(name)


def head_dims(device_type: str) -> list[int]:
    """The head dimensions that all ops take on a "cpu" or "cuda" device; none where this build has
    no kernels for it."""
    return _C.head_dims(device_type)


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
    max_count: int | None = None,
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
        max_count: no sequence has more new tokens than this; None: nothing is known. It spares
            CUDA a launch when all sequences decode.

    Returns:
        [T, Hq, D].

    Source: Jiang et al. 2023, arXiv:2310.06825, section 2; Milakov and Gimelshein 2018,
    arXiv:1805.02867 (online softmax).
    """
    return torch.ops.mistral_ext.attention(
        q, k, v, k_pool, v_pool, sequences, window, scale, max_count
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate, up: [T, F].

    Returns:
        [T, F].

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.
    """
    return torch.ops.mistral_ext.swiglu(gate, up)


Weight: TypeAlias = Tensor | Quantized


def linear(
    x: Tensor,
    weight: Weight | Sequence[Weight],
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """x @ weight.T: a layer without bias, after an optional RMSNorm of x.

    Few tokens are limited by reading the weights; up to 8 come out the same to the bit whatever
    their number, on CUDA devices up to 64 of bfloat16 or float16. Weights in 8 or 4 bits are
    widened as they are read, and the arithmetic is that of x; but up to 8 tokens of bfloat16 or
    float16 are multiplied with 8 bits in integers where the processor can (AVX-512 VNNI), each x
    rounded by at most 2^-15 of the largest of its token. With 8 bits K is at most 2^20. CUDA
    devices read rows by 16 bytes: x, norm and the weights must be aligned to that, and K a multiple
    of 8, or of 16 for 8 bits.

    Args:
        x: [T, K].
        weight: [N, K], contiguous, of the dtype of x or `Quantized`; or up to 3 that are multiplied
            in one pass as if one lay below the other, such as those of query, key and value.
        norm: [K], the weight of an RMSNorm (see `rms_norm`) of x before the product; None: none.
        eps: of the RMSNorm.

    Returns:
        [T, N], with several weights N is the sum of theirs.
    """
    weights = [weight] if isinstance(weight, Tensor | Quantized) else weight
    return torch.ops.mistral_ext.linear(x, *_values_and_scales(weights), norm, eps)


def linear_residual(x: Tensor, weight: Weight, residual: Tensor) -> None:
    """residual += x @ weight.T, in place: the end of an attention or feed-forward block.

    The sum is rounded to the dtype once.

    Args:
        x: [T, K].
        weight: [N, K], as in `linear`.
        residual: [T, N], updated in place.
    """
    torch.ops.mistral_ext.linear_residual(x, *_values_and_scales([weight]), residual)


def linear_rope(
    x: Tensor,
    weights: Sequence[Weight],
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    theta: float,
    window: int | None = None,
) -> Tensor:
    """Query, key and value of x, q and k rotated, k and v appended to the rings.

    The same to the bit as `linear` and then `rope`, which see; up to 64 tokens, CUDA devices do it
    in one launch. What `rope` leaves to `attention` to append, this does too.

    Args:
        x: [T, K].
        weights: (wq, wk, wv), [Hq * D, K], [Hkv * D, K] and [Hkv * D, K], as in `linear`.
        norm: [K], the weight of an RMSNorm of x before the product; None: none.
        eps: of the RMSNorm.
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        theta: base of the angles.
        window: W, keys that a query sees, itself included; None: all.

    Returns:
        [T, (Hq + 2 Hkv) * D]: of each token the heads of q, then those of k, then those of v.
    """
    given = norm, eps, k_pool, v_pool, sequences, theta, window
    return torch.ops.mistral_ext.linear_rope(x, *_values_and_scales(weights), *given)


def linear_argmax(
    x: Tensor,
    weight: Weight,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear`, and which of a token's outputs is the largest: logits and the greedy next token.

    Outputs are compared as they are rounded to the dtype, and of equals the first is taken: what
    `sample` chooses from the same logits at temperature 0. Up to 64 tokens, CUDA devices
    find it without a launch more than those of `linear`.

    Args:
        x: [T, K].
        weight: [N, K], as in `linear`.
        norm, eps: as in `linear`.
        limit: outputs to choose from, the first ones, up to 2^24; None: all.

    Returns:
        ([T, N], [T] int64). -1 where there is no choice, because an output is NaN or all are -inf.
    """
    return torch.ops.mistral_ext.linear_argmax(x, *_values_and_scales([weight]), norm, eps, limit)


def linear_swiglu(
    x: Tensor, gate: Weight, up: Weight, norm: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), after an optional RMSNorm of x: see `linear` and `swiglu`.

    Args:
        x: [T, K].
        gate, up: [F, K], as in `linear`.
        norm, eps: as in `linear`.

    Returns:
        [T, F].
    """
    return torch.ops.mistral_ext.linear_swiglu(x, *_values_and_scales([gate, up]), norm, eps)


def _values_and_scales(weights: Sequence[Weight]) -> tuple[list[Tensor], list[Tensor]]:
    values = [w.values if isinstance(w, Quantized) else w for w in weights]
    return values, [w.scales for w in weights if isinstance(w, Quantized)]


def sample(
    logits: Tensor,
    rows: Tensor,
    options: Tensor,
    noise: Tensor,
    history: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Chooses the next token of each row of logits, by options and state of its own.

    The steps, in this order: bias, repetition penalty, presence and frequency penalties (the result
    is rounded to float32), temperature, min_p, top_k, top_p, and a draw by the Gumbel-max rule with
    noise that is a pure function of (seed, index, step, token). A temperature of 0 takes the
    largest. Of equals the lower id comes first. The same arguments give the same tokens on every
    device, and what else is in the batch does not matter (csrc/sample.h has all of the definition).

    Options and state are tables with a row for each completion, on the device of the logits: a
    decode loop needs nothing from the host. `mistral_ext.engine.sampling.Sampler` keeps them. The
    columns:

        options  temperature, top_k (0: all), top_p, min_p, repetition_penalty, presence_penalty,
                 frequency_penalty
        noise    seed (its 64 bits), index (which of the completions of one seed), step

    Args:
        logits: [N, V] float32, V up to 2^24.
        rows: [N] int64, the row of the tables that each row of logits goes with; none twice.
        options: [M, 7] float64.
        noise: [M, 3] int64; step grows by one.
        history: [M, V] int32, 2 * (times chosen) + (1 if in the prompt); the choice is counted.
        bias: [M, V] float32, added to the logits; None: nothing is.

    Returns:
        [N] int64. -1 where there is no choice, because a logit is NaN or all are -inf; the state of
        these rows stays as it is.

    Source: Gumbel 1954 and Maddison et al. 2014, arXiv:1411.0030 (Gumbel-max); Salmon et al. 2011
    (Philox); Holtzman et al. 2020, arXiv:1904.09751 (top_p); Keskar et al. 2019, arXiv:1909.05858
    (repetition penalty).
    """
    return torch.ops.mistral_ext.sample(logits, rows, options, noise, history, bias)


# torch.library: schemas (mutated arguments marked), implementations, and fake kernels, which give
# torch.compile and torch.export the shapes without running anything.

_library = torch.library.Library("mistral_ext", "DEF")
_DEVICES = ("cpu", "cuda")

_library.define(
    "rms_norm(Tensor x, Tensor weight, float eps=1e-05, Tensor(a!)? residual=None) -> Tensor"
)
_library.define(
    "rope(Tensor(a!) q, Tensor(b!) k, Tensor v, Tensor(c!) k_pool, Tensor(d!) v_pool, "
    "Tensor sequences, float theta, int? window=None) -> ()"
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, "
    "Tensor sequences, int? window=None, float? scale=None, int? max_count=None) -> Tensor"
)
_library.define("swiglu(Tensor gate, Tensor up) -> Tensor")
_WEIGHTS = "Tensor[] values, Tensor[] scales"  # of plain weights there are no scales
_NORM = "Tensor? norm=None, float eps=1e-05"
_library.define(f"linear(Tensor x, {_WEIGHTS}, {_NORM}) -> Tensor")
_library.define(f"linear_residual(Tensor x, {_WEIGHTS}, Tensor(a!) residual) -> ()")
_library.define(
    f"linear_rope(Tensor x, {_WEIGHTS}, Tensor? norm, float eps, Tensor(a!) k_pool, "
    "Tensor(b!) v_pool, Tensor sequences, float theta, int? window=None) -> Tensor"
)
_library.define(
    f"linear_argmax(Tensor x, {_WEIGHTS}, {_NORM}, int? limit=None) -> (Tensor, Tensor)"
)
_library.define(f"linear_swiglu(Tensor x, {_WEIGHTS}, {_NORM}) -> Tensor")
_library.define(
    "sample(Tensor logits, Tensor rows, Tensor options, Tensor(a!) noise, Tensor(b!) history, "
    "Tensor? bias=None) -> Tensor"
)


def _lane(x: Tensor) -> int:
    """Where a kernel on x runs: how many threads on the CPU, on which stream on a GPU."""
    if x.is_cuda:
        return torch.cuda.current_stream(x.device).cuda_stream
    return torch.get_num_threads()


@torch.library.impl("mistral_ext::rms_norm", _DEVICES)
def _(x, weight, eps=1e-5, residual=None):
    out = x.new_empty(x.shape)
    _C.rms_norm(x, weight, residual, out, eps, _lane(x))
    return out


@torch.library.impl("mistral_ext::rope", _DEVICES)
def _(q, k, v, k_pool, v_pool, sequences, theta, window=None):
    _C.rope(q, k, v, k_pool, v_pool, sequences, theta, window, _lane(q))


# (device, stream, whether it is being captured) -> the graph (0: none), and zeroed counters for the
# blocks of a call, which leave them zeroed.
_counters: dict[tuple[torch.device, int, bool], tuple[int, Tensor]] = {}


def _zeroed_counters(device: torch.device, lane: int, count: int) -> Tensor:
    # A graph has its own, zeroed once in each replay: it may run at the same time as others.
    graph = _C.capture_id(lane)
    key = (device, lane, graph != 0)
    known, counters = _counters.get(key, (None, None))
    if known != graph or len(counters) < count:
        # At least so many that those of a decode step are zeroed only once.
        counters = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _counters[key] = graph, counters
    return counters


_scratch_of_thread = threading.local()


def _scratch(nbytes: int) -> int:
    """The address of memory that a thread's calls use one after another, aligned to a cache line.

    It is kept, as large as the largest call has needed: fresh pages would cost every call time.
    """
    scratch = getattr(_scratch_of_thread, "bytes", None)
    if scratch is None or len(scratch) < nbytes + 64:
        scratch = _scratch_of_thread.bytes = torch.empty(nbytes + 64, dtype=torch.uint8)
    return -(-scratch.data_ptr() // 64) * 64


@torch.library.impl("mistral_ext::attention", "cpu")
def _(q, k, v, k_pool, v_pool, sequences, window=None, scale=None, max_count=None):
    out = q.new_empty(q.shape)
    given = (q, k, v, k_pool, v_pool, sequences)
    _C.attention(*given, out, window, scale, max_count, _scratch, _lane(q))
    return out


@torch.library.impl("mistral_ext::attention", "cuda")
def _(q, k, v, k_pool, v_pool, sequences, window=None, scale=None, max_count=None):
    out = q.new_empty(q.shape)
    lane = _lane(q)
    held = []  # until the launch: what is freed before could be given to another call

    def scratch(partials: int, counters: int) -> tuple[int, int]:
        held.append(torch.empty(partials, dtype=torch.float32, device=q.device))
        held.append(_zeroed_counters(q.device, lane, counters))
        return held[0].data_ptr(), held[1].data_ptr()

    given = (q, k, v, k_pool, v_pool, sequences)
    _C.attention(*given, out, window, scale, max_count, scratch, lane)
    return out


@torch.library.impl("mistral_ext::swiglu", _DEVICES)
def _(gate, up):
    out = gate.new_empty(gate.shape)
    _C.swiglu(gate, up, out, _lane(gate))
    return out


# Our products on a CUDA device are made for few tokens, which reading the weights limits; those of
# more, and of float32, are torch's. Weights in 8 or 4 bits are widened for them, one after the
# other: of many tokens that costs less than products slower than the vendor's would.
_MOST_TOKENS_ON_CUDA = 64


def _multiplied_by_torch(x: Tensor) -> bool:
    return x.is_cuda and (len(x) > _MOST_TOKENS_ON_CUDA or x.dtype == torch.float32)


def _linear_scratch(x):
    """What gives a product of x its scratch, to be kept until the launch: see attention."""
    held = []

    def scratch(nbytes: int) -> int:
        if not x.is_cuda:
            return _scratch(nbytes)
        held.append(torch.empty(nbytes, dtype=torch.uint8, device=x.device))
        return held[0].data_ptr()

    return scratch


def _linear(op, x, values, scales, norm, eps, out):
    _C.linear(op, x, values, scales, norm, eps, out, _linear_scratch(x), _lane(x))


def _dequantize(values, scales, dtype):
    weight = Quantized(values, scales)
    out = torch.empty(weight.shape, dtype=dtype, device=values.device)
    _C.dequantize(values, scales, out, _lane(values))
    return out


def _plain_weights(values, scales, dtype):
    """Of all formats, one after the other, so that no two widened ones take memory. Those that lie
    one below the other (`weights.device.move_weights`) come as one."""
    if scales:
        yield from (_dequantize(*weight, dtype) for weight in zip(values, scales, strict=True))
    elif _adjacent(values):
        shape = (sum(map(len, values)), values[0].shape[1])
        yield values[0].as_strided(shape, values[0].stride())
    else:
        yield from values


def _adjacent(weights) -> bool:
    first = weights[0].untyped_storage().data_ptr()
    return all(
        after.untyped_storage().data_ptr() == first
        and after.data_ptr() == before.data_ptr() + before.nbytes
        for before, after in itertools.pairwise(weights)
    )


def _side_by_side(products):
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def _torch_products(op, x, values, scales, norm, eps):
    _C.check_linear(op, x, values, scales, norm, eps, None)
    x = x if norm is None else rms_norm(x, norm, eps)
    return [
        torch.nn.functional.linear(x, weight) for weight in _plain_weights(values, scales, x.dtype)
    ]


@torch.library.impl("mistral_ext::linear", _DEVICES)
def _(x, values, scales, norm=None, eps=1e-5):
    if _multiplied_by_torch(x):
        return _side_by_side(_torch_products("linear", x, values, scales, norm, eps))
    out = x.new_empty((len(x), sum(map(len, values))))
    _linear("linear", x, values, scales, norm, eps, out)
    return out


@torch.library.impl("mistral_ext::linear_residual", _DEVICES)
def _(x, values, scales, residual):
    if _multiplied_by_torch(x):
        _C.check_linear("linear_residual", x, values, scales, None, 0.0, residual)
        (weight,) = _plain_weights(values, scales, x.dtype)
        residual.addmm_(x, weight.T)
    else:
        _linear("linear_residual", x, values, scales, None, 0.0, residual)


@torch.library.impl("mistral_ext::linear_rope", _DEVICES)
def _(x, values, scales, norm, eps, k_pool, v_pool, sequences, theta, window=None):
    rings = k_pool, v_pool, sequences, theta, window
    if _multiplied_by_torch(x):
        _C.check_linear_rope(x, values, scales, norm, eps, k_pool)
        out = _side_by_side(_torch_products("linear_rope", x, values, scales, norm, eps))
        heads = [len(weight) // k_pool.shape[1] for weight in values]
        q, k, v = out.unflatten(1, (sum(heads), -1)).split(heads, dim=1)
        _C.rope(q, k, v, *rings, _lane(x))
        return out
    out = x.new_empty((len(x), sum(map(len, values))))
    given = x, values, scales, norm, eps, out, *rings
    _C.linear_rope(*given, _linear_scratch(x), _lane(x))
    return out


@torch.library.impl("mistral_ext::linear_argmax", _DEVICES)
def _(x, values, scales, norm=None, eps=1e-5, limit=None):
    if _multiplied_by_torch(x):
        _C.check_linear_argmax(x, values, scales, norm, eps, limit)
        out = _side_by_side(_torch_products("linear_argmax", x, values, scales, norm, eps))
        largest, token_ids = out[:, :limit].max(dim=1)  # a NaN, if there is one
        return out, token_ids.where(largest > -torch.inf, -1)
    out = x.new_empty((len(x), sum(map(len, values))))
    token_ids = x.new_empty(len(x), dtype=torch.int64)
    lane = _lane(x)
    counters = _zeroed_counters(x.device, lane, _C.argmax_counters) if x.is_cuda else None
    given = x, values, scales, norm, eps, limit, out, token_ids, counters
    _C.linear_argmax(*given, _linear_scratch(x), lane)
    return out, token_ids


@torch.library.impl("mistral_ext::linear_swiglu", _DEVICES)
def _(x, values, scales, norm=None, eps=1e-5):
    if _multiplied_by_torch(x):
        products = _torch_products("linear_swiglu", x, values, scales, norm, eps)
        return swiglu(*(products if len(products) == 2 else products[0].chunk(2, dim=1)))
    out = x.new_empty((len(x), len(values[0])))
    _linear("linear_swiglu", x, values, scales, norm, eps, out)
    return out


@torch.library.impl("mistral_ext::sample", _DEVICES)
def _(logits, rows, options, noise, history, bias=None):
    out = rows.new_empty(rows.shape)
    keys = logits.new_empty(logits.shape, dtype=torch.int32)
    weights = logits.new_empty(logits.shape, dtype=torch.int64)
    _C.sample(logits, rows, options, noise, history, bias, keys, weights, out, _lane(logits))
    return out


@torch.library.register_fake("mistral_ext::rms_norm")
def _(x, weight, eps=1e-5, residual=None):
    return x.new_empty(x.shape)


@torch.library.register_fake("mistral_ext::rope")
def _(q, k, v, k_pool, v_pool, sequences, theta, window=None):
    return None


@torch.library.register_fake("mistral_ext::attention")
def _(q, k, v, k_pool, v_pool, sequences, window=None, scale=None, max_count=None):
    return q.new_empty(q.shape)


@torch.library.register_fake("mistral_ext::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("mistral_ext::linear")
def _(x, values, scales, norm=None, eps=1e-5):
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in values)))


@torch.library.register_fake("mistral_ext::linear_residual")
def _(x, values, scales, residual):
    return None


@torch.library.register_fake("mistral_ext::linear_rope")
def _(x, values, scales, norm, eps, k_pool, v_pool, sequences, theta, window=None):
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in values)))


@torch.library.register_fake("mistral_ext::linear_argmax")
def _(x, values, scales, norm=None, eps=1e-5, limit=None):
    out = x.new_empty((x.shape[0], sum(weight.shape[0] for weight in values)))
    return out, x.new_empty(x.shape[0], dtype=torch.int64)


@torch.library.register_fake("mistral_ext::linear_swiglu")
def _(x, values, scales, norm=None, eps=1e-5):
    return x.new_empty((x.shape[0], values[0].shape[0]))


@torch.library.register_fake("mistral_ext::sample")
def _(logits, rows, options, noise, history, bias=None):
    return rows.new_empty(rows.shape)
