"""Passes the outputs of an HTTP request's completions from the engine's thread to the event
loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mistral_ext.engine.adapters import UnknownAdapterError
from mistral_ext.engine.request import Completion, Output, Request
from mistral_ext.serve.engine_thread import EngineThread
from mistral_ext.serve.errors import ApiError, bad_request, failed, removed_model
from mistral_ext.serve.metrics import Metrics


@dataclass
class Progress:
    """The progress of a completion. Times are of `time.perf_counter`."""

    tokens: int = 0  # the number of tokens so far
    first: float | None = None  # the time of its first token; None: there is no token yet
    last: float = 0.0  # the time of its latest token
    completion: Completion | None = None


class Generation:
    """Runs completions, and returns their outputs in the order in which they come.

    Outputs wait here until the event loop takes them. The event loop calls all methods except
    `_take` and `_note`, which the engine's thread calls.

    Args:
        engine: the thread that steps the engine.
        requests: the requests of the completions.
        began: the time at which the HTTP request arrived, of `time.perf_counter`.
        metrics: counts tokens and times.
        max_unread: as soon as this many outputs wait, the completions are ended, and `on_overflow`
            is called. None: any number may wait, because the client does not get them as they come.
        on_overflow: a function that the event loop calls if too many outputs wait.

    Attributes:
        progress: the progress of each completion.
        began: the argument of this name.
    """

    def __init__(
        self,
        engine: EngineThread,
        requests: Sequence[Request],
        began: float,
        metrics: Metrics,
        max_unread: int | None,
        on_overflow: Callable[[], object],
    ) -> None:
        self.progress = [Progress() for _ in requests]
        self._engine = engine
        self._requests = requests
        self.began = began
        self._metrics = metrics
        self._max_unread = max_unread
        self._on_overflow = on_overflow
        self._loop = asyncio.get_running_loop()
        self._ids: list[int] = []
        self._come: deque[tuple[int, Output]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None

    def start(self) -> None:
        """Queues the completions.

        Raises:
            ApiError: 400 if `Engine.add` refuses a completion, 404 if its adapter was removed, 503
                if the engine is dead. Completions that are queued already then run until `close`.
        """
        try:
            for index, request in enumerate(self._requests):
                self._ids.append(self._engine.add(request, partial(self._take, index)))
        except UnknownAdapterError as error:
            raise removed_model(error) from error
        except ValueError as error:
            raise bad_request(str(error)) from error

    async def next(self, seconds: float) -> tuple[int, Output] | None:
        """Returns the next output with the number of its completion, or None if there was no output
        within `seconds`.

        Raises:
            ApiError: a completion has failed, or `fail` was called.
        """
        deadline = self._loop.time() + seconds
        while not (self._come or self._error):
            if self._loop.time() >= deadline:
                return None
            await self._wait_until(deadline)
        if self._error:
            raise self._error
        index, output = self._come.popleft()
        if output.error:
            raise failed(output.error)
        return index, output

    def fail(self, error: ApiError) -> None:
        """Ends all completions with an error."""
        self._error = self._error or error
        self.close()
        self._wake()

    def close(self) -> None:
        """Ends the completions that have not ended. The engine frees their memory at its next
        step."""
        self._engine.abort(self._ids)

    async def _wait_until(self, deadline: float) -> None:
        self._waiter = self._loop.create_future()
        timer = self._loop.call_at(deadline, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self, index: int, output: Output) -> None:
        if output.token_ids:
            self._note(index, output)
        self._come.append((index, output))
        if len(self._come) == 1:
            self._loop.call_soon_threadsafe(self._wake)
        elif len(self._come) == self._max_unread:
            for request_id in self._ids:  # in this thread, because the event loop may be busy
                self._engine.engine.abort(request_id)
            self._loop.call_soon_threadsafe(self._on_overflow)

    def _note(self, index: int, output: Output) -> None:
        progress, now = self.progress[index], time.perf_counter()
        if progress.first is None:
            progress.first = now
            self._metrics.first_token(now - self.began)
        else:
            self._metrics.next_token(now - progress.last)
        progress.last = now
        progress.tokens += len(output.token_ids)
        progress.completion = output.completion
