"""Tables: what roots say about their objects, a column at a time, so that a million objects take little memory.

A table has the objects of one root in its order, a row each. What is needed of all objects at once, their names and
splits, is in arrays; texts are looked up row by row.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import DataError
from .metadata import (
    NAME_COLUMNS,
    SPLITS,
    VAL_FRACTION,
    check_sha256,
    settings_of_rows,
)

if TYPE_CHECKING:
    from pandas import DataFrame

HEX = np.full(256, 255, np.uint8)  # the value of each lower-case hexadecimal digit, 255 for what is none
HEX[list(b"0123456789abcdef")] = np.arange(16)
DIGITS = 64  # of a sha256
ENTRY_TEXTS = ("name", "source", "kind", "frame")  # what an Entry has beside names and splits


def keys_of(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first 8 bytes of sha256s, [N] uint64, and which of them are valid, [N] bool.

    digits: their characters, [N, 64] uint8.
    """
    values = HEX[digits]
    pairs = values[:, :16:2] << 4 | values[:, 1:16:2]
    return np.ascontiguousarray(pairs).view(">u8")[:, 0].astype(np.uint64), values.max(1) < 16


def keys_of_texts(names: Iterable[str]) -> np.ndarray:
    """Return the first 8 bytes of valid sha256s, [N] uint64."""
    return np.fromiter((int(name[:16], 16) for name in names), np.uint64)


def splits_of(keys: np.ndarray) -> np.ndarray:
    """Return the split of objects whose root does not say, [N] uint8: the number in SPLITS. See `metadata.split_of`."""
    return ((keys >> np.uint64(32)).astype(np.float64) / 2**32 < VAL_FRACTION).astype(np.uint8)


class Texts:
    """A column of text, each different value once, in UTF-8. Blanks are None."""

    def __init__(self, values: Iterable[Any]):
        import pandas as pd

        objects = np.array([str(value) if value is not None and value != "" else None for value in values], object)
        self._codes, different = pd.factorize(objects)
        self._codes = self._codes.astype(np.int32)  # -1: blank
        encoded = [value.encode("utf-8", "surrogatepass") for value in different]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._codes)

    def at(self, rows: np.ndarray) -> list[str | None]:
        """Return the texts of rows, [n] int64."""
        codes = self._codes[rows]
        starts, ends = self._ends[codes].tolist(), self._ends[codes + 1].tolist()
        return [
            None if code < 0 else self._bytes[start:end].decode("utf-8", "surrogatepass")
            for code, start, end in zip(codes.tolist(), starts, ends, strict=True)
        ]


