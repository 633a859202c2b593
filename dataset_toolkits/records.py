"""What the data tools share: tables, records of finished grids and of files left out, and the tables made from them.

A dataset folder holds `voxels/<sha256>.ply`, `metadata.csv`, `failed.csv` and `records/`. Each run appends to a file of
its own in `records/` as it goes. `metadata.csv` and `failed.csv` are made from all of them, without a lock, so that
nothing is lost if a run is killed or several write at once.
A folder of shards has `*.arrow` in place of the voxel files and of `metadata.csv`: what is known of a grid is beside it
in its shard, and records have only the grids of volumes, which tell when one of a volume is gone.
"""

import csv
import io
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TextIO

from trellis.datasets.metadata import is_sha256
from trellis.datasets.shards import Shard, shards_in
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import atomic_write

RECORD_FIELDS = (
    "event",
    "file",
    "sha256",
    "reason",
    "num_voxels",
    "up_axis",
    "resolution",
    "normalization",
    "fill",
    "split",
    "axis",
    "notes",
    "mm_per_cell",
    "frame",
    "input",
    "grid_format",
    "labels",
    "components",
)
OLD_FIELDS = ("sha256", "num_voxels", "up_axis", "resolution", "split", "file", "normalization")
METADATA_FIELDS = (
    "sha256",
    "file",
    "voxelized",
    "num_voxels",
    "up_axis",
    "resolution",
    "normalization",
    "axis",
    "notes",
)
RARE_FIELDS = ("split", "fill", "mm_per_cell", "frame")  # columns of metadata.csv that are made when a row has one
SETTINGS = (
    "up_axis",
    "resolution",
    "normalization",
    "fill",
    "labels",
    "components",
    "grid_format",
)  # all grids of a folder share them
OF_VOLUMES = ("fill", "labels", "components")  # settings that meshes do not have: "" goes with every value
NO_TABLE = "every"  # of the setting labels; else the digest of a table, a space and the table's name
SHARDS = "shards"  # of the setting grid_format; "": voxel files
WHOLE, PARTS = "whole", "parts"  # of the setting components
OF_SHARDS = ("split", "up_axis", "normalization", "fill", "mm_per_cell")  # what rows have of the columns of shards
DEFAULTS = {"normalization": "cube", "fill": "surface"}  # of records and of a metadata.csv that do not say
FAILED_FIELDS = ("file", "sha256", "reason")
RUN_FILE = re.compile(r"run_\d{6,}_\d+_[0-9a-f]{8}\.csv")
LONGEST_FIELD = 2**31 - 1  # captions can be long; no larger number goes on Windows

Row = dict[str, str]
Settings = tuple[str, ...]  # the values of SETTINGS; those OF_VOLUMES are "" where there is no volume


def check_rank(rank: int, world_size: int) -> None:
    """Raise ConfigError unless 0 <= rank < world_size."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank} --world_size {world_size}: ranks count from 0 to world_size - 1.")


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Read a CSV file with a header, every value as the text that is there.

    Return the column names and the rows. Raise DataError naming the line of a damaged row.
    """
    csv.field_size_limit(LONGEST_FIELD)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {number} is not UTF-8 text ({error.reason}). Save the table as UTF-8."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
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
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num + 1}: {error}. Mend or delete it.") from error
    return fields, rows


