"""Products with weights, fused with the operations before and after the product in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops import torch_products
from mistral_ext.ops.library import Gradient, fake_empty, register, with_rows
from mistral_ext.ops.routing import routed
from mistral_ext.ops.weight import Parts, Quantized, Weight, Weights, in_order, parts_of
from mistral_ext.ops.workspace import run

_WEIGHTS = "Tensor[] values, Tensor?[] scales, str[] formats, Tensor? whole"
_NORM = "Tensor? norm=None, float eps=1e-05"


def linear(
    x: Tensor,
    weight: Weight | Weights,
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Computes x @ weight.T, a linear layer without bias, after an optional RMSNorm of x.

    A product of few tokens takes as long as reading the weights. Special kernels (gemv) compute it.
    The result of a token then has the same bits whatever the number of tokens in the call. On the
    CPU this holds for up to 8 tokens, and for any number of tokens if x is rounded to 8 bits (see
    below). On CUDA devices it holds for up to 64 tokens of bfloat16 or float16.

    Quantised weights are unpacked as they are read, and multiplied in the precision of x. CPUs with
    AVX2 or NEON make exceptions:

    - For "int8" and "q8_0", up to 8 tokens of bfloat16 or float16 are rounded to 16-bit integers.
      The errors are at most 2^-15 of the largest magnitude of a token.
    - For formats of 4 to 6 bits, x is rounded to 8-bit integers, unless `set_exact_products`
      forbids it. The errors are at most 1/254 of the largest magnitude of 32 neighbours. More than
      8 tokens are not rounded for "iq4_nl" and "iq4_xs" on x86 without VNNI, nor in bfloat16 on
      CPUs with AMX.
    - With AVX-512, "int4" is multiplied in 16-bit integers or bfloat16, not in 8-bit integers.

    With "int8", K is at most 2^20, so that 32-bit sums do not overflow. CUDA devices read rows in
    16-byte loads. So there x, norm and the weights must be aligned to 16 bytes, and K must be a
    multiple of 8, or of 16 for 8-bit values.

    The op has a gradient for x with weights of every format. It has no gradient for the weights or
    norm. Products that round x to 8 bits have no gradient either, so call
    `set_exact_products(True)` before training.

    Args:
        x: [T, K].
        weight: [N, K], contiguous, with the dtype of x, or `Quantized`. It may also be a list of up
            to 3 weights, such as those of query, key and value. These are multiplied in one pass,
            as if they were stacked, and each may have its own format. Or it may be a
            `JoinedWeight`, which torch multiplies as one matrix, and our kernels as several.
        norm: [K], the weight of an RMSNorm (see `rms_norm`) of x before the product. None: x is not
            normalised.
        eps: epsilon of the RMSNorm.

    Returns:
        [T, N]. With several weights N is the sum of their rows.
    """
    weights: Weights = [weight] if isinstance(weight, Tensor | Quantized) else weight
    x, norm = in_order(x, weights, norm)
    out: Tensor = torch.ops.mistral_ext.linear(x, *parts_of(weights), norm, eps)
    return out


