"""Reads the tensors in which GPTQ, AWQ and compressed-tensors store a matrix [N, K].

The matrix has a row for each of N outputs, and a column for each of K inputs. A row has G groups of
values. The values of a group share a scale and a zero point. The sizes below are those of 4 bits,
where an int32 word has 8 values. With 8 bits a word has 4.

GPTQ has `qweight` int32 [K/8, N], where a word has 8 neighbouring values of a row of the matrix,
`qzeros` int32 [G, N/8], `scales` [G, N], and `g_idx` int32 [K], the group of each input. The inputs
of a group may be anywhere ("act-order"). The first version of GPTQ stores each zero point minus 1.

AWQ has, in the layout of its GEMM kernel, `qweight` int32 [K, N/8], `qzeros` int32 [G, N/8] and
`scales` [G, N]. A word has the values of 8 neighbouring outputs, in the order `_AWQ`.

compressed-tensors has, in its format "pack-quantized", `weight_packed` int32 [N, K/8],
`weight_scale` [N, G], `weight_zero_point` int32 [N/8, G], `weight_shape` [2], and `weight_g_idx`,
which is like `g_idx` of GPTQ.

Sources: the packers of GPTQModel, AutoAWQ and compressed-tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext.weights.packed_groups import (
    GroupedMatrix,
    sorted_order,
    swap_nibbles,
    unpack_along,
)
from mistral_ext.weights.packed_settings import WHOLE_ROW, Packing
from mistral_ext.weights.packed_tensors import ModuleTensors
from mistral_ext.weights.safetensors_file import StoredTensor

_WORD = (torch.int32,)
_SCALES = (torch.float16, torch.bfloat16)
_PER_WORD = 8  # the number of 4-bit values in a word
# Value i of a word of AWQ belongs to output _AWQ[i] of the word's 8 outputs.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(module: ModuleTensors, packing: Packing) -> GroupedMatrix:
    rows, size = module.shape
    group = _group(module, packing)
    per_word = 32 // packing.bits
    module.expect_multiples(per_word)
    words = module.take("qweight", (size // per_word, rows), _WORD)
    scales = module.take("scales", (size // group, rows), _SCALES)
    zeros = module.take("qzeros", (size // group, rows // per_word), _WORD)
    module.drop_zeros("bias")

    def block(some: slice) -> Tensor:
        return _transposed(words.read()[:, some])

    def zero() -> Tensor:
        # 1 is added to each zero point of a word in one addition, with carries from one to the
        # next, because the writers subtract 1 in the same way.
        stored = zeros.read() + (0x11111111 if packing.zero_minus_one else 0)
        return unpack_along(stored, 1).T

    # If values are symmetric, all zero points are `middle`. The first version of GPTQ stores them
    # minus 1. Some files name the wrong version, so both numbers are accepted.
    middle = 2 ** (packing.bits - 1)
    symmetric = packing.symmetric and any(
        torch.equal(zeros.read(), _filled(zeros.shape, value, packing.bits))
        for value in (middle - 1, middle)
    )
    if packing.bits == 8 and not symmetric:
        raise module.error(zeros, f"holds zero points, expected {middle - 1} or {middle} in 8 bits")
    order = _order(module, "g_idx", packing)
    return GroupedMatrix(
        module.name,
        module.shape,
        packing.bits,
        group,
        block,
        lambda: scales.read().T,
        _dtype(scales),
        None if symmetric else zero,
        order,
    )


def awq(module: ModuleTensors, packing: Packing) -> GroupedMatrix:
    rows, size = module.shape
    group = _group(module, packing)
    module.expect_multiples(_PER_WORD)
    words = module.take("qweight", (size, rows // _PER_WORD), _WORD)
    zeros = module.take("qzeros", (size // group, rows // _PER_WORD), _WORD)
    scales = module.take("scales", (size // group, rows), _SCALES)
    module.drop_zeros("bias")

    def block(some: slice) -> Tensor:
        part = words.read()[:, some.start // _PER_WORD : some.stop // _PER_WORD]
        inputs = _transposed(_transposed(part).view(-1, _PER_WORD)).view(_PER_WORD, -1, size // 8)
        # `inputs` is [8, rows / 8, K / 8] words. Before the swap, the word at [i, r, k] holds the
        # values of input 8 k + i for 8 outputs. After the swap, it holds the values of inputs 8 k
        # to 8 k + 7 for one of these outputs, the one at place i.
        swap_nibbles(inputs)
        out = part.new_empty(some.stop - some.start, size // _PER_WORD)
        for place, output in enumerate(_AWQ):
            out[output::_PER_WORD] = inputs[place]
        return out

    def zero() -> Tensor:
        eights: Tensor = unpack_along(zeros.read(), 1).unflatten(1, (-1, _PER_WORD))
        places = torch.tensor([_AWQ.index(output) for output in range(_PER_WORD)], device="cpu")
        return eights[..., places].flatten(1).T

    return GroupedMatrix(
        module.name,
        module.shape,
        4,
        group,
        block,
        lambda: scales.read().T,
        _dtype(scales),
        zero,
    )


def compressed_tensors(module: ModuleTensors, packing: Packing) -> GroupedMatrix:
    rows, size = module.shape
    group = _group(module, packing)
    per_word = 32 // packing.bits
    words = module.take("weight_packed", (rows, size // per_word), _WORD)
    scales = module.take("weight_scale", (rows, size // group), _SCALES)
    module.expect_shape("weight_shape")
    zeros: StoredTensor | None = None
    if not packing.symmetric:
        module.expect_multiples(_PER_WORD)
        zeros = module.take("weight_zero_point", (rows // _PER_WORD, size // group), _WORD)
    return GroupedMatrix(
        module.name,
        module.shape,
        packing.bits,
        group,
        lambda some: words.read()[some],
        scales.read,
        _dtype(scales),
        None if zeros is None else lambda: unpack_along(zeros.read(), 0),
        _order(module, "weight_g_idx", packing),
    )


def _transposed(matrix: Tensor) -> Tensor:
    # Torch transposes contiguous matrices several times as fast as other matrices.
    return matrix.contiguous().T.contiguous()


def _group(module: ModuleTensors, packing: Packing) -> int:
    size = module.shape[1]
    group = size if packing.group == WHOLE_ROW else packing.group
    if size % group:
        raise ValueError(
            f"{module.name!r} has {size} inputs, expected a multiple of the group size {group}"
        )
    return group


def _dtype(stored: StoredTensor) -> torch.dtype:
    assert isinstance(stored.dtype, torch.dtype)  # `take` has checked it
    return stored.dtype


def _order(module: ModuleTensors, suffix: str, packing: Packing) -> Tensor | None:
    group = _group(module, packing)
    g_idx = module.take_optional(suffix, (module.shape[1],), (torch.int32, torch.int64))
    if g_idx is None:
        if packing.act_order and group < module.shape[1]:
            raise ValueError(
                f"tensor '{module.name}.{suffix}' is missing, expected it with act-order"
            )
        return None
    try:
        return sorted_order(g_idx.read(), group)
    except ValueError as error:
        raise module.error(g_idx, str(error)) from error


def _filled(shape: tuple[int, ...], value: int, bits: int) -> Tensor:
    """Makes int32 words in which every field of `bits` bits holds `value`."""
    word = sum(value << shift for shift in range(0, 32, bits))
    return torch.full(shape, word - (word >> 31 << 32), dtype=torch.int32, device="cpu")
