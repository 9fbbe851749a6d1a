"""A model rounded by us and, from the same file, by llama.cpp: bits, divergence and perplexity.

A part of quality.py. All of them run in the same way, in float32 on our kernels, with only the
matrices of the layers rounded: embeddings and output keep the values of the original.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import print_header, print_row
from peers import available, quantize_file
from torch import Tensor
from torch.nn import functional

from mistral_ext import Mistral
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Transformer
from mistral_ext.ops import Quantized, Weight
from mistral_ext.weights.calibrate import calibrated
from mistral_ext.weights.checkpoint import load_weights, tensor_shapes
from mistral_ext.weights.folder import read_folder
from mistral_ext.weights.gguf_model import gguf_name
from mistral_ext.weights.mixed import Mixture
from mistral_ext.weights.new_model import layout_of, weights_size
from mistral_ext.weights.quantize import Quantization
from mistral_ext.weights.sensitivity import Sensitivities, random_tokens

# As loading and `mistral-ext quantize` round.
OURS = {
    "int8": Quantization.from_bits(8),
    "int4": Quantization.from_bits(4),
    "4 bits, --group 64": Quantization.from_bits(4, group=64),
}
FILE_TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS")
COLUMNS = [("", -26), ("bits", 5), ("KL", 9), ("perplexity", 10), ("to fp32", 8), ("same top", 8)]

Weights = dict[str, Tensor]


@dataclass
class Rounded:
    """Weights in float32, with the layers' matrices rounded.

    Attributes:
        bits: the bits of a value of these matrices, with its share of the scales.
    """

    weights: Weights
    bits: float


def is_rounded(name: str, weight: Tensor) -> bool:
    return name.startswith("layers.") and weight.dim() == 2


def rounded(exact: Weights, matrices: Weights, nbytes: int) -> Rounded:
    """The exact weights, with `matrices` in the place of those of the same names. In their format
    `matrices` take `nbytes` bytes."""
    values = sum(matrix.numel() for matrix in matrices.values())
    return Rounded(exact | matrices, 8 * nbytes / values)


def made_here(exact: Weights, quantization: Quantization) -> Rounded:
    """Weights that are rounded by us, as a whole model would be."""
    return of_weights(
        exact, {name: quantization.quantize(name, weight, name) for name, weight in exact.items()}
    )


def calibrated_here(
    exact: Weights,
    config: MistralConfig,
    ids: list[int],
    folder: Path,
    quantization: Quantization = OURS["int4"],
) -> Rounded:
    """Weights that are rounded by what the layers see of a text, as `mistral-ext quantize
    --calibrate` does it.

    Args:
        folder: a folder for intermediate results.
    """
    weights = ((name, exact[name]) for name in tensor_shapes(config) if name in exact)
    made = dict(
        calibrated(weights, config, quantization, ids, folder, torch.float32, progress=False)
    )
    shutil.rmtree(folder)
    return of_weights(exact, made)


class Mixtures:
    """int4 with int8 where int4 loses the most, as `mistral-ext quantize --size` chooses.

    Args:
        ids: the tokens of a text by which to choose. Empty: random tokens are used, as without
            --calibrate.
    """

    def __init__(self, exact: Weights, config: MistralConfig, ids: list[int]) -> None:
        self._exact, self._config = exact, config
        self._ids = ids or random_tokens(config.vocab_size)
        self._sensitivities: dict[str, float] = {}

    def of_bits(self, bits: float) -> Quantization:
        """The formats with at most `bits` bits for a value of the layers' matrices, scales
        included."""
        if not self._sensitivities:
            measured = Sensitivities(self._exact.__getitem__, self._config)
            self._sensitivities = measured.measure(self._ids, progress=False)
        layout = layout_of(self._config, torch.float32, OURS["int4"])
        layers = [weight for name, weight in layout.items() if is_rounded(name, self._exact[name])]
        room = bits / 8 * sum(weight.shape.numel() for weight in layers)
        size = weights_size(layout) + math.floor(room - sum(weight.nbytes for weight in layers))
        return Mixture(size, self._config, torch.float32).best(self._sensitivities)


def of_weights(exact: Weights, made: Mapping[str, Weight | None]) -> Rounded:
    matrices, nbytes = {}, 0
    for name, weight in exact.items():
        if is_rounded(name, weight):
            matrices[name] = made[name].dequantize()
            nbytes += made[name].nbytes
    return rounded(exact, matrices, nbytes)


def of_file(exact: Weights, model: Path) -> Rounded:
    """Weights that are rounded as a folder or a GGUF file has them."""
    folder = read_folder(model)
    stored = load_weights(folder, torch.float32, progress=False)
    matrices, nbytes = {}, 0
    for name, weight in exact.items():
        if is_rounded(name, weight):
            found = stored[name]
            matrices[name] = found.dequantize() if isinstance(found, Quantized) else found
            nbytes += folder.gguf.tensors[gguf_name(name)].nbytes if folder.gguf else found.nbytes
    return rounded(exact, matrices, nbytes)


def ways(
    model: Path,
    exact: Weights,
    config: MistralConfig,
    calibration: list[int],
    folder: Path,
    mixed: Sequence[float] = (),
) -> Iterator[tuple[str, Callable[[], Rounded]]]:
    """Yields the name of each way to round, with a function that makes the weights.

    Args:
        model: a folder or a GGUF file. llama.cpp only rounds files.
        exact, config: the model's exact weights and its configuration.
        calibration: tokens to calibrate int4 with. Empty: calibrated int4 is left out.
        folder: a folder for the files that are made.
        mixed: numbers of bits of a value. int4 and int8 are mixed to reach each of them.
    """
    for name, quantization in OURS.items():
        yield name, lambda how=quantization: made_here(exact, how)
    if calibration:
        yield (
            "int4, calibrated",
            lambda: calibrated_here(exact, config, calibration, folder / "calibration"),
        )
    for ids in [[], calibration] if calibration else [[]]:
        mixtures = Mixtures(exact, config, ids)
        for bits in mixed:

            def mix(
                bits: float = bits, ids: list[int] = ids, mixtures: Mixtures = mixtures
            ) -> Rounded:
                chosen = mixtures.of_bits(bits)
                if not ids:
                    return made_here(exact, chosen)
                return calibrated_here(exact, config, ids, folder / "calibration", chosen)

            yield f"mixed to {bits:g}{', calibrated' if ids else ''}", mix
    if "llama.cpp" not in available() or not model.is_file():
        return
    for file_type in FILE_TYPES:

        def by_llama_cpp(file_type: str = file_type) -> Rounded:
            target = folder / f"{file_type}.gguf"
            quantize_file(model, target, file_type)
            return of_file(exact, target)

        yield f"llama.cpp's {file_type}", by_llama_cpp


def negative_log_likelihood(logits: Tensor, ids: list[int]) -> float:
    """The mean negative log-likelihood of the tokens after the first, in nats."""
    return functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:])).item()


def measure_peers(
    model: Path,
    config: MistralConfig,
    ids: list[int],
    calibration: list[int],
    folder: Path,
    compare: Callable[[Tensor, Tensor], dict[str, float]],
    mixed: Sequence[float] = (),
) -> dict[str, dict[str, Any]]:
    """Prints and returns a row for each way.

    Args:
        ids: the tokens. The logits after each of them are compared.
        compare: the function `compare` of quality.py.
        mixed: numbers of bits of a value. int4 and int8 are mixed to reach each of them.
    """

    def logits_of(weights: Weights) -> Tensor:
        llm = Mistral(config, Transformer(config, weights), None, model)
        return llm.logits(ids, chunk=512)

    stored = load_weights(read_folder(model), torch.float32, progress=False)
    exact = {
        name: weight.dequantize() if isinstance(weight, Quantized) else weight
        for name, weight in stored.items()
    }
    expected = logits_of(exact)
    base = negative_log_likelihood(expected, ids)
    rows: dict[str, dict[str, Any]] = {"fp32": {"perplexity": math.exp(base)}}
    print_header(COLUMNS)
    print_row(COLUMNS, ["fp32", "", "", f"{math.exp(base):.3f}", "", ""])
    for name, make in ways(model, exact, config, calibration, folder, mixed):
        made = make()
        logits = logits_of(made.weights)
        row = {"bits": made.bits, "perplexity": math.exp(negative_log_likelihood(logits, ids))}
        row |= compare(logits, expected)
        rows[name] = row
        cells = [f"{row['bits']:.2f}", f"{row['kl']:.2e}", f"{row['perplexity']:.3f}"]
        cells += [f"{row['perplexity'] / math.exp(base) - 1:+.1%}", f"{row['same_top']:.1%}"]
        print_row(COLUMNS, [name, *cells])
    return rows
