"""Reads files that torch.save wrote, which must hold a flat dict of tensors.

A file is usually a zip archive, which is mapped into memory. A file that was written before torch
1.6, or in that format on request, is a pickle followed by the data. torch can read such a file only
as a whole.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mistral_ext.weights.library_errors import summary
from mistral_ext.weights.safetensors_file import StoredTensor

_ZIP = b"PK\x03\x04"


def torch_tensors(file: Path) -> Iterator[StoredTensor]:
    """The tensors of a file. Code in the file is not run.

    Raises:
        ValueError: the file is damaged, holds something else than a dict of tensors, or is one of
            several files among which the weights are split (model parallelism). The message names
            the file or its folder.
    """
    if re.fullmatch(r"consolidated\.\d+\.pth", file.name):
        parts = sorted(part.name for part in file.parent.glob("consolidated.*.pth"))
        if len(parts) > 1:
            raise ValueError(
                f"{file.parent} holds weights split for model parallelism ({', '.join(parts)}), "
                "expected consolidated.00.pth alone"
            )
    with file.open("rb") as f:
        is_zip = f.read(len(_ZIP)) == _ZIP
    try:
        tensors = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may raise any exception
        raise ValueError(
            f"{file} is truncated, or not a checkpoint written by torch.save: {_reason(error)}"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, expected a dict of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{file} holds a tensor under {name!r:.60}, expected names of tensors")
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{file} holds a {type(tensor).__name__} as {name!r}, expected a dict of tensors"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"tensor {name!r} in {file} is {kind}, expected its values")
        shape = tuple(tensor.shape)
        yield StoredTensor(name, file, tensor.dtype, shape, tensor.nbytes, tensor.contiguous)


def _reason(error: Exception) -> str:
    """The reason in torch's error message, without its advice to load the file in a way that may
    run code."""
    wrapped = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    return summary(wrapped or error)
