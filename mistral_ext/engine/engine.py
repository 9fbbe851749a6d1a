"""The engine: requests come and go at any time, and each step brings all of them on.

    request_id = engine.add(request)
    while engine.has_work:
        for output in engine.step():
            ...

`scheduler` decides what a step does, `runner` does it, `slots` has the memory. A step makes up to
two passes over the weights. The first reads the next pieces of prompts. The second computes the
next token of every sequence whose prompt has been read. On a CPU the first may pause between two
layers, and goes on in the next step, so that the second waits little for it (`pace`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from mistral_ext.engine.adapters import LoadedAdapter, UnknownAdapterError
from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.drafts import Drafter, default_drafts, room_for_drafts
from mistral_ext.engine.graph_runner import make_runner
from mistral_ext.engine.memory import default_slots
from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.prefix_cache import LEAST_PIECE
from mistral_ext.engine.prompt_reader import PromptReader
from mistral_ext.engine.request import Output, Request
from mistral_ext.engine.runner import Step, Verified
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.scheduler import Scheduler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import Extent, SlotPool
from mistral_ext.model.transformer import Transformer

_T = TypeVar("_T")

# Prompt tokens in a pass while other sequences generate. On a GPU the pass takes about as long as a
# decode step. On a CPU it may take a few times as long; that is where `Pace` begins.
_BUSY_CHUNK = {"cpu": 32, "cuda": 512}

# How often a thread that waits for a step to end looks whether its work was done meanwhile.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Load:
    """The present work of an engine."""

    running: int  # sequences that read their prompt or generate
    waiting: int  # sequences that wait for room
    preemptions: int  # how often a sequence was put back, so far
    cache_share: float  # part of the cache's slots that running sequences own, 0 to 1


@dataclass(frozen=True)
class _UnderWay:
    """A decode step that was launched, and whose tokens have not been read."""

    key: list[tuple[int, int, int]]  # for each sequence: request id, first slot, capacity
    waiting: list[tuple[int, Sequence, Extent]]  # row, sequence and place of each new token
    step: Step


class Engine:
    """Completes requests, as many at a time as there is room for.

    Any thread may call `add`, `abort` and `outputs`; one thread at a time makes steps.

    Args:
        model: the weights.
        vocab_size: number of ids that may be sampled.
        max_batch: sequences that may generate at a time.
        prefill_chunk: prompt tokens in a pass, at most; no fewer than 32.
        cache_tokens: tokens that the cache has room for; None: see `memory.default_slots`.
        holes: ids below vocab_size that no token has, and that are never sampled.
        drafts: tokens to guess at a time, at most, for requests that do not say (see `drafts`);
            None: 7 on the CPU or with a draft model, else 0.
        draft_model: guesses tokens where the text does not repeat itself; on the same device, and
            with a row for each id that may be sampled.

    Attributes:
        pool: cache memory.
        scheduler: the policy.
        runner: the mechanism.
    """

    def __init__(
        self,
        model: Transformer,
        vocab_size: int,
        max_batch: int = 8,
        prefill_chunk: int = 512,
        cache_tokens: int | None = None,
        holes: Collection[int] = (),
        drafts: int | None = None,
        draft_model: Transformer | None = None,
    ) -> None:
        if cache_tokens is None:
            others = () if draft_model is None else (draft_model,)
            cache_tokens = default_slots(
                model.config,
                model.dtype,
                model.device,
                max_batch,
                sum(one.nbytes for one in (model, *others)),
                token_bytes=sum(one.config.cache_bytes(one.dtype) for one in (model, *others)),
            )
        self.pool = SlotPool(model.config, cache_tokens, model.dtype, model.device)
        self._vocab_size = vocab_size
        self._holes = holes
        self._sampler = Sampler(max_batch, vocab_size, model.device, holes)
        self.runner = make_runner(model, self.pool, self._sampler)
        chunk = max(LEAST_PIECE, prefill_chunk)
        self.scheduler = Scheduler(self.pool, max_batch, chunk, _BUSY_CHUNK[model.device.type])
        layers = len(model.layers)
        self._reader = PromptReader(self.runner, self.scheduler, self.pool, layers, chunk)
        guesses = None
        if draft_model is not None:
            sizes = max_batch, cache_tokens, self.scheduler.busy_chunk
            guessing = DraftModel(draft_model, self._sampler, *sizes, make_runner)
            guesses = ModelGuesses(guessing, draft_model.nbytes / model.nbytes)
        self._drafter = Drafter(guesses)
        if drafts is None:
            drafts = default_drafts(model.device, draft_model is not None)
        self._most_drafts = drafts
        self._under_way: deque[_UnderWay] = deque()
        self._ids = itertools.count()
        # Guards the four attributes below. The lock is reentrant because garbage may be collected
        # while it is held: an iterator over outputs that nobody reads any more aborts its requests.
        self._lock = threading.RLock()
        self._sequences: dict[int, Sequence] = {}  # all that have not ended
        self._aborted: list[Sequence] = []
        self._listeners: dict[int, Callable[[Output], object]] = {}
        self._between: deque[Callable[[], object]] = deque()
        self._stepping = threading.Lock()
        self._stepped = threading.Condition(self._lock)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        with self._lock:
            return bool(self._sequences or self._aborted)

    @property
    def load(self) -> Load:
        """The present work of the engine, and how much of its memory the work takes."""
        with self._lock:
            running = list(self.scheduler.running())
            return Load(
                running=len(running),
                waiting=len(self.scheduler.waiting),
                preemptions=self.scheduler.preemptions,
                cache_share=sum(s.place.capacity for s in running) / self.pool.slots,
            )

    def add(self, request: Request, listener: Callable[[Output], object] | None = None) -> int:
        """Queues a request.

        Args:
            request: what to do.
            listener: is called with each of the request's outputs, by the thread that makes the
                step. It must be quick, and may call `abort`.

        Returns:
            Its id.

        Raises:
            ValueError: it can never fit into the cache, or its logit_bias has a token that may not
                be sampled.
            UnknownAdapterError: its adapter was removed.
        """
        with self._lock:
            if request.adapter is not None and not request.adapter.is_loaded:
                raise UnknownAdapterError(f"adapter {request.adapter.name!r} was removed")
            sequence = Sequence(next(self._ids), request, self._vocab_size, self._holes)
            self.scheduler.add(sequence)
            self._sequences[sequence.request_id] = sequence
            if listener is not None:
                self._listeners[sequence.request_id] = listener
            return sequence.request_id

    def abort(self, request_id: int) -> None:
        """Ends a request at the next step, whatever it is doing, but for a pass over prompts that
        it shares with others: then at the end of the pass. It has no more outputs. A request that
        has ended, or that is not known, is left alone."""
        with self._lock:
            self._listeners.pop(request_id, None)
            sequence = self._sequences.pop(request_id, None)
            if sequence is not None:
                sequence.is_aborted = True
                self._aborted.append(sequence)

    def outputs(self, requests: Collection[Request]) -> Outputs:
        """Adds requests, and returns an iterator over their outputs. The iterator steps the engine,
        unless another thread does.

        Raises:
            ValueError: as `add`; then none of the requests stays.
        """
        outputs = Outputs(self)
        try:
            for request in requests:
                outputs.add(request)
        except BaseException:
            outputs.close()
            raise
        return outputs

    def step(self) -> list[Output]:
        """Brings all requests on.

        Returns:
            The new outputs of all requests; the outputs of each request are in order. A step that
            is interrupted (Ctrl-C) has given the outputs so far to the listeners alone.
        """
        self._stepping.acquire()
        return self._step_and_let_go()

    def between_steps(self, work: Callable[[], object]) -> None:
        """Calls `work` while no step is under way and no request is added, and waits for it."""
        done = threading.Event()
        problem: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                problem.append(error)
            done.set()

        with self._lock:
            self._between.append(run)
        # A thread that steps without a pause hardly ever leaves the lock to others, but it does the
        # work itself when a step begins.
        while not done.is_set():
            if self._stepping.acquire(timeout=_POLL_SECONDS):
                self._let_go()
        if problem:
            raise problem[0]

    def adapters_in_use(self) -> list[LoadedAdapter]:
        """The adapters of the requests that have not ended, and of a pass that has paused."""
        with self._lock:
            sequences = *self._sequences.values(), *self._reader.paused
            given = [sequence.request.adapter for sequence in sequences]
        return [adapter for adapter in given if adapter is not None]

    def _work_between(self) -> None:
        while self._between:
            self._between.popleft()()

    def _step_and_let_go(self) -> list[Output]:
        """Makes a step, and then releases `_stepping`, which the calling thread holds."""
        try:
            return self._step()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Does the work between steps, and then releases `_stepping`, which the calling thread
        holds."""
        with self._stepped:
            try:
                self._work_between()
            finally:
                self._stepping.release()
                self._stepped.notify_all()

    def _step(self) -> list[Output]:
        with self._lock:
            self._work_between()
            self._release_aborted()
            self.scheduler.admit()
        outputs: list[Output] = []
        try:
            self._read(outputs)
            self._decode(outputs)
        finally:  # after Ctrl-C too: the tokens of these outputs are in their sequences
            self._deliver(outputs)
            with self._lock:
                self._drafter.keep_only(list(self.scheduler.running()))
        return outputs

    def _release_aborted(self) -> None:
        reading = self._reader.paused
        if all(sequence.is_aborted for sequence in reading):
            self._reader.forget()
            reading = []
        # Others wait for the rest of a pass that has paused: it still writes to their extents.
        staying = [sequence for sequence in self._aborted if sequence in reading]
        for sequence in self._aborted:
            if sequence not in staying:
                if sequence.finish_reason is None:
                    self.scheduler.release(sequence)
                self._free_adapter(sequence)
        self._aborted = staying

    def _deliver(self, outputs: list[Output]) -> None:
        """Hands outputs to the listeners of their requests."""
        with self._lock:
            for output in outputs:
                listener = self._listeners.get(output.request_id)
                if output.is_last:
                    sequence = self._sequences.pop(output.request_id, None)
                    if sequence is not None:
                        self._free_adapter(sequence)
                    self._listeners.pop(output.request_id, None)
                if listener is not None:
                    listener(output)

    def _free_adapter(self, sequence: Sequence) -> None:
        """Has memory freed after the step that the adapter of an ended sequence may have held."""
        adapter = sequence.request.adapter
        if adapter is not None:
            self._between.append(lambda: adapter.free(self.adapters_in_use()))

    def _read(self, outputs: list[Output]) -> None:
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
                self.scheduler.note_read(sequence, count)
            if sequence.is_aborted:  # while its pass paused: it has no outputs any more
                continue
            if sequence.request.reports_prompt and len(of_piece):
                outputs.append(sequence.report(of_piece))
            if sequence.reads_prompt:
                continue
            if sequence.request.params is None:
                self._end(sequence, Output(sequence.request_id, finish_reason="stop"), outputs)
            elif len(sequence.ids) == sequence.prompt_length:  # else it was put back meanwhile
                self._prepare_draw(sequence)
                draw = partial(self._sampler.sample, [sequence.sampler_row], of_piece[-1:])
                sampled = self._run([sequence], draw)
                if isinstance(sampled, Exception):
                    outputs += self._fail([sequence], sampled)
                else:
                    self._accept(sequence, sampled[0], of_piece[-1], outputs)

    def _decode(self, outputs: list[Output]) -> None:
        """Launches the next decode step, and reads the oldest one if enough steps are under way.

        A step continues on the device from the tokens of the step before. It cannot if the
        sequences or their places have changed, or if a sequence reads known tokens again; and
        drafts have to follow known tokens. Then this call reads the results of all steps under way,
        and launches none.
        """
        with self._lock:
            sequences = self.scheduler.next_decode()
            self._reader.forget_if_lost()
        # A step can continue from the tokens of the step before only if this key is the same.
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
        began = time.perf_counter()  # the first guess at a long text takes as long as a pass
        accepted = dict.fromkeys(drafts, 0)
        if drafts:
            is_usual = self._verify(sequences, drafts, accepted, outputs)
        else:
            is_usual = self._launch(sequences, key, outputs)
        seconds = time.perf_counter() - began if is_usual else None
        if seconds is not None:
            self._reader.pace.note_step(seconds)
        self._drafter.note(len(sequences), seconds, drafts, accepted)

    def _drafts(self, sequences: list[Sequence]) -> dict[Sequence, list[int]]:
        """The drafts of the next step. While steps are under way, whose tokens nobody knows, they
        only say that the next step should wait for these tokens."""
        unknown = len(self._under_way)
        room = [room_for_drafts(s, self.pool, self._most_drafts, unknown) for s in sequences]
        return self._drafter.choose(sequences, room, unknown)

    def _launch(
        self, sequences: list[Sequence], key: list[tuple[int, int, int]], outputs: list[Output]
    ) -> bool:
        """Launches a step without drafts. Returns `is_usual`: whether later such calls take as long
        as this one, which then is the time of a step."""
        rows, extents = [s.sampler_row for s in sequences], [s.place for s in sequences]
        token_ids = None if self._under_way else [s.next_id for s in sequences]
        given = extents, rows, token_ids, [s.request.adapter_slot for s in sequences]
        step = self._run(sequences, lambda: self.runner.launch(*given))
        if isinstance(step, Exception):
            outputs += self._fail(sequences, step)
            return False
        waiting = [(i, s, s.place) for i, s in enumerate(sequences) if s.generates]
        with self._lock:
            self.scheduler.note_decoded(sequences)
        self._under_way.append(_UnderWay(key, waiting, step))
        # A matcher has to know the token before the next step begins.
        is_free = all(sequence.matcher is None for sequence in sequences)
        waits = False  # the first of the steps that are launched ahead is not waited for
        while len(self._under_way) > (self.runner.ahead if is_free else 0):
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
        """Makes a step with drafts, and counts in `accepted` which are right. The tokens of a
        sequence are chosen one after the other, each as without drafts, until a draft is not the
        token that was chosen. Returns `is_usual`, as `_launch` does."""
        rows, extents = [s.sampler_row for s in sequences], [s.place for s in sequences]
        token_ids = [[s.next_id, *drafts.get(s, ())] for s in sequences]
        given = extents, rows, token_ids, [s.request.adapter_slot for s in sequences]
        step = self._run(sequences, lambda: self.runner.verify(*given))
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
                self.pool.note_drafts(sequence.place, len(tokens))
                sequence.drafted += len(tokens)
            self.scheduler.note_decoded(sequences)
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
                self.scheduler.note_decoded([sequence for sequence, _, _ in going])
            for sequence, _, _ in going:
                sequence.accepted += 1
                accepted[sequence] += 1
                self._prepare_draw(sequence)
        return step.is_usual

    def _choose(self, step: Verified, waiting: list[tuple[int, Sequence]]) -> list[int]:
        """The token that each of some sequences gets from its row of a step; -1 for none."""
        rows = [row for row, _ in waiting]
        if step.largest is not None:
            return [step.largest[row] for row in rows]
        logits = step.logits.index_select(0, torch.tensor(rows, device=step.logits.device))
        return self._sampler.draw_now([s.sampler_row for _, s in waiting], logits)

    def _finish(self, launched: _UnderWay, outputs: list[Output]) -> None:
        """Reads the tokens of a step, for the sequences whose places have not changed since."""
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
            self.scheduler.release(sequence)
        outputs.append(output)

    def _prepare_draw(self, sequence: Sequence) -> None:
        """Brings the sampler's row into the state that the next draw needs."""
        if not sequence.is_drawing:
            params = sequence.request.params
            assert params is not None  # it is to generate
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
        """Calls `work`; returns its result, or an exception that it raised, for the requests to
        report. Exceptions that end the program (Ctrl-C above all) pass through, and leave the
        engine as if the pass had not begun."""
        try:
            return work()
        except Exception as error:
            return error
        except BaseException:
            with self._lock:
                self._under_way.clear()
                sequences = *sequences, *self._reader.paused, *self.scheduler.decoding
                self._reader.forget()
                for sequence in sequences:
                    if sequence.extent is not None:
                        self.scheduler.put_back(sequence)
            raise

    def _fail(self, sequences: Collection[Sequence], error: Exception) -> list[Output]:
        """Ends requests with an error, and gives their memory back."""
        outputs = []
        with self._lock:
            for sequence in sequences:
                if sequence.finish_reason is None and sequence.extent is not None:
                    sequence.finish_reason = "error"
                    self.scheduler.release(sequence, keep=False)
                    outputs.append(Output(sequence.request_id, error=error))
        return outputs


