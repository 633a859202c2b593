"""What the data tools share: finding meshes, ranks, records of finished grids, and the metadata.csv made from them.

A dataset folder holds `voxels/<sha256>.ply`, `metadata.csv`, `failed.csv` and `records/`. Each rank appends to its own
file in `records/` as it finishes grids. `metadata.csv` is made from all of them, under a lock, so that no row is lost
if a rank is killed or several write at once.
"""

import csv
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trellis.datasets.metadata import is_sha256
from trellis.grids.meshes import MESH_SUFFIXES
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import atomic_write

RECORD_FIELDS = ("sha256", "num_voxels", "up_axis", "resolution", "split", "file", "normalization")
METADATA_FIELDS = ("sha256", "file", "voxelized", "num_voxels", "up_axis", "resolution", "normalization")
DEFAULT_NORMALIZATION = "cube"  # of old records and metadata.csv, which do not say
SETTINGS = ("up_axis", "resolution", "normalization")  # all grids of a folder share them
FAILED_FIELDS = ("file", "sha256", "reason")

Row = dict[str, str]


def find_meshes(inputs: Iterable[str | os.PathLike], exclude: Path) -> dict[str, Path]:
    """Find mesh files.

    inputs: mesh files and folders, which are searched recursively, through links too.
    exclude: a folder that is not searched: grids written there are PLY files as well.
    Return {recorded name: path}, sorted by name. Raise DataError if an input is missing, a file has another suffix, or
    there is no mesh at all.
    """
    paths = [Path(item) for item in inputs]
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            found.update({os.path.abspath(mesh): mesh for mesh in _walk(path, exclude.resolve())})
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder. Give a mesh or a folder of meshes.")
        elif path.suffix.lower() not in MESH_SUFFIXES:
            raise DataError(f"{path}: is not one of {' '.join(MESH_SUFFIXES)}. Convert it to one of them.")
        else:
            found[os.path.abspath(path)] = path
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no {' '.join(MESH_SUFFIXES)} there or below. Give a folder of meshes."
        )
    return dict(sorted((printable(path), path) for path in found.values()))


def _walk(folder: Path, exclude: Path) -> Iterator[Path]:
    visited = set()  # else a link to a parent would never end
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in visited or real == exclude:
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in MESH_SUFFIXES and path.is_file():
                yield path


def printable(path: Path) -> str:
    """Return a path as one line of valid UTF-8. File names on Linux can be other bytes."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal, reading it in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_rank(rank: int, world_size: int) -> None:
    """Raise ConfigError unless 0 <= rank < world_size."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank} --world_size {world_size}: ranks count from 0 to world_size - 1.")


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Read a CSV file with a header, every value as the text that is there.

    Return the column names and the rows. Raise DataError naming the line of a damaged row.
    """
    csv.field_size_limit(sys.maxsize)  # captions can be long
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        try:
            fields = list(reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}: line {reader.line_num} does not have the header's "
                        f"{len(fields)} columns. Mend or delete that line."
                    )
                rows.append(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: line {reader.line_num + 1}: {error}. Mend or delete it.") from error
        return fields, rows


def write_table(path: Path, fields: Collection[str], rows: Iterable[Row]) -> None:
    """Write a CSV file atomically. A row may lack fields."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(root: Path) -> tuple[list[str], dict[str, Row]]:
    """Read `metadata.csv` to write it back: the column names, and the rows by sha256. Both are empty without a file.

    Every value is the text that is there, so that nothing which others wrote is changed.
    Raise DataError if sha256 is missing, given twice or no sha256.
    """
    path = root / "metadata.csv"
    if not path.exists():
        return [], {}
    fields, rows = read_table(path)
    if "sha256" not in fields:
        raise DataError(f"{path}: has no column sha256, only {fields}. Add it, or give another --output_dir.")
    by_sha = {}
    for row in rows:
        sha256 = row["sha256"]
        if not is_sha256(sha256):
            raise DataError(
                f"{path}: sha256 {sha256!r} is not 64 lower-case hexadecimal digits. Mend or delete that line."
            )
        if sha256 in by_sha:
            raise DataError(f"{path}: sha256 {sha256} is given twice. Delete one of the two lines.")
        by_sha[sha256] = row
    return fields, by_sha


class RecordFile:
    """The grids that one rank has finished, one line each, in `records/voxelized_<rank>.csv`.

    Every line is flushed at once, so that a killed program loses none. A line that a crash cut off is removed when the
    file is next opened; until then `read_records` ignores it.
    """

    def __init__(self, root: Path, rank: int):
        path = root / "records" / f"voxelized_{rank}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self.file = open(path, "a", encoding="utf-8", newline="")
        self.file.truncate(whole)
        if not whole:
            self.write(RECORD_FIELDS)

    def write(self, values: Iterable[object]) -> None:
        """Append a line with the values of RECORD_FIELDS."""
        csv.writer(self.file, lineterminator="\n").writerow(values)
        self.file.flush()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()


