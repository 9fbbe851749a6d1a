"""mistral_ext.weights.checkpoint: every format gives the same weights, every damage is named."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mistral_ext.model.config import MistralConfig
from mistral_ext.weights import checkpoint
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import ModelFolder, find_weights, read_folder
from mistral_ext.weights.names import hugging_face_name

CONFIG = MistralConfig(
    vocab_size=96,
    dim=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,  # not dim / n_heads, on purpose
    hidden_dim=80,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=8,
    max_positions=64,
    bos_id=1,
    eos_ids=(2,),
)
Q0 = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def make_hf_model(**changes) -> transformers.MistralForCausalLM:
    torch.manual_seed(3)
    config = transformers.MistralConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.dim,
        intermediate_size=CONFIG.hidden_dim,
        num_hidden_layers=CONFIG.n_layers,
        num_attention_heads=CONFIG.n_heads,
        num_key_value_heads=CONFIG.n_kv_heads,
        head_dim=CONFIG.head_dim,
        sliding_window=CONFIG.sliding_window,
        max_position_embeddings=CONFIG.max_positions,
        **changes,
    )
    return transformers.MistralForCausalLM(config)


@pytest.fixture(scope="module")
def hf_model() -> transformers.MistralForCausalLM:
    model = make_hf_model()
    with torch.no_grad():  # norms are made as ones: give each its own values
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return model


@pytest.fixture
def hf_weights(hf_model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}


def mistral_weights(hf_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights in Mistral's format, with the rows moved one by one."""
    half = CONFIG.head_dim // 2
    weights = {}
    for name in checkpoint.tensor_shapes(CONFIG):
        stored = hf_weights[hugging_face_name(name)]
        weights[name] = stored.clone()
        if name.endswith(("wq.weight", "wk.weight")):
            for head in range(len(stored) // CONFIG.head_dim):
                first = head * CONFIG.head_dim
                for i in range(half):
                    weights[name][first + 2 * i] = stored[first + i]
                    weights[name][first + 2 * i + 1] = stored[first + half + i]
    return weights


def write_hf_single(folder, model):
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def write_hf_sharded(folder, model):
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(find_weights(folder).files) > 2


def write_bin(folder, model):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_legacy_bin(folder, model):
    """As torch before 1.6 did: no zip archive."""
    file = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)


def write_bin_sharded(folder, model):
    weights = model.state_dict()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)


def write_consolidated(folder, model):
    save_file(mistral_weights(model.state_dict()), folder / "consolidated.safetensors")


def write_pth(folder, model):
    torch.save(mistral_weights(model.state_dict()), folder / "consolidated.00.pth")


WRITERS = {
    "single": write_hf_single,
    "sharded": write_hf_sharded,
    "bin": write_bin,
    "bin-sharded": write_bin_sharded,
    "legacy": write_legacy_bin,
    "consolidated": write_consolidated,
    "pth": write_pth,
}


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path, hf_model) -> Path:
    WRITERS[request.param](tmp_path, hf_model)
    return tmp_path


def test_every_format_gives_the_same_weights(folder, hf_weights):
    weights = load_weights(ModelFolder(folder, CONFIG))
    assert list(weights) == list(checkpoint.tensor_shapes(CONFIG))
    assert {hugging_face_name(name) for name in weights} == set(hf_weights)
    for name, tensor in weights.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, hf_weights[hugging_face_name(name)]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion(folder, hf_weights, dtype):
    for name, tensor in load_weights(ModelFolder(folder, CONFIG), dtype=dtype).items():
        assert torch.equal(tensor, hf_weights[hugging_face_name(name)].to(dtype)), name


def test_permutation_keeps_the_attention_scores(hf_weights):
    """Rotating Mistral's pairs or our halves gives the same q.k."""
    torch.manual_seed(0)
    x, y = torch.randn(2, CONFIG.dim, dtype=torch.float64)
    angle = torch.rand(CONFIG.head_dim // 2, dtype=torch.float64) * 6

    def rotate(vector, pairs):
        heads = vector.view(-1, CONFIG.head_dim)
        if pairs:
            a, b = heads[:, 0::2], heads[:, 1::2]
        else:
            a, b = heads.chunk(2, dim=1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos])

    def score(weights, wq, wk, pairs):
        q = rotate(weights[wq].double() @ x, pairs).view(2, CONFIG.n_kv_heads, -1)
        k = rotate(weights[wk].double() @ y, pairs).view(2, CONFIG.n_kv_heads, -1)
        return torch.stack([(q[..., : k.shape[-1]] * k).sum(), (q[..., k.shape[-1] :] * k).sum()])

    theirs = mistral_weights(hf_weights)
    prefix = "layers.1.attention"
    torch.testing.assert_close(
        score(theirs, f"{prefix}.wq.weight", f"{prefix}.wk.weight", pairs=True),
        score(
            hf_weights,
            hugging_face_name(f"{prefix}.wq.weight"),
            hugging_face_name(f"{prefix}.wk.weight"),
            pairs=False,
        ),
    )


