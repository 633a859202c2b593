"""Time to start: imports, `--tryrun`, and the first optimizer step.

    python benchmarks/startup.py

Measures `import trellis` and the imports of train.py beyond `import torch`; `--tryrun` of the demo's configurations on
a CPU; and train.py from the start of its process to its first optimizer step, with empty and with filled caches of
compiled kernels. The first step is over when its loss is printed. In place of a limit, the table has `import torch`,
the least that any start takes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

IMPORTS = """
import sys, time
sys.path.insert(0, {root!r})
started = time.perf_counter()
import torch
then = time.perf_counter()
{statement}
print(then - started, time.perf_counter() - then)
"""
# Variables that say where compiled kernels are kept between processes.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
FIRST_STEP = "step 1/"
COLUMNS = (Column("start", "key"), Column("seconds"))


def import_seconds(statement: str, repeats: int) -> tuple[float, float]:
    """Return the median seconds of `import torch` and, after it, of `statement`, each time in a new process."""
    code = IMPORTS.format(root=str(common.ROOT), statement=statement)
    times = []
    for _ in range(repeats + 1):  # the first fills the file cache
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        times.append(tuple(map(float, done.stdout.split())))
    torch_times, own_times = zip(*times[1:], strict=True)
    return statistics.median(torch_times), statistics.median(own_times)


def first_step_seconds(command_line: list[str], caches: Path) -> float:
    """Return the seconds from the start of train.py to its first optimizer step. `caches` keeps compiled kernels."""
    environment = {**os.environ, **{name: str(caches / name.lower()) for name in CACHES}}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, str(common.ROOT / "train.py"), *command_line],
        cwd=common.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        seconds, printed = None, []
        for line in process.stdout:
            printed.append(line)
            if seconds is None and line.startswith(FIRST_STEP):
                seconds = time.perf_counter() - started
    if process.returncode or seconds is None:
        raise RuntimeError(
            f"train.py {' '.join(command_line)} ended with {process.returncode}:\n{''.join(printed)[-3000:]}"
        )
    return seconds


def import_rows(args: argparse.Namespace) -> list[tuple[str, float]]:
    torch_seconds, package = import_seconds("import trellis", args.repeats)
    _, everything = import_seconds("import train", args.repeats)
    return [
        ("import torch", torch_seconds),
        ("import trellis, beyond import torch", package),
        ("all imports of train.py, beyond import torch", everything),
    ]


def tryrun_rows(args: argparse.Namespace, data_dir: str, folder: Path) -> list[tuple[str, float]]:
    rows = []
    for name in ("demo_vae", "demo_stage1", "demo_stage2"):
        settings = {"dataset.args.resolution": args.resolution}
        line = runs.arguments(
            runs.config_path(name), torch.device("cpu"), data_dir, folder / "none", settings, "--tryrun"
        )
        started = time.perf_counter()
        runs.run_train(line)
        rows.append((f"--tryrun of {name}.json on a CPU", time.perf_counter() - started))
    return rows


def first_step_rows(
    args: argparse.Namespace, device: torch.device, data_dir: str, folder: Path
) -> list[tuple[str, float]]:
    cuda = device.type == "cuda"
    path = runs.config_path("ss_vae_conv3d_16l8_fp16" if cuda else "demo_vae")
    settings = runs.steady_settings(None, 1, 1) | {"dataset.args.resolution": args.resolution}
    settings |= runs.batch_setting(load_config(path), args.batch_size or (32 if cuda else 4))
    rows = []
    for caches in ("empty", "filled"):
        line = runs.arguments(path, device, data_dir, folder / caches, settings, "--num_gpus", "1")
        seconds = first_step_seconds(line, folder / "caches")
        rows.append((f"{path.stem}: process start to first step, {caches} kernel caches", seconds))
    return rows


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument(
        "--of",
        nargs="+",
        choices=("imports", "tryrun", "first_step"),
        default=("imports", "tryrun", "first_step"),
        help="what to measure (default: all)",
    )
    flags.add_argument("--batch_size", type=int, help="batch size of the first step (default: 32 on a GPU, 4 on a CPU)")
    flags.add_argument("--repeats", type=int, default=5, help="processes for each import (default: 5)")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    report = Report("Start", __file__, argv, device, args.output)
    rows: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "imports" in args.of:
            rows += import_rows(args)
        data_dir = common.data_for(args, folder)
        if "tryrun" in args.of:
            rows += tryrun_rows(args, data_dir, folder)
        if "first_step" in args.of:
            rows += first_step_rows(args, device, data_dir, folder)
    print(report.write(Table(COLUMNS, rows)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
