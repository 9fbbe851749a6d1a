"""Reads the weights in the files of a model folder.

Files in Hugging Face's, Mistral's and GGUF's formats (mistral_ext/weights/folder.py) are read into
one dict of tensors, with Mistral's names and Hugging Face's order of the query and key rows.

Weights are mapped into memory instead of being read. Their pages belong to the file: memory holds
them once, processes share them, and the system can evict them instead of killing the process.
Tensors are copied, one at a time, only if they must change (a permutation, another dtype, fewer
bits). (Old files of torch cannot be mapped, and are read as a whole: torch_file.py.)

A quantised weight (mistral_ext/weights/quantize.py) is stored as two tensors. Its values have the
weight's name. Its scales have this name with `_scale` appended. config.json holds the format.

All that a file says about its tensors is checked before the first weight is read.
"""

from __future__ import annotations

import logging
import math
import mmap
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.files import refuse_lfs_pointer
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import JoinedWeight, Quantized, Weight
from mistral_ext.weights.device import expect_runnable, move_weights
from mistral_ext.weights.folder import (
    LAYOUTS,
    Layout,
    ModelFolder,
    WeightFiles,
    find_weights,
    what_is_there,
)
from mistral_ext.weights.gguf_model import (
    default_dtype,
    gguf_name,
    gguf_tensors,
    kept_formats,
    kept_parts,
    say_what_changes,
)
from mistral_ext.weights.names import hugging_face_name, with_base_names
from mistral_ext.weights.packed_model import Layer, read_packed
from mistral_ext.weights.packed_model import default_dtype as packed_dtype
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.safetensors_file import SCALE_SUFFIX, StoredTensor, stored_tensors
from mistral_ext.weights.torch_file import torch_tensors

# If it takes more than so many seconds to quantise weights at the start, `load_weights` logs how to
# quantise them once for all.
_LONG = 5.0

_log = logging.getLogger("mistral_ext")

# The dtypes of weights that are not quantised.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load_weights(
    folder: ModelFolder,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    quantize: str | None = None,
    device: torch.device | None = None,
) -> dict[str, Weight | JoinedWeight]:
    """Loads all weights of a model.

    The pages of the files are read here, in order, so that the first token does not wait for the
    disk. The operating system may evict these pages again, because they belong to the files.

    Args:
        folder: the result of :func:`mistral_ext.weights.folder.read_folder`. If it holds several
            formats, the first of `LAYOUTS` that is complete is used.
        dtype: the dtype to which weights are converted, bfloat16, float16 or float32. None: weights
            keep their stored dtype. Weights that must be decoded get the dtype of the embeddings,
            or bfloat16 if the embeddings are quantised. Weights that stay quantised are not
            converted.
        progress: show a progress bar if stderr is a terminal.
        quantize: "int8" (8 bits) or "int4" (4 bits): the weights are quantised, one after another.
            If this package has stored them with that number of bits already, they are kept as they
            are stored. None: they are kept as they are stored, too.
        device: where the model should run. If the model cannot run there, an error is raised before
            the weights are read. Otherwise the weights are moved there. None: the weights stay on
            the CPU.

    Returns:
        Contiguous tensors by Mistral's names, with the shapes of :func:`tensor_shapes`. On a GPU
        the weights that are multiplied in one pass are joined (`move_weights`). The rows of ``wq``
        and ``wk`` are in Hugging Face's order: RoPE rotates (i, i + head_dim / 2). Do not write to
        the tensors.

    Raises:
        FileNotFoundError: there are no weights, or a file named by the index is missing.
        ValueError: a tensor is missing, unknown, truncated or has the wrong shape or dtype, or a
            file is damaged, or a tensor cannot be quantised. The message names the tensor and the
            file. Or the weights are quantised already to another number of bits, `dtype` or
            `quantize` is not one of its values, or the model cannot run on the device.
    """
    quantization = None if quantize is None else Quantization.from_name(quantize)
    checkpoint = Checkpoint(folder, dtype, quantization)
    if device is not None:
        expect_runnable(folder.config, checkpoint.dtype, checkpoint.nbytes, device)
    began = time.monotonic()
    loaded: dict[str, Weight | JoinedWeight] = dict(checkpoint.weights(progress))
    seconds = time.monotonic() - began
    if quantization is not None and seconds > _LONG:
        _say_how_to_do_it_once(folder, quantization, seconds)
    if "output.weight" not in loaded:
        loaded["output.weight"] = loaded["tok_embeddings.weight"]
    if device is not None and device.type != "cpu":
        move_weights(loaded, device)
    return loaded


