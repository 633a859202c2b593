"""The processes of one node: started, signaled and ended together."""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from . import signals
from .errors import UserError

# A process that has failed tends to take the others along, by the same error or a broken connection.
GRACE_SECONDS = 3.0
# A process that is to end, but whose main thread waits for another rank in compiled code, is ended after this time.
UNWIND_SECONDS = 3.0
STOP_CODES = tuple(128 + signum for signum in signals.STOPPING)


class RankFailedError(Exception):
    """The end of a rank for another reason than the user's; the rank has printed its traceback."""


def run_all(target: Callable[[int], int], number: int) -> int:
    """Run `target(i)`, which returns an exit code, in a new process for each i < number, and wait for them.

    A signal is passed on to them; a later one kills them. If one fails, the others are ended.
    Return 0, or the code of processes that were stopped by a signal.
    Raise UserError or OSError if a process ended by it, RankFailedError if one failed otherwise.
    """
    context = multiprocessing.get_context("spawn")
    _start_tracker()
    errors = context.SimpleQueue()
    processes: list[SpawnProcess] = []

    def pass_on(signum: int, later: bool) -> None:
        for process in list(processes):
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL if later else signum)

    with signals.noted(pass_on) as handled:
        try:
            for i in range(number):
                process = context.Process(target=_run, args=(target, i, errors), name=f"rank {i}")
                process.start()
                processes.append(process)
                if handled.signum:
                    break
            _wait(processes)
        finally:
            ended = {i for i, process in enumerate(processes) if process.exitcode is None}
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        codes = [process.exitcode or 0 for process in processes]
        if not any(codes) and len(codes) == number:
            return 0
        if handled.signum:
            return 128 + handled.signum
    killed = [f"process {i} {_how(code)}" for i, code in enumerate(codes) if code < 0 and i not in ended]
    if killed:
        raise RankFailedError("; ".join(killed))
    if not errors.empty():  # ranks tend to find the same error, so one of them is enough
        raise errors.get()
    stopped = [code for code in codes if code in STOP_CODES]
    if stopped:
        return stopped[0]
    raise RankFailedError(
        "; ".join(f"process {i} {_how(code)}" for i, code in enumerate(codes) if code and i not in ended)
    )


def _start_tracker() -> None:
    """Start the process in which Python notes the semaphores of all the others, with signals blocked.

    A closed terminal and some schedulers signal the whole group. Python lets this process ignore SIGINT and SIGTERM
    alone; if another signal ends it, the next one prints a traceback about each semaphore that it does not know.
    """
    if hasattr(signal, "pthread_sigmask"):  # Windows lacks both
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
        try:
            resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(processes: Sequence[SpawnProcess]) -> None:
    """Wait until all have ended, or for a moment after one has failed."""
    deadline = None
    while running := [process for process in processes if process.exitcode is None]:
        wait([process.sentinel for process in running], timeout=0.5)
        # One that was stopped by a signal has saved; the others may be saving still.
        failed = [p for p in processes if p.exitcode not in (None, 0, *STOP_CODES)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    memory = "; memory may have run out" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def _run(target: Callable[[int], int], number: int, errors) -> None:
    """Run in a new process, which ends when its parent does."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with signals.handled(UNWIND_SECONDS):
        try:
            code = target(number)
        except signals.Stopped as stopped:
            code = 128 + stopped.signum
        except (UserError, OSError, RankFailedError) as error:
            errors.put(error)
            code = 1
        except Exception as error:
            traceback.print_exc()
            errors.put(RankFailedError(f"process {number}: {type(error).__name__}: {error}"))
            code = 1
        if code:
            end(code)


def end(code: int) -> None:
    """End this process without waiting for what a failed group of ranks leaves behind: threads and communicators."""
    timer = threading.Timer(UNWIND_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    try:
        atexit._run_exitfuncs()  # loading processes, semaphores
        for stream in (sys.stdout, sys.stderr):
            print(end="", file=stream, flush=True)
    finally:  # also where nobody reads the output any more
        os._exit(code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
