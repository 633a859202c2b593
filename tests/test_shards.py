"""Shards give the grids and columns that were written, as a data root like the others, and no damage passes."""

import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from test_sparse_structure_dataset import R, all_items, packed_root, ply_root, random_grids, sha256

from trellis.datasets.batches import endless_batches
from trellis.datasets.metadata import settings_of_data
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import pack_bits
from trellis.trainers.data_changes import changes, facts_of
from trellis.utils.errors import ConfigError, DataError

pa = pytest.importorskip("pyarrow")

from trellis.datasets.shards import Shard, write_shard  # noqa: E402

FULL = {
    "name": ["a.glb", None, "ü/c.glb"],
    "source": ["x", "", "y"],
    "kind": [None, "organ", "organ"],
    "captions": [["a cup", "a mug"], None, []],
    "split": ["val", "train", None],
    "up_axis": ["z"] * 3,
    "normalization": ["cube"] * 3,
    "fill": [None, "solid", "surface"],
    "mm_per_cell": [None, 1.5, 0.1],
    "frame": ['{"a": 1}', None, None],
    "aesthetic_score": [5.0, None, 4.0],
    "license": ["CC0", None, "MIT"],
}


def shard(path: Path, grids: np.ndarray, first: int = 0, **columns) -> Path:
    """Grids of objects number `first` and up as a shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [sha256(first + number) for number in range(len(grids))]
    write_shard(path, pack_bits(grids), grids.shape[1], {"sha256": names, **columns})
    return path


def opened(root: object, split: str = "all", **arguments) -> SparseStructure:
    return SparseStructure(str(root), resolution=R, split=split, **arguments)


# --- what is read ---


def test_every_column_comes_back_and_arrow_reads_the_file(tmp_path):
    grids = random_grids(3)
    path = shard(tmp_path / "a.arrow", grids, **FULL)
    data = opened(path)
    found = data.columns_of(np.array([2, 0, 1]))
    assert found.pop("sha256") == [sha256(2), sha256(0), sha256(1)]
    assert found.pop("split") == ["train", "val", "train"]  # the third by its hash
    expected = {name: [values[2], values[0], values[1]] for name, values in FULL.items() if name != "split"}
    assert found == expected and list(found)[-1] == "license"
    assert [data.name(index) for index in range(3)] == ["a.glb", sha256(1), "ü/c.glb"]
    assert [data.source(index) for index in range(3)] == ["x", None, "y"]
    assert data.settings[str(path)] == {"up_axis": {"z"}, "normalization": {"cube"}, "fill": {"solid", "surface"}}
    table = pa.ipc.open_file(str(path)).read_all()
    assert table["num_voxels"].to_pylist() == grids.sum((1, 2, 3)).tolist()
    frames = table["grid"].to_pylist()
    assert table["checksum"].to_pylist() == [zlib.crc32(frame) for frame in frames]
    bits = [pa.decompress(frame, R**3 // 8, codec="zstd", asbytes=True) for frame in frames]
    assert bits == [row.tobytes() for row in pack_bits(grids)]


@pytest.mark.parametrize("layout", ["ply", "packed", "shards"])
def test_the_columns_of_any_root_make_equal_shards(tmp_path, layout):
    grids = random_grids(30)
    texts = {"source": [f"s{i % 3}" for i in range(30)], "fill": ["solid"] * 30, "up_axis": ["y"] * 30}
    files = [f"f{i}.glb" for i in range(30)]
    if layout == "ply":
        root = ply_root(tmp_path / "ply", grids, file=files, mm_per_cell=["0.1", ""] * 15, note="n 1", **texts)
        extra = {"mm_per_cell": [0.1, None] * 15, "note": ["n 1"] * 30}
    elif layout == "packed":
        names = np.array([sha256(i) for i in range(30)])
        arrays = {name: np.array(values) for name, values in texts.items()}
        size = np.array(["0.1", ""] * 15)
        root = packed_root(tmp_path / "a.npz", grids, sha256=names, name=np.array(files), mm_per_cell=size, **arrays)
        extra = {"mm_per_cell": [0.1, None] * 15}
    else:
        extra = {"captions": [["a"], []] * 15, "aesthetic_score": [1.5, None] * 15}
        root = shard(tmp_path / "first.arrow", grids, name=files, **texts, **extra)
    data = opened(root)
    (tmp_path / "out").mkdir()
    everything = np.arange(30)
    bits = data.get_batch(everything)["bits"].numpy()
    write_shard(tmp_path / "out" / "a.arrow", bits, R, data.columns_of(everything))
    again = opened(tmp_path / "out")
    assert torch.equal(all_items(again), all_items(data)) and torch.equal(all_items(data)[:, 0], torch.tensor(grids))
    assert [e._replace(root="") for e in again.entries] == [e._replace(root="") for e in data.entries]
    assert again.settings[str(tmp_path / "out")] == data.settings[str(root)] or layout == "ply"
    found = again.columns_of(np.arange(30))
    assert {name: found[name] for name in extra} == extra and found["name"] == files
    assert found.keys() == {"sha256", "split", "name", *texts, *extra}


def test_shards_follow_each_other_by_name_and_mix_with_other_roots(tmp_path):
    grids = random_grids(40)
    shard(tmp_path / "s" / "b.arrow", grids[10:25], 10)
    shard(tmp_path / "s" / "a.arrow", grids[:10])
    (tmp_path / "s" / ".a.arrow.host.1.00000000.tmp").write_bytes(b"half")
    (tmp_path / "s" / ".hidden.arrow").write_bytes(b"half")
    names = np.array([sha256(number) for number in range(20, 40)])
    packed = packed_root(tmp_path / "c.npz", grids[20:], sha256=names)
    data = opened(f"{tmp_path / 's'},{packed}")
    assert data.texts("sha256") == [sha256(number) for number in range(40)]
    assert "5 removed as repeating an earlier root" in data.summary()
    assert torch.equal(all_items(data)[:, 0], torch.tensor(grids))
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(data.get_batch(order)["bits"].numpy(), pack_bits(grids[order]))
    assert data.find([sha256(number) for number in (39, 3, 100)]).tolist() == [39, 3, -1]
    assert torch.equal(data.get_instance(str(packed), sha256(30))["ss"], data[30]["ss"])
    with pytest.raises(KeyError):
        data.get_instance(str(packed), sha256(3))
    assert not data.in_memory and data.entries[-1].root == str(packed) and data.entries[3:5] == list(data.entries)[3:5]
    copied = pickle.loads(pickle.dumps(data))
    assert torch.equal(all_items(copied), all_items(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_batches_from_shards_as_from_a_packed_file(tmp_path, workers):
    grids = random_grids(23)
    names = np.array([sha256(number) for number in range(23)])
    packed = packed_root(tmp_path / "a.npz", grids, sha256=names)
    for number, part in enumerate(np.array_split(np.arange(23), 3)):
        shard(tmp_path / "s" / f"{number}.arrow", grids[part], int(part[0]))
    place = {"seed": 3, "start": 7, "device": torch.device("cpu"), "num_workers": workers, "prefetch": True}
    for one, other in itertools.islice(
        zip(*(endless_batches(opened(root, "train"), 5, **place) for root in (packed, tmp_path / "s")), strict=True), 9
    ):
        assert torch.equal(one["ss"], other["ss"]) and torch.equal(one["sample_ids"], other["sample_ids"])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
def test_shards_keep_no_file_open(tmp_path):
    grids = random_grids(50)
    for number in range(50):
        shard(tmp_path / f"{number:02d}.arrow", grids[number : number + 1], number, name=[f"{number}.glb"])
    before = len(os.listdir("/proc/self/fd"))
    data = opened(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    for path in tmp_path.iterdir():
        path.unlink()  # what is mapped stays
    assert torch.equal(all_items(data)[:, 0], torch.tensor(grids))
    assert [data.name(index) for index in range(50)] == [f"{number}.glb" for number in range(50)]


def test_an_object_in_two_shards_counts_once_if_its_grids_are_equal(tmp_path):
    grids = random_grids(8)
    shard(tmp_path / "a.arrow", grids[:5])
    shard(tmp_path / "b.arrow", grids[3:], 3)
    data = opened(tmp_path)
    assert data.texts("sha256") == [sha256(number) for number in range(8)]
    assert torch.equal(all_items(data)[:, 0], torch.tensor(grids))
    assert "10 listed" not in data.summary() and "2 in several files counted once; 8 kept" in data.summary()
    assert data.split_sizes() == opened(shard(tmp_path / "c" / "c.arrow", grids)).split_sizes()
    other = grids.copy()
    other[4] = ~other[4]
    shard(tmp_path / "b.arrow", other[3:], 3)
    with pytest.raises(DataError, match=f"b.arrow: has another grid of {sha256(4)} than .*a.arrow"):
        opened(tmp_path)


def test_names_that_share_their_first_bytes_are_told_apart(tmp_path):
    names = ["0" * 63 + digit for digit in "0123"]
    grids = random_grids(4)
    write_shard(tmp_path / "a.arrow", pack_bits(grids), R, {"sha256": names})
    packed = packed_root(tmp_path / "p" / "b.npz", random_grids(2, seed=1), sha256=np.array(["0" * 63 + "4", names[2]]))
    data = opened(f"{tmp_path / 'a.arrow'},{packed}")
    assert data.texts("sha256") == [*names, "0" * 63 + "4"]
    assert data.find([names[3], "0" * 63 + "5", names[0], "0" * 63 + "4"]).tolist() == [3, -1, 0, 4]
    write_shard(tmp_path / "twice.arrow", pack_bits(grids), R, {"sha256": [*names[:3], names[0]]})
    with pytest.raises(DataError, match=f"sha256 {names[0]} is listed twice"):
        opened(tmp_path / "twice.arrow")


def test_filters_settings_and_splits_work_as_for_other_roots(tmp_path):
    grids = random_grids(6)
    scores = [5, 4.5, 9, 1, 4.4, 6]
    shard(tmp_path / "a.arrow", grids[:3], aesthetic_score=scores[:3], up_axis=["y"] * 3)
    shard(tmp_path / "b.arrow", grids[3:], 3, aesthetic_score=scores[3:], up_axis=["z", "z", "y"])
    data = opened(tmp_path, min_aesthetic_score=4.5)
    assert data.texts("sha256") == [sha256(i) for i in (0, 1, 2, 5)]
    assert torch.equal(all_items(data)[:, 0], torch.tensor(grids[[0, 1, 2, 5]]))
    assert "6 listed; 2 removed by aesthetic_score >= 4.5; 4 kept" in data.summary()
    assert data.settings[str(tmp_path)]["up_axis"] == {"y"}
    assert settings_of_data([tmp_path], "up_axis").keys() == {"y", "z"}
    shard(tmp_path / "b.arrow", grids[3:], 3)
    with pytest.raises(DataError, match=f"aesthetic_score of {sha256(3)} is"):
        opened(tmp_path, min_aesthetic_score=4.5)
    named = shard(tmp_path / "n" / "x_val.arrow", grids)
    assert opened(named).split_sizes() == {"train": 0, "val": 6}
    by_hash = opened(tmp_path).texts("split")
    assert by_hash == ["val" if int(sha256(i)[:8], 16) / 2**32 < 0.05 else "train" for i in range(6)]


def test_the_content_key_and_the_facts_tell_shards_apart(tmp_path):
    grids = random_grids(40)
    root = shard(tmp_path / "a" / "a.arrow", grids).parent
    key, facts = opened(root).content_key(), facts_of(opened(root, "train"))
    assert key == opened(shard(tmp_path / "copy.arrow", grids)).content_key() != opened(root, "train").content_key()
    sums = Shard(root / "a.arrow").checksums
    lines = "".join(f"{sha256(number)} {sums[number]:08x}\n" for number in range(40))
    assert key["data"] == hashlib.sha256(lines.encode()).hexdigest()
    assert changes(facts, facts_of(opened(root, "train")), opened(root, "train")) == []
    trained = opened(root, "train").texts("sha256")
    changed = next(number for number in range(40) if sha256(number) in trained)
    grids[changed] = ~grids[changed]
    shard(root / "a.arrow", grids[:-1], name=[f"d/{number}.glb" for number in range(39)])
    shard(root / "b.arrow", random_grids(9, seed=1), 100)
    now = opened(root, "train")
    [line] = [line for line in changes(facts, facts_of(now), now) if line.startswith("training")]
    added = [sha256(n)[:10] for n in range(100, 109) if sha256(n) in now.texts("sha256")]
    assert f"{len(added)} added: {added[0]}…, {added[1]}…, {added[2]}… and others" in line
    assert f"1 replaced (another grid, or another time of its file): {sha256(changed)[:10]}… ({changed}.glb)" in line
    assert ("1 removed: " + sha256(39)[:10] in line) == (sha256(39) in trained)


def test_keys_of_other_roots_are_what_they_have_always_been(tmp_path):
    """Latent caches and token folders are claimed by them."""
    grids = random_grids(12)
    names = [sha256(number) for number in range(12)]
    packed = packed_root(tmp_path / "a.npz", grids, sha256=np.array(names))
    ply = ply_root(tmp_path / "ply", grids)
    stats = [os.stat(ply / "voxels" / f"{name}.ply") for name in names]
    versions = {
        packed: [f"{zlib.crc32(row.tobytes()):08x}" for row in pack_bits(grids)],
        ply: [f"{each.st_size} {each.st_mtime_ns}" for each in stats],
    }
    for root, expected in versions.items():
        lines = "".join(f"{name} {version}\n" for name, version in zip(names, expected, strict=True))
        data = hashlib.sha256(lines.encode()).hexdigest()
        key = {"dataset": "SparseStructure", "objects": 12, "data": data, "resolution": R}
        assert opened(root).content_key() == key
        marks = facts_of(opened(root, "train"))["objects"]
        for split, found in marks.items():
            part = opened(root, split)
            for index, mark in enumerate(found):
                version = expected[names.index(part.sha256(index))]
                hashed = hashlib.blake2b(version.encode(), digest_size=3).digest()
                assert bytes(mark.tolist()) == bytes.fromhex(part.sha256(index))[:5] + hashed


# --- errors ---


def wrong_type(path: Path) -> Path:
    batch = pa.ipc.open_file(str(shard(path / "a.arrow", random_grids(2)))).get_batch(0)
    batch = batch.set_column(3, "num_voxels", batch.column("num_voxels").cast("int64"))
    with pa.ipc.new_file(str(path / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    return path


def foreign(path: Path) -> Path:
    table = pa.table({"x": [1, 2]})
    with pa.ipc.new_file(str(path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return path


def two_resolutions(path: Path) -> Path:
    shard(path / "a.arrow", random_grids(2))
    write_shard(path / "b.arrow", np.full((1, 64), 255, np.uint8), 8, {"sha256": [sha256(9)]})
    return path


def with_packed(path: Path) -> Path:
    packed_root(path / "b.npz", random_grids(2))
    return shard(path / "a.arrow", random_grids(2)).parent


BAD = {
    "empty file": (lambda path: _bytes(path, b""), "a.arrow: is not a readable shard of grids .it is empty"),
    "garbage": (lambda path: _bytes(path, b"x" * 5000), "a.arrow: is not a readable shard .*all its rows are lost"),
    "foreign": (foreign, "a.arrow: is not a readable shard .*sum of its schema"),
    "wrong type": (wrong_type, "a.arrow: is not a readable shard .*schema is damaged"),
    "folder": (lambda path: (path / "a.arrow").mkdir() or path, "a.arrow: is a folder"),
    "two resolutions": (two_resolutions, "b.arrow: has grids of resolution 8, but those of .*a.arrow have 4"),
    "two layouts": (with_packed, "has both b.npz and a.arrow"),
    "bad split": (
        lambda path: shard(path / "a.arrow", random_grids(3), split=["train", "", "test"]),
        f"split of {sha256(2)} is 'test'; it must be train, val or blank",
    ),
    "no hash": (lambda path: _named(path, [sha256(0), "../../secret"]), "sha256 '../../secret' is not 64"),
    "upper case": (lambda path: _named(path, [sha256(0), "A" * 64]), "sha256 'AAA.* is not 64"),
    "blank": (lambda path: _named(path, [None, sha256(0)]), "sha256 None is not 64"),
}


def _bytes(path: Path, content: bytes) -> Path:
    (path / "a.arrow").write_bytes(content)
    return path


def _named(path: Path, names: list) -> Path:
    write_shard(path / "a.arrow", pack_bits(random_grids(2)), R, {"sha256": names})
    return path


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_a_bad_root_is_one_error_naming_file_and_value(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as error:
        opened(make(tmp_path))
    assert "\n" not in str(error.value)


def test_another_resolution_than_is_asked_for_is_an_error(tmp_path):
    shard(tmp_path / "a.arrow", random_grids(2))
    with pytest.raises(DataError, match="grids have resolution 4, but resolution is 64.*dataset.args.resolution"):
        SparseStructure(str(tmp_path), resolution=64)


def test_empty_grids_and_other_lengths_are_not_written(tmp_path):
    bits = pack_bits(random_grids(3))
    bits[1] = 0
    names = {"sha256": [sha256(number) for number in range(3)]}
    with pytest.raises(DataError, match=f"a.arrow: the grid of {sha256(1)} has no occupied voxel"):
        write_shard(tmp_path / "a.arrow", bits, R, names)
    bits[1] = 1
    for wrong in ((bits[:2], R, names), (bits, R + 2, names), (bits[:0], R, {"sha256": []})):
        with pytest.raises(ValueError):
            write_shard(tmp_path / "a.arrow", *wrong)
    assert not list(tmp_path.iterdir())


def test_a_row_that_says_other_than_its_grid_is_named(tmp_path, monkeypatch):
    """Sums that fit, around a grid of another size or count: what another program may have written."""
    from trellis.datasets import shards

    bits = pack_bits(random_grids(3))
    names = {"sha256": [sha256(number) for number in range(3)]}
    monkeypatch.setattr(shards, "count_voxels", lambda row: 7)
    write_shard(tmp_path / "count.arrow", bits, R, names)
    monkeypatch.undo()
    with pytest.raises(DataError, match=f"row 0, {sha256(0)}, is damaged .it has .* voxels, and num_voxels is 7"):
        opened(tmp_path / "count.arrow")[0]
    write_shard(tmp_path / "right.arrow", bits, R, names)
    content = bytearray((tmp_path / "right.arrow").read_bytes())
    half = pa.compress(bytes(bits[0][:4]), codec="zstd", asbytes=True)
    frame = Shard(tmp_path / "right.arrow")
    start = content.index(bytes(frame._grids[frame._starts[0] : frame._starts[1]]))
    assert len(half) <= frame._starts[1] - frame._starts[0]
    content[start : start + len(half)] = half
    (tmp_path / "short.arrow").write_bytes(content)
    damaged = Shard(tmp_path / "short.arrow")
    damaged.checksums = frame.checksums.copy()
    damaged.checksums[0] = zlib.crc32(damaged._grids[damaged._starts[0] : damaged._starts[1]])
    with pytest.raises(DataError, match=f"row 0, {sha256(0)}, is damaged .it does not give 8 bytes"):
        damaged.bits(0)


# Flips bits all over a shard in a process of its own, since a reader may crash, and prints each that passes unseen.
FLIPS = """
import json, sys
from pathlib import Path
from random import Random
import numpy as np
from trellis.datasets.sparse_structure import SparseStructure
from trellis.utils.errors import DataError

