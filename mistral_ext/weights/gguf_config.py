"""Reads the configuration of a model from the metadata of a GGUF file."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mistral_ext.model.config import MistralConfig, OverrideError
from mistral_ext.weights.gguf_blocks import decode
from mistral_ext.weights.gguf_file import Gguf
from mistral_ext.weights.gguf_model import FREQUENCY_FACTORS, gguf_name

_log = logging.getLogger("mistral_ext")

ARCHITECTURES = ("llama", "mistral")

# Settings of YaRN, and their names in Hugging Face's files.
_YARN_NAMES = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}

# dim, n_layers, n_heads, n_kv_heads and hidden_dim of Mistral 7B. v0.1 and its fine-tunes have a
# window, but GGUF files do not mention it. v0.2 and later versions have no window. The base of RoPE
# tells which version a file has.
_MISTRAL_7B = (4096, 32, 32, 8, 14336)
_THETA_WITH_WINDOW = 1e4
_WINDOW = 4096

# Tokens that end a turn or a text. They are looked up in the vocabulary, because the metadata of
# many files name only one of them. llama.cpp ends a text at each of them, too.
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
)
_CONTROL = 3  # the type of control tokens


def gguf_config(file: Gguf, **overrides: Any) -> MistralConfig:
    """Reads the configuration of a model.

    Args:
        file: the result of `read_gguf`.
        overrides: fields of `MistralConfig`, which replace values of the file.

    Raises:
        ValueError: the file describes another kind of model, or lacks a part of its description.
            The message names the file and the key. Or an override is wrong. The message names it.
        TypeError: an override is not a field.
    """
    return _Metadata(file).config(overrides)


def _is_control(types: Any, token_id: int) -> bool:
    """Whether the types of tokens in a file call a token a control token."""
    sound = isinstance(types, np.ndarray) and token_id < len(types)
    return sound and bool(types[token_id] == _CONTROL)


class _Metadata:
    """Reads values from a file's metadata and checks them."""

    def __init__(self, file: Gguf) -> None:
        self._file = file
        self._prefix = self._text("general.architecture")
        if self._prefix not in ARCHITECTURES:
            raise self._error(
                f"general.architecture is {self._prefix!r}, expected {' or '.join(ARCHITECTURES)}"
            )

    def config(self, overrides: dict[str, Any]) -> MistralConfig:
        if self._int("expert_count", 0):
            raise self._error(f"{self._prefix}.expert_count: experts are not supported")
        if self._file.metadata.get(f"{self._prefix}.attention.causal", True) is not True:
            raise self._error(f"{self._prefix}.attention.causal is not true: not supported")
        embeddings = self._file.tensors.get(gguf_name("tok_embeddings.weight"))
        if embeddings is None:
            raise self._error("tensor 'token_embd.weight' is missing")
        n_heads = self._int("attention.head_count")
        dim = self._int("embedding_length")
        head_dim = self._int("attention.key_length", dim // max(1, n_heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._int(key, head_dim) != head_dim:
                raise self._error(
                    f"{self._prefix}.{key} is {self._int(key)}, expected {head_dim} as of the keys"
                )
        eos_ids = self._eos_ids()
        values = {
            "model_type": "mistral",
            "vocab_size": embeddings.shape[0],
            "hidden_size": dim,
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": n_heads,
            "num_key_value_heads": self._int("attention.head_count_kv", n_heads),
            "intermediate_size": self._int("feed_forward_length"),
            "head_dim": head_dim,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 1e4),
            "max_position_embeddings": self._int("context_length"),
            "bos_token_id": self._token("bos", eos_ids[0]),
            "eos_token_id": eos_ids,
            "tie_word_embeddings": gguf_name("output.weight") not in self._file.tensors,
            "rope_scaling": self._rope_scaling(head_dim),
        }
        if "sliding_window" not in overrides:
            values["sliding_window"] = self._window(values)
        try:
            return MistralConfig.from_hf(values, **overrides)
        except OverrideError:
            raise
        except ValueError as error:
            raise self._error(str(error)) from error

    def _window(self, values: dict[str, Any]) -> int | None:
        if stated := self._int("attention.sliding_window", 0):
            return stated
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        if tuple(values[key] for key in (*keys, "intermediate_size")) != _MISTRAL_7B:
            return None
        window = _WINDOW if values["rope_theta"] == _THETA_WITH_WINDOW else None
        _log.warning(
            "%s does not say whether the model has a sliding window; its shape and its base of "
            "RoPE, %g, are those of a Mistral 7B with %s (sliding_window overrides that)",
            self._file.path,
            values["rope_theta"],
            f"a window of {window}" if window else "none",
        )
        return window

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        kind = self._text(f"{self._prefix}.rope.scaling.type", "none")
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        if factor and f"{self._prefix}.rope.scaling.type" not in self._file.metadata:
            kind = "linear"  # old files have a factor without a type
        attention = self._number("rope.scaling.attn_factor", 1.0)
        if attention != 1:
            raise self._error(f"{self._prefix}.rope.scaling.attn_factor is {attention}, expected 1")
        scaling: dict[str, Any] | None = None
        if kind == "linear":
            scaling = {"rope_type": "linear", "factor": factor or 1.0}
        elif kind == "yarn":
            scaling = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": self._int(
                    "rope.scaling.original_context_length", self._int("context_length")
                ),
            }
            # llama.cpp's converter copies these values from the model's config.json, if they are
            # there.
            for key, name in _YARN_NAMES.items():
                if f"{self._prefix}.rope.scaling.{key}" in self._file.metadata:
                    scaling[name] = self._number(f"rope.scaling.{key}")
        elif kind != "none":
            raise self._error(
                f"{self._prefix}.rope.scaling.type is {kind!r}, expected none, linear or yarn"
            )
        factors = self._file.tensors.get(FREQUENCY_FACTORS)
        if factors is None:
            return scaling
        if factors.shape != (head_dim // 2,) or scaling is not None:
            raise self._error(
                f"tensor {FREQUENCY_FACTORS!r} of shape {factors.shape} with RoPE scaling "
                f"{kind!r}, expected shape {(head_dim // 2,)} and no other scaling"
            )
        return {"rope_type": "factors", "factors": decode(factors.rows(), factors.type)[0].tolist()}

    def _eos_ids(self) -> list[int]:
        """The ids of the tokens that end a text or a turn, each id once. The first is the
        end-of-text token."""
        ids = [self._token("eos", 2)]
        ids += [self._token(name, ids[0]) for name in ("eot", "eom")]
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        types = self._file.metadata.get("tokenizer.ggml.token_type")
        if isinstance(tokens, list):
            ends = [tokens.index(name) for name in _ENDS if name in tokens]
            # In some vocabularies "</s>" is text, a tag of HTML.
            ids += [i for i in ends if tokens[i] != "</s>" or _is_control(types, i)]
        return list(dict.fromkeys(ids))

    # Values of the metadata by their keys

    def _token(self, name: str, default: int) -> int:
        return int(self._value(f"tokenizer.ggml.{name}_token_id", (int,), "a token id", default))

    def _int(self, key: str, default: int | None = None) -> int:
        return int(self._value(f"{self._prefix}.{key}", (int,), "an integer", default))

    def _number(self, key: str, default: float | None = None) -> float:
        return float(self._value(f"{self._prefix}.{key}", (int, float), "a number", default))

    def _text(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, (str,), "a text", default))

    def _value(self, key: str, kinds: tuple[type, ...], expected: str, default: Any) -> Any:
        value = self._file.metadata.get(key, default)
        if value is None:
            raise self._error(f"{key} is missing, expected {expected}")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self._error(f"{key} is {value!r:.60}, expected {expected}")
        return value

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._file.path}: {problem}")
