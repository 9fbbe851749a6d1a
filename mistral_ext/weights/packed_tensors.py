"""Checks the stored tensors of a packed linear layer, for the readers of the packed formats.

A reader (packed_layouts.py, packed_nf4.py) takes the tensors that its format has, one by one.
checkpoint.py refuses the tensors of a packed layer that its reader has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mistral_ext.weights.safetensors_file import StoredTensor

Dtypes = tuple[torch.dtype, ...]


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of a linear layer that have not been taken yet. The methods below take them.

    Attributes:
        name: the name of the layer in the file.
        shape: the shape [N, K] of its matrix.
        left: the tensors. The key is the part of the tensor's name after the layer's name and a
            dot, such as "qweight".
    """

    name: str
    shape: tuple[int, int]
    left: dict[str, StoredTensor]

    def take(self, suffix: str, shape: tuple[int, ...], dtypes: Dtypes) -> StoredTensor:
        """Removes a tensor from `left` and returns it. Raises ValueError if it is missing, or has
        another shape or dtype."""
        stored = self.take_optional(suffix, shape, dtypes)
        if stored is None:
            file = next(iter(self.left.values())).file if self.left else "the files"
            raise ValueError(
                f"tensor '{self.name}.{suffix}' is missing from {file}, expected shape {shape}"
            )
        return stored

    def take_optional(
        self, suffix: str, shape: tuple[int, ...], dtypes: Dtypes
    ) -> StoredTensor | None:
        """Does the same as `take`, but returns None if there is no such tensor."""
        stored = self.left.pop(suffix, None)
        if stored is None:
            return None
        if stored.shape != shape:
            raise self.error(stored, f"has shape {stored.shape}, expected {shape}")
        if stored.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.error(stored, f"has dtype {stored.dtype}, expected {expected}")
        return stored

    def drop_zeros(self, suffix: str) -> None:
        """Removes the bias of a layer, if it has one. Some writers store a bias of zeros. Raises
        ValueError for any other bias."""
        stored = self.left.pop(suffix, None)
        if stored is not None and stored.read().any():
            raise self.error(stored, "is not zero, expected layers without bias")

    def expect_shape(self, suffix: str) -> None:
        """Removes the tensor that holds the shape of the matrix. Raises ValueError if the shape is
        wrong."""
        stored = self.take(suffix, (2,), (torch.int64, torch.int32))
        if tuple(stored.read().tolist()) != self.shape:
            raise self.error(stored, f"is {stored.read().tolist()}, expected {list(self.shape)}")

    def expect_multiples(self, number: int) -> None:
        """Raises ValueError unless the numbers of rows and columns are multiples of `number`."""
        if any(size % number for size in self.shape):
            raise ValueError(
                f"{self.name!r} has shape {self.shape}, expected multiples of {number}: that many "
                "values share a word"
            )

    @staticmethod
    def error(stored: StoredTensor, problem: str) -> ValueError:
        return ValueError(f"tensor {stored.name!r} in {stored.file} {problem}")
