"""Reads the weights of a packed checkpoint, of GPTQ, AWQ, compressed-tensors or bitsandbytes.

Matrices of the first three become a `Quantized` with the same numbers. If the caller wants other
formats, they are decoded instead, and the caller rounds them. Matrices of bitsandbytes are always
decoded as they are read. The names of a matrix's tensors tell whether the matrix is packed, so a
checkpoint may also have matrices that are not packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_ext.ops import Quantized
from mistral_ext.weights.device import TOGETHER
from mistral_ext.weights.packed_groups import GroupedMatrix
from mistral_ext.weights.packed_layouts import awq, compressed_tensors, gptq
from mistral_ext.weights.packed_nf4 import Nf4Matrix, nf4
from mistral_ext.weights.packed_settings import Packing
from mistral_ext.weights.packed_tensors import ModuleTensors
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.safetensors_file import SCALE_SUFFIX, StoredTensor

_log = logging.getLogger("mistral_ext")

_Reader = Callable[[ModuleTensors, Packing], GroupedMatrix | Nf4Matrix]
_READERS: dict[str, _Reader] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": nf4,
}
# Tensors that only packed layers have. The name of the layer comes before these names.
_MARKS = ("qweight", "qzeros", "weight_packed", "weight.absmax", "weight.quant_map")


class PackedWeights(NamedTuple):
    """The tensors of a checkpoint in the form that checkpoint.py reads.

    Attributes:
        tensors: all tensors. A packed matrix has been replaced by its decoded `weight`, or by the
            values and scales of a `Quantized`. The name of the scales ends with `SCALE_SUFFIX`.
        kept: the matrices that are a `Quantized`, by Mistral's names, with values and scales on the
            meta device.
    """

    tensors: list[StoredTensor]
    kept: dict[str, Quantized]


class Layer(NamedTuple):
    """A layer whose matrix may be packed."""

    weight: str  # Mistral's name of its matrix
    shape: tuple[int, int]  # [N, K]


def read_packed(
    tensors: Iterable[StoredTensor],
    packing: Packing,
    layers: Mapping[str, Layer],
    dtype: torch.dtype,
    quantization: Quantization | None,
) -> PackedWeights:
    """Finds the packed matrices of a checkpoint. Reads only small tensors, such as zero points.

    Args:
        tensors: all tensors of the files. They have Hugging Face's names.
        packing: how the matrices are packed, according to the configuration.
        layers: the layers that may be packed, by Hugging Face's names.
        dtype: the dtype to which matrices are decoded.
        quantization: how the weights are rounded again. All packed matrices are then decoded.
            None: the weights are not rounded again.

    Raises:
        ValueError: a tensor is missing or invalid, or matrices that share their input need it in
            different orders. The message names the tensor.
    """
    modules, found = _by_module(tensors, layers)
    kept: dict[str, Quantized] = {}
    decoded_bytes = 0
    for module in modules:
        if any(mark in module.left for mark in _MARKS):
            file = next(iter(module.left.values())).file
            matrix = _READERS[packing.method](module, packing)
            weight = f"{module.name}.weight"
            if isinstance(matrix, GroupedMatrix) and quantization is None:
                form = kept[layers[module.name].weight] = matrix.form
                found.append(_stored(weight, file, form.values, matrix.values))
                found.append(_stored(weight + SCALE_SUFFIX, file, form.scales, matrix.scales))
            else:
                plain = torch.empty(module.shape, dtype=dtype, device="meta")
                found.append(_stored(weight, file, plain, partial(matrix.decoded, dtype)))
                decoded_bytes += plain.nbytes
        # What is left belongs to a layer that is not packed, or is unknown. The caller raises an
        # error if a tensor is unknown.
        found += module.left.values()
    _expect_same_orders(kept)
    _say_what_changes(packing, quantization or dtype, decoded_bytes)
    return PackedWeights(found, kept)


def _say_what_changes(
    packing: Packing, becomes: Quantization | torch.dtype, decoded_bytes: int
) -> None:
    """Logs what becomes of packed matrices that do not keep their numbers. `becomes` is how they
    are rounded again, or the dtype to which they are decoded, and `decoded_bytes` their size when
    decoded."""
    if isinstance(becomes, Quantization):
        _log.warning("weights in %s become %s as they are read", packing, becomes)
    elif decoded_bytes:
        _log.warning(
            "weights in %s become %s as they are read, %.2f GB (quantize makes them smaller)",
            packing,
            str(becomes).removeprefix("torch."),
            decoded_bytes / 1e9,
        )


def default_dtype(tensors: Iterable[StoredTensor], embeddings: str) -> torch.dtype:
    """The dtype to compute in: that of the tensor named `embeddings`, or bfloat16 if this tensor is
    missing or has a dtype that torch does not have."""
    for stored in tensors:
        if stored.name == embeddings and isinstance(stored.dtype, torch.dtype):
            return stored.dtype
    return torch.bfloat16


def _stored(name: str, file: Path, like: Tensor, read: Callable[[], Tensor]) -> StoredTensor:
    return StoredTensor(name, file, like.dtype, tuple(like.shape), like.nbytes, read)


def _by_module(
    tensors: Iterable[StoredTensor], layers: Mapping[str, Layer]
) -> tuple[list[ModuleTensors], list[StoredTensor]]:
    """Returns the tensors of each layer in `layers`, and all other tensors."""
    modules: dict[str, ModuleTensors] = {}
    others = []
    for stored in tensors:
        name = stored.name
        while name and name not in layers:
            name = name.rpartition(".")[0]
        if not name:
            others.append(stored)
            continue
        module = modules.setdefault(name, ModuleTensors(name, layers[name].shape, {}))
        module.left[stored.name.removeprefix(f"{name}.")] = stored
    return list(modules.values()), others


def _expect_same_orders(kept: Mapping[str, Quantized]) -> None:
    """Raises ValueError if matrices that are multiplied in one pass need their input in different
    orders."""
    layers = {name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0] for name in kept}
    for layer in sorted(layers):
        for together in TOGETHER.values():
            names = [f"{layer}.{part}.weight" for part in together]
            orders = [kept[name].order if name in kept else None for name in names]
            for name, order in zip(names, orders, strict=True):
                if not _equal(order, orders[0]):
                    raise ValueError(
                        f"{name!r} has groups of other inputs than {names[0]!r} (act-order), "
                        "expected the same: they share their input"
                    )


def _equal(order: Tensor | None, other: Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return torch.equal(order, other)
