"""What a data root says about its objects: metadata.csv, or the text arrays of packed files in its place.

metadata.csv has no version: a column may be missing, and unknown columns are kept and ignored. `sha256` alone is
required. A missing `voxelized` means that every object has a grid, a missing `split` that the hash decides, a missing
`normalization` of grids that voxelize.py made "cube", and a missing `up_axis` or `resolution` that it is not known.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..utils.errors import DataError
from .packed import load_text

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SPLITS = ("train", "val")
Split = Literal["train", "val", "all"]
VAL_FRACTION = 0.05
NAME_COLUMNS = ("name", "file", "file_identifier")  # packed files, voxelize.py, TRELLIS
TEXT_COLUMNS = ("sha256", "source", "split", *NAME_COLUMNS)


class Entry(NamedTuple):
    """One object that passed the filters."""

    root: str
    sha256: str
    name: str  # the mesh file if known, else the sha256
    source: str | None  # the collection it comes from, if known
    split: str


def read_metadata(root: str) -> "DataFrame":
    """Read `root/metadata.csv` as a table to filter; `attrs["path"]` is what errors call it.

    Raise DataError if it cannot be read or has no sha256 column.
    """
    import pandas as pd

    path = Path(root, "metadata.csv")
    try:
        metadata = pd.read_csv(
            path, dtype=dict.fromkeys(TEXT_COLUMNS, str), low_memory=False, keep_default_na=False, na_values=[""]
        )  # a mesh may be called 007 or NA
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). voxelize.py writes it.") from error
    except ValueError as error:  # pandas' parser errors and bad UTF-8 are ValueErrors
        raise DataError(f"{path}: is not a CSV table ({error}). Rerun voxelize.py.") from error
    if "sha256" not in metadata:
        raise DataError(
            f"{path}: has no sha256 column, only {', '.join(map(str, metadata.columns))}. Rerun voxelize.py."
        )
    metadata.attrs["path"] = str(path)
    return metadata


def setting_of_data(roots: Iterable[str | os.PathLike], name: str) -> str | None:
    """Return the value that all objects of these roots share, None if they differ or a root does not say.

    name: a column of metadata.csv or a text array of a packed file, such as up_axis or normalization.
    Missing roots are skipped. Raise DataError for a root that cannot be read.
    """
    found: set[str | None] = set()
    for root in map(Path, roots):
        packed = [root] if root.suffix == ".npz" else sorted(root.glob("*.npz"))
        for path in packed if all(map(Path.is_file, packed)) else ():
            texts = load_text(path, name)
            found |= {None} if texts is None else set(texts)
        if not packed and (root / "metadata.csv").is_file():
            metadata = read_metadata(str(root))
            found |= set(metadata[name].dropna().astype(str)) if name in metadata else {None}
    return found.pop() if len(found) == 1 else None


def read_flags(metadata: "DataFrame", column: str) -> "Series":
    """Return a column of true and false as bool, [N]. A blank is false: merged records leave blanks behind.

    Raise DataError naming the first other value.
    """
    text = metadata[column].astype(object).where(metadata[column].notna(), "").astype(str).str.lower()
    true, false = text.isin(["true", "1", "1.0"]), text.isin(["false", "0", "0.0", ""])
    unknown = ~(true | false)
    if unknown.any():
        row = metadata[unknown].iloc[0]
        raise DataError(
            f"{metadata.attrs['path']}: {column} of {row['sha256']} is {row[column]!r}; it must be True or False"
        )
    return true


def require_files(folder: str | os.PathLike, names: list[str]) -> None:
    """Check that a folder has all the named files, by listing it once. Raise DataError naming the first missing."""
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}). voxelize.py makes it.") from error
    missing = [name for name in names if name not in present]
    if missing:
        raise DataError(
            f"{Path(folder, missing[0])}: is missing, and so are {len(missing) - 1} other files "
            f"of the {len(names)} that metadata.csv lists. Rerun voxelize.py, which makes only "
            "what is missing."
        )


def split_of(sha256: str) -> str:
    """Return "val" for 5 % of all hashes, else "train"."""
    return "val" if int(sha256[:8], 16) / 2**32 < VAL_FRACTION else "train"


def is_sha256(value: object) -> bool:
    """Return whether a value can name an object: a string of 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def check_sha256(where: str, column: "Series") -> None:
    """Raise DataError for a name that is not a sha256, or given twice. where: what errors call the table."""
    valid = column.map(is_sha256).astype(bool)
    if not valid.all():
        first = column[~valid].iloc[0]
        raise DataError(f"{where}: sha256 {first!r} is not 64 lower-case hexadecimal digits")
    repeated = column.duplicated()
    if repeated.any():
        raise DataError(
            f"{where}: sha256 {column[repeated].iloc[0]} is listed twice ({int(repeated.sum())} "
            "repetitions in all). Remove the repeated rows."
        )


def entries_of(root: str, where: str, metadata: "DataFrame") -> list[Entry]:
    """Return the entries of a root. Raise DataError for a split that does not exist."""

    def texts(*columns: str) -> list[str | None]:
        """Return the first of these columns that exists, with None for a blank."""
        for column in columns:
            if column in metadata:
                return [
                    str(value) if present and value != "" else None
                    for value, present in zip(metadata[column], metadata[column].notna(), strict=True)
                ]
        return [None] * len(metadata)

    entries = []
    for sha256, name, source, split in zip(
        metadata["sha256"], texts(*NAME_COLUMNS), texts("source"), texts("split"), strict=True
    ):
        if split not in (*SPLITS, None):
            raise DataError(f"{where}: split of {sha256} is {split!r}; it must be train, val or blank")
        entries.append(Entry(root, sha256, name or sha256, source, split or split_of(sha256)))
    return entries
