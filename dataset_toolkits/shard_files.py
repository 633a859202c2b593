"""What pack.py and voxelize.py share about the shards that they write: sizes, names, columns, and worker processes."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.datasets.shard_table import FROM_GRID
from trellis.datasets.shards import SUFFIX, shards_in, write_shard
from trellis.datasets.tables import typed
from trellis.grids.voxels import pack_bits, packed_size, points_to_voxels, read_ply, voxels_to_grid
from trellis.utils import signals
from trellis.utils.errors import DataError

BITS_PER_SHARD = 2**30  # 128 MiB, which a process that writes a shard holds
SIGNAL_SECONDS = 0.2  # between looks for a signal
NUMBER = re.compile(r"grids-(\d{6,})-.*\.arrow")


def grids_per_shard(resolution: int) -> int:
    """Return how many grids go into a shard unless somebody says otherwise: 4,096 of 64^3."""
    return max(1, min(4096, BITS_PER_SHARD // resolution**3))


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

    def write(self) -> None:
        """Read the voxel files and write the shard. Raise DataError for a file that cannot be read."""
        bits = np.empty((len(self), packed_size(self.resolution)), np.uint8)
        others = (row for row in range(len(self)) if row not in self.voxel_files)
        for row, grid in zip(others, self.grids, strict=True):
            bits[row] = unsqueeze(grid)
        for row, path in self.voxel_files.items():
            voxels = points_to_voxels(read_ply(path), self.resolution, name=str(path))
            bits[row] = pack_bits(voxels_to_grid(voxels, self.resolution)[None])[0]
        write_shard(self.path, bits, self.resolution, self.columns)


def write_shards(tasks: Iterable[Task], workers: int, done: Callable[[int], None]) -> None:
    """Write shards in this process, or in several worker processes, each of which holds one at a time.

    done: called with the number of grids of each shard once it is written.
    Raise what a task raises, DataError if a process was killed. Nothing is left of unfinished shards.
    """
    if workers == 1:
        for task in tasks:
            task.write()
            done(len(task))
        return
    others = set(multiprocessing.active_children())
    # A signal is looked for between calls of the pool: an exception within them could leave its locks taken.
    with signals.noted() as handled, _pool(workers) as pool:
        try:
            for count in _written(pool, tasks, workers, handled):
                done(count)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
                process.join()
            if isinstance(error, BrokenProcessPool):
                raise DataError(
                    "a process that packs grids was killed, perhaps for want of memory: take fewer --max_workers, or "
                    "a smaller --shard_size. What is written is kept."
                ) from error
            raise


def _pool(workers: int) -> ProcessPoolExecutor:
    with _signals_blocked():
        return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start)


def _written(pool: ProcessPoolExecutor, tasks: Iterable[Task], workers: int, handled: signals.Signals) -> Iterator[int]:
    """Yield the number of grids of each shard that is written. Raise Stopped after a signal."""
    running: dict[Future, int] = {}
    for task in tasks:
        with _signals_blocked():
            running[pool.submit(task.write)] = len(task)
        while len(running) > workers:
            yield from _ended(running, handled)
    while running:
        yield from _ended(running, handled)


def _ended(running: dict[Future, int], handled: signals.Signals) -> Iterator[int]:
    for future in wait(running, timeout=SIGNAL_SECONDS, return_when=FIRST_COMPLETED).done:
        future.result()
        yield running.pop(future)
    if handled.signum is not None:
        raise signals.Stopped(handled.signum)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep signals to a whole group of processes, such as Ctrl-C, from processes that start in the block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """Let a worker end with its parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
