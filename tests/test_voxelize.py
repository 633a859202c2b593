"""voxelize.py: what it records, what is left out and why, ranks, resuming, older folders and TRELLIS's."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BROKEN, ROOT, cells_met, table, tetrahedron

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("numba")

from dataset_toolkits import build_metadata, claim, estimate, inputs, records, report, voxelize, work  # noqa: E402
from trellis.grids import meshes  # noqa: E402
from trellis.grids.volumes import Frame  # noqa: E402
from trellis.grids.voxels import points_to_occupancy, points_to_voxels, read_ply  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402
from trellis.utils.files import host_name  # noqa: E402


@pytest.fixture
def serial(monkeypatch):
    """Voxelize in this process, which saves the start of workers; returns the paths that were worked on."""
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
    return worked


def run(*args: object) -> int:
    return voxelize.main([str(arg) for arg in (*args, "--resolution", 16, "--max_workers", 1)])


def record_of(root: Path) -> Path:
    """The record file of a folder with one run."""
    [path] = (root / "records").glob("run_*.csv")
    return path


def tree(root: Path) -> dict[str, bytes]:
    """What a folder holds that programs read, by relative path."""
    paths = [root / "metadata.csv", root / "failed.csv", *sorted((root / "voxels").iterdir())]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.exists()}


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
        ((), "auto", "cube"),
        (("--up_axis", "y"), "y", "cube"),
        (("--up_axis", "keep"), "keep", "cube"),
        (("--normalization", "shapellm"), "auto", "shapellm"),
        (("--normalization", "shapellm", "--up_axis", "y"), "y", "shapellm"),
    ],
)
def test_settings_are_recorded(flags, up_axis, normalization, tmp_path, serial):
    [(sha256, path)] = export(tmp_path / "in", 1).items()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", *flags) == 0
    [row] = table(tmp_path / "out" / "metadata.csv")
    assert (row["up_axis"], row["normalization"]) == (up_axis, normalization)
    [record] = records.read_records(tmp_path / "out").grids.values()
    assert (record["up_axis"], record["normalization"]) == (up_axis, normalization)
    grid = points_to_occupancy(read_ply(tmp_path / "out" / "voxels" / f"{sha256}.ply"), 16)
    assert torch.equal(grid, meshes.mesh_to_grid(path, 16, up_axis, normalization))


@pytest.mark.parametrize("kept", ["records", "metadata.csv", "both"])
@pytest.mark.parametrize("has_normalization", [False, True])
def test_folders_of_earlier_versions_go_on(kept, has_normalization, tmp_path, serial, capsys):
    """Their records have another name, no header that counts, 7 fields, or 6 from before there was a normalization."""
    shas = list(export(tmp_path / "in", 2))
    out = tmp_path / "out"
    args = "--input", tmp_path / "in", "--output_dir", out, "--up_axis", "keep"
    assert run(*args) == 0
    rows = table(out / "metadata.csv")
    for row in rows:
        del row["axis"], row["notes"]
        if not has_normalization:
            del row["normalization"]
    records.write_table(out / "metadata.csv", rows[0], rows)
    shutil.rmtree(out / "records")
    (out / "records").mkdir()
    fields = records.OLD_FIELDS if has_normalization else records.OLD_FIELDS[:-1]
    records.write_table(
        out / "records" / "voxelized_0.csv", fields, [{name: row.get(name, "") for name in fields} for row in rows]
    )
    if kept == "records":
        (out / "metadata.csv").unlink()
    elif kept == "metadata.csv":
        shutil.rmtree(out / "records")

    serial.clear()
    for flags, message in (
        (("--up_axis", "auto"), "--up_axis keep; this run asks for --up_axis auto. Give --up_axis keep, or another"),
        (
            ("--up_axis", "auto", "--normalization", "shapellm"),
            "holds grids of --up_axis keep --normalization cube; this run asks for --up_axis auto --normalization sh",
        ),
    ):
        assert run(*args, *flags) == 1
        assert message in capsys.readouterr().err and not serial
    assert run(*args) == 0 and not serial
    assert run(*args[:4]) == 0 and not serial  # without the flag too
    after = table(out / "metadata.csv")
    for row, old in zip(after, rows, strict=True):
        assert row == {**old, "normalization": "cube", "axis": "", "notes": ""}

    tetrahedron(7).export(tmp_path / "in" / "new, with a comma.off")
    assert run(*args) == 0 and len(serial) == 1
    after = {row["sha256"]: row for row in table(out / "metadata.csv")}
    assert len(after) == 3 and [row["normalization"] for row in after.values()] == ["cube"] * 3
    assert {row["axis"] for sha256, row in after.items() if sha256 not in shas} == {"keep"}
    assert run(*args) == 0 and len(serial) == 1
    assert {row["sha256"]: row for row in table(out / "metadata.csv")} == after


def test_of_files_of_the_same_bytes_one_with_the_name_of_its_format_is_taken(tmp_path, serial):
    (tmp_path / "in").mkdir()
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "in" / "e.stl")
    shutil.copy(tmp_path / "in" / "e.stl", tmp_path / "in" / "d.obj")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    [row] = table(tmp_path / "out" / "metadata.csv")
    assert Path(row["file"]).name == "e.stl" and not (tmp_path / "out" / "failed.csv").exists()


def test_a_shapellm_folder_takes_nothing_else(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    for up_axis in ("keep", "z"):
        assert run(*args, "--normalization", "shapellm", "--up_axis", up_axis) == 1
        assert f"error: up_axis '{up_axis}': normalization \"shapellm\"" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*args, "--normalization", "shapellm") == 0
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    assert run(*args) == 1  # differs in the normalization alone
    assert "grids of --normalization shapellm; this run asks for --normalization cube. " in capsys.readouterr().err
    assert run(*args, "--normalization", "shapellm", "--up_axis", "auto") == 0
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before and len(serial) == 1


def test_other_settings_are_refused(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--up_axis", "z") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"error: {tmp_path / 'out'}: holds grids of --up_axis auto; this run asks for --up_axis z. "
        "Give --up_axis auto, or another --output_dir."
    )
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before and len(serial) == 1


def test_left_out_files_and_duplicates_are_reported(tmp_path, serial, capsys):
    shas = export(tmp_path / "in", 2)
    shutil.copy(tmp_path / "in" / "0.off", tmp_path / "in" / "0_again.off")
    for name in ("nan.obj", "nothing.stl"):
        (tmp_path / "in" / "sub").mkdir(exist_ok=True)
        (tmp_path / "in" / "sub" / name).write_bytes(BROKEN[name][0])
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert "5 meshes: 2 new, 0 done already, 1 duplicate, 2 left out" in capsys.readouterr().out
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
    shutil.copy(tmp_path / "in" / "3.off", tmp_path / "in" / "3_same.off")  # on the other rank too
    for i in range(2):
        (tmp_path / "in" / f"bad{i}.obj").write_bytes(BROKEN["points.obj"][0])
    common_args = "--input", tmp_path / "in", "--split", "train", "--output_dir"
    assert run(*common_args, tmp_path / "one") == 0
    for rank in (1, 0):
        assert run(*common_args, tmp_path / "two", "--rank", rank, "--world_size", 2) == 0
    for rank in (0, 1):
        assert run(*common_args, tmp_path / "three", "--rank", rank, "--world_size", 2) == 0
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    assert tree(tmp_path / "two") == tree(tmp_path / "one") and len(tree(tmp_path / "one")) == 7
    names = sorted(path.name[:13] for path in (tmp_path / "two" / "records").iterdir())
    assert names == ["run_000001_1_", "run_000002_0_", "settings.json"]


def test_record_cut_off_by_a_crash_is_made_again(tmp_path, serial):
    export(tmp_path / "in", 3)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out"
    assert run(*args) == 0
    expected = (tmp_path / "out" / "metadata.csv").read_bytes()
    record = record_of(tmp_path / "out")
    record.write_bytes(record.read_bytes()[:-3])
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


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "missing"], "missing: no such file or folder"),
        (["--input", "empty"], "empty: no mesh or volume there or below. Give a folder of meshes. Read are .glb"),
        (["--input", "note.txt"], "note.txt: is not one of .glb"),
        (["--input", "bad"], "the only file could not be voxelized: bad/nan.obj: "),
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
        ("name\nx\n", "begins with 'name', which has no column sha256. Its first line must name the columns"),
        ("sha256;file\n" + "a" * 64 + ";b\n", "no column sha256. Save the table with commas between the columns."),
        ("sha256,file\n" + 3000 * ("a" * 64 + ",b\n") + "\udcff,b\n", "line 3002 is not UTF-8 text"),
        ("sha256,file\n" + "a" * 64 + "\n", "line 2"),
        ("sha256\n" + 2 * ("a" * 64 + "\n"), "given twice"),
        ("sha256\n../../x\n", "64 lower-case hexadecimal digits"),
    ],
)
def test_damaged_metadata_is_one_error(content, message, tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    encoded = content.encode(errors="surrogateescape")
    (tmp_path / "out" / "metadata.csv").write_bytes(encoded)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == encoded and not serial


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
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / "out" / "records").glob("run_*.csv"))

    while process.poll() is None and lines() < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = lines() - 1

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"{40 - done} new, {done} done already" in again.stdout and 3 <= done
    assert {row["sha256"] for row in table(tmp_path / "out" / "metadata.csv")} == set(shas)
    assert {path.stem for path in (tmp_path / "out" / "voxels").glob("*.ply")} == set(shas)

    missing = subprocess.run([*command, "--rank", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("error: --rank -1")
    assert "Traceback" not in missing.stderr


# The program without open3d, whose import takes a worker seconds: the voxels are those of the corners.
FAST = """
import sys
sys.path.insert(0, {root!r})
from dataset_toolkits import voxelize
from trellis.grids import mesh_pool, meshes
mesh_pool.start_worker = lambda: None
meshes.voxelize_mesh = lambda vertices, faces, resolution: meshes.voxelize_points(vertices, resolution)
if __name__ == "__main__":
    sys.exit(voxelize.main(sys.argv[1:]))