def test_folder_with_both_formats(tmp_path, hf_model, hf_weights):
    write_hf_sharded(tmp_path, hf_model)
    write_bin(tmp_path, hf_model)
    write_consolidated(tmp_path, hf_model)
    torch.save({}, tmp_path / "consolidated.00.pth")  # must not be read
    weights = load_weights(ModelFolder(tmp_path, CONFIG))
    assert torch.equal(weights["output.weight"], hf_weights["lm_head.weight"])
    assert find_weights(tmp_path).layout.format == "hf"


def test_incomplete_format_gives_way_to_a_complete_one(tmp_path, hf_model, hf_weights):
    write_hf_sharded(tmp_path, hf_model)
    find_weights(tmp_path).files[1].unlink()
    write_consolidated(tmp_path, hf_model)
    weights = load_weights(ModelFolder(tmp_path, CONFIG))
    assert torch.equal(weights["layers.0.attention.wq.weight"], hf_weights[Q0])


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX leaves open what a mapping shows")
@pytest.mark.parametrize("folder", [name for name in WRITERS if name != "legacy"], indirect=True)
def test_weights_share_the_pages_of_the_file(folder):
    """Without conversion nothing is copied: a change of the file shows in the tensor."""
    tensor = load_weights(ModelFolder(folder, CONFIG))["norm.weight"]
    content = tensor.numpy().tobytes()
    file = next(f for f in find_weights(folder).files if content in f.read_bytes())
    with file.open("r+b") as f:
        f.seek(file.read_bytes().index(content))
        f.write(torch.full_like(tensor, 7.0).numpy().tobytes())
    assert torch.equal(tensor, torch.full_like(tensor, 7.0))


