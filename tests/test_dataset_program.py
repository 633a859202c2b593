"""dataset.py: data sets checked, described, joined, divided and cleaned."""

import csv
import hashlib
import json
import re
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import solid_grids, table

from dataset_toolkits import dataset as program
from dataset_toolkits import pack, shard_files
from dataset_toolkits.curation import objects, statistics, verification
from dataset_toolkits.curation.families import axes_of
from dataset_toolkits.curation.filtering import parse_condition
from trellis.datasets.metadata import split_of
from trellis.datasets.shards import Shard, write_shard
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.symmetries import SYMMETRIES
from trellis.grids.voxels import occupancy_to_points, pack_bits, write_ply

pytest.importorskip("pyarrow")
R = 16


def sha(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def columns_for(count: int, start: int = 0) -> dict[str, list]:
    """Columns of all types, with blanks."""
    numbers = range(start, start + count)
    return {
        "sha256": [sha(i) for i in numbers],
        "name": [f"shape {i}.obj" for i in numbers],
        "source": [f"source{i % 3}" if i % 4 else None for i in numbers],
        "kind": ["chair" if i % 2 else "table" for i in numbers],
        "captions": [[f"a shape, {i}"] if i % 5 else None for i in numbers],
        "split": ["val" if i % 6 == 0 else "train" for i in numbers],
        "normalization": ["cube"] * count,
        "up_axis": ["z"] * count,
        "aesthetic_score": [i / 10 if i % 3 else None for i in numbers],
        "artist": [f"artist {i % 4}" for i in numbers],
        "my rating": ["nan" if i % 5 == 4 else str(i % 5) for i in numbers],
    }


def make_shards(folder: Path, grids: np.ndarray, columns: dict[str, list], size: int = 10) -> Path:
    folder.mkdir(parents=True)
    for start in range(0, len(grids), size):
        part = {name: values[start : start + size] for name, values in columns.items()}
        write_shard(folder / f"part{start:03d}.arrow", pack_bits(grids[start : start + size]), R, part)
    return folder


def run(*args: object) -> int:
    return program.main([*map(str, args), "--resolution", str(R)])


def content(root: Path | str) -> dict[str, tuple[bytes, dict]]:
    """{sha256: grid and columns} of a data root."""
    dataset = SparseStructure(str(root), resolution=R, split="all")
    indices = np.arange(len(dataset))
    columns = dataset.columns_of(indices)
    bits = dataset.get_batch(indices)["bits"].numpy()
    rows = [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in indices]
    return {row.pop("sha256"): (grid.tobytes(), row) for row, grid in zip(rows, bits, strict=True)}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.fixture
def grids() -> np.ndarray:
    return solid_grids(24, R, 0)


@pytest.fixture
def root(tmp_path, grids) -> Path:
    return make_shards(tmp_path / "data", grids, columns_for(24))


# --- verify ------------------------------------------------------------------------------------------------------


def test_whole_data_are_verified(root, capsys):
    assert run("verify", root, "--max_workers", 1) == 0
    assert "24 objects in 3 shards, all whole" in capsys.readouterr().out


def test_each_damaged_file_is_named_with_what_is_lost(root, capsys):
    for name, rows in (("part000.arrow", (3, 7)), ("part020.arrow", (1,))):
        shard = Shard(root / name)
        damaged = bytearray((root / name).read_bytes())
        for row in rows:
            grid = shard.column("grid")[row].as_buffer().to_pybytes()
            damaged[damaged.find(grid) + len(grid) // 2] ^= 4
        (root / name).write_bytes(damaged)
    (root / "part010.arrow").write_bytes((root / "part010.arrow").read_bytes()[:-100])
    assert run("verify", root, "--max_workers", 2) == 1
    out = capsys.readouterr().out
    for row in (3, 7, 21):
        assert sha(row) in out
    assert "part010.arrow" in out
    assert "3 of 3 shards damaged: 3 objects lost, and all objects of 1 file that cannot be opened" in out


def test_a_killed_reader_is_said_with_the_files_that_are_left(root, monkeypatch, capsys):
    def killed(function, paths, workers, done):
        done(function(paths[0]))
        raise BrokenProcessPool

    monkeypatch.setattr(verification, "run_in_processes", killed)
    assert run("verify", root, "--max_workers", 2) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "part010.arrow, " in error and "part000.arrow" not in error


def test_damage_of_a_column_and_long_lists(root, capsys):
    path = root / "part000.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"artist 3", b"artist X", 1))
    assert run("verify", root, "--max_workers", 1) == 1
    assert "artist is damaged" in capsys.readouterr().out
    finding = verification.check_shard(path, R)
    assert (finding.rows, finding.lost) == (10, 10)
    capsys.readouterr()
    assert program.main(["verify", str(root), "--resolution", "32", "--max_workers", "1"]) == 1
    said = capsys.readouterr()
    assert "grids of resolution 16, but 32 is asked for. Give --resolution 16" in said.err
    assert "lost" not in said.out and "damaged" not in said.out


def test_other_roots_are_verified_too(tmp_path, grids, capsys):
    voxels = tmp_path / "ply" / "voxels"
    voxels.mkdir(parents=True)
    names = [sha(f"ply {i}") for i in range(4)]
    for name, grid in zip(names, grids, strict=False):
        write_ply(voxels / f"{name}.ply", occupancy_to_points(grid))
    (tmp_path / "ply/metadata.csv").write_text("sha256\n" + "\n".join(names) + "\n")
    np.savez(tmp_path / "own_val.npz", bits=pack_bits(grids))
    both = f"{tmp_path / 'ply'},{tmp_path / 'own_val.npz'}"
    assert run("verify", both) == 0
    assert "28 objects, all whole" in capsys.readouterr().out
    (voxels / f"{names[2]}.ply").write_bytes(b"ply\n")
    assert run("verify", both) == 1
    out = capsys.readouterr().out
    assert f"{names[2]}.ply" in out and names[1] not in out
    assert run("verify", tmp_path / "nowhere") == 1
    assert "does not exist" in capsys.readouterr().out


# --- merge -------------------------------------------------------------------------------------------------------


def test_merging_loses_nothing_and_takes_repeated_objects_once(tmp_path, root, grids, capsys):
    other = make_shards(tmp_path / "other", grids[:12][::-1], {n: v[::-1] for n, v in columns_for(12).items()}, 5)
    more = make_shards(tmp_path / "more", solid_grids(8, R, 1), columns_for(8, 100), 3)
    assert run("merge", f"{root},{other},{more}", "--output", tmp_path / "all") == 0
    assert "32 objects, 12 times one that an earlier root has, in 1 shard" in capsys.readouterr().out
    assert content(tmp_path / "all") == content(root) | content(more)
    assert not leftovers(tmp_path)


def test_merging_packed_and_voxel_files(tmp_path, root, grids):
    np.savez(tmp_path / "own_val.npz", bits=pack_bits(grids[:3]), normalization=np.array(["cube"] * 3))
    assert run("merge", f"{root},{tmp_path / 'own_val.npz'}", "--output", tmp_path / "all") == 0
    found = content(tmp_path / "all")
    assert len(found) == 27
    own = found[hashlib.sha256(pack_bits(grids[:1])[0]).hexdigest()]
    assert own == (pack_bits(grids[:1])[0].tobytes(), {"normalization": "cube", "split": "val"})


def test_one_object_with_two_grids_is_an_error(tmp_path, root, grids, capsys):
    other = make_shards(tmp_path / "other", grids[::-1][:5], columns_for(5))
    assert run("merge", f"{root},{other}", "--output", tmp_path / "all") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and sha(0) in error and str(root) in error and str(other) in error
    assert not (tmp_path / "all").exists() and not leftovers(tmp_path)


def test_other_normalizations_are_not_merged(tmp_path, root, grids, capsys):
    other = make_shards(tmp_path / "other", grids[:5], columns_for(5, 50) | {"normalization": ["shapellm"] * 5})
    assert run("merge", f"{root},{other}", "--output", tmp_path / "all") == 1
    assert "normalization" in capsys.readouterr().err


def test_large_data_go_into_several_shards_in_their_order(tmp_path, root, monkeypatch):
    monkeypatch.setattr(objects, "grids_per_shard", lambda resolution: 7)
    monkeypatch.setattr(shard_files, "CHUNK", 4)
    assert run("merge", root, "--output", tmp_path / "all") == 0
    files = sorted((tmp_path / "all").iterdir())
    assert [len(Shard(file)) for file in files] == [7, 7, 7, 3]
    assert [name for file in files for name in Shard(file).column("sha256").to_pylist()] == columns_for(24)["sha256"]
    assert content(tmp_path / "all") == content(root)


@pytest.mark.parametrize("command", ["merge", "filter --where kind==chair", "dedupe", "split --val 0.1"])
def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path, root, monkeypatch, capsys, command):
    name, *flags = command.split()
    (tmp_path / "there").mkdir()
    assert run(name, root, *flags, "--output", tmp_path / "there") == 1
    assert "exists already" in capsys.readouterr().err

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(objects, "write_shard", interrupted)
    assert run(name, root, *flags, "--output", tmp_path / "new") == 130
    assert not (tmp_path / "new").exists() and not leftovers(tmp_path)
    monkeypatch.undo()
    assert run(name, root, *flags, "--output", tmp_path / "new") == 0
    assert (tmp_path / "new").is_dir()


# --- filter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conditions, rule",
    [
        (["kind == chair"], lambda i, row, voxels: i % 2),
        (["kind != 'chair'", "aesthetic_score >= 1"], lambda i, row, voxels: not i % 2 and i % 3 and i >= 10),
        (["source in source1, source2"], lambda i, row, voxels: i % 4 and i % 3),
        (["source != source1"], lambda i, row, voxels: i % 4 and i % 3 != 1),
        (["aesthetic_score in 0.1, 0.2, 0.30"], lambda i, row, voxels: i in (1, 2)),
        (["num_voxels < 300"], lambda i, row, voxels: voxels < 300),
        (["num_voxels>300", "artist==artist 2"], lambda i, row, voxels: voxels > 300 and i % 4 == 2),
        (["name == shape 3.obj"], lambda i, row, voxels: i == 3),
        (["my rating >= 2"], lambda i, row, voxels: i % 5 in (2, 3)),
        (["artist != 'a and b == c'", "my rating != 2"], lambda i, row, voxels: i % 5 != 2),
    ],
)
def test_objects_that_meet_all_conditions(tmp_path, root, grids, conditions, rule):
    flags = [part for condition in conditions for part in ("--where", condition)]
    assert run("filter", root, *flags, "--output", tmp_path / "out") == 0
    columns = columns_for(24)
    voxels = grids.reshape(24, -1).sum(1)
    expected = {columns["sha256"][i] for i in range(24) if rule(i, columns, voxels[i])}
    whole = content(root)
    assert 0 < len(expected) < 24
    assert content(tmp_path / "out") == {name: whole[name] for name in expected}


