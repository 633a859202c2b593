"""dataset.py stats: what a data set holds, in numbers, tables and pictures."""

import argparse
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dataset_toolkits.report import count
from dataset_toolkits.shard_files import chunks
from trellis.datasets.metadata import SPLITS
from trellis.datasets.sparse_structure import SparseStructure
from trellis.tokens.stats_report import COLORS, require_matplotlib
from trellis.utils.environment import versions
from trellis.utils.files import new_folder
from trellis.utils.progress import waiting

from .objects import bits_of, check_new, open_roots, voxel_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
GROUPS = ("source", "kind", "split")
SHOWN = 25  # sources or kinds in a picture
UNKNOWN = ""  # group of objects that do not say


class Measured(NamedTuple):
    """Of N objects in the order of the data.

    num_voxels: [N] int64.
    extents: [N, 3] int64, voxels from the first to the last occupied one along x, y and z.
    groups: {one of GROUPS: (its texts, the number of the text of each object [N] int64)}.
    """

    num_voxels: np.ndarray
    extents: np.ndarray
    groups: dict[str, tuple[list[str], np.ndarray]]


def measure(dataset: SparseStructure) -> Measured:
    """Measure all objects, a part at a time."""
    num_voxels, extents = [], []
    texts: dict[str, dict[str, int]] = {name: {} for name in GROUPS}
    codes: dict[str, list[np.ndarray]] = {name: [] for name in GROUPS}
    with waiting("measuring", len(dataset)) as progress:
        for part in chunks(np.arange(len(dataset))):
            bits = bits_of(dataset, part)
            num_voxels.append(voxel_counts(bits))
            extents.append(np.array([extent_of(row, dataset.resolution) for row in bits]))
            for name in GROUPS:
                values, known = dataset.texts(name, part), texts[name]
                codes[name].append(np.array([known.setdefault(value or UNKNOWN, len(known)) for value in values]))
            progress(progress.done + len(part))
    groups = {name: (list(texts[name]), np.concatenate(codes[name])) for name in GROUPS}
    return Measured(np.concatenate(num_voxels), np.concatenate(extents), groups)


def extent_of(row: np.ndarray, resolution: int) -> list[int]:
    """Return how many voxels the grid of bits [R^3 / 8] spans along x, y and z."""
    grid = np.unpackbits(row, count=resolution**3).reshape((resolution,) * 3)
    found = []
    for others in ((1, 2), (0, 2), (0, 1)):
        places = np.flatnonzero(grid.any(axis=others))
        found.append(int(places[-1] - places[0] + 1))
    return found


def summary(values: np.ndarray) -> dict[str, float]:
    """Return mean and percentiles of numbers [N]."""
    points = np.percentile(values, PERCENTILES).tolist()
    return {"mean": float(values.mean()), **{f"p{p}": point for p, point in zip(PERCENTILES, points, strict=True)}}


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """Return the rows of stats.csv: one for each value of a group, the most frequent first."""
    rows = []
    splits = _splits(measured)
    for name, (texts, codes) in measured.groups.items():
        order = np.argsort(codes, kind="stable")
        numbers = np.bincount(codes, minlength=len(texts))
        objects = np.split(order, np.cumsum(numbers)[:-1])
        for code in np.argsort(-numbers, kind="stable").tolist():
            chosen = objects[code]
            row: dict[str, Any] = {"column": name, "value": texts[code], "objects": len(chosen)}
            row |= {split: int((splits[chosen] == split).sum()) for split in SPLITS}
            voxels = measured.num_voxels[chosen]
            row |= {"num_voxels_mean": round(float(voxels.mean()), 1), "num_voxels_median": float(np.median(voxels))}
            rows.append(row)
    return rows


def _splits(measured: Measured) -> np.ndarray:
    """Return the split of each object as text, [N]."""
    texts, codes = measured.groups["split"]
    return np.array(texts)[codes]


