"""What a run is doing, in status.json of its folder, for programs and people that watch many runs.

`RunStatus` writes the file, `read_status` reads it, and `judge` says in words how a run stands, also one that died.
The file is replaced atomically, by a thread of its own, so that training waits for no disk:

    format              version of this file
    state               "starting", "training", "validating", "saving", "finished", "stopped" or "failed"
    doing               what takes long right now, such as "validation: 120 of 650 objects, 12 s so far"; else null
    reason              why it stopped ("SIGTERM") or failed (the first line of the error); else null
    step, max_steps     optimizer steps taken, and wanted
    eta_s               seconds to max_steps, by the pace of this start; null before its second step
    samples_per_second  of the steps since the last entry of the log
    loss                of the last logged step
    scores              {"step", name: score} of the last validation
    reference           {"step", "iou", "note"}: the configuration's reference curve there
    best                {"step", "by", "score"}
    checkpoint_step     last complete checkpoint
    health              lr, grad_norm, codebook_window_usage and bad_steps, as far as the run has them
    objects             {"train", "val"}, numbers of objects
    parameters          weights of all models
    host, pid, ranks, card, versions
    started             when this process began, in seconds since 1970
    progressed          last time that a step or a phase ended
    time                last time that the process wrote, at least every HEARTBEAT seconds
"""

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..utils.environment import versions
from ..utils.errors import DataError, UserError
from ..utils.files import atomic_write, is_running, remove_leftovers
from ..utils.formats import check_version
from ..utils.processes import RankFailedError
from ..utils.progress import Work, say, waiting
from ..utils.signals import Stopped
from ..utils.units import duration
from .lock import LOCK, Holder, may_write

FORMAT_VERSION = 1
FILE = "status.json"
STATES = ("starting", "training", "validating", "saving", "finished", "stopped", "failed")
ENDED = ("finished", "stopped", "failed")
Life = Literal["ended", "alive", "silent", "died"]
HEARTBEAT = 20.0  # seconds between writes if nothing changes
PAUSE = 1.0  # seconds between writes at least
# Seconds without a heartbeat after which a run on another machine counts as dead: clocks differ, file servers cache.
DEAD_AFTER = 150.0
# What still holds for a run that a start has not moved on.
LASTING = (
    "step", "max_steps", "samples_per_second", "loss", "scores", "reference", "best", "checkpoint_step", "health",
    "objects", "parameters",
)  # fmt: skip
# Seconds without a step or a new phase after which a live run is said to make no progress.
STUCK_AFTER = 900.0


# --- writing ---------------------------------------------------------------------------------------------


