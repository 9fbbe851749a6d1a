"""Saves the finished steps of a calibration in a folder. If the calibration is interrupted, the
next call continues from there.

Each new model has a folder of its own. `sensitivities.pt` holds how much the model loses if a
matrix is rounded to 4 bits (sensitivity.py). `0.pt`, `1.pt` and so on hold the rounded layers.
`hidden.pt` holds the number of finished layers, and the hidden states after them. Each file also
holds an identity, a hash of what it was computed from. A file whose identity is not the expected
one is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_ext.weights.library_errors import summary
from mistral_ext.weights.new_folder import sync_names

HIDDEN, SENSITIVITIES = "hidden.pt", "sensitivities.pt"
_OURS = re.compile(r"(hidden|sensitivities|[0-9]+)\.(pt|part)")
_STEP = 97  # every 97th row of a matrix goes into a hash (`hash_of_weights` says why)


def kept_folder(target: str | Path) -> Path:
    """The folder that keeps the finished steps until the model `target` is complete."""
    target = Path(target)
    return target.with_name(f"{target.name}.calibration")


def holds_work(kept: Path) -> bool:
    """Says whether the next call would continue from a folder, instead of beginning anew."""
    return (kept / HIDDEN).exists() or (kept / SENSITIVITIES).exists()


def remove_kept(kept: Path) -> None:
    """Removes the files of a calibration from a folder. Removes the folder, too, if it is then
    empty.

    Raises:
        OSError: a file of the calibration cannot be removed.
    """
    if not kept.is_dir():
        return
    for file in list(kept.iterdir()):
        if _OURS.fullmatch(file.name):
            file.unlink()
    if not any(kept.iterdir()):
        kept.rmdir()


def save_state(state: dict[str, Any], file: Path) -> None:
    """Writes a state to a file. Even after a power cut the file is complete, or as it was
    before."""
    partial = file.with_suffix(".part")
    with partial.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, file)
    sync_names(file.parent)


def load_state(file: Path, identity: str) -> dict[str, Any]:
    """Reads a state that `save_state` wrote. The state has a key "identity".

    Raises:
        ValueError: the file is missing or damaged, or has another identity than `identity`.
    """
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch raises errors of many types
        raise ValueError(
            f"{str(file)!r} is missing or damaged: remove {str(file.parent)!r} ({summary(error)})"
        ) from error
    if found != identity:
        raise ValueError(
            f"{str(file.parent)!r} is of another calibration, expected the same model and "
            "arguments, or remove it"
        )
    return state


def hash_of_text(token_ids: Iterable[int]) -> str:
    """A hash of the tokens of a text."""
    tokens = torch.tensor(list(token_ids), dtype=torch.int64, device="cpu")
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def hash_of_weights(weights: Iterable[Tensor]) -> str:
    """A hash of a sample of the rows of matrices, and of whole vectors. A sample is enough, because
    training, or merging an adapter, changes nearly all rows of a matrix, or no row."""
    found = hashlib.sha256()
    for weight in weights:
        sample = weight[::_STEP] if weight.dim() > 1 else weight
        found.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
