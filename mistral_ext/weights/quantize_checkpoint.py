"""Writes a model folder with weights in 8 or 4 bits, or both: `mistral-ext quantize`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mistral_ext.weights import checkpoint
from mistral_ext.weights.calibrate import calibrated
from mistral_ext.weights.folder import ModelFolder, read_folder
from mistral_ext.weights.hub import resolve
from mistral_ext.weights.kept import kept_folder, remove_kept
from mistral_ext.weights.mixed import Mixture, bytes_of
from mistral_ext.weights.new_folder import expect_replaceable
from mistral_ext.weights.new_model import layout_of, write_model
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.sensitivity import Sensitivities, random_tokens

_log = logging.getLogger("mistral_ext")


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    bits: int | None = None,
    group: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    calibration: Sequence[int] | None = None,
    size: str | int | None = None,
) -> Path:
    """Quantises a model, tensor by tensor, into a folder that loads without the original.

    The folder is either complete or absent (`new_folder`), so the call can be repeated after an
    error or an interruption. Finished steps of a `calibration` are kept in another folder beside
    it.

    Args:
        source: a model folder, or a hub id.
        target: the folder to make. If it exists, it must be empty.
        bits: 8 ("q8_0") or 4 ("iq4_xs", or "iq4_nl" for rows whose length is no multiple of 256).
            None: `size` decides which matrices get 8 bits and which get 4.
        group: for 4 bits, the number of weights that share a scale: 32, 64 or 128. The format is
            then "int4". None: the formats are those named above.
        dtype: the dtype of embeddings and norms, which are not quantised. None: they keep the dtype
            in which they are stored.
        progress: show a progress bar if stderr is a terminal.
        calibration: for 4 bits or a `size`, the tokens of a text that the model runs. Errors are
            then small for inputs that are large in this text (`mistral_ext.weights.calibrate`).
            Finished layers are kept in a folder `target` + ".calibration". If the call is
            interrupted, the next call continues from there. None: weights are rounded without
            regard to inputs.
        size: the most bytes that the file of weights may have, such as 4200000000, "4.2GB" (10^9)
            or "4GiB" (2^30). The layers' matrices get 4 bits. Those that lose the most in 4 bits
            get 8 bits instead, as many as fit (`mistral_ext.weights.mixed`). None: `bits` is given.

    Returns:
        `target`.

    Raises:
        FileExistsError: `target` is a file, or a folder with something in it.
        FileNotFoundError, ValueError: as in :func:`mistral_ext.weights.checkpoint.load_weights`.
            The message names what is wrong with the source, the tensor or the argument.
        ValueError: the source is a GGUF file, quantised already or an embedding model, or the
            arguments contradict each other.
        OSError: no space is left, or another failure of the system.
    """
    quantization = _quantization(bits, group, size)
    if calibration is not None and (bits == 8 or group is not None):
        raise ValueError(
            f"calibration is given with bits {bits!r} and group {group!r}, expected 4 and None, "
            "or a size"
        )
    target = Path(target).expanduser()  # as `resolve` does with the source
    expect_replaceable(target)
    original = read_folder(resolve(source))
    _expect_quantizable(original)
    weights = checkpoint.Checkpoint(original, dtype, quantization)
    # The new model has output weights of its own, in 8 bits, even if the original uses its
    # embeddings as output weights (tied embeddings).
    config = dataclasses.replace(original.config, dtype=weights.dtype, tie_word_embeddings=False)
    wide = checkpoint.Checkpoint(original, torch.float32)
    kept = kept_folder(target)
    if size is not None:
        mixture = Mixture(size, config, weights.dtype)
        quantization = mixture.best(_sensitivities(wide, original, calibration, kept, progress))
        weights = checkpoint.Checkpoint(original, dtype, quantization)
    read = weights.weights(progress)
    if calibration is not None:
        read = calibrated(
            wide.weights(progress=False),
            original.config,
            quantization,
            calibration,
            kept,
            weights.dtype,
            progress,
        )
    layout = layout_of(config, weights.dtype, quantization)
    write_model(target, original, config, layout, read, quantization)
    if calibration is not None:
        try:
            remove_kept(kept)
        except OSError as error:  # no reason to fail, because the model is complete
            _log.warning("%s is not needed any more, but cannot be removed: %s", kept, error)
    return target


def _quantization(bits: int | None, group: int | None, size: str | int | None) -> Quantization:
    """Returns the formats for `bits` and `group`. If a `size` is given, returns the formats for 4
    bits, because `Mixture` can choose only when the source was read. Raises ValueError if the
    arguments contradict each other."""
    if (bits is None) == (size is None):
        raise ValueError(f"bits is {bits!r} and size is {size!r}, expected one of them")
    if size is not None:
        bytes_of(size)  # raises if it is not a size
        if group is not None:
            raise ValueError(f"group is {group!r} and size is {size!r}, expected one of them")
    return Quantization.from_bits(4 if bits is None else bits, group)


def _expect_quantizable(original: ModelFolder) -> None:
    if original.gguf is not None:
        raise ValueError(
            f"{str(original.path)!r} is a GGUF file, expected the folder of the original, or load "
            "it with quantize="
        )
    form = original.quantization or original.packing
    if form is not None:
        raise ValueError(
            f"the weights in {str(original.path)!r} are quantised already, as {form}, expected the "
            "original"
        )
    if not original.config.writes_text:
        raise ValueError(
            f"{str(original.path)!r} is an embedding model, expected a model that writes text, or "
            "load it with quantize="
        )


def _sensitivities(
    weights: checkpoint.Checkpoint,
    original: ModelFolder,
    calibration: Sequence[int] | None,
    kept: Path,
    progress: bool,
) -> dict[str, float]:
    """The loss of accuracy by 4 bits in each matrix of the layers, by Mistral's names (names.py).
    It is measured on the tokens of `calibration`, and saved in the folder `kept` for the next call.
    If `calibration` is None, it is measured on random tokens, and not saved."""
    sensitivities = Sensitivities(weights.read, original.config)
    if calibration is not None:
        return sensitivities.measure_once(calibration, kept, progress)
    return sensitivities.measure(random_tokens(original.config.vocab_size), progress)