path, R, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
whole = path.read_bytes()
def read(path):
    data = SparseStructure(str(path), resolution=R, split="all")
    everything = np.arange(len(data))
    return data.get_batch(everything)["bits"].numpy().tobytes(), repr(data.columns_of(everything)), repr(data.settings)
good = read(path)
head, tail = 3000, len(whole) - 3000  # the schema and the batch's lengths; the footer
rng, found = Random(0), {"error": 0, "same": 0, "wrong": []}
for trial in range(trials):
    place = rng.choice((rng.randrange(head), rng.randrange(tail, len(whole)), rng.randrange(len(whole))))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << rng.randrange(8)
    if trial % 10 == 0:
        damaged = damaged[: rng.randrange(len(damaged))]
    other = path.with_name("damaged.arrow")
    other.write_bytes(damaged)
    try:
        same = read(other)[:2] == good[:2]
        found["same" if same else "wrong"] = found["same"] + 1 if same else found["wrong"] + [place]
    except DataError as error:
        assert "damaged.arrow" in str(error) and chr(10) not in str(error), str(error)
        found["error"] += 1
    other.unlink()
print(json.dumps(found))
"""


def test_no_flipped_bit_and_no_cut_gives_another_grid_or_ends_the_process(tmp_path):
    columns = {name: values * 10 for name, values in FULL.items()}
    path = shard(tmp_path / "a.arrow", random_grids(30), **columns)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, path, str(R), "1000"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and found["error"] > 700  # the rest was between the columns, where nothing is


def test_a_damaged_grid_costs_its_row_alone(tmp_path):
    grids = random_grids(9)
    path = shard(tmp_path / "a.arrow", grids)
    content = bytearray(path.read_bytes())
    frame = Shard(path)
    place = content.index(bytes(frame._grids[frame._starts[4] : frame._starts[5]]))
    content[place + 9] ^= 4
    path.write_bytes(content)
    data = opened(path)
    with pytest.raises(DataError, match=f"a.arrow: the grid of row 4, {sha256(4)}, is damaged .*: 1 of 9 rows is lost"):
        data.get_batch(np.arange(9))
    others = np.delete(np.arange(9), 4)
    assert np.array_equal(data.get_batch(others)["bits"].numpy(), pack_bits(grids[others]))


def test_a_damaged_column_names_the_rows_lost(tmp_path):
    path = shard(tmp_path / "a.arrow", random_grids(9), name=[f"mesh {number}.glb" for number in range(9)])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"mesh 5.glb", b"mesh 6.glb"))
    data = opened(path)  # names are first read when they are asked for
    with pytest.raises(DataError, match=f"column name is damaged .*: 9 rows are lost, from {sha256(0)} on"):
        data.name(0)


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    shard(tmp_path / "a.arrow", random_grids(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        opened(tmp_path)