def test_writing_to_a_weight_leaves_the_file_alone(tmp_path, hf_model):
    write_hf_single(tmp_path, hf_model)
    before = (tmp_path / "model.safetensors").read_bytes()
    load_weights(ModelFolder(tmp_path, CONFIG))["norm.weight"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("padding", range(4))
def test_unaligned_safetensors(tmp_path, hf_model, hf_weights, padding):
    """The header may have any length, so tensors may start at any byte."""
    write_hf_single(tmp_path, hf_model)
    header, data = split_safetensors(tmp_path / "model.safetensors")
    join_safetensors(tmp_path / "model.safetensors", header, data, padding)
    weights = load_weights(ModelFolder(tmp_path, CONFIG))
    assert weights["norm.weight"].data_ptr() % 4 == 0
    assert torch.equal(weights["layers.0.attention.wq.weight"], hf_weights[Q0])


def test_rotary_frequencies_are_ignored(tmp_path, hf_weights):
    hf_weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(hf_weights, tmp_path / "model.safetensors")
    assert len(load_weights(ModelFolder(tmp_path, CONFIG))) == len(hf_weights) - 1


def test_tied_embeddings(tmp_path):
    model = make_hf_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    weights = load_weights(read_folder(tmp_path))
    assert weights["output.weight"] is weights["tok_embeddings.weight"]


def test_progress_goes_to_a_terminal_only(tmp_path, hf_model, capfd):
    write_hf_single(tmp_path, hf_model)
    capfd.readouterr()  # what transformers printed
    load_weights(ModelFolder(tmp_path, CONFIG))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("progress", [True, False])
def test_progress_on_a_terminal(tmp_path, hf_model, monkeypatch, progress):
    fcntl = pytest.importorskip("fcntl", reason="needs a pseudo-terminal")
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    write_hf_single(tmp_path, hf_model)
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", 25, 80, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        load_weights(ModelFolder(tmp_path, CONFIG), progress=progress)
        terminal.write("end")
    shown = b""
    while not shown.endswith(b"end"):  # a read gives what has come by then
        shown += os.read(reader, 65536)
    assert (b"loading weights: 100%" in shown) == progress
    os.close(reader)


# Bad input: each is refused with the tensor's and the file's name.


def split_safetensors(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_safetensors(file: Path, header: dict, data: bytes, padding: int = 0) -> None:
    header_bytes = json.dumps(header).encode() + b" " * padding
    file.write_bytes(len(header_bytes).to_bytes(8, "little") + header_bytes + data)


def refusal(folder: Path, config: MistralConfig = CONFIG, error=ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        load_weights(ModelFolder(folder, config), **options)
    return str(caught.value)


def save_hf(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    save_file(weights, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_missing_tensor(tmp_path, hf_weights):
    del hf_weights[Q0]
    file = save_hf(tmp_path, hf_weights)
    assert refusal(tmp_path) == f"tensor '{Q0}' is missing from {file}, expected shape (64, 48)"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"base_model.model.{name}",
        lambda name: f"base_model.model.{name.removeprefix('model.')}",
    ],
    ids=["without model.", "of peft", "of peft, without model."],
)
def test_names_that_begin_in_another_way(tmp_path, hf_weights, rename):
    save_hf(tmp_path, {rename(name): weight for name, weight in hf_weights.items()})
    for name, weight in load_weights(ModelFolder(tmp_path, CONFIG)).items():
        assert torch.equal(weight, hf_weights[hugging_face_name(name)]), name


def test_a_tensor_under_two_names_is_refused(tmp_path, hf_weights):
    weights = {f"base_model.model.{name}": weight for name, weight in hf_weights.items()}
    file = save_hf(tmp_path, weights | {"lm_head.weight": hf_weights["lm_head.weight"].clone()})
    assert refusal(tmp_path) == f"tensor 'lm_head.weight' is in both {file} and {file}"


def test_names_of_a_model_without_its_head(tmp_path, hf_weights):
    del hf_weights["lm_head.weight"]
    file = save_hf(tmp_path, {n.removeprefix("model."): w for n, w in hf_weights.items()})
    assert refusal(tmp_path) == (
        f"tensor 'lm_head.weight' is missing from {file}, expected shape (96, 48), or "
        "architectures ['MistralModel'] in config.json for an embedding model"
    )


def test_tensors_named_in_another_way(tmp_path, hf_weights):
    file = save_hf(tmp_path, {f"{n}.lora_A": weight for n, weight in hf_weights.items()})
    assert refusal(tmp_path) == (
        f"tensor 'model.embed_tokens.weight' is missing from {file}; found "
        "'lm_head.weight.lora_A', 'model.embed_tokens.weight.lora_A', "
        "'model.layers.0.input_layernorm.weight.lora_A'"
    )


def test_missing_output_is_refused_unless_tied(tmp_path, hf_weights):
    del hf_weights["lm_head.weight"]
    save_hf(tmp_path, hf_weights)
    assert "'lm_head.weight' is missing" in refusal(tmp_path)


def test_missing_tensor_of_a_sharded_checkpoint(tmp_path, hf_model):
    write_hf_sharded(tmp_path, hf_model)
    file = next(f for f in find_weights(tmp_path).files if Q0 in load_file(f))
    weights = load_file(file)
    del weights[Q0]
    save_file(weights, file)
    assert f"'{Q0}' is missing from {tmp_path / INDEX}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_extra_tensor(tmp_path, hf_weights, name):
    hf_weights[name] = torch.ones(3)
    file = save_hf(tmp_path, hf_weights)
    message = refusal(tmp_path)
    assert f"unknown tensor '{name}' of shape (3,) in {file}" in message
    assert "n_layers=2" in message


def test_misshaped_tensor(tmp_path, hf_weights):
    hf_weights[Q0] = hf_weights[Q0].T.contiguous()
    file = save_hf(tmp_path, hf_weights)
    expected = f"tensor '{Q0}' in {file} has shape (48, 64), expected (64, 48)"
    assert refusal(tmp_path) == expected


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}])
def test_unsupported_dtype(tmp_path, hf_weights, options):
    hf_weights[Q0] = hf_weights[Q0].to(torch.int8)
    file = save_hf(tmp_path, hf_weights)
    message = refusal(tmp_path, **options)
    assert message == (
        f"tensor '{Q0}' in {file} has dtype torch.int8, expected bfloat16, float16 or float32"
    )


def test_unsupported_dtype_in_a_torch_file(tmp_path, hf_weights):
    hf_weights[Q0] = hf_weights[Q0].double()
    torch.save(hf_weights, tmp_path / "pytorch_model.bin")
    assert "has dtype torch.float64, expected" in refusal(tmp_path)


