"""Where scripts/to_tokens.py takes grids from: data roots of train.py, or mesh files, voxelized as they are needed.

Both give out shards, which are runs of their objects, with grids as packed bits (trellis.grids.voxels.pack_bits).
Axes: B objects of a batch, R voxels along an axis.
"""

import copy
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trellis.datasets.base import Rows
from trellis.datasets.batches import load_batches
from trellis.datasets.metadata import Split, compare_with_tokenizer
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import pack_bits, voxels_to_grid
from trellis.tokens.sharegpt import CAPTION_COLUMNS, captions_of, read_captions
from trellis.utils.errors import DataError
from trellis.utils.ray_cluster import Cluster

if TYPE_CHECKING:
    from dataset_toolkits.plan import Job
    from trellis.grids.meshes import Voxelized

BATCH = {"cpu": 8, "cuda": 64}  # objects per batch, enough to keep a device busy; ids do not depend on it
AT_ONCE = 10_000  # objects whose texts are looked up together


class TokenObject(NamedTuple):
    """An object as its row in a Parquet file names it."""

    sha256: str
    name: str
    source: str | None = None
    frame: str | None = None  # where it lies in its scan


class Shard(NamedTuple):
    """A run of objects with their grids."""

    number: int
    objects: Sequence[TokenObject]  # those that have a grid
    batches: Iterable[Tensor]  # [B, ceil(R³ / 8)] uint8 on the CPU, in the order of `objects`
    left_out: list[dict[str, str]]  # {"file", "sha256", "reason"} of the objects without a grid


