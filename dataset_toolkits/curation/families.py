"""dataset.py dedupe and split: families of near-duplicates, reported, removed, or kept in one split."""

import argparse
import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset_toolkits.report import count
from dataset_toolkits.shard_files import chunks
from trellis.datasets.duplicates import LOWEST_IOU, Duplicates, families_of, join, root_of, sketch_all
from trellis.datasets.metadata import SPLITS
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.symmetries import Symmetry
from trellis.utils.errors import ConfigError
from trellis.utils.files import atomic_write
from trellis.utils.progress import waiting

from .objects import bits_of, check_new, check_shard_folder, column_names, open_roots, write_objects


class Member(NamedTuple):
    """A row of a report: an object of a family of several.

    axes says how the object it is near to lies in it: "-y +x +z" means that the object's x axis is the other's y axis
    reversed, its y axis the other's x, its z axis the other's z.
    """

    family: str  # the lowest sha256 of its objects
    sha256: str
    name: str
    source: str
    root: str
    split: str  # today's
    near: str = ""  # sha256 of the object that stays in its place; blank if it stays itself
    iou: str = ""
    axes: str = ""
    new_split: str = ""


def find(dataset: SparseStructure, iou: float) -> Duplicates:
    """Find the near-duplicates of a data set, with progress."""

    def read(numbers: np.ndarray) -> np.ndarray:
        return bits_of(dataset, numbers)

    with waiting("reading", len(dataset)) as progress:
        sketches = sketch_all(read, len(dataset), dataset.resolution, iou, progress)
    with waiting("comparing", sketches.keys.shape[1], "band") as progress:
        return Duplicates(sketches, read, dataset.resolution, iou, progress)


def axes_of(symmetry: Symmetry) -> str:
    """Return a symmetry as text, see `Member`."""
    pairs = zip(symmetry.axes, symmetry.mirrored, strict=True)
    return " ".join(("-" if mirrored else "+") + "xyz"[axis] for axis, mirrored in pairs)


