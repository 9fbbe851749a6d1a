"""Low-rank adapters of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.library import Gradient, fake_empty, register, with_rows
from mistral_ext.ops.workspace import execution_target


class LowRank(NamedTuple):
    """The update of a weight [N, K] by an adapter: scale * b @ a."""

    a: Tensor  # [rank, K]
    b: Tensor  # [N, rank]
    scale: float


def lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
    out: Tensor | None = None,
) -> Tensor | None:
    """Computes out += scale * (x @ A.T) @ B in place. For each token, the scale, A and B are those
    of its adapter, from `scales`, `a` and `b`.

    The adapters of a weight are stacked and padded to the largest rank. Weights that are multiplied
    with the same x (such as query, key and value) are *parts*: they share a call, and their outputs
    lie side by side. x @ A.T stays in fp32, and `out` is rounded once. Rows of tokens without an
    adapter do not change. The result of a token has the same bits whatever the other tokens and
    adapters are.

    Without `out` the op returns the update that it would add to `out`. Only without `out` does it
    have gradients, for x, a and b, which are summed in fp32. Then a and b may be float32 while x
    has another dtype. They are rounded to the dtype of x for the product, and their gradients are
    float32. So an optimiser can keep a and b in float32.

    Args:
        x: [T, K].
        a: [adapters, parts, max_rank, K], contiguous.
        b: [adapters, max_rank, N], contiguous; N is the sum of `parts`.
        scales: [adapters, parts] float32.
        ranks: [adapters, parts] int32, the rank of each update, from 0 (no update) to max_rank.
            Values of a and b beyond the rank are not read.
        adapters: [T] int32, the index of each token's adapter. A negative index: the token has no
            adapter.
        parts: the number of outputs of each part, for up to 3 parts.
        out: [T, N], with the dtype of x or float32, updated in place. None: the op returns the
            update.

    Returns:
        [T, N] with the dtype of x if `out` is None, else None.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    given = x, a, b, scales, ranks, adapters, parts
    if out is None:
        added: Tensor
        added, _ = torch.ops.mistral_ext.lora.added(*given)
        return added
    torch.ops.mistral_ext.lora.default(*given, out)
    return None


_SCHEMA = (
    "lora(Tensor x, Tensor a, Tensor b, Tensor scales, Tensor ranks, Tensor adapters, "
    "int[] parts, Tensor(a!) out) -> ()"
)


def _run(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
    out: Tensor,
) -> None:
    hidden = x.new_empty((len(x), *a.shape[1:3]), dtype=torch.float32)
    target = execution_target(x)
    _C.lora(x, a, b, scales, ranks, adapters, list(parts), hidden, out, target)


def _fake(*_: object) -> None:
    return None


register(_SCHEMA, _run, _fake)


def _run_added(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Returns the update [T, N], and scale * x A^T, [T, parts, max_rank] fp32, for the gradient."""
    out = x.new_zeros((len(x), sum(parts)))
    hidden = x.new_zeros((len(x), *a.shape[1:3]), dtype=torch.float32)
    given = x, a.to(x.dtype), b.to(x.dtype), scales, ranks, adapters, list(parts)
    _C.lora(*given, hidden, out, execution_target(x))
    return out, hidden


def _fake_added(x: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    hidden = fake_empty(x, (x.shape[0], a.shape[1], a.shape[2]), dtype=torch.float32)
    return fake_empty(x, (x.shape[0], sum(rest[-1]))), hidden


def _run_backward(
    d_out: Tensor,
    hidden: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    ranks: Tensor,
    adapters: Tensor,
    parts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    # The sum over several parts is rounded once, at the end.
    d_x = x.new_zeros(x.shape, dtype=x.dtype if len(parts) == 1 else torch.float32)
    d_a, d_b = (stack.new_empty(stack.shape, dtype=torch.float32) for stack in (a, b))
    end = 0
    for i, outputs in enumerate(parts):
        part, columns = slice(i, i + 1), slice(end, end + outputs)
        end += outputs
        d_part = with_rows(d_out)[:, columns]
        # d_x += scale * (d_part B^T) A. `_C.lora` computes this too, if it gets B in place of A,
        # and A in place of B.
        d_hidden = hidden.new_zeros((len(x), 1, hidden.shape[2]))
        _C.lora(
            d_part,
            b[:, None, :, columns].to(x.dtype).contiguous(),
            a[:, i].to(x.dtype).contiguous(),
            scales[:, part].contiguous(),
            ranks[:, part].contiguous(),
            adapters,
            [x.shape[1]],
            d_hidden,
            d_x,
            execution_target(x),
        )
        d_a[:, i] = _sum_over_tokens(d_hidden[:, 0], x, adapters, len(a))
        d_b[:, :, columns] = _sum_over_tokens(hidden[:, i], d_part, adapters, len(a))
    return d_x.to(x.dtype), d_a.to(a.dtype), d_b.to(b.dtype)


def _sum_over_tokens(hidden: Tensor, x: Tensor, adapters: Tensor, count: int) -> Tensor:
    """For each adapter, sums the products of `hidden` [T, R] and x [T, N] over its tokens. The
    result is [count, R, N] fp32."""
    out = hidden.new_empty((count, hidden.shape[1], x.shape[1]))
    _C.lora_gradient(hidden, x, adapters, out, execution_target(x))
    return out


def _fake_backward(
    d_out: Tensor, hidden: Tensor, x: Tensor, a: Tensor, b: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_empty(x, x.shape), fake_empty(a, a.shape), fake_empty(b, b.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.parts = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(hidden, *tensors)


def _differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.mistral_ext.lora_backward(d_out, *ctx.saved_tensors, ctx.parts)
    return *gradients, None, None, None, None


_ADAPTERS = "Tensor x, Tensor a, Tensor b, Tensor scales, Tensor ranks, Tensor adapters"
register(
    f"lora.added({_ADAPTERS}, int[] parts) -> (Tensor, Tensor)",
    _run_added,
    _fake_added,
    Gradient(("x", "a", "b"), _save, _differentiate),
)
register(
    f"lora_backward(Tensor d_out, Tensor hidden, {_ADAPTERS}, int[] parts) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