class DataSource:
    """Grids of data roots, in the order of the dataset.

    roots: comma-separated, as the --data_dir of train.py.
    split: "train", "val" or "all".
    resolution, up_axis, normalization: the tokenizer's.
    Raise DataError if a root cannot be read, has another resolution, or says that its grids have another
    normalization.

    notes: what a user should know about roots that differ from one another or from the tokenizer.
    """

    def __init__(self, roots: str, split: Split, resolution: int, up_axis: str, normalization: str):
        self.given = roots, split, resolution, up_axis, normalization
        self.dataset = SparseStructure(roots, resolution=resolution, split=split)
        self.objects: Sequence[TokenObject] = Rows(len(self.dataset), self._objects_at)  # a list would take a gigabyte
        self.failures: list[dict[str, str]] = []
        differing = compare_with_tokenizer(self.dataset.settings, up_axis, normalization)
        self.notes = [*self.dataset.notes, *differing]
        self.noted: list[tuple[str, str]] = []  # of files; grids have none

    def __reduce__(self):
        return type(self), self.given  # each process reads the data itself

    def key(self) -> dict[str, str | int]:
        """Return what identifies the grids."""
        return self.dataset.content_key()

    def _objects_at(self, indices: np.ndarray) -> list[TokenObject]:
        columns = (self.dataset.texts(name, indices) for name in TokenObject._fields)
        return [TokenObject(*values) for values in zip(*columns, strict=True)]

    def has_frames(self) -> bool:
        """Return whether an object says where it lies in its scan."""
        return any(any(self.dataset.texts("frame", indices)) for indices in self._parts())

    def _parts(self) -> Iterator[np.ndarray]:
        """Yield the indices of all objects, some at a time."""
        yield from np.split(np.arange(len(self.dataset)), range(AT_ONCE, len(self.dataset), AT_ONCE))

    def captions(self) -> dict[str, list[str]]:
        """Return captions by sha256, if metadata.csv or shards have any."""
        captions: dict[str, list[str]] = {}
        tables = [path for root in self.dataset.roots if (path := Path(root, "metadata.csv")).is_file()]
        for path in tables:
            captions |= read_captions(path, required=False)
        if len(tables) == len(self.dataset.roots):
            return captions
        for indices in self._parts():
            columns = self.dataset.columns_of(indices)
            for name in CAPTION_COLUMNS:
                for sha256, value in zip(columns["sha256"], columns.get(name, ()), strict=False):
                    if value is not None and (found := captions_of(value)):
                        captions.setdefault(sha256, found)
        return captions

    def feed(
        self,
        shards: dict[int, slice],
        device: torch.device,
        processes: int,
        tokenize: Callable[[Shard], None],
        progress: Callable[[int], object],
    ) -> None:
        """Call tokenize for each shard, one after the other.

        shards: {number: slice of the objects}.
        processes: how many programs share this machine.
        progress: called with a number of objects as they are read.
        Raise DataError for a grid that cannot be read, and what tokenize raises.
        """
        size = BATCH[device.type]
        indices = {number: np.arange(len(self.objects))[objects] for number, objects in shards.items()}
        batches = [part for whole in indices.values() for part in np.split(whole, range(size, len(whole), size))]

        def loaded() -> Iterator[Tensor]:
            for batch in load_batches(self.dataset, batches, device, processes=processes):
                progress(len(batch["bits"]))
                yield batch["bits"]

        bits = loaded()
        for number, whole in indices.items():
            tokenize(Shard(number, self.objects[shards[number]], islice(bits, -(-len(whole) // size)), []))

    def grids(self, sha256: list[str]) -> Tensor:
        """Return the grids of these objects, [n, ceil(R³ / 8)] uint8."""
        indices = self.dataset.find(sha256)
        if (indices < 0).any():
            raise DataError(f"{','.join(self.dataset.roots)}: has no object {sha256[int(indices.argmin())]}")
        return self.dataset.get_batch(indices)["bits"]


class MeshSource:
    """Grids of mesh files, voxelized in worker processes. Files with the same bytes are one object.

    inputs: files and folders, which are searched recursively.
    resolution, normalization: the tokenizer's.
    up_axis: how the axes of the files are taken, see `trellis.grids.placing`.
    max_workers: worker processes of this machine.
    timeout: seconds for a file.
    output_dir: its folder `voxels` is not searched: grids are PLY files too.
    cluster: of Ray, which hashes many files; None: this machine.
    Raise DataError if there is no mesh, ConfigError if a package is missing.
    """

    def __init__(
        self,
        inputs: list[str],
        resolution: int,
        up_axis: str,
        normalization: str,
        max_workers: int,
        timeout: float,
        output_dir: Path,
        cluster: Cluster | None = None,
    ):
        from dataset_toolkits.plan import plan_meshes

        plan = plan_meshes(inputs, output_dir, max_workers if cluster is None else None, cluster)
        self.jobs = sorted(plan.jobs)  # by sha256, so that the spelling of paths does not matter
        self.objects = [TokenObject(job.sha256, job.names[0]) for job in self.jobs]
        self.failures = plan.failures
        self.notes: list[str] = []
        self.noted: list[tuple[str, str]] = []  # (file, note) of what this process has voxelized
        self.settings = resolution, up_axis, normalization
        self.max_workers, self.timeout = max_workers, timeout
        self.elsewhere = False  # than where the files were hashed

    def part(self, objects: slice) -> "MeshSource":
        """Return a source of some of the objects, for another machine."""
        part = copy.copy(self)
        part.jobs, part.objects, part.failures, part.noted = self.jobs[objects], self.objects[objects], [], []
        part.elsewhere = True
        return part

    def key(self) -> dict[str, str | int]:
        """Return what identifies the grids."""
        digest = hashlib.sha256("\n".join(job.sha256 for job in self.jobs).encode())
        return {"dataset": "meshes", "objects": len(self.jobs), "data": digest.hexdigest()}

    def has_frames(self) -> bool:
        """Return that no object is from a scan."""
        return False

    def captions(self) -> dict[str, list[str]]:
        """Return no captions: mesh files have none."""
        return {}

    def feed(
        self,
        shards: dict[int, slice],
        device: torch.device,
        processes: int,
        tokenize: Callable[[Shard], None],
        progress: Callable[[int], object],
    ) -> None:
        """Do as `DataSource.feed` does. tokenize runs in a thread while the meshes of the next shards are voxelized."""
        jobs = {number: self.jobs[objects] for number, objects in shards.items()}
        number_of = {job.path: number for number, part in jobs.items() for job in part}
        unfinished = {number: len(part) for number, part in jobs.items()}
        results: dict[Path, np.ndarray | DataError] = {}
        running: Future | None = None
        stopped = threading.Event()

        def unless_stopped(bits: np.ndarray) -> Iterator[Tensor]:
            for batch in torch.from_numpy(bits).split(BATCH[device.type]):
                if stopped.is_set():
                    raise CancelledError
                yield batch

        def finish(path: Path, result: np.ndarray | DataError) -> None:
            nonlocal running
            number = number_of[path]
            results[path] = result
            progress(1)
            unfinished[number] -= 1
            if unfinished[number]:
                return
            objects, bits, left_out = [], [], []
            for job in jobs[number]:
                result = results.pop(job.path)
                if isinstance(result, DataError):
                    left_out += [{"file": name, "sha256": job.sha256, "reason": str(result)} for name in job.names]
                else:
                    objects.append(TokenObject(job.sha256, job.names[0]))
                    bits.append(result)
            batches = unless_stopped(np.stack(bits)) if bits else ()
            if running is not None:
                running.result()
            running = encoder.submit(tokenize, Shard(number, objects, batches, left_out))

        with ThreadPoolExecutor(1) as encoder:
            try:
                self._voxelize([job for part in jobs.values() for job in part], finish, self.max_workers // processes)
                if running is not None:
                    running.result()
            except BaseException:
                stopped.set()  # else the end of the shard would be waited for
                raise

    def grids(self, sha256: list[str]) -> Tensor:
        """Return the grids of these objects, [n, ceil(R³ / 8)] uint8. Raise DataError for one without a grid."""
        jobs = {job.sha256: job for job in self.jobs}
        results: dict[Path, np.ndarray | DataError] = {}
        self._voxelize([jobs[each] for each in sha256], results.__setitem__, self.max_workers)
        grids: dict[Path, np.ndarray] = {}
        for path, result in results.items():
            if isinstance(result, DataError):
                raise DataError(f"{path}: {result}")
            grids[path] = result
        return torch.from_numpy(np.stack([grids[jobs[each].path] for each in sha256]))

    def _voxelize(
        self, jobs: "list[Job]", finish: Callable[[Path, np.ndarray | DataError], None], workers: int
    ) -> None:
        """Call finish with each path and its grid, [ceil(R³ / 8)] uint8, or the reason why there is none."""
        from dataset_toolkits.work import voxels_elsewhere, voxels_of
        from trellis.grids.mesh_pool import run_in_pool

        resolution = self.settings[0]

        def pack(task: tuple, result: "Voxelized | DataError") -> None:
            if isinstance(result, DataError):
                finish(task[0], result)
            else:
                self.noted += [(str(task[0]), note) for note in result.notes]
                finish(task[0], pack_bits(voxels_to_grid(result.voxels, resolution)[None])[0])

        tasks = ((job.path, job.stamp, *self.settings) for job in jobs)
        run_in_pool(
            voxels_elsewhere if self.elsewhere else voxels_of,
            tasks,
            pack,
            max(1, min(workers, len(jobs))),
            self.timeout,
        )