def test_mixed_dtypes_need_a_conversion(tmp_path, hf_weights):
    hf_weights[Q0] = hf_weights[Q0].bfloat16()
    save_hf(tmp_path, hf_weights)
    message = refusal(tmp_path)
    assert f"'{Q0}'" in message
    assert "pass dtype" in message
    weights = load_weights(ModelFolder(tmp_path, CONFIG), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_unsupported_target_dtype(tmp_path, hf_weights):
    save_hf(tmp_path, hf_weights)
    assert "dtype is torch.int8, expected" in refusal(tmp_path, dtype=torch.int8)


def test_truncated_safetensors_names_the_first_tensor_that_is_cut(tmp_path, hf_model):
    write_hf_single(tmp_path, hf_model)
    file = tmp_path / "model.safetensors"
    header, data = split_safetensors(file)
    cut = header[Q0]["data_offsets"][0] + 1
    size = file.stat().st_size - len(data) + cut
    os.truncate(file, size)
    message = refusal(tmp_path)
    assert message.startswith(f"{file} is truncated: tensor '{Q0}'")
    assert message.endswith(f"the file ends at byte {size}")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_truncated_header(tmp_path, hf_model, size):
    write_hf_single(tmp_path, hf_model)
    file = tmp_path / "model.safetensors"
    os.truncate(file, size)
    message = refusal(tmp_path)
    assert str(file) in message
    assert "truncated" in message


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [64, 49]},
        {"shape": ["x"]},
        {"shape": [-64, -48]},
        {"shape": [64.5, 48]},
        {"shape": "64"},
        {"data_offsets": [8, 4]},
        {"data_offsets": [-12288, 0]},
        {"data_offsets": None},
        {"data_offsets": [0]},
        {"data_offsets": [0, math.inf]},
    ],
)
def test_damaged_header_entry(tmp_path, hf_model, change):
    write_hf_single(tmp_path, hf_model)
    file = tmp_path / "model.safetensors"
    header, data = split_safetensors(file)
    header[Q0] |= change
    join_safetensors(file, header, data)
    assert str(file) in refusal(tmp_path)


def test_tensors_that_share_bytes(tmp_path, hf_model):
    write_hf_single(tmp_path, hf_model)
    file = tmp_path / "model.safetensors"
    header, data = split_safetensors(file)
    other = Q0.replace("layers.0", "layers.1")
    header[other]["data_offsets"] = header[Q0]["data_offsets"]
    join_safetensors(file, header, data)
    message = refusal(tmp_path)
    assert str(file) in message
    assert f"{Q0!r} and {other!r} share bytes" in message


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b"\xff\xff", b"[" * 100_000], ids=range(5)
)
def test_damaged_header(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    message = refusal(tmp_path)
    assert str(file) in message
    assert "damaged" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("damage", ["truncated", "cut early", "empty", "garbage"])
def test_damaged_torch_file(tmp_path, hf_weights, name, damage, zipped):
    file = tmp_path / name
    torch.save(hf_weights, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    damaged = {"truncated": content[:-1000], "cut early": content[:100], "empty": b""}
    file.write_bytes(damaged.get(damage, b"x" * 999))
    message = refusal(tmp_path)
    assert message.startswith(f"{file} is truncated, or not a checkpoint written by torch.save: ")
    assert not message.endswith(": ")
    assert "weights_only" not in message  # torch's advice


class Unsafe:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_runs_no_code(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Unsafe()}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path)
    assert str(file) in message
    assert "mkdir" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [[torch.ones(3)], {"model": {"a": torch.ones(3)}}, {5: torch.ones(3)}]
)
def test_torch_file_of_another_structure(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in message
    assert "expected a dict of tensors" in message or "expected names of tensors" in message


@pytest.mark.parametrize("kind", ["sparse_coo", "meta"])
def test_torch_file_of_tensors_without_plain_values(tmp_path, hf_weights, kind):
    tensor = hf_weights["lm_head.weight"]
    changed = tensor.to_sparse() if kind == "sparse_coo" else tensor.to("meta")
    torch.save({**hf_weights, "lm_head.weight": changed}, tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "'lm_head.weight'" in message
    assert f"is {kind}, expected its values" in message


def test_model_parallel_parts(tmp_path, hf_model):
    write_pth(tmp_path, hf_model)
    (tmp_path / "consolidated.01.pth").touch()
    message = refusal(tmp_path)
    assert "consolidated.00.pth, consolidated.01.pth" in message
    assert "model parallelism" in message


def test_missing_shard(tmp_path, hf_model):
    write_hf_sharded(tmp_path, hf_model)
    shard = find_weights(tmp_path).files[1]
    shard.unlink()
    message = refusal(tmp_path, error=FileNotFoundError)
    assert message == f"{shard} is missing; {tmp_path / INDEX} lists it"


def test_tensor_in_two_shards(tmp_path, hf_model):
    write_hf_sharded(tmp_path, hf_model)
    first, second = find_weights(tmp_path).files[:2]
    save_file(load_file(first) | load_file(second), second)
    assert f"is in both {first} and {second}" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    assert str(tmp_path / INDEX) in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"])
def test_lfs_pointer(tmp_path, name):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14483498240"
    (tmp_path / name).write_text(pointer)
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message
    assert "git lfs pull" in message


def test_no_weights(tmp_path):
    message = refusal(tmp_path, error=FileNotFoundError)
    assert str(tmp_path) in message
    assert "consolidated.safetensors" in message
