"""Memory for weights in large pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mistral_ext.ops import Quantized, memory

SMAPS = Path("/proc/self/smaps")


def flags_of(tensor: torch.Tensor) -> list[str]:
    """The flags of the mapping that holds a tensor."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= tensor.data_ptr() < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1024, 1025)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int32])
def test_empty_is_like_that_of_torch(shape, dtype):
    tensor = memory.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(
    not SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="a system without large pages on request",
)
def test_long_weights_ask_for_large_pages():
    weight = Quantized.empty((4096, 4096), "q8_0")
    assert "hg" in flags_of(weight.values)
    assert weight.values.data_ptr() % memory.LARGE_PAGE == 0
    assert "hg" not in flags_of(torch.empty(1 << 24, dtype=torch.uint8))
