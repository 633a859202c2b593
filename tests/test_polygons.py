"""Polygons to triangles: the same area, the fan where it is right, no crash on what has no area."""

import sys

import numpy as np
import pytest

from trellis.grids.readers.polygons import triangulate
from trellis.utils.errors import ConfigError, DataError

pytest.importorskip("mapbox_earcut")
L_SHAPE = np.array([[0, 0], [3, 0], [3, 1], [1, 1], [1, 3], [0, 3]], dtype=float)
DART = np.array([[0, 0], [4, 2], [0, 4], [1, 2]], dtype=float)  # concave at its last corner


def in_space(plane: np.ndarray, seed: int = 0) -> np.ndarray:
    """Put points [N, 2] into a random plane of space, [N, 3]; distances and winding stay."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return np.concatenate([plane, np.zeros((len(plane), 1))], axis=1) @ turn.T + turn[0]


def areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the vector areas of triangles, [F, 3]."""
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.cross(b - a, c - a) / 2


def polygon(vertices: np.ndarray) -> np.ndarray:
    return triangulate(vertices, np.arange(len(vertices)), np.array([len(vertices)]))


def covers(plane: np.ndarray, seed: int = 0) -> np.ndarray:
    """Assert that the triangles of a simple polygon tile it with its winding; return them."""
    vertices = in_space(plane, seed)
    faces = polygon(vertices)
    following = np.roll(plane, -1, axis=0)
    area = np.abs((plane[:, 0] * following[:, 1] - plane[:, 1] * following[:, 0]).sum()) / 2
    vectors = areas(vertices, faces)
    assert np.linalg.norm(vectors, axis=1).sum() == pytest.approx(area, rel=1e-12)  # nothing outside, nothing twice
    assert np.linalg.norm(vectors.sum(axis=0)) == pytest.approx(area, rel=1e-12)  # all wound the same way
    whole = np.cross(vertices, np.roll(vertices, -1, axis=0)).sum(axis=0)
    assert vectors.sum(axis=0) @ whole > 0  # as the polygon
    return faces


@pytest.mark.parametrize("shift", range(6))
@pytest.mark.parametrize("mirror", [False, True])
def test_concave_polygon_from_every_corner(shift: int, mirror: bool):
    for shape in (L_SHAPE, DART):
        plane = np.roll(shape, -shift, axis=0)
        covers(plane[::-1] if mirror else plane, seed=shift)


def test_small_polygons_need_no_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mapbox_earcut", None)
    rng = np.random.default_rng(1)
    for i in range(200):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 4 + i % 2))
        if np.diff(angles, append=angles[0] + 2 * np.pi).max() < np.pi:  # around the origin: it does not cross itself
            radii = rng.uniform(0.05, 1, len(angles))
            covers(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1), seed=i)


def test_comb_of_many_teeth():
    x = np.arange(2001.0)
    comb = np.concatenate([np.stack([x, 1 + x % 2], axis=1), [[2000, 0], [0, 0]]])
    covers(np.roll(comb, 700, axis=0))


def test_hole_joined_by_a_bridge():
    outer = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]
    hole = [[1, 1], [1, 3], [3, 3], [3, 1], [1, 1]]
    assert len(covers(np.array(outer + hole, dtype=float))) == 8


@pytest.mark.parametrize("scale", [1e-310, 1e-40, 1e150])
def test_size_does_not_matter(scale: float):
    vertices = in_space(L_SHAPE[[1, 2, 3, 4, 5, 0]])
    assert np.array_equal(polygon(vertices * scale), polygon(vertices))


def test_fan_where_the_first_corner_sees_all():
    square = in_space(np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float))
    assert polygon(square).tolist() == [[0, 1, 2], [2, 3, 0]]
    assert polygon(in_space(DART[[3, 0, 1, 2]])).tolist() == [[0, 1, 2], [2, 3, 0]]  # concave at the first corner
    circle = np.linspace(0, 2 * np.pi, 7, endpoint=False)
    vertices = in_space(np.stack([np.cos(circle), np.sin(circle)], axis=1))
    assert polygon(vertices).tolist() == [[0, i, i + 1] for i in range(1, 6)]
    assert polygon(in_space(L_SHAPE)).tolist() == [[0, i, i + 1] for i in range(1, 5)]  # the inner corner is opposite


def test_bent_quad_keeps_the_fan():
    bent = np.array([[0, 0, 0], [1, 0, 0.4], [1, 1, 0], [0, 1, 0.4]], dtype=float)
    assert polygon(bent).tolist() == [[0, 1, 2], [2, 3, 0]]


def test_polygons_keep_their_order_and_small_ones_are_left_out():
    vertices = np.concatenate([in_space(L_SHAPE), in_space(DART), in_space(L_SHAPE[:3])])
    corners = [0, 6, 7, 8, 9, 10, 11, 1, 2, 3, 4, 5, 0, 10, 11, 12]
    faces = triangulate(vertices, np.array(corners), np.array([1, 4, 2, 0, 6, 3]))
    assert len(faces) == 2 + 4 + 1
    assert set(faces[:2].ravel()) == {6, 7, 8, 9} and set(faces[2:6].ravel()) == set(range(6))
    assert faces[6].tolist() == [10, 11, 12]
    assert triangulate(vertices, np.zeros(0), np.zeros(0)).shape == (0, 3)
    assert triangulate(vertices, np.array([0, 1]), np.array([2])).shape == (0, 3)


@pytest.mark.parametrize(
    "plane",
    [
        [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1], [0, 1]],  # repeated corners
        [[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]],  # the first corner closes it
        [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0, 1]],  # corners on straight edges
    ],
)
def test_superfluous_corners_lose_no_area(plane: list):
    covers(np.array(plane, dtype=float))


@pytest.mark.parametrize(
    "plane",
    [
        [[0, 0], [1, 0], [2, 0], [3, 0]],
        [[0, 0], [3, 0], [1, 0], [2, 0], [0, 0]],
        [[1, 1], [1, 1], [1, 1], [1, 1]],
        [[0, 0], [1, 0], [0, 1], [1, 1]],  # crosses itself
        [[0, 0], [3, 1], [0, 1], [3, 0]],  # crosses itself, unequal halves
        [[0, 0], [np.nan, 0], [0, 1], [1, 1]],
        [[0, 0], [np.inf, 0], [0, 1], [1, 1]],
    ],
)
def test_polygon_without_triangulation_keeps_the_fan(plane: list):
    size = len(plane)
    vertices = np.pad(np.array(plane, dtype=float), [(0, 0), (0, 1)])
    faces = triangulate(vertices, np.arange(size), np.array([size]))
    assert np.array_equal(np.sort(faces), np.sort([[0, i, i + 1] for i in range(1, size - 1)]))


def test_corner_that_is_no_vertex():
    for corner in (-1, 6):
        with pytest.raises(DataError, match="its faces use vertices .* of 6$"):
            triangulate(in_space(L_SHAPE), np.array([0, 1, 2, corner]), np.array([4]))


def test_missing_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mapbox_earcut", None)
    polygon(in_space(L_SHAPE))  # a fan does without
    with pytest.raises(ConfigError, match="pip install mapbox_earcut"):
        polygon(in_space(L_SHAPE[[1, 2, 3, 4, 5, 0]]))
