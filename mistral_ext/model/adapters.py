"""The LoRA adapters of a model's linear layers. Adapters are stacked, so that one pass can serve
sequences with different adapters.

Each adapter has a slot, which is its index in the stacks. A tensor names the slot of each token's
adapter, and its values may change between replays of a CUDA graph (`engine.graph_runner`). So a
graph that was captured with one adapter also serves others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext import ops
from mistral_ext.ops import LowRank

# The groups of weights that are multiplied with the same input. The keys are fields of
# `transformer.Layer`, the values Mistral's names of the weights.
GROUPS = {
    "qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "wo": ("attention.wo",),
    "gate_up": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}


@dataclass
class Stack:
    """The adapters of one group of weights in one layer. The fields are arguments of `ops.lora`.

    A *part* is one weight of the group. All parts have K inputs, and together they have N outputs.
    """

    a: Tensor  # [slots, parts, max_rank, K]
    b: Tensor  # [slots, max_rank, N]
    scales: Tensor  # [slots, parts]
    ranks: Tensor  # [slots, parts]
    parts: Sequence[int]  # the number of outputs of each part

    @classmethod
    def empty(cls, slots: int, max_rank: int, shapes: Sequence[torch.Size], like: Tensor) -> Stack:
        """Makes a stack without adapters, for weights of these shapes [outputs, inputs], with the
        dtype and device of `like`."""
        parts = [outputs for outputs, _ in shapes]
        _, inputs = shapes[0]
        zeros = torch.zeros(slots, len(parts), device=like.device)
        a = like.new_zeros((slots, len(parts), max_rank, inputs))
        b = like.new_zeros((slots, max_rank, sum(parts)))
        return cls(a, b, zeros, zeros.int(), parts)

    @property
    def slots(self) -> int:
        return len(self.a)

    @property
    def max_rank(self) -> int:
        return self.a.shape[2]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def take(self, other: Stack) -> None:
        """Copies the adapters of `other`, which must not be larger than this stack."""
        self.a[: other.slots, :, : other.max_rank] = other.a
        self.b[: other.slots, : other.max_rank] = other.b
        self.scales[: other.slots] = other.scales
        self.ranks[: other.slots] = other.ranks

    def first(self, slots: int) -> Stack:
        """Makes a stack with copies of the first `slots` slots. Its largest rank is the largest
        rank of their adapters."""
        rank = int(self.ranks[:slots].max())
        a = self.a[:slots, :, :rank].clone(memory_format=torch.contiguous_format)
        b = self.b[:slots, :rank].clone(memory_format=torch.contiguous_format)
        return Stack(a, b, self.scales[:slots].clone(), self.ranks[:slots].clone(), self.parts)

    def move(self, slot: int, to: int) -> None:
        """Moves the adapter of `slot` to the slot `to`, and empties `slot`."""
        for tensor in (self.a, self.b, self.scales, self.ranks):
            tensor[to] = tensor[slot]
        self.ranks[slot] = 0

    def put(self, slot: int, updates: Sequence[LowRank | None]) -> None:
        """Sets the adapter of a slot. `updates` has an element for each weight of the group: the
        adapter's update, or None if the adapter does not change the weight."""
        columns = self.b[slot].split(list(self.parts), dim=1)
        for part, update in enumerate(updates):
            rank = 0
            if update is not None:
                rank = len(update.a)
                self.a[slot, part, :rank] = update.a
                columns[part][:rank] = update.b.T
                self.scales[slot, part] = update.scale
            self.ranks[slot, part] = rank


