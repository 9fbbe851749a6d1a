"""Makes passes over prompts. On a CPU, a pass pauses between layers while other sequences generate
(see `pace`)."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from mistral_ext.engine.pace import Pace
from mistral_ext.engine.runner import Piece, Reading, Runner
from mistral_ext.engine.scheduler import Scheduler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool


@dataclass(frozen=True)
class _Paused:
    """A pass that has begun, but whose last layers have not been computed."""

    pieces: list[tuple[Sequence, int]]
    extents: list[Extent]
    reading: Reading


class PromptReader:
    """Reads the pieces of prompts that the scheduler chooses.

    Args:
        runner, scheduler, pool: the objects that the engine has made.
        layers: the number of layers of the model.
        most: the most tokens of a pass.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, pool: SlotPool, layers: int, most: int
    ) -> None:
        self._runner, self._scheduler, self._pool = runner, scheduler, pool
        self._paused: _Paused | None = None
        self.pace = Pace(layers, scheduler.busy_chunk, most)

    @property
    def paused(self) -> list[Sequence]:
        """The sequences of the paused pass. The list is empty if no pass has paused."""
        return [sequence for sequence, _ in self._paused.pieces] if self._paused else []

    def next_pieces(self) -> list[tuple[Sequence, int]]:
        """Returns the pieces of prompts for the next call of `go_on`: sequences, each with the
        number of its tokens to read."""
        if self._paused:
            return self._paused.pieces
        scheduler = self._scheduler
        if self._runner.pauses and scheduler.decoding:
            self._divide_time()
            scheduler.busy_chunk = self.pace.most_tokens
        return scheduler.next_pieces()

    def go_on(self, pieces: list[tuple[Sequence, int]]) -> list[Tensor] | None:
        """Computes the next layers of a pass. Computes all remaining layers if no other sequence
        generates, or if the runner does not pause.

        Returns:
            The results of the pieces (see `Runner.read`) if the pass is done, or None if it pauses.
        """
        paused = self._paused or self._begin(pieces)
        reading = paused.reading
        if not (self._runner.pauses and self._scheduler.decoding):
            self._paused = None
            reading.advance()
            return reading.results()
        self._divide_time()
        if self._paused is None:
            self.pace.begin(sum(count for _, count in pieces))
        layers, began = min(self.pace.layers(), reading.layers_left), time.perf_counter()
        reading.advance(layers)
        # The last layer skips work for tokens without logits, so its time says nothing about other
        # layers.
        whole = layers - (reading.layers_left == 0)
        if whole > 0:
            self.pace.note_read(whole, time.perf_counter() - began)
        if reading.layers_left:
            if self._paused is None:
                # In the layers that are done, new tokens may have taken the slots of older tokens.
                # So the pool is told now, and the prefix cache does not copy the older tokens.
                for sequence, count in pieces:
                    self._pool.note_drafts(sequence.place, count - 1)
            self._paused = paused
            return None
        self._paused = None
        self.pace.end()
        return reading.results()

    def _divide_time(self) -> None:
        self.pace.divide(self._scheduler.count_soon_generating(), len(self._scheduler.decoding))

    def _begin(self, pieces: list[tuple[Sequence, int]]) -> _Paused:
        given = [_piece(sequence, count) for sequence, count in pieces]
        reading = self._runner.begin(given)
        for sequence, count in pieces:
            sequence.note_read(count)
        return _Paused(pieces, [piece.extent for piece in given], reading)

    def forget(self) -> None:
        """Forgets the paused pass. The caller must put back or release its sequences."""
        self._paused = None

    def forget_if_lost(self) -> None:
        """Forgets the paused pass if one of its sequences was put back, and puts back the others
        too. Their pieces cannot simply be read again: in some layers the pass may have stored their
        tokens in the slots of older ones that the pieces see."""
        if self._paused is None:
            return
        placed = zip(self.paused, self._paused.extents, strict=True)
        kept = [sequence for sequence, extent in placed if sequence.extent is extent]
        if len(kept) < len(self.paused):
            self.forget()
            for sequence in kept:
                self._scheduler.put_back(sequence)


def _piece(sequence: Sequence, count: int) -> Piece:
    begin, request = sequence.place.length, sequence.request
    end = begin + count
    if request.reports_prompt:
        logits = max(0, end - max(begin, sequence.reported))
    else:
        logits = int(end == sequence.prompt_length and request.params is not None)
    ids = sequence.ids[begin:end]
    return Piece(sequence.place, ids, logits, request.adapter_slot, request.hidden)