def _say_how_to_do_it_once(folder: ModelFolder, quantization: Quantization, seconds: float) -> None:
    """Logs that `mistral-ext quantize` would do once what every start now does. Logs nothing if
    `quantize_checkpoint` would refuse the folder."""
    if folder.quantization or folder.packing or folder.gguf or not folder.config.writes_text:
        return
    _log.warning(
        "reading the weights and quantising them to %s took %.0f s, and takes them at every start; "
        "`mistral-ext quantize %s OUT --bits %d` does it once",
        quantization,
        seconds,
        folder.path,
        quantization.bits,
    )


class Checkpoint:
    """The weights of a folder, checked but not yet read (see :func:`load_weights`).

    Args:
        folder, dtype: as in :func:`load_weights`.
        quantization: how to quantise the weights. None: they stay as they are stored.

    Attributes:
        dtype: the dtype of the weights that are not quantised.

    Raises:
        FileNotFoundError, ValueError: as in :func:`load_weights`.
    """

    def __init__(
        self,
        folder: ModelFolder,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(
                f"dtype is {dtype!r}, expected one of torch's {_list(DTYPES)}, or None"
            )
        config = folder.config
        files = _files(folder)
        stored = folder.quantization
        if stored and quantization and stored.bits != quantization.bits:
            raise ValueError(
                f"the weights in {str(folder.path)!r} are quantised already, as {stored}, and "
                f"cannot be made {quantization}: start from the original"
            )
        if stored:
            _expect_known(stored.formats, config)
        self._quantizes = quantization if stored is None else None
        if self._quantizes:
            for name, shape in tensor_shapes(config).items():
                self._quantizes.parts(name, shape)  # raises if rows do not divide into groups
        tensors: list[StoredTensor]
        kept: dict[str, str] = {}
        if folder.gguf is None:
            tensors = with_base_names(_stored_tensors(files), files.layout.format)
        else:
            dtype = dtype or default_dtype(folder.gguf)
            # Weights that are to be quantised anew are first decoded to fp32. A smaller dtype would
            # round them once more in between.
            decoded = torch.float32 if self._quantizes else dtype
            if quantization is None:
                kept = kept_formats(folder.gguf)
            tensors = list(gguf_tensors(folder.gguf, decoded, kept))
            say_what_changes(
                folder.gguf, _new_formats(config, quantization) | kept, _list((dtype,))
            )
        packed: dict[str, Quantized] = {}
        if folder.packing is not None:
            dtype = dtype or packed_dtype(tensors, hugging_face_name("tok_embeddings.weight"))
            decoded = torch.float32 if self._quantizes else dtype
            layers = _layers(config)
            tensors, packed = read_packed(tensors, folder.packing, layers, decoded, quantization)
        # The weights that are stored as values and scales.
        quantized = {
            name: parts
            for name, shape in tensor_shapes(config).items()
            if (parts := _stored_parts(folder, kept, name, shape)) is not None
        }
        self._quantized = quantized | packed
        self._parts = _match(tensors, files, config, self._quantized, dtype)
        self._dtype = dtype
        self.dtype = dtype or _expect_dtype(self._parts["tok_embeddings.weight"][0], DTYPES)
        if self._quantizes and "output.weight" not in self._parts:
            self._parts["output.weight"] = self._parts["tok_embeddings.weight"]  # they are tied
        # Whether `_read` must bring the rows of wq and wk from Mistral's order to Hugging Face's.
        self._has_pairs = files.layout.format in ("mistral", "gguf")
        self._config = config

    @property
    def names(self) -> list[str]:
        """Mistral's names of the weights that `weights` yields."""
        return list(self._parts)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights that `weights` yields."""
        return sum(self._nbytes(name, parts) for name, parts in self._parts.items())

    def weights(self, progress: bool = True) -> Iterator[tuple[str, Weight]]:
        """Reads one weight after another. Yields Mistral's name and the weight.

        If the files have no output matrix, the embeddings serve as output matrix. Then
        "output.weight" is yielded only if weights are quantised here: as a quantised copy of the
        embeddings, which themselves are not quantised.
        """
        n_bytes = {name: sum(part.nbytes for part in parts) for name, parts in self._parts.items()}
        with tqdm(
            desc="quantising weights" if self._quantizes else "loading weights",
            total=sum(n_bytes.values()),
            unit="B",
            unit_scale=True,
            disable=None if progress else True,  # None: the bar is shown if stderr is a terminal
        ) as bar:
            for name, parts in self._parts.items():
                yield name, self._read(name, parts)
                bar.update(n_bytes[name])

    def read(self, name: str) -> Weight:
        """Reads one weight by Mistral's name. If the files have no "output.weight", it is the
        embeddings."""
        if name == "output.weight" and name not in self._parts:
            name = "tok_embeddings.weight"
        return self._read(name, self._parts[name])

    def _nbytes(self, name: str, parts: tuple[StoredTensor, ...]) -> int:
        quantized = self._quantizes and self._quantizes.parts(name, parts[0].shape)
        if quantized:
            return quantized.nbytes
        if self._dtype is not None and len(parts) == 1:
            return math.prod(parts[0].shape) * self._dtype.itemsize
        return sum(part.nbytes for part in parts)

    def _read(self, name: str, parts: tuple[StoredTensor, ...]) -> Weight:
        tensors = [part.read() for part in parts]
        if self._has_pairs:
            module = name.removesuffix(".weight")
            tensors = [pairs_to_halves(module, tensor, self._config) for tensor in tensors]
        if self._quantizes:
            try:
                quantized = self._quantizes.quantize(name, tensors[0], parts[0].name)
            except ValueError as error:
                raise ValueError(f"{parts[0].file}: {error}") from error
            if quantized is not None:
                return quantized
        if self._dtype is not None and len(tensors) == 1:
            tensors = [tensors[0].to(self._dtype)]
        for tensor in tensors:
            _page_in(tensor)
        if len(tensors) == 1:
            return tensors[0]
        values, scales = tensors
        return self._quantized[name]._replace(values=values, scales=scales)


def tensor_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """Returns Mistral's name and the shape of every weight of a model, in the order of the
    layers."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (c.vocab_size, c.dim)}
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


def _layers(config: MistralConfig) -> dict[str, Layer]:
    """The matrices that may be packed, by Hugging Face's names of their layers."""
    return {
        hugging_face_name(name).removesuffix(".weight"): Layer(name, (shape[0], shape[1]))
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2
    }


def _expect_known(names: Iterable[str], config: MistralConfig) -> None:
    """Raises ValueError if a format is set for a weight that the model does not have."""
    shapes = tensor_shapes(config)
    unknown = next((name for name in names if name not in shapes), None)
    if unknown is not None:
        raise ValueError(
            f"formats of quantization_config has {hugging_face_name(unknown)!r}, expected weights "
            f"of a model with n_layers={config.n_layers}"
        )


def _new_formats(config: MistralConfig, quantization: Quantization | None) -> dict[str, str | None]:
    """The formats that weights of a GGUF file get by quantisation, by the file's names. None: the
    weight is not quantised."""
    return {
        gguf_name(name): quantization.format_of(name, shape[-1]) if quantization else None
        for name, shape in tensor_shapes(config).items()
    }


def _stored_name(name: str, layout: Layout) -> str:
    if layout.format == "gguf":
        return gguf_name(name)
    return hugging_face_name(name) if layout.format == "hf" else name


def named_parts(name: str, weight: Weight) -> dict[str, Tensor]:
    """The tensors of one weight, by the names that they have in Hugging Face's format."""
    name = hugging_face_name(name)
    if isinstance(weight, Quantized):
        return {name: weight.values, name + SCALE_SUFFIX: weight.scales}
    return {name: weight}


# The tensors in the files


def _stored_parts(
    folder: ModelFolder, kept: Mapping[str, str], name: str, shape: tuple[int, ...]
) -> Quantized | None:
    """Returns a weight that is stored as values and scales, on the meta device (dtypes and shapes
    only). Returns None if the weight is stored in another way."""
    if folder.quantization is not None:
        return folder.quantization.parts(name, shape)
    return kept_parts(folder.gguf, kept, name, shape) if folder.gguf is not None else None


def _match(
    tensors: Iterable[StoredTensor],
    weights: WeightFiles,
    config: MistralConfig,
    quantized: Mapping[str, Quantized],
    dtype: torch.dtype | None,
) -> dict[str, tuple[StoredTensor, ...]]:
    """Finds the stored tensors of each weight. A weight in `quantized` has two tensors, its values
    and its scales. Other weights have one.

    Raises ValueError if a tensor is missing or unknown, or has a wrong shape or dtype. Only the
    output weights may be missing, if the embeddings serve instead or the model writes no text.
    """
    found = {stored.name: stored for stored in tensors}
    _expect_names(found, weights)
    matched: dict[str, tuple[StoredTensor, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        stored_name = _stored_name(name, weights.layout)
        if (parts := quantized.get(name)) is not None:
            values = _take(found, stored_name, parts.values.shape, weights)
            scales = _take(found, stored_name + SCALE_SUFFIX, parts.scales.shape, weights)
            _expect_dtype(values, (parts.values.dtype,))
            _expect_dtype(scales, (parts.scales.dtype,))
            matched[name] = (values, scales)
            continue
        if name == "output.weight" and stored_name not in found:
            if config.tie_word_embeddings or not config.writes_text:
                continue
            raise ValueError(
                f"tensor {stored_name!r} is missing from {weights.file}, expected shape {shape}, "
                "or architectures ['MistralModel'] in config.json for an embedding model"
            )
        stored = _take(found, stored_name, shape, weights)
        stored_dtype = _expect_dtype(stored, DTYPES)
        matched[name] = (stored,)
        first = matched["tok_embeddings.weight"][0]
        if dtype is None and stored_dtype != first.dtype:
            raise ValueError(
                f"tensor {stored_name!r} in {stored.file} has dtype {stored_dtype}, expected "
                f"{first.dtype} like {first.name!r}: pass dtype to convert all weights to one"
            )
    if found:
        extra = next(iter(found.values()))
        raise ValueError(
            f"unknown tensor {extra.name!r} of shape {extra.shape} in {extra.file}: not part of a "
            f"Mistral model with n_layers={config.n_layers}"
        )
    return matched


def _expect_names(found: Mapping[str, StoredTensor], weights: WeightFiles) -> None:
    """Raises ValueError if the embeddings do not have the name that the format gives them. Then
    most names are probably of another kind, so the message shows some of them."""
    expected = _stored_name("tok_embeddings.weight", weights.layout)
    if expected in found:
        return
    last = expected.removeprefix("model.")
    other = next((name for name in found if name.endswith(last)), None)
    names = ", ".join(map(repr, [other] if other else list(found)[:3]))
    raise ValueError(f"tensor {expected!r} is missing from {weights.file}; found {names or 'none'}")


def _take(
    found: dict[str, StoredTensor], name: str, shape: tuple[int, ...], weights: WeightFiles
) -> StoredTensor:
    """Removes the tensor `name` from `found` and returns it. Raises ValueError if it is missing or
    has another shape."""
    shape = tuple(shape)
    stored = found.pop(name, None)
    if stored is None:
        raise ValueError(f"tensor {name!r} is missing from {weights.file}, expected shape {shape}")
    if stored.shape != shape:
        raise ValueError(
            f"tensor {name!r} in {stored.file} has shape {stored.shape}, expected {shape}"
        )
    return stored


def _expect_dtype(stored: StoredTensor, expected: tuple[torch.dtype, ...]) -> torch.dtype:
    """Returns the dtype of a tensor. Raises ValueError if it is not one of `expected`."""
    if isinstance(stored.dtype, str) or stored.dtype not in expected:
        raise ValueError(
            f"tensor {stored.name!r} in {stored.file} has dtype {stored.dtype}, expected "
            f"{_list(expected)}"
        )
    return stored.dtype


def _files(folder: ModelFolder) -> WeightFiles:
    """Finds the files with a model's weights. Raises FileNotFoundError if there are none."""
    if folder.gguf is not None:
        return WeightFiles(Layout(folder.path.name, "gguf"), folder.path, (folder.path,))
    files = find_weights(folder.path)
    if files is None:
        expected = ", ".join(layout.file for layout in LAYOUTS)
        found = what_is_there(entry.name for entry in folder.path.iterdir())
        raise FileNotFoundError(
            f"no weights in {str(folder.path)!r}: expected one of {expected}; {found}"
        )
    return files


def _stored_tensors(weights: WeightFiles) -> Iterator[StoredTensor]:
    for file in weights.files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {weights.file} lists it")
        refuse_lfs_pointer(file)
        if file.suffix == ".safetensors":
            yield from stored_tensors(file)
        else:
            yield from torch_tensors(file)


# Changes to a tensor


def pairs_to_halves(module: str, weight: Tensor, config: MistralConfig) -> Tensor:
    """Reorders the rows of wq or wk from Mistral's order to Hugging Face's. `module` is Mistral's
    name of the weight, without ".weight". Rows of other weights stay as they are.

    Within each head, Mistral's RoPE rotates rows (2i, 2i + 1) as a pair, and our RoPE rotates rows
    (i, i + head_dim / 2). So the result has the even rows of a head first, then the odd rows.
    """
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(module.rpartition(".")[2])
    if n_heads is None:
        return weight
    n_rows, dim = weight.shape
    pairs = weight.view(n_heads, n_rows // n_heads // 2, 2, dim)
    return pairs.transpose(1, 2).reshape(n_rows, dim)


def _page_in(tensor: Tensor) -> None:
    """Reads a mapped tensor from disk, by touching one byte of each of its pages. Otherwise the
    first pass over the weights would wait for the disk."""
    tensor.view(torch.uint8).view(-1)[:: mmap.PAGESIZE].sum()


def _list(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(most)} or {last}" if most else last
