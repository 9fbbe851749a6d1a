"""Reads LoRA adapters from files of peft, Mistral and GGUF, and writes them in peft's format.

All three kinds of files are read into the same kind of dict. Its keys are Mistral's names of
weights without ".weight", such as "layers.0.attention.wq". Its values are the updates of these
weights (`LowRank`). For wq and wk the rows of b are in Hugging Face's order, like the rows of the
weights (`checkpoint`).

A tensor that belongs to no weight of the model raises an error that names it. So does a known
setting that changes the arithmetic and is not supported.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mistral_ext.files import read_json_object, refuse_lfs_pointer
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import LowRank
from mistral_ext.weights.checkpoint import pairs_to_halves, tensor_shapes
from mistral_ext.weights.gguf_file import is_gguf, read_gguf
from mistral_ext.weights.gguf_model import gguf_name, gguf_tensors
from mistral_ext.weights.hub import resolve_adapter
from mistral_ext.weights.names import PEFT_PREFIX, hugging_face_name
from mistral_ext.weights.new_folder import new_folder
from mistral_ext.weights.safetensors_file import StoredTensor, Writer, stored_tensors
from mistral_ext.weights.torch_file import torch_tensors

_log = logging.getLogger("mistral_ext")

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_FILES = (PEFT_WEIGHTS, "adapter_model.bin")
MISTRAL_FILE = "lora.safetensors"
_MISTRAL_PARAMS = "params.json"
_MISTRAL_SCALE = 2.0  # the default of mistral-finetune, whose weights files do not hold the scale

# Settings of peft that change what an adapter computes. They are not supported, so they must not be
# set.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that do not change the model's weights. Other initialisations (PiSSA, OLoRA)
# change them, and the adapter then belongs to the changed weights.
_SOUND_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Adapter = Mapping[str, LowRank]


def adapter_for(config: MistralConfig, given: str | Path | Adapter) -> Adapter:
    """Reads an adapter if it is a path, and checks that it fits a model.

    Args:
        config: the configuration of the model.
        given: the path of an adapter, as in `read_adapter`, or an adapter in memory.

    Raises:
        FileNotFoundError, ValueError: as in `read_adapter` and `expect_adapter`.
    """
    if not isinstance(given, Mapping):
        return read_adapter(given, config)
    expect_adapter(given, config)
    return given


def expect_adapter(adapter: Adapter, config: MistralConfig) -> None:
    """Checks that an adapter in memory fits a model.

    Raises:
        ValueError: the adapter changes no weight, or a weight that the model does not have, or one
            of its matrices has a wrong shape or dtype.
    """
    if not adapter:
        raise ValueError("adapter is empty, expected what is added to one weight or more")
    shapes = _module_shapes(config)
    for name, update in adapter.items():
        if name not in shapes:
            raise ValueError(
                f"adapter has {name!r}, expected linear layers of a model with "
                f"n_layers={config.n_layers}, such as {next(iter(shapes))!r}"
            )
        outputs, inputs = shapes[name]
        rank = update.a.shape[0] if update.a.shape else 0
        for matrix, tensor, shape in (
            ("a", update.a, (max(1, rank), inputs)),
            ("b", update.b, (outputs, rank)),
        ):
            if tensor.shape != shape or tensor.dtype not in _DTYPES:
                raise ValueError(
                    f"adapter has {matrix} {list(tensor.shape)} of {tensor.dtype} for {name!r}, "
                    f"expected {list(shape)} of float32, bfloat16 or float16"
                )


def read_adapter(path: str | Path, config: MistralConfig) -> dict[str, LowRank]:
    """Reads an adapter.

    Args:
        path: a folder of peft (adapter_config.json and its weights) or of Mistral
            (lora.safetensors), a file of weights from such a folder, a GGUF file, or the hub id of
            a folder ("owner/name") or file ("owner/name:file.gguf").
        config: the configuration of the model for which the adapter is made.

    Returns:
        The update of each weight that the adapter changes. Tensors that need no decoding or
        reordering are mapped into memory.

    Raises:
        FileNotFoundError: there is no adapter, or its adapter_config.json is missing.
        ValueError: the adapter is damaged, is for another model, or needs an unsupported feature.
    """
    files = (PEFT_CONFIG, *_PEFT_FILES, MISTRAL_FILE, _MISTRAL_PARAMS)
    file = _find(resolve_adapter(path, files))
    refuse_lfs_pointer(file)
    if is_gguf(file):
        return _read_gguf(file, config)
    if file.name in _PEFT_FILES:
        return _read_peft(file, config)
    return _read_mistral(file, config)


def _find(path: Path) -> Path:
    """Finds the file with an adapter's weights."""
    if path.is_file():
        if path.name == PEFT_CONFIG:
            return _find(path.parent)
        if path.suffix == ".safetensors" or path.name in _PEFT_FILES or is_gguf(path):
            return path
        raise ValueError(f"{path} is no adapter, expected a .safetensors or .gguf file")
    names = (*_PEFT_FILES, MISTRAL_FILE)
    for name in names:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    raise FileNotFoundError(
        f"no adapter in {str(path)!r}: expected {', '.join(names)} or one GGUF file"
    )


