"""Models in GGUF files: the same weights, configuration and logits as in transformers' format."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
import transformers
from adapters import write_peft
from checkpoints import write_checkpoint
from gguf_files import write_model

from mistral_ext import Mistral
from mistral_ext.model.config import OverrideError
from mistral_ext.model.rope_scaling import Factors, Linear, Yarn
from mistral_ext.ops import Quantized, Weight
from mistral_ext.weights.checkpoint import load_weights
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.gguf_model import gguf_name
from mistral_ext.weights.quantize_checkpoint import quantize_checkpoint

MIXED = {"token_embd": "Q8_0", "attn_v": "Q5_1", "ffn_down": "F16", "norm": "F32", "blk": "Q4_0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> transformers.MistralForCausalLM:
    return write_checkpoint(
        tmp_path_factory.mktemp("hf"), sliding_window=None, intermediate_size=256
    )


def written(folder, model, *args, **kwargs):
    path = folder / "model.gguf"
    write_model(path, model, *args, **kwargs)
    return path


def logits_of(model, ids):
    with torch.inference_mode():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("types", [{}, MIXED], ids=["F32", "mixed"])
def test_logits_are_those_of_the_decoded_weights(types, model, tmp_path, exact_products):
    path = written(tmp_path, model, types)
    llm = Mistral.from_pretrained(path, dtype=torch.float32, progress=False)
    ids = torch.randint(131, (50,))
    torch.testing.assert_close(llm.logits(ids), logits_of(model, ids), rtol=1e-4, atol=2e-4)


def test_weights_have_the_names_and_rows_of_other_formats(model, tmp_path):
    path = written(tmp_path, model, MIXED)
    model.save_pretrained(tmp_path / "hf")
    expected = load_weights(read_folder(tmp_path / "hf"))
    weights = load_weights(read_folder(path), dtype=torch.float32)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        kept = isinstance(weight, Quantized)
        assert torch.equal(weight.dequantize() if kept else weight, expected[name]), name


# As llama.cpp mixes types in some layers of a file "Q4_K_M".
Q4_K_M = {"norm": "F32", "attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_output": "Q4_K"}
Q4_K_M |= {"output": "Q6_K", "token_embd": "Q4_K", "blk": "Q4_K"}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> transformers.MistralForCausalLM:
    """Its rows are whole blocks of 256 values."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    return write_checkpoint(tmp_path_factory.mktemp("wide"), sliding_window=None, **sizes)


