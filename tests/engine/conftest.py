from __future__ import annotations

import shutil

import pytest
import torch
from checkpoints import TOKENIZERS, write_checkpoint
from drafting import WINDOW

from mistral_ext import Mistral
from mistral_ext.engine.pace import Pace


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """Passes over prompts do not pause, and do not depend on how fast the machine is."""
    monkeypatch.setattr(Pace, "layers", lambda pace: pace._layers)
    monkeypatch.setattr(Pace, "end", lambda pace: None)


@pytest.fixture(scope="session")
def instruct_llm(tmp_path_factory) -> Mistral:
    """A random Instruct model with the vocabulary v3."""
    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    write_checkpoint(folder, vocab_size=32768, sliding_window=None, max_position_embeddings=4096)
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    return Mistral.from_pretrained(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """window -> a model, in bfloat16, the dtype that rounds most."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder, sliding_window=WINDOW, max_position_embeddings=4096)

    def model(window):
        llm = Mistral.from_pretrained(folder, dtype=torch.bfloat16, sliding_window=window)
        return llm.model

    return {window: model(window) for window in (None, WINDOW)}
