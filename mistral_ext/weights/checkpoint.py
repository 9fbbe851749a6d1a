"""Checkpoint files: where they are, what is in them, and the weights they hold.

Two families of files are read: Hugging Face's (``model*.safetensors``, ``pytorch_model*.bin``)
and Mistral's (``consolidated.safetensors``, ``consolidated.00.pth``). Both give one dict of
tensors with Mistral's names and Hugging Face's order of the query and key rows.

Weights are mapped into memory, not read into it: their pages belong to the file, so they are
held once, are shared between processes, and can be evicted instead of killing the process. Only
tensors that must change (a permutation, another dtype, fewer bits) are copied, one at a time.

Weights in 8 or 4 bits (mistral_ext/weights/quantize.py) are stored as two tensors: the values
under the weight's name, the scales under that name and `_scale`. How they are quantised is in
config.json.

Everything a file says about its tensors is checked before the first of them is read.
"""

from __future__ import annotations

import json
import mmap
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.ops import Quantized
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.quantize import quantize as quantize_weight
from mistral_ext.weights.safetensors_file import StoredTensor, stored_tensors

if TYPE_CHECKING:
    from mistral_ext.model.config import MistralConfig


@dataclass(frozen=True)
class Layout:
    """One way of storing weights in a folder."""

    file: str  # the weights, or the index that lists the files with the weights
    format: str  # "hf" or "mistral": whose tensor names, and whose order of q and k rows
    shards: str | None = None  # pattern of the listed files, if `file` is an index


# What belongs to a model beside its configuration and weights.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "chat_template*",
)

# In order of preference: the first one that is complete is read.
LAYOUTS = (
    Layout("model.safetensors", "hf"),
    Layout("model.safetensors.index.json", "hf", shards="model-*.safetensors"),
    Layout("pytorch_model.bin", "hf"),
    Layout("pytorch_model.bin.index.json", "hf", shards="pytorch_model-*.bin"),
    Layout("consolidated.safetensors", "mistral"),
    Layout("consolidated.00.pth", "mistral"),
)

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
_SCALE_SUFFIX = "_scale"  # follows the name of a quantised weight
# Old versions of transformers stored the RoPE frequencies, which follow from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Weights:
    """The weight files of one folder."""

    layout: Layout
    file: Path  # layout.file in its folder
    files: tuple[Path, ...]  # the files with tensors: `file` itself, or the shards it lists


def load_weights(
    folder: str | Path,
    config: MistralConfig,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    quantize: str | None = None,
) -> dict[str, Tensor | Quantized]:
    """Load all weights of a model.

    The pages are read here, in order, so that the first token does not wait for the disk; the
    operating system may evict them again, since they belong to the file.

    Args:
        folder: holds one of :data:`LAYOUTS`; of several, the first that is complete is used.
        config: gives the names and shapes of the tensors.
        dtype: convert to bfloat16, float16 or float32. None keeps the stored one, copying nothing.
            Quantised weights have none.
        progress: show a progress bar if stderr is a terminal.
        quantize: "int8" or "int4": quantise the weights, one after another, unless they are stored
            so; None: as stored.

    Returns:
        Contiguous CPU tensors by Mistral's names, with the shapes of :func:`tensor_shapes`. The
        rows of ``wq`` and ``wk`` are in Hugging Face's order: RoPE rotates (i, i + head_dim / 2).
        Do not write to them.

    Raises:
        FileNotFoundError: no weights, or a file named by the index is missing.
        ValueError: a tensor is missing, unknown, truncated or has the wrong shape or dtype, or a
            file is damaged, or a tensor cannot be quantised; the message names the tensor and the
            file.
    """
    quantization = None if quantize is None else Quantization.from_name(quantize)
    loaded = dict(Checkpoint(folder, config, dtype, quantization).weights(progress))
    if "output.weight" not in loaded:
        loaded["output.weight"] = loaded["tok_embeddings.weight"]
    return loaded


