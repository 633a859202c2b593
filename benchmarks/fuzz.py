"""Fuzzing of everything that reads a file or a text of strangers, for as long as you like.

    python benchmarks/fuzz.py --minutes 60 --folder outputs/fuzz

Each target of fuzz_targets.py takes its turns in a process of its own, under limits of memory and time, and none may
write outside of its folder, start a program or open a connection. Inputs are mutations of valid ones. With atheris
(pip install atheris; Python 3.11 to 3.13) coverage guides them: an input that reaches new code of the package is kept,
in FOLDER/corpus, and mutated further; without, they are drawn at random. Linux only.

A finding is saved in FOLDER/findings: the input, and beside it what happened. Findings that end at the same place of
the code count once. The exit code is 1 if there are any. `--replay TARGET FILE` runs one input again.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trellis.utils.command import run_command
from trellis.utils.errors import ConfigError

SECONDS = 10.0  # that an input may take
SILENCE = 60.0  # seconds after which a process is ended that neither finishes an input nor stops by itself
START = 600.0  # seconds that a process may take until its first input: atheris rewrites the whole package
MEMORY = 6 * 2**30  # bytes of address space beyond what is there when fuzzing begins
TURN = 300.0  # seconds of a turn at most
PACKAGES = ["trellis"]  # whose coverage guides
# Files of this name hold the input that runs, so that a crash loses nothing.
CURRENT = "current"
FORBIDDEN = (  # audit events, besides `open` for writing; see https://docs.python.org/3/library/audit_events.html
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="for all targets together (default: 60)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/fuzz"), help="where corpus and findings are kept")
    parser.add_argument("--targets", nargs="+", help="names of targets (default: all)")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="run one input")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: 0)")
    parser.add_argument("--worker", nargs=2, metavar=("TARGET", "SECONDS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- a worker --------------------------------------------------------------------------------------------


def guard(folder: Path) -> Callable[[], list[str]]:
    """Note forbidden acts of this process. Return a function that gives those since its last call."""
    inside, acts = str(folder.resolve()), []

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, str | bytes | os.PathLike) and is_outside(path):
                acts.append(f"open for writing: {os.fsdecode(path)}")
        elif event in FORBIDDEN:
            paths = [arg for arg in args if isinstance(arg, str | bytes)]
            if not (event.startswith(("os.", "shutil.")) and paths and not any(map(is_outside, paths))):
                acts.append(f"{event} {args!r:.300}")

    def is_outside(path: str | bytes | os.PathLike) -> bool:
        whole = os.path.abspath(os.fsdecode(path))
        return not whole.startswith(inside + os.sep) and whole not in (inside, os.devnull)

    def since() -> list[str]:
        found, acts[:] = acts[:], []
        return found

    sys.addaudithook(hook)
    return since


def work(name: str, seconds: float, folder: Path, seed: int) -> int:
    """Fuzz one target in this process."""
    import resource  # not on Windows

    sys.dont_write_bytecode = True
    try:
        import atheris
    except ImportError:
        atheris = None
    import torch

    torch.set_num_threads(1)
    if atheris is None:
        from benchmarks import fuzz_targets
    else:
        with atheris.instrument_imports(include=PACKAGES):
            from benchmarks import fuzz_targets
    target = fuzz_targets.TARGETS[name]
    corpus, findings = folder / "corpus" / name, folder / "findings"
    for each in (corpus, findings):
        each.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds()
    for data in seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:20]).write_bytes(data)
        with tempfile.TemporaryDirectory() as scratch:
            target.run(data, Path(scratch))  # also imports and compiles what a first call does
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sandbox = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    tempfile.tempdir = sandbox
    acts = guard(Path(sandbox))
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        inside = Path(sandbox, "in")
        inside.mkdir(exist_ok=True)
        Path(sandbox, CURRENT).write_bytes(data)
        acts()
        found = fuzz_targets.attempt(target, data, inside, SECONDS)
        done = acts()
        shutil.rmtree(inside)
        if done:
            record(findings, name, data, "act", "\n".join(done))
        if found is not None:
            record(findings, name, data, found.kind, found.text)
        if count % 50 == 0:
            beat.write_text(json.dumps({"inputs": count, "sandbox": sandbox}))

    beat = folder / f"{name}.beat"
    beat.write_text(json.dumps({"inputs": 0, "sandbox": sandbox}))
    if atheris is None:
        rng, until = Random(seed), time.monotonic() + seconds
        while time.monotonic() < until:
            one(fuzz_targets.mutated(target, rng, rng.choice(seeds)))
        beat.write_text(json.dumps({"inputs": count, "sandbox": sandbox}))
        return 0

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        rng = Random(number)
        changed = atheris.Mutate(data, max_size) if not rng.randrange(8) else fuzz_targets.mutated(target, rng, data)
        return bytes(changed[:max_size])

    options = [
        "-max_len=150000",
        "-timeout=0",
        "-rss_limit_mb=0",
        "-print_final_stats=0",
        "-verbosity=0",
        "-detect_leaks=0",
    ]
    options += [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed + 1}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()  # ends the process
    return 0


def record(folder: Path, name: str, data: bytes, kind: str, text: str) -> None:
    """Save an input that ended badly, unless one that ended at the same place is there."""
    digest = hashlib.sha256(f"{name} {kind} {place_of(text)}".encode()).hexdigest()[:12]
    path = folder / f"{name}-{kind}-{digest}"
    if not path.exists():
        path.write_bytes(data)
        path.with_name(f"{path.name}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def place_of(text: str) -> str:
    """Return what of a traceback tells findings apart: its last two lines of code and the error's type."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    last = text.strip().splitlines()[-1] if text.strip() else ""
    return f"{frames[-2:]} {last.partition(':')[0]}" if frames else re.sub(r"/\S+|\d+", "", last)[:80]


