"""The surface of a grid: what lies inside, where it lies, what smoothing does, and what files hold."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, solid_grids

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("skimage")

from trellis.grids import meshes  # noqa: E402
from trellis.grids.placing import turn_to_z_up  # noqa: E402
from trellis.grids.surface import SUFFIXES, save_mesh, surface_mesh  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402


def centers(resolution: int) -> np.ndarray:
    """The centers of all voxels, [R, R, R, 3] float64."""
    return np.moveaxis(np.indices((resolution,) * 3), 0, -1) / resolution + 0.5 / resolution - 0.5


def winding_numbers(mesh: trimesh.Trimesh, points: np.ndarray) -> np.ndarray:
    """How often the surface goes round each point [N, 3], by the solid angles of its triangles.

    Van Oosterom and Strackee, IEEE Trans. Biomed. Eng. 30 (1983), eq. 8. 1 inside a closed surface with outward
    normals, 0 outside; any hole, turned triangle or surface within another shows as another value.
    """
    total = np.zeros(len(points))
    for triangle in mesh.triangles:
        a, b, c = (corner - points for corner in triangle)
        la, lb, lc = (np.linalg.norm(side, axis=1) for side in (a, b, c))
        volume = (a * np.cross(b, c)).sum(1)
        total += np.arctan2(volume, la * lb * lc + (a * b).sum(1) * lc + (b * c).sum(1) * la + (c * a).sum(1) * lb)
    return total / (2 * np.pi)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.8, 1.0])
def test_exactly_the_centers_of_occupied_voxels_lie_inside(share):
    """Of any grid, also where voxels touch at edges and corners only, and at the border of the cube."""
    grid = np.random.default_rng(int(100 * share)).random((7, 7, 7)) < share
    mesh = surface_mesh(grid, smooth=False)
    winding = winding_numbers(mesh, centers(7).reshape(-1, 3)).reshape(grid.shape)
    assert np.abs(winding - grid).max() < 1e-9
    assert mesh.is_watertight and mesh.volume > 0


def test_solid_and_hollow_shapes_enclose_their_cells():
    for grid in solid_grids(2, 12, seed=3):
        mesh = surface_mesh(grid, smooth=False)
        assert np.abs(winding_numbers(mesh, centers(12).reshape(-1, 3)).reshape(grid.shape) - grid).max() < 1e-9


def test_a_cell_is_at_its_place():
    grid = np.zeros((8, 8, 8), dtype=np.uint8)
    grid[0, 3, 7] = 1
    mesh = surface_mesh(grid, smooth=False)
    expected = np.array([(0.5, 3.5, 7.5)] * 6) + 0.5 * np.array([*np.eye(3), *-np.eye(3)])  # halfway to each neighbor
    assert sorted(mesh.vertices.tolist()) == sorted((expected / 8 - 0.5).tolist())
    assert np.array_equal(surface_mesh(grid * -2.0 + 1.0, smooth=False).bounds, [[-0.5] * 3, [0.5] * 3])  # logits


def test_normals_point_outwards():
    grid = np.linalg.norm(centers(16), axis=-1) < 0.4
    for smooth in (False, True):
        mesh = surface_mesh(grid, smooth)
        outwards = mesh.triangles_center / np.linalg.norm(mesh.triangles_center, axis=1, keepdims=True)
        assert (mesh.face_normals * outwards).sum(1).min() > 0.5


def test_smoothing_makes_a_ball_rounder_at_the_same_volume():
    grid = np.linalg.norm(centers(32), axis=-1) < 0.4
    rough, smooth = surface_mesh(grid, smooth=False), surface_mesh(grid)
    assert np.array_equal(smooth.faces, rough.faces) and smooth.is_watertight
    assert smooth.volume == pytest.approx(rough.volume, rel=2e-3)
    spread, before = (np.linalg.norm(mesh.vertices, axis=1).std() * 32 for mesh in (smooth, rough))
    assert spread < 0.7 * before
    bend, before = (np.sqrt((mesh.face_adjacency_angles**2).mean()) for mesh in (smooth, rough))
    assert bend < before / 2


def test_smoothing_stays_in_the_cube():
    mesh = surface_mesh(np.ones((12, 12, 12), dtype=bool))
    assert np.abs(mesh.vertices).max() == 0.5 and mesh.is_watertight and mesh.volume > 0.95


def corners(mesh: trimesh.Trimesh) -> list:
    """The triangles' corners in float32, as sorted lists: formats keep neither the order nor shared vertices."""
    return sorted(mesh.triangles.astype(np.float32).reshape(-1, 9).tolist())


