"""Rounds a matrix with error feedback (GPTQ, Frantar et al. 2022, arXiv:2210.17323).

The loss of rounding W [N, K] to W - D is the trace of D H D^T. The Hessian H [K, K] sums the
products of the input's elements with each other over all tokens. With H = R R^T and R upper
triangular, the loss is the sum of the squares of D R. So column j of D R depends on the columns of
D up to j alone: columns are rounded one after another, and column j makes up for the errors before
it. (GPTQ multiplies by the inverse of R, which is the factor of the inverse of H. Without it, no
matrix is inverted but the blocks on R's diagonal: QuIP, Chee et al. 2023, arXiv:2307.13304, shows
that the results are the same.)

A block of columns b is rounded in one step. The errors before it enter by one product, with
R[:, b] R[b, b]^-1. Within the block a kernel does the rest with R[b, b]^-1.

Of symmetric matrices only the lower triangle is made, in blocks of rows. The blocks on the diagonal
are whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.ops import Quantized
from mistral_ext.ops.quantize import round_with_feedback
from mistral_ext.ops.weight import FORMATS

# Added to the diagonal of a Hessian, relative to its mean. GPTQ has 0.01, but with hardly more
# tokens than inputs a Hessian is nearly singular (docs/performance.md has measurements).
_DAMPING = 0.1
_LEAST_MEAN = 1e-30  # of the diagonal: of less, squares and their inverses leave the range of fp32
_BLOCK = 256  # columns that are rounded in one step: a block of "iq4_xs"
# Rows of a symmetric matrix that are made at a time. On the diagonal `_add_squares` makes whole
# blocks of so many rows. _BLOCK divides _ROWS, so blocks of _BLOCK rows are whole there, too.
_ROWS = 2 * _BLOCK


class Factor(NamedTuple):
    """What rounding needs of a Hessian."""

    # [K, K]. On the diagonal R[b, b]^-1 for each block b. The rows before hold, transposed, what
    # columns of earlier blocks add to those of b: R[:, b] R[b, b]^-1.
    blocks: Tensor
    importance: Tensor  # [K], how much an error in each input counts: the Hessian's diagonal


def hessian_of(inputs: Sequence[Tensor], sizes: Sequence[Tensor] | None = None) -> Tensor:
    """The products [K, K] of the inputs' elements with each other, summed over all tokens. Only
    the lower triangle is right.

    Args:
        inputs: [T, K] float32 for each sequence.
        sizes: [T] float32 for each sequence. An error in the output of a token counts relative to
            its size. None: all tokens have the same size.
    """
    length = inputs[0].shape[1]
    hessian = inputs[0].new_zeros(length, length)
    for i, x in enumerate(inputs):
        _add_squares((x if sizes is None else x / sizes[i][:, None]).T.contiguous(), hessian)
    return hessian


def factor_of(inputs: Sequence[Tensor], sizes: Sequence[Tensor] | None = None) -> Factor:
    """Factors the Hessian of inputs. The arguments are those of `hessian_of`.

    Raises:
        ValueError: the inputs are not finite, or so large that the Hessian is not. Or rounding to
            fp32 leaves a Hessian that is not positive definite, so that it has no factor.
    """
    for damping in (_DAMPING, 10 * _DAMPING):
        try:
            return _damped_factor(hessian_of(inputs, sizes), damping)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue  # the factors are made in place, so all is made again
    raise ValueError("the products of the inputs with each other have no factor in fp32")


def _damped_factor(hessian: Tensor, damping: float) -> Factor:
    """Overwrites the Hessian."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(_LEAST_MEAN)
    if not mean.isfinite():
        raise ValueError("the products of the inputs are not finite")
    importance = (diagonal / mean).contiguous()
    diagonal.add_(damping * mean)
    for begin, end in reversed(list(_blocks(len(hessian)))):
        block = hessian[begin:end, begin:end]
        # A Cholesky factor is lower triangular: turned around it is upper triangular.
        upper = torch.linalg.cholesky(block.flip(0, 1)).flip(0, 1)
        identity = torch.eye(end - begin, device=block.device)
        inverse = torch.linalg.solve_triangular(upper, identity, upper=True).contiguous()
        before = hessian[begin:end, :begin]  # R[:, b]^T after the product with the inverse
        block.copy_(inverse)
        if begin:
            rows = ops.linear(before.T.contiguous(), inverse)
            before.copy_((rows @ inverse).T)
            _add_squares(rows, hessian, -1)
    return Factor(hessian, importance)


def round_by(factor: Factor, weight: Tensor, out: Quantized) -> Tensor:
    """Rounds a weight [N, K] float32 into `out`, whose format has values from a table.

    Returns:
        [N, K], the weight less what it was rounded to. Not finite if a weight is NaN or infinite,
        or too large for the scales.
    """
    errors, facts = torch.empty_like(weight), FORMATS[out.format]
    for begin, end in _blocks(weight.shape[1]):
        of_block = factor.blocks[begin:end]
        part = weight[:, begin:end].clone(memory_format=torch.contiguous_format)
        if begin:
            ops.linear_residual(errors[:, :begin], of_block[:, :begin].contiguous(), part)
        made = Quantized.empty(part.shape, out.format, device=part.device)
        round_with_feedback(
            part, of_block[:, begin:end], made, factor.importance[begin:end].contiguous()
        )
        torch.sub(weight[:, begin:end], made.dequantize(), out=errors[:, begin:end])
        out.values[:, facts.elements(begin) : facts.elements(end)] = made.values
        first, last = (at // facts.least_group * facts.group_scales for at in (begin, end))
        out.scales[:, first:last] = made.scales
    return errors


def _add_squares(rows: Tensor, sums: Tensor, sign: int = 1) -> None:
    """Adds the products [n, n] of n rows with each other to the lower triangle of `sums`, to its
    first n rows and columns; or subtracts them."""
    signed = rows if sign > 0 else -rows
    for begin in range(0, len(rows), _ROWS):
        end = min(begin + _ROWS, len(rows))
        ops.linear_residual(signed[begin:end], rows[:end], sums[begin:end, :end])


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, columns, _BLOCK):
        yield begin, min(begin + _BLOCK, columns)
