"""Rounds weights by the inputs that the layers of a model get: `mistral-ext quantize --calibrate`.

A text is run through the model, one layer at a time. The mean products of a matrix's inputs are its
Hessian. It says how much an error in each weight counts, and how other weights can compensate it.
So a matrix is rounded column by column, and the error of each column is compensated in the columns
that follow (GPTQ, Frantar et al. 2022, arXiv:2210.17323). Then the text goes on through the rounded
layer, so that later layers see its errors.

The memory needed is that of one layer in fp32, of the Hessian of its longest rows and some copies
of it, and of the hidden states of all tokens. Finished layers are kept in a folder, so that a run
that was interrupted continues there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Quantized, Weight
from mistral_ext.ops.quantize import round_with_feedback
from mistral_ext.ops.weight import FORMATS
from mistral_ext.weights import whole_layer
from mistral_ext.weights.quantize import Quantization, expect_finite, has_table
from mistral_ext.weights.whole_layer import SEQUENCE, LayerRunner, embed

_DAMPING = 0.01  # as in GPTQ: added to the diagonal of a Hessian, relative to its mean
_BLOCK = 256  # columns of a block; errors are compensated block by block

# The groups of matrices that have the same input.
_INPUTS = {
    "attention": ("attention.wq", "attention.wk", "attention.wv"),
    "attended": ("attention.wo",),
    "feed_forward": ("feed_forward.w1", "feed_forward.w3"),
    "hidden": ("feed_forward.w2",),
}


class CalibratedLayers:
    """Rounds the layers of a model one after another.

    Args:
        config: the configuration of the model.
        quantization: the formats of the weights. The formats of the layers must have a table of
            values.
        embedded: [T, E] fp32, the embeddings of a text's tokens.
        kept: a folder for finished layers. It is made if it does not exist.
        identity: everything else that the result depends on, such as a hash of the text.

    Raises:
        ValueError: the folder `kept` belongs to another run.
    """

    def __init__(
        self,
        config: MistralConfig,
        quantization: Quantization,
        embedded: Tensor,
        kept: Path,
        identity: str,
    ) -> None:
        self._runner, self._quantization, self._kept = LayerRunner(config), quantization, kept
        identity = f"{identity} {quantization!r} {config}"
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._hidden, self.done = embedded.clone(), 0
        kept.mkdir(parents=True, exist_ok=True)
        if (kept / "hidden.pt").exists():
            state = load_state(kept / "hidden.pt", self._identity)
            self._hidden, self.done = state["hidden"], state["done"]

    def rounded(self, index: int, layer: dict[str, Tensor]) -> dict[str, Weight]:
        """Rounds layer `index`, and returns its weights by their names in the layer. The caller
        must take the layers in order."""
        file = self._kept / f"{index}.pt"
        if index < self.done:
            stored = _load(file)
            return {name: _weight(parts, layer[name]) for name, parts in stored.items()}
        wide = {name: weight.float() for name, weight in layer.items()}
        hessians = self._hessians(wide)
        made: dict[str, Weight] = dict(layer)
        for source, names in _INPUTS.items():
            hessian, factor = hessians.pop(source), None
            for name in (f"{name}.weight" for name in names):
                full_name, weight = f"layers.{index}.{name}", wide[name]
                out = self._quantization.empty(full_name, tuple(weight.shape), weight.device)
                if out is not None and has_table(out.format):
                    expect_finite(weight.abs().amax(1), full_name)
                    factor = factor or _factor(hessian)
                    errors = weight.clone()  # the weight may belong to a file
                    _round(errors, *factor, out)
                    _expect_finite_errors(errors, weight, full_name, out.format)
                else:  # errors of 8 bits are too small to compensate
                    out = self._quantization.quantize(full_name, weight, full_name)
                assert out is not None  # all matrices of layers are quantised
                made[name], wide[name] = out, out.dequantize()
        for tokens in self._hidden.split(SEQUENCE):
            tokens.copy_(self._runner.run(wide, tokens, partial(whole_layer.product, wide)))
        save_state({name: _parts(weight) for name, weight in made.items()}, file)
        self.done = index + 1
        state = {"identity": self._identity, "hidden": self._hidden, "done": self.done}
        save_state(state, self._kept / "hidden.pt")
        return made

    def _hessians(self, layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each input of the layer's products, computes a matrix [K, K]: the products of the
        input's elements with each other, summed over all tokens."""
        hessians: dict[str, Tensor] = {}
        for source, names in _INPUTS.items():
            size = layer[f"{names[0]}.weight"].shape[1]
            hessians[source] = torch.zeros(size, size, dtype=torch.float32, device="cpu")
        first = {names[0]: source for source, names in _INPUTS.items()}

        def product(x: Tensor, name: str) -> Tensor:
            if name in first:
                hessians[first[name]].addmm_(x.T, x)
            return whole_layer.product(layer, x, name)

        for tokens in self._hidden.split(SEQUENCE):
            self._runner.run(layer, tokens, product)
        return hessians


