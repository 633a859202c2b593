"""Scores of many objects in few numbers: over all, by source, by kind, and by how thin their structure is."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..utils.errors import ConfigError
from .evaluate import Scores, codebook_scores, kl_scores, occupancy_scores

# The KL of a group of latent cells is compared with an id of ShapeLLM-Omni (arXiv:2506.01853): 8192 codes, four cells.
ID_BITS = 13.0
# Narrow gaps per occupied voxel from which on an object counts as thinner; about the quartiles of public meshes at 64³.
THINNER = (0.0, 0.002, 0.015, 0.05)
NARROW_CLASSES = (f"0: below {THINNER[1]}", *(f"{n}: from {least}" for n, least in enumerate(THINNER) if n))

Labels = Sequence[str | None]  # of each object; None if unknown


def summarize(scores: Scores, sources: Labels, kinds: Labels = ()) -> dict:
    """Return the mean of every metric, median and 5th percentile of the IoU, the scores of codebook or KL, and the main
    scores for each source, kind and class of `metrics.narrow_gaps`.

    scores: of a detailed evaluation, or of `Baselines.scores`.
    sources, kinds: of each object; kinds may be empty.
    """
    summary: dict = {"objects": scores.number, **{name: value.mean().item() for name, value in scores.objects.items()}}
    ious = [name for name in ("iou", "sampled_iou") if name in scores.objects]
    for name in ious:
        summary[f"{name}_median"] = scores.objects[name].quantile(0.5).item()
        summary[f"{name}_p5"] = scores.objects[name].quantile(0.05).item()
    if scores.counts is not None:
        summary |= codebook_scores(scores.counts, scores.number, scores.masks)
    if scores.counts_occupied is not None:
        summary |= occupancy_scores(scores)
    if scores.groups is not None:
        summary |= kl_scores(scores) | {"id_bits": ID_BITS}

    gaps = scores.objects["narrow_gaps"].tolist()
    thinness = [max(number for number, least in enumerate(THINNER) if gap >= least) for gap in gaps]
    names = [name for name in (*ious, "f_score", "chamfer") if name in scores.objects]
    names += ["tokens", "masks"] if scores.masks is not None else []
    for title, groups in (
        ("sources", _groups(sources)),
        ("kinds", _groups(kinds)),
        ("narrow", _groups([NARROW_CLASSES[number] for number in thinness])),
    ):
        summary[title] = {}
        for label, rows in groups.items():
            part = {name: scores.objects[name][rows] for name in names}
            means = {name: value.mean().item() for name, value in part.items()}
            percentiles = {f"{name}_p5": part[name].quantile(0.05).item() for name in ious}
            summary[title][label] = {"objects": len(rows), **means, **percentiles}
    return summary


def summarize_bits(bits: Tensor, sources: Labels, kinds: Labels = ()) -> dict:
    """Return mean and median of the bits of objects, and the mean for each source and kind. bits: [n] float64."""
    summary: dict = {
        "objects": len(bits),
        "bits_per_object": bits.mean().item(),
        "bits_per_object_median": bits.quantile(0.5).item(),
    }
    for title, groups in (("sources", _groups(sources)), ("kinds", _groups(kinds))):
        summary[title] = {
            label: {"objects": len(rows), "bits_per_object": bits[rows].mean().item()} for label, rows in groups.items()
        }
    return summary


def _groups(labels: Labels) -> dict[str, list[int]]:
    """Return {label: its objects}, sorted; objects without one are left out."""
    return {
        label: [row for row, other in enumerate(labels) if other == label]
        for label in sorted({label for label in labels if label})
    }


def read_kinds(path: str) -> dict[str, str]:
    """Read which kind of objects each source has: {source: kind}.

    path: a CSV table with the columns `source` and `kind`; others are ignored.
    Raise ConfigError if it cannot be read, lacks a column or a value, has one too many, or names two kinds for a
    source.
    """
    remedy = "give a CSV table with the columns source and kind, such as: source,kind"
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise ConfigError(f"--kinds {path}: cannot be read ({error.strerror}); {remedy}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"--kinds {path}: is not a CSV table ({error}); {remedy}") from error
    if missing := [name for name in ("source", "kind") if name not in columns]:
        raise ConfigError(f"--kinds {path}: has no column {missing[0]}, only {', '.join(columns) or 'none'}; {remedy}")
    if repeated := [name for name in ("source", "kind") if columns.count(name) > 1]:
        raise ConfigError(f"--kinds {path}: has two columns {repeated[0]}; leave one out")
    kinds: dict[str, str] = {}
    for line, row in rows:
        if None in row:
            raise ConfigError(
                f"--kinds {path}: line {line} has more than {len(columns)} values; put a text with a comma into quotes"
            )
        source, kind = ((row[name] or "").strip() for name in ("source", "kind"))
        if not source or not kind:
            raise ConfigError(f"--kinds {path}: line {line} lacks {'a kind' if source else 'a source'}; fill it in")
        if kinds.setdefault(source, kind) != kind:
            raise ConfigError(f"--kinds {path}: line {line} says {kind} of {source}, an earlier one {kinds[source]}")
    return kinds
