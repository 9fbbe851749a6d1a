"""Packed checkpoints: the weights and logits are those of the decoded model, and a file that is not
as its settings say is refused by name."""

from __future__ import annotations

import logging
import shutil
from functools import partial

import pytest
import torch
from packed_checkpoints import (
    awq_tensors,
    change_config,
    change_tensors,
    compressed_tensors,
    gptq_tensors,
    nf4_layer,
    packed_layer,
    write_packed,
)
from safetensors.torch import load_file, save_file

from mistral_ext import Mistral
from mistral_ext.cli import main
from mistral_ext.llm import DEMO_MODEL
from mistral_ext.ops import Quantized
from mistral_ext.weights import packed_groups
from mistral_ext.weights.checkpoint import Checkpoint, load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.merge import merge_adapter
from mistral_ext.weights.names import hugging_face_name
from mistral_ext.weights.packed_settings import WHOLE_ROW
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 64,
            }
        }
    },
}
gptq_v2 = partial(gptq_tensors, first_version=False)

# quantization_config, what makes the layers, their format when they are loaded
CASES = {
    "GPTQ": (GPTQ, packed_layer(gptq_tensors, group=64), "q4_z"),
    "GPTQ v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        packed_layer(gptq_v2, group=64),
        "q4_z",
    ),
    "GPTQ symmetric": (
        GPTQ | {"sym": True, "group_size": 32},
        packed_layer(gptq_tensors, group=32, symmetric=True),
        "q4_0",
    ),
    "GPTQ bf16 scales": (
        GPTQ | {"sym": True},
        packed_layer(gptq_tensors, group=64, symmetric=True, dtype=torch.bfloat16),
        "int4",
    ),
    "GPTQ groups of 256": (
        GPTQ | {"group_size": 256},
        packed_layer(gptq_tensors, group=256),
        "q4_z",
    ),
    "GPTQ act-order": (
        GPTQ | {"desc_act": True},
        packed_layer(gptq_tensors, group=64, act_order=True),
        "q4_z",
    ),
    "GPTQ act-order symmetric": (
        GPTQ | {"desc_act": True, "sym": True},
        packed_layer(gptq_tensors, group=64, act_order=True, symmetric=True),
        "q4_0",
    ),
    "GPTQ 8 bits": (
        GPTQ | {"sym": True, "bits": 8},
        packed_layer(partial(gptq_tensors, bits=8), group=64, symmetric=True, bits=8),
        "q8_0",
    ),
    "GPTQ 8 bits act-order": (
        GPTQ | {"sym": True, "bits": 8},
        packed_layer(
            partial(gptq_tensors, bits=8), group=64, symmetric=True, bits=8, act_order=True
        ),
        "q8_0",
    ),
    "AWQ": (AWQ, packed_layer(awq_tensors, group=128), "q4_z"),
    "compressed-tensors": (COMPRESSED, packed_layer(compressed_tensors, group=64), "q4_z"),
    "compressed-tensors bf16 scales": (
        COMPRESSED,
        packed_layer(compressed_tensors, group=64, dtype=torch.bfloat16),
        "q4_z",
    ),
    "nf4": (NF4, nf4_layer, None),
}


@pytest.fixture(autouse=True)
def _several_steps(monkeypatch):
    """Matrices are repacked a few rows at a time, as large matrices are."""
    monkeypatch.setattr(packed_groups, "_AT_ONCE", 2**13)


