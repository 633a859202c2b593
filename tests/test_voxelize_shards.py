"""voxelize.py --format shards: the grids of --format ply, none lost or made twice, whatever stops it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import BROKEN, ROOT, table, tetrahedron

pytest.importorskip("numba")
pytest.importorskip("pyarrow")

from dataset_toolkits import build_metadata, records, shard_files, voxelize  # noqa: E402
from dataset_toolkits.shapes.make_shapes import make_shape, write_shape  # noqa: E402
from trellis.datasets.shards import Shard, write_shard  # noqa: E402
from trellis.datasets.sparse_structure import SparseStructure  # noqa: E402
from trellis.grids.voxels import pack_bits, points_to_voxels, read_ply, voxels_to_grid  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402
from trellis.utils.signals import Stopped  # noqa: E402

R = 16


@pytest.fixture
def serial(monkeypatch):
    """Voxelize in this process, with 5 grids a shard; returns the paths that were worked on."""
    worked = []

    def run(function, tasks, finish, max_workers, timeout, memory):
        for task in tasks:
            worked.append(task[0])
            try:
                result = function(*task)
            except DataError as error:
                result = error
            finish(task, result)

    monkeypatch.setattr(voxelize, "run_in_pool", run)
    monkeypatch.setattr(shard_files, "BITS_PER_SHARD", 5 * R**3)
    return worked


def run(*args: object, form: str = "shards") -> int:
    flags = ("--resolution", R, "--max_workers", 1, "--format", form)
    return voxelize.main([str(arg) for arg in (*args, *flags)])


def export(folder: Path, count: int) -> dict[str, Path]:
    """Write different tetrahedra; returns {sha256: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        tetrahedron(1 + i / 4).export(folder / f"{i:02d}.off")
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.off"))}


def shards(root: Path) -> list[Shard]:
    return [Shard(path) for path in sorted(root.glob("*.arrow"))]


def rows(root: Path) -> list[dict]:
    """What all shards say, with the grids, in their order."""
    return [
        {**row, "grid": shard.bits(i).tobytes()}
        for shard in shards(root)
        for i, row in enumerate(shard.batch.to_pylist())
    ]


def by_sha256(root: Path) -> dict[str, dict]:
    found = rows(root)
    named = {row["sha256"]: row for row in found}
    assert len(named) == len(found)  # no object is there twice
    return named


def grids_of_ply(root: Path) -> dict[str, bytes]:
    def bits(path: Path) -> bytes:
        return pack_bits(voxels_to_grid(points_to_voxels(read_ply(path), R), R)[None])[0].tobytes()

    return {path.stem: bits(path) for path in (root / "voxels").glob("*.ply")}


def write_scan(path: Path, spacing: float = 1.5) -> None:
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((24, 20, 16), np.uint8)
    labels[2:10, 4:12, 3:9] = 1
    labels[14:20, 4:12, 3:9] = 2
    labels[12, 0, :3] = 5
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([spacing, spacing, 2 * spacing, 1])), path)


