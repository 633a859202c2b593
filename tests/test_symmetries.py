"""The 48 symmetries of the cube are exact, and which one a sample gets follows from its number alone."""

import collections
import itertools

import numpy as np
import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, run, tiny_config

import train
from trellis.datasets.batches import endless_batches, to_device
from trellis.datasets.sparse_structure import SparseStructure
from trellis.evaluation.metrics import voxel_metrics
from trellis.grids.symmetries import SYMMETRIES, Symmetry, augment_grids, symmetry_of
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer
from trellis.utils import dist_utils
from trellis.utils.errors import ConfigError

R = 5


def matrix(symmetry: Symmetry) -> np.ndarray:
    """Where a point of the object goes, [3, 3] int: coordinate a of the new one is ± coordinate axes[a]."""
    rows = np.zeros((3, 3), int)
    rows[np.arange(3), symmetry.axes] = np.where(symmetry.mirrored, -1, 1)
    return rows


def moved(grid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Move every occupied voxel's center, in half voxels from the middle of the cube, by a matrix."""
    size = len(grid)
    points = (2 * np.argwhere(grid) - (size - 1)) @ rows.T
    result = np.zeros_like(grid)
    result[tuple(((points + size - 1) // 2).T)] = 1
    return result


def random_grids(*shape: int, resolution: int = R) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(*shape, *[resolution] * 3, generator=generator) < 0.3).to(torch.uint8)


# --- the group ---


@pytest.mark.parametrize("resolution", [4, R])
def test_each_symmetry_equals_the_moving_of_points_by_its_matrix(resolution):
    grids = random_grids(2, 1, resolution=resolution)
    for symmetry in SYMMETRIES["all"]:
        want = np.stack([moved(grid, matrix(symmetry)) for grid in grids[:, 0].numpy()])
        assert np.array_equal(symmetry(grids)[:, 0].numpy(), want)


def test_all_48_are_distinct_and_a_group():
    matrices = [matrix(symmetry) for symmetry in SYMMETRIES["all"]]
    known = {rows.tobytes() for rows in matrices}
    assert len(known) == 48 and matrices[0].tolist() == np.eye(3).tolist()
    assert sorted(round(np.linalg.det(rows)) for rows in matrices) == [-1] * 24 + [1] * 24
    assert all((a @ b).tobytes() in known for a, b in itertools.product(matrices, repeat=2))
    assert all(np.array_equal(rows @ rows.T, np.eye(3)) for rows in matrices)
    grid = random_grids()
    assert len({symmetry(grid).numpy().tobytes() for symmetry in SYMMETRIES["all"]}) == 48


def test_z_holds_all_that_keep_the_z_axis_and_its_direction():
    def keeps_z(symmetry):
        return np.array_equal(matrix(symmetry) @ [0, 0, 1], [0, 0, 1])

    assert set(SYMMETRIES["z"]) == {symmetry for symmetry in SYMMETRIES["all"] if keeps_z(symmetry)}
    assert len(SYMMETRIES["z"]) == 8
    assert sorted(round(np.linalg.det(matrix(symmetry))) for symmetry in SYMMETRIES["z"]) == [-1] * 4 + [1] * 4
    assert [matrix(symmetry).tolist() for symmetry in SYMMETRIES["none"]] == [np.eye(3).tolist()]


def test_scores_do_not_change_when_both_grids_are_moved_alike():
    logits, target = torch.randn(3, 1, R, R, R, generator=torch.Generator().manual_seed(1)), random_grids(3, 1)
    want = voxel_metrics(logits, target)
    for symmetry in SYMMETRIES["all"]:
        found = voxel_metrics(symmetry(logits), symmetry(target))
        assert all(torch.equal(found[name], value) for name, value in want.items())


# --- which one a sample gets ---


@pytest.mark.parametrize("augmentation", ["z", "all"])
def test_each_symmetry_is_equally_likely_and_seeds_and_neighbors_are_unrelated(augmentation):
    number = len(SYMMETRIES[augmentation])
    drawn = [symmetry_of(augmentation, 0, sample_id) for sample_id in range(200 * number)]
    counts = collections.Counter(drawn)
    assert counts.keys() == set(SYMMETRIES[augmentation])
    # Chi-square of number - 1 degrees, mean number - 1, variance twice that.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < number - 1 + 5 * (2 * number) ** 0.5
    share, spread = 1 / number, (200 * number / number) ** 0.5
    for other in (drawn[1:], [symmetry_of(augmentation, 1, sample_id) for sample_id in range(200 * number)]):
        equal = sum(a == b for a, b in zip(drawn, other, strict=False))
        assert abs(equal - share * len(drawn)) < 5 * spread


@pytest.mark.parametrize("augmentation", ["none", "z", "all"])
def test_a_grid_gets_the_symmetry_of_its_number_whatever_its_batch(augmentation):
    grids, ids = random_grids(8, 1), torch.tensor([0, 7, 2**40, 3, 4, 5, 6, 7])
    before = grids.clone()
    result = augment_grids(grids, augmentation, 3, ids)
    assert result.is_contiguous() and result.dtype == torch.uint8 and torch.equal(grids, before)
    for row, (grid, sample_id) in enumerate(zip(grids, ids.tolist(), strict=True)):
        want = moved(grid[0].numpy(), matrix(symmetry_of(augmentation, 3, sample_id)))
        assert np.array_equal(result[row, 0].numpy(), want)
        assert torch.equal(augment_grids(grid[None], augmentation, 3, ids[row : row + 1]), result[row : row + 1])
    spread_out = grids.repeat_interleave(2, 0)[::2].movedim(-1, -3)  # not contiguous
    assert augment_grids(spread_out, augmentation, 3, ids).is_contiguous()


# --- in training ---


@pytest.fixture
def dataset(data_dir) -> SparseStructure:
    """24 training and 6 validation grids of 16³."""
    return SparseStructure(data_dir, resolution=16, augmentation="all")


def batches(data: SparseStructure, batch_size: int, number: int, *, seed=3, start=8, workers=0) -> list[dict]:
    stream = endless_batches(
        data, batch_size, seed=seed, start=start, device=torch.device("cpu"), num_workers=workers, prefetch=True
    )
    return list(itertools.islice(stream, number))


def joined(parts: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_each_stored_grid_by_its_samples_symmetry(dataset, data_dir, workers):
    plain = SparseStructure(data_dir, resolution=16)
    stored, seen = joined(batches(plain, 8, 6)), joined(batches(dataset, 8, 6, workers=workers))
    want = augment_grids(stored["ss"], "all", 3, stored["sample_ids"])
    assert_equal(seen, {**stored, "ss": want})
    assert not torch.equal(want, stored["ss"])
    other = joined(batches(dataset, 8, 6, seed=4))
    assert not torch.equal(other["ss"], want)


def test_neither_the_batch_nor_an_interruption_changes_what_is_seen(dataset):
    whole = joined(batches(dataset, 8, 5))
    assert_equal(joined(batches(dataset, 1, 40)), whole)
    assert_equal(joined([*batches(dataset, 8, 2), *batches(dataset, 8, 3, start=24)]), whole)


def test_two_ranks_see_what_one_does(dataset, monkeypatch):
    whole = joined(batches(dataset, 8, 5))
    monkeypatch.setattr(dist_utils, "world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(dist_utils, "rank", lambda rank=rank: rank)
        ranks.append(batches(dataset, 4, 5))
    assert_equal(joined(list(itertools.chain(*zip(*ranks, strict=True)))), whole)


@pytest.mark.parametrize("split", ["val", "all"])
def test_only_the_training_split_is_augmented(dataset, data_dir, split):
    plain = SparseStructure(data_dir, resolution=16, split=split)
    for other in (dataset.for_split(split), SparseStructure(data_dir, resolution=16, augmentation="all", split=split)):
        assert_equal(joined(batches(other, 4, 6)), joined(batches(plain, 4, 6)))
    assert not torch.equal(
        joined(batches(dataset.for_split(split).for_split("train"), 4, 6))["ss"],
        joined(batches(plain.for_split("train"), 4, 6))["ss"],
    )


def test_items_and_batches_outside_the_loop_are_as_stored(dataset, data_dir):
    plain = SparseStructure(data_dir, resolution=16)
    indices = np.arange(len(plain))
    stored = torch.stack([item["ss"] for item in plain])
    assert torch.equal(torch.stack([item["ss"] for item in dataset]), stored)
    assert torch.equal(to_device(dataset, dataset.get_batch(indices), torch.device("cpu"))["ss"], stored)
    assert dataset.content_key() == plain.content_key()


# --- with the rest of a configuration ---


def configured(augmentation: str, trainer: str = VQ, **args) -> dict:
    config = tiny_config(trainer, **args)
    config["dataset"]["args"]["augmentation"] = augmentation
    return config


def test_a_latent_cache_is_refused_where_an_object_has_many_forms():
    for augmentation, cache in (("none", True), ("all", False), ("z", False)):
        train.check_config(configured(augmentation, freeze=["encoder"], latent_cache=cache), 1)
    for augmentation, cache in (("z", True), ("all", "folder")):
        with pytest.raises(ConfigError) as error:
            train.check_config(configured(augmentation, freeze=["encoder"], latent_cache=cache), 1)
        assert all(
            key in str(error.value)
            for key in (
                "trainer.args.latent_cache",
                f'dataset.args.augmentation is "{augmentation}"',
                'augmentation to "none"',
            )
        )
    with pytest.raises(ConfigError, match='augmentation is "y"; it must be "none" or "z" or "all"'):
        train.check_config(configured("y"), 1)


def test_a_run_that_stopped_ends_in_the_bits_of_one_that_did_not(data_dir, write_config, tmp_path, monkeypatch):
    monkeypatch.setattr(SparseStructureVaeTrainer, "run_snapshot", lambda self: {})  # takes most of the time

    def train_until(step: int, folder: str, augmentation: str = "all") -> dict:
        config = write_config(configured(augmentation, "SparseStructureVaeTrainer", max_steps=step))
        assert run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / folder) == 0
        return checkpoint(tmp_path / folder, step)

    whole = train_until(3, "whole")
    train_until(1, "parts")
    assert_equal(train_until(3, "parts"), whole)
    weights = "decoder_step0000003.pt"
    plain = train_until(3, "plain", "none")[weights]
    assert not all(torch.equal(plain[name], value) for name, value in whole[weights].items())
