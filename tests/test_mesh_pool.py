"""The pool of workers: limits of time and memory, deaths, and what is raised where."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, wait_for

pytest.importorskip("numba")

from trellis.grids import mesh_pool  # noqa: E402
from trellis.grids.mesh_pool import LostTask, MeshPool, run_in_pool  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402

LIMITS_MEMORY = sys.platform == "linux"
GIB = 2**30


class NeedsTwo(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, a, b):
        super().__init__(a)


def raise_needs_two() -> None:
    raise NeedsTwo(1, 2)


def raise_disguised() -> None:
    """As a library that answers any failure with its own error."""
    try:
        raise MemoryError
    except MemoryError as error:
        raise DataError("the file is damaged") from error


@pytest.fixture(scope="module")
def pool():
    with MeshPool(1) as pool:
        yield pool


def outcome(pool: MeshPool, function, *args, timeout: float = 30, memory: int | None = None):
    return pool.submit(function, *args, timeout=timeout, memory=memory).result(timeout=60)


@pytest.mark.parametrize(
    "expression, error, message",
    [
        ("__import__('time').sleep(60)", DataError, "took longer than the time limit of 0.5 s"),
        ("__import__('os')._exit(3)", LostTask, r"its process died \(exit code 3\)"),
        ("__import__('os').abort()", LostTask, r"its process died \(SIGABRT\)"),
        ("__import__('os').kill(__import__('os').getpid(), 9)", LostTask, r"its process died \(SIGKILL\)"),
        ("{}['x']", KeyError, "x"),
        ("open('/gone')", FileNotFoundError, "/gone"),
        ("(lambda: 0)", RuntimeError, "cannot be sent back"),
    ],
)
def test_a_task_fails_alone(expression, error, message, pool):
    with pytest.raises(error, match=message) as raised:
        outcome(pool, eval, expression, timeout=0.5)
    if error is KeyError:
        assert "In a worker process" in raised.value.__notes__[0]
    assert outcome(pool, eval, "6 * 7") == 42


def test_exceptions_that_do_not_survive_the_way_back_are_told(pool):
    with pytest.raises(RuntimeError, match="cannot be sent back"):
        outcome(pool, raise_needs_two)
    assert outcome(pool, eval, "6 * 7") == 42


@pytest.mark.skipif(not LIMITS_MEMORY, reason="the system does not limit memory")
def test_memory_is_limited_for_each_task(pool):
    assert outcome(pool, eval, "len(bytes(2**29))", memory=GIB) == 2**29
    with pytest.raises(LostTask, match="needs more memory than the limit of 1 GiB"):
        outcome(pool, eval, "len(bytes(2**31))", memory=GIB)
    assert outcome(pool, eval, "len(bytes(2**30 + 2**29))") == 2**30 + 2**29  # without a limit again
    with pytest.raises(LostTask, match="needs more memory"):
        outcome(pool, raise_disguised)


def test_tasks_that_run_out_of_memory_are_tried_alone_with_the_memory_of_all():
    results = {}
    tasks = [(f"len(bytes({size}))",) for size in (2**20, 3 * 2**29, 2**32)] + [("__import__('os')._exit(3)",)]
    run_in_pool(eval, tasks, lambda task, result: results.update({task: result}), 2, 30, GIB)
    small, middle, large, dying = (results[task] for task in tasks)
    assert small == 2**20 and isinstance(dying, DataError) and "exit code 3" in str(dying)
    if LIMITS_MEMORY:
        assert middle == 3 * 2**29
        assert isinstance(large, DataError) and "the limit of 2 GiB" in str(large)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_worker_that_is_killed_while_it_waits_costs_nothing(pool):
    killed = outcome(pool, os.getpid)
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.2)
    assert outcome(pool, os.getpid) != killed


def test_threads_share_a_pool_and_it_starts_again_after_closing():
    with MeshPool(2) as pool:
        results = []
        threads = [threading.Thread(target=lambda: results.append(outcome(pool, eval, "1 + 1"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        before = {name: os.environ.get(name) for name in mesh_pool.THREAD_COUNTS}
        assert results == [2] * 6 and set(before.values()) == {"1"}
        pool.close()
        assert outcome(pool, eval, "1 + 2") == 3


def test_closing_ends_what_runs(monkeypatch):
    with MeshPool(1) as pool:
        task = pool.submit(eval, "__import__('time').sleep(60)", timeout=100)
        pool.submit(eval, "1", timeout=100)
        assert wait_for(task.running)
        started = time.monotonic()
    assert time.monotonic() - started < 10


def program(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    path = tmp_path / "program.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code)
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100)


def test_workers_that_cannot_start_are_one_error(tmp_path):
    """A missing package is named. A program without a guard starts itself in each worker, which Python refuses."""
    code = """
from trellis.grids.mesh_pool import MeshPool
from trellis.utils.errors import ConfigError
sys.modules["open3d"] = sys.modules["numba"] = None
if __name__ == "__main__":
    with MeshPool(1) as pool:
        try:
            pool.submit(eval, "1", timeout=5).result()
        except ConfigError as error:
            print("ConfigError:", error)
"""
    done = program(tmp_path, code)
    assert done.stdout.startswith("ConfigError: a Python package is missing") and "pip install " in done.stdout
    done = program(tmp_path, code.replace("if __name__", "if True or __name__"))
    assert done.stdout.startswith("ConfigError: a worker process cannot start (exit code 1)"), done.stderr
    assert done.returncode == 0


def test_a_worker_that_ends_before_it_is_told_what_to_do_is_one_error(monkeypatch):
    def fail(process):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", fail)
    with MeshPool(1) as pool, pytest.raises(ConfigError, match=f"cannot start: {sys.executable} ended at once"):
        outcome(pool, eval, "1")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = """
import os, time
from trellis.grids import mesh_pool
mesh_pool.start_worker = lambda: None
if __name__ == "__main__":
    pool = mesh_pool.MeshPool(2)
    print(pool.submit(os.getpid, timeout=5).result(), flush=True)
    pool.submit(time.sleep, 60, timeout=100)
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
"""
    done = program(tmp_path, code)
    worker = Path("/proc", done.stdout.strip())
    assert done.returncode == -9 and wait_for(lambda: not worker.exists(), 10)


def test_a_start_that_is_killed_is_tried_again(monkeypatch):
    tried = []

    def dies(worker):
        tried.append(worker)
        worker.process.kill()
        wait(worker)

    wait = mesh_pool._Worker.wait_until_ready
    monkeypatch.setattr(mesh_pool._Worker, "wait_until_ready", dies)
    with MeshPool(1) as pool, pytest.raises(ConfigError, match=r"a worker process cannot start \(SIGKILL\)"):
        outcome(pool, eval, "1")
    assert len(tried) == mesh_pool.STARTS
