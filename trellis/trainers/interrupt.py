"""Ctrl-C and termination signals, which training obeys at the end of a step."""

import signal
import threading
from typing import Any


class StopRequests:
    """A block in which the first SIGINT or SIGTERM sets `signum`; a second one has its usual effect."""

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}  # what signal.signal returned for each signal

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def __exit__(self, *exc) -> None:
        self._restore()
