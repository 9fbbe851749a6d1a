"""Writes and reads checkpoints of a training run: folders that are either complete or absent.

A checkpoint has the files of the adapter, so that the adapter can be tried. The checkpoint also has
the state of the optimiser, and the progress of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_ext.files import read_json_object
from mistral_ext.finetune.layers import TrainedAdapter
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops.weight import parts_of
from mistral_ext.weights.adapters import read_adapter, write_adapter_files
from mistral_ext.weights.new_folder import new_folder
from mistral_ext.weights.safetensors_file import Writer, stored_tensors

_NAME = re.compile(r"checkpoint-(\d+)")
_PROGRESS = "training.json"
_OPTIMIZER = "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of AdamW's state


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: the number of finished steps.
        best_loss: the lowest held-out loss so far. The loss before the first step does not count,
            because the adapter does not change the model yet. None: there is none.
        without_gain: the number of evaluations since the evaluation with the lowest loss.
        evaluated: the number of steps that were finished at the last evaluation. -1: there was no
            evaluation.
    """

    step: int = 0
    best_loss: float | None = None
    without_gain: int = 0
    evaluated: int = -1


def write_checkpoint(
    output: Path,
    progress: Progress,
    run: Mapping[str, Any],
    adapter: TrainedAdapter,
    optimizer: torch.optim.Optimizer,
    base: str,
) -> Path:
    """Writes `output`/checkpoint-N for step N, and then removes the other checkpoints. Returns the
    folder.

    Args:
        output: the folder of the run.
        progress: the progress of the run.
        run: the values that a resumed run must share with this run. They can be written as JSON.
        adapter: the adapter.
        optimizer: the optimiser of the adapter's matrices.
        base: the name of the model, for people who read the files.
    """
    target = output / f"checkpoint-{progress.step:06}"
    if not target.exists():
        tensors = _moments(adapter, optimizer)
        with new_folder(target) as folder:
            write_adapter_files(folder, adapter.low_ranks(), base)
            text = json.dumps({"progress": asdict(progress), "run": run}, indent=2)
            (folder / _PROGRESS).write_text(text + "\n", encoding="utf-8")
            with Writer(folder / _OPTIMIZER, tensors) as writer:
                for name, tensor in tensors.items():
                    writer.write(name, tensor.cpu().contiguous())
    for other in _checkpoints(output):
        if other != target:
            shutil.rmtree(other)
    return target


def base_digest(model: Transformer) -> str:
    """A hash of the formats of the first layer's weights and of some values, which is enough to
    distinguish models."""
    layer = model.layers[0]
    hashed = hashlib.sha256(_bytes(model.norm))
    for weights in (layer.qkv, [layer.wo], layer.gate_up, [layer.w2]):
        parts = parts_of(weights)
        hashed.update(repr(parts.formats).encode())
        hashed.update(_bytes(parts.values[0][0]))
    return hashed.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return data


def newest_checkpoint(output: Path) -> Path | None:
    """The last checkpoint of a run, or None if the run has no checkpoint."""
    found = _checkpoints(output)
    return found[-1] if found else None


def read_checkpoint(
    folder: Path,
    run: Mapping[str, Any],
    config: MistralConfig,
    adapter: TrainedAdapter,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Restores the state of a checkpoint into `adapter` and `optimizer`.

    Raises:
        ValueError: the checkpoint is damaged, or it belongs to another run.
    """
    state = read_json_object(folder / _PROGRESS)
    try:
        before, progress = state["run"], Progress(**state["progress"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / _PROGRESS} is damaged: {error!r}") from error
    _expect_same(before, run, folder)
    weights = read_adapter(folder, config)
    stored = {tensor.name: tensor for tensor in stored_tensors(folder / _OPTIMIZER)}
    expected = {f"{name}.{key}" for name in adapter.parameters for key in _MOMENTS}
    if stored.keys() != expected or weights.keys() != adapter.pairs.keys():
        raise ValueError(f"{folder} is damaged: it has other tensors than those of the run")
    with torch.no_grad():
        for name, (a, b) in adapter.pairs.items():
            a.copy_(weights[name].a)
            b.copy_(weights[name].b)
    for name, parameter in adapter.parameters.items():
        moments = {
            key: torch.empty_like(parameter).copy_(stored[f"{name}.{key}"].read())
            for key in _MOMENTS
        }
        step = torch.tensor(float(progress.step), device="cpu")
        optimizer.state[parameter] = {"step": step, **moments}
    return progress


def _moments(adapter: TrainedAdapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of AdamW's state, by names. They are 0 if there was no step yet."""
    moments = {}
    for name, parameter in adapter.parameters.items():
        state = optimizer.state.get(parameter, {})
        for key in _MOMENTS:
            moments[f"{name}.{key}"] = state.get(key, torch.zeros_like(parameter)).detach()
    return moments


def _checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, in the order of their steps."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _expect_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name} is {now.get(name)!r}, expected {before.get(name)!r} as in {folder}: a run "
                "goes on with what it began with"
            )
