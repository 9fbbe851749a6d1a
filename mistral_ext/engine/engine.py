"""The engine. Requests come and go at any time, and each step advances those that have room.

    request_id = engine.add(request)
    while engine.has_work:
        for output in engine.step():
            ...

`scheduler` decides what a step does, `passes` and `runner` do it, and `slots` manages the memory of
the cache. A step makes up to two passes over the weights. The first pass reads the next pieces of
prompts. The second pass computes the next token of every sequence whose prompt has been read. On a
CPU the first pass may pause between two layers and continue in the next step, so that the second
pass begins soon (`pace`).
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from mistral_ext.engine.adapters import LoadedAdapter, UnknownAdapterError
from mistral_ext.engine.draft_model import DraftModel
from mistral_ext.engine.drafts import Drafter, default_drafts
from mistral_ext.engine.graph_runner import make_runner
from mistral_ext.engine.memory import default_slots
from mistral_ext.engine.model_guesses import ModelGuesses
from mistral_ext.engine.passes import Passes
from mistral_ext.engine.prefix_cache import LEAST_PIECE
from mistral_ext.engine.prompt_reader import PromptReader
from mistral_ext.engine.request import Output, Request
from mistral_ext.engine.sampling import Sampler
from mistral_ext.engine.scheduler import Scheduler
from mistral_ext.engine.sequence import Sequence
from mistral_ext.engine.slots import SlotPool
from mistral_ext.model.transformer import Transformer

# The most prompt tokens in a pass while other sequences generate, so that these need not wait long.
# On a GPU a pass over so many tokens takes about as long as a decode step. On a CPU it may take a
# few times as long, so there `Pace` adapts the number. It begins with this number, and never
# chooses a smaller one.
_BUSY_CHUNK = {"cpu": 32, "cuda": 512}

# The interval at which a thread that waits for the end of a step checks whether its work is done.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Load:
    """What an engine is doing, and how much memory that takes."""

    running: int  # the number of sequences whose prompts are being read, or that generate
    waiting: int  # the number of sequences that wait for room
    preemptions: int  # how many times so far a running sequence lost its room and had to wait again
    cache_share: float  # the share of the cache's slots that running sequences own, 0 to 1


class Engine:
    """Completes requests, as many at a time as there is room for.

    Any thread may call any method. Only one thread at a time makes a step; others wait.

    Args:
        model: the weights.
        vocab_size: the number of ids that may be sampled.
        max_batch: the most sequences that may generate at a time.
        prefill_chunk: the most prompt tokens in a pass. A number below 32 counts as 32 (see
            `prefix_cache.LEAST_PIECE`).
        cache_tokens: the number of tokens that the cache has room for. None: `memory.default_slots`
            chooses it by the free memory.
        holes: ids below vocab_size that no token has, and that are never sampled.
        drafts: the most tokens to guess at a time (see the module `drafts`), for requests that set
            no number. None: 7 on the CPU or with a draft model, else 0.
        draft_model: a model that guesses tokens where the text does not repeat itself. It must be
            on the same device, and have embeddings and logits for each id that may be sampled.
            None: there is no draft model.

    Attributes:
        pool: cache memory.
        scheduler: decides what a step does.
        runner: computes the passes.
        passes: makes the two passes of a step, with the scheduler and the runner.
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
        sampler = Sampler(max_batch, vocab_size, model.device, holes)
        self.runner = make_runner(model, self.pool, sampler)
        chunk = max(LEAST_PIECE, prefill_chunk)
        self.scheduler = Scheduler(self.pool, max_batch, chunk, _BUSY_CHUNK[model.device.type])
        layers = len(model.layers)
        self._reader = PromptReader(self.runner, self.scheduler, self.pool, layers, chunk)
        guesses = None
        if draft_model is not None:
            sizes = max_batch, cache_tokens, self.scheduler.busy_chunk
            guessing = DraftModel(draft_model, sampler, *sizes, make_runner)
            guesses = ModelGuesses(guessing, draft_model.nbytes / model.nbytes)
        if drafts is None:
            drafts = default_drafts(model.device, draft_model is not None)
        self._ids = itertools.count()
        # The lock guards the four attributes below, the scheduler and the pool. It is reentrant,
        # because garbage may be collected while a thread holds it. Then an abandoned `Outputs`
        # aborts its requests, which takes the lock again.
        self._lock = threading.RLock()
        # By their ids, the sequences that are still open: they have not ended and were not aborted.
        self._sequences: dict[int, Sequence] = {}
        self._aborted: list[Sequence] = []
        self._listeners: dict[int, Callable[[Output], object]] = {}
        self._between: deque[Callable[[], object]] = deque()
        self._stepping = threading.Lock()
        self._stepped = threading.Condition(self._lock)
        self.passes = Passes(
            self.runner,
            self.scheduler,
            self._reader,
            Drafter(guesses),
            sampler,
            self.pool,
            self._lock,
            drafts,
        )

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended, or aborted requests to clean up after."""
        with self._lock:
            return bool(self._sequences or self._aborted)

    @property
    def load(self) -> Load:
        """What the engine is doing now."""
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
            listener: a function to call with each of the request's outputs. The thread that makes
                the step calls it, so it must be quick. It may call `abort`. None: there is no
                listener.

        Returns:
            The id of the request.

        Raises:
            ValueError: the request can never fit into the cache, or its logit_bias has a token that
                may not be sampled.
            UnknownAdapterError: the adapter of the request was removed.
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
        """Ends a request at the next step, in any state. If it shares a paused pass over prompts
        with other requests, it ends after the pass. Its listener is not called again. Does nothing
        if the request has ended or is unknown."""
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
            ValueError: `add` refuses one of the requests. Then the other requests are aborted.
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
        """Starts the requests for which there is room, and makes up to two passes.

        Returns:
            The new outputs of all requests. The outputs of each request are in order. If Ctrl-C
            interrupts the step, nothing is returned, but listeners receive the outputs so far.
        """
        self._stepping.acquire()
        return self._step_and_let_go()

    def between_steps(self, work: Callable[[], object]) -> None:
        """Calls `work` while no thread makes a step or adds a request. Returns after `work`, and
        raises what `work` raises. While `work` runs, a pass over prompts may be paused, and a GPU
        may still compute a step that was launched ahead."""
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
        # A thread that makes one step after the other hardly ever leaves `_stepping` to this
        # thread. So whichever thread makes steps also does the work, between two steps.
        while not done.is_set():
            if self._stepping.acquire(timeout=_POLL_SECONDS):
                self._let_go()
        if problem:
            raise problem[0]

    def is_idle(self) -> bool:
        """Whether no thread uses the engine and no request is open. Never waits."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return not (self._stepping.locked() or self._sequences or self._aborted)
        finally:
            self._lock.release()

    def adapters_in_use(self) -> list[LoadedAdapter]:
        """The adapters of requests that have not ended, and of a paused pass."""
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
        """Does the work that waits for the end of a step, and then releases `_stepping`, which the
        calling thread holds."""
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
            self.passes.read(outputs)
            self.passes.decode(outputs)
        finally:  # also after Ctrl-C, because the sequences have already advanced by these tokens
            self._deliver(outputs)
            with self._lock:
                self.passes.drafter.keep_only(list(self.scheduler.running()))
        return outputs

    def _release_aborted(self) -> None:
        reading = self._reader.paused
        if all(sequence.is_aborted for sequence in reading):
            self._reader.forget()
            reading = []
        # Sequences of a paused pass stay until its end, because the pass still writes to their
        # extents.
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
        """Call this when a sequence has ended. If it used an adapter, the memory of removed
        adapters that no request needs any more is freed after the step."""
        adapter = sequence.request.adapter
        if adapter is not None:
            self._between.append(lambda: adapter.free(self.adapters_in_use()))


class Outputs(Iterator[Output]):
    """An iterator over the outputs of some requests (see `Engine.outputs`).

    Attributes:
        request_ids: the ids of the requests, in the order in which they were given.
    """

    def __init__(self, engine: Engine) -> None:
        self.request_ids: list[int] = []
        self._engine = engine
        self._open: dict[int, deque[Output]] = {}  # by request id, outputs not given yet

    def add(self, request: Request) -> None:
        """Adds a request. From then on the iterator also gives its outputs. Raises the errors of
        `Engine.add`."""
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
                    engine._stepped.wait()  # another thread makes a step
                    continue
            engine._step_and_let_go()
        raise StopIteration

    def close(self) -> None:
        """Aborts the requests that have not ended."""
        with self._engine._lock:
            while self._open:
                self._engine.abort(self._open.popitem()[0])

    def __del__(self) -> None:
        if self._open:
            self.close()
