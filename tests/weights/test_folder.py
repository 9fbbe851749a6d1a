"""mistral_ext.weights.folder: which files count, and what is wrong with those that do not."""

from __future__ import annotations

import pytest
from test_config import HF_V1, PARAMS_V1, without, write

from mistral_ext.model.config import MistralConfig
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import config_json, is_instruct, read_folder


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"a": 1,}'])
def test_damaged_json_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_folder(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json.*params.json") as error:
        read_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


# Early v0.2 folders disagree: a window in config.json, none in params.json.
PARAMS_V2 = without(PARAMS_V1, "sliding_window") | {"rope_theta": 1e6}


@pytest.mark.parametrize(
    ("weights", "window"),
    [
        ([], 4096),
        (["model.safetensors"], 4096),
        (["model.safetensors", "consolidated.safetensors"], 4096),
        (["consolidated.safetensors"], None),
        (["consolidated.00.pth"], None),
    ],
)
def test_of_two_files_the_one_that_goes_with_the_weights(tmp_path, weights, window):
    write(tmp_path, config=HF_V1, params=PARAMS_V2)
    for name in weights:
        (tmp_path / name).touch()
    assert read_folder(tmp_path).config.sliding_window == window


def test_params_alone_go_with_any_weights(tmp_path):
    write(tmp_path, params=PARAMS_V2)
    (tmp_path / "model.safetensors").touch()
    assert read_folder(tmp_path).config.rope_theta == 1e6


# generation_config.json


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, 32000, (2, 32000)),
        (2, [2, 32000], (2, 32000)),
        ([2, 5], [7, 5], (2, 5, 7)),
        (2, None, (2,)),
        (None, 32000, (2, 32000)),
    ],
)
def test_end_tokens_of_both_files(tmp_path, config, generation, expected):
    values = HF_V1 | {"vocab_size": 32002, "eos_token_id": config}
    write(tmp_path, config=values, generation_config={"eos_token_id": generation, "top_p": 0.9})
    assert read_folder(tmp_path).config.eos_ids == expected
    assert read_folder(tmp_path, eos_ids=[3]).config.eos_ids == (3,)


def test_end_tokens_join_those_of_params_json_too(tmp_path):
    write(tmp_path, params=PARAMS_V1, generation_config={"eos_token_id": 9})
    assert read_folder(tmp_path).config.eos_ids == (2, 9)


@pytest.mark.parametrize("ids", [32000, [2, -1], "2", True, [[2]], 2.5])
def test_bad_end_tokens_name_the_file(tmp_path, ids):
    write(tmp_path, config=HF_V1, generation_config={"eos_token_id": ids})
    with pytest.raises(ValueError, match=r"eos_ids .*below vocab_size \(32000\)") as error:
        read_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "generation_config.json"))


# Instruct models


@pytest.mark.parametrize(
    ("name", "instruct"),
    [
        ("Mistral-7B-Instruct-v0.2", True),
        ("models--mistralai--Mistral-7B-Instruct-v0.3/snapshots/abc", True),
        ("Mistral-7B-v0.1", False),
        ("instruct/Mistral-7B-v0.1", False),
    ],
)
def test_instruct_by_name(tmp_path, name, instruct):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    write(folder, params=PARAMS_V1)
    assert read_folder(folder).instruct == instruct


def test_instruct_by_the_name_of_a_link(tmp_path):
    (tmp_path / "store" / "v1").mkdir(parents=True)
    write(tmp_path / "store" / "v1", params=PARAMS_V1)
    link = tmp_path / "Mistral-7B-Instruct"
    link.symlink_to(tmp_path / "store" / "v1")
    assert read_folder(link).instruct
    assert not read_folder(tmp_path / "store" / "v1").instruct


@pytest.mark.parametrize(
    ("repository", "name", "instruct"),
    [
        ("owner--Mistral-7B", "mistral-7b-instruct.Q4_0.gguf", True),
        ("owner--Mistral-7B-Instruct", "model.gguf", True),
        ("owner--Mistral-7B-Instruct", "Q4_0/model.gguf", True),
        ("owner--Mistral-7B", "model.gguf", False),
    ],
)
def test_instruct_by_the_name_of_a_file_in_the_hubs_cache(tmp_path, repository, name, instruct):
    model = tmp_path / f"models--{repository}"
    file, target = model / "snapshots" / "abc" / name, model / "blobs" / "0123"
    file.parent.mkdir(parents=True)
    target.parent.mkdir()
    target.touch()
    file.symlink_to(target)
    assert is_instruct(file) == instruct


@pytest.mark.parametrize("instruct", [True, False])
def test_instruct_by_what_is_written_down(tmp_path, instruct):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, config=HF_V1 | {"mistral_ext": {"instruct": instruct}})
    assert read_folder(folder).instruct == instruct
    write(folder, config=config_json(MistralConfig.from_hf(HF_V1), instruct=instruct))
    assert read_folder(folder).instruct == instruct


def test_what_is_written_down_wins(tmp_path):
    folder = tmp_path / "not-an-instruct-model"
    folder.mkdir()
    write(folder, config=HF_V1 | {"mistral_ext": {"instruct": False}})
    assert not read_folder(folder).instruct


# What is not a model, or not there


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 493443\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer.json", "added_tokens.json", "config.json"]
)
def test_lfs_pointers_are_recognised(tmp_path, name):
    write(tmp_path, config=HF_V1)
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r"is a git-lfs pointer.*git lfs pull") as error:
        read_folder(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["blobs", "refs", "snapshots"], "found blobs, refs, snapshots"),
        ([f"{i}.txt" for i in range(20)], r"found 0.txt, .*, 12 more"),
        ([], "found nothing"),
    ],
)
def test_the_message_says_what_is_there(tmp_path, names, seen):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"no model configuration in .*{seen}"):
        read_folder(tmp_path)


def test_without_weights_the_message_says_what_is_there(tmp_path):
    write(tmp_path, config=HF_V1)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*; found config\.json$"):
        load_weights(read_folder(tmp_path))