class LayerAdapters:
    """The adapters of one layer, for the tokens of a pass.

    Args:
        stacks: the adapters of the layer.
        slots: [T] int32, the slot of each token's adapter, or -1 for a token without an adapter.
            None: no token has an adapter.
    """

    def __init__(self, stacks: Mapping[str, Stack], slots: Tensor | None) -> None:
        self._stacks = stacks
        self._slots = slots

    def __contains__(self, group: str) -> bool:
        return group in self._stacks

    def of_tokens(self, rows: Tensor) -> LayerAdapters:
        """Returns the adapters for some of the tokens, whose indices are `rows`."""
        slots = None if self._slots is None else self._slots.index_select(0, rows)
        return LayerAdapters(self._stacks, slots)

    def add(self, group: str, x: Tensor, out: Tensor) -> None:
        """Adds the adapters' updates to `out` [T, N], the products of x [T, K] with the weights of
        a group."""
        stack = self._stacks.get(group)
        if stack is not None:
            assert self._slots is not None
            given = stack.a, stack.b, stack.scales, stack.ranks, self._slots, stack.parts
            ops.lora(x, *given, out)


class Adapters:
    """The adapters of a model, by their slots.

    Args:
        n_layers: the number of layers of the model.
        shapes: the shapes [outputs, inputs] of the weights in each of `GROUPS`.
        like: a tensor with the model's dtype and device.

    Attributes:
        layers: for each layer the stacks of `GROUPS`. A group has no stack before the first adapter
            that changes it.
        generation: a number that grows when stacks are made, replaced or removed. A graph that was
            captured before that may read memory that has been freed.
    """

    def __init__(
        self, n_layers: int, shapes: Mapping[str, Sequence[torch.Size]], like: Tensor
    ) -> None:
        self.layers: list[dict[str, Stack]] = [{} for _ in range(n_layers)]
        self.generation = 0
        self._shapes = shapes
        self._like = like
        self._slots = 0

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for layer in self.layers for stack in layer.values())

    @torch.inference_mode(False)  # tensors made in inference mode cannot be changed outside of it
    @torch.no_grad()
    def put(self, slot: int, adapter: Mapping[str, LowRank]) -> None:
        """Sets the adapter of a slot.

        Args:
            slot: the index of the slot, 0 or more.
            adapter: the updates, by names of weights such as "layers.0.attention.wq".
        """
        self._slots = max(self._slots, slot + 1)
        for i, layer in enumerate(self.layers):
            for group, names in GROUPS.items():
                updates = [adapter.get(f"layers.{i}.{name}") for name in names]
                rank = max(len(update.a) if update else 0 for update in updates)
                if rank or group in layer:
                    self._make_room(layer, group, rank)
                    layer[group].put(slot, updates)

    def of_layer(self, layer: int, slots: Tensor | None) -> LayerAdapters:
        """Returns the adapters of a layer, for the tokens of a pass.

        Args:
            layer: the index of the layer.
            slots: [T] int32, the slot of each token's adapter, or -1 for a token without an
                adapter. None: no token has an adapter.
        """
        return LayerAdapters({} if slots is None else self.layers[layer], slots)

    def reserve(self, slots: int) -> None:
        """Makes later stacks with room for at least `slots` slots, so that they need not grow."""
        self._slots = max(self._slots, slots)

    @torch.no_grad()
    def move(self, slot: int, to: int) -> None:
        """Moves the adapter of a slot to another slot."""
        for layer in self.layers:
            for stack in layer.values():
                stack.move(slot, to)

    @torch.inference_mode(False)
    @torch.no_grad()
    def shrink(self, slots: int) -> None:
        """Keeps the first `slots` slots, and frees the memory of the others."""
        self._slots = slots
        for layer in self.layers:
            for group, stack in list(layer.items()):
                if stack.slots <= slots:
                    continue
                self.generation += 1
                if slots and int(stack.ranks[:slots].max()):
                    layer[group] = stack.first(slots)
                else:
                    del layer[group]

    def _make_room(self, layer: dict[str, Stack], group: str, rank: int) -> None:
        """Makes the stack of a group of a layer large enough for all slots and for adapters of this
        rank."""
        before = layer.get(group)
        if before is not None:
            if before.slots >= self._slots and before.max_rank >= rank:
                return
            rank = max(rank, before.max_rank)
        layer[group] = Stack.empty(self._slots, rank, self._shapes[group], self._like)
        if before is not None:
            layer[group].take(before)
        self.generation += 1
