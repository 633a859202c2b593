"""Built-in shapes: the same bytes for the same seed, no two alike, all fit to be voxelized."""

import filecmp
import hashlib
from pathlib import Path

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")

from dataset_toolkits.shapes import make_shapes, primitives  # noqa: E402
from trellis.grids import meshes  # noqa: E402


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.glob("*/*")}


def write(root: Path, num: int, num_val: int = 0, seed: int = 0) -> int:
    return make_shapes.main(
        ["--output_dir", str(root), "--num", str(num), "--num_val", str(num_val), "--seed", str(seed)]
    )


def test_same_seed_same_bytes_and_more_only_adds(tmp_path):
    assert write(tmp_path / "a", 4, 2) == 0
    before = files(tmp_path / "a")
    assert write(tmp_path / "a", 14, 3) == 0
    assert write(tmp_path / "b", 14, 3) == 0
    assert not filecmp.dircmp(tmp_path / "a", tmp_path / "b").diff_files
    after = files(tmp_path / "a")
    assert after == files(tmp_path / "b") and len(after) == 17
    assert before == {name: after[name] for name in before}


def test_existing_files_are_not_written_again(tmp_path):
    assert write(tmp_path, 3) == 0
    names = sorted((tmp_path / "train").iterdir())
    names[0].write_bytes(b"mine")
    names[1].unlink()
    assert write(tmp_path, 3) == 0
    assert names[0].read_bytes() == b"mine" and names[1].stat().st_size > 100


def test_other_seed_is_refused_in_the_same_folder(tmp_path, capsys):
    assert write(tmp_path, 1, seed=1) == 0
    assert write(tmp_path, 2, seed=2) == 1
    assert "seed 1, not 2" in capsys.readouterr().err and len(files(tmp_path)) == 1
    assert write(tmp_path / "new", -1) == 1
    assert "--num -1" in capsys.readouterr().err


def test_no_two_shapes_are_alike():
    digests = set()
    for seed, split in ((0, "train"), (0, "val"), (1, "train")):
        for index in range(65):
            parts = make_shapes.make_shape(seed, split, index)
            digests.add(hashlib.sha256(b"".join(part.vertices.tobytes() for part in parts)).digest())
    assert len(digests) == 3 * 65


@pytest.mark.parametrize("family", make_shapes.FAMILIES)
def test_every_family_is_upright_finite_and_of_unit_size(family):
    first = list(make_shapes.FAMILIES).index(family)
    for index in range(first, first + 20 * len(make_shapes.FAMILIES), len(make_shapes.FAMILIES)):
        parts = make_shapes.make_shape(0, "train", index)
        assert all(len(part.faces) for part in parts)
        points = np.concatenate([part.vertices[np.unique(part.faces)] for part in parts])
        assert np.isfinite(points).all()
        assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=2e-5)
        assert np.ptp(points, axis=0).min() > 0.03  # nothing is flat
        assert np.allclose(points[:, :2].max(0) + points[:, :2].min(0), 0, atol=2e-5)


def test_formats_and_families_are_mixed(tmp_path):
    names = [make_shapes.shape_name(index) for index in range(65)]
    pairs = {(name.split("_")[1].split(".")[0], name.split(".")[1]) for name in names}
    assert pairs == {(family, suffix) for family in make_shapes.FAMILIES for suffix in make_shapes.FORMATS}


@pytest.mark.parametrize("suffix", make_shapes.FORMATS)
def test_files_hold_the_shape(suffix, tmp_path):
    parts = make_shapes.make_shape(0, "train", 0)
    path = tmp_path / f"shape.{suffix}"
    make_shapes.write_shape(parts, path)
    vertices, faces, *_ = meshes.load_mesh(path)
    expected = np.concatenate([part.triangles for part in parts])
    found = vertices[faces].round(make_shapes.DECIMALS) + 0.0  # glb keeps float32 and its own order of the parts
    assert sorted(found.reshape(-1, 9).tolist()) == sorted((expected + 0.0).reshape(-1, 9).tolist())


def test_primitives_are_closed_and_have_their_volume():
    """Signed volume of closed pieces; a missing or turned face would change it."""
    square = primitives.rectangle(2, 1)
    solids = {
        "prism": (primitives.prism(square, 0, 3), 6),
        "hollow prism": (primitives.prism(square, 0, 3, hole=square / 2), 6 * 3 / 4),
        "disc": (primitives.disc(1, 0, 2, 4), 4),
        "bar": (primitives.bar((0, 0, 0), (0, 0, 3), 1, segments=4), 6),
        "box": (primitives.box((5, 5, 5), (1, 2, 3)), 6),
        "ring": (
            primitives.sweep(np.insert(primitives.circle(3, 64), 2, 0, axis=1), 1, 32, closed=True),
            2 * np.pi**2 * 3,
        ),
    }
    for name, (solid, volume) in solids.items():
        closed = trimesh.Trimesh(solid.vertices, solid.faces)  # joins equal vertices
        assert closed.is_watertight, name
        assert abs(solid.volume) == pytest.approx(volume, rel=0.02), name
