"""GGUF files for tests, written by the `gguf` package."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor

from mistral_ext.weights.gguf_blocks import BLOCK_TYPES, BlockType

# Where a type's fp16 numbers begin in a block: random bytes there may be infinite.
_HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def random_blocks(
    block_type: BlockType, n_rows: int, columns: int, seed: int, scale: float = 0.01
) -> Tensor:
    """[n_rows, bytes of a row] uint8: random bits, and fp16 scales around `scale`."""
    generator = torch.Generator().manual_seed(seed)
    if block_type.dtype is not None:
        values = torch.randn(n_rows, columns, generator=generator)
        return values.to(block_type.dtype).view(torch.uint8)
    shape = n_rows * columns // block_type.values, block_type.nbytes
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for begin in _HALVES[block_type.name]:
        scales = torch.randn(len(blocks), 1, generator=generator) * scale
        blocks[:, begin : begin + 2] = scales.half().view(torch.uint8)
    return blocks.view(n_rows, -1)


# Files by their bytes, for what no writer would write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    """Of the metadata."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A description."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    n_entries: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file, with other numbers of entries and tensors than it has, if they are given."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_entries = len(entries) if n_entries is None else n_entries
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries)
    header += b"".join(entries) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


# Models

_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_model(
    path: Path,
    model: transformers.PreTrainedModel,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, object] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a transformers model as llama.cpp's converter does, and rounds its weights to what the
    file holds.

    Args:
        types: of tensors, by a part of their names; F32 without. A tensor is replaced by a random
            one if `gguf` cannot write its type.
        metadata: more of it, or other values; a value None leaves a key out.
        tensors: more of them.
    """
    config = model.config
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | dict(metadata or {})
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = gguf_tensor_name(name)
        kind = next((kind for part, kind in (types or {}).items() if part in target), "F32")
        kind = gguf.GGMLQuantizationType[kind]
        data = _blocks(parameter, kind)
        rounded = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
        parameter.data.copy_(rounded.view(parameter.shape))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for module, n_heads in heads.items():
            if module in target:  # pairs of rows that are rotated together stand together
                halves = data.reshape(n_heads, 2, -1, data.shape[1])
                data = halves.swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(target, data, raw_dtype=kind)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(parameter: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    try:
        return gguf.quants.quantize(parameter.float().numpy(), kind)
    except NotImplementedError:
        return random_blocks(BLOCK_TYPES[kind], *parameter.shape, seed=1, scale=1e-4).numpy()


def gguf_tensor_name(name: str) -> str:
    """llama.cpp's name for one of transformers'."""
    module = name.removesuffix(".weight")
    prefix = ""
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        prefix = f"blk.{layer}."
    return f"{prefix}{_MODULES[module]}.weight"
