"""Meshes read on a Ray cluster: a pool of worker processes on each node, with the limits of `mesh_pool`."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ..utils.errors import ConfigError, DataError
from ..utils.files import host_name
from ..utils.ray_cluster import Cluster, Lost, Node, Slot
from .mesh_pool import LostTask, MeshPool, memory_limit

ATTEMPTS = 2  # workers that may be lost over a file, and as many again in the end
LARGEST = 64  # files that a pool is given at once; more of one node's work would be done again if it is lost


class Unseen(DataError):
    """A file that is not there on a node, with the node's name."""


def check_seen(cluster: Cluster, path: str | os.PathLike, result: Any) -> None:
    """Raise ConfigError if a result is an Unseen of a file that this machine sees."""
    if isinstance(result, Unseen) and os.path.lexists(path):
        raise ConfigError(
            f"--ray {cluster.address}: node {result} does not see {os.fspath(path)}, as this machine does. Every node "
            "must have the input at the same path: mount it there, or leave the node out."
        )


def slots_of_node(threads: int | None, node: Node) -> list[Slot]:
    """Return one slot with all CPUs of a node, or as many as threads are asked for; none without CPUs."""
    threads = threads or node.cpus
    return [Slot(min(threads, node.cpus), 0, threads)] if node.cpus else []


class NodePool:
    """The pool of one node.

    function: called with the parts of a task, of which the first is the path of a file.
    timeout: seconds for a task.
    memory: GiB for a task; None: its share of what is free on the node.
    alone: give the only task the memory of all workers.
    """

    def __init__(self, function: Callable, timeout: float, memory: float | None, alone: bool, slot: Slot):
        self.function, self.timeout = function, timeout
        self.memory = memory_limit(memory and memory * slot.cpus if alone else memory, slot.threads)
        self.pool = MeshPool(slot.threads)
        self.pool.submit(int, timeout=timeout).result()  # raises ConfigError if workers cannot start

    def __call__(self, task: tuple) -> Any:
        """Return what the function returns, or the DataError in its place."""
        if not os.path.lexists(task[0]):
            return Unseen(host_name())
        try:
            return self.pool.submit(self.function, *task, timeout=self.timeout, memory=self.memory).result()
        except DataError as error:
            return error


def run_on_cluster(
    cluster: Cluster,
    function: Callable,
    tasks: Iterable[tuple],
    finish: Callable[[tuple, Any], None],
    max_workers: int | None,
    timeout: float,
    memory: float | None = None,
) -> None:
    """Do as `mesh_pool.run_in_pool` does, on all nodes of a cluster. Tasks that were lost are tried once more as there.

    max_workers: worker processes of a node; None: one for each of its CPUs.
    memory: GiB for a task; None: its share of what is free on its node.
    Raise ConfigError if a node does not see a file that this machine sees.
    """
    lost: list[tuple] = []

    slots = partial(slots_of_node, max_workers)

    def one_at_a_time(node: Node) -> list[Slot]:
        return [Slot(slot.cpus, 0, 1) for slot in slots(node)]

    def take(task: tuple, result: Any) -> None:
        check_seen(cluster, task[0], result)
        if isinstance(result, Unseen):
            result = DataError("cannot be read: No such file or directory")
        elif isinstance(result, Lost):
            result = DataError(f"{result.reason}, perhaps out of memory: simplify it")
        finish(task, result)

    def take_or_keep(task: tuple, result: Any) -> None:
        if isinstance(result, (LostTask, Lost)):
            lost.append(task)
        else:
            take(task, result)

    work = partial(NodePool, function, timeout, memory)
    cluster.run_tasks(partial(work, False), slots, tasks, take_or_keep, LARGEST, attempts=ATTEMPTS)
    cluster.run_tasks(partial(work, True), one_at_a_time, lost, take, most=len(lost), attempts=ATTEMPTS)
