"""Ids of many objects in Parquet files, written by scripts/to_tokens.py.

A folder holds shards of equal numbers of objects, shard-00003-of-00012.parquet, and `_common_metadata`, a Parquet file
with their schema and without rows. So readers of Parquet folders open it (pandas, Hugging Face's datasets). A row is
an object:

    sha256      string
    name        string
    source      string or null
    tokens      list<uint16>, or list<int32> for more than 65536 different numbers: ids in one of the forms of forms.py
    num_voxels  int32
    iou         float32, if it was asked for
    frame       string or null, if an object comes from a scan: where it lies there, see grids.volumes.Frame

The metadata of every file say how its ids were made: the fields of `TokenInfo` (text as it is, other values as JSON),
`format_version` (see utils/formats.py), `made_from`, what else the ids of a folder have in common, and `left_out`, the
objects of its share that have no row, with the reasons. Folders of earlier versions have `tokens.json` in place of
`_common_metadata`, and their files no checksums, by which readers find damaged ids.
Axes: n rows, T ids of an object, K codes.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.config import differences, differing_keys, parse_json
from ..utils.errors import ConfigError, DataError
from ..utils.files import atomic_write
from ..utils.formats import check_version
from ..utils.inputs import require_file
from .footer import read_row_groups
from .forms import form_of, octree_of
from .octree import MASKS, Octree
from .problems import integers

if TYPE_CHECKING:
    import pyarrow

COMMON = "_common_metadata"  # readers of Parquet folders know the name, or skip what begins with _
OLD_MANIFEST = "tokens.json"
SHARD = re.compile(r"shard-(\d{5})-of-(\d{5})\.parquet")
FORMAT_VERSION = 2  # of octree forms; the dense one is version 1
VERSION_KEY, MADE_FROM, LEFT_OUT = "format_version", "made_from", "left_out"  # metadata beside TokenInfo's
COLUMNS = {  # what a column holds; those of OPTIONAL may have nulls
    **dict.fromkeys(("sha256", "name", "source", "frame"), "text"),
    "tokens": "lists of whole numbers",
    "num_voxels": "whole numbers",
    "iou": "numbers",
}
OPTIONAL = ("source", "frame")
ROWS_AT_ONCE = 256
MAX_TOKENS = 2**24  # of an object: those of a lattice of 256³


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


# What the values of TokenInfo's fields must be, by the fields' types.
VALID: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str) and len(value) <= 200,
    int: _whole,
    bool: lambda value: isinstance(value, bool),
    tuple[int, int, int]: lambda value: isinstance(value, list) and len(value) == 3 and all(map(_whole, value)),
}


@dataclass(frozen=True)
class TokenInfo:
    """What ids mean."""

    tokenizer_hash: str
    normalization: str  # how meshes became grids, as voxelize.py's flag
    up_axis: str  # likewise: how the axes of their files were taken
    lattice: tuple[int, int, int]  # X' Y' Z', tokens along each axis
    codes_per_token: int  # Q, consecutive ids of a token
    n_embed: int  # K
    resolution: int  # R, voxels along an axis
    precision: str  # of the encoder that made the ids
    empty_code: bool = False  # whether id 0 stands for a token whose block has no voxel
    form: str = "dense"  # one of FORMS

    @cached_property
    def octree(self) -> Octree | None:
        """What writes and reads the form, None for the dense one. Raise ConfigError for a form that there is not."""
        return octree_of(form_of(self.form, self.empty_code), self.lattice, self.n_embed, self.codes_per_token)

    @property
    def num_values(self) -> int:
        """How many different numbers files may have in place of ids: K, or with an octree K + 255."""
        return self.n_embed + (0 if self.octree is None else MASKS)

    @property
    def num_tokens(self) -> int:
        """T, ids of an object."""
        return math.prod(self.lattice) * self.codes_per_token

    def to_metadata(self) -> dict[str, str]:
        """Return a file's metadata: these fields as texts, and the version of the format."""
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(self).items()}
        return {**texts, VERSION_KEY: str(1 if self.octree is None else FORMAT_VERSION)}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, path: Path) -> "TokenInfo":
        """Read a file's metadata; fields with a default may be missing, as in files of earlier versions.

        Raise DataError naming the field that is missing or damaged.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            key = field.name.encode()
            if field.default is not MISSING and key not in (metadata or {}):
                continue
            try:
                text = (metadata or {})[key].decode()
                value = text if field.type in (str, "str") else parse_json(text, field.name)
            except (KeyError, ValueError, ConfigError) as error:
                raise _invalid(path, field.name) from error
            if not VALID[field.type](value):
                raise _invalid(path, field.name)
            values[field.name] = value
        info = cls(**{**values, "lattice": tuple(values["lattice"])})
        if info.num_tokens > MAX_TOKENS:
            raise DataError(
                f"{path}: its metadata are damaged: lattice {list(info.lattice)} with codes_per_token "
                f"{info.codes_per_token} makes {info.num_tokens} ids of an object, and at most {MAX_TOKENS} are read."
            )
        try:
            form_of(info.form, info.empty_code)
        except ConfigError as error:
            raise DataError(f"{path}: its metadata are damaged: {error}.") from error
        return info


def require_pyarrow() -> None:
    """Raise ConfigError, with the command that installs it, if pyarrow cannot be loaded."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Parquet files need pyarrow ({error}): pip install pyarrow") from error


