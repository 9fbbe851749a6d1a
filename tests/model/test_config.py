"""mistral_ext.model.config: both file formats, their traps, and what must be refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import transformers

from mistral_ext.model.config import MistralConfig, OverrideError
from mistral_ext.weights.folder import read_folder

# What the releases ship, less the keys that nobody reads.
HF_V1 = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
PARAMS_V1 = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
V1 = {
    "vocab_size": 32000,
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "hidden_dim": 14336,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "max_positions": 32768,
    "bos_id": 1,
    "eos_ids": (2,),
}


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def write(folder, **files) -> None:
    """write(folder, config={...}) makes folder/config.json."""
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def test_hf_v1():
    assert MistralConfig.from_hf(HF_V1) == MistralConfig(**V1, dtype=torch.bfloat16)


def test_params_v1():
    assert MistralConfig.from_params(PARAMS_V1) == MistralConfig(**V1)


def test_hf_missing_keys_take_the_defaults_of_transformers():
    ours = MistralConfig.from_hf({"model_type": "mistral"})
    theirs = transformers.MistralConfig()
    assert ours == MistralConfig(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        hidden_dim=theirs.intermediate_size,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
        sliding_window=theirs.sliding_window,
        max_positions=theirs.max_position_embeddings,
        bos_id=theirs.bos_token_id,
        eos_ids=(theirs.eos_token_id,),
        tie_word_embeddings=theirs.tie_word_embeddings,
    )


def test_hf_as_the_installed_transformers_writes_it(tmp_path):
    transformers.MistralConfig(
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        sliding_window=None,
        head_dim=64,
        eos_token_id=[2, 7],
        dtype="float16",
    ).save_pretrained(tmp_path)
    config = read_folder(tmp_path).config
    assert (config.rope_theta, config.sliding_window) == (5e5, None)
    assert (config.head_dim, config.eos_ids, config.dtype) == (64, (2, 7), torch.float16)


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"rope_theta": 1e6}, "rope_theta", 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta", 1e6),
        ({"rope_scaling": None}, "rope_theta", 1e4),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 1e4),
        ({"sliding_window": None}, "sliding_window", None),
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 160}, "head_dim", 160),
        ({"num_key_value_heads": None}, "n_kv_heads", 32),
        ({"eos_token_id": [2, 5]}, "eos_ids", (2, 5)),
        ({"eos_token_id": None}, "eos_ids", (2,)),
        ({"dtype": "float32"}, "dtype", torch.float32),
        ({"torch_dtype": None}, "dtype", None),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window", 4096),
        ({"layer_types": ["full_attention"] * 32}, "sliding_window", None),
    ],
)
def test_hf_variants(change, field, expected):
    assert getattr(MistralConfig.from_hf(HF_V1 | change), field) == expected


@pytest.mark.parametrize(
    ("change", "window", "theta"),
    [
        ({}, 4096, 1e4),
        ({"rope_theta": 1e6}, 4096, 1e6),
        ({"sliding_window": None}, None, 1e6),
        ({"sliding_window": None, "_sliding_window": 1024}, 1024, 1e4),
        ({"sliding_window": None, "rope_theta": 5e5}, None, 5e5),
    ],
)
def test_params_window_decides_a_missing_theta(change, window, theta):
    config = MistralConfig.from_params(PARAMS_V1 | change)
    assert (config.sliding_window, config.rope_theta) == (window, theta)


@pytest.mark.parametrize(
    ("change", "positions"),
    [
        ({}, 32768),
        ({"max_seq_len": 8192}, 8192),
        ({"max_position_embeddings": 131072}, 131072),
        ({"max_seq_len": 65536, "max_position_embeddings": 131072}, 65536),
        ({"max_seq_len": None, "max_position_embeddings": 131072}, 131072),
    ],
)
def test_params_may_say_the_number_of_positions(change, positions):
    """vLLM reads both keys of params.json. mistral-inference reads none of them."""
    assert MistralConfig.from_params(PARAMS_V1 | change).max_positions == positions
    assert MistralConfig.from_params(PARAMS_V1 | change, max_positions=7).max_positions == 7


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "8192", True])
def test_wrong_number_of_positions_in_params_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"^max_seq_len is {wrong!r}, expected a positive int"):
        MistralConfig.from_params(PARAMS_V1 | {"max_seq_len": wrong})


def test_overrides_win_over_the_file(tmp_path):
    write(tmp_path, config=HF_V1)
    config = read_folder(tmp_path, sliding_window=None, rope_theta=1e6, eos_ids=[2, 3]).config
    assert (config.sliding_window, config.rope_theta, config.eos_ids) == (None, 1e6, (2, 3))


def test_override_of_the_window_leaves_theta_as_the_file_means_it():
    assert MistralConfig.from_params(PARAMS_V1, sliding_window=None).rope_theta == 1e4


def test_override_repairs_a_bad_value():
    assert MistralConfig.from_params(PARAMS_V1 | {"vocab_size": -1}, vocab_size=7).vocab_size == 7


def test_override_of_dim_moves_a_derived_head_dim():
    assert MistralConfig.from_hf(HF_V1, dim=2048).head_dim == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sliding_window": -2}, "^sliding_window is -2, expected a positive integer"),
        ({"max_positions": 0}, "^max_positions is 0, expected a positive integer$"),
        ({"rope_theta": 0.0}, "^rope_theta is 0.0, expected a positive number$"),
        ({"dim": 4100}, "^dim is 4100, expected a multiple of n_heads"),
        (
            {"n_heads": 7},
            r"^dim is 4096, expected a multiple of n_heads .* is 7: head_dim is missing",
        ),
        ({"n_heads": 4}, r"^n_kv_heads is 8, expected a divisor of n_heads \(4\)$"),
        ({"vocab_size": 1}, r"^bos_id is 1, expected a token id below vocab_size \(1\)$"),
        ({"vocab_size": 2}, r"^eos_ids is \(2,\), expected token ids below vocab_size \(2\)$"),
    ],
)
@pytest.mark.parametrize("file", ["config", "params"])
def test_wrong_override_is_no_fault_of_the_file(override, message, file, tmp_path):
    hf = {name: value for name, value in HF_V1.items() if name != "head_dim"}
    params = {name: value for name, value in PARAMS_V1.items() if name != "head_dim"}
    write(tmp_path, **({"config": hf} if file == "config" else {"params": params}))
    with pytest.raises(OverrideError, match=message):
        read_folder(tmp_path, **override)


def test_errors_can_be_pickled():
    """A worker process sends them to another process."""
    with pytest.raises(ValueError, match=r"dim \(hidden_size\) is 4100, expected") as found:
        MistralConfig.from_hf(HF_V1 | {"hidden_size": 4100, "head_dim": None})
    again = pickle.loads(pickle.dumps(found.value))
    assert type(again) is type(found.value)
    assert str(again) == str(found.value)


def test_fault_of_the_file_names_it_beside_overrides(tmp_path):
    write(tmp_path, config=HF_V1 | {"sliding_window": -2})
    with pytest.raises(ValueError, match=r"config\.json: sliding_window is -2"):
        read_folder(tmp_path, max_positions=7)


def test_unknown_override_lists_the_fields():
    with pytest.raises(TypeError, match=r"'window'.*sliding_window"):
        MistralConfig.from_hf(HF_V1, window=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', expected 'mistral' or 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, expected none"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method is None"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "rope_type is 'longrope', expected one of",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor of rope_scaling is None, expected"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of rope_scaling is '2', exp"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_type is 'dynamic', .* sliding_window",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, expec",
        ),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* same kind"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types has 'chunked_attention', exp"),
        ({"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ({"sliding_window": -1}, "sliding_window is -1, expected a positive integer"),
        ({"sliding_window": True}, "sliding_window is True, expected a positive integer"),
        ({"hidden_size": 0}, "hidden_size.* is 0, expected a (multiple|positive integer)"),
        ({"hidden_size": 4100}, r"dim \(hidden_size\) is 4100, expected a multiple .* 32:"),
        ({"num_hidden_layers": "32"}, r"n_layers \(num_hidden_layers\) is '32', expec"),
        ({"num_key_value_heads": 5}, r"\(num_key_value_heads\) is 5, expected a divisor"),
        ({"head_dim": 127}, "head_dim is 127, expected an even"),
        ({"rms_norm_eps": 0.0}, r"norm_eps \(rms_norm_eps\) is 0.0, expected a positive"),
        ({"rms_norm_eps": float("nan")}, "norm_eps .*is nan, expected a positive"),
        ({"vocab_size": -1}, "vocab_size is -1, expected a positive integer"),
        ({"bos_token_id": 32000}, r"bos_id .*is 32000, .*below vocab_size \(32000\)"),
        ({"eos_token_id": [2, -5]}, r"eos_ids .*is \(2, -5\), .*below vocab_size \(32000\)"),
        ({"eos_token_id": "2"}, r"eos_ids .*is '2', .*below vocab_size \(32000\)"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', expected one of bfloat16"),
    ],
)
def test_hf_refused(tmp_path, change, message):
    write(tmp_path, config=HF_V1 | change)
    with pytest.raises(ValueError, match=message) as error:
        read_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PARAMS_V1 | {"moe": {"num_experts": 8}}, "moe is .*, expected none"),
        (PARAMS_V1 | {"yarn": {"factor": 4}}, "yarn is .*, expected none"),
        (PARAMS_V1 | {"model_type": "mamba"}, "model_type is 'mamba', expected 'transformer'"),
        (PARAMS_V1 | {"causal": False}, "causal is False, expected True"),
        (PARAMS_V1 | {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is .*, expected none"),
        (PARAMS_V1 | {"sliding_window": [4096, 8192]}, r"sliding_window is \[4096, 8192\], exp"),
        (PARAMS_V1 | {"vocab_size": -1}, "vocab_size is -1, expected a positive integer"),
        (without(PARAMS_V1, "n_kv_heads", "vocab_size"), "missing vocab_size, n_kv_heads"),
    ],
)
def test_params_refused(tmp_path, values, message):
    write(tmp_path, params=values)
    with pytest.raises(ValueError, match=message) as error:
        read_folder(tmp_path)
    assert str(tmp_path / "params.json") in str(error.value)
