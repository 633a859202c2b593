"""Runs that are killed or whose disk fails, and what is lost by it.

    python benchmarks/faults.py --kills 100       # inside calls to the file system, and at random moments
    python benchmarks/faults.py --steps 20000     # memory, open files, threads and log of a long run

Each trial starts a tiny run by train.py's own `main` in a copy (fork) of this process. A first start is killed at one
of its calls to the file system (open, in the middle of a write, fsync, rename, link, unlink, mkdir), a second one at a
random moment, and a third one ends. In every fifth trial the disk fails first: it is full, read-only, over quota, or
broken. A reader opens the run all the time, with all its weights. CPU only: there final weights are equal to the last
bit. The exit code is 1 if any run, reader or message was not as it must be.
"""

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import torch.utils.tensorboard  # before the fork: it takes longer than a run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from benchmarks import common
from benchmarks.report import Column, Report, Table
from trellis.runs import open_run
from trellis.runs.checkpoint import Checkpoints
from trellis.runs.sums import SumWriter
from trellis.trainers import SparseStructureVaeTrainer
from trellis.trainers.basic import BasicTrainer
from trellis.utils.errors import CheckpointError

DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
STEPS, I_SAVE = 8, 2
_FORK = multiprocessing.get_context("fork" if os.name == "posix" else None)


# --- a tiny run ------------------------------------------------------------------------------------------


def tiny_config(**trainer: object) -> dict:
    """Return the configuration of a KL run at 16³ that takes milliseconds a step."""
    models = common.tiny_models()
    del models["quantizer"]
    args = {"max_steps": STEPS, "batch_size": 2, "optimizer": {"name": "AdamW", "args": {"lr": 1e-3}}, "grad_clip": 1.0}
    args |= {"i_save": I_SAVE, "keep_last": 2, "i_log": 2, "i_print": 1000, "i_eval": 4, "i_sample": 1000}
    return {
        "models": models,
        "dataset": {"name": "SparseStructure", "args": {"resolution": 16}},
        "trainer": {"name": "SparseStructureVaeTrainer", "args": {**args, "num_workers": 0, **trainer}},
    }


def make_data(folder: Path) -> str:
    """Write 24 grids as a packed file, 4 of them for validation, and return its path."""
    path = folder / "shells.npz"
    bits = np.packbits(common.make_grids(24, 16).reshape(24, -1), axis=1)
    np.savez(path, bits=bits, split=np.array(["train"] * 20 + ["val"] * 4))
    return str(path)


def command(config: Path, data_dir: str, folder: Path) -> list[str]:
    """Return train.py's arguments."""
    flags = ["--config", str(config), "--data_dir", data_dir, "--output_dir", str(folder)]
    return [*flags, "--device", "cpu", "--auto_retry", "0"]


def forked(function: Callable, *args: object) -> BaseProcess:
    """Start a function in a copy of this process. What it returns is the exit code."""
    process = _FORK.Process(target=lambda: sys.exit(function(*args)))
    process.start()
    return process


