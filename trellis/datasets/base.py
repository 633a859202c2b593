"""What every dataset shares: roots, metadata, filters, the split, and what happens with a bad item.

A bad item is an error. It is never replaced by another one: a damaged folder would train unnoticed.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..utils.errors import DataError
from .metadata import (
    SETTINGS,
    SPLITS,
    Entry,
    Settings,
    Split,
    check_sha256,
    compare_settings,
    entries_of,
    settings_of_rows,
)

if TYPE_CHECKING:
    from pandas import DataFrame


class StandardDatasetBase(Dataset, ABC):
    """Objects of one or several roots, named by sha256, filtered by their metadata, in one split.

    A subclass says how a root lists its objects (`read_root`), which of them it keeps (`filter_metadata`) and
    what an item is (`get_instance`). It may give batches a compact form on their way to the device (`get_batch`,
    `unpack_batch`), and show training items in several forms (`augment`).

    roots: comma-separated paths.
    split: "train", "val" or "all". If the metadata do not say, 5 % of all sha256 are validation, so objects that
        are added later do not move the others.
    Raise DataError for an unusable root, for roots that differ in their normalization, or if no object is left.

    Attributes:
        instances: list of (root, sha256), in the order of the roots and of their metadata.
        entries: what is known about each instance.
        settings: {root: what it says of how its grids were made}.
        notes: what a user should know about roots that differ.
    """

    runtime_args = ("roots", "split")  # given by the program, not by a configuration

    def __init__(self, roots: str, *, split: Split = "train"):
        self.roots = [root.strip() for root in roots.split(",")]
        if not all(self.roots):
            raise DataError(f"data_dir {roots!r} has an empty entry; give folders or .npz files, separated by commas")
        self._all_entries: list[Entry] = []
        self._report: dict[str, str] = {}
        self.settings: dict[str, Settings] = {}
        for root in self.roots:
            self._add_root(root)
        self.notes = compare_settings(self.settings)
        self._select(split)

    @abstractmethod
    def read_root(self, root: str) -> "DataFrame":
        """Return one row per object of a root: `sha256` and, if known, `name`, `source`, `split`.

        `attrs["path"]` of the result is what errors call it.
        """

    @abstractmethod
    def get_instance(self, root: str, instance: str) -> dict[str, Tensor]:
        """Return the item of an object."""

    def filter_metadata(self, metadata: "DataFrame") -> tuple["DataFrame", dict[str, int | None]]:
        """Return the rows to keep, and how many rows each filter removed, or None if it could not be applied.

        Subclasses extend the result of super().
        """
        return metadata, {}

    def check_files(self, root: str, metadata: "DataFrame") -> None:  # noqa: B027 - optional hook
        """Raise DataError if files of the rows that passed the filters are missing."""

    def _add_root(self, root: str) -> None:
        if root in self._report:
            raise DataError(f"{root}: is given twice in data_dir")
        metadata = self.read_root(root)
        where = metadata.attrs["path"]
        listed = len(metadata)
        if not listed:
            raise DataError(f"{where}: lists no object. Run voxelize.py on the meshes first.")
        check_sha256(where, metadata["sha256"])

        metadata, stats = self.filter_metadata(metadata)
        notes = [
            f"{removed} removed by {name}" if removed is not None else f"{name} NOT applied (no such column)"
            for name, removed in stats.items()
        ]
        known = {entry.sha256 for entry in self._all_entries}
        repeated = metadata["sha256"].isin(known)
        if repeated.any():
            notes.append(f"{int(repeated.sum())} removed as repeating an earlier root")
            metadata = metadata[~repeated]
        if not len(metadata):
            raise DataError(
                f"{where}: none of {listed} objects is left: {'; '.join(notes)}. "
                "Relax the filter or leave this root out."
            )
        self.check_files(root, metadata)
        self.settings[root] = {name: settings_of_rows(metadata, name) for name in SETTINGS}

        entries = entries_of(root, where, metadata)
        self._all_entries += entries
        val = sum(entry.split == "val" for entry in entries)
        notes.append(f"{len(entries)} kept: {len(entries) - val} train, {val} val")
        self._report[root] = f"{listed} listed; {'; '.join(notes)}"

    def _select(self, split: str) -> None:
        self.split = split
        self.entries = [entry for entry in self._all_entries if split in (entry.split, "all")]
        self.instances = [(entry.root, entry.sha256) for entry in self.entries]
        if not self.instances:
            raise DataError(
                f"{','.join(self.roots)}: no object is in split {split!r} "
                f"({self.split_sizes()}). Set `split` of some objects in metadata.csv, before packing, add objects, "
                "or choose another split (evaluate.py --split all)."
            )

    def for_split(self, split: Split) -> "StandardDatasetBase":
        """Return the same data restricted to another split; nothing is read again.

        Raise DataError if that split is empty; `split_sizes` tells beforehand.
        """
        other = copy.copy(self)
        other._select(split)
        return other

    def split_sizes(self) -> dict[str, int]:
        """Return the number of objects in each split after the filters, whatever this dataset's own split."""
        return {split: sum(entry.split == split for entry in self._all_entries) for split in SPLITS}

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.get_instance(*self.instances[index])

    @property
    def in_memory(self) -> bool:
        """Whether all items are in memory, so that loading processes would only cost time."""
        return False

    def get_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the items at these indices, [B] int64, stacked and in the form that is moved to the device."""
        return default_collate([self[index] for index in indices.tolist()])

    def unpack_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch of `get_batch`, on any device, as stacked items there. Leave other entries as they are."""
        return batch

    def augment(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return an unpacked batch with its items in the forms that are trained on.

        The form of an item may depend only on `seed` and on its number in `sample_ids`, [B] int64 on the CPU:
        then neither the number of ranks nor an interruption changes it. Validation and pictures take items as they
        are stored.
        """
        return batch

    def content_key(self) -> dict[str, str | int]:
        """Return what identifies the items of this split in their order, for files that are made from them.

        A subclass adds those of its arguments that change an item.
        """
        digest = hashlib.sha256()
        for root, sha256 in self.instances:
            digest.update(f"{sha256} {self.item_version(root, sha256)}\n".encode())
        return {"dataset": type(self).__name__, "objects": len(self), "data": digest.hexdigest()}

    def item_version(self, root: str, instance: str) -> str:
        """Return text that changes if an object's item is made anew. Cheap: it is called for every object.

        The sha256 does not suffice. It often belongs to a mesh, which gives another grid with another up axis.
        """
        return ""

    def sha256(self, index: int) -> str:
        """Return the sha256 that names an object."""
        return self.entries[index].sha256

    def name(self, index: int) -> str:
        """Return the name of the mesh file if the root has it, else the sha256."""
        return self.entries[index].name

    def source(self, index: int) -> str | None:
        """Return the collection an object comes from, None if the root does not say."""
        return self.entries[index].source

    def kind(self, index: int) -> str | None:
        """Return what an object is, such as "anatomy", None if the root does not say."""
        return self.entries[index].kind

    def summary(self) -> str:
        """Return a line for the whole dataset, a line per root (counts, and what each filter removed), and notes."""
        total = len(self._all_entries)
        lines = [f"{type(self).__name__}, split {self.split}: {len(self)} of {total} objects"]
        lines += [f"  {root}: {report}" for root, report in self._report.items()]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    __str__ = summary
