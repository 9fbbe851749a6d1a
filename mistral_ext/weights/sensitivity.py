"""Measures how much a model loses if a matrix is rounded to 4 bits. The result decides which
matrices get 8 bits.

A change D of a matrix changes the distribution of each next token. To second order the mean KL
divergence of the new distributions from the old ones is half of the mean, over all tokens, of
(g . D x)^2. Here x is the input of the matrix at a token, and g is a gradient with respect to the
output of the matrix at this token. It is the gradient of the log-likelihood of next tokens that are
drawn from the model. (This is the Fisher information, whose diagonal SqueezeLLM uses: Kim et al.
2023, arXiv:2306.07629.)

The formula squares each g . D x on its own, so it takes the errors at different tokens as
independent. They are not: on SmolLM2 wk appears 1.3 times as sensitive as it is, and wv 0.6 times.
The square of the sum of g . D x over all tokens needs no such assumption, but leads to no better
choices.

A sequence is run through the model, and the gradient back, one layer at a time in float32. The
memory holds the hidden states before each layer. In addition, it holds at most two layers, or one
layer and the output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mistral_ext import ops
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Weight
from mistral_ext.weights import whole_layer
from mistral_ext.weights.checkpoint import tensor_shapes
from mistral_ext.weights.kept import (
    SENSITIVITIES,
    hash_of_text,
    hash_of_weights,
    load_state,
    save_state,
)
from mistral_ext.weights.quantize import Quantization, expect_finite
from mistral_ext.weights.whole_layer import LayerRunner, embed

_TOKENS = 512  # the number of tokens that are run; more tokens lead to no better choice
_SEED = 0
_SMALL = Quantization.from_bits(4)


def random_tokens(vocab_size: int) -> list[int]:
    """Random tokens, for use if there is no text. The choice of matrices is nearly as good with
    them."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(vocab_size, (_TOKENS,), generator=generator).tolist()


class Sensitivities:
    """Measures how much a model loses if matrices of its layers are rounded to 4 bits.

    Args:
        read: a function that returns a weight by Mistral's name, not quantised.
        config: the configuration of the model.
    """

    def __init__(self, read: Callable[[str], Weight], config: MistralConfig) -> None:
        self._read_weight, self._config, self._runner = read, config, LayerRunner(config)

    def measure(self, token_ids: Sequence[int], progress: bool = True) -> dict[str, float]:
        """The loss by 4 bits in each matrix (KL divergence in nats per token), by Mistral's names.

        Args:
            token_ids: the tokens of a text. The first 512 are used.
            progress: show a progress bar if stderr is a terminal.

        Raises:
            ValueError: there is no token, a token is not in the vocabulary, or a weight is NaN,
                infinite or too large for the scales.
        """
        n_layers, found = self._config.n_layers, dict[str, float]()
        with tqdm(
            desc="measuring sensitivities",
            total=2 * n_layers,
            unit="layer",
            disable=None if progress else True,
        ) as bar:
            states = [embed(token_ids[:_TOKENS], self._read("tok_embeddings.weight"))]
            for index in range(n_layers):
                layer = self._layer(index)
                states.append(
                    self._runner.run(layer, states[-1], partial(whole_layer.product, layer))
                )
                bar.update()
            gradient = self._gradient(states.pop())
            for index in reversed(range(n_layers)):
                gradient = self._back(index, states.pop(), gradient, found)
                bar.update()
        return {name: found[name] for name in tensor_shapes(self._config) if name in found}

    def measure_once(
        self, token_ids: Sequence[int], kept: Path, progress: bool = True
    ) -> dict[str, float]:
        """Does the same as `measure`, and keeps the result in a folder. Later calls read the result
        from there.

        Args:
            token_ids, progress: as in `measure`.
            kept: the folder. It is made if it does not exist.

        Raises:
            ValueError: as in `measure`, or the folder belongs to another text or model, or is
                damaged.
        """
        # This call is only for its check of all tokens. `measure` checks only the first 512.
        embed(token_ids, self._read("tok_embeddings.weight"))
        weights = hash_of_weights(map(self._unchecked, tensor_shapes(self._config)))
        identity = f"{hash_of_text(token_ids)} {weights} {self._config}"
        file = kept / SENSITIVITIES
        if not file.exists():
            state = {"identity": identity, "found": self.measure(token_ids, progress)}
            kept.mkdir(parents=True, exist_ok=True)
            save_state(state, file)
        found: dict[str, float] = load_state(file, identity)["found"]
        return found

    def _gradient(self, h: Tensor) -> Tensor:
        """The gradient [T, E] of the log-likelihood of drawn tokens, with respect to the last
        hidden states [T, E]."""
        h.requires_grad_()
        x = ops.rms_norm(h, self._read("norm.weight"), self._config.norm_eps)
        logarithms = (x @ self._read("output.weight").T).log_softmax(-1)
        generator = torch.Generator().manual_seed(_SEED)
        drawn = torch.multinomial(logarithms.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(logarithms.gather(1, drawn).sum(), h)
        return gradient

    def _back(self, index: int, h: Tensor, gradient: Tensor, found: dict[str, float]) -> Tensor:
        """Takes the gradient with respect to the hidden states after a layer, and returns the
        gradient with respect to the states `h` before it. Adds the loss by 4 bits in each matrix of
        the layer to `found`."""
        layer = self._layer(index)

        def measure(name: str, x: Tensor, of_output: Tensor) -> None:
            weight, full_name = layer[name], f"layers.{index}.{name}"
            rounded = _SMALL.quantize(full_name, weight, full_name)
            assert rounded is not None  # all matrices of layers are quantised
            changes = x @ rounded.dequantize().sub_(weight).T
            found[full_name] = changes.mul_(of_output).sum(1).square_().mean().item() / 2

        def product(x: Tensor, name: str) -> Tensor:
            y = whole_layer.product(layer, x, name)
            y.register_hook(partial(measure, f"{name}.weight", x.detach()))
            return y

        h.requires_grad_()
        after = self._runner.run(layer, h, product)
        (before,) = torch.autograd.grad(after, h, gradient)
        return before

    def _layer(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer, by their names in the layer."""
        prefix = f"layers.{index}."
        names = (name for name in tensor_shapes(self._config) if name.startswith(prefix))
        return {name.removeprefix(prefix): self._read(name) for name in names}

    def _unchecked(self, name: str) -> Tensor:
        weight = self._read_weight(name)
        assert isinstance(weight, Tensor)  # the model is not quantised
        return weight

    def _read(self, name: str) -> Tensor:
        weight = self._unchecked(name)
        expect_finite(weight.abs().amax(), name)
        return weight.float()
