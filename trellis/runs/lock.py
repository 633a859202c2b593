"""One writer per run folder.

The writer of a folder holds its file `lock`, which says who it is: machine, process, job, command and since when. A
thread of the holder touches the file every 10 s. Locks of the operating system (flock, fcntl) are not used: network
drives may lack them or keep them to one machine. What is relied on is atomic on NFS and Lustre too: a hard link fails
if the name is taken, and a rename replaces.

- A second start on the holder's machine is refused, if the process that the file names still runs. If it does not, the
  lock is taken over at once.
- From another machine (or another container) a start waits for the file to be touched, and is then refused. If it was
  not for 120 s, by the clock of the file server, the holder is dead and the lock is taken over.
  A job that Slurm has started again takes over at once: the scheduler has ended the first start.
- A holder that was suspended so long that it lost its lock finds out before it writes, and stops.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from ..utils.errors import ConfigError
from ..utils.files import is_running
from ..utils.inputs import obstacle
from ..utils.units import duration

LOCK = "lock"
BEAT = 10.0  # seconds between touches
DEAD_AFTER = 120.0  # seconds without a touch


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says."""

    token: str  # of this lock; no other has the same
    host: str
    boot: str  # the machine since it was started, and the container; "" if unknown
    pid: int
    started: str  # when the process began, in the machine's own unit; "" if unknown
    job: str  # of Slurm; "" without
    restart: int  # how often Slurm has started the job again
    command: str
    since: str  # local time

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=_restarts(),
            command=" ".join(sys.argv),
            since=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        if not self.token:
            return "somebody (the lock does not say who)"
        return f"process {self.pid} on {self.host} ({self.command})"

    def for_how_long(self) -> str:
        """Return for how long the lock has been held, in words."""
        try:
            seconds = (datetime.now().astimezone() - datetime.fromisoformat(self.since)).total_seconds()
        except (ValueError, TypeError):
            return "since nobody knows when"
        return f"for {duration(seconds)} (since {self.since})"

    def is_here(self) -> bool:
        """Return whether the process numbers of this machine are those of the holder's."""
        return self.boot == _boot() if self.boot else self.host == socket.gethostname()

    def is_dead(self) -> bool | None:
        """Return whether the holder has ended; None if that cannot be seen from here."""
        if self.is_here():
            return not is_running(self.pid) or self.started != _started(self.pid)
        again = self.job and self.job == os.environ.get("SLURM_JOB_ID") and _restarts() > self.restart
        return True if again else None


