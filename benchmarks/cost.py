"""What an object costs in each program, and what a million take on many machines.

    python benchmarks/cost.py --meshes DIR --data_dir DATA    # your meshes and packed grids
    python benchmarks/cost.py                                 # made-up ones

Every figure is CPU time of one core, of user and system, with all child processes: so other work on the machine matters
little. Programs run with few objects and with more, and the difference counts: start-up is left out. The last
table divides these times by cores and GPUs, as if nodes shared the work evenly, their cores were like this one, and
disks and networks kept up. The GPU's speed is that of results/tokenizer_h200.json, as this benchmark uses none.
"""

import contextlib
import hashlib
import io
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.meshes import make_meshes
from benchmarks.report import Column, Report, Table
from dataset_toolkits import pack
from dataset_toolkits.work import Settings, make_grids
from trellis.datasets.packed import load_packed, packed_resolution, save_packed
from trellis.grids import meshes
from trellis.utils.command import run_command
from trellis.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
GPU_RESULT = ROOT / "benchmarks/results/tokenizer_h200.json"
CORES, GPUS = 64, 8  # of a node
NODES = (1, 16, 256)
OBJECTS = (10**6, 10**7)
REPEATS = 3  # of which the least counts: other work on the machine only adds
PACKED = 1600  # grids at most that are packed and unpacked
SPHERES = (6, 7, 8)  # subdivisions of made-up meshes, of 82 thousand to 1.3 million triangles
IMAGE_BYTES = 20_000_000  # of a textured mesh
SIZES = ((0, 10_000), (10_000, 100_000), (100_000, 2**63))  # triangles
LEAST_HOURS = 0.01
COLUMNS = (
    Column("form", "key"),
    Column("bytes an object"),
    Column("PLY to this", "ratio"),
    *(Column(f"TB, {objects:.0e}".replace("e+0", "e")) for objects in OBJECTS),
)
MESH_COLUMNS = (
    Column("meshes", "key"),
    Column("files"),
    Column("MB a file"),
    Column("triangles a file"),
    Column("median ms"),
    Column("mean ms"),
    Column("p95 ms"),
    Column("ms a MB"),
)
STEP_COLUMNS = (Column("step", "key"), Column("on one", "key"), Column("ms an object"), Column("objects/s"))
PLAN_COLUMNS = (
    Column("step", "key"),
    Column("objects", "key"),
    *(Column(f"hours, {nodes} node{'s' if nodes > 1 else ''}") for nodes in NODES),
)


class Step(NamedTuple):
    """What a program takes for an object.

    on: "core" or a GPU's name, of which `seconds` is the time.
    places: how many of them of a node it uses.
    nodes: it may run on several.
    """

    name: str
    on: str
    seconds: float
    places: int
    nodes: bool

    def hours(self, objects: int, nodes: int) -> float:
        return objects * self.seconds / (self.places * (nodes if self.nodes else 1)) / 3600


# --- measuring ---


def cpu_seconds(command: Sequence[object]) -> float:
    """Run a program with one thread, and return the CPU time of it and its children. Raise DataError if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise DataError(f"{' '.join(words[1:])} ended with {done.returncode}: {done.stderr.strip()}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def seconds_an_object(command: Callable[[int], Sequence[object]], few: int, many: int) -> float:
    """Return the CPU time that a program takes for one more object.

    command: returns the command line for the first so many objects, with a new output, as programs do nothing twice.
    """
    least = [min(cpu_seconds(command(number)) for _ in range(REPEATS)) for number in (few, many)]
    if least[1] <= least[0]:
        raise DataError(f"{many} objects took no longer than {few}: too few to measure {command(few)[0]}. Give more.")
    return (least[1] - least[0]) / (many - few)


class Measured(NamedTuple):
    """A mesh file, and the CPU time in seconds from its bytes to its grid's file."""

    path: Path
    triangles: int
    seconds: float


