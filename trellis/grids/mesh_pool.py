"""Worker processes that read meshes: each file has a time limit, and a crash of one costs that file alone."""

import concurrent.futures
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable
from itertools import islice

from ..utils.errors import DataError

THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def start_worker() -> None:
    """Load open3d before the time limit of the first file runs, and keep warnings out of the progress bar."""
    import open3d

    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)


def run_in_pool(
    function: Callable,
    tasks: Iterable[tuple],
    finish: Callable[[tuple, object], None],
    max_workers: int,
    timeout: float,
) -> None:
    """Call function(*task) in worker processes, and finish(task, result) here as soon as a task has ended.

    The result is a DataError where the function raised one, where it took longer than `timeout` seconds (its
    process is killed), or where its process died. Any other exception, such as a full disk, ends the run.
    """
    from pebble import ProcessExpired, ProcessPool  # an extra

    tasks, waiting = iter(tasks), {}
    before = {name: os.environ.get(name) for name in THREAD_COUNTS}
    os.environ.update(dict.fromkeys(THREAD_COUNTS, "1"))  # inherited by the workers: one thread each
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
    pool = ProcessPool(max_workers, initializer=start_worker, context=context)
    try:
        while True:
            for task in islice(tasks, 4 * max_workers - len(waiting)):
                waiting[pool.schedule(function, args=task, timeout=timeout)] = task
            if not waiting:
                break
            ended, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                try:
                    result = future.result()
                except DataError as error:
                    result = error
                except concurrent.futures.TimeoutError:
                    result = DataError(f"took longer than the time limit of {timeout:g} s (--timeout)")
                except ProcessExpired as error:
                    result = DataError(f"its process died with exit code {error.exitcode}: out of memory?")
                finish(waiting.pop(future), result)
    finally:
        pool.stop()
        pool.join()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
