"""Make the reference curve of a configuration from a run: configs/vae/curves/NAME.csv.

    python scripts/reference_curve.py --run outputs/stage1 --config configs/vae/demo_stage1.json

A run of the configuration then says at each validation where it is beside the curve. trellis/trainers/standing.py
explains the columns. Runs of earlier versions have no status.json: give --card, --train and --val.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import csv
import json
from collections.abc import Iterator
from typing import Any

import torch

from trellis.models import build
from trellis.runs.status import read_status
from trellis.trainers.configuration import complete_config
from trellis.trainers.standing import COLUMNS, parameter_count
from trellis.utils.command import run_command
from trellis.utils.config import load_config
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import atomic_write

POINTS = 40  # of the loss, evenly spaced


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder; its log.txt and config.json are read")
    parser.add_argument("--config", required=True, help="configuration that the run is the reference of")
    parser.add_argument("--card", help="GPU or processor (default: as status.json says)")
    parser.add_argument("--train", type=int, help="training objects (default: as status.json says)")
    parser.add_argument("--val", type=int, help="validation objects (default: as status.json says)")
    parser.add_argument("--ranks", type=int, help="processes (default: as status.json says, else 1)")
    return parser.parse_args(argv)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log.txt. Raise DataError for a damaged one."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = json.loads(line)
                if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                    raise ValueError(f"line {number} has no step")
                yield entry
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); continue the run, which mends its log, or take another"
        ) from error


def curve(log: Iterator[dict[str, Any]], max_steps: int) -> list[dict[str, Any]]:
    """Return rows {"step", "loss", "iou"}: at validations and POINTS evenly spaced steps.

    loss: the mean since the row before.
    Raise DataError for a log that does not reach max_steps.
    """
    marks = {round(max_steps * n / POINTS) for n in range(1, POINTS + 1)}
    losses: dict[int, float] = {}
    ious: dict[int, float] = {}
    for entry in log:
        if entry.get("loss") is not None:
            losses[entry["step"]] = entry["loss"]
        if entry.get("val/iou") is not None:
            ious[entry["step"]] = entry["val/iou"]
    if max(losses, default=0) < max_steps:
        raise DataError(f"the log ends at step {max(losses, default=0)} of {max_steps}; take a finished run")
    rows, since = [], 0
    for step in sorted((marks | ious.keys()) & ({0} | losses.keys())):
        part = [losses[n] for n in range(since + 1, step + 1) if n in losses]
        iou = ious.get(step)
        rows.append(
            {
                "step": step,
                "loss": f"{sum(part) / len(part):.5g}" if part else "",
                "iou": "" if iou is None else f"{iou:.4f}",
            }
        )
        since = step
    return rows


def make(args: argparse.Namespace) -> None:
    """Write the curve."""
    run = Path(args.run)
    config = complete_config(load_config(str(run / "config.json")))
    settings, status = config["trainer"]["args"], read_status(run) or {}
    objects = status.get("objects") or {}
    train, val = args.train or objects.get("train"), args.val or objects.get("val")
    card, ranks = args.card or status.get("card"), args.ranks or status.get("ranks") or 1
    for flag, value in (("card", card), ("train", train), ("val", val)):
        if value is None:
            raise ConfigError(f"{run} has no status.json that says it; give --{flag}")
    with torch.device("meta"):
        models = {name: build(spec, f"models.{name}") for name, spec in config["models"].items()}
    facts = {
        "card": card,
        "max_steps": settings["max_steps"],
        "samples_per_step": settings["batch_size"] or settings["batch_size_per_gpu"] * ranks,
        "parameters": parameter_count(models),
        "train": train,
        "val": val,
    }
    rows = [{**row, **facts} for row in curve(entries(run / "log.txt"), settings["max_steps"])]
    path = Path(args.config).parent / "curves" / f"{Path(args.config).stem}.csv"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}, {len(rows)} points")


def main(argv: list[str] | None = None) -> int:
    return run_command(make, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
