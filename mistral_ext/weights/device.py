"""Finds the device of a model, checks that the model can run there, and moves weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.model.config import (
    JOINED_GATE_UP,
    JOINED_QKV,
    LEAST_CACHE_TOKENS,
    MistralConfig,
)
from mistral_ext.ops import JoinedWeight, Weight

# Our CUDA kernels are not compiled for older GPUs. python/launch_failure.cpp has the same limit.
_LEAST_CAPABILITY = (8, 0)

# Weights that are multiplied in one pass, by the name of the weight into which they are joined.
TOGETHER = {
    JOINED_QKV: ("attention.wq", "attention.wk", "attention.wv"),
    JOINED_GATE_UP: ("feed_forward.w1", "feed_forward.w3"),
}


@dataclass(frozen=True)
class Gpu:
    """The properties of a CUDA device that decide whether a model can run there."""

    capability: tuple[int, int]
    free_bytes: int


def find_gpu(device: torch.device) -> Gpu:
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Gpu(torch.cuda.get_device_capability(device), free)


def find_device(device: torch.device | str | int | None) -> torch.device:
    """Finds the device that a caller names. None is the CPU, and a number is a CUDA device.

    Raises:
        ValueError: there is no such device, or this build has no kernels for it.
    """
    if device is None:
        return torch.device("cpu")
    found: torch.device | None
    try:
        if isinstance(device, int) and not isinstance(device, bool):
            found = torch.device("cuda", device)
        else:
            found = torch.device(device)
    except (RuntimeError, TypeError):  # torch does not know the device
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        shown = str(device) if isinstance(device, torch.device) else device
        raise ValueError(
            f"device is {shown!r}, expected 'cpu' or 'cuda', or the number of a CUDA device"
        )
    if found.type == "cpu":
        return found
    if not ops.head_dims("cuda"):
        raise ValueError(
            f"device is {str(found)!r}, but this build of mistral_ext has no CUDA kernels: "
            "install it again with nvcc on PATH and MISTRAL_EXT_CUDA=on"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device is {str(found)!r}, but torch finds no CUDA device")
    if (found.index or 0) >= count:
        there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ValueError(f"device is {str(found)!r}, but torch finds {there}")
    return found


def is_same_device(first: torch.device, second: torch.device) -> bool:
    """Whether two names mean the same device. "cuda" without a number is the current CUDA
    device."""
    return first.type == second.type and _index(first) == _index(second)


def _index(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def expect_runnable(
    config: MistralConfig,
    dtype: torch.dtype,
    weight_bytes: int,
    device: torch.device,
) -> None:
    """Raises an error if a model cannot run on a device. It is called before the weights are read.

    Args:
        config: the configuration of the model.
        dtype: the dtype of the weights that are not quantised, and of keys and values.
        weight_bytes: the bytes that the weights will take.
        device: the device.

    Raises:
        ValueError: the model cannot run there. The message names the reason.
    """
    head_dims = ops.head_dims(device.type)
    if config.head_dim not in head_dims:
        raise ValueError(
            f"head_dim is {config.head_dim}, expected one of {', '.join(map(str, head_dims))}: "
            f"there are no kernels for others on a {device.type} device"
        )
    if device.type != "cuda":
        return
    if dtype == torch.float32:
        raise ValueError(
            f"dtype is {dtype}, expected torch.bfloat16 or torch.float16 on a CUDA device: pass "
            "dtype to convert the weights"
        )
    gpu = find_gpu(device)
    if gpu.capability < _LEAST_CAPABILITY:
        raise ValueError(
            f"{device} has compute capability {_dotted(gpu.capability)}, expected "
            f"{_dotted(_LEAST_CAPABILITY)} or more"
        )
    tokens = min(config.sliding_window or config.max_positions, LEAST_CACHE_TOKENS)
    cache_bytes = tokens * config.cache_bytes(dtype)
    if weight_bytes + cache_bytes > gpu.free_bytes:
        raise ValueError(
            f"{device} has {gpu.free_bytes / 1e9:.2f} GB of memory free, expected "
            f"{weight_bytes / 1e9:.2f} GB for the weights and {cache_bytes / 1e9:.2f} GB for "
            f"the keys and values of {tokens} tokens; weights in 8 or 4 bits (quantize) take less"
        )


def move_weights(weights: dict[str, Weight | JoinedWeight], device: torch.device) -> None:
    """Replaces the weights of a model by copies on a device.

    Weights are copied one at a time. An original is let go when it is copied, so that its memory
    can be freed. A weight with two names (tied embeddings) is copied once. Weights that are not
    quantised and are multiplied in one pass are joined under a new name (`JOINED_QKV`,
    `JOINED_GATE_UP`). With many tokens, torch then multiplies them in one product.
    """
    for i in range(sum(name.endswith(".attention_norm.weight") for name in weights)):
        _join(weights, i, device)
    first_name = {id(weight): name for name, weight in reversed(weights.items())}
    same = {name: first_name[id(weight)] for name, weight in weights.items()}
    for name in list(weights):
        weight = weights[name]
        if isinstance(weight, JoinedWeight):
            continue
        weights[name] = weight.to(device) if same[name] == name else weights[same[name]]


def _join(weights: dict[str, Weight | JoinedWeight], layer: int, device: torch.device) -> None:
    """Joins the weights of a layer that are multiplied in one pass, if they are not quantised. The
    joined copies are on the device and replace the weights."""
    for joined, parts in TOGETHER.items():
        names = [f"layers.{layer}.{part}.weight" for part in parts]
        plain = [part for part in map(weights.get, names) if isinstance(part, Tensor)]
        if len(plain) == len(names):
            weights[joined.format(layer)] = JoinedWeight.join(plain, device)
            for name in names:
                del weights[name]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