def test_lists_of_objects(tmp_path, root, capsys):
    names = columns_for(24)["sha256"]
    (tmp_path / "keep.txt").write_text("sha256\n" + "\n".join(f"{name}, a note" for name in names[:9]) + "\n\n")
    (tmp_path / "drop.txt").write_text("\n".join([*names[5:12], sha("another")]))
    flags = ("--keep", tmp_path / "keep.txt", "--drop", tmp_path / "drop.txt")
    assert run("filter", root, *flags, "--where", "kind == chair", "--output", tmp_path / "out") == 0
    assert set(content(tmp_path / "out")) == {names[1], names[3]}
    assert "--drop: 7 of its 8 objects are in the data" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--where", "kind"], "is no condition"),
        (["--where", "num_voxels >= many"], "many is no number"),
        (["--where", "num_voxels in 1, x"], "is no number"),
        (["--where", "colour == red"], "no column colour, only .*artist.*num_voxels"),
        (["--where", "captions == red"], "captions cannot be compared"),
        (["--where", "name > 3"], "name of [0-9a-f]{64} is 'shape 0.obj', which is no number"),
        (["--where", "__import__('os') == 3"], "no column __import__"),
        (["--where", "kind == sofa"], "no object is left"),
        (["--where", "kind != sofa and num_voxels > 3"], "has several conditions; give a --where for each"),
        (["--where", "num_voxels > 3 or num_voxels < 1"], "has several conditions"),
        (["--where", "num_voxels >= nan"], "nan is no number"),
        ([], "nothing to filter by"),
        (["--keep", "missing.txt"], "missing.txt: cannot be read"),
        (["--keep", "list.txt"], "line 2 begins with 'chair', which is no sha256"),
    ],
)
def test_a_filter_that_cannot_run(tmp_path, root, monkeypatch, capsys, flags, error):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text(f"{sha(1)}\nchair\n")
    assert run("filter", root, *flags, "--output", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(error, message), message
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_text_columns_that_hold_numbers_are_compared_as_numbers():
    condition = parse_condition("year >= 1999")
    assert condition.holds("2001", "") and not condition.holds("888", "") and not condition.holds(None, "")


# --- families ----------------------------------------------------------------------------------------------------


def altered(grid: np.ndarray, flips: int, seed: int) -> np.ndarray:
    flat = grid.reshape(-1).copy()
    flat[np.random.default_rng(seed).choice(flat.size, flips, replace=False)] ^= True
    return flat.reshape(grid.shape)


def turned(grid: np.ndarray, symmetry: int) -> np.ndarray:
    return SYMMETRIES["all"][symmetry](torch.from_numpy(grid)).contiguous().numpy()


@pytest.fixture
def with_families(tmp_path, grids) -> tuple[Path, np.ndarray, dict[str, list]]:
    """Objects 0 to 11 are unlike; 12 to 15 are forms of 0, 1, 2 and 2; 16 is 3 as it is."""
    forms = [altered(turned(grids[i], 7 * k + 5), 12, k) for k, i in enumerate((0, 1, 2, 2))]
    every = np.stack([*grids[:12], *forms, grids[3]])
    columns = columns_for(17)
    columns["split"] = ["val" if i in (1, 13, 14) else "train" for i in range(17)]
    return make_shards(tmp_path / "families", every, columns), every, columns


FAMILIES = ((0, 12), (1, 13), (2, 14, 15), (3, 16))


def test_near_duplicates_go_and_one_of_val_or_the_lowest_stays(tmp_path, with_families, capsys):
    root, grids, columns = with_families
    names, splits = columns["sha256"], columns["split"]
    assert run("dedupe", root, "--report", tmp_path / "r.csv", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "4 families of several objects, 9 of 17 in all, the largest of 3" in out
    assert "1 family in both train and val" in out
    assert "5 objects may go; 2 of them of train, near to one of val" in out
    rows = {row["sha256"]: row for row in table(tmp_path / "r.csv")}
    assert set(rows) == {names[i] for family in FAMILIES for i in family}
    gone = set()
    by_axes = {axes_of(symmetry): symmetry for symmetry in SYMMETRIES["all"]}
    for family in FAMILIES:
        stays = min(family, key=lambda i: (splits[i] != "val", names[i]))
        for i in family:
            row = rows[names[i]]
            assert row["family"] == min(names[j] for j in family)
            assert (row["name"], row["split"], row["root"]) == (columns["name"][i], splits[i], str(root))
            if i == stays:
                assert row["near"] == row["iou"] == row["axes"] == ""
                continue
            gone.add(names[i])
            assert row["near"] == names[stays]
            moved = by_axes[row["axes"]](torch.from_numpy(grids[stays])).numpy()
            assert f"{(moved & grids[i]).sum() / (moved | grids[i]).sum():.4f}" == row["iou"]
    whole = content(root)
    assert content(tmp_path / "out") == {name: whole[name] for name in names if name not in gone}


def test_without_an_output_dedupe_only_tells(tmp_path, with_families, capsys):
    root, _, _ = with_families
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert run("dedupe", root, "--iou", "1") == 0
    assert "1 family of several objects, 2 of 17" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_no_family_is_in_both_splits(tmp_path, with_families, capsys):
    root, _, columns = with_families
    names = columns["sha256"]
    flags = ("--val", 0.4, "--output", tmp_path / "out", "--report", tmp_path / "r.csv")
    assert run("split", root, *flags) == 0
    assert "1 family in both train and val" in capsys.readouterr().out
    whole, divided = content(root), content(tmp_path / "out")
    splits = {name: row.pop("split") for name, (_, row) in divided.items()}
    for _, row in whole.values():
        row.pop("split")
    assert divided == whole  # the split alone is another
    members = [{names[i] for i in family} for family in FAMILIES]
    assert all(len({splits[name] for name in family}) == 1 for family in members)
    alone = set(names) - set().union(*members)
    assert len(alone) == 8 and all((splits[name] == "val") == (int(name[:8], 16) / 2**32 < 0.4) for name in alone)
    assert {row["sha256"]: row["new_split"] for row in table(tmp_path / "r.csv")} == {
        name: splits[name] for family in members for name in family
    }


def test_objects_added_later_move_no_other_family(tmp_path, grids):
    first = make_shards(tmp_path / "first", grids[:16], columns_for(16))
    more = make_shards(tmp_path / "more", grids[16:], columns_for(8, 16))
    assert run("split", first, "--val", 0.3, "--output", tmp_path / "a") == 0
    assert run("split", f"{first},{more}", "--val", 0.3, "--output", tmp_path / "b") == 0
    before, after = content(tmp_path / "a"), content(tmp_path / "b")
    assert {name: after[name] for name in before} == before and len(after) == 24


def test_a_share_of_val_of_large_families_is_no_larger(tmp_path):
    """The lowest of many sha256 is low: it must not decide."""
    count = 400
    bits = np.zeros((count, R**3), bool)
    bits[np.arange(count), np.arange(count) * 9] = bits[np.arange(count), np.arange(count) * 10 + 3] = True
    columns = {"sha256": [sha(f"x{i}") for i in range(count)], "artist": [str(i % 40) for i in range(count)]}
    root = make_shards(tmp_path / "data", bits.reshape(count, R, R, R), columns, count)
    assert run("split", root, "--val", 0.2, "--iou", 1, "--family", "artist", "--output", tmp_path / "out") == 0
    found = content(tmp_path / "out").values()
    assert 0.05 < sum(row["split"] == "val" for _, row in found) / count < 0.4
    by_artist: dict[str, set[str]] = {}
    for _, row in found:
        by_artist.setdefault(row["artist"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_artist.values())


def test_values_of_a_column_are_families_too(tmp_path, with_families, capsys):
    root, _, columns = with_families
    assert run("split", root, "--val", 0.5, "--family", "source", "--output", tmp_path / "out") == 0
    found = content(tmp_path / "out")
    splits = [found[name][1]["split"] for name in columns["sha256"]]
    for value in ("source0", "source1", "source2"):
        assert len({splits[i] for i in range(17) if columns["source"][i] == value}) == 1
    assert all(len({splits[i] for i in family}) == 1 for family in FAMILIES)


def test_the_default_split_is_that_of_single_objects(tmp_path, root):
    assert run("split", root, "--val", 0.05, "--output", tmp_path / "out") == 0
    assert {name: row["split"] for name, (_, row) in content(tmp_path / "out").items()} == {
        name: split_of(name) for name in columns_for(24)["sha256"]
    }


@pytest.mark.parametrize(
    "flags, error",
    [
        (["split", "--val", "0"], "--val 0.0: must lie between 0 and 1"),
        (["split", "--val", "nan"], "--val nan"),
        (
            ["split", "--val", "0.1", "--family", "maker"],
            "--family maker: the data have no such column, only aesthetic",
        ),
        (["split", "--val", "0.1", "--iou", "0.2"], "--iou 0.2: must lie between 0.5 and 1"),
        (["dedupe", "--iou", "nan"], "--iou nan"),
        (["dedupe", "--report", "data"], "--report data: exists already"),
        (["dedupe", "--output", "x", "--report", "x/r.csv"], "--report x/r.csv: lies in --output"),
        (["dedupe", "--output", "x.arrow"], "is to be a folder of shards"),
        (["merge", "--output", "data"], "--output data: exists already"),
        (["stats", "--output", "data"], "--output data: exists already"),
        (["sheet", "--output", "x.jpg"], "name that ends in .png"),
        (["sheet", "--output", "x.png", "--objects", "0"], "--objects 0: must lie between 1"),
        (["sheet", "--output", "x.png", "--families", "--iou", "0.99"], "no two objects overlap"),
        (["verify", "--max_workers", "0"], "--max_workers 0"),
    ],
)
def test_flags_that_cannot_run(tmp_path, root, monkeypatch, capsys, flags, error):
    monkeypatch.chdir(tmp_path)
    assert run(flags[0], "data", *flags[1:]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and error in message


# --- stats and sheet ---------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_grids(tmp_path, root, grids, capsys):
    assert run("stats", root, "--output", tmp_path / "stats") == 0
    result = json.loads((tmp_path / "stats/stats.json").read_text())
    voxels = grids.reshape(24, -1).sum(1)
    assert (result["objects"], result["splits"]) == (24, {"train": 20, "val": 4})
    assert result["num_voxels"]["mean"] == pytest.approx(voxels.mean())
    assert result["num_voxels"]["p50"] == np.median(voxels)
    for i, axis in enumerate("xyz"):
        places = [np.argwhere(grid)[:, i] for grid in grids]
        extents = [place.max() - place.min() + 1 for place in places]
        assert result["extent"][axis]["mean"] == pytest.approx(np.mean(extents))
    assert result["kinds"] == {"chair": 12, "table": 12}
    columns = columns_for(24)
    rows = {(row["column"], row["value"]): row for row in table(tmp_path / "stats/stats.csv")}
    for value in ("source0", "source1", "source2", ""):
        chosen = np.array([(source or "") == value for source in columns["source"]])
        row = rows["source", value]
        assert int(row["objects"]) == chosen.sum()
        assert float(row["num_voxels_median"]) == np.median(voxels[chosen])
        assert int(row["val"]) == sum(split == "val" for split, c in zip(columns["split"], chosen, strict=True) if c)
    names = {path.name for path in (tmp_path / "stats").iterdir()}
    assert names == {"stats.json", "stats.csv", "occupancy.png", "extents.png", "sources.png", "kinds.png"}
    assert not leftovers(tmp_path)
    assert "24 objects of 3 sources: median" in capsys.readouterr().out


def test_many_sources_are_counted_in_little_time_and_memory():
    """An object's own page may be its source: no step may go over all objects for each source."""
    count, names = 200_000, [f"https://example.org/{i}" for i in range(200_000)]
    everything = np.arange(count)
    measured = statistics.Measured(
        everything + 1,
        np.ones((count, 3), np.int64),
        {"source": (names, everything), "kind": ([""], everything * 0), "split": (["val", "train"], everything % 2)},
    )
    start = time.monotonic()
    rows = statistics.rows_of(measured)
    assert time.monotonic() - start < 60  # 10^10 comparisons take longer
    assert [row["objects"] for row in rows] == [1] * count + [count] + [count // 2] * 2
    assert [row["num_voxels_median"] for row in rows[: count + 1]] == [*range(1, count + 1), (count + 1) / 2]
    assert sum(row["val"] for row in rows[:count]) == count // 2


def test_a_sheet_is_a_function_of_its_seed(tmp_path, root):
    from PIL import Image

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("sheet", root, "--objects", 10, "--seed", seed, "--output", tmp_path / f"{name}.png") == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    size = Image.open(tmp_path / "a.png").size
    assert run("sheet", root, "--objects", 99, "--output", tmp_path / "all.png") == 0
    assert Image.open(tmp_path / "all.png").size == (size[0], size[1] * 3 // 2)  # three lines of eight, not two


def test_a_sheet_of_families(tmp_path, with_families):
    from PIL import Image

    assert run("sheet", with_families[0], "--families", "--objects", 5, "--output", tmp_path / "f.png") == 0
    assert run("sheet", with_families[0], "--objects", 1, "--output", tmp_path / "one.png") == 0
    width, height = Image.open(tmp_path / "one.png").size
    assert Image.open(tmp_path / "f.png").size == (3 * width, 2 * height)  # a family of three, one of two


def test_reports_are_tables_for_other_programs(tmp_path, with_families):
    """Commas and quotes of names are escaped; lines end alike on every system."""
    root, grids, columns = with_families
    columns["name"][0] = 'a, "b".obj'
    quoted = make_shards(tmp_path / "quoted", grids, columns)
    assert run("dedupe", quoted, "--report", tmp_path / "new/r.csv") == 0
    text = (tmp_path / "new/r.csv").read_bytes()
    assert b"\r" not in text
    assert 'a, "b".obj' in [row["name"] for row in csv.DictReader(text.decode().splitlines())]


@pytest.mark.parametrize("command", program.COMMANDS)
def test_each_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([command, "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    assert program.COMMANDS[command][:60] in words


def test_voxel_files_are_merged_as_they_are_packed(tmp_path, grids):
    """Also what people add to metadata.csv."""
    voxels = tmp_path / "ply/voxels"
    voxels.mkdir(parents=True)
    lines = ["sha256,file,voxelized,num_voxels,resolution,split,aesthetic_score,captions,artist"]
    for i, grid in enumerate(grids[:6]):
        write_ply(voxels / f"{sha(i)}.ply", occupancy_to_points(grid))
        lines.append(f'{sha(i)},{i}.obj,True,{grid.sum()},16,,{i}.5,"[""a shape"", ""no {i}""]",' + "Ada" * (i % 2))
    (tmp_path / "ply/metadata.csv").write_text("\n".join(lines) + "\n")
    assert run("merge", tmp_path / "ply", "--output", tmp_path / "merged") == 0
    assert (
        pack.main(["--input", str(tmp_path / "ply"), "--output", str(tmp_path / "packed"), "--resolution", "16"]) == 0
    )
    merged = content(tmp_path / "merged")
    assert merged == content(tmp_path / "packed")
    assert merged[sha(3)][1]["captions"] == ["a shape", "no 3"] and merged[sha(3)][1]["artist"] == "Ada"
