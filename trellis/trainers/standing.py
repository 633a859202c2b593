"""How a run stands: what status.json says of it, and where it is beside its configuration's reference curve.

A reference curve is the file `curves/NAME.csv` beside the configuration NAME.json, made from a real run's log by
scripts/reference_curve.py. Its columns:

    step              of the curve's run
    loss              mean over the steps since the row before; empty at step 0
    iou               of the validation split; empty where nothing was validated
    card              that it ran on
    max_steps         of its schedule
    samples_per_step  over all ranks
    parameters        weights of all models
    train, val        numbers of objects
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..datasets.base import StandardDatasetBase
from ..modules.model import Model
from ..utils import dist_utils
from ..utils.environment import device_name
from ..utils.errors import ConfigError

COLUMNS = ("step", "loss", "iou", "card", "max_steps", "samples_per_step", "parameters", "train", "val")
# A point of the curve is compared with a step that is at most this share of it away.
NEAR = 0.05
# What status.json says of a run's health, as far as steps have it.
HEALTH = ("lr", "grad_norm", "codebook_window_usage", "bad_steps")


@dataclass(frozen=True)
class RunSize:
    """The size of a run. The numbers are those of a curve's columns."""

    max_steps: int
    samples_per_step: int
    parameters: int
    train: int
    val: int

    @classmethod
    def of(
        cls, models: dict[str, Model], dataset: StandardDatasetBase, max_steps: int, samples_per_step: int
    ) -> "RunSize":
        """Return the size of a run on a training split."""
        return cls(max_steps, samples_per_step, parameter_count(models), len(dataset), dataset.split_sizes()["val"])


def run_facts(size: RunSize, device: torch.device) -> dict[str, Any]:
    """Return what status.json says of a run as a whole."""
    return {
        "objects": {"train": size.train, "val": size.val},
        "parameters": size.parameters,
        "ranks": dist_utils.world_size(),
        "card": device_name(device),
    }


def parameter_count(models: dict[str, Model]) -> int:
    """Return the number of weights of all models, frozen ones and codebooks without gradients included."""
    return sum(value.numel() for model in models.values() for value in model.state_dict().values())


def health(rows: list[dict[str, float]], summary: dict[str, float]) -> dict[str, Any]:
    """Return what status.json says of logged steps. rows: of the steps; summary: the entry after them."""
    if not rows:
        return {}
    last = rows[-1]
    found: dict[str, Any] = {"loss": last.get("loss"), "samples_per_second": summary.get("samples_per_second")}
    return found | {"health": {name: last[name] for name in HEALTH if name in last}}


@dataclass(frozen=True)
class Point:
    """A row of a reference curve."""

    step: int
    loss: float | None
    iou: float | None


@dataclass(frozen=True)
class Reference:
    """A reference curve, and the card and the size of its run."""

    points: list[Point]
    card: str
    size: RunSize

    @classmethod
    def of_config(cls, config: str | Path) -> "Reference | None":
        """Read the curve of a configuration file; None if it has none. Raise ConfigError for a damaged one."""
        path = Path(config).parent / "curves" / f"{Path(config).stem}.csv"
        if not path.is_file():
            return None
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
            points = [Point(int(row["step"]), _number(row["loss"]), _number(row["iou"])) for row in rows]
            first = rows[0]
            facts = {name: int(first[name]) for name in COLUMNS[4:]}
            return cls(points, first["card"], RunSize(**facts))
        except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
            raise ConfigError(
                f"{path} is no reference curve ({type(error).__name__}: {error}); make it anew with "
                "scripts/reference_curve.py, or delete it"
            ) from error

    def near(self, samples: int, name: str) -> tuple[int, float] | None:
        """Return step and value of the curve's point nearest to a number of samples seen; None if none is near.

        name: "loss" or "iou".
        """
        step = samples / self.size.samples_per_step
        known = [(point.step, value) for point in self.points if (value := getattr(point, name)) is not None]
        nearest = min(known, key=lambda one: abs(one[0] - step), default=None)
        return nearest if nearest and abs(nearest[0] - step) <= NEAR * step else None

    def beside(
        self, size: RunSize, step: int, samples: int, *, iou: float | None, loss: float | None
    ) -> dict[str, Any]:
        """Return where a run is beside the curve after a validation: {"step", "iou", "note"}; {} if it cannot be said.

        size: of the run. samples: seen so far. iou: of the validation. loss: mean of the last steps.
        """
        if size.parameters != self.size.parameters:  # other models
            return {}
        there = {name: self.near(samples, name) for name in ("iou", "loss")}
        here = {"iou": iou, "loss": loss}
        labels = {"iou": "IoU", "loss": "loss"}
        both = [name for name in labels if there[name] is not None and here[name] is not None]
        if not both:
            return {}
        run = ", ".join(f"{labels[name]} {here[name]:.4g}" for name in both)
        reference = ", ".join(
            f"{labels[name]} {value:.4g} at step {at}"
            for name in both
            for at, value in [there[name] or (0, 0.0)]  # `both` has only points that exist
        )
        note = f"step {step}  {run}; the reference has {reference} ({self._differences(size)})"
        return {"step": step, "iou": there["iou"][1] if there["iou"] else None, "note": note}

    def _differences(self, size: RunSize) -> str:
        """Return the card, and what else is not as in a run of this size."""
        own, parts = self.size, [self.card]
        if (size.train, size.val) != (own.train, own.val):
            parts.append(f"other data: {own.train} objects, {own.val} for validation")
        if size.max_steps != own.max_steps:
            parts.append(f"another schedule: {own.max_steps} steps in all, {size.max_steps} here")
        if size.samples_per_step != own.samples_per_step:
            parts.append(f"{own.samples_per_step} samples a step, {size.samples_per_step} here")
        return "; ".join(parts)


def _number(text: str) -> float | None:
    """Return the number in a cell, None for an empty one."""
    return float(text) if text else None
