"""The sha256 of many files, on this machine or on a Ray cluster."""

import errno
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from trellis.grids.mesh_cluster import Unseen, check_seen, slots_of_node
from trellis.utils.errors import DataError
from trellis.utils.files import host_name
from trellis.utils.ray_cluster import Cluster, Lost, Slot

from .inputs import Stamp, sha256_of, stamp_of

Hashed = tuple[Stamp, str] | OSError
"""The stamp of a file before it was hashed, and its sha256, see `inputs`; or why it cannot be read."""
LARGEST = 256  # files that a worker is given at once


def hash_file(path: Path, known: Collection[str]) -> Hashed:
    """Return the hash of a file. known: as for `inputs.sha256_of`."""
    try:
        return stamp_of(path), sha256_of(path, known)
    except OSError as error:
        return error


def hash_here(paths: list[Path], known: Collection[str], threads: int, step: Callable[[], None]) -> list[Hashed]:
    """Return the hash of each file. step: called after each."""
    results = []
    pool = ThreadPoolExecutor(threads)
    try:
        for result in pool.map(partial(hash_file, known=known), paths):
            results.append(result)
            step()
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what is left
    return results


class NodeHasher:
    """What hashes files on a node."""

    def __init__(self, known: Collection[str], slot: Slot):
        self.known = known

    def __call__(self, path: Path) -> Hashed | Unseen:
        return hash_file(path, self.known) if os.path.lexists(path) else Unseen(host_name())


def hash_on_cluster(
    cluster: Cluster, paths: list[Path], known: Collection[str], threads: int | None, step: Callable[[], None]
) -> list[Hashed]:
    """Do as `hash_here` does, on all nodes of a cluster.

    threads: of a node; None: one for each CPU.
    Raise ConfigError if a node does not see a file that this machine sees, DataError if workers are lost over one.
    """
    has_gltf = any(path.suffix.lower() == ".gltf" for path in paths)
    results: dict[Path, Hashed] = {}

    def finish(path: Path, result: Hashed | Unseen | Lost) -> None:
        if isinstance(result, Lost):
            raise DataError(f"{path}: {result.reason}. Run the same command again to go on.")
        check_seen(cluster, path, result)
        results[path] = OSError(errno.ENOENT, os.strerror(errno.ENOENT)) if isinstance(result, Unseen) else result
        step()

    make = partial(NodeHasher, frozenset(known) if has_gltf else frozenset())
    cluster.run_tasks(make, partial(slots_of_node, threads), iter(paths), finish, LARGEST)
    return [results[path] for path in paths]
