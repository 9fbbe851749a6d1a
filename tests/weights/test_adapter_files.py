"""Adapters in files of peft, Mistral and GGUF, against peft with transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from adapters import ALL_LINEAR, write_peft
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from mistral_ext import Mistral
from mistral_ext.weights.adapters import PEFT_WEIGHTS, read_adapter, write_adapter
from mistral_ext.weights.gguf_model import gguf_name

IDS = torch.randint(3, 131, (41,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def llm(base):
    return Mistral.from_pretrained(base)


@torch.inference_mode()
def logits_of(model):
    """In float64, so that only our rounding counts."""
    return copy.deepcopy(model).double()(torch.tensor([IDS])).logits[0].float()


SETTINGS = {
    "all": {},
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2, "^unused$": 1},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 1.5, "gate_proj|up_proj": 3},
    },
    "patterns with rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 9}},
    "a regular expression": {"target_modules": r".*layers\.1\..*(o_proj|up_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "rank 1": {"r": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_peft(llm, tmp_path, name):
    theirs = write_checkpoint(tmp_path / "model")
    plain = logits_of(theirs)
    expected = logits_of(write_peft(theirs, tmp_path / "adapter", **SETTINGS[name]))
    assert (expected - plain).abs().max() > 0.05
    llm.load_adapter(tmp_path / "adapter", name)
    try:
        torch.testing.assert_close(llm.logits(IDS, adapter=name), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(llm.logits(IDS), plain, atol=2e-5, rtol=2e-5)
    finally:
        llm.unload_adapter(name)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A folder of peft, alpha 6 and rank 4."""
    folder = tmp_path_factory.mktemp("adapter")
    write_peft(write_checkpoint(folder / "model"), folder)
    return folder


