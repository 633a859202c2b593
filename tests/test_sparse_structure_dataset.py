"""Both layouts give the grids that were stored, the split is stable, and a bad folder is one clear error."""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TEST_DATA, needs_test_data, run, solid_grids, tiny_config
from torch.utils.data import DataLoader

from trellis.datasets.batches import endless_batches
from trellis.datasets.sampler import Order, ResumableSampler
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import occupancy_to_points, pack_bits, write_ply
from trellis.utils.errors import ConfigError, DataError

R = 4


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def random_grids(number: int, seed: int = 0) -> np.ndarray:
    grids = np.random.default_rng(seed).random((number, R, R, R)) < 0.3
    grids[:, 0, 0, 0] = True
    return grids


def ply_root(root: Path, grids: np.ndarray, **columns) -> Path:
    """A folder as TRELLIS makes it; a column given as None is left out."""
    (root / "voxels").mkdir(parents=True)
    names = [sha256(number) for number in range(len(grids))]
    for name, grid in zip(names, grids, strict=True):
        write_ply(root / "voxels" / f"{name}.ply", occupancy_to_points(grid))
    columns = {"sha256": names, "voxelized": True} | columns
    table = pd.DataFrame({key: value for key, value in columns.items() if value is not None})
    table.to_csv(root / "metadata.csv", index=False)
    return root


def packed_root(path: Path, grids: np.ndarray, **arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"bits": pack_bits(grids)} | arrays)
    return path


def all_items(dataset: SparseStructure) -> torch.Tensor:
    return torch.stack([item["ss"] for item in dataset])


# --- what is read ---


def test_both_layouts_give_the_grids_that_were_stored(tmp_path):
    grids = random_grids(20)
    names = np.array([sha256(number) for number in range(20)])
    files = np.array([f"chairs/{number}.glb" for number in range(20)])
    ply = SparseStructure(str(ply_root(tmp_path / "ply", grids, file=files)), resolution=R, split="all")
    packed = packed_root(tmp_path / "a.npz", grids, sha256=names, name=files, source=np.full(20, "chairs"))
    packed = SparseStructure(str(packed), resolution=R, split="all")
    for dataset in (ply, packed):
        items = all_items(dataset)
        assert items.dtype == torch.uint8 and items.shape == (20, 1, R, R, R)
        assert np.array_equal(items[:, 0].numpy(), grids)
        assert [dataset.sha256(i) for i in range(20)] == names.tolist()
        assert [dataset.name(i) for i in range(20)] == files.tolist()
        assert [instance for _, instance in dataset.instances] == names.tolist()
    assert [entry.split for entry in ply.entries] == [entry.split for entry in packed.entries]
    assert (ply.source(0), packed.source(0)) == (None, "chairs")


def test_several_roots_follow_each_other_and_repeated_objects_are_counted_once(tmp_path):
    grids = random_grids(12)
    first = ply_root(tmp_path / "a", grids[:5])
    names = np.array([sha256(number) for number in range(12)])
    second = packed_root(tmp_path / "b" / "x.npz", grids, sha256=names).parent
    dataset = SparseStructure(f"{first}, {second}", resolution=R, split="all")
    assert dataset.instances == (
        [(str(first), sha256(i)) for i in range(5)] + [(str(second), sha256(i)) for i in range(5, 12)]
    )
    assert np.array_equal(all_items(dataset)[:, 0].numpy(), grids)
    assert "5 removed as repeating an earlier root" in dataset.summary()


def test_default_sha256_is_that_of_the_packed_row(tmp_path):
    grids = random_grids(3)
    dataset = SparseStructure(str(packed_root(tmp_path / "a.npz", grids)), resolution=R, split="all")
    for index, row in enumerate(pack_bits(grids)):
        assert dataset.sha256(index) == hashlib.sha256(row.tobytes()).hexdigest()
        assert dataset.name(index) == dataset.sha256(index)


def test_filters_keep_what_they_should_and_report_the_rest(tmp_path):
    grids = random_grids(6)
    root = ply_root(
        tmp_path / "a",
        grids,
        voxelized=["True", "True", "False", "", "True", "True"],
        aesthetic_score=[5, 4.5, 9, None, 4.4, 6],
    )
    (root / "voxels" / f"{sha256(2)}.ply").unlink()  # a file that a filter leaves out need not be there
    dataset = SparseStructure(str(root), resolution=R, min_aesthetic_score=4.5, split="all")
    assert [name for _, name in dataset.instances] == [sha256(i) for i in (0, 1, 5)]
    for phrase in ("6 listed", "2 removed by voxelized", "1 removed by aesthetic_score >= 4.5", "3 kept"):
        assert phrase in str(dataset)
    assert len(SparseStructure(str(root), resolution=R, split="all")) == 4


