"""What starts, joins, stops and watches the processes of a run: schedulers, signals, ranks that die or disagree."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import fake_slurm
import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, VQ, checkpoint, free_port, ranks_of, run, tiny_config, wait_for

from trellis.datasets.sampler import ResumableSampler
from trellis.runs.checkpoint import Checkpoints
from trellis.utils import rendezvous
from trellis.utils import watch as watching
from trellis.utils.cluster import Flags, Joined, Nodes, expand_hosts, tasks_per_node, where_started
from trellis.utils.errors import ConfigError

# --- what started a process ---

POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
TORCHRUN = {**POD, "TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
BATCH = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "n[01-02]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[01-02]", "SLURM_STEP_NUM_NODES": "2"}
TASK = {**BATCH, **STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
TASK |= {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1"}
NODE = {**BATCH, **STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
NODE |= {"SLURM_PROCID": "1", "SLURM_NODEID": "1"}
MPIRUN = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"))}
ALONE = Nodes("the command line", 1, 0, "localhost", 0)


@pytest.mark.parametrize(
    "env, flags, expected",
    [
        ({}, {}, ALONE),
        ({}, {"master_port": 4000}, Nodes("the command line", 1, 0, "localhost", 4000)),
        (
            {},
            {"num_nodes": 3, "node_rank": 2, "master_addr": "a"},
            Nodes("the command line", 3, 2, "a", 12345),
        ),
        ({}, {"num_nodes": 2}, Nodes("the command line", 2, 0, "localhost", 12345)),
        (TORCHRUN, {}, Joined("torchrun", 1, 2, 1, 2, "job-master-0", 23456, False)),
        (
            {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"},
            {},
            Joined("torchrun", 1, 2, 1, 2, "job-master-0", 23456, True, 2),
        ),
        # A pod: its GPUs are this program's to start.
        (POD, {}, Nodes("RANK and WORLD_SIZE", 2, 1, "job-master-0", 23456)),
        ({**POD, "RANK": "0", "WORLD_SIZE": "1"}, {}, Nodes("RANK and WORLD_SIZE", 1, 0, "localhost", 0)),
        (
            {**POD, "LOCAL_RANK": "0"},
            {},
            Joined("RANK and WORLD_SIZE", 1, 2, 0, 2, "job-master-0", 23456, False),
        ),
        # A batch script and an interactive shell have most of a task's variables.
        (BATCH, {}, ALONE),
        ({**TASK, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}, {}, ALONE),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, {}, ALONE),
        (TASK, {}, Joined("srun", 6, 8, 2, 4, "n01", 12077, False)),
        (TASK, {"master_addr": "ib01", "master_port": 9}, Joined("srun", 6, 8, 2, 4, "ib01", 9, False)),
        ({**TASK, "SLURM_STEP_ID": "1"}, {}, Joined("srun", 6, 8, 2, 4, "n01", 13086, False)),
        (NODE, {}, Nodes("srun", 2, 1, "n01", 12077, ("n01", "n02"))),
        ({**NODE, "MASTER_ADDR": "ib01", "MASTER_PORT": "9"}, {}, Nodes("srun", 2, 1, "ib01", 9, ("n01", "n02"))),
        # The least that a srun sets.
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            {},
            Joined("srun", 0, 2, 0, 2, "localhost", 12345, False),
        ),
        (
            {
                **TASK,
                "SLURM_NTASKS": "1",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_NODES": "1",
            },
            {"num_gpus": 4},
            Nodes("srun", 1, 0, "localhost", 0),
        ),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            {},
            Joined("mpirun", 1, 2, 1, 2, "localhost", 12345, False),
        ),
        ({"WORLD_SIZE": "1"}, {}, ALONE),
    ],
)
def test_what_started_a_process(env, flags, expected):
    assert where_started(env, Flags(**flags)) == expected


@pytest.mark.parametrize(
    "env, flags, message",
    [
        ({"RANK": "0"}, {}, "RANK is '0', but WORLD_SIZE is not set; .*torchrun"),
        ({"WORLD_SIZE": "2"}, {}, "WORLD_SIZE is '2', but RANK is not set"),
        ({**POD, "RANK": "2"}, {}, "RANK is 2, but WORLD_SIZE is 2; it must be below that"),
        ({**POD, "RANK": "one"}, {}, "RANK is 'one'; it must be a whole number"),
        ({**POD, "RANK": "-1"}, {}, "RANK is '-1'; it must be a whole number"),
        ({**POD, "MASTER_PORT": "70000"}, {}, "MASTER_PORT is 70000"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, {}, "MASTER_ADDR is not set; give --master_addr"),
        (POD, {"num_nodes": 3}, "--num_nodes is 3, but by RANK and WORLD_SIZE it is 2"),
        (POD, {"master_port": 9}, "--master_port is 9, but MASTER_PORT is 23456"),
        ({**POD, "PET_NNODES": "1"}, {}, "PET_NNODES is 1, but WORLD_SIZE is 2: .*torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none"}, {}, "without RANK, WORLD_SIZE, .*; unset TORCHELASTIC_RUN_ID"),
        (TORCHRUN, {"num_gpus": 2}, "--num_gpus is 2, but torchrun has started 2 processes"),
        (
            TASK,
            {"num_gpus": 8},
            "--num_gpus is 8, but srun has started 8 processes, .*leave --num_gpus out.*--ntasks-per-node 1",
        ),
        (TASK, {"master_port": 0}, "--master_port is 0, any free port, but several programs"),
        (NODE, {"node_rank": 0}, "--node_rank is 0, but by srun it is 1"),
        ({**TASK, "SLURM_STEP_NODELIST": "n[1-"}, {}, r"SLURM_NODELIST is 'n\[1-', which is no list"),
        ({**NODE, "RANK": "0", "WORLD_SIZE": "1"}, {}, "WORLD_SIZE is 1, but srun has started 2 tasks"),
        ({**TASK, "RANK": "0", "WORLD_SIZE": "8"}, {}, "RANK is 0, but SLURM_PROCID of this task is 6; unset RANK"),
        ({"SLURM_PROCID": "1"}, {}, "SLURM_NTASKS is not set"),
        (MPIRUN, {}, "OMPI_COMM_WORLD_LOCAL_SIZE is not set; start with torchrun"),
        ({}, {"num_nodes": 2, "master_addr": "a", "master_port": 0}, "--master_port is 0"),
    ],
)
def test_what_does_not_fit_together_is_one_error(env, flags, message):
    with pytest.raises(ConfigError, match=message):
        where_started(env, Flags(**flags))


def test_slurms_short_forms():
    assert expand_hosts("n[01-03,7],login") == ("n01", "n02", "n03", "n7", "login")
    assert expand_hosts("r[1-2]n[09-10]-ib") == ("r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib")
    assert expand_hosts("") == ()
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("") == []
    for text in ("n[3-1]", "n[1", "n]", "n[a]", "a,,b", "n[1-99999999999]"):
        with pytest.raises(ConfigError, match="no list of nodes"):
            expand_hosts(text)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output_dir", ""], "--output_dir is empty; give the run folder"),
        (["--load_dir", "caf\udce9"], "--load_dir is not UTF-8 text"),
        (["--master_port", "-1"], "--master_port is -1; it must be from 0 to 65535"),
        (["--master_port", "70000"], "--master_port is 70000"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--node_rank", "1"], "--node_rank is 1; with --num_nodes 1"),
    ],
)
def test_flags_out_of_range(flags, message, capsys):
    import train

    with pytest.raises(SystemExit) as ended:
        train.parse_args(["--config", "c", "--output_dir", "o", "--data_dir", "d", *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


# --- the meeting of the ranks ---


def meet(*ranks: tuple[int, int], minutes: float = 0.03, gpu: str = "") -> list[str]:
    """Let ranks, each with the world size that it believes in, check in at one store. Return their errors."""
    store = rendezvous.host_store(0)
    errors = []

    def rank(number: int, believed: int) -> None:
        try:
            joined = rendezvous.join_store("localhost", store.port, 0, minutes, speak=False)
            rendezvous.check_in(joined, number, believed, minutes, speak=True, gpu=gpu)
        except ConfigError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=rank, args=each) for each in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert len(errors) in (0, len(ranks))
    return errors


def test_ranks_meet():
    assert meet((0, 2), (1, 2)) == []


def test_missing_ranks_are_named():
    assert all("ranks 1, 3 of 4 did not come within 0.03 minutes" in error for error in meet((0, 4), (2, 4)))


def test_ranks_of_different_runs_do_not_meet():
    errors = meet((1, 3), (0, 2))
    assert len(errors) == 2 and all("was started as one of 3, rank 0" in error for error in errors)
    errors = meet((1, 2), (1, 2), (0, 2))
    assert len(errors) == 3 and all("two processes are rank 1" in error for error in errors)


def test_ranks_that_share_a_gpu_are_refused():
    errors = meet((0, 2), (1, 2), gpu="GPU-59ab")
    assert len(errors) == 2 and all("ranks 0 and 1 take the same GPU of" in error for error in errors)


def test_a_port_in_use_is_named():
    store = rendezvous.host_store(0)
    with pytest.raises(ConfigError, match=f"--master_port {store.port} is in use by another program"):
        rendezvous.host_store(store.port)


@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_a_first_node_that_never_comes(host, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "SAY_AFTER", 0.2)
    port, started = free_port(), time.monotonic()
    with pytest.raises(ConfigError, match=rf"rank 0 cannot be reached at {host}:{port} after 0.02 minutes \("):
        rendezvous.join_store(host, port, 0, 0.02, speak=True)
    assert time.monotonic() - started < 10
    assert f"waiting for rank 0 at {host}:{port}" in capsys.readouterr().err


def test_the_store_of_a_failed_attempt_is_not_joined():
    store = rendezvous.host_store(0)
    rendezvous.end_all("localhost", store.port, "failed")
    with pytest.raises(ConfigError, match="cannot be reached"):
        rendezvous.join_store("localhost", store.port, 0, 0.02, speak=False)
    rendezvous.join_store("localhost", store.port, 1, 0.02, speak=False)  # but the next attempt's is


# --- ranks that watch each other ---


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The exit codes with which a watch would have ended this process."""
    codes: list[int] = []
    monkeypatch.setattr(watching.os, "_exit", codes.append)
    monkeypatch.setattr(watching, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.0)
    return codes