def changed(adapter, folder, **settings):
    """A copy of an adapter of peft with other settings."""
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("model"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def with_tensors(adapter, folder, change):
    """A copy of an adapter of peft whose tensors `change` has changed."""
    changed(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def halves_to_pairs(b, heads):
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def in_mistrals_order(llm, adapter):
    """(name, a, b) with the rows of wq and wk as Mistral's and GGUF's files have them."""
    heads = {"wq": llm.config.n_heads, "wk": llm.config.n_kv_heads}
    for name, update in read_adapter(adapter, llm.config).items():
        count = heads.get(name.split(".")[-1])
        b = update.b if count is None else halves_to_pairs(update.b, count)
        yield name, update.a.clone(), b.contiguous()


def check_equal(read, adapter, config, scale):
    expected = read_adapter(adapter, config)
    assert read.keys() == expected.keys()
    for name, update in read.items():
        assert torch.equal(update.a, expected[name].a)
        assert torch.equal(update.b, expected[name].b)
        assert update.scale == scale


def write_mistrals(llm, adapter, folder, scale=None):
    tensors = {}
    for name, a, b in in_mistrals_order(llm, adapter):
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    save_file(tensors, folder / "lora.safetensors")
    if scale is not None:
        (folder / "params.json").write_text(json.dumps({"lora": {"rank": 4, "scaling": scale}}))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_mistrals_own_format(llm, adapter, tmp_path, scale, caplog):
    write_mistrals(llm, adapter, tmp_path, scale)
    check_equal(read_adapter(tmp_path, llm.config), adapter, llm.config, scale or 2.0)
    assert ("does not say its scaling" in caplog.text) == (scale is None)


@pytest.mark.parametrize("scale", [float("nan"), float("-inf"), True, "2"])
def test_a_scale_that_is_no_finite_number_is_refused(llm, adapter, tmp_path, scale):
    write_mistrals(llm, adapter, tmp_path, scale)
    with pytest.raises(ValueError, match=rf"params.json: scaling of lora is {scale!r}, expected"):
        read_adapter(tmp_path, llm.config)


def write_gguf(llm, adapter, file, alpha=6.0, kind="adapter"):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, a, b in in_mistrals_order(llm, adapter):
        stored = gguf_name(f"{name}.weight")
        writer.add_tensor(f"{stored}.lora_a", a.numpy().astype(np.float32))
        writer.add_tensor(f"{stored}.lora_b", b.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf(llm, adapter, tmp_path):
    file = write_gguf(llm, adapter, tmp_path / "adapter.gguf")
    check_equal(read_adapter(file, llm.config), adapter, llm.config, 1.5)
    check_equal(read_adapter(tmp_path, llm.config), adapter, llm.config, 1.5)
    file = file.rename(tmp_path / "sha256-0123")  # as Ollama names it
    check_equal(read_adapter(file, llm.config), adapter, llm.config, 1.5)


def test_a_model_in_a_gguf_file_is_no_adapter(llm, adapter, tmp_path):
    file = write_gguf(llm, adapter, tmp_path / "model.gguf", kind="model")
    with pytest.raises(ValueError, match=r"general.type is 'model', expected 'adapter'"):
        read_adapter(file, llm.config)


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 0.0])
def test_an_alpha_that_is_no_positive_number_is_refused(llm, adapter, tmp_path, alpha):
    file = write_gguf(llm, adapter, tmp_path / "adapter.gguf", alpha)
    with pytest.raises(ValueError, match=rf"adapter.lora.alpha is {alpha}, expected a positive"):
        read_adapter(file, llm.config)


def test_names_with_the_adapters_own_name(llm, adapter, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    folder = with_tensors(adapter, tmp_path / "named", rename)
    check_equal(read_adapter(folder, llm.config), adapter, llm.config, 1.5)


def test_an_adapter_of_a_model_without_a_head(llm, base, adapter, tmp_path):
    """peft trains embedding models as MistralModel, whose names do not begin with "model."."""
    embedder = transformers.MistralModel.from_pretrained(base)
    write_peft(embedder, tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    names = load_file(tmp_path / "adapter" / PEFT_WEIGHTS)
    assert all(name.startswith("base_model.model.layers.") for name in names)
    config = dataclasses.replace(llm.config, writes_text=False)
    for folder in (tmp_path / "adapter", adapter):  # the other is of the model with its head
        check_equal(read_adapter(folder, config), adapter, llm.config, 1.5)
    with pytest.raises(ValueError, match=r"model.layers.0.* is not supported"):
        read_adapter(tmp_path / "adapter", llm.config)


def test_a_written_adapter_loads_in_peft_and_here(base, llm, tmp_path):
    import peft

    theirs = write_checkpoint(tmp_path / "model")
    settings = SETTINGS["patterns"]
    expected = logits_of(write_peft(theirs, tmp_path / "adapter", **settings))
    read = read_adapter(tmp_path / "adapter", llm.config)
    folder = write_adapter(tmp_path / "written", read, "base")
    again = read_adapter(folder, llm.config)
    assert {name: update.scale for name, update in again.items()} == pytest.approx(
        {name: update.scale for name, update in read.items()}
    )
    loaded = peft.PeftModel.from_pretrained(write_checkpoint(tmp_path / "again"), folder)
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True, expected none: it is not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is "),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": 8}, "lora_A of 'model.layers.0.* has rank 4, expected 8"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a positive number"),
        ({"lora_alpha": True}, "lora_alpha is True, expected a positive number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern is .*nan"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern is .*, expected patterns with numbers"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(': missing \), unterminated"),
    ],
)
def test_settings_that_are_refused(llm, adapter, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(changed(adapter, tmp_path / "changed", **settings), llm.config)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128)}),
            "tensor 'base_model.model.lm_head.lora_A.weight' in .* is not supported",
        ),
        (
            lambda t: t.update({f"{Q.replace('s.0', 's.9')}.lora_A.weight": torch.zeros(4, 128)}),
            "layers.9.self_attn.q_proj.lora_A.weight' in .* is not supported: .*n_layers=2",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(256)}),
            "lora_magnitude_vector' in .* is not supported",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(256)}),
            "lora_B.bias' in .* is not supported",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "lora_A.weight' without its other matrix"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64)}),
            r"lora_A.weight' in .* has shape \(4, 64\), expected \(4, 128\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(256, 3)}),
            r"lora_B.weight' in .* has shape \(256, 3\), expected \(256, 4\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 128, dtype=torch.int8)}),
            "has dtype torch.int8, expected float32, bfloat16 or float16",
        ),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_tensors_that_are_refused(llm, adapter, tmp_path, change, message):
    """Other engines skip what matches nothing, and answer as if there were no adapter."""
    folder = with_tensors(adapter, tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message):
        llm.load_adapter(folder, "refused")
    assert llm.adapters.names == []


def test_where_there_is_no_adapter(llm, tmp_path, adapter):
    with pytest.raises(FileNotFoundError, match=r"no adapter in .* expected adapter_model.safe"):
        read_adapter(tmp_path, llm.config)
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        read_adapter(tmp_path, llm.config)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt is no adapter"):
        read_adapter(tmp_path / "notes.txt", llm.config)


def test_nothing_to_write(tmp_path):
    with pytest.raises(ValueError, match="adapter is empty"):
        write_adapter(tmp_path / "new", {})
    assert not (tmp_path / "new").exists()


def test_all_linear_layers_are_covered(llm, adapter):
    assert len(read_adapter(adapter, llm.config)) == len(ALL_LINEAR) * llm.config.n_layers
