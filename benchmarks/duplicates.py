"""Near-duplicates: time an object, and what hashing finds of what comparing all pairs finds. One core.

    python benchmarks/duplicates.py --data_dir train.npz,val.npz    # data roots, separated by commas
    python benchmarks/duplicates.py --scale 1000000                 # made-up objects

All pairs: of at most --pairs objects of the data, each pair that the counts of orbits do not rule out is compared under
the 48 symmetries; those counts rule nothing out wrongly (trellis/datasets/duplicates.py). Noise: forms of these objects
with random voxels added and removed such that the IoU is just the one in the table, which is the hardest case. Scale:
--scale objects of four hollow boxes each, made as they are read, one in ten of them an altered form of the one before.
Times are of the processor, so that other work does not count; no stage uses a GPU, whatever --device says.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.report import Column, Report, Table
from trellis.datasets.duplicates import (
    IOU,
    Duplicates,
    Grid,
    Sketcher,
    Sketches,
    compare,
    orbits,
    sketch_all,
    voxels_of,
)
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.symmetries import SYMMETRIES
from trellis.grids.voxels import pack_bits
from trellis.utils.command import run_command
from trellis.utils.progress import waiting

SPEED = (
    Column("objects", "key"),
    Column("reading, µs an object"),
    Column("hashing, µs an object"),
    Column("comparing, µs an object"),
    Column("objects a minute"),
    Column("pairs compared"),
    Column("families"),
    Column("objects in them"),
    Column("hashes, bytes an object"),
)
COLUMNS = (
    Column("pairs", "key"),
    Column("IoU at least", "key"),
    Column("number"),
    Column("found"),
    Column("recall", "ratio"),
)


def all_pairs(bits: np.ndarray, resolution: int, iou: float) -> np.ndarray:
    """Return all pairs of grids at a threshold, [P, 2] int64, without hashing."""
    numbers = orbits(resolution)
    counts = np.zeros((len(bits), int(numbers.max()) + 1), np.uint8)
    for row, count in zip(bits, counts, strict=True):
        count[:] = np.bincount(numbers[voxels_of(row)], minlength=len(count))
    sizes = counts.sum(axis=1, dtype=np.int64)
    order = np.argsort(sizes, kind="stable")
    groups = np.add.reduceat(counts, np.arange(0, counts.shape[1], 64), axis=1, dtype=np.int32)
    found = []
    with waiting("comparing all pairs", len(bits)) as progress:
        for place, a in enumerate(order.tolist()):
            end = np.searchsorted(sizes[order], sizes[a] / iou, side="right")
            others = order[place + 1 : end]
            for table in (groups, counts):  # the first is a bound on the second, and fast
                shared = np.minimum(table[a], table[others]).sum(axis=1, dtype=np.int64)
                others = others[shared >= iou * (sizes[a] + sizes[others] - shared) - 1e-6]
            first = Grid(bits[a], resolution)
            found += [(a, b) for b in others.tolist() if compare(first, Grid(bits[b], resolution), iou, best=False)]
            progress(place + 1)
    return np.array(found, np.int64).reshape(-1, 2)


def altered(row: np.ndarray, resolution: int, iou: float, rng: np.random.Generator) -> np.ndarray:
    """Return a grid in another orientation with random voxels added and removed; both have this IoU, or a bit more."""
    grid = np.unpackbits(row, count=resolution**3).view(bool).copy()
    occupied, empty = np.flatnonzero(grid), np.flatnonzero(~grid)
    flips = int(2 * len(occupied) * (1 - iou) / (1 + iou) + 1e-9)
    grid[rng.choice(occupied, flips // 2, replace=False)] = False
    grid[rng.choice(empty, flips - flips // 2, replace=False)] = True
    turned = SYMMETRIES["all"][rng.integers(48)](torch.from_numpy(grid.reshape((resolution,) * 3)))
    return pack_bits(turned[None])[0]


def candidates(sketches: Sketches, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return [P] bool: which pairs, [P] int64 each, hashing leaves to be compared."""
    return (sketches.keys[first] == sketches.keys[second]).any(axis=1) & sketches.plausible(first, second)


