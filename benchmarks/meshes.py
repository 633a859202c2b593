"""Mesh files to voxel files: the time of each stage, on one core.

    python benchmarks/meshes.py --meshes DIR    # every mesh below DIR
    python benchmarks/meshes.py                 # made-up spheres of 320 to 81,920 triangles

Stages: hash (SHA-256 of the file), load, place (center and scale), rasterize (triangles to an array of voxels) and
write. For each file and stage the least of several times counts: other work may interfere, and the first reads the file
from the disk. No stage uses a GPU, whatever --device says. Plain: Open3D, which makes its grid and then gives its
voxels one by one; without it its columns are empty. Equal: share of the files whose voxels are Open3D's.
"""

import functools
import hashlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.report import Column, Report, Table
from trellis.grids import meshes, placing, rasterize
from trellis.grids.voxels import voxel_centers, write_ply
from trellis.utils.command import run_command
from trellis.utils.errors import DataError

STAGES = ("hash", "load", "place", "rasterize", "write")
PLAIN = ("make grid", "read out")
COLUMNS = (
    Column("resolution", "key"),
    Column("voxels"),
    Column("ms"),
    Column("plain ms"),
    *(Column(f"plain: {step}, ms") for step in PLAIN),
    Column("ratio to plain", "ratio"),
    Column("least ratio"),
    Column("equal"),
)
TIMES = (Column("median ms"), Column("mean ms"), Column("p95 ms"))
STAGE_COLUMNS = (Column("stage", "key"), *TIMES, Column("share", format=".2f"))
FORMAT_COLUMNS = (
    Column("format", "key"),
    Column("files"),
    Column("MB"),
    Column("triangles"),
    *TIMES,
    Column("MB/s"),
    Column("share of load", format=".2f"),
)


@dataclass(frozen=True)
class Mesh:
    """A measured mesh file.

    vertices: [V, 3] float64, placed in the cube.
    faces: [F, 3] int64.
    ms: {stage: least time in milliseconds}.
    """

    path: Path
    vertices: np.ndarray
    faces: np.ndarray
    ms: dict[str, float]


def least_ms(function: Callable[[], object], repeats: int) -> float:
    """Return the least time of a call, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def measure(path: Path, folder: Path, resolution: int, repeats: int) -> Mesh:
    """Measure the stages of a mesh file; `folder` gets its voxel file. Raise DataError if it cannot be voxelized."""
    vertices, faces = meshes.load_mesh(path)[:2]
    placed = placing.normalize_cube(np.asarray(vertices, dtype=np.float64))
    voxels = rasterize.voxelize_mesh(placed, faces, resolution)
    calls: dict[str, Callable[[], object]] = {
        "hash": lambda: hashlib.sha256(path.read_bytes()).hexdigest(),
        "load": lambda: meshes.load_mesh(path),
        "place": lambda: placing.normalize_cube(np.asarray(vertices, dtype=np.float64)),
        "rasterize": lambda: rasterize.voxelize_mesh(placed, faces, resolution),
        "write": lambda: write_ply(folder / "voxels.ply", voxel_centers(voxels, resolution)),
    }
    return Mesh(path, placed, faces, {stage: least_ms(calls[stage], repeats) for stage in STAGES})


def has_open3d() -> bool:
    """Return whether Open3D is there to compare with."""
    return importlib.util.find_spec("open3d") is not None


def plain_voxels(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> tuple[np.ndarray, dict[str, float]]:
    """Return Open3D's voxels [N, 3] int64, sorted by x, y, z, and {step: ms}."""
    import open3d

    started = time.perf_counter()
    clipped = np.clip(vertices, -rasterize.HALF, rasterize.HALF)
    mesh = open3d.geometry.TriangleMesh(
        open3d.utility.Vector3dVector(clipped), open3d.utility.Vector3iVector(faces.astype(np.int32))
    )
    grid = open3d.geometry.VoxelGrid.create_from_triangle_mesh_within_bounds(
        mesh, voxel_size=1 / resolution, min_bound=(-0.5,) * 3, max_bound=(0.5,) * 3
    )
    made = time.perf_counter()
    voxels = np.array([voxel.grid_index for voxel in grid.get_voxels()], dtype=np.int64).reshape(-1, 3)
    voxels = voxels[np.lexsort(voxels.T[::-1])]
    return voxels, dict(zip(PLAIN, (1e3 * (made - started), 1e3 * (time.perf_counter() - made)), strict=True))


