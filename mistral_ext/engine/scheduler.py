"""The policy of the engine: which requests to admit, which tokens to read, which to put back.

Nothing here touches a tensor of the model.

A request waits until there is a row of the sampler for it and room in the cache for its prompt.
Then its prompt is read, piece by piece. Pieces may be smaller while other sequences generate, so
that a long prompt delays them little. Prompts that are being read take turns.

Prompts and generated tokens are read in separate passes. The rounding of a product depends on its
number of tokens, so in a common pass a text would depend on the rest of the batch. In separate
passes it does not: pieces of prompts have at least `LEAST_PIECE` tokens, from where on a token's
bits do not depend on the number of tokens, and neither do they for up to 8 generated tokens. A
prompt of up to 8 tokens is read alone.

When a sequence has to grow and there is no room, extents of ended requests are released first. Then
the sequence that came last is put back: it waits, its prompt is read again, and the tokens that it
had generated are computed again one by one, with the same bits as before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mistral_ext.engine.prefix_cache import (
    LEAST_PIECE,
    PrefixCache,
    common_length,
    shareable_length,
)
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool, slots_needed

# The gemv kernels multiply passes of up to this many tokens (`ops.linear`). A prompt this short is
# read alone: with other prompts in its pass, gemm would multiply it, and round differently.
_FEW_TOKENS = 8


class Scheduler:
    """Decides what the next step does.

    Args:
        pool: cache memory.
        rows: the number of sequences that may generate at a time.
        chunk: the most tokens of prompts to read in a pass while no sequence generates.
        busy_chunk: the most tokens of prompts to read in a pass while a sequence generates.

    Attributes:
        waiting: sequences that are not admitted yet, in the order of service.
        reading: sequences whose prompts are being read, in the order of service.
        decoding: sequences that generate, in the order of admission.
        prefixes: extents that ended requests have left.
        preemptions: how often a sequence was put back.
        busy_chunk: the argument of this name, limited to `chunk`. The engine may change it.
    """

    def __init__(self, pool: SlotPool, rows: int, chunk: int, busy_chunk: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.reading: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.prefixes = PrefixCache(pool)
        self.preemptions = 0
        self._pool = pool
        self._free_rows = list(range(rows))
        self._chunk = chunk
        self.busy_chunk = min(chunk, busy_chunk)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.reading or self.decoding)

    def running(self) -> Iterator[Sequence]:
        """All sequences that own an extent."""
        yield from self.reading
        yield from self.decoding

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence.

        Raises:
            ValueError: the sequence can never fit into the cache.
        """
        needed = self._needed(sequence)
        if needed > self._pool.slots:
            raise ValueError(
                f"the request needs {needed} tokens of cache ({sequence.prompt_length} of prompt, "
                f"{sequence.request.max_length} with its completion), but there are "
                f"{self._pool.slots}: ask for fewer tokens, or make cache_tokens larger"
            )
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Admits waiting sequences in their order, as long as there is room."""
        while self.waiting and self._may_enter(self.waiting[0]):
            sequence = self.waiting[0]
            extent, exact = self._extent_for(sequence)
            if extent is None:
                return
            self.waiting.popleft()
            sequence.extent = extent
            sequence.exact = exact
            if sequence.request.params is not None:
                sequence.row = self._free_rows.pop(0)
            self.reading.append(sequence)

    def next_pieces(self) -> list[tuple[Sequence, int]]:
        """The prompt tokens to read in the next pass: sequences, and how many tokens of each."""
        if not self.reading:
            return []
        budget = self.busy_chunk if self.decoding else self._chunk
        first = self.reading[0]
        if first.request.chunk is not None:
            unread = first.prompt_length - first.place.length
            return [(first, min(unread, first.request.chunk))]
        if _is_read_alone(first):
            return [(first, first.prompt_length)]
        pieces: list[tuple[Sequence, int]] = []
        for sequence in self.reading:
            if sequence.request.chunk is not None or (pieces and _is_read_alone(sequence)):
                continue
            count = _piece(sequence.prompt_length - sequence.place.length, budget)
            if pieces and count > budget:
                continue
            pieces.append((sequence, count))
            budget -= count
            if budget < LEAST_PIECE:
                break
        return pieces

    def note_read(self, sequence: Sequence, count: int) -> None:
        """Counts prompt tokens that were read; after the last of them the sequence generates."""
        may_share = sequence.request.chunk is None and sequence.prompt_length >= LEAST_PIECE
        if may_share and sequence.exact == sequence.place.length:
            sequence.exact += count
        self._pool.advance(sequence.place, count)
        self.reading.remove(sequence)
        if sequence.reads_prompt:
            self.reading.append(sequence)  # at the end: prompts take turns
        elif sequence.request.params is not None:
            self.decoding.append(sequence)

    def next_decode(self) -> list[Sequence]:
        """The sequences of the next decode step, each with room for its token."""
        for sequence in list(self.decoding):
            if sequence.extent is not None and _goes_on(sequence):  # not put back by this loop
                self._make_room(sequence)
        return [sequence for sequence in self.decoding if _goes_on(sequence)]

    def note_decoded(self, sequences: list[Sequence]) -> None:
        """Counts the token that each sequence has read."""
        for sequence in sequences:
            self._pool.advance(sequence.place, 1)

    def release(self, sequence: Sequence, keep: bool = True) -> None:
        """Lets go of a sequence that has ended, wherever it is.

        Args:
            keep: whether its keys and values are sound, so that other requests may use them.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self._forget(sequence)
        if keep:
            self.prefixes.keep(sequence)
        else:
            self._pool.release(sequence.place)
        sequence.extent = None

    def put_back(self, sequence: Sequence) -> None:
        """Makes a running sequence wait again, ahead of all sequences that came after it."""
        self.preemptions += 1
        self._forget(sequence)
        self._pool.release(sequence.place)
        sequence.extent = None
        sequence.is_drawing = False
        sequence.was_put_back = True
        later = (i for i, w in enumerate(self.waiting) if w.request_id > sequence.request_id)
        self.waiting.insert(next(later, len(self.waiting)), sequence)

    def _forget(self, sequence: Sequence) -> None:
        if sequence in self.decoding:
            self.decoding.remove(sequence)
        elif sequence in self.reading:
            self.reading.remove(sequence)
        if sequence.row is not None:
            self._free_rows.append(sequence.row)
            self._free_rows.sort()
            sequence.row = None

    def _needed(self, sequence: Sequence) -> int:
        return slots_needed(self._pool.window, sequence.request.max_length)

    def _may_enter(self, sequence: Sequence) -> bool:
        if sequence.request.params is not None and not self._free_rows:
            return False
        # Prompts for the next pass or two are enough: a later request finds more in the cache.
        unread = sum(s.prompt_length - s.place.length for s in self.reading)
        if unread >= 2 * self._chunk:
            return False
        return not any(self._is_worth_waiting_for(s, sequence) for s in self.reading)

    def _is_worth_waiting_for(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether `other` is reading tokens that `sequence` would have to read as well, if it did
        not wait."""
        if other.request.prefix_owner != sequence.request.prefix_owner:
            return False
        if other.request.chunk is not None:
            return False
        most = min(other.prompt_length, shareable_length(sequence))
        common = common_length(other.ids, sequence.ids, most)
        return common >= other.place.length + LEAST_PIECE

    def _extent_for(self, sequence: Sequence) -> tuple[Extent | None, int]:
        """An extent for a prompt, and how many of the tokens in it are exact (see `Match`). The
        extent may hold the beginning of the prompt."""
        most = self._needed(sequence)
        # A sequence that was put back gets all slots that it can need, so that it never is again.
        length = most if sequence.was_put_back else min(sequence.prompt_length + 1, most)
        match = self.prefixes.find(sequence, self.running())
        extent = self.prefixes.extent(match, length, most)
        return extent, 0 if match is None else match.exact

    def _make_room(self, sequence: Sequence) -> None:
        """Gives a sequence room for one more token. If there is none, puts back the sequences that
        came last, which may include this one."""
        while sequence.extent is not None and not self.prefixes.grow(sequence.extent, 1):
            self.put_back(max(self.running(), key=lambda s: s.request_id))


def _is_read_alone(sequence: Sequence) -> bool:
    return sequence.prompt_length <= _FEW_TOKENS


def _goes_on(sequence: Sequence) -> bool:
    """Whether the sequence needs another token after those under way, as far as is known."""
    return sequence.is_open and sequence.place.length + 1 < sequence.request.max_length


def _piece(unread: int, budget: int) -> int:
    """How many tokens of a prompt to read next. Neither this piece nor the rest of the prompt may
    have fewer than LEAST_PIECE tokens, so the piece may exceed the budget a little."""
    count = min(budget, unread - LEAST_PIECE)
    return count if count >= LEAST_PIECE and unread > budget else unread