class Outputs(Iterator[Output]):
    """Iterator over the outputs of some requests: see `Engine.outputs`.

    Attributes:
        request_ids: the ids of the requests, in the order in which they were given.
    """

    def __init__(self, engine: Engine) -> None:
        self.request_ids: list[int] = []
        self._engine = engine
        self._open: dict[int, deque[Output]] = {}  # unread outputs of requests that have not ended

    def add(self, request: Request) -> None:
        """Adds a request. This iterator gives its outputs too."""
        come: deque[Output] = deque()
        with self._engine._lock:
            request_id = self._engine.add(request, come.append)
            self._open[request_id] = come
            self.request_ids.append(request_id)

    def __next__(self) -> Output:
        engine = self._engine
        while self._open:
            with engine._stepped:
                for request_id, come in self._open.items():
                    if come:
                        output = come.popleft()
                        if output.is_last:
                            del self._open[request_id]
                        return output
                if not engine._stepping.acquire(blocking=False):
                    engine._stepped.wait()  # another thread steps for us
                    continue
            engine._step_and_let_go()
        raise StopIteration

    def close(self) -> None:
        """Ends the requests that have not ended."""
        with self._engine._lock:
            while self._open:
                self._engine.abort(self._open.popitem()[0])

    def __del__(self) -> None:
        if self._open:
            self.close()