class Table(ABC):
    """The objects of a root: first all that it lists, after `keep` those that passed the filters.

    root: as the user gave it. where: what errors call it.
    keys: the first 8 bytes of each sha256, [N] uint64.
    splits: the number in SPLITS of each object, [N] uint8; set by `keep`.
    notes: what a summary should say.
    """

    root: str
    where: str
    keys: np.ndarray
    splits: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @abstractmethod
    def frame(self, columns: tuple[str, ...]) -> "DataFrame":
        """Return the table to filter, before `keep`: at least these of its columns, its index the rows."""

    @abstractmethod
    def keep(self, rows: np.ndarray | None) -> None:
        """Keep these rows [n] int64, all if None, in this order. Raise DataError for a split that does not exist."""

    @abstractmethod
    def sha256s(self, rows: np.ndarray) -> list[str]:
        """Return the names of rows, [n] int64."""

    @abstractmethod
    def texts(self, name: str, rows: np.ndarray) -> list[str | None]:
        """Return one of ENTRY_TEXTS of rows, [n] int64; None for a blank, or if the root has no such column."""

    @abstractmethod
    def setting(self, name: str) -> set[str | None]:
        """Return the values of one of SETTINGS; None stands for objects that do not say."""

    @abstractmethod
    def columns(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """Return what the root says about rows [n] int64: {column of a shard: values}, see `shards`; None for a blank.

        Without sha256, split, and what follows from the grid.
        """

    def check_keys(self) -> None:
        """Raise DataError if an object is listed twice."""
        repeated = repetitions(self.keys, self.sha256s)
        if len(repeated):
            raise DataError(
                f"{self.where}: sha256 {self.sha256s(repeated[:1])[0]} is listed twice ({len(repeated)} "
                "repetitions in all). Remove the repeated rows."
            )


def repetitions(keys: np.ndarray, sha256s: Any) -> np.ndarray:
    """Return the rows [n] int64, ascending, whose sha256 an earlier row has. sha256s: returns the names of rows."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    if not same.any():
        return np.empty(0, np.int64)
    alike = np.sort(order[np.concatenate([[False], same]) | np.concatenate([same, [False]])])
    seen: set[str] = set()
    repeated = []
    for row, name in zip(alike.tolist(), sha256s(alike), strict=True):
        if name in seen:
            repeated.append(row)
        seen.add(name)
    return np.array(repeated, np.int64)


class FrameTable(Table):
    """A root's table as pandas read it.

    metadata: one row per object, `sha256` and, if known, `name`, `source` and others; `attrs["path"]` is what errors
        call it.
    """

    def __init__(self, root: str, metadata: "DataFrame"):
        self.root, self.where = root, metadata.attrs["path"]
        self._frame = metadata.reset_index(drop=True)
        self._frame.attrs = metadata.attrs
        check_sha256(self.where, self._frame["sha256"])
        self._digits = np.array(self._frame["sha256"].tolist(), f"S{DIGITS}")
        self.keys = keys_of(self._digits.view(np.uint8).reshape(-1, DIGITS))[0]

    def frame(self, columns: tuple[str, ...]) -> "DataFrame":
        return self._frame

    def keep(self, rows: np.ndarray | None) -> None:
        metadata = self._frame
        if rows is not None:
            metadata = metadata.loc[rows]
            self.keys, self._digits = self.keys[rows], self._digits[rows]
        self.rows = rows
        self._settings = {name: settings_of_rows(metadata, name) for name in ("up_axis", "normalization", "fill")}
        self._texts = {name: Texts(values) for name in self.kept_texts() if (values := _first(metadata, name))}
        self.splits = splits_of(self.keys)
        given = _first(metadata, "split")
        for row, split in enumerate(given or ()):
            if split is None:
                continue
            if split not in SPLITS:
                raise DataError(
                    f"{self.where}: split of {metadata['sha256'].iloc[row]} is {split!r}; it must be train, val or "
                    "blank"
                )
            self.splits[row] = SPLITS.index(split)
        del self._frame

    def kept_texts(self) -> tuple[str, ...]:
        """Return the names of the columns of text to keep in memory."""
        return ENTRY_TEXTS

    def sha256s(self, rows: np.ndarray) -> list[str]:
        return self._digits[rows].astype(f"U{DIGITS}").tolist()

    def texts(self, name: str, rows: np.ndarray) -> list[str | None]:
        return self._texts[name].at(rows) if name in self._texts else [None] * len(rows)

    def setting(self, name: str) -> set[str | None]:
        return self._settings[name]

    def columns(self, rows: np.ndarray) -> dict[str, list[Any]]:
        return {name: typed(self.where, name, texts.at(rows)) for name, texts in self._texts.items()}


def _first(metadata: "DataFrame", name: str) -> list[str | None] | None:
    """Return a column as text, None for a blank; None if there is no such column. `name` has several names."""
    for column in NAME_COLUMNS if name == "name" else (name,):
        if column in metadata:
            return [
                str(value) if present and value != "" else None
                for value, present in zip(metadata[column], metadata[column].notna(), strict=True)
            ]
    return None


def typed(where: str, name: str, values: list[str | None]) -> list[Any]:
    """Return texts of a column as a shard has them: numbers, lists of captions, or text.

    where: what errors call the table.
    Raise DataError for what is no number.
    """
    if name in ("mm_per_cell", "aesthetic_score"):
        return [None if value is None else _number(where, name, value) for value in values]
    if name == "captions":
        return [None if value is None else _captions(value) for value in values]
    return list(values)


def _number(where: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{where}: {name} is {text!r} and no number. Correct it or leave it blank.") from None


def _captions(text: str) -> list[str]:
    """Return captions: a JSON list of texts, as TRELLIS's metadata have them, or else one caption."""
    try:
        found = json.loads(text)
    except ValueError:
        return [text]
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else [text]