def test_a_filter_without_its_column_is_reported_as_not_applied(tmp_path):
    root = ply_root(tmp_path / "a", random_grids(3))
    dataset = SparseStructure(str(root), resolution=R, min_aesthetic_score=4.5, split="all")
    assert len(dataset) == 3
    assert "aesthetic_score >= 4.5 NOT applied (no such column)" in dataset.summary()


# --- batches ---


@pytest.mark.parametrize("layouts", ["ply", "packed", "both"])
@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_hold_the_items_in_the_samplers_order(tmp_path, layouts, workers):
    grids = random_grids(12)
    roots = {
        "ply": ply_root(tmp_path / "ply", grids[:7]),
        "packed": packed_root(tmp_path / "a.npz", grids[7:]),
    }
    chosen = [str(root) for layout, root in roots.items() if layouts in (layout, "both")]
    dataset = SparseStructure(",".join(chosen), resolution=R, split="all")
    assert dataset.in_memory == (layouts == "packed")
    batches = endless_batches(
        dataset, 5, seed=1, start=10, device=torch.device("cpu"), num_workers=workers, prefetch=True
    )
    order = ResumableSampler(len(dataset), 5, rank=0, world_size=1, seed=1, start=10)
    items = all_items(dataset)
    for batch, (sample_ids, indices) in zip(itertools.islice(batches, 6), order, strict=False):
        assert batch.keys() == {"ss", "sample_ids"} and batch["ss"].dtype == torch.uint8
        assert torch.equal(batch["ss"], items[indices]) and batch["sample_ids"].tolist() == sample_ids.tolist()


def test_a_batch_travels_packed(tmp_path):
    grids = random_grids(6)
    for root in (ply_root(tmp_path / "ply", grids), packed_root(tmp_path / "a.npz", grids)):
        dataset = SparseStructure(str(root), resolution=R, split="all")
        batch = dataset.get_batch(np.array([4, 0, 4]))
        assert batch.keys() == {"bits"} and np.array_equal(batch["bits"].numpy(), pack_bits(grids[[4, 0, 4]]))


def test_the_content_key_follows_from_what_the_items_are(tmp_path):
    def key(root, split="all", **arguments):
        return SparseStructure(str(root), resolution=R, split=split, **arguments).content_key()

    grids = random_grids(40)
    names = np.array([sha256(number) for number in range(40)])
    packed = packed_root(tmp_path / "a.npz", grids, sha256=names)
    keys = [key(packed), key(packed, split="train"), key(packed_root(tmp_path / "b.npz", grids[:39]))]
    turned = packed_root(tmp_path / "c.npz", grids.swapaxes(1, 3), sha256=names)  # the same meshes, other axes
    keys.append(key(turned))
    root = ply_root(tmp_path / "ply", grids)
    keys.append(key(root))
    path = root / "voxels" / f"{sha256(3)}.ply"
    status = path.stat()
    write_ply(path, occupancy_to_points(grids[3].swapaxes(0, 2)))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(0, status.st_mtime_ns + 1000))
    keys.append(key(root))
    assert len({json.dumps(each) for each in keys}) == len(keys)
    assert key(packed_root(tmp_path / "copy.npz", grids, sha256=names)) == keys[0]
    os.utime(path, ns=(0, status.st_mtime_ns))
    assert key(root) == keys[4]
    dataset = SparseStructure(str(root), resolution=R, split="all")
    path.unlink()
    with pytest.raises(DataError, match=f"{sha256(3)}.ply: cannot be read"):
        dataset.content_key()


# --- split ---


