"""The CUDA kernel that dequantises weights: for products of many tokens, and rows of embeddings."""

from __future__ import annotations

import pytest
import torch
from backends import GPU, registered
from packed_weights import random_weights
from tolerance import DTYPES

from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import quantize


def weights(shape, generator) -> dict[str, Quantized]:
    exact = torch.randn(shape, generator=generator)
    made = {form: quantize(exact, form) for form in ("int8", "q8_0")}
    made |= {f"int4, groups of {group}": quantize(exact, "int4", group) for group in (32, 64, 128)}
    return made | random_weights(shape, generator)


FORMS = list(weights((1, 256), torch.Generator()))


def dequantize(emulator, weight, dtype, indices=None):
    rows, size = weight.shape
    count = rows if indices is None else len(indices)
    out = torch.full((count, size), float("nan"), dtype=dtype)
    given = {"values": weight.values, "scales": weight.scales}
    if indices is not None:
        given["indices"] = indices
    with registered(emulator, **given, out=out):
        addresses = [tensor.data_ptr() for tensor in given.values()] + [0] * (3 - len(given))
        name = str(dtype).removeprefix("torch.")
        sizes = count, rows, size, weight.group
        assert emulator.dequantize(name, weight.format, *addresses, out.data_ptr(), *sizes) == 0
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_value(emulator, form, dtype, generator):
    weight = weights((5, 768), generator)[form]
    out = dequantize(emulator, weight, dtype)
    assert torch.equal(out, weight.dequantize(dtype))
    (record,) = emulator.take_launches()
    assert record["stored_bytes"] == out.nbytes
    further = 1.25 if weight.format in ("q5_k", "q6_k") else 1
    sectors = further * weight.values.nbytes // 32 + 4 * weight.scales.nbytes
    assert record["load_sectors"] <= sectors


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_their_indices(emulator, form, generator):
    """An index of no row is no access outside of the weight, and shows in the result."""
    weight = weights((5, 768), generator)[form]
    indices = torch.tensor([3, 0, 3, -1, 4, 5, 2**40])
    out = dequantize(emulator, weight, torch.bfloat16, indices)
    there = torch.tensor([0, 1, 2, 4])
    assert torch.equal(out[there], weight.rows(indices[there], torch.bfloat16))
    assert out[[3, 5, 6]].isnan().all()


def test_nothing(emulator, generator):
    weight = weights((5, 256), generator)["q4_k, groups of 256"]
    assert len(dequantize(emulator, weight, torch.float32, torch.empty(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(device, form, generator):
    weight, indices = weights((5, 768), generator)[form], torch.tensor([3, 0, 3])
    moved = weight.to(device)
    for dtype in DTYPES:
        assert torch.equal(moved.dequantize(dtype).cpu(), weight.dequantize(dtype))
        rows = moved.rows(indices.to(device), dtype)
        assert torch.equal(rows.cpu(), weight.rows(indices, dtype))
