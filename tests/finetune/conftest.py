"""A tiny random model with a tokenizer and a chat template, and training data for it."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from chat_templates import CHATML
from checkpoints import TOKENIZERS, write_checkpoint

import mistral_ext

# A window that the samples exceed.
SHAPE = {
    "vocab_size": 32002,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "sliding_window": 8,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the model, and transformers' model with the same weights."""
    folder = tmp_path_factory.mktemp("tiny") / "chatml"
    model = write_checkpoint(folder, **SHAPE)
    shutil.copy(TOKENIZERS["v1"], folder / "tokenizer.model")
    added = {"<|im_end|>": 32000, "<|im_start|>": 32001}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model


@pytest.fixture
def llm(tiny):
    return mistral_ext.Mistral.from_pretrained(tiny[0], dtype=torch.float32, progress=False)


@pytest.fixture
def oracle(tiny):
    """transformers' model, with eager attention; peft changes it in place."""
    model = copy.deepcopy(tiny[1])
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def write_lines(tmp_path):
    """Writes JSON lines; returns their file."""

    def write(name: str, *lines: dict | str):
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n")
        return path

    return write
