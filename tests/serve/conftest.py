from __future__ import annotations

import shutil

import pytest
from servers import serving


@pytest.fixture(scope="session")
def demo():
    """A server of the demo model, for all tests that leave it as it was."""
    with serving("--ping-seconds", "0.2") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Instruct model without a window, with the vocabulary v3."""
    from checkpoints import TOKENIZERS, write_checkpoint  # which import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny-Instruct"
    write_checkpoint(
        folder, vocab_size=32768, sliding_window=None, max_position_embeddings=8192, hidden_size=64
    )
    shutil.copy(TOKENIZERS["v3"], folder / "tokenizer.model.v3")
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """A server of that model."""
    with serving("--model", tiny_folder, "--served-model-name", "tiny") as server:
        yield server