def identity_of(token_ids: Sequence[int], embeddings: Tensor) -> str:
    """A hash of a text and of a model's embeddings."""
    tokens = torch.tensor(token_ids, dtype=torch.int64, device="cpu")
    return hashlib.sha256(tokens.numpy().tobytes() + _bytes(embeddings)).hexdigest()


def calibrated(
    weights: Iterator[tuple[str, Weight]],
    config: MistralConfig,
    quantization: Quantization,
    token_ids: Sequence[int],
    kept: Path,
    dtype: torch.dtype,
    progress: bool = True,
) -> Iterator[tuple[str, Weight]]:
    """Quantises the weights of a model by the inputs that its layers get from a text.

    Args:
        weights: the weights by Mistral's names, not quantised, in the order of
            `checkpoint.tensor_shapes`. The output matrix may be missing.
        config: the configuration of the model.
        quantization: the formats of the weights. The format of the layers is "iq4_xs" or "iq4_nl".
        token_ids: the tokens of the text.
        kept: a folder for finished layers. It is removed when all layers are done.
        dtype: the dtype of the weights that are not quantised.
        progress: show a progress bar if stderr is a terminal.

    Yields:
        Mistral's names and the quantised weights. The output matrix is always among them.

    Raises:
        ValueError: a token is not in the vocabulary, `kept` belongs to another run, or a weight is
            NaN, infinite or too large for the scales.
    """
    _, embeddings = next(weights)
    assert isinstance(embeddings, Tensor)
    embedded = embed(token_ids, embeddings)
    identity = identity_of(token_ids, embeddings)
    layers = CalibratedLayers(config, quantization, embedded, kept, identity)
    yield "tok_embeddings.weight", embeddings.to(dtype)
    output, layer = embeddings, dict[str, Tensor]()
    with tqdm(
        desc="calibrating", total=config.n_layers, unit="layer", disable=None if progress else True
    ) as bar:
        for name, weight in weights:
            assert isinstance(weight, Tensor)
            if name == "output.weight":
                output = weight
            elif name == "norm.weight":
                yield name, weight.to(dtype)
            else:
                _, index, in_layer = name.split(".", 2)
                layer[in_layer] = weight
                if in_layer == "feed_forward.w3.weight":  # this is the last weight of a layer
                    for made, rounded in layers.rounded(int(index), layer).items():
                        if isinstance(rounded, Tensor):
                            rounded = rounded.to(dtype)
                        yield f"layers.{index}.{made}", rounded
                    layer = {}
                    bar.update()
    quantized = quantization.quantize("output.weight", output, "output.weight")
    yield "output.weight", output if quantized is None else quantized
    shutil.rmtree(kept)


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper Cholesky factor [K, K] of the inverse Hessian, and [K], how much an error
    in each input counts."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    importance = (diagonal / mean).contiguous()
    diagonal.add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).contiguous(), importance


def _round(weight: Tensor, factor: Tensor, importance: Tensor, out: Quantized) -> None:
    """Rounds a weight [N, K] fp32 into `out`. Overwrites the weight with the errors, as
    `round_with_feedback` does."""
    facts, columns = FORMATS[out.format], weight.shape[1]
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        part = weight[:, begin:end]
        values = out.values[:, facts.elements(begin) : facts.elements(end)]
        first, last = (at // facts.least_group * facts.group_scales for at in (begin, end))
        of_block = Quantized(values, out.scales[:, first:last], out.format)
        round_with_feedback(part, factor[begin:end, begin:end], of_block, importance[begin:end])
        weight[:, end:].addmm_(part, factor[begin:end, end:], alpha=-1)


def _expect_finite_errors(errors: Tensor, weight: Tensor, name: str, format: str) -> None:
    if not errors.isfinite().all():
        raise ValueError(
            f"tensor {name!r} holds magnitudes up to {weight.abs().max():g} and leaves errors that "
            f"are not finite: it cannot be quantised to {format!r} with this text"
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor[::97].contiguous().view(torch.uint8).numpy().tobytes()


def _parts(weight: Weight) -> tuple[Tensor, Tensor, str] | None:
    """The parts of a quantised weight, to be kept in a file of the layer. Returns None for other
    weights, which are read from the model again."""
    return None if isinstance(weight, Tensor) else (weight.values, weight.scales, weight.format)


def _weight(parts: tuple[Tensor, Tensor, str] | None, plain: Tensor) -> Weight:
    return plain if parts is None else Quantized(*parts)


def save_state(state: dict[str, Any], file: Path) -> None:
    """Writes a state to a file. Even after an interruption the file is complete or absent."""
    partial = file.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, file)


def load_state(file: Path, identity: str) -> dict[str, Any]:
    """Reads a state that `save_state` wrote. The state has a key "identity".

    Raises:
        ValueError: the state has another identity than `identity`.
    """
    state = _load(file)
    if state["identity"] != identity:
        raise ValueError(
            f"{str(file.parent)!r} is of another calibration, expected the same arguments, or "
            "remove it"
        )
    return state


def _load(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state
