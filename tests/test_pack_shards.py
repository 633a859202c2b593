"""Packing into shards: nothing of the grids or of metadata.csv is lost, whoever else writes, and whatever stops it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

pytest.importorskip("pyarrow")

from dataset_toolkits import pack as program  # noqa: E402
from dataset_toolkits import records, shard_files  # noqa: E402
from dataset_toolkits.pack import pack, pack_shards, unpack  # noqa: E402
from trellis.datasets.packed import load_packed, save_packed  # noqa: E402
from trellis.datasets.shards import Shard, write_shard  # noqa: E402
from trellis.datasets.sparse_structure import SparseStructure  # noqa: E402
from trellis.grids.voxels import pack_bits, unpack_bits, voxel_centers, write_ply  # noqa: E402
from trellis.utils.command import error_of_system  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402
from trellis.utils.files import atomic_write  # noqa: E402

R = 8
SHA256 = ["%064x" % (number * 0x9E3779B97F4A7C15**4 % 2**256) for number in range(1, 14)]
BITS = pack_bits(np.random.default_rng(0).random((13, R, R, R)) < 0.2)


def write_root(root: Path, first: int = 0, last: int = 13, **columns: list) -> Path:
    """Write a folder of voxel files of some of the objects, with the columns of voxelize.py and others."""
    (root / "voxels").mkdir(parents=True)
    rows = []
    for i in range(first, last):
        points = voxel_centers(np.argwhere(unpack_bits(BITS[i : i + 1], R)[0].numpy()), R)
        write_ply(root / "voxels" / f"{SHA256[i]}.ply", points)
        row = {"sha256": SHA256[i], "file": f"größe/椅子, {i}.stl" if i % 3 else "", "source": "lab" if i % 2 else ""}
        row |= {"split": ("train", "val")[i % 2], "voxelized": "True", "num_voxels": str(len(points))}
        row |= {name: values[i - first] for name, values in columns.items()}
        rows.append(row)
    records.write_table(root / "metadata.csv", rows[0], rows)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of 13 objects with every column of a shard and one of the user's own."""
    return write_root(
        tmp_path / "root",
        kind=["", "bones"] * 6 + [""],
        up_axis=["y"] * 13,
        normalization=["cube"] * 13,
        fill=["", "solid"] * 6 + [""],
        mm_per_cell=["0.1", ""] * 6 + ["2"],
        frame=["", '{"center":[1,0,0]}'] * 6 + [""],
        captions=['["a chair", "a \\"thin\\" thing, 椅子"]', "", "[a bracket"] * 4 + [""],
        aesthetic_score=["6.5", "7", ""] * 4 + ["-1.25"],
        licence=["CC0", "", "007"] * 4 + ["NA"],
    )


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in shards(folder)]


def rows(folder: Path) -> list[dict]:
    """What all shards say, with the grids, in their order."""
    return [
        {**row, "grid": shard.bits(i).tobytes()}
        for shard in map(Shard, shards(folder))
        for i, row in enumerate(shard.batch.to_pylist())
    ]


def grids(folder: Path) -> dict[str, bytes]:
    """The grids as training sees them, by sha256."""
    dataset = SparseStructure(str(folder), resolution=R, split="all")
    bits = dataset.get_batch(np.arange(len(dataset)))["bits"].numpy()
    return {dataset.sha256(i): bits[i].tobytes() for i in range(len(dataset))}


EXPECTED = {sha256: bits.tobytes() for sha256, bits in zip(SHA256, BITS, strict=True)}