class RunStatus:
    """The status of one run, kept in its folder while the block runs.

    folder: the run folder, made if need be; None keeps no file.
    shown: whether `doing` is shown on the terminal.
    An error that leaves the block makes the state "failed", a signal "stopped". A run that was finished stays so if a
    start fails before it has begun, and what was known of a run stays known after a start that takes no step.
    """

    def __init__(self, folder: str | Path | None, *, shown: bool = True):
        self.folder, self.shown = None if folder is None else Path(folder), shown
        now = time.time()
        self.values: dict[str, Any] = {
            "format": FORMAT_VERSION, "state": "starting", "doing": None, "reason": None, "step": None,
            "max_steps": None, "eta_s": None, "samples_per_second": None, "loss": None, "scores": None,
            "reference": None, "best": None, "checkpoint_step": None, "health": {}, "objects": None,
            "parameters": None, "host": socket.gethostname(), "pid": os.getpid(), "ranks": 1, "card": None,
            "versions": versions(), "started": now, "progressed": now, "time": now,
        }  # fmt: skip
        self._first: tuple[int, float] | None = None  # the first step of this process, and when it ended
        self._works: list[Work] = []
        self._done = 0  # of the innermost work, at the last write
        self._changed = threading.Condition()
        self._dirty = self._closed = False
        self._thread: threading.Thread | None = None
        self._told = False
        self._before: dict[str, Any] | None = None  # the status that an earlier start has left

    def __enter__(self) -> "RunStatus":
        if self.folder is not None:
            with contextlib.suppress(DataError, OSError):  # it is replaced, also if it is damaged
                self._before = read_status(self.folder)
            self._write()
            if self.folder.is_dir():
                remove_leftovers(self.folder)
            self._thread = threading.Thread(target=self._keep, name="status", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            state, reason = ending(error)
            self.set(state=state, reason=reason, eta_s=None)
        self._take_over()
        if self._thread is not None:
            with self._changed:
                self._closed = True
                self._changed.notify()
            self._thread.join()
            self._write()
            if error is not None:
                self._remove_if_alone()

    def _take_over(self) -> None:
        """Keep what the status before says, unless steps were taken since."""
        before = self._before
        if before is None or self.values["step"] not in (None, before["step"]):
            return
        if self.values["step"] is None and before["state"] == "finished":
            self.values = {**before, "doing": None}
            self._works.clear()
        else:
            self.set(**{key: before.get(key) for key in LASTING if not self.values[key]})

    def _remove_if_alone(self) -> None:
        """Remove the file if the folder has nothing else but the lock: a start that failed leaves no folder."""
        assert self.folder is not None
        with contextlib.suppress(OSError):  # what cannot be removed may stay
            if may_write(self.folder) and {path.name for path in self.folder.iterdir()} <= {FILE, LOCK}:
                (self.folder / FILE).unlink()

    def set(self, **values: Any) -> None:
        """Change values; they are in the file within about a second."""
        assert values.keys() <= self.values.keys(), values
        with self._changed:
            self.values.update(values, progressed=time.time())
            self._dirty = True
            self._changed.notify()

    def at_step(self, step: int) -> None:
        """Note that a step has ended. It costs next to nothing, and waits for the next write."""
        now = time.time()
        if self._first is None:
            self._first = (step, now)  # its time is left out: kernels are compiled in it
        elif self.values["max_steps"] is not None:
            first, since = self._first
            self.values["eta_s"] = (now - since) / (step - first) * (self.values["max_steps"] - step)
        self.values["step"], self.values["progressed"] = step, now

    @contextlib.contextmanager
    def doing(
        self, what: str, total: int | None = None, unit: str = "object", *, state: str | None = None
    ) -> Iterator[Work]:
        """Say on the terminal and in the file that something long goes on while the block runs, as `waiting` does.

        state: the run's while the block runs; None leaves it.
        """
        before = self.values["state"]
        with waiting(what, total, unit, self.shown) as work:
            with self._changed:
                self._works.append(work)
            self.set(state=state or before)
            yield work  # after an error it stays on the list: the status then says what was being done
            with self._changed:
                self._works.remove(work)
            self.set(state=before)

    def _keep(self) -> None:
        """Write the file after changes, and every HEARTBEAT seconds, until the status is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closed, HEARTBEAT)
                if self._closed:
                    return
                self._dirty = False
            self._write()
            with self._changed:
                self._changed.wait_for(lambda: self._closed, PAUSE)

    def _write(self) -> None:
        assert self.folder is not None
        if not may_write(self.folder):  # another process has the folder now
            return
        with self._changed:
            values = {**self.values, "time": time.time()}
            if self._works:
                values["doing"] = self._works[-1].line()
                if self._works[-1].done != self._done:
                    self._done = self._works[-1].done
                    values["progressed"] = self.values["progressed"] = values["time"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / FILE) as partial:
                partial.write_text(json.dumps(json_numbers(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            self._told = False
        except OSError as error:  # a full disk ends training only where something is lost
            if not self._told:
                say(f"{self.folder / FILE} cannot be written ({error.strerror or error}); the run goes on without it")
            self._told = True


def ending(error: BaseException) -> tuple[str, str]:
    """Return state and reason of a run that an exception ends."""
    if isinstance(error, Stopped):
        return "stopped", signal_name(error.signum)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", signal.SIGINT.name
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return "stopped", signal_name(error.code - 128)
    first = (str(error).strip().splitlines() or [""])[0]
    for_people = isinstance(error, (UserError, RankFailedError)) and first
    return "failed", first if for_people else f"{type(error).__name__}: {first}".strip(": ")


def signal_name(number: int) -> str:
    """Return "SIGTERM" for 15, and "signal 99" for a number that is none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def json_numbers(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: json_numbers(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- reading ---------------------------------------------------------------------------------------------


def read_status(folder: str | Path) -> dict[str, Any] | None:
    """Return a run's status, None if it has none. Raise DataError for a damaged or newer one."""
    path = Path(folder) / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); a run that goes on writes it anew") from error
    try:
        status = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); a run that goes on writes it anew") from error
    if not isinstance(status, dict):
        raise DataError(f"{path} is damaged (it holds no JSON object); a run that goes on writes it anew")
    check_version(status.get("format"), FORMAT_VERSION, path, DataError)
    for key, kinds in KINDS.items():
        if not isinstance(status.get(key), kinds) or isinstance(status.get(key), bool):
            raise DataError(f"{path} is damaged ({key} is {status.get(key)!r}); a run that goes on writes it anew")
    if status["state"] not in STATES:
        raise DataError(f"{path} is damaged (state is {status['state']!r}); a run that goes on writes it anew")
    return status


_NUMBER = (int, float)
_OR_NONE = (int, float, type(None))
# Types of what readers calculate with.
KINDS: dict[str, tuple[type, ...]] = {
    "state": (str,), "doing": (str, type(None)), "reason": (str, type(None)), "step": _OR_NONE, "max_steps": _OR_NONE,
    "eta_s": _OR_NONE, "samples_per_second": _OR_NONE, "loss": _OR_NONE, "scores": (dict, type(None)),
    "reference": (dict, type(None)), "best": (dict, type(None)), "checkpoint_step": _OR_NONE, "health": (dict,),
    "objects": (dict, type(None)), "parameters": _OR_NONE, "host": (str,), "pid": (int,), "card": (str, type(None)),
    "started": _NUMBER, "progressed": _NUMBER, "time": _NUMBER,
}  # fmt: skip


def life(status: dict[str, Any], now: float, lock: Holder | None = None) -> Life:
    """Return whether the process that wrote a status lives.

    lock: who holds the run folder, which tells containers of one machine and processes of one number apart.
    "ended": it said so. "died": it is gone without a word, which is known at once on its own machine, and assumed on
    another after DEAD_AFTER seconds without a heartbeat. "silent": a process of its number runs here, but writes no
    more, since it is suspended, its disk is full, or the number now belongs to another program.
    """
    if status["state"] in ENDED:
        return "ended"
    if lock is not None and (lock.host, lock.pid) == (status["host"], status["pid"]):
        gone = lock.is_dead()
    else:
        gone = not is_running(status["pid"]) if status["host"] == socket.gethostname() else None
    if gone:
        return "died"
    if now - status["time"] > DEAD_AFTER:
        return "died" if gone is None else "silent"
    return "alive"


def judge(status: dict[str, Any], now: float, lock: Holder | None = None) -> str:
    """Return how a run stands, in words: its state, or that it died or makes no progress. lock: as for `life`."""
    state, found = status["state"], life(status, now, lock)
    silent = f"nothing written for {duration(now - status['time'])}"
    where = f"process {status['pid']} on {status['host']}"
    if found == "died":
        doing = status["doing"] or state
        return f"died ({doing}): {silent} by {where}; the same command continues"
    if found == "silent":
        return f"silent: {silent}; {where} is suspended or cannot write, or has died"
    if state == "stopped":
        return f"stopped by {status['reason']}; the same command continues"
    if state == "failed":
        return f"failed: {status['reason']}"
    words = f"{state}: {status['doing']}" if status["doing"] else state
    if state not in ENDED and now - status["progressed"] > STUCK_AFTER:
        words += f"; no progress for {duration(now - status['progressed'])}"
    return words
