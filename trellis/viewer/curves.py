"""The training curves of a run, from the JSON lines of its log.txt (see trellis/trainers/logger.py), and its state.

The run may be training, so files come and go, and a last line is half written.
"""

import json
import math
import time
from itertools import cycle
from pathlib import Path
from typing import Any, TypeGuard

from ..runs.lock import read_holder
from ..runs.status import judge, life, read_status
from ..utils.errors import DataError
from ..utils.units import duration

POINTS = 1500  # per curve; longer ones are thinned out evenly
LOSSES, RATE = "losses", "learning rate"
# A name that is missing here and in ELSEWHERE, and does not start with "val/", is a term of the loss.
PLOTS = {
    LOSSES: (),
    "validation": ("val/iou", "val/precision", "val/recall"),
    "share of codes in use": ("codebook_usage", "codebook_window_usage", "val/codebook_usage"),
    "perplexity of the codes": ("codebook_perplexity", "val/codebook_perplexity"),
    "norm of the gradient": ("grad_norm",),
    RATE: ("lr",),
}
LOGARITHMIC = (LOSSES, "norm of the gradient")
ELSEWHERE = ("codes_revived", "bad_steps", "max_grad_norm", "loss_scale", "kl_bits")
COLORS = ("#3b5b92", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#5c6672", "#8d6e63", "#00838f")


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return {name: [(step, value)]} of what each step and each validation left in a log.txt.

    Skip what is no such line, as a last one that is still being written.
    Raise DataError if the file cannot be read.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    step = entry["step"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
                if not isinstance(step, int):
                    continue
                for name, value in entry.items():
                    # A line without "loss" sums up many steps: speed, memory, and the scores of a validation.
                    if ("loss" in entry or name.startswith("val/")) and name != "step" and _is_number(value):
                        series.setdefault(name, []).append((step, value))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): has the run trained yet?") from error
    return series


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curves_figures(series: dict[str, list[tuple[int, float]]]) -> dict[str, dict[str, Any]]:
    """Return {title: figure} of the plots of PLOTS that have a curve, steps along x."""
    named = {name for names in PLOTS.values() for name in names}
    terms = [name for name in series if name not in named and name not in ELSEWHERE and "/" not in name]
    plots = {title: [name for name in names or terms if name in series] for title, names in PLOTS.items()}
    return {title: _figure(title, {name: series[name] for name in names}) for title, names in plots.items() if names}


def _figure(title: str, series: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    traces = []
    for color, (name, whole) in zip(cycle(COLORS), series.items(), strict=False):
        points = thinned(whole)
        traces.append(
            {
                "type": "scatter",
                "name": name,
                "x": [step for step, _ in points],
                "y": [value for _, value in points],
                "showlegend": True,
                "mode": "lines+markers" if len(points) < 30 else "lines",
                "marker": {"size": 5},
                "line": {"color": color, "width": 1.7},
                "hovertemplate": "step %{x}: %{y:.5g}",
            }
        )
    axis = {"gridcolor": "#eceef2", "zeroline": False, "linecolor": "#c9ced6", "automargin": True}
    kind = {"type": "log", "tickformat": "~g", "dtick": "D2"} if title in LOGARITHMIC else {}
    if title == RATE:
        kind = {"tickformat": "~g"}  # 0.0006, not 600µ
    layout = {
        "xaxis": {**axis, "title": {"text": "step", "standoff": 4}, "nticks": 6},
        "yaxis": {**axis, **kind},
        "legend": {"x": 0, "y": 1, "yref": "container", "yanchor": "top", "orientation": "h", "font": {"size": 11}},
        "margin": {"l": 44, "r": 14, "t": 26, "b": 36},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
        "font": {"size": 11, "color": "#2d323c"},
    }
    return {"data": traces, "layout": layout}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return about POINTS of the points, evenly, and always the last."""
    return [*points[: -1 : max(1, len(points) // POINTS)], points[-1]]


def state_of(run_dir: Path) -> str:
    """Return a line on what a run's status.json says: its state, its step and the time left; "" without such a file."""
    try:
        status, lock = read_status(run_dir), read_holder(run_dir)
    except (DataError, OSError) as error:
        return str(error)
    if status is None:
        return ""
    now = time.time()
    parts = [judge(status, now, lock)]
    step, last, left = (status[key] for key in ("step", "max_steps", "eta_s"))
    if step is not None:
        parts.append(f"step {step:,}" if last is None else f"step {step:,} of {last:,}")
    if left is not None and life(status, now, lock) == "alive":
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)
