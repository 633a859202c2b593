"""Near-duplicates found by hashing, against all pairs compared one by one."""

import json

import numpy as np
import pytest
import torch
from helpers import TEST_DATA, needs_test_data, solid_grids

from trellis.datasets import duplicates
from trellis.datasets.duplicates import Duplicates, Grid, Sketcher, Sketches, compare, orbits, sketch_all
from trellis.grids.symmetries import SYMMETRIES
from trellis.grids.voxels import pack_bits, unpack_bits

ALL = SYMMETRIES["all"]


def turned(grid: np.ndarray, symmetry: int) -> np.ndarray:
    return ALL[symmetry](torch.from_numpy(grid)).contiguous().numpy()


def altered(grid: np.ndarray, iou: float, rng: np.random.Generator) -> np.ndarray:
    """A grid with as many voxels flipped as leave this IoU or a little more."""
    flat = grid.reshape(-1).copy()
    on, off = np.flatnonzero(flat), np.flatnonzero(~flat)
    flips = int(2 * len(on) * (1 - iou) / (1 + iou) + 1e-9)
    removed = flips // 2
    flat[rng.choice(on, removed, replace=False)] = False
    flat[rng.choice(off, flips - removed, replace=False)] = True
    return flat.reshape(grid.shape)


def iou_of(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def best_ious(grids: np.ndarray) -> np.ndarray:
    """[N, N], the highest IoU of all pairs under the 48 symmetries, by counting."""
    flat = grids.reshape(len(grids), -1).astype(np.float32)
    sizes = flat.sum(1, dtype=np.float64)
    best = np.zeros((len(grids),) * 2)
    for symmetry in ALL:
        moved = symmetry(torch.from_numpy(grids)).reshape(len(grids), -1).numpy().astype(np.float32)
        shared = (moved @ flat.T).astype(np.float64)
        best = np.maximum(best, shared / (sizes[:, None] + sizes - shared))
    return best


def connected(near: np.ndarray) -> np.ndarray:
    """[N], the lowest number that each object is connected to."""
    reach = near | np.eye(len(near), dtype=bool)
    while (wider := (reach.astype(np.float32) @ reach.astype(np.float32)) > 0).sum() > reach.sum():
        reach = wider
    return reach.argmax(1)


def found_in(grids: np.ndarray, iou: float = 0.9) -> Duplicates:
    return found_in_bits(pack_bits(grids), grids.shape[-1], iou)


def found_in_bits(bits: np.ndarray, resolution: int, iou: float = 0.9) -> Duplicates:
    def read(numbers: np.ndarray) -> np.ndarray:
        return bits[numbers]

    return Duplicates(sketch_all(read, len(bits), resolution, iou), read, resolution, iou)


@pytest.mark.parametrize("resolution", [3, 4, 6])
def test_an_orbit_is_what_the_symmetries_move_a_voxel_to(resolution):
    numbers = orbits(resolution).reshape((resolution,) * 3)
    voxels = torch.arange(resolution**3).reshape((resolution,) * 3)
    moved = np.stack([symmetry(voxels).reshape(-1).numpy() for symmetry in ALL], 1)
    for voxel, images in enumerate(moved):
        assert set(np.flatnonzero(numbers.reshape(-1) == numbers.reshape(-1)[voxel])) == set(images)


def test_orbits_at_64():
    assert orbits(64).max() + 1 == 5984


@pytest.mark.parametrize("resolution", [5, 6])
def test_comparing_gives_the_highest_iou_and_its_symmetry(resolution):
    rng = np.random.default_rng(0)
    for trial in range(60):
        a = rng.random((resolution,) * 3) < 0.3
        b = altered(turned(a, trial % 48), 0.7, rng) if trial % 3 else rng.random((resolution,) * 3) < 0.3
        expected = max(iou_of(turned(a, symmetry), b) for symmetry in range(48))
        first, second = (Grid(pack_bits(grid[None])[0], resolution) for grid in (a, b))
        match = compare(first, second, 0.0)
        assert match is not None and match.iou == expected
        assert iou_of(match.symmetry(torch.from_numpy(a)).numpy(), b) == expected
        for iou in (expected, np.nextafter(expected, 1)):  # at the threshold it counts, below it does not
            for best in (True, False):
                assert (compare(first, second, iou, best) is not None) == (iou == expected)


def test_families_are_those_of_all_pairs():
    rng = np.random.default_rng(1)
    base = solid_grids(30, 16, 2)
    others = [
        altered(turned(base[i % 30], int(rng.integers(48))), iou, rng)
        for i, iou in enumerate(np.repeat([1.0, 0.95, 0.9, 0.89, 0.8], 30))
    ]
    grids = np.stack([*base, *others])[rng.permutation(180)]
    best = best_ious(grids)
    for iou in (0.9, 0.8, 1.0):
        expected = connected(best >= iou)
        assert np.array_equal(found_in(grids, iou).family, expected)
        assert len(set(expected)) < 160  # there is something to find


def test_pairs_at_the_threshold_share_a_key():
    """Of noise, which shape does not help: its Jaccard index is hardly more than its IoU."""
    rng = np.random.default_rng(3)
    grids = solid_grids(200, 32, 4)
    near = np.stack([altered(turned(grid, int(rng.integers(48))), 0.9, rng) for grid in grids])
    sketcher = Sketcher(32)
    first, second = sketcher(pack_bits(grids)), sketcher(pack_bits(near))
    assert (first.keys == second.keys).any(axis=1).all()
    both = Sketches(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
    pairs, bits = np.arange(200), pack_bits(np.concatenate([grids, near]))
    found = Duplicates(both, lambda numbers: bits[numbers], 32)
    assert both.plausible(pairs, pairs + 200).all()
    assert (found.family[pairs + 200] == found.family[pairs]).all()


def test_a_symmetry_leaves_the_sketch_as_it_is():
    grid = solid_grids(1, 16, 5)[0]
    forms = Sketcher(16)(pack_bits(np.stack([turned(grid, symmetry) for symmetry in range(48)])))
    assert (forms.keys == forms.keys[0]).all() and (forms.prints == forms.prints[0]).all()


def test_keys_of_few_voxels():
    """Most bins are empty and take others' hashes, down to a single voxel; what differs shares nothing."""
    grids = np.zeros((3, 16, 16, 16), bool)
    grids[0, 0, 0, 0] = grids[1, 15, 0, 15] = grids[2, 7, 7, 7] = True
    sketches = Sketcher(16)(pack_bits(grids))
    assert (sketches.keys[0] == sketches.keys[1]).all()
    assert not (sketches.keys[0] == sketches.keys[2]).any()
    assert sketches.num_voxels.tolist() == [1, 1, 1]


def test_many_alike_objects_take_few_comparisons():
    """2,000 forms of two shapes are 96 grids; 200 versions of a third are all in one bucket."""
    rng = np.random.default_rng(6)
    shapes = solid_grids(3, 16, 7)
    forms = [turned(shapes[i % 2], int(rng.integers(48))) for i in range(2000)]
    versions = [altered(shapes[2], 0.99, rng) for _ in range(200)]
    found = found_in(np.stack(forms + versions))
    assert [len(family) for family in found.families()] == [1000, 1000, 200]
    assert found.compared < 96 + 2 * 200


def test_a_large_bucket_of_unlike_objects_loses_no_pair(monkeypatch):
    rng = np.random.default_rng(8)
    grids = rng.random((150, 8, 8, 8)) < 0.3
    grids[140] = altered(turned(grids[3], 17), 0.95, rng)
    bits = pack_bits(grids)
    sketches = Sketcher(8)(bits)
    sketches.keys[:] = 0
    found = Duplicates(sketches, lambda numbers: bits[numbers], 8)
    assert [family.tolist() for family in found.families()] == [[3, 140]]


def test_what_goes_is_near_what_stays():
    rng = np.random.default_rng(9)
    chain = [solid_grids(1, 16, 10)[0]]
    for _ in range(12):
        chain.append(altered(chain[-1], 0.94, rng))  # the ends are far apart
    grids = np.stack([turned(grid, int(rng.integers(48))) for grid in chain] + [chain[4]])
    found = found_in(grids)
    assert (found.family == 0).all()
    best = best_ious(grids)
    order = rng.permutation(len(grids))
    gone = {number: (stays, match) for number, stays, match in found.choose(order)}
    stays = [number for number in order.tolist() if number not in gone]
    assert 1 < len(stays) < len(grids)
    assert (best[np.ix_(stays, stays)] + np.eye(len(stays)) * -2 < 0.9).all()
    for number, (other, match) in gone.items():
        earlier = [stay for stay in stays if best[stay, number] >= 0.9]
        assert other == earlier[0] and order.tolist().index(other) < order.tolist().index(number)
        assert match.iou == pytest.approx(best[other, number])
        assert iou_of(match.symmetry(torch.from_numpy(grids[other])).numpy(), grids[number]) == match.iou


def test_the_length_of_a_band():
    assert duplicates.band_length(0.9) == 14
    assert duplicates.band_length(1.0) == duplicates.BINS
    for iou in (0.5, 0.8, 0.95):
        length = duplicates.band_length(iou)
        assert (1 - iou**length) ** (duplicates.BINS // length) <= duplicates.MISS


@pytest.mark.parametrize("iou", [0.49, 1.01, float("nan")])
def test_a_threshold_out_of_range(iou):
    with pytest.raises(ValueError, match="iou must lie"):
        found_in(solid_grids(2, 8, 0), iou)


@needs_test_data
def test_real_grids_against_all_pairs():
    """Every pair of 700 real grids that the counts of orbits do not rule out, compared in all orientations."""
    with np.load(TEST_DATA / "data/voxels64_train.npz") as file:
        bits = file["bits"][:700]
    numbers = orbits(64)
    counts = np.stack([np.bincount(numbers[np.unpackbits(row) == 1], minlength=5984) for row in bits]).astype(np.uint8)
    sizes = counts.sum(1, dtype=np.int64)
    near = np.zeros((700, 700), bool)
    for a in range(700):
        others = np.arange(a + 1, 700)
        shared = np.minimum(counts[a], counts[others]).sum(1, dtype=np.int64)
        for b in others[shared >= 0.9 * (sizes[a] + sizes[others] - shared)]:
            grid, other = (unpack_bits(bits[i][None], 64)[0].bool() for i in (a, b))
            near[a, b] = near[b, a] = max(iou_of(symmetry(grid).numpy(), other.numpy()) for symmetry in ALL) >= 0.9
    found = found_in_bits(bits, 64)
    assert near.any()
    assert np.array_equal(found.family, connected(near))


@pytest.mark.parametrize("resolution", [5, 6, 24])
def test_profiles_bound_what_differs(resolution):
    """No pair is ruled out that compare would find, whatever the prints say; slabs are mirrored onto each other."""
    rng = np.random.default_rng(11)
    grids = rng.random((30, *[resolution] * 3)) < 0.2
    grids = np.concatenate([grids, [altered(turned(grid, int(rng.integers(48))), 0.8, rng) for grid in grids]])
    sketches = Sketcher(resolution)(pack_bits(grids))
    first, second = (numbers.reshape(-1) for numbers in np.indices((60, 60)))
    differing = sketches._differing(first, second)
    total = sketches.num_voxels[first] + sketches.num_voxels[second]
    best = best_ious(grids)[first, second]
    assert (differing <= np.rint(total * (1 - best) / (1 + best))).all()
    assert (differing[first == second] == 0).all() and (differing > 0).any()


def test_what_is_kept_of_an_object_is_small():
    sketches = Sketcher(64)(pack_bits(np.ones((1, 64, 64, 64), bool)))
    assert sum(array.nbytes for array in sketches) == 488


def test_the_benchmark(tmp_path, capsys):
    """Made-up objects: each copy is found, and copies alone are families."""
    from benchmarks import duplicates as benchmark

    output = tmp_path / "result.md"
    flags = ["--resolution", "32", "--objects", "12", "--scale", "40", "--output", str(output)]
    benchmark.main(flags)
    recall, speed = json.loads(output.with_suffix(".json").read_text())["tables"]
    assert [row[0] for row in speed["rows"]] == [12, 40]
    assert speed["rows"][1][6:8] == [4, 8]
    assert [row[2:] for row in recall["rows"][1:]] == [[12, 12, 1.0]] * 3 + [[4, 4, 1.0]]
    assert "# Near-duplicates" in capsys.readouterr().out
