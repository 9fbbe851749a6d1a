"""Makes models of Mistral 7B's shape with random weights, and counts what a model reads and
computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mistral_ext.bench import DTYPES
from mistral_ext.llm import Mistral
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import JoinedWeight, Quantized, Weight, memory
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.device import expect_runnable, move_weights
from mistral_ext.weights.quantize import NAMES, Quantization

_NAMES_OF_DTYPES = {getattr(torch, dtype): name for name, dtype in DTYPES.items()}


def mistral_7b(layers: int) -> MistralConfig:
    """Returns the configuration of Mistral 7B v0.1, but with this number of layers."""
    return MistralConfig(
        vocab_size=32000,
        dim=4096,
        n_layers=layers,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4096,
        max_positions=32768,
        bos_id=1,
        eos_ids=(2,),
    )


def random_model(
    layers: int, form: str | None, dtype: torch.dtype, device: torch.device
) -> Mistral:
    """Makes a model of Mistral 7B's shape with random weights and no tokenizer.

    Args:
        layers: the number of layers, 32 in the real model.
        form, dtype, device: as in `random_weights`.

    Raises:
        ValueError: the device has no kernels for this model.
    """
    config = mistral_7b(layers)
    expect_runnable(config, dtype, 0, device)
    weights: dict[str, Weight | JoinedWeight] = {**random_weights(config, form, dtype, device)}
    if device.type == "cuda":
        move_weights(weights, device)
    return Mistral(config, Transformer(config, weights), None, Path("random"))


def random_weights(
    config: MistralConfig, form: str | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Weight]:
    """Makes random weights of a model, for measurements of speed.

    Args:
        config: the configuration, which determines the shapes.
        form: the format of the matrices: "int8", "int4" or a key of
            `mistral_ext.ops.weight.FORMATS`. None: the matrices are plain tensors.
        dtype: the dtype of plain weights. Norms and embeddings are always plain.
        device: the device on which the weights are made.
    """
    quantization = None if form is None else Quantization(NAMES.get(form, form))
    made: dict[str, Weight] = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            made[name] = torch.ones(shape, dtype=dtype, device=device)
            continue
        chosen = quantization.format_of(name, shape[-1]) if quantization else None
        group = quantization.group_of(chosen) if quantization and chosen else None
        made[name] = random_weight(shape, chosen, dtype, device, group)
    return made


def random_weight(
    shape: tuple[int, ...],
    form: str | None,
    dtype: torch.dtype,
    device: torch.device,
    group: int | None = None,
) -> Weight:
    """Makes a random weight [N, K], for measurements of speed.

    Args:
        shape: (N, K).
        form: the format of the weight. The values of a quantised weight are random bits. Its scales
            are all equal, because speed does not depend on them. None: the weight is a plain
            tensor.
        dtype: the dtype of a plain weight.
        device: the device on which the weight is made.
        group: the number of values that share scales. None: the fewest that the format allows.
    """
    if form is None:
        plain = random_values(shape, dtype, device).mul_(1 / 64)
        return on_large_pages(plain) if device.type == "cpu" else plain
    values, scales = Quantized.empty(shape, form, group, device)[:2]
    integers = torch.iinfo(values.dtype)
    values.random_(integers.min, integers.max)
    # Small scales keep results finite. An array of bytes holds small integers and fp16 numbers as
    # scales. With 0x11 in each byte, an fp16 number is 6e-4.
    scales.fill_(1e-3 if scales.is_floating_point() else 0x11)
    return Quantized(values, scales, form)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Makes a tensor of normally distributed values. One block of values is repeated, because to
    draw all of them would take long."""
    count = torch.Size(shape).numel()
    block = torch.randn(min(count, 2**20), dtype=torch.float32, device=device).to(dtype)
    return block.repeat(-(-count // block.numel()))[:count].view(shape)


def on_large_pages(x: Tensor) -> Tensor:
    """Copies a tensor to memory in large pages, because the weights of a model are in such memory
    too."""
    return memory.empty(x.shape, x.dtype).copy_(x)


def step_bytes(model: Transformer) -> int:
    """Returns how many bytes of weights a decode step reads, without adapters. A step reads one row
    of the embeddings, so they count only if they are also the output matrix."""
    unread = 0 if model.embeddings is model.output else model.embeddings.nbytes
    return model.nbytes - model.adapters.nbytes - unread


def formats_of(model: Transformer) -> str:
    """Returns the names of the formats of the matrices that a decode step reads, separated by
    commas. The format with the most bytes comes first."""
    nbytes: dict[str, int] = {}
    matrices = [model.output]
    for layer in model.layers:
        for weights in (layer.qkv, [layer.wo], layer.gate_up, [layer.w2]):
            matrices += weights.parts if hasattr(weights, "parts") else weights
    for matrix in matrices:
        name = matrix.format if isinstance(matrix, Quantized) else _NAMES_OF_DTYPES[matrix.dtype]
        nbytes[name] = nbytes.get(name, 0) + matrix.nbytes
    return ", ".join(sorted(nbytes, key=nbytes.__getitem__, reverse=True))


def flops(config: MistralConfig, batch: int, tokens: int, history: int = 0) -> int:
    """Returns the FLOPs for `tokens` new tokens in each of `batch` sequences, if only the logits of
    the last token are needed.

    Each token is multiplied with the matrices of the layers. Only the last token is multiplied with
    the output matrix, and with the matrices of the last layer that follow attention. In attention,
    each token sees the `history` tokens before the new ones, and the new tokens up to itself. This
    is right as long as the window is not full.
    """
    sizes = {
        name: shape[0] * shape[1]
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name != "tok_embeddings.weight"
    }
    last_layer = f"layers.{config.n_layers - 1}."
    after_attention = {f"{last_layer}attention.wo.weight", "output.weight"} | {
        f"{last_layer}feed_forward.{w}.weight" for w in ("w1", "w2", "w3")
    }
    products = sum(
        size * (1 if name in after_attention else tokens) for name, size in sizes.items()
    )
    seen = tokens * history + tokens * (tokens + 1) // 2  # pairs of a query and a key
    attention = config.n_layers * 2 * seen * config.n_heads * config.head_dim
    return 2 * batch * (products + attention)
