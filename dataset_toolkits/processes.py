"""Calls of a function in worker processes, none of which outlives the program."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

from trellis.utils import signals

SIGNAL_SECONDS = 0.2  # between looks for a signal
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, done: Callable[[Result], None]
) -> None:
    """Call a function for each item, and done(result) here as soon as a call has ended.

    function: pickled, as items and results are.
    items: taken as workers get free, with one more for each worker in advance.
    workers: 1: this process does the work.
    Raise what a call raises, Stopped after a signal, BrokenProcessPool if a process was killed.
    """
    if workers == 1:
        for item in items:
            done(function(item))
        return
    others = set(multiprocessing.active_children())
    # A signal is looked for between calls of the pool: an exception within them could leave its locks taken.
    with signals.noted() as handled, _pool(workers) as pool:
        try:
            running: set[Future] = set()
            for item in items:
                with _signals_blocked():
                    running.add(pool.submit(function, item))
                while len(running) > workers:
                    running = _take(running, done, handled)
            while running:
                running = _take(running, done, handled)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
                process.join()
            raise


def _take(running: set[Future], done: Callable, handled: signals.Signals) -> set[Future]:
    """Give out what has ended, and return the rest. Raise Stopped after a signal."""
    ended, running = wait(running, timeout=SIGNAL_SECONDS, return_when=FIRST_COMPLETED)
    for future in ended:
        done(future.result())
    if handled.signum is not None:
        raise signals.Stopped(handled.signum)
    return running


def _pool(workers: int) -> ProcessPoolExecutor:
    with _signals_blocked():
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep signals to a whole group of processes, such as Ctrl-C, from processes that start in the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """Let a worker end with its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
