"""Converts the names of weights in files.

In memory, weights have Mistral's names (layers.0.attention.wq.weight). Files in Hugging Face's
format have the names of transformers' causal models (model.layers.0.self_attn.q_proj.weight). Their
names lack "model." if the model was saved without its output matrix, and begin with
"base_model.model." if it was saved in peft's wrapper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from mistral_ext.weights.safetensors_file import StoredTensor

PEFT_PREFIX = "base_model.model."

_HF_MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_MISTRAL_MODULES = {module: name for name, module in _HF_MODULES.items()}
_EXAMPLE = "model.layers.0.self_attn.v_proj.weight"
# Old versions of transformers stored the RoPE frequencies. They are not read, because they follow
# from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def hugging_face_name(name: str) -> str:
    """Returns Hugging Face's name of a weight: layers.0.attention.wq.weight becomes
    model.layers.0.self_attn.q_proj.weight."""
    module = name.removesuffix(".weight")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{_HF_MODULES[module]}.weight"


def mistral_name(name: str) -> str:
    """The inverse of `hugging_face_name`.

    Raises:
        ValueError: no weight has this name.
    """
    module, prefix = name.removesuffix(".weight"), ""
    if (match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)) is not None:
        prefix, module = f"layers.{match[1]}.", match[2]
    found = f"{prefix}{_MISTRAL_MODULES.get(module, '')}.weight"
    try:
        is_same = hugging_face_name(found) == name
    except KeyError:
        is_same = False
    if not is_same:
        raise ValueError(
            f"tensor name is {name!r}, expected that of a weight, such as {_EXAMPLE!r}"
        )
    return found


def with_base_names(tensors: Iterable[StoredTensor], format: str) -> list[StoredTensor]:
    """Gives tensors of Hugging Face's format the names that transformers' causal models use. Keeps
    Mistral's names. Leaves out stored frequencies of RoPE.

    Args:
        tensors: the tensors with their names in the files.
        format: "hf" or "mistral", as in `mistral_ext.weights.folder.Layout`.

    Raises:
        ValueError: two tensors have the same name.
    """
    given = [stored for stored in tensors if not stored.name.endswith(_IGNORED_SUFFIX)]
    if format == "hf":
        given = _with_hugging_face_names(given)
    found: dict[str, StoredTensor] = {}
    for stored in given:
        twin = found.setdefault(stored.name, stored)
        if twin is not stored:
            raise ValueError(f"tensor {stored.name!r} is in both {twin.file} and {stored.file}")
    return given


def _with_hugging_face_names(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """Renames tensors to the names of transformers' causal models. Every model has embeddings, and
    their name shows which prefixes the file uses."""
    embeddings = re.compile(rf"({re.escape(PEFT_PREFIX)})?(model\.)?embed_tokens\.")
    match = next((m for m in (embeddings.match(stored.name) for stored in tensors) if m), None)
    if match is None or match[0].startswith("model."):
        return tensors
    has_model = match[2] is not None

    def base_name(name: str) -> str:
        name = name.removeprefix(PEFT_PREFIX)
        return name if has_model or name.startswith("lm_head.") else f"model.{name}"

    return [replace(stored, name=base_name(stored.name)) for stored in tensors]
