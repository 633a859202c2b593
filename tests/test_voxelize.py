"""Meshes to voxel grids: the grids, what is left out and why, ranks, resuming, TRELLIS's folders."""

import csv
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

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("open3d")

from dataset_toolkits import build_metadata, common, meshes, voxelize  # noqa: E402
from trellis.datasets.voxels import points_to_occupancy, read_ply  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402

ROOT = Path(__file__).parents[1]
SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "meshes_sample"
TETRAHEDRON = (np.array([(0, 0, 0), (4, 0, 0), (0, 2, 0), (1, 0.5, 3)]),
               np.array([(0, 2, 1), (0, 1, 3), (1, 2, 3), (2, 0, 3)]))


def tetrahedron(scale: float = 1.0) -> trimesh.Trimesh:
    """Coordinates are short in binary, so that every format stores them exactly."""
    return trimesh.Trimesh(TETRAHEDRON[0] * (1, 1, scale), TETRAHEDRON[1], process=False)


def grid_of(path: Path, resolution: int = 16, up_axis: str = "keep", normalized: bool = False) -> np.ndarray:
    target = path.parent / "grid.tmp.ply"
    count = meshes.voxelize_file(path, target, resolution, up_axis, normalized)
    grid = points_to_occupancy(read_ply(target), resolution)[0].numpy()
    target.unlink()
    assert grid.sum() == count
    return grid


