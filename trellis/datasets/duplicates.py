"""Near-duplicates: objects whose grids overlap with IoU >= t under one of the 48 symmetries of the cube.

Comparing all pairs is quadratic, so candidates are found by hashing. A symmetry moves a voxel within its orbit, the up
to 48 voxels that it can be moved to. So the number of occupied voxels of each orbit is the same for all forms of an
object, and for two objects

    sum_o min(a_o, b_o) / sum_o max(a_o, b_o)  >=  IoU under any symmetry,

since the voxels that two grids share in an orbit are at most the lesser of its counts. The left side is the Jaccard
index of the sets {(o, k): 1 <= k <= a_o}, which MinHash estimates (Broder 1997, "On the resemblance and containment of
documents"). One hash of each element suffices: hashes are divided into bins, and each bin has its least
(one-permutation hashing, Li, Owen, Zhang 2012, arXiv:1208.1259); an empty bin takes that of another (Shrivastava 2017,
arXiv:1703.04664). Bands of bins are keys: objects that share none are no candidates. A band is as long as it may be
for a pair at t to share a key with a probability of at least 1 - MISS.

Candidates are then compared exactly: their numbers of voxels along each axis say which of the symmetries are possible,
and for those the shared voxels are counted. Nothing is sampled there and no bucket is cut short, so what is reported is
right, and what is missed is missed by hashing alone.

Axes: N objects, B bands, R voxels along an axis, V voxels of an object, O orbits.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..grids.symmetries import SYMMETRIES, Symmetry

IOU = 0.9
LOWEST_IOU = 0.5  # below, hashing finds too many candidates to compare
BINS = 512
PRINTS = 128  # bins that are kept, as a byte each, to estimate the Jaccard index of a pair
MISS = 1e-4  # probability that a pair at the threshold shares no key
SLABS = 32  # of slices across each axis, at most, whose voxels are counted
DEVIATIONS = 5  # standard deviations below the threshold at which an estimate rules a pair out
SMALL_BUCKET = 64  # objects of a bucket whose pairs are listed; larger ones are compared object by object
BATCH = 256  # grids read at a time
EMPTY = np.uint32(2**32 - 1)
SEED = 48
AXES = np.array([symmetry.axes for symmetry in SYMMETRIES["all"]])  # [48, 3]
MIRRORED = np.array([symmetry.mirrored for symmetry in SYMMETRIES["all"]], np.intp)  # [48, 3]

Read = Callable[[np.ndarray], np.ndarray]
"""Returns the grids of objects [n] int64 as bits [n, R^3 / 8] uint8, see grids.voxels.pack_bits."""


class Match(NamedTuple):
    """How far two objects overlap."""

    iou: float  # the highest under the 48 symmetries
    symmetry: Symmetry  # the one that turns the first object to the second


def orbits(resolution: int) -> np.ndarray:
    """Return the number of each voxel's orbit under the 48 symmetries, [R^3] int64 in C order, in [0, O)."""
    axis = np.arange(resolution)
    folded = np.minimum(axis, resolution - 1 - axis)
    triples = np.stack(np.meshgrid(folded, folded, folded, indexing="ij"), -1).reshape(-1, 3)
    triples.sort(axis=1)
    return np.unique(np.ravel_multi_index(tuple(triples.T), (resolution,) * 3), return_inverse=True)[1].reshape(-1)


