"""Which packed checkpoints are read, by their configuration; others are refused by name."""

from __future__ import annotations

import json

import pytest
from checkpoints import write_checkpoint
from packed_checkpoints import change_config

from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.packed_settings import WHOLE_ROW, Packing, packing_of

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def compressed(group=None, **weights):
    groups = {"group_0": {"weights": WEIGHTS | weights} | (group or {})}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }


def transforms(*locations):
    applied = [{"location": location, "targets": ["Linear"]} for location in locations]
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": applied}}}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (GPTQ, Packing("gptq", 4, 128, True, zero_minus_one=True)),
        (GPTQ | {"sym": False}, Packing("gptq", 4, 128, False, zero_minus_one=True)),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, Packing("gptq", 4, 128, True)),
        (GPTQ | {"desc_act": True}, Packing("gptq", 4, 128, True, True, act_order=True)),
        (GPTQ | {"desc_act": True, "static_groups": True}, Packing("gptq", 4, 128, True, True)),
        (
            GPTQ | {"desc_act": True, "meta": {"static_groups": True}},
            Packing("gptq", 4, 128, True, True),
        ),
        (GPTQ | {"bits": 8, "group_size": -1}, Packing("gptq", 8, WHOLE_ROW, True, True)),
        (AWQ, Packing("awq", 4, 128)),
        (AWQ | {"version": "GEMM"}, Packing("awq", 4, 128)),
        (compressed(), Packing("compressed-tensors", 4, 32, True)),
        (compressed(num_bits=8), Packing("compressed-tensors", 8, 32, True)),
        (compressed(actorder="weight"), Packing("compressed-tensors", 4, 32, True)),
        (
            compressed(actorder="group"),
            Packing("compressed-tensors", 4, 32, True, act_order=True),
        ),
        (
            compressed(strategy="channel", group_size=None),
            Packing("compressed-tensors", 4, WHOLE_ROW, True),
        ),
        (
            compressed() | transforms("weight_input", "weight_output"),
            Packing("compressed-tensors", 4, 32, True),
        ),
        (NF4, Packing("bitsandbytes")),
    ],
)
def test_settings(settings, expected, tmp_path):
    assert packing_of({"quantization_config": settings}, tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "hqq"},
            "quant_method is 'hqq', expected one of mistral_ext, gptq, awq, ",
        ),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\], expected one of"),
        (GPTQ | {"bits": 3}, "bits is 3, expected 4 or 8"),
        (GPTQ | {"bits": True}, "bits is True, expected 4 or 8"),
        (GPTQ | {"bits": 8, "sym": False}, "sym is False with 8 bits, expected True"),
        (GPTQ | {"group_size": 0}, "group_size is 0, expected a positive number or -1"),
        (GPTQ | {"group_size": "128"}, "group_size is '128', expected"),
        (
            GPTQ | {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin', expected 'gptq' or",
        ),
        (AWQ | {"bits": 8}, "bits is 8, expected 4"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', expected 'gemm'"),
        (AWQ | {"zero_point": False}, "zero_point is False, expected True"),
        (
            compressed() | {"format": "nvfp4-pack-quantized"},
            "format is 'nvfp4-pack-quantized', exp",
        ),
        (compressed() | {"config_groups": {}}, "config_groups is {}, expected an object with one"),
        (compressed({"weights": None}), "weights of config_groups is None, expected an object"),
        (
            compressed({"input_activations": {"num_bits": 8}}),
            "input_activations is .* expected null",
        ),
        (compressed(num_bits=2), "num_bits is 2, expected 4 or 8"),
        (compressed(num_bits=8, symmetric=False), "symmetric is False with 8 bits"),
        (compressed(type="float"), "type is 'float', expected 'int'"),
        (compressed(strategy="tensor"), "strategy is 'tensor', expected 'group' or 'channel'"),
        (compressed() | {"transform_config": {"R4": 1}}, "transform_config is {'R4': 1}, expected"),
        (
            compressed() | transforms("weight_output", "input"),
            "transform_config has location 'input', expected weight_input or weight_output",
        ),
        (NF4 | {"load_in_8bit": True}, "load_in_8bit is True, expected load_in_4bit"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', expected 'nf4'"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"quantization_config: {message}"):
        packing_of({"quantization_config": settings}, tmp_path)


def test_the_key_that_was_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="compression_config: num_bits is 2, expected 4 or 8"):
        packing_of({"compression_config": compressed(num_bits=2)}, tmp_path)


@pytest.mark.parametrize(
    ("file", "settings", "expected"),
    [
        (
            "quantize_config.json",
            {"bits": 4, "group_size": 64, "sym": False, "desc_act": True},
            Packing("gptq", 4, 64, False, zero_minus_one=True, act_order=True),
        ),
        (
            "quant_config.json",
            {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True},
            Packing("awq", 4, 128),
        ),
    ],
)
def test_files_of_old_packers(file, settings, expected, tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / file).write_text(json.dumps(settings))
    assert read_folder(tmp_path).packing == expected
    (tmp_path / file).write_text(json.dumps(settings | {"quant_method": "exl2"}))
    with pytest.raises(ValueError, match=f"{file}: quant_method is 'exl2'"):
        read_folder(tmp_path)
    change_config(tmp_path, quantization_config=GPTQ)  # config.json comes first
    assert read_folder(tmp_path).packing.group == 128