def decoded(weight):
    return weight.dequantize() if isinstance(weight, Quantized) else weight


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_those_of_the_decoded_model(case, tmp_path):
    settings, make, form = CASES[case]
    model = write_packed(tmp_path, settings, make)
    weights = load_weights(read_folder(tmp_path), dtype=torch.float32, progress=False)
    for name, weight in weights.items():
        assert torch.equal(decoded(weight), model.state_dict()[hugging_face_name(name)]), name
        is_layer = name.startswith("layers.") and not name.endswith("norm.weight")
        assert getattr(weight, "format", None) == (form if is_layer else None)
    llm = Mistral.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    ids = torch.randint(131, (40,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    for count in (3, 40):  # multiplied by the kernels for few and for many
        logits = llm.logits(ids[:count])
        torch.testing.assert_close(logits, expected[:count], rtol=1e-4, atol=2e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder and a model for GPTQ with zero points, GPTQ in act-order, nf4; not to be changed."""
    made = {}
    for case in ("GPTQ", "GPTQ act-order", "AWQ", "compressed-tensors", "nf4"):
        folder = tmp_path_factory.mktemp("packed")
        made[case] = folder, write_packed(folder, *CASES[case][:2])
    return made


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(case):
        return shutil.copytree(folders[case][0], tmp_path / "copy")

    return copy


def test_the_dtype_is_that_of_the_embeddings(folders):
    weights = load_weights(read_folder(folders["nf4"][0]), progress=False)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_names_without_model_and_of_peft(copy_of, folders):
    folder = copy_of("GPTQ")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file).items()
    save_file({f"base_model.model.{name.removeprefix('model.')}": t for name, t in tensors}, file)
    expected = load_weights(read_folder(folders["GPTQ"][0]), progress=False)
    for name, weight in load_weights(read_folder(folder), progress=False).items():
        assert torch.equal(decoded(weight), decoded(expected[name])), name


def test_nf4_is_decoded(folders, caplog):
    folder, model = folders["nf4"]
    with caplog.at_level(logging.WARNING, logger="mistral_ext"):
        checkpoint = Checkpoint(read_folder(folder), torch.bfloat16)
    assert "become bfloat16 as they are read, 0.00 GB" in caplog.text
    for name, weight in checkpoint.weights(progress=False):
        expected = model.state_dict()[hugging_face_name(name)].bfloat16()
        assert torch.equal(weight, expected), name


def test_weights_can_be_rounded_again(folders):
    folder, model = folders["AWQ"]
    weights = load_weights(read_folder(folder), quantize="int8", progress=False)
    name = "layers.1.feed_forward.w2.weight"
    assert weights[name].format == "q8_0"
    expected = model.state_dict()[hugging_face_name(name)]
    assert (weights[name].dequantize() - expected).abs().max() < expected.abs().max() / 200


def test_the_command_line_reads_them(tmp_path, capsys, exact_products):
    settings, make, _ = CASES["GPTQ act-order"]
    model = write_packed(tmp_path, settings, make, vocab_size=2048)
    model.save_pretrained(tmp_path / "decoded")
    for folder in (tmp_path, tmp_path / "decoded"):
        shutil.copy(DEMO_MODEL / "tokenizer.model", folder)
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a mill by a river, and nobody lived in it.")
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert f"for {tmp_path}" in capsys.readouterr().out
    perplexities = []
    for folder in (tmp_path, tmp_path / "decoded"):
        options = ["--model", str(folder), "--file", str(text), "--dtype", "float32"]
        assert main(["perplexity", *options]) == 0
        perplexities.append(float(capsys.readouterr().out.split()[1]))
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


def test_what_needs_the_original_says_so(folders, tmp_path):
    source = folders["nf4"][0]
    with pytest.raises(ValueError, match="quantised already, as nf4, expected the original"):
        quantize_checkpoint(source, tmp_path / "out", 4)
    with pytest.raises(ValueError, match="are nf4, expected a folder of weights"):
        merge_adapter(source, tmp_path, tmp_path / "out")


LAYER = "model.layers.1.self_attn.k_proj"


def without(suffix):
    return lambda tensors: tensors.pop(f"{LAYER}.{suffix}")


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def changed(suffix, change):
    def change_all(tensors):
        tensors[f"{LAYER}.{suffix}"] = change(tensors.get(f"{LAYER}.{suffix}"))

    return change_all


DAMAGES = [
    ("GPTQ", without("qweight"), "k_proj.qweight' is missing from .*model.safetensors"),
    ("GPTQ", without("qzeros"), r"k_proj.qzeros' is missing .* expected shape \(4, 16\)"),
    ("GPTQ", without("scales"), r"k_proj.scales' is missing .* expected shape \(4, 128\)"),
    ("GPTQ", changed("qweight", lambda t: t[1:]), r"qweight' .* shape \(31, 128\), expected \(32,"),
    (
        "GPTQ",
        changed("qweight", lambda t: t.float()),
        "qweight' .* dtype torch.float32, expected int32",
    ),
    (
        "GPTQ",
        changed("scales", lambda t: t.float()),
        "scales' .* torch.float32, expected float16 or bf",
    ),
    ("GPTQ", changed("g_idx", lambda t: t * 0), r"k_proj.g_idx' .* groups of several sizes"),
    ("GPTQ", changed("g_idx", lambda t: t[1:]), r"k_proj.g_idx' .* shape \(255,\)"),
    ("GPTQ", changed("bias", lambda _: torch.ones(128)), "k_proj.bias' .* is not zero"),
    ("GPTQ", changed("more", lambda _: torch.ones(1)), "unknown tensor .*k_proj.more'"),
    (
        "GPTQ act-order",
        changed("g_idx", lambda t: t.flip(0)),
        "attention.wk.weight' has groups of other inputs",
    ),
    (
        "GPTQ act-order",
        without("g_idx"),
        "k_proj.g_idx' is missing, expected it with act-order",
    ),
    ("AWQ", changed("qweight", lambda t: t.T), r"qweight' .* shape \(16, 256\)"),
    ("compressed-tensors", changed("weight_shape", lambda t: t + 1), r"is \[129, 257\], expected"),
    ("compressed-tensors", without("weight_zero_point"), "weight_zero_point' is missing"),
    ("nf4", without("weight"), "k_proj.weight' is missing, expected nf4"),
    ("nf4", without("weight.absmax"), "k_proj.weight.absmax' is missing"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4' is missing"),
    ("nf4", changed("weight", lambda t: t[1:]), "k_proj.weight' .* 16383 bytes, expected 16384"),
    (
        "nf4",
        changed("weight.quant_state.bitsandbytes__nf4", lambda t: t[1:]),
        "is no description of nf4",
    ),
    (
        "nf4",
        changed("weight.quant_state.bitsandbytes__nf4", lambda _: as_bytes("[" * 2**15)),
        "is no description of nf4",
    ),
    (
        "nf4",
        changed("weight.quant_state.bitsandbytes__nf4", lambda _: as_bytes(" " * (2**16 + 1))),
        "has 65537 bytes of dtype torch.uint8, expected uint8 and at most 65536",
    ),
    (
        "nf4",
        changed("weight", lambda t: t.view(torch.float8_e4m3fn)),
        "k_proj.weight' .* has dtype F8_E4M3, expected uint8",
    ),
]


@pytest.mark.parametrize(("case", "damage", "message"), DAMAGES)
def test_damage_is_named_before_weights_are_read(case, damage, message, copy_of):
    folder = copy_of(case)
    change_tensors(folder, damage)
    with pytest.raises(ValueError, match=message):
        Checkpoint(read_folder(folder))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (96, r"down_proj' has 512 inputs, expected a multiple of the group size 96"),
        (32, r"down_proj.scales' .* shape \(8, 256\), expected \(16, 256\)"),
        (WHOLE_ROW, r"down_proj.scales' .* shape \(8, 256\), expected \(1, 256\)"),
    ],
)
def test_groups_of_another_size_are_named(group, message, copy_of):
    folder = copy_of("GPTQ")
    change_config(folder, quantization_config=GPTQ | {"group_size": group})
    with pytest.raises(ValueError, match=message):
        Checkpoint(read_folder(folder))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_groups_that_no_format_has_are_named(quantize, tmp_path):
    settings = GPTQ | {"group_size": 16}
    write_packed(tmp_path, settings, packed_layer(gptq_tensors, group=16))
    with pytest.raises(ValueError, match="proj' has groups of 16, expected a multiple of 32"):
        load_weights(read_folder(tmp_path), quantize=quantize, progress=False)


def test_scales_that_are_not_finite_are_named(copy_of):
    folder = copy_of("GPTQ")
    change_tensors(folder, changed("scales", lambda t: t * float("inf")))
    with pytest.raises(ValueError, match="k_proj' has scales that are not finite"):
        load_weights(read_folder(folder), progress=False)


@pytest.mark.parametrize(
    ("suffix", "named"),
    [("nested_absmax", "absmax"), ("nested_quant_map", "absmax"), ("quant_map", "quant_map")],
)
def test_nf4_that_is_not_finite_is_named(suffix, named, copy_of):
    folder = copy_of("nf4")
    change_tensors(folder, changed(f"weight.{suffix}", lambda t: t * float("nan")))
    with pytest.raises(ValueError, match=f"k_proj.weight.{named}' .* numbers that are not finite"):
        load_weights(read_folder(folder), progress=False)


@pytest.mark.parametrize(("scale", "is_rounded"), [(2**-17, False), (2**-18, True)])
def test_bf16_scales_that_fp16_rounds_are_logged(scale, is_rounded, tmp_path, caplog):
    settings, make, _ = CASES["compressed-tensors bf16 scales"]
    write_packed(tmp_path, settings, make)
    few_bits = torch.tensor(scale * (1 + 2**-7), dtype=torch.bfloat16)
    change_tensors(
        tmp_path, changed("weight_scale", lambda t: t.new_full(t.shape, few_bits.item()))
    )
    load_weights(read_folder(tmp_path), progress=False)
    message = "k_proj' has scales so small that torch.float16 rounds them"
    assert (message in caplog.text) == is_rounded


def test_a_bias_of_zeros_is_no_bias(copy_of):
    folder = copy_of("GPTQ")
    change_tensors(folder, changed("bias", lambda _: torch.zeros(128)))
    load_weights(read_folder(folder), progress=False)