# --- faults ----------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What happens at one of a run's calls to the file system.

    call: "open", "write", "fsync", "replace", "rename", "link", "unlink" or "mkdir"; "" for none.
    place: which one of these calls, from 1, over all threads of the run.
    number: of the error that this and all later calls that write raise; None kills the process.
    """

    call: str
    place: int
    number: int | None = None

    def __post_init__(self) -> None:
        self.counts, self.failed = Counter[str](), False

    def at(self, call: str, path: object = None) -> bool:
        """Count a call. Return whether the process dies at it; raise OSError if it fails, which names a path alone."""
        self.counts[call] += 1
        here = call == self.call and self.counts[call] == self.place
        if self.number is None:
            return here
        self.failed |= here
        # A full disk lets files be removed.
        if self.failed and (call != "unlink" or self.number in (errno.EROFS, errno.EIO)):
            raise OSError(self.number, os.strerror(self.number), path if isinstance(path, (str, os.PathLike)) else None)
        return False


@contextlib.contextmanager
def failing(folder: Path, fault: Fault) -> Iterator[None]:
    """Let a fault happen in a block, at the calls that change something below a folder."""
    root = str(folder.resolve())
    originals = {(module, name): getattr(module, name) for module, name in _CALLS}
    write = SumWriter.write

    def inside(path: object) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root)

    def wrapped(name: str, original: Callable) -> Callable:
        def call(path: object, *args: object, **kwargs: object) -> object:
            writes = name != "open" or any(letter in str(kwargs.get("mode", args[:1])) for letter in "wax+")
            if writes and inside(path) and fault.at(name, path):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *args, **kwargs)

        return call

    def half_written(self: SumWriter, data: bytes) -> int:
        if fault.at("write"):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    def write_or_fail(self: SumWriter, data: bytes) -> int:
        try:
            return half_written(self, data)
        except OSError as error:
            self.error = self.error or error
            raise

    for (module, name), original in originals.items():
        setattr(module, name, wrapped(name, original))
    SumWriter.write = write_or_fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (module, name), original in originals.items():
            setattr(module, name, original)
        SumWriter.write = write  # type: ignore[method-assign]


_CALLS = (
    (builtins, "open"),
    (io, "open"),
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "link"),
    (os, "unlink"),
    (os, "mkdir"),
)


def start(flags: list[str], folder: Path, fault: Fault | None, reached, output: Path) -> int:
    """Run train.py with a fault, its output in a file. Return the exit code. reached: shared, the last step taken."""
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    run_step = BasicTrainer.run_step

    def counting(self, batch):
        result = run_step(self, batch)
        reached.value = self.step + 1
        return result

    BasicTrainer.run_step = counting  # type: ignore[method-assign]
    SparseStructureVaeTrainer.run_snapshot = lambda self: {}  # type: ignore[method-assign]  # takes longer than all else
    try:
        with failing(folder, fault) if fault is not None else contextlib.nullcontext():
            return train.main(flags)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def warm(flags: list[str]) -> None:
    """Take one step in this process: what is imported and compiled for it need not be again in its copies."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        again = [*flags, "--output_dir", name, "--set", "trainer.args.max_steps=1"]
        if train.main(again):
            raise RuntimeError(f"train.py {' '.join(again)} failed")


def count_calls(flags: list[str], folder: Path, output: Path) -> dict[str, int]:
    """Run to the end. Return how many calls of each kind a fault can happen at."""
    counts = _FORK.SimpleQueue()

    def counted() -> int:
        fault = Fault("", 0)
        code = start(flags, folder, fault, _FORK.Value("i", 0), output)
        counts.put(dict(fault.counts))
        return code

    process = forked(counted)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the undisturbed run failed:\n{output.read_text()}")
    return counts.get()


# --- what must hold --------------------------------------------------------------------------------------


def state(folder: Path, step: int) -> dict:
    """Return all that a checkpoint holds, except for time spent and versions."""
    checkpoints = Checkpoints(folder)
    checkpoints.verify(step)
    misc = checkpoints.read_misc(step, mmap=False)
    assert misc is not None
    files = {name: torch.load(checkpoints.folder / name, weights_only=True) for name in misc["files"]}
    return files | {key: value for key, value in misc.items() if key not in ("seconds", "files", "sums", "versions")}


