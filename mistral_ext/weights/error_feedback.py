"""Rounds a matrix with error feedback (GPTQ, Frantar et al. 2022, arXiv:2210.17323).

The loss of rounding W [N, K] to W - D is the trace of D H D^T. The Hessian H [K, K] sums the
products of the input's elements with each other over all tokens. Let H = R R^T, where R is upper
triangular. Then the loss is the sum of the squared elements of D R, and column j of D R depends
only on the columns of D up to j. So columns are rounded one after another, and column j compensates
the errors of the columns before it. (GPTQ multiplies by the inverse of R instead. Here only the
blocks on R's diagonal are inverted. The results are the same, as QuIP shows: Chee et al. 2023,
arXiv:2307.13304.)

A block b of columns is rounded in one step. R[b, b] is the block of R on the diagonal in these
columns, and R[:b, b] is the part of R above it. One product, with R[:b, b] R[b, b]^-1, compensates
the errors of earlier blocks. Within the block a kernel compensates the errors column by column,
with R[b, b]^-1.

Of a symmetric matrix only the lower triangle is computed, which halves the work. One product
computes a block of `_ROWS` rows, so the blocks on the diagonal are computed whole.
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

# The mean of a Hessian's diagonal, multiplied by this number, is added to the diagonal. GPTQ takes
# 0.01. This is too little if there are hardly more tokens than inputs, because the Hessian is then
# nearly singular (docs/performance.md has measurements).
_DAMPING = 0.1
# The least mean of the diagonal. With a smaller mean, squares and their inverses would leave the
# range of fp32.
_LEAST_MEAN = 1e-30
_BLOCK = 256  # the number of columns that are rounded in one step: a block of "iq4_xs"
# The number of rows of a symmetric matrix that `_add_squares` computes at a time. Blocks of so many
# rows on the diagonal are computed whole. `_damped_factor` reads blocks of _BLOCK rows there. They
# lie inside the whole blocks, because this number is a multiple of _BLOCK.
_ROWS = 2 * _BLOCK


class Factor(NamedTuple):
    """What rounding needs to know of a Hessian H = R R^T."""

    # [K, K]. The rows of each block b hold R[b, b]^-1 on the diagonal. Left of the diagonal they
    # hold R[:b, b] R[b, b]^-1, transposed.
    blocks: Tensor
    # [K], how much an error in each input counts: the Hessian's diagonal, divided by its mean.
    importance: Tensor


def hessian_of(inputs: Sequence[Tensor], sizes: Sequence[Tensor] | None = None) -> Tensor:
    """The products [K, K] of the inputs' elements with each other, summed over all tokens. Only
    the lower triangle and the blocks of _ROWS rows on the diagonal are right.

    Args:
        inputs: [T, K] float32 for each sequence.
        sizes: [T] float32 for each sequence: at each token the size (root mean square) of the
            residual stream, to which the matrix's output is added. An error in the output counts
            relative to this size (calibrate.py says why). None: the size is 1 at all tokens.
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
            continue  # the failed try has overwritten the Hessian, so the next computes it again
    raise ValueError("the products of the inputs with each other have no factor in fp32")


def _damped_factor(hessian: Tensor, damping: float) -> Factor:
    """Adds `damping` times the diagonal's mean to the diagonal, and factors the Hessian in place.

    Raises:
        torch.linalg.LinAlgError: the Hessian has no factor in fp32.
        ValueError: the mean is not finite.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(_LEAST_MEAN)
    if not mean.isfinite():
        raise ValueError("the products of the inputs are not finite")
    importance = (diagonal / mean).contiguous()
    diagonal.add_(damping * mean)
    for begin, end in reversed(list(_blocks(len(hessian)))):
        block = hessian[begin:end, begin:end]
        # A Cholesky factor is lower triangular. With rows and columns in reverse order, it is upper
        # triangular.
        upper = torch.linalg.cholesky(block.flip(0, 1)).flip(0, 1)
        identity = torch.eye(end - begin, device=block.device)
        inverse = torch.linalg.solve_triangular(upper, identity, upper=True).contiguous()
        before = hessian[begin:end, :begin]  # becomes (R[:b, b] R[b, b]^-1)^T
        block.copy_(inverse)
        if begin:
            rows = ops.linear(before.T.contiguous(), inverse)  # R[:b, b]
            before.copy_((rows @ inverse).T)
            _add_squares(rows, hessian, -1)
    return Factor(hessian, importance)


def round_by(factor: Factor, weight: Tensor, out: Quantized) -> Tensor:
    """Rounds a weight [N, K] float32 into `out`, in "iq4_nl" or "iq4_xs".

    Returns:
        [N, K] float32, the errors: the weight minus its rounded values. Errors are not finite if a
        weight is NaN, infinite or too large for the scales.
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
    """Multiplies n rows with each other, and adds the products [n, n] to the first n rows and
    columns of `sums`, or subtracts them if `sign` is -1. Changes only the lower triangle and the
    blocks of _ROWS rows on the diagonal."""
    signed = rows if sign > 0 else -rows
    for begin in range(0, len(rows), _ROWS):
        end = min(begin + _ROWS, len(rows))
        ops.linear_residual(signed[begin:end], rows[:end], sums[begin:end, :end])


def _blocks(columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, columns, _BLOCK):
        yield begin, min(begin + _BLOCK, columns)
