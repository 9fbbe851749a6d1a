"""Adds an adapter that is being trained to a product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops.workspace import execution_target


def low_rank_update(
    out: Tensor,
    x: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor] | None],
    scale: float,
    parts: Sequence[int],
) -> Tensor:
    """Returns out + scale * (x @ a.T) @ b.T, with gradients for `out`, x, a and b.

    On the CPU the kernels of `lora` update `out` in place. They round a and b to the dtype of x, as
    they do when the adapter is used later, and keep x @ a.T in fp32. On CUDA devices these kernels
    are only for the few tokens of a decode step, so torch multiplies in fp32. On both devices the
    sum is rounded once, and the gradients of a and b are summed in fp32.

    Args:
        out: [T, N], the products of x with one to three weights, whose outputs lie side by side. It
            may be overwritten, so no other gradient may need its values.
        x: [T, K].
        pairs: for each weight the matrices a [rank, K] and b [outputs, rank], both float32, or None
            if the weight has no update.
        scale: the factor of b @ a.
        parts: the number of outputs of each weight. N is their sum.

    Returns:
        [T, N], with the dtype of x.
    """
    matrices = [matrix for pair in pairs for matrix in (pair or (None, None))]
    update = _ByTorch if x.is_cuda else _ByKernels
    added: Tensor = update.apply(out, x, scale, list(parts), *matrices)  # type: ignore[no-untyped-call]
    return added


class _ByKernels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, scale: float, parts: list[int], *matrices: Tensor | None
    ) -> Tensor:
        a, b, scales, ranks, adapters = _stack(x, scale, parts, matrices)
        hidden = x.new_zeros((len(x), *a.shape[1:3]), dtype=torch.float32)
        low, high = a.to(x.dtype), b.to(x.dtype)
        target = execution_target(x)
        _C.lora(x, low, high, scales, ranks, adapters, parts, hidden, out, target)
        ctx.mark_dirty(out)
        ctx.save_for_backward(hidden, x, a, b, scales, ranks, adapters)
        ctx.ranks = [None if matrix is None else len(matrix) for matrix in matrices[::2]]
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_a, d_b = torch.ops.mistral_ext.lora_backward(d_out, *ctx.saved_tensors, ctx.parts)
        gradients: list[Tensor | None] = []
        for i, (columns, rank) in enumerate(
            zip(d_b[0].split(ctx.parts, 1), ctx.ranks, strict=True)
        ):
            if rank is None:
                gradients += [None, None]
            else:
                gradients += [d_a[0, i, :rank], columns[:rank].T]
        return d_out, d_x, None, None, *gradients


def _stack(
    x: Tensor, scale: float, parts: list[int], matrices: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Makes the arguments a, b, scales, ranks and adapters of `lora`, for one adapter that all
    tokens use. a and b are float32."""
    count = len(parts)
    of_pairs = [0 if a is None else len(a) for a in matrices[::2]]
    a = x.new_zeros((1, count, max(of_pairs), x.shape[1]), dtype=torch.float32)
    b = x.new_zeros((1, max(of_pairs), sum(parts)), dtype=torch.float32)
    for i, (columns, one, other) in enumerate(_each_part(b[0], parts, matrices)):
        if one is not None and other is not None:
            a[0, i, : len(one)] = one
            columns[: len(one)] = other.T
    scales = x.new_full((1, count), scale, dtype=torch.float32)
    ranks = torch.tensor([of_pairs], dtype=torch.int32, device=x.device)
    return a, b, scales, ranks, x.new_zeros(len(x), dtype=torch.int32)


class _ByTorch(torch.autograd.Function):
    """Computes the update with torch's products. For the gradients it keeps x itself, not a float32
    copy of x, which would be larger."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, scale: float, parts: list[int], *matrices: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        ctx.scale, ctx.parts = scale, parts
        wide, added = x.float(), out.to(torch.float32, copy=True)
        for columns, a, b in _each_part(added, parts, matrices):
            if a is not None and b is not None:
                columns.addmm_(wide @ a.T, b.T, alpha=scale)
        return added.to(out.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *matrices = ctx.saved_tensors
        wide, d_wide = x.float(), d_out.float()
        d_x = torch.zeros_like(wide)
        gradients: list[Tensor | None] = []
        for columns, a, b in _each_part(d_wide, ctx.parts, matrices):
            if a is None or b is None:
                gradients += [None, None]
                continue
            d_hidden = ctx.scale * (columns @ b)  # [T, rank]
            d_x.addmm_(d_hidden, a)
            gradients += [d_hidden.T @ wide, ctx.scale * (columns.T @ (wide @ a.T))]
        return d_out, d_x.to(x.dtype), None, None, *gradients


def _each_part(
    joined: Tensor, parts: Sequence[int], matrices: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Yields for each weight its columns of `joined`, its a and its b."""
    return zip(joined.split(list(parts), dim=1), matrices[::2], matrices[1::2], strict=True)
