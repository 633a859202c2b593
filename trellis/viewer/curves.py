"""The training curves of a run, from the JSON lines of its log.txt (see trellis/trainers/logger.py)."""

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from ..utils.errors import DataError

POINTS = 1500  # per curve; longer ones are thinned out evenly
COLUMNS = 3  # plots in a row
GAP_ACROSS, GAP_DOWN = 0.16, 0.3  # gap between two plots, as a share of the distance of their centers
LOSSES = "losses"
# A name that is missing here and in ELSEWHERE, and does not start with "val/", is a term of the loss.
PLOTS = {
    LOSSES: (),
    "validation": ("val/iou", "val/precision", "val/recall"),
    "share of codes in use": ("codebook_usage", "codebook_window_usage", "val/codebook_usage"),
    "perplexity of the codes": ("codebook_perplexity", "val/codebook_perplexity"),
    "norm of the gradient": ("grad_norm",),
    "learning rate": ("lr",),
}
LOGARITHMIC = (LOSSES, "norm of the gradient", "learning rate")
ELSEWHERE = (
    "step",
    "seconds",
    "samples_per_second",
    "codes_revived",
    "bad_steps",
    "max_grad_norm",
    "loss_scale",
    "kl_bits",
)
COLORS = ("#3b5b92", "#d1495b", "#2a9d8f", "#e09f3e", "#7b5ea7", "#5c6672", "#8d6e63", "#00838f")


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return {name: [(step, value)]} of a log.txt. Skip a last line that is still being written.

    Raise DataError if there is no such file.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): has the run trained yet?") from error
    for line in lines:
        try:
            entry = json.loads(line)
            step = entry["step"]
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name != "step":
                series.setdefault(name, []).append((step, value))
    return series


def curves_figure(series: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Return the plots of PLOTS that have a curve, COLUMNS in a row, steps along x."""
    named = {name for names in PLOTS.values() for name in names}
    terms = [name for name in series if name not in named and name not in ELSEWHERE and "/" not in name]
    plots = {title: [name for name in names or terms if name in series] for title, names in PLOTS.items()}
    plots = {title: names for title, names in plots.items() if names}
    rows = max(1, -(-len(plots) // COLUMNS))
    traces, notes = [], []
    layout = {
        "height": 360 * rows,
        "margin": {"l": 50, "r": 16, "t": 56, "b": 44},
        "plot_bgcolor": "white",
        "paper_bgcolor": "white",
        "font": {"size": 11, "color": "#2d323c"},
    }
    for index, (title, names) in enumerate(plots.items()):
        number = str(index + 1) if index else ""
        width, height = 1 / (COLUMNS - GAP_ACROSS), 1 / (rows - GAP_DOWN)  # from one plot to the next
        left, top = index % COLUMNS * width, 1 - index // COLUMNS * height
        right, bottom = left + (1 - GAP_ACROSS) * width, top - (1 - GAP_DOWN) * height
        kind = {"type": "log", "tickformat": "~g", "dtick": "D2"} if title in LOGARITHMIC else {}
        axis = {"gridcolor": "#eceef2", "zeroline": False, "linecolor": "#c9ced6"}
        layout[f"xaxis{number}"] = {
            **axis,
            "domain": [left, min(1, right)],
            "anchor": f"y{number}",
            "title": {"text": "step", "standoff": 2},
        }
        layout[f"yaxis{number}"] = {**axis, "domain": [max(0, bottom), top], "anchor": f"x{number}", **kind}
        layout[f"legend{number}"] = {"x": left, "y": top, "yanchor": "bottom", "orientation": "h", "font": {"size": 11}}
        notes.append(
            {
                "text": f"<b>{title}</b>",
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "yshift": 20,
                "showarrow": False,
            }
        )
        for color, name in zip(cycle(COLORS), names, strict=False):
            points = thinned(series[name])
            traces.append(
                {
                    "type": "scatter",
                    "name": name,
                    "x": [step for step, _ in points],
                    "y": [value for _, value in points],
                    "xaxis": f"x{number}",
                    "yaxis": f"y{number}",
                    "legend": f"legend{number}",
                    "showlegend": True,
                    "mode": "lines+markers" if len(points) < 30 else "lines",
                    "marker": {"size": 5},
                    "line": {"color": color, "width": 1.7},
                    "hovertemplate": "step %{x}: %{y:.5g}",
                }
            )
    return {"data": traces, "layout": {**layout, "annotations": notes}}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return about POINTS of the points, evenly, and always the last."""
    return [*points[: -1 : max(1, len(points) // POINTS)], points[-1]]
