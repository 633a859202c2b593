"""Turn meshes into voxel grids, `voxels/<sha256 of the mesh file>.ply` and `metadata.csv`, as TRELLIS does.

    python dataset_toolkits/voxelize.py --input meshes/ --output_dir data/voxels --up_axis y

A voxel is occupied if a triangle meets it: a grid is the surface, not the solid. The bounding box of the mesh is
centered and its longest edge made 1; `--normalization shapellm` scales as ShapeLLM-Omni does, whose token ids
depend on it. Run it again after an interruption: finished files are skipped. Files that cannot be voxelized are
listed with the reason in `failed.csv`.
A folder of TRELLIS as --input (`metadata.csv`, `renders/<sha256>/mesh.ply`, already normalized) gets its voxels
beside the renders, or in --output_dir.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import records
from trellis.grids import meshes, placing
from trellis.grids.mesh_pool import run_in_pool
from trellis.utils.command import available_cores, run_command
from trellis.utils.errors import ConfigError, DataError

REASONS_SHOWN = 5
INTERRUPTED = "interrupted: run the same command again to go on"


class Job(NamedTuple):
    """A mesh to voxelize."""

    sha256: str
    path: Path
    names: tuple[str, ...]  # all files with these bytes; the first is the one recorded


class Plan(NamedTuple):
    """The share of this rank, before looking at what is done already."""

    jobs: list[Job]
    failures: list[records.Row]  # files that cannot be opened, as rows of failed.csv
    share: set[str]  # names of this rank's files
    listing: set[str]  # names of the files of all ranks
    base: dict[str, records.Row]  # rows of TRELLIS's metadata.csv


def plan_meshes(inputs: list[str], output_dir: Path, rank: int, world_size: int, threads: int) -> Plan:
    """List the mesh files and hash this rank's share; files with the same bytes make one job."""
    listing = records.find_meshes(inputs, exclude=output_dir / "voxels")
    share = dict(list(listing.items())[rank::world_size])

    def attempt(path: Path) -> str | OSError:
        try:
            return records.sha256_of(path)
        except OSError as error:
            return error

    by_sha: dict[str, list[str]] = {}
    failures = []
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(attempt, share.values())
        hashes = tqdm(hashes, "hash", len(share), leave=False, delay=1, **bar_style())
        for name, result in zip(share, hashes, strict=True):
            if isinstance(result, OSError):
                failures.append({"file": name, "reason": f"cannot be read: {result.strerror}"})
            else:
                by_sha.setdefault(result, []).append(name)
    jobs = [Job(sha256, share[names[0]], tuple(names)) for sha256, names in by_sha.items()]
    return Plan(jobs, failures, set(share), set(listing), {})


def plan_renders(root: Path, rank: int, world_size: int) -> Plan:
    """List this rank's share of `renders/<sha256>/mesh.ply` in a folder of TRELLIS."""
    _, base = records.read_rows(root)
    if not base:
        raise DataError(f"{root / 'metadata.csv'}: lists no object. Make it with TRELLIS's toolkit.")
    names = {sha256: f"renders/{sha256}/mesh.ply" for sha256 in sorted(base)}
    share = dict(list(names.items())[rank::world_size])
    jobs, failures = [], []
    for sha256, name in share.items():
        if (root / name).is_file():
            jobs.append(Job(sha256, root / name, (name,)))
        else:
            failures.append({"file": name, "sha256": sha256, "reason": "is missing: not rendered yet?"})
    return Plan(jobs, failures, set(share.values()), set(names.values()), base)


def is_trellis_root(path: str) -> bool:
    """Return whether a folder is a data root of TRELLIS, with its meshes in renders/."""
    return Path(path, "metadata.csv").is_file() and Path(path, "renders").is_dir()


def bar_style() -> dict:
    """Return options of progress bars: smooth on a terminal, a line now and then in a log."""
    return {"unit": "mesh", "mininterval": 0.1 if sys.stderr.isatty() else 30, "maxinterval": 60}


