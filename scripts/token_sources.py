"""Where scripts/to_tokens.py takes grids from: data roots of train.py, or mesh files that are voxelised on the way.

Both hand out shards, runs of their objects, with grids as packed bits (trellis.grids.voxels.unpack_bits).
Axes: B objects of a batch, R voxels along an axis.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trellis.datasets.metadata import setting_of_data
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import pack_bits, voxels_to_grid
from trellis.tokens.sharegpt import read_captions
from trellis.utils.errors import DataError

# Objects that go to a device together: many enough that it need not wait. Ids do not depend on it.
BATCH = {"cpu": 8, "cuda": 64}
LOADERS = 8  # processes that read PLY files, at most


class Shard(NamedTuple):
    """The objects of a shard that have a grid, and their grids in that order, [B, R³ / 8] uint8 on the CPU.
    left_out: {"file", "sha256", "reason"} of the others."""

    number: int
    objects: list[tuple[str, str, str | None]]  # sha256, name, source
    batches: Iterable[Tensor]
    left_out: list[dict[str, str]]


class DataSource:
    """Grids of data roots, in the order of the data set.

    roots, split: as of train.py. Raises DataError where a root cannot be read, is of another resolution, or says that
    its grids are normalised in another way than this.
    """

    def __init__(self, roots: str, split: str, resolution: int, normalization: str):
        self.given = roots, split, resolution, normalization
        self.dataset = SparseStructure(roots, resolution=resolution, split=split)
        self.objects = [(entry.sha256, entry.name, entry.source) for entry in self.dataset.entries]
        self.failures: list[dict[str, str]] = []
        for root in self.dataset.roots:
            found = setting_of_data([root], "normalization")
            if found is None and Path(root, "metadata.csv").is_file():
                found = "cube"  # what folders that do not say hold; packed files may hold anything
            if found not in (None, normalization):
                raise DataError(
                    f"{root}: its grids have normalization {found}, but the tokenizer's is {normalization}."
                    f" Make them anew with voxelize.py --normalization {normalization}."
                )

    def __reduce__(self):
        return type(self), self.given  # each process reads the data itself

    def key(self) -> dict[str, str | int]:
        """What identifies the grids."""
        return self.dataset.content_key()

    def captions(self) -> dict[str, list[str]]:
        """Captions by sha256, where metadata.csv has any."""
        captions = {}
        for root in self.dataset.roots:
            if (path := Path(root, "metadata.csv")).is_file():
                captions |= read_captions(path, required=False)
        return captions

    def feed(
        self,
        shards: dict[int, slice],
        device: torch.device,
        processes: int,
        tokenize: Callable[[Shard], None],
        progress: Callable[[int], object],
    ) -> None:
        """Call tokenize for each shard, {number: its objects}, one after the other. processes: how many share this
        machine. progress: called with a number of objects as they are read. Raises DataError for a grid that cannot be
        read, and what tokenize raises."""
        size = BATCH[device.type]
        places = {number: np.arange(len(self.objects))[objects] for number, objects in shards.items()}
        batches = [part for whole in places.values() for part in np.split(whole, range(size, len(whole), size))]
        # On a CPU the model itself needs every core; rows in memory only have to be put together.
        processes_pay = device.type == "cuda" and not self.dataset.in_memory
        workers = min(LOADERS, (os.cpu_count() or 1) // processes) if processes_pay else 0
        loader = DataLoader(
            _Bits(self.dataset),
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda",
        )
        loaded = _watched(loader, progress)
        for number, whole in places.items():
            tokenize(Shard(number, self.objects[shards[number]], islice(loaded, -(-len(whole) // size)), []))

    def grids(self, sha256: list[str]) -> Tensor:
        """The grids of these objects, [n, R³ / 8] uint8."""
        places = {entry.sha256: i for i, entry in enumerate(self.dataset.entries)}
        return self.dataset.get_batch(np.array([places[each] for each in sha256]))["bits"]


class MeshSource:
    """Grids of mesh files, voxelised in processes of their own. Files with the same bytes are one object.

    inputs: files, and folders that are searched with all below. resolution, up_axis, normalization: the tokenizer's.
    max_workers: processes of this machine; timeout: seconds for a file.
    Raises DataError where there is no mesh, ConfigError where trimesh, open3d or Pebble is missing.
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
    ):
        from dataset_toolkits.voxelize import plan_meshes
        from trellis.grids.meshes import require_open3d, require_trimesh

        require_trimesh()
        require_open3d()
        plan = plan_meshes(inputs, output_dir, 0, 1, max_workers)
        self.jobs = sorted(plan.jobs)  # by sha256, so that it does not matter how paths are written
        self.objects = [(job.sha256, job.names[0], None) for job in self.jobs]
        self.failures = plan.failures
        self.settings = resolution, up_axis, normalization
        self.max_workers, self.timeout = max_workers, timeout

    def key(self) -> dict[str, str | int]:
        """What identifies the grids."""
        digest = hashlib.sha256("\n".join(job.sha256 for job in self.jobs).encode())
        return {"dataset": "meshes", "objects": len(self.jobs), "data": digest.hexdigest()}

    def captions(self) -> dict[str, list[str]]:
        return {}

    def feed(
        self,
        shards: dict[int, slice],
        device: torch.device,
        processes: int,
        tokenize: Callable[[Shard], None],
        progress: Callable[[int], object],
    ) -> None:
        """As of `DataSource`; tokenize runs in a thread, while the meshes of the next shards are voxelised."""
        jobs = {number: self.jobs[objects] for number, objects in shards.items()}
        number_of = {job.path: number for number, part in jobs.items() for job in part}
        unfinished = {number: len(part) for number, part in jobs.items()}
        results: dict[Path, np.ndarray | DataError] = {}
        running: Future | None = None

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
                    objects.append((job.sha256, job.names[0], None))
                    bits.append(result)
            batches = torch.from_numpy(np.stack(bits)).split(BATCH[device.type]) if bits else ()
            if running is not None:
                running.result()
            running = encoder.submit(tokenize, Shard(number, objects, batches, left_out))

        with ThreadPoolExecutor(1) as encoder:
            self._voxelize(list(number_of), finish, max(1, self.max_workers // processes))
            if running is not None:
                running.result()

    def grids(self, sha256: list[str]) -> Tensor:
        """The grids of these objects, [n, R³ / 8] uint8. Raises DataError for one that cannot be voxelised now."""
        paths = {job.sha256: job.path for job in self.jobs}
        results: dict[Path, np.ndarray | DataError] = {}
        self._voxelize([paths[each] for each in sha256], results.__setitem__, self.max_workers)
        for path, result in results.items():
            if isinstance(result, DataError):
                raise DataError(f"{path}: {result}")
        return torch.from_numpy(np.stack([results[paths[each]] for each in sha256]))

    def _voxelize(
        self, paths: list[Path], finish: Callable[[Path, np.ndarray | DataError], None], workers: int
    ) -> None:
        """finish: gets each path with its grid, [R³ / 8] uint8, or with the reason why there is none."""
        from trellis.grids.mesh_pool import run_in_pool
        from trellis.grids.meshes import mesh_voxels

        resolution = self.settings[0]

        def pack(task: tuple, result: np.ndarray | DataError) -> None:
            if not isinstance(result, DataError):
                result = pack_bits(voxels_to_grid(result, resolution)[None])[0]
            finish(task[0], result)

        tasks = ((path, *self.settings) for path in paths)
        run_in_pool(mesh_voxels, tasks, pack, min(workers, len(paths)), self.timeout)


class _Bits(Dataset):
    def __init__(self, dataset: SparseStructure):
        self.dataset = dataset

    def __getitems__(self, indices: np.ndarray) -> Tensor:  # torch's name for what takes a whole batch
        return self.dataset.get_batch(indices)["bits"]


def _as_it_is(batch: Tensor) -> Tensor:
    return batch


def _watched(loader: DataLoader, progress: Callable[[int], object]) -> Iterator[Tensor]:
    try:
        for batch in loader:
            progress(len(batch))
            yield batch
    except DataError as error:  # a loading process wraps the message in its traceback
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
