"""The Mistral transformer, top to bottom.

Shape letters: T new tokens of all sequences of a call, packed; E model dimension; F hidden
dimension; Hq query and Hkv key/value heads; D head dimension; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.model import rope
from mistral_ext.model.config import MistralConfig
from mistral_ext.ops import Quantized, Weight


class Cache(Protocol):
    """Where keys and values are: a pool [R, D] for each layer, keys in `k` and values in `v`."""

    k: list[Tensor]
    v: list[Tensor]


@dataclass
class Layer:
    """Weights of one block, named as in Mistral's own checkpoints."""

    attention_norm: Tensor  # [E]
    wq: Weight  # [Hq * D, E]
    wk: Weight  # [Hkv * D, E]
    wv: Weight  # [Hkv * D, E]
    wo: Weight  # [E, Hq * D]
    ffn_norm: Tensor  # [E]
    w1: Weight  # [F, E], gate
    w2: Weight  # [E, F], down
    w3: Weight  # [F, E], up


class Transformer:
    """The model without tokenizer or sampling: token ids and a cache in, logits out.

    Args:
        config: its shape and constants.
        weights: from `checkpoint.load_weights`, kept and not copied. Matrices may be `Quantized`,
            but for the embeddings.
    """

    def __init__(self, config: MistralConfig, weights: Mapping[str, Weight]):
        self.config = config
        self.embeddings = _plain(weights, "tok_embeddings.weight")  # [V, E]
        self.norm = _plain(weights, "norm.weight")  # [E]
        self.output = weights["output.weight"]  # [V, E]
        self.frequencies = rope.frequencies(
            config.rope_theta, config.head_dim, self.device, config.rope_scaling
        )
        self.layers = []
        for i in range(config.n_layers):
            attention, feed_forward = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
            self.layers.append(
                Layer(
                    attention_norm=_plain(weights, f"layers.{i}.attention_norm.weight"),
                    **{w: weights[f"{attention}{w}.weight"] for w in ("wq", "wk", "wv", "wo")},
                    ffn_norm=_plain(weights, f"layers.{i}.ffn_norm.weight"),
                    **{w: weights[f"{feed_forward}{w}.weight"] for w in ("w1", "w2", "w3")},
                )
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; those of the embeddings once, if the output shares them."""
        weights: list[Weight] = [self.embeddings, self.norm, self.output]
        for layer in self.layers:
            weights += vars(layer).values()
        return sum(weight.nbytes for weight in {id(weight): weight for weight in weights}.values())

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def forward(
        self, token_ids: Tensor, sequences: Tensor, cache: Cache, rows: Tensor | None = None
    ) -> Tensor:
        """Runs new tokens through all layers and appends them to the cache.

        Args:
            token_ids: [T] int64 on the CPU, the new tokens of all sequences.
            sequences: the sequence table on the CPU (see `mistral_ext.ops`).
            cache: where keys and values are.
            rows: [N] int64 on the CPU, which of the T tokens to compute logits for; None: all.

        Returns:
            [N, V] fp32 logits, on the model's device.
        """
        max_count = int(sequences[:, 1].max())
        rows = None if rows is None else rows.to(self.device)
        h = self.step(token_ids.to(self.device), sequences.to(self.device), cache, max_count, rows)
        return self.logits(h)

    @torch.inference_mode()
    def step(
        self,
        token_ids: Tensor,
        sequences: Tensor,
        cache: Cache,
        max_count: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`forward` up to the logits, with tensors that are on the model's device already. Does not
        wait for the device.

        Args:
            max_count: no sequence has more new tokens than this.

        Returns:
            [N, E], the residual stream, for `logits` or `greedy`.
        """
        config = self.config
        eps, window, scale = config.norm_eps, config.sliding_window, config.attention_scale

        # Not embeddings[token_ids]: for that torch wakes its threads even for one row, and on the
        # CPU they then spin for milliseconds on the cores that ours need.
        h = self.embeddings.index_select(0, token_ids)  # [T, E], the residual stream
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        for layer, k_pool, v_pool in zip(self.layers, cache.k, cache.v, strict=True):
            weights, rings = (layer.wq, layer.wk, layer.wv), (k_pool, v_pool, sequences)
            rotated = *rings, self.frequencies, window
            qkv = ops.linear_rope(h, weights, layer.attention_norm, eps, *rotated)
            qkv = qkv.unflatten(1, (-1, config.head_dim))  # [T, Hq + Hkv + Hkv, D]
            q, k, v = qkv.split(heads, dim=1)  # [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
            x = ops.attention(q, k, v, *rings, window, scale, max_count)  # [T, Hq, D]
            if rows is not None and layer is self.layers[-1]:
                # From here on tokens do not see each other: those without logits are done.
                x, h = x.index_select(0, rows), h.index_select(0, rows)  # [N, ...]
            ops.linear_residual(x.flatten(1), layer.wo, h)
            x = ops.linear_swiglu(h, layer.w1, layer.w3, layer.ffn_norm, eps)  # [T, F]
            ops.linear_residual(x, layer.w2, h)
        return h

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """[N, V] fp32."""
        return ops.linear(h, self.output, self.norm, self.config.norm_eps).float()

    @torch.inference_mode()
    def greedy(self, h: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """[N, V] logits in the model's dtype, and [N] the token ids of the largest ones among the
        first `vocab_size`, -1 where there is no choice: `ops.linear_argmax`."""
        return ops.linear_argmax(h, self.output, self.norm, self.config.norm_eps, vocab_size)


def _plain(weights: Mapping[str, Weight], name: str) -> Tensor:
    """A weight that may not be quantised."""
    weight = weights[name]
    if isinstance(weight, Quantized):
        raise TypeError(f"{name} is quantised, expected a tensor")
    return weight