def write_table(path: Path, fields: Collection[str], rows: Iterable[Row]) -> None:
    """Write a CSV file atomically. A row may lack fields."""
    with (
        atomic_write(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
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
        header = ",".join(fields)
        remedy = "Its first line must name the columns, sha256 among them"
        if re.search("[;\t]", header):
            remedy = "Save the table with commas between the columns"
        raise DataError(f"{path}: begins with {header[:60]!r}, which has no column sha256. {remedy}.")
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


class Recorded(NamedTuple):
    """What all record files of a folder say.

    grids: {sha256: row of metadata.csv} of the grids that were made.
    splits: {sha256: split} for grids that got a split after they were made.
    failures: {file: row of failed.csv}.
    inputs: keys of the volumes whose objects are all recorded, see `Record`.
    """

    grids: dict[str, Row]
    splits: dict[str, str]
    failures: dict[str, Row]
    inputs: set[str]


class RecordFile:
    """The events of one run: an own file in `records/`, `run_<number>_<rank>_<random>.csv`, made with the first event.

    A run's number is greater than that of all files which are there when it begins to write, so that of two events
    which contradict each other, such as two reasons why a file failed, the later one is known. Every line is flushed
    at once, so that a killed program loses none. `read_records` ignores a line that a crash cut off.

    RECORD_FIELDS, besides columns of metadata.csv and failed.csv:
        event  grid: `file` gave the grid `sha256`; failed: `file` gave none for `reason`; cleared: no reason holds for
               `file` any more; named: `file` has the bytes of `sha256` too; split: `sha256` belongs to `split`; input:
               all objects of a volume are recorded
        input  of a grid out of a volume and of an input: the key that stands for the volume and how it was divided
        labels, components  of a grid out of a volume: how volumes were divided, see `work.division`
    """

    def __init__(self, root: Path, rank: int):
        self.root = root
        self.run = f"{rank}_{secrets.token_hex(4)}"  # as in the file's name
        self._file: TextIO | None = None

    def write(self, event: str, **values: object) -> None:
        """Append a line. values: some of RECORD_FIELDS."""
        if self._file is None:
            folder = self.root / "records"
            folder.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.name.split("_")[1]) for path in _run_files(folder)]
            path = folder / f"run_{max(numbers, default=0) + 1:06d}_{self.run}.csv"
            self._file = open(path, "x", encoding="utf-8", errors="backslashreplace", newline="")
            self._append(RECORD_FIELDS)
            for row in _old_failures(self.root) if not numbers else ():
                self._append(_values("failed", row))
        self._append(_values(event, values))

    def _append(self, values: Iterable[str]) -> None:
        assert self._file is not None
        csv.writer(self._file, lineterminator="\n").writerow(values)
        self._file.flush()

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _values(event: str, row: Mapping[str, object]) -> list[str]:
    """Return the values of RECORD_FIELDS, each as one line."""
    return [" ".join(str(row.get(name, "") if name != "event" else event).splitlines()) for name in RECORD_FIELDS]


def _run_files(folder: Path) -> list[Path]:
    """Return the record files of runs, in the order of their numbers."""
    return sorted(path for path in folder.glob("run_*.csv") if RUN_FILE.fullmatch(path.name))


def read_records(root: Path) -> Recorded:
    """Read the records of all runs, and merge those of one sha256 or file.

    A merged grid has the first file by name and the first split that is given, so the order in which ranks end does
    not matter. Folders of earlier versions have `voxelized_<rank>.csv` with grids alone; their lines may lack the
    normalization, which was "cube".
    Raise DataError if grids were made with different settings.
    """
    recorded = Recorded({}, {}, {}, set())
    names: list[tuple[str, str]] = []
    for path in sorted((root / "records").glob("voxelized_*.csv")):
        for line, values in _lines(path):
            if len(values) == len(OLD_FIELDS) - 1:
                values.append(DEFAULTS["normalization"])
            _add_grid(root, recorded.grids, _as_row(path, line, OLD_FIELDS, values))
    runs = _run_files(root / "records")
    if not runs:
        recorded.failures.update((row["file"], row) for row in _old_failures(root))
    for path in runs:
        fields: list[str] = []
        for line, values in _lines(path, with_header=True):
            if not fields:
                fields = values
                continue
            row = _as_row(path, line, fields, values)
            match row.pop("event", ""):
                case "grid":
                    _add_grid(root, recorded.grids, {name: row[name] for name in row if name != "reason"})
                case "failed":
                    recorded.failures[row["file"]] = {name: row[name] for name in FAILED_FIELDS}
                case "cleared":
                    recorded.failures.pop(row["file"], None)
                case "named":
                    names.append((row["sha256"], row["file"]))
                case "split":
                    recorded.splits.setdefault(row["sha256"], row["split"])
                case "input":
                    recorded.inputs.add(row["input"])
                case event:
                    raise DataError(
                        f"{path}: the event {event!r} is not known. A newer version wrote it: use that, or delete the "
                        "line."
                    )
    for sha256, file in names:
        if sha256 in recorded.grids:
            recorded.grids[sha256]["file"] = min(recorded.grids[sha256]["file"], file)
    return recorded