def check_iou(iou: float) -> None:
    """Raise ConfigError for an --iou that `Duplicates` does not take."""
    if not LOWEST_IOU <= iou <= 1:
        raise ConfigError(f"--iou {iou}: must lie between {LOWEST_IOU} and 1.")


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that cannot run."""
    check_iou(args.iou)
    if args.report is not None:
        check_new(args.report, "--report")
        if args.output is not None and args.output.resolve() in args.report.resolve().parents:
            raise ConfigError(f"--report {args.report}: lies in --output, which is a folder of shards alone.")
    if args.output is not None:
        check_shard_folder(args)


def _write_report(path: Path | None, members: list[Member], columns: tuple[str, ...]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(member._asdict() for member in members)


def _members(dataset: SparseStructure, family: np.ndarray) -> list[Member]:
    """Return the objects of a family in its order."""
    texts = {name: dataset.texts(name, family) for name in ("sha256", "name", "source", "root", "split")}
    lowest = min(texts["sha256"])
    return [
        Member(lowest, sha256, name, source or "", root, split)
        for sha256, name, source, root, split in zip(*texts.values(), strict=True)
    ]


def _say_families(families: list[np.ndarray], dataset: SparseStructure) -> None:
    """Print how many families there are, and how many are in both splits."""
    divided = sum(len(set(dataset.texts("split", family))) > 1 for family in families)
    objects = sum(map(len, families))
    largest = f", the largest of {len(families[0])}" if families else ""
    many = "families"
    print(f"{count(len(families), 'family', many)} of several objects, {objects} of {len(dataset)} in all{largest}")
    print(f"  of today's split: {count(divided, 'family', many)} in both train and val")


# --- dedupe -------------------------------------------------------------------------------------------------------


def run_dedupe(args: argparse.Namespace) -> None:
    _check(args)
    dataset = open_roots(args)
    found = find(dataset, args.iou)
    families = found.families()
    _say_families(families, dataset)
    gone = np.zeros(len(dataset), bool)
    report: list[Member] = []
    with waiting("choosing what stays", len(families), "family") as progress:
        for family in families:
            members = _members(dataset, family)
            # Val first: what is held out today stays so.
            order = sorted(range(len(family)), key=lambda i: (members[i].split != "val", members[i].sha256))
            family, members = family[order], [members[i] for i in order]
            names = dict(zip(family.tolist(), members, strict=True))
            for number, other, match in found.choose(family):
                gone[number] = True
                names[number] = names[number]._replace(
                    near=names[other].sha256, iou=f"{match.iou:.4f}", axes=axes_of(match.symmetry)
                )
            report += names.values()
            progress(progress.done + 1)
    val = {member.sha256 for member in report if member.split == "val"}
    train_near_val = sum(member.split == "train" and member.near in val for member in report)
    print(f"{count(int(gone.sum()), 'object')} may go; {train_near_val} of them of train, near to one of val")
    if args.output is not None:
        chosen = np.flatnonzero(~gone)
        shards = write_objects(dataset, chosen, args.output)
        print(f"{args.output}: {count(len(chosen), 'object')} in {count(shards, 'shard')}")
    _write_report(args.report, report, Member._fields[:-1])


# --- split --------------------------------------------------------------------------------------------------------


def run_split(args: argparse.Namespace) -> None:
    _check(args)
    if not 0 < args.val < 1:
        raise ConfigError(f"--val {args.val}: must lie between 0 and 1, such as 0.05.")
    dataset = open_roots(args)
    if args.family is not None and args.family not in (known := column_names(dataset)):
        raise ConfigError(f"--family {args.family}: the data have no such column, only {', '.join(sorted(known))}")
    labels = find(dataset, args.iou).family
    if args.family is not None:
        labels = _joined(labels, _values(dataset, args.family))
    deciding = _deciding(dataset, labels)
    splits = [SPLITS[int(name[:8], 16) / 2**32 < args.val] for name in deciding]
    families = families_of(labels)
    _say_families(families, dataset)
    today = dataset.texts("split")
    val = splits.count("val")
    moved = sum(new != old for new, old in zip(splits, today, strict=True))
    print(f"{val} of {len(splits)} val ({val / len(splits):.2%}), {moved} of another split than today")
    if not 0 < val < len(splits):
        print(f"note: all objects would be {splits[0]}: there are too few families for this share")
    if args.output is not None:
        shards = write_objects(dataset, np.arange(len(dataset)), args.output, {"split": splits})
        print(f"{args.output}: {count(len(dataset), 'object')} in {count(shards, 'shard')}")
    if args.report is not None:
        members = [
            member._replace(new_split=splits[index])
            for family in families
            for member, index in zip(_members(dataset, family), family.tolist(), strict=True)
        ]
        _write_report(args.report, members, (*Member._fields[:6], "new_split"))


def _deciding(dataset: SparseStructure, labels: np.ndarray) -> list[str]:
    """Return for each object the sha256 that decides the split of its family.

    It is that of one object of the family, drawn by another hash: the lowest sha256 of a large family is low, so such
    families would all be val.
    """
    names = dataset.texts("sha256")
    drawn: dict[int, tuple[bytes, str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        lot = hashlib.sha256(name.encode()).digest(), name
        drawn[label] = min(drawn.get(label, lot), lot)
    return [drawn[label][1] for label in labels.tolist()]


def _values(dataset: SparseStructure, column: str) -> list[str | None]:
    """Return a column as text, None for no value."""
    values: list[str | None] = []
    for part in chunks(np.arange(len(dataset))):
        found = dataset.columns_of(part).get(column, [None] * len(part))
        values += [None if value is None or value == "" else str(value) for value in found]
    return values


def _joined(labels: np.ndarray, values: list[str | None]) -> np.ndarray:
    """Return labels [N] of families that hold together the given families [N] and the objects of each value."""
    parents = np.arange(len(labels))
    first: dict[str, int] = {}
    for number, (label, value) in enumerate(zip(labels.tolist(), values, strict=True)):
        join(parents, number, label)
        if value is not None:
            join(parents, number, first.setdefault(value, number))
    return np.array([root_of(parents, number) for number in range(len(labels))])