def test_shards_keep_the_grids_and_every_column(root, tmp_path):
    assert pack_shards(str(root), tmp_path / "packed", R, shard_size=5) == 13
    found = rows(tmp_path / "packed")
    table = pd.read_csv(root / "metadata.csv", dtype=str, keep_default_na=False)
    assert [row["sha256"] for row in found] == SHA256
    assert [len(Shard(path)) for path in shards(tmp_path / "packed")] == [5, 5, 3]
    captions = {"": None, "[a bracket": ["[a bracket"]}
    for row, written in zip(found, table.to_dict("records"), strict=True):
        assert row["grid"] == EXPECTED[row["sha256"]] and row["num_voxels"] == int(written["num_voxels"])
        assert (row["name"] or "") == written["file"]
        for name in ("source", "split", "kind", "up_axis", "normalization", "fill", "frame", "licence"):
            assert (row[name] or "") == written[name], name
        for name in ("mm_per_cell", "aesthetic_score"):
            assert row[name] == (float(written[name]) if written[name] else None), name
        text = written["captions"]
        assert row["captions"] == (captions[text] if text in captions else json.loads(text))
    expected = {*table.columns, "name", "grid", "checksum"} - {"file", "voxelized"}
    assert found[0].keys() == found[-1].keys() == expected


def test_there_and_back_is_the_identity(root, tmp_path):
    """Shards to voxel files and to shards, the same bytes; from one shard and from a folder of them."""
    pack_shards(str(root), tmp_path / "packed", R, shard_size=5)
    assert unpack(tmp_path / "packed", tmp_path / "again") == 13
    for path in (root / "voxels").iterdir():
        assert (tmp_path / "again" / "voxels" / path.name).read_bytes() == path.read_bytes()
    pack_shards(str(tmp_path / "again"), tmp_path / "packed again", R, shard_size=5)
    assert contents(tmp_path / "packed again") == contents(tmp_path / "packed")
    first = shards(tmp_path / "packed")[0]
    assert unpack(first, tmp_path / "first") == 5
    before, after = (
        pd.read_csv(tmp_path / name / "metadata.csv", dtype=str, keep_default_na=False) for name in ("again", "first")
    )
    assert after.equals(before[:5][after.columns]) and not before[:5][before.columns.difference(after.columns)].any(
        axis=None
    )


def test_every_column_of_names_is_kept(tmp_path):
    """One of them is what objects are called; the others are columns as any other, there and back."""
    addresses = [f"https://example.org/{i}" for i in range(13)]
    write_root(tmp_path / "root", file_identifier=addresses)
    assert pack_shards(str(tmp_path / "root"), tmp_path / "packed", R) == 13
    found = rows(tmp_path / "packed")
    assert [row["file_identifier"] for row in found] == addresses
    assert [row["name"] for row in found] == [f"größe/椅子, {i}.stl" if i % 3 else None for i in range(13)]
    unpack(tmp_path / "packed", tmp_path / "again")
    first, second = (pd.read_csv(tmp_path / name / "metadata.csv", dtype=str) for name in ("root", "again"))
    pd.testing.assert_frame_equal(first, second[first.columns])
    alone = pd.read_csv(tmp_path / "root" / "metadata.csv", dtype=str).drop(columns="file")
    alone.to_csv(tmp_path / "root" / "metadata.csv", index=False)
    pack_shards(str(tmp_path / "root"), tmp_path / "alone", R)
    assert [row["name"] for row in rows(tmp_path / "alone")] == addresses
    assert "file_identifier" not in rows(tmp_path / "alone")[0]


@pytest.mark.parametrize("name", ["grid", "checksum"])
def test_a_column_of_a_name_that_shards_use_is_refused(name, tmp_path):
    write_root(tmp_path / "root", **{name: ["mine"] * 13})
    with pytest.raises(DataError, match=f"metadata.csv: has a column {name}, a name that shards use"):
        pack_shards(str(tmp_path / "root"), tmp_path / "packed", R)
    assert not (tmp_path / "packed").exists()
    with pytest.raises(DataError, match=f"row 1: has a column {name}, a name that shards use"):
        shard_files.columns_of_row("row 1", {"sha256": SHA256[0], name: "mine"})


