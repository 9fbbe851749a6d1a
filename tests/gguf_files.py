"""GGUF files for tests, written by the `gguf` package."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_ext.weights.gguf_blocks import BlockType

# Where a type's fp16 numbers begin in a block: random bytes there may be infinite.
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def random_blocks(block_type: BlockType, n_rows: int, columns: int, seed: int) -> Tensor:
    """[n_rows, bytes of a row] uint8: random bits, and scales of the size that weights have."""
    generator = torch.Generator().manual_seed(seed)
    if block_type.dtype is not None:
        values = torch.randn(n_rows, columns, generator=generator)
        return values.to(block_type.dtype).view(torch.uint8)
    shape = n_rows * columns // block_type.values, block_type.nbytes
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for begin in _HALVES[block_type.name]:
        scales = torch.randn(len(blocks), 1, generator=generator) * 0.01
        blocks[:, begin : begin + 2] = scales.half().view(torch.uint8)
    return blocks.view(n_rows, -1)


# Files by their bytes, for what no writer would write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    """Of the metadata."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A description."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    n_entries: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file, with other numbers of entries and tensors than it has, if they are given."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_entries = len(entries) if n_entries is None else n_entries
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries)
    header += b"".join(entries) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data
