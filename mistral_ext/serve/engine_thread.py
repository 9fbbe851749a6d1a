"""Runs the steps of the engine in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

import torch

from mistral_ext.engine.engine import Engine
from mistral_ext.engine.request import Output, Request
from mistral_ext.serve.errors import out_of_order

_log = logging.getLogger("mistral_ext.serve")

# Several clients often send requests within a few milliseconds. So an idle engine waits a little
# after the first request, and then reads all prompts in one pass. If it began with the first prompt
# alone, generating tokens for it would slow down the reading of the others.
_LULL = 0.003  # the first step begins after so many seconds without a new request
_LONGEST_WAIT = 0.03  # the first step begins after so many seconds even if requests still come


class EngineThread:
    """Runs the steps of an engine while there is work. Other threads add and abort requests.

    If a pass through the model fails, the requests in it end with an error, and the thread goes on.
    The thread ends if the engine itself fails or the device no longer works. Then `add` refuses new
    requests.

    Args:
        engine: the engine.
        device: the device of the engine's model.
        on_death: a function that the thread calls when it ends after a failure.
    """

    def __init__(
        self, engine: Engine, device: torch.device, on_death: Callable[[], object]
    ) -> None:
        self.engine = engine
        self._device = device
        self._on_death = on_death
        self._wake = threading.Condition()
        self._added = 0  # the number of requests that were added so far
        self._is_stopping = False
        self._is_dead = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_dead(self) -> bool:
        """Whether the thread has ended after a failure."""
        return self._is_dead

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def add(self, request: Request, listener: Callable[[Output], object]) -> int:
        """Adds a request (see `Engine.add`).

        Raises:
            ApiError: 503 if the thread has died.
            ValueError: `Engine.add` refuses the request.
        """
        if self._is_dead:
            raise out_of_order()
        request_id = self.engine.add(request, listener)
        with self._wake:
            self._added += 1
            self._wake.notify()
        return request_id

    def abort(self, request_ids: Iterable[int]) -> None:
        """Ends requests at the next step."""
        for request_id in request_ids:
            self.engine.abort(request_id)
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                errors = [output.error for output in self.engine.step() if output.error]
                for error in errors:
                    _log.error("a pass failed: %s", error, exc_info=error)
                if errors:
                    self._check_device()
            except Exception as error:
                _log.critical("the engine has failed: %s", error, exc_info=error)
                self._is_dead = True
                self._on_death()
                return

    def _wait_for_work(self) -> bool:
        with self._wake:
            if not (self._is_stopping or self.engine.has_work):
                self._wake.wait_for(lambda: self._is_stopping or self.engine.has_work)
                self._wait_for_a_lull()
            return not self._is_stopping

    def _wait_for_a_lull(self) -> None:
        """Waits until no request has been added for a moment, but not longer than `_LONGEST_WAIT`.
        The caller must hold `_wake`."""
        latest = time.monotonic() + _LONGEST_WAIT
        while not self._is_stopping and (left := latest - time.monotonic()) > 0:

            def goes_on(added: int = self._added) -> bool:
                return self._is_stopping or self._added > added

            if not self._wake.wait_for(goes_on, min(_LULL, left)):
                return

    def _check_device(self) -> None:
        """Raises an error if the device can no longer compute, such as a GPU after a bad access."""
        torch.ones(1, device=self._device).sum().item()
