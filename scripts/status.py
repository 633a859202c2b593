"""Show how runs stand: one line for each, also for those that died.

    python scripts/status.py outputs/stage1 outputs/stage2
    python scripts/status.py outputs               # all runs in it
    python scripts/status.py outputs --json

A run that ended without a word, such as by kill -9 or a lost machine, is said to have died: at once on its own machine,
after some minutes without a heartbeat elsewhere. Nothing is written. The exit code is 1 if a given folder has no run or
a status cannot be read. trellis/runs/status.py explains the values that --json prints.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import json
import os
import time
from typing import Any

from trellis.runs.checkpoint import Checkpoints
from trellis.runs.lock import read_holder
from trellis.runs.status import FILE, judge, life, read_status
from trellis.utils.command import run_command
from trellis.utils.errors import DataError
from trellis.utils.units import duration

COLUMNS = ("run", "step", "of", "ETA", "samples/s", "loss", "IoU", "best", "saved", "usage", "lr", "state")
DEPTH = 4  # levels of folders in which runs are looked for


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run folder, or a folder of them")
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each run")
    return parser.parse_args(argv)


def find_runs(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run, else the runs in it, sorted. A folder that cannot be read has none."""
    if (folder / FILE).exists() or (folder / "ckpts").is_dir():
        return [folder]
    found = []
    for path, names, files in os.walk(folder):
        here = Path(path)
        if FILE in files or "ckpts" in names:
            found.append(here)
            names.clear()
        elif len(here.relative_to(folder).parts) >= DEPTH:
            names.clear()
    return sorted(found)


def state_of(run: Path, now: float) -> dict[str, Any]:
    """Return the status of a run with "run", "life" and "words" added; "error" in their place if it cannot be read."""
    try:
        status, lock = read_status(run), read_holder(run)
        steps = Checkpoints(run).steps() if status is None else []
    except (DataError, OSError) as error:
        return {"run": str(run), "error": str(error)}
    if status is None:
        saved = f"its last checkpoint is of step {steps[-1]}" if steps else "and it has no checkpoint"
        return {"run": str(run), "error": f"{run} has no {FILE}, which runs of earlier versions lack; {saved}"}
    return {"run": str(run), **status, "life": life(status, now, lock), "words": judge(status, now, lock)}


def row_of(status: dict[str, Any]) -> list[str]:
    """Return a run's cells, in the order of COLUMNS. A value that is not known is a hyphen."""
    scores, best, health = (status[key] or {} for key in ("scores", "best", "health"))
    words, bad = status["words"], health.get("bad_steps")
    if bad:
        words += f"; {number(bad)} bad steps"
    eta = status["eta_s"] if status["life"] == "alive" else None
    return [
        status["run"], number(status["step"]), number(status["max_steps"]),
        "-" if eta is None else duration(eta), number(status["samples_per_second"]), number(status["loss"]),
        number(scores.get("iou")), number(best.get("score")), number(status["checkpoint_step"]),
        number(health.get("codebook_window_usage")), number(health.get("lr")), words,
    ]  # fmt: skip


def number(value: Any) -> str:
    """Return a number in at most four digits, a whole one in full; a hyphen for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(rows: list[list[str]]) -> str:
    """Return lines with aligned columns: the first and the last to the left, numbers to the right."""
    lines = [list(COLUMNS), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS) - 1)]
    text = []
    for first, *numbers, last in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        text.append("  ".join([*cells, last]))
    return "\n".join(text)


def show(args: argparse.Namespace) -> int:
    """Print the runs of all folders. Return the exit code."""
    now, states = time.time(), []
    for folder in dict.fromkeys(map(Path, args.folders)):
        runs = find_runs(folder)
        if not runs:
            what = f"{folder} has no run in it" if folder.is_dir() else f"{folder} is no folder"
            states.append({"run": str(folder), "error": f"{what}; give a run folder or a folder of runs"})
        states += [state_of(run, now) for run in runs]
    if args.json:
        print(json.dumps(states, indent=1))
    else:
        rows = [row_of(state) for state in states if "error" not in state]
        if rows:
            print(table(rows))
    for state in states:
        if "error" in state:
            print(f"error: {state['error']}", file=sys.stderr)
    return int(any("error" in state for state in states))


def main(argv: list[str] | None = None) -> int:
    return run_command(show, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