def _lines(path: Path, with_header: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of a record file and their values, without what a crash left of the last one."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    for line in lines if with_header else lines[1:]:
        yield line, next(csv.reader([line]), [])


def _as_row(path: Path, line: str, fields: Sequence[str], values: list[str]) -> Row:
    if len(values) != len(fields):
        raise DataError(f"{path}: {line[:80]!r} is not a record. Delete that line, then run again.")
    return dict(zip(fields, values, strict=True))


def _add_grid(root: Path, grids: dict[str, Row], new: Row) -> None:
    old = grids.setdefault(new["sha256"], new)
    old["file"] = min(old["file"], new["file"])
    old["split"] = old["split"] or new["split"]
    if not go_together(_settings_of_record(old), _settings_of_record(new)):
        raise _mixture(root, _settings_of_record(old), _settings_of_record(new))
    for name in ("labels", "components"):  # which records of earlier versions lack
        old[name] = old.get(name) or new.get(name, "")


def _old_failures(root: Path) -> list[Row]:
    """Return the rows of a failed.csv that an earlier version wrote, which kept no other record of them."""
    try:
        rows = read_table(root / "failed.csv")[1]
    except (OSError, DataError):  # missing or damaged: what still fails is found again
        return []
    return [row for row in rows if set(row) == set(FAILED_FIELDS)]


def check_failed(root: Path) -> None:
    """Raise DataError if there is a failed.csv that voxelize.py did not write, and that it would replace."""
    path = root / "failed.csv"
    if not path.exists():
        return
    with open(path, "rb") as file:
        header = file.readline(1000).decode("utf-8-sig", "replace").strip()
    if header and not {"file", "reason"} <= set(re.split(r"[,;\t]", header.replace('"', ""))):
        raise DataError(
            f"{path}: begins with {header[:60]!r}, so voxelize.py did not write it, and would replace it. Move it away."
        )


class Known(NamedTuple):
    """What is done already: the rows of the grids that are there, by sha256, and the keys of finished volumes."""

    grids: dict[str, Row]
    inputs: set[str]


def known_grids(root: Path, settings: Settings) -> tuple[Known, dict[str, Row]]:
    """Return what is recorded and whose files exist, and the recorded failures by file.

    settings: the values of SETTINGS.
    Raise DataError if the folder was made with other settings.
    """
    _, rows = read_rows(root)
    in_shards = rows_of_shards(root)
    rows |= in_shards
    recorded = read_records(root)
    for sha256, record in recorded.grids.items():
        row = rows.setdefault(sha256, {})
        row.update(record, split=row.get("split") or record["split"] or recorded.splits.get(sha256, ""))
        row["voxelized"] = "True"
    for found in sorted(_settings(rows.values(), recorded.grids.values())):
        if not go_together(found, settings):
            raise _refusal(root, found, settings)
    present = _present(root) | in_shards.keys()
    gone = {row["input"] for sha256, row in recorded.grids.items() if row.get("input") and sha256 not in present}
    grids = {sha256: row for sha256, row in rows.items() if is_voxelized(row) and sha256 in present}
    return Known(grids, recorded.inputs - gone), recorded.failures


def axis_of_folder(root: Path) -> str | None:
    """Return the --up_axis that all grids of a folder have; None if it has no grids, or none that say it."""
    _, rows = read_rows(root)
    every = [
        *(row for row in rows.values() if is_voxelized(row)),
        *rows_of_shards(root).values(),
        *read_records(root).grids.values(),
    ]
    found = {_settings_of_row(row)[0] for row in every} - {""}
    return found.pop() if len(found) == 1 else None


def is_voxelized(row: Row) -> bool:
    """Return whether a row of metadata.csv says that its grid exists. Spreadsheets write TRUE."""
    return row.get("voxelized", "").lower() == "true"


def update_tables(
    root: Path, base: dict[str, Row] | None = None, shards: bool = False
) -> tuple[dict[str, Row], list[Row]]:
    """Bring `metadata.csv` and `failed.csv` up to date with the records of all runs, and return their rows.

    base: rows of another metadata.csv (TRELLIS's), whose values fill gaps in this one.
    shards: the folder is one of shards, which have what else would be in metadata.csv.
    Rows and columns of other origin are kept. Rows are sorted by sha256, those of failed.csv by file; without rows,
    it is deleted.
    Raise DataError if rows were made with different settings.
    """
    # No lock, which some shared file systems lack. Several runs may write the tables at once, and the last one to
    # write has every record: it looks again after it has written, and if records have come since it read, it merges
    # once more, unless the run they are from is still active. That one will then write later itself, as every run
    # does after its last record, so the write was not the last.
    while True:
        before = _sizes(root)
        result = _update_failed(root) if shards else _update_tables(root, base or {})
        grown = {name for name, size in _sizes(root).items() if before.get(name) != size}
        if all(active_file(root, Path(name).stem.split("_", 2)[2]).exists() for name in grown):
            return result


def active_file(root: Path, run: str) -> Path:
    """Return the file that is there while a run is active. run: as in the name of its record file."""
    return root / "records" / f"active_{run}.json"


def _sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in _run_files(root / "records")}


