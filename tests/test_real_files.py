"""Real and odd mesh files, each with the grid or the refusal that its list expects. Needs the folder of test data."""

import numpy as np
import pytest
from helpers import TEST_DATA, needs_test_data, table

from trellis.grids.geometry import Geometry
from trellis.grids.meshes import load_mesh, voxelize_geometry
from trellis.grids.voxels import voxels_to_grid
from trellis.utils.errors import DataError

pytestmark = needs_test_data

DATA = TEST_DATA / "data"
ODD = {row["file"]: row["expected"] for row in table(DATA / "odd" / "EXPECTED.csv")} if DATA.is_dir() else {}
LISTS = {"meshes_sample": ("voxels64",), "meshes_extra": ("voxels64_extra",)}
REAL = [
    (folder, row["file"], f"{row.get('repo') or row['repository']}/{row['path']}", row["split"])
    for folder in (LISTS if DATA.is_dir() else ())
    for row in table(DATA / folder / "SOURCES.csv")
]
STRANGE = [row["file"] for row in table(DATA / "strange" / "SOURCES.csv")] if DATA.is_dir() else []


def grid_of(geometry: Geometry) -> np.ndarray:
    return voxels_to_grid(voxelize_geometry(geometry, 64, "keep", "cube").voxels, 64) > 0


def within_a_cell(grid: np.ndarray, other: np.ndarray) -> bool:
    """Whether every voxel of each grid is a voxel of the other or touches one."""
    padded = np.pad(other, 1)
    near = np.zeros_like(grid)
    for x, y, z in np.ndindex(3, 3, 3):
        near |= padded[x : x + 64, y : y + 64, z : z + 64]
    return not (grid & ~near).any()


@pytest.mark.parametrize("name", ODD)
def test_odd_file_gives_its_true_triangles_or_a_reason(name):
    expected = ODD[name]
    try:
        geometry = load_mesh(DATA / "odd" / name)
    except DataError as error:
        assert "refuse" in expected or expected == "either", error
        assert len(str(error)) > 10 and not str(error).endswith(".")
        return
    assert expected != "refuse"
    truth = np.load(DATA / "odd" / "truth.npz")
    if f"{name}|V" in truth:
        grid = grid_of(geometry)
        true = grid_of(Geometry(truth[f"{name}|V"].astype(np.float64), truth[f"{name}|F"].astype(np.int64)))
        # Where faces lie on the border of cells, rounding decides.
        assert np.array_equal(grid, true) or (within_a_cell(grid, true) and within_a_cell(true, grid))


@pytest.mark.parametrize("folder, file, name, split", REAL)
def test_real_file_gives_the_published_grid(folder, file, name, split, published):
    try:
        geometry = load_mesh(DATA / folder / file)
    except DataError as error:
        assert file.endswith((".fbx", ".wrl", ".dat", ".mpd")) and " is not read: " in str(error)
        return
    grid, want = grid_of(geometry), published(folder, split)[name]
    if file == "opensim-models__sacrum.vtp":  # has two concave quads, which the published grid fills
        want = np.unpackbits(want).reshape(grid.shape) > 0
        assert within_a_cell(grid, want) and within_a_cell(want, grid) and (grid != want).sum() <= 5
    else:
        assert np.array_equal(np.packbits(grid), want)


@pytest.mark.parametrize("name", STRANGE)
def test_strange_file_gives_a_grid_or_a_reason(name):
    try:
        assert grid_of(load_mesh(DATA / "strange" / name)).any()
    except DataError as error:
        assert len(str(error)) > 10 and "Error:" not in str(error)


@pytest.fixture(scope="module")
def published():
    loaded: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def grids(folder: str, split: str) -> dict[str, np.ndarray]:
        if (folder, split) not in loaded:
            file = np.load(DATA / f"{LISTS[folder][0]}_{split}.npz")
            loaded[folder, split] = dict(zip(file["name"].tolist(), file["bits"], strict=True))
        return loaded[folder, split]

    return grids