def voxelize(args: argparse.Namespace) -> int:
    """Voxelize this rank's share, bring metadata.csv and failed.csv up to date, and print a summary.

    Return the exit code: 0, or 130 after Ctrl-C. Raise UserError if nothing could be voxelized.
    """
    started = time.perf_counter()
    from_trellis = is_trellis_root(args.input[0])
    root = Path(args.output_dir or args.input[0])
    if from_trellis:
        plan = plan_renders(Path(args.input[0]), args.rank, args.world_size)
    else:
        plan = plan_meshes(args.input, root, args.rank, args.world_size, args.max_workers)
    if from_trellis:
        up_axis, normalization = "z", None  # TRELLIS's meshes are z-up and lie in the cube already
    else:
        up_axis, normalization = args.up_axis or placing.default_up_axis(args.normalization), args.normalization
    known = records.known_grids(root, up_axis, args.resolution, args.normalization)
    todo = {job.sha256: job for job in plan.jobs if job.sha256 not in known}
    failures = list(plan.failures)
    made = set()

    if todo:
        meshes.require_trimesh()
        meshes.require_open3d()
    (root / "voxels").mkdir(parents=True, exist_ok=True)
    exit_code = 0
    with (
        records.RecordFile(root, args.rank) as record_file,
        tqdm(total=len(todo), desc="voxelize", disable=not todo, **bar_style()) as bar,
    ):

        def finish(task: tuple, result: int | DataError) -> None:
            job = todo[task[1].stem]
            if isinstance(result, DataError):
                failures.extend({"file": name, "sha256": job.sha256, "reason": str(result)} for name in job.names)
            else:
                record_file.write(
                    (job.sha256, result, up_axis, args.resolution, args.split or "", job.names[0], args.normalization)
                )
                made.add(job.sha256)
            bar.update()

        tasks = (
            (job.path, root / "voxels" / f"{job.sha256}.ply", args.resolution, up_axis, normalization)
            for job in todo.values()
        )
        try:
            if todo:
                workers = min(args.max_workers, len(todo))
                run_in_pool(meshes.voxelize_file, tasks, finish, workers, args.timeout)
        except KeyboardInterrupt:
            exit_code = 130

    done = {job.sha256 for job in plan.jobs} - set(todo)
    splits = {sha256: args.split for sha256 in done} if args.split else {}
    rows = records.update_metadata(root, plan.base, splits)
    folders = tuple("renders/" if from_trellis else f"{records.printable(Path(item))}/" for item in args.input)
    records.update_failed(
        root,
        failures,
        outdated=lambda name: name in plan.share or (name not in plan.listing and name.startswith(folders)),
    )

    print_summary(args, root, plan, failures, made, done, time.perf_counter() - started)
    other_split = sum(rows[sha256]["split"] != args.split for sha256 in done) if args.split else 0
    if other_split:
        print(
            f"  {other_split} of those done already belong to another split in {root / 'metadata.csv'}, and stay there"
        )
    if exit_code:
        print(INTERRUPTED, file=sys.stderr)
    elif (
        failures
        and not made
        and not done
        and (args.world_size == 1 or not any(map(records.is_voxelized, rows.values())))
    ):
        raise DataError(
            f"none of the {len(plan.share)} meshes could be voxelized. The reasons are in "
            f"{root / 'failed.csv'}; the first: {failures[0]['file']}: {failures[0]['reason']}"
        )
    return exit_code


def print_summary(
    args: argparse.Namespace,
    root: Path,
    plan: Plan,
    failures: list[records.Row],
    made: set[str],
    done: set[str],
    seconds: float,
) -> None:
    duplicates = sum(len(job.names) - 1 for job in plan.jobs if job.sha256 in made | done)
    rank = f" (rank {args.rank} of {args.world_size})" if args.world_size > 1 else ""
    print(
        f"{root}: {len(plan.share)} meshes{rank}: {len(made)} new, {len(done)} done already, "
        f"{duplicates} duplicates, {len(failures)} left out; {seconds:.1f} s"
    )
    for row in failures[:REASONS_SHOWN]:
        print(f"  left out: {row['file']}: {row['reason']}")
    if failures:
        print(f"  all reasons: {root / 'failed.csv'}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files ({' '.join(records.MESH_SUFFIXES)}), folders, which are searched "
        "recursively, or one TRELLIS folder",
    )
    parser.add_argument("--output_dir", help="gets voxels/ and metadata.csv; default: the TRELLIS folder")
    parser.add_argument(
        "--up_axis",
        choices=placing.UP_AXES,
        help="the files' up axis: y is turned to z-up (glTF), z is z-up already, keep "
        "(default) leaves the axes alone without saying what they are",
    )
    parser.add_argument(
        "--normalization",
        choices=placing.NORMALIZATIONS,
        default="cube",
        help="cube (default): the box is centered and its longest edge made 1; shapellm: one "
        "minimum and maximum for all axes, and y-up turned to z-up, as ShapeLLM-Omni does",
    )
    parser.add_argument("--resolution", type=int, default=64, help="voxels along an edge (default 64)")
    parser.add_argument("--split", choices=("train", "val"), help="split of the new grids; default: none")
    parser.add_argument("--rank", type=int, default=0, help="number of this process, from 0")
    parser.add_argument("--world_size", type=int, default=1, help="number of processes that share the work")
    parser.add_argument(
        "--max_workers",
        type=int,
        default=available_cores(),
        help="worker processes of one thread each; default: one per core",
    )
    parser.add_argument("--timeout", type=float, default=120, help="seconds for a file (default 120)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that cannot run."""
    records.check_rank(args.rank, args.world_size)
    for name, low, high in (("resolution", 2, 1024), ("max_workers", 1, 1024), ("timeout", 1e-3, 1e6)):
        if not low <= getattr(args, name) <= high:
            raise ConfigError(f"--{name} {getattr(args, name)}: must lie between {low:g} and {high:g}.")
    trellis_roots = [path for path in args.input if is_trellis_root(path)]
    if trellis_roots and len(args.input) > 1:
        raise ConfigError(f"--input {trellis_roots[0]}: a TRELLIS folder must be the only input.")
    if trellis_roots and args.up_axis == "y":
        raise ConfigError(f"--up_axis y: the meshes in {trellis_roots[0]} are z-up. Leave the flag out.")
    if trellis_roots and args.normalization != "cube":
        raise ConfigError(
            f"--normalization {args.normalization}: the meshes in {trellis_roots[0]} are normalized "
            "already. Leave the flag out."
        )
    placing.check_settings(args.up_axis or placing.default_up_axis(args.normalization), args.normalization)
    if not trellis_roots and not args.output_dir:
        raise ConfigError("--output_dir is missing. Only a TRELLIS folder has a default: itself.")


def run(args: argparse.Namespace) -> int:
    check_args(args)
    return voxelize(args)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run_command(run, args, INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
