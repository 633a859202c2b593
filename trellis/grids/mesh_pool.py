"""Worker processes that read meshes: each task has limits of time and memory, and a crash costs that task alone.

Each worker has a pipe of its own, and a thread here waits for its answer. Pools whose workers share a queue
(multiprocessing, concurrent.futures, Pebble) do not survive that a waiting worker is killed.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..utils import signals
from ..utils.command import available_memory
from ..utils.errors import ConfigError, DataError, UserError
from .meshes import voxelize_mesh

THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
STARTS = 3  # attempts to start a worker that is killed before it is ready
LEAST_MEMORY = 2  # GiB of a worker
START_SECONDS = 300  # for the imports of a worker, which a cold network disk makes slow
ORPHAN_SECONDS = 60  # after its time limit, a worker whose parent was killed ends by itself


class LostTask(DataError):
    """A task that ran out of memory, or whose process died. With more memory, or once more, it may succeed."""


class MeshPool:
    """Worker processes of one thread each, started as they are needed. Threads may share a pool.

    max_workers: number of processes.
    """

    def __init__(self, max_workers: int):
        self.max_workers = max_workers
        self._threads: ThreadPoolExecutor | None = None
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._environment: dict[str, str | None] = {}

    def submit(self, function: Callable, *args: object, timeout: float, memory: int | None = None) -> Future:
        """Call function(*args) in a worker, which is killed after `timeout` seconds.

        memory: bytes that the worker may take beyond what it has, where the system can limit them (Linux).
        The future's result() returns what the function returns and raises what it raises. It raises DataError after
        the time limit, LostTask if the memory did not suffice or the process died, ConfigError if workers cannot start,
        such as without trimesh.
        """
        with self._lock:
            if self._threads is None:
                # Workers inherit these; set in a worker they would come too late for numpy, which is imported first.
                self._environment = {name: os.environ.get(name) for name in THREAD_COUNTS}
                os.environ.update(dict.fromkeys(THREAD_COUNTS, "1"))
                self._threads = ThreadPoolExecutor(self.max_workers, "mesh pool", initializer=_block_signals)
            return self._threads.submit(self._run, self._threads, function, args, timeout, memory)

    def _run(
        self, threads: ThreadPoolExecutor, function: Callable, args: tuple, timeout: float, memory: int | None
    ) -> Any:
        task = pickle.dumps((function, args))
        while True:
            worker = self._take(threads)
            try:
                worker.connection.send((task, timeout, memory))
            except OSError:  # it died while it waited, so the task has not begun
                self._drop(worker)
                continue
            try:
                error, result = worker.answer(timeout, memory)
            except DataError:
                self._drop(worker)
                raise
            with self._lock:
                if threads is self._threads:
                    self._idle.append(worker)
            if error is not None:
                raise error
            return result

    def _take(self, threads: ThreadPoolExecutor) -> "_Worker":
        with self._lock:
            if threads is not self._threads:
                raise concurrent.futures.CancelledError
            if self._idle:
                return self._idle.pop()
        for attempt in range(1, STARTS + 1):
            with self._lock:
                if threads is not self._threads:
                    raise concurrent.futures.CancelledError
                worker = _Worker()
                self._all.add(worker)
            try:
                worker.wait_until_ready()
                break
            except ConfigError:
                self._drop(worker)
                if attempt == STARTS or (worker.process.exitcode or 0) >= 0:  # not killed
                    raise
        return worker

    def _drop(self, worker: "_Worker") -> None:
        worker.stop()
        with self._lock:
            self._all.discard(worker)

    def close(self) -> None:
        """Stop the workers. Tasks that have not ended are lost."""
        with self._lock:
            threads, self._threads = self._threads, None
            for worker in self._all:
                worker.process.kill()
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._environment = {}
        if threads is not None:
            threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.stop()
        self._all, self._idle = set(), []

    def __enter__(self) -> "MeshPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_in_pool(
    function: Callable,
    tasks: Iterable[tuple],
    finish: Callable[[tuple, Any], None],
    max_workers: int,
    timeout: float,
    memory: int | None = None,
) -> None:
    """Call function(*task) in worker processes, and finish(task, result) here as soon as a task has ended.

    timeout, memory: limits of a task, see `MeshPool.submit`. Tasks that ran out of memory or whose process died are
    tried once more at the end, one at a time with the memory of all workers.
    The result is a DataError if the function raised one or the task met a limit. Any other exception, such as a full
    disk, ends the run.
    """
    lost = []
    with MeshPool(max_workers) as pool:
        for task, result in _results(pool, function, tasks, timeout, memory):
            if isinstance(result, LostTask):
                lost.append(task)
            else:
                finish(task, result)
    with MeshPool(1) as pool:
        for task, result in _results(pool, function, lost, timeout, memory and memory * max_workers):
            finish(task, result)


def memory_limit(gib: float | None, workers: int) -> int | None:
    """Return the bytes that a worker may take: those asked for, else its share of what is free. None if not known."""
    if gib is not None:
        return int(gib * 2**30)
    free = available_memory()
    return None if free is None else max(LEAST_MEMORY * 2**30, free // max(1, workers))


def _results(
    pool: MeshPool, function: Callable, tasks: Iterable[tuple], timeout: float, memory: int | None
) -> Iterator[tuple[tuple, Any]]:
    """Yield each task with its result, or the DataError in its place, as tasks end."""
    tasks = iter(tasks)
    waiting: dict[Future, tuple] = {}
    # A signal that raises in concurrent.futures.wait, while it takes the locks of all futures, leaves some taken, and
    # then their threads never end. A queue has no such moment.
    ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
    while True:
        for task in islice(tasks, 4 * pool.max_workers - len(waiting)):
            future = pool.submit(function, *task, timeout=timeout, memory=memory)
            waiting[future] = task
            future.add_done_callback(ended.put)
        if not waiting:
            return
        future = ended.get()
        try:
            result = future.result()
        except DataError as error:
            result = error
        yield waiting.pop(future), result


class _Worker:
    """A process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            self.process.start()
        except BrokenPipeError as error:  # it did not live to be told what to do
            raise ConfigError(
                f"a worker process cannot start: {sys.executable} ended at once. Its own message, if any, is above"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"a worker process cannot start ({error.strerror or error}): take fewer workers"
            ) from error
        finally:
            theirs.close()

    def wait_until_ready(self) -> None:
        """Wait for the worker's imports. Raise ConfigError if they fail, or if the process ends."""
        try:
            if not self.connection.poll(START_SECONDS):
                raise ConfigError(f"a worker process has not started within {START_SECONDS} s")
            error = self.connection.recv()
        except (EOFError, OSError) as ended:
            raise ConfigError(
                f"a worker process cannot start ({_how_it_ended(self.process)}): its own message, if any, is above"
            ) from ended
        if error is not None:
            raise error

    def answer(self, timeout: float, memory: int | None) -> tuple[Exception | None, Any]:
        """Return what the task raised and what it returned. Raise DataError if it met a limit."""
        try:
            if not self.connection.poll(timeout):
                raise DataError(f"took longer than the time limit of {timeout:g} s: simplify it or raise the limit")
            error, result = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as ended:
            raise LostTask(
                f"its process died ({_how_it_ended(self.process)}), perhaps out of memory: simplify it"
            ) from ended
        if isinstance(error, MemoryError):
            limit = "there is" if memory is None else f"the limit of {memory / 2**30:.3g} GiB"
            raise LostTask(f"needs more memory than {limit}: simplify it or raise the limit")
        return error, result

    def stop(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _how_it_ended(process: Any) -> str:
    process.join(5)  # the pipe ends shortly before the process
    code = process.exitcode
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def _block_signals() -> None:
    """Keep signals to a whole group of processes, such as Ctrl-C, from the workers that this thread starts, which
    inherit its mask. The main thread stops them; else their files would seem to have failed."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)


def _serve(connection: Connection) -> None:
    """Do the tasks that come through a pipe, until the other end closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        start_worker()
    except UserError as error:
        connection.send(error)
        return
    connection.send(None)
    while True:
        try:
            task, timeout, memory = connection.recv()
        except (EOFError, OSError):
            return
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_REAL, timeout + ORPHAN_SECONDS)
        connection.send_bytes(_dump(_call(task, memory)))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def start_worker() -> None:
    """Load what voxelizing takes before the time limit of the first file runs, and silence warnings of libraries."""
    warnings.simplefilter("ignore")
    voxelize_mesh(np.eye(3) / 4, np.array([(0, 1, 2)]), 8)


