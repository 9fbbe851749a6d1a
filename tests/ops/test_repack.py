"""mistral_ext.ops.repack: every type keeps the numbers that the `gguf` package decodes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import random_blocks
from torch import Tensor

from mistral_ext.ops import Quantized
from mistral_ext.ops.repack import BLOCK_FORMATS, repack
from mistral_ext.ops.weight import FORMATS
from mistral_ext.weights.gguf_blocks import BLOCK_TYPES

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.name in BLOCK_FORMATS}
EACH_TYPE = pytest.mark.parametrize("name", TYPES)


def blocks_of(name: str, n_rows: int, columns: int, seed: int = 1) -> Tensor:
    return random_blocks(TYPES[name], n_rows, columns, seed)


def repacked(blocks: Tensor, name: str) -> Quantized:
    columns = blocks.shape[1] // TYPES[name].nbytes * TYPES[name].values
    out = Quantized.empty((len(blocks), columns), BLOCK_FORMATS[name])
    for part in out[:2]:
        part.view(torch.uint8).fill_(0xA5)  # what is left of it is seen
    repack(blocks, name, out.values, out.scales)
    return out


def assert_same(weight: Quantized, expected: Quantized) -> None:
    for part, other in zip(weight[:2], expected[:2], strict=True):
        assert torch.equal(part.view(torch.uint8), other.view(torch.uint8))


def test_types_are_those_of_files():
    assert TYPES.keys() == BLOCK_FORMATS.keys()
    assert set(BLOCK_FORMATS.values()) <= FORMATS.keys()


@EACH_TYPE
@pytest.mark.parametrize("n_rows", [1, 7])
def test_no_number_changes(name, n_rows):
    blocks = blocks_of(name, n_rows, 768)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(repacked(blocks, name).dequantize().numpy(), expected)


@EACH_TYPE
def test_bytes_that_pad_scales_are_zero(name):
    weight = repacked(blocks_of(name, 3, 512), name)
    if weight.format == "q6_k":
        assert not weight.scales.unflatten(1, (-1, 20))[..., 18:].any()


@EACH_TYPE
def test_threads_share_the_rows(name):
    """Several ranges of rows for each thread, and the last of them short."""
    blocks = blocks_of(name, 301, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = repacked(blocks, name)
        torch.set_num_threads(3)
        assert_same(repacked(blocks, name), alone)
    finally:
        torch.set_num_threads(before)
    rows = [repacked(blocks[i : i + 1], name) for i in (0, 97, 300)]
    for i, row in zip((0, 97, 300), rows, strict=True):
        assert_same(Quantized(alone.values[i : i + 1], alone.scales[i : i + 1], alone.format), row)


@EACH_TYPE
@pytest.mark.parametrize("skipped", [1, 3, 8])
def test_blocks_lie_at_any_address_and_rows_apart(name, skipped):
    blocks = blocks_of(name, 5, 512)
    wide = torch.empty(5, blocks.shape[1] + skipped + 2, dtype=torch.uint8)
    view = wide[:, skipped:-2]
    view.copy_(blocks)
    assert_same(repacked(view, name), repacked(blocks, name))


@EACH_TYPE
def test_a_part_alone(name):
    blocks = blocks_of(name, 4, 256)
    whole, values, scales = (repacked(blocks, name) for _ in range(3))
    values.values.zero_()
    scales.scales.zero_()
    repack(blocks, name, values=values.values)
    repack(blocks, name, scales=scales.scales)
    assert_same(values, whole)
    assert_same(scales, whole)


@EACH_TYPE
@pytest.mark.parametrize(("n_rows", "columns"), [(0, 256), (3, 0), (0, 0)])
def test_empty_matrices(name, n_rows, columns):
    blocks = blocks_of(name, 3, 256)[:n_rows, : columns // TYPES[name].values * TYPES[name].nbytes]
    assert repacked(blocks, name).shape == (n_rows, columns)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("blocks", torch.zeros(2, 144).int()),
        ("blocks", torch.zeros(2, 144, 1).byte()),
        ("blocks", torch.zeros(2, 288).byte()[:, ::2]),
        ("blocks", torch.zeros(2, 143).byte()),
        ("blocks", torch.zeros(2, 144, dtype=torch.uint8, device="meta")),
        ("type", "Q2_K"),
        ("values", torch.zeros(2, 32)),
        ("values", torch.zeros(2, 31).int()),
        ("values", torch.zeros(3, 32).int()),
        ("values", torch.zeros(2, 64).int()[:, ::2]),
        ("scales", torch.zeros(2, 16)),
        ("scales", torch.zeros(2, 15).byte()),
        ("scales", torch.zeros(2, 32).byte()[:, ::2]),
        ("scales", torch.zeros(2, 16, dtype=torch.uint8, device="meta")),
    ],
)
def test_wrong_arguments_are_named(name, wrong):
    given = {
        "blocks": torch.zeros(2, 144).byte(),
        "type": "Q4_K",
        "values": torch.zeros(2, 32).int(),
        "scales": torch.zeros(2, 16).byte(),
    }
    repack(**given)
    with pytest.raises((ValueError, TypeError), match=f"^repack: {name} ") as caught:
        repack(**(given | {name: wrong}))
    assert "expected" in str(caught.value)
