"""Worker processes that read meshes: each file has a time limit, and a crash costs that file alone."""

import concurrent.futures
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..utils.errors import ConfigError, DataError
from .meshes import require_open3d, require_trimesh

if TYPE_CHECKING:
    from pebble import ProcessPool

THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def start_worker() -> None:
    """Load open3d and trimesh before the time limit of the first file runs, and silence their warnings."""
    import open3d
    import trimesh  # noqa: F401

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)


class MeshPool:
    """Worker processes of one thread each, started with the first task. Threads may share a pool.

    max_workers: number of processes.
    """

    def __init__(self, max_workers: int):
        self.max_workers = max_workers
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()
        self._environment: dict[str, str | None] = {}

    def submit(self, function: Callable, *args: object, timeout: float) -> Future:
        """Call function(*args) in a worker, which is killed after `timeout` seconds. `result_of` takes the result.

        Raise ConfigError if Pebble, trimesh or open3d is missing.
        """
        with self._lock:
            if self._pool is None or not self._pool.active:
                self._start()
            assert self._pool is not None
            return self._pool.schedule(function, args=args, timeout=timeout)

    def _start(self) -> None:
        try:
            from pebble import ProcessPool  # an extra
        except ModuleNotFoundError as error:
            raise ConfigError(f"a Python package is missing ({error}): pip install Pebble") from error
        require_trimesh()  # here and not in every worker
        require_open3d()
        # Workers inherit these; set in a worker they would come too late for numpy, which is imported first.
        self._environment = self._environment or {name: os.environ.get(name) for name in THREAD_COUNTS}
        os.environ.update(dict.fromkeys(THREAD_COUNTS, "1"))
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._pool = ProcessPool(self.max_workers, initializer=start_worker, context=context)

    def close(self) -> None:
        """Stop the workers. Tasks that have not ended are lost."""
        with self._lock:
            if self._pool is None:
                return
            self._pool.stop()
            self._pool.join()
            self._pool = None
            for name, value in self._environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            self._environment = {}

    def __enter__(self) -> "MeshPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def result_of(future: Future, timeout: float) -> Any:
    """Wait for a task of `MeshPool.submit` and return its result.

    Raise what the task raised, and DataError if it took longer than `timeout` seconds, ran out of memory, or if its
    process died.
    """
    from pebble import ProcessExpired

    try:
        return future.result()
    except concurrent.futures.TimeoutError as error:
        raise DataError(f"took longer than the time limit of {timeout:g} s: simplify it or raise the limit") from error
    except MemoryError as error:
        raise DataError("ran out of memory: simplify it") from error
    except ProcessExpired as error:
        code = error.exitcode
        raise DataError(f"its process died with exit code {code}, perhaps out of memory: simplify it") from error


def run_in_pool(
    function: Callable,
    tasks: Iterable[tuple],
    finish: Callable[[tuple, Any], None],
    max_workers: int,
    timeout: float,
) -> None:
    """Call function(*task) in worker processes, and finish(task, result) here as soon as a task has ended.

    The result is a DataError if the function raised one, if it took longer than `timeout` seconds, if it ran out of
    memory, or if its process died. Any other exception, such as a full disk, ends the run.
    """
    tasks = iter(tasks)
    waiting: dict[Future, tuple] = {}
    with MeshPool(max_workers) as pool:
        while True:
            for task in islice(tasks, 4 * max_workers - len(waiting)):
                waiting[pool.submit(function, *task, timeout=timeout)] = task
            if not waiting:
                break
            ended, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                try:
                    result = result_of(future, timeout)
                except DataError as error:
                    result = error
                finish(waiting.pop(future), result)