def equal(a: object, b: object) -> bool:
    """Return whether two trees are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)  # NaN is NaN


def read_until(stop, folder: Path, counts) -> int:
    """Open a run and read all its weights, again and again. counts: [opened, none yet, removed meanwhile].

    Return 1 at the first set that is not whole, with a line that says why.
    """
    warnings.simplefilter("error")  # a set that is passed over has a misc file and is not whole
    while not stop.is_set():
        if not Checkpoints(folder).steps():
            counts[1] += 1
            time.sleep(0.005)
            continue
        run = None
        try:
            run = open_run(folder)
            files = {path for weights in run.weight_sets().values() for path in weights.values()}
            tensors = [value for path in files for value in torch.load(path, weights_only=True).values()]
            if len(files) != 4 or not all(value.isfinite().all() for value in tensors):
                raise CheckpointError(f"step {run.step} is not whole: {sorted(map(str, files))}")
            counts[0] += 1
            time.sleep(0.005)
        except (CheckpointError, FileNotFoundError) as error:
            if run is not None and run.step not in Checkpoints(folder).steps():
                counts[2] += 1  # keep_last removed it while it was read
            else:
                print(f"a reader: {type(error).__name__}: {error}", flush=True)
                return 1
        except UserWarning as warning:
            print(f"a reader: {warning}", flush=True)
            return 1
    return 0


@dataclass
class Outcome:
    """What came of a start that a fault ended."""

    exit_code: int | None
    reached: int  # the last step taken
    kept: int  # the last step of a complete checkpoint; -1 without one

    @property
    def repeated(self) -> int:
        """Steps that are taken again."""
        return self.reached - max(self.kept, 0)


def disturbed(flags: list[str], folder: Path, output: Path, fault: Fault | None, after: float | None = None) -> Outcome:
    """Start a run that a fault ends, or a kill `after` seconds."""
    latest = Checkpoints(folder).latest() if folder.is_dir() else None
    reached = _FORK.Value("i", latest or 0)
    process = forked(start, flags, folder, fault, reached, output)
    process.join(after)
    if after is not None:
        process.kill()
        process.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = Checkpoints(folder).latest()
    return Outcome(process.exitcode, reached.value, -1 if kept is None else kept)


def what_differs(flags: list[str], folder: Path, output: Path, want: dict) -> str:
    """Run the same command to its end. Return in what it is not as the undisturbed run; "" if in nothing."""
    process = forked(start, flags, folder, None, _FORK.Value("i", 0), output)
    process.join()
    if process.exitcode:
        return f"exit code {process.exitcode}: {output.read_text().splitlines()[-1]}"
    left = [path.name for path in folder.rglob("*") if path.name.startswith(".") or path.name == "lock"]
    if left:
        return f"left: {', '.join(left)}"
    return "" if equal(state(folder, STEPS), want) else "other bits"


# --- many of them ----------------------------------------------------------------------------------------


def run_kills(number: int, folder: Path, report: Report, say: Callable[[str], None]) -> tuple[str, int]:
    """Kill runs, and let disks fail. Return the report, and how much was not as it must be."""
    config, data_dir = folder / "config.json", make_data(folder)
    config.write_text(json.dumps(tiny_config()))
    output = folder / "output.txt"
    warm(command(config, data_dir, folder / "undisturbed"))
    begun = time.monotonic()
    calls = count_calls(command(config, data_dir, folder / "undisturbed"), folder / "undisturbed", output)
    seconds = time.monotonic() - begun
    want = state(folder / "undisturbed", STEPS)
    rng = random.Random(0)
    counts = _FORK.Array("l", 3)
    kills, trial = 0, 0
    repeated: dict[str, list[int | None]] = {}
    unequal, bad_readers, bad_words = 0, 0, 0
    while kills < number:
        trial += 1
        run = folder / f"run{trial}"
        flags, stop = command(config, data_dir, run), _FORK.Event()
        reader = forked(read_until, stop, run, counts)
        call = sorted(calls)[trial % len(calls)]
        fault = Fault(call, rng.randint(1, calls[call]), DISK_ERRORS[trial // 5 % 4] if trial % 5 == 0 else None)
        kind = f"a kill in {call}" if fault.number is None else f"{errno.errorcode[fault.number]} from a call on"
        text = output.stat().st_size
        first = disturbed(flags, run, output, fault)
        said = output.read_bytes()[text:].decode()
        if fault.number is not None and first.exit_code:
            bad_words += "Traceback" in said or f"\n{said}".count("\nerror: ") != 1
        second = disturbed(flags, run, output, None, rng.uniform(0.05, seconds))
        for name, outcome in ((kind, first), ("a kill at a random moment", second)):
            kills += outcome.exit_code == -signal.SIGKILL
            repeated.setdefault(name, []).append(outcome.repeated if outcome.exit_code else None)
        if wrong := what_differs(flags, run, output, want):
            say(f"trial {trial}, {kind} ({fault.place}): {wrong}")
            unequal += 1
        stop.set()
        reader.join()
        bad_readers += reader.exitcode != 0
        if trial % 10 == 0:
            say(f"{kills} of {number} kills; {unequal} runs unequal, {bad_readers} readers disturbed")
    rows: list[list[object]] = []
    for name, all_of_it in sorted(repeated.items()):
        again = [steps for steps in all_of_it if steps is not None]
        mean, most = (sum(again) / len(again), max(again)) if again else (None, None)
        rows.append([name, len(all_of_it), len(all_of_it) - len(again), mean, most])
    names = ("starts", "had ended before", "steps repeated, mean", "most")
    table = Table((Column("ended by", "key"), *map(Column, names)), rows)
    made = ", ".join(f"{count} × {call}" for call, count in sorted(calls.items()))
    notes = (
        f"{trial} runs of {STEPS} steps, saved every {I_SAVE} steps (keep_last 2), with {kills} kills in all. "
        f"A run of {seconds:.1f} s makes {made}.",
        f"Runs that did not end with the bits of the undisturbed run, or left a file of a broken write: {unequal}. "
        f"Disk errors that were not said in one line: {bad_words}. "
        f"A reader opened the run {counts[0]} times, with all weights and their sums; sets that were not whole: "
        f"{bad_readers}; sets that keep_last removed while they were read: {counts[2]}.",
        f"Steps are repeated back to the last whole checkpoint: at most i_save ({I_SAVE}), and those that were taken "
        "while the next one was being written: up to i_save here, a few seconds' worth in a run of full size.",
    )
    return report.write(*notes, table), unequal + bad_readers + bad_words


# --- one long one ----------------------------------------------------------------------------------------


def resources(pid: int) -> tuple[float, int, int]:
    """Return resident memory in MiB, open files and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def run_steps(steps: int, folder: Path, report: Report, say: Callable[[str], None]) -> str:
    """Train for many steps and return the report of what grew."""
    config, data_dir = folder / "config.json", make_data(folder)
    every = max(1, steps // 100)
    content = tiny_config(max_steps=steps, i_save=every, i_log=every, i_eval=5 * every, batch_size=1)
    for name in ("encoder", "decoder"):  # as small as can be: the steps count, not what they learn
        content["models"][name]["args"] |= {"channels": [4, 4]}
    config.write_text(json.dumps(content))
    run = folder / "run"
    reached = _FORK.Value("i", 0)
    process = forked(start, command(config, data_dir, run), run, None, reached, folder / "output.txt")
    columns = (
        Column("step", "key"), Column("RSS, MiB", format=".0f"), Column("open files"), Column("threads"),
        Column("log.txt, bytes per step", format=".0f"), Column("checkpoints"), Column("run folder, MiB", format=".2f"),
    )  # fmt: skip
    rows: list[list[object]] = []
    while process.is_alive():
        process.join(0.2)
        if reached.value >= steps * (len(rows) + 1) / 10.5 and process.is_alive():
            step, log = reached.value, run / "log.txt"
            size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name[0] != ".")
            steps_kept = len(Checkpoints(run).steps())
            rows.append([step, *resources(process.pid), log.stat().st_size / step, steps_kept, size / 2**20])
            say(str(rows[-1]))
    if process.exitcode:
        raise RuntimeError((folder / "output.txt").read_text())
    return report.write(f"{steps} steps, a checkpoint every {every}, keep_last 2.", Table(columns, rows))


def main(argv: list[str] | None = None) -> int:
    flags = common.parser(__doc__, data=False)
    flags.add_argument("--kills", type=int, default=100, help="kill this many starts (default: 100)")
    flags.add_argument("--steps", type=int, help="measure a run of this many steps instead")
    args = flags.parse_args(argv)
    torch.set_num_threads(1)
    title = "Faults" if args.steps is None else "A long run"
    report = Report(title, __file__, argv, torch.device("cpu"), args.output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.steps is None:
            text, wrong = run_kills(args.kills, folder, report, lambda text: print(text, flush=True))
        else:
            text, wrong = run_steps(args.steps, folder, report, lambda text: print(text, flush=True)), 0
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
