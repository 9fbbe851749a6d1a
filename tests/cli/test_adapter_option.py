"""Adapters on the command line."""

from __future__ import annotations

import io
import shutil

import pytest
from adapters import write_peft
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral
from mistral_ext.cli import main

OPTIONS = {"max_tokens": 12, "ignore_eos": True}
GIVEN = ["--max-tokens", "12", "--ignore-eos"]
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Instruct model, and an adapter in its folder `adapter`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    model = write_checkpoint(folder, vocab_size=32768, hidden_size=64)
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    write_peft(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    return Mistral.from_pretrained(folder, adapters={"a": folder / "adapter"})


@pytest.mark.parametrize("more", [[], ["--n", "2"]])
def test_generate(llm, folder, more, capsys):
    with_adapter = ["--adapter", f"a={folder / 'adapter'}"]
    for name, options in ((None, []), ("a", with_adapter)):
        assert main(["generate", "--model", str(folder), *options, *GIVEN, *more, "Once"]) == 0
        (completion,) = llm.generate("Once", adapter=name, **OPTIONS)
        assert capsys.readouterr().out.startswith(completion.text + "\n")
    assert completion.text != llm.generate("Once", **OPTIONS)[0].text


def test_chat(llm, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    options = ["--model", str(folder), "--adapter", f"a={folder / 'adapter'}", *GIVEN]
    assert main(["chat", *options]) == 0
    reply = llm.chat(HELLO, adapter="a", **OPTIONS).text
    assert capsys.readouterr().out == reply + "\n"
    assert reply != llm.chat(HELLO, **OPTIONS).text


def test_merge(llm, folder, tmp_path, capsys):
    target = tmp_path / "merged"
    assert main(["merge", str(folder), str(folder / "adapter"), str(target)]) == 0
    assert capsys.readouterr().err.endswith(f"{target}/model.safetensors: 0.02 GB\n")
    (merged,) = Mistral.from_pretrained(target).generate("Once", **OPTIONS)
    assert merged.text == llm.generate("Once", adapter="a", **OPTIONS)[0].text


@pytest.mark.parametrize("given", ["a", "=path", "a="])
def test_no_name_or_no_path(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--adapter", given, "Once"])
    assert f"argument --adapter: {given!r} is not NAME=PATH_OR_ID" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--adapter", "a=./no/such", "Once"], "no adapter in 'no/such'"),
        (
            ["serve", "--adapter", "demo=x"],
            "an adapter has the name 'demo', expected a name of its own",
        ),
        (["serve", "--adapter", "a=x", "--adapter", "a=y"], "an adapter has the name 'a'"),
        (["merge", "no/such", "x", "out"], "no/such"),
    ],
)
def test_errors(args, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(args) == 1
    assert message in capsys.readouterr().err
