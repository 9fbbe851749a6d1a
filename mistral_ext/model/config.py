"""The hyperparameters of a Mistral model, from the values in either of two kinds of files.

Hugging Face folders describe a model in ``config.json``, Mistral's own folders in ``params.json``.
mistral_ext/weights/folder.py reads the files. The values of either file become a
:class:`MistralConfig`, with Mistral's names. Settings for arithmetic that this engine does not have
(biases, experts, other kinds of RoPE) raise an error. Keys that are not known are ignored.

A Llama is a Mistral without a window, so ``model_type: llama`` is read too (TinyLlama, Llama 2 and
3, SmolLM2).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from mistral_ext.model.rope_scaling import RopeScaling, Yarn, is_positive, scaling_from_hf

# For each field its key in config.json, and transformers' default if the key is missing.
_HF_KEYS = {
    "vocab_size": ("vocab_size", 32000),
    "dim": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 32),
    "n_heads": ("num_attention_heads", 32),
    "n_kv_heads": ("num_key_value_heads", 8),
    "hidden_dim": ("intermediate_size", 14336),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "sliding_window": ("sliding_window", 4096),
    "max_positions": ("max_position_embeddings", 131072),
    "bos_id": ("bos_token_id", 1),
    "eos_ids": ("eos_token_id", 2),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
_HF_DEFAULT_ROPE_THETA = 1e4
# The values of "architectures" in config.json for models without an output matrix. Such a model
# ends with the last norm.
_EMBEDDING_MODELS = (["MistralModel"], ["LlamaModel"])
# The defaults of transformers' LlamaConfig that differ from those of MistralConfig. None stands for
# n_heads.
_LLAMA_DEFAULTS = {"n_kv_heads": None, "hidden_dim": 11008, "max_positions": 2048}

# The kinds of attention that `layer_types` may name.
_LAYER_TYPES = ("full_attention", "sliding_attention")

# Keys of params.json that have the name of the field. They have no default.
_PARAMS_KEYS = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "norm_eps")
# Keys of params.json for the number of positions. The releases of the 7B have none of them.
_PARAMS_POSITIONS = ("max_seq_len", "max_position_embeddings")
# Values for what params.json does not say. They are the same in all three releases of the 7B.
_PARAMS_DEFAULTS = {"max_positions": 32768, "bos_id": 1, "eos_ids": 2}

# The names under which weights of a layer may be joined to one matrix, to multiply them in one
# pass. {} stands for the index of the layer.
JOINED_QKV = "layers.{}.attention.wqkv.weight"  # wq, wk and wv
JOINED_GATE_UP = "layers.{}.feed_forward.w13.weight"  # w1 and w3

# By default a cache has room for at least this many tokens, even if memory is short, because a
# request that is larger than the cache is refused. If all sequences together can never have so many
# tokens, the cache is smaller.
LEAST_CACHE_TOKENS = 4096

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class OverrideError(ValueError):
    """A value that the caller has given for a field is wrong. The model's file is not the cause."""


class _FieldError(ValueError):
    """The value of a field is wrong, by itself or together with the values of `others`, which are
    names of other fields."""

    def __init__(self, field: str, value: object, expected: str, *others: str) -> None:
        # If the error is pickled for another process, it is made there by calling this function
        # with these arguments.
        super().__init__(field, value, expected, *others)
        self.fields = (field, *others)
        self.as_argument = f"{field} is {value!r}, expected {expected}"

    def __str__(self) -> str:
        field, value, expected = self.args[:3]
        key = _HF_KEYS.get(field, (field,))[0]
        label = field if key == field else f"{field} ({key})"
        return f"{label} is {value!r}, expected {expected}"


