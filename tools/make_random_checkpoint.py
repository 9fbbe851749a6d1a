#!/usr/bin/env python
"""Write a checkpoint of random weights in the shape of a released Mistral 7B.

For load tests and benchmarks where the real weights are not at hand: every byte count, file
layout and setting is that of the real thing; only the text it generates is noise.

    python tools/make_random_checkpoint.py --version v0.1 --tokenizer tokenizer.model OUT

Tensors are made and written one by one (about 1 GB of memory). OUT appears when it is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from mistral_ext.model.config import MistralConfig
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.names import hugging_face_name
from mistral_ext.weights.new_folder import new_folder
from mistral_ext.weights.safetensors_file import Writer

# The differences between the releases: vocabulary, RoPE base, window.
VERSIONS = {
    "v0.1": {"vocab_size": 32000, "rope_theta": 1e4, "sliding_window": 4096},
    "v0.2": {"vocab_size": 32000, "rope_theta": 1e6, "sliding_window": None},
    "v0.3": {"vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None},
}
SHARD_BYTES = 5 * 10**9  # the shard size of the released Hugging Face checkpoints
WEIGHT_STD = 0.02  # keeps activations of order 1 through all layers, so bfloat16 stays finite


def release_config(version: str, n_layers: int) -> MistralConfig:
    return MistralConfig(
        **VERSIONS[version],
        dim=4096,
        n_layers=n_layers,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        norm_eps=1e-5,
        max_positions=32768,
        bos_id=1,
        eos_ids=(2,),
        dtype=torch.bfloat16,
    )


def params(config: MistralConfig) -> dict:
    """The contents of params.json. Keys that the real files lack are left out: v0.1 has no
    rope_theta."""
    values = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.sliding_window is not None:
        return values | {"sliding_window": config.sliding_window}
    return values | {"rope_theta": config.rope_theta}


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random weight: uniform values with standard deviation WEIGHT_STD, which are faster to make
    than normal ones. Norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    bound = WEIGHT_STD * math.sqrt(3)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).bfloat16()


def n_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch.bfloat16.itemsize


def split(shapes: dict[str, tuple[int, ...]], limit: float) -> list[dict[str, tuple[int, ...]]]:
    """Cut a sequence of tensors into shards of at most `limit` bytes."""
    shards, size = [{}], 0
    for name, shape in shapes.items():
        if shards[-1] and size + n_bytes(shape) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += n_bytes(shape)
    return shards


def write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], generator: torch.Generator, bar: tqdm
) -> None:
    layout = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }
    with Writer(file, layout) as writer:
        for name, shape in shapes.items():
            writer.write(name, random_weight(shape, generator))
            bar.update(n_bytes(shape))


def write_checkpoint(folder: Path, config: MistralConfig, file_format: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(config)
    total = sum(map(n_bytes, shapes.values()))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        if file_format == "mistral":
            write_json(folder / "params.json", params(config))
            write_safetensors(folder / "consolidated.safetensors", shapes, generator, bar)
            return
        write_json(folder / "config.json", config.to_hf())
        shards = split({hugging_face_name(name): s for name, s in shapes.items()}, SHARD_BYTES)
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / file, shard, generator, bar)
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--version", choices=VERSIONS, default="v0.1")
    parser.add_argument("--layers", type=int, default=32, help="fewer make a smaller model")
    parser.add_argument("--format", choices=("hf", "mistral"), default="hf")
    parser.add_argument("--tokenizer", type=Path, help="file to copy in as tokenizer.model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    if args.tokenizer is not None and not args.tokenizer.is_file():
        parser.error(f"--tokenizer {args.tokenizer} is not a file")
    try:
        config = release_config(args.version, args.layers)
    except ValueError as error:
        parser.error(str(error))

    with new_folder(args.out) as folder:
        write_checkpoint(folder, config, args.format, args.seed)
        if args.tokenizer is not None:
            shutil.copyfile(args.tokenizer, folder / "tokenizer.model")


if __name__ == "__main__":
    main()
