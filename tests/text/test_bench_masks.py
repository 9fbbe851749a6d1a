"""bench/masks.py, with the demo's vocabulary and few runs."""

from __future__ import annotations

import jsonschema
import masks

from mistral_ext.llm import DEMO_MODEL
from mistral_ext.text.tokenizer import Tokenizer


def test_its_text_matches_its_schema():
    jsonschema.validate(masks.VALUE, masks.SCHEMA)
    tokenizer = Tokenizer.from_folder(DEMO_MODEL)
    added, compiled = masks.mask_seconds(tokenizer, runs=1)
    assert len(added) > 100  # each token of the text was allowed, else it raises
    assert sum(added) > 0
    assert compiled > 0
