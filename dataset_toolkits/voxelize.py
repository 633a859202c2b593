"""Turn meshes and volumes into voxel grids, `voxels/<sha256 of the file>.ply` and `metadata.csv`, as TRELLIS does.

    python dataset_toolkits/voxelize.py --input meshes/ --output_dir data/voxels
    python dataset_toolkits/voxelize.py --input meshes/ --output_dir data/packed --format shards

A voxel is occupied if a triangle meets it: a grid is the surface, not the solid. The bounding box of the mesh is
centered and its longest edge made 1; `--normalization shapellm` scales as ShapeLLM-Omni does, whose token ids
depend on it. A label map of a scan (NIfTI, NRRD, MetaImage) gives a grid for each organ.
Run it again after an interruption: finished files are skipped. Files that cannot be voxelized are listed with the
reason in `failed.csv`. `--dry_run` says what there is to do and writes nothing.
A folder of TRELLIS as --input (`metadata.csv`, `renders/<sha256>/mesh.ply`, already normalized) gets its voxels
beside the renders, or in --output_dir. `--format shards` writes shards (trellis/datasets/shards.py) in place of voxel
files and metadata.csv, for more objects than a file system likes as files.
"""

import argparse
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import estimate, inputs, records, report, work
from dataset_toolkits.claim import claimed
from dataset_toolkits.plan import Job, Plan, is_trellis_root, plan_files, plan_renders
from dataset_toolkits.shard_files import GridBuffer, columns_of_row
from dataset_toolkits.work import Made, Outcome, Settings, division, input_key, is_volume, make_grids, time_factor
from trellis.datasets.metadata import SPLITS
from trellis.datasets.remote import is_url
from trellis.datasets.shards import require_pyarrow
from trellis.grids import placing
from trellis.grids.mesh_cluster import run_on_cluster
from trellis.grids.mesh_pool import memory_limit, run_in_pool
from trellis.grids.volumes import FILLS
from trellis.utils import signals
from trellis.utils.command import (
    available_cores,
    check_output_folder,
    error_of_system,
    report_interruption,
    run_command,
)
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.files import atomic_write, remove_leftovers
from trellis.utils.progress import waiting
from trellis.utils.ray_cluster import Cluster, joined

PACKAGES = ("trellis", "dataset_toolkits")  # what workers on other machines need of the project
WRITERS = 16  # threads that write what a Ray cluster has made: each file waits for the disk
INTERRUPTED = "interrupted: run the same command again to go on"
COLUMNS = ("sha256", "name", "split", "up_axis", "normalization", "fill", "axis", "notes", "mm_per_cell", "frame")
SHARD_SECONDS = 300  # after which grids are written as a shard, however few: what a killed run may lose


def voxelize(args: argparse.Namespace, cluster: Cluster | None = None) -> int:
    """Voxelize this rank's share, bring metadata.csv and failed.csv up to date, and print a summary.

    cluster: of Ray, which does the work; None: this machine.

    Return the exit code: 0, or 128 + its number after a signal. Raise UserError if nothing could be voxelized, or if
    the folder cannot be written.
    """
    started = time.perf_counter()
    root = Path(args.output_dir or args.input[0])
    from_trellis = is_trellis_root(args.input[0])
    args.up_axis = args.up_axis or records.axis_of_folder(root) or "auto"
    settings = settings_of(args)
    shards = args.format == "shards"
    if shards and (root / "metadata.csv").exists():
        raise DataError(
            f"{root}: has metadata.csv, so its grids are voxel files: leave --format shards out, or give "
            "another --output_dir."
        )
    records.check_failed(root)
    with waiting("listing files"):
        found = None if from_trellis else inputs.find_files(args.input, exclude=root / "voxels")
    if found is not None:
        check_volume_flags(args, found)
    has_volumes = found is not None and any(map(is_volume, found.files.values()))
    of_volumes = (settings.fill, *division(settings)) if has_volumes else ("",) * len(records.OF_VOLUMES)
    grid_format = records.SHARDS if shards else ""
    key = (settings.up_axis, str(settings.resolution), args.normalization, *of_volumes, grid_format)
    if args.dry_run:
        print_dry_run(args, root, found, settings, key)
        return 0
    check_output_folder(root)
    record_file = records.RecordFile(root, args.rank)
    try:
        with claimed(root, key, record_file.run) as known, record_file:
            if not shards:
                (root / "voxels").mkdir(parents=True, exist_ok=True)
            for folder in (root, root / "voxels", root / "records"):
                remove_leftovers(folder)
            if found is None:
                plan = plan_renders(Path(args.input[0]), args.rank, args.world_size)
            else:
                name_rank = partial(work.name_rank, settings=settings)
                threads = args.max_workers if cluster is None else args.workers_of_node
                sharing = args.rank, args.world_size, threads
                plan = plan_files(found, *sharing, known[0].grids, name_rank, cluster)
            run = Run(args, root, settings, key, plan, known, record_file, cluster)
            run.work()
            remove_leftovers(root / "voxels")  # of workers that were killed
            with waiting("writing tables"):
                rows, _ = records.update_tables(root, plan.base, shards)
    except OSError as error:  # of the output; an input that cannot be read is a line of failed.csv
        raise DataError(
            f"{error_of_system(error, root)}. Mend that and run the same command again: what is finished is kept."
        ) from error
    run.print_summary(rows, time.perf_counter() - started)
    if run.stopped:
        return report_interruption(run.stopped, INTERRUPTED)
    if (
        run.left_out
        and not run.made
        and not run.done
        and (args.world_size == 1 or not any(map(records.is_voxelized, rows.values())))
    ):
        name, reason = run.left_out[0]
        number = len(plan.share)
        raise DataError(
            f"none of the {number} files could be voxelized. The reasons are in {root / 'failed.csv'}; the first: "
            f"{name}: {reason}"
            if number > 1
            else f"the only file could not be voxelized: {name}: {reason}"
        )
    return 0


