"""Folders of quantised weights: written whole or not at all, read back to the bit."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint
from safetensors.torch import load_file, save_file

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.ops import Quantized
from mistral_ext.weights import checkpoint, safetensors_file
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.names import hugging_face_name
from mistral_ext.weights.quantize import Quantization, quantize
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

FORMATS = [(8, None), (4, None), (4, 32)]
Q0, Q0_OURS = "model.layers.0.self_attn.q_proj.weight", "layers.0.attention.wq.weight"


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """fp32, in Hugging Face's format, with all that may belong to a model."""
    folder = tmp_path_factory.mktemp("hf")
    write_checkpoint(folder, vocab_size=32000, intermediate_size=192, eos_token_id=[2, 5])
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')
    (folder / "added_tokens.json").write_text('{"[PAD]": 32000}')
    (folder / "README.md").write_text("not part of the model")
    return folder


@pytest.fixture(scope="module")
def mistral_folder(tmp_path_factory, hf_folder):
    """The same in Mistral's format, in bfloat16."""
    folder = tmp_path_factory.mktemp("mistral")
    config = read_folder(hf_folder).config
    weights = load(hf_folder, dtype=torch.bfloat16)
    for name, weight in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            halves = weight.view(-1, 2, config.head_dim // 2, config.dim)
            weights[name] = halves.transpose(1, 2).reshape(weight.shape)
    save_file(weights, folder / "consolidated.safetensors")
    names = ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim"]
    params = {name: getattr(config, name) for name in (*names, "norm_eps", "sliding_window")}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(params=["hf", "mistral"])
def source(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def quantized_folder(tmp_path, hf_folder):
    return quantize_checkpoint(hf_folder, tmp_path / "int4", 4)


def load(folder, **options) -> dict[str, torch.Tensor | Quantized]:
    return load_weights(read_folder(folder), **options)


def is_same(a: torch.Tensor | Quantized, b: torch.Tensor | Quantized) -> bool:
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        same = is_same(a.values, b.values) and is_same(a.scales, b.scales)
        return same and a.format == b.format
    return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_read_back_without_the_original(source, tmp_path, bits, group):
    original = tmp_path / "original"
    shutil.copytree(source, original)
    weights = load(original)
    target = quantize_checkpoint(original, tmp_path / "new" / "quantised", bits, group)
    shutil.rmtree(original)

    loaded = load(target)
    quantization = Quantization.from_bits(bits, group)
    assert list(loaded) == list(weights)
    for name, weight in weights.items():
        form = quantization.format_of(name, weight.shape[-1])
        expected = weight
        if form is not None:
            expected = quantize(weight, form, quantization.group if form == "int4" else None)
            assert loaded[name].values.is_contiguous()
            assert loaded[name].scales.is_contiguous()
        assert is_same(loaded[name], expected), name


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_while_loading_is_the_same(source, tmp_path, bits):
    target = quantize_checkpoint(source, tmp_path / "quantised", bits)
    stored = load(target)
    for folder in (source, target):
        here = load(folder, quantize=f"int{bits}")
        assert list(here) == list(stored)
        assert all(is_same(here[name], weight) for name, weight in stored.items())


def test_configuration_and_companions(source, tmp_path):
    target = quantize_checkpoint(source, tmp_path / "int4", 4, 32)
    before, after = read_folder(source), read_folder(target)
    dtype = load(source)["norm.weight"].dtype
    assert after.config == dataclasses.replace(before.config, dtype=dtype)
    assert (before.quantization, after.quantization) == (None, Quantization("int4", 32))
    assert json.loads((target / "config.json").read_text())["quantization_config"] == {
        "quant_method": "mistral_ext",
        "format": "int4",
        "group_size": 32,
        "output_format": "q8_0",
    }
    companions = {"tokenizer.model", "tokenizer_config.json", "generation_config.json"}
    companions |= {"added_tokens.json"}
    companions &= {file.name for file in source.iterdir()}
    written = {file.name for file in target.iterdir()}
    assert written == companions | {"config.json", "model.safetensors"}
    for name in companions:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_chat_templates_in_a_subfolder_are_companions(hf_folder, tmp_path):
    source = shutil.copytree(hf_folder, tmp_path / "source")
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "README.md").write_text("not part of the model")
    target = quantize_checkpoint(source, tmp_path / "int8", 8)
    copied = target / "additional_chat_templates"
    assert [file.name for file in copied.iterdir()] == ["tool_use.jinja"]
    assert (copied / "tool_use.jinja").read_text() == "{{ tools }}"


def test_paths_in_the_users_folder(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(hf_folder, tmp_path / "model")
    assert quantize_checkpoint("~/model", "~/int8", 8) == tmp_path / "int8"
    assert load(tmp_path / "int8")


def test_an_instruct_model_stays_one_under_another_name(mistral_folder, tmp_path):
    """Mistral's own folders hold no chat template: only the name says what they are."""
    original = tmp_path / "Mistral-7B-Instruct-v0.2"
    shutil.copytree(mistral_folder, original)
    once = quantize_checkpoint(original, tmp_path / "small", 4)
    assert json.loads((once / "config.json").read_text())["mistral_ext"] == {"instruct": True}
    for folder, instruct in ((original, True), (once, True), (mistral_folder, False)):
        assert read_folder(folder).instruct == instruct


def test_the_library_reads_the_same(quantized_folder):
    theirs = load_file(quantized_folder / "model.safetensors")
    for name, weight in load(quantized_folder).items():
        for stored_name, tensor in checkpoint.named_parts(name, weight).items():
            assert is_same(theirs.pop(stored_name), tensor)
    assert not theirs


def test_written_twice_to_the_byte(hf_folder, quantized_folder, tmp_path):
    again = quantize_checkpoint(hf_folder, tmp_path / "again", 4)
    for file in quantized_folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX leaves open what a mapping shows")
@pytest.mark.parametrize("part", ["values", "scales"])
def test_weights_share_the_pages_of_the_file(quantized_folder, part):
    tensor = getattr(load(quantized_folder)["layers.1.feed_forward.w2.weight"], part)
    file = quantized_folder / "model.safetensors"
    content = tensor.view(torch.uint8).numpy().tobytes()
    with file.open("r+b") as f:
        f.seek(file.read_bytes().index(content))
        f.write(bytes(len(content)))
    assert not tensor.any()


def test_how_to_quantise_once_is_said(hf_folder, quantized_folder, monkeypatch, caplog):
    load(hf_folder, quantize="int4")
    assert not caplog.text  # it took no time
    monkeypatch.setattr(checkpoint, "_LONG", 0.0)
    load(quantized_folder, quantize="int4")
    assert not caplog.text  # it is done
    load(hf_folder, quantize="int4")
    assert "quantising them to iq4_xs in groups of 256 took 0 s" in caplog.text
    assert f"`mistral-ext quantize {hf_folder} OUT --bits 4` does it once" in caplog.text


def test_dtype_is_that_of_embeddings_and_norms(hf_folder, quantized_folder, tmp_path):
    stored = load(quantized_folder)
    as_bf16 = load(quantized_folder, dtype=torch.bfloat16)
    from_original = load(hf_folder, dtype=torch.bfloat16, quantize="int4")
    written = load(quantize_checkpoint(hf_folder, tmp_path / "x", 4, dtype=torch.bfloat16))
    for name, weight in stored.items():
        if isinstance(weight, torch.Tensor):
            assert weight.dtype == torch.float32
            weight = weight.bfloat16()
        # quantised from what is stored, not from what that is rounded to
        for other in (as_bf16, from_original, written):
            assert is_same(other[name], weight), name


@pytest.mark.parametrize("bits", [8, 4])
def test_tied_embeddings(tmp_path, bits):
    write_checkpoint(tmp_path / "tied", intermediate_size=192, tie_word_embeddings=True)
    embeddings = load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    target = quantize_checkpoint(tmp_path / "tied", tmp_path / "quantised", bits)
    assert not read_folder(target).config.tie_word_embeddings
    for weights in (load(target), load(tmp_path / "tied", quantize=f"int{bits}")):
        assert is_same(weights["tok_embeddings.weight"], embeddings)
        assert is_same(weights["output.weight"], quantize(embeddings, "q8_0"))


@pytest.mark.parametrize("bits", [8, 4])
def test_folders_of_before_formats_had_names(hf_folder, tmp_path, bits):
    """They say how many bits there are; those of 8 bits, the output's too, have a scale a row."""
    target = quantize_checkpoint(hf_folder, tmp_path / "old", bits, 32 if bits == 4 else None)
    file = target / "model.safetensors"
    expected, tensors = load(hf_folder), load_file(file)
    for name, weight in expected.items():
        old = "int8" if name == "output.weight" or bits == 8 else "int4"
        if f"{hugging_face_name(name)}_scale" in tensors:
            expected[name] = quantize(weight, old, 32 if old == "int4" else None)
            tensors |= checkpoint.named_parts(name, expected[name])
    save_file(tensors, file)
    settings = {"quant_method": "mistral_ext", "bits": bits}
    settings["group_size"] = 32 if bits == 4 else None
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    loaded = load(target)
    assert all(is_same(loaded[name], weight) for name, weight in expected.items())


# Nothing is half-written


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("calls", [1, 20, "rename"])
def test_an_interrupted_run_leaves_nothing(hf_folder, tmp_path, monkeypatch, error, calls):
    before = {file: file.read_bytes() for file in hf_folder.iterdir()}
    write, written = safetensors_file.Writer.write, []

    def interrupted(*args):
        write(*args)
        written.append(1)
        if len(written) == calls:
            raise error

    def not_renamed(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file.Writer, "write", interrupted)
        if calls == "rename":
            patch.setattr("pathlib.Path.rename", not_renamed)
        with pytest.raises(type(error)):
            quantize_checkpoint(hf_folder, tmp_path / "int4", 4)
    assert list(tmp_path.iterdir()) == []
    assert {file: file.read_bytes() for file in hf_folder.iterdir()} == before
    assert load(quantize_checkpoint(hf_folder, tmp_path / "int4", 4))


def test_a_terminated_run_leaves_nothing(hf_folder, tmp_path):
    """By SIGTERM, in the middle: from timeout, systemd, docker stop or a batch system."""
    code = f"""if True:
        import os, signal
        from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint
        from mistral_ext.weights.safetensors_file import Writer
        write, written = Writer.write, []
        def terminated(*args):
            write(*args)
            written.append(1)
            if len(written) == 20:
                print("under way:", *os.listdir({str(tmp_path)!r}))
                os.kill(os.getpid(), signal.SIGTERM)
        Writer.write = terminated
        quantize_checkpoint({str(hf_folder)!r}, {str(tmp_path / "int4")!r}, 4)
        print("finished")
    """
    done = subprocess.run(
        [sys.executable, "-uc", code], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"under way: int4\.part-\w+\n", done.stdout)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_in_the_way(hf_folder, tmp_path, caplog):
    left = tmp_path / "int4.part-abc"
    (left / "int4").mkdir(parents=True)
    assert load(quantize_checkpoint(hf_folder, tmp_path / "int4", 4))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [str(left)]
    assert not left.exists()


def test_existing_targets(hf_folder, tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "x").touch()
    file.touch()
    empty.mkdir()
    for target in (full, file, hf_folder):
        with pytest.raises(FileExistsError) as caught:
            quantize_checkpoint(hf_folder, target, 8)
        assert str(caught.value) == f"{str(target)!r} exists, expected a new or an empty folder"
    assert load(quantize_checkpoint(hf_folder, empty, 8))
    assert empty.stat().st_mode == full.stat().st_mode
    assert {entry.name for entry in tmp_path.iterdir()} == {"full", "file", "empty"}


# Bad input


def refusal(call, *args, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        call(*args, **options)
    return str(caught.value)


def test_already_quantised(quantized_folder, tmp_path):
    message = refusal(quantize_checkpoint, quantized_folder, tmp_path / "x", 8)
    assert str(quantized_folder) in message
    assert "are quantised already, as iq4_xs in groups of 256" in message
    assert not (tmp_path / "x").exists()
    message = refusal(load, quantized_folder, quantize="int8")
    assert "as iq4_xs in groups of 256, and cannot be made q8_0 in groups of 32" in message


def test_same_bits_in_other_groups(hf_folder, tmp_path):
    target = quantize_checkpoint(hf_folder, tmp_path / "int4", 4, 32)
    assert load(target, quantize="int4")[Q0_OURS].group == 32


@pytest.mark.parametrize("suffix", ["", "_scale"])
def test_missing_tensor(quantized_folder, suffix):
    file = quantized_folder / "model.safetensors"
    tensors = load_file(file)
    shape = tuple(tensors.pop(Q0 + suffix).shape)
    save_file(tensors, file)
    expected = f"tensor '{Q0 + suffix}' is missing from {file}, expected shape {shape}"
    assert refusal(load, quantized_folder) == expected


@pytest.mark.parametrize("suffix", ["", "_scale"])
def test_misshaped_tensor(quantized_folder, suffix):
    file = quantized_folder / "model.safetensors"
    tensors = load_file(file)
    tensors[Q0 + suffix] = tensors[Q0 + suffix][:, 1:].contiguous()
    save_file(tensors, file)
    message = refusal(load, quantized_folder)
    assert message.startswith(f"tensor '{Q0 + suffix}' in {file} has shape (256, ")


@pytest.mark.parametrize(
    ("suffix", "dtype", "message"),
    [
        ("", torch.float32, "has dtype torch.float32, expected int32"),
        ("_scale", torch.bfloat16, "has dtype torch.bfloat16, expected float16"),
    ],
)
def test_wrong_dtype(quantized_folder, suffix, dtype, message):
    file = quantized_folder / "model.safetensors"
    tensors = load_file(file)
    tensors[Q0 + suffix] = tensors[Q0 + suffix].to(dtype)
    save_file(tensors, file)
    assert refusal(load, quantized_folder) == f"tensor '{Q0 + suffix}' in {file} {message}"


def test_unknown_tensor(quantized_folder):
    file = quantized_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight_scale"] = torch.ones(128, 1)
    save_file(tensors, file)
    assert "unknown tensor 'model.norm.weight_scale'" in refusal(load, quantized_folder)


def test_quantised_weights_with_the_configuration_of_the_original(quantized_folder, hf_folder):
    shutil.copy(hf_folder / "config.json", quantized_folder)
    assert f"tensor '{Q0}'" in refusal(load, quantized_folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "exl2"},
            "quant_method is 'exl2', expected one of mistral_ext, gptq, awq",
        ),
        ({"bits": 4}, "quant_method is None, expected one of mistral_ext, gptq"),
        ("int4", "quantization_config is 'int4', expected an object"),
        ({"quant_method": "mistral_ext", "bits": 3}, "quantization_config: bits is 3"),
        ({"quant_method": "mistral_ext"}, "quantization_config: bits is None"),
        ({"quant_method": "mistral_ext", "bits": 4, "group_size": 5}, "group is 5, expected 32"),
        ({"quant_method": "mistral_ext", "format": "q9"}, "format is 'q9', expected one of int8"),
    ],
)
def test_unknown_methods_are_refused_by_name(quantized_folder, settings, message):
    file = quantized_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    refused = refusal(read_folder, quantized_folder)
    assert message in refused
    assert str(file) in refused


