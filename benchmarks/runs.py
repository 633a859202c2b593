"""Runs of train.py: as a command whose log is read, or as a trainer whose parts are measured."""

import json
import shutil
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from benchmarks.common import ROOT
from trellis.trainers.basic import BasicTrainer

# First entries of the log, which include warm-up: compilation, the choice of convolution algorithms, the loss scale.
WARM_INTERVALS = 2
# An interval that a run never reaches: no validation, pictures or checkpoints between the first and the last step.
NEVER = 10**9


@dataclass(frozen=True)
class Speed:
    """Speed of a training run after warm-up. Memory is None on a CPU."""

    samples_per_second: float
    peak_memory_gib: float | None


def config_path(name: str) -> Path:
    """Return the path of a shipped configuration."""
    return ROOT / "configs" / "vae" / f"{name}.json"


def arguments(
    config: Path, device: torch.device, data_dir: str, output_dir: Path, settings: dict, *flags: str
) -> list[str]:
    """Return train.py's arguments. settings: {"trainer.args.max_steps": 4, ...}."""
    parts = ["--config", str(config), "--data_dir", data_dir, "--output_dir", str(output_dir)]
    parts += ["--device", device.type, "--auto_retry", "0", "--master_port", str(_free_port()), *flags]
    for key, value in settings.items():
        parts += ["--set", f"{key}={json.dumps(value)}"]
    return parts


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def batch_setting(config: dict, batch: int) -> dict:
    """Return the setting of the batch size per process, under the name that the configuration uses."""
    args = config["trainer"]["args"]
    return {"trainer.args.batch_size" if "batch_size" in args else "trainer.args.batch_size_per_gpu": batch}


def steady_settings(weights: dict[str, str] | None, max_steps: int, interval: int) -> dict:
    """Return settings of a run that only trains and logs every `interval` steps.

    weights: see `common.random_weights`; None for freshly initialized ones. The lr is too small to change them much,
    since random weights may diverge at the configuration's lr; the speed is the same.
    """
    settings = {"max_steps": max_steps, "i_log": interval, "i_print": interval, "finetune_ckpt": weights}
    settings |= dict.fromkeys(("i_eval", "i_save", "i_sample", "i_ddpcheck"), NEVER)
    settings["optimizer.args.lr"] = 1e-6
    return {f"trainer.args.{key}": value for key, value in settings.items()}


def run_script(script: str, command_line: list[str]) -> str:
    """Run a script of this repository and return its output. Raise RuntimeError with the output's end if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *command_line],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(command_line)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def run_train(command_line: list[str]) -> str:
    """Run train.py; see `run_script`."""
    return run_script("train.py", command_line)


def read_speed(run_dir: Path, warm: int) -> Speed:
    """Return the median rate over the log's entries after the first `warm`, and the peak memory of the whole run."""
    lines = [json.loads(line) for line in (run_dir / "log.txt").read_text().splitlines()]
    intervals = [line for line in lines if "samples_per_second" in line]
    rates = [line["samples_per_second"] for line in intervals[warm:]]
    if not rates:
        raise RuntimeError(
            f"{run_dir}/log.txt has {len(intervals)} intervals, all of them warm-up; train for more steps"
        )
    return Speed(statistics.median(rates), intervals[-1].get("peak_memory_gib"))


def speed(command_line: list[str], run_dir: Path, warm: int) -> Speed:
    """Run train.py, return its speed and remove its folder: a checkpoint of full-size networks takes gigabytes."""
    run_train(command_line)
    try:
        return read_speed(run_dir, warm)
    finally:
        shutil.rmtree(run_dir)


def build_trainer(command_line: list[str], device: torch.device) -> BasicTrainer:
    """Return the trainer that train.py would run with these arguments in one process, before its run is opened."""
    args = train.parse_args(command_line)
    return train.build_trainer(args, train.read_config(args, world_size=1), device)
