"""The Mistral transformer, from embeddings to logits.

Shape letters: T new tokens of all sequences of a call, packed one after another; E model dimension;
F hidden dimension of the feed-forward; Hq query heads; Hkv key/value heads; D head dimension; V
vocabulary size; R rows of a layer's key or value pool; N tokens for which logits are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.model import rope
from mistral_ext.model.adapters import GROUPS, Adapters, LayerAdapters
from mistral_ext.model.config import JOINED_GATE_UP, JOINED_QKV, MistralConfig
from mistral_ext.ops import JoinedWeight, Weight, Weights


class Cache(Protocol):
    """The memory of keys (`k`) and values (`v`), with a pool [R, D] for each layer."""

    k: list[Tensor]
    v: list[Tensor]


@dataclass
class Layer:
    """The weights of one layer. `qkv` and `gate_up` each hold weights that are multiplied in one
    pass. The other names are those of Mistral's own checkpoints."""

    attention_norm: Tensor  # [E]
    qkv: Weights  # wq [Hq * D, E], wk [Hkv * D, E], wv [Hkv * D, E]
    wo: Weight  # [E, Hq * D]
    ffn_norm: Tensor  # [E]
    gate_up: Weights  # w1 [F, E], w3 [F, E]
    w2: Weight  # [E, F]


