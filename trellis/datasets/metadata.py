"""What a data root says about its objects: metadata.csv, or the text arrays of packed files in its place.

metadata.csv has no version: a column may be missing, and unknown columns are kept and ignored. `sha256` alone is
required. A missing `voxelized` means that every object has a grid, a missing `split` that the hash decides, a missing
`normalization` of grids that voxelize.py made "cube", and a missing `up_axis` or `resolution` that it is not known.

Two of the columns are settings of the data, `up_axis` and `normalization`: how meshes became grids, see
`grids.placing`. Grids of another normalization lie elsewhere in the cube, so roots that differ are not used together.
Grids of the settings "auto", "y" and "z" are all z-up and may be mixed.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..grids.placing import Z_UP
from ..utils.errors import DataError
from ..utils.inputs import require_file
from .packed import load_text
from .remote import shard_files
from .shards import Shard

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SPLITS = ("train", "val")
Split = Literal["train", "val", "all"]
VAL_FRACTION = 0.05
SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val)$", re.IGNORECASE)  # not in interval.npz
NAME_COLUMNS = ("name", "file", "file_identifier")  # packed files, voxelize.py, TRELLIS
SETTINGS = ("up_axis", "normalization", "fill")
Settings = dict[str, set[str | None]]  # {one of SETTINGS: values that objects have; None: some do not say}
TEXT_COLUMNS = ("sha256", "source", "kind", "split", *NAME_COLUMNS)


class Entry(NamedTuple):
    """One object that passed the filters."""

    root: str
    sha256: str
    name: str  # the mesh file if known, else the sha256
    source: str | None  # the collection it comes from, if known
    split: str
    kind: str | None = None  # what it is, such as "anatomy", if known
    frame: str | None = None  # where it lies in its scan, see grids.volumes.Frame; None if it comes from no scan


def read_metadata(root: str, as_text: bool = False) -> "DataFrame":
    """Read `root/metadata.csv` as a table to filter; `attrs["path"]` is what errors call it.

    as_text: read every column as the text that is there, not only TEXT_COLUMNS.
    Raise DataError if it cannot be read or has no sha256 column.
    """
    import pandas as pd

    path = Path(root, "metadata.csv")
    require_file(path, DataError, "voxelize.py writes it")
    try:
        metadata = pd.read_csv(
            path,
            dtype=str if as_text else dict.fromkeys(TEXT_COLUMNS, str),
            low_memory=False,
            keep_default_na=False,
            na_values=[""],
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


def settings_of_rows(metadata: "DataFrame", name: str) -> set[str | None]:
    """Return the values of one of SETTINGS in the table of a root. None stands for objects that do not say.

    metadata: rows of objects with grids; `attrs["path"]` says whether they come from metadata.csv. There blanks are
        ignored if other rows say something: all grids of such a folder share their settings. Without any
        normalization it is "cube", the only one when folders did not say. A blank `fill` is "surface" everywhere.
    """
    values: set[str | None] = {None} if len(metadata) else set()
    if name in metadata:
        column = metadata[name].astype(object)
        values = {str(value) if value else None for value in column.where(column.notna(), None)}
    if name == "fill":
        return {value or "surface" for value in values}
    if Path(metadata.attrs["path"]).name != "metadata.csv":
        return values
    if values == {None} and name == "normalization":
        return {"cube"}
    return values if values == {None} else values - {None}


def settings_of_data(roots: Iterable[str | os.PathLike], name: str) -> dict[str | None, str]:
    """Return {value: the first root with it} of one of SETTINGS; the value None stands for objects that do not say.

    Missing roots are skipped. Raise DataError for a root that cannot be read.
    """
    found: dict[str | None, str] = {}
    for given in map(str, roots):
        root = Path(given)
        shards = shard_files(given)
        values: set[str | None] = set().union(*(Shard(*file).setting(name) for file in shards))
        packed = [root] if root.suffix == ".npz" else sorted(root.glob("*.npz"))
        for path in packed if all(map(Path.is_file, packed)) else ():
            texts = load_text(path, name)
            values |= {None} if texts is None else {text or None for text in texts}
            if name == "fill":
                values = {value or "surface" for value in values}
        if not packed and not shards and (root / "metadata.csv").is_file():
            metadata = read_metadata(str(root))
            if "voxelized" in metadata:
                metadata = metadata[read_flags(metadata, "voxelized")]
            values |= settings_of_rows(metadata, name)
        found |= {value: given for value in values if value not in found}
    return found


def common_setting(values: Iterable[str | None]) -> str | None:
    """Return the setting that holds for all of these values of `up_axis` or of `normalization`.

    That is the value they share, or "auto" for several of Z_UP, whose grids are all z-up. None if there is no such
    setting, or if a value is None.
    """
    values = set(values)
    if len(values) == 1:
        return values.pop()
    return "auto" if values and values <= set(Z_UP) else None


def compare_settings(settings: dict[str, Settings]) -> list[str]:
    """Return notes on what roots do not say or what differs but may be used together.

    settings: of each root that is used.
    Raise DataError for grids of several normalizations.
    """
    return [*_compare_normalizations(settings), *_compare_axes(settings), *_compare_fills(settings)]


def compare_with_tokenizer(settings: dict[str, Settings], up_axis: str, normalization: str) -> list[str]:
    """Return notes on roots in whose grids other axes may be up than in those that a tokenizer was trained on.

    settings: of each root that is used.
    up_axis, normalization: the tokenizer's.
    Raise DataError for a root whose grids have another normalization.
    """
    notes = []
    for root, values in settings.items():
        others = values["normalization"] - {None, normalization}
        if others:
            raise DataError(
                f"{root}: its grids have normalization {min(filter(None, others))}, but the tokenizer's is "
                f"{normalization}. Make them anew with voxelize.py --normalization {normalization}."
            )
        said = values["up_axis"] - {None}
        if said and common_setting(said | {up_axis}) is None:
            notes.append(
                f"{root}: its grids were made with up_axis {' and '.join(sorted(filter(None, said)))}, but the "
                f"tokenizer's is {up_axis}, so other axes may be up in them than in those it was trained on"
            )
    return notes


def _compare_normalizations(settings: dict[str, Settings]) -> list[str]:
    said: dict[str, str] = {}
    silent = []
    for root, values in settings.items():
        for value in sorted(filter(None, values["normalization"])):
            said.setdefault(value, root)
        if None in values["normalization"]:
            silent.append(root)
    if len(said) > 1:
        (first, root), (second, other) = list(said.items())[:2]
        raise DataError(
            f"{other}: has grids of normalization {second}, and {root} has grids of normalization {first}: a model "
            f"cannot tell them apart. Make those of one root anew with voxelize.py --normalization, or leave it out."
        )
    if said and silent:
        [(value, root)] = said.items()
        return [f"{silent[0]} does not say how its grids were normalized; those of {root} are normalized as {value}"]
    return []


def _compare_fills(settings: dict[str, Settings]) -> list[str]:
    solid = [root for root, values in settings.items() if "solid" in values["fill"]]
    hollow = [root for root, values in settings.items() if "surface" in values["fill"]]
    if solid and hollow:
        return [f"grids of {solid[0]} are solid, and those of {hollow[0]} surfaces: a model learns both"]
    return []


def _compare_axes(settings: dict[str, Settings]) -> list[str]:
    first_with: dict[str | None, str] = {}
    for root, values in settings.items():
        for value in values["up_axis"]:
            first_with.setdefault(value, root)
    if len(first_with) == 1 or common_setting(first_with):
        return []
    roots = [
        f"{root} ({f'up_axis {value}' if value else 'does not say'})"
        for value, root in sorted(first_with.items(), key=lambda item: item[0] or "")
    ]
    return [
        f"grids may have different axes up: {', '.join(roots)}. If objects lie on their side, make their grids anew "
        "with voxelize.py --up_axis"
    ]


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
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{Path(folder, missing[0])}: is missing{others} of the {len(names)} files that metadata.csv lists. Rerun "
            "voxelize.py, which makes only what is missing."
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
