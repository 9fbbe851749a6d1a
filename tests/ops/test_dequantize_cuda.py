"""The CUDA kernel that dequantises weights, for products of many tokens.

`embedding` reads rows with it: test_embedding.py."""

from __future__ import annotations

import pytest
import torch
from backends import GPU, registered
from packed_weights import random_weights
from tolerance import DTYPES

from mistral_ext import _C
from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import quantize


def weights(shape, generator) -> dict[str, Quantized]:
    exact = torch.randn(shape, generator=generator)
    made = {form: quantize(exact, form) for form in ("int8", "q8_0")}
    made |= {f"int4, groups of {group}": quantize(exact, "int4", group) for group in (32, 64, 128)}
    return made | random_weights(shape, generator)


FORMS = list(weights((1, 256), torch.Generator()))


def dequantize(emulator, weight, dtype):
    out = torch.full(weight.shape, float("nan"), dtype=dtype)
    with registered(emulator, values=weight.values, scales=weight.scales, out=out):
        addresses = [tensor.data_ptr() for tensor in (weight.values, weight.scales, out)]
        name = str(dtype).removeprefix("torch.")
        sizes = *weight.shape, weight.group
        assert emulator.dequantize(name, weight.format, *addresses, *sizes) == 0
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


def test_nothing(emulator, generator):
    weight = weights((1, 256), generator)["q4_k, groups of 256"]
    weight = weight._replace(values=weight.values[:0], scales=weight.scales[:0])
    assert len(dequantize(emulator, weight, torch.float32)) == 0


@pytest.mark.skipif(_C.cuda_architectures is None, reason="a build without CUDA")
def test_memory_of_the_cpu_is_refused(generator):
    weight = quantize(torch.randn(2, 32, generator=generator), "int8")
    message = "dequantize: tensors are on cpu, expected a CUDA device"
    with pytest.raises(ValueError, match=message):
        _C.dequantize(*weight[:3], torch.empty(2, 32), 1)


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(device, form, generator):
    weight = weights((5, 768), generator)[form]
    moved = weight.to(device)
    for dtype in DTYPES:
        assert torch.equal(moved.dequantize(dtype).cpu(), weight.dequantize(dtype))