class Transformer:
    """The model without tokenizer and sampling. It takes token ids and a cache, and returns logits.

    Args:
        config: the shapes and constants of the model.
        weights: the result of `weights.checkpoint.load_weights`. The tensors are not copied.
            Matrices may be `Quantized`.

    Attributes:
        adapters: the LoRA adapters that tokens of a pass may use. At first there are no adapters.
    """

    def __init__(self, config: MistralConfig, weights: Mapping[str, Weight | JoinedWeight]):
        self.config = config
        self.embeddings = _matrix(weights, "tok_embeddings.weight")  # [V, E]
        self.norm = _plain(weights, "norm.weight")  # [E]
        self.output = _matrix(weights, "output.weight")  # [V, E]
        self.frequencies = rope.frequencies(
            config.rope_theta, config.head_dim, self.device, config.rope_scaling
        )
        self.layers: list[Layer] = []
        for i in range(config.n_layers):
            attention, feed_forward = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
            self.layers.append(
                Layer(
                    attention_norm=_plain(weights, f"layers.{i}.attention_norm.weight"),
                    qkv=_together(weights, JOINED_QKV.format(i), attention, "wq", "wk", "wv"),
                    wo=_matrix(weights, f"{attention}wo.weight"),
                    ffn_norm=_plain(weights, f"layers.{i}.ffn_norm.weight"),
                    gate_up=_together(weights, JOINED_GATE_UP.format(i), feed_forward, "w1", "w3"),
                    w2=_matrix(weights, f"{feed_forward}w2.weight"),
                )
            )
        of_groups = {group: shapes(getattr(self.layers[0], group)) for group in GROUPS}
        self.adapters = Adapters(config.n_layers, of_groups, self.norm)

    @property
    def nbytes(self) -> int:
        """The bytes of the weights and adapters. A matrix that serves as embeddings and as output
        matrix counts once."""
        weights = self.embeddings, self.norm, self.output, *self.weights_of_layers()
        each = {id(weight): weight for weight in weights}.values()
        return self.adapters.nbytes + sum(weight.nbytes for weight in each)

    def weights_of_layers(self) -> list[Weight | JoinedWeight]:
        """Returns all weights of the layers, layer by layer."""
        weights: list[Weight | JoinedWeight] = []
        for layer in self.layers:
            for weight in vars(layer).values():
                weights += weight if isinstance(weight, list) else [weight]
        return weights

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def forward(
        self, token_ids: Tensor, sequences: Tensor, cache: Cache, rows: Tensor | None = None
    ) -> Tensor:
        """Runs new tokens through all layers and appends them to the cache.

        Args:
            token_ids: [T] int64 on the CPU, the new tokens of all sequences.
            sequences: the sequence table on the CPU (see `mistral_ext.ops`).
            cache: the memory of keys and values.
            rows: [N] int64 on the CPU, the tokens for which to compute logits. None: all T tokens.

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
        adapters: Tensor | None = None,
        layers: range | None = None,
        h: Tensor | None = None,
    ) -> Tensor:
        """Runs new tokens through some or all layers, without computing logits. The call does not
        wait for the device.

        Args:
            token_ids, sequences, rows: as in `forward`, but on the model's device.
            cache: as in `forward`.
            max_count: an upper bound of the number of new tokens of any sequence.
            adapters: [T] int32, the slot of each token's adapter in the attribute `adapters`, or -1
                for a token without an adapter. None: no token has an adapter. The bits of a token
                without an adapter do not depend on the adapters of other tokens.
            layers: the layers to run. None: all layers.
            h: [T, E], the result of the call for the previous layers. This call changes it. None:
                the call begins with the embeddings of `token_ids`.

        Returns:
            The residual stream. After the last layer of the model this is [N, E], for `logits`,
            `greedy` or `hidden`. After another layer it is [T, E].
        """
        config = self.config
        eps, window, scale = config.norm_eps, config.sliding_window, config.attention_scale

        if h is None:
            h = self.embed(token_ids)  # [T, E], the residual stream
        heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        for i in range(config.n_layers) if layers is None else layers:
            layer = self.layers[i]
            rings = cache.k[i], cache.v[i], sequences
            rotated = *rings, self.frequencies, window
            adapted = self.adapters.of_layer(i, adapters)
            if "qkv" in adapted:  # adapters are added before RoPE, which is then an op of its own
                x = ops.rms_norm(h, layer.attention_norm, eps)
                qkv = ops.linear(x, layer.qkv)
                adapted.add("qkv", x, qkv)
            else:
                qkv = ops.linear_rope(h, layer.qkv, layer.attention_norm, eps, *rotated)
            qkv = qkv.unflatten(1, (-1, config.head_dim))  # [T, Hq + Hkv + Hkv, D]
            q, k, v = qkv.split(heads, dim=1)  # [T, Hq, D], [T, Hkv, D], [T, Hkv, D]
            if "qkv" in adapted:
                ops.rope(q, k, v, *rotated)
            x = ops.attention(q, k, v, *rings, window, scale, max_count)  # [T, Hq, D]
            if rows is not None and layer is self.layers[-1]:
                # From here on no token sees another one, so tokens without logits are left out.
                x, h = x.index_select(0, rows), h.index_select(0, rows)  # [N, ...]
                adapted = adapted.of_tokens(rows)
                if not len(rows):  # no token needs logits, and all keys and values are stored
                    return h
            x = x.flatten(1)
            adapted.add("wo", x, h)
            ops.linear_residual(x, layer.wo, h)
            x = self._swiglu(layer, h, adapted)  # [T, F]
            adapted.add("w2", x, h)
            ops.linear_residual(x, layer.w2, h)
        return h

    def _swiglu(self, layer: Layer, h: Tensor, adapted: LayerAdapters) -> Tensor:
        eps = self.config.norm_eps
        if "gate_up" not in adapted:
            return ops.linear_swiglu(h, layer.gate_up, layer.ffn_norm, eps)
        x = ops.rms_norm(h, layer.ffn_norm, eps)
        # Tokens without an adapter keep the initial value -0.0. Adding it changes no number, not
        # even the sign of a zero.
        added = x.new_full((len(x), 2 * self.config.hidden_dim), -0.0, dtype=torch.float32)
        adapted.add("gate_up", x, added)
        return ops.linear_swiglu(x, layer.gate_up, added=added)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Returns [T, E], the embeddings of tokens [T] on the model's device."""
        return ops.embedding(token_ids.contiguous(), self.embeddings, self.dtype)

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """Returns the logits [N, V] fp32 of rows [N, E] of the residual stream."""
        return ops.linear(h, self.output, self.norm, self.config.norm_eps).float()

    @torch.inference_mode()
    def hidden(self, h: Tensor) -> Tensor:
        """Returns the hidden states [N, E] fp32 after the last norm, of rows [N, E] of the residual
        stream."""
        return ops.rms_norm(h, self.norm, self.config.norm_eps).float()

    @torch.inference_mode()
    def greedy(self, h: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Returns the logits [N, V] in the model's dtype, and for each row the id of the largest of
        the first `vocab_size` logits, [N]. An id is -1 if no token can be chosen (see
        `ops.linear_argmax`)."""
        return ops.linear_argmax(h, self.output, self.norm, self.config.norm_eps, vocab_size)


def shapes(weights: Weight | Weights) -> list[torch.Size]:
    """Returns the shapes [outputs, inputs] of weights that are multiplied in one pass."""
    if isinstance(weights, JoinedWeight):
        return [part.shape for part in weights.parts]
    return [weight.shape for weight in ([weights] if isinstance(weights, Weight) else weights)]


def _plain(weights: Mapping[str, Weight | JoinedWeight], name: str) -> Tensor:
    """Returns the weight of a name. Raises an error if the weight is quantised."""
    weight = weights[name]
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is quantised, expected a tensor")
    return weight


def _matrix(weights: Mapping[str, Weight | JoinedWeight], name: str) -> Weight:
    weight = weights[name]
    # Only the names JOINED_QKV and JOINED_GATE_UP have a JoinedWeight (see `_together`).
    assert not isinstance(weight, JoinedWeight)
    return weight


def _together(
    weights: Mapping[str, Weight | JoinedWeight], joined: str, prefix: str, *names: str
) -> Weights:
    """Returns weights that are multiplied in one pass. The result is a `JoinedWeight` if `weights`
    has one under the name `joined`, else a list of separate weights."""
    whole = weights.get(joined)
    if isinstance(whole, JoinedWeight):
        return whole
    return [_matrix(weights, f"{prefix}{name}.weight") for name in names]