# --- all of them -----------------------------------------------------------------------------------------


def fuzz(args: argparse.Namespace) -> int:
    """Give the targets their turns, in processes of their own, until time is up. Return the exit code."""
    if args.worker:
        return work(args.worker[0], float(args.worker[1]), args.folder, args.seed)
    from benchmarks.fuzz_targets import TARGETS, attempt

    if args.replay:
        name, file = args.replay
        with tempfile.TemporaryDirectory() as scratch:
            found = attempt(TARGETS[name], Path(file).read_bytes(), Path(scratch), SECONDS)
        print("a good end" if found is None else f"{found.kind}\n{found.text}")
        return 0 if found is None else 1
    names = args.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise ConfigError(f"--targets has {unknown[0]}; it can be one of: {', '.join(TARGETS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    started, turns, inputs = time.monotonic(), 0, dict.fromkeys(names, 0)
    until = started + 60 * args.minutes
    turn = min(TURN, 60 * args.minutes / len(names))
    while (left := until - time.monotonic()) > 5:
        name = names[turns % len(names)]
        inputs[name] += run_turn(args.folder, name, min(turn, left), args.seed + turns)
        turns += 1
        minutes = (time.monotonic() - started) / 60
        number = len(findings_in(args.folder))
        print(f"{minutes:.1f} min: {name}: {inputs[name]} inputs so far; {number} findings in all", flush=True)
    bad = findings_in(args.folder)
    print(f"{sum(inputs.values())} inputs, {json.dumps(inputs)}, {len(bad)} findings: {args.folder / 'findings'}")
    for path in bad:
        print(f"  {path.name}")
    return 1 if bad else 0


def findings_in(folder: Path) -> list[Path]:
    """Return the inputs that ended badly."""
    return sorted(path for path in (folder / "findings").glob("*") if path.suffix != ".txt")


def run_turn(folder: Path, name: str, seconds: float, seed: int) -> int:
    """Let a target fuzz for some seconds. Record a crash, and a process that hangs. Return the number of inputs."""
    beat, log = folder / f"{name}.beat", folder / f"{name}.log"
    beat.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--worker", name, str(seconds), "--folder", str(folder), "--seed", str(seed)]
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        kind, seen, state = "crash", time.monotonic(), ("", 0.0)
        while (code := process.poll()) is None:
            time.sleep(0.5)
            now = _progress(beat)
            if now != state:
                state, seen = now, time.monotonic()
            if time.monotonic() - seen > (SILENCE + SECONDS if now[0] else START):
                process.kill()
                kind, code = "hang", process.wait()
                break
    try:
        told = json.loads(beat.read_text())
    except (OSError, ValueError):
        told = {"inputs": 0, "sandbox": None}
    current = Path(told["sandbox"], CURRENT) if told["sandbox"] else None
    if code and current is not None and current.exists():
        tail = log.read_bytes()[-3000:].decode("utf-8", "replace")
        record(folder / "findings", name, current.read_bytes(), kind, f"exit code {code}\n{tail}")
    elif code:
        raise ConfigError(f"{name} did not start (exit code {code}); {log} says why")
    return int(told["inputs"])


def _progress(beat: Path) -> tuple[str, float]:
    """Return what changes while a worker goes on: its counter, and when it wrote the input that runs."""
    try:
        text = beat.read_text()
        return text, Path(json.loads(text)["sandbox"], CURRENT).stat().st_mtime
    except (OSError, ValueError):
        return "", 0.0


def main(argv: list[str] | None = None) -> int:
    return run_command(fuzz, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
