"""Runs a layer in float32 over a whole sequence, to calibrate (calibrate.py) or to measure
sensitivities (sensitivity.py). The caller gives a function that multiplies by the layer's matrices,
so the caller sees the inputs of each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.model import rope
from mistral_ext.model.config import MistralConfig

# Calibration splits a text into sequences of so many tokens. Attention does not cross sequences, so
# its time grows with the length of the text, and not with the square of the length.
SEQUENCE = 1024

# A function that computes the product [T, N] of an input [T, K] with the matrix of a name such as
# "attention.wq".
Product = Callable[[Tensor, str], Tensor]


def embed(token_ids: Sequence[int], embeddings: Tensor) -> Tensor:
    """Returns the hidden states [T, E] float32 before the first layer.

    Args:
        embeddings: [V, E], the embedding of each token of the vocabulary.

    Raises:
        ValueError: there is no token, or a token is not in the vocabulary.
    """
    tokens = torch.tensor(token_ids, dtype=torch.int64, device="cpu")
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= len(embeddings):
        raise ValueError(
            f"token_ids has {len(tokens)} tokens of a vocabulary of {len(embeddings)}, expected at "
            f"least one, each 0 to {len(embeddings) - 1}"
        )
    return embeddings.index_select(0, tokens).float()


def product(layer: Mapping[str, Tensor], x: Tensor, name: str) -> Tensor:
    """Returns the product [T, N] of x [T, K] with the matrix `name` of a layer, such as
    "attention.wq"."""
    return ops.linear(x, layer[f"{name}.weight"])


class LayerRunner:
    """Runs the layers of a model. Torch records a gradient if the hidden states require one."""

    def __init__(self, config: MistralConfig) -> None:
        self._config = config
        self._frequencies = rope.frequencies(
            config.rope_theta, config.head_dim, "cpu", config.rope_scaling
        )

    def run(self, layer: Mapping[str, Tensor], h: Tensor, product: Product) -> Tensor:
        """Returns the hidden states [T, E] after a layer, from the hidden states before it, which
        do not change.

        Args:
            layer: float32 weights by their names in the layer. This function uses only the norms.
            h: [T, E] float32, the hidden states of a sequence before the layer.
            product: a function that computes the products. It is called once for each matrix, in
                this order: wq, wk, wv, wo, w1, w3, w2.
        """
        x = self.normed(h, layer["attention_norm.weight"])
        h = h + product(self.attended(x, product), "attention.wo")
        x = self.normed(h, layer["ffn_norm.weight"])
        return h + product(self.gated(x, product), "feed_forward.w2")

    def normed(self, h: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of hidden states [T, E], the input of attention or of the feed-forward block."""
        return ops.rms_norm(h, weight, self._config.norm_eps)

    def size(self, h: Tensor) -> Tensor:
        """The numbers [T] by which an RMSNorm divides hidden states [T, E]."""
        return (h.square().mean(1) + self._config.norm_eps).sqrt()

    def attended(self, x: Tensor, product: Product) -> Tensor:
        """The input [T, H * D] of wo, from the input [T, E] of wq, wk and wv. The T tokens are a
        sequence."""
        config = self._config
        sequences = torch.tensor([[0, len(x), 0, 0, len(x)]], device="cpu")
        q, k, v = (
            product(x, f"attention.{name}").unflatten(1, (-1, config.head_dim))
            for name in ("wq", "wk", "wv")
        )
        q, k = (ops.rotate(heads, sequences, self._frequencies) for heads in (q, k))
        window, scale = config.sliding_window, config.attention_scale
        return ops.attention(q, k, v, None, None, sequences, window, scale).flatten(1)

    def gated(self, x: Tensor, product: Product) -> Tensor:
        """The input [T, F] of w2, from the input [T, E] of w1 and w3."""
        return ops.swiglu(product(x, "feed_forward.w1"), product(x, "feed_forward.w3"))