def measure_meshes(paths: list[Path], folder: Path, resolution: int, repeats: int = REPEATS) -> list[Measured]:
    """Make the grid of each file in this process, as voxelize.py's workers do; those without one are left out."""
    settings = Settings(resolution, "auto", "cube")
    found = []
    for path in paths:
        try:
            triangles = len(meshes.load_mesh(path)[1])
            times = []
            for _ in range(repeats):  # the first one may compile, and reads from the disk
                started = time.process_time()
                sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                make_grids(path, sha256, folder, settings)
                times.append(time.process_time() - started)
        except DataError:
            continue
        found.append(Measured(path, triangles, min(times)))
    return found


def mesh_rows(measured: list[Measured]) -> list[list[object]]:
    """Return a row for each suffix and for each range of triangles that has files, and one for all."""
    groups = {
        suffix: [mesh for mesh in measured if mesh.path.suffix.lower() == suffix] for suffix in _suffixes(measured)
    }
    for low, high in SIZES:
        name = f"{low:,} to {high:,} triangles" if high < 2**63 else f"from {low:,} triangles"
        groups[name] = [mesh for mesh in measured if low <= mesh.triangles < high]
    groups["all"] = measured
    rows: list[list[object]] = []
    for name, group in groups.items():
        if group:
            ms = [1e3 * mesh.seconds for mesh in group]
            megabytes = sum(mesh.path.stat().st_size for mesh in group) / 1e6
            triangles = statistics.mean(mesh.triangles for mesh in group)
            spread = [statistics.median(ms), statistics.mean(ms), float(np.percentile(ms, 95))]
            rows.append([name, len(group), megabytes / len(group), triangles, *spread, sum(ms) / megabytes])
    return rows


def _suffixes(measured: list[Measured]) -> list[str]:
    return sorted({mesh.path.suffix.lower() for mesh in measured})


# --- grids in each form ---


class Roots:
    """Data roots of the first so many grids, in each form, made when they are first asked for."""

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray]):
        self.folder, self.arrays = folder, arrays

    def npz(self, number: int) -> Path:
        path = self.folder / f"{number}.npz"
        if not path.exists():
            texts = self.arrays.keys() - {"bits"}
            save_packed(path, self.arrays["bits"][:number], {name: self.arrays[name][:number] for name in texts})
        return path

    def ply(self, number: int) -> Path:
        return self._made(f"ply_{number}", "--unpack", self.npz(number), "--output_dir")

    def shards(self, number: int) -> Path:
        resolution = packed_resolution(self.arrays["bits"])
        flags = ("--resolution", resolution, "--max_workers", 1, "--input", self.npz(number), "--output")
        return self._made(f"shards_{number}", *flags)

    def _made(self, name: str, *flags: object) -> Path:
        """Return a folder, after pack.py has made it if need be."""
        root = self.folder / name
        if not root.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                code = pack.main([*map(str, flags), str(root)])
            if code:
                raise DataError(f"{root} could not be made")
        return root


def read_grids(data_dir: str, number: int) -> dict[str, np.ndarray]:
    """Return the first grids of a packed file or a folder of them, with their names and sources if they have some."""
    path = Path(data_dir)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{data_dir} has no .npz file; the benchmarks read packed data, which pack.py makes")
    found = [load_packed(file) for file in files]
    names = [name for name in ("bits", "name", "source", "kind") if all(name in arrays for arrays in found)]
    return {name: np.concatenate([arrays[name] for arrays in found])[:number] for name in names}


def bytes_of(path: Path, pattern: str) -> int:
    files = [path] if path.is_file() else list(path.rglob(pattern))
    return sum(file.stat().st_size for file in files)


# --- the tables ---