def claim(folder: Path, info: TokenInfo, made_from: dict[str, Any], iou: bool, frame: bool) -> None:
    """Make a folder one of these tokens, or compare it with the tokens that it has.

    made_from: what else they have in common; JSON.
    iou, frame: as for `schema`.
    Raise ConfigError if the folder has others, or shards that do not say, DataError for damaged files.
    """
    require_pyarrow()
    import pyarrow.parquet

    wanted = json.loads(json.dumps({**asdict(info), **made_from}))
    found = _claimed(folder)
    if found is None:
        layout = schema(info, iou, frame)
        layout = layout.with_metadata({**(layout.metadata or {}), MADE_FROM: json.dumps(made_from)})
        with atomic_write(folder / COMMON) as partial:
            pyarrow.parquet.write_metadata(layout, partial)
        found = _claimed(folder)  # another machine may have been first
    assert found is not None
    source, values = found
    if values != wanted:
        changed = ", ".join(f"{key} ({old:.80}, now {new:.80})" for key, old, new in differences(values, wanted))
        raise ConfigError(
            f"{folder}: holds tokens made with other settings. {source.name} has other values of {changed}. Give the "
            "same as before, or another --output_dir."
        )


def _claimed(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return what the tokens of a folder have in common, and the file that says it; None if it has no tokens."""
    old, shards = folder / OLD_MANIFEST, sorted(path for path in folder.glob("*") if SHARD.fullmatch(path.name))
    if old.exists():
        require_file(old, ConfigError, "delete it together with the files beside it")
        try:
            defaults = {field.name: field.default for field in fields(TokenInfo) if field.default is not MISSING}
            return old, {**defaults, **parse_json(old.read_text(encoding="utf-8"), str(old))}
        except (ValueError, TypeError, ConfigError) as error:
            raise ConfigError(f"{old} is damaged ({error}); delete it together with the files beside it") from error
    for path in (folder / COMMON, *shards[:1]):
        if not path.exists():
            continue
        made_from = _said(path, MADE_FROM)
        if made_from is None:
            continue
        if not isinstance(made_from, dict):
            raise _invalid(path, MADE_FROM)
        info = TokenInfo.from_metadata(_open(path).schema_arrow.metadata, path)
        return path, {**json.loads(json.dumps(asdict(info))), **made_from}
    if shards:
        raise ConfigError(
            f"{folder}: has shards, but neither {COMMON} nor {OLD_MANIFEST} that says how they were made. Give another "
            "--output_dir."
        )
    return None


def shard_name(number: int, shards: int) -> str:
    """Return the file name of one shard."""
    return f"shard-{number:05d}-of-{shards:05d}.parquet"


def schema(info: TokenInfo, iou: bool = False, frame: bool = False) -> "pyarrow.Schema":
    """Return a shard's schema, with or without the columns iou and frame. Its metadata lack `left_out`."""
    import pyarrow as pa

    ids = pa.uint16() if info.num_values <= 2**16 else pa.int32()
    columns = {
        "sha256": pa.string(),
        "name": pa.string(),
        "source": pa.string(),
        "tokens": pa.list_(ids),
        "num_voxels": pa.int32(),
    }
    columns |= {"iou": pa.float32()} if iou else {}
    columns |= {"frame": pa.string()} if frame else {}
    return pa.schema(columns, metadata=info.to_metadata())


def write_shard(
    path: Path,
    info: TokenInfo,
    sha256: list[str],
    names: list[str],
    sources: list[str | None],
    tokens: np.ndarray,
    num_voxels: np.ndarray,
    iou: np.ndarray | None = None,
    left_out: list[dict[str, str]] | None = None,
    frames: list[str | None] | None = None,
    made_from: dict[str, Any] | None = None,
) -> None:
    """Write a shard atomically.

    tokens: [n, T] integers in [0, K), which are written in the form of `info`; n may be 0.
    num_voxels: [n].
    iou: [n] or None.
    left_out: {"file", "sha256", "reason"} of each object without ids.
    frames: [n] where objects lie in their scans; None if no object of the data set comes from a scan.
    made_from: as for `claim`.
    Raise ConfigError without pyarrow, ValueError for tokens of another shape.
    """
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet

    if tokens.shape != (len(sha256), info.num_tokens):
        raise ValueError(f"tokens must be [{len(sha256)}, {info.num_tokens}], not {list(tokens.shape)}")
    layout = schema(info, iou is not None, frames is not None)
    ids = layout.field("tokens").type.value_type
    rows = tokens if info.octree is None else [info.octree.to_values(row).numpy() for row in tokens]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = pa.array(np.concatenate([*rows, np.zeros(0, int)]).astype(ids.to_pandas_dtype()), ids)
    columns = {
        "sha256": sha256, "name": names, "source": sources,
        "tokens": pa.ListArray.from_arrays(offsets, values, type=layout.field("tokens").type),
        "num_voxels": num_voxels.astype(np.int32),
    }  # fmt: skip
    if iou is not None:
        columns["iou"] = iou.astype(np.float32)
    if frames is not None:
        columns["frame"] = frames
    said = {} if made_from is None else {MADE_FROM: json.dumps(made_from)}
    layout = layout.with_metadata({**info.to_metadata(), **said, LEFT_OUT: json.dumps(left_out or [])})
    with atomic_write(path) as partial:
        # Without checksums a flipped bit is another id, without a word.
        table = pa.table(columns, schema=layout)
        pa.parquet.write_table(table, partial, compression="zstd", write_page_checksum=True)


def shard_files(source: str | Path) -> list[Path]:
    """Return a folder's shards in order, or the one Parquet file given.

    Raise DataError if there are none, if some are missing, and if their names give different totals.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder. scripts/to_tokens.py writes Parquet files.")
    found = {path: SHARD.fullmatch(path.name) for path in sorted(source.iterdir())}
    numbers = {int(match[1]): path for path, match in found.items() if match}
    totals = sorted({int(match[2]) for match in found.values() if match})
    if not totals:
        raise DataError(f"{source}: has no shard-*.parquet. scripts/to_tokens.py writes them.")
    if len(totals) > 1:
        raise DataError(
            f"{source}: holds shards of different sets (of {' and of '.join(map(str, totals))} files). "
            "Delete those that do not belong there."
        )
    missing = [number for number in range(totals[0]) if number not in numbers]
    if missing:
        raise DataError(
            f"{source}: {shard_name(missing[0], totals[0])} is missing ({len(missing)} such shards in "
            "all). Run scripts/to_tokens.py again: it makes what is missing."
        )
    return [numbers[number] for number in range(totals[0])]


def read_info(source: str | Path) -> TokenInfo:
    """Return how the ids of a folder, or of one file, were made.

    Raise DataError as `shard_files` does, for shards made in different ways, and for a newer format version.
    """
    infos = {path: TokenInfo.from_metadata(_open(path).schema_arrow.metadata, path) for path in shard_files(source)}
    first, info = next(iter(infos.items()))
    for path, other in infos.items():
        if other != info:
            keys = ", ".join(differing_keys(asdict(info), asdict(other)))
            raise DataError(f"{path}: has another {keys} than {first.name}. Delete the one that does not belong there.")
    return info


def count_rows(path: Path) -> int:
    """Return how many objects a file has. Read its footer alone."""
    return _open(path).metadata.num_rows


def read_column(path: Path, name: str) -> np.ndarray:
    """Return a column of numbers, [n]."""
    return _columns(path, [name]).column(name).to_numpy()


def read_names(source: str | Path) -> Iterator[tuple[str, str]]:
    """Yield sha256 and name of the objects of a folder's shards, or of one file, in order. Do not read their ids."""
    for path in shard_files(source):
        for batch in _batches(_open(path), path, ["sha256", "name"]):
            yield from zip(batch.column("sha256").to_pylist(), batch.column("name").to_pylist(), strict=True)


def read_left_out(path: Path) -> list[dict[str, str]]:
    """Return {"file", "sha256", "reason"} of each object in a shard's share that has no row.

    Raise DataError if they are damaged.
    """
    rows = _said(path, LEFT_OUT) or []
    keys = ("file", "sha256", "reason")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys) for row in rows
    ):
        raise _invalid(path, LEFT_OUT)
    return rows