def test_shards_hold_the_grids_and_facts_of_voxel_files(tmp_path, serial, monkeypatch):
    """Of shapes, a mesh that says its axis, and organs; solid ones too."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(12):
        write_shape(make_shape(0, "train", i), Path("in", f"{i}.obj"))
    tetrahedron(3).export("in/chair, old.glb")
    write_scan(Path("in/case.nii.gz"))
    (Path("in") / "bad.obj").write_bytes(BROKEN["points.obj"][0])
    Path("labels.json").write_text('{"liver": 1, "kidney": 2, "small": 5}')
    args = "--input", "in", "--labels", "labels.json", "--fill", "solid", "--split", "val", "--output_dir"
    assert run(*args, "ply", form="ply") == run(*args, "packed") == 0
    packed, tables = by_sha256(Path("packed")), {row["sha256"]: row for row in table(Path("ply/metadata.csv"))}
    assert {sha256: row["grid"] for sha256, row in packed.items()} == grids_of_ply(Path("ply")) and len(packed) == 15
    for sha256, row in packed.items():
        written = tables[sha256]
        for mine, theirs in (
            ("name", "file"),
            *((name, name) for name in ("split", "up_axis", "normalization", "axis")),
        ):
            assert row[mine] == written[theirs], mine
        for name in ("notes", "fill", "frame"):
            assert (row[name] or "") == written[name], name
        assert row["num_voxels"] == int(written["num_voxels"])
        assert row["mm_per_cell"] == (float(written["mm_per_cell"]) if written["mm_per_cell"] else None)
    assert Path("packed/failed.csv").read_bytes() == Path("ply/failed.csv").read_bytes()
    assert [len(shard) for shard in shards(Path("packed"))] == [5, 5, 5]
    assert sorted(path.name for path in Path("packed").iterdir() if path.suffix != ".arrow") == [
        "failed.csv",
        "records",
    ]


def test_a_rerun_makes_what_is_missing_and_an_addition_comes_after_it(tmp_path, serial, capsys):
    shas = export(tmp_path / "in", 12)
    out = tmp_path / "out"
    args = "--input", tmp_path / "in", "--output_dir", out
    assert run(*args) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.arrow")}
    serial.clear()
    assert run(*args) == 0 and not serial
    assert ": 12 meshes: 0 new, 12 done already, " in capsys.readouterr().out
    gone = sorted(before)[1]
    (out / gone).unlink()
    assert run(*args) == 0 and serial == list(shas.values())[5:10]
    assert by_sha256(out).keys() == shas.keys()
    tetrahedron(99).export(tmp_path / "in" / "00_first.off")
    assert run(*args) == 0 and len(serial) == 6
    assert rows(out)[-1]["name"].endswith("00_first.off") and len(by_sha256(out)) == 13
    for name in before.keys() - {gone}:
        assert (out / name).read_bytes() == before[name]

    shutil.rmtree(out / "records")  # the shards say what is done
    serial.clear()
    assert run(*args) == 0 and not serial
    assert build_metadata.main(["--output_dir", str(out)]) == 0
    assert "13 objects, 13 voxelized" in capsys.readouterr().out and not (out / "metadata.csv").exists()


@pytest.mark.parametrize("at_once", [False, True])
def test_ranks_share_a_folder_in_any_order(at_once, tmp_path, serial, monkeypatch):
    export(tmp_path / "in", 9)
    shutil.copy(tmp_path / "in" / "01.off", tmp_path / "in" / "00_same_as_01.off")  # on the other rank
    (tmp_path / "in" / "bad.obj").write_bytes(BROKEN["points.obj"][0])
    args = "--input", tmp_path / "in", "--output_dir"
    assert run(*args, tmp_path / "one") == 0

    def other_rank() -> None:
        assert run(*args, tmp_path / "two", "--rank", 1, "--world_size", 2) == 0

    def between(*args: object) -> None:
        monkeypatch.setattr(shard_files, "write_shard", write_shard)
        other_rank()
        write_shard(*args)

    if at_once:
        monkeypatch.setattr(shard_files, "write_shard", between)
    else:
        other_rank()
    assert run(*args, tmp_path / "two", "--rank", 0, "--world_size", 2) == 0
    grids = [{row["sha256"]: row["grid"] for row in rows(tmp_path / name)} for name in ("one", "two")]
    assert grids[0] == grids[1] and len(grids[0]) == 9
    assert (tmp_path / "one" / "failed.csv").read_bytes() == (tmp_path / "two" / "failed.csv").read_bytes()
    assert len(rows(tmp_path / "two")) == (10 if at_once else 9)  # both made one of them
    dataset = SparseStructure(str(tmp_path / "two"), resolution=R, split="all")  # which counts once
    bits = dataset.get_batch(np.arange(len(dataset)))["bits"].numpy()
    assert {dataset.sha256(i): bits[i].tobytes() for i in range(len(dataset))} == grids[0] and len(dataset) == 9


@pytest.mark.parametrize("where", ["shard", "record", "table"])
def test_a_full_disk_is_one_error_and_a_rerun_goes_on(where, tmp_path, serial, capsys, monkeypatch):
    shas = export(tmp_path / "in", 12)
    (tmp_path / "in" / "bad.obj").write_bytes(BROKEN["points.obj"][0])
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    with monkeypatch.context() as patch:
        calls = []

        def fill(real, last):
            def write(*args, **kwargs):
                calls.append(1)
                if len(calls) > last:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            return write

        if where == "shard":
            patch.setattr(shard_files, "write_shard", fill(shard_files.write_shard, 1))
        elif where == "record":
            patch.setattr(records.RecordFile, "_append", fill(records.RecordFile._append, 1))
        else:
            patch.setattr(records, "write_table", fill(records.write_table, 0))
        assert run(*args) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "No space left on device. Mend that and run the same command again" in error[0]
    done = len(by_sha256(tmp_path / "out"))
    assert done >= 5
    serial.clear()
    assert run(*args) == 0 and len(serial) == 12 - done + 1
    assert by_sha256(tmp_path / "out").keys() == shas.keys()
    assert len(table(tmp_path / "out" / "failed.csv")) == 1 and not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize("moment", ["voxelizing", "writing", "writing the last"])
def test_a_signal_loses_nothing(moment, tmp_path, serial, monkeypatch, capsys):
    """Also one that comes while a shard is written, which waits until the shard is recorded."""
    shas = export(tmp_path / "in", 12)
    (tmp_path / "in" / "00_bad.obj").write_bytes(BROKEN["points.obj"][0])
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    module, name = (voxelize, "make_grids") if moment == "voxelizing" else (shard_files, "write_shard")
    real = getattr(module, name)
    calls = []
    last, done, left = {"voxelizing": (8, 6, 6), "writing": (1, 5, 7), "writing the last": (3, 12, 0)}[moment]

    def signaled(*args, **kwargs):
        calls.append(1)
        try:
            return real(*args, **kwargs)
        finally:
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signaled)
        assert run(*args) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == voxelize.INTERRUPTED
    assert len(table(tmp_path / "out" / "failed.csv")) == 1
    assert len(by_sha256(tmp_path / "out")) == done
    serial.clear()
    assert run(*args) == 0 and len(serial) == left + 1  # what failed is tried again
    assert by_sha256(tmp_path / "out").keys() == shas.keys()


# The program without Numba, whose import takes a worker seconds: the voxels are those of the corners. 5 grids a shard.
FAST = """
import sys
sys.path.insert(0, {root!r})
from dataset_toolkits import shard_files, voxelize
from trellis.grids import mesh_pool, meshes
mesh_pool.start_worker = lambda: None
meshes.voxelize_mesh = lambda vertices, faces, resolution: meshes.voxelize_points(vertices, resolution)
shard_files.BITS_PER_SHARD = 5 * {resolution}**3
if __name__ == "__main__":
    sys.exit(voxelize.main(sys.argv[1:]))
