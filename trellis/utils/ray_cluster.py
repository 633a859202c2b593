"""Tasks on a Ray cluster: done by workers on its nodes, with results that come back to this program.

A worker is a Ray actor that takes a part of a node, its slot, and does several tasks at a time there. This program
starts a worker for each slot, also on nodes that join later, gives out tasks in small batches, and gives those of a
worker or node that was lost to another one.
"""

import contextlib
import itertools
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from . import signals
from .errors import ConfigError, UserError
from .files import host_name

LOCAL = "local"  # the address of a cluster that is made of this machine for one run
STARTS = 3  # workers of a node that may be lost in a row before they are ready
LOOK_SECONDS = 5.0  # between two looks for nodes
# A batch comes back after this time, done or not, so that progress is seen and little is lost with a worker.
BATCH_SECONDS = 1.0
NOTE_SECONDS = 30.0  # without a worker, until a line says so
CONNECT_SECONDS = 10.0  # for the first node to answer
LEAVE_SECONDS = 10.0  # for workers to end
OBJECT_STORE = 80 * 2**20  # bytes of shared memory of a local cluster, near Ray's least: results are small


class Node(NamedTuple):
    """A node of the cluster, with the processors that Ray counts."""

    id: str
    name: str
    cpus: int
    gpus: int


class Slot(NamedTuple):
    """What a worker takes of its node.

    cpus, gpus: of those that Ray counts.
    threads: tasks at a time.
    """

    cpus: int
    gpus: int
    threads: int


class Lost(NamedTuple):
    """The result of a task over which too many workers were lost."""

    reason: str


class Process(NamedTuple):
    """A worker's process, by names that `files.atomic_write` gives temporary files."""

    host: str
    pid: int


