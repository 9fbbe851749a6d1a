"""The device of a model: moving its weights there."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_ext.ops import Weight

# What is multiplied in one pass.
_TOGETHER = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("feed_forward.w1", "feed_forward.w3"),
)


def move_weights(weights: dict[str, Weight], device: torch.device) -> None:
    """Replaces the weights of a model by copies on a device.

    One at a time: the pages of its file are let go as it is copied. Those that are multiplied in
    one pass come to lie one below the other, which makes their products with many tokens one
    (`ops.linear`).
    """
    first = {
        f"layers.{i}.{names[0]}.weight": [f"layers.{i}.{name}.weight" for name in names]
        for i in range(sum(name.endswith(".attention_norm.weight") for name in weights))
        for names in _TOGETHER
    }
    for name in list(weights):
        parts = [weights[part] for part in first.get(name, [])]
        if parts and all(isinstance(part, Tensor) for part in parts):
            joined = parts[0].new_empty((sum(map(len, parts)), parts[0].shape[1]), device=device)
            views = joined.split([len(part) for part in parts])
            for part, view in zip(first[name], views, strict=True):
                weights[part] = view.copy_(weights[part])
        else:
            weights[name] = weights[name].to(device)