@pytest.mark.parametrize("tokens", [5, 50])  # multiplied by the kernels for few and for many
@pytest.mark.parametrize(
    "types",
    [Q4_K_M, {"norm": "F32", "": "Q5_K"}, {"norm": "F32", "attn": "IQ4_XS", "": "IQ4_NL"}],
    ids=["Q4_K_M", "Q5_K", "IQ4"],
)
def test_logits_of_matrices_in_blocks(types, tokens, wide_model, tmp_path, exact_products):
    path = written(tmp_path, wide_model, types)
    llm = Mistral.from_pretrained(path, dtype=torch.float32, progress=False)
    ids = torch.randint(131, (tokens,))
    expected = logits_of(wide_model, ids)
    torch.testing.assert_close(llm.logits(ids), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tokens", [5, 50])
def test_logits_with_rounded_activations_are_nearly_those(tokens, wide_model, tmp_path):
    path = written(tmp_path, wide_model, Q4_K_M)
    llm = Mistral.from_pretrained(path, dtype=torch.float32, progress=False)
    ids = torch.randint(131, (tokens,))
    expected = logits_of(wide_model, ids)
    error = (llm.logits(ids) - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.05


def test_an_adapter_over_matrices_in_blocks(tmp_path, exact_products):
    model = write_checkpoint(tmp_path / "hf", sliding_window=None, intermediate_size=256)
    path = written(tmp_path, model, {"norm": "F32", "": "Q4_0"})
    adapted = write_peft(model, tmp_path / "adapter")
    adapters = {"name": tmp_path / "adapter"}
    llm = Mistral.from_pretrained(path, dtype=torch.float32, progress=False, adapters=adapters)
    ids = torch.randint(131, (20,))
    expected = logits_of(adapted, ids)
    torch.testing.assert_close(llm.logits(ids, adapter="name"), expected, rtol=1e-4, atol=1e-3)


KEPT = {"embd": "Q4_1", "attn_q": "Q8_0", "attn_v": "Q5_0", "norm": "F32", "blk": "Q4_0"}


def test_matrices_keep_their_numbers(model, tmp_path):
    path = written(tmp_path, model, KEPT)
    weights = load_weights(read_folder(path))
    formats = {name: w.format for name, w in weights.items() if isinstance(w, Quantized)}
    assert formats.pop("tok_embeddings.weight") == "q4_1"
    for suffix in ("wq", "wv"):
        assert {formats.pop(f"layers.{i}.attention.{suffix}.weight") for i in range(2)} == {"q8_0"}
    assert len(formats) == 2 * 5
    assert set(formats.values()) == {"q4_0"}
    quantized = load_weights(read_folder(path), quantize="int4")
    assert quantized["layers.0.attention.wq.weight"].format == "iq4_nl"
    assert quantized["tok_embeddings.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("types", "dtype", "expected"),
    [
        (MIXED, None, torch.bfloat16),
        ({"embd": "F16"}, None, torch.float16),
        ({}, None, torch.float32),
        (MIXED, torch.float16, torch.float16),
    ],
)
def test_dtype(types, dtype, expected, model, tmp_path):
    weights = load_weights(read_folder(written(tmp_path, model, types)), dtype=dtype)
    plain = [weight for weight in weights.values() if isinstance(weight, torch.Tensor)]
    assert {weight.dtype for weight in plain} == {expected}


def is_same(ours: Weight, theirs: Weight) -> bool:
    if isinstance(ours, Quantized) and isinstance(theirs, Quantized):
        tensors = zip(ours[:2], theirs[:2], strict=True)
        return ours.format == theirs.format and all(torch.equal(*pair) for pair in tensors)
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_from_the_exact_weights(quantize, model, tmp_path):
    path = written(tmp_path, model, MIXED)
    model.save_pretrained(tmp_path / "hf")
    expected = load_weights(read_folder(tmp_path / "hf"), torch.bfloat16, quantize=quantize)
    weights = load_weights(read_folder(path), quantize=quantize)
    for name, weight in weights.items():
        assert is_same(weight, expected[name]), name


def test_what_is_decoded_is_said(model, tmp_path, caplog):
    load_weights(read_folder(written(tmp_path, model, MIXED)))
    assert "model.gguf: Q5_1 become bfloat16 as they are read" in caplog.text
    caplog.clear()
    load_weights(read_folder(written(tmp_path, model, KEPT)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'model.gguf'}: Q5_0 become q8_0 as they are read"
    ]
    caplog.clear()
    load_weights(read_folder(written(tmp_path, model, MIXED)), quantize="int8")
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "Q8_0 become bfloat16 as they are read",
        "Q4_0, Q5_1 become q8_0 as they are read",
    ]
    caplog.clear()
    load_weights(read_folder(written(tmp_path, model)))
    assert not caplog.text


def test_tied_output(tmp_path, exact_products):
    model = write_checkpoint(tmp_path, sliding_window=None, tie_word_embeddings=True)
    path = written(tmp_path, model, MIXED)
    ids = torch.randint(131, (20,))
    for folder in (path, path.parent / "only"):
        if folder != path:
            folder.mkdir()
            shutil.move(path, folder)
        llm = Mistral.from_pretrained(folder, dtype=torch.float32, progress=False)
        assert llm.config.tie_word_embeddings
        torch.testing.assert_close(llm.logits(ids), logits_of(model, ids), rtol=1e-4, atol=2e-4)


def test_a_folder_with_several_files_names_them(tmp_path):
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    message = r"holds 2 models in GGUF.*: a\.gguf, b-00001-of-00002\.gguf"
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_other_weights_of_a_folder_come_first(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert read_folder(tmp_path).gguf is None


def test_quantize_into_a_folder_is_refused(model, tmp_path):
    path = written(tmp_path, model)
    with pytest.raises(ValueError, match=r"model\.gguf' is a GGUF file, expected the folder"):
        quantize_checkpoint(path, tmp_path / "new", 8)
    assert not (tmp_path / "new").exists()


# The configuration


def config_of(tmp_path, model, metadata=None, tensors=None, **overrides):
    path = written(tmp_path, model, metadata=metadata, tensors=tensors)
    return read_folder(path, **overrides).config


def test_config(model, tmp_path):
    config = config_of(tmp_path, model)
    assert (config.vocab_size, config.dim, config.n_layers) == (131, 128, 2)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 64)
    assert (config.hidden_dim, config.max_positions) == (256, 32768)
    assert (config.bos_id, config.eos_ids, config.sliding_window) == (1, (2,), None)
    assert not config.tie_word_embeddings


TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", *map(str, range(126))]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"tokenizer.ggml.eot_token_id": 7}, (2, 7)),
        ({"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}, (2, 7, 8)),
        ({"tokenizer.ggml.tokens": TOKENS}, (2, 3, 4)),
        ({"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.eot_token_id": 4}, (2, 4, 3)),
        # A fine-tune in ChatML may end a text with the token of its base, as in llama.cpp.
        (
            {
                "tokenizer.ggml.tokens": TOKENS,
                "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 128],
                "tokenizer.ggml.eos_token_id": 3,
            },
            (3, 4, 2),
        ),
        (
            {
                "tokenizer.ggml.tokens": TOKENS,
                "tokenizer.ggml.token_type": [1] * 131,
                "tokenizer.ggml.eos_token_id": 3,
            },
            (3, 4),
        ),
    ],
)
def test_every_token_that_ends_a_turn(metadata, expected, model, tmp_path):
    assert config_of(tmp_path, model, metadata).eos_ids == expected


MISTRAL_7B = {
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14336,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.attention.key_length": 128,
    "llama.attention.value_length": 128,
    "llama.rope.dimension_count": 128,
}


@pytest.mark.parametrize(
    ("metadata", "overrides", "window", "said"),
    [
        ({"llama.rope.freq_base": 1e4}, {}, 4096, "with a window of 4096"),
        ({"llama.rope.freq_base": None}, {}, 4096, "with a window of 4096"),
        ({"llama.rope.freq_base": 1e6}, {}, None, "with none"),
        ({"llama.rope.freq_base": 1e4}, {"sliding_window": None}, None, ""),
        ({"llama.rope.freq_base": 1e4, "llama.attention.sliding_window": 512}, {}, 512, ""),
        ({"llama.feed_forward_length": 11008, "llama.rope.freq_base": 1e4}, {}, None, ""),
    ],
)
def test_window(metadata, overrides, window, said, model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "mistral_ext"):
        config = config_of(tmp_path, model, MISTRAL_7B | metadata, **overrides)
    assert config.sliding_window == window
    assert said in caplog.text
    assert bool([r for r in caplog.records if r.name == "mistral_ext"]) == bool(said)


def test_wrong_override_is_no_fault_of_the_file(model, tmp_path):
    with pytest.raises(OverrideError, match=r"^sliding_window is -2, expected"):
        config_of(tmp_path, model, {}, sliding_window=-2)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, Linear(4)),
        ({"llama.rope.scale_linear": 2.0}, Linear(2)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 4096,
            },
            Yarn(8, 4096, 0.1 * float(np.log(8)) + 1),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 4096,
                "llama.rope.scaling.yarn_attn_factor": 1.5,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            Yarn(8, 4096, 1.5, 16, 2),
        ),
    ],
)
def test_rope_scaling(metadata, expected, model, tmp_path):
    assert config_of(tmp_path, model, metadata).rope_scaling == expected


