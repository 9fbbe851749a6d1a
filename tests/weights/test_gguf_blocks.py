"""mistral_ext.weights.gguf_blocks: every type decodes exactly as by the `gguf` package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import random_blocks

from mistral_ext.weights.gguf_blocks import BLOCK_TYPES, OTHER_TYPES, decode

TYPES = pytest.mark.parametrize("number", BLOCK_TYPES, ids=lambda n: BLOCK_TYPES[n].name)


@TYPES
def test_names_and_sizes(number):
    block_type, theirs = BLOCK_TYPES[number], gguf.GGMLQuantizationType(number)
    assert block_type.name == theirs.name
    assert (block_type.values, block_type.nbytes) == gguf.GGML_QUANT_SIZES[theirs]


@TYPES
@pytest.mark.parametrize("n_rows", [1, 7])
def test_decodes_exactly(number, n_rows):
    block_type = BLOCK_TYPES[number]
    columns = 3 * max(block_type.values, 32)
    data = random_blocks(block_type, n_rows, columns, seed=number)
    expected = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(number))
    np.testing.assert_array_equal(decode(data, block_type).numpy(), expected)


@TYPES
def test_rounds_to_the_dtype_that_is_wanted(number):
    block_type = BLOCK_TYPES[number]
    data = random_blocks(block_type, 5, 512, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        expected = decode(data, block_type).to(dtype)
        assert torch.equal(decode(data, block_type, dtype), expected)


def test_rows_that_are_decoded_apart_are_put_together(monkeypatch):
    block_type = BLOCK_TYPES[12]
    data = random_blocks(block_type, 11, 512, seed=2)
    whole = decode(data, block_type)
    monkeypatch.setattr("mistral_ext.weights.gguf_blocks._AT_ONCE", 1024)  # two rows
    assert torch.equal(decode(data, block_type), whole)


def test_other_types_have_the_names_that_ggml_gives_them():
    for number, name in OTHER_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    # Each type that a file can have is read, or refused by its name.
    assert {t.value for t in gguf.GGMLQuantizationType} - BLOCK_TYPES.keys() <= OTHER_TYPES.keys()
