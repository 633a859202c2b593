"""The Utah teapot: that it is Newell's, and that the committed file is what the script makes."""

import numpy as np
import pytest
from helpers import ROOT

trimesh = pytest.importorskip("trimesh")

from dataset_toolkits.shapes import teapot  # noqa: E402
from trellis.grids import meshes  # noqa: E402


def test_the_patches_are_newells():
    """32 patches over 290 distinct points; one quarter of the rim and the spout's tip as published."""
    patches = teapot.patches()
    assert patches.shape == (32, 4, 4, 3)
    assert len(np.unique(patches.reshape(-1, 3).round(6) + 0.0, axis=0)) == 290
    rim = {(1.4, 0, 2.4), (0.784, 1.4, 2.4), (1.3375, 0.749, 2.53125), (0, 1.4375, 2.53125), (1.5, 0.84, 2.4)}
    tip = {(2.9, -0.15, 2.475), (3.45, 0.15, 2.5125), (3.2, 0.15, 2.4), (2.8, 0, 2.4)}
    points = set(map(tuple, (patches.reshape(-1, 3).round(6) + 0.0).tolist()))
    assert rim <= points and tip <= points


def all_near(points: np.ndarray, others: np.ndarray) -> bool:
    """Whether each point is one of the others, up to the rounding of halves."""
    cKDTree = pytest.importorskip("scipy.spatial").cKDTree
    return cKDTree(others).query(points)[0].max() < 2 * 10**-teapot.DECIMALS


def test_the_surface_passes_through_the_corners_of_all_patches_and_mirrors_in_y():
    vertices = teapot.teapot().vertices
    assert all_near(teapot.patches()[:, ::3, ::3].reshape(-1, 3), vertices)
    assert all_near(vertices * [1, -1, 1], vertices)
    assert all_near(vertices, teapot.teapot(2 * teapot.STEPS).vertices)  # twice the steps pass through the same points


def test_four_pieces_face_outwards():
    pieces = teapot.teapot().split(only_watertight=False)
    assert len(pieces) == 4  # body, lid, handle, spout
    for piece in pieces:
        assert piece.is_winding_consistent
        outermost = piece.triangles_center[:, 1].argmax()
        assert piece.face_normals[outermost, 1] > 0.5


def test_the_committed_file_is_what_the_script_writes(tmp_path):
    assert teapot.main(["--output", str(tmp_path / "teapot.glb")]) == 0
    expected = np.sort(teapot.teapot().triangles.reshape(-1, 9), axis=0)
    for path in (tmp_path / "teapot.glb", ROOT / "docs" / "teapot.glb"):
        vertices, faces, *_ = meshes.load_mesh(path)
        turned = vertices[faces][..., [0, 2, 1]] * [1, -1, 1]  # a GLB is y-up
        assert np.allclose(np.sort(turned.reshape(-1, 9), axis=0), expected, rtol=0, atol=2 * 10**-teapot.DECIMALS)
        assert path.stat().st_size < 300_000


def test_another_suffix_is_refused(tmp_path, capsys):
    assert teapot.main(["--output", str(tmp_path / "teapot.step")]) == 1
    assert "teapot.step: a mesh is written as" in capsys.readouterr().err
