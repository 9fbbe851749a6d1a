"""Sampling defaults from generation_config.json, for those who ask for them."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral
from mistral_ext.cli.generate import run as run_generate
from mistral_ext.cli.parser import parse

GIVEN = {"do_sample": True, "temperature": 0.9, "top_k": 30, "max_new_tokens": 9, "min_p": None}
MEANT = {"temperature": 0.9, "top_k": 30, "max_tokens": 9}


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, vocab_size=32000)
    shutil.copy(TOKENIZERS["v1"], tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text(json.dumps(GIVEN))
    return tmp_path


def token_ids(llm, **options):
    return llm.generate("Once", seed=3, ignore_eos=True, **options)[0].token_ids


def test_they_count_only_on_request(folder):
    plain = Mistral.from_pretrained(folder)
    asked = Mistral.from_pretrained(folder, generation_config="auto")
    assert plain.sampling_defaults == {}
    assert asked.sampling_defaults == MEANT
    assert len(token_ids(plain)) == 128
    assert token_ids(asked) == token_ids(plain, **MEANT)


def test_what_a_call_gives_wins(folder):
    llm = Mistral.from_pretrained(folder, generation_config="auto")
    assert token_ids(llm, temperature=0.0, max_tokens=4) == token_ids(
        llm, temperature=0.0, top_k=0, max_tokens=4
    )
    assert len(token_ids(llm, max_tokens=4)) == 4


@pytest.mark.parametrize("name", ["", "mine.json"])
def test_of_another_folder_or_file(folder, tmp_path_factory, name):
    other = tmp_path_factory.mktemp("other")
    file = other / (name or "generation_config.json")
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    llm = Mistral.from_pretrained(folder, generation_config=file if name else other)
    assert llm.sampling_defaults == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.5}, 0.5),
        ({"do_sample": False}, 0.0),
        ({}, None),
    ],
)
def test_temperature(folder, values, temperature):
    (folder / "generation_config.json").write_text(json.dumps(values))
    llm = Mistral.from_pretrained(folder, generation_config="auto")
    assert llm.sampling_defaults.get("temperature") == temperature


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"temperature": -1}', ValueError, "temperature is -1, expected a number, 0 or more"),
        ('{"top_p": "high"}', ValueError, "top_p is 'high', expected a number above 0"),
        ("[]", ValueError, "holds a list, expected a JSON object"),
        (None, FileNotFoundError, "generation_config is 'auto', but there is no file"),
    ],
)
def test_bad_files_are_named(folder, text, error, message):
    file = folder / "generation_config.json"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    if text != "[]":  # the end tokens are read in any case
        Mistral.from_pretrained(folder)
    with pytest.raises(error, match=message) as found:
        Mistral.from_pretrained(folder, generation_config="auto")
    assert "generation_config.json" in str(found.value)


def test_command_line(folder, capsys):
    command = ["generate", "--model", str(folder), "--seed", "3", "--ignore-eos", "--json", "Once"]
    for more, options in (
        (["--generation-config", "auto"], MEANT),
        (["--generation-config", "auto", "--max-tokens", "5"], {**MEANT, "max_tokens": 5}),
        (["--max-tokens", "5"], {"max_tokens": 5}),
    ):
        assert run_generate(parse([*command, *more])) == 0
        printed = json.loads(capsys.readouterr().out)
        expected = token_ids(Mistral.from_pretrained(folder), **options)
        assert printed["token_ids"] == expected
