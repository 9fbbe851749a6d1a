"""Rounds the weights of a model so that the outputs of its layers for a text change little:
`mistral-ext quantize --calibrate`.

The text is run through the model once, one layer at a time. The Hessian of a matrix is the sum,
over all tokens, of the products of the matrix's inputs with each other. It says how much an error
in each weight counts, and how other weights can compensate the error. So a matrix is rounded with
error feedback (error_feedback.py). Then the text goes on through the rounded matrix, so that later
matrices see its errors and can compensate them.

The output of wo and w2 is added to the residual stream, and the next norm divides the sum by its
size (root mean square). So errors of wo and w2 count relative to this size. Otherwise a single
token could decide how wo and w2 are rounded: in many models the residual stream of the first token
is a hundred times as large as that of other tokens (Sun et al. 2024, arXiv:2402.17762).

The memory holds one layer in fp32, the hidden states of all tokens, and, for the matrix with the
longest rows, its Hessian and the inputs of all tokens. If the embeddings are also the output
matrix, the memory holds the embeddings in fp32, too. Finished layers are kept in a folder
(kept.py). If a calibration is interrupted, the next call continues from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Quantized, Weight
from mistral_ext.weights import whole_layer
from mistral_ext.weights.error_feedback import Factor, factor_of, round_by
from mistral_ext.weights.kept import (
    HIDDEN,
    hash_of_text,
    hash_of_weights,
    load_state,
    save_state,
)
from mistral_ext.weights.quantize import Quantization, expect_finite, has_table
from mistral_ext.weights.whole_layer import SEQUENCE, LayerRunner, embed


class CalibratedLayers:
    """Rounds the layers of a model one after another.

    Args:
        config: the configuration of the model.
        quantization: the formats of the weights. Only matrices in "iq4_nl" and "iq4_xs" are rounded
            with error feedback.
        embedded: [T, E] fp32, the embeddings of a text's tokens. They are overwritten.
        kept: a folder for finished layers. It is made if it does not exist.
        identity: a hash of the text and the embeddings. The weights of the layers need not go into
            it, because `rounded` compares them itself.

    Attributes:
        done: the number of finished layers, those of earlier calls included.

    Raises:
        ValueError: the folder `kept` belongs to another text, configuration or quantisation, or is
            damaged.
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
        self._hidden, self.done = embedded, 0
        kept.mkdir(parents=True, exist_ok=True)
        if (kept / HIDDEN).exists():
            state = load_state(kept / HIDDEN, self._identity)
            self._hidden, self.done = state["hidden"], state["done"]

    def rounded(self, index: int, layer: dict[str, Tensor]) -> dict[str, Weight]:
        """Rounds a layer, or reads it from the folder if it is finished. The caller must take the
        layers in order.

        Args:
            index: the number of the layer.
            layer: its weights by their names in the layer. The dict is emptied, to save memory.

        Returns:
            The rounded matrices and the norms, by their names in the layer.

        Raises:
            ValueError: an earlier call rounded the layer from other weights, or the layer's file is
                damaged, or the layer cannot be rounded.
        """
        file, identity = self._kept / f"{index}.pt", hash_of_weights(layer.values())
        if index < self.done:
            stored = load_state(file, identity)["weights"]
            return {name: _weight(parts, layer.pop(name)) for name, parts in stored.items()}
        made = self._run_and_round(index, layer)
        parts = {name: _parts(weight) for name, weight in made.items()}
        save_state({"identity": identity, "weights": parts}, file)
        self.done = index + 1
        state = {"identity": self._identity, "hidden": self._hidden, "done": self.done}
        save_state(state, self._kept / HIDDEN)
        return made

    def _run_and_round(self, index: int, layer: dict[str, Tensor]) -> dict[str, Weight]:
        """Rounds a layer, and moves the hidden states through it. The inputs of each matrix have
        come through the matrices before it, which are rounded already."""
        runner, hidden = self._runner, self._hidden.split(SEQUENCE)
        wide = {name: layer.pop(name).float() for name in list(layer)}
        made: dict[str, Weight] = {name: norm for name, norm in wide.items() if norm.dim() == 1}

        def product(x: Tensor, name: str) -> Tensor:
            return whole_layer.product(wide, x, name)

        def round_all(x: list[Tensor], *names: str, sizes: Sequence[Tensor] | None = None) -> None:
            self._round(index, x, sizes, [f"{name}.weight" for name in names], wide, made)

        def add_product(x: list[Tensor], name: str) -> None:
            for part, sums in zip(x, hidden, strict=True):
                sums.add_(product(part, name))

        x = [runner.normed(h, wide["attention_norm.weight"]) for h in hidden]
        round_all(x, "attention.wq", "attention.wk", "attention.wv")
        x = [runner.attended(part, product) for part in x]
        round_all(x, "attention.wo", sizes=[runner.size(h) for h in hidden])
        add_product(x, "attention.wo")
        for name in ("wq", "wk", "wv", "wo"):
            del wide[f"attention.{name}.weight"]
        x = [runner.normed(h, wide["ffn_norm.weight"]) for h in hidden]
        round_all(x, "feed_forward.w1", "feed_forward.w3")
        x = [runner.gated(part, product) for part in x]
        # The next step needs the most memory, so the matrices that are done with are freed first.
        del wide["feed_forward.w1.weight"], wide["feed_forward.w3.weight"]
        round_all(x, "feed_forward.w2", sizes=[runner.size(h) for h in hidden])
        add_product(x, "feed_forward.w2")
        return made

    def _round(
        self,
        index: int,
        x: list[Tensor],
        sizes: Sequence[Tensor] | None,
        names: list[str],
        wide: dict[str, Tensor],
        made: dict[str, Weight],
    ) -> None:
        """Rounds the matrices `names`, which all have the inputs x, [T, K] for each sequence. Adds
        the rounded matrices to `made`, and replaces those in `wide` by the rounded values in fp32.
        `sizes` is as in `error_feedback.hessian_of`."""
        factor = None
        for name in names:
            full_name, weight = f"layers.{index}.{name}", wide[name]
            out = self._quantization.empty(full_name, tuple(weight.shape), weight.device)
            if out is not None and has_table(out.format):
                expect_finite(weight.abs().amax(1), full_name)
                factor = factor or _factor(x, sizes, full_name)
                errors = round_by(factor, weight, out)
                _expect_finite_errors(errors, weight, full_name, out.format)
                wide[name] = torch.sub(weight, errors, out=errors)
            else:  # in 8 bits the errors are too small to be worth compensating
                out = self._quantization.quantize(full_name, weight, full_name)
                assert out is not None  # the layers' matrices are quantised
                wide[name] = out.dequantize()
            made[name] = out


