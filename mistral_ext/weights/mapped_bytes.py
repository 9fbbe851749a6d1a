"""Maps parts of files into memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from mistral_ext.ops import memory


def map_bytes(file: Path, offset: int, count: int) -> Tensor:
    """Maps `count` bytes of a file, from `offset` on, as a tensor [count] uint8.

    Each call makes a mapping of its own, which is closed when the tensor is freed. So after a
    tensor was copied and freed, the process does not hold its pages any more.
    """
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    skipped = offset - start
    with file.open("rb") as f:
        # ACCESS_COPY gives private pages. torch has no read-only tensors, so an accidental write
        # must neither crash nor reach the file.
        pages = mmap.mmap(f.fileno(), skipped + count, access=mmap.ACCESS_COPY, offset=start)
    memory.ask_for_large_pages(pages)
    return torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=skipped)