class OtherRank:
    """Rank 1, which writes its reports to a store; `step` does not change by itself."""

    def __init__(self, store: dist.Store):
        self.store, self.beat, self.step = store, 0, 57

    def write(self) -> None:
        self.beat += 1
        report = {"host": "b", "step": self.step, "place": "validate (evaluate.py:3)", "long": False}
        self.store.set("where 1", json.dumps({**report, "beat": self.beat}))


@pytest.fixture
def watch():
    """The watch of rank 0 of 2, which stands at step 58."""
    watch = watching.Watch(dist.HashStore(), 0, 2, minutes=1 / 100, speaks=True)
    watch.where = lambda: {"host": "a", "step": 58, "place": "run_step (basic.py:9)", "long": False}
    watch.start()
    yield watch
    watch.stop()


def test_ranks_that_do_not_move_end_and_say_where_they_stand(ended, watch, capsys):
    other = OtherRank(watch.store)
    assert wait_for(lambda: other.write() or ended) and set(ended) == {1}
    error = capsys.readouterr().err
    assert "no rank has moved" in error and "rank 0: on a at step 58, run_step (basic.py:9), for" in error
    assert "rank 1: on b at step 57, validate (evaluate.py:3), for" in error


def test_a_silent_rank_ends_all(ended, watch, monkeypatch, capsys):
    monkeypatch.setattr(watching, "SILENT_SECONDS", 0.2)
    OtherRank(watch.store).write()
    assert wait_for(lambda: ended) and set(ended) == {1}
    assert "rank 1 has been silent for 0 s" in capsys.readouterr().err


