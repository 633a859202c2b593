"""What a checkpoint keeps of the data, and what has changed in them when a run continues.

An object is kept as 8 bytes: 5 of its sha256 and 3 of a hash of its `item_version`, so a million objects take 8 MB.
Two of a million objects share the 5 bytes with a probability of 0.4; such a pair may hide one change.
"""

import hashlib
import os
from typing import Any

import numpy as np
import torch

from ..datasets.base import ROWS_AT_ONCE, StandardDatasetBase
from ..datasets.metadata import SETTINGS, Split
from ..datasets.remote import absolute

SPLITS: tuple[tuple[Split, str], ...] = (("train", "training"), ("val", "validation"))
NAME_BYTES, VERSION_BYTES = 5, 3
# Names in a line.
SHOWN = 3


def facts_of(dataset: StandardDatasetBase) -> dict[str, Any]:
    """Return what identifies the data of a run, for its checkpoints. Asks every object for its version.

    dataset_size: training objects. data_dir: absolute roots, separated by commas. objects: {split: uint8 [N, 8]} in
    the order of the dataset. settings: {one of SETTINGS: its values over all roots}.
    """
    sizes = dataset.split_sizes()
    parts = {split: dataset.for_split(split) for split, _ in SPLITS if sizes[split]}
    return {
        "dataset_size": len(dataset),
        "data_dir": ",".join(map(absolute, dataset.roots)),
        "objects": {split: _marks(part) for split, part in parts.items()},
        "settings": {
            name: sorted({value or "unknown" for root in dataset.settings.values() for value in root[name]})
            for name in SETTINGS
        },
    }


def same_validation(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the validation objects are known to be those of a checkpoint, in the same order."""
    old, new = (facts.get("objects", {}).get("val") for facts in (before, now))
    return old is not None and new is not None and torch.equal(old, new)


def _marks(dataset: StandardDatasetBase) -> torch.Tensor:
    """Return the 8 bytes of each object, uint8 [N, 8]."""
    marks = np.empty((len(dataset), NAME_BYTES + VERSION_BYTES), np.uint8)
    marks[:, :NAME_BYTES] = dataset.keys().astype(">u8").view(np.uint8).reshape(-1, 8)[:, :NAME_BYTES]
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        part = marks[start : start + ROWS_AT_ONCE]
        versions = dataset.versions(np.arange(start, start + len(part)))
        hashes = b"".join([hashlib.blake2b(each.encode(), digest_size=VERSION_BYTES).digest() for each in versions])
        part[:, NAME_BYTES:] = np.frombuffer(hashes, np.uint8).reshape(-1, VERSION_BYTES)
    return torch.from_numpy(marks)


def changes(before: dict[str, Any], now: dict[str, Any], dataset: StandardDatasetBase) -> list[str]:
    """Return lines on what has changed in the data since a checkpoint; none if nothing has.

    before: a checkpoint's `facts_of`; older ones have dataset_size and data_dir alone. now: those of `dataset`.
    """
    lines = []
    if before.get("data_dir", now["data_dir"]) != now["data_dir"]:
        lines.append(f"--data_dir was {before['data_dir']} and is {now['data_dir']}")
    for name, values in now["settings"].items():
        old = before.get("settings", {}).get(name, values)
        if old != values:
            lines.append(f"{name} of the data was {' and '.join(old)} and is {' and '.join(values)}")
    if "objects" not in before:
        if before["dataset_size"] != now["dataset_size"]:
            lines.append(f"the training split had {before['dataset_size']} objects and has {now['dataset_size']}")
        return lines
    empty = torch.zeros(0, NAME_BYTES + VERSION_BYTES, dtype=torch.uint8)
    for split, words in SPLITS:
        old, new = (facts["objects"].get(split, empty).numpy() for facts in (before, now))
        lines += [f"{words} objects: {text}" for text in _compare(old, new, dataset, split)]
    return lines


def _compare(old: np.ndarray, new: np.ndarray, dataset: StandardDatasetBase, split: Split) -> list[str]:
    """Return a line on what differs between the objects [N, 8] of a split, if anything does."""
    if np.array_equal(old, new):
        return []
    (old_names, old_versions), (new_names, new_versions) = _numbers(old), _numbers(new)
    added = np.flatnonzero(~np.isin(new_names, old_names))
    removed = np.flatnonzero(~np.isin(old_names, new_names))
    order = np.argsort(old_names, kind="stable")
    common = np.flatnonzero(np.isin(new_names, old_names))
    before = order[np.searchsorted(old_names, new_names[common], side="right", sorter=order) - 1]
    replaced = common[old_versions[before] != new_versions[common]]
    found = {
        "added": (len(added), lambda: _names(dataset, split, added[:SHOWN])),
        "removed": (len(removed), lambda: [f"{bytes(old[row, :NAME_BYTES]).hex()}…" for row in removed[:SHOWN]]),
        "replaced (another grid, or another time of its file)": (
            len(replaced),
            lambda: _names(dataset, split, replaced[:SHOWN]),
        ),
    }
    texts = [
        f"{number} {what}: {', '.join(names())}{' and others' if number > SHOWN else ''}"
        for what, (number, names) in found.items()
        if number
    ]
    return ["; ".join(texts) or "the same in another order, so epochs go on in another order too"]


def _numbers(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of names and of versions of marks [N, 8], as numbers [N] each."""
    numbers = np.ascontiguousarray(marks).view(">u8")[:, 0].astype(np.uint64)
    return numbers >> np.uint64(8 * VERSION_BYTES), numbers & np.uint64(256**VERSION_BYTES - 1)


def _names(dataset: StandardDatasetBase, split: Split, indices: np.ndarray) -> list[str]:
    """Return what objects [n] of a split are called: their first digits and, if there is one, the mesh's file name."""
    part = dataset.for_split(split)
    return [
        f"{sha256[: 2 * NAME_BYTES]}…" + (f" ({os.path.basename(name)})" if name != sha256 else "")
        for sha256, name in zip(part.texts("sha256", indices), part.texts("name", indices), strict=True)
    ]