def _run_linear(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out = x.new_empty((len(x), parts.outputs))
    run(_C.linear("linear", x, *parts[:3], norm, eps, out), x, out)
    return out


def _fake_linear(x: Tensor, values: list[Tensor], *_: object) -> Tensor:
    return fake_empty(x, (x.shape[0], sum(weight.shape[0] for weight in values)))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
    x, values, scales, ctx.formats, whole, norm, ctx.eps = inputs
    _expect_exact(x, ctx.formats)
    ctx.save_for_backward(None if norm is None else x, norm, whole, *values, *scales)


def _expect_exact(x: Tensor, formats: list[str]) -> None:
    """Raises RuntimeError if the product rounds x to 8 bits."""
    if x.is_cuda or _C.exact_products():
        return
    for name in formats:
        # If a single token is not rounded, more tokens are not rounded either. This is asked first,
        # because reading len(x) makes torch.compile compile anew for each number of tokens.
        if _C.linear_rounds(x.dtype, name, 1) and _C.linear_rounds(x.dtype, name, len(x)):
            raise RuntimeError(
                f"linear: x requires a gradient, but its product with a weight in {name!r} rounds "
                "it to 8 bits, which has none: call ops.set_exact_products(True)"
            )


def _differentiate_linear(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    x, norm, whole, *tensors = ctx.saved_tensors
    count = len(ctx.formats)
    values, scales = tensors[:count], tensors[count:]
    d_x = torch.ops.mistral_ext.linear_backward(d_out, values, scales, ctx.formats, whole)
    if norm is not None:
        d_x = torch.ops.mistral_ext.rms_norm_backward(x, norm, d_x, ctx.eps)
    # The gradients must have the structure of the arguments. But torch does not count a list that
    # contains None as a list of tensors, and expects a single None for it.
    of_scales = None if None in scales else [None] * count
    return d_x, [None] * count, of_scales, None, None, None, None


register(
    f"linear(Tensor x, {_WEIGHTS}, {_NORM}) -> Tensor",
    routed(_run_linear, torch_products.linear),
    _fake_linear,
    Gradient(("x",), _save_linear, _differentiate_linear),
)


def _run_linear_backward(
    d_out: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    whole: Tensor | None,
) -> Tensor:
    parts, d_out = Parts(values, scales, formats, whole), with_rows(d_out)
    if d_out.is_cuda:
        return torch_products.linear_backward(d_out, parts)
    d_x = d_out.new_empty((len(d_out), parts.inputs))
    run(_C.linear_backward(d_out, *parts[:3], d_x), d_x)
    return d_x


def _fake_linear_backward(d_out: Tensor, *weights: Any) -> Tensor:
    return fake_empty(d_out, (d_out.shape[0], Parts(*weights).inputs))


register(
    f"linear_backward(Tensor d_out, {_WEIGHTS}) -> Tensor",
    _run_linear_backward,
    _fake_linear_backward,
)


def linear_residual(x: Tensor, weight: Weight, residual: Tensor) -> None:
    """Computes residual += x @ weight.T in place, the end of an attention or feed-forward block.

    The sum is rounded to the dtype once. If the product itself is needed (for a sum over devices),
    call `linear`, and give its result and the residual to `rms_norm`, which adds the two. This way
    the product is also rounded before it is added, so the residual may differ slightly.

    Args:
        x: [T, K].
        weight: [N, K], as in `linear`.
        residual: [T, N], updated in place.
    """
    x, _ = in_order(x, [weight])
    torch.ops.mistral_ext.linear_residual(x, *parts_of([weight]), residual)


def _run_linear_residual(
    x: Tensor,
    parts: Parts,
    residual: Tensor,
) -> None:
    run(_C.linear("linear_residual", x, *parts[:3], None, 0.0, residual), x, residual)


def _fake_linear_residual(*_: object) -> None:
    return None


register(
    f"linear_residual(Tensor x, {_WEIGHTS}, Tensor(a!) residual) -> ()",
    routed(_run_linear_residual, torch_products.linear_residual),
    _fake_linear_residual,
)


def linear_rope(
    x: Tensor,
    weights: Weights,
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> Tensor:
    """Computes query, key and value of x, rotates q and k, and appends k and v to the rings.

    The result has the same bits as that of `linear` followed by `rope`. On CUDA devices, up to 64
    tokens take no more launches than `linear` if all weights have the same group size and the same
    format, and this format is plain, "int8", "int4" or "q8_0". Like `rope`, this op leaves some
    tokens for `attention` to append.

    Args:
        x: [T, K].
        weights: (wq, wk, wv), [Hq * D, K], [Hkv * D, K] and [Hkv * D, K], as in `linear`.
        norm: [K], the weight of an RMSNorm of x before the product. None: x is not normalised.
        eps: epsilon of the RMSNorm.
        k_pool, v_pool: [R, D], the rings of all sequences.
        sequences: [S, 5] int64, the sequence table.
        frequencies: [D/2] float64, radians per position, the result of
            `mistral_ext.model.rope.frequencies`.
        window: W, the number of keys that a query sees, including its own key. None: a query sees
            all keys up to its own.

    Returns:
        [T, (Hq + 2 Hkv) * D]: for each token the heads of q, then of k, then of v.
    """
    x, norm = in_order(x, weights, norm)
    given = norm, eps, k_pool, v_pool, sequences, frequencies, window
    out: Tensor = torch.ops.mistral_ext.linear_rope(x, *parts_of(weights), *given)
    return out


def _run_linear_rope(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None,
    eps: float,
    k_pool: Tensor,
    v_pool: Tensor,
    sequences: Tensor,
    frequencies: Tensor,
    window: int | None = None,
) -> Tensor:
    out = x.new_empty((len(x), parts.outputs))
    weights = parts[:3]
    call = _C.linear_rope(
        x, *weights, norm, eps, out, k_pool, v_pool, sequences, frequencies, window
    )
    run(call, x, out)
    return out


register(
    f"linear_rope(Tensor x, {_WEIGHTS}, Tensor? norm, float eps, Tensor(a!) k_pool, "
    "Tensor(b!) v_pool, Tensor sequences, Tensor frequencies, int? window=None) -> Tensor",
    routed(_run_linear_rope, torch_products.linear_rope),
    _fake_linear,
)


def linear_argmax(
    x: Tensor,
    weight: Weight,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `linear`, and the index of each token's largest output. For the output matrix these
    are the logits and the greedy next tokens.

    Outputs are compared after they are rounded to the dtype. Among equal outputs the first one is
    chosen. `sample` chooses the same token from the same logits at temperature 0. On CUDA devices,
    up to 64 tokens take no more launches than `linear`.

    Args:
        x: [T, K].
        weight: [N, K], as in `linear`.
        norm, eps: as in `linear`.
        limit: the number of first outputs to choose among, at most 2^24. None: the choice is among
            all outputs.

    Returns:
        The outputs [T, N], and the indices [T] int64. An index is -1 if one of the outputs to
        choose among is NaN, or all are -inf.
    """
    x, norm = in_order(x, [weight], norm)
    given = norm, eps, limit
    out: tuple[Tensor, Tensor] = torch.ops.mistral_ext.linear_argmax(x, *parts_of([weight]), *given)
    return out


def _run_linear_argmax(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((len(x), parts.outputs))
    token_ids = x.new_empty(len(x), dtype=torch.int64)
    run(_C.linear_argmax(x, *parts[:3], norm, eps, limit, out, token_ids), x)
    return out, token_ids


def _fake_linear_argmax(x: Tensor, values: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return _fake_linear(x, values), fake_empty(x, (x.shape[0],), dtype=torch.int64)


register(
    f"linear_argmax(Tensor x, {_WEIGHTS}, {_NORM}, int? limit=None) -> (Tensor, Tensor)",
    routed(_run_linear_argmax, torch_products.linear_argmax),
    _fake_linear_argmax,
)


def linear_swiglu(
    x: Tensor,
    weights: Weights,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    added: Tensor | None = None,
) -> Tensor:
    """Computes silu(x @ gate.T) * (x @ up.T), after an optional RMSNorm of x (see `linear` and
    `swiglu`).

    Args:
        x: [T, K].
        weights: (gate, up), [F, K] each, as in `linear`.
        norm, eps: as in `linear`.
        added: [T, 2 F] float32, a tensor to add to the products with gate and up, such as the
            result of `lora`. Our kernels add it before they round the products. Torch's products
            are rounded before it is added. None: nothing is added.

    Returns:
        [T, F].
    """
    x, norm = in_order(x, weights, norm)
    out: Tensor = torch.ops.mistral_ext.linear_swiglu(x, *parts_of(weights), norm, eps, added)
    return out


def _run_linear_swiglu(
    x: Tensor,
    parts: Parts,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    added: Tensor | None = None,
) -> Tensor:
    out = x.new_empty((len(x), len(parts.values[0])))
    call = _C.linear("linear_swiglu", x, *parts[:3], norm, eps, out, added)
    run(call, x, out if added is None else None)
    return out


def _fake_linear_swiglu(x: Tensor, values: list[Tensor], *_: object) -> Tensor:
    return fake_empty(x, (x.shape[0], values[0].shape[0]))


register(
    f"linear_swiglu(Tensor x, {_WEIGHTS}, {_NORM}, Tensor? added=None) -> Tensor",
    routed(_run_linear_swiglu, torch_products.linear_swiglu),
    _fake_linear_swiglu,
)
