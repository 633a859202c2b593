"""A data set of a million objects in shards: how fast it opens, what memory it takes, how fast grids come out of it.

    python benchmarks/packed.py --folder /data/made --output benchmarks/results/packed_cpu.md

Makes --objects objects in --folder, or uses those that are there. Each part runs in a process of its own, with the
files in the page cache. Private memory is what a process has for itself (RssAnon); mapped files are shared by all
processes of the machine, and each has its share of them in Pss. --formats compares ways to store FORMAT_OBJECTS of the
objects; those whose package is missing are left out (pip install zarr pylance).
"""

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.packed_data import RESOLUTION, make_shards
from benchmarks.packed_formats import FORMATS
from benchmarks.report import Column, Report, Table
from trellis.utils.command import run_command
from trellis.utils.errors import DataError

CPU = torch.device("cpu")
BATCH = 64
SECONDS = 3.0  # of processor time for each rate
LOADED = 200_000  # objects that two ranks load together
FORMAT_OBJECTS = 20_000
PARTS = 5  # of the loading, to see whether memory grows
MEMORY = ("RssAnon", "RssFile", "Pss")  # MiB

COLUMNS = [Column("random access", "key"), Column("grids/s of the processor"), Column("of the limit", "ratio")]

WHY_ARROW = (
    "Shards are Arrow files because a grid is read at random out of a mapped file that all processes share. "
    "Parquet and Zarr store as little, but read whole row groups or go through a slow index; Lance is slower too, "
    "and fewer tools open it. A tar is as fast, but pads each grid to 512 bytes, is read to its end before the "
    "first grid, and has no columns. An .npz is unpacked into the memory of each process."
)


def memory() -> dict[str, float]:
    """Return the MEMORY of this process, in MiB."""
    text = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    found = {name: re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE) for name in MEMORY}
    return {name: int(match[1]) / 1024 for name, match in found.items() if match}


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call, by the clock and of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - own


def random_rate(read: Callable[[np.ndarray], object], objects: int) -> float:
    """Return grids read per second of the processor, in batches of random objects."""
    rng = np.random.default_rng(0)
    start, read_in_all = time.process_time(), 0
    while (spent := time.process_time() - start) < SECONDS or not read_in_all:
        read(rng.integers(0, objects, BATCH))
        read_in_all += BATCH
    return read_in_all / spent


