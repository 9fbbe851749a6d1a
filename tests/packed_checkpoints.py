"""Packed checkpoints, written by the definitions of their layouts.

Words are sums of integers times powers of two, so that the code has nothing in common with what it
tests.
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

# A decoded weight [N, K] in fp32, and the tensors of its layer.
Layer = tuple[Tensor, dict[str, Tensor]]


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
    """Whose weights are of a likely size. All zero points from 0 to 15 occur."""
    random = np.random.default_rng(seed)
    count = columns // group
    middle = 2 ** (bits - 1)
    groups = np.arange(columns) // group
    zeros = random.integers(0, 2 * middle, (rows, count))
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
    for i, place in enumerate(order):
        packed += values[..., place].astype(np.uint32) * np.uint32(2 ** (bits * i))
    return torch.from_numpy(packed.view(np.int32))


def along_rows(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, C] to [R, C bits / 32] words of neighbours in a row."""
    return words(values.reshape(len(values), -1, 32 // bits), bits, order)


def gptq_tensors(matrix: Integers, bits: int = 4, first_version: bool = True) -> dict[str, Tensor]:
    # GPTQModel subtracts 1 from each zero point of a word in one subtraction, as `words` does: the
    # 0 of one zero point becomes 15, and borrows 1 from the next.
    stored_zeros = matrix.zeros - (1 if first_version else 0)
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


def compressed_tensors(matrix: Integers) -> dict[str, Tensor]:
    return {
        "weight_packed": along_rows(matrix.values, 4),
        "weight_scale": matrix.scales,
        "weight_zero_point": along_rows(matrix.zeros.T, 4).T.contiguous(),
        "weight_shape": torch.tensor(matrix.values.shape),
    }


def packed_layer(
    pack: Callable[[Integers], dict[str, Tensor]], **integers
) -> Callable[[tuple[int, int], int], Layer]:
    """Makes layers of `random_integers` with these arguments."""

    def make(shape: tuple[int, int], seed: int) -> Layer:
        matrix = random_integers(*shape, seed=seed, **integers)
        return matrix.weight, pack(matrix)

    return make


def nf4_layer(shape: tuple[int, int], seed: int) -> Layer:
    """Doubly quantised, with a table of its own."""
    random = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1]
    indices = torch.randint(16, (count,), generator=random)
    table = torch.linspace(-1, 1, 16) ** 3
    absmax = torch.randint(256, (count // 64,), generator=random)
    nested_table = torch.linspace(-1, 1, 256)
    nested = torch.rand(-(-len(absmax) // 256), generator=random) / 100
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(shape)}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
    data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {
        "weight": (indices[::2] * 16 + indices[1::2]).to(torch.uint8).unsqueeze(1),
        "weight.absmax": absmax.to(torch.uint8),
        "weight.quant_map": table,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": nested_table,
        "weight.quant_state.bitsandbytes__nf4": data,
    }
    magnitudes = [
        nested_table[byte] * nested[i // 256] + 0.02 for i, byte in enumerate(absmax.tolist())
    ]
    weight = table[indices].view(-1, 64) * torch.stack(magnitudes).unsqueeze(1)
    return weight.view(shape), tensors


def write_packed(
    folder: Path,
    settings: dict[str, object],
    make: Callable[[tuple[int, int], int], Layer],
    dtype: torch.dtype = torch.float16,
    vocab_size: int = 131,
) -> transformers.MistralForCausalLM:
    """Writes a checkpoint whose layers are packed; returns the model with its decoded weights.

    Args:
        settings: quantization_config.
        make: makes a layer of a shape from a seed.
        dtype: of what is not packed.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": vocab_size}
    model = write_checkpoint(folder, **sizes)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    stored = {name: tensor for name, tensor in state.items() if not name.endswith("proj.weight")}
    for seed, name in enumerate(sorted(state.keys() - stored.keys())):
        state[name], tensors = make(tuple(state[name].shape), seed)
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
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