def _end_with_parent() -> None:
    """End this process when its parent has ended. Code that keeps Python's lock delays it until the timer rings."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(task: bytes, memory: int | None) -> tuple[Exception | None, Any]:
    """Return what a pickled call raises and returns. MemoryError stands for all errors that come from one."""
    try:
        with limited_memory(memory):
            function, args = pickle.loads(task)
            return None, function(*args)
    except Exception as error:
        if _is_out_of_memory(error):
            return MemoryError(), None
        if not isinstance(error, (UserError, OSError)):
            error.add_note("In a worker process:\n" + traceback.format_exc())
        return error, None


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__
    return error is not None


def _dump(answer: tuple[Exception | None, Any]) -> bytes:
    """Pickle an answer, or the reason why it cannot be pickled and taken up again."""
    try:
        dumped = pickle.dumps(answer)
        if answer[0] is not None:
            pickle.loads(dumped)  # an exception may need arguments that it does not keep
    except Exception as error:
        return pickle.dumps((RuntimeError(f"{answer[0] or answer[1]!r:.200} cannot be sent back: {error}"), None))
    return dumped


@contextlib.contextmanager
def limited_memory(memory: int | None) -> Iterator[None]:
    """Let this process take at most `memory` bytes more than it has now; None, or a system without such limits: any.

    What goes beyond raises MemoryError, or ends the process if a library does not expect it.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        memory = None
    if memory is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * os.sysconf("SC_PAGE_SIZE") + memory
    for limit in (soft, hard):
        if limit != resource.RLIM_INFINITY:
            wanted = min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