def made_up(numbers: np.ndarray, resolution: int) -> np.ndarray:
    """Return objects of four hollow boxes each as bits [n, R^3 / 8], a function of their numbers.

    One in ten is the one before it in another orientation, with random voxels flipped: an IoU of about 0.93.
    """
    grids = np.zeros((len(numbers), *[resolution] * 3), np.uint8)
    for grid, number in zip(grids, numbers.tolist(), strict=True):
        copy = number % 10 == 9
        rng = np.random.default_rng(number - copy)
        starts = rng.integers(resolution * 3 // 4, size=(4, 3))
        ends = np.minimum(starts + rng.integers(resolution // 8, resolution // 2, size=(4, 3)), resolution)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            grid[tuple(map(slice, start, end))] = 1
            grid[tuple(slice(first + 1, last - 1) for first, last in zip(start, end, strict=True))] = 0
        if copy:
            flips = rng.integers(grid.size, size=int(0.07 * np.count_nonzero(grid)))
            grid.reshape(-1)[flips] ^= 1
            grid[:] = SYMMETRIES["all"][rng.integers(48)](torch.from_numpy(grid.copy())).numpy()
    return pack_bits(grids)


def measure(read, count: int, resolution: int) -> tuple[list[object], Duplicates]:
    """Return a row of the table of speed, and what was found."""
    started = time.process_time()
    sample = np.arange(min(count, 2000))
    for start in range(0, len(sample), 256):
        read(sample[start : start + 256])
    reading = (time.process_time() - started) / len(sample)
    started = time.process_time()
    with waiting("hashing", count) as progress:
        sketches = sketch_all(read, count, resolution, progress=progress)
    hashing = (time.process_time() - started) / count - reading
    started = time.process_time()
    with waiting("comparing", sketches.keys.shape[1], "band") as progress:
        found = Duplicates(sketches, read, resolution, progress=progress)
    comparing = (time.process_time() - started) / count
    memory = sum(array.nbytes for array in sketches) / count
    families = found.families()
    rate = 60 / (reading + hashing + comparing)
    times = [1e6 * seconds for seconds in (reading, hashing, comparing)]
    return [count, *times, rate, found.compared, len(families), sum(map(len, families)), memory], found


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--pairs", type=int, default=12000, help="objects whose pairs are all compared (default: 12000)")
    flags.add_argument(
        "--scale", type=int, default=0, help="made-up objects to find near-duplicates in (default: none)"
    )
    args = flags.parse_args(argv)
    torch.set_num_threads(1)
    resolution = args.resolution
    report = Report("Near-duplicates", __file__, argv, torch.device("cpu"), args.output, {"resolution": resolution})
    speed, recall, notes = [], [], []
    rng = np.random.default_rng(0)

    if args.data_dir:
        dataset = SparseStructure(args.data_dir, resolution=resolution, split="all")

        def read(numbers: np.ndarray) -> np.ndarray:
            return dataset.get_batch(numbers)["bits"].numpy()

        row, found = measure(read, len(dataset), resolution)
        speed.append(row)
        splits = dataset.texts("split")
        divided = sum(len({splits[number] for number in family}) > 1 for family in found.families())
        notes.append(
            f"Data: {args.data_dir}. {row[6]} families of several objects, {row[7]} objects; {divided} of these "
            "families are in both train and val."
        )
    else:
        made = common.make_grids(args.objects, resolution)
        bits = np.concatenate([pack_bits(grid[None]) for grid in made])

        def read(numbers: np.ndarray) -> np.ndarray:
            return bits[numbers]

        row, found = measure(read, len(bits), resolution)
        speed.append(row)
        notes.append(f"Data: {args.objects} made-up grids.")

    chosen = rng.permutation(row[0])[: args.pairs]
    rows = np.concatenate([read(chosen[start : start + 256]) for start in range(0, len(chosen), 256)])
    pairs = all_pairs(rows, resolution, IOU)
    part = Sketches(*(array[chosen] for array in found.sketches))
    hits = candidates(part, *pairs.T)
    recall.append([f"all of {len(rows)} objects", IOU, len(pairs), int(hits.sum()), share(hits)])
    sketcher = Sketcher(resolution)
    sample = rows[:2000]
    numbers = np.arange(len(sample))
    for iou in (0.9, 0.92, 0.95):
        forms = sketcher(np.stack([altered(row, resolution, iou, rng) for row in sample]))
        both = Sketches(*(np.concatenate([own[: len(sample)], other]) for own, other in zip(part, forms, strict=True)))
        hits = candidates(both, numbers, numbers + len(sample))
        recall.append(["noise", iou, len(sample), int(hits.sum()), share(hits)])

    if args.scale:
        row, found = measure(lambda numbers: made_up(numbers, resolution), args.scale, resolution)
        speed.append(row)
        copies = np.arange(9, args.scale, 10)
        together = found.family[copies] == found.family[copies - 1]
        recall.append([f"made-up, of {args.scale} objects", 0.93, len(copies), int(together.sum()), share(together)])
    print(report.write(*notes, Table(COLUMNS, recall, "Recall"), Table(SPEED, speed, "Speed")))


def share(hits: np.ndarray) -> float | None:
    """Return the share of true values, None of none."""
    return float(hits.mean()) if len(hits) else None


if __name__ == "__main__":
    sys.exit(run_command(main, None))