def rasterize_row(measured: list[Mesh], resolution: int, repeats: int, with_plain: bool) -> list[object]:
    """Return the row of a resolution: means over all meshes, the least ratio of a mesh, and the share that is equal."""
    counts, ours, plain, equal = [], [], [], []
    for mesh in measured:
        call = functools.partial(rasterize.voxelize_mesh, mesh.vertices, mesh.faces, resolution)
        voxels = call()
        counts.append(len(voxels))
        ours.append(least_ms(call, repeats))
        if with_plain:
            runs = [plain_voxels(mesh.vertices, mesh.faces, resolution) for _ in range(repeats)]
            plain.append([min(steps[step] for _, steps in runs) for step in PLAIN])
            equal.append(np.array_equal(voxels, runs[0][0]))
    row: list[object] = [resolution, float(np.mean(counts)), float(np.mean(ours))]
    if not with_plain:
        return [*row, *[None] * (len(COLUMNS) - len(row))]
    steps, totals = np.mean(plain, axis=0), np.sum(plain, axis=1)
    ratios = totals / np.array(ours)
    mean = float(totals.mean())
    ratio = mean / float(np.mean(ours))
    return [*row, mean, *map(float, steps), ratio, float(ratios.min()), float(np.mean(equal))]


def spread(times: list[float]) -> list[float]:
    """Return median, mean and 95th percentile."""
    return [float(np.median(times)), float(np.mean(times)), float(np.percentile(times, 95))]


def stage_rows(measured: list[Mesh]) -> list[list[object]]:
    """Return a row for each stage."""
    total = sum(sum(mesh.ms.values()) for mesh in measured)
    times = {stage: [mesh.ms[stage] for mesh in measured] for stage in STAGES}
    return [[stage, *spread(times[stage]), sum(times[stage]) / total] for stage in STAGES]


def format_rows(measured: list[Mesh]) -> list[list[object]]:
    """Return a row for each suffix: what was loaded and how long that took, the largest share first."""
    groups: dict[str, list[Mesh]] = {}
    for mesh in measured:
        groups.setdefault(mesh.path.suffix.lower(), []).append(mesh)
    total = sum(mesh.ms["load"] for mesh in measured)
    rows: dict[float, list[object]] = {}
    for suffix, group in groups.items():
        times = [mesh.ms["load"] for mesh in group]
        megabytes = sum(mesh.path.stat().st_size for mesh in group) / 1e6
        triangles = sum(len(mesh.faces) for mesh in group)
        share = sum(times) / total
        rows[share] = [suffix, len(group), megabytes, triangles, *spread(times), 1e3 * megabytes / sum(times), share]
    return [rows[share] for share in sorted(rows, reverse=True)]


def make_meshes(folder: Path) -> None:
    """Write spheres of 320 to 81,920 triangles, each in five formats."""
    import trimesh

    for subdivisions in (2, 4, 6):
        for suffix in ("glb", "obj", "off", "ply", "stl"):
            trimesh.creation.icosphere(subdivisions=subdivisions).export(folder / f"{subdivisions}.{suffix}")


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument("--meshes", type=Path, metavar="DIR", help="folder of mesh files (default: made-up spheres)")
    flags.add_argument(
        "--resolutions",
        type=int,
        nargs="+",
        default=[64, 128, 256],
        help="voxels along an axis; the stages take the first (default: 64 128 256)",
    )
    flags.add_argument("--repeats", type=int, default=5, help="times that each call is made (default: 5)")
    args = flags.parse_args(argv)
    resolution, measured, left_out = args.resolutions[0], [], []
    with tempfile.TemporaryDirectory() as name:
        source, folder = args.meshes or Path(name, "meshes"), Path(name, "voxels")
        folder.mkdir()
        if args.meshes is None:
            source.mkdir()
            make_meshes(source)
        for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in meshes.MESH_SUFFIXES):
            try:
                measured.append(measure(path, folder, resolution, args.repeats))
            except DataError as error:
                left_out.append(f"{path.name} {error}")
        if not measured:
            raise DataError(f"--meshes {source}: has no mesh that can be voxelized. Give a folder that has some.")

        work = {"resolution": resolution, "meshes": len(measured)}
        report = Report("Mesh files to voxel files", __file__, argv, torch.device("cpu"), args.output, work)
        mean = sum(sum(mesh.ms.values()) for mesh in measured) / len(measured)
        notes = [
            f"{len(measured)} meshes, {sum(len(mesh.faces) for mesh in measured):,} triangles: {mean:.1f} ms each, "
            f"{1e3 / mean:.1f} objects/s on one core at {resolution}³."
        ]
        if left_out:
            notes.append(f"Left out: {'; '.join(left_out)}.")
        rows = [rasterize_row(measured, size, args.repeats, has_open3d()) for size in args.resolutions]
        text = report.write(
            *notes,
            Table(COLUMNS, rows, "Rasterize"),
            Table(STAGE_COLUMNS, stage_rows(measured), "Stages"),
            Table(FORMAT_COLUMNS, format_rows(measured), "Load, by format"),
        )
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main, None))