def test_a_caption_beside_captions_is_a_column_of_its_own():
    row = {"caption": "one", "captions": '["two"]'}
    assert shard_files.columns_of_row("row 1", row) == {"caption": "one", "captions": ["two"]}
    assert shard_files.columns_of_row("row 1", {"caption": "one"}) == {"captions": ["one"]}


def test_npz_to_shards_and_back_is_the_identity(tmp_path):
    texts = {
        "sha256": np.array(SHA256),
        "name": np.array([f"{i}.glb" for i in range(13)]),
        "source": np.array(["lab", ""] * 6 + ["shop"]),
        "split": np.array(["train", "val"] * 6 + ["val"]),
        "mm_per_cell": np.array(["0.7", ""] * 6 + ["12"]),
        "up_axis": np.array(["z"] * 13),
    }
    save_packed(tmp_path / "a.npz", BITS, texts)
    assert pack_shards(str(tmp_path / "a.npz"), tmp_path / "packed", R, shard_size=4) == 13
    assert grids(tmp_path / "packed") == EXPECTED
    assert pack(str(tmp_path / "packed"), tmp_path / "b.npz", R) == 13
    before, after = load_packed(tmp_path / "a.npz"), load_packed(tmp_path / "b.npz")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_several_roots_of_all_kinds_become_one(root, tmp_path):
    write_root(tmp_path / "ply", 0, 4)
    save_packed(tmp_path / "a.npz", BITS[4:8], {"sha256": np.array(SHA256[4:8])})
    pack_shards(str(write_root(tmp_path / "rest", 8, 13)), tmp_path / "shards", R)
    roots = ",".join(str(tmp_path / name) for name in ("ply", "a.npz", "shards"))
    assert pack_shards(roots, tmp_path / "all", R, shard_size=6) == 13
    assert [row["sha256"] for row in rows(tmp_path / "all")] == SHA256 and grids(tmp_path / "all") == EXPECTED


def test_a_rerun_writes_only_missing_shards_and_ranks_make_what_one_makes(root, tmp_path):
    pack_shards(str(root), tmp_path / "one", R, shard_size=3)
    before = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "one")}
    expected = contents(tmp_path / "one")
    assert len(before) == 5 and pack_shards(str(root), tmp_path / "one", R, shard_size=3) == 0
    gone = shards(tmp_path / "one")[1]
    gone.unlink()
    assert pack_shards(str(root), tmp_path / "one", R, shard_size=3) == 3
    after = {path.name: path.stat().st_mtime_ns for path in shards(tmp_path / "one")}
    assert contents(tmp_path / "one") == expected and {n: t for n, t in after.items() if before[n] != t}.keys() == {
        gone.name
    }
    counts = [pack_shards(str(root), tmp_path / "ranks", R, 3, rank=rank, world_size=3) for rank in (2, 0, 1)]
    assert counts == [3, 6, 4]
    assert [p.name for p in shards(tmp_path / "ranks")] == list(before) and contents(tmp_path / "ranks") == expected


def test_a_folder_of_other_data_or_settings_is_refused(root, tmp_path):
    packed = tmp_path / "packed"
    pack_shards(str(root), packed, R, shard_size=5)
    before = contents(packed)

    def refused(*args: object, **kwargs: object) -> None:
        with pytest.raises(
            DataError, match=r"packed: holds shards of other data, .*such as .*, or --append to add the"
        ):
            pack_shards(*args, **kwargs)
        assert contents(packed) == before

    refused(str(root), packed, R, shard_size=6)
    refused(str(write_root(tmp_path / "part", 0, 5)), packed, R, shard_size=5)
    text = (root / "metadata.csv").read_text(encoding="utf-8")
    (root / "metadata.csv").write_text(text.replace("007", "008"), encoding="utf-8")
    refused(str(root), packed, R, shard_size=5)
    (root / "metadata.csv").write_text(text, encoding="utf-8")
    assert pack_shards(str(root), packed, R, shard_size=5) == 0
    for output, message in (
        (root, "has metadata.csv or .npz files, so shards cannot go there"),
        (tmp_path / "a.arrow", "--output is a folder of shards, or one file that ends in .npz"),
    ):
        with pytest.raises(DataError, match=message):
            pack_shards(str(root), output, R)
    with pytest.raises(DataError, match="--resolution 5: .*even"):
        pack_shards(str(root), tmp_path / "odd", 5)
    assert not (tmp_path / "odd").exists() and not (tmp_path / "a.arrow").exists()


