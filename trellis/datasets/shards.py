"""Shards: Arrow files that hold the grids of many objects, compressed one by one, and what is known about them.

This is format 1. A shard is an Arrow IPC file with one record batch, uncompressed as a whole, so that all processes of
a machine map one copy of it and read any row at once. Readers of Arrow's file format open it: pyarrow.ipc.open_file,
pandas.read_feather, polars.read_ipc, and load_dataset("arrow", data_files=...) of Hugging Face datasets, whose
Dataset.from_file takes Arrow streams alone. Columns, one row per object:

    sha256           text: name of the object
    grid             binary: the grid of resolution R, an even number, as bits [R^3 / 8] (grids.voxels.pack_bits), a
                     zstd frame
    checksum         uint32: CRC-32 of `grid` as it is stored
    num_voxels       int32: occupied voxels
    name             text: mesh file
    source           text: collection that an object comes from
    kind             text: what an object is, such as "anatomy", for scores by kind
    captions         list of text
    split            text: "train" or "val"
    up_axis          text: how mesh files were turned, see grids.placing
    normalization    text: how meshes were scaled, see grids.placing
    fill             text: "solid" if the inside is occupied too; null: "surface"
    mm_per_cell      float64: edge of a voxel in mm, of objects of scans
    frame            text: where an object's grid lies in its scan, JSON with its affine, see grids.volumes.Frame
    aesthetic_score  float64: as TRELLIS's metadata have it

The first four are always there and never null; the others may be missing. Further columns are text, kept and ignored.
The schema's metadata hold, under `trellis_grids`, JSON: `format`, `resolution`, `sums`, {column: CRC-32 of its buffers
as a reader finds them; of `grid` those of its offsets alone, as rows have sums of their own}, and `framing`, 8 digits:
the CRC-32 of the bytes before and after the columns, taken with zeros in place of these digits. So no damage is read
without a word, Arrow gets no damaged schema to interpret, and a damaged grid costs its row alone.
"""

import json
import mmap
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..grids.voxels import count_voxels
from ..utils.errors import ConfigError, DataError
from ..utils.files import atomic_write
from ..utils.formats import check_version
from ..utils.inputs import require_file

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
SUFFIX = ".arrow"
METADATA = b"trellis_grids"
TYPES = {
    "sha256": "string",
    "grid": "binary",
    "checksum": "uint32",
    "num_voxels": "int32",
    "name": "string",
    "source": "string",
    "kind": "string",
    "captions": "list<string>",
    "split": "string",
    "up_axis": "string",
    "normalization": "string",
    "fill": "string",
    "mm_per_cell": "double",
    "frame": "string",
    "aesthetic_score": "double",
}
"""The type of each column; further ones are strings."""
REQUIRED = ("sha256", "grid", "checksum", "num_voxels")
# Of zstd: 1.10 KB a grid of 64^3. Level 3 takes 1.33 KB and half the time, 19 takes 0.99 KB and 46 times the time.
LEVEL = 9
LARGEST_RESOLUTION = 2048  # more is damage: 1 GiB a grid
MAGIC = b"ARROW1"
FRAMING = re.compile(rb'"framing": "([0-9a-f]{8})"')
NO_SUM = "0" * 8  # what the framing has in place of its sum when that is taken


