"""Computes the loss of a language model from hidden states. It works on chunks of tokens, because
the logits of all tokens may not fit into memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistral_ext import _C
from mistral_ext.ops import torch_products
from mistral_ext.ops.library import Gradient, fake_empty, register
from mistral_ext.ops.weight import Parts, Weight, in_order, parts_of
from mistral_ext.ops.workspace import execution_target, run

IGNORED = -100  # the target of a token without loss, as in torch
# The most tokens whose logits exist at a time. The number is small enough that the logits fit into
# memory, and large enough that unpacking the weight takes a small part of a product's time.
_CHUNK = 512


def linear_cross_entropy(
    x: Tensor, weight: Weight, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the cross entropy of the logits x @ weight.T, with at most 512 rows of logits in
    memory.

    The op has a gradient for x, which it computes together with the loss. Logits and their
    gradients have the dtype of x, sums are in fp32. No logits are computed for ignored tokens.
    Products do not round x to 8 bits, whatever `set_exact_products` says. A call on a CUDA device
    waits for the device.

    Args:
        x: [T, K].
        weight: [V, K], as in `linear`.
        targets: [T] int64, the index of the right logit, 0 to V - 1, or -100 for a token to ignore.
        weights: [T] float32, the factors of the tokens' losses in the sum. None: all factors are 1.
            The factors of ignored tokens are not used.

    Returns:
        Two float32 tensors: [], the sum of the losses times their factors, and [T], the loss of
        each token without its factor. Only the sum has a gradient. The loss of an ignored token is
        0.

    Raises:
        ValueError: a target is not the index of a logit. On CUDA devices the loss of such a token
            is NaN instead.
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
        RuntimeError: backward was called with create_graph=True, but the gradient has no gradient.
    """
    x, _ = in_order(x, [weight])
    with_gradient = torch.is_grad_enabled() and x.requires_grad
    given = targets, weights, with_gradient
    total, losses, _ = torch.ops.mistral_ext.linear_cross_entropy(x, *parts_of([weight]), *given)
    return total, losses


def _run(
    x: Tensor,
    values: list[Tensor],
    scales: list[Tensor | None],
    formats: list[str],
    whole: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = Parts(values, scales, formats, whole)
    _expect(x, targets, "targets", torch.int64)
    if weights is not None:
        _expect(x, weights, "weights", torch.float32)
    losses = x.new_zeros(len(x), dtype=torch.float32)
    d_x = x.new_zeros(x.shape if with_gradient else (0, x.shape[1]))
    if weights is None:
        factors = torch.ones_like(losses)
    else:  # the factor of an ignored token may be NaN or infinite, which would spoil the sum
        factors = weights.masked_fill(targets == IGNORED, 0)
    for rows in (targets != IGNORED).nonzero().flatten().split(_CHUNK):
        chunk = _Chunk(x.index_select(0, rows), parts)
        of_rows = factors.index_select(0, rows) if with_gradient else None
        losses.index_copy_(0, rows, chunk.losses(targets.index_select(0, rows), of_rows))
        if with_gradient:
            d_x.index_copy_(0, rows, chunk.gradient())
    return losses @ factors, losses, d_x


def _expect(x: Tensor, table: Tensor, name: str, dtype: torch.dtype) -> None:
    problem = f"linear_cross_entropy: {name} has "
    if table.dtype != dtype:
        raise TypeError(f"{problem}dtype {table.dtype}, expected {dtype}")
    if table.device != x.device:
        raise TypeError(f"{problem}device {table.device}, expected {x.device} like x")
    if table.shape != x.shape[:1]:
        raise ValueError(f"{problem}shape {list(table.shape)}, expected {list(x.shape[:1])}")


class _Chunk:
    """The logits of some tokens. `losses` may overwrite them with their gradients."""

    def __init__(self, x: Tensor, parts: Parts) -> None:
        self._parts = parts
        if x.is_cuda:
            self._logits = torch_products.linear(x, parts)
            return
        self._logits = x.new_empty((len(x), parts.outputs))
        given = x, *parts[:3], None, 0.0, self._logits
        run(_C.linear("linear_cross_entropy", *given, None, True), x)

    def losses(self, targets: Tensor, factors: Tensor | None) -> Tensor:
        """Returns the losses [T]. If factors [T] are given, also overwrites the logits with their
        gradients times the factors."""
        losses = self._logits.new_empty(len(targets), dtype=torch.float32)
        target = execution_target(losses)
        _C.cross_entropy(self._logits, targets, factors, losses, target)
        return losses

    def gradient(self) -> Tensor:
        """Returns the gradient [T, K] of x. `losses` must have been called with factors before."""
        gradient: Tensor = torch.ops.mistral_ext.linear_backward(self._logits, *self._parts)
        return gradient


def _fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, inputs = x.shape
    with_gradient = arguments[-1]
    return (
        fake_empty(x, (), dtype=torch.float32),
        fake_empty(x, (tokens,), dtype=torch.float32),
        fake_empty(x, (tokens if with_gradient else 0, inputs)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, values, scales, *_, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError(
            "linear_cross_entropy: x requires a gradient and with_gradient is False, expected True"
        )
    _, losses, d_x = output
    ctx.count, ctx.plain = len(values), None in scales
    ctx.mark_non_differentiable(losses, d_x)
    ctx.save_for_backward(d_x)


def _differentiate(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True, for which torch would take d_x as a constant
        raise RuntimeError(
            "linear_cross_entropy: its gradient has no gradient: call backward without create_graph"
        )
    (d_x,) = ctx.saved_tensors
    nothing = [None] * ctx.count
    of_x = (d_x.float() * d_total).to(d_x.dtype)
    return of_x, nothing, None if ctx.plain else nothing, *[None] * 5


register(
    "linear_cross_entropy(Tensor x, Tensor[] values, Tensor?[] scales, str[] formats, "
    "Tensor? whole, Tensor targets, Tensor? weights, bool with_gradient) "
    "-> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    Gradient(("x",), _save, _differentiate),
)