def test_the_split_by_hash_is_stable_under_additions_and_about_5_percent(tmp_path):
    numbers = np.arange(4000)
    bits = np.frombuffer(numbers.astype(">u8").tobytes(), np.uint8).reshape(-1, 8) | 1  # not empty
    names = np.array([sha256(number) for number in numbers])

    def splits(chosen: np.ndarray) -> dict[str, str]:
        path = tmp_path / f"{len(chosen)}.npz"
        np.savez(path, bits=bits[chosen], sha256=names[chosen])
        dataset = SparseStructure(str(path), resolution=R, split="all")
        return {entry.sha256: entry.split for entry in dataset.entries}

    order = np.random.default_rng(0).permutation(4000)
    few, many = splits(order[:500]), splits(np.sort(order))
    assert few.items() <= many.items()
    assert 160 <= sum(split == "val" for split in many.values()) <= 240
    assert all((int(name[:8], 16) < 0.05 * 2**32) == (split == "val") for name, split in many.items())


def test_the_splits_part_the_data_and_reading_again_is_not_needed(tmp_path):
    split = ["train", "val", "train", "", "val"]  # a blank is by hash
    by_hash = "val" if int(sha256(3)[:8], 16) / 2**32 < 0.05 else "train"
    root = ply_root(tmp_path / "a", random_grids(5), split=split)
    dataset = SparseStructure(str(root), resolution=R)
    (root / "metadata.csv").unlink()
    parts = {name: dataset.for_split(name) for name in ("train", "val", "all")}
    for name in ("train", "val"):
        expected = [sha256(i) for i, own in enumerate(split) if (own or by_hash) == name]
        assert [parts[name].sha256(i) for i in range(len(parts[name]))] == expected
        assert dataset.split_sizes()[name] == len(expected)
    assert dataset.split == "train" and dataset.instances == parts["train"].instances
    assert len(parts["all"]) == 5 and parts["val"][0]["ss"].sum() == all_items(parts["all"])[1].sum()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("voxels64_train.npz", "train"),
        ("val.npz", "val"),
        ("shapes-Val.npz", "val"),
        ("64train.npz", "train"),
        ("interval.npz", None),
        ("train_a.npz", None),
    ],
)
def test_a_file_name_gives_the_split_and_an_array_outranks_it(tmp_path, name, expected):
    grids = random_grids(40)
    path = packed_root(tmp_path / name, grids)
    found = {entry.split for entry in SparseStructure(str(path), resolution=R, split="all").entries}
    assert found == ({expected} if expected else {"train", "val"})
    path = packed_root(tmp_path / name, grids, split=np.array(["train", "val"] * 20))
    assert SparseStructure(str(path), resolution=R).split_sizes() == {"train": 20, "val": 20}


def test_an_empty_split_is_an_error_that_names_it(tmp_path):
    dataset = SparseStructure(str(packed_root(tmp_path / "a_train.npz", random_grids(3))), resolution=R)
    assert dataset.split_sizes() == {"train": 3, "val": 0}
    with pytest.raises(DataError, match="a_train.npz: no object is in split 'val'"):
        dataset.for_split("val")


# --- weights of roots ---


def two_roots(tmp_path) -> str:
    """3 training objects, and 20 with 4 more for validation."""
    names = np.array([sha256(number) for number in range(100, 124)])
    small = packed_root(tmp_path / "small.npz", random_grids(3), split=np.full(3, "train"))
    large = packed_root(
        tmp_path / "large.npz", random_grids(24, 1), sha256=names, split=np.array(["train"] * 20 + ["val"] * 4)
    )
    return f"{small},{large}"


def test_roots_are_mixed_by_their_weights(tmp_path):
    roots = two_roots(tmp_path)
    dataset = SparseStructure(roots, resolution=R, weights=[0.25, 0.75])
    assert dataset.shares == [(3, 0.25), (20, 0.75)] and len(dataset) == 23
    items = dataset.order(seed=1).items(0, 4096)
    assert (items < 3).sum() == 1024
    assert f"training samples: 25.00% from {roots.split(',')[0]}, 75.00% from" in dataset.summary()
    batches = endless_batches(dataset, 8, seed=1, start=16, device=torch.device("cpu"), num_workers=0, prefetch=True)
    for number, batch in enumerate(itertools.islice(batches, 3)):
        start = 16 + 8 * number
        assert torch.equal(batch["ss"], torch.stack([dataset[i]["ss"] for i in items[start : start + 8].tolist()]))
    plain = SparseStructure(roots, resolution=R)
    assert plain.shares is None and "training samples" not in plain.summary()
    assert np.array_equal(plain.order(1).items(0, 99), Order(23, 1).items(0, 99))
    for split in ("val", "all"):
        other = dataset.for_split(split)
        assert other.shares is None and other.instances == plain.for_split(split).instances


