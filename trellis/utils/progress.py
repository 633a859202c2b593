"""Long work that shows how far it is: a bar on a terminal; elsewhere a line after ten seconds of silence.

One thread shows the innermost of the works under way, so that also work which reports nothing (a compiler, a slow disk)
is seen to go on.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

SILENCE = 10.0  # seconds without a line after which one is printed
REFRESH = 1.0  # seconds between updates of a bar
PAUSE = 1.0  # seconds between two works that make them one silence


class Work:
    """Something that takes long. Call it with the number of units that are done.

    what: it in words, such as "validation".
    total: number of units; None if it has none to count.
    unit: one of them, such as "object".
    done: units that are done already.
    text: returns the line to print in place of the usual one.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "object",
        *,
        done: int = 0,
        text: Callable[[], str] | None = None,
    ):
        self.what, self.total, self.unit, self.done, self.text = what, total, unit, done, text
        self.started = time.monotonic()
        self.bar: tqdm | None = None

    def __call__(self, done: int) -> None:
        self.done = done

    def line(self) -> str:
        """Return where the work stands, in one line."""
        if self.text is not None:
            return self.text()
        count = "" if self.total is None else f"{self.done} of {self.total} {self.unit}s, "
        return f"{self.what}: {count}{time.monotonic() - self.started:.0f} s so far"


class _Display:
    """The works under way in this process, and the thread that shows the innermost."""

    def __init__(self) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.works: list[Work] = []
        self.spoke = time.monotonic()
        self.idle_since = -math.inf  # when the last work ended
        self.thread: threading.Thread | None = None

    def push(self, work: Work) -> None:
        with self.condition:
            # What came before may have spoken by other means; right after a work only `say` speaks.
            if not self.works and time.monotonic() - self.idle_since > PAUSE:
                self.spoke = time.monotonic()
            self.works.append(work)
            if sys.stderr is not None and sys.stderr.isatty():
                work.bar = _bar(work, leave=len(self.works) == 1 and work.text is not None)
            if self.thread is None:
                self.thread = threading.Thread(target=self._show, name="progress", daemon=True)
                self.thread.start()
            self.condition.notify()

    def pop(self, work: Work) -> None:
        with self.condition:
            self.works.remove(work)
            self.idle_since = time.monotonic()
            if work.bar is not None:
                _update(work)
                work.bar.close()
                work.bar = None
            self.condition.notify()

    def say(self, text: str) -> None:
        with self.condition:
            self.spoke = time.monotonic()
            if any(work.bar is not None for work in self.works):
                from tqdm import tqdm

                tqdm.write(text)
            else:
                print(text, flush=True)

    def _show(self) -> None:
        with self.condition:
            while self.works:
                work = self.works[-1]
                if work.bar is not None:
                    _update(work)
                    self.condition.wait(REFRESH)
                    continue
                left = self.spoke + SILENCE - time.monotonic()
                if left > 0:
                    self.condition.wait(left)
                    continue
                self.say(work.line())
            self.thread = None


def _bar(work: Work, leave: bool) -> "tqdm":
    from tqdm import tqdm

    plain = "{desc}: {elapsed}" if work.total is None else None
    return tqdm(
        desc=work.what, total=work.total, initial=work.done, unit=work.unit, leave=leave, bar_format=plain,
        dynamic_ncols=True,
    )  # fmt: skip


def _update(work: Work) -> None:
    assert work.bar is not None
    work.bar.n = work.done
    work.bar.refresh()


_display = _Display()


@contextlib.contextmanager
def show(work: Work) -> Iterator[Work]:
    """Show a work while the block runs."""
    _display.push(work)
    try:
        yield work
    finally:
        _display.pop(work)


@contextlib.contextmanager
def waiting(what: str, total: int | None = None, unit: str = "object", shown: bool = True) -> Iterator[Work]:
    """Show that something long goes on while the block runs; yield the `Work`, to be called with the number done.

    what, total, unit: as for `Work`.
    shown: False shows nothing, such as on ranks other than the first.
    """
    work = Work(what, total, unit)
    with show(work) if shown else contextlib.nullcontext():
        yield work


def say(text: str) -> None:
    """Print a line, above the bars if there are any."""
    _display.say(text)