class Cluster:
    """A Ray cluster that this program has joined, see `joined`.

    processes: of all workers that were ready once.
    ready: when the first of them was, of time.monotonic; None: none was yet.
    """

    def __init__(self, ray: Any, address: str):
        self.ray, self.address = ray, address
        self.processes: list[Process] = []
        self.ready: float | None = None

    def nodes(self) -> list[Node]:
        """Return the nodes that live."""
        return [
            Node(
                node["NodeID"],
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def run_tasks(
        self,
        make: Callable[[Slot], Callable[[Any], Any]],
        slots: Callable[[Node], Sequence[Slot]],
        tasks: Iterable[Any],
        finish: Callable[[Any, Any], None],
        largest: int = 1,
        most: int | None = None,
        attempts: int = 3,
    ) -> None:
        """Do each task on some node, and call finish(task, result) here as soon as it has ended.

        make: called once in each worker with its slot; returns what does a task there, in several threads. It, the
            tasks and the results are pickled.
        slots: what workers may take of a node.
        largest: number of tasks that a worker may be given at once; only quick ones are.
        most: number of workers; None: one for each slot.
        attempts: number of workers that may be lost over a task; then its result is a Lost.
        Raise ConfigError if no node has a slot or workers cannot start, and what a task raises.
        """
        run = _Run(self, make, slots, iter(tasks), finish, largest, most, attempts)
        try:
            run.work()
        finally:
            run.dismiss()


@contextlib.contextmanager
def joined(address: str, packages: Sequence[str]) -> Iterator[Cluster]:
    """Join a Ray cluster for the time of a block, and send it the code.

    address: "auto" for the cluster that this machine is a node of, its host:port, or LOCAL.
    packages: names of the packages of the project that workers import.
    Raise ConfigError without Ray, or if there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers; read at the import
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about a later default
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--ray needs ray ({error}): pip install ray") from error
    if "://" in address:
        raise ConfigError(f"--ray {address}: start this program on a node of the cluster, and give auto or host:port")
    _check_listens(address)
    own: dict[str, Any] = {"address": address}
    if address == LOCAL:
        from .command import available_cores

        own |= {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    handlers = {signum: signal.getsignal(signum) for signum in signals.STOPPING}
    try:
        ray.init(
            **own,
            runtime_env={"py_modules": [_folder(name) for name in packages], "excludes": ["__pycache__"]},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError, TimeoutError) as error:
        raise ConfigError(f"--ray {address}: cannot join the cluster: {_in_short(error)}") from error
    except SystemExit:  # Ray's own answer to SIGTERM
        raise signals.stopped() or signals.Stopped(signal.SIGTERM) from None
    finally:
        for signum, handler in handlers.items():  # Ray sets its own
            signal.signal(signum, handler)
    try:
        yield Cluster(ray, address)
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise ConfigError if nobody answers at a host:port, which Ray takes minutes to find."""
    where = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray has a word for what is no address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray {where}: no Ray cluster is there ({error}). Give what ray start has printed"
        ) from error


def _in_short(error: Exception) -> str:
    """Return an error of Ray, which may be long, in one line."""
    return " ".join(str(error).split())[:300]


def _folder(package: str) -> str:
    """Return the folder of a package."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return str(Path(next(iter(spec.submodule_search_locations))))


class _Actor:
    """A worker, as it runs on its node. make: pickled, see `Cluster.run_tasks`."""

    def __init__(self, make: bytes, slot: Slot):
        self._make, self._slot = make, slot

    def start(self, folder: str) -> Process:
        """Get ready. folder: where the program was started, which relative paths start from."""
        # Processes that Python starts run the program of their parent again, which here is Ray's and loads much.
        vars(sys.modules["__main__"]).pop("__file__", None)
        with contextlib.suppress(OSError):  # without it absolute paths may do
            os.chdir(folder)
        try:
            self._do = pickle.loads(self._make)(self._slot)
        except ImportError as error:
            raise ConfigError(f"{error} on node {host_name()}: install there what this machine has") from error
        except UserError as error:
            raise type(error)(f"on node {host_name()}: {error}") from error
        return Process(host_name(), os.getpid())

    def work(self, tasks: list[Any]) -> tuple[list[Any], float]:
        """Return the results of the first tasks, as many as there is time for, and the seconds that they took."""
        started, results = time.monotonic(), []
        for task in tasks:
            results.append(self._do(task))
            if time.monotonic() - started > BATCH_SECONDS:
                break
        return results, time.monotonic() - started


class _Task(NamedTuple):
    task: Any
    losses: int = 0  # workers that were lost while they had it


class _Worker:
    """A worker, as this program sees it.

    starting: the call that makes it ready, None once it is.
    calls: {call: its tasks}.
    """

    def __init__(self, actor: Any, node: Node, slot: Slot):
        self.actor, self.node, self.slot = actor, node, slot
        self.starting: Any = actor.start.remote(os.getcwd())
        self.calls: dict[Any, list[_Task]] = {}


class _Run:
    """One call of `Cluster.run_tasks`."""

    def __init__(
        self,
        cluster: Cluster,
        make: Callable,
        slots: Callable[[Node], Sequence[Slot]],
        tasks: Iterator[Any],
        finish: Callable[[Any, Any], None],
        largest: int,
        most: int | None,
        attempts: int,
    ):
        self.cluster, self.ray, self.slots, self.finish = cluster, cluster.ray, slots, finish
        self.tasks = map(_Task, tasks)
        self.again: deque[_Task] = deque()  # taken before `tasks`
        self.largest, self.size = largest, 1  # of batches
        self.most, self.attempts = most, attempts
        self.make = self.ray.put(pickle.dumps(make))  # once for all workers
        self.actor = self.ray.remote(_Actor)
        self.workers: list[_Worker] = []
        self.failed: dict[str, int] = {}  # workers lost in a row before they were ready, by node
        self.looked = -LOOK_SECONDS
        self.reason = ""  # why the last one was lost
        self.idle_since: float | None = time.monotonic()  # since when there is no worker that is ready

    def work(self) -> None:
        if not self._more():
            return
        while True:
            if time.monotonic() - self.looked >= LOOK_SECONDS:
                self._hire()
            self._give_out()
            calls = {call: worker for worker in self.workers for call in (worker.starting, *worker.calls) if call}
            if not any(worker.calls for worker in self.workers) and not self._more():
                return
            if not calls:
                time.sleep(0.1)
                continue
            ready, _ = self._wait(calls, 1, timeout=1.0)
            if len(ready) < len(calls):
                ready, _ = self._wait(calls, len(calls), timeout=0)
            for call in ready:
                if calls[call] in self.workers:  # not lost by another call
                    self._take(calls[call], call)

    def _wait(self, calls: Iterable[Any], number: int, timeout: float) -> Any:
        try:
            return self.ray.wait(list(calls), num_returns=number, timeout=timeout)
        except KeyboardInterrupt as interrupted:
            raise signals.stopped() or interrupted from None

    def _more(self) -> bool:
        """Return whether tasks are left that nobody has."""
        if not self.again:
            self.again.extend(itertools.islice(self.tasks, 1))
        return bool(self.again)

    def _hire(self) -> None:
        """Start a worker in each slot that has none."""
        self.looked = now = time.monotonic()
        nodes = self.cluster.nodes()
        hired = {node.id: sum(worker.node.id == node.id for worker in self.workers) for node in nodes}
        offered = {node: list(self.slots(node)) for node in nodes}
        for node, slots in offered.items():
            if self.failed.get(node.id, 0) < STARTS:
                free = None if self.most is None else max(0, self.most - len(self.workers))
                self.workers += [self._start(node, slot) for slot in slots[hired[node.id] :][:free]]
        if not self.workers:
            if self.reason and any(offered.values()):
                raise ConfigError(f"--ray {self.cluster.address}: workers cannot start: {self.reason}")
            found = ", ".join(f"{node.name} ({node.cpus} CPUs, {node.gpus} GPUs)" for node in nodes)
            raise ConfigError(f"--ray {self.cluster.address}: no node can take this work: {found or 'there is none'}")
        if self.idle_since is not None and now - self.idle_since > NOTE_SECONDS:
            wanted = ", ".join(
                f"{worker.slot.cpus} CPUs and {worker.slot.gpus} GPUs of {worker.node.name}"
                for worker in self.workers[:3]
            )
            print(f"note: no worker has started for {NOTE_SECONDS:g} s; awaited: {wanted}", file=sys.stderr)
            self.idle_since = None

    def _start(self, node: Node, slot: Slot) -> _Worker:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self.actor.options(
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            max_concurrency=slot.threads,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(self.make, slot)
        return _Worker(actor, node, slot)

    def _give_out(self) -> None:
        """Give tasks to workers that are ready, to each a batch in turn."""
        ready = [worker for worker in self.workers if worker.starting is None]
        depth = 1
        while ready:
            for worker in list(ready):
                # Quick batches wait at the worker already, so that it need not wait for them.
                if depth > worker.slot.threads * (1 if self.size == 1 else 2):
                    ready.remove(worker)
                elif len(worker.calls) < depth:
                    if not self._more():
                        return
                    self._call(worker)
            depth += 1

    def _call(self, worker: _Worker) -> None:
        batch = [self.again.popleft()]
        while not batch[0].losses and len(batch) < self.size and self._more() and not self.again[0].losses:
            batch.append(self.again.popleft())
        worker.calls[worker.actor.work.remote([task for task, _ in batch])] = batch

    def _take(self, worker: _Worker, call: Any) -> None:
        """Take the answer to a call."""
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = self.ray.get(call)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (UserError, OSError)):
                raise cause from None
            raise
        except RayError as error:
            self._lose(worker, error)
            return
        except KeyboardInterrupt as interrupted:
            raise signals.stopped() or interrupted from None
        if call is worker.starting:
            worker.starting = None
            self.failed[worker.node.id] = 0
            self.idle_since = None
            self.cluster.processes.append(answer)
            self.cluster.ready = self.cluster.ready or time.monotonic()
            return
        results, seconds = answer
        batch = worker.calls.pop(call)
        if len(results) < len(batch):
            self.size = max(1, len(results))
        elif seconds < BATCH_SECONDS / 2:
            self.size = min(self.largest, max(self.size, 2 * len(batch)))
        self.again.extendleft(reversed(batch[len(results) :]))
        for (task, _), result in zip(batch, results, strict=False):  # the others are in `again`
            self.finish(task, result)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Give the tasks of a worker that was lost to others."""
        self.reason = f"{worker.node.name}: {_in_short(error)}"
        self.workers.remove(worker)
        self.looked = -LOOK_SECONDS
        if all(each.starting for each in self.workers):
            self.idle_since = time.monotonic()
        self.ray.kill(worker.actor)
        if worker.starting is not None:
            self.failed[worker.node.id] = self.failed.get(worker.node.id, 0) + 1
        for task, losses in itertools.chain.from_iterable(worker.calls.values()):
            if losses + 1 < self.attempts:
                self.again.append(_Task(task, losses + 1))
            else:
                short = f"{worker.node.name}: {str(error).partition(chr(10))[0].rstrip('.')}"
                self.finish(task, Lost(f"its worker was lost {self.attempts} times, the last one on {short}"))

    def dismiss(self) -> None:
        """End the workers."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
        calls = [call for worker in self.workers for call in (worker.starting, *worker.calls) if call]
        if calls:
            self.ray.wait(calls, num_returns=len(calls), timeout=LEAVE_SECONDS)
