"""Shards: Arrow files that hold the grids of many objects, compressed one by one, and what is known about them.

This is format 1. A shard is an Arrow IPC file with one record batch, uncompressed as a whole, so that all processes of a
machine map one copy of it and read any row at once. Every reader of Arrow opens it (pyarrow, pandas, polars, DuckDB,
Hugging Face datasets). Columns, one row per object:

    sha256           text: name of the object
    grid             binary: the grid of resolution R, an even number, as bits [R^3 / 8] (grids.voxels.pack_bits), a zstd
                     frame
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
The schema's metadata hold, under `trellis_grids`, JSON: `format`, `resolution`, and `sums`, {column: CRC-32 of its
buffers as a reader finds them; of `grid` those of its offsets alone, as rows have sums of their own}. So no damage is
read without a word, and a damaged grid costs its row alone.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
LEVEL = 9  # of zstd: 1.10 KB a grid of 64^3; 3 takes 1.33 KB and half the time, 19 takes 0.99 KB and 46 times the time


def require_pyarrow() -> None:
    """Raise ConfigError, with the command that installs it, if pyarrow cannot be loaded."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"shards of grids need pyarrow ({error}): pip install pyarrow") from error


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
    num_voxels = np.array([int.from_bytes(row.tobytes()).bit_count() for row in bits], np.int32)
    if not num_voxels.all():
        empty = columns["sha256"][int(np.argmin(num_voxels))]
        raise DataError(f"{path}: the grid of {empty} has no occupied voxel")
    codec = pa.Codec("zstd", compression_level=LEVEL)
    grids = [codec.compress(np.ascontiguousarray(row), asbytes=True) for row in bits]
    sums = np.array([zlib.crc32(grid) for grid in grids], np.uint32)
    values = {**columns, "grid": grids, "checksum": sums, "num_voxels": num_voxels}
    ordered = [name for name in TYPES if name in values] + sorted(values.keys() - TYPES)
    arrays = [pa.array(values[name], _type(name)) for name in ordered]
    if any(len(array) != count for array in arrays):
        raise ValueError(f"columns must have {count} values: {dict(zip(ordered, map(len, arrays), strict=True))}")
    batch = pa.record_batch(arrays, names=ordered)
    said = {"format": FORMAT_VERSION, "resolution": resolution, "sums": _sums(_as_read(batch))}
    batch = batch.replace_schema_metadata({METADATA: json.dumps(said)})
    with atomic_write(path) as partial, pa.OSFile(str(partial), "wb") as sink:
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)


def _type(name: str) -> "pa.DataType":
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


class Shard:
    """A shard that is open, mapped into memory. Raise DataError if it cannot be read.

    path: the file.
    """

    def __init__(self, path: Path):
        require_pyarrow()
        import pyarrow as pa

        self.path = path
        require_file(path, DataError, "pack.py writes shards")
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            said = json.loads((reader.schema.metadata or {})[METADATA])
            check_version(said["format"], FORMAT_VERSION, path, DataError)
            self.resolution = int(said["resolution"])
            self._known_sums = dict(said["sums"])
            self.batch = reader.get_batch(0)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: is not a readable shard of grids ({error}). Make it anew by pack.py.") from error
        self._checked: set[str] = set()
        self._codec = pa.Codec("zstd")
        self._grids = self.column("grid")
        self._sums = self.column("checksum").to_numpy()
        self._size = self.resolution**3 // 8

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
            if _sum(name, array) != self._known_sums.get(name):
                raise DataError(
                    f"{self.path}: its column {name} is damaged (its sum is another): {len(self)} rows are lost. "
                    "Make the file anew by pack.py."
                )
            self._checked.add(name)
        return array

    def bits(self, row: int) -> np.ndarray:
        """Return a grid as uint8 [R^3 / 8]. Raise DataError if it is damaged."""
        grid = self._grids[row].as_buffer()
        if zlib.crc32(grid) != self._sums[row]:
            raise DataError(
                f"{self.path}: the grid of row {row}, {self.column('sha256')[row]}, is damaged (its sum is another). "
                "Make the file anew by pack.py."
            )
        return np.frombuffer(self._codec.decompress(grid, self._size), np.uint8)
