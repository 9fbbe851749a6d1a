from __future__ import annotations

import shutil

import pytest
from checkpoints import TOKENIZERS, write_checkpoint

from mistral_ext import Mistral


@pytest.fixture(scope="session")
def instruct_llm(tmp_path_factory) -> Mistral:
    """A random Instruct model with the vocabulary v3."""
    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    write_checkpoint(folder, vocab_size=32768, sliding_window=None, max_position_embeddings=4096)
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    return Mistral.from_pretrained(folder)
