"""Mesh files to grids: what is read, which voxels are met, both normalizations, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BROKEN, ROOT, TEST_DATA, TETRAHEDRON, cells_met, needs_test_data, table, tetrahedron

trimesh = pytest.importorskip("trimesh")
open3d = pytest.importorskip("open3d")

from trellis.grids import meshes  # noqa: E402
from trellis.grids.placing import normalize_cube, turn_to_z_up  # noqa: E402
from trellis.grids.voxels import voxels_to_grid  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402

SAMPLE = TEST_DATA / "data" / "meshes_sample"


def grid_of(path: Path, resolution: int = 16, up_axis: str = "keep") -> np.ndarray:
    return voxels_to_grid(meshes.mesh_voxels(path, resolution, up_axis, "cube").voxels, resolution)


@pytest.mark.parametrize("shape", ["sphere", "box"])
def test_grid_equals_an_independent_reference(shape):
    if shape == "sphere":
        mesh = trimesh.creation.icosphere(subdivisions=2)
    else:
        mesh = trimesh.creation.box(extents=(1, 0.61, 0.37))
    # Turned, so that no face lies in the border of two voxels, where rounding decides.
    mesh.apply_transform(trimesh.transformations.euler_matrix(0.3, 0.7, 1.1))
    vertices = normalize_cube(mesh.vertices)
    assert np.allclose(np.ptp(vertices, axis=0).max(), 1) and np.allclose(vertices.max(0), -vertices.min(0))
    voxels = meshes.voxelize_mesh(vertices, mesh.faces, 16)
    assert np.array_equal(voxels, np.argwhere(cells_met(vertices, mesh.faces, 16)))  # the order too


@needs_test_data
@pytest.mark.parametrize(
    "name",
    [
        "myo_sim__l_femur.stl",
        "bullet3__000.obj",
        "trimesh__ballA.off",
        "trimesh__fixed_top.ply",
        "quaternius-showcase__CruiseShip.glb",
        "KayKit-City-Builder-Bits-1.0__car_taxi.obj",
    ],
)
def test_real_meshes_equal_published_grids(name, tmp_path):
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
    expected = grid_of(tmp_path / "mesh.off")
    for name in ("glb", "gltf", "obj", "ply", "STL", "dae"):
        assert np.array_equal(grid_of(tmp_path / f"mesh.{name}"), expected), name


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


def test_up_axis_y_becomes_z(tmp_path):
    mesh = tetrahedron().apply_transform(trimesh.transformations.euler_matrix(0.3, 0.7, 1.1))
    mesh.export(tmp_path / "mesh.off")
    kept = grid_of(tmp_path / "mesh.off")
    # x y z -> x -z y: the new y is the old z backwards, the new z the old y.
    assert np.array_equal(grid_of(tmp_path / "mesh.off", up_axis="y"), kept[:, :, ::-1].transpose(0, 2, 1))
    assert np.array_equal(grid_of(tmp_path / "mesh.off", up_axis="z"), kept)
    quarter = trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0))
    assert np.allclose(turn_to_z_up(mesh.vertices), trimesh.transform_points(mesh.vertices, quarter))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_mesh_is_refused_with_a_reason(name, tmp_path):
    content, reason = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        grid_of(tmp_path / name)


@pytest.mark.parametrize(
    "suffix, reason",
    [
        ("glb", "is cut off: its header says 2\\d+ bytes, and 2\\d+ are there"),
        ("ply", "its header counts 1280 rows .* it is cut"),
        ("stl", "its header counts 1280 triangles, .* it is cut"),
        ("off", "its header counts 642 vertices and 1280 faces, .* it is cut"),
        ("dae", "it is damaged or cut off"),
    ],
)
def test_truncated_mesh_is_refused(suffix, reason, tmp_path):
    path = tmp_path / f"mesh.{suffix}"
    trimesh.creation.icosphere().export(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=reason):
        grid_of(path)


def shapellm_reference(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    """ShapeLLM-Omni's grid, [R, R, R] bool: its points are turned by a rotation matrix, in coordinates."""
    points = (mesh.vertices - mesh.vertices.min()) / (mesh.vertices.max() - mesh.vertices.min()) - 0.5
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(points.clip(-0.5 + 1e-6, 0.5 - 1e-6)), open3d.utility.Vector3iVector(mesh.faces)
    )
    voxels = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, 1 / resolution, (-0.5, -0.5, -0.5), (0.5, 0.5, 0.5)
    ).get_voxels()
    centers = (np.array([voxel.grid_index for voxel in voxels]) + 0.5) / resolution - 0.5
    turned = (
        centers
        @ np.array([(1, 0, 0), (0, np.cos(np.pi / 2), -np.sin(np.pi / 2)), (0, np.sin(np.pi / 2), np.cos(np.pi / 2))]).T
    )
    grid = np.zeros((resolution,) * 3, dtype=bool)
    grid[tuple(np.floor((turned + 0.5) * resolution).astype(int).T)] = True
    return grid


