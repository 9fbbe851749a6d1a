"""Runs passes over the weights, for the sequences that the scheduler has chosen.

Shape letters: N sequences of a decode step; T tokens of a pass; E model dimension; V vocabulary
size.

`Runner` is for the CPU, where a pass is done when the call that makes it returns. It is also for a
GPU if the environment variable MISTRAL_EXT_GRAPHS is 0. `graph_runner` has the usual runner for a
GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_ext.engine.recorded_steps import RecordedSteps
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.slots import Extent, SlotPool
from mistral_ext.model.transformer import Transformer


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a prompt to read in one pass.

    Attributes:
        extent: the extent that stores the keys and values of the tokens.
        token_ids: the tokens.
        logits: the number of tokens at the end of the piece for which to compute logits.
        adapter: the slot of the sequence's adapter in `model.adapters`, not a slot of the cache.
            -1: the sequence has no adapter.
        hidden: whether to give the hidden states of these tokens, and not their logits.
    """

    extent: Extent
    token_ids: Sequence[int]
    logits: int
    adapter: int = -1
    hidden: bool = False


@dataclass(frozen=True)
class Step:
    """A decode step that was launched.

    Attributes:
        token_ids: a function that waits for the step and returns the N tokens that it sampled. A
            token is -1 if none could be chosen.
        logits: [N, V] fp32, from which the tokens were sampled. The next `Runner.ahead` steps of N
            sequences leave them as they are. A later step may overwrite them.
        is_usual: whether later steps of this size take as long. False if this step had to be
            prepared, captured or recorded first.
    """

    token_ids: Callable[[], list[int]]
    logits: Tensor
    is_usual: bool = True


@dataclass(frozen=True)
class Verified:
    """A decode step with drafts.

    Attributes:
        logits: [T, V] fp32, a row for each token that was read.
        largest: [T], the id of the largest logit of each row, or -1 if no token can be chosen.
            None: not all sequences take the largest logit, so the caller has to draw tokens.
        is_usual: as in `Step`.
    """

    logits: Tensor
    largest: list[int] | None
    is_usual: bool = True


