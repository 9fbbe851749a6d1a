"""Finds the files of a model in a folder or a GGUF file, and reads them except weights.

There are two families of folders. Hugging Face's hold ``config.json`` and ``model*.safetensors`` or
``pytorch_model*.bin``. Mistral's hold ``params.json`` and ``consolidated.safetensors`` or
``consolidated.00.pth``. A folder may hold both. A GGUF file is a whole model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mistral_ext.files import is_lfs_pointer, read_json_object, refuse_lfs_pointer
from mistral_ext.model.config import MistralConfig, OverrideError
from mistral_ext.weights import generation_config
from mistral_ext.weights.gguf_config import gguf_config
from mistral_ext.weights.gguf_file import Gguf, is_gguf, part_names, read_gguf
from mistral_ext.weights.names import hugging_face_name
from mistral_ext.weights.packed_settings import Packing, method_of, packing_of
from mistral_ext.weights.quantize import Quantization


@dataclass(frozen=True)
class Layout:
    """One way to store weights in a folder."""

    file: str  # the file with the weights, or the index that lists such files
    format: str  # "hf", "mistral" or "gguf": the names of tensors, and the order of q and k rows
    shards: str | None = None  # the pattern of the files that an index lists; None: no index


# In order of preference: the first complete layout is read.
LAYOUTS = (
    Layout("model.safetensors", "hf"),
    Layout("model.safetensors.index.json", "hf", shards="model-*.safetensors"),
    Layout("pytorch_model.bin", "hf"),
    Layout("pytorch_model.bin.index.json", "hf", shards="pytorch_model-*.bin"),
    Layout("consolidated.safetensors", "mistral"),
    Layout("consolidated.00.pth", "mistral"),
)

CONFIGS = ("config.json", "params.json")  # Hugging Face's and Mistral's

# The other files of a model, besides its configuration and weights. They are downloaded with the
# model, and copied to a folder that holds a changed model.
COMPANIONS = (
    generation_config.NAME,
    "tokenizer*",
    "tekken.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)

_QUANT_METHOD = "mistral_ext"  # the quant_method of folders that `quantize` has written
_OWN_KEY = "mistral_ext"  # a key of config.json for facts for which Hugging Face has no key


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder or file, and its contents except weights (see :func:`read_folder`)."""

    path: Path
    config: MistralConfig  # includes the end tokens of generation_config.json
    # How the weights are quantised: by this package (`quantization`), or by GPTQ and others
    # (`packing`). Both are None if the weights are not quantised, or if `gguf` is set.
    quantization: Quantization | None = None
    packing: Packing | None = None
    instruct: bool = False  # the result of `is_instruct`
    gguf: Gguf | None = None  # the contents, if `path` is a GGUF file


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one folder."""

    layout: Layout
    file: Path  # layout.file in its folder
    files: tuple[Path, ...]  # the files with tensors: `file`, or the files that the index lists


def read_folder(path: str | Path, **overrides: Any) -> ModelFolder:
    """Reads a folder or a GGUF file, except weights and tokenizer.

    If a folder holds both formats, ``params.json`` is read if the weights to read are Mistral's
    (`find_weights`), and ``config.json`` otherwise. So the configuration comes from the same source
    as the weights (early ``config.json`` files of v0.2 state a window that its ``params.json`` does
    not have). If a folder has weights in neither format but one GGUF model, this model is read.

    Args:
        path: a local folder, or a GGUF file, in one or several parts (see
            :func:`mistral_ext.weights.hub.resolve` for hub ids). The end tokens of a folder's
            ``generation_config.json`` are added to those of the configuration.
        overrides: fields of `MistralConfig`, such as ``sliding_window=None``. They replace values
            of the file.

    Raises:
        FileNotFoundError: there is no config.json, params.json or GGUF file.
        ValueError: a file is damaged, or describes a model that this engine cannot compute. The
            message names the file. Or an override is wrong. The message names it.
        TypeError: an override is not a field.
    """
    path = Path(path)
    gguf_file = find_gguf(path)
    if gguf_file is not None:
        gguf = read_gguf(gguf_file)
        config = gguf_config(gguf, **overrides)
        return ModelFolder(gguf.path, config, instruct=is_instruct(gguf.path), gguf=gguf)
    hf_file, params_file = (path / name for name in CONFIGS)
    weights = find_weights(path)
    mistral_weights = weights is not None and weights.layout.format == "mistral"
    if params_file.is_file() and (mistral_weights or not hf_file.is_file()):
        file, read = params_file, MistralConfig.from_params
    elif hf_file.is_file():
        file, read = hf_file, MistralConfig.from_hf
    else:
        raise FileNotFoundError(
            f"no model configuration in {str(path)!r}: expected config.json (Hugging Face) or "
            f"params.json (Mistral); {what_is_there(entry.name for entry in path.iterdir())}"
        )
    for companion in companions(path):
        refuse_lfs_pointer(companion)
    values = read_json_object(file)
    try:
        config = read(values, **overrides)
        quantization = _quantization(values) if file is hf_file else None
        packing = packing_of(values, path) if file is hf_file and not quantization else None
    except OverrideError:
        raise
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if "eos_ids" not in overrides:
        config = _with_end_tokens(config, path / generation_config.NAME)
    return ModelFolder(path, config, quantization, packing, is_instruct(path))


def find_weights(folder: str | Path) -> WeightFiles | None:
    """Finds the weights to read in a folder that may hold several layouts. Returns the first of
    :data:`LAYOUTS` that is complete, or if no layout is, the first whose `file` exists. Returns
    None if there are no weights."""
    folder = Path(folder)
    found = [_weights(folder, layout) for layout in LAYOUTS if (folder / layout.file).is_file()]
    complete = [w for w in found if all(f.is_file() and not is_lfs_pointer(f) for f in w.files)]
    return next(iter(complete + found), None)


def find_gguf(path: Path) -> Path | None:
    """Finds the GGUF file of a model: the path itself, or the only GGUF model in a folder without
    other weights. If that model has several parts, returns the first part. Returns None if there is
    no such file.

    Raises:
        ValueError: the folder holds several models in GGUF.
    """
    if is_gguf(path):
        return path
    if not path.is_dir() or find_weights(path) is not None:
        return None
    models = sorted({path / part_names(file.name)[0] for file in path.glob("*.gguf")})
    if len(models) > 1:
        raise ValueError(
            f"{str(path)!r} holds {len(models)} models in GGUF, expected one; pass one of the "
            f"files: {', '.join(model.name for model in models)}"
        )
    return next(iter(models), None)


def is_instruct(path: Path) -> bool:
    """Whether a folder or GGUF file holds a Mistral Instruct model. This counts only if the model
    has no chat template.

    The answer is yes if the name of the folder or file, or its hub id, contains "instruct". If the
    path is a symbolic link, the name of the link counts, too. A model that `quantize` has written
    may have any name, but its config.json says whether the original was such a model.
    """
    config = path / "config.json"
    ours = read_json_object(config).get(_OWN_KEY) if config.is_file() else None
    if isinstance(ours, dict) and "instruct" in ours:
        return bool(ours["instruct"])
    # In huggingface_hub's cache the files of a model are links, whose targets have hashes as names.
    names = [name for one in (Path(os.path.abspath(path)), path.resolve()) for name in _names(one)]
    return any("instruct" in name.lower() for name in names)


def _names(path: Path) -> list[str]:
    """The name of a path and, if it lies in huggingface_hub's cache, the name of the folder that
    stands for its hub id. The cache has models--OWNER--NAME/snapshots/REVISION."""
    folders = pairwise(path.parts)
    return [path.name, *(folder for folder, inner in folders if inner == "snapshots")]


def companions(folder: Path) -> list[Path]:
    """The files of a folder that :data:`COMPANIONS` lists."""
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def what_is_there(names: Iterable[str]) -> str:
    """A hint for error messages about an incomplete folder or hub model: what it is, according to
    the names of its files."""
    names = sorted(names)
    if "adapter_config.json" in names:
        return (
            "adapter_config.json says that this is a LoRA adapter, which changes another model: "
            "expected that model, which --adapter NAME=PATH and adapters= load with it"
        )
    for name in names:
        if name.endswith(".gguf"):
            return f"found {name}: of a GGUF file pass the file, as in OWNER/NAME:{name}"
    shown = [*names[:8], f"{len(names) - 8} more"] if len(names) > 9 else names
    return f"found {', '.join(shown) or 'nothing'}"


def _with_end_tokens(config: MistralConfig, file: Path) -> MistralConfig:
    """Adds the end tokens of ``generation_config.json`` to a configuration. Fine-tunes often name
    the token that ends a turn only in this file."""
    ids = read_json_object(file).get("eos_token_id") if file.is_file() else None
    if ids is None:
        return config
    ids = ids if isinstance(ids, list) else [ids]
    more = [token_id for token_id in ids if token_id not in config.eos_ids]
    try:
        return dataclasses.replace(config, eos_ids=(*config.eos_ids, *more))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_json(
    config: MistralConfig, quantization: Quantization | None = None, instruct: bool = False
) -> dict[str, Any]:
    """Makes the contents of a ``config.json`` from which :func:`read_folder` reads the same
    settings."""
    values = config.to_hf()
    if quantization is not None:
        values["quantization_config"] = {
            "quant_method": _QUANT_METHOD,
            "format": quantization.format,
            "group_size": quantization.group,
            "output_format": quantization.output_format,
        }
        if quantization.formats:
            values["quantization_config"]["formats"] = {
                hugging_face_name(name): form for name, form in quantization.formats.items()
            }
    if instruct:
        values[_OWN_KEY] = {"instruct": True}
    return values


def _weights(folder: Path, layout: Layout) -> WeightFiles:
    file = folder / layout.file
    if layout.shards is None:
        return WeightFiles(layout, file, (file,))
    shard_of = read_json_object(file).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(
            f"{file}: weight_map is {shard_of!r:.60}, expected an object from tensor names to files"
        )
    names = dict.fromkeys(str(name) for name in shard_of.values())  # each once, in order
    return WeightFiles(layout, file, tuple(folder / name for name in names))


def _quantization(values: dict[str, Any]) -> Quantization | None:
    """The formats of weights that `quantize` has written, according to a ``config.json``. Returns
    None for other weights."""
    settings, method, key = method_of(values)
    if method != _QUANT_METHOD:
        return None
    try:
        return Quantization.from_settings(settings)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
