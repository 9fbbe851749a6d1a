"""Matrices in bitsandbytes' nf4 format, which are decoded as they are read.

Values are stored in blocks of neighbours, usually 64. A value is one of 16 numbers of a table,
multiplied by the largest magnitude of its block. `weight` has two values in a byte, the first in
the high bits, row after row. `weight.absmax` has the magnitudes, and `weight.quant_map` the table.

With double quantisation `weight.absmax` consists of bytes. Each is the index of a number in the
table `weight.nested_quant_map`. This number is multiplied by an element of `weight.nested_absmax`.
Neighbouring bytes, usually 256, share such an element. An offset is added. The result is the
magnitude. `weight.quant_state.bitsandbytes__nf4` holds the sizes of blocks and the offset as JSON.

Source: bitsandbytes' functional.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistral_ext.weights.packed_settings import Packing
from mistral_ext.weights.packed_tensors import ModuleTensors
from mistral_ext.weights.safetensors_file import StoredTensor

_STATE = "weight.quant_state.bitsandbytes__nf4"
_FLOAT = (torch.float32,)
_STATE_BYTES = 2**16  # the most bytes that the JSON may have; usually it has some hundred
_AT_ONCE = 2**20  # the number of values decoded at a time, so few that they stay in the caches


@dataclass(frozen=True)
class Nf4Matrix:
    """A matrix [N, K] in blocks of neighbours. A block may continue in the next row.

    Attributes:
        shape: the shape [N, K] of the matrix.
        block: the number of values in a block.
        packed: the values, two in a byte: N K / 2 bytes, of any dtype.
        absmax: the largest magnitude of each block, [blocks] fp32. If `nested` is given: [blocks]
            uint8.
        table: [16] fp32, the numbers that a value may be before it is multiplied.
        nested: how `absmax` is quantised: its table [256], its own largest magnitudes, and the
            number of bytes of `absmax` that share such a magnitude. None: `absmax` is not
            quantised.
        offset: a number that is added to the decoded `absmax`. It is not used if `nested` is None.
    """

    shape: tuple[int, int]
    block: int
    packed: StoredTensor
    absmax: StoredTensor
    table: StoredTensor
    nested: tuple[StoredTensor, StoredTensor, int] | None
    offset: float

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Reads the matrix and decodes it. Values are computed in fp32 and rounded to `dtype`.

        Raises:
            ValueError: the magnitudes or the table are not finite.
        """
        packed = self.packed.read().view(-1).view(torch.uint8)
        table, magnitudes = self.table.read(), self._magnitudes()
        for stored, numbers in ((self.table, table), (self.absmax, magnitudes)):
            if not numbers.isfinite().all():
                raise ModuleTensors.error(stored, "stands for numbers that are not finite")
        out = torch.empty(len(magnitudes), self.block, dtype=dtype, device="cpu")
        step = max(1, _AT_ONCE // self.block)
        for begin in range(0, len(out), step):
            some = slice(begin, begin + step)
            data = packed[begin * self.block // 2 : (begin + step) * self.block // 2]
            indices = torch.stack([data >> 4, data & 15], dim=1).view(-1, self.block)
            out[some] = table[indices.int()] * magnitudes[some].unsqueeze(1)
        return out.view(self.shape)

    def _magnitudes(self) -> Tensor:
        absmax = self.absmax.read()
        if self.nested is None:
            return absmax
        table, scales, block = self.nested
        of_blocks = scales.read().repeat_interleave(block)[: len(absmax)]
        return table.read()[absmax.int()] * of_blocks + self.offset


def nf4(module: ModuleTensors, packing: Packing) -> Nf4Matrix:
    """Takes the tensors of a layer. They say themselves how the layer is packed, so `packing` is
    not used.

    Raises:
        ValueError: a tensor is missing, or does not fit the others. The message names the tensor.
    """
    stored_state = module.left.pop(_STATE, None)
    if stored_state is None:
        raise ValueError(f"tensor '{module.name}.{_STATE}' is missing, expected nf4")
    state = _state(module, stored_state)
    count = module.shape[0] * module.shape[1]
    block = state["blocksize"]
    if block % 2 or count % block:
        raise module.error(
            stored_state, f"has blocksize {block}, expected an even divisor of {count}"
        )
    blocks = count // block
    nested = None
    if "nested_blocksize" in state:
        size = state["nested_blocksize"]
        nested = (
            module.take("weight.nested_quant_map", (256,), _FLOAT),
            module.take("weight.nested_absmax", (-(-blocks // size),), _FLOAT),
            size,
        )
    absmax = module.take("weight.absmax", (blocks,), (torch.uint8,) if nested else _FLOAT)
    table = module.take("weight.quant_map", (16,), _FLOAT)
    packed = module.left.pop("weight", None)
    if packed is None:
        raise ValueError(f"tensor '{module.name}.weight' is missing, expected nf4")
    if not isinstance(packed.dtype, torch.dtype):
        raise module.error(packed, f"has dtype {packed.dtype}, expected uint8")
    if 2 * packed.nbytes != count:
        raise module.error(packed, f"has {packed.nbytes} bytes, expected {count // 2}")
    offset = state.get("nested_offset", 0.0)
    return Nf4Matrix(module.shape, block, packed, absmax, table, nested, offset)


def _state(module: ModuleTensors, stored: StoredTensor) -> dict[str, Any]:
    """Reads the JSON that describes how a layer is quantised: its shape, type, block sizes and
    offset. Raises ValueError if the JSON does not describe nf4 with the layer's shape."""
    if stored.dtype != torch.uint8 or stored.nbytes > _STATE_BYTES:
        raise module.error(
            stored,
            f"has {stored.nbytes} bytes of dtype {stored.dtype}, expected uint8 and at most "
            f"{_STATE_BYTES}",
        )
    try:
        state = json.loads(bytes(stored.read().tolist()))
        sound = (
            tuple(state["shape"]) == module.shape
            and state["quant_type"] == "nf4"
            and all(
                isinstance(size, int) and size > 0
                for size in (state["blocksize"], state.get("nested_blocksize", 1))
            )
            and isinstance(state.get("nested_offset", 0), (int, float))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise module.error(stored, f"is no description of nf4 with shape {list(module.shape)}")
    assert isinstance(state, dict)
    return state
