"""Made-up shards of any number of objects, for benchmarks of data sets that are larger than what is at hand.

Each object is the union of a member of two pools: pairs of hollow ellipsoids or boxes, and single hollow boxes. A pool
has a few hundred base shapes under random symmetries of the cube. No two objects have the same two members, but every
hundredth is a mirror image of the object before it. About 1.4 KB an object.
"""

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import make_grids
from trellis.datasets.shards import write_shard
from trellis.grids.symmetries import symmetry_of
from trellis.grids.voxels import pack_bits, unpack_bits

RESOLUTION = 64
ROWS = 20_000  # of a shard
BASE_SHAPES, POOL = 300, 3000
SPREAD = 1_299_709  # a prime that no pair of members divides: steps through all POOL^2 pairs
TWIN_EVERY = 100
KINDS = ("furniture", "vehicle", "animal", "building", "tool", "anatomy")
COLLECTIONS = 50


def make_shards(folder: Path, objects: int, processes: int) -> None:
    """Write shards of so many objects, ROWS each, into a folder; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        (folder / f"made-{first // ROWS:05d}.arrow", range(first, min(first + ROWS, objects)))
        for first in range(0, objects, ROWS)
    ]
    tasks = [task for task in tasks if not task[0].exists()]
    if tasks:
        with multiprocessing.get_context("spawn").Pool(processes, _make_pools) as pool:
            pool.starmap(_make_shard, tasks, chunksize=1)


def _make_pools() -> None:
    """Make the pools of a process, [POOL, R^3 / 8] uint8 each."""
    global _POOLS
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pairs = np.concatenate([make_grids(1, RESOLUTION, seed) for seed in range(BASE_SHAPES)])
    boxes = np.stack([_box(rng) for _ in range(BASE_SHAPES)])
    _POOLS = tuple(
        np.concatenate([_turned(base, seed * POOL + number) for number, base in enumerate(_cycle(bases))])
        for seed, bases in enumerate((pairs, boxes))
    )


def _cycle(bases: np.ndarray) -> list[np.ndarray]:
    return [bases[number % len(bases)] for number in range(POOL)]


def _box(rng: np.random.Generator) -> np.ndarray:
    """Return a hollow box, [R, R, R] bool."""
    grid = np.zeros((RESOLUTION,) * 3, bool)
    low = rng.integers(0, RESOLUTION // 2, 3)
    high = low + rng.integers(4, RESOLUTION // 2, 3)
    grid[tuple(map(slice, low, high))] = True
    grid[tuple(map(slice, low + 1, high - 1))] = False
    return grid


def _turned(grid: np.ndarray, number: int) -> np.ndarray:
    """Return a grid under a random symmetry, as bits [1, R^3 / 8]."""
    return pack_bits(symmetry_of("all", 0, number)(torch.from_numpy(grid)).contiguous().numpy()[None])


def _make_shard(path: Path, numbers: range) -> None:
    rows = np.array(numbers)
    first, second = np.divmod(rows * SPREAD % POOL**2, POOL)
    bits = _POOLS[0][first] | _POOLS[1][second]
    for row in range(TWIN_EVERY - 1, len(rows), TWIN_EVERY):
        grid = unpack_bits(bits[row - 1 : row], RESOLUTION)[0]
        bits[row] = pack_bits(grid.flip(0).numpy()[None])[0]
    write_shard(
        path,
        bits,
        RESOLUTION,
        {
            "sha256": [hashlib.sha256(f"made-up object {number}".encode()).hexdigest() for number in numbers],
            "name": [f"collection_{number % COLLECTIONS:02d}/object_{number:07d}.glb" for number in numbers],
            "source": [f"collection_{number % COLLECTIONS:02d}" for number in numbers],
            "kind": [KINDS[number % len(KINDS)] for number in numbers],
            "captions": [[f"a made-up object, number {number}"] for number in numbers],
            "up_axis": ["z"] * len(rows),
            "normalization": ["cube"] * len(rows),
            "aesthetic_score": (4 + (rows * 7919 % 1000) / 250).tolist(),
        },
    )