def test_group_that_does_not_divide(tmp_path):
    message = refusal(quantize_checkpoint, DEMO_MODEL, tmp_path / "x", 4, 128)
    assert "'layers.0.feed_forward.w2.weight' of shape (256, 704)" in message
    assert "groups of 128" in message
    write_checkpoint(tmp_path / "odd", intermediate_size=208)
    message = refusal(load, tmp_path / "odd", quantize="int4")
    assert "'layers.0.feed_forward.w2.weight' of shape (128, 208)" in message
    assert "expected a multiple of 32" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd"]


def test_not_a_number_names_tensor_and_file(tmp_path):
    write_checkpoint(tmp_path / "model", intermediate_size=192)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file)
    for call in (
        lambda: load(tmp_path / "model", quantize="int4"),
        lambda: quantize_checkpoint(tmp_path / "model", tmp_path / "x", 8),
    ):
        message = refusal(call)
        assert message.startswith(f"{file}: tensor 'model.layers.1.mlp.up_proj.weight' holds NaN")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("bits", "group"), [(5, None), (4, 16), (8, 64)])
def test_bad_arguments_are_refused_first(tmp_path, bits, group):
    message = refusal(quantize_checkpoint, tmp_path / "none", tmp_path / "x", bits, group)
    assert message.startswith(("bits is 5", "group is 16", "group is 64"))
    assert list(tmp_path.iterdir()) == []


def test_bad_name_of_a_quantisation(hf_folder):
    assert refusal(load, hf_folder, quantize="q4").startswith("quantize is 'q4', expected 'int8'")