def test_a_root_of_weight_0_is_validated_and_not_trained_on(tmp_path):
    roots = two_roots(tmp_path)
    dataset = SparseStructure(roots, resolution=R, weights=[1, 0])
    assert dataset.split_sizes() == {"train": 3, "val": 4} and dataset.shares == [(3, 1)]
    assert set(dataset.texts("root")) == {roots.split(",")[0]}
    assert len(dataset.for_split("val")) == 4 and len(dataset.for_split("all")) == 27
    assert dataset.for_split("val").for_split("train").instances == dataset.instances


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1], r"is \[1\], but data_dir has 2 roots"),
        ([1, 1, 1], r"is \[1, 1, 1\], but data_dir has 2 roots"),
        ([1, -0.5], "has -0.5; give a number >= 0"),
        ([float("nan"), 1], "has nan; give"),
        ([1, float("inf")], "has inf; give"),
        ([0, 0], "has no weight above 0"),
        ([1e-9, 1], "1e-09 of .*small.npz is less than one of 65536 samples"),
    ],
)
def test_weights_that_are_no_shares_are_an_error(tmp_path, weights, message):
    with pytest.raises(ConfigError, match=f"dataset.args.weights:? {message}"):
        SparseStructure(two_roots(tmp_path), resolution=R, weights=weights)


def test_weights_of_other_roots_do_not_stop_an_evaluation(tmp_path):
    large = two_roots(tmp_path).split(",")[1]
    assert len(SparseStructure(large, resolution=R, weights=[0.5, 0.5], split="val")) == 4


def test_a_root_without_training_objects_needs_weight_0(tmp_path):
    val = packed_root(tmp_path / "a_val.npz", random_grids(4))
    train = packed_root(tmp_path / "a_train.npz", random_grids(4, 1))
    with pytest.raises(DataError, match="a_val.npz: has no training object, but weight 1. Give it weight 0"):
        SparseStructure(f"{train},{val}", resolution=R, weights=[1, 1])
    assert len(SparseStructure(f"{train},{val}", resolution=R, weights=[1, 0]).for_split("val")) == 4


# --- errors ---


def test_a_bad_item_is_an_error_and_never_another_item(tmp_path):
    root = ply_root(tmp_path / "a", random_grids(4))
    dataset = SparseStructure(str(root), resolution=R, split="all")
    path = root / "voxels" / f"{sha256(2)}.ply"
    path.write_bytes(path.read_bytes()[:-1])
    for index in (0, 1, 3):
        assert dataset[index]["ss"].sum() == random_grids(4)[index].sum()
    with pytest.raises(DataError, match=f"{path}: .*truncated"):
        dataset[2]
    with pytest.raises(DataError, match=f"{path}: .*truncated"):
        list(DataLoader(dataset, batch_size=2))


def replace_file(root: Path, points: np.ndarray) -> Path:
    write_ply(root / "voxels" / f"{sha256(0)}.ply", points)
    return root


def ply(**columns):
    return lambda path: ply_root(path / "root", random_grids(3), **columns)


def npz(**arrays):
    return lambda path: packed_root(path / "root.npz", random_grids(3), **arrays)


def without(name: str):
    def make(path: Path) -> Path:
        root = ply_root(path / "root", random_grids(3))
        target = root / name.format(sha256(1))
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        return root

    return make


def metadata(content: bytes):
    def make(path: Path) -> Path:
        root = ply_root(path / "root", random_grids(3))
        (root / "metadata.csv").write_bytes(content)
        return root

    return make


def cut(path: Path) -> Path:
    packed = packed_root(path / "root.npz", random_grids(3))
    packed.write_bytes(packed.read_bytes()[:-30])
    return packed


def folder(name: str, content: bytes | None = None):
    def make(path: Path) -> Path:
        (path / "root").mkdir()
        if content is not None:
            (path / "root" / name).write_bytes(content)
        return path / "root"

    return make


def both(path: Path) -> Path:
    packed_root(ply_root(path / "root", random_grids(3)) / "a.npz", random_grids(3))
    return path / "root"


def plain_file(path: Path) -> Path:
    (path / "root.txt").write_text("")
    return path / "root.txt"


def one_array(path: Path) -> Path:
    with open(path / "root.npz", "wb") as file:
        np.save(file, np.zeros(3))
    return path / "root.npz"