# peft


def _read_peft(file: Path, config: MistralConfig) -> dict[str, LowRank]:
    settings_file = file.parent / PEFT_CONFIG
    if not settings_file.is_file():
        raise FileNotFoundError(f"{settings_file} is missing: it holds the scale of {file.name}")
    settings = read_json_object(settings_file)
    _expect_supported(settings, settings_file)
    names = {hugging_face_name(f"{name}.weight"): name for name in _module_shapes(config)}
    stored = torch_tensors(file) if file.suffix == ".bin" else stored_tensors(file)
    pairs = _Pairs(file, config)
    for tensor in stored:
        # In older files, and in files saved by hand, names also contain that of the adapter,
        # "default".
        key = tensor.name.removeprefix(PEFT_PREFIX).replace(".default.", ".")
        # If peft wrapped a model without output matrix, the names in the file lack "model.".
        if not config.writes_text:
            key = f"model.{key.removeprefix('model.')}"
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        pairs.add(names.get(f"{module}.weight"), matrix, ("lora_A", "lora_B"), tensor)

    def scale(name: str, rank: int) -> float:
        module = hugging_face_name(f"{name}.weight").removesuffix(".weight")
        expected = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
        if rank != expected:
            raise ValueError(
                f"{file}: lora_A of {module!r} has rank {rank}, expected {expected} as in "
                f"{settings_file.name}"
            )
        alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))

    return {name: LowRank(a, b, scale(name, len(a))) for name, (a, b) in pairs.matched().items()}


def _expect_supported(settings: Mapping[str, Any], file: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}, expected 'LORA'")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ValueError(
                f"{file}: {name} is {settings[name]!r}, expected none: it is not supported"
            )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {settings['bias']!r}, expected 'none'")
    if settings.get("init_lora_weights") not in _SOUND_INITS:
        raise ValueError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the "
            "model's own weights: expected an adapter that was converted for the original weights"
        )
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if not _is_positive(value):
            raise ValueError(f"{file}: {name} is {value!r}, expected a positive number")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            raise ValueError(f"{file}: {name} is {patterns!r}, expected patterns with numbers")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{file}: {name} has {pattern!r}: {error}") from error


def _is_positive(value: object) -> bool:
    return _is_finite(value) and value > 0


def _is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number. (JSON's reader also returns NaN and Infinity. A bool is
    an int in Python, but no number here.)"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that matches a module, as peft chooses it. Returns `default`
    if no pattern matches, or if `patterns` is None."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# Mistral and GGUF, whose query and key rows are in Mistral's order


def _read_mistral(file: Path, config: MistralConfig) -> dict[str, LowRank]:
    pairs = _Pairs(file, config)
    for tensor in stored_tensors(file):
        module, _, matrix = tensor.name.removesuffix(".weight").rpartition(".")
        pairs.add(module, matrix, ("lora_A", "lora_B"), tensor)
    matched = pairs.matched()
    scale = _mistral_scale(file)
    return {
        name: LowRank(a, pairs_to_halves(name, b, config), scale)
        for name, (a, b) in matched.items()
    }


def _mistral_scale(file: Path) -> float:
    params = file.parent / _MISTRAL_PARAMS
    settings = read_json_object(params).get("lora") if params.is_file() else None
    if isinstance(settings, dict) and settings.get("scaling") is not None:
        scale = settings["scaling"]
        if not _is_finite(scale):
            raise ValueError(f"{params}: scaling of lora is {scale!r}, expected a finite number")
        return float(scale)
    _log.warning(
        "%s does not say its scaling; it is taken to be %g, the default of mistral-finetune (a "
        'params.json beside it may say another: {"lora": {"scaling": 4.0}})',
        file,
        _MISTRAL_SCALE,
    )
    return _MISTRAL_SCALE


def _read_gguf(file: Path, config: MistralConfig) -> dict[str, LowRank]:
    gguf = read_gguf(file)
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if gguf.metadata.get(key) != expected:
            raise ValueError(f"{file}: {key} is {gguf.metadata.get(key)!r}, expected {expected!r}")
    alpha = gguf.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not _is_positive(alpha):
        raise ValueError(f"{file}: adapter.lora.alpha is {alpha!r}, expected a positive number")
    names = {gguf_name(f"{name}.weight"): name for name in _module_shapes(config)}
    pairs = _Pairs(file, config)
    for tensor in gguf_tensors(gguf, torch.float32, kept={}):
        module, _, matrix = tensor.name.rpartition(".")
        pairs.add(names.get(module), matrix, ("lora_a", "lora_b"), tensor)
    return {
        name: LowRank(a, pairs_to_halves(name, b, config), alpha / len(a))
        for name, (a, b) in pairs.matched().items()
    }


