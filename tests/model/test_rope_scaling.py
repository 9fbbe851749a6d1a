"""mistral_ext.model.rope_scaling, and Llama models: as transformers computes them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mistral_ext import Mistral
from mistral_ext.model import rope
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.rope_scaling import Factors
from mistral_ext.weights.folder import config_json

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA_3,
    "yarn": YARN,
    "yarn, whole": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, attention": YARN | {"attention_factor": 1.5},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
}
KINDS = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)


def llama_config(**changes) -> transformers.LlamaConfig:
    settings = {
        "vocab_size": 131,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return transformers.LlamaConfig(**(settings | changes))


@KINDS
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies(scaling, theta):
    theirs = llama_config(rope_parameters=scaling | {"rope_theta": theta}, head_dim=128)
    expected, attention = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    ours = MistralConfig.from_hf(theirs.to_dict())
    frequencies = rope.frequencies(ours.rope_theta, ours.head_dim, "cpu", ours.rope_scaling)
    # transformers computes them in fp32.
    torch.testing.assert_close(frequencies.float(), expected, rtol=2e-6, atol=0)
    assert (ours.attention_scale or 128**-0.5) == pytest.approx(attention**2 / 128**0.5)


def test_factors_of_each_frequency():
    factors = Factors((1.0, 2.0, 4.0, 8.0))
    scaled = rope.frequencies(1e4, 8, "cpu", factors)
    assert torch.equal(scaled * torch.tensor(factors.factors), rope.frequencies(1e4, 8))


@pytest.mark.parametrize(
    "scaling", [*SCALINGS.values(), {"rope_type": "factors", "factors": [2.0]}]
)
def test_a_written_config_is_read_as_the_same(scaling):
    values = llama_config().to_dict() | {"rope_parameters": scaling | {"rope_theta": 1e4}}
    config = MistralConfig.from_hf(values)
    assert config.rope_scaling is not None
    assert MistralConfig.from_hf(config_json(config)) == config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, *SCALINGS.values()], ids=["none", *SCALINGS]
)
def test_llama_logits(scaling, tied, tmp_path):
    torch.manual_seed(0)
    config = llama_config(rope_parameters=scaling | {"rope_theta": 1e4}, tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():  # as initialised, attention hardly matters
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(131, (200,))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    llm = Mistral.from_pretrained(tmp_path, progress=False)
    assert llm.config.sliding_window is None
    torch.testing.assert_close(llm.logits(ids, chunk=77), expected, rtol=1e-4, atol=2e-4)


def test_dynamic_scaling_begins_where_the_engine_ends(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(llama_config(rope_parameters=scaling)).eval()
    theirs.save_pretrained(tmp_path)
    llm = Mistral.from_pretrained(tmp_path, progress=False)
    ids = torch.randint(131, (256,))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(llm.logits(ids), expected, rtol=1e-4, atol=2e-4)
    with pytest.raises(ValueError, match="token_ids has 257 tokens, expected up to 256"):
        llm.logits([1] * 257)


def test_llama_defaults():
    theirs = transformers.LlamaConfig()
    ours = MistralConfig.from_hf({"model_type": "llama"})
    assert (ours.hidden_dim, ours.n_kv_heads, ours.max_positions, ours.sliding_window) == (
        theirs.intermediate_size,
        theirs.num_key_value_heads,
        theirs.max_position_embeddings,
        None,
    )
    # transformers ignores a window here.
    assert (
        MistralConfig.from_hf({"model_type": "llama", "sliding_window": 8}).sliding_window is None
    )