@needs_test_data
@pytest.mark.parametrize(
    "name",
    [
        "myo_sim__l_femur.stl",
        "common-3d-test-models__spot.obj",
        "libigl-tutorial-data__camelhead.off",
        "trimesh__bunny.ply",
    ],
)
def test_shapellm_normalization_equals_a_reference_on_real_meshes(name):
    grid = meshes.mesh_to_grid(SAMPLE / name, 64, "y", "shapellm")[0].numpy()
    expected = shapellm_reference(trimesh.load(SAMPLE / name, force="mesh", process=False), 64)
    assert np.array_equal(grid, expected)
    assert not np.array_equal(grid, meshes.mesh_to_grid(SAMPLE / name, 64, "y", "cube")[0])


def test_shapellm_normalization_by_separating_axes(tmp_path):
    """Off the origin, so that one axis alone reaches each end of the cube; turned voxel by voxel."""
    mesh = tetrahedron().apply_transform(trimesh.transformations.euler_matrix(0.3, 0.7, 1.1))
    mesh.apply_translation((5, 1.5, -2)).export(tmp_path / "mesh.off")
    vertices, faces = meshes.load_mesh(tmp_path / "mesh.off")[:2]
    met = cells_met((vertices - vertices.min()) / np.ptp(vertices) - 0.5, faces, 16)
    expected = np.zeros_like(met)
    for i, j, k in np.argwhere(met):
        expected[i, 15 - k, j] = True
    grid = meshes.mesh_to_grid(tmp_path / "mesh.off", 16, "y", "shapellm")
    assert np.array_equal(grid[0].numpy(), expected)
    voxels = meshes.mesh_voxels(tmp_path / "mesh.off", 16, "y", "shapellm").voxels
    assert np.array_equal(voxels, np.argwhere(expected))  # the order too
    assert expected.any((1, 2))[15] and not expected.any((1, 2))[0]  # x is greatest, and in no way centered


@pytest.mark.parametrize(
    "up_axis, normalization",
    [("auto", "cube"), ("keep", "cube"), ("y", "cube"), ("z", "cube"), ("auto", "shapellm"), ("y", "shapellm")],
)
def test_mesh_to_grid_is_the_voxels_as_a_tensor(up_axis, normalization, tmp_path):
    tetrahedron().export(tmp_path / "mesh.stl")
    voxels = meshes.mesh_voxels(tmp_path / "mesh.stl", 16, up_axis, normalization).voxels
    grid = meshes.mesh_to_grid(tmp_path / "mesh.stl", 16, up_axis, normalization)
    assert torch.equal(grid[0], torch.from_numpy(voxels_to_grid(voxels, 16)))
    assert grid.dtype == torch.uint8 and grid.shape == (1, 16, 16, 16) and grid.sum() == len(voxels)


def test_mesh_to_grid_names_the_file_or_the_setting(tmp_path):
    (tmp_path / "empty.obj").touch()
    (tmp_path / "point.obj").write_bytes(BROKEN["speck.obj"][0])
    for name, reason in (("gone.obj", "No such file"), ("empty.obj", "0 bytes"), ("point.obj", "edge is 0")):
        with pytest.raises(DataError, match=f"{name}: .*{reason}"):
            meshes.mesh_to_grid(tmp_path / name, 16, "y", "shapellm")
    for up_axis, normalization, message in (
        ("keep", "shapellm", "up_axis 'keep': .*\"y\""),
        ("z", "shapellm", "up_axis 'z'"),
        ("x", "cube", "up_axis 'x'"),
        ("y", "box", "normalization 'box'"),
    ):
        with pytest.raises(ConfigError, match=message):
            meshes.mesh_to_grid(tmp_path / "empty.obj", 16, up_axis, normalization)


def test_a_missing_package_is_named(tmp_path):
    tetrahedron().export(tmp_path / "mesh.off")
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from trellis.grids.meshes import mesh_to_grid\nmesh_to_grid('mesh.off', 16)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert run.returncode == 1 and "ConfigError: a Python package is missing" in run.stderr
    assert "pip install numba" in run.stderr


@pytest.mark.parametrize(
    "suffix, up_axis, axis, note",
    [
        ("stl", "auto", "z", None),
        ("stl", "z", "z", None),
        ("stl", "keep", "keep", None),
        ("stl", "y", "y", "is of a format whose files are mostly z-up, but was taken as y-up"),
        ("glb", "auto", "y", None),
        ("glb", "z", "z", "says that y is up, but was taken as z-up"),
        ("obj", "y", "y", None),
        ("obj", "auto", "keep", "its format does not say which axis is up: taken as they are"),
    ],
)
def test_a_note_says_where_a_setting_and_a_format_differ(suffix, up_axis, axis, note, tmp_path):
    path = tmp_path / f"mesh.{suffix}"
    tetrahedron().export(path)
    made = meshes.mesh_voxels(path, 16, up_axis, "cube")
    assert made.axis == axis and made.notes == (() if note is None else (note,))