# The tensors of an adapter


def _module_shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """The shape [N, K] of each weight that an adapter may change."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensor_shapes(config).items()
        if name.startswith("layers.") and len(shape) == 2
    }


class _Pairs:
    """Collects the two matrices, a and b, of each weight that an adapter changes.

    Args:
        file: the file of the adapter, named in error messages.
        config: the configuration of the model.
    """

    def __init__(self, file: Path, config: MistralConfig) -> None:
        self._file = file
        self._shapes = _module_shapes(config)
        self._n_layers = config.n_layers
        self._found: dict[str, dict[int, StoredTensor]] = {}

    def add(
        self, name: str | None, matrix: str, matrices: tuple[str, str], stored: StoredTensor
    ) -> None:
        """Adds a tensor, the matrix a or b of the weight `name` (None: the model has no such
        weight). `matrix` is the last part of the tensor's name. `matrices` are the last parts that
        mean a and b. Raises ValueError if the model has no such weight, or if the tensor is neither
        a nor b, has a wrong dtype, or was added before."""
        if name not in self._shapes or matrix not in matrices:
            raise ValueError(
                f"tensor {stored.name!r} in {self._file} is not supported: expected "
                f"{' and '.join(matrices)} of the linear layers of a model with "
                f"n_layers={self._n_layers}"
            )
        if stored.dtype not in _DTYPES:
            raise ValueError(
                f"tensor {stored.name!r} in {self._file} has dtype {stored.dtype}, expected "
                "float32, bfloat16 or float16"
            )
        which = matrices.index(matrix)
        if which in self._found.setdefault(name, {}):
            raise ValueError(f"{self._file}: {matrix} of {name!r} is there twice")
        self._found[name][which] = stored

    def matched(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Reads the matrices a [rank, K] and b [N, rank] of each weight.

        Raises:
            ValueError: no tensor was added, or a matrix is missing or has a wrong shape.
        """
        if not self._found:
            raise ValueError(f"{self._file} has no tensors, expected tensors of an adapter")
        return {name: self._read(name, given) for name, given in self._found.items()}

    def _read(self, name: str, given: Mapping[int, StoredTensor]) -> tuple[Tensor, Tensor]:
        if len(given) == 1:
            (stored,) = given.values()
            raise ValueError(
                f"{self._file} has {stored.name!r} without its other matrix, expected two"
            )
        outputs, inputs = self._shapes[name]
        rank = given[0].shape[0] if given[0].shape else 0
        for stored, expected in ((given[0], (max(1, rank), inputs)), (given[1], (outputs, rank))):
            if stored.shape != expected:
                raise ValueError(
                    f"tensor {stored.name!r} in {self._file} has shape {stored.shape}, expected "
                    f"{expected} for this model"
                )
        return given[0].read(), given[1].read()


# Writing


def write_adapter(target: str | Path, adapter: Adapter, base: str = "") -> Path:
    """Writes an adapter in peft's format, as a folder that is either complete or absent.

    Args:
        target: the folder to make. If it exists, it must be empty.
        adapter: the adapter, in the form that `read_adapter` returns. Its matrices are float32,
            bfloat16 or float16, on any device.
        base: the name of the model, as information for readers. Empty: the name is not known.

    Returns:
        `target`.

    Raises:
        FileExistsError: `target` is a file, or a folder that is not empty.
        ValueError: the adapter changes no weight.
        OSError: no space is left, or another failure of the system.
    """
    if not adapter:
        raise ValueError("adapter is empty, expected what is added to one weight or more")
    target = Path(target)
    with new_folder(target) as folder:
        write_adapter_files(folder, adapter, base)
    return target


def write_adapter_files(folder: Path, adapter: Adapter, base: str = "") -> None:
    """Writes the two files of an adapter in peft's format into a folder.

    Args:
        folder: a folder that exists.
        adapter, base: as in `write_adapter`.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.items():
        module = PEFT_PREFIX + hugging_face_name(f"{name}.weight").removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = update.a
        tensors[f"{module}.lora_B.weight"] = update.b
    settings = json.dumps(_peft_settings(adapter, base), indent=2)
    (folder / PEFT_CONFIG).write_text(settings + "\n", encoding="utf-8")
    with Writer(folder / PEFT_WEIGHTS, tensors) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.detach().cpu().contiguous())


def _peft_settings(adapter: Adapter, base: str) -> dict[str, Any]:
    modules = {
        hugging_face_name(f"{name}.weight").removesuffix(".weight"): (
            len(update.a),
            update.scale * len(update.a),
        )
        for name, update in adapter.items()
    }
    rank, alpha = next(iter(modules.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(m): r for m, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {re.escape(m): x for m, (_, x) in modules.items() if x != alpha},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
