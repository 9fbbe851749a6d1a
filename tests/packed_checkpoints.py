"""Packed checkpoints, written by the definitions of their layouts.

Bits are put in place one value after another in Python's integers, so that the code has nothing in
common with what it tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Integers:
    """A matrix: integers [N, K], the group [K] of each column, zero points and scales [N, G]."""

    values: np.ndarray
    groups: np.ndarray
    zeros: np.ndarray
    scales: Tensor

    @property
    def weight(self) -> Tensor:
        """[N, K] fp32."""
        offsets = self.values - self.zeros[:, self.groups]
        return torch.from_numpy(offsets).float() * self.scales.float()[:, self.groups]


def random_integers(
    rows: int,
    columns: int,
    group: int,
    seed: int,
    bits: int = 4,
    symmetric: bool = False,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    """Whose weights are of a likely size. All zero points from 1 to 15 occur."""
    random = np.random.default_rng(seed)
    count = columns // group
    middle = 2 ** (bits - 1)
    groups = np.arange(columns) // group
    zeros = random.integers(1, 2 * middle, (rows, count))
    scales = torch.from_numpy(random.uniform(0.5, 1.5, (rows, count)) / (8 * middle))
    return Integers(
        random.integers(0, 2 * middle, (rows, columns)),
        # The same for layers of the same inputs, as a quantiser finds it.
        np.random.default_rng(columns).permutation(groups) if act_order else groups,
        np.full_like(zeros, middle) if symmetric else zeros,
        scales.to(dtype),
    )


def words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[..., 32 / bits] integers to [...] words; value order[i] is the i-th from the lowest bits."""
    order = order or tuple(range(32 // bits))
    packed = np.zeros(values.shape[:-1], dtype=np.uint32)
    for index in np.ndindex(packed.shape):
        word = 0
        for i, place in enumerate(order):
            word += int(values[index][place]) << (bits * i)
        packed[index] = word
    return torch.from_numpy(packed.view(np.int32))


def along_rows(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] to [R, C bits / 32] words of neighbours in a row."""
    return words(values.reshape(len(values), -1, 32 // bits), bits, order)


def gptq_tensors(matrix: Integers, bits: int = 4, first_version: bool = True) -> dict[str, Tensor]:
    stored_zeros = matrix.zeros - first_version
    return {
        "qweight": along_rows(matrix.values, bits).T.contiguous(),
        "qzeros": along_rows(stored_zeros.T, bits),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": torch.from_numpy(matrix.groups.astype(np.int32)),
    }


def awq_tensors(matrix: Integers) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": along_rows(matrix.values.T, 4, order),
        "qzeros": along_rows(matrix.zeros.T, 4, order),
        "scales": matrix.scales.T.contiguous(),
    }


def write_packed(
    folder: Path,
    settings: dict[str, object],
    pack: Callable[[Integers], dict[str, Tensor]],
    dtype: torch.dtype = torch.float16,
    **integers,
) -> transformers.MistralForCausalLM:
    """Writes a checkpoint whose layers are packed; returns the model with its decoded weights.

    Args:
        settings: quantization_config.
        pack: gives the tensors of a layer.
        integers: arguments of `random_integers`.
    """
    model = write_checkpoint(folder, hidden_size=256, intermediate_size=512, head_dim=64)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for seed, name in enumerate([name for name in state if name.endswith("proj.weight")]):
        matrix = random_integers(*state[name].shape, seed=seed, dtype=dtype, **integers)
        state[name] = matrix.weight
        layer = name.removesuffix(".weight")
        for suffix, tensor in pack(matrix).items():
            state[f"{layer}.{suffix}"] = tensor
    model.load_state_dict({name: state[name].float() for name in model.state_dict()}, strict=True)
    stored = {name: t for name, t in state.items() if not name.endswith("proj.weight")}
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config=settings, dtype=str(dtype).removeprefix("torch."))
    return model


def change_config(folder: Path, **changes: object) -> None:
    """A value None removes a key."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
