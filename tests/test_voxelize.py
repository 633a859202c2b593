"""voxelize.py: what it records, what is left out and why, ranks, resuming, older folders and TRELLIS's."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BROKEN, ROOT, cells_met, table, tetrahedron

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("open3d")

from dataset_toolkits import build_metadata, records, voxelize  # noqa: E402
from trellis.grids import meshes  # noqa: E402
from trellis.grids.voxels import points_to_occupancy, read_ply  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402


@pytest.fixture
def serial(monkeypatch):
    """Voxelize in this process, which saves the start of workers; returns the paths that were worked on."""
    worked = []

    def run(function, tasks, finish, max_workers, timeout):
        for task in tasks:
            worked.append(task[0])
            try:
                result = function(*task)
            except DataError as error:
                result = error
            finish(task, result)

    monkeypatch.setattr(voxelize, "run_in_pool", run)
    return worked


def run(*args: object) -> int:
    return voxelize.main([str(arg) for arg in (*args, "--resolution", 16, "--max_workers", 1)])


def export(folder: Path, count: int) -> dict[str, Path]:
    """Write different tetrahedra; returns {sha256: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        tetrahedron(1 + i / 4).export(folder / f"{i}.off")
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.off"))}


def test_grids_below_the_input_are_not_taken_for_meshes(tmp_path, serial, capsys):
    export(tmp_path, 2)
    (tmp_path / "loop").symlink_to(tmp_path)
    for _ in range(2):
        assert run("--input", tmp_path, tmp_path / "0.off", "--output_dir", tmp_path / "out") == 0
        assert ": 2 meshes: " in capsys.readouterr().out
    assert not (tmp_path / "out" / "failed.csv").exists() and len(serial) == 2


@pytest.mark.parametrize(
    "flags, up_axis, normalization",
    [
        ((), "keep", "cube"),
        (("--up_axis", "y"), "y", "cube"),
        (("--normalization", "shapellm"), "y", "shapellm"),
        (("--normalization", "shapellm", "--up_axis", "y"), "y", "shapellm"),
    ],
)
def test_settings_are_recorded(flags, up_axis, normalization, tmp_path, serial):
    [(sha256, path)] = export(tmp_path / "in", 1).items()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", *flags) == 0
    [row] = table(tmp_path / "out" / "metadata.csv")
    assert (row["up_axis"], row["normalization"]) == (up_axis, normalization)
    [record] = table(tmp_path / "out" / "records" / "voxelized_0.csv")
    assert (record["up_axis"], record["normalization"]) == (up_axis, normalization)
    grid = points_to_occupancy(read_ply(tmp_path / "out" / "voxels" / f"{sha256}.ply"), 16)
    assert torch.equal(grid, meshes.mesh_to_grid(path, 16, up_axis, normalization))


@pytest.mark.parametrize("kept", ["records", "metadata.csv", "both"])
def test_folders_without_normalization_are_cubes(kept, tmp_path, serial, capsys):
    """A folder of before there was a choice: the column is missing in metadata.csv, the last field in records."""
    export(tmp_path / "in", 2)
    out, record = tmp_path / "out", tmp_path / "out" / "records" / "voxelized_0.csv"
    args = "--input", tmp_path / "in", "--output_dir", out
    assert run(*args) == 0
    today = (out / "metadata.csv").read_bytes()
    for path in (out / "metadata.csv", record):
        rows = table(path)
        assert [row.pop("normalization") for row in rows] == ["cube", "cube"]
        records.write_table(path, rows[0], rows)
    if kept == "records":
        (out / "metadata.csv").unlink()
    elif kept == "metadata.csv":
        record.unlink()

    serial.clear()
    assert run(*args, "--normalization", "shapellm") == 1
    error = capsys.readouterr().err
    assert "--up_axis keep --resolution 16 --normalization cube" in error
    assert "--up_axis y --resolution 16 --normalization shapellm" in error and not serial
    assert run(*args) == 0 and not serial
    assert (out / "metadata.csv").read_bytes() == today

    tetrahedron(7).export(tmp_path / "in" / "new, with a comma.off")  # its record follows the shorter ones
    assert run(*args) == 0 and len(serial) == 1
    after = table(out / "metadata.csv")
    assert [row["normalization"] for row in after] == ["cube"] * 3
    assert run(*args) == 0 and len(serial) == 1
    assert table(out / "metadata.csv") == after


def test_a_shapellm_folder_takes_nothing_else(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    for up_axis in ("keep", "z"):
        assert run(*args, "--normalization", "shapellm", "--up_axis", up_axis) == 1
        assert f"error: up_axis '{up_axis}': normalization \"shapellm\"" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*args, "--normalization", "shapellm") == 0
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    assert run(*args, "--up_axis", "y") == 1  # differs in the normalization alone
    assert "--normalization cube and --up_axis y --resolution 16 --normalization shapellm" in capsys.readouterr().err
    assert run(*args, "--normalization", "shapellm", "--up_axis", "y") == 0
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before and len(serial) == 1


def test_other_settings_are_refused(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--up_axis", "z") == 1
    error = capsys.readouterr().err
    assert "--up_axis keep --resolution 16 --normalization cube and --up_axis z --resolution 16 --norm" in error
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before and len(serial) == 1


def test_left_out_files_and_duplicates_are_reported(tmp_path, serial, capsys):
    shas = export(tmp_path / "in", 2)
    shutil.copy(tmp_path / "in" / "0.off", tmp_path / "in" / "0_again.off")
    for name in ("nan.obj", "nothing.stl"):
        (tmp_path / "in" / "sub").mkdir(exist_ok=True)
        (tmp_path / "in" / "sub" / name).write_bytes(BROKEN[name][0])
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert "5 meshes: 2 new, 0 done already, 1 duplicates, 2 left out" in capsys.readouterr().out
    rows = {row["sha256"]: row for row in table(tmp_path / "out" / "metadata.csv")}
    assert {sha: row["file"] for sha, row in rows.items()} == {sha: str(path) for sha, path in shas.items()}
    for sha, row in rows.items():
        assert row["voxelized"] == "True"
        assert int(row["num_voxels"]) == len(read_ply(tmp_path / "out" / "voxels" / f"{sha}.ply"))
    failed = table(tmp_path / "out" / "failed.csv")
    assert [Path(row["file"]).name for row in failed] == ["nan.obj", "nothing.stl"]
    assert "not finite" in failed[0]["reason"] and "0 bytes" in failed[1]["reason"]

    # A mended and a deleted file are no longer listed.
    tetrahedron(9).export(tmp_path / "in" / "sub" / "nan.obj")
    (tmp_path / "in" / "sub" / "nothing.stl").unlink()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "failed.csv").exists()
    assert len(table(tmp_path / "out" / "metadata.csv")) == 3


def test_rerun_skips_what_is_done_and_keeps_what_users_added(tmp_path, serial, capsys):
    shas = list(export(tmp_path / "in", 3))
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    assert run(*args) == 0 and len(serial) == 3
    metadata = tmp_path / "out" / "metadata.csv"
    rows = table(metadata)
    for row in rows:
        row.update(aesthetic_score="6.50", caption='a "thing", thin', split="")
    rows[0]["split"] = "val"
    rows.append({**dict.fromkeys(rows[0], ""), "sha256": "f" * 64, "caption": "not voxelized yet"})
    records.write_table(metadata, rows[0], rows)
    (tmp_path / "out" / "voxels" / f"{shas[1]}.ply").unlink()

    serial.clear()
    assert run(*args, "--split", "train") == 0
    assert serial == [tmp_path / "in" / "1.off"]  # only the grid that was gone
    assert "1 of those done already belong to another split" in capsys.readouterr().out
    after = {row["sha256"]: row for row in table(metadata)}
    assert len(after) == 4 and after["f" * 64]["voxelized"] == "False"
    assert after["f" * 64]["caption"] == "not voxelized yet"
    for row in rows[:-1]:
        assert after[row["sha256"]] == {**row, "split": row["split"] or "train"}

    before = metadata.read_bytes()
    metadata.unlink()
    assert build_metadata.main(["--output_dir", str(tmp_path / "out")]) == 0
    assert {row["sha256"] for row in table(metadata)} == set(shas)
    metadata.write_bytes(before)
    assert build_metadata.main(["--output_dir", str(tmp_path / "out")]) == 0
    assert metadata.read_bytes() == before


def test_two_ranks_make_what_one_makes(tmp_path, serial):
    export(tmp_path / "in", 5)
    shutil.copy(tmp_path / "in" / "1.off", tmp_path / "in" / "0_same_as_1.off")  # on the other rank
    for i in range(2):
        (tmp_path / "in" / f"bad{i}.obj").write_bytes(BROKEN["points.obj"][0])
    common_args = "--input", tmp_path / "in", "--split", "train", "--output_dir"
    assert run(*common_args, tmp_path / "one") == 0
    for rank in (1, 0):
        assert run(*common_args, tmp_path / "two", "--rank", rank, "--world_size", 2) == 0
    for name in ("metadata.csv", "failed.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "two" / "records")) == [".lock", "voxelized_0.csv", "voxelized_1.csv"]
    for path in (tmp_path / "one" / "voxels").iterdir():
        assert (tmp_path / "two" / "voxels" / path.name).read_bytes() == path.read_bytes()


def test_record_cut_off_by_a_crash_is_made_again(tmp_path, serial):
    export(tmp_path / "in", 3)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    assert run(*args) == 0
    expected = (tmp_path / "out" / "metadata.csv").read_bytes()
    record = tmp_path / "out" / "records" / "voxelized_0.csv"
    record.write_bytes(record.read_bytes()[:-30])
    (tmp_path / "out" / "metadata.csv").unlink()
    serial.clear()
    assert run(*args) == 0 and len(serial) == 1
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == expected


def test_trellis_folder_is_taken_as_it_is(tmp_path, serial, capsys):
    root = tmp_path / "trellis"
    shas = [letter * 64 for letter in "abc"]
    for sha in shas[:2]:
        (root / "renders" / sha).mkdir(parents=True)
    small = trimesh.creation.box(extents=(0.5, 0.27, 0.97)).apply_translation((0.21, 0, 0))
    small.export(root / "renders" / shas[0] / "mesh.ply")
    tetrahedron().export(root / "renders" / shas[1] / "mesh.ply")  # not normalized
    (root / "metadata.csv").write_text(
        "sha256,aesthetic_score,rendered\n" + "".join(f"{sha},7.25,True\n" for sha in shas)
    )
    assert run("--input", root) == 0
    rows = table(root / "metadata.csv")
    assert [row["sha256"] for row in rows] == shas
    assert [(row["aesthetic_score"], row["rendered"]) for row in rows] == [("7.25", "True")] * 3
    assert [row["voxelized"] for row in rows] == ["True", "False", "False"] and rows[0]["up_axis"] == "z"
    grid = points_to_occupancy(read_ply(root / "voxels" / f"{shas[0]}.ply"), 16)[0].numpy()
    assert np.array_equal(grid, cells_met(small.vertices, small.faces, 16))
    assert grid.sum() == int(rows[0]["num_voxels"])
    reasons = [row["reason"] for row in table(root / "failed.csv")]
    assert "not normalized" in reasons[0] and "is missing" in reasons[1]
    assert {row["normalization"] for row in rows if row["voxelized"] == "True"} == {"cube"}
    assert run("--input", root, "--up_axis", "y") == 1 and "z-up" in capsys.readouterr().err
    assert run("--input", root, "--normalization", "shapellm") == 1
    assert "normalized already" in capsys.readouterr().err

    other = tmp_path / "other"
    assert run("--input", root, "--output_dir", other) == 0
    assert (other / "metadata.csv").read_bytes() == (root / "metadata.csv").read_bytes()


def test_pool_survives_slow_and_dying_tasks():
    results = {}
    tasks = [("__import__('time').sleep(60)",), ("__import__('os')._exit(3)",), ("6 * 7",)]
    voxelize.run_in_pool(eval, tasks, lambda task, result: results.update({task: result}), 1, timeout=1)
    assert results[tasks[2]] == 42
    assert isinstance(results[tasks[0]], DataError) and "time limit of 1 s" in str(results[tasks[0]])
    assert isinstance(results[tasks[1]], DataError) and "exit code 3" in str(results[tasks[1]])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "missing"], "missing: no such file or folder"),
        (["--input", "empty"], "empty: no .glb"),
        (["--input", "note.txt"], "note.txt: is not one of .glb"),
        (["--input", "bad"], "none of the 1 meshes could be voxelized"),
        (["--input", "bad", "--rank", "2", "--world_size", "2"], "--rank 2 --world_size 2"),
        (["--input", "bad", "--resolution", "0"], "--resolution 0"),
    ],
)
def test_wrong_input_is_one_error(args, message, tmp_path, monkeypatch, serial, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "nan.obj").write_bytes(BROKEN["nan.obj"][0])
    assert voxelize.main([*args, "--output_dir", "out"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("name\nx\n", "no column sha256"),
        ("sha256,file\n" + "a" * 64 + "\n", "line 2"),
        ("sha256\n" + 2 * ("a" * 64 + "\n"), "given twice"),
        ("sha256\n../../x\n", "64 lower-case hexadecimal digits"),
    ],
)
def test_damaged_metadata_is_one_error(content, message, tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metadata.csv").write_text(content)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "metadata.csv").read_text() == content and not serial


def test_program_killed_midway_goes_on(tmp_path):
    """As a user runs it: from another folder, with workers, killed without warning, started again."""
    shas = export(tmp_path / "in", 40)
    command = [
        sys.executable,
        str(ROOT / "dataset_toolkits" / "voxelize.py"),
        "--input",
        "in",
        "--output_dir",
        "out",
        "--max_workers",
        "1",
    ]
    record = tmp_path / "out" / "records" / "voxelized_0.csv"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not record.exists() or record.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = record.read_bytes().count(b"\n") - 1

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{40 - done} new, {done} done already" in again.stdout and 3 <= done
    assert {row["sha256"] for row in table(tmp_path / "out" / "metadata.csv")} == set(shas)
    assert {path.stem for path in (tmp_path / "out" / "voxels").glob("*.ply")} == set(shas)

    missing = subprocess.run([*command, "--rank", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("error: --rank -1")
    assert "Traceback" not in missing.stderr