def identity_of(token_ids: Sequence[int], embeddings: Tensor) -> str:
    """A hash of a text and of a model's embeddings. Fine-tunes with the same embeddings have the
    same hash; `CalibratedLayers.rounded` tells them apart."""
    return f"{hash_of_text(token_ids)} {hash_of_weights([embeddings])}"


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
        weights: pairs of Mistral's name and the weight, not quantised, in the order of
            `checkpoint.tensor_shapes`. The output matrix may be missing if the embeddings serve as
            output matrix.
        config: the configuration of the model.
        quantization: the formats of the weights. The format of the layers is "iq4_xs" or "iq4_nl",
            but single matrices may have 8 bits.
        token_ids: the tokens of the text.
        kept: a folder for finished layers. The caller removes it when the weights are on the disk.
        dtype: the dtype of the weights that are not quantised.
        progress: show a progress bar if stderr is a terminal.

    Yields:
        Pairs of Mistral's name and the weight. All matrices but the embeddings are quantised. If
        `weights` has no output matrix, one is made from the embeddings.

    Raises:
        ValueError: `token_ids` is empty, a token is not in the vocabulary, `kept` belongs to
            another model, text or quantisation or is damaged, a weight is NaN, infinite or too
            large for the scales, or the Hessian of a matrix is not finite or has no Cholesky factor
            in fp32.
    """
    _, embeddings = next(weights)
    assert isinstance(embeddings, Tensor)
    embedded, identity = embed(token_ids, embeddings), identity_of(token_ids, embeddings)
    layers = CalibratedLayers(config, quantization, embedded, kept, identity)
    del embedded  # this frees it if `layers` has read hidden states from `kept` instead
    yield "tok_embeddings.weight", embeddings.to(dtype)
    output, layer = embeddings if config.tie_word_embeddings else None, dict[str, Tensor]()
    del embeddings
    with tqdm(
        desc="calibrating",
        total=config.n_layers,
        initial=layers.done,
        unit="layer",
        disable=None if progress else True,
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
                del weight  # so that `rounded` can free it
                if in_layer == "feed_forward.w3.weight":  # this is the last weight of a layer
                    for made, rounded in layers.rounded(int(index), layer).items():
                        if isinstance(rounded, Tensor):
                            rounded = rounded.to(dtype)
                        yield f"layers.{index}.{made}", rounded
                    layer = {}
                    bar.update(layers.done - bar.n)
    assert output is not None  # `weights` has it, or the embeddings are the output
    quantized = quantization.quantize("output.weight", output, "output.weight")
    yield "output.weight", output if quantized is None else quantized


def _factor(x: list[Tensor], sizes: Sequence[Tensor] | None, name: str) -> Factor:
    try:
        return factor_of(x, sizes)
    except ValueError as error:
        raise ValueError(f"tensor {name!r} cannot be calibrated with this text: {error}") from error


def _expect_finite_errors(errors: Tensor, weight: Tensor, name: str, format: str) -> None:
    if not torch.stack(errors.aminmax()).isfinite().all():  # makes no tensor as large as `errors`
        raise ValueError(
            f"tensor {name!r} holds magnitudes up to {weight.abs().max():g} and leaves errors that "
            f"are not finite: it cannot be quantised to {format!r} with this text"
        )


def _parts(weight: Weight) -> tuple[Tensor, Tensor, str] | None:
    """The parts of a quantised weight, which are kept in the layer's file. Returns None for other
    weights, which are read from the model again."""
    return None if isinstance(weight, Tensor) else (weight.values, weight.scales, weight.format)


def _weight(parts: tuple[Tensor, Tensor, str] | None, plain: Tensor) -> Weight:
    return plain if parts is None else Quantized(*parts)
