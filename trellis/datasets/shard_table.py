"""The objects of a root of shards: a folder of Arrow files, or one such file, see `shards`.

Columns stay in the mapped files, so that all processes of a machine share them, and a million objects take 17 MB of
each.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import DataError
from .metadata import SPLIT_IN_NAME, SPLITS
from .shards import TYPES, Shard, arrow_type
from .tables import DIGITS, Table, keys_of, repetitions, splits_of

if TYPE_CHECKING:
    from pandas import DataFrame

FROM_GRID = ("grid", "checksum", "num_voxels")  # columns that follow from the grids


class ShardTable(Table):
    """The objects of some shards in the order of the files and of their rows.

    An object that stands in several of them, as when two processes met the same mesh, counts once, where it is first.
    files: paths, and what errors call each; at least one.
    Raise ConfigError without pyarrow, DataError for a damaged file, files of several resolutions, or an object with
    different grids.
    """

    def __init__(self, root: str, files: list[tuple[Path, str]]):
        self.root = self.where = root
        self.shards = [Shard(path, name) for path, name in files]
        self.resolution = self.shards[0].resolution
        for shard in self.shards:
            if shard.resolution != self.resolution:
                raise DataError(
                    f"{shard.name}: has grids of resolution {shard.resolution}, but those of {self.shards[0].name} "
                    f"have {self.resolution}. Keep files of one resolution in a folder."
                )
        self._starts = np.cumsum([0, *map(len, self.shards)])  # the first row of each file, and the end
        self.keys = np.concatenate([_keys(shard) for shard in self.shards])
        self._rows: np.ndarray | None = None  # the rows of the files that are objects; None: all
        self._drop_repetitions()

    def _drop_repetitions(self) -> None:
        repeated = repetitions(self.keys, self.sha256s)
        if not len(repeated):
            return
        alike = np.flatnonzero(np.isin(self.keys, self.keys[repeated]))
        first: dict[str, int] = {}
        for row, name in zip(alike.tolist(), self.sha256s(alike), strict=True):
            if first.setdefault(name, row) != row:
                self._compare(name, first[name], row)
        kept = np.ones(len(self.keys), bool)
        kept[repeated] = False
        self._rows = np.flatnonzero(kept)
        self.keys = self.keys[self._rows]
        self.notes = (f"{len(repeated)} in several files counted once",)

    def _compare(self, name: str, first: int, second: int) -> None:
        """Raise DataError unless two rows of an object are in two files and have the same grid."""
        (one, row), (other, other_row) = self._place(first), self._place(second)
        if one is other:
            raise DataError(
                f"{one.name}: sha256 {name} is listed twice. Delete the file and repeat the command that made it."
            )
        same = one.checksums[row] == other.checksums[other_row]
        if not same and not np.array_equal(one.bits(row), other.bits(other_row)):
            raise DataError(f"{other.name}: has another grid of {name} than {one.name}. Remove one of the files.")

    def _place(self, row: int) -> tuple[Shard, int]:
        """Return the file of a row of the files, and the row in it."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.shards[number], row - int(self._starts[number])

    def _of_files(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._rows is None else self._rows[rows]

    def frame(self, columns: tuple[str, ...]) -> "DataFrame":
        import pandas as pd
        import pyarrow as pa

        found = {}
        for name in ("sha256", *columns):
            if any(name in shard.names for shard in self.shards):
                chunks = [
                    shard.column(name) if name in shard.names else pa.nulls(len(shard), arrow_type(name))
                    for shard in self.shards
                ]
                column = pa.chunked_array(chunks)
                found[name] = pd.arrays.ArrowExtensionArray(column if self._rows is None else column.take(self._rows))
        metadata = pd.DataFrame(found, copy=False)
        metadata.attrs["path"] = self.where
        return metadata

    def keep(self, rows: np.ndarray | None) -> None:
        if rows is not None:
            self.keys, self._rows = self.keys[rows], self._of_files(rows)
        self.splits = splits_of(self.keys)
        for shard, own, chosen in self._parts(np.arange(len(self))):
            _set_splits(shard, own, chosen, self.splits)

    def _parts(self, rows: np.ndarray) -> list[tuple[Shard, np.ndarray, np.ndarray]]:
        """Return, for each file that has some of the rows [n]: the file, their rows in it, and their places in [n]."""
        rows = self._of_files(rows)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        parts = []
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            parts.append((self.shards[number], rows[chosen] - self._starts[number], chosen))
        return parts

    def _values(self, name: str, rows: np.ndarray) -> list[Any]:
        found: list[Any] = [None] * len(rows)
        for shard, own, chosen in self._parts(rows):
            if name in shard.names:
                for place, value in zip(chosen.tolist(), shard.column(name).take(own).to_pylist(), strict=True):
                    found[place] = value
        return found

    def sha256s(self, rows: np.ndarray) -> list[str]:
        return self._values("sha256", rows)

    def texts(self, name: str, rows: np.ndarray) -> list[str | None]:
        return [value or None for value in self._values(name, rows)]

    def setting(self, name: str) -> set[str | None]:
        values: set[str | None] = set()
        for shard, own, _ in self._parts(np.arange(len(self))):
            values |= shard.setting(name, None if len(own) == len(shard) else own)
        return values

    def columns(self, rows: np.ndarray) -> dict[str, list[Any]]:
        names = {name for shard in self.shards for name in shard.names} - {*FROM_GRID, "sha256", "split"}
        ordered = [name for name in TYPES if name in names] + sorted(names - TYPES.keys())
        return {name: self._values(name, rows) for name in ordered}

    def bits(self, rows: np.ndarray) -> np.ndarray:
        """Return grids as bits, uint8 [n, R^3 / 8]. Raise DataError for one that is damaged."""
        rows = self._of_files(rows)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        own = rows - self._starts[numbers]
        bits = np.empty((len(rows), self.resolution**3 // 8), np.uint8)
        for place, (number, row) in enumerate(zip(numbers.tolist(), own.tolist(), strict=True)):
            bits[place] = self.shards[number].bits(row)
        return bits

    def versions(self, rows: np.ndarray) -> list[str]:
        """Return the checksums of grids, as the files have them."""
        found = np.empty(len(rows), np.uint32)
        for shard, own, chosen in self._parts(rows):
            found[chosen] = shard.checksums[own]
        return [f"{checksum:08x}" for checksum in found.tolist()]


def _keys(shard: Shard) -> np.ndarray:
    """Return the first 8 bytes of the sha256s of a shard, [N] uint64. Raise DataError for what is no sha256."""
    column = shard.column("sha256")
    offsets, characters = (np.frombuffer(buffer, kind) for buffer, kind in zip(column.buffers()[1:], "ib", strict=True))
    offsets = offsets[: len(shard) + 1]
    right = np.diff(offsets) == DIGITS
    if right.all():
        keys, right = keys_of(characters.view(np.uint8)[: DIGITS * len(shard)].reshape(-1, DIGITS))
    if column.null_count or not right.all():
        first = column.to_pylist()[int(np.argmin(right & np.asarray(column.is_valid())))]
        raise DataError(f"{shard.name}: sha256 {first!r} is not 64 lower-case hexadecimal digits")
    return keys


def _set_splits(shard: Shard, rows: np.ndarray, places: np.ndarray, splits: np.ndarray) -> None:
    """Write the splits that a shard says for some of its rows [n], or its name for all, to places [n] of `splits`."""
    if "split" not in shard.names:
        if named := SPLIT_IN_NAME.search(shard.path.stem):
            splits[places] = SPLITS.index(named[1].lower())
        return
    column = shard.column("split")
    if len(rows) < len(shard):
        column = column.take(rows)
    coded = column.dictionary_encode()
    codes = np.asarray(coded.indices.fill_null(-1))
    for code, split in enumerate(coded.dictionary.to_pylist()):
        if split == "":
            continue
        here = places[codes == code]
        if split not in SPLITS:
            sha256 = shard.column("sha256")[int(rows[int(np.argmax(codes == code))])]
            raise DataError(f"{shard.name}: split of {sha256} is {split!r}; it must be train, val or blank")
        splits[here] = SPLITS.index(split)