def run(args: argparse.Namespace) -> None:
    require_matplotlib()
    check_new(args.output, "--output")
    dataset = open_roots(args)
    measured = measure(dataset)
    rows = rows_of(measured)
    result = {
        "data": args.roots,
        "objects": len(dataset),
        "resolution": dataset.resolution,
        "splits": dataset.split_sizes(),
        "num_voxels": summary(measured.num_voxels),
        "occupancy": summary(measured.num_voxels / dataset.resolution**3),
        "extent": {axis: summary(measured.extents[:, i]) for i, axis in enumerate("xyz")},
        "sources": _numbers(rows, "source"),
        "kinds": _numbers(rows, "kind"),
        "versions": versions(),
    }
    with new_folder(args.output) as folder:
        (folder / "stats.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        with open(folder / "stats.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        pictures = draw(measured, rows, dataset.resolution, folder)
    voxels = result["num_voxels"]
    assert isinstance(voxels, dict)
    sources = len(_numbers(rows, "source").keys() - {UNKNOWN})
    of_sources = f" of {count(sources, 'source')}" if sources else ""
    print(
        f"{count(len(dataset), 'object')}{of_sources}: median "
        f"{voxels['p50']:.0f} voxels, 5 % have at most {voxels['p5']:.0f}, 5 % at least {voxels['p95']:.0f}"
    )
    print(f"written: {args.output}/stats.json, stats.csv, {', '.join(pictures)}")


def _numbers(rows: list[dict[str, Any]], column: str) -> dict[str, int]:
    return {row["value"]: row["objects"] for row in rows if row["column"] == column}


# --- pictures -----------------------------------------------------------------------------------------------------


def draw(measured: Measured, rows: list[dict[str, Any]], resolution: int, folder: Path) -> list[str]:
    """Write the pictures into a folder. Return their names."""
    from matplotlib.figure import Figure

    names = []

    def save(name: str, figure: "Figure") -> None:
        figure.savefig(folder / f"{name}.png", format="png", dpi=110)
        names.append(f"{name}.png")

    splits = _splits(measured)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    bins = np.geomspace(measured.num_voxels.min(), measured.num_voxels.max() + 1, 50).tolist()
    for split, color in zip(SPLITS, COLORS, strict=True):
        chosen = measured.num_voxels[splits == split]
        if len(chosen):
            weights = np.full(len(chosen), 1 / len(chosen))
            label = f"{split}, {count(len(chosen), 'object')}"
            axes.hist(chosen, bins, weights=weights, label=label, color=color, histtype="step", linewidth=2)
    axes.set_xscale("log")
    axes.set(xlabel=f"occupied voxels of {resolution}³", ylabel="share of the split", title="Occupancy")
    axes.legend()
    save("occupancy", figure)

    figure = Figure(figsize=(8, 3), layout="constrained")
    for i, (axes, axis) in enumerate(zip(figure.subplots(1, 3, sharey=True), "xyz", strict=True)):
        axes.hist(measured.extents[:, i], np.linspace(0.5, resolution + 0.5, 33).tolist(), color=COLORS[1])
        axes.set(xlabel=f"voxels along {axis}")
    figure.axes[0].set(ylabel="objects")
    figure.suptitle("Extent")
    save("extents", figure)

    for column in ("source", "kind"):
        found = [row for row in rows if row["column"] == column][:SHOWN]
        if [row["value"] for row in found] == [UNKNOWN]:
            continue
        figure = Figure(figsize=(8, 1 + 0.25 * len(found)), layout="constrained")
        axes = figure.subplots()
        labels = [row["value"] or "not said" for row in found]
        left = np.zeros(len(found))
        for split, color in zip(SPLITS, COLORS, strict=True):
            numbers = np.array([row[split] for row in found])
            axes.barh(range(len(found)), numbers, left=left, label=split, color=color)
            left += numbers
        axes.set_yticks(range(len(found)), labels)
        axes.invert_yaxis()
        axes.set(xlabel="objects", title=f"{column.capitalize()}s, the {len(found)} largest")
        axes.legend()
        save(f"{column}s", figure)
    return names
