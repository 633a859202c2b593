"""Voxel files: what is written is read back voxel for voxel, and nothing damaged is read at all."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch

from trellis.grids.voxels import (
    occupancy_to_points,
    pack_bits,
    points_to_occupancy,
    read_ply,
    unpack_bits,
    unpack_bits_on_device,
    voxel_centers,
    write_ply,
)
from trellis.utils.errors import DataError


def all_voxels(resolution: int) -> np.ndarray:
    return np.stack(np.unravel_index(np.arange(resolution**3), (resolution,) * 3), axis=1)


@pytest.mark.parametrize("resolution", [6, 64])
def test_a_written_grid_is_read_back_voxel_for_voxel(tmp_path, resolution):
    grid = np.random.default_rng(0).random((resolution,) * 3) < 0.3
    grid[0, 0, 0] = grid[-1, -1, -1] = grid[0, -1, 0] = True  # corners of the cube
    write_ply(tmp_path / "grid.ply", occupancy_to_points(grid))
    read = points_to_occupancy(read_ply(tmp_path / "grid.ply"), resolution)
    assert read.dtype == torch.uint8 and read.shape == (1, resolution, resolution, resolution)
    assert np.array_equal(read[0].numpy(), grid)


def test_each_voxel_alone_is_marked_where_it_is():
    voxels = all_voxels(6)
    grids = torch.stack([points_to_occupancy(center[None], 6) for center in voxel_centers(voxels, 6)])
    assert torch.equal(grids.view(216, 216), torch.eye(216, dtype=torch.uint8))


@pytest.mark.parametrize("resolution", [64, 100, 256])
def test_float32_centers_of_every_slice_are_within_the_tolerance(resolution):
    indices = np.repeat(np.arange(resolution)[:, None], 3, axis=1)
    centers = voxel_centers(indices, resolution)
    assert centers.dtype == np.float32
    assert np.array_equal(points_to_occupancy(centers, resolution)[0].nonzero().numpy(), indices)


def test_points_up_to_the_tolerance_are_taken_and_none_beyond():
    center, size = voxel_centers(np.array([[3, 0, 7]]), 8).astype(float), 1 / 8
    for axis in range(3):
        for sign in (-1, 1):
            shift = np.eye(3)[axis] * sign * size
            assert points_to_occupancy(center + 0.9e-3 * shift, 8)[0, 3, 0, 7] == 1
            with pytest.raises(DataError, match="grid.ply: point 0 is .*not the center.*rerun voxelize"):
                points_to_occupancy(center + 1.1e-3 * shift, 8, name="grid.ply")


@pytest.mark.parametrize("value", [0.5, 0.5000001, -0.50000003, 1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_points_outside_the_cube_are_refused_by_number_and_value(value, axis):
    points = voxel_centers(all_voxels(4), 4).astype(float)
    points[17, axis] = value
    with pytest.raises(DataError, match=r"grid.ply: point 17 is .*in \[-0.5, 0.5\).*voxelize") as error:
        points_to_occupancy(points, 4, name="grid.ply")
    assert f"{value:.7g}" in str(error.value)


def test_the_lower_border_is_inside_but_no_center():
    with pytest.raises(DataError, match="not the center of a voxel"):
        points_to_occupancy(np.array([[-0.5, 0.25, 0.25]]), 2)


@pytest.mark.parametrize("made, read", [(32, 64), (64, 32), (256, 16), (16, 100)])
def test_points_of_another_resolution_say_which(made, read):
    points = voxel_centers(np.random.default_rng(1).integers(0, made, (50, 3)), made)
    with pytest.raises(DataError, match=f"at resolution {read}: the points fit resolution {made}"):
        points_to_occupancy(points, read)


@pytest.mark.parametrize("text, order", [(True, "="), (False, "<"), (False, ">")])
def test_the_format_written_is_plain_and_other_valid_ones_are_read(tmp_path, text, order):
    points = voxel_centers(np.random.default_rng(2).integers(0, 64, (40, 3)), 64)
    write_ply(tmp_path / "ours.ply", points)
    ours = plyfile.PlyData.read(str(tmp_path / "ours.ply"))
    assert not ours.text and ours.byte_order == "<" and [e.name for e in ours.elements] == ["vertex"]
    assert ours["vertex"].data.dtype == np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
    assert np.array_equal(np.stack([ours["vertex"][axis] for axis in "xyz"], 1), points)

    # Another order of properties, colors between, faces before and edges after, comments.
    vertices = np.zeros(len(points), dtype=[("z", "f8"), ("red", "u1"), ("x", "f4"), ("y", "f4")])
    for axis, column in zip("xyz", points.T, strict=True):
        vertices[axis] = column
    vertices["red"] = 200
    faces = np.array([([0, 1, 2],), ([3, 4, 5],)], dtype=[("vertex_indices", "i4", (3,))])
    edges = np.array([(0, 1)], dtype=[("vertex1", "i4"), ("vertex2", "i4")])
    elements = [
        plyfile.PlyElement.describe(*element) for element in ((faces, "face"), (vertices, "vertex"), (edges, "edge"))
    ]
    theirs = plyfile.PlyData(elements, text=text, byte_order=order, comments=["a comment"])
    theirs.write(tmp_path / "theirs.ply")
    assert np.array_equal(read_ply(tmp_path / "theirs.ply"), points.astype(np.float64))


def test_every_truncation_of_a_file_is_an_error_naming_it(tmp_path):
    write_ply(tmp_path / "whole.ply", voxel_centers(all_voxels(2)[:3], 2))
    content = (tmp_path / "whole.ply").read_bytes()
    path = tmp_path / "cut.ply"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="cut.ply: .*voxelize.py"):
            read_ply(path)
    path.write_bytes(content)
    assert len(read_ply(path)) == 3


ASCII = (
    "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
    "end_header\n0 0 0\n.25 .25 .25\n"
)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("vertex 2", "vertex 99999999999999999", "99999999999999999 rows .* file of 1[0-9]+ bytes"),
        ("vertex 2", "vertex " + "9" * 40, "9{40} rows"),
        ("vertex 2", "vertex -2", "-2 rows"),
        ("vertex 2", "vertex two", "invalid literal .*two"),
        ("vertex 2", "vertex 0", "has no points"),
        ("vertex 2", "vertex 3", "truncated"),
        ("0 0 0\n", "0 0\n", "truncated"),
        ("0 0 0", "0 zero 0", "row 0: property 'y'"),
        ("element vertex", "element face", r"{'face': \['x', 'y', 'z'\]}"),
        ("element vertex 2\n", "", "line 3: expected one of .*element"),
        ("format ascii 1.0\n", "", "line 2: expected one of .*format"),
        ("format ascii", "format utf8", "format 'utf8'"),
        ("property float y\n", "", "row 0: expected end-of-line"),
        ("float y", "float x", "two properties with same name"),
        ("property float z", "property float z\nproperty float z", "two properties with same name"),
        ("float y", "quaternion y", "line 5: field type 'quaternion'"),
        ("end_header\n", "", "no end_header"),
        ("end_header\n", "comment " + "x" * 70000 + "\nend_header\n", "no end_header in the first 65536"),
        ("ply\n", "solid\n", "not a PLY"),
    ],
)
def test_absurd_headers_and_values_are_errors_naming_the_file(tmp_path, old, new, message):
    path = tmp_path / "bad.ply"
    path.write_text(ASCII)
    assert np.array_equal(read_ply(path), [[0, 0, 0], [0.25, 0.25, 0.25]])
    assert ASCII.count(old) == 1 or old == "ply\n"
    path.write_text(ASCII.replace(old, new, 1))
    with pytest.raises(DataError, match=f"(?s)bad.ply: .*{message}.*voxelize.py"):
        read_ply(path)


@pytest.mark.parametrize("y", [[], [("list", "f4", (2,))], [("y", "f4", (1,))]])
@pytest.mark.parametrize("text", [True, False])
def test_a_valid_file_without_one_number_for_each_axis_says_what_it_has(tmp_path, text, y):
    vertices = np.zeros(2, dtype=[("x", "f4"), *y, ("z", "f4")])
    plyfile.PlyData([plyfile.PlyElement.describe(vertices, "vertex")], text=text).write(tmp_path / "bad.ply")
    with pytest.raises(DataError, match=r"bad.ply: has .*{'vertex': \['x', 'z'\]}.*x, y, z.*voxelize.py"):
        read_ply(tmp_path / "bad.ply")


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian"])
def test_an_absurd_count_costs_no_memory(tmp_path, encoding):
    header = ASCII.replace("ascii", encoding).replace("vertex 2", "vertex 10000000")
    path = tmp_path / "absurd.ply"
    path.write_text(header.replace("float z\n", "float z\nproperty list uchar int neighbors\n"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="absurd.ply: .*10000000 rows"):
            read_ply(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6  # plyfile alone: 200 MB
    finally:
        tracemalloc.stop()


def test_a_missing_file_and_a_folder_are_errors_naming_it(tmp_path):
    with pytest.raises(DataError, match="none.ply: cannot be read .No such file"):
        read_ply(tmp_path / "none.ply")
    with pytest.raises(DataError, match="is a folder"):
        read_ply(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "grid.ply"
    write_ply(path, np.zeros((1, 3)))
    before = path.read_bytes()
    for points in (np.array([["no", "number", "here"]]), np.zeros((2, 2)), np.zeros((2, 6))):
        with pytest.raises(ValueError):
            write_ply(path, points)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.ply"]


def test_packed_bits_are_the_documented_ones_and_come_back():
    grids = np.random.default_rng(3).random((3, 4, 4, 4)) < 0.5
    rows = pack_bits(grids)
    assert rows.shape == (3, 8) and rows.dtype == np.uint8
    for n, i, j, k in np.ndindex(grids.shape):
        place = (i * 4 + j) * 4 + k
        assert bool(rows[n, place // 8] >> (7 - place % 8) & 1) == grids[n, i, j, k]
    unpacked = unpack_bits(rows, 4)
    assert unpacked.dtype == torch.uint8 and np.array_equal(unpacked.numpy(), grids)
    assert np.array_equal(pack_bits(unpacked), rows)


@pytest.mark.parametrize("resolution", [2, 6, 16, 32, 64])
def test_bits_unpacked_by_tensor_operations_are_those_of_numpy(resolution):
    rows = np.random.default_rng(4).integers(0, 256, (3, resolution**3 // 8), dtype=np.uint8)
    unpacked = unpack_bits_on_device(torch.from_numpy(rows), resolution)
    assert unpacked.dtype == torch.uint8 and unpacked.is_contiguous()
    assert torch.equal(unpacked, unpack_bits(rows, resolution)[:, None])


def test_every_byte_is_unpacked_and_a_filled_up_one_is_cut():
    every = np.arange(256, dtype=np.uint8)[:, None]
    unpacked = unpack_bits_on_device(torch.from_numpy(every), 2)
    assert np.array_equal(unpacked.flatten(1).numpy(), np.unpackbits(every, axis=1))
    grids = np.random.default_rng(5).random((4, 5, 5, 5)) < 0.5  # 125 voxels in 16 bytes
    rows = torch.from_numpy(np.packbits(grids.reshape(4, -1), axis=1))
    assert np.array_equal(unpack_bits_on_device(rows, 5)[:, 0].numpy(), grids)
    assert np.array_equal(pack_bits(grids), rows) and np.array_equal(unpack_bits(rows.numpy(), 5).numpy(), grids)


def test_rows_of_another_size_are_refused():
    for wrong in (torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 64), torch.zeros(64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[B, 64\] at resolution 8"):
            unpack_bits_on_device(wrong, 8)
    with pytest.raises(ValueError, match="resolution 8"):
        unpack_bits(np.zeros((1, 8), np.uint8), 8)
    for shape in ((3, 3, 3), (1, 3, 3, 4), (1, 1, 3, 3, 3)):
        with pytest.raises(ValueError, match=r"\[N, R, R, R\]"):
            pack_bits(np.zeros(shape))


def test_voxels_are_written_without_torch():
    code = "import sys, trellis.grids.voxels; print('torch' in sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True)
    assert output == "False\n"
