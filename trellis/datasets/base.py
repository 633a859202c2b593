"""What every dataset shares: roots, metadata, filters, the split, and what happens with a bad item.

A bad item is an error. It is never replaced by another one: a damaged folder would train unnoticed.
"""

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from operator import eq
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..utils.errors import ConfigError, DataError
from .metadata import SETTINGS, SPLITS, Entry, Settings, Split, compare_settings
from .sampler import Order, Share, shares_of_period
from .tables import FrameTable, Table, keys_of_texts

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")
ROWS_AT_ONCE = 10_000  # of what is looked up for all objects


class Rows(Sequence[T], Generic[T]):
    """A sequence whose elements are made when they are asked for. look_up: makes those of positions, [n] int64."""

    def __init__(self, length: int, look_up: Callable[[np.ndarray], list[T]]):
        self._length, self._look_up = length, look_up

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self._look_up(np.arange(*index.indices(self._length)))
        return self._look_up(np.array([range(self._length)[index]]))[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, self._length, ROWS_AT_ONCE):
            yield from self._look_up(np.arange(start, min(start + ROWS_AT_ONCE, self._length)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list


class StandardDatasetBase(Dataset, ABC):
    """Objects of one or several roots, named by sha256, filtered by their metadata, in one split.

    A subclass says how a root lists its objects (`read_root`), which of them it keeps (`filter_metadata`) and
    what an item is (`get_instance`). It may give batches a compact form on their way to the device (`get_batch`,
    `unpack_batch`), and show training items in several forms (`augment`).

    roots: comma-separated paths.
    weights: one of each root, in their order: the shares in which training samples are drawn from them. Objects of a
        root of weight 0 are not in the training split, only in the others. None: all objects alike.
    split: "train", "val" or "all". If the metadata do not say, 5 % of all sha256 are validation, so objects that
        are added later do not move the others.
    Raise DataError for an unusable root, for roots that differ in their normalization, or if no object is left;
    ConfigError for weights that are no shares or, in the training split, not one of each root. (A configuration's
    weights say nothing about other roots, on which its model is evaluated.)

    Attributes:
        settings: {root: what it says of how its grids were made}.
        notes: what a user should know about roots that differ.
    """

    runtime_args = ("roots", "split")  # given by the program, not by a configuration
    filter_columns: tuple[str, ...] = ()
    """The columns that `filter_metadata` reads beside sha256. Roots that need not be read whole give it no others."""

    def __init__(self, roots: str, *, weights: Sequence[float] | None = None, split: Split = "train"):
        self.roots = [root.strip() for root in roots.split(",")]
        if not all(self.roots):
            raise DataError(f"data_dir {roots!r} has an empty entry; give folders or .npz files, separated by commas")
        self.weights = _checked_weights(weights, self.roots, split)
        self._tables: list[Table] = []
        self._report: dict[str, str] = {}
        self.settings: dict[str, Settings] = {}
        for root in self.roots:
            self._add_root(root)
        self.notes = compare_settings(self.settings)
        self._offsets = np.cumsum([0, *map(len, self._tables)])  # the first object of each root, and the end
        self._splits = np.concatenate([table.splits for table in self._tables])
        self._select(split)

    @abstractmethod
    def read_root(self, root: str) -> "DataFrame | Table":
        """Return one row per object of a root: `sha256` and, if known, `name`, `source`, `split`.

        `attrs["path"]` of a DataFrame is what errors call it.
        """

    @abstractmethod
    def get_instance(self, root: str, instance: str) -> dict[str, Tensor]:
        """Return the item of an object."""

    def filter_metadata(self, metadata: "DataFrame") -> tuple["DataFrame", dict[str, int | None]]:
        """Return the rows to keep, and how many rows each filter removed, or None if it could not be applied.

        Rows keep their index, which says where they stand. Subclasses extend the result of super(), and
        `filter_columns` by what they read.
        """
        return metadata, {}

    def check_files(self, root: str, metadata: "DataFrame") -> None:  # noqa: B027 - optional hook
        """Raise DataError if files of the rows that passed the filters are missing."""

    def _add_root(self, root: str) -> None:
        if root in self._report:
            raise DataError(f"{root}: is given twice in data_dir")
        table = self.read_root(root)
        if not isinstance(table, Table):
            table = FrameTable(root, table)
        listed = len(table)
        if not listed:
            raise DataError(f"{table.where}: lists no object. Run voxelize.py on the meshes first.")
        table.check_keys()

        metadata, stats = self.filter_metadata(table.frame(self.filter_columns))
        rows = metadata.index.to_numpy()
        all_kept = len(rows) == listed and np.array_equal(rows, np.arange(listed))
        if not all_kept and not np.array_equal(keys_of_texts(metadata["sha256"]), table.keys[rows]):
            raise ValueError(f"{type(self).__name__}.filter_metadata must keep the index of its rows")
        notes = [
            f"{removed} removed by {name}" if removed is not None else f"{name} NOT applied (no such column)"
            for name, removed in stats.items()
        ]
        repeated = self._known(table, rows)
        if repeated.any():
            notes.append(f"{int(repeated.sum())} removed as repeating an earlier root")
            metadata, rows, all_kept = metadata[~repeated], rows[~repeated], False
        if not len(rows):
            raise DataError(
                f"{table.where}: none of {listed} objects is left: {'; '.join(notes)}. "
                "Relax the filter or leave this root out."
            )
        self.check_files(root, metadata)
        table.keep(None if all_kept else rows)
        self.settings[root] = {name: table.setting(name) for name in SETTINGS}

        self._tables.append(table)
        train, val = (int((table.splits == number).sum()) for number in range(len(SPLITS)))
        notes.append(f"{train + val} kept: {train} train, {val} val")
        self._report[root] = "; ".join([f"{listed} listed", *table.notes, *notes])

    def _known(self, table: Table, rows: np.ndarray) -> np.ndarray:
        """Return which rows [n] of a table repeat an object of an earlier root, [n] bool."""
        repeated = np.zeros(len(rows), bool)
        for earlier in self._tables:
            alike = np.flatnonzero(np.isin(table.keys[rows], earlier.keys))
            if len(alike):
                theirs = np.flatnonzero(np.isin(earlier.keys, table.keys[rows[alike]]))
                names = set(earlier.sha256s(theirs))
                repeated[alike] |= [name in names for name in table.sha256s(rows[alike])]
        return repeated

    def _select(self, split: str) -> None:
        self.split = split
        # The numbers of this split's objects among all, ascending.
        self._objects = np.arange(len(self._splits)) if split == "all" else np.flatnonzero(self._is_in(split))
        if not len(self._objects):
            raise DataError(
                f"{','.join(self.roots)}: no object is in split {split!r} "
                f"({self.split_sizes()}). Set `split` of some objects in metadata.csv, before packing, add objects, "
                "or choose another split (evaluate.py --split all)."
            )
        self.shares: list[Share] | None = self._shares() if split == "train" and self.weights else None

    def _is_in(self, split: str) -> np.ndarray:
        """Return which of all objects are in a split, [N] bool."""
        chosen = self._splits == SPLITS.index(split)
        if split == "train" and self.weights:
            chosen &= np.repeat(np.array(self.weights) > 0, np.diff(self._offsets))
        return chosen

    def _shares(self) -> list[Share]:
        """Return the parts of the training split, and their weights. Raise DataError for one without samples."""
        ends = np.searchsorted(self._objects, self._offsets)
        assert self.weights is not None
        shares = {
            root: Share(int(size), weight)
            for root, size, weight in zip(self.roots, np.diff(ends), self.weights, strict=True)
            if weight > 0
        }
        counts = shares_of_period([share.weight for share in shares.values()])
        for (root, share), count in zip(shares.items(), counts, strict=True):
            if not share.size:
                raise DataError(f"{root}: has no training object, but weight {share.weight:g}. Give it weight 0.")
            if not count:
                raise ConfigError(
                    f"dataset.args.weights: {share.weight:g} of {root} is less than one of {sum(counts)} samples; "
                    "give it more, or 0"
                )
        return [*shares.values()]

    def order(self, seed: int) -> Order:
        """Return the order in which training sees the objects of this split."""
        return Order(len(self), seed, self.shares)

    def for_split(self, split: Split) -> "StandardDatasetBase":
        """Return the same data restricted to another split; nothing is read again.

        Raise DataError if that split is empty; `split_sizes` tells beforehand.
        """
        other = copy.copy(self)
        other._select(split)
        return other

    def split_sizes(self) -> dict[str, int]:
        """Return the number of objects in each split after the filters, whatever this dataset's own split."""
        return {split: int(self._is_in(split).sum()) for split in SPLITS}

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def instances(self) -> Rows[tuple[str, str]]:
        """(root, sha256) of each object, in the order of the roots and of their metadata."""
        return Rows(
            len(self),
            lambda indices: [*zip(self.texts("root", indices), self.texts("sha256", indices), strict=True)],
        )

    @property
    def entries(self) -> Rows[Entry]:
        """What is known about each object, looked up when it is asked for. For one column of many use `texts`."""
        return Rows(len(self), self._entries_at)

    def _entries_at(self, indices: np.ndarray) -> list[Entry]:
        columns = (self.texts(name, indices) for name in Entry._fields)
        return [Entry(*values) for values in zip(*columns, strict=True)]

    def texts(self, name: str, indices: np.ndarray | None = None) -> list[Any]:
        """Return a field of `Entry` of objects: of those at indices [n] int64, or of all."""
        if name not in Entry._fields:
            raise ValueError(f"{name} is no field of an Entry: {', '.join(Entry._fields)}")
        numbers = self._objects if indices is None else self._objects[indices]
        if name == "split":
            return [SPLITS[number] for number in self._splits[numbers].tolist()]
        if name == "root":
            roots = [table.root for table in self._tables]
            return [roots[place] for place in self._places(numbers)[0].tolist()]

        def look_up(table: Table, rows: np.ndarray) -> list[Any]:
            if name == "sha256":
                return table.sha256s(rows)
            found = table.texts(name, rows)
            if name != "name":
                return found
            return [own or sha256 for own, sha256 in zip(found, table.sha256s(rows), strict=True)]

        return self._gather(numbers, look_up)

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the table and the row in it of objects, [n] int64 each. numbers: theirs among all, [n] int64."""
        places = np.searchsorted(self._offsets, numbers, side="right") - 1
        return places, numbers - self._offsets[places]

    def _gather(self, numbers: np.ndarray, look_up: Callable[[Table, np.ndarray], list[T]]) -> list[T]:
        """Return what `look_up` says of the rows of each table, in the order of the numbers [n] int64."""
        places, rows = self._places(numbers)
        used = np.unique(places).tolist()
        if len(used) == 1:
            return look_up(self._tables[used[0]], rows)
        found: list[Any] = [None] * len(numbers)
        for place in used:
            own = np.flatnonzero(places == place)
            for at, value in zip(own.tolist(), look_up(self._tables[place], rows[own]), strict=True):
                found[at] = value
        return found

    def columns_of(self, indices: np.ndarray) -> dict[str, list[Any]]:
        """Return what is known about objects, as columns of a shard: {name: n values}, None for what is not known.

        indices: [n] int64.
        With `sha256` and `split`; without the grid and what follows from it. See `shards`.
        """
        numbers = self._objects[indices]
        places, rows = self._places(numbers)
        found: dict[str, list[Any]] = {"sha256": self.texts("sha256", indices), "split": self.texts("split", indices)}
        for place in np.unique(places).tolist():
            own = np.flatnonzero(places == place)
            for name, values in self._tables[place].columns(rows[own]).items():
                column = found.setdefault(name, [None] * len(numbers))
                for at, value in zip(own.tolist(), values, strict=True):
                    column[at] = value
        return found

    def find(self, sha256s: Sequence[str]) -> np.ndarray:
        """Return the index of the object of each name, [n] int64; -1 if it is not in this split."""
        keys = self.keys()
        order = np.argsort(keys, kind="stable")
        wanted = keys_of_texts(sha256s)
        found = np.full(len(wanted), -1)
        first, end = (np.searchsorted(keys, wanted, side, sorter=order) for side in ("left", "right"))
        for run in range(int((end - first).max(initial=0))):  # one, unless two names share 8 bytes
            at = np.flatnonzero(first + run < end)
            candidates = order[first[at] + run]
            names = self.texts("sha256", candidates)
            right = [name == sha256s[number] for name, number in zip(names, at.tolist(), strict=True)]
            found[at[right]] = candidates[right]
        return found

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
        for start in range(0, len(self), ROWS_AT_ONCE):
            indices = np.arange(start, min(start + ROWS_AT_ONCE, len(self)))
            for sha256, version in zip(self.texts("sha256", indices), self.versions(indices), strict=True):
                digest.update(f"{sha256} {version}\n".encode())
        return {"dataset": type(self).__name__, "objects": len(self), "data": digest.hexdigest()}

    def versions(self, indices: np.ndarray) -> list[str]:
        """Return `item_version` of the objects at indices [n] int64."""
        return [self.item_version(*self.instances[index]) for index in indices.tolist()]

    def item_version(self, root: str, instance: str) -> str:
        """Return text that changes if an object's item is made anew. Cheap: it is called for every object.

        The sha256 does not suffice. It often belongs to a mesh, which gives another grid with another up axis.
        """
        return ""

    def keys(self) -> np.ndarray:
        """Return the first 8 bytes of each object's sha256, [N] uint64."""
        return np.concatenate([table.keys for table in self._tables])[self._objects]

    def sha256(self, index: int) -> str:
        """Return the sha256 that names an object."""
        return self.texts("sha256", np.array([index]))[0]

    def name(self, index: int) -> str:
        """Return the name of the mesh file if the root has it, else the sha256."""
        return self.texts("name", np.array([index]))[0]

    def source(self, index: int) -> str | None:
        """Return the collection an object comes from, None if the root does not say."""
        return self.texts("source", np.array([index]))[0]

    def kind(self, index: int) -> str | None:
        """Return what an object is, such as "anatomy", None if the root does not say."""
        return self.texts("kind", np.array([index]))[0]

    def summary(self) -> str:
        """Return a line for the whole dataset, a line per root (counts, and what each filter removed), and notes."""
        total = len(self._splits)
        lines = [f"{type(self).__name__}, split {self.split}: {len(self)} of {total} objects"]
        lines += [f"  {root}: {report}" for root, report in self._report.items()]
        if self.weights:
            drawn = [
                f"{weight / sum(self.weights):.2%} from {root}"
                for root, weight in zip(self.roots, self.weights, strict=True)
            ]
            lines.append(f"  training samples: {', '.join(drawn)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    __str__ = summary


def _checked_weights(weights: Sequence[float] | None, roots: list[str], split: str) -> list[float] | None:
    """Return the weights of roots, None if there are none. Raise ConfigError for those that are no shares."""
    if weights is None:
        return None
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if wrong or not any(weights):
        what = f"has {wrong[0]}" if wrong else "has no weight above 0"
        raise ConfigError(f"dataset.args.weights {what}; give a number >= 0 for each root, one of them above 0")
    if len(weights) == len(roots):
        return [float(weight) for weight in weights]
    if split == "train":
        raise ConfigError(
            f"dataset.args.weights is {list(weights)}, but data_dir has {len(roots)} roots "
            f"({', '.join(roots)}); give one for each, in their order, or null"
        )
    return None
