"""What a checkpoint keeps of the data, and what has changed in them when a run continues.

An object is kept as 8 bytes: 5 of its sha256 and 3 of a hash of its `item_version`, so a million objects take 8 MB.
Two of a million objects share the 5 bytes with a probability of 0.4; such a pair may hide one change.
"""

import hashlib
import os
from typing import Any

import numpy as np
import torch

from ..datasets.base import StandardDatasetBase
from ..datasets.metadata import SETTINGS, Split

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
        "data_dir": ",".join(os.path.abspath(root) for root in dataset.roots),
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
    rows = b"".join(
        bytes.fromhex(sha256)[:NAME_BYTES]
        + hashlib.blake2b(dataset.item_version(root, sha256).encode(), digest_size=VERSION_BYTES).digest()
        for root, sha256 in dataset.instances
    )
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, NAME_BYTES + VERSION_BYTES).clone()


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
    versions = {bytes(row[:NAME_BYTES]): bytes(row[NAME_BYTES:]) for row in old}
    added, replaced, present = [], [], set()
    for index, row in enumerate(new):
        name = bytes(row[:NAME_BYTES])
        present.add(name)
        if name not in versions:
            added.append(index)
        elif versions[name] != bytes(row[NAME_BYTES:]):
            replaced.append(index)
    removed = [name for name in versions if name not in present]
    names = _names(dataset, split)
    found = {
        "added": [names[index] for index in added],
        "removed": [f"{name.hex()}…" for name in removed],
        "replaced (another grid, or another time of its file)": [names[index] for index in replaced],
    }
    texts = [
        f"{len(which)} {what}: {', '.join(which[:SHOWN])}{' and others' if len(which) > SHOWN else ''}"
        for what, which in found.items()
        if which
    ]
    return ["; ".join(texts) or "the same in another order, so epochs go on in another order too"]


def _names(dataset: StandardDatasetBase, split: Split) -> list[str]:
    """Return what each object of a split is called: its first digits and, if there is one, its mesh's file name."""
    if not dataset.split_sizes()[split]:
        return []
    part = dataset.for_split(split)
    return [
        f"{entry.sha256[: 2 * NAME_BYTES]}…"
        + (f" ({os.path.basename(entry.name)})" if entry.name != entry.sha256 else "")
        for entry in part.entries
    ]
