"""Small random checkpoints, written by transformers itself."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers


class _Tokenizers(dict):
    """Of mistral-common; without it, what needs one of them is skipped."""

    def __missing__(self, version: str) -> Path:
        pytest.skip(f"mistral-common, which has the vocabulary {version}, is not installed")


# The real vocabularies, by version; v2 and v3 have 32768 tokens, v1 has 32000.
_package = find_spec("mistral_common")
TOKENIZERS = _Tokenizers(
    (file.suffix[1:], file)
    for folder in (_package.submodule_search_locations if _package else ())
    for file in Path(folder, "data").glob("*.model.v[123]")
)


def write_checkpoint(folder: Path, seed: int = 0, **changes) -> transformers.MistralForCausalLM:
    """Writes a random Mistral of two layers to `folder` in Hugging Face format, fp32.

    `changes` go to transformers' MistralConfig.
    """
    settings = {
        "vocab_size": 131,
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    }
    torch.manual_seed(seed)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**(settings | changes)))
    # As initialised, logits hardly differ and attention hardly matters.
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.eval().save_pretrained(folder)
    return model