def test_append_adds_what_is_lacking_after_what_is_there(root, tmp_path):
    packed = tmp_path / "packed"
    assert pack_shards(str(write_root(tmp_path / "part", 3, 8)), packed, R, append=True) == 5
    before = contents(packed)
    assert pack_shards(str(root), packed, R, shard_size=3, append=True) == 8
    assert contents(packed)[:1] == before and grids(packed) == EXPECTED
    assert [row["sha256"] for row in rows(packed)] == SHA256[3:8] + SHA256[:3] + SHA256[8:]
    assert pack_shards(str(root), packed, R, append=True) == 0
    shards(packed)[2].unlink()
    assert pack_shards(str(root), packed, R, append=True) == 3 and grids(packed) == EXPECTED

    again = tmp_path / "again"
    for rank in (1, 0, 2):
        pack_shards(str(root), again, R, 2, rank=rank, world_size=3, append=True)
    assert grids(again) == EXPECTED and len(rows(again)) == 13


def test_append_refuses_grids_of_another_kind(root, tmp_path):
    packed = tmp_path / "packed"
    pack_shards(str(write_root(tmp_path / "part", 0, 5, normalization=["shapellm"] * 5)), packed, R)
    before = contents(packed)
    with pytest.raises(DataError, match="normalization"):
        pack_shards(str(root), packed, R, append=True)
    with pytest.raises(DataError, match="resolution"):
        save_packed(tmp_path / "a.npz", pack_bits(np.ones((1, 4, 4, 4))), {})
        pack_shards(str(tmp_path / "a.npz"), packed, 4, append=True)
    assert contents(packed) == before


@pytest.mark.parametrize("same", [False, True])
def test_two_appends_at_once_lose_nothing(same, root, tmp_path, monkeypatch):
    """The second begins and ends while the first writes. What both write is taken once, also of the same data."""
    part = root if same else write_root(tmp_path / "part", 3, 10)
    packed = tmp_path / "packed"
    counts = []

    def between(path, *args):
        monkeypatch.setattr(shard_files, "write_shard", write_shard)
        counts.append(pack_shards(str(part), packed, R, 2, append=True))
        write_shard(path, *args)

    monkeypatch.setattr(shard_files, "write_shard", between)
    assert pack_shards(str(root), packed, R, 2, append=True) == 13 and counts == [13 if same else 7]
    assert grids(packed) == EXPECTED and not list(packed.glob(".*"))
    assert len(rows(packed)) == (13 if same else 20)


def test_workers_make_what_one_process_makes(root, tmp_path):
    pack_shards(str(root), tmp_path / "one", R, shard_size=3)
    assert pack_shards(str(root), tmp_path / "two", R, shard_size=3, max_workers=2) == 13
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    damaged = root / "voxels" / f"{SHA256[7]}.ply"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=damaged.name):
        pack_shards(str(root), tmp_path / "three", R, shard_size=1, max_workers=2)
    assert not list((tmp_path / "three").glob(".*")) and not multiprocessing.active_children()


# Workers that take a second for a shard.
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
from dataset_toolkits import pack, shard_files
real = shard_files.write_shard
def slow(*args):
    time.sleep(1)
    real(*args)
