"""Random weights of Mistral 7B's shape: weights on a GPU, and weights that other engines can take,
too."""

from __future__ import annotations

import torch
from shapes import GPU
from torch import Tensor

from mistral_ext.bench import models
from mistral_ext.bench.models import mistral_7b as mistral_7b  # changed by gpu_check/stand_in.py
from mistral_ext.bench.models import on_large_pages
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import JoinedWeight, Quantized, Weight
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.device import move_weights
from mistral_ext.weights.quantize import Quantization


def random_weight(rows: int, size: int, form: str | None, dtype: torch.dtype) -> Weight:
    """Makes a random weight on the GPU, in a format. If `form` is None, it is a plain tensor."""
    return models.random_weight((rows, size), form, dtype, torch.device(GPU))


def random_weights_on_gpu(
    config: MistralConfig, name: str = "bf16"
) -> dict[str, Weight | JoinedWeight]:
    """Makes random weights in "bf16", "int8" or "int4", on the GPU and joined, as if a model had
    been loaded."""
    form = None if name == "bf16" else name
    gpu = torch.device(GPU)
    weights: dict[str, Weight | JoinedWeight] = {
        **models.random_weights(config, form, torch.bfloat16, gpu)
    }
    move_weights(weights, gpu)
    return weights


def random_weights(config: MistralConfig) -> dict[str, Tensor]:
    """Makes random weights in bf16. Tensors of the same shape are equal."""
    block = torch.randn(2**22).mul_(0.02).bfloat16()  # repeated: making more would take minutes
    weights = {}
    for name, shape in tensor_shapes(config).items():
        count = torch.Size(shape).numel()
        weights[name] = on_large_pages(block.repeat(-(-count // len(block)))[:count].view(shape))
    return weights


def quantized(weights: dict[str, Tensor], name: str) -> dict[str, Weight]:
    """The weights that loading `random_weights` as "int8" or "int4" would give.

    Only one tensor of each shape is quantised, because they are equal; the others are copies.
    """
    quantization = Quantization.from_name(name)
    done: dict[tuple[torch.Size, str], Quantized] = {}
    result: dict[str, Weight] = {}
    for tensor, weight in weights.items():
        chosen = quantization.format_of(tensor, weight.shape[-1])
        if chosen is None:
            result[tensor] = weight
            continue
        key = weight.shape, chosen
        if key not in done:
            done[key] = quantization.quantize(tensor, weight, tensor)
        values, scales = map(on_large_pages, done[key][:2])
        result[tensor] = Quantized(values, scales, chosen)
    return result


def separated(weights: dict[str, Weight | JoinedWeight]) -> dict[str, Weight]:
    """The same weights, all under Mistral's names. Weights that are joined become views of the
    whole."""
    names = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}
    result: dict[str, Weight] = {}
    for name, weight in weights.items():
        if isinstance(weight, JoinedWeight):
            module, joined, suffix = name.rsplit(".", 2)
            parts = zip(names[joined], weight.parts, strict=True)
            result |= {f"{module}.{part}.{suffix}": view for part, view in parts}
        else:
            result[name] = weight
    return result
