"""Reads the tensors of a model in a GGUF file.

Tensors are stored under GGUF's own names, in blocks (gguf_blocks.py), and with the query and key
rows in Mistral's order. If our kernels can multiply a matrix in its format, its values and scales
are moved into two tensors, without any rounding (mistral_ext/ops/repack.py). Other tensors are
decoded as they are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from mistral_ext.ops import Quantized, memory
from mistral_ext.ops.repack import BLOCK_FORMATS, repack
from mistral_ext.weights.gguf_blocks import decode
from mistral_ext.weights.gguf_file import Gguf, GgufTensor
from mistral_ext.weights.safetensors_file import SCALE_SUFFIX, StoredTensor

_log = logging.getLogger("mistral_ext")

_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
# Not a weight: divisors of RoPE's frequencies, which belong to the configuration.
FREQUENCY_FACTORS = "rope_freqs.weight"


def gguf_name(name: str) -> str:
    """GGUF's name for a weight: blk.0.attn_q.weight for layers.0.attention.wq.weight."""
    module = name.removesuffix(".weight")
    if not module.startswith("layers."):
        return f"{_NAMES[module]}.weight"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}.{_NAMES[module]}.weight"


def kept_formats(file: Gguf) -> dict[str, str]:
    """The formats of matrices that our kernels multiply as the file stores them. The keys are the
    names in the file."""
    return {
        name: BLOCK_FORMATS[tensor.type.name]
        for name, tensor in file.tensors.items()
        if tensor.type.name in BLOCK_FORMATS and len(tensor.shape) == 2
    }


def kept_parts(
    file: Gguf, kept: Mapping[str, str], name: str, shape: tuple[int, ...]
) -> Quantized | None:
    """The values and scales of a weight that keeps its format, as tensors on the meta device.

    Args:
        file: the result of `read_gguf`.
        kept: the result of `kept_formats`.
        name: Mistral's name of the weight.
        shape: the shape that the weight should have.

    Returns:
        The values and scales, or None if the weight does not keep its format or is missing.

    Raises:
        ValueError: the weight has another shape.
    """
    tensor = file.tensors.get(gguf_name(name))
    if tensor is None or tensor.name not in kept:
        return None
    if tensor.shape != shape:
        raise ValueError(
            f"tensor {tensor.name!r} in {tensor.file} has shape {tensor.shape}, expected {shape}"
        )
    return Quantized.empty(shape, kept[tensor.name], device=torch.device("meta"))


def gguf_tensors(file: Gguf, dtype: torch.dtype, kept: Mapping[str, str]) -> Iterator[StoredTensor]:
    """Yields the weights of a file. A weight is converted when its `read` is called.

    Args:
        file: the result of `read_gguf`.
        dtype: the dtype to which weights that are not in `kept` are decoded.
        kept: the result of `kept_formats`. Each of these matrices becomes two tensors: the values
            have its name, and the scales its name with `SCALE_SUFFIX`.
    """
    for name, tensor in file.tensors.items():
        if name == FREQUENCY_FACTORS:
            continue
        if name in kept:
            yield from _kept_tensors(tensor, kept[name])
        else:
            read = partial(_read, tensor, dtype)
            yield StoredTensor(name, tensor.file, dtype, tensor.shape, tensor.nbytes, read)


def _kept_tensors(tensor: GgufTensor, format: str) -> Iterator[StoredTensor]:
    parts = Quantized.empty(tensor.shape, format, device=torch.device("meta"))
    for suffix, field in (("", "values"), (SCALE_SUFFIX, "scales")):
        part: Tensor = getattr(parts, field)
        yield StoredTensor(
            tensor.name + suffix,
            tensor.file,
            part.dtype,
            tuple(part.shape),
            part.nbytes,
            partial(_read_part, tensor, field, part),
        )


def _read_part(tensor: GgufTensor, field: str, like: Tensor) -> Tensor:
    part = memory.empty(like.shape, like.dtype)
    repack(tensor.rows(), tensor.type.name, **{field: part})
    return part


def default_dtype(file: Gguf) -> torch.dtype:
    """The dtype to compute in: that of the embeddings, or bfloat16 if they are quantised."""
    embeddings = file.tensors.get(gguf_name("tok_embeddings.weight"))
    return (embeddings and embeddings.type.dtype) or torch.bfloat16


def say_what_changes(file: Gguf, formats: Mapping[str, str | None], dtype: str) -> None:
    """Logs which types of a file change as they are read, and what they become.

    Args:
        file: the result of `read_gguf`.
        formats: the formats that weights get, by the file's names. None: the weight is decoded.
        dtype: the name of the dtype to which weights are decoded.
    """
    changes: dict[str, set[str]] = {}
    for name, tensor in file.tensors.items():
        becomes = formats.get(name) or dtype
        if tensor.type.dtype is None and becomes != tensor.type.name.lower():
            changes.setdefault(becomes, set()).add(tensor.type.name)
    for becomes, types in sorted(changes.items()):
        names = ", ".join(sorted(types))
        _log.warning("%s: %s become %s as they are read", file.path, names, becomes)


def _read(tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    rows = tensor.rows()
    if tensor.type.dtype != dtype:
        return decode(rows, tensor.type, dtype).view(tensor.shape)
    if rows.data_ptr() % dtype.itemsize:  # tensors in a file may have any alignment
        rows = rows.clone()
    return rows.view(dtype).view(tensor.shape)
