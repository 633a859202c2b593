"""What there is to do for one rank: files listed, hashed, and those of the same bytes put together."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from trellis.utils.command import available_cores
from trellis.utils.errors import DataError
from trellis.utils.progress import waiting
from trellis.utils.ray_cluster import Cluster

from . import inputs, records
from .hashing import hash_here, hash_on_cluster
from .work import is_volume

HASHED_HERE = 1000  # files that are hashed sooner than workers on other machines have started


class Job(NamedTuple):
    """A file to make grids of."""

    sha256: str
    path: Path
    names: tuple[str, ...]  # all files with these bytes; the first is `path`, and the one recorded
    stamp: inputs.Stamp | None = None  # of `path` before it was hashed; None if it was not hashed


class Plan(NamedTuple):
    """The share of this rank, before looking at what is done already."""

    jobs: list[Job]
    failures: list[records.Row]  # files that cannot be opened or are not read, as rows of failed.csv
    share: set[str]  # names of this rank's files
    listing: set[str]  # names of the files of all ranks
    base: dict[str, records.Row]  # rows of TRELLIS's metadata.csv


def plan_files(
    found: inputs.Found,
    rank: int,
    world_size: int,
    threads: int | None,
    known: Collection[str] = (),
    name_rank: Callable[[Path], int] = lambda path: 0,
    cluster: Cluster | None = None,
) -> Plan:
    """Hash this rank's share of some files; files with the same bytes make one job.

    threads: that hash here, or on each node of a Ray cluster; None: one for each CPU of a node.
    known: sha256 of the grids that exist.
    name_rank: of files with the same bytes, one of the lowest comes first, see `work.name_rank`.
    """
    listing = sorted((*found.files, *found.left_out))
    share = listing[rank::world_size]
    failures = [{"file": name, "reason": found.left_out[name]} for name in share if name in found.left_out]
    files = {name: found.files[name] for name in share if name in found.files}

    with waiting("hashing", len(files), "file") as progress:

        def step() -> None:
            progress(progress.done + 1)

        if cluster is None or len(files) < HASHED_HERE:
            results = hash_here([*files.values()], known, threads or available_cores(), step)
        else:
            results = hash_on_cluster(cluster, [*files.values()], known, threads, step)
    by_sha: dict[str, list[str]] = {}
    stamps: dict[str, inputs.Stamp] = {}
    for name, result in zip(files, results, strict=True):
        if isinstance(result, OSError):
            failures.append({"file": name, "reason": f"cannot be read: {result.strerror}"})
        else:
            stamps[name], sha256 = result
            by_sha.setdefault(sha256, []).append(name)
    for names in by_sha.values():
        if len(names) > 1:  # the rank may look into the file
            names.sort(key=lambda name: (name_rank(files[name]), name))
    jobs = [Job(sha256, files[names[0]], tuple(names), stamps[names[0]]) for sha256, names in by_sha.items()]
    return Plan(jobs, failures, set(share), set(listing), {})


def plan_meshes(paths: list[str], output_dir: Path, threads: int | None, cluster: Cluster | None = None) -> Plan:
    """List and hash the mesh files of some files and folders, for programs that take meshes and no volumes.

    output_dir: its folder `voxels` is not searched.
    threads, cluster: as for `plan_files`.
    Volumes are among the failures. Raise DataError if there is no mesh.
    """
    found = inputs.find_files(paths, exclude=output_dir / "voxels")
    volumes = {name for name, path in found.files.items() if is_volume(path)}
    reason = "is a volume: make grids of it with voxelize.py, and give their folder"
    left_out = {**found.left_out, **dict.fromkeys(volumes, reason)}
    files = {name: path for name, path in found.files.items() if name not in volumes}
    if not files:
        raise DataError(
            f"{', '.join(paths)}: no mesh, only volumes. Make grids with voxelize.py, and give their folder."
        )
    return plan_files(inputs.Found(files, left_out), 0, 1, threads, cluster=cluster)


def plan_renders(root: Path, rank: int, world_size: int) -> Plan:
    """List this rank's share of `renders/<sha256>/mesh.ply` in a folder of TRELLIS."""
    _, base = records.read_rows(root)
    if not base:
        raise DataError(f"{root / 'metadata.csv'}: lists no object. Make it with TRELLIS's toolkit.")
    names = {sha256: f"renders/{sha256}/mesh.ply" for sha256 in sorted(base)}
    share = dict(list(names.items())[rank::world_size])
    jobs, failures = [], []
    for sha256, name in share.items():
        reason = inputs.obstacle(root / name)
        if reason is None:
            jobs.append(Job(sha256, root / name, (name,)))
        else:
            missing = not (root / name).exists()
            failures.append(
                {"file": name, "sha256": sha256, "reason": "is missing: not rendered yet?" if missing else reason}
            )
    return Plan(jobs, failures, set(share.values()), set(names.values()), base)


def is_trellis_root(path: str) -> bool:
    """Return whether a folder is a data root of TRELLIS, with its meshes in renders/."""
    return os.path.isfile(Path(path, "metadata.csv")) and os.path.isdir(Path(path, "renders"))
