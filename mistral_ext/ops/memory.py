"""Allocates memory for weights, in pages of 2 MB if the system has them.

A processor has to look up the physical address of every page that it reads. With pages of 4 KB the
look-ups take up to a third of a decode step. They take most on virtual machines, which look up each
address twice.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes


def ask_for_large_pages(pages: mmap.mmap) -> None:
    """Asks the system for large pages, for a mapped file or for memory that has not been used yet.

    On systems other than Linux nothing is done. A file's pages become large if its file system
    permits it, and if they are not already in memory as small pages.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # Linux may have been built without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Makes a tensor on the CPU as `torch.empty` does. If its size is at least that of a large
    page, asks for large pages."""
    count = math.prod(shape)
    n_bytes = count * dtype.itemsize
    if n_bytes < LARGE_PAGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    # The memory is one page longer, so that the tensor can begin at the start of a page.
    pages = mmap.mmap(-1, n_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_for_large_pages(pages)
    begin = -torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr() % LARGE_PAGE
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin).view(tuple(shape))