@dataclass(frozen=True)
class MistralConfig:
    """Shapes and constants of one model.

    Raises:
        ValueError: a field is wrong. The message names the field (and its key in config.json), its
            value and what was expected.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int  # the number of query heads
    n_kv_heads: int  # the number of key/value heads, a divisor of n_heads
    head_dim: int  # even, for RoPE; n_heads * head_dim need not be dim
    hidden_dim: int  # the width of the feed-forward
    norm_eps: float
    rope_theta: float
    sliding_window: int | None  # W, the number of keys that a query sees, with its own; None: all
    max_positions: int  # the number of positions in training; a limit only without a window
    bos_id: int  # the token that begins a text
    eos_ids: tuple[int, ...]  # each of these tokens ends a text
    dtype: torch.dtype | None = None  # the dtype of the stored weights; None: not in the file
    # True: if the weights lack an output matrix, the embeddings serve as output matrix.
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None  # None: RoPE is not scaled
    writes_text: bool = True  # False: an embedding model, which has no output matrix

    def __post_init__(self) -> None:
        if isinstance(self.eos_ids, (int, list)):  # files have one id or a list
            ids = [self.eos_ids] if isinstance(self.eos_ids, int) else self.eos_ids
            object.__setattr__(self, "eos_ids", tuple(ids))
        for name in (
            "vocab_size",
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "hidden_dim",
            "max_positions",
        ):
            self._check(name, _is_int(getattr(self, name), minimum=1), "a positive integer")
        for name in ("norm_eps", "rope_theta"):
            self._check(name, is_positive(getattr(self, name)), "a positive number")
        self._check(
            "sliding_window",
            self.sliding_window is None or _is_int(self.sliding_window, minimum=1),
            "a positive integer, or null (None) for full attention",
        )
        self._check(
            "n_kv_heads",
            self.n_heads % self.n_kv_heads == 0,
            f"a divisor of n_heads ({self.n_heads})",
            "n_heads",
        )
        self._check("head_dim", self.head_dim % 2 == 0, "an even number: RoPE rotates pairs")
        self._check(
            "bos_id",
            _is_int(self.bos_id) and self.bos_id < self.vocab_size,
            f"a token id below vocab_size ({self.vocab_size})",
            "vocab_size",
        )
        self._check(
            "eos_ids",
            isinstance(self.eos_ids, tuple)
            and all(_is_int(i) and i < self.vocab_size for i in self.eos_ids),
            f"token ids below vocab_size ({self.vocab_size})",
            "vocab_size",
        )
        self._check(
            "dtype",
            self.dtype is None or self.dtype in _DTYPES.values(),
            f"one of {', '.join(_DTYPES)}",
        )

    @property
    def attention_scale(self) -> float | None:
        """The factor of attention's scores. None: 1 / sqrt(head_dim)."""
        if not isinstance(self.rope_scaling, Yarn):
            return None
        return self.rope_scaling.attention_factor**2 / math.sqrt(self.head_dim)

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Returns the number of bytes of a token's keys and values in all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * dtype.itemsize

    def _check(self, name: str, valid: bool, expected: str, *others: str) -> None:
        """Raises an error about the field `name` if `valid` is False. `others` are the other fields
        whose values decide whether it is valid."""
        if not valid:
            raise _FieldError(name, getattr(self, name), expected, *others)

    @classmethod
    def from_hf(cls, values: dict[str, Any], **overrides: Any) -> MistralConfig:
        """Makes the configuration from the values of a Hugging Face ``config.json``, of any version
        of transformers.

        For a key that is missing or null, the default of transformers' ``MistralConfig`` counts, or
        that of ``LlamaConfig`` for Llama models. (It is not always the value of Mistral 7B.) Two
        keys are exceptions: a ``sliding_window`` of null means that there is no window, and a
        ``num_key_value_heads`` of null that there are as many key/value heads as query heads. A
        Llama never has a window, nor has a model whose ``layer_types`` are all "full_attention".

        Args:
            values: the contents of the file.
            overrides: the caller's values for fields, which replace those of the file.

        Raises:
            ValueError, TypeError: a value is wrong or not supported. The message names the key or
                field.
        """
        _refuse_unless(values, "model_type", "mistral", "llama")
        is_llama = values["model_type"] == "llama"
        _refuse_unless(values, "hidden_act", "silu", default="silu")
        _refuse_if_set(values, "attention_bias", "mlp_bias")
        layer_types = set(map(str, values.get("layer_types") or ()))
        if len(layer_types) > 1:
            raise ValueError(
                f"layer_types is {values['layer_types']!r}, expected the same kind of attention in "
                "every layer"
            )
        if not layer_types <= set(_LAYER_TYPES):
            raise ValueError(
                f"layer_types has {min(layer_types)!r}, expected {' or '.join(_LAYER_TYPES)}"
            )

        fields: dict[str, Any] = {}
        for name, (key, default) in _HF_KEYS.items():
            missing = _LLAMA_DEFAULTS.get(name, default) if is_llama else default
            value = values.get(key, missing)
            fields[name] = missing if value is None and key != "sliding_window" else value
        if values.get("num_key_value_heads", fields["n_kv_heads"]) is None:
            fields["n_kv_heads"] = fields["n_heads"]
        if is_llama or layer_types == {"full_attention"}:
            fields["sliding_window"] = None
        fields["head_dim"] = values.get("head_dim")
        rope = _hf_rope(values)
        fields["rope_theta"] = rope.get(
            "rope_theta", values.get("rope_theta", _HF_DEFAULT_ROPE_THETA)
        )
        fields["rope_scaling"] = scaling_from_hf(rope, fields["max_positions"])
        if "dynamic" in rope.values() and fields["sliding_window"] is not None:
            raise ValueError("rope_type is 'dynamic', expected another kind with a sliding_window")
        fields["dtype"] = _dtype(values)
        fields["writes_text"] = values.get("architectures") not in _EMBEDDING_MODELS
        return cls._build(fields, overrides)

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a ``config.json`` that :meth:`from_hf` reads as this
        configuration. The model must not be an embedding model."""
        values: dict[str, Any] = {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
        }
        for name, (key, _) in _HF_KEYS.items():
            values[key] = getattr(self, name)
        values["head_dim"] = self.head_dim
        values["rope_theta"] = self.rope_theta
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_hf()
        if self.dtype is not None:
            values["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_params(cls, values: dict[str, Any], **overrides: Any) -> MistralConfig:
        """Makes the configuration from the values of Mistral's ``params.json``.

        Without a ``rope_theta``, as in the first release, theta is 1e4 if there is a window, else
        1e6. Some files call the window ``_sliding_window``. The file has no token ids, and that of
        the 7B has no number of positions, so those of the 7B releases are taken. Files of newer
        models have the number as ``max_seq_len`` or ``max_position_embeddings``; the smaller
        counts.

        Args, Raises: as in :meth:`from_hf`.
        """
        _refuse_unless(values, "model_type", "transformer", default="transformer")
        if values.get("causal") is False:
            raise ValueError("causal is False, expected True: it is not supported")
        _refuse_if_set(
            values,
            "moe",
            "quantization",
            "vision_encoder",
            "yarn",
            "llama_4_scaling",
            "use_biases",
        )

        fields = {key: values[key] for key in _PARAMS_KEYS if key in values}
        fields |= _PARAMS_DEFAULTS
        positions = {key: values[key] for key in _PARAMS_POSITIONS if values.get(key) is not None}
        for key, value in positions.items():
            if not _is_int(value, minimum=1):
                raise ValueError(f"{key} is {value!r}, expected a positive integer")
        if positions:
            fields["max_positions"] = min(positions.values())
        fields["head_dim"] = values.get("head_dim")
        window = values.get("sliding_window")
        window = values.get("_sliding_window") if window is None else window
        fields["sliding_window"] = window
        fields["rope_theta"] = values.get("rope_theta") or (1e6 if window is None else 1e4)
        fields["dtype"] = _dtype(values)
        fields["tie_word_embeddings"] = bool(values.get("tied_embeddings"))
        missing = [key for key in _PARAMS_KEYS if key not in fields and key not in overrides]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        return cls._build(fields, overrides)

    @classmethod
    def _build(cls, fields: dict[str, Any], overrides: dict[str, Any]) -> MistralConfig:
        """Makes the configuration from the fields of a file and the caller's values for fields.

        Raises:
            OverrideError: a caller's value is wrong.
            ValueError: a field of the file is wrong.
            TypeError: a caller's value is for a field that does not exist.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in overrides if name not in names]
        if unknown:
            raise TypeError(
                f"unknown configuration field {unknown[0]!r}, expected one of {', '.join(names)}"
            )
        fields = fields | overrides
        try:
            if fields["head_dim"] is None:
                fields["head_dim"] = _derived_head_dim(fields["dim"], fields["n_heads"])
            return cls(**fields)
        except _FieldError as error:
            if any(field in overrides for field in error.fields):
                raise OverrideError(error.as_argument) from error
            raise


