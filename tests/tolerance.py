"""The one table of tolerances, and the one rule that uses it.

A kernel passes if its largest error against the exact result (the reference in float64) is at
most twice that of the plain computation (the reference in the kernel's own dtype), plus a floor
for the cases where the plain computation happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In units of the exact result's largest magnitude. 16-bit: half a unit in the last place, the
# error of rounding a perfect result. float32: sums in another order, and exp to 2 units.
FLOOR = {
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: 0.5 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 0.5 * torch.finfo(torch.float16).eps,
}

DTYPES = tuple(FLOOR)


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, dim: int | None = None) -> None:
    """Applies the rule to the whole tensor, or with `dim` to each row along that axis.

    Args:
        actual: what the kernel returned.
        exact: the same in float64.
        plain: the same by the plain computation in the dtype of `actual`.
        dim: for rows of different magnitude; 0-sized tensors need none.
    """
    assert actual.dtype == plain.dtype
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape == plain.shape
    if actual.numel() == 0:
        return

    def largest(x: Tensor) -> Tensor:
        return x.abs().amax(dim if dim is not None else tuple(range(x.dim())))

    error = largest(actual.double() - exact)
    allowed = 2 * largest(plain.double() - exact) + FLOOR[actual.dtype] * largest(exact)
    # written so that a NaN fails
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"error {error[wrong].tolist()[:5]}, allowed {allowed[wrong].tolist()[:5]} "
        f"({int(wrong.sum())} of {wrong.numel()} rows)"
    )