def cells_met(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Reference: [R, R, R] bool by separating axes of every triangle and every cell, all in float64."""
    centres = (np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5
               ) / resolution - 0.5
    half = 0.5 / resolution
    met = np.zeros(len(centres), dtype=bool)
    for triangle in np.clip(vertices, -0.5 + 1e-6, 0.5 - 1e-6)[faces]:
        edges = np.roll(triangle, -1, axis=0) - triangle
        axes = [*np.eye(3), np.cross(edges[0], edges[1]), *np.cross(np.eye(3)[:, None], edges).reshape(-1, 3)]
        apart = np.zeros(len(centres), dtype=bool)
        for axis in axes:
            corners = triangle @ axis - (centres @ axis)[:, None]
            reach = half * np.abs(axis).sum()
            apart |= (corners.min(axis=1) > reach) | (corners.max(axis=1) < -reach)
        met |= ~apart
    return met.reshape((resolution,) * 3)


@pytest.fixture
def serial(monkeypatch):
    """Voxelise in this process, which saves the start of workers; returns the paths that were worked on."""
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


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))


def export(folder: Path, count: int) -> dict[str, Path]:
    """Write different tetrahedra; returns {sha256: path}."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        tetrahedron(1 + i / 4).export(folder / f"{i}.off")
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.off"))}


@pytest.mark.parametrize("shape", ["sphere", "box"])
def test_grid_equals_an_independent_reference(shape):
    if shape == "sphere":
        mesh = trimesh.creation.icosphere(subdivisions=2)
    else:
        mesh = trimesh.creation.box(extents=(1, 0.61, 0.37))
    # Turned, so that no face lies in the border of two cells, where rounding decides.
    mesh.apply_transform(trimesh.transformations.euler_matrix(0.3, 0.7, 1.1))
    vertices = meshes.normalize(mesh.vertices)
    assert np.allclose(np.ptp(vertices, axis=0).max(), 1) and np.allclose(vertices.max(0), -vertices.min(0))
    cells = meshes.voxelize_mesh(vertices, mesh.faces, 16)
    assert np.array_equal(cells, np.argwhere(cells_met(vertices, mesh.faces, 16)))  # the order too


@pytest.mark.parametrize("name", ["myo_sim__l_femur.stl", "bullet3__000.obj", "trimesh__ballA.off",
                                  "trimesh__fixed_top.ply", "quaternius-showcase__CruiseShip.glb",
                                  "KayKit-City-Builder-Bits-1.0__car_taxi.obj"])
def test_real_meshes_equal_published_grids(name, tmp_path):
    if not SAMPLE.exists():
        pytest.skip("no sample meshes here")
    row = next(row for row in table(SAMPLE / "SOURCES.csv") if row["file"] == name)
    shutil.copy(SAMPLE / name, tmp_path)
    grid = grid_of(tmp_path / name, 64)
    assert grid.sum() == int(row["occupied_voxels"])
    packed = np.load(SAMPLE.parent / f"voxels64_{row['split']}.npz")
    index = list(packed["name"]).index(f"{row['repo']}/{row['path']}")
    assert np.array_equal(np.packbits(grid), packed["bits"][index])


def test_all_formats_give_the_same_grid(tmp_path):
    for suffix in ("glb", "obj", "ply", "stl", "off", "dae"):
        tetrahedron().export(tmp_path / f"mesh.{suffix}")
    (tmp_path / "mesh.stl").rename(tmp_path / "mesh.STL")
    for name, content in trimesh.Scene(tetrahedron()).export(file_type="gltf").items():
        (tmp_path / name.replace("model", "mesh")).write_bytes(content)
    found = common.find_meshes([tmp_path], exclude=tmp_path / "voxels")
    assert {path.suffix.lower() for path in found.values()} == set(common.MESH_SUFFIXES)
    expected = grid_of(tmp_path / "mesh.off")
    for path in found.values():
        assert np.array_equal(grid_of(path), expected), path


def test_nodes_are_placed_and_unused_vertices_ignored(tmp_path):
    far = trimesh.Trimesh([*TETRAHEDRON[0], (np.nan, 0, 0), (100, 0, 0)], TETRAHEDRON[1], process=False)
    scene = trimesh.Scene()
    for x, turn in ((0, 0), (8, np.pi / 2)):
        transform = trimesh.transformations.rotation_matrix(turn, (0, 0, 1)).round(9)
        transform[0, 3] = x
        scene.add_geometry(far, transform=transform)
    scene.export(tmp_path / "scene.glb")
    turned = TETRAHEDRON[0] @ np.array([(0, 1, 0), (-1, 0, 0), (0, 0, 1)]) + (8, 0, 0)
    both = trimesh.Trimesh([*TETRAHEDRON[0], *turned], [*TETRAHEDRON[1], *TETRAHEDRON[1] + 4], process=False)
    both.export(tmp_path / "both.off")
    assert np.array_equal(grid_of(tmp_path / "scene.glb"), grid_of(tmp_path / "both.off"))


def test_up_axis_y_becomes_z(tmp_path, serial):
    mesh = tetrahedron().apply_transform(trimesh.transformations.euler_matrix(0.3, 0.7, 1.1))
    mesh.export(tmp_path / "mesh.off")
    kept = grid_of(tmp_path / "mesh.off")
    # x y z -> x -z y: the new y is the old z backwards, the new z the old y.
    assert np.array_equal(grid_of(tmp_path / "mesh.off", up_axis="y"), kept[:, :, ::-1].transpose(0, 2, 1))
    assert np.array_equal(grid_of(tmp_path / "mesh.off", up_axis="z"), kept)
    assert run("--input", tmp_path, "--output_dir", tmp_path / "out", "--up_axis", "y") == 0
    assert table(tmp_path / "out" / "metadata.csv")[0]["up_axis"] == "y"


def test_grids_below_the_input_are_not_taken_for_meshes(tmp_path, serial, capsys):
    export(tmp_path, 2)
    (tmp_path / "loop").symlink_to(tmp_path)
    for _ in range(2):
        assert run("--input", tmp_path, tmp_path / "0.off", "--output_dir", tmp_path / "out") == 0
        assert ": 2 meshes: " in capsys.readouterr().out
    assert not (tmp_path / "out" / "failed.csv").exists() and len(serial) == 2


def test_unloadable_open3d_names_the_packages(tmp_path, monkeypatch):
    (tmp_path / "open3d.py").write_text("raise OSError('libusb-1.0.so.0: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open3d")
    with pytest.raises(ConfigError, match="apt-get install libusb-1.0-0 libgl1 libgomp1"):
        meshes.require_open3d()


def test_other_settings_are_refused(tmp_path, serial, capsys):
    export(tmp_path / "in", 1)
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out") == 0
    before = (tmp_path / "out" / "metadata.csv").read_bytes()
    assert run("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--up_axis", "z") == 1
    error = capsys.readouterr().err
    assert "--up_axis keep --resolution 16 and --up_axis z --resolution 16" in error
    assert (tmp_path / "out" / "metadata.csv").read_bytes() == before and len(serial) == 1


BROKEN = {
    "nan.obj": (b"v 0 0 0\nv 1 0 0\nv 0 nan 1\nf 1 2 3\n", "not finite"),
    "points.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no triangles"),
    "nothing.stl": (b"", "0 bytes"),
    "speck.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "longest edge is 0"),
    "astray.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "face index outside"),
    "astray.ply": (b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
                   b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
                   b"0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "0 to 7 of 3"),
    "text.glb": (b"this is no mesh", "cannot be read"),
    "draco.gltf": (b'{"asset": {"version": "2.0"}, "extensionsRequired": ["EXT_meshopt_compression"]}',
                   "without compression"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_mesh_is_refused_with_a_reason(name, tmp_path):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        meshes.voxelize_file(tmp_path / name, tmp_path / "grid.ply", 16, "keep", False)
    assert not (tmp_path / "grid.ply").exists()


@pytest.mark.parametrize("suffix, reason", [("glb", "cannot be read"), ("ply", "cannot be read"),
                                            ("stl", "no triangles")])
def test_truncated_mesh_is_refused(suffix, reason, tmp_path):
    path = tmp_path / f"mesh.{suffix}"
    trimesh.creation.icosphere().export(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=reason):
        grid_of(path)


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
    rows.append({**dict.fromkeys(rows[0], ""), "sha256": "f" * 64, "caption": "not voxelised yet"})
    common.write_table(metadata, rows[0], rows)
    (tmp_path / "out" / "voxels" / f"{shas[1]}.ply").unlink()

    serial.clear()
    assert run(*args, "--split", "train") == 0
    assert serial == [tmp_path / "in" / "1.off"]  # only the grid that was gone
    assert "1 of those done already belong to another split" in capsys.readouterr().out
    after = {row["sha256"]: row for row in table(metadata)}
    assert len(after) == 4 and after["f" * 64]["voxelized"] == "False"
    assert after["f" * 64]["caption"] == "not voxelised yet"
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
    tetrahedron().export(root / "renders" / shas[1] / "mesh.ply")  # not normalised
    (root / "metadata.csv").write_text("sha256,aesthetic_score,rendered\n"
                                       + "".join(f"{sha},7.25,True\n" for sha in shas))
    assert run("--input", root) == 0
    rows = table(root / "metadata.csv")
    assert [row["sha256"] for row in rows] == shas
    assert [(row["aesthetic_score"], row["rendered"]) for row in rows] == [("7.25", "True")] * 3
    assert [row["voxelized"] for row in rows] == ["True", "False", "False"] and rows[0]["up_axis"] == "z"
    grid = points_to_occupancy(read_ply(root / "voxels" / f"{shas[0]}.ply"), 16)[0].numpy()
    assert np.array_equal(grid, cells_met(small.vertices, small.faces, 16))
    assert grid.sum() == int(rows[0]["num_voxels"])
    reasons = [row["reason"] for row in table(root / "failed.csv")]
    assert "not normalised" in reasons[0] and "not there" in reasons[1]
    assert run("--input", root, "--up_axis", "y") == 1 and "z-up" in capsys.readouterr().err

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


@pytest.mark.parametrize("args, message", [
    (["--input", "missing"], "missing: no such file or folder"),
    (["--input", "empty"], "empty: no .glb"),
    (["--input", "note.txt"], "note.txt: is not one of .glb"),
    (["--input", "bad"], "none of the 1 meshes could be voxelised"),
    (["--input", "bad", "--rank", "2", "--world_size", "2"], "--rank 2 --world_size 2"),
    (["--input", "bad", "--resolution", "0"], "--resolution 0"),
])
def test_wrong_input_is_one_error(args, message, tmp_path, monkeypatch, serial, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "nan.obj").write_bytes(BROKEN["nan.obj"][0])
    assert voxelize.main([*args, "--output_dir", "out"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("content, message", [
    ("name\nx\n", "no column sha256"),
    ("sha256,file\n" + "a" * 64 + "\n", "line 2"),
    ("sha256\n" + 2 * ("a" * 64 + "\n"), "given twice"),
    ("sha256\n../../x\n", "not a hash"),
])
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
    command = [sys.executable, str(ROOT / "dataset_toolkits" / "voxelize.py"), "--input", "in",
               "--output_dir", "out", "--max_workers", "1"]
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