class Run:
    """One rank's run: what is done already, the work, and what it came to.

    made: sha256 of the new grids; finished: of the files that they are from.
    done: jobs that earlier runs have finished.
    left_out: (file, reason) of this run, also those of earlier runs that were not tried again.
    notes: (file, note) of the new grids.
    stopped: the signal that ended the work early.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        root: Path,
        settings: Settings,
        key: records.Settings,
        plan: Plan,
        known: tuple[records.Known, dict[str, records.Row]],
        record_file: records.RecordFile,
        cluster: Cluster | None = None,
    ):
        self.args, self.root, self.settings, self.plan = args, root, settings, plan
        self.record_file, self.cluster = record_file, cluster
        self.common = dict(zip(records.SETTINGS, key, strict=True))
        self.common["fill"] = "" if settings.fill == "surface" else self.common["fill"]
        self.known, self.failed_before = known
        self.base: dict[str, dict[str, object]] = {}
        self.buffer: GridBuffer | None = None
        if args.format == "shards":
            self.base = self._columns_of_base()
            columns = [*COLUMNS, *sorted({name for row in self.base.values() for name in row} - set(COLUMNS))]
            self.buffer = GridBuffer(root, record_file.run, settings.resolution, columns)
        self.waiting: list[tuple[Job, Outcome]] = []  # to record once their grids are in a shard
        self.written_at = time.monotonic()
        self.made: set[str] = set()
        self.finished: set[str] = set()
        self.left_out: list[tuple[str, str]] = []
        self.notes: list[tuple[str, str]] = []
        self.stopped: KeyboardInterrupt | None = None
        self.objects: dict[str, list[str]] = {}  # grids of a volume, by its key
        for sha256, row in self.known.grids.items():
            if row.get("input"):
                self.objects.setdefault(row["input"], []).append(sha256)
        self.done = [job for job in plan.jobs if self._is_done(job)]

    def _is_done(self, job: Job) -> bool:
        if is_volume(job.path):
            return input_key(job.sha256, job.path, self.settings) in self.known.inputs
        return job.sha256 in self.known.grids

    def work(self) -> None:
        """Do what is not done, and record each file as it ends. A signal that ends the work is kept in `stopped`."""
        done = {job.sha256 for job in self.done}
        todo = {job.sha256: job for job in self.plan.jobs if job.sha256 not in done}
        self._forget(done)
        for row in self.plan.failures:
            self._fail(**row)
        if self.args.split and self.buffer is None:
            for sha256 in (sha256 for job in self.done for sha256 in self._grids_of(job)):
                if not self.known.grids[sha256].get("split"):
                    self.record_file.write("split", sha256=sha256, split=self.args.split)
        if self.buffer is None:
            self._name_by_first_duplicate()
        workers = min(self.args.max_workers, len(todo))
        memory = memory_limit(self.args.memory, workers)
        volumes = [job for job in todo.values() if is_volume(job.path)]
        others = [job for job in todo.values() if not is_volume(job.path)]
        with waiting("voxelizing", len(todo), "file", shown=bool(todo)) as progress:

            def finish(task: tuple, result: Outcome | DataError) -> None:
                self._finish(todo[task[1]], result)
                progress(progress.done + 1)

            folder = self.root / "voxels" if self.buffer is None else None
            try:
                try:
                    for jobs in (others, volumes):
                        tasks = ((job.path, job.sha256, folder, self.settings, job.stamp) for job in jobs)
                        if jobs:
                            timeout = self.args.timeout * time_factor(jobs[0].path)
                            if self.cluster is None:
                                run_in_pool(make_grids, tasks, finish, min(workers, len(jobs)), timeout, memory)
                            else:
                                self._work_on_cluster(self.cluster, tasks, finish, timeout)
                finally:
                    self._write_shards()
            except KeyboardInterrupt as stopped:
                self.stopped = stopped

    def _finish(self, job: Job, result: Outcome | DataError) -> None:
        """Record what became of a job, or keep its grids for a shard."""
        if self.buffer is None or isinstance(result, DataError) or not result.made:
            self._record(job, result)
            return
        for made in result.made:
            if made.sha256 not in self.known.grids:  # of a volume that has lost others
                self.buffer.add(made.grid, self._columns(job, made))
        self.waiting.append((job, Outcome(tuple(made._replace(grid=b"") for made in result.made), result.missing)))
        if len(self.buffer) >= self.buffer.limit or time.monotonic() - self.written_at > SHARD_SECONDS:
            self._write_shards()

    def _columns_of_base(self) -> dict[str, dict[str, object]]:
        """Return what TRELLIS's metadata.csv says of the files of this rank, as columns of shards.

        Raise DataError for what shards cannot say.
        """
        columns = {}
        table = Path(self.args.input[0], "metadata.csv")
        for job in self.plan.jobs if self.plan.base else ():
            row = {
                name: text for name, text in self.plan.base[job.sha256].items() if name not in records.METADATA_FIELDS
            }
            if row.get("split", "") not in ("", *SPLITS):  # shards that say so could not be read
                raise DataError(f"{table}: split of {job.sha256} is {row['split']!r}; it must be train, val or blank")
            columns[job.sha256] = columns_of_row(str(table), row)
        return columns

    def _columns(self, job: Job, made: Made) -> dict[str, object]:
        """Return what a shard says of a grid."""
        row = (
            made.sha256,
            _name_of(job, made),
            self.args.split or "",
            self.common["up_axis"],
            self.common["normalization"],
            self.common["fill"] if is_volume(job.path) else "",
            made.axis,
            "; ".join(made.notes),
            made.mm_per_cell,
            made.frame,
        )
        return {**self.base.get(job.sha256, {}), **columns_of_row(str(job.path), dict(zip(COLUMNS, row, strict=True)))}

    def _write_shards(self) -> None:
        """Write the grids that wait for it as a shard, then record their jobs. A signal waits until that is done."""
        if self.buffer is None:
            return
        with signals.noted() as handled:
            before = handled.signum
            self.buffer.write()
            while self.waiting:
                self._record(*self.waiting.pop(0))
            self.written_at = time.monotonic()
        if handled.signum is not None and before is None:
            raise signals.Stopped(handled.signum)

    def _work_on_cluster(
        self,
        cluster: Cluster,
        tasks: Iterable[tuple],
        finish: Callable[[tuple, Outcome | DataError], None],
        timeout: float,
    ) -> None:
        """Do as run_in_pool does on a Ray cluster, whose nodes need not see the output folder."""
        writing: deque[tuple[Future, tuple, Outcome]] = deque()

        def write(folder: Path, files: dict[str, bytes]) -> None:
            for name, data in files.items():
                with atomic_write(folder / name) as partial:
                    partial.write_bytes(zlib.decompress(data))

        def finish_written(most: int) -> None:
            """Let at most so many files be written still."""
            while len(writing) > most or (writing and writing[0][0].done()):
                future, task, outcome = writing.popleft()
                future.result()
                finish(task, outcome)

        def take(task: tuple, result: tuple[Outcome, dict[str, bytes]] | DataError) -> None:
            if isinstance(result, DataError):
                finish(task, result)
                return
            outcome, files = result
            if files:
                writing.append((threads.submit(write, task[2], files), task, outcome))
            else:
                finish(task, outcome)
            finish_written(4 * WRITERS)

        workers, memory = self.args.workers_of_node, self.args.memory
        with ThreadPoolExecutor(WRITERS) as threads:
            try:
                run_on_cluster(cluster, work.make_grids_elsewhere, tasks, take, workers, timeout, memory)
            finally:
                finish_written(0)

    def _grids_of(self, job: Job) -> list[str]:
        """Return the grids that a finished job has."""
        return (
            self.objects.get(input_key(job.sha256, job.path, self.settings), [])
            if is_volume(job.path)
            else [job.sha256]
        )

    def _name_by_first_duplicate(self) -> None:
        """Record the first name of what is done, as one rank alone would. Another may have seen a later duplicate."""
        for job in self.done:
            for sha256 in self._grids_of(job):
                recorded = self.known.grids[sha256].get("file", "")
                file = _file_of(recorded, self.plan.listing)
                if file in self.plan.listing and job.names[0] < file:
                    part = recorded.removeprefix(file)
                    self.record_file.write("named", sha256=sha256, file=job.names[0] + part)

    def _forget(self, done: set[str]) -> None:
        """Clear the recorded reasons of files that are done or gone. Those that are tried anew get new ones."""
        folders = [inputs.printable(Path(item)) for item in self.args.input]
        if is_trellis_root(self.args.input[0]):
            folders = ["renders"]
        finished = {name for job in self.done for name in job.names}
        volumes = {name for job in self.done if is_volume(job.path) for name in job.names}
        for name, row in self.failed_before.items():
            file = _file_of(name, self.plan.listing)
            if file in volumes and file != name:  # an object that a finished volume does not give
                self.left_out.append((name, row["reason"]))
            elif file in finished or (
                file not in self.plan.listing and any(_is_below(name, folder) for folder in folders)
            ):
                self.record_file.write("cleared", file=name)

    def _fail(self, file: str, reason: str, sha256: str = "") -> None:
        self.left_out.append((file, reason))
        if self.failed_before.get(file) != {"file": file, "sha256": sha256, "reason": reason}:
            self.record_file.write("failed", file=file, sha256=sha256, reason=reason)

    def _record(self, job: Job, result: Outcome | DataError) -> None:
        """Record what became of a job. Earlier reasons of its files are replaced."""
        if isinstance(result, DataError):
            result, reasons = Outcome(()), dict.fromkeys(job.names, (job.sha256, str(result)))
        else:
            reasons = {f"{job.names[0]}#{part.part}": (part.sha256, part.reason) for part in result.missing}
        key = input_key(job.sha256, job.path, self.settings) if is_volume(job.path) else ""
        common = {name: value for name, value in self.common.items() if key or name not in records.OF_VOLUMES}
        for made in result.made:
            name = _name_of(job, made)
            if key or self.buffer is None:
                self.record_file.write(
                    "grid",
                    **common,
                    file=name,
                    split=self.args.split or "",
                    input=key,
                    notes="; ".join(made.notes),
                    **{name: getattr(made, name) for name in ("sha256", "num_voxels", "axis", "mm_per_cell", "frame")},
                )
            self.made.add(made.sha256)
            self.finished.add(job.sha256)
            self.notes += [(name, note) for note in made.notes]
        for name in self.failed_before:
            if name not in reasons and _file_of(name, job.names) in job.names:
                self.record_file.write("cleared", file=name)
        for name, (sha256, reason) in reasons.items():
            self._fail(name, reason, sha256)
        if key and (result.made or result.missing):
            self.record_file.write("input", input=key, file=job.names[0])

    def print_summary(self, rows: dict[str, records.Row], seconds: float) -> None:
        """Print counts, then notes and reasons by kind."""
        args, plan = self.args, self.plan
        good = {job.sha256 for job in self.done} | self.finished
        duplicates = sum(len(job.names) - 1 for job in plan.jobs if job.sha256 in good)
        rank = f" (rank {args.rank} of {args.world_size})" if args.world_size > 1 else ""
        names = (name for name, _ in (*self.notes, *self.left_out))
        objects = {name for name in names if name not in plan.listing}
        if any(is_volume(job.path) for job in plan.jobs):
            what = report.count(len(plan.share), "file")
            made, done = report.count(len(self.made), "new grid"), report.count(len(self.done), "file")
            parts = sum(name in objects for name, _ in self.left_out)
            left_out = report.count(len(self.left_out) - parts, "file")
            if parts:
                left_out = (f"{left_out} and " if parts < len(self.left_out) else "") + report.count(parts, "object")
        else:
            what = report.count(len(plan.share), "mesh", "meshes")
            made, done, left_out = f"{len(self.made)} new", str(len(self.done)), str(len(self.left_out))
        print(
            f"{self.root}: {what}{rank}: {made}, {done} done already, {report.count(duplicates, 'duplicate')}, "
            f"{left_out} left out; {seconds:.1f} s"
        )
        for line in report.by_kind(self.notes, objects):
            print(f"  noted: {line}")
        for line in report.by_kind(self.left_out, objects):
            print(f"  left out: {line}")
        if self.left_out:
            print(f"  all reasons: {self.root / 'failed.csv'}")
        grids = (sha256 for job in self.done for sha256 in self._grids_of(job))
        other = sum(rows[sha256]["split"] != args.split for sha256 in grids) if args.split else 0
        if other:
            where = self.root / "metadata.csv" if self.buffer is None else f"the shards of {self.root}"
            print(f"  {other} of those done already belong to another split in {where}, and stay there")


def _name_of(job: Job, made: Made) -> str:
    return f"{job.names[0]}#{made.part}" if made.part else job.names[0]


def _file_of(name: str, files: Container[str]) -> str:
    """Return the file of a recorded name, which is that of a file or FILE#OBJECT; both may have a # in them.

    Return the name itself if it is of none of these files.
    """
    file = name
    while file and file not in files:
        file = file.rpartition("#")[0]
    return file or name


def _is_below(name: str, folder: str) -> bool:
    if folder == ".":
        return not name.startswith(("/", ".."))
    return name.startswith(folder.rstrip("/") + "/")


def settings_of(args: argparse.Namespace) -> Settings:
    """Return how files become grids. Raise ConfigError if the table of labels cannot be read."""
    if is_trellis_root(args.input[0]):
        return Settings(args.resolution, "z", None)  # TRELLIS's meshes are z-up and lie in the cube already
    labels = None
    if args.labels is not None:
        from trellis.grids.volumes import load_labels

        labels = load_labels(args.labels)
    fill = args.fill or "surface"
    return Settings(args.resolution, args.up_axis, args.normalization, args.points, labels, args.components, fill)


def check_volume_flags(args: argparse.Namespace, found: inputs.Found) -> None:
    """Raise ConfigError for flags about volumes if no file is one."""
    if any(map(is_volume, found.files.values())):
        return
    given = {"--labels": args.labels, "--components": args.components, "--fill": args.fill}
    for flag, value in given.items():
        if value:
            raise ConfigError(f"{flag}: there is no volume among the files, and it is about volumes. Leave it out.")


def print_dry_run(
    args: argparse.Namespace, root: Path, found: inputs.Found | None, settings: Settings, key: records.Settings
) -> None:
    known, _ = records.known_grids(root, key)
    if found is None:
        plan = plan_renders(Path(args.input[0]), args.rank, args.world_size)
        found = inputs.Found(
            {job.names[0]: job.path for job in plan.jobs}, {row["file"]: row["reason"] for row in plan.failures}
        )
    else:
        share = set(sorted((*found.files, *found.left_out))[args.rank :: args.world_size])
        found = inputs.Found(
            {name: path for name, path in found.files.items() if name in share},
            {name: reason for name, reason in found.left_out.items() if name in share},
        )
    done = {_file_of(row.get("file", ""), found.files) for row in known.grids.values()}
    workers = min(args.max_workers, len(found.files))
    memory = memory_limit(args.memory, workers)
    print(f"{root}: dry run, nothing is written")
    with waiting("trying a few files"):
        lines = estimate.dry_run(found, done, settings, workers, args.timeout, memory, args.format == "shards")
    for line in lines:
        print(f"  {line}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files ({inputs.READ_SUFFIXES}), folders, which are searched recursively, or one TRELLIS folder",
    )
    parser.add_argument("--output_dir", help="gets voxels/ and metadata.csv, or shards; default: the TRELLIS folder")
    parser.add_argument(
        "--format",
        choices=("ply", "shards"),
        default="ply",
        help="a voxel file for each grid (default), or shards of 4096 grids of 64^3. A folder has one of them",
    )
    parser.add_argument(
        "--up_axis",
        choices=placing.UP_AXES,
        help="the files' up axis, which becomes the grids' z: auto takes what each file or its format says (glTF y, "
        "STL z), and files that do not say as they are; y or z holds for all files; keep leaves all axes alone, "
        "without saying what they are. A folder has one value. Default: that of --output_dir, else auto",
    )
    parser.add_argument(
        "--normalization",
        choices=placing.NORMALIZATIONS,
        default="cube",
        help="cube (default): the box is centered and its longest edge made 1; shapellm: one "
        "minimum and maximum for all axes, and y-up turned to z-up, as ShapeLLM-Omni does",
    )
    parser.add_argument("--resolution", type=int, default=64, help="voxels along an edge (default 64)")
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="split of the new grids, and of voxel files done already that have none; default: none",
    )
    parser.add_argument("--rank", type=int, default=0, help="number of this process, from 0")
    parser.add_argument("--world_size", type=int, default=1, help="number of processes that share the work")
    parser.add_argument(
        "--max_workers",
        type=int,
        help="worker processes of one thread each, with --ray on each node; default: one per core",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="do the work on a Ray cluster, see docs/cluster.md: auto for the one of this machine, or host:port; "
        "without ADDRESS, one that is made of this machine",
    )
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds for a mesh (default 120); a volume gets ten times as much"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="GiB for a file, where the system can limit it (Linux); default: the free memory divided by the workers, "
        "at least 2. Files that need more are tried once more at the end, one at a time with the memory of all workers",
    )
    parser.add_argument("--points", action="store_true", help="take files that have points and no triangles, as points")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help='label maps: the objects to take, a JSON file such as {"1": "liver", "lungs": [10, 11]}, or '
        "totalsegmentator; default: every label",
    )
    parser.add_argument(
        "--components", action="store_true", help="label maps: take each connected part of an object by itself"
    )
    parser.add_argument("--fill", choices=FILLS, help="volumes: the surface, one voxel thick (default), or all")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="write nothing; say what there is to do, what would be left out, and about how long it would take",
    )
    args = parser.parse_args(argv)
    args.workers_of_node = args.max_workers
    if args.max_workers is None:
        args.max_workers = available_cores()
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that cannot run."""
    records.check_rank(args.rank, args.world_size)
    limits = (("resolution", 2, 1024), ("max_workers", 1, 1024), ("timeout", 1e-3, 1e6), ("memory", 0.1, 1e5))
    for name, low, high in limits:
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise ConfigError(f"--{name} {getattr(args, name)}: must lie between {low:g} and {high:g}.")
    if args.ray is not None and args.world_size > 1:
        raise ConfigError(
            "--ray does not go with --rank and --world_size: Ray shares the work itself. Give one of them."
        )
    if args.ray is not None and args.dry_run:
        raise ConfigError("--dry_run tries files on this machine, without Ray. Leave --ray out.")
    trellis_roots = [path for path in args.input if is_trellis_root(path)]
    if trellis_roots and len(args.input) > 1:
        raise ConfigError(f"--input {trellis_roots[0]}: a TRELLIS folder must be the only input.")
    if trellis_roots and args.up_axis == "y":
        raise ConfigError(f"--up_axis y: the meshes in {trellis_roots[0]} are z-up. Leave the flag out.")
    if trellis_roots and (args.labels or args.components or args.fill or args.points):
        raise ConfigError(f"--labels, --components, --fill, --points: {trellis_roots[0]} has meshes. Leave them out.")
    if trellis_roots and args.normalization != "cube":
        raise ConfigError(
            f"--normalization {args.normalization}: the meshes in {trellis_roots[0]} are normalized "
            "already. Leave the flag out."
        )
    placing.check_settings(args.up_axis or "auto", args.normalization)
    if args.format == "shards":
        require_pyarrow()
        if args.resolution % 2:
            raise ConfigError(f"--resolution {args.resolution}: shards hold grids of an even resolution.")
    if is_url(args.output_dir):
        raise ConfigError(
            f"--output_dir {args.output_dir}: is a URL. Write to a folder of this machine, and copy that."
        )
    if not trellis_roots and not args.output_dir:
        raise ConfigError("--output_dir is missing. Only a TRELLIS folder has a default: itself.")


def run(args: argparse.Namespace) -> int:
    check_args(args)
    if args.ray is None:
        return voxelize(args)
    with joined(args.ray, PACKAGES) as cluster:
        return voxelize(args, cluster)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(run, args, INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
