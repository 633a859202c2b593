"""Placing in the cube: the turn and its way back are exact inverses, and voxels turn as their centers do."""

import numpy as np
import pytest

from trellis.grids import placing
from trellis.grids.voxels import voxel_centers
from trellis.utils.errors import ConfigError, DataError


def points(seed: int = 0) -> np.ndarray:
    """Coordinates of very different size, so that any arithmetic would round."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1000, 3)) * 10.0 ** rng.integers(-8, 9, (1000, 3))


def test_turn_and_inverse_are_exact_inverses():
    assert np.array_equal(placing.turn_to_y_up(placing.turn_to_z_up(points())), points())
    assert np.array_equal(placing.turn_to_z_up(placing.turn_to_y_up(points())), points())
    assert placing.turn_to_z_up(np.array([1, 2, 3])).tolist() == [1, -3, 2]  # y, which was up, is z
    batch = points().reshape(10, 100, 3)
    assert np.array_equal(placing.turn_to_z_up(batch).reshape(-1, 3), placing.turn_to_z_up(points()))


def test_four_turns_are_none_and_a_turn_is_a_rotation():
    turned = points()
    for _ in range(4):
        turned = placing.turn_to_z_up(turned)
    assert np.array_equal(turned, points())
    matrix = placing.turn_to_z_up(np.eye(3)).T
    assert np.linalg.det(matrix) == pytest.approx(1) and np.array_equal(matrix @ matrix.T, np.eye(3))


@pytest.mark.parametrize("resolution", [5, 16])
def test_voxels_turn_as_their_centers_do(resolution):
    voxels = np.argwhere(np.ones((resolution,) * 3))
    turned = placing.turn_voxels_to_z_up(voxels, resolution)
    centers = placing.turn_to_z_up(voxel_centers(voxels, resolution).astype(float))
    assert np.allclose(voxel_centers(turned, resolution), centers, atol=1e-6)
    assert len(np.unique(turned, axis=0)) == resolution**3 and turned.min() == 0


@pytest.mark.parametrize("up_axis, normalization", [("keep", "cube"), ("z", "cube"), ("y", "cube"), ("y", "shapellm")])
def test_placed_vertices_lie_in_the_cube_and_keep_their_shape(up_axis, normalization):
    vertices = np.random.default_rng(1).uniform((-3, 5, 0), (4, 6, 30), (200, 3))
    placed = placing.place_vertices(vertices, up_axis, normalization)
    back = placing.turn_to_y_up(placed) if up_axis == "y" else placed
    if normalization == "cube":
        assert np.allclose(placed.max(0), -placed.min(0)) and np.ptp(placed, axis=0).max() == pytest.approx(1)
    else:
        assert (back.min(), back.max()) == (-0.5, 0.5)
    scale = np.ptp(vertices, axis=0) / np.ptp(back, axis=0)
    assert np.allclose(scale, scale[0])
    assert np.allclose((back - back[0]) * scale, vertices - vertices[0])


def test_a_mesh_that_is_in_the_cube_already_is_left_as_it_is():
    inside = np.random.default_rng(2).uniform(-0.5, 0.5, (50, 3))
    assert placing.place_vertices(inside, "z", None) is inside
    inside[7, 1] = 0.5009  # rounding
    placing.place_vertices(inside, "z", None)
    inside[7, 1] = -0.502
    with pytest.raises(DataError, match="not normalized to the unit cube: a coordinate is 0.502"):
        placing.place_vertices(inside, "z", None)


def test_settings_that_go_together_and_a_mesh_without_size():
    for up_axis in placing.UP_AXES:
        placing.check_settings(up_axis, "cube")
    for up_axis in ("auto", "y"):
        placing.check_settings(up_axis, "shapellm")
    for up_axis, normalization in (("keep", "shapellm"), ("z", "shapellm"), ("x", "cube"), ("y", "ball")):
        with pytest.raises(ConfigError):
            placing.check_settings(up_axis, normalization)
    for normalization, reason in (("cube", "longest edge is 0"), ("shapellm", "span 0")):
        with pytest.raises(DataError, match=reason):
            placing.place_vertices(np.ones((3, 3)), "y", normalization)


@pytest.mark.parametrize(
    "up_axis, normalization, axes",
    [  # of files that say y, z, nothing
        ("auto", "cube", ("y", "z", "keep")),
        ("auto", "shapellm", ("y", "z", "y")),
        ("auto", None, ("y", "z", "keep")),
        ("y", "cube", ("y", "y", "y")),
        ("y", "shapellm", ("y", "y", "y")),
        ("z", "cube", ("z", "z", "z")),
        ("keep", "cube", ("keep", "keep", "keep")),
        ("keep", "shapellm", ("keep", "keep", "keep")),  # only to write: no file is read so
    ],
)
def test_the_axis_of_a_file_is_found_and_files_are_written_with_the_axis_that_is_found_in_them(
    up_axis, normalization, axes
):
    for said, suffix, axis in zip(("y", "z", None), (".GLB", ".stl", ".ply"), axes, strict=True):
        assert placing.axis_of_file(up_axis, said, normalization) == axis
        assert placing.axis_to_write(up_axis, suffix, normalization) == axis
    assert placing.axis_to_write(up_axis, ".gltf", normalization) == axes[0]
    assert placing.axis_to_write(up_axis, ".obj", normalization) == axes[2]


def test_an_unknown_setting_is_refused_when_a_file_is_written():
    with pytest.raises(ConfigError, match="up_axis 'x': must be one of auto, y, z, keep"):
        placing.axis_to_write("x", ".glb", "cube")


@pytest.mark.parametrize("normalization", placing.NORMALIZATIONS)
def test_files_of_one_object_with_other_axes_are_placed_alike(normalization):
    z_up = np.random.default_rng(4).uniform((-3, 5, 0), (4, 6, 30), (200, 3))
    y_up = placing.turn_to_y_up(z_up)
    assert np.array_equal(
        placing.place_vertices(z_up, "z", normalization), placing.place_vertices(y_up, "y", normalization)
    )