def read_records(root: Path) -> dict[str, Row]:
    """Read the records of all ranks by sha256, and merge several records of one sha256.

    A merged record has the first file by name and the first split that is given, so the order in which ranks end does
    not matter. Lines of older folders have no normalization; it was "cube".
    Raise DataError if grids were made with different settings.
    """
    records: dict[str, Row] = {}
    for path in sorted((root / "records").glob("voxelized_*.csv")):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines[1:-1]:  # without the header, and what a crash left of the last line
            values = next(csv.reader([line]), [])
            if len(values) == len(RECORD_FIELDS) - 1:
                values.append(DEFAULT_NORMALIZATION)
            if len(values) != len(RECORD_FIELDS):
                raise DataError(f"{path}: {line[:80]!r} is not a record. Delete that line, then run again.")
            new = dict(zip(RECORD_FIELDS, values, strict=True))
            old = records.setdefault(new["sha256"], new)
            old["file"] = min(old["file"], new["file"])
            old["split"] = old["split"] or new["split"]
            settings = {tuple(row[name] for name in SETTINGS) for row in (old, new)}
            if len(settings) > 1:
                raise _mixed(root, settings)
    return records


def known_grids(root: Path, up_axis: str, resolution: int, normalization: str) -> dict[str, Row]:
    """Return the finished grids by sha256: those that are recorded and whose file exists.

    Raise DataError if the folder was made with other settings.
    """
    _, rows = read_rows(root)
    for sha256, record in read_records(root).items():
        split = rows.get(sha256, {}).get("split") or record["split"]
        rows[sha256] = {**rows.get(sha256, {}), **record, "split": split, "voxelized": "True"}
    settings = _settings(rows) | {(up_axis, str(resolution), normalization)}
    if len(settings) > 1:
        raise _mixed(root, settings)
    present = _present(root)
    return {sha256: row for sha256, row in rows.items() if is_voxelized(row) and sha256 in present}


def is_voxelized(row: Row) -> bool:
    """Return whether a row of metadata.csv says that its grid exists. Spreadsheets write TRUE."""
    return row.get("voxelized", "").lower() == "true"


def update_metadata(
    root: Path, base: dict[str, Row] | None = None, splits: dict[str, str] | None = None
) -> dict[str, Row]:
    """Bring `metadata.csv` up to date with the records of all ranks, and return its rows by sha256.

    base: rows of another metadata.csv (TRELLIS's), whose values fill gaps in this one.
    splits: {sha256: split}, for rows without a split.
    Rows and columns of other origin are kept. Rows are sorted by sha256.
    Raise DataError if rows were made with different settings.
    """
    with locked(root):
        fields, rows = read_rows(root)
        for sha256, row in (base or {}).items():
            own = rows.setdefault(sha256, {})
            own.update({key: value for key, value in row.items() if not own.get(key)})
            fields += [key for key in row if key not in fields]

        records, present = read_records(root), _present(root)
        recorded = {sha256: row["split"] for sha256, row in records.items() if row["split"]}
        splits = {**recorded, **(splits or {})}
        for sha256, record in records.items():
            split = rows.get(sha256, {}).get("split", "")
            rows.setdefault(sha256, {}).update(record, split=split, voxelized=str(sha256 in present))
        for sha256, row in rows.items():
            row["voxelized"] = row.get("voxelized") or "False"
            row["split"] = row.get("split") or splits.get(sha256, "")
            if is_voxelized(row):
                row["normalization"] = row.get("normalization") or DEFAULT_NORMALIZATION

        settings = _settings(rows)
        if len(settings) > 1:
            raise _mixed(root, settings)
        fields += [name for name in METADATA_FIELDS if name not in fields]
        fields += ["split"] if splits and "split" not in fields else []
        rows = {sha256: {name: rows[sha256].get(name, "") for name in fields} for sha256 in sorted(rows)}
        write_table(root / "metadata.csv", fields, rows.values())
        return rows


def update_failed(root: Path, failures: Iterable[Row], outdated: Callable[[str], bool]) -> None:
    """Bring `failed.csv` up to date with the files that this run left out, sorted by file. Delete it if it is empty.

    outdated: called with the file of an earlier row; returns whether this run replaces the row. Rows of other ranks
        stay.
    """
    path = root / "failed.csv"
    with locked(root):
        old = read_table(path)[1] if path.exists() else []
        rows = [row for row in old if not outdated(row["file"])] + list(failures)
        if rows:
            write_table(path, FAILED_FIELDS, sorted(rows, key=lambda row: row["file"]))
        else:
            path.unlink(missing_ok=True)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it if the program is killed."""
    path = root / "records" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _present(root: Path) -> set[str]:
    """Return the sha256 of every grid file. One listing is faster than a check of each file."""
    folder = root / "voxels"
    return {path.stem for path in folder.glob("*.ply")}


def _settings(rows: dict[str, Row]) -> set[tuple[str, str, str]]:
    """Return the SETTINGS of the voxelized rows that have them. Rows of TRELLIS do not."""
    found = {
        (
            row.get("up_axis", ""),
            row.get("resolution", "").removesuffix(".0"),  # pandas writes 64.0
            row.get("normalization") or DEFAULT_NORMALIZATION,
        )
        for row in rows.values()
        if is_voxelized(row)
    }
    return found - {("", "", DEFAULT_NORMALIZATION)}


def _mixed(root: Path, settings: Iterable[tuple[str, ...]]) -> DataError:
    found = " and ".join(
        " ".join(f"--{name} {value}" for name, value in zip(SETTINGS, values, strict=True))
        for values in sorted(settings)
    )
    return DataError(
        f"{root}: would hold grids made with {found}. Give the same values as before, or another --output_dir."
    )