def _is_int(value: Any, minimum: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _derived_head_dim(dim: Any, n_heads: Any) -> int:
    if not (_is_int(dim, minimum=1) and _is_int(n_heads, minimum=1) and dim % n_heads == 0):
        raise _FieldError(
            "dim",
            dim,
            f"a multiple of n_heads (num_attention_heads), which is {n_heads!r}: head_dim is "
            "missing",
            "n_heads",
        )
    return int(dim // n_heads)


def _refuse_unless(values: dict[str, Any], key: str, *expected: str, default: Any = None) -> None:
    value = values.get(key, default)
    if value not in expected:
        raise ValueError(f"{key} is {value!r}, expected {' or '.join(map(repr, expected))}")


def _refuse_if_set(values: dict[str, Any], *keys: str) -> None:
    for key in keys:
        if values.get(key):
            raise ValueError(f"{key} is {values[key]!r}, expected none: it is not supported")


def _hf_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of RoPE's scaling in a ``config.json``, or {} if there are none.

    Newer versions of transformers have one object ``rope_parameters`` in place of ``rope_scaling``
    and ``rope_theta``. So ``rope_theta`` may be among the settings.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}, expected an object")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {partial!r}, expected 1")
    return rope


def _dtype(values: dict[str, Any]) -> torch.dtype | None:
    """Returns the dtype in which the weights are stored, or None if the file does not say it. Old
    versions of transformers call the key ``torch_dtype``."""
    name = values.get("dtype", values.get("torch_dtype"))
    if name is None:
        return None
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
