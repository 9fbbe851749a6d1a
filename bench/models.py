"""A model of Mistral 7B's shape with random weights, for the benchmarks."""

from __future__ import annotations

import mmap

import torch
from shapes import GPU, random
from torch import Tensor

from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import JoinedWeight, Quantized, Weight
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.device import move_weights
from mistral_ext.weights.quantize import Quantization


def mistral_7b(layers: int) -> MistralConfig:
    """Mistral 7B v0.1 with fewer layers."""
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


def random_weight(rows: int, size: int, form: str | None, dtype: torch.dtype) -> Weight:
    """On the GPU, in a format or, with None, plain. The values of a quantised weight do not matter
    for the time that it takes, so they are random bits."""
    if form is None:
        return random(rows, size, dtype=dtype, device=GPU) / 64
    parts = Quantization(form).parts("layers.0.weight", (rows, size))
    integers = torch.iinfo(parts.values.dtype)
    values = torch.empty_like(parts.values, device=GPU).random_(integers.min, integers.max)
    return Quantized(values, torch.full_like(parts.scales, 1e-3, device=GPU), form)


def random_weights_on_gpu(
    config: MistralConfig, name: str = "bf16"
) -> dict[str, Weight | JoinedWeight]:
    """In "bf16", "int8" or "int4", where and as loading puts them."""
    quantization = None if name == "bf16" else Quantization.from_name(name)
    weights: dict[str, Weight | JoinedWeight] = {}
    for tensor, shape in tensor_shapes(config).items():
        if len(shape) == 2:
            form = quantization.format_of(tensor) if quantization else None
            weights[tensor] = random_weight(*shape, form, torch.bfloat16)
        else:
            weights[tensor] = torch.ones(shape, dtype=torch.bfloat16, device=GPU)
    move_weights(weights, torch.device(GPU))
    return weights


_LARGE_PAGE = 2**21


def on_large_pages(x: Tensor) -> Tensor:
    """A copy in memory of 2 MB pages, where the system has them.

    Models are mapped from files, whose pages Linux joins to large ones; memory that a process asks
    for has them on request only. With small ones a step is 5 to 8 % slower here.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, (x.nbytes // _LARGE_PAGE + 2) * _LARGE_PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)


def random_weights(config: MistralConfig) -> dict[str, Tensor]:
    """In bf16. Tensors of one shape are equal."""
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
        chosen = quantization.format_of(tensor)
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
    """The same weights under Mistral's names, those that are joined as views of the whole."""
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


def step_bytes(weights: dict[str, Tensor | Quantized]) -> int:
    """Bytes of weights that a decode step reads: of the embeddings one row, and all of the rest."""
    return sum(w.nbytes for name, w in weights.items() if name != "tok_embeddings.weight")


def flops(config: MistralConfig, batch: int, tokens: int, history: int = 0) -> int:
    """What `tokens` new ones in each of `batch` sequences need, where only the last one's logits
    are wanted: the matrices of the layers for each token, but in the last layer those after
    attention, and the output matrix, only for the last; and the products of attention with
    `history` and each other, as long as no window is full."""
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
    seen = tokens * history + tokens * (tokens + 1) // 2  # pairs of query and key
    attention = config.n_layers * 2 * seen * config.n_heads * config.head_dim
    return 2 * batch * (products + attention)