def _update_tables(root: Path, base: dict[str, Row]) -> tuple[dict[str, Row], list[Row]]:
    fields, rows = read_rows(root)
    for sha256, row in base.items():
        own = rows.setdefault(sha256, {})
        own.update({key: value for key, value in row.items() if not own.get(key)})
        fields += [key for key in row if key not in fields]

    recorded, present = read_records(root), _present(root)
    splits = dict(recorded.splits)
    for sha256, record in recorded.grids.items():
        splits[sha256] = record["split"] or splits.get(sha256, "")
        hidden = ("input", "split", "labels", "components", "grid_format")
        values = {name: value for name, value in record.items() if value and name not in hidden}
        rows.setdefault(sha256, {}).update(values, voxelized=str(sha256 in present))
    for sha256, row in rows.items():
        row["voxelized"] = row.get("voxelized") or "False"
        row["split"] = row.get("split") or splits.get(sha256, "")
        if is_voxelized(row):
            row["normalization"] = row.get("normalization") or DEFAULTS["normalization"]

    _refuse_mixture(root, rows, recorded)
    fields += [name for name in METADATA_FIELDS if name not in fields]
    for name in RARE_FIELDS:
        if name not in fields and any(row.get(name) for row in rows.values()):
            fields.append(name)
    rows = {sha256: {name: rows[sha256].get(name, "") for name in fields} for sha256 in sorted(rows)}
    write_table(root / "metadata.csv", fields, rows.values())

    made = {sha256 for sha256, row in rows.items() if is_voxelized(row) and sha256 in present}
    return rows, _write_failures(root, recorded, made)


def _update_failed(root: Path) -> tuple[dict[str, Row], list[Row]]:
    """Return the rows of the grids in shards, and write `failed.csv`."""
    rows, recorded = rows_of_shards(root), read_records(root)
    _refuse_mixture(root, rows, recorded)
    return rows, _write_failures(root, recorded, rows)


def _write_failures(root: Path, recorded: Recorded, made: Collection[str]) -> list[Row]:
    failures = [row for name, row in sorted(recorded.failures.items()) if row["sha256"] not in made]
    if failures:
        write_table(root / "failed.csv", FAILED_FIELDS, failures)
    else:
        (root / "failed.csv").unlink(missing_ok=True)
    return failures


def _refuse_mixture(root: Path, rows: dict[str, Row], recorded: Recorded) -> None:
    for one, other in combinations(sorted(_settings(rows.values(), recorded.grids.values())), 2):
        if not go_together(one, other):
            raise _mixture(root, one, other)


def _present(root: Path) -> set[str]:
    """Return the sha256 of every grid file. One listing is faster than a check of each file."""
    folder = root / "voxels"
    return {path.stem for path in folder.glob("*.ply")}