shard_files.write_shard = slow
if __name__ == "__main__":
    sys.exit(pack.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are looked up in /proc")
@pytest.mark.parametrize("what", ["group", "kill", "worker"])
def test_a_stop_leaves_whole_shards_and_no_process(what, root, tmp_path):
    """A signal to the whole group, as schedulers send it; kill -9; and a worker that runs out of memory."""
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    command = [sys.executable, "slow.py", "--input", "root", "--output", "packed", "--shard_size", "1"]
    command += ["--resolution", str(R), "--max_workers", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not shards(tmp_path / "packed") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = [
        int(pid)
        for path in Path(f"/proc/{process.pid}/task").glob("*/children")
        for pid in path.read_text().split()
        if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(workers) == 2
    if what == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(workers[0] if what == "worker" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    if what == "group":
        assert process.returncode == 128 + signal.SIGTERM and errors.splitlines()[-1] == program.INTERRUPTED
    if what == "worker":
        assert process.returncode == 1 and "error: a process that packs grids was killed, perhaps for" in errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/stat").exists()]
    done = len(rows(tmp_path / "packed"))  # each of them whole
    assert 1 <= done < 13
    assert pack_shards(str(root), tmp_path / "packed", R, shard_size=1) == 13 - done
    assert grids(tmp_path / "packed") == EXPECTED and not list((tmp_path / "packed").glob(".*"))


def test_a_full_disk_leaves_whole_shards(root, tmp_path, monkeypatch):
    calls = []

    def fill(path, *args):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(path))
        write_shard(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "write_shard", fill)
        with pytest.raises(OSError, match="No space"):
            pack_shards(str(root), tmp_path / "packed", R, shard_size=3)
    assert len(rows(tmp_path / "packed")) == 6
    assert pack_shards(str(root), tmp_path / "packed", R, shard_size=3) == 7 and grids(tmp_path / "packed") == EXPECTED


def test_a_full_disk_is_told_in_the_words_of_the_system(tmp_path):
    """pyarrow has others: "Error writing bytes to file. Detail: [errno 28] No space left on device"."""
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.arrow"):
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    assert error_of_system(caught.value) == f"{tmp_path}/a.arrow: {os.strerror(28)}"
    assert not list(tmp_path.iterdir())


def test_grids_are_read_a_shard_at_a_time(root, tmp_path, monkeypatch):
    """Memory does not grow with the number of objects."""
    pack_shards(str(root), tmp_path / "packed", R, shard_size=5)
    monkeypatch.setattr(shard_files, "CHUNK", 2)
    sizes, real = [], SparseStructure.get_batch

    def spy(self, indices):
        sizes.append(len(indices))
        return real(self, indices)

    def write(path, bits, *args):
        assert sum(sizes) <= len(bits)
        sizes.clear()
        write_shard(path, bits, *args)

    monkeypatch.setattr(SparseStructure, "get_batch", spy)
    monkeypatch.setattr(shard_files, "write_shard", write)
    assert pack_shards(str(tmp_path / "packed"), tmp_path / "again", R, shard_size=4) == 13
    assert grids(tmp_path / "again") == EXPECTED


def test_missing_pyarrow_is_one_error(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        pack_shards(str(root), tmp_path / "packed", R)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--output", "a.npz", "--append"), "go with a folder of shards"),
        (("--output", "a.npz", "--shard_size", "3"), "go with a folder of shards"),
        (("--output", "s3://bucket/packed"), "s3://bucket/packed is a URL: write to a folder of this machine"),
        (("--output", "packed", "--shard_size", "0"), "--shard_size 0: must be at least 1"),
        (("--output", "packed", "--max_workers", "0"), "--max_workers 0: must lie between"),
        (("--output", "packed", "--rank", "2", "--world_size", "2"), "--rank 2 --world_size 2: ranks count from 0"),
    ],
)
def test_flags_that_cannot_run_are_one_error(flags, message, root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert program.main(["--input", "root", "--resolution", str(R), *flags]) == 1
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "packed").exists()
