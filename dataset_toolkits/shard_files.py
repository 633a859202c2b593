"""What the programs share about the shards that they write: sizes, names, columns, and who writes them."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.datasets.shard_table import FROM_GRID
from trellis.datasets.shards import SUFFIX, shards_in, write_shard
from trellis.datasets.tables import typed
from trellis.grids.voxels import pack_bits, packed_size, points_to_voxels, read_ply, voxels_to_grid
from trellis.utils.errors import DataError

from .processes import run_in_processes

CHUNK = 1024  # objects that are read at a time
BITS_PER_SHARD = 2**30  # 128 MiB, which a process that writes a shard holds
NUMBER = re.compile(r"grids-(\d{6,})-.*\.arrow")


def grids_per_shard(resolution: int) -> int:
    """Return how many grids go into a shard unless somebody says otherwise: 4,096 of 64^3."""
    return max(1, min(4096, BITS_PER_SHARD // resolution**3))


def chunks(indices: np.ndarray, size: int | None = None) -> Iterator[np.ndarray]:
    """Yield indices [n] in parts. size: of a part; None: CHUNK."""
    size = size or CHUNK
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def next_number(folder: Path) -> int:
    """Return a number greater than that of all shards in a folder, so that new ones come after them."""
    found = (NUMBER.fullmatch(path.name) for path in shards_in(folder))
    return max((int(match[1]) for match in found if match), default=0) + 1


def columns_of_row(where: str, row: Mapping[str, str]) -> dict[str, Any]:
    """Return {column of a shard: value} of a row of texts without its blanks.

    where: what errors call it.
    Raise DataError for what is no number, or for a column of a name that shards use otherwise.
    """
    given = {name: text for name, text in row.items() if text}
    if taken := [name for name in given if name in FROM_GRID]:
        raise DataError(f"{where}: has a column {taken[0]}, a name that shards use themselves. Rename it.")
    if "caption" in given and "captions" not in given:
        given["captions"] = given.pop("caption")
    return {name: typed(where, name, [text])[0] for name, text in given.items()}


def digest_of(parts: Iterable[object]) -> str:
    """Return 12 hexadecimal digits that stand for values of JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:12]


def squeeze(bits: np.ndarray) -> bytes:
    """Return a grid as bits, uint8 [R^3 / 8], in little memory and time, on its way to a shard."""
    return zlib.compress(bits.tobytes(), 1)


def unsqueeze(grid: bytes) -> np.ndarray:
    """Undo `squeeze`."""
    return np.frombuffer(zlib.decompress(grid), np.uint8)


class GridBuffer:
    """Grids that are not in a shard yet.

    folder: gets the shards, which come after those that are there.
    run: goes into their names; no other run has it.
    resolution: R, an even number.
    columns: those of every shard, also where no grid of it has a value.
    """

    def __init__(self, folder: Path, run: str, resolution: int, columns: Sequence[str]):
        self.folder, self.run, self.resolution, self.columns = folder, run, resolution, columns
        self.limit = grids_per_shard(resolution)
        self._grids: list[tuple[bytes, Mapping[str, Any]]] = []
        self._number = 0
        self._written = 0

    def __len__(self) -> int:
        return len(self._grids)

    def add(self, bits: bytes, values: Mapping[str, Any]) -> None:
        """Add a grid, as of `squeeze`, and its values of columns."""
        self._grids.append((bits, values))

    def write(self) -> None:
        """Write what there is as shards of at most `limit` grids. A grid that is written is not kept."""
        while self._grids:
            part = self._grids[: self.limit]
            self._number = self._number or next_number(self.folder)
            path = self.folder / f"grids-{self._number:06d}-{self.run}-{self._written:05d}{SUFFIX}"
            bits = np.stack([unsqueeze(grid) for grid, _ in part])
            columns = {name: [values.get(name) for _, values in part] for name in self.columns}
            write_shard(path, bits, self.resolution, columns)
            self._written += 1
            del self._grids[: self.limit]


@dataclass
class Task:
    """A shard to write.

    columns: as for `write_shard`, N values each.
    voxel_files: {row: PLY file} of some rows.
    grids: those of the other rows in their order, as of `squeeze`: a process has several tasks waiting.
    """

    path: Path
    resolution: int
    columns: Mapping[str, Sequence[Any]]
    voxel_files: Mapping[int, Path]
    grids: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.grids) + len(self.voxel_files)

    def write(self) -> int:
        """Read the voxel files, write the shard, and return its number of grids.

        Raise DataError for a file that cannot be read.
        """
        bits = np.empty((len(self), packed_size(self.resolution)), np.uint8)
        others = (row for row in range(len(self)) if row not in self.voxel_files)
        for row, grid in zip(others, self.grids, strict=True):
            bits[row] = unsqueeze(grid)
        for row, path in self.voxel_files.items():
            voxels = points_to_voxels(read_ply(path), self.resolution, name=str(path))
            bits[row] = pack_bits(voxels_to_grid(voxels, self.resolution)[None])[0]
        write_shard(self.path, bits, self.resolution, self.columns)
        return len(self)


def write_shards(tasks: Iterable[Task], workers: int, done: Callable[[int], None]) -> None:
    """Write shards in this process, or in several worker processes, each of which holds one at a time.

    done: called with the number of grids of each shard once it is written.
    Raise what a task raises, DataError if a process was killed. Nothing is left of unfinished shards.
    """
    try:
        run_in_processes(Task.write, tasks, workers, done)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that packs grids was killed, perhaps for want of memory: take fewer --max_workers, or "
            "a smaller --shard_size. What is written is kept."
        ) from error
