"""Reads and writes files in the safetensors format. Files are read by mapping them into memory, and
written tensor by tensor.

A file consists of the length of the header (8 bytes, little-endian), the header (a JSON object from
the name of a tensor to its dtype, shape and range of bytes), and the data without gaps. The
safetensors library is not used: it does not name the tensor when it refuses a damaged file, and it
writes only files that fit into memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_ext.weights.mapped_bytes import map_bytes

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I64": torch.int64,
}
_ALIGNMENT = 64  # the data begin at a multiple of so many bytes, which is a cache line


SCALE_SUFFIX = "_scale"  # appended to the name of a weight, it gives the name of the scales


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. A quantised weight has two tensors, its values and its scales."""

    name: str
    file: Path
    dtype: torch.dtype | str  # str: the file's name of an unsupported dtype
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]  # maps the tensor into memory, or reads it if it must be converted


# Reading


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a file, in the order of their data.

    Raises:
        ValueError: the file is damaged or truncated. The message names the file and, if possible,
            the tensor.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        header_size = int.from_bytes(f.read(8), "little")
        data_start = 8 + header_size
        if data_start > size:
            raise ValueError(
                f"{file} is truncated, or not a safetensors file: its header should end at byte "
                f"{data_start}, the file ends at byte {size}"
            )
        header = f.read(header_size)
    try:
        entries = _parse_header(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged safetensors header: {error!r}") from error

    for name, dtype_name, shape, begin, end in entries:
        if data_start + end > size:
            raise ValueError(
                f"{file} is truncated: tensor {name!r} should end at byte {data_start + end}, "
                f"the file ends at byte {size}"
            )
        dtype = DTYPES.get(dtype_name, dtype_name)
        if isinstance(dtype, torch.dtype) and end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{file}: tensor {name!r} of shape {shape} and dtype {dtype_name} should have "
                f"{math.prod(shape) * dtype.itemsize} bytes, the header gives it {end - begin}"
            )
        read = partial(_map, file, data_start + begin, dtype, shape)
        yield StoredTensor(name, file, dtype, shape, end - begin, read)


def _parse_header(header: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Returns (name, dtype, shape, first byte, last byte + 1) of each tensor, in the order of the
    data."""
    entries = []
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            sizes = (begin, end, *shape)
            if not all(type(size) is int and size >= 0 for size in sizes) or begin > end:
                raise ValueError(f"tensor {name!r} has impossible entry {entry}")
            entries.append((name, str(entry["dtype"]), shape, begin, end))
    entries.sort(key=lambda entry: entry[-2:])
    for (name, *_, end), (other, *_, begin, other_end) in pairwise(
        entry for entry in entries if entry[-2] < entry[-1]
    ):
        if begin < end:
            shared = f"{begin} to {min(end, other_end)}"
            raise ValueError(f"tensors {name!r} and {other!r} share bytes {shared}")
    return entries


def _map(file: Path, offset: int, dtype: torch.dtype | str, shape: tuple[int, ...]) -> Tensor:
    """Maps a tensor of a file into memory."""
    if isinstance(dtype, str):
        raise ValueError(f"{file} has dtype {dtype}, expected one of {', '.join(DTYPES)}")
    data = map_bytes(file, offset, math.prod(shape) * dtype.itemsize)
    if data.data_ptr() % dtype.itemsize:  # a header may have any length, so data may be unaligned
        data = data.clone()
    return data.view(dtype).view(shape)


# Writing


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """The bytes of the file that a `Writer` makes of these tensors."""
    _, header_bytes = _header(tensors)
    return 8 + len(header_bytes) + sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], bytes]:
    # Tensors with the largest elements come first. Then each tensor begins at a multiple of the
    # size of its elements, whatever the shapes. Those of Mistral 7B begin at multiples of 64 bytes.
    by_size = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in by_size:
        tensor = tensors[name]
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header_bytes = json.dumps(header).encode()
    return header, header_bytes + b" " * (-(8 + len(header_bytes)) % _ALIGNMENT)


class Writer:
    """Writes a safetensors file, one tensor after another, in any order.

    The names, dtypes and shapes of all tensors are given at the beginning. The writer is a context
    manager. The file is complete when every tensor has been written and the block has ended.

    Args:
        file: the file to write. An existing file is replaced.
        tensors: for each name a tensor with the right dtype and shape. Its values are not read, so
            it may be on the meta device.

    Raises:
        OSError: no space is left, or another failure of the system.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        self._header, header_bytes = _header(tensors)
        self._data_start = 8 + len(header_bytes)
        self._file = file.open("wb")
        self._file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor to its place in the file. The tensor must be contiguous, on the CPU."""
        self._file.seek(self._data_start + self._header[name]["data_offsets"][0])
        self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
