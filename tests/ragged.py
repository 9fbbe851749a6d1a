"""Sequences as plain lists of tokens: what rope and attention over rings must come to.

The list model keeps every token that a later one may see and computes attention from the list;
its rings are pools into which every token is written in order. Whatever no token was written to
holds NaN, in the model and in the pools that the kernels get.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import reference
import torch
from tolerance import assert_close
from torch import Tensor

from mistral_ext import ops

GAP = 3  # rows of the pools before, between and after the rings


class RaggedBatch:
    """Runs the ops on a batch of sequences, step by step, and checks each step.

    Args:
        capacities: slots of each sequence's ring; rings lie in the pools in random order.
        window: W or None.
        positions: tokens that each sequence has seen before the first step; those that the next
            one sees are put in its ring.
        layout: "fused": q, k, v are slices of one matrix; "heads first": views of [H, T, D];
            "apart": each in memory of its own, and no two strides are the same.
        device: of all tensors, those of the list model too.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        window: int | None,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        dtype: torch.dtype = torch.float32,
        theta: float = 1e4,
        positions: Sequence[int] | None = None,
        layout: str = "fused",
        scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ):
        self.capacities, self.window = list(capacities), window
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.dtype, self.layout, self.scale = dtype, layout, scale
        self.device = device
        self.frequencies = reference.frequencies(theta, dim, device)
        self.generator = torch.Generator().manual_seed(seed)

        order = list(range(len(self.capacities)))
        random.Random(seed).shuffle(order)
        self.rows, end = [0] * len(order), GAP
        for i in order:
            self.rows[i] = end
            end += kv_heads * self.capacities[i] + GAP
        self.expected_k = self._nan(end, dim)
        self.expected_v = self.expected_k.clone()

        self.positions = list(positions or [0] * len(order))
        self.k_lists, self.v_lists = [], []  # [tokens, Hkv, D], rotated, up to the last position
        for i, position in enumerate(self.positions):
            history = min(position, (window or position + 1) - 1)
            k, v = self._random(history, kv_heads), self._random(history, kv_heads)
            self.k_lists.append(k)
            self.v_lists.append(v)
            self._write(i, position - history, k, v)
        self.k_pool, self.v_pool = self.expected_k.clone(), self.expected_v.clone()

    def _random(self, tokens: int, heads: int) -> Tensor:
        x = torch.randn(tokens, heads, self.dim, generator=self.generator)
        return x.to(self.device, self.dtype)

    def _nan(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def _write(self, i: int, position: int, k: Tensor, v: Tensor) -> None:
        heads = torch.arange(self.kv_heads) * self.capacities[i] + self.rows[i]
        for t in range(len(k)):
            slots = heads + (position + t) % self.capacities[i]
            self.expected_k[slots], self.expected_v[slots] = k[t], v[t]

    def table(self, counts: Sequence[int]) -> Tensor:
        rows, first_token = [], 0
        for i, count in enumerate(counts):
            rows.append((first_token, count, self.positions[i], self.rows[i], self.capacities[i]))
            first_token += count
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(-1, 5)

    def table_of_tokens(self, counts: Sequence[int]) -> Tensor:
        """`table` with a row for each token: rows of a sequence share its ring."""
        rows = []
        for i, count in enumerate(counts):
            for position in range(self.positions[i], self.positions[i] + count):
                rows.append((len(rows), 1, position, self.rows[i], self.capacities[i]))
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(-1, 5)

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v; NaN in the memory between them."""
        q, kv = self.heads, self.kv_heads
        values = self._random(tokens, q + 2 * kv)
        if self.layout == "apart":
            parts = values.split([q, kv, kv], dim=1)
            places = (
                self._nan(tokens, q + 1, self.dim + 8),
                self._nan(kv, tokens + 3, self.dim).transpose(0, 1),
                self._nan(tokens, kv + 2, self.dim + 16),
            )
            views = [
                p[:tokens, : x.shape[1], : self.dim] for p, x in zip(places, parts, strict=True)
            ]
            return tuple(view.copy_(part) for view, part in zip(views, parts, strict=True))
        if self.layout == "fused":
            fused = self._nan(tokens, q + 2 * kv + 1, self.dim)
            fused[:, :-1] = values
            return fused[:, :q], fused[:, q : q + kv], fused[:, q + kv : -1]
        by_head = self._nan(q + 2 * kv, tokens + 1, self.dim).transpose(0, 1)
        by_head[:-1] = values
        return by_head[:-1, :q], by_head[:-1, q : q + kv], by_head[:-1, q + kv :]

    def step(self, counts: Sequence[int], tokens_apart: bool = False) -> Tensor:
        """Adds counts[i] new tokens to sequence i, checks all results, returns attention's.

        Args:
            tokens_apart: each token has a row of the table, as drafts have.
        """
        table = self.table_of_tokens(counts) if tokens_apart else self.table(counts)
        q, k, v = self.inputs(sum(counts))
        old_q, old_k, old_v = q.clone(), k.clone(), v.clone()
        pools = self.k_pool, self.v_pool
        ops.rope(q, k, v, *pools, table, self.frequencies, self.window)
        rotated_q, rotated_k = q.clone(), k.clone()
        out = ops.attention(q, k, v, *pools, table, self.window, self.scale)

        positions = [p + t for p, n in zip(self.positions, counts, strict=True) for t in range(n)]
        positions = torch.tensor(positions, device=self.device)
        for before, after in ((old_q, rotated_q), (old_k, rotated_k)):
            exact = reference.rotate(before.double(), positions, self.frequencies)
            plain = reference.rotate(before, positions, self.frequencies)
            assert_close(after, exact, plain)
        for before, after in ((rotated_q, q), (rotated_k, k), (old_v, v)):
            assert torch.equal(before, after), "attention or rope wrote to what it only reads"

        for i, (first, count, position, _, _) in enumerate(self.table(counts).tolist()):
            if count == 0:
                continue
            new = slice(first, first + count)
            self.k_lists[i] = torch.cat([self.k_lists[i], k[new]])
            self.v_lists[i] = torch.cat([self.v_lists[i], v[new]])
            lists = self.k_lists[i], self.v_lists[i]
            wide = (x.double() for x in (q[new], *lists))
            exact = reference.attention(*wide, self.window, self.scale)
            plain = reference.attention(q[new], *lists, self.window, self.scale)
            assert_close(out[new], exact, plain)
            self._write(i, position, k[new], v[new])
            self.positions[i] += count
        self.check_rings()
        return out

    def check_rings(self) -> None:
        """Each ring holds the last C tokens of its list, and nothing else was written."""
        for actual, expected in ((self.k_pool, self.expected_k), (self.v_pool, self.expected_v)):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