class RunLock:
    """The lock of a run folder, held from `acquire` to `release`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self.holder = Holder.this_process()
        self._made_folder = False
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from a dead holder too. Raise ConfigError at once if another process holds it.

        Only if the holder is on another machine does it take time to see whether it lives: 10 to 120 s.
        """
        try:
            self._made_folder = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._require_file()
            while not self._create(self.path):
                self._take_over()
                if read_holder(self.folder) == self.holder:
                    break
                time.sleep(0.01)
        except OSError as error:
            raise ConfigError(f"--output_dir {self.folder} cannot be written ({error.strerror})") from error
        self._remove_leftovers()
        self._file = os.open(self.path, os.O_RDONLY)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        _held[self.folder.resolve()] = self

    def check(self) -> None:
        """Raise ConfigError if another process has taken the lock over."""
        other = read_holder(self.folder)
        if other != self.holder:
            by = f"by {other}, " if other else ""
            raise ConfigError(
                f"the lock of {self.folder} was taken over {by}while this process was suspended or cut off; it stops "
                f"here and leaves the folder as it is"
            )

    def release(self) -> None:
        """Give the lock back, unless another process has it by now."""
        self._stop.set()
        _held.pop(self.folder.resolve(), None)
        os.close(self._file)
        # On a disk that has become read-only the lock stays; it names a process that has ended, so it stops nobody.
        with suppress(OSError):
            if read_holder(self.folder) == self.holder:
                self.path.unlink(missing_ok=True)
            if self._made_folder:  # a start that failed before it wrote anything leaves nothing
                self.folder.rmdir()

    def _require_file(self) -> None:
        """Raise ConfigError if something else than a file has the lock's name: it could not be taken over."""
        reason = obstacle(self.path) if os.path.lexists(self.path) else None
        if reason is not None and os.path.lexists(self.path):  # it may have been given back since
            raise ConfigError(f"--output_dir {self.folder}: {self.path} {reason}; remove it")

    def _remove_leftovers(self) -> None:
        """Remove what starts have left that were killed while they tried to get the lock."""
        for path in self.folder.glob(f".{LOCK}[._]*"):
            with suppress(FileNotFoundError):
                other = _read(path)
                old = _modified(self.path) - _modified(path) > DEAD_AFTER
                if other is not None and (other.is_dead() or old):
                    path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            # Of the open file: a lock that another process has made meanwhile is not touched. A server that cannot be
            # reached is tried again; whoever takes the lock over meanwhile is found by `check`.
            with suppress(OSError):
                os.utime(self._file)

    def _create(self, path: Path) -> bool:
        """Make a file that names this process. Return whether it is new; else it was there and is left as it is."""
        partial = path.with_name(f".{path.name}.{self.holder.token}.tmp")
        try:
            with open(partial, "x", encoding="utf-8") as file:
                json.dump(asdict(self.holder), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, path)
                return True
            except FileExistsError:
                # NFS answers so if its first answer was lost.
                return os.stat(partial).st_nlink > 1
            except OSError:  # no hard links here
                try:
                    with open(path, "x", encoding="utf-8") as file:
                        file.write(partial.read_text(encoding="utf-8"))
                    return True
                except FileExistsError:
                    return False
        finally:
            partial.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Replace the lock of a dead holder by this process's. Raise ConfigError if the holder lives.

        Of several that want to, the one that makes the file named after the dead lock may; that file then becomes the
        lock, so there is one at every moment.
        """
        old = self._find_dead(self.path)
        if old is None:
            return  # it was given back
        heir = self.folder / f".{LOCK}_after_{old.token or 'unknown'}"
        if not self._create(heir):
            if self._find_dead(heir) is not None:  # killed between two lines of this function
                heir.unlink(missing_ok=True)
        elif _read(self.path) != old:  # another was faster, and is done
            heir.unlink(missing_ok=True)
        else:
            with suppress(FileNotFoundError):  # taken for dead by another, which `acquire` then finds
                os.replace(heir, self.path)
                print(f"{self.folder}: took over the lock of {old}, which has ended", flush=True)

    def _find_dead(self, path: Path) -> Holder | None:
        """Return who made a lock file, if it has ended; None if there is no file. Raise ConfigError if it lives."""
        holder = _read(path)
        if holder is None:
            return None
        dead = holder.is_dead()
        if dead is None:
            dead = self._stands_still(path, holder)
        if not dead:
            raise ConfigError(
                f"--output_dir {self.folder} is written by {holder}, {holder.for_how_long()}. Wait for its end, stop "
                f"it, or choose another --output_dir (its lock is {path})"
            )
        return holder

    def _stands_still(self, path: Path, holder: Holder) -> bool:
        """Wait until a lock file is touched, and return False, or has not been for DEAD_AFTER, and return True."""
        print(
            f"{self.folder} is locked by {holder}, {holder.for_how_long()}, which cannot be seen from here; waiting "
            f"for a sign of life ({BEAT:g} s), at most {DEAD_AFTER:g} s",
            flush=True,
        )
        try:
            first = _modified(path)
            age, begun = self._server_time() - first, time.monotonic()
            while age + time.monotonic() - begun < DEAD_AFTER:
                time.sleep(min(1.0, BEAT / 4))
                if _modified(path) != first:
                    return False
        except FileNotFoundError:  # given back, or taken over: the caller looks again
            pass
        return True

    def _server_time(self) -> float:
        """Return the time by the clock of the disk or file server, in s. Clocks of machines may differ by minutes."""
        probe = self.folder / f".{LOCK}.{self.holder.token}.tmp"
        try:
            with open(probe, "x") as file:
                return os.fstat(file.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)


_held: dict[Path, RunLock] = {}  # the locks of this process


@contextmanager
def writing(folder: str | Path, looking: bool = False) -> Iterator[None]:
    """Hold the lock of a run folder in a block. Raise ConfigError if another process holds it.

    looking: nothing will be written, so a holder is only noted.
    """
    if looking:
        holder = read_holder(folder)
        if holder is not None and not holder.is_dead():
            print(f"note: {folder} is locked by {holder}, {holder.for_how_long()}", flush=True)
        yield
        return
    lock = RunLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def may_write(folder: Path) -> bool:
    """Return whether `require_lock` would let this process write in a run folder."""
    lock = _held.get(Path(folder).resolve())
    return lock is None or read_holder(folder) == lock.holder


def require_lock(folder: Path) -> None:
    """Raise ConfigError if this process has lost the lock of a run folder. Ask before each write.

    A process that never had the lock (a program that makes checkpoints without training) is not asked for it.
    """
    lock = _held.get(Path(folder).resolve())
    if lock is not None:
        lock.check()


def read_holder(folder: str | Path) -> Holder | None:
    """Return who holds the lock of a run folder, dead or alive; None if there is no lock."""
    return _read(Path(folder) / LOCK)


def _read(path: Path) -> Holder | None:
    """Return who made a lock file; None if there is none. What cannot be read is a holder without a token."""
    try:
        # Opened each time: what NFS remembers of a name is compared with the server then.
        found = json.loads(path.read_text(encoding="utf-8"))
        holder = Holder(**{name: kind(found[name]) for name, kind in _FIELDS.items()})
        if not holder.token.isalnum():  # becomes a part of a file name
            raise ValueError(holder.token)
        return holder
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Holder(**{name: kind() for name, kind in _FIELDS.items()})


_FIELDS: dict[str, type] = {field.name: int if field.name in ("pid", "restart") else str for field in fields(Holder)}


def _modified(path: Path) -> float:
    """Return when a file was changed, in s, as the file server says and not what NFS remembers."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime


def _boot() -> str:
    """Return what two processes have in common that see each other by their numbers; "" if the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began, in ticks after the machine's start; "" if the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _restarts() -> int:
    """Return how often Slurm has started this job again."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0
