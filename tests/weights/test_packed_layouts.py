"""Packed matrices as AutoAWQ, GPTQModel, compressed-tensors and bitsandbytes write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistral_ext.weights.packed_layouts import awq, compressed_tensors, gptq
from mistral_ext.weights.packed_nf4 import nf4
from mistral_ext.weights.packed_settings import WHOLE_ROW, Packing
from mistral_ext.weights.packed_tensors import ModuleTensors
from mistral_ext.weights.safetensors_file import stored_tensors

GOLDEN = Path(__file__).parent.parent / "data" / "packed.safetensors"

# By name: the reader, the settings, the format that the matrix gets.
CASES = {
    "gptq_v1": (gptq, Packing("gptq", 4, 32, zero_minus_one=True), "q4_z"),
    "gptq_v2": (gptq, Packing("gptq", 4, 32), "q4_z"),
    "gptq_act_order": (gptq, Packing("gptq", 4, 32, zero_minus_one=True), "q4_z"),
    "gptq_symmetric": (gptq, Packing("gptq", 4, 32, symmetric=True, zero_minus_one=True), "q4_0"),
    "awq": (awq, Packing("awq", 4, 32), "q4_z"),
    "ct_symmetric": (compressed_tensors, Packing("", 4, 32, symmetric=True), "int4"),
    "ct_zero_points": (compressed_tensors, Packing("", 4, 32), "q4_z"),
    "ct_channel": (compressed_tensors, Packing("", 4, WHOLE_ROW, symmetric=True), "q4_0"),
    "ct_8_bits": (compressed_tensors, Packing("", 8, 32, symmetric=True), "q8_0"),
}


def layer(name, **changes):
    """The tensors of a matrix in the file, some of them changed or, with None, left out; and the
    matrix that their writer makes of them."""
    prefix = f"{name}."
    found = {
        stored.name.removeprefix(prefix): stored
        for stored in stored_tensors(GOLDEN)
        if stored.name.startswith(prefix)
    }
    expected = found.pop("expected").read()
    return ModuleTensors(name, tuple(expected.shape), found), expected


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_writer(name):
    read, packing, form = CASES[name]
    module, expected = layer(name)
    matrix = read(module, packing)
    assert not module.left
    assert matrix.form.format == form
    assert torch.equal(matrix.decoded(torch.float32), expected)
    assert torch.equal(matrix.decoded(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("name", ["nf4", "nf4_double"])
def test_nf4_is_decoded_as_by_bitsandbytes(name):
    module, expected = layer(name)
    matrix = nf4(module, Packing("bitsandbytes"))
    assert not module.left
    assert torch.equal(matrix.decoded(torch.float16), expected)


def test_a_version_that_is_stated_wrongly_does_not_matter_to_symmetric_weights():
    packing = Packing("gptq", 4, 32, symmetric=True, zero_minus_one=False)
    module, expected = layer("gptq_symmetric")
    assert torch.equal(gptq(module, packing).decoded(torch.float32), expected)


def test_act_order_without_the_groups_of_the_inputs_is_refused():
    module, _ = layer("ct_zero_points")
    with pytest.raises(ValueError, match="weight_g_idx' is missing, expected it with act-order"):
        compressed_tensors(module, Packing("", 4, 32, act_order=True))
    module, expected = layer("ct_channel")  # a row is one group, in any order
    packing = Packing("", 4, WHOLE_ROW, symmetric=True, act_order=True)
    assert torch.equal(compressed_tensors(module, packing).decoded(torch.float32), expected)


def test_zero_points_that_differ_are_kept_whatever_the_settings_say():
    packing = Packing("gptq", 4, 32, symmetric=True, zero_minus_one=True)
    module, expected = layer("gptq_v1")
    assert torch.equal(gptq(module, packing).decoded(torch.float32), expected)