class Reading:
    """A pass that reads pieces of several prompts. It may pause between layers.

    Args:
        model: the weights.
        pool: the cache.
        pieces: the pieces to read.
    """

    def __init__(self, model: Transformer, pool: SlotPool, pieces: Sequence[Piece]) -> None:
        self._model, self._pool, self._pieces = model, pool, pieces
        tokens = [token_id for piece in pieces for token_id in piece.token_ids]
        rows: list[int] = []
        end = 0
        for piece in pieces:
            end += len(piece.token_ids)
            rows += range(end - piece.logits, end)
        table = pool.table({piece.extent: len(piece.token_ids) for piece in pieces})
        adapters = [piece.adapter for piece in pieces for _ in piece.token_ids]
        device = model.device
        self._has_results = bool(rows)
        self._token_ids = _int64(tokens, device)
        self._table = table.to(device)
        self._max_count = max(len(piece.token_ids) for piece in pieces)
        self._rows = None if len(rows) == len(tokens) else _int64(rows, device)
        self._adapters = _slots(adapters, device)
        self._done = 0
        self._h: Tensor | None = None

    @property
    def layers_left(self) -> int:
        return len(self._model.layers) - self._done

    def advance(self, layers: int | None = None) -> None:
        """Computes the next `layers` layers. If `layers` is None, computes all remaining layers."""
        begin, left = self._done, self.layers_left
        self._done += left if layers is None else min(layers, left)
        self._h = self._model.step(
            self._token_ids,
            self._table,
            self._pool,
            self._max_count,
            self._rows,
            self._adapters,
            range(begin, self._done),
            self._h,
        )

    def results(self) -> list[Tensor]:
        """Returns what `Runner.read` returns. All layers must be done."""
        h, pieces, model = self._h, self._pieces, self._model
        assert h is not None
        if not self._has_results:
            return [h.new_empty(0, model.output.shape[0], dtype=torch.float32)] * len(pieces)
        counts = [piece.logits for piece in pieces]
        if any(piece.hidden for piece in pieces):
            return self._some_hidden(h.split(counts))
        return list(model.logits(h).split(counts))

    def _some_hidden(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The logits or hidden states of pieces, given their rows of the residual stream."""
        pieces = self._pieces
        plain = [part for piece, part in zip(pieces, parts, strict=True) if not piece.hidden]
        logits = iter(())
        if plain:
            logits = iter(self._model.logits(torch.cat(plain)).split([len(p) for p in plain]))
        return [
            self._model.hidden(part) if piece.hidden else next(logits)
            for piece, part in zip(pieces, parts, strict=True)
        ]


class Runner:
    """Runs passes. In this class `launch` waits until the tokens of its step are chosen.

    Args:
        model: the weights.
        pool: the cache.
        sampler: chooses tokens, and has the options and state of the sequences.

    Attributes:
        ahead: how many earlier decode steps may still be under way, with unknown tokens, when the
            next step is launched.
        pauses: whether passes over prompts pause while other sequences generate. It is False on a
            GPU, where calls return before their work is done, so the time of some layers cannot be
            measured.
    """

    ahead = 0
    pauses = True

    def __init__(self, model: Transformer, pool: SlotPool, sampler: Sampler) -> None:
        self._model = model
        self._pool = pool
        self._sampler = sampler
        on_cpu = model.device.type == "cpu"
        self.pauses = self.pauses and on_cpu
        self._recorded = RecordedSteps(model, pool) if on_cpu and captures_steps() else None

    def read(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Reads pieces of several prompts in one pass.

        Returns:
            For each piece its logits, [piece.logits, V] fp32, or if `piece.hidden` is set its
            hidden states, [piece.logits, E] fp32.
        """
        reading = self.begin(pieces)
        reading.advance()
        return reading.results()

    def begin(self, pieces: Sequence[Piece]) -> Reading:
        """Prepares the same pass as `read`. The caller then computes its layers, some at a time, by
        `Reading.advance`. Until the pass is done, the extents of the pieces must neither move nor
        be released."""
        return Reading(self._model, self._pool, pieces)

    def launch(
        self,
        extents: Sequence[Extent],
        rows: Sequence[int],
        token_ids: Sequence[int] | None,
        adapters: Sequence[int] = (),
    ) -> Step:
        """Starts a step, which reads one token of each of N sequences and samples the next token.

        Args:
            extents: the sequences' places in the cache.
            rows: the sequences' rows of the sampler.
            token_ids: the N tokens to read. None: the tokens that the last step samples. That step
                must have had the same sequences, and `ahead` must not be 0.
            adapters: the slots of the sequences' adapters, or -1 for a sequence without one. An
                empty list: no sequence has an adapter.

        Raises:
            ValueError: token_ids is None, but `ahead` is 0.
        """
        if token_ids is None:
            raise ValueError("token_ids is None, expected the ids to read: this runner keeps none")
        model, device = self._model, self._model.device
        table = self._pool.table(dict.fromkeys(extents, 1))
        h, is_usual = self._step(token_ids, table, adapters)
        greedy = self._sampler.needs_no_draw(rows)
        logits, sampled = choose(model, self._sampler, h, _int64(rows, device), greedy)
        chosen: list[int] = sampled.tolist()
        return Step(lambda: chosen, logits.float(), is_usual)

    def verify(
        self,
        extents: Sequence[Extent],
        rows: Sequence[int],
        token_ids: Sequence[Sequence[int]],
        adapters: Sequence[int],
    ) -> Verified:
        """Reads the next token of each of N sequences, and the drafts that follow it.

        Args:
            extents, rows: as in `launch`.
            token_ids: for each sequence its next token and its drafts.
            adapters: for each sequence the slot of its adapter, or -1 if it has none.
        """
        counts = list(map(len, token_ids))
        return self._verify_rows(
            [token_id for ids in token_ids for token_id in ids],
            self._pool.draft_table(extents, counts),
            [slot for slot, n in zip(adapters, counts, strict=True) for _ in range(n)],
            self._sampler.needs_no_draw(rows),
        )

    def _verify_rows(
        self, token_ids: Sequence[int], table: Tensor, adapters: Sequence[int], greedy: bool
    ) -> Verified:
        """Does the work of `verify`, for T tokens of all sequences together.

        Args:
            token_ids: [T], the tokens.
            table: [T, 5], the sequence table, with a row for each token.
            adapters: [T], for each token the slot of its adapter, or -1.
            greedy: whether all sequences take the largest logit.
        """
        model = self._model
        h, is_usual = self._step(token_ids, table, adapters)
        if not greedy:
            return Verified(model.logits(h), None, is_usual)
        logits, largest = model.greedy(h, self._sampler.vocab_size)
        return Verified(logits.float(), largest.tolist(), is_usual)

    def _step(
        self, token_ids: Sequence[int], table: Tensor, adapters: Sequence[int]
    ) -> tuple[Tensor, bool]:
        """Makes a step for T tokens. Each token has a row of the table and an entry in `adapters`.
        Returns the residual stream [T, E], and `is_usual` as in `Step`."""
        device = self._model.device
        tokens, slots = _int64(token_ids, device), _slots(adapters, device)
        if self._recorded is not None:
            return self._recorded.run(tokens, table, slots)
        h = self._model.step(tokens, table.to(device), self._pool, max_count=1, adapters=slots)
        return h, True


def captures_steps() -> bool:
    """Whether decode steps are recorded, or captured as CUDA graphs, and then repeated. If
    MISTRAL_EXT_GRAPHS is 0, Python launches every kernel of a step."""
    return os.environ.get("MISTRAL_EXT_GRAPHS") != "0"


def choose(
    model: Transformer, sampler: Sampler, h: Tensor, rows: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Returns the logits [N, V] and the chosen token ids [N] of a step. If `greedy`, each token is
    that of the largest logit. Otherwise `sampler` draws it."""
    if greedy:
        return model.greedy(h, sampler.vocab_size)
    logits = model.logits(h)
    return logits, sampler.draw(rows, logits)


def _slots(adapters: Sequence[int], device: torch.device) -> Tensor | None:
    """Makes a tensor of the slots of adapters (-1: no adapter). Returns None if all are -1."""
    if max(adapters, default=-1) < 0:
        return None
    return torch.tensor(adapters, dtype=torch.int32, device=device)


def _int64(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
