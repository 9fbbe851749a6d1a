"""mistral_ext.weights.gguf_planes: every type has the numbers that the `gguf` package decodes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import random_blocks

from mistral_ext.ops import Quantized
from mistral_ext.weights.gguf_blocks import BLOCK_TYPES
from mistral_ext.weights.gguf_planes import PLANES, scales_of, values_of

NUMBERS = [number for number, kind in BLOCK_TYPES.items() if kind.name in PLANES]
TYPES = pytest.mark.parametrize("number", NUMBERS, ids=lambda n: BLOCK_TYPES[n].name)


def made_of(blocks, block_type):
    parts = values_of(blocks, block_type), scales_of(blocks, block_type)
    return Quantized(*parts, PLANES[block_type.name].format)


@TYPES
@pytest.mark.parametrize("n_rows", [1, 7])
def test_no_number_changes(number, n_rows):
    block_type = BLOCK_TYPES[number]
    data = random_blocks(block_type, n_rows, 768, seed=number)
    weight = made_of(data, block_type)
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(weight.dequantize().numpy(), expected)
    empty = Quantized.empty((n_rows, 768), weight.format)
    for part, like in zip(weight[:2], empty[:2], strict=True):
        assert (part.shape, part.dtype) == (like.shape, like.dtype)
        assert part.is_contiguous()


@TYPES
def test_rows_that_are_changed_apart_are_put_together(number, monkeypatch):
    block_type = BLOCK_TYPES[number]
    data = random_blocks(block_type, 11, 512, seed=2)
    whole = made_of(data, block_type)
    monkeypatch.setattr("mistral_ext.weights.gguf_blocks._AT_ONCE", 1024)  # two rows
    for part, expected in zip(made_of(data, block_type)[:2], whole[:2], strict=True):
        assert torch.equal(part, expected)


@TYPES
def test_some_rows(number):
    """More values than are dequantised at a time, and the same row twice."""
    block_type = BLOCK_TYPES[number]
    weight = made_of(random_blocks(block_type, 9, 4096, seed=3), block_type)
    indices = torch.tensor([8, 0, 3, 3, 7, 1])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.rows(indices, dtype), weight.dequantize(dtype)[indices])
    assert weight.rows(indices[:0], torch.bfloat16).shape == (0, 4096)
