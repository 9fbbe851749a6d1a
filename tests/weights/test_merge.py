"""Models with an adapter merged into them: as peft merges in float64, and whole or not at all."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
import transformers
from adapters import write_peft
from checkpoints import write_checkpoint
from gguf_files import write_model
from safetensors.torch import load_file, save_file

from mistral_ext import Mistral
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.merge import merge_adapter
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.randint(3, 131, (30,), generator=torch.Generator().manual_seed(5)).tolist()


def write_base(folder, dtype=torch.float32, **changes):
    write_checkpoint(folder, **changes).to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Changes all weights but those of the output of attention."""
    folder = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    write_peft(write_checkpoint(folder / "model"), folder, target_modules=targets, use_rslora=True)
    return folder


def merged_by_peft(folder, adapter):
    """Tensors in float64, by their names in files."""
    model = transformers.MistralForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_peft(adapter, tmp_path, dtype):
    folder = write_base(tmp_path / "base", dtype)
    target = merge_adapter(folder, adapter, tmp_path / "new" / "merged")
    before, merged = (load_file(f / "model.safetensors") for f in (folder, target))
    expected = merged_by_peft(folder, adapter)
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name
        changes = "_proj" in name and "o_proj" not in name
        assert torch.equal(tensor, before[name]) != changes, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_rounded_once(base, adapter, tmp_path, dtype):
    target = merge_adapter(base, adapter, tmp_path / "merged", dtype=dtype)
    expected = merged_by_peft(base, adapter)
    for name, tensor in load_file(target / "model.safetensors").items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name
    assert Mistral.from_pretrained(target).config.dtype == dtype


def test_a_merged_model_answers_as_one_with_the_adapter(base, adapter, tmp_path):
    target = merge_adapter(base, adapter, tmp_path / "merged")
    merged = Mistral.from_pretrained(target).logits(IDS)
    llm = Mistral.from_pretrained(base, adapters={"a": adapter})
    torch.testing.assert_close(merged, llm.logits(IDS, adapter="a"), atol=1e-4, rtol=1e-4)
    theirs = transformers.MistralForCausalLM.from_pretrained(target)
    with torch.inference_mode():
        theirs = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(merged, theirs, atol=1e-4, rtol=1e-4)
    companion = "tokenizer_config.json"
    assert (target / companion).read_bytes() == (base / companion).read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_mistrals_own_format_merges_to_the_same(base, adapter, tmp_path):
    weights = load_weights(read_folder(base))
    config = read_folder(base).config
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            halves = weight.view(-1, 2, config.head_dim // 2, config.dim)
            weights[name] = halves.transpose(1, 2).reshape(weight.shape)
    original = tmp_path / "original"
    shutil.copytree(base, original, ignore=shutil.ignore_patterns("model.safetensors"))
    save_file(weights, original / "consolidated.safetensors")
    merged, expected = (
        merge_adapter(folder, adapter, tmp_path / name) / "model.safetensors"
        for folder, name in ((original, "merged"), (base, "expected"))
    )
    assert merged.read_bytes() == expected.read_bytes()


def test_tied_embeddings_stay_tied(adapter, tmp_path):
    folder = write_base(tmp_path / "tied", tie_word_embeddings=True)
    target = merge_adapter(folder, adapter, tmp_path / "merged")
    assert read_folder(target).config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    assert "output.weight" in load_weights(read_folder(target))


def test_weights_of_few_bits_are_refused(adapter, tmp_path):
    model = write_checkpoint(tmp_path / "base", intermediate_size=192)
    quantised = quantize_checkpoint(tmp_path / "base", tmp_path / "int4", 4)
    gguf = tmp_path / "model.gguf"
    write_model(gguf, model)
    for folder, form in ((quantised, "iq4_xs in groups of 256"), (gguf, "a GGUF file")):
        with pytest.raises(ValueError, match=f"are {form}, expected a folder of weights"):
            merge_adapter(folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_embedding_model_is_refused(base, adapter, tmp_path):
    transformers.MistralModel.from_pretrained(base).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="model' is an embedding model, expected a model that wri"):
        merge_adapter(tmp_path / "model", adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_weight_that_is_too_large_leaves_nothing(tmp_path):
    folder = write_base(tmp_path / "base", torch.float16)
    write_peft(write_checkpoint(tmp_path / "model"), tmp_path / "adapter", lora_alpha=10**6)
    with pytest.raises(ValueError, match=r"attention.wq.weight with .* not finite in .*16"):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / "new" / "merged")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_target_in_the_users_folder(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert merge_adapter(base, adapter, "~/merged") == tmp_path / "merged"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_wrong_arguments_leave_nothing(base, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        merge_adapter(base, adapter, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        merge_adapter(base, tmp_path, tmp_path / "new")
    other = write_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(ValueError, match=r"has shape .* for this model"):
        merge_adapter(other, adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()
