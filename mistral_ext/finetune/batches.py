"""Chooses the samples that each step reads, and packs them one after another without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_ext.finetune.data import Sample
from mistral_ext.ops.cross_entropy import IGNORED


class Pass(NamedTuple):
    """Samples that go through the model at once. Each sample is a sequence, so its tokens do not
    see other samples.

    The last token of a sample is only a target, and is not read.
    """

    token_ids: Tensor  # [T] int64, the tokens that are read
    sequences: Tensor  # [S, 5] int64, the sequence table (see ops/__init__.py), without a cache
    targets: Tensor  # [T] int64, the token after each, or IGNORED if it has no loss
    weights: Tensor  # [T] float32, the factor of the loss of each target

    def to(self, device: torch.device) -> Pass:
        return Pass(*(part.to(device) for part in self))


def steps_of_epoch(n_samples: int, batch_size: int) -> int:
    return math.ceil(n_samples / batch_size)


def step_samples(n_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Returns the numbers of the samples that a step reads.

    Args:
        n_samples: the number of samples of the data.
        batch_size: the number of samples in a step. The last step of an epoch may have fewer.
        step: the number of the step, from 0, counted over all epochs.
        seed: the seed for the order of the samples, which differs in each epoch.
    """
    epoch, index = divmod(step, steps_of_epoch(n_samples, batch_size))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch + 1):
        order = torch.randperm(n_samples, generator=generator, device="cpu")
    chosen: list[int] = order[index * batch_size : (index + 1) * batch_size].tolist()
    return chosen


def passes(samples: Sequence[Sample], most_tokens: int) -> list[Pass]:
    """Packs samples into few passes of up to `most_tokens` tokens. The samples are taken in the
    order of their lengths, the longest first. Each goes into the first pass that has room for
    it."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        count = len(sample.ids) - 1
        fitting = next((i for i, left in enumerate(room) if count <= left), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            room.append(most_tokens)
        bins[fitting].append(sample)
        room[fitting] -= count
    return [_packed(chosen) for chosen in bins]


def _packed(samples: Sequence[Sample]) -> Pass:
    rows, first = [], 0
    for sample in samples:
        count = len(sample.ids) - 1
        rows.append([first, count, 0, 0, count])
        first += count
    weights = torch.cat([sample.weights[1:] for sample in samples])
    targets = torch.cat([sample.ids[1:] for sample in samples]).long()
    return Pass(
        token_ids=torch.cat([sample.ids[:-1] for sample in samples]).long(),
        sequences=torch.tensor(rows, dtype=torch.int64, device="cpu"),
        targets=targets.masked_fill(weights == 0, IGNORED),
        weights=weights,
    )