"""


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "fast.py", "--input", "in", "--output_dir", "out", "--resolution", str(R)]
    return subprocess.Popen(
        [*command, "--max_workers", "1", "--format", "shards", *flags],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_again_and_again_and_two_at_once(tmp_path):
    """What was in a shard when it was killed is not made again. Two at once may both make a grid, the same one."""
    (tmp_path / "fast.py").write_text(FAST.format(root=str(ROOT), resolution=R))
    shas = export(tmp_path / "in", 60)
    out = tmp_path / "out"
    for count in (0, 1, 3):
        process = start(tmp_path)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("*.arrow"))) < count and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.communicate()
    done = len(by_sha256(out))
    assert 15 <= done < 60
    both = [start(tmp_path) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f"{60 - done} new, {done} done already" in output or " 0 new, 60 done already" in output
    found = rows(out)
    assert len({(row["sha256"], row["grid"]) for row in found}) == 60 and {row["sha256"] for row in found} == set(shas)
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("active_*"))


def test_a_folder_has_one_format(tmp_path, serial, capsys):
    export(tmp_path / "in", 2)
    args = "--input", tmp_path / "in", "--output_dir"
    assert run(*args, tmp_path / "ply", form="ply") == run(*args, tmp_path / "packed") == 0
    serial.clear()
    for form, message in (
        ("shards", "ply: has metadata.csv, so its grids are voxel files: leave --format shards out, or give another"),
        ("ply", "packed: holds grids of --format shards; this run asks for --format ply. Give --format shards, or"),
    ):
        other = tmp_path / ("ply" if form == "shards" else "packed")
        before = sorted(other.rglob("*"))
        assert run(*args, other, form=form) == 1
        assert message in capsys.readouterr().err and not serial and sorted(other.rglob("*")) == before
    (tmp_path / "ply" / "metadata.csv").unlink()  # killed before it was written
    assert run(*args, tmp_path / "ply") == 1
    assert (
        "holds grids of --format ply; this run asks for --format shards. Give --format ply" in capsys.readouterr().err
    )
    assert run(*args, tmp_path / "packed", "--up_axis", "z") == 1
    assert "holds grids of --up_axis auto; this run asks for --up_axis z. " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "packed" / "records")
    assert run(*args, tmp_path / "packed", "--normalization", "shapellm") == 1
    assert "holds grids of --normalization cube; this run asks for --normalization shapellm" in capsys.readouterr().err
    assert voxelize.main(["--input", "a", "--output_dir", "b", "--format", "shards", "--resolution", "15"]) == 1
    assert "--resolution 15: shards hold grids of an even resolution." in capsys.readouterr().err
    assert voxelize.main(["--input", "a", "--output_dir", "s3://b/c", "--format", "shards"]) == 1
    assert "--output_dir s3://b/c: is a URL. Write to a folder of this machine" in capsys.readouterr().err
    assert not serial


def test_a_damaged_shard_is_named_and_its_grids_are_made_again(tmp_path, serial, capsys):
    shas = export(tmp_path / "in", 12)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    assert run(*args) == 0
    damaged = sorted((tmp_path / "out").glob("*.arrow"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    serial.clear()
    assert run(*args) == 1 and not serial
    error = capsys.readouterr().err
    assert str(damaged) in error and "delete it and run voxelize.py again" in error
    damaged.unlink()
    assert run(*args) == 0 and len(serial) == 5
    assert by_sha256(tmp_path / "out").keys() == shas.keys()


def test_a_scan_that_lost_a_shard_is_made_again_and_what_is_there_stays_once(tmp_path, serial, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shard_files, "BITS_PER_SHARD", R**3)  # a grid a shard
    Path("in").mkdir()
    for case in (1, 2):
        write_scan(Path("in", f"{case}.nii.gz"), case)
    args = "--input", "in", "--output_dir", "out", "--components"
    assert run(*args) == 0
    before = {(row["name"], row["grid"]) for row in by_sha256(Path("out")).values()}
    assert len(before) == 4 and {name.rpartition("#")[0] for name, _ in before} == {"in/1.nii.gz", "in/2.nii.gz"}
    serial.clear()
    assert run(*args) == 0 and not serial
    sorted(Path("out").glob("*.arrow"))[0].unlink()
    assert run(*args) == 0 and serial == [Path("in/1.nii.gz")]
    assert {(row["name"], row["grid"]) for row in by_sha256(Path("out")).values()} == before
    capsys.readouterr()
    assert run("--input", "in", "--output_dir", "out") == 1
    assert "holds grids of --components; this run asks for no --components" in capsys.readouterr().err


def test_grids_that_are_slow_to_come_are_written_in_time(tmp_path, serial, monkeypatch):
    export(tmp_path / "in", 4)
    monkeypatch.setattr(voxelize, "SHARD_SECONDS", -1)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert [len(shard) for shard in shards(tmp_path / "out")] == [1, 1, 1, 1]


def test_a_later_split_is_of_new_grids_alone(tmp_path, serial, capsys):
    export(tmp_path / "in", 2)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    assert run(*args, "--split", "train") == 0
    tetrahedron(9).export(tmp_path / "in" / "new.off")
    assert run(*args, "--split", "val") == 0
    assert "2 of those done already belong to another split in the shards of " in capsys.readouterr().out
    assert [row["split"] for row in rows(tmp_path / "out")] == ["train", "train", "val"]


def test_a_trellis_folder_gives_its_captions_and_scores(tmp_path, serial, capsys):
    root = tmp_path / "trellis"
    shas = [letter * 64 for letter in "abc"]
    scales = (0.3, 0.4, 0.45)
    for sha256, scale in zip(shas, scales, strict=True):
        (root / "renders" / sha256).mkdir(parents=True)
        mesh = tetrahedron()
        mesh.apply_translation(-mesh.bounds.mean(0))
        mesh.apply_scale(scale / mesh.extents.max())
        mesh.export(root / "renders" / sha256 / "mesh.ply")
    captions = json.dumps(["a thing", 'a "thin" thing, 椅子']).replace('"', '""')
    lines = [f'{shas[0]},6.5,"{captions}",x.glb,True', f"{shas[1]},,,y.glb,True", f"{shas[2]},7,,,False"]
    (root / "metadata.csv").write_text("sha256,aesthetic_score,captions,file_identifier,rendered\n" + "\n".join(lines))
    assert run("--input", root) == 1 and "has metadata.csv" in capsys.readouterr().err
    assert run("--input", root, "--output_dir", tmp_path / "out") == 0
    found = by_sha256(tmp_path / "out")
    assert [found[sha256]["aesthetic_score"] for sha256 in shas] == [6.5, None, 7]
    assert [found[sha256]["captions"] for sha256 in shas] == [["a thing", 'a "thin" thing, 椅子'], None, None]
    assert [found[sha256]["file_identifier"] for sha256 in shas] == ["x.glb", "y.glb", None]
    assert {row["name"] for row in found.values()} == {f"renders/{sha256}/mesh.ply" for sha256 in shas}

    text = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(text.replace(",7,", ",good,"))
    assert run("--input", root, "--output_dir", tmp_path / "other") == 1
    assert "trellis/metadata.csv: aesthetic_score is 'good' and no number" in capsys.readouterr().err
    (root / "metadata.csv").write_text(text.replace("rendered", "split").replace("True", "test"))
    assert run("--input", root, "--output_dir", tmp_path / "other") == 1
    assert f"split of {shas[0]} is 'test'; it must be train, val or blank" in capsys.readouterr().err
    assert len(serial) == 3 and not list((tmp_path / "other").glob("*.arrow"))


def test_a_dry_run_knows_the_size_of_shards(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(10):
        write_shape(make_shape(0, "train", i), tmp_path / "in" / f"{i}.obj")
    flags = ["--format", "shards", "--max_workers", "1"]
    args = ["--input", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *flags]
    assert voxelize.main([*args, "--dry_run"]) == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out.partition(" with 1 worker and ")[2].partition(" of disk")[0]
    number, unit = said.split()
    assert voxelize.main(args) == 0
    [path] = (tmp_path / "out").glob("*.arrow")
    assert 0.7 < float(number) * {"B": 1, "kB": 1000}[unit] / path.stat().st_size < 1.4


def test_stopped_is_the_signal(tmp_path, serial, monkeypatch):
    """A second signal during the last shard is not taken for a first one."""
    export(tmp_path / "in", 3)

    def stop(function, tasks, finish, *rest):
        for task in tasks:
            finish(task, function(*task))
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(voxelize, "run_in_pool", stop)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 128 + signal.SIGTERM
    assert len(by_sha256(tmp_path / "out")) == 3
