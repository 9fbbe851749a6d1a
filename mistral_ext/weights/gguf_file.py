"""Reads GGUF files, versions 2 and 3, by mapping them into memory.

A file consists of the magic bytes, u32 version, u64 number of tensors, u64 number of metadata
entries, these entries (key, u32 type, value), the descriptions of the tensors (name, u32 number of
dimensions, u64 dimensions, u32 type, u64 offset) and, from the next multiple of `general.alignment`
on, their data. All numbers are little-endian. A string is its u64 length and that many bytes.

A file may come from anywhere, so every number in it is checked before it is used. No number in a
file makes this reader allocate more than a few times the file's size. A tensor that lies outside
the file, or overlaps another, is refused.

Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mistral_ext.files import refuse_lfs_pointer
from mistral_ext.weights.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, BlockType
from mistral_ext.weights.mapped_bytes import map_bytes

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_SIZE = 2**63 - 1  # the largest size of a tensor, in values and in bytes
# The fewest bytes of a metadata entry: the length of an empty key, a type, a bool.
_LEAST_ENTRY = 8 + 4 + 1
# A lower bound for the bytes of a tensor's description, with an empty name and no dimensions.
_LEAST_TENSOR = 8 + 4 + 4 + 8

_STRING, _ARRAY, _BOOL = 8, 9, 7
# The types of numbers in metadata. The keys are the numbers by which files name the types.
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# The value of a metadata entry: a number, a text, or an array (of numbers in numpy, of texts in a
# list).
Value = int | float | bool | str | np.ndarray[Any, Any] | list[str]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file.

    Attributes:
        shape: the shape in torch's order, with the length of a row last.
        type: the type of the tensor's blocks.
        offset: the position of the tensor's first byte in the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    type: BlockType
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.values * self.type.nbytes

    def rows(self) -> Tensor:
        """Maps the bytes of the tensor into memory: [rows, bytes of a row] uint8. A vector is one
        row."""
        data = map_bytes(self.file, self.offset, self.nbytes)
        return data.view(-1, self.type.row_bytes(self.shape[-1]))


@dataclass(frozen=True)
class Gguf:
    """The contents of a model's file, or of all its parts: see :func:`read_gguf`."""

    path: Path  # the first part
    metadata: Mapping[str, Value]  # the metadata of the first part
    tensors: Mapping[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, according to its name or its first bytes. (In Ollama's folder
    the name of such a file is a hash.)"""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: str | Path) -> Gguf:
    """Reads the metadata of a model and the places of its tensors, and checks both.

    Args:
        path: the file, or any part of a model in several files (``NAME-00001-of-00003.gguf``).

    Raises:
        FileNotFoundError: the file, or one of the parts, is missing.
        ValueError: a file is damaged, truncated, of another format or version, or holds an
            unsupported type of data. The message names the file and the field.
    """
    parts = [read_part(part) for part in _part_files(Path(path))]
    first = parts[0]
    tensors: dict[str, GgufTensor] = {}
    for index, part in enumerate(parts):
        if len(parts) > 1:
            _expect_value(part, "split.no", index)
            _expect_value(part, "split.count", len(parts))
        for name, tensor in part.tensors.items():
            twin = tensors.setdefault(name, tensor)
            if twin is not tensor:
                raise ValueError(f"tensor {name!r} is in both {twin.file} and {tensor.file}")
    if len(parts) > 1 or first.metadata.get("split.count", 1) not in (0, 1):
        _expect_value(first, "split.count", len(parts))
        _expect_value(first, "split.tensors.count", len(tensors))
    return Gguf(first.path, first.metadata, tensors)


def _part_files(path: Path) -> list[Path]:
    parts = [path.with_name(name) for name in part_names(path.name)]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing; {path.name} is one of {len(parts)} parts")
    return parts


def part_names(name: str) -> list[str]:
    """The names of all files of a model. `name` is one of them. Raises ValueError if `name` has an
    impossible number, such as part 4 of 3."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise ValueError(f"{name} is part {number} of {count}, expected 1 to {count}")
    return [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]


def read_part(path: Path) -> Gguf:
    """Reads one file as :func:`read_gguf` does, without the other parts of its model."""
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < len(_MAGIC):
            raise ValueError(f"{path} has {size} bytes, expected a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).read()


def _expect_value(part: Gguf, key: str, expected: int) -> None:
    value = part.metadata.get(key)
    if value != expected:
        raise ValueError(f"{part.path}: {key} is {value!r}, expected {expected}")


class _Header:
    """Reads the header of a file, which is everything before the data."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0

    def read(self) -> Gguf:
        magic = self._take(len(_MAGIC), "the magic bytes")
        if magic != _MAGIC:
            raise self._error(f"the magic bytes are {magic!r}, expected {_MAGIC!r}")
        version = self._uint32("the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            order = " in big-endian order" if swapped else ""
            raise self._error(f"the version is {version}{order}, expected 2 or 3, little-endian")
        n_tensors = self._count("the number of tensors", _LEAST_TENSOR)
        n_entries = self._count("the number of metadata entries", _LEAST_ENTRY)
        metadata: dict[str, Value] = {}
        for i in range(n_entries):
            key = self._string(f"the key of metadata entry {i}")
            if key in metadata:
                raise self._error(f"the metadata has {key!r} twice")
            metadata[key] = self._value(key)
        described = [self._tensor(i) for i in range(n_tensors)]
        tensors = self._placed(described, self._alignment(metadata))
        return Gguf(self._path, metadata, tensors)

    # Values

    def _value(self, key: str) -> Value:
        kind = self._uint32(f"the type of {key!r}")
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            number: int | float | bool = self._numbers(kind, 1, key)[0].item()
            return number
        kind = self._uint32(f"the type of the values of {key!r}")
        if kind == _STRING:
            count = self._count(f"the length of {key!r}", 8)
            return [self._string(key) for _ in range(count)]
        least = _NUMBERS[kind].itemsize if kind in _NUMBERS else 1
        return self._numbers(kind, self._count(f"the length of {key!r}", least), key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray[Any, Any]:
        if kind not in _NUMBERS:
            raise self._error(f"the type of {key!r} is {kind}, expected a number or text (0 to 12)")
        dtype = _NUMBERS[kind]
        data = self._take(count * dtype.itemsize, key)
        if kind == _BOOL and data.strip(b"\0\1"):
            raise self._error(f"{key} is no bool, expected 0 or 1 in each byte")
        return np.frombuffer(data, dtype)

    def _string(self, what: str) -> str:
        data = self._take(self._uint64(what), what)
        # Some vocabularies hold tokens that are not UTF-8. They must not stop the reader.
        return data.decode("utf-8", "surrogateescape")

    def _count(self, what: str, least: int) -> int:
        """Reads the number of elements that follow, each at least `least` bytes long. Raises
        ValueError if so many do not fit into the rest of the file."""
        count = self._uint64(what)
        left = self._size - self._position
        if count > left // least:
            raise self._error(f"{what} is {count}, but {left} bytes are left in the file")
        return count

    def _uint32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _uint64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _take(self, count: int, what: str) -> bytes:
        end = self._position + count
        if end > self._size:
            raise self._error(
                f"{what} should end at byte {end}, the file ends at byte {self._size}: truncated, "
                "or damaged"
            )
        data = self._data[self._position : end]
        self._position = end
        return data

    # Tensors

    def _tensor(self, index: int) -> GgufTensor:
        """Reads the description of a tensor. Its offset is relative to the start of the data of all
        tensors."""
        name = self._string(f"the name of tensor {index}")
        n_dims = self._uint32(f"the number of dimensions of tensor {name!r}")
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {n_dims} dimensions, expected 1 to 4")
        dims = struct.unpack(f"<{n_dims}Q", self._take(8 * n_dims, f"the shape of tensor {name!r}"))
        number = self._uint32(f"the type of tensor {name!r}")
        if number not in BLOCK_TYPES:
            raise self._error(
                f"tensor {name!r} has type {OTHER_TYPES.get(number, number)}, expected one of "
                f"{', '.join(known.name for known in BLOCK_TYPES.values())}"
            )
        block_type = BLOCK_TYPES[number]
        if 0 in dims or math.prod(dims) * block_type.nbytes > _MAX_SIZE:
            raise self._error(f"tensor {name!r} has the impossible shape {dims[::-1]}")
        if dims[0] % block_type.values:
            raise self._error(
                f"tensor {name!r} has rows of {dims[0]} values, expected a multiple of "
                f"{block_type.values}, the values in a block of {block_type.name}"
            )
        offset = self._uint64(f"the offset of tensor {name!r}")
        return GgufTensor(name, self._path, dims[::-1], block_type, offset)

    def _alignment(self, metadata: Mapping[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, expected a power of two")
        return alignment

    def _placed(self, described: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """Returns the tensors by name, in the order of their data. Their offsets are made relative
        to the beginning of the file."""
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = 0  # the end of the tensor before, relative to the start of the data
        for tensor in sorted(described, key=lambda tensor: tensor.offset):
            name, offset = tensor.name, tensor.offset
            if name in tensors:
                raise self._error(f"tensor {name!r} is there twice")
            if offset % alignment:
                raise self._error(
                    f"tensor {name!r} is at offset {offset}, expected a multiple of {alignment}"
                )
            if offset < end:
                raise self._error(f"tensor {name!r} at offset {offset} lies in the one before it")
            end = offset + tensor.nbytes
            if start + end > self._size:
                raise self._error(
                    f"tensor {name!r} should end at byte {start + end}, the file ends at byte "
                    f"{self._size}: truncated, or damaged"
                )
            tensors[name] = GgufTensor(name, self._path, tensor.shape, tensor.type, start + offset)
        return tensors

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._path}: {problem}")
