"""Guesses the next tokens of sequences with a draft model, which is a smaller model with the same
vocabulary.

The draft model has its own cache. In it, each sequence that the model guesses for has an extent
(its slots for keys and values, see `slots`). If a sequence continues with other tokens than were
guessed, its extent is rewound to the last right token. The extent of an ended sequence is kept
until its memory is needed. Later sequences with the same beginning reuse it, above all the next
turn of a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as List
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from mistral_ext.engine.params import MOST_DRAFTS
from mistral_ext.engine.pass_costs import MOST_ROWS
from mistral_ext.engine.prefix_cache import PrefixCache
from mistral_ext.engine.runner import Piece, Runner
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool, slots_needed
from mistral_ext.model.transformer import Transformer


@dataclass(eq=False)
class _Place:
    """The tokens of a sequence that the draft model's cache holds.

    Attributes:
        extent: the slots of the sequence in that cache.
        known: the number of tokens of the sequence that the slots hold.
        guesses: the guessed tokens that the slots hold after these.
    """

    extent: Extent
    known: int = 0
    guesses: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses the next tokens of sequences. It chooses them by the rules of the sampler from the
    draft model's logits.

    Args:
        model: the weights of the draft model, on the device of the sampler.
        sampler: the sampler of the sequences, which has their options and state. It is not changed.
        rows: the number of rows of the sampler.
        slots: the number of tokens that the draft model's cache has room for.
        chunk: the most tokens that a call of `prepare` reads in pieces, of all sequences together.
        make_runner: makes the runner, given a model, a cache and a sampler.

    Attributes:
        pool: the draft model's cache.
        prefixes: the extents of sequences that have ended.
        rows: the number of tokens that the last pass of `guess` read. They are rows of the pass,
            not of the sampler.
        is_usual: whether the last pass of `guess` took the time that later passes take. If not,
            callers do not note its time (see `runner.Step`).
    """

    def __init__(
        self,
        model: Transformer,
        sampler: Sampler,
        rows: int,
        slots: int,
        chunk: int,
        make_runner: Callable[[Transformer, SlotPool, Sampler], Runner],
    ) -> None:
        self.pool = SlotPool(model.config, slots, model.dtype, model.device)
        self.prefixes = PrefixCache(self.pool)
        self._given = sampler
        self._sampler = Sampler(rows, sampler.vocab_size, model.device)
        self._runner = make_runner(model, self.pool, self._sampler)
        self._chunk = chunk
        self.rows, self.is_usual = 0, True
        self._places: dict[Sequence, _Place] = {}

    def prepare(self, sequences: Collection[Sequence]) -> list[Sequence]:
        """Makes room in the draft model's cache for sequences, of which there are at most
        `MOST_ROWS`, and reads their tokens. Sequences with many unread tokens are read in pieces,
        in total up to `chunk` tokens per call.

        Returns:
            The sequences that are ready for one common call of `guess`. They have room for guesses.
            All their tokens are read, except those that the first pass of `guess` reads.
        """
        places = {s: place for s in sequences if (place := self._place(s)) is not None}
        rows, budget = MOST_ROWS - len(places), self._chunk
        ready: list[Sequence] = []
        pieces: dict[Sequence, Piece] = {}
        for sequence, place in places.items():
            # `guess` reads the last token, because the logits after it give the first guess.
            unread = sequence.ids[place.known : -1]
            if len(unread) <= rows:
                rows -= len(unread)
                ready.append(sequence)
            elif budget:
                pieces[sequence] = Piece(place.extent, unread[:budget], 0)
                if len(unread) <= budget:
                    ready.append(sequence)
                budget -= len(pieces[sequence].token_ids)
        if pieces:
            with self._forgotten_on_failure(pieces):
                self._runner.read(list(pieces.values()))
        for sequence, piece in pieces.items():
            self.pool.advance(piece.extent, len(piece.token_ids))
            places[sequence].known = piece.extent.length
        return ready

    def guess(self, sequences: List[Sequence]) -> Iterator[list[tuple[int, float]]]:
        """Guesses tokens for sequences that `prepare` has returned. Each iteration is a pass of at
        most `MOST_ROWS` rows. The sampler has one mask of allowed tokens for a sequence, which does
        not change between the guesses. So if a grammar made the mask, only the first guess is
        useful.

        Yields:
            For each sequence its next token, and the probability that the model gives this token.
            There are at most `MOST_DRAFTS` iterations.

        Raises:
            ValueError: no token can be chosen, because a logit is NaN or all are -inf.
        """
        places = [self._places[sequence] for sequence in sequences]
        extents, rows = [place.extent for place in places], [s.sampler_row for s in sequences]
        self._sampler.follow(self._given, rows)
        unread = [s.ids[e.length :] for s, e in zip(sequences, extents, strict=True)]
        with self._forgotten_on_failure(sequences):
            first = self._runner.verify(extents, rows, unread, [-1] * len(rows))
        self.rows, self.is_usual = sum(map(len, unread)), first.is_usual
        last, end = [], -1
        for place, tokens in zip(places, unread, strict=True):
            end += len(tokens)
            last.append(end)
            self.pool.advance(place.extent, len(tokens))
            place.known, place.guesses = place.extent.length, []
        logits = first.logits[last]
        if first.largest is None:
            token_ids = self._sampler.draw_now(rows, logits)
        else:
            token_ids = [first.largest[row] for row in last]
        yield self._guesses(sequences, token_ids, logits)
        for _ in range(MOST_DRAFTS - 1):
            with self._forgotten_on_failure(sequences):
                step = self._runner.launch(extents, rows, token_ids)
            for place, token_id in zip(places, token_ids, strict=True):
                self.pool.advance(place.extent, 1)
                place.guesses.append(token_id)
            self.rows, self.is_usual = len(rows), step.is_usual
            token_ids, logits = step.token_ids(), step.logits
            yield self._guesses(sequences, token_ids, logits)

    def keep_only(self, sequences: Collection[Sequence]) -> None:
        """Forgets all sequences but these. The extents of the others stay for later sequences with
        the same beginning, until the memory is needed."""
        for sequence in [s for s in self._places if s not in sequences]:
            place = self._places.pop(sequence)
            self.pool.rewind(place.extent, place.known)
            # Generated tokens count as exact too (see `Sequence.exact`), so that other sequences
            # may reuse them. Their keys may differ in the last bits from those of the same tokens
            # in a prompt. At most this makes guesses worse.
            self.prefixes.add(place.extent, sequence, exact=place.known)

    @contextmanager
    def _forgotten_on_failure(self, sequences: Collection[Sequence]) -> Iterator[None]:
        """Forgets the sequences if the block raises an error, because nobody knows what a failed
        pass has written."""
        try:
            yield
        except BaseException:
            for sequence in sequences:
                self.pool.release(self._places.pop(sequence).extent)
            raise

    def _guesses(
        self, sequences: List[Sequence], token_ids: list[int], logits: Tensor
    ) -> list[tuple[int, float]]:
        if -1 in token_ids:
            with self._forgotten_on_failure(sequences):
                raise self._sampler.problem(logits[token_ids.index(-1)])
        of_all = logits[:, : self._sampler.vocab_size].softmax(-1)
        return [(token_id, float(of_all[i, token_id])) for i, token_id in enumerate(token_ids)]

    def _place(self, sequence: Sequence) -> _Place | None:
        """Returns the place of a sequence. It is rewound to the last right token, and has room for
        the sequence's later tokens and for guesses. Returns None if there is no room, or if guesses
        are not worth it (see `_enter`)."""
        place = self._places.get(sequence) or self._enter(sequence)
        if place is None:
            return None
        ids, right = sequence.ids, 0
        for guess, token_id in zip(place.guesses, ids[place.known :], strict=False):
            if guess != token_id:
                break
            right += 1
        # The last token is always read again, because the logits after it give the next guess.
        place.known, place.guesses = min(place.known + right, len(ids) - 1), []
        self.pool.rewind(place.extent, place.known)
        if not self.prefixes.grow(place.extent, len(ids) - place.known + MOST_DRAFTS):
            self.pool.release(self._places.pop(sequence).extent)
            return None
        return place

    def _enter(self, sequence: Sequence) -> _Place | None:
        """Makes a place for a sequence. Returns None if there is no room. Also returns None if the
        draft model, which reads one chunk per step, would need more than half of the sequence's
        remaining steps only to read the tokens so far."""
        match = self.prefixes.find(sequence, running=())
        unread = len(sequence.ids) - (0 if match is None else match.length)
        left = sequence.request.max_length - len(sequence.ids)
        if 2 * unread > left * self._chunk:
            return None
        most = slots_needed(self.pool.window, sequence.request.max_length + MOST_DRAFTS)
        extent = self.prefixes.extent(match, min(len(sequence.ids), most), most)
        if extent is None:
            return None
        self._places[sequence] = _Place(extent, known=extent.length)
        return self._places[sequence]
