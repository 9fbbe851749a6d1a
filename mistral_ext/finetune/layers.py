"""Runs the model in training: on whole samples without a cache, with gradients for an adapter.

The model's own weights have no gradients, and may have any format. The intermediate results of a
layer are computed a second time for its gradients, so that only the input of each layer has to stay
in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mistral_ext import ops
from mistral_ext.finetune.batches import Pass
from mistral_ext.model.adapters import GROUPS
from mistral_ext.model.config import MistralConfig
from mistral_ext.model.transformer import Layer, Transformer, shapes
from mistral_ext.ops import LowRank, Weight, Weights
from mistral_ext.ops.low_rank_update import low_rank_update
from mistral_ext.weights.checkpoint import tensor_shapes

Pair = tuple[Tensor, Tensor]  # a [rank, K] and b [N, rank], both float32


class TrainedAdapter:
    """An adapter whose matrices are learned, in float32. The update of a weight is scale * b @ a.

    Attributes:
        pairs: a and b of each weight with an update, by names such as "layers.0.attention.wq".
        scale: the factor of b @ a.
    """

    def __init__(self, pairs: Mapping[str, Pair], scale: float) -> None:
        self.pairs = pairs
        self.scale = scale

    @classmethod
    def new(
        cls,
        config: MistralConfig,
        rank: int,
        scale: float,
        targets: Sequence[str],
        seed: int,
        device: torch.device,
    ) -> TrainedAdapter:
        """Makes an adapter that changes nothing yet: a is random, as in peft, and b is 0.

        Args:
            config: the configuration of the model.
            rank: the rank of the updates.
            scale: the factor of b @ a.
            targets: the linear layers of each block that get an update, such as "wq".
            seed: the seed for the random numbers.
            device: the device of the matrices.
        """
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for name, shape in tensor_shapes(config).items():
            stem = name.removesuffix(".weight")
            if name.startswith("layers.") and stem.rpartition(".")[2] in targets:
                outputs, inputs = shape
                a = torch.empty(rank, inputs, device="cpu")
                bound = 1 / math.sqrt(inputs)
                a.uniform_(-bound, bound, generator=generator)
                b = torch.zeros(outputs, rank, device="cpu")
                pairs[stem] = a.to(device).requires_grad_(), b.to(device).requires_grad_()
        return cls(pairs, scale)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The learned matrices by names, for the optimiser and checkpoints."""
        return {
            f"{name}.{which}": matrix
            for name, pair in self.pairs.items()
            for which, matrix in zip("ab", pair, strict=True)
        }

    def low_ranks(self) -> dict[str, LowRank]:
        """The adapter in the form that `weights.adapters` writes. Its tensors share the memory of
        the learned matrices."""
        return {
            name: LowRank(a.detach(), b.detach(), self.scale) for name, (a, b) in self.pairs.items()
        }

    def of_layer(self, layer: int, group: str) -> list[Pair | None]:
        """The matrices of each weight in a group of a layer. `model.adapters.GROUPS` has the
        groups. None: the weight has no update."""
        return [self.pairs.get(f"layers.{layer}.{name}") for name in GROUPS[group]]


def loss(model: Transformer, adapter: TrainedAdapter, batch: Pass) -> Tensor:
    """Computes the sum of the weighted cross entropies of a pass, a float32 scalar.

    Args:
        batch: the samples of the pass, on the model's device.
    """
    h = model.embed(batch.token_ids)
    for i, layer in enumerate(model.layers):
        run = partial(_block, model, layer, partial(_adapted, adapter, i), batch.sequences)
        if torch.is_grad_enabled():
            h = checkpoint(run, h, use_reentrant=False, preserve_rng_state=False)
        else:
            h = run(h)
    x = ops.rms_norm(h, model.norm, model.config.norm_eps)
    summed, _ = ops.linear_cross_entropy(x, model.output, batch.targets, batch.weights)
    return summed


# Multiplies an input by the weights of a group. The arguments are the input, the weights, and the
# name of the group (see `model.adapters.GROUPS`).
Product = Callable[[Tensor, Weight | Weights, str], Tensor]


def _block(
    model: Transformer, layer: Layer, product: Product, sequences: Tensor, h: Tensor
) -> Tensor:
    """Runs one layer on hidden states [T, E], and returns those after it, [T, E].
    `transformer.Transformer.step` does the same with a cache."""
    config = model.config
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    x = ops.rms_norm(h, layer.attention_norm, config.norm_eps)
    qkv = product(x, layer.qkv, "qkv").unflatten(1, (-1, config.head_dim))
    q, k, v = qkv.split(heads, dim=1)
    q, k = (ops.rotate(x, sequences, model.frequencies) for x in (q, k))
    scale = config.attention_scale
    x = ops.attention(q, k, v, None, None, sequences, config.sliding_window, scale)
    h = h + product(x.flatten(1), layer.wo, "wo")
    x = ops.rms_norm(h, layer.ffn_norm, config.norm_eps)
    gate, up = product(x, layer.gate_up, "gate_up").chunk(2, dim=1)
    return h + product(ops.swiglu(gate, up), layer.w2, "w2")


def _adapted(
    adapter: TrainedAdapter, layer: int, x: Tensor, weight: Weight | Weights, group: str
) -> Tensor:
    """Returns [T, N]: the products of x with the weights of a group, plus those of x with the
    adapter's updates of these weights."""
    out = ops.linear(x, weight)
    pairs = adapter.of_layer(layer, group)
    if not any(pairs):
        return out
    parts = [outputs for outputs, _ in shapes(weight)]
    return low_rank_update(out, x, pairs, adapter.scale, parts)
