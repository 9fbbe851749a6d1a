"""mistral_ext.weights.hub: folders as they are, hub models as far as they are needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

import mistral_ext
from mistral_ext.weights.hub import DEMO_MODEL, resolve, resolve_adapter

INDEX = "model.safetensors.index.json"


def test_resolve_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    assert resolve("owner/name") == Path("owner/name")  # a folder wins over a hub id


def test_the_demo_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("demo") == resolve(Path("demo")) == DEMO_MODEL
    assert (DEMO_MODEL / "config.json").is_file()
    (tmp_path / "demo").mkdir()
    assert resolve("demo") == Path("demo")  # a folder wins


def test_resolve_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        resolve(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").touch()
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    (tmp_path / "sha256-0123").write_bytes(b"GGUF\3\0\0\0")
    assert resolve(tmp_path / "sha256-0123") == tmp_path / "sha256-0123"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.gguf", ["model.gguf"]),
        ("Q4/m.gguf", ["Q4/m.gguf"]),
        (
            "Q4/m-00002-of-00002.gguf",
            ["Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf"],
        ),
    ],
)
def test_a_gguf_file_of_the_hub(name, expected, tmp_path, monkeypatch):
    asked = []

    def download(hub_id, file):
        asked.append((hub_id, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve(f"owner/name:{name}") == tmp_path / expected[0]
    assert asked == [("owner/name", file) for file in expected]


def test_an_adapter_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, file: f"{hub_id}/{file}")
    assert resolve_adapter("owner/name", ("a", "b")) == tmp_path
    assert asked == [("owner/name", ["a", "b"])]
    assert resolve_adapter("owner/name:x/a.gguf", ()) == Path("owner/name/x/a.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_adapter("owner/name", ()) == Path("owner/name")  # a folder wins
    assert resolve_adapter("./no/such", ()) == Path("no/such")  # the reader says what is missing
    assert len(asked) == 1


def test_an_adapter_that_cannot_be_had(monkeypatch):
    def download(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is not a local.*no network"):
        resolve_adapter("owner/name", ())


def test_a_gguf_file_that_cannot_be_had(monkeypatch):
    def download(hub_id, file):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"'owner/name' is not a local .*no network"):
        resolve("owner/name:model.gguf")


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "/nowhere/model", "a/b/c", "../x"])
def test_resolve_missing_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        resolve(path)
    assert repr(path) in str(error.value)


def test_an_empty_name_is_neither_the_demo_nor_the_current_folder():
    """A variable that is not set gives it. The command line refuses it: tests/cli."""
    for call in (resolve, mistral_ext.Mistral.from_pretrained):
        with pytest.raises(ValueError, match=r"^model is '', expected a folder"):
            call("")
    with pytest.raises(ValueError, match=r"^model is '', expected a folder"):
        mistral_ext.generate("Once", model="")


def test_resolve_offline_says_what_to_do(tmp_path):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    code = "from mistral_ext.weights.hub import resolve; resolve('mistralai/Mistral-7B-v0.1')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    message = done.stderr.splitlines()[-1]
    assert message.startswith("FileNotFoundError: 'mistralai/Mistral-7B-v0.1'")
    assert "hf download mistralai/Mistral-7B-v0.1" in message
    assert "HF_HOME" in message


def test_messages_of_the_library_lose_their_colours(monkeypatch):
    def model_info(self, hub_id):
        raise RuntimeError("\x1b[1mno \x1b[31;1mway\x1b[0m\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", model_info)
    with pytest.raises(FileNotFoundError, match=r"\(RuntimeError: no way\)\. Models"):
        resolve("owner/name")


def test_resolve_offline_finds_the_cache(tmp_path):
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    code = "from mistral_ext.weights.hub import resolve; print(resolve('owner/name'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == cache / "snapshots" / "abc"


def set_repository(monkeypatch, files: list[str]) -> None:
    """Let the hub's answer be a model with these files."""
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, hub_id: info)


HF_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
BIN_SHARDS = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        ([*HF_SHARDS, *BIN_SHARDS, "consolidated.safetensors"], HF_SHARDS),
        ([*BIN_SHARDS, "consolidated.safetensors"], BIN_SHARDS),
        (["consolidated.safetensors", "consolidated.00.pth"], ["consolidated.safetensors"]),
        (["consolidated.00.pth", "flax_model.msgpack"], ["consolidated.00.pth"]),
    ],
)
def test_download_takes_one_format_and_the_companions(tmp_path, monkeypatch, available, wanted):
    from huggingface_hub.utils import filter_repo_objects

    companions = ["config.json", "params.json", "tokenizer.model.v3", "tokenizer.json"]
    companions += ["added_tokens.json", "chat_template.jinja", "generation_config.json"]
    companions.append("additional_chat_templates/tool_use.jinja")
    repository = [*companions, "README.md", *available]
    downloaded = []

    def snapshot_download(hub_id, allow_patterns):
        downloaded.extend(filter_repo_objects(repository, allow_patterns=allow_patterns))
        return str(tmp_path)

    set_repository(monkeypatch, repository)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    assert sorted(downloaded) == sorted(companions + wanted)


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        (["README.md"], r"found README\.md"),
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter"),
        (["README.md", "x.Q4_0.gguf", "x.Q8_0.gguf"], r"found x\.Q4_0\.gguf: .* OWNER/NAME:x"),
    ],
)
def test_download_without_weights(monkeypatch, files, seen):
    set_repository(monkeypatch, files)
    with pytest.raises(FileNotFoundError, match=f"no weights in hub model 'owner/name'.*{seen}"):
        resolve("owner/name")