def gpu_seconds() -> float:
    """Return the seconds of to_tokens.py for an object on one GPU, from packed grids to Parquet, in bf16."""
    (table,) = json.loads(GPU_RESULT.read_text(encoding="utf-8"))["tables"]
    names = [column["name"] for column in table["columns"]]
    rows = [dict(zip(names, row, strict=True)) for row in table["rows"]]
    (rate,) = [row["script, objects/s"] for row in rows if (row["precision"], row["task"]) == ("bf16", "encode")]
    return 1 / rate


def byte_rows(sizes: dict[str, float]) -> list[list[object]]:
    return [
        [form, size, sizes["PLY"] / size, *(size * objects / 1e12 for objects in OBJECTS)]
        for form, size in sizes.items()
    ]


def plan_rows(steps: list[Step]) -> list[list[object]]:
    """Return hours; start-up counts for more where they are less than LEAST_HOURS."""
    rows: list[list[object]] = []
    for objects in OBJECTS:
        for step in steps:
            hours = [step.hours(objects, nodes) for nodes in NODES]
            shown = [value if value >= LEAST_HOURS else f"< {LEAST_HOURS}" for value in hours]
            rows.append([step.name, f"{objects:.0e}".replace("e+0", "e"), *shown])
    return rows


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--meshes", type=Path, nargs="+", metavar="DIR", help="folders of meshes (default: spheres)")
    flags.add_argument("--tokenizer", default=str(ROOT / "pretrained/base"), help="default: pretrained/base")
    flags.add_argument("--tokenized", type=int, default=16, help="objects that to_tokens.py gets (default: 16)")
    args = flags.parse_args(argv)
    resolution = ("--resolution", args.resolution)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "voxels").mkdir()
        sources = args.meshes or [folder / "meshes"]
        if args.meshes is None:
            sources[0].mkdir()
            make_meshes(sources[0])
        paths = sorted(path for source in sources for path in source.rglob("*") if is_mesh(path))
        measured = measure_meshes(paths, folder / "voxels", args.resolution)
        of_meshes = mesh_rows(measured) + sphere_rows(folder / "voxels", args.resolution)

        grids = read_grids(common.data_for(args, folder), args.objects)
        roots, many = Roots(folder, grids), len(grids["bits"])
        if min(len(measured), many) < 2:
            raise DataError(f"{len(measured)} meshes that can be voxelized and {many} grids: two of each are needed")
        few, count, packed = max(1, many // 16), min(args.tokenized, many), min(PACKED, many)
        outputs = iter(range(1000))

        def new() -> Path:
            return folder / f"output_{next(outputs)}"

        voxelizing = ["dataset_toolkits/voxelize.py", "--max_workers", 1, "--format", "shards", *resolution]
        good = [mesh.path for mesh in measured]
        tokenizing = ["scripts/to_tokens.py", "--tokenizer", args.tokenizer, "--device", "cpu", "--output_dir"]
        tokens: dict[int, Path] = {}

        def tokens_of(number: int) -> Path:
            tokens[number] = new()
            return tokens[number]

        checking = ["dataset_toolkits/dataset.py", "verify", "--max_workers", 1, *resolution]
        packing = ["dataset_toolkits/pack.py", "--max_workers", 1, *resolution]
        of_all, of_node, alone = (CORES, True), (CORES, False), (1, False)  # cores of a node; on several nodes
        measures: list[tuple[str, tuple[int, bool], int, int, Callable[[int], Sequence[object]]]] = [
            (
                "voxelize.py, into shards",
                of_all,
                1,
                len(good),
                lambda number: [*voxelizing, "--output_dir", new(), "--input", *good[:number]],
            ),
            (
                "pack.py, PLY to shards",
                of_all,
                1,
                packed,
                lambda number: [*packing, "--input", roots.ply(number), "--output", new()],
            ),
            (
                "pack.py, npz to shards",
                of_all,
                1,
                packed,
                lambda number: [*packing, "--input", roots.npz(number), "--output", new()],
            ),
            (
                "dataset.py verify",
                of_node,
                few,
                many,
                lambda number: [*checking, roots.shards(number)],
            ),
            (
                "dataset.py dedupe",
                alone,
                few,
                many,
                lambda number: ["dataset_toolkits/dataset.py", "dedupe", *resolution, roots.shards(number)],
            ),
            (
                "to_tokens.py, fp32",
                of_all,
                1,
                count,
                lambda number: [*tokenizing, tokens_of(number), "--data_dir", roots.shards(number)],
            ),
        ]
        steps = [
            Step(step, "core", seconds_an_object(command, low, high), *place)
            for step, place, low, high, command in measures
        ]
        sizes = {
            "PLY": bytes_of(roots.ply(packed), "*.ply") / packed,
            "npz": bytes_of(roots.npz(packed), "*") / packed,
            "shards": bytes_of(roots.shards(packed), "*.arrow") / packed,
        }
        sizes["tokens, Parquet"] = bytes_of(tokens[count], "*.parquet") / count
    steps.append(Step("to_tokens.py, bf16, TRELLIS's size", "H200", gpu_seconds(), GPUS, True))

    work: dict[str, object] = {"resolution": args.resolution, "meshes": len(measured), "grids": many}
    report = Report("What an object costs", __file__, argv, torch.device("cpu"), args.output, work)
    text = report.write(
        f"{many} grids and {len(measured)} meshes; {len(paths) - len(measured)} other files gave no grid. CPU time of "
        f"one core. Tokens: {args.tokenizer}, {count} objects.",
        Table(COLUMNS, byte_rows(sizes), "Bytes"),
        Table(MESH_COLUMNS, of_meshes, "A mesh file to its grid"),
        Table(
            STEP_COLUMNS, [[step.name, step.on, 1e3 * step.seconds, 1 / step.seconds] for step in steps], "An object"
        ),
        f"Computed from these, for nodes of {CORES} cores and {GPUS} GPUs:",
        Table(PLAN_COLUMNS, plan_rows(steps), "A million objects"),
    )
    print(text)


def sphere_rows(folder: Path, resolution: int) -> list[list[object]]:
    """Return a row for each of a few large meshes, for collections have larger ones than samples; one with images."""
    import trimesh

    names = {}
    for number, subdivisions in enumerate(SPHERES, 1):
        path = folder / f"sphere_{subdivisions}.glb"
        trimesh.creation.icosphere(subdivisions=subdivisions).export(path)
        names[path] = f"made-up sphere {number}, .glb"
    textured = folder / "textured.glb"
    textured.write_bytes((folder / f"sphere_{SPHERES[0]}.glb").read_bytes())
    add_image(textured)
    names[textured] = f"made-up sphere 1 with {IMAGE_BYTES // 10**6} MB of images, .glb"
    measured = measure_meshes(list(names), folder, resolution, 3 * REPEATS)
    return [[names[mesh.path], *mesh_rows([mesh])[-1][1:]] for mesh in measured]


def add_image(path: Path) -> None:
    """Add IMAGE_BYTES that stand for an image to a GLB file of one buffer."""
    content = path.read_bytes()
    (length,) = struct.unpack("<I", content[12:16])
    described, binary = json.loads(content[20 : 20 + length]), content[20 + length + 8 :]
    view = {"buffer": 0, "byteOffset": len(binary), "byteLength": IMAGE_BYTES}
    described["bufferViews"].append(view)
    described["images"] = [{"bufferView": len(described["bufferViews"]) - 1, "mimeType": "image/png"}]
    described["buffers"][0]["byteLength"] = len(binary) + IMAGE_BYTES
    text = json.dumps(described).encode()
    chunks = ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", binary + os.urandom(IMAGE_BYTES)))
    parts = b"".join(struct.pack("<I4s", len(data), kind) + data for kind, data in chunks)
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(parts)) + parts)


def is_mesh(path: Path) -> bool:
    return path.suffix.lower() in meshes.MESH_SUFFIXES


if __name__ == "__main__":
    sys.exit(run_command(main, None))