def read_data_key(source: str | Path) -> dict[str, Any] | None:
    """Return what identifies the data of a folder's ids, or of one file's; None if a file does not say.

    Raise DataError if it is damaged.
    """
    path = shard_files(source)[0]
    made_from = _said(path, MADE_FROM)
    data = made_from.get("data") if isinstance(made_from, dict) else None
    if not isinstance(data, dict | None):
        raise _invalid(path, MADE_FROM)
    return data


def read_shards(source: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a folder's shards, or of one file, in order.

    A row is {"sha256": str, "name": str, "source": str or None, "tokens": int64 array [T], "num_voxels": int}, with
    "iou": float and "frame": str or None if the file has them. The tokens are ids in every form.
    Raise DataError for missing or damaged shards, for an object whose number of ids is not T, for an id outside [0, K),
    and for a sequence that is not the octree form of an object.
    """
    info = read_info(source)
    for path in shard_files(source):
        file = _open(path)
        _check_columns(file, schema(info).names, path)
        _check_lengths(info, path)
        for batch in _batches(file, path):
            yield from _rows(batch, info, path)


def _rows(batch: "pyarrow.RecordBatch", info: TokenInfo, path: Path) -> Iterator[dict[str, Any]]:
    columns = {name: batch.column(name).to_pylist() for name in batch.schema.names if name != "tokens"}
    read = _dense_ids if info.octree is None else _octree_ids
    for i, ids in enumerate(read(batch.column("tokens"), columns["sha256"], info, path)):
        yield {"tokens": ids, **{name: values[i] for name, values in columns.items()}}


def _dense_ids(lists: "pyarrow.ListArray", sha256: list[str], info: TokenInfo, path: Path) -> Iterable[np.ndarray]:
    """Return ids [n, T] int64."""
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    if (lengths != info.num_tokens).any():
        row = int(np.argmax(lengths != info.num_tokens))
        raise DataError(
            f"{path}: {sha256[row]} has {lengths[row]} ids, but its metadata say {info.num_tokens}. Delete the file "
            "and run scripts/to_tokens.py again."
        )
    tokens = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64).reshape(-1, info.num_tokens)
    outside = ((tokens < 0) | (tokens >= info.n_embed)).any(1)
    if outside.any():
        raise DataError(
            f"{path}: {sha256[int(np.argmax(outside))]} has an id outside [0, {info.n_embed}). Delete the file and run "
            "scripts/to_tokens.py again."
        )
    return tokens


def _octree_ids(lists: "pyarrow.ListArray", sha256: list[str], info: TokenInfo, path: Path) -> Iterable[np.ndarray]:
    """Yield ids [T] int64."""
    assert info.octree is not None
    for row, sequence in zip(sha256, lists.to_pylist(), strict=True):
        try:
            if sequence is None:
                raise DataError("its sequence is missing")
            ids, problems = info.octree.read(integers(sequence, "values"))
            if problems:
                raise DataError(min(problems, key=lambda problem: problem.position).message)
        except DataError as error:
            raise DataError(f"{path}: {row}: {error}. Delete the file and run scripts/to_tokens.py again.") from error
        yield ids.numpy()


def _open(path: Path) -> "pyarrow.parquet.ParquetFile":
    """Open a Parquet file. Raise DataError if it is damaged or of a newer format version."""
    require_pyarrow()
    import pyarrow.parquet

    require_file(path, DataError, "scripts/to_tokens.py writes such files")
    with _reading(path):
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        file.schema_arrow.names  # noqa: B018 - decodes them
    version = (file.schema_arrow.metadata or {}).get(VERSION_KEY.encode(), b"1").decode(errors="replace")
    known = version.isdecimal() and len(version) < 10
    check_version(int(version) if known else version[:80], FORMAT_VERSION, path, DataError)
    return file


def _batches(
    file: "pyarrow.parquet.ParquetFile", path: Path, names: list[str] | None = None
) -> Iterator["pyarrow.RecordBatch"]:
    """Yield columns in pieces of ROWS_AT_ONCE rows, all columns by default.

    Raise DataError if the file lacks one, is damaged, or has no value where there must be one.
    """
    _check_columns(file, names or [], path)
    number = 0
    batches = file.iter_batches(ROWS_AT_ONCE, columns=names)
    while True:
        with _reading(path):
            batch = next(batches, None)
        if batch is None:
            break
        for name in set(batch.schema.names) & COLUMNS.keys() - set(OPTIONAL):
            if batch.column(name).null_count:
                row = number + batch.column(name).is_null().to_pylist().index(True)
                raise DataError(
                    f"{path}: {name} of row {row} is missing. Delete the file and run scripts/to_tokens.py again."
                )
        number += batch.num_rows
        yield batch
    _check_rows(file, number, path)


def _columns(path: Path, names: list[str]) -> "pyarrow.Table":
    """Return columns. Raise DataError as `_batches` does."""
    import pyarrow as pa

    file = _open(path)
    batches = list(_batches(file, path, names))
    return pa.Table.from_batches(batches, None if batches else pa.schema([file.schema_arrow.field(n) for n in names]))


def _check_lengths(info: TokenInfo, path: Path) -> None:
    """Raise DataError if the lists of tokens have more values than objects can have.

    Compressed, they take no space in the file: only memory, once they are read.
    """
    # An octree has a mask above each token and at most as many above those.
    most = info.num_tokens if info.octree is None else info.num_tokens + 2 * math.prod(info.lattice) + info.octree.depth
    with _reading(path):
        groups = read_row_groups(path)
    for group in groups:
        values = sum(count for name, count in group.num_values.items() if name.startswith("tokens."))
        if values > group.num_rows * max(1, most):
            raise DataError(
                f"{path}: has {values} ids in {group.num_rows} rows, where an object has at most {most}. Delete the "
                "file and run scripts/to_tokens.py again."
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a DataError."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Change its permissions.") from error
    except Exception as error:  # errors of Arrow, of the system and of text, ValueError, KeyError, …
        raise _damaged(path, error) from error


def _check_rows(file: "pyarrow.parquet.ParquetFile", number: int, path: Path) -> None:
    """Raise DataError unless so many rows were read as the file says that it has.

    Checksums are of the pages' content; a damaged header of a page can end a column early, without an error.
    """
    if number != file.metadata.num_rows:
        raise DataError(
            f"{path}: is damaged: {number} of its {file.metadata.num_rows} rows can be read. Delete it and run "
            "scripts/to_tokens.py again."
        )


def _check_columns(file: "pyarrow.parquet.ParquetFile", names: Iterable[str], path: Path) -> None:
    """Raise DataError if a column of these names is missing, given twice, or one of COLUMNS holds something else."""
    present = file.schema_arrow.names
    if lacking := set(names) - set(present):
        raise DataError(f"{path}: has no column {', '.join(sorted(lacking))}. scripts/to_tokens.py writes such files.")
    for field in file.schema_arrow:
        if present.count(field.name) > 1:
            raise DataError(f"{path}: has the column {field.name} twice. scripts/to_tokens.py writes such files.")
        if field.name in COLUMNS and not _holds(field.type, COLUMNS[field.name]):
            raise DataError(
                f"{path}: its column {field.name} is {str(field.type):.80}, not {COLUMNS[field.name]}. Delete the file "
                "and run scripts/to_tokens.py again."
            )


def _holds(kind: "pyarrow.DataType", what: str) -> bool:
    """Return whether a type is one of COLUMNS' kinds."""
    import pyarrow as pa

    if what == "text":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if what == "whole numbers":
        return pa.types.is_integer(kind)
    if what == "numbers":
        return pa.types.is_floating(kind)
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def _said(path: Path, key: str) -> Any:
    """Return what a file's metadata say under a key, None if nothing. Raise DataError if it is no JSON."""
    text = (_open(path).schema_arrow.metadata or {}).get(key.encode())
    try:
        return None if text is None else parse_json(text.decode(), key)
    except (ValueError, ConfigError) as error:
        raise _invalid(path, key) from error


def _invalid(path: Path, key: str) -> DataError:
    return DataError(f"{path}: its metadata have no valid {key}. scripts/to_tokens.py writes such files.")


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"{path}: is not a readable Parquet file ({reason}). Delete it and run scripts/to_tokens.py again."
    )
