"""mistral_ext.weights.safetensors_file writes what the library of that name reads. (Reading, and
damaged files, are in test_checkpoint.py.)"""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from mistral_ext.weights.safetensors_file import DTYPES, Writer, stored_tensors


@pytest.fixture
def tensors(generator):
    shapes = [(), (0,), (1,), (7,), (3, 5), (4, 0, 2), (17, 64)]
    return {
        f"{name}.{len(shape)}.{i}": torch.randint(-100, 100, shape, generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }


def test_written_in_any_order(tmp_path, tensors):
    names = list(tensors)
    random.Random(0).shuffle(names)
    file = tmp_path / "x.safetensors"
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with Writer(file, layout) as writer:
        for name in names:
            writer.write(name, tensors[name])

    theirs = load_file(file)
    ours = {stored.name: stored.read() for stored in stored_tensors(file) if stored.nbytes}
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype
        assert torch.equal(theirs[name], tensor)
        if tensor.numel():
            assert torch.equal(ours[name], tensor)
            assert ours[name].data_ptr() % tensor.itemsize == 0


def test_data_begin_at_a_cache_line(tmp_path):
    for i in range(70):
        file = tmp_path / "x.safetensors"
        with Writer(file, {"x" * (i + 1): torch.empty(1, device="meta")}) as writer:
            writer.write("x" * (i + 1), torch.ones(1))
        assert file.stat().st_size % 64 == 4
        assert load_file(file) == {"x" * (i + 1): torch.ones(1)}