def require_pyarrow() -> None:
    """Raise ConfigError, with the command that installs it, if pyarrow cannot be loaded."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"shards of grids need pyarrow ({error}): pip install pyarrow") from error


def shards_in(root: Path) -> list[Path]:
    """Return the shards of a root: itself, or the files of a folder by name. Temporary files have hidden names."""
    if root.suffix == SUFFIX and root.is_file():
        return [root]
    return sorted(path for path in root.glob(f"*{SUFFIX}") if not path.name.startswith("."))


def write_shard(path: Path, bits: np.ndarray, resolution: int, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a shard atomically.

    bits: [N, R^3 / 8] uint8, N >= 1.
    columns: {name: N values, None where there is none} with `sha256`, without `grid`, `checksum` and `num_voxels`.
    Raise ConfigError without pyarrow, DataError for an empty grid, ValueError for arrays of other shapes.
    """
    require_pyarrow()
    import pyarrow as pa

    count = len(bits)
    if bits.dtype != np.uint8 or bits.shape != (count, resolution**3 // 8) or not count:
        raise ValueError(f"bits must be uint8 [N, {resolution**3 // 8}], N >= 1, not {bits.dtype} {list(bits.shape)}")
    bits = np.ascontiguousarray(bits)
    num_voxels = np.array([count_voxels(row) for row in bits], np.int32)
    if not num_voxels.all():
        empty = columns["sha256"][int(np.argmin(num_voxels))]
        raise DataError(f"{path}: the grid of {empty} has no occupied voxel")
    codec = pa.Codec("zstd", compression_level=LEVEL)
    grids = [codec.compress(row, asbytes=True) for row in bits]
    sums = np.array([zlib.crc32(grid) for grid in grids], np.uint32)
    values = {**columns, "grid": grids, "checksum": sums, "num_voxels": num_voxels}
    ordered = [name for name in TYPES if name in values] + sorted(values.keys() - TYPES)
    arrays = [pa.array(values[name], arrow_type(name)) for name in ordered]
    if any(len(array) != count for array in arrays):
        raise ValueError(f"columns must have {count} values: {dict(zip(ordered, map(len, arrays), strict=True))}")
    batch = pa.record_batch(arrays, names=ordered)
    said = {"format": FORMAT_VERSION, "resolution": resolution, "sums": _sums(_as_read(batch)), "framing": NO_SUM}
    batch = batch.replace_schema_metadata({METADATA: json.dumps(said)})
    with atomic_write(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with open(partial, "r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            framed, places = framing(content)
            for place in places:
                content[place : place + len(NO_SUM)] = f"{zlib.crc32(framed):08x}".encode()


def arrow_type(name: str) -> "pa.DataType":
    """Return the type of a column."""
    import pyarrow as pa

    kind = TYPES.get(name, "string")
    return pa.list_(pa.string()) if kind == "list<string>" else pa.type_for_alias(kind)


def _as_read(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Return a batch with the buffers that a reader of its file finds."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_file(sink.getvalue()).get_batch(0)


def _sums(batch: "pa.RecordBatch") -> dict[str, int]:
    return {name: _sum(name, batch.column(name)) for name in batch.schema.names}


def _sum(name: str, array: "pa.Array") -> int:
    """Return the CRC-32 of an array's buffers; of `grid` without the grids."""
    total = 0
    for buffer in array.buffers()[: 2 if name == "grid" else None]:
        if buffer is not None:
            total = zlib.crc32(buffer, total)
    return total


def framing(content: Any) -> tuple[bytes, list[int]]:
    """Return what a file has before and after its columns, without the sum in it, and the places of that sum.

    content: the file, as bytes or mapped. A file is the magic, the messages of the schema and of the batch, the
    columns, an end mark of 8 bytes, the footer, its length and the magic. A message has a mark, its length, and so
    many bytes. Raise ValueError if it is not.
    """
    size = len(content)
    if content[: len(MAGIC)] != MAGIC or content[size - len(MAGIC) :] != MAGIC:
        raise ValueError("it does not begin and end as an Arrow file" if size else "it is empty")
    start = 8
    for _ in range(2):  # the schema, the batch
        length = int.from_bytes(content[start + 4 : start + 8], "little")
        start += 8 + length
    end = size - len(MAGIC) - 4
    end -= int.from_bytes(content[end : end + 4], "little") + 8
    if not 8 <= start <= end:
        raise ValueError("it is cut off, or the lengths in it are wrong")
    head, tail = content[:start], content[end:]
    found = [(match, offset) for part, offset in ((head, 0), (tail, end)) for match in FRAMING.finditer(part)]
    if len(found) != 2 or found[0][0][1] != found[1][0][1]:
        raise ValueError("the sum of its schema is not in it")
    return FRAMING.sub(b'"framing": "%s"' % NO_SUM.encode(), head + tail), [m.start(1) + at for m, at in found]


class Shard:
    """A shard that is open, mapped into memory. Processes share its pages; a copy for another one opens the file anew.

    path: the file. name: what errors call it; the path if None.
    Raise ConfigError without pyarrow, DataError if the file cannot be read, naming it and the rows lost if they are
    known.
    """

    def __init__(self, path: Path, name: str | None = None):
        require_pyarrow()
        import pyarrow as pa

        self.path, self.name = path, name or str(path)
        require_file(path, DataError, "pack.py writes shards")
        try:
            self._check_framing()
            file = pa.memory_map(str(path))
            reader = pa.ipc.open_file(file)
            said = json.loads((reader.schema.metadata or {})[METADATA])
            check_version(said["format"], FORMAT_VERSION, path, DataError)
            self.resolution = int(said["resolution"])
            if not 0 < self.resolution <= LARGEST_RESOLUTION or self.resolution % 2:
                raise ValueError(f"its resolution is {self.resolution}")
            self._known_sums = dict(said["sums"])
            self.batch = reader.get_batch(0)
            file.close()  # the batch keeps the mapping; thousands of open files would be too many
            self.batch.validate()
            types = {field.name: field.type for field in self.batch.schema}
            wrong = [name for name, own in types.items() if own != arrow_type(name)]
            if missing := [name for name in REQUIRED if name not in types]:
                raise ValueError(f"it has no column {missing[0]}")
            if wrong:
                raise ValueError(f"its column {wrong[0]} is {types[wrong[0]]}, not {arrow_type(wrong[0])}")
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.name}: is not a readable shard of grids ({error}): all its rows are lost. Delete it and "
                "repeat the command that made it."
            ) from error
        self._checked: set[str] = set()  # columns whose sums fit
        self._codec = pa.Codec("zstd")
        offsets, grids = self.column("grid").buffers()[1:]
        self._starts, self._grids = np.frombuffer(offsets, np.int32), memoryview(grids)
        self._size = self.resolution**3 // 8
        self.checksums: np.ndarray = self.column("checksum").to_numpy()
        self.num_voxels: np.ndarray = self.column("num_voxels").to_numpy()
        if not len(self) or not self.num_voxels.all():
            empty = (
                f"the grid of row {int(np.argmin(self.num_voxels))} has no occupied voxel" if len(self) else "no row"
            )
            raise DataError(f"{self.name}: {empty}. Delete the file and repeat the command that made it.")

    def _check_framing(self) -> None:
        """Raise ValueError unless the bytes around the columns are those that were written."""
        with open(self.path, "rb") as file:
            if not self.path.stat().st_size:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                framed, places = framing(content)
                said = content[places[0] : places[0] + len(NO_SUM)]
        if int(said, 16) != zlib.crc32(framed):
            raise ValueError("its schema is damaged, the sum is another")

    def __reduce__(self) -> tuple[type["Shard"], tuple[Path, str]]:
        return type(self), (self.path, self.name)

    def __len__(self) -> int:
        return self.batch.num_rows

    @property
    def names(self) -> list[str]:
        """The columns that it has."""
        return self.batch.schema.names

    def column(self, name: str) -> "pa.Array":
        """Return a column, which maps the file. Raise DataError if it is damaged."""
        array = self.batch.column(name)
        if name not in self._checked:
            reason = "its sum is another" if _sum(name, array) != self._known_sums.get(name) else _invalid(array)
            if reason:
                first = "" if name == "sha256" else f", from {self.column('sha256')[0]} on"
                raise DataError(
                    f"{self.name}: its column {name} is damaged ({reason}): {len(self)} rows are lost{first}. "
                    "Delete the file and repeat the command that made it."
                )
            self._checked.add(name)
        return array

    def bits(self, row: int) -> np.ndarray:
        """Return a grid as uint8 [R^3 / 8]. Raise DataError, naming it, if it is damaged."""
        grid = self._grids[self._starts[row] : self._starts[row + 1]]
        if zlib.crc32(grid) != self.checksums[row]:
            raise self._damaged(row, "its sum is another")
        try:
            bits = np.frombuffer(self._codec.decompress(grid, self._size), np.uint8)
        except OSError as error:  # of its own kind in pyarrow
            raise self._damaged(row, f"it does not give {self._size} bytes: {error}") from error
        found = count_voxels(bits)
        if found != self.num_voxels[row]:
            raise self._damaged(row, f"it has {found} occupied voxels, and num_voxels is {self.num_voxels[row]}")
        return bits

    def setting(self, name: str, rows: np.ndarray | None = None) -> set[str | None]:
        """Return the values of one of metadata.SETTINGS, in rows [n] int64 or in all; None for objects that do not say.

        A blank `fill` is "surface".
        """
        values: set[str | None] = {None}
        if name in self.names:
            column = self.column(name) if rows is None else self.column(name).take(rows)
            values = {value or None for value in column.unique().to_pylist()}
        return {value or "surface" for value in values} if name == "fill" else values

    def _damaged(self, row: int, reason: str) -> DataError:
        return DataError(
            f"{self.name}: the grid of row {row}, {self.column('sha256')[row]}, is damaged ({reason}): 1 of "
            f"{len(self)} rows is lost. Delete the file and repeat the command that made it."
        )


def _invalid(array: "pa.Array") -> str | None:
    """Return why Arrow could not read an array without harm, such as offsets out of it; None if it can."""
    import pyarrow as pa

    try:
        array.validate(full=True)
    except pa.ArrowException as error:
        return " ".join(str(error).split())
    return None
