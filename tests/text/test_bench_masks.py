"""bench/masks.py, with the demo's vocabulary, few runs and a clock that counts."""

from __future__ import annotations

import itertools
import json
import sys

import jsonschema
import masks
import pytest

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.tokenizer import Tokenizer


def test_its_text_matches_its_schema():
    jsonschema.validate(masks.VALUE, masks.SCHEMA)
    tokenizer = Tokenizer.from_folder(DEMO_MODEL)
    # Compiling takes 5 seconds, each token 3 with the schema and 1 without.
    clock = itertools.chain([0, 5], itertools.cycle([0, 3, 4]))
    added, compiled = masks.mask_seconds(tokenizer, 1, clock.__next__)
    ids = tokenizer.encode(json.dumps(masks.VALUE), bos=False)
    assert added == [2] * len(ids)  # each token of the text was allowed, else it raises
    assert compiled == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [("--layers 1", "--layers: 1, expected 2 or more"), ("--runs 0", "--runs: 0, expected 1")],
)
def test_wrong_options(monkeypatch, capsys, option, message):
    monkeypatch.setattr(sys, "argv", ["masks.py", "--tokenizer", "folder", *option.split()])
    with pytest.raises(SystemExit):
        masks.parse_options()
    assert message in capsys.readouterr().err