def apart(function: Callable, *args: object) -> object:
    """Return what a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def opening(folder: Path) -> list[list]:
    """Return rows: what, seconds, processor seconds, private MiB since the imports."""
    import pandas  # noqa: F401 - as any program that trains has it
    import pyarrow  # noqa: F401

    from trellis.datasets.sampler import Order
    from trellis.datasets.sparse_structure import SparseStructure
    from trellis.trainers.data_changes import facts_of

    torch.set_num_threads(1)
    before, opened = memory()["RssAnon"], []
    works: dict[str, Callable[[], object]] = {
        "open": lambda: opened.append(SparseStructure(str(folder))),
        "facts for checkpoints": lambda: facts_of(opened[0]),
        "content key": lambda: opened[0].content_key(),
        "the validation split": lambda: opened[0].for_split("val"),
        "the order of an epoch": lambda: Order(len(opened[0]), 0).items(0, BATCH),
        "all sources": lambda: opened[0].texts("source"),
    }
    return [[what, *timed(work), memory()["RssAnon"] - before] for what, work in works.items()]


def random_access(folder: Path) -> list[list]:
    """Return rows: what reads, grids/s of the processor, ratio to the limit, which is to unpack frames in memory."""
    import pyarrow

    from trellis.datasets.shards import Shard, shards_in
    from trellis.datasets.sparse_structure import SparseStructure

    torch.set_num_threads(1)
    dataset = SparseStructure(str(folder))
    shard = Shard(shards_in(folder)[0])
    frames, codec = shard.column("grid").to_pylist(), pyarrow.Codec("zstd")

    def unpack(rows: np.ndarray) -> None:
        for row in rows.tolist():
            zlib.crc32(frames[row])
            codec.decompress(frames[row], RESOLUTION**3 // 8)

    limit, rate = random_rate(unpack, len(frames)), random_rate(dataset.get_batch, len(dataset))
    return [["the library alone, from memory", limit, 1.0], ["a batch of the dataset", rate, rate / limit]]


def loading(rank: int, world: int, folder: Path, meeting: str) -> list[list]:
    """Load as one rank of training, and unpack grids, which a GPU would do.

    Return rows: rank, objects loaded by all ranks, samples/s of this one, by the clock and of the processor, MEMORY.
    """
    import torch.distributed as dist

    from trellis.datasets.batches import endless_batches
    from trellis.datasets.sparse_structure import SparseStructure

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    dataset = SparseStructure(str(folder))
    batches = endless_batches(dataset, BATCH, seed=0, start=0, device=CPU, num_workers=0, prefetch=True)
    each, rows = max(1, min(LOADED, len(dataset)) // (PARTS * BATCH * world)), []
    for part in range(PARTS):
        dist.barrier()
        seconds, own = timed(lambda: [next(batches)["ss"].shape for _ in range(each)])
        rates = each * BATCH / seconds, each * BATCH / own
        rows.append([rank, (part + 1) * each * BATCH * world, *rates, *memory().values()])
    batches.close()
    dist.barrier()
    dist.destroy_process_group()
    return rows


def two_ranks(folder: Path) -> list[list]:
    """Return the rows of two ranks that load at the same time."""
    with tempfile.TemporaryDirectory() as meeting, multiprocessing.get_context("spawn").Pool(2) as pool:
        tasks = [(rank, 2, folder, f"{meeting}/store") for rank in range(2)]
        return [row for rows in pool.starmap(loading, tasks, chunksize=1) for row in rows]


def damages(folder: Path) -> list[list]:
    """Return rows: what was done to a shard, what the error says when it is opened and read."""
    from trellis.datasets.shards import Shard
    from trellis.datasets.sparse_structure import SparseStructure

    [*shards] = sorted(folder.glob("*.arrow"))
    victim, rows = shards[len(shards) // 2], []
    content, shard = victim.read_bytes(), Shard(victim)
    frame = bytes(shard._grids[shard._starts[7] : shard._starts[8]])
    sha256 = shard.column("sha256")[7].as_py()

    def flipped(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    cases = {
        "a bit of the grid in row 7 flipped": flipped(content.index(frame) + 20),
        "a bit of a sha256 flipped": flipped(content.index(sha256.encode()) + 5),
        "a bit of the schema flipped": flipped(200),
        "cut to half": content[: len(content) // 2],
        "empty": b"",
    }
    for what, damaged in cases.items():
        with tempfile.TemporaryDirectory() as copy:
            for path in shards:
                Path(copy, path.name).symlink_to(path.resolve())
            Path(copy, victim.name).unlink()
            Path(copy, victim.name).write_bytes(damaged)
            message = "no error"
            with contextlib.suppress(DataError):
                try:
                    dataset = SparseStructure(copy, split="all")
                    dataset.get_batch(dataset.find([sha256]))
                except DataError as error:
                    message = str(error).replace(f"{copy}/", "")
                    raise
        rows.append([what, message])
    return rows


def formats(folder: Path) -> list[list]:
    """Return rows: format, bytes an object, seconds to open, grids/s, private MiB."""
    from trellis.datasets.sparse_structure import SparseStructure

    dataset = SparseStructure(str(folder), split="all")
    count = min(FORMAT_OBJECTS, len(dataset))
    everything = np.arange(count)
    bits, names = dataset.get_batch(everything)["bits"].numpy(), dataset.texts("sha256", everything)
    rows = []
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        for number, (name, stored) in enumerate(FORMATS.items()):
            target = Path(place, str(number))
            target.mkdir()
            try:
                stored.write(target, bits, names)
            except ImportError:
                continue
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            seconds, rate, private = apart(measure_format, name, target, count)  # type: ignore[misc]
            rows.append([name, size / count, seconds, rate, private])
    return rows


def measure_format(name: str, folder: Path, count: int) -> tuple[float, float, float]:
    """Return the seconds to open a format, its grids/s of the processor, and private MiB that it takes."""
    torch.set_num_threads(1)
    stored, opened = FORMATS[name], []
    stored.open(folder)  # imports
    before = memory()["RssAnon"]
    seconds, _ = timed(lambda: opened.append(stored.open(folder)))
    return seconds, random_rate(opened[0], count), memory()["RssAnon"] - before


def measure(args: argparse.Namespace) -> None:
    """Measure, print the report and write it."""
    make_shards(args.folder, args.objects, args.processes)
    shards = sorted(args.folder.glob("*.arrow"))
    size = sum(path.stat().st_size for path in shards)
    work = {"objects": args.objects, "resolution": RESOLUTION}
    report = Report("A data set in shards", __file__, args.argv, CPU, args.output, work)
    rates = apart(random_access, args.folder)
    ranks = two_ranks(args.folder)
    parts: list[str | Table] = [
        f"{args.objects} made-up objects of {RESOLUTION}³ in {len(shards)} shards, {size / args.objects:.0f} bytes an "
        "object, files in the page cache.",
        Table(COLUMNS, rates, f"One core, batches of {BATCH}"),  # type: ignore[arg-type]
        Table(
            [Column("what", "key"), Column("s"), Column("s of the processor"), Column("private MiB since the imports")],
            apart(opening, args.folder),  # type: ignore[arg-type]
            "Start of a run, one core",
        ),
        Table(
            [
                Column("rank", "key"),
                Column("objects", "key"),
                Column("samples/s"),
                Column("of the processor"),
                *map(Column, MEMORY),
            ],
            ranks,
            "Two ranks that load and unpack at the same time; samples/s of each, memory in MiB",
        ),  # fmt: skip
        Table(
            [Column("damage", "key"), Column("error")],
            apart(damages, args.folder),  # type: ignore[arg-type]
            "One shard damaged",
        ),
    ]
    print(report.write(*parts))
    if args.formats:
        parts.append(WHY_ARROW)
        parts.append(
            Table(
                [
                    Column("format", "key"),
                    Column("bytes an object"),
                    Column("s to open"),
                    Column("grids/s"),
                    Column("private MiB"),
                ],
                formats(args.folder),
                f"Formats, {min(FORMAT_OBJECTS, args.objects)} objects: random grids/s of the processor",
            )  # fmt: skip
        )
        print(report.write(*parts))


def main(argv: list[str] | None = None) -> int:
    flags = common.parser(__doc__ or "", data=False)
    flags.add_argument("--folder", type=Path, required=True, help="folder of the made-up shards; 1.2 GB a million")
    flags.add_argument("--objects", type=int, default=1_000_000, help="made-up objects (default: a million)")
    flags.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that make them")
    flags.add_argument("--formats", action="store_true", help="compare formats too")
    args = flags.parse_args(argv)
    args.argv = argv
    return run_command(measure, args)


if __name__ == "__main__":
    sys.exit(main())