class Checkpoint:
    """The weights of a folder, checked and not yet read: see :func:`load_weights`.

    Args:
        folder, config, dtype: as for :func:`load_weights`.
        quantization: how to quantise the weights; None: as they are stored.

    Attributes:
        dtype: of the weights that are not quantised.
    """

    def __init__(
        self,
        folder: str | Path,
        config: MistralConfig,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be one of torch's {_list(_DTYPES)}, or None, got {dtype!r}"
            )
        files = find_weights(folder)
        if files is None:
            expected = ", ".join(layout.file for layout in LAYOUTS)
            raise FileNotFoundError(f"no weights in {str(folder)!r}: expected one of {expected}")
        stored = config.quantization
        if stored and quantization and stored.bits != quantization.bits:
            raise ValueError(
                f"the weights in {str(folder)!r} are quantised already, as {stored}, and cannot be "
                f"made {quantization}: start from the original"
            )
        self._quantizes = quantization if stored is None else None
        if self._quantizes:
            for name, shape in tensor_shapes(config).items():
                self._quantizes.parts(name, shape)  # refuses what does not divide into groups
        self._parts = _match(files, config, dtype)
        self._dtype = dtype
        self.dtype = dtype or self._parts["tok_embeddings.weight"][0].dtype
        if self._quantizes and "output.weight" not in self._parts:
            self._parts["output.weight"] = self._parts["tok_embeddings.weight"]  # they are tied
        self._heads_in_pairs = {}  # of the weights whose rows are in Mistral's order
        if files.layout.format == "mistral":
            self._heads_in_pairs = {"wq": config.n_heads, "wk": config.n_kv_heads}

    def weights(self, progress: bool = True) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Reads the weights; gives the name (Mistral's) and the weight of one after another.

        Without "output.weight" if that is tied to the embeddings, and neither is quantised.
        """
        n_bytes = {name: sum(part.nbytes for part in parts) for name, parts in self._parts.items()}
        with tqdm(
            desc="quantising weights" if self._quantizes else "loading weights",
            total=sum(n_bytes.values()),
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: only if stderr is a terminal
        ) as bar:
            for name, parts in self._parts.items():
                yield name, self._read(name, parts)
                bar.update(n_bytes[name])

    def _read(self, name: str, parts: tuple[StoredTensor, ...]) -> Tensor | Quantized:
        tensors = [part.read() for part in parts]
        n_heads = self._heads_in_pairs.get(name.split(".")[-2])
        if n_heads is not None:
            tensors = [_pairs_to_halves(tensor, n_heads) for tensor in tensors]
        if self._quantizes and (bits := self._quantizes.bits_of(name)):
            group = self._quantizes.group if bits == 4 else None
            try:
                return quantize_weight(tensors[0], bits, group, parts[0].name)
            except ValueError as error:
                raise ValueError(f"{parts[0].file}: {error}") from error
        if self._dtype is not None and len(tensors) == 1:
            tensors = [tensors[0].to(self._dtype)]
        for tensor in tensors:
            _page_in(tensor)
        return tensors[0] if len(tensors) == 1 else Quantized(*tensors)


def tensor_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """The name (Mistral's) and shape of every weight of a model, in the order of their use."""
    c = config
    shapes = {"tok_embeddings.weight": (c.vocab_size, c.dim)}
    for i in range(c.n_layers):
        layer = f"layers.{i}"
        shapes[f"{layer}.attention_norm.weight"] = (c.dim,)
        shapes[f"{layer}.attention.wq.weight"] = (c.n_heads * c.head_dim, c.dim)
        shapes[f"{layer}.attention.wk.weight"] = (c.n_kv_heads * c.head_dim, c.dim)
        shapes[f"{layer}.attention.wv.weight"] = (c.n_kv_heads * c.head_dim, c.dim)
        shapes[f"{layer}.attention.wo.weight"] = (c.dim, c.n_heads * c.head_dim)
        shapes[f"{layer}.ffn_norm.weight"] = (c.dim,)
        shapes[f"{layer}.feed_forward.w1.weight"] = (c.hidden_dim, c.dim)
        shapes[f"{layer}.feed_forward.w2.weight"] = (c.dim, c.hidden_dim)
        shapes[f"{layer}.feed_forward.w3.weight"] = (c.hidden_dim, c.dim)
    shapes["norm.weight"] = (c.dim,)
    shapes["output.weight"] = (c.vocab_size, c.dim)
    return shapes


def hugging_face_name(name: str) -> str:
    """Hugging Face's name for a weight: layers.0.attention.wq.weight is
    model.layers.0.self_attn.q_proj.weight."""
    module = name.removesuffix(".weight")
    prefix = ""
    if module.startswith("layers."):
        _, layer, module = module.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{_HF_MODULES[module]}.weight"


def named_parts(name: str, weight: Tensor | Quantized) -> dict[str, Tensor]:
    """The tensors of a weight by the names under which Hugging Face's format stores them."""
    name = hugging_face_name(name)
    if isinstance(weight, Quantized):
        return {name: weight.values, name + _SCALE_SUFFIX: weight.scales}
    return {name: weight}


# Finding the files


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model: a folder as it is, a hub id (``owner/name``) downloaded.

    Of a hub model, only the configuration, the tokenizer and one format of the weights are
    downloaded, into huggingface_hub's cache; later calls work without a network.

    Raises:
        FileNotFoundError: no such folder, and no such model on the hub or in its cache.
        ValueError: the path is a file.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{str(path)!r} is a file; expected the folder that holds the model")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_hub_id)):
        return _download(str(path_or_hub_id))
    raise FileNotFoundError(
        f"{str(path_or_hub_id)!r} does not exist; expected a folder, or a hub id like 'owner/name'"
    )


def find_weights(folder: str | Path) -> Weights | None:
    """The weights to read in a folder that may hold several: the first complete ones of
    :data:`LAYOUTS`. If none are complete, the first ones at all; without any, None."""
    folder = Path(folder)
    found = [_weights(folder, layout) for layout in LAYOUTS if (folder / layout.file).is_file()]
    complete = [w for w in found if all(f.is_file() and not _is_lfs_pointer(f) for f in w.files)]
    return next(iter(complete + found), None)


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _weights(folder: Path, layout: Layout) -> Weights:
    file = folder / layout.file
    if layout.shards is None:
        return Weights(layout, file, (file,))
    shard_of = read_json_object(file).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{file}: expected a 'weight_map' from tensor names to file names")
    names = dict.fromkeys(str(name) for name in shard_of.values())  # unique, in order
    return Weights(layout, file, tuple(folder / name for name in names))


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as f:
        return f.read(len(_LFS_POINTER)) == _LFS_POINTER


def _download(hub_id: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    patterns = ["config.json", "params.json", *COMPANIONS]
    try:
        files = [entry.rfilename for entry in HfApi().model_info(hub_id).siblings]
    except Exception as error:  # no network, no access or no such model: the cache may have it
        return _cached(hub_id, error)
    layout = next((layout for layout in LAYOUTS if layout.file in files), None)
    if layout is None:
        expected = ", ".join(layout.file for layout in LAYOUTS)
        raise FileNotFoundError(f"no weights in hub model {hub_id!r}: expected one of {expected}")
    patterns += [name for name in (layout.file, layout.shards) if name is not None]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise _not_available(hub_id, error) from error


def _cached(hub_id: str, reason: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # No patterns: whether the files are complete is for their readers to find out.
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=[]))
    except Exception:
        raise _not_available(hub_id, reason) from reason


def _not_available(hub_id: str, reason: Exception) -> FileNotFoundError:
    summary = str(reason).strip().partition("\n")[0]
    return FileNotFoundError(
        f"{hub_id!r} is not a local folder, and could not be downloaded from the Hugging Face hub "
        f"({type(reason).__name__}: {summary}). Models that ask for consent need 'hf auth login'. "
        f"Without a network: run 'hf download {hub_id}' on another machine and pass the folder "
        "here, or set HF_HOME to a copy of its cache."
    )


# What the files hold


def _match(
    weights: Weights, config: MistralConfig, dtype: torch.dtype | None
) -> dict[str, tuple[StoredTensor, ...]]:
    """The stored tensors of each weight, after checking that they are exactly those expected: one,
    or the values and the scales of a quantised weight."""
    found: dict[str, StoredTensor] = {}
    for stored in _stored_tensors(weights):
        if stored.name.endswith(_IGNORED_SUFFIX):
            continue
        twin = found.setdefault(stored.name, stored)
        if twin is not stored:
            raise ValueError(f"tensor {stored.name!r} is in both {twin.file} and {stored.file}")

    matched: dict[str, tuple[StoredTensor, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        stored_name = hugging_face_name(name) if weights.layout.format == "hf" else name
        parts = config.quantization.parts(name, shape) if config.quantization else None
        if parts is not None:
            values = _take(found, stored_name, parts.values.shape, weights)
            scales = _take(found, stored_name + _SCALE_SUFFIX, parts.scales.shape, weights)
            _check_dtype(values, (parts.values.dtype,))
            _check_dtype(scales, (parts.scales.dtype,))
            matched[name] = (values, scales)
            continue
        if name == "output.weight" and config.tie_word_embeddings and stored_name not in found:
            continue
        stored = _take(found, stored_name, shape, weights)
        _check_dtype(stored, _DTYPES)
        matched[name] = (stored,)
        (first,) = matched["tok_embeddings.weight"]
        if dtype is None and stored.dtype != first.dtype:
            raise ValueError(
                f"tensor {stored_name!r} in {stored.file}: expected dtype {first.dtype} like "
                f"{first.name!r}, got {stored.dtype}; pass dtype to convert all weights to one"
            )
    if found:
        extra = next(iter(found.values()))
        raise ValueError(
            f"unknown tensor {extra.name!r} of shape {extra.shape} in {extra.file}: not part of a "
            f"Mistral model with n_layers={config.n_layers}"
        )
    return matched


def _take(
    found: dict[str, StoredTensor], name: str, shape: tuple[int, ...], weights: Weights
) -> StoredTensor:
    """Removes the tensor from `found`; refuses one that is missing or has another shape."""
    shape = tuple(shape)
    stored = found.pop(name, None)
    if stored is None:
        raise ValueError(f"tensor {name!r} is missing from {weights.file}; expected shape {shape}")
    if stored.shape != shape:
        raise ValueError(
            f"tensor {name!r} in {stored.file}: expected shape {shape}, got {stored.shape}"
        )
    return stored


def _check_dtype(stored: StoredTensor, expected: tuple[torch.dtype, ...]) -> None:
    if stored.dtype not in expected:
        raise ValueError(
            f"tensor {stored.name!r} in {stored.file}: expected dtype {_list(expected)}, "
            f"got {stored.dtype}"
        )


def _stored_tensors(weights: Weights) -> Iterator[StoredTensor]:
    for file in weights.files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {weights.file} lists it")
        if _is_lfs_pointer(file):
            raise ValueError(
                f"{file} is a git-lfs pointer, not the weights themselves: run 'git lfs pull'"
            )
        if file.suffix == ".safetensors":
            yield from stored_tensors(file)
        else:
            yield from _torch_tensors(file)


def _torch_tensors(file: Path) -> Iterator[StoredTensor]:
    """List a file written by torch.save, which must hold a flat dict of tensors."""
    if re.fullmatch(r"consolidated\.\d+\.pth", file.name):
        parts = sorted(part.name for part in file.parent.glob("consolidated.*.pth"))
        if len(parts) > 1:
            raise ValueError(
                f"{file.parent}: weights split for model parallelism ({', '.join(parts)}) are not "
                "supported; expected consolidated.00.pth alone"
            )
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        summary = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} is truncated, or not a checkpoint written by torch.save: {summary}"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file}: expected a dict of tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{file}: expected a dict of tensors, got {type(tensor).__name__} for {name!r}"
            )
        yield StoredTensor(name, file, tensor.dtype, tuple(tensor.shape), tensor.contiguous)


# What is done to a tensor


def _pairs_to_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of wq or wk from Mistral's order to Hugging Face's.

    Within each head, Mistral's RoPE rotates the rows (2i, 2i + 1) as a pair, ours the rows
    (i, i + head_dim / 2): the even rows come first, then the odd ones.
    """
    n_rows, dim = weight.shape
    pairs = weight.view(n_heads, n_rows // n_heads // 2, 2, dim)
    return pairs.transpose(1, 2).reshape(n_rows, dim)


def _page_in(tensor: Tensor) -> None:
    """Read a mapped tensor from disk, by touching one byte of each of its pages."""
    tensor.view(torch.uint8).view(-1)[:: mmap.PAGESIZE].sum()


def _list(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(most)} or {last}" if most else last
