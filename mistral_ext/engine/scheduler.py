"""The policy of the engine: which requests to admit, which tokens to read, which sequences to put
back.

The scheduler does not touch tensors of the model.

A request waits until there is a row of the sampler for it and room in the cache for its prompt.
Then its prompt is read, piece by piece. Pieces may be smaller while other sequences generate, so
that a long prompt delays them little. Prompts that are being read take turns.

Kernels for few and for many tokens round differently. But what else is in the batch should not
decide which kernels a text gets. So
- prompts and generated tokens are read in separate passes. On the CPU, a generated token gets the
  same bits in all passes of up to 8 tokens.
- a piece of a prompt has at least `LEAST_PIECE` tokens, or is the whole prompt. On the CPU, a token
  gets the same bits in all passes of at least that many tokens. (A request that sets `chunk`
  chooses the sizes of its pieces itself.)
- a prompt of up to 8 tokens is read alone.
- requests that report results of their prompts share passes with each other only. From the last
  layer's attention on, a pass computes only the tokens whose results are needed: one of each prompt
  that is only completed, but perhaps all of a prompt with results. So there the former would get
  other kernels.

When a sequence has to grow and there is no room, extents of ended requests are released first. If
that is not enough, the sequence that came last is *put back*: it loses its extent and waits. Later
its prompt is read again, and its generated tokens are read again one by one, so that their keys and
values get the same bits as before.
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

# Passes of up to this many tokens are multiplied by the gemv kernels (`ops.linear`). A prompt this
# short is read alone: in a pass with other prompts, gemm would multiply it and round differently.
_FEW_TOKENS = 8


class Scheduler:
    """Decides what the next step does.

    Args:
        pool: cache memory.
        rows: the most sequences that may generate at a time.
        chunk: the most tokens of prompts to read in a pass while no sequence generates.
        busy_chunk: the most tokens of prompts to read in a pass while a sequence generates.

    Attributes:
        waiting: sequences that wait to be admitted, the next one first.
        reading: sequences whose prompts are being read, in the order of their next pieces.
        decoding: sequences that generate, in the order in which their prompts were done.
        prefixes: the extents of ended requests.
        preemptions: the number of times that a sequence was put back.
        busy_chunk: the argument of this name, but at most `chunk`. `PromptReader` may change it.
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

    def running(self) -> Iterator[Sequence]:
        """All sequences that own an extent."""
        yield from self.reading
        yield from self.decoding

    def count_soon_generating(self) -> int:
        """Counts the sequences that generate as soon as their prompts are read. Among those that
        wait, only as many count as the sampler has free rows."""
        reading, waiting = (
            sum(sequence.request.params is not None for sequence in sequences)
            for sequences in (self.reading, self.waiting)
        )
        return reading + min(waiting, len(self._free_rows))

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
        """Admits waiting sequences in their order, until one has no room or should wait for longer
        (see `_may_enter`)."""
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
        """Chooses the prompt tokens to read in the next pass. Returns sequences, each with the
        number of its tokens to read."""
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
            request = sequence.request
            if request.chunk is not None or (pieces and _is_read_alone(sequence)):
                continue
            if request.reports_prompt != first.request.reports_prompt:
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
        """Counts prompt tokens that were read. After the last token of its prompt, the sequence
        generates if it has params."""
        may_share = sequence.request.chunk is None and sequence.prompt_length >= LEAST_PIECE
        if may_share and sequence.exact == sequence.place.length:
            sequence.exact += count
        self._pool.advance(sequence.place, count)
        self.reading.remove(sequence)
        if sequence.reads_prompt:
            self.reading.append(sequence)  # appended, because prompts take turns
        elif sequence.request.params is not None:
            self.decoding.append(sequence)

    def next_decode(self) -> list[Sequence]:
        """Returns the sequences of the next decode step, after making room for a token of each.
        This may put back sequences."""
        for sequence in list(self.decoding):
            # The extent is None if room for an earlier sequence has put back this one.
            if sequence.extent is not None and _goes_on(sequence):
                self._make_room(sequence)
        return [sequence for sequence in self.decoding if _goes_on(sequence)]

    def note_decoded(self, sequences: list[Sequence]) -> None:
        """Counts one more token that was read for each sequence."""
        for sequence in sequences:
            self._pool.advance(sequence.place, 1)

    def release(self, sequence: Sequence, keep: bool = True) -> None:
        """Releases a sequence that has ended, whether it waits, reads or decodes.

        Args:
            sequence: the sequence.
            keep: whether its keys and values are valid, so that other requests may use them. If
                False, its slots are freed.
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
        """Takes the extent of a running sequence, and makes the sequence wait again, ahead of all
        waiting sequences that came after it."""
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
        # It is enough to admit the prompts of the next pass or two. A request that is admitted
        # later may find more of its prompt in the cache.
        unread = sum(s.prompt_length - s.place.length for s in self.reading)
        if unread >= 2 * self._chunk:
            return False
        return not any(self._is_worth_waiting_for(s, sequence) for s in self.reading)

    def _is_worth_waiting_for(self, other: Sequence, sequence: Sequence) -> bool:
        """Whether `other` is reading tokens that `sequence` would also have to read if it did not
        wait."""
        if other.request.prefix_owner != sequence.request.prefix_owner:
            return False
        if other.request.chunk is not None:
            return False
        most = min(other.prompt_length, shareable_length(sequence))
        common = common_length(other.ids, sequence.ids, most)
        return common >= other.place.length + LEAST_PIECE

    def _extent_for(self, sequence: Sequence) -> tuple[Extent | None, int]:
        """Makes an extent for a sequence. The extent holds the beginning of the prompt if the cache
        has it. Returns the extent (None: there is no room), and the number of its tokens that are
        exact (see `Sequence.exact`)."""
        most = self._needed(sequence)
        # A sequence that was put back gets at once all slots that it can ever need. So it never has
        # to grow, and is put back for want of room only if a sequence that came earlier grows.
        length = most if sequence.was_put_back else min(sequence.prompt_length + 1, most)
        match = self.prefixes.find(sequence, self.running())
        extent = self.prefixes.extent(match, length, most)
        return extent, 0 if match is None else match.exact

    def _make_room(self, sequence: Sequence) -> None:
        """Gives a sequence room for one more token. While there is no room, puts back the running
        sequence that came last. This may be the sequence itself."""
        while sequence.extent is not None and not self.prefixes.grow(sequence.extent, 1):
            self.put_back(max(self.running(), key=lambda s: s.request_id))


def _is_read_alone(sequence: Sequence) -> bool:
    return sequence.prompt_length <= _FEW_TOKENS


def _goes_on(sequence: Sequence) -> bool:
    """Whether the sequence needs another decode step, as far as is known: a token that a step under
    way computes may still end it. `place.length` already counts the steps under way."""
    return sequence.is_open and sequence.place.length + 1 < sequence.request.max_length


def _piece(unread: int, budget: int) -> int:
    """The number of tokens of a prompt to read next. No prompt is cut into pieces of fewer than
    LEAST_PIECE tokens, so this piece may exceed the budget a little."""
    count = min(budget, unread - LEAST_PIECE)
    return count if count >= LEAST_PIECE and unread > budget else unread