def test_factors_of_frequencies(model, tmp_path):
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = written(tmp_path, model, tensors={"rope_freqs.weight": factors})
    llm = Mistral.from_pretrained(path, progress=False)
    assert llm.config.rope_scaling == Factors(tuple(factors.tolist()))
    ids = torch.randint(131, (40,))
    expected = model.model.rotary_emb.inv_freq / torch.from_numpy(factors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.rotary_emb, "inv_freq", expected)
        torch.testing.assert_close(llm.logits(ids), logits_of(model, ids), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture is 'qwen2', expected llama or mistral"),
        ({"llama.block_count": None}, "llama.block_count is missing, expected an integer"),
        ({"llama.block_count": 3}, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, "unknown tensor 'blk.1"),
        ({"llama.embedding_length": "x"}, "llama.embedding_length is 'x', expected an integer"),
        ({"llama.attention.head_count": 0}, "n_heads .* is 0, expected a positive integer"),
        ({"llama.attention.value_length": 32}, "value_length is 32, expected 64"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32, expected 64"),
        ({"llama.expert_count": 8}, "expert_count: experts are not supported"),
        ({"llama.attention.causal": False}, "attention.causal is not true: not supported"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5, expected 1"),
        ({"llama.attention.head_count_kv": [1, 2]}, "head_count_kv is .*, expected an integer"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope', expected none, linear or yarn"),
        ({"llama.rope.scaling.type": "yarn"}, "factor of rope_scaling is 0.0, expected a pos"),
        ({"tokenizer.ggml.eos_token_id": 131}, "eos_ids .* is .*, expected token ids below vocab"),
        (
            {"llama.feed_forward_length": 96},
            r"'blk.0.ffn_gate.weight' .* has shape .*, expected \(96, 128\)",
        ),
    ],
)
def test_what_is_wrong_is_named(metadata, message, model, tmp_path):
    path = written(tmp_path, model, metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(read_folder(path))
    assert str(path) in str(error.value)


def test_biases_are_refused_by_name(model, tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(256, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"unknown tensor 'blk.0.attn_q.bias'"):
        load_weights(read_folder(written(tmp_path, model, tensors=bias)))


def test_names_of_weights():
    assert gguf_name("layers.11.feed_forward.w2.weight") == "blk.11.ffn_down.weight"