@pytest.mark.parametrize("to_y_up", [False, True])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".STL"])
def test_files_hold_the_mesh(suffix, to_y_up, tmp_path):
    mesh = surface_mesh(solid_grids(1, 16, seed=5)[0])
    path = tmp_path / f"mesh{suffix}"
    path.write_bytes(b"of an earlier run")
    before = mesh.copy()
    save_mesh(mesh, str(path), to_y_up)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    vertices, faces, *_ = meshes.load_mesh(path)
    read = trimesh.Trimesh(turn_to_z_up(vertices) if to_y_up else vertices, faces, process=False)
    assert np.array_equal(mesh.vertices, before.vertices)  # the caller's mesh is not turned
    if suffix == ".obj":  # as text, with eight digits
        assert np.array_equal(read.faces, mesh.faces)
        assert np.abs(read.vertices - mesh.vertices).max() < 1e-8
    else:
        assert corners(read) == corners(mesh)


def test_voxelizing_a_saved_mesh_with_its_up_axis_finds_the_same_voxels(tmp_path):
    pytest.importorskip("numba")
    grid = np.linalg.norm(centers(24) * (1.1, 1.7, 2.9) - 0.1, axis=-1) < 0.42
    mesh = surface_mesh(grid)
    save_mesh(mesh, tmp_path / "mesh.glb", to_y_up=True)
    save_mesh(mesh, tmp_path / "mesh.ply", to_y_up=False)
    found = meshes.mesh_to_grid(tmp_path / "mesh.glb", 32, up_axis="y").numpy()
    assert np.array_equal(found, meshes.mesh_to_grid(tmp_path / "mesh.ply", 32, up_axis="z").numpy())
    assert not np.array_equal(found, meshes.mesh_to_grid(tmp_path / "mesh.glb", 32, up_axis="keep").numpy())


def test_a_glb_has_outward_normals_and_is_no_metal(tmp_path):
    save_mesh(surface_mesh(np.linalg.norm(centers(16), axis=-1) < 0.4), tmp_path / "ball.glb", to_y_up=True)
    [read] = trimesh.load_scene(tmp_path / "ball.glb", process=False).geometry.values()
    assert "vertex_normals" in read._cache  # as the file has them, not computed
    assert (read.vertex_normals * read.vertices).sum(1).min() > 0.3
    assert read.visual.material.metallicFactor == 0


def test_what_cannot_be_written_is_refused(tmp_path):
    mesh = surface_mesh(np.ones((2, 2, 2)))
    for name in ("mesh.fbx", "mesh"):
        with pytest.raises(ConfigError, match=f"{name}: a mesh is written as .glb, .obj, .ply, .stl"):
            save_mesh(mesh, tmp_path / name, to_y_up=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no occupied voxel"):
        surface_mesh(np.zeros((4, 4, 4), dtype=bool))
    with pytest.raises(ValueError, match=r"\[R, R, R\], not \[1, 4, 4, 4\]"):
        surface_mesh(np.ones((1, 4, 4, 4), dtype=bool))


@pytest.mark.parametrize("package", ["skimage", "trimesh"])
def test_a_missing_package_is_named(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None\nimport numpy\n"
        "from trellis.grids.surface import surface_mesh\nsurface_mesh(numpy.ones((2, 2, 2)))"
    )
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert run.returncode == 1 and "pip install scikit-image trimesh" in run.stderr