def off_the_cube(path: Path) -> Path:
    return replace_file(ply_root(path / "root", random_grids(3)), np.array([[0.125, 0.625, 0.125]]))


def another_resolution(path: Path) -> Path:
    return replace_file(ply_root(path / "root", random_grids(3)), np.full((1, 3), 0.5 / 16))


BAD_ROOTS = {
    "missing": (lambda path: path / "root", "root: does not exist"),
    "plain file": (plain_file, "root.txt: is neither a folder nor an .npz or .arrow file"),
    "empty folder": (folder("x"), "root: has neither metadata.csv .*npz.*voxelize.py"),
    "two layouts": (both, "root: has both metadata.csv and a.npz"),
    "no metadata": (without("metadata.csv"), "root: has neither metadata.csv"),
    "empty metadata": (metadata(b""), "metadata.csv: is not a CSV table"),
    "binary metadata": (metadata(b"sha256\n\xff\xfe\n"), "metadata.csv: is not a CSV table"),
    "no rows": (metadata(b"sha256,voxelized\n"), "metadata.csv: lists no object"),
    "no sha256": (metadata(b"name\nchair\n"), "metadata.csv: has no sha256 column, only name"),
    "no hash": (metadata(b"sha256\n../../secret\n"), "metadata.csv: sha256 '../../secret' is not 64"),
    "blank hash": (metadata(b"sha256,file\n,a.glb\n"), "metadata.csv: sha256 nan is not 64"),
    "repeated": (metadata(f"sha256\n{sha256(0)}\n{sha256(0)}\n".encode()), f"{sha256(0)} is listed twice"),
    "bad flag": (ply(voxelized="maybe"), "metadata.csv: voxelized of .* is 'maybe'"),
    "none voxelized": (ply(voxelized=False), "none of 3 objects is left: 3 removed by voxelized = True"),
    "low scores": (ply(aesthetic_score=1.0), "none of 3 .* 3 removed by aesthetic_score >= 2"),
    "NaN score": (ply(aesthetic_score=["5", "nan", ""]), f"score of {sha256(1)} is .*nan.*2 such objects"),
    "bad split": (ply(split=["train", "test", "val"]), f"metadata.csv: split of {sha256(1)} is 'test'"),
    "resolution in metadata": (ply(resolution=64), "resolution of .* is 64, but 4 is asked for"),
    "no voxels": (without("voxels"), "root/voxels: cannot be read"),
    "one file missing": (without("voxels/{}.ply"), f"voxels/{sha256(1)}.ply: is missing of the 3 files that"),
    "point off the cube": (off_the_cube, rf"{sha256(0)}.ply: point 0 is \(0.125, 0.625, 0.125\)"),
    "other resolution": (another_resolution, f"{sha256(0)}.ply: .*the points fit resolution 16"),
    "missing npz": (lambda path: path / "root.npz", "root.npz: cannot be read .No such file"),
    "cut npz": (cut, "root.npz: is not a readable .npz file"),
    "not zipped": (one_array, "root.npz: has no array `bits`"),
    "no npz at all": (folder("a.npz", b"hello"), r"root/a.npz: is not a readable .npz file \(it is no zip archive\)"),
    "pickled": (npz(name=np.array(["a", None, "c"], dtype=object)), "root.npz: .*allow_pickle=False"),
    "dtype": (npz(bits=np.zeros((3, 8), np.int64)), r"root.npz: bits is int64 \[3, 8\]"),
    "no grids": (npz(bits=np.zeros((0, 8), np.uint8)), r"root.npz: bits is uint8 \[0, 8\]"),
    "resolution": (npz(bits=np.ones((3, 64), np.uint8)), "root.npz: rows of 64 bytes hold .* 8, .* is 4"),
    "no cube": (npz(bits=np.ones((3, 9), np.uint8)), "root.npz: rows of 9 bytes are not a cube"),
    "empty grid": (npz(bits=np.eye(3, 8, -1, np.uint8)), "root.npz: row 0 of bits has no .*1 such"),
    "equal grids": (npz(bits=np.ones((3, 8), np.uint8)), "root.npz: sha256 .* is listed twice .2 repet"),
    "too few names": (npz(name=np.array(["a", "b"])), r"root.npz: name is <U1 \[2\]; it must be text \[3\]"),
    "numbers as names": (npz(source=np.arange(3)), r"root.npz: source is int64"),
    "bad split array": (npz(split=np.array(["train", "test", ""])), "root.npz: split of .* is 'test'"),
}


