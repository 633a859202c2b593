"""dataset.py verify: every row and every sum is read; what is damaged is named with the objects lost."""

import argparse
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset_toolkits.processes import run_in_processes
from dataset_toolkits.report import count
from dataset_toolkits.shard_files import chunks
from trellis.datasets.metadata import is_sha256
from trellis.datasets.remote import is_url
from trellis.datasets.shards import Shard, require_pyarrow, shards_in
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.progress import say, waiting

from .objects import bits_of

SHOWN = 10  # damaged objects of a file that are named


class Finding(NamedTuple):
    """What was read of a shard."""

    path: Path
    rows: int  # 0 if it could not be opened
    lost: int
    problems: list[str]


def check_shard(path: Path, resolution: int) -> Finding:
    """Read a shard in full. Raise DataError if it is whole, but of another resolution."""
    try:
        shard = Shard(path)
    except DataError as error:
        return Finding(path, 0, 0, [str(error)])
    if shard.resolution != resolution:
        raise DataError(
            f"{path}: has grids of resolution {shard.resolution}, but {resolution} is asked for. Give --resolution "
            f"{shard.resolution}, and data of other resolutions in calls of their own."
        )
    problems = []
    for name in shard.names:
        try:
            shard.column(name)
        except DataError as error:
            problems.append(str(error))
    if problems:
        return Finding(path, len(shard), len(shard), problems)
    lost = 0
    for row, name in enumerate(shard.column("sha256").to_pylist()):
        problem = None
        if not is_sha256(name):
            problem = f"{path}: row {row}: sha256 {name!r} is not 64 lower-case hexadecimal digits"
        else:
            try:
                shard.bits(row)
            except DataError as error:
                problem = str(error)
        if problem is not None:
            lost += 1
            if lost <= SHOWN:
                problems.append(problem)
    if lost > SHOWN:
        problems.append(f"{path}: and {lost - SHOWN} more of its {len(shard)} objects")
    return Finding(path, len(shard), lost, problems)


def run(args: argparse.Namespace) -> int:
    if args.max_workers < 1:
        raise ConfigError(f"--max_workers {args.max_workers}: must be at least 1.")
    roots = [root.strip() for root in args.roots.split(",")]
    findings: list[Finding] = []
    whole = True
    objects = 0
    for root in roots:
        shards = [] if is_url(root) else shards_in(Path(root))
        found = _check_shards(shards, args.resolution, args.max_workers) if shards else []
        findings += found
        damaged = any(finding.problems for finding in found)
        if not damaged:  # what concerns several files, or files of another kind
            problems, rows = _check_root(root, args.resolution, grids=not shards)
            for problem in problems:
                say(problem)
            objects += rows
            whole &= not problems
        else:
            objects += sum(finding.rows for finding in found)
            whole = False
    lost = sum(finding.lost for finding in findings)
    bad = sum(bool(finding.problems) for finding in findings)
    unread = sum(not finding.rows for finding in findings)
    if whole:
        files = f" in {count(len(findings), 'shard')}" if findings else ""
        print(f"{args.roots}: {count(objects, 'object')}{files}, all whole")
        return 0
    if bad:
        unknown = f", and all objects of {count(unread, 'file')} that cannot be opened" if unread else ""
        print(f"{args.roots}: {bad} of {count(len(findings), 'shard')} damaged: {count(lost, 'object')} lost{unknown}")
    else:
        print(f"{args.roots}: not whole, see above")
    return 1


def _check_shards(paths: list[Path], resolution: int, workers: int) -> list[Finding]:
    """Read shards in processes, print what is wrong, and return what was found."""
    require_pyarrow()
    found: list[Finding] = []
    with waiting("verifying", len(paths), "shard") as progress:

        def done(finding: Finding) -> None:
            for problem in finding.problems:
                say(problem)
            found.append(finding)
            progress(len(found))

        try:
            run_in_processes(partial(check_shard, resolution=resolution), paths, min(workers, len(paths)), done)
        except BrokenProcessPool as error:
            read = {finding.path for finding in found}
            left = [str(path) for path in paths if path not in read]
            raise DataError(
                f"a process that reads shards was killed; one of {', '.join(left[:3])}"
                f"{' …' if len(left) > 3 else ''} may be the reason. Try again with --max_workers 1."
            ) from error
    return found


def _check_root(root: str, resolution: int, grids: bool) -> tuple[list[str], int]:
    """Open a root as training does, and with `grids` read each grid. Return what is wrong, and the objects."""
    from trellis.datasets.sparse_structure import SparseStructure  # needs torch, which workers need not load

    try:
        dataset = SparseStructure(root, resolution=resolution, split="all")
    except DataError as error:
        return [str(error)], 0
    problems: list[str] = []
    bad = 0
    if grids:
        with waiting(f"reading {root}", len(dataset)) as progress:
            for part in chunks(np.arange(len(dataset))):
                try:
                    bits_of(dataset, part)
                except DataError:
                    for index in part.tolist():
                        try:
                            bits_of(dataset, np.array([index]))
                        except DataError as error:
                            bad += 1
                            if bad <= SHOWN:
                                problems.append(str(error))
                progress(progress.done + len(part))
        if bad > SHOWN:
            problems.append(f"{root}: and {bad - SHOWN} more of its {len(dataset)} objects")
    return problems, len(dataset)
