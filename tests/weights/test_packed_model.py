"""Packed checkpoints: the numbers, names and logits of the decoded model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packed_checkpoints import awq_tensors, gptq_tensors, write_packed

from mistral_ext import Mistral, ops
from mistral_ext.ops import Quantized
from mistral_ext.weights.checkpoint import hugging_face_name, load_weights
from mistral_ext.weights.folder import read_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}

# name: settings, packer, arguments of random_integers, format of the weights
CASES = {
    "GPTQ": (GPTQ, gptq_tensors, {"group": 64}, "q4_z"),
    "GPTQ v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        partial(gptq_tensors, first_version=False),
        {"group": 64},
        "q4_z",
    ),
    "GPTQ symmetric": (
        GPTQ | {"sym": True, "group_size": 32},
        gptq_tensors,
        {"group": 32, "symmetric": True},
        "q4_0",
    ),
    "GPTQ act-order": (
        GPTQ | {"desc_act": True},
        gptq_tensors,
        {"group": 64, "act_order": True},
        "q4_z",
    ),
    "GPTQ 8 bits": (
        GPTQ | {"sym": True, "bits": 8},
        partial(gptq_tensors, bits=8),
        {"group": 64, "symmetric": True, "bits": 8},
        "q8_0",
    ),
    "AWQ": (AWQ, awq_tensors, {"group": 128}, "q4_z"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_those_of_the_decoded_model(case, tmp_path):
    settings, pack, integers, form = CASES[case]
    model = write_packed(tmp_path, settings, pack, **integers)
    weights = load_weights(read_folder(tmp_path), progress=False)
    state = model.state_dict()
    for name, weight in weights.items():
        expected = state[hugging_face_name(name)]
        if "proj" in hugging_face_name(name):
            assert weight.format == form
            assert torch.equal(weight.dequantize(), expected), name
        else:
            assert torch.equal(weight.float(), expected), name
    llm = Mistral.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    ids = torch.randint(131, (40,))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    ops.set_exact_products(True)
    try:
        for count in (3, 40):  # by the kernels for few and for many tokens
            torch.testing.assert_close(
                llm.logits(ids[:count]), expected[:count], rtol=1e-4, atol=2e-4
            )
    finally:
        ops.set_exact_products(False)
