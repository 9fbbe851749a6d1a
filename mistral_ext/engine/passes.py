"""The two passes over the weights that make up a step of the engine.

`read` reads the next pieces of prompts. `decode` computes the next token of every sequence whose
prompt has been read. Both append the outputs of the requests to a list. A sequence that was *put
back* has lost its place in the cache and waits to be read again (see `scheduler`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from mistral_ext.engine.drafts import Drafter, room_for_drafts
from mistral_ext.engine.prompt_reader import PromptReader
from mistral_ext.engine.request import Output
from mistral_ext.engine.runner import Runner, Step, Verified
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.scheduler import Scheduler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool

_T = TypeVar("_T")


@dataclass(frozen=True)
class _UnderWay:
    """A decode step that was launched, but whose new tokens the host does not know yet."""

    key: list[tuple[int, int, int]]  # for each sequence: request id, first slot, capacity
    # For each new token its row of the step, its sequence, and the sequence's extent at the launch.
    waiting: list[tuple[int, Sequence, Extent]]
    step: Step


class Passes:
    """Makes the passes, for one thread at a time.

    Args:
        runner, scheduler, reader, drafter, sampler, pool: the objects that the engine has made.
        lock: the lock that guards the scheduler and the pool.
        most_drafts: the most tokens to guess at a time, for requests that do not set a number.

    Attributes:
        drafter: guesses the tokens that a pass checks.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        reader: PromptReader,
        drafter: Drafter,
        sampler: Sampler,
        pool: SlotPool,
        lock: threading.RLock,
        most_drafts: int,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._reader = reader
        self.drafter = drafter
        self._sampler = sampler
        self._pool = pool
        self._lock = lock
        self._most_drafts = most_drafts
        self._under_way: deque[_UnderWay] = deque()

    def read(self, outputs: list[Output]) -> None:
        pieces = self._reader.next_pieces()
        if not pieces:
            return
        sequences = [sequence for sequence, _ in pieces]
        logits = self._run(sequences, lambda: self._reader.go_on(pieces))
        if logits is None:
            return
        if isinstance(logits, Exception):
            self._reader.forget()
            outputs += self._fail(sequences, logits)
            return
        for (sequence, count), of_piece in zip(pieces, logits, strict=True):
            with self._lock:
                self._scheduler.note_read(sequence, count)
            if sequence.is_aborted:  # the abort came while the pass was paused
                continue
            if sequence.request.reports_prompt and len(of_piece):
                outputs.append(sequence.report(of_piece))
            if sequence.reads_prompt:
                continue
            if sequence.request.params is None:
                self._end(sequence, Output(sequence.request_id, finish_reason="stop"), outputs)
            # A sequence that was put back may already know its next token. Others draw one.
            elif len(sequence.ids) == sequence.prompt_length:
                self._prepare_draw(sequence)
                draw = partial(self._sampler.sample, [sequence.sampler_row], of_piece[-1:])
                sampled = self._run([sequence], draw)
                if isinstance(sampled, Exception):
                    outputs += self._fail([sequence], sampled)
                else:
                    self._accept(sequence, sampled[0], of_piece[-1], outputs)

    def decode(self, outputs: list[Output]) -> None:
        """Launches the next decode step. If then more steps are under way than the runner allows,
        waits for the tokens of the oldest step.

        While steps are under way, the next step continues on the device from the tokens of the last
        step. It cannot do so if
        - the sequences or their extents have changed,
        - a sequence that was put back reads its generated tokens again, or
        - the step should have drafts, which must follow known tokens.
        Then this call only reads the tokens of all steps under way, and a later call launches the
        next step.
        """
        with self._lock:
            sequences = self._scheduler.next_decode()
            self._reader.forget_if_lost()
        # A step can continue from the tokens of the last step only if both have the same key.
        key = [(s.request_id, s.place.first, s.place.capacity) for s in sequences]
        goes_on = all(sequence.generates for sequence in sequences)
        if self._under_way:
            goes_on = goes_on and self._under_way[-1].key == key
            waiting = self._drafts(sequences) if goes_on else {}
            if waiting or not goes_on:
                while self._under_way:
                    self._finish(self._under_way.popleft(), outputs)
                for sequence in waiting:
                    sequence.proposer.note_wait()
                return
        if not sequences:
            return
        for sequence in sequences:
            if sequence.generates:
                self._prepare_draw(sequence)
        drafts = {} if self._under_way else self._drafts(sequences)
        # The time of the step is measured from here on, without the guesses above: the first guess
        # for a long text takes as long as a pass.
        began = time.perf_counter()
        accepted = dict.fromkeys(drafts, 0)
        if drafts:
            is_usual = self._verify(sequences, drafts, accepted, outputs)
        else:
            is_usual = self._launch(sequences, key, outputs)
        seconds = time.perf_counter() - began if is_usual else None
        if seconds is not None:
            self._reader.pace.note_step(seconds)
        self.drafter.note(len(sequences), seconds, drafts, accepted)

    def _drafts(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """Chooses the drafts of the next step. Drafts can follow only known tokens. So if steps are
        under way, a result that is not empty only says that the next step should wait until their
        tokens are known."""
        unknown = len(self._under_way)
        room = [room_for_drafts(s, self._pool, self._most_drafts, unknown) for s in sequences]
        return self.drafter.choose(sequences, room, unknown)

    def _launch(
        self, sequences: list[Sequence], key: list[tuple[int, int, int]], outputs: list[Output]
    ) -> bool:
        """Launches a step without drafts. Returns `is_usual`: whether the time of this call is the
        usual time of a step."""
        rows, extents = [s.sampler_row for s in sequences], [s.place for s in sequences]
        token_ids = None if self._under_way else [s.next_id for s in sequences]
        given = extents, rows, token_ids, [s.request.adapter_slot for s in sequences]
        step = self._run(sequences, lambda: self._runner.launch(*given))
        if isinstance(step, Exception):
            outputs += self._fail(sequences, step)
            return False
        waiting = [(i, s, s.place) for i, s in enumerate(sequences) if s.generates]
        with self._lock:
            self._scheduler.note_decoded(sequences)
        self._under_way.append(_UnderWay(key, waiting, step))
        # A matcher must know the token before the next step begins, because the token decides which
        # tokens the grammar allows in that step.
        is_free = all(sequence.matcher is None for sequence in sequences)
        # The time of a call that waits for no step says nothing about a step. The call that
        # launches the first step ahead is such a call.
        waits = False
        while len(self._under_way) > (self._runner.ahead if is_free else 0):
            self._finish(self._under_way.popleft(), outputs)
            waits = True
        return step.is_usual and waits

    def _verify(
        self,
        sequences: list[Sequence],
        drafts: Mapping[Sequence, list[int]],
        accepted: dict[Sequence, int],
        outputs: list[Output],
    ) -> bool:
        """Makes a step with drafts. The tokens of a sequence are chosen one after the other, each
        as without drafts, until a chosen token differs from the draft at its position. Adds the
        number of right drafts of each sequence to `accepted`. Returns `is_usual`, as `_launch`
        does."""
        rows, extents = [s.sampler_row for s in sequences], [s.place for s in sequences]
        token_ids = [[s.next_id, *drafts.get(s, ())] for s in sequences]
        given = extents, rows, token_ids, [s.request.adapter_slot for s in sequences]
        step = self._run(sequences, lambda: self._runner.verify(*given))
        if isinstance(step, Exception):
            outputs += self._fail(sequences, step)
            return False
        first = itertools.accumulate(map(len, token_ids), initial=0)
        going = [
            (sequence, row, iter(drafts.get(sequence, ())))
            for sequence, row in zip(sequences, first, strict=False)
            if sequence.generates
        ]
        with self._lock:
            for sequence, tokens in drafts.items():
                self._pool.note_drafts(sequence.place, len(tokens))
                sequence.drafted += len(tokens)
            self._scheduler.note_decoded(sequences)
        while going:
            waiting = [(row, sequence) for sequence, row, _ in going]
            chosen = self._run([s for _, s in waiting], partial(self._choose, step, waiting))
            if isinstance(chosen, Exception):
                outputs += self._fail([s for _, s in waiting], chosen)
                return False
            right = []
            for (sequence, row, rest), token_id in zip(going, chosen, strict=True):
                self._accept(sequence, token_id, step.logits[row], outputs)
                if next(rest, None) == token_id and sequence.is_open:
                    right.append((sequence, row + 1, rest))
            going = right
            with self._lock:
                self._scheduler.note_decoded([sequence for sequence, _, _ in going])
            for sequence, _, _ in going:
                sequence.accepted += 1
                accepted[sequence] += 1
                self._prepare_draw(sequence)
        return step.is_usual

    def _choose(self, step: Verified, waiting: list[tuple[int, Sequence]]) -> list[int]:
        """Chooses a token for each of some sequences. `waiting` has for each sequence the row of
        the step from which to choose, and the sequence. A token is -1 if none can be chosen."""
        rows = [row for row, _ in waiting]
        if step.largest is not None:
            return [step.largest[row] for row in rows]
        logits = step.logits.index_select(0, torch.tensor(rows, device=step.logits.device))
        return self._sampler.draw_now([s.sampler_row for _, s in waiting], logits)

    def _finish(self, launched: _UnderWay, outputs: list[Output]) -> None:
        """Reads the tokens of a step, for the sequences that have the same extents as at its
        launch. The step's other sequences have ended or were put back."""
        waiting = [(i, s) for i, s, extent in launched.waiting if s.extent is extent]
        sequences = [sequence for _, sequence in waiting]
        token_ids = self._run(sequences, launched.step.token_ids)
        if isinstance(token_ids, Exception):
            outputs += self._fail(sequences, token_ids)
            return
        for i, sequence in waiting:
            self._accept(sequence, token_ids[i], launched.step.logits[i], outputs)

    def _accept(
        self, sequence: Sequence, token_id: int, logits: torch.Tensor, outputs: list[Output]
    ) -> None:
        if sequence.is_aborted:
            return
        try:
            if token_id < 0:
                raise self._sampler.problem(logits)
            output = sequence.accept(token_id, logits)
        except Exception as error:
            outputs += self._fail([sequence], error)
            return
        if output.is_last:
            self._end(sequence, output, outputs)
        else:
            outputs.append(output)

    def _end(self, sequence: Sequence, output: Output, outputs: list[Output]) -> None:
        sequence.finish_reason = output.finish_reason
        with self._lock:
            self._scheduler.release(sequence)
        outputs.append(output)

    def _prepare_draw(self, sequence: Sequence) -> None:
        """Brings the sequence's row of the sampler into the state that the next draw needs."""
        if not sequence.is_drawing:
            params = sequence.request.params
            assert params is not None  # a sequence that generates has params
            self._sampler.start(
                sequence.sampler_row,
                params,
                sequence.ids[: sequence.prompt_length],
                sequence.request.index,
                sequence.ids[sequence.prompt_length :],
                sequence.seed,
            )
            sequence.is_drawing = True
        if sequence.matcher is not None:
            self._sampler.restrict(sequence.sampler_row, sequence.matcher.allowed)

    def _run(self, sequences: Collection[Sequence], work: Callable[[], _T]) -> _T | Exception:
        """Calls `work` for some sequences. Returns its result, or the exception that it raised,
        which the requests then report.

        An exception that ends the program (above all Ctrl-C) is raised again. Before that, the
        running sequences that a pass may have changed are put back, so that later steps do the work
        again.
        """
        try:
            return work()
        except Exception as error:
            return error
        except BaseException:
            with self._lock:
                self._under_way.clear()
                sequences = *sequences, *self._reader.paused, *self._scheduler.decoding
                self._reader.forget()
                for sequence in sequences:
                    if sequence.extent is not None:
                        self._scheduler.put_back(sequence)
            raise

    def _fail(self, sequences: Collection[Sequence], error: Exception) -> list[Output]:
        """Ends requests with an error, and frees their memory."""
        outputs = []
        with self._lock:
            for sequence in sequences:
                if sequence.finish_reason is None and sequence.extent is not None:
                    sequence.finish_reason = "error"
                    self._scheduler.release(sequence, keep=False)
                    outputs.append(Output(sequence.request_id, error=error))
        return outputs
