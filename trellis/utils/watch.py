"""Ranks that watch each other, so that a dead or hung one ends all of them and each says where it stood.

A thread of every rank writes to the store where its main thread is, and reads where the others are. The job hangs if no
rank has moved for the time that its phase may take: ranks that wait for one that works do not move either.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import signals
from .errors import UserError
from .processes import RankFailedError
from .rendezvous import ENDED, describe

LOOK_EVERY = 1.0  # seconds
# A rank whose thread has not written for this time is gone, or its host is: compiled code that keeps Python's threads
# waiting takes less.
SILENT_SECONDS = 120.0
# Validation, k-means, reading data, downloads and checkpoints may take this many times as long as a training step.
LONG_PHASE = 6
# A rank that finds the same error as the others reports it itself within this time.
GRACE_SECONDS = 5.0
# How gloo says that another rank has gone.
LOST = ("Connection reset by peer", "Connection closed by peer", "Broken pipe")
STEP_FUNCTIONS = ("run_step", "batches", "stop_requested")
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass
class Seen:
    """What is known of a rank: its last report, and when it came, and when it last had moved."""

    report: dict[str, Any] | None
    came: float
    moved: float


class Watch:
    """A thread that watches the ranks of a job.

    store: this thread's own connection; a wait on another one would block it.
    minutes: how long a training step may take. Other phases may take LONG_PHASE times as long.
    step: returns the step that this rank has reached.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, minutes: float, *, speaks: bool):
        self.store, self.rank, self.world, self.minutes, self.speaks = store, rank, world, minutes, speaks
        self.step: Callable[[], int] = lambda: 0
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._seen: dict[int, Seen] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, before the ranks leave one by one."""
        self._stopped.set()
        self._thread.join()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Call `fail` with an error that ends the block. One block may lie in another."""
        try:
            yield
        except RankFailedError:  # the inner block has told
            raise
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Let every rank end because of this rank's error. Raise RankFailedError if another rank's end led to it."""
        where = f"rank {self.rank} on {socket.gethostname()}"
        if isinstance(error, signals.Stopped):
            reason, code = f"{where} was stopped by {signal.Signals(error.signum).name}", 128 + error.signum
        elif isinstance(error, UserError):
            reason, code = f"{where}: {error}", 1
        elif isinstance(error, RuntimeError) and (lost := [text for text in LOST if text in str(error)]):
            reason, code = f"{where} lost another rank at step {self.step()} ({lost[0]})", 1
            error = RankFailedError(reason)
        else:
            reason, code = f"{where} failed at step {self.step()}: {type(error).__name__}: {error}", 1
        first = self._end_all(reason, code)
        own = isinstance(error, (UserError, signals.Stopped))
        if isinstance(error, RankFailedError) or (first not in (None, reason) and not own):
            raise RankFailedError(first or reason) from None

    def _end_all(self, reason: str, code: int) -> str | None:
        """Let every rank end with this exit code. Return the first reason, or None if the store has gone."""
        try:
            ended = json.dumps({"reason": reason, "code": code})
            return json.loads(self.store.compare_set(ENDED, "", ended))["reason"]
        except dist.DistError:
            return None

    def _run(self) -> None:
        beat = 0
        try:
            while not self._stopped.wait(LOOK_EVERY):
                beat += 1
                self.store.set(f"where {self.rank}", json.dumps({**self.where(), "beat": beat}))
                if self.store.check([ENDED]):
                    self._end(json.loads(self.store.get(ENDED)))
                self._look()
        except dist.DistError as error:
            text = str(error).splitlines()[0]
            self._end({"reason": f"the host of the ranks' store does not answer any more ({text})", "code": 1})

    def _look(self) -> None:
        """Read where the ranks are, and end all if one is gone or none has moved for too long."""
        now, hanging = time.monotonic(), True
        for rank in range(self.world):
            report = None
            if self.store.check([f"where {rank}"]):
                report = json.loads(self.store.get(f"where {rank}"))
            seen = self._seen.setdefault(rank, Seen(report, now, now))
            if report is not None and report != seen.report:
                moved = seen.report is None or {**report, "beat": 0} != {**seen.report, "beat": 0}
                self._seen[rank] = seen = Seen(report, now, now if moved else seen.moved)
            if report is not None and now - seen.came > min(SILENT_SECONDS, 60 * self.minutes):
                silent = now - seen.came
                self._end_all(f"rank {rank} has been silent for {silent:.0f} s: {self.report()}", 1)
            long = report is None or report["long"]
            hanging &= now - seen.moved > 60 * self.minutes * (LONG_PHASE if long else 1)
        if hanging:
            self._end_all(f"the job hangs; no rank has moved for {60 * self.minutes:.0f} s: {self.report()}", 1)

    def report(self) -> str:
        """Return where each rank stands, as far as this one knows."""
        now = time.monotonic()
        return "; ".join(
            f"rank {rank}: {describe(seen.report)}, for {now - seen.moved:.0f} s"
            for rank, seen in sorted(self._seen.items())
        )

    def where(self) -> dict[str, Any]:
        """Return where this rank's main thread is."""
        frame, place, long = sys._current_frames().get(self._main or 0), "", True
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents:
                place = place or f"{frame.f_code.co_name} ({path.relative_to(PACKAGE)}:{frame.f_lineno})"
                long &= frame.f_code.co_name not in STEP_FUNCTIONS
            frame = frame.f_back
        return {"host": socket.gethostname(), "step": self.step(), "place": place, "long": long}

    def _end(self, ended: dict[str, Any]) -> None:
        if self._stopped.wait(GRACE_SECONDS):
            return
        if self.speaks:
            print(f"error: {ended['reason']}", file=sys.stderr, flush=True)
        os._exit(ended["code"])
