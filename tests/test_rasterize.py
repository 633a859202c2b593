"""Triangles to voxels: equal to geometry in exact fractions, and to Open3D bit for bit."""

import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from helpers import ROOT, TEST_DATA, needs_test_data

from trellis.grids import rasterize
from trellis.grids.rasterize import HALF, voxelize_mesh
from trellis.utils.errors import ConfigError, DataError

numba = pytest.importorskip("numba")

SAMPLE = TEST_DATA / "data" / "meshes_sample"
RESOLUTIONS = (16, 31, 32, 33, 48, 64, 65, 100, 127, 128, 256)


def triangles(count: int) -> np.ndarray:
    return np.arange(3 * count).reshape(count, 3)


def snapped(points: np.ndarray, parts: int) -> np.ndarray:
    """Move points to the nearest multiples of 1 / parts from the cube's corner."""
    return np.round((points + 0.5) * parts) / parts - 0.5


# --- kinds of triangles: vertices [3 F, 3] ---


def anywhere(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    return rng.random((3 * count, 3)) - 0.5


def small(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    corners = np.repeat(rng.random((count, 3)) - 0.5, 3, axis=0)
    return corners + (rng.random((3 * count, 3)) - 0.5) * 10.0 ** rng.uniform(-4, -0.5)


def in_corners(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    return snapped(anywhere(rng, resolution, count), resolution)


def in_corners_and_centers(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    return snapped(anywhere(rng, resolution, count), 2 * resolution)


def beside_corners(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    """One or two steps of float64 from the corners of voxels."""
    points = in_corners(rng, resolution, count)
    for _ in range(2):
        points = np.nextafter(points, points + rng.choice([-1, 0, 1], points.shape))
    return points


def in_borders(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    """Triangles of one plane each, which is a border of voxels."""
    points, axis = anywhere(rng, resolution, count), rng.integers(3)
    points[:, axis] = np.repeat(snapped(points[::3, axis], resolution), 3)
    return points


def in_the_cubes_faces(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    points = np.clip(1.5 * anywhere(rng, resolution, count), -0.5, 0.5)
    points[:, rng.integers(3)] = np.repeat(rng.choice([-0.5, 0.5], count), 3)
    return points


def needles(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    points = anywhere(rng, resolution, count)
    points[1::3] = points[::3] + (rng.random((count, 3)) - 0.5) * 10.0 ** rng.uniform(-17, -4)
    return points


def segments_and_points(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    points, along = anywhere(rng, resolution, count), rng.random((count, 1))
    points[2::3] = points[::3] * (1 - along) + points[1::3] * along
    points[1::6] = points[::6]
    points[:3] = points[0]
    return points


def steep(rng: np.random.Generator, resolution: int, count: int) -> np.ndarray:
    """Planes with a z component of the normal about the limit below which a column is searched whole."""
    points = anywhere(rng, resolution, count)
    points[2::3] = points[::3] + [0, 0, 0.4] + (rng.random((count, 3)) - 0.5) * 10.0 ** rng.uniform(-5, -2)
    return points


KINDS = (
    anywhere,
    small,
    in_corners,
    in_corners_and_centers,
    beside_corners,
    in_borders,
    in_the_cubes_faces,
    needles,
    segments_and_points,
    steep,
)


# --- the reference: geometry in exact fractions ---


def meets(triangle: list[list[Fraction]], box: list[tuple[Fraction, Fraction]]) -> bool:
    """Whether a triangle meets a closed box: something is left of it when cut off at the six planes."""
    polygon = triangle
    for axis, (low, high) in enumerate(box):
        for sign, bound in ((1, low), (-1, -high)):
            kept = []
            for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
                before, after = sign * p[axis] - bound, sign * q[axis] - bound
                if before >= 0:
                    kept.append(p)
                if before * after < 0:
                    share = before / (before - after)
                    kept.append([a + share * (b - a) for a, b in zip(p, q, strict=True)])
            polygon = kept
    return bool(polygon)


def exact_voxels(vertices: np.ndarray, resolution: int) -> list[list[int]]:
    """Voxels that triangles meet; along each axis none below the one whose half-open range has the least coordinate."""
    found = set()
    for corners in vertices.reshape(-1, 3, 3):
        triangle = [[(Fraction(x) + Fraction(1, 2)) * resolution for x in point] for point in corners.tolist()]
        ranges = [range(math.floor(min(axis)), math.floor(max(axis)) + 1) for axis in zip(*triangle, strict=True)]
        for voxel in itertools.product(*ranges):
            if meets(triangle, [(Fraction(i), Fraction(i + 1)) for i in voxel]):
                found.add(voxel)
    return sorted(map(list, found))


@pytest.mark.parametrize("extent", [2, 16], ids=["small", "large"])
def test_voxels_are_those_of_exact_geometry(extent):
    """Coordinates are multiples of a quarter of a voxel at 16³, so float64 rounds nothing and borders are met often."""
    rng = np.random.default_rng(extent)
    for _ in range(60 if extent == 2 else 6):
        corner = rng.integers(1, 66 - 4 * extent, 3)
        points = corner + rng.integers(0, 4 * extent - 1, (3, 3))
        if rng.random() < 0.3:  # in a plane along two axes
            points[:, rng.integers(3)] = rng.integers(1, 63)
        vertices = points / 64 - 0.5
        assert np.abs(vertices).max() <= HALF
        assert voxelize_mesh(vertices, triangles(1), 16).tolist() == exact_voxels(vertices, 16)


@pytest.mark.parametrize("points", [[[10, 20, 30]] * 3, [[3, 5, 7], [59, 40, 21], [3, 5, 7]]], ids=["point", "segment"])
def test_triangles_without_area_are_met(points):
    vertices = np.array(points) / 64 - 0.5
    assert voxelize_mesh(vertices, triangles(1), 16).tolist() == exact_voxels(vertices, 16)


def test_a_face_between_two_voxels_belongs_to_the_upper():
    corners = np.array([[0.25, 0, 0], [0.25, 0.2, 0], [0.25, 0, 0.2]])
    assert set(voxelize_mesh(corners, triangles(1), 8)[:, 0]) == {6}
    assert set(voxelize_mesh(-corners, triangles(1), 8)[:, 0]) == {2}


def test_faces_of_the_cube_lie_in_its_outer_voxels():
    corners = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    quads = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    faces = np.array([triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))])
    shell = [v for v in itertools.product(range(11), repeat=3) if {0, 10} & set(v)]
    assert voxelize_mesh(corners, faces, 11).tolist() == list(map(list, shell))
    assert np.array_equal(voxelize_mesh(3 * corners, faces, 11), voxelize_mesh(corners, faces, 11))  # clipped


# --- Open3D ---


def open3d_voxels(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    open3d = pytest.importorskip("open3d")
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(np.clip(vertices, -HALF, HALF)), open3d.utility.Vector3iVector(faces)
    )
    grid = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, voxel_size=1 / resolution, min_bound=(-0.5,) * 3, max_bound=(0.5,) * 3
    )
    voxels = np.array([voxel.grid_index for voxel in grid.get_voxels()], dtype=np.int64).reshape(-1, 3)
    return voxels[np.lexsort(voxels.T[::-1])]


@pytest.mark.parametrize("kind", KINDS)
def test_voxels_are_open3ds(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(3):
        for resolution in RESOLUTIONS:
            count = 2 + 3000 // resolution**2 * 4
            vertices = kind(rng, resolution, count)
            ours = voxelize_mesh(vertices, triangles(count), resolution)
            assert np.array_equal(ours, open3d_voxels(vertices, triangles(count), resolution)), resolution


@needs_test_data
def test_voxels_of_real_meshes_are_open3ds():
    pytest.importorskip("trimesh")
    from trellis.grids import meshes, placing

    paths = [path for path in sorted(SAMPLE.iterdir()) if path.suffix.lower() in meshes.MESH_SUFFIXES]
    assert paths
    for path in paths:
        vertices, faces = meshes.load_mesh(path)[:2]
        vertices = placing.normalize_cube(np.asarray(vertices, dtype=np.float64))
        assert np.array_equal(voxelize_mesh(vertices, faces, 64), open3d_voxels(vertices, faces, 64)), path.name


# --- the function ---


def test_the_voxels_of_a_mesh_are_those_of_its_triangles_in_order():
    rng = np.random.default_rng(0)
    vertices, faces = rng.random((30, 3)) - 0.5, rng.integers(0, 30, (40, 3))
    voxels = voxelize_mesh(vertices, faces, 20)
    assert voxels.dtype == np.int64
    single = np.concatenate([voxelize_mesh(vertices, face[None], 20) for face in faces])
    assert np.array_equal(voxels, np.unique(single, axis=0))  # sorted by x, then y, then z
    assert np.array_equal(voxels, voxelize_mesh(vertices, faces[::-1], 20))


@pytest.mark.parametrize("faces", [np.empty((0, 3), np.int64), np.empty((0, 3), np.int32)])
@pytest.mark.parametrize("count", [0, 5])
def test_no_triangle_gives_no_voxel(faces, count):
    assert voxelize_mesh(np.zeros((count, 3)), faces, 16).shape == (0, 3)


def test_any_layout_of_arrays_gives_the_same_voxels_and_is_left_alone():
    rng = np.random.default_rng(0)
    vertices, faces = (rng.random((30, 3)) - 0.5).astype(np.float32).astype(np.float64), rng.integers(0, 30, (40, 3))
    expected = voxelize_mesh(vertices, faces, 20)
    fixed_vertices, fixed_faces = vertices * 2, faces.astype(np.uint32)
    for array in (fixed_vertices, fixed_faces):
        array.flags.writeable = False
    for some_vertices, some_faces in (
        (vertices.astype(np.float32), faces.astype(np.int32)),
        (np.asfortranarray(vertices), np.asfortranarray(faces)),
        (np.repeat(vertices, 2, axis=0)[::2], np.repeat(faces, 2, axis=1)[:, ::2]),
        (vertices.tolist(), faces.tolist()),
    ):
        assert np.array_equal(voxelize_mesh(some_vertices, some_faces, 20), expected)
    assert np.array_equal(voxelize_mesh(fixed_vertices / 2, fixed_faces, 20), expected)
    assert np.array_equal(fixed_vertices, vertices * 2) and np.array_equal(fixed_faces, faces)
    voxelize_mesh(fixed_vertices, fixed_faces, 20)  # clipped in a copy


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vertex_that_is_not_finite_is_refused(value):
    vertices = np.zeros((4, 3))
    vertices[3, 1] = value  # no triangle uses it
    with pytest.raises(ValueError, match="a vertex is not finite"):
        voxelize_mesh(vertices, triangles(1), 16)


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(ValueError, match=rf"the triangles use vertices {min(index, 0)} to {max(index, 1)} of 3"):
        voxelize_mesh(np.zeros((3, 3)), np.array([[0, 1, index]]), 16)


# --- compiled code ---


@pytest.fixture
def fresh():
    rasterize.load_kernels.cache_clear()
    yield
    rasterize.load_kernels.cache_clear()


def test_a_missing_numba_is_named(monkeypatch, fresh):
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ConfigError, match=r"a Python package is missing .*numba.*: pip install numba"):
        voxelize_mesh(np.zeros((3, 3)), triangles(1), 16)


@pytest.mark.parametrize("error", [RuntimeError("no locator available"), OSError(28, "No space left"), EOFError()])
def test_code_that_cannot_be_kept_isload_kernels_anyhow(monkeypatch, fresh, error):
    """Plain Python stands for the code compiled then, and gives the same voxels."""
    vertices = anywhere(np.random.default_rng(0), 16, 2)
    expected = voxelize_mesh(vertices, triangles(2), 16)
    rasterize.load_kernels.cache_clear()

    def njit(signature, cache=False):
        if cache:
            raise error
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    assert np.array_equal(voxelize_mesh(vertices, triangles(2), 16), expected)


def test_kept_code_that_is_damaged_isload_kernels_again(tmp_path):
    code = """
import numpy as np
from trellis.grids.rasterize import voxelize_mesh
print(voxelize_mesh(np.zeros((3, 3)), np.array([[0, 1, 2]]), 16).tolist())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "[[8, 8, 8]]\n"), done.stderr
        kept = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(kept) == 4  # an index and the code of each function
        for path in kept:
            path.write_bytes(path.read_bytes()[:10])


# --- the benchmark ---


def test_the_benchmark_counts_what_it_measured(tmp_path, capsys):
    trimesh = pytest.importorskip("trimesh")
    from benchmarks import meshes

    source, output = tmp_path / "meshes", tmp_path / "result.md"
    source.mkdir()
    for name in ("a.off", "b.off", "c.STL"):
        trimesh.creation.icosphere(subdivisions=1).export(source / name)
    (source / "broken.ply").write_bytes(b"")
    (source / "notes.txt").write_text("no mesh")
    meshes.main(["--meshes", str(source), "--resolutions", "16", "8", "--repeats", "1", "--output", str(output)])
    assert capsys.readouterr().out.strip() == output.read_text().strip()
    content = json.loads(output.with_suffix(".json").read_text())
    assert content["work"] == {"resolution": 16, "meshes": 3} and "broken.ply" in content["notes"][1]
    rows, stages, formats = (
        [dict(zip((column["name"] for column in table["columns"]), row, strict=True)) for row in table["rows"]]
        for table in content["tables"]
    )
    assert [row["resolution"] for row in rows] == [16, 8] and {row["equal"] for row in rows} <= {1, None}
    for row in rows:
        if row["plain ms"] is not None:
            assert row["plain ms"] == pytest.approx(row["plain: make grid, ms"] + row["plain: read out, ms"])
            assert row["ratio to plain"] == pytest.approx(row["plain ms"] / row["ms"])
            assert row["least ratio"] <= row["ratio to plain"] * (1 + 1e-9)
    assert [row["stage"] for row in stages] == ["hash", "load", "place", "rasterize", "write"]
    assert sum(row["share"] for row in stages) == pytest.approx(1)
    assert {row["format"]: (row["files"], row["triangles"]) for row in formats} == {".off": (2, 160), ".stl": (1, 80)}
    assert sum(row["share of load"] for row in formats) == pytest.approx(1)


def test_the_benchmark_refuses_a_folder_without_meshes(tmp_path):
    pytest.importorskip("trimesh")
    from benchmarks import meshes

    with pytest.raises(DataError, match="has no mesh that can be voxelized"):
        meshes.main(["--meshes", str(tmp_path)])