"""


def start(folder: Path, *flags: str, group: bool = False) -> subprocess.Popen:
    """group: in a group of its own, with Ctrl-C as in a terminal, for a test may run in the background."""
    command = [sys.executable, "fast.py", "--input", "in", "--resolution", "16", "--max_workers", "1", *flags]
    return subprocess.Popen(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=group,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler) if group else None,
    )


def events(root: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (root / "records").glob("run_*.csv"))


def wait_for_events(process: subprocess.Popen, root: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and events(root) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None and events(root) >= count


@pytest.fixture
def mixed_input(tmp_path, serial, monkeypatch) -> Path:
    """A folder `in` with meshes, bad files and a format that is not read, and in `clean` what one run makes of it."""
    (tmp_path / "fast.py").write_text(FAST.format(root=str(ROOT)))
    monkeypatch.setattr(
        meshes, "voxelize_mesh", lambda vertices, faces, resolution: meshes.voxelize_points(vertices, resolution)
    )
    export(tmp_path / "in", 60)
    for i in range(3):
        (tmp_path / "in" / f"bad{i}.obj").write_bytes(BROKEN["points.obj"][0])
    (tmp_path / "in" / "scene.fbx").write_bytes(b"Kaydara")
    shutil.copy(tmp_path / "in" / "7.off", tmp_path / "in" / "copy of 7.off")
    folder = Path.cwd()
    try:
        os.chdir(tmp_path)  # names are recorded as they are given
        assert run("--input", "in", "--output_dir", "clean") == 0
    finally:
        os.chdir(folder)
    assert len(tree(tmp_path / "clean")) == 62
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are looked up in /proc")
def test_killed_workers_cost_nothing(mixed_input):
    """A file whose worker was killed is tried once more at the end."""
    process = start(mixed_input, "--output_dir", "out")
    for count in (8, 30):
        wait_for_events(process, mixed_input / "out", count)
        for child in Path(f"/proc/{process.pid}/task").glob("*/children"):
            for pid in child.read_text().split():
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(int(pid), signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "65 meshes: 60 new, 0 done already, 1 duplicate, 4 left out" in output
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


def test_the_same_command_twice_at_once(mixed_input):
    both = [start(mixed_input, "--output_dir", "out") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")
    assert not [
        path
        for path in (mixed_input / "out").rglob("*")
        if path.name.endswith((".tmp", "json")) and path.name != "settings.json"
    ]


def test_of_two_settings_at_once_one_is_made_and_the_other_refused_at_once(mixed_input):
    both = [start(mixed_input, "--output_dir", "out", "--up_axis", axis) for axis in ("auto", "z")]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    lost = [process.returncode for process in both].index(1)
    message = errors[lost].strip().splitlines()[-1]
    assert message.startswith("error: out: another run is active there with --up_axis ")
    assert "voxelize:" not in errors[lost]  # it did no work
    [axis] = {row["up_axis"] for row in table(mixed_input / "out" / "metadata.csv")}
    assert axis == ("z", "auto")[lost]


def test_a_mistaken_flag_locks_a_folder_only_with_its_first_grid(mixed_input, serial, capsys, monkeypatch):
    monkeypatch.chdir(mixed_input)
    (mixed_input / "none").mkdir()
    (mixed_input / "none" / "bad.obj").write_bytes(BROKEN["points.obj"][0])
    assert run("--input", "none", "--output_dir", "out", "--up_axis", "y") == 1
    killed = records.active_file(mixed_input / "out", "0_00000000")  # and one that was killed before its first grid
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    killed.write_text(json.dumps({"host": host_name(), "pid": dead.pid, "settings": ["y", "16", "cube", "surface"]}))
    assert run("--input", "in", "--output_dir", "out") == 0 and not killed.exists()
    rows = [row for row in table(mixed_input / "out" / "failed.csv") if row["file"] != "none/bad.obj"]
    assert rows == table(mixed_input / "clean" / "failed.csv")
    assert (mixed_input / "out" / "metadata.csv").read_bytes() == (mixed_input / "clean" / "metadata.csv").read_bytes()
    assert run("--input", "in", "--output_dir", "out", "--up_axis", "y") == 1
    assert "holds grids of --up_axis auto; this run asks for --up_axis y" in capsys.readouterr().err

    alive = records.active_file(mixed_input / "new", "0_00000000")
    alive.parent.mkdir(parents=True)
    alive.write_text(
        killed_text := json.dumps({"host": "another", "pid": 1, "settings": ["y", "16", "cube", "surface"]})
    )
    (alive.parent / "settings.json").write_text('["y", "16", "cube", "surface"]')
    assert run("--input", "in", "--output_dir", "new") == 1
    error = capsys.readouterr().err
    assert "another run is active there with --up_axis y" in error and f"delete new/records/{alive.name}" in error
    assert alive.read_text() == killed_text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_it_in_order_and_no_file_is_blamed(number, mixed_input):
    """As schedulers and terminals send it: to the workers too."""
    process = start(mixed_input, "--output_dir", "out", group=True)
    wait_for_events(process, mixed_input / "out", 8)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == voxelize.INTERRUPTED and "Traceback" not in errors
    made = table(mixed_input / "out" / "metadata.csv")  # what is done is told at once
    assert 3 <= len(made) < 60 and {row["voxelized"] for row in made} == {"True"}
    assert not list((mixed_input / "out").rglob("*.tmp")) and not list((mixed_input / "out").rglob("active_*"))
    output, errors = start(mixed_input, "--output_dir", "out").communicate(timeout=120)
    assert f"{60 - len(made)} new, {len(made)} done already" in output, errors
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


def test_killed_again_and_again(mixed_input):
    """Killed at the start, among the first files, later and while the tables are written."""
    for count in (0, 3, 30, 64):
        process = start(mixed_input, "--output_dir", "out")
        before = events(mixed_input / "out")
        while process.poll() is None and events(mixed_input / "out") < max(count, before):
            time.sleep(0.002)
        process.kill()
        process.communicate()
    process = start(mixed_input, "--output_dir", "out")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


@pytest.mark.parametrize("where", ["grid", "record", "table"])
def test_a_full_disk_is_one_error_and_a_rerun_goes_on(where, mixed_input, serial, capsys, monkeypatch):
    monkeypatch.chdir(mixed_input)
    with monkeypatch.context() as patch:
        calls = []

        def fill(real, last):
            def write(*args, **kwargs):
                calls.append(1)
                if len(calls) > last:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            return write

        if where == "grid":
            patch.setattr(work, "write_ply", fill(work.write_ply, 5))
        elif where == "record":
            patch.setattr(records.RecordFile, "_append", fill(records.RecordFile._append, 9))
        else:
            patch.setattr(records, "write_table", fill(records.write_table, 1))  # metadata.csv, but not failed.csv
        assert run("--input", "in", "--output_dir", "out") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and error[0].startswith("error: out: No space left on device. Mend that and run the same")
    assert run("--input", "in", "--output_dir", "out") == 0
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


# --- what is said ---


def test_notes_and_axes_are_recorded_and_counted(tmp_path, serial, capsys):
    export(tmp_path / "in", 3)
    tetrahedron().export(tmp_path / "in" / "lamp.stl")
    tetrahedron(2).export(tmp_path / "in" / "chair.glb")
    (tmp_path / "in" / "cloud.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--points") == 0
    rows = {Path(row["file"]).name: row for row in table(tmp_path / "out" / "metadata.csv")}
    unknown = f"{meshes.UNKNOWN_AXIS}: taken as they are"
    cloud = "a cloud of 3 points: its voxels have no surface between them"
    assert {name: (row["axis"], row["notes"]) for name, row in rows.items()} == {
        **{f"{i}.off": ("keep", unknown) for i in range(3)},
        "lamp.stl": ("z", ""),
        "chair.glb": ("y", ""),
        "cloud.obj": ("keep", f"{cloud}; {unknown}"),
    }
    assert rows["cloud.obj"]["num_voxels"] == "3"
    output = capsys.readouterr().out.splitlines()
    assert f"  noted: 4 files: {unknown}. Say it by --up_axis y or z" in output
    assert f"  noted: {tmp_path / 'in' / 'cloud.obj'}: {cloud}" in output

    shutil.rmtree(tmp_path / "out")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--up_axis", "z") == 0
    [row] = table(tmp_path / "out" / "failed.csv")
    assert row["file"].endswith("cloud.obj") and "--points" in row["reason"]
    axes = {Path(row["file"]).name: row["axis"] for row in table(tmp_path / "out" / "metadata.csv")}
    assert set(axes.values()) == {"z"}  # of the GLB too, which says nothing that contradicts


def test_many_notes_are_shown_by_kind():
    texts = [("a", "has 3 points"), ("b", "has 1,250.5 points"), ("c", "is cut"), ("d", "is cut")]
    assert report.by_kind(texts) == ["2 files, such as a: has 3 points", "2 files: is cut"]
    assert report.by_kind(texts, {"c", "d", "a"}) == [
        "2 files and objects, such as a: has 3 points",
        "2 objects: is cut",
    ]
    lines = report.by_kind((f"{i}", "x" * i) for i in range(1, 10))
    assert len(lines) == report.KINDS_SHOWN + 1 and lines[-1] == "and 4 more"


def test_what_is_counted_has_its_name(tmp_path, serial, capsys, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for case in (4, 5):
        labels = np.zeros((12, 12, 12), np.uint8)
        for organ in (1, 2, 3):
            labels[: 2 + case, 4 * organ - 4 : 4 * organ - 1, 2:10] = organ
        labels[0, 0, 11] = 7
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), Path("in", f"{case}.nii"))
    Path("in/a.fbx").touch()
    args = "--input", "in", "--output_dir", "out"
    assert run(*args, "--dry_run") == 0
    dry = capsys.readouterr().out
    assert "  3 files: 2 .nii, 1 not read; " in dry
    assert "of those tried, noted: 4 objects: reaches the scan's border (left) and may be cut off" in dry
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert "out: 3 files: 6 new grids, 0 files done already, 0 duplicates, 1 file and 2 objects left out; " in out
    assert "  noted: 4 objects: reaches the scan's border (left) and may be cut off" in out
    assert "  left out: 2 objects: has 1 voxels of the scan, fewer than 27" in out
    assert run("--input", "in/4.nii", "--output_dir", "one") == 0
    assert (
        "one: 1 file: 3 new grids, 0 files done already, 0 duplicates, 1 object left out; " in capsys.readouterr().out
    )


def test_formats_that_are_not_read_are_listed_and_counted(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    for name in ("a.fbx", "b.fbx", "c.step"):
        (tmp_path / "in" / name).touch()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "4 meshes: 1 new, 0 done already, 0 duplicates, 3 left out" in output
    assert "  left out: 2 files: FBX is not read: " in output
    failed = {Path(row["file"]).name: row["reason"] for row in table(tmp_path / "out" / "failed.csv")}
    assert failed.keys() == {"a.fbx", "b.fbx", "c.step"} and failed["c.step"].startswith("STEP is not read: ")
    before = events(tmp_path / "out")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert events(tmp_path / "out") == before  # nothing new to record
    (tmp_path / "in" / "a.fbx").unlink()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert len(table(tmp_path / "out" / "failed.csv")) == 2


def test_a_file_that_goes_while_it_runs_costs_itself_alone(tmp_path, serial, monkeypatch):
    export(tmp_path / "in", 3)
    planned = voxelize.plan_files

    def plan_and_lose(*args):
        plan = planned(*args)
        (tmp_path / "in" / "1.off").unlink()
        return plan

    monkeypatch.setattr(voxelize, "plan_files", plan_and_lose)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    [row] = table(tmp_path / "out" / "failed.csv")
    assert row["file"].endswith("1.off") and row["reason"] == "cannot be read: No such file or directory"
    assert len(table(tmp_path / "out" / "metadata.csv")) == 2


@pytest.mark.parametrize("written", ["before", "within"])
def test_a_file_that_is_replaced_while_it_runs_is_not_taken_for_the_one_that_was_hashed(
    written, tmp_path, serial, monkeypatch
):
    export(tmp_path / "in", 2)
    replacement = tmp_path / "new.off"
    tetrahedron(7).export(replacement)
    planned, voxels = voxelize.plan_files, work.mesh_voxels

    def replace():
        (tmp_path / "in" / "1.off").write_bytes(replacement.read_bytes()[: None if written == "before" else 20])

    def plan_and_replace(*args):
        plan = planned(*args)
        replace()
        return plan

    def replace_and_read(path, *args):
        if path.name == "1.off":  # half a file: it seems damaged
            replace()
        return voxels(path, *args)

    with monkeypatch.context() as patch:
        if written == "before":
            patch.setattr(voxelize, "plan_files", plan_and_replace)
        else:
            patch.setattr(work, "mesh_voxels", replace_and_read)
        assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    [row] = table(tmp_path / "out" / "failed.csv")
    assert row["file"].endswith("1.off") and row["reason"] == work.CHANGED
    shutil.copy(replacement, tmp_path / "in" / "1.off")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "clean") == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "clean")


def test_a_fault_of_a_reader_costs_its_file_alone(tmp_path, serial, monkeypatch):
    export(tmp_path / "in", 2)
    voxels = work.mesh_voxels

    def fail(path, *args):
        if path.name == "0.off":
            raise KeyError("x")
        return voxels(path, *args)

    monkeypatch.setattr(work, "mesh_voxels", fail)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    [row] = table(tmp_path / "out" / "failed.csv")
    assert row["reason"] == "cannot be voxelized, by a fault of this program (KeyError: 'x')"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"file,sha256,reason\r\nold.off,,edited\r\n",
        b"file;sha256;reason\nold.off;;by a spreadsheet\n",
        b"\xef\xbb\xbffile,reason\nold.off,x\n",
        b'file,sha256,reason\n"in/0.off,,not ended\n\xff\xfe',
        b"reason,file,sha256,mine\n1,2\n",
    ],
)
def test_a_failed_csv_that_was_edited_is_made_anew(content, mixed_input, serial, monkeypatch):
    monkeypatch.chdir(mixed_input)
    assert run("--input", "in", "--output_dir", "out") == 0
    (mixed_input / "out" / "failed.csv").write_bytes(content)
    assert run("--input", "in", "--output_dir", "out") == 0
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


def test_a_failed_csv_of_others_is_not_touched(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "failed.csv").write_text("student,grade\nme,F\n")
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 1
    assert "failed.csv: begins with 'student,grade', so voxelize.py did not write it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failed.csv"] and not serial


def test_reasons_that_an_earlier_version_listed_stay_until_their_rank_runs_again(mixed_input, serial, monkeypatch):
    """It kept them in failed.csv alone."""
    monkeypatch.chdir(mixed_input)
    assert run("--input", "in", "--output_dir", "out") == 0
    shutil.rmtree(mixed_input / "out" / "records")
    for rank in (0, 1):
        assert run("--input", "in", "--output_dir", "out", "--rank", rank, "--world_size", 2) == 0
        assert table(mixed_input / "out" / "failed.csv") == table(mixed_input / "clean" / "failed.csv")


def test_a_success_of_one_run_outlives_a_failure_of_another(mixed_input, serial, monkeypatch):
    """As when two runs share the files, and one machine is too slow for a file."""
    monkeypatch.chdir(mixed_input)
    assert run("--input", "in", "--output_dir", "out") == 0
    sha256 = hashlib.sha256((mixed_input / "in" / "3.off").read_bytes()).hexdigest()
    with records.RecordFile(mixed_input / "out", 1) as file:
        file.write("failed", file="in/3.off", sha256=sha256, reason="took longer than the time limit of 1 s")
    assert build_metadata.main(["--output_dir", "out"]) == 0
    assert tree(mixed_input / "out") == tree(mixed_input / "clean")


def test_records_that_come_while_the_tables_are_written_are_in_them(tmp_path, serial, monkeypatch):
    """The last one to write has every record, without a lock."""
    export(tmp_path / "in", 4)
    args = "--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--world_size", 2
    write_table = records.write_table

    def write_late(path, *rest):
        if path.name == "metadata.csv":
            monkeypatch.setattr(records, "write_table", write_table)
            assert run(*args, "--rank", 1) == 0  # from its start to its end, between this rank's reading and writing
        write_table(path, *rest)

    monkeypatch.setattr(records, "write_table", write_late)
    assert run(*args, "--rank", 0) == 0
    assert len(table(tmp_path / "out" / "metadata.csv")) == 4


def test_a_dry_run_writes_nothing_and_says_what_a_run_would_do(mixed_input, capsys, monkeypatch):
    monkeypatch.chdir(mixed_input)
    command = ["--input", "in", "--output_dir", "new", "--resolution", "16", "--max_workers", "1", "--dry_run"]
    assert voxelize.main(command) == 0
    assert not (mixed_input / "new").exists()
    output = capsys.readouterr().out
    assert output.startswith("new: dry run, nothing is written\n  65 files: 61 .off, 3 .obj, 1 not read; ")
    assert "left out: in/scene.fbx: FBX is not read" in output
    assert " to do: about " in output and "of those tried, noted: " in output
    found = re.search(r"at most (\d+) (is a|are) duplicates?, by size", output)
    assert found and int(found[1]) >= 1

    shutil.copytree("clean", "done")
    before = tree(mixed_input / "done")
    command[3] = "done"
    assert voxelize.main(command) == 0
    output = capsys.readouterr().out
    assert "60 are recorded as done, by their names" in output and "\n  4 to do: " in output
    assert tree(mixed_input / "done") == before
    assert voxelize.main([*command, "--up_axis", "z"]) == 1  # it would be refused
    assert "holds grids of --up_axis auto; this run asks for --up_axis z" in capsys.readouterr().err


def timed(path: Path, settings: object) -> tuple[float, work.Outcome]:
    """Stands for estimate._timed in a worker: a file takes as many seconds as it says, and with 0 the worker dies."""
    seconds = float(path.read_text())
    time.sleep(seconds)
    if seconds == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return seconds, work.Outcome((work.Made("", estimate.NO_SHA256, 100, "z", ()),))


def test_a_dry_run_counts_what_it_had_no_time_for_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "_timed", timed)
    monkeypatch.setattr(estimate, "SAMPLE_SECONDS", 1.0)
    files = {}
    for name, text in (("a.stl", "0.1"), ("b.stl", "0.2" + " " * 7), ("c.nii", "60" + " " * 18)):
        files[name] = tmp_path / name
        files[name].write_text(text)
    found = inputs.Found(files, {})
    lines = estimate.dry_run(found, set(), work.Settings(16, "auto", "cube"), 1, 60, None)
    assert lines[-1] == (
        "3 to do: about 2 s with 1 worker and 3.99 kB of disk, by 2 of them that were tried, and by the size of 1 "
        "that took too long"
    )
    files["c.nii"].write_text("0" + " " * 19)
    lines = estimate.dry_run(found, set(), work.Settings(16, "auto", "cube"), 1, 60, None)
    assert lines[-1].startswith("of those tried, would be tried once more, alone: ") and "c.nii: its proc" in lines[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not limit memory")
def test_memory_is_limited_for_each_file(tmp_path, capsys):
    """A PLY of 60 million points is 720 MB, which does not fit in 0.2 GiB."""
    export(tmp_path / "in", 1)
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 60000000\n"
    header += b"".join(b"property float %c\n" % axis for axis in b"xyz") + b"end_header\n"
    with open(tmp_path / "in" / "large.ply", "wb") as file:
        file.write(header)
        file.truncate(len(header) + 720_000_000)  # a sparse file: it takes no disk
    flags = ["--resolution", "16", "--max_workers", "1", "--memory", "0.2", "--points"]
    assert voxelize.main(["--input", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    [row] = table(tmp_path / "out" / "failed.csv")
    assert row["file"].endswith("large.ply")
    assert row["reason"] == "needs more memory than the limit of 0.2 GiB: simplify it or raise the limit"
    assert len(table(tmp_path / "out" / "metadata.csv")) == 1


# --- volumes ---


def write_scan(path: Path, spacing: float = 1.5) -> None:
    """A scan with two organs, one of two parts, and three voxels of a third."""
    nibabel = pytest.importorskip("nibabel")
    labels = np.zeros((24, 20, 16), np.uint8)
    labels[2:10, 4:12, 3:9] = 1
    labels[14:20, 4:12, 3:9] = 2
    labels[14:20, 15:19, 3:9] = 2
    labels[12, 0, :3] = 5
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([spacing, spacing, 2 * spacing, 1])), path)


def test_a_scan_gives_a_grid_for_each_organ(tmp_path, serial, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for case in (1, 2):
        write_scan(Path("in", f"case_{case}.nii.gz"), spacing=case)
    tetrahedron().export("in/mesh.stl")
    Path("labels.json").write_text('{"1": "liver", "kidneys": [2], "9": "heart", "small": [5]}')
    args = "--input", "in", "--output_dir", "out", "--labels", "labels.json"
    assert run(*args) == 0
    assert "3 files: 5 new grids, 0 files done already, 0 duplicates, 4 objects left out; " in capsys.readouterr().out
    rows = {row["file"]: row for row in table(Path("out/metadata.csv"))}
    organs = {f"in/case_{case}.nii.gz#{name}" for case in (1, 2) for name in ("liver", "kidneys")}
    assert rows.keys() == organs | {"in/mesh.stl"}
    for case in (1, 2):
        row = rows[f"in/case_{case}.nii.gz#liver"]
        assert row["axis"] == "z" and float(row["mm_per_cell"]) == case * 12 / 16  # 6 slices of 2 mm are longest
        frame = Frame.from_json(row["frame"])
        assert frame.mm_per_cell == case * 12 / 16 and frame.shape == (24, 20, 16)
        voxels = points_to_voxels(read_ply(Path("out/voxels", f"{row['sha256']}.ply")), 16)
        assert len(voxels) == int(row["num_voxels"])
    assert rows["in/mesh.stl"]["frame"] == rows["in/mesh.stl"]["mm_per_cell"] == ""
    failed = {row["file"]: row["reason"] for row in table(Path("out/failed.csv"))}
    assert failed.keys() == {f"in/case_{case}.nii.gz#{name}" for case in (1, 2) for name in ("heart", "small")}

    before = tree(Path("out"))
    serial.clear()
    assert run(*args) == 0 and not serial and tree(Path("out")) == before
    assert "0 new grids, 3 files done already, 0 duplicates, 4 objects left out; " in capsys.readouterr().out
    Path("out/voxels", f"{rows['in/case_1.nii.gz#kidneys']['sha256']}.ply").unlink()
    assert run(*args) == 0 and serial == [Path("in/case_1.nii.gz")] and tree(Path("out")) == before

    assert run(*args, "--split", "val") == 0 and {row["split"] for row in table(Path("out/metadata.csv"))} == {"val"}
    Path("in/case_2.nii.gz").unlink()
    serial.clear()
    assert run(*args) == 0 and not serial
    assert {row["file"] for row in table(Path("out/failed.csv"))} == {
        f"in/case_1.nii.gz#{name}" for name in ("heart", "small")
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_with_line_breaks_stay_one_line(tmp_path, serial, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for place, character in enumerate("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"):
        Path("in", f"bad{character}{place}.obj").write_text("v 0 0 0")
        tetrahedron(1 + place / 4).export(Path("in", f"good{character}{place}.off"))
        assert inputs.printable(Path(f"a{character}b")) == f"a{character.encode('unicode_escape').decode()}b"
    args = "--input", "in", "--output_dir", "out"
    assert run(*args) == 0
    before = tree(Path("out"))
    assert len(table(Path("out/failed.csv"))) == len(table(Path("out/metadata.csv"))) == 10
    assert run(*args) == 0 and tree(Path("out")) == before
    shutil.rmtree("in")
    tetrahedron(9).export("in.off")
    Path("in").mkdir()
    Path("in.off").rename("in/one.off")
    assert run(*args) == 0 and not Path("out/failed.csv").exists()


def test_names_of_files_and_organs_may_be_any_text(tmp_path, serial, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    write_scan(Path("in", "case#1.nii.gz"))
    Path("labels.json").write_text('{"lesion #1": 1, "left\\nkidney": 2, "gone #3": 9, "tiny\\n#5": 5}')
    args = "--input", "in", "--output_dir", "out", "--labels", "labels.json"
    assert run(*args) == 0
    assert {row["file"] for row in table(Path("out/metadata.csv"))} == {
        "in/case#1.nii.gz#lesion #1", "in/case#1.nii.gz#left kidney"
    }  # fmt: skip
    failed = {row["file"] for row in table(Path("out/failed.csv"))}
    assert failed == {"in/case#1.nii.gz#gone #3", "in/case#1.nii.gz#tiny #5"}
    before = tree(Path("out"))
    assert run(*args) == 0 and len(serial) == 1 and tree(Path("out")) == before
    capsys.readouterr()
    assert run(*args, "--dry_run") == 0 and "nothing to do" in capsys.readouterr().out
    Path("in/a#b.nii.gz").write_bytes(Path("in/case#1.nii.gz").read_bytes())
    assert run(*args) == 0 and len(serial) == 1
    assert {row["file"] for row in table(Path("out/metadata.csv"))} == {
        "in/a#b.nii.gz#lesion #1", "in/a#b.nii.gz#left kidney"
    }  # fmt: skip


def test_masks_of_one_organ_each_have_its_name(tmp_path, serial, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.chdir(tmp_path)
    for case, edge in (("s1", 8), ("s2", 9)):
        Path("in", case).mkdir(parents=True)
        for place, organ in enumerate(("liver", "spleen", "brain")):
            mask = np.zeros((24, 20, 16), np.uint8)
            mask[2 : 2 + edge, 2 : 6 + place, 3:9] = organ != "brain"
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), Path("in", case, f"{organ}.nii.gz"))
    Path("labels.json").write_text('{"spleen": 1, "liver": 5}')
    found = {f"in/{case}/{organ}.nii.gz#{organ}" for case in ("s1", "s2") for organ in ("liver", "spleen")}
    for labels in ((), ("--labels", "totalsegmentator"), ("--labels", "labels.json")):
        out = Path(f"out{'_'.join(labels)}")
        assert run("--input", "in", "--output_dir", out, *labels) == 0
        assert {row["file"] for row in table(out / "metadata.csv")} == found
        reasons = {row["file"]: row["reason"] for row in table(out / "failed.csv")}
        assert reasons == {f"in/{case}/brain.nii.gz": "has no label: every voxel is 0" for case in ("s1", "s2")}

    Path("few.json").write_text('{"liver": 1}')
    shutil.rmtree("in/s2")
    Path("in/s1/brain.nii.gz").unlink()
    args = "--input", "in", "--output_dir", "few", "--labels", "few.json"
    assert run(*args) == 0
    (left_out,) = table(Path("few/failed.csv"))
    assert left_out["file"] == "in/s1/spleen.nii.gz#spleen" and "few.json does not name" in left_out["reason"]
    serial.clear()
    assert run(*args) == 0 and not serial  # what is not asked for is not read again
    Path("in/s1/spleen.nii.gz").rename("in/s1/case.nii.gz")  # no mask by its name: a label map
    assert run(*args) == 0 and serial == [Path("in/s1/case.nii.gz")]
    assert {row["file"] for row in table(Path("few/metadata.csv"))} == {
        "in/s1/liver.nii.gz#liver", "in/s1/case.nii.gz#liver"
    } and not Path("few/failed.csv").exists()  # fmt: skip


@pytest.mark.parametrize("labels, value", [("totalsegmentator", 1), ("labels.json", 1), ("few.json", 255)])
def test_of_copies_of_a_mask_the_one_named_after_its_organ_counts(labels, value, tmp_path, serial, monkeypatch):
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("labels.json").write_text('{"liver": 5}')
    Path("few.json").write_text('{"liver": 1}')
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[2:8, 2:8, 2:8] = value
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), Path("in/hepatic_thing.nii.gz"))
    args = "--input", "in", "--output_dir", "out", "--labels", labels
    assert run(*args) == 1 and len(table(Path("out/failed.csv"))) == 1
    for name in ("liver", "another"):
        shutil.copy("in/hepatic_thing.nii.gz", f"in/{name}.nii.gz")
        for _ in range(2):
            assert run(*args) == 0 and not Path("out/failed.csv").exists()
            assert [row["file"] for row in table(Path("out/metadata.csv"))] == ["in/liver.nii.gz#liver"]
    assert serial == [Path("in/hepatic_thing.nii.gz"), Path("in/liver.nii.gz")]


def test_parts_of_an_organ_and_solids(tmp_path, serial, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scan(Path("case.nii"))
    args = "--input", "case.nii", "--output_dir", "out", "--components", "--fill", "solid"
    assert run(*args) == 0
    rows = table(Path("out/metadata.csv"))
    assert {row["file"] for row in rows} == {"case.nii#1_1", "case.nii#2_1", "case.nii#2_2"}
    assert {row["fill"] for row in rows} == {"solid"} and len({row["sha256"] for row in rows}) == 3
    assert run("--input", "case.nii", "--output_dir", "out", "--components") == 1
    assert "holds grids of --fill solid; this run asks for --fill surface. Give --fill solid" in capsys.readouterr().err
    assert run(*args, "--normalization", "shapellm") == 1
    assert run("--input", "case.nii", "--output_dir", "other", "--normalization", "shapellm") == 1
    assert "is a volume, which is placed as by --normalization cube" in capsys.readouterr().err


def test_volumes_of_a_folder_are_divided_in_one_way(tmp_path, serial, capsys, monkeypatch):
    """A corrected table, or parts after whole organs, would leave objects of both, with their own names and splits."""
    monkeypatch.chdir(tmp_path)
    write_scan(Path("case.nii.gz"))
    export(Path("in"), 1)
    Path("labels.json").write_text('{"1": "livr", "2": "kidneys"}')
    args = "--input", "case.nii.gz", "--output_dir", "out"
    assert run("--input", "in", "--output_dir", "out") == 0  # meshes go with every division
    assert run(*args, "--labels", "labels.json", "--split", "train") == 0
    before = tree(Path("out"))
    assert len(table(Path("out/metadata.csv"))) == 3
    serial.clear()

    def refused(*flags: str) -> str:
        capsys.readouterr()
        for extra in ((), ("--dry_run",)):
            assert run(*args, *flags, *extra) == 1 and not serial and tree(Path("out")) == before
        error = capsys.readouterr().err.splitlines()
        assert error[0] == error[1]
        return error[0]

    Path("labels.json").rename("old.json")
    Path("labels.json").write_text('{"1": "liver", "2": "kidneys"}')
    assert re.fullmatch(
        r"error: out: holds grids of --labels labels.json \(its content: (\w{8})\); this run asks for "
        r"--labels labels.json \(its content: (?!\1)\w{8}\). Give the same as before, or another --output_dir.",
        refused("--labels", "labels.json"),
    )
    assert "; this run asks for no --labels. Give the same as before, or another" in refused()
    assert refused("--labels", "old.json", "--components").endswith(
        "holds grids of no --components; this run asks for --components. Give the same as before, or another "
        "--output_dir."
    )
    assert run("--input", "in", "--output_dir", "out") == 0 and tree(Path("out")) == before
    write_scan(Path("new.nii.gz"), 2)
    assert run("--input", "new.nii.gz", *args[2:], "--labels", "old.json") == 0  # the same table by another name
    assert serial == [Path("new.nii.gz")] and len(table(Path("out/metadata.csv"))) == 5

    for path in Path("out/records").glob("run_*.csv"):  # as earlier versions wrote them
        rows = table(path)
        records.write_table(
            path, records.RECORD_FIELDS[:-2], [{k: r[k] for k in records.RECORD_FIELDS[:-2]} for r in rows]
        )
    Path("out/records/settings.json").write_text('["auto", "16", "cube", "surface"]')
    assert run(*args, "--labels", "labels.json") == 0


def test_another_division_is_refused_while_a_run_is_active(tmp_path, serial, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claim, "PATIENCE", 0)
    write_scan(Path("case.nii.gz"))
    export(Path("in"), 1)
    assert run("--input", "in", "--output_dir", "out") == 0
    assert json.loads(Path("out/records/settings.json").read_text()) == ["auto", "16", "cube", *[""] * 4]
    other = records.active_file(Path("out"), "0_00000000")
    theirs = ["auto", "16", "cube", "surface", "every", "parts"]
    other.write_text(json.dumps({"host": "another", "pid": 1, "settings": theirs}))
    serial.clear()
    args = "--input", "case.nii.gz", "--output_dir", "out"
    assert run(*args) == 1 and not serial
    assert "another run is active there with --up_axis auto --resolution 16 --norm" in capsys.readouterr().err
    assert run("--input", "in", "--output_dir", "out") == 0
    assert run(*args, "--components") == 0
    assert json.loads(Path("out/records/settings.json").read_text()) == [*theirs, ""]


def test_solid_is_said_of_volumes_alone(tmp_path, serial, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    write_scan(Path("in/case.nii"))
    export(Path("in/meshes"), 2)
    args = "--output_dir", "out", "--fill", "solid", "--input"
    assert run(*args, "in/case.nii", "in/meshes/0.off") == 0
    assert run(*args, "in") == 0 and run("--output_dir", "out", "--input", "in/meshes") == 0
    fills = {row["file"]: row["fill"] for row in table(Path("out/metadata.csv"))}
    assert fills == {"in/case.nii#1": "solid", "in/case.nii#2": "solid", "in/meshes/0.off": "", "in/meshes/1.off": ""}
    assert len(serial) == 3
    shutil.rmtree("out/records")
    assert run(*args, "in") == 0 and run("--output_dir", "out", "--input", "in") == 1


def test_an_array_is_one_object_and_turns_by_up_axis(tmp_path, serial, monkeypatch):
    monkeypatch.chdir(tmp_path)
    occupied = np.zeros((16, 16, 16), bool)
    occupied[:, 2:5, 3:11] = True
    np.save("array.npy", occupied)
    sha256 = hashlib.sha256(Path("array.npy").read_bytes()).hexdigest()
    for axis in ("auto", "y"):
        assert run("--input", "array.npy", "--output_dir", axis, "--up_axis", axis, "--fill", "solid") == 0
        [row] = table(Path(axis, "metadata.csv"))
        assert (row["file"], row["sha256"]) == ("array.npy", sha256)
        assert row["axis"] == ("keep" if axis == "auto" else "y")
        assert row["notes"] == (f"{meshes.UNKNOWN_AXIS}: taken as they are" if axis == "auto" else "")
        grid = points_to_occupancy(read_ply(Path(axis, "voxels", f"{sha256}.ply")), 16)[0].numpy().astype(bool)
        assert np.array_equal(grid, occupied if axis == "auto" else occupied.transpose(0, 2, 1)[:, ::-1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--labels", "totalsegmentator"], "--labels: there is no volume among the files"),
        (["--components"], "--components: there is no volume"),
        (["--fill", "solid"], "--fill: there is no volume"),
        (["--labels", "gone.json"], "gone.json: cannot be read"),
        (["--memory", "0"], "--memory 0.0: must lie between"),
    ],
)
def test_flags_that_go_with_nothing_are_one_error(flags, message, tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", *flags) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists() and not serial