def rows_of_shards(root: Path) -> dict[str, Row]:
    """Return what the shards of a folder say of their grids, by sha256, with names as in metadata.csv.

    Raise DataError for a damaged shard.
    """
    rows: dict[str, Row] = {}
    for path in shards_in(root):
        try:
            shard = Shard(path)
            said = {
                field: shard.column(name).to_pylist()
                for name, field in (("sha256", "sha256"), ("name", "file"), *((name, name) for name in OF_SHARDS))
                if name in shard.names
            }
        except DataError as error:
            raise DataError(f"{error} Or delete it and run voxelize.py again, which makes its grids anew.") from error
        common = {"resolution": str(shard.resolution), "grid_format": SHARDS, "voxelized": "True", "split": ""}
        for values in zip(*said.values(), strict=True):
            row = {name: str(value) for name, value in zip(said, values, strict=True) if value is not None}
            rows.setdefault(row["sha256"], {**common, **row})
    return rows


def _settings(rows: Iterable[Row], recorded: Iterable[Row]) -> set[Settings]:
    """Return the settings of the rows with a grid, and of records. Rows of TRELLIS do not have any."""
    found = {_settings_of_row(row) for row in rows if is_voxelized(row)}
    return {values for values in found if values[0] or values[1]} | set(map(_settings_of_record, recorded))


def _settings_of_row(row: Row) -> Settings:
    """Return the values of SETTINGS that a row of metadata.csv has; it does not say how volumes were divided."""
    up_axis, resolution, normalization = (row.get(name) or DEFAULTS.get(name, "") for name in SETTINGS[:3])
    from_volume = row.get("input") or row.get("mm_per_cell")
    fill = row.get("fill") or (DEFAULTS["fill"] if from_volume else "")
    return (
        up_axis,
        resolution.removesuffix(".0"),
        normalization,
        fill,
        "",
        "",
        row.get("grid_format", ""),
    )  # pandas: 64.0


def _settings_of_record(row: Row) -> Settings:
    """Return the values of SETTINGS that a recorded grid has; "" for the division in folders of earlier versions."""
    return *_settings_of_row(row)[:4], row.get("labels", ""), row.get("components", ""), row.get("grid_format", "")


def differences(one: Settings, other: Settings) -> list[str]:
    """Return the names of the SETTINGS that keep grids from one folder."""
    return [
        name
        for name, first, second in zip(SETTINGS, one, other, strict=True)
        # of labels the digest alone: the same table may be in a file of another name
        if first.partition(" ")[0] != second.partition(" ")[0] and not (name in OF_VOLUMES and "" in (first, second))
    ]


def go_together(one: Settings, other: Settings) -> bool:
    """Return whether grids of these settings may be in one folder."""
    return not differences(one, other)


def _refusal(root: Path, found: Settings, asked: Settings) -> DataError:
    names = differences(found, asked)
    there, here = flags_of(found, names), flags_of(asked, names)
    give = there if "labels" not in names and "no --" not in there else "the same as before"
    return DataError(f"{root}: holds grids of {there}; this run asks for {here}. Give {give}, or another --output_dir.")


def _mixture(root: Path, one: Settings, other: Settings) -> DataError:
    names = differences(one, other)
    return DataError(
        f"{root}: holds grids of {flags_of(one, names)} and of {flags_of(other, names)}, which do not go together. "
        "Make those of one anew in another --output_dir."
    )


def flags_of(settings: Settings, names: Collection[str] = SETTINGS) -> str:
    """Return settings as flags of voxelize.py for people, those with these names that have a value."""
    flags = []
    for name, value in zip(SETTINGS, settings, strict=True):
        if name not in names or not value and name in OF_VOLUMES:
            continue
        if name == "grid_format":
            flags.append(f"--format {value or 'ply'}")
        elif name == "components":
            flags.append("--components" if value == PARTS else "no --components")
        elif value == NO_TABLE:
            flags.append("no --labels")
        elif name == "labels":
            digest, _, source = value.partition(" ")
            flags.append(f"--labels {source} (its content: {digest[:8]})")
        else:
            flags.append(f"--{name} {value}" if value else f"unknown {name}")
    return " ".join(flags)