def band_length(iou: float) -> int:
    """Return how many bins make a key: the most with which a pair at the threshold is missed by at most MISS.

    Raise ValueError for a threshold outside [LOWEST_IOU, 1].
    """
    if not LOWEST_IOU <= iou <= 1:
        raise ValueError(f"iou must lie in [{LOWEST_IOU}, 1], not {iou}")
    return max(r for r in range(1, BINS + 1) if (1 - iou**r) ** (BINS // r) <= MISS)


class Sketches(NamedTuple):
    """What is kept of objects to find candidates: 488 bytes each at 64^3 and t = 0.9.

    keys: [N, B] uint32, of the bands; candidates share one.
    prints: [N, PRINTS] uint8, the hashes of some bins: the share that is equal estimates the Jaccard index.
    profiles: [N, 3, S] unsigned, voxels of each slab of slices across x, y and z: symmetries reorder and reverse them.
    num_voxels: [N] int64.
    digests: [N, 2] uint64, half a SHA-256 of the bits: equal for equal grids alone.
    """

    keys: np.ndarray
    prints: np.ndarray
    profiles: np.ndarray
    num_voxels: np.ndarray
    digests: np.ndarray

    def plausible(self, first: np.ndarray, second: np.ndarray, iou: float = IOU) -> np.ndarray:
        """Return [P] bool: whether pairs, [P] int64 each, may be at a threshold by their sizes, prints and profiles."""
        voxels, prints = self.num_voxels, self.prints
        less = np.minimum(voxels[first], voxels[second])
        kept = less >= iou * np.maximum(voxels[first], voxels[second])
        least = PRINTS * iou - DEVIATIONS * (PRINTS * iou * (1 - iou)) ** 0.5
        chosen = np.flatnonzero(kept)
        for start in range(0, len(chosen), 1 << 16):
            part = chosen[start : start + (1 << 16)]
            kept[part] = np.count_nonzero(prints[first[part]] == prints[second[part]], axis=1) >= least
        chosen = np.flatnonzero(kept)
        for start in range(0, len(chosen), 1 << 12):
            part = chosen[start : start + (1 << 12)]
            total = voxels[first[part]] + voxels[second[part]]
            differing = self._differing(first[part], second[part])
            kept[part] = total - differing >= iou * (total + differing)
        return kept

    def _differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return in how many voxels pairs, [P] int64 each, differ at least in any orientation, [P] int64."""
        one, other = (self.profiles[numbers].astype(np.int32) for numbers in (first, second))
        apart = [np.abs(one[:, None] - turned[:, :, None]).sum(-1) for turned in (other, other[:, :, ::-1])]
        axes = np.minimum(*apart)  # [P, 3, 3]: one's axis, the other's, the better of its directions
        orders = [axes[:, range(3), order].max(axis=1) for order in itertools.permutations(range(3))]
        return np.min(orders, axis=0).astype(np.int64)


class Sketcher:
    """The hash functions for one resolution and threshold. The same in every process.

    resolution: R.
    iou: t.
    """

    def __init__(self, resolution: int, iou: float = IOU):
        random = np.random.default_rng(SEED)
        self.resolution = resolution
        self._orbits = orbits(resolution)
        sizes = np.bincount(self._orbits)
        self._count = len(sizes)
        self._starts = np.cumsum(sizes) - sizes  # element (o, k) has the number starts[o] + k - 1
        self._hashes = random.integers(EMPTY, size=resolution**3, dtype=np.uint32)  # of elements; the upper bits: bin
        self._bounds = np.arange(BINS, dtype=np.uint32) * np.uint32(2**32 // BINS)
        self.slabs = max(
            number for number in range(1, SLABS + 1) if resolution % number == 0
        )  # mirrored onto each other
        slab = np.arange(resolution) * self.slabs // resolution
        cells = np.ix_(slab * self.slabs**2, slab * self.slabs, slab)
        self._cells = (cells[0] + cells[1] + cells[2]).reshape(-1)  # [R^3], of slabs^3
        self.profile_type = np.dtype(np.uint16 if resolution**3 // self.slabs < 2**16 else np.uint32)
        # Bins that an empty one asks, in this order.
        self._others = random.permuted(np.tile(np.arange(BINS, dtype=np.uint16), (BINS, 1)), axis=1).T
        self._length = band_length(iou)
        self.bands = BINS // self._length
        self._factors = random.integers(2**64, size=self.bands * self._length, dtype=np.uint64) | np.uint64(1)

    def __call__(self, bits: np.ndarray) -> Sketches:
        """Return the sketches of grids [N, R^3 / 8] uint8, each with an occupied voxel."""
        hashes = np.empty((len(bits), BINS), np.uint32)
        digests = np.empty((len(bits), 2), np.uint64)
        num_voxels = np.empty(len(bits), np.int64)
        profiles = np.empty((len(bits), 3, self.slabs), self.profile_type)
        for number, row in enumerate(bits):
            digests[number] = np.frombuffer(hashlib.sha256(row).digest()[:16], np.uint64)
            voxels = voxels_of(row)
            num_voxels[number] = len(voxels)
            cells = np.bincount(self._cells[voxels], minlength=self.slabs**3).reshape([self.slabs] * 3)
            plane = cells.sum(axis=0)
            profiles[number] = cells.sum(axis=(1, 2)), plane.sum(axis=1), plane.sum(axis=0)
            hashes[number] = self._least(np.bincount(self._orbits[voxels], minlength=self._count))
        hashes = self._filled(hashes)
        used = hashes[:, : len(self._factors)].astype(np.uint64) * self._factors
        keys = used.reshape(len(bits), self.bands, self._length).sum(axis=2) >> np.uint64(32)
        prints = hashes[:, :: BINS // PRINTS].astype(np.uint8)
        return Sketches(keys.astype(np.uint32), prints, profiles, num_voxels, digests)

    def _least(self, counts: np.ndarray) -> np.ndarray:
        """Return the least hash of each bin, [BINS] uint32, of the elements that counts [O] stand for."""
        occupied = np.flatnonzero(counts)
        counts = counts[occupied]
        before = np.cumsum(counts) - counts
        elements = np.repeat(self._starts[occupied] - before, counts) + np.arange(counts.sum())
        hashes = np.append(np.sort(self._hashes[elements]), EMPTY)
        least = hashes[np.searchsorted(hashes, self._bounds)]
        return np.where(least - self._bounds < 2**32 // BINS, least, EMPTY)

    def _filled(self, hashes: np.ndarray) -> np.ndarray:
        """Return the hashes [N, BINS] with those of other bins in place of EMPTY."""
        empty = hashes == EMPTY
        rows = np.flatnonzero(empty.any(axis=1))
        found = hashes.copy()
        for others in self._others:
            if not len(rows):
                break
            known = hashes[rows]
            found[rows] = np.where(found[rows] == EMPTY, known[:, others], found[rows])
            rows = rows[(found[rows] == EMPTY).any(axis=1)]
        return found


def voxels_of(row: np.ndarray) -> np.ndarray:
    """Return the numbers of the occupied voxels of a grid as bits [ceil(R^3 / 8)], in C order, [V] int64."""
    used = np.flatnonzero(row != 0)  # most bytes are empty: unpacking them all takes twice as long
    places = np.flatnonzero(np.unpackbits(row[used]).view(bool))
    return (8 * used)[places >> 3] + (places & 7)


class Grid:
    """A grid to be compared with others.

    row: the grid as bits [ceil(R^3 / 8)] uint8.
    resolution: R.
    """

    def __init__(self, row: np.ndarray, resolution: int):
        self.row, self.resolution = row, resolution
        bits = np.unpackbits(row, count=resolution**3)
        self.occupied = bits.view(bool)  # [R^3]
        cube = bits.reshape((resolution,) * 3)
        small = np.uint8 if resolution < 256 else np.uint16  # holds R, and is fast to add
        yz, xz = cube.sum(axis=0, dtype=small), cube.sum(axis=1, dtype=small)
        profiles = (xz.sum(axis=1, dtype=int), yz.sum(axis=1, dtype=int), yz.sum(axis=0, dtype=int))
        self.profiles = np.stack(profiles)  # [3, R], voxels of each slice across x, y and z
        self.num_voxels = int(profiles[0].sum())

    @functools.cached_property
    def coordinates(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each axis the coordinates of the voxels, [V] int64 each, as they are and mirrored."""
        last = self.resolution - 1
        rest = voxels_of(self.row)
        x = rest // self.resolution**2
        rest = rest - x * self.resolution**2
        y = rest // self.resolution
        return [(values, last - values) for values in (x, y, rest - y * self.resolution)]

    def shared(self, other: "Grid", symmetry: int) -> int:
        """Return how many voxels this grid, under one of the 48 symmetries, shares with another."""
        x, y, z = (
            self.coordinates[axis][mirrored] for axis, mirrored in zip(AXES[symmetry], MIRRORED[symmetry], strict=True)
        )
        places = (x * self.resolution + y) * self.resolution + z
        return int(np.count_nonzero(other.occupied[places]))


def compare(first: Grid, second: Grid, iou: float = IOU, best: bool = True) -> Match | None:
    """Return how far two grids of one resolution overlap, None if the IoU is below a threshold in all orientations.

    best: find the symmetry of the highest IoU; else the first one found at the threshold.
    """
    total = first.num_voxels + second.num_voxels
    both = np.stack([first.profiles, first.profiles[:, ::-1]], axis=1)  # [3, 2, R]
    distance = np.abs(both[None] - second.profiles[:, None, None]).sum(axis=-1)  # [3, 3, 2]
    differing = distance[np.arange(3), AXES, MIRRORED].max(axis=1)  # [48]: at least so many voxels differ
    found, least = None, None
    for symmetry in np.argsort(differing, kind="stable").tolist():
        bound = int(differing[symmetry])
        if (total - bound) / (total + bound) < iou or (least is not None and bound >= least):
            break
        shared = first.shared(second, symmetry)
        value = shared / (total - shared)
        if value >= iou and (found is None or value > found.iou):
            found = Match(value, SYMMETRIES["all"][symmetry])
            least = total - 2 * shared
            if not best:
                break
    return found


class Duplicates:
    """Families of near-duplicates among objects, and which of them may stay.

    A family is what pairs at the threshold connect, so its ends may be farther apart. It is what must not be divided
    between train and val.

    sketches: of all objects.
    read: reads grids.
    resolution: R.
    iou: t, in [LOWEST_IOU, 1].
    progress: called with the number of bands that are done.

    Attributes:
        family: [N] int64, the lowest number of an object of the family.
        compared: pairs that were compared exactly.
    """

    def __init__(
        self,
        sketches: Sketches,
        read: Read,
        resolution: int,
        iou: float = IOU,
        progress: Callable[[int], None] | None = None,
    ):
        self.sketches, self.iou = sketches, iou
        self.compared = 0

        @functools.lru_cache(maxsize=32)
        def grid(number: int) -> Grid:
            return Grid(read(np.array([number]))[0], resolution)

        self._grid = grid
        first = _first_of_equal(sketches.digests)
        self._parents = first.copy()
        self._different = np.flatnonzero(first == np.arange(len(first)))
        for band in range(sketches.keys.shape[1]):
            self._join_band(band)
            self._parents = self._roots(np.arange(len(first)))
            if progress is not None:
                progress(band + 1)
        self.family = self._parents

    def _join_band(self, band: int) -> None:
        """Compare the objects that share a key of this band and none of an earlier one."""
        keys = self.sketches.keys[self._different, band]
        order = np.argsort(keys, kind="stable")
        members, keys = self._different[order], keys[order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        sizes = np.diff(np.append(starts, len(keys)))
        small = np.repeat(sizes <= SMALL_BUCKET, sizes)
        for shift in range(1, min(SMALL_BUCKET, int(sizes.max()))):
            pairs = np.flatnonzero((keys[shift:] == keys[:-shift]) & small[shift:])
            if not len(pairs):
                break
            self._join(members[pairs], members[pairs + shift], band)
        for start, size in zip(starts[sizes > SMALL_BUCKET], sizes[sizes > SMALL_BUCKET], strict=True):
            bucket = members[start : start + size]
            for place in range(size - 1):
                roots = self._roots(bucket)
                if (roots == roots[0]).all():
                    break
                others = bucket[place + 1 :][roots[place + 1 :] != roots[place]]
                self._join(np.full(len(others), bucket[place]), others, band)

    def _join(self, first: np.ndarray, second: np.ndarray, band: int) -> None:
        """Compare pairs of objects, [P] each, and join the families of those at the threshold."""
        new = self._roots(first) != self._roots(second)
        first, second = first[new], second[new]
        kept = self.sketches.plausible(first, second, self.iou)
        first, second = first[kept], second[kept]
        earlier = (self.sketches.keys[first, :band] == self.sketches.keys[second, :band]).any(axis=1)
        for a, b in zip(first[~earlier].tolist(), second[~earlier].tolist(), strict=True):
            if root_of(self._parents, a) == root_of(self._parents, b):
                continue
            self.compared += 1
            if compare(self._grid(a), self._grid(b), self.iou, best=False):
                join(self._parents, a, b)

    def _roots(self, numbers: np.ndarray) -> np.ndarray:
        roots = self._parents[numbers]
        while ((above := self._parents[roots]) != roots).any():
            roots = above
        return roots

    def families(self) -> list[np.ndarray]:
        """Return `families_of` these objects."""
        return families_of(self.family)

    def choose(self, family: np.ndarray) -> Iterator[tuple[int, int, Match]]:
        """Yield (object, the one that stays in its place, how they overlap) for what may go of a family.

        family: its objects, the most wanted first. An object goes if it is at the threshold to one before it that
        stays: the first such. The symmetry turns the one that stays to the other.
        """
        stays: list[int] = []
        same: dict[bytes, int] = {}  # digest -> object that stays
        for number in family.tolist():
            digest = self.sketches.digests[number].tobytes()
            if digest in same:
                yield number, same[digest], Match(1.0, SYMMETRIES["all"][0])
                continue
            kept = np.array(stays, np.intp)
            for other in kept[self.sketches.plausible(kept, np.full(len(kept), number), self.iou)].tolist():
                match = compare(self._grid(other), self._grid(number), self.iou)
                if match is not None:
                    yield number, other, match
                    break
            else:
                stays.append(number)
                same[digest] = number


def root_of(parents: np.ndarray, number: int) -> int:
    """Return the object that stands for the family of another, and shorten the way to it.

    parents: [N] int64, for each object one of its family, with a lower number; itself if it stands for all.
    """
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = int(parents[number])
    return number


def join(parents: np.ndarray, first: int, second: int) -> None:
    """Make one family of those of two objects. parents: as for `root_of`."""
    one, other = root_of(parents, first), root_of(parents, second)
    parents[max(one, other)] = min(one, other)


def families_of(labels: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the objects of each family of several, ascending; the largest family first.

    labels: [N] int64, not negative, equal for the objects of a family.
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    found = [part for part in np.split(order, starts[1:]) if len(part) > 1]
    return sorted(found, key=len, reverse=True)


def sketch_all(
    read: Read, count: int, resolution: int, iou: float = IOU, progress: Callable[[int], None] | None = None
) -> Sketches:
    """Return the sketches of objects 0 ... count - 1.

    progress: called with the number of objects that were read.
    """
    sketcher = Sketcher(resolution, iou)
    sketches = Sketches(
        np.empty((count, sketcher.bands), np.uint32),
        np.empty((count, PRINTS), np.uint8),
        np.empty((count, 3, sketcher.slabs), sketcher.profile_type),
        np.empty(count, np.int64),
        np.empty((count, 2), np.uint64),
    )
    for start in range(0, count, BATCH):
        numbers = np.arange(start, min(start + BATCH, count))
        for array, part in zip(sketches, sketcher(read(numbers)), strict=True):
            array[numbers] = part
        if progress is not None:
            progress(start + len(numbers))
    return sketches


def _first_of_equal(digests: np.ndarray) -> np.ndarray:
    """Return for each digest, [N, 2] uint64, the number of the first that equals it, [N] int64."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in the order of their numbers
    ordered = digests[order]
    new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = np.empty(len(digests), np.int64)
    first[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first
