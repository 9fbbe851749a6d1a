"""Turns Ctrl-C, SIGTERM and SIGHUP into requests to end, so that a training run ends at a point
where nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Interruption:
    """A context in which the first signal only sets a flag. A second signal has its usual effect.

    Signals that are ignored stay ignored, for instance SIGHUP under nohup. In threads other than
    the main thread the context has no effect, because only the main thread may handle signals.

    Attributes:
        requested: whether there was a signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in _SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
