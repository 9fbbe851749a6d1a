"""Merges a LoRA adapter into the weights of a model: `mistral-ext merge`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mistral_ext.ops import LowRank, Weight
from mistral_ext.weights.adapters import Adapter, read_adapter
from mistral_ext.weights.checkpoint import Checkpoint, tensor_shapes
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.hub import resolve
from mistral_ext.weights.new_folder import expect_replaceable
from mistral_ext.weights.new_model import write_model

# The number of rows of a weight that are merged at once. In Mistral 7B they take up to 117 MB in
# float64.
_ROWS = 1024


def merge_adapter(
    source: str | Path,
    adapter: str | Path,
    target: str | Path,
    progress: bool = True,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a model with an adapter merged into its weights, in Hugging Face's format.

    A merged weight is computed in float64 and rounded once. Weights that the adapter does not
    change are only converted to `dtype`. The folder is either complete or absent (`new_folder`).

    Args:
        source: a model folder, or a hub id. Its weights must not be quantised, because rounding to
            a few bits loses most of an adapter's update.
        adapter: the path or hub id of an adapter, as in `read_adapter`.
        target: the folder to make. If it exists, it must be empty.
        progress: show a progress bar if stderr is a terminal.
        dtype: the dtype of the weights that are written: float32, bfloat16 or float16. None: the
            weights keep the dtype in which they are stored.

    Returns:
        `target`.

    Raises:
        FileExistsError: `target` is a file, or a folder with something in it.
        FileNotFoundError: the source or the adapter is missing.
        ValueError: the source is quantised, damaged or an embedding model, the adapter is damaged,
            for another model or not supported, or a weight is too large for the dtype.
        OSError: no space is left, or another failure of the system.
    """
    target = Path(target).expanduser()  # as `resolve` does with the source
    expect_replaceable(target)
    original = read_folder(resolve(source))
    form = original.quantization or original.packing or (original.gguf and "a GGUF file")
    if form is not None:
        raise ValueError(
            f"the weights in {str(original.path)!r} are {form}, expected a folder of weights that "
            "are not quantised: rounding them again loses what an adapter adds"
        )
    if not original.config.writes_text:
        raise ValueError(
            f"{str(original.path)!r} is an embedding model, expected a model that writes text, or "
            "load it with the adapter"
        )
    updates = read_adapter(adapter, original.config)
    weights = Checkpoint(original)  # read in the stored dtype, so that nothing is rounded twice
    dtype = dtype or weights.dtype
    config = dataclasses.replace(original.config, dtype=dtype)
    shapes = tensor_shapes(config)
    layout: dict[str, Weight] = {
        name: torch.empty(shapes[name], dtype=dtype, device="meta") for name in weights.names
    }
    merged = _merged_weights(weights, updates, dtype, progress)
    write_model(target, original, config, layout, merged)
    return target


def _merged_weights(
    weights: Checkpoint, updates: Adapter, dtype: torch.dtype, progress: bool
) -> Iterator[tuple[str, Weight]]:
    for name, weight in weights.weights(progress):
        assert isinstance(weight, Tensor)  # the source is not quantised
        update = updates.get(name.removesuffix(".weight"))
        written = weight.to(dtype) if update is None else _merged(weight, update, dtype)
        if written is not weight and not written.isfinite().all():
            what = name if update is None else f"{name} with the adapter"
            raise ValueError(f"{what} is not finite in {dtype}")
        yield name, written


def _merged(weight: Tensor, update: LowRank, dtype: torch.dtype) -> Tensor:
    merged = torch.empty_like(weight, dtype=dtype)
    a = update.scale * update.a.double()
    for rows, before, b in zip(
        merged.split(_ROWS), weight.split(_ROWS), update.b.split(_ROWS), strict=True
    ):
        rows.copy_(before.double().addmm_(b.double(), a))
    return merged