@pytest.mark.parametrize("make, message", BAD_ROOTS.values(), ids=BAD_ROOTS)
def test_a_bad_root_is_one_error_naming_file_and_value(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as error:
        dataset = SparseStructure(str(make(tmp_path)), resolution=R, min_aesthetic_score=2.0, split="all")
        for index in range(len(dataset)):
            dataset[index]
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_bad_lists_of_roots_are_errors(tmp_path):
    root = ply_root(tmp_path / "a", random_grids(2))
    with pytest.raises(DataError, match="has an empty entry"):
        SparseStructure(f"{root},", resolution=R)
    with pytest.raises(DataError, match="is given twice"):
        SparseStructure(f"{root},{root}", resolution=R)


# --- public models ---


# --- roots that differ ---


def both_kinds(folder: Path, name: str, values: tuple[str | None, str | None]) -> list[tuple[Path, Path]]:
    """Two roots with these values of a setting, in all four pairs of layouts."""
    grids = random_grids(4, 5), random_grids(4, 6)
    pairs = []
    for kinds in itertools.product("cp", "cp"):
        roots = []
        for number, (kind, value) in enumerate(zip(kinds, values, strict=True)):
            base = folder / "".join(kinds) / str(number)
            names = [sha256(100 * number + i) for i in range(4)]
            if kind == "p":
                texts = {"sha256": np.array(names)} | ({} if value is None else {name: np.full(4, value)})
                roots.append(packed_root(base.with_suffix(".npz"), grids[number], **texts))
            else:
                (base / "voxels").mkdir(parents=True)
                for each, grid in zip(names, grids[number], strict=True):
                    write_ply(base / "voxels" / f"{each}.ply", occupancy_to_points(grid))
                table = {"sha256": [*names, sha256(999)], "voxelized": [True] * 4 + [False]}
                if value is not None:  # rows without a grid leave it blank
                    table[name] = [value] * 4 + [""]
                pd.DataFrame(table).to_csv(base / "metadata.csv", index=False)
                roots.append(base)
        pairs.append(tuple(roots))
    return pairs


def test_roots_of_different_normalization_are_refused_with_both_names(tmp_path):
    for roots in both_kinds(tmp_path, "normalization", ("cube", "shapellm")):
        for first, second in (roots, roots[::-1]):
            with pytest.raises(DataError) as error:
                SparseStructure(f"{first},{second}", resolution=R, split="all")
            for said in (f"{first} has", f"{second}: has", "shapellm", "cube", "--normalization"):
                assert said in str(error.value)


def test_objects_of_different_normalization_in_one_root_are_refused(tmp_path):
    path = packed_root(tmp_path / "a.npz", random_grids(2), normalization=np.array(["cube", "shapellm"]))
    with pytest.raises(DataError, match="grids of normalization shapellm.* grids of normalization cube"):
        SparseStructure(str(path), resolution=R, split="all")


def test_a_root_that_does_not_say_its_normalization_goes_with_a_note(tmp_path):
    for first, second in both_kinds(tmp_path, "normalization", (None, "cube")):
        data = SparseStructure(f"{first},{second}", resolution=R, split="all")
        # A folder that does not say is of before there was a choice.
        silent = first.suffix == ".npz"
        assert data.notes == silent * [
            f"{first} does not say how its grids were normalized; those of {second} are normalized as cube"
        ]
        assert ("note: " in data.summary()) == silent
    folder, _ = both_kinds(tmp_path / "again", "normalization", (None, None))[0]
    other = packed_root(tmp_path / "x.npz", random_grids(2, 9), normalization=np.full(2, "shapellm"))
    with pytest.raises(DataError, match="shapellm.*cube"):
        SparseStructure(f"{folder},{other}", resolution=R, split="all")
    quiet = both_kinds(tmp_path / "more", "normalization", (None, None))[3]
    assert SparseStructure(",".join(map(str, quiet)), resolution=R, split="all").notes == []


@pytest.mark.parametrize(
    "axes, noted",
    [
        (("y", "z"), False),
        (("auto", "z"), False),
        (("keep", "keep"), False),
        ((None, None), False),
        (("keep", "y"), True),
        (("keep", "auto"), True),
        ((None, "z"), True),
        ((None, "keep"), True),
    ],
)
def test_roots_that_may_have_other_axes_up_are_named_in_the_summary(axes, noted, tmp_path):
    for roots in both_kinds(tmp_path, "up_axis", axes):
        data = SparseStructure(",".join(map(str, roots)), resolution=R, split="all")
        notes = [note for note in data.notes if "axes" in note]
        assert len(notes) == noted
        for root, axis in zip(roots, axes, strict=True):
            assert not noted or f"{root} ({f'up_axis {axis}' if axis else 'does not say'})" in notes[0]
            assert data.settings[str(root)]["up_axis"] == {axis}
        assert data.for_split("all").summary() == data.summary()
        assert data.summary().count("note: grids may have different axes up") == noted


def test_solid_grids_beside_surfaces_are_named_in_the_summary(tmp_path):
    for first, second in (
        *both_kinds(tmp_path / "a", "fill", ("solid", "")),
        *both_kinds(tmp_path / "b", "fill", ("solid", None)),
    ):
        data = SparseStructure(f"{first},{second}", resolution=R, split="all")
        assert f"grids of {first} are solid, and those of {second} surfaces: a model learns both" in data.notes
        assert SparseStructure(str(first), resolution=R, split="all").settings[str(first)]["fill"] == {"solid"}
    alike = both_kinds(tmp_path / "c", "fill", (None, ""))[1]
    assert "are solid" not in SparseStructure(",".join(map(str, alike)), resolution=R, split="all").summary()


def test_roots_of_different_resolution_are_refused_with_both_names(tmp_path):
    grids = np.random.default_rng(3).random((2, 2 * R, 2 * R, 2 * R)) < 0.3
    fits = packed_root(tmp_path / "fits.npz", random_grids(2))
    packed = packed_root(tmp_path / "packed.npz", grids)
    folder = ply_root(tmp_path / "folder", random_grids(2, 7), resolution=2 * R)
    for other, path in ((packed, packed), (folder, folder / "metadata.csv")):
        with pytest.raises(DataError) as error:
            SparseStructure(f"{fits},{other}", resolution=R, split="all")
        assert str(error.value) == (
            f"{path}: has grids of resolution {2 * R}, but those of {fits} have {R}, as the config says. Make the "
            f"former anew with voxelize.py --resolution {R}, or leave this root out."
        )
        with pytest.raises(DataError, match=rf"but ((the config's|resolution) is {R}\. Ask|{R} is asked for\. Ask)"):
            SparseStructure(f"{other},{fits}", resolution=R, split="all")


def test_programs_refuse_roots_that_differ_before_they_start(tmp_path, vae_run, write_config, capsys):
    from scripts import evaluate

    roots = []
    for number, normalization in enumerate(("cube", "shapellm")):
        texts = {"normalization": np.full(4, normalization)}
        roots.append(str(packed_root(tmp_path / f"{number}.npz", solid_grids(4, 16, number), **texts)))
    config, data = write_config(tiny_config()), ",".join(roots)
    for more in ((), ("--tryrun",)):
        assert run("--config", config, "--data_dir", data, "--output_dir", tmp_path / "run", *more) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {roots[1]}: ") and roots[0] in error and "Traceback" not in error
    assert not (tmp_path / "run" / "ckpts").exists()
    flags = ["--run", str(vae_run), "--data_dir", data, "--output_dir", str(tmp_path / "eval"), "--device", "cpu"]
    assert evaluate.main(flags) == 1
    assert roots[0] in capsys.readouterr().err and not (tmp_path / "eval").exists()


@needs_test_data
def test_grids_of_public_models_are_read_as_described():
    folder = TEST_DATA / "data"
    dataset = SparseStructure(f"{folder}/voxels64_val.npz,{folder}/voxels64_train.npz", split="val")
    assert dataset.split_sizes() == {"train": 4695, "val": 650}
    grids = [item["ss"][0] for item in dataset]
    counts = [grid.count_nonzero().item() for grid in grids]
    assert (round(np.mean(counts)), np.median(counts)) == (11096, 9202)
    for grid in grids:  # the longest axis touches both end slices
        ends = [[grid.select(axis, end).any() for end in (0, 63)] for axis in range(3)]
        assert any(all(pair) for pair in ends)
    sources = [dataset.source(index) for index in range(len(dataset))]
    assert sources.count("bulletphysics/bullet3") == 146