def test_a_rank_that_moves_keeps_all_alive(ended, watch):
    other, until = OtherRank(watch.store), time.monotonic() + 1.5
    while time.monotonic() < until:
        other.step += 1
        other.write()
        time.sleep(0.02)
    assert not ended


def test_a_watch_sees_where_the_main_thread_is():
    found = []
    waits = rendezvous.Wait(1, False)
    waits.started -= 30  # so that it waits for half a second
    other = watching.Watch(dist.HashStore(), 0, 2, 1, speaks=True)
    timer = threading.Timer(0.1, lambda: found.append(other.where()))
    timer.start()
    assert waits.on("for nothing")
    timer.join()
    assert re.fullmatch(r"on \(utils/rendezvous\.py:\d+\)", found[-1]["place"]) and found[-1]["long"]


def test_the_first_failure_is_everybodys(ended, capsys):
    from trellis.utils.processes import RankFailedError
    from trellis.utils.signals import Stopped

    store = dist.HashStore()
    first, second, third = (watching.Watch(store, rank, 3, 1, speaks=rank == 1) for rank in range(3))
    first.fail(ValueError("broken"))
    with pytest.raises(RankFailedError, match=r"rank 0 on \S+ failed at step 0: ValueError: broken"):
        second.fail(RuntimeError("connection closed"))
    third.fail(Stopped(signal.SIGTERM))  # stays what it is
    lost = watching.Watch(dist.HashStore(), 1, 2, 1, speaks=False)
    with pytest.raises(
        RankFailedError, match=r"rank 1 on \S+ lost another rank at step 0 \(Connection reset by peer\)"
    ):
        lost.fail(RuntimeError("Read error: Connection reset by peer. This is typically"))
    second.start()
    came = wait_for(lambda: ended)
    second.stop()
    assert came and set(ended) == {1} and "error: rank 0 on" in capsys.readouterr().err


