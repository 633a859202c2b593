"""Signals that ask a program to end: obeyed at once, or noted for the end of a training step.

Imports nothing large, since a program sets its handlers before it loads torch. Each signal needs a handler of its own,
for a process that is number 1 in a container never gets one that it does not handle. What was ignored when the program
started (SIGHUP under nohup, SIGINT in the background of a script) stays ignored.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows lacks some
# A scheduler signals every process of a job, and a launcher passes on its own signal: repeats within this time are one
# request.
REPEAT_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """The request to end at once, raised in the main thread.

    signum: the signal's number.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """The signals that have arrived, while handlers are set. See `handled`.

    limit: seconds after Stopped in which the process must end; None if it may take its time.
    signum: the first one, or None.
    on_signal: None: the main thread raises Stopped. Else it is called by another thread with the signal and whether it
        is a later one, and the main thread goes on.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.signum: int | None = None
        self.on_signal: Callable[[int, bool], None] | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}  # what signal.signal returned for each signal
        self._pipe: tuple[socket.socket, socket.socket] | None = None  # both ends; Windows has no other for this
        self._previous_wakeup = -1
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def _open(self) -> None:
        # Python calls handlers in the main thread once compiled code returns there, which may take an hour in a
        # collective. So a thread learns of signals, too, through the pipe that Python offers for this.
        self._pipe = socket.socketpair()
        self._pipe[1].setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._pipe[1].fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle)

    def _close(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._closed.set()
        assert self._pipe is not None and self._thread is not None
        self._pipe[1].send(b"\0")
        self._thread.join()
        for end in self._pipe:
            end.close()

    def _handle(self, signum: int, frame: Any) -> None:
        """Note the signal; in the main thread."""
        first, self.signum = self.signum is None, self.signum or signum
        if first and self.on_signal is None:
            raise Stopped(signum)

    def _watch(self) -> None:
        assert self._pipe is not None
        while not self._closed.is_set():
            signum = self._pipe[0].recv(1)[0]
            if signum not in self._previous:
                continue
            now = time.monotonic()
            later = self._since > 0
            if later and now - self._since < REPEAT_SECONDS:
                continue
            self._since = self._since or now
            if self.on_signal is not None:
                self.signum = self.signum or signum
                self.on_signal(signum, later)
            elif later or (self.limit is not None and not self._closed.wait(self.limit)):
                os._exit(128 + signum)


_active: Signals | None = None


@contextlib.contextmanager
def handled(limit: float | None = None) -> Iterator[Signals]:
    """Raise Stopped in a block at the first signal; a later one ends the process at once.

    A block within it shares its handlers. In other threads than the main one: nothing.

    limit: seconds after which a process is ended that has not left the block, since its main thread waits in compiled
        code for another process; None if what it tidies up may take its time.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Signals()
        return
    _active = Signals(limit)
    _active._open()
    try:
        yield _active
    finally:
        _active._close()
        _active = None


@contextlib.contextmanager
def noted(on_signal: Callable[[int, bool], None] | None = None) -> Iterator[Signals]:
    """Only note the first signal in a block, as `signum`; a later one ends the process at once.

    on_signal: called instead, by another thread, with each signal and whether it is a later one.
    """

    def end_if_later(signum: int, later: bool) -> None:
        if later:
            os._exit(128 + signum)

    with handled() as signals:
        before, signals.on_signal = signals.on_signal, on_signal or end_if_later
        try:
            yield signals
        finally:
            signals.on_signal = before


def stopped() -> Stopped | None:
    """Return what the first signal in a block has raised, for libraries that turn it into something else."""
    return None if _active is None or _active.signum is None else Stopped(_active.signum)


def heed(*signums: int) -> None:
    """Let signals that were ignored at the start end the program after all."""
    for signum in signums:
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)


def ignore() -> None:
    """Ignore all of these signals, as loading processes do: training still needs them for its last step."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def end_at_once(signum: int, frame: Any) -> None:
    """A handler for the time before anything is worth tidying up."""
    os._exit(128 + signum)
