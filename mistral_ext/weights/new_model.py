"""Writes a model folder in Hugging Face's format that is either complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Weight
from mistral_ext.weights.checkpoint import named_parts, tensor_shapes
from mistral_ext.weights.folder import ModelFolder, companions, config_json
from mistral_ext.weights.new_folder import new_folder
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.safetensors_file import Writer, file_size


def layout_of(
    config: MistralConfig, dtype: torch.dtype, quantization: Quantization
) -> dict[str, Weight]:
    """Returns the weights of a quantised model by Mistral's names (names.py), on the meta device
    (dtypes and shapes only).

    Args:
        config: the configuration of the model.
        dtype: the dtype of the weights that are not quantised.
        quantization: the formats of the quantised weights.

    Raises:
        ValueError: a weight does not divide into groups.
    """
    layout: dict[str, Weight] = {}
    for name, shape in tensor_shapes(config).items():
        parts = quantization.parts(name, shape)
        layout[name] = torch.empty(shape, dtype=dtype, device="meta") if parts is None else parts
    return layout


def weights_size(layout: Mapping[str, Weight]) -> int:
    """The size in bytes of the file that `write_model` makes of these weights."""
    return file_size(_tensors_of(layout))


def write_model(
    target: Path,
    original: ModelFolder,
    config: MistralConfig,
    layout: Mapping[str, Weight],
    weights: Iterable[tuple[str, Weight]],
    quantization: Quantization | None = None,
) -> None:
    """Writes a model that was made from another one (the original), tensor by tensor. Copies the
    tokenizer and similar files of the original.

    Args:
        target: the folder to make. If it exists, it must be empty.
        original: the model whose other files are copied.
        config: the configuration of the new model.
        layout: the weights by Mistral's names, with the right dtypes and shapes, for the header of
            the file. Their values are not used, so they may be on the meta device.
        weights: pairs of the same names and the weights with their values, in any order.
        quantization: the formats of the weights. None: the weights are not quantised.

    Raises:
        FileExistsError: `target` is a file, or a folder with something in it.
        OSError: no space is left, or another failure of the system.
    """
    tensors = _tensors_of(layout)
    with new_folder(target) as folder:
        for file in companions(original.path):
            copy = folder / file.relative_to(original.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        values = config_json(config, quantization, original.instruct)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        with Writer(folder / "model.safetensors", tensors) as writer:
            for name, weight in weights:
                for stored_name, tensor in named_parts(name, weight).items():
                    writer.write(stored_name, tensor)


def _tensors_of(layout: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors of all weights, by the names that they have in Hugging Face's format."""
    tensors: dict[str, Tensor] = {}
    for name, weight in layout.items():
        tensors |= named_parts(name, weight)
    return tensors