# --- signals ---


@pytest.fixture
def popen():
    """Start processes, with their output in pipes. End them after the test."""
    processes: list[subprocess.Popen] = []

    def start(command: list[str], **settings) -> subprocess.Popen:
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, **settings, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def program(popen, tmp_path):
    """Start small programs with handlers, which print "ready" when a signal may come."""

    def start(body: str, *before: str) -> subprocess.Popen:
        path = tmp_path / f"program{len(list(tmp_path.iterdir()))}.py"
        path.write_text("import os, signal, sys, time\nfrom trellis.utils import signals\n" + textwrap.dedent(body))
        return popen([*before, sys.executable, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)})

    return start


ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("signum", ALL)
def test_a_signal_outside_of_training_ends_with_its_code(signum, program):
    process = program(
        """
        with signals.handled():
            try:
                print("ready", flush=True)
                time.sleep(60)
            except Exception:
                pass
            except signals.Stopped as stopped:
                print("tidied up", flush=True)
                sys.exit(128 + stopped.signum)
        """
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert process.communicate(timeout=20)[0] == "tidied up\n"
    assert process.returncode == 128 + signum


def test_a_main_thread_that_does_not_end_is_ended(program):
    process = program(
        """
        with signals.handled(0.3):
            while True:
                try:
                    print("ready", flush=True)
                    time.sleep(60)
                except BaseException:
                    pass  # as in compiled code, which waits for another rank
        """
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_training_notes_the_first_signal_and_ends_by_a_later_one(program):
    process = program(
        """
        with signals.noted() as stop:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
                if stop.signum and sys.stdout:
                    print(stop.signum, flush=True)
                    while True:
                        time.sleep(60)
        """
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)  # a scheduler's and a launcher's, the same request
    assert process.stdout.readline() == f"{int(signal.SIGUSR1)}\n"
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143


def test_what_was_ignored_stays_ignored(program):
    process = program(
        """
        with signals.handled():
            print("ready", flush=True)
            time.sleep(1)
        print("to the end")
        """,
        "nohup",
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "to the end\n"
    assert process.returncode == 0


# --- processes of one node ---

RANKS = """
from trellis.utils import processes
processes.GRACE_SECONDS = 0.3

def rank(number):
    os.write(1, f"pid {os.getpid()}\\n".encode())
    WORK
    return 0

if __name__ == "__main__":
    with signals.handled():
        try:
            print("returned", processes.run_all(rank, 2), flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
"""


def pids_of(process: subprocess.Popen) -> list[int]:
    """The pids of both ranks, once they work."""
    return [int(process.stdout.readline().removeprefix("pid ")) for _ in range(2)]


def gone(pids: list[int]) -> bool:
    return wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def test_a_killed_rank_ends_the_others(program):
    process = program(RANKS.replace("WORK", "time.sleep(60)"))
    pids = pids_of(process)
    os.kill(pids[0], signal.SIGKILL)
    assert re.match(
        r"RankFailedError process \d was killed by SIGKILL; memory may have run out\n",
        process.communicate(timeout=20)[0],
    )
    assert gone(pids)


def test_ranks_end_with_their_parent(program):
    process = program(RANKS.replace("WORK", "time.sleep(60)"))
    pids = pids_of(process)
    process.kill()
    assert gone(pids)


def test_the_error_of_a_rank_is_the_parents(program):
    process = program(RANKS.replace("WORK", "raise OSError(28, 'full') if number else time.sleep(60)"))
    pids = pids_of(process)
    assert process.communicate(timeout=20)[0] == "OSError [Errno 28] full\n" and gone(pids)


def test_a_signal_to_the_whole_group_leaves_no_traceback_about_semaphores(program):
    """A closed terminal, and some schedulers, signal Python's own helper too."""
    check = """
    from multiprocessing.resource_tracker import _resource_tracker as tracker
    for signum in signals.STOPPING:
        os.kill(tracker._pid, signum)
    time.sleep(0.3)
    print("alive", tracker._check_alive())
"""
    process = program(RANKS.replace("WORK", "pass") + check)
    pids_of(process)
    assert process.communicate(timeout=20)[0] == "returned 0\nalive True\n"


def test_a_signal_is_passed_on_and_a_later_one_kills(program):
    work = """
    with signals.noted() as stop:
        while not stop.signum:
            time.sleep(0.01)
        time.sleep(60 if os.environ.get("SLOW") else 0.3)
        return 128 + stop.signum
    """
    process = program(RANKS.replace("    WORK", work))
    pids_of(process)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == f"returned {128 + signal.SIGUSR1}\n"

    process = program(RANKS.replace("    WORK", work), "env", "SLOW=1")
    pids = pids_of(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "returned 143\n" and gone(pids)


# --- train.py, started by others ---


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a machine with imitations of Slurm's commands."""
    return fake_slurm.install(tmp_path / "bin")


@pytest.fixture
def flags(data_dir, write_config, tmp_path) -> list[str]:
    """Flags of a run of four steps."""
    path = write_config(tiny_config(max_steps=4, i_eval=100, i_save=4))
    flags = ["--config", path, "--data_dir", data_dir, "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    return [*flags, "--auto_retry", "0", "--timeout", "2"]


@pytest.mark.parametrize("script, ranks", [("one_node", [1]), ("several_nodes", [2]), ("task_per_gpu", [2, 2])])
def test_the_examples_for_slurm(script, ranks, slurm, flags, popen, tmp_path):
    """task_per_gpu is told in the middle that its time is over, and is requeued."""
    if script == "task_per_gpu":
        flags += ["--set", "trainer.args.max_steps=150", "--set", "trainer.args.i_save=1000"]
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    process = popen(["sbatch", fake_slurm.script(script), *flags], env=slurm, cwd=tmp_path)
    job = fake_slurm.Job(tmp_path, process.pid)
    if script == "task_per_gpu":
        assert wait_for(lambda: "step 2/" in job.log, 60)
        job.signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 0 and ranks_of(tmp_path / "run") == ranks
    steps = Checkpoints(tmp_path / "run").steps()
    if script == "task_per_gpu":
        assert job.starts == 2 and len(steps) == 3 and 2 <= sorted(steps)[1] < 150
    assert max(steps) == (150 if script == "task_per_gpu" else 4)


def test_pods_that_disagree_stop_and_say_who(flags, data_dir, popen, tmp_path):
    """Two pods of a job, of which one has other data."""
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    (other / "shapes_val.npz").unlink()
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    pods = [
        popen(
            [sys.executable, str(ROOT / "train.py"), *flags, *(["--data_dir", str(other)] if rank else [])],
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    host = socket.gethostname()
    expected = rf"error: rank 1 on {host} differs from rank 0 on {host} in the data \(24 objects, \w+, not 30 objects, "
    for pod in pods:
        error = pod.communicate(timeout=120)[1]
        assert pod.returncode == 1 and re.match(expected, error) and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks, signum", [(1, signal.SIGINT), (2, signal.SIGUSR2)])
def test_a_signal_at_a_random_moment_ends_the_run_with_its_code(ranks, signum, flags, popen):
    """While it imports, starts its ranks, builds, or trains: never 0, never tried again."""
    flags = [*flags[:-4], "--auto_retry", "3", "--num_gpus", str(ranks), "--set", "trainer.args.max_steps=100000"]
    process = popen([sys.executable, str(ROOT / "train.py"), *flags])
    assert wait_for(lambda: handles(process.pid, signum))  # before, the system ends Python
    moment = random.Random(time.time_ns()).uniform(0, 8)
    time.sleep(moment)
    process.send_signal(signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, f"after {moment:.3f} s: {error}"
    assert "Traceback" not in error and "trying again" not in error, f"after {moment:.3f} s: {error}"


def handles(pid: int, signum: int) -> bool:
    """Return whether a process has a handler for this signal, as the kernel sees it."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught[1], 16) >> (signum - 1) & 1)


# --- another number of ranks ---


def test_resumed_on_other_numbers_of_ranks_a_run_sees_the_same_samples(data_dir, write_config, tmp_path):
    args = {"lambda_kl": 1e-3, "optimizer": {"name": "SGD", "args": {"lr": 1e-2}}, "i_eval": 100}
    path = write_config(tiny_config(max_steps=6, **args))
    flags = ("--config", path, "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    for ranks, until in ((2, 2), (4, 4), (1, 6)):
        limit = ("--set", f"trainer.args.max_steps={until}")
        assert run(*flags, *limit, "--output_dir", tmp_path / "several", "--num_gpus", ranks) == 0
    one, several = (checkpoint(tmp_path / name, 6) for name in ("one", "several"))
    assert one.keys() == several.keys()
    for file in one:
        if not file.startswith("misc"):
            for name, value in one[file].items():
                torch.testing.assert_close(several[file][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gpus", [2, 4])
def test_several_gpus_equal_one(gpus, vae_run, data_dir, write_config, tmp_path):
    """Through NCCL, with a codebook and its averages, and nothing on standard error."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    args = {"loss_type": "bce_iou", "mix_precision_mode": None, "i_ddpcheck": 2}
    optimizer = {"name": "SGD", "args": {"lr": 1e-2}}
    path = write_config(tiny_config(VQ, **args, optimizer=optimizer, max_steps=6, i_eval=3))
    for ranks in (1, gpus):
        flags = ["--config", path, "--data_dir", data_dir, "--load_dir", str(vae_run), "--num_gpus", str(ranks)]
        flags += ["--device", "cuda", "--output_dir", str(tmp_path / str(ranks)), "--auto_retry", "0"]
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    one, several = (checkpoint(tmp_path / str(ranks), 6) for ranks in (1, gpus))
    for file in one:
        if not file.startswith("misc"):
            for name, value in one[file].items():
                torch.testing.assert_close(several[file][name], value, atol=2e-3, rtol=1e-2)


def test_a_run_says_that_its_batch_has_changed(data_dir, write_config, tmp_path, capsys):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--config")
    args = {"batch_size": None, "i_eval": 100}
    assert run(*flags, write_config(tiny_config(**args, batch_size_per_gpu=4, max_steps=1))) == 0
    assert run(*flags, write_config(tiny_config(**args, batch_size_per_gpu=4, max_steps=2))) == 0
    assert "samples; so far" not in capsys.readouterr().out
    assert run(*flags, write_config(tiny_config(**args, batch_size_per_gpu=2, max_steps=3))) == 0
    assert "from here on a step has 2 samples; so far it had 4 on average" in capsys.readouterr().out


def test_the_order_of_samples_does_not_depend_on_ranks():
    one = [list(itertools.islice(sampler(1, 0, start=0), 6))]
    seen, start = [], 0
    for ranks, steps in ((1, 1), (2, 2), (4, 2), (1, 1)):
        parts = [list(itertools.islice(sampler(ranks, rank, start=start), steps)) for rank in range(ranks)]
        seen += [np.concatenate([part[step] for part in parts], axis=1) for step in range(steps)]
        start += 8 * steps
    np.testing.assert_array_equal(np.stack(seen), np.stack([np.stack(batch) for batch in one[0]]))


def sampler(ranks: int, rank: int, start: int) -> ResumableSampler:
    """Batches of 8 of 11 objects, so that epochs end within them."""
    return ResumableSampler(11, 8 // ranks, rank=rank, world_size=ranks, seed=3, start=start)
