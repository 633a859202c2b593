"""One writer per run folder: who is refused, who takes over, and who stops."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from helpers import forked, run, tiny_config, wait_for

from trellis.runs import lock
from trellis.runs.checkpoint import Checkpoints
from trellis.runs.lock import Holder, RunLock, read_holder, require_lock, writing
from trellis.utils.errors import ConfigError


def hold(folder: Path, held) -> None:
    with writing(folder):
        held.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    held = multiprocessing.get_context("fork").Event()
    process = forked(hold, tmp_path / "run", held)
    assert held.wait(20)
    yield process
    process.kill()
    process.join()


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD_AFTER", 0.6)


def write_lock(folder: Path, age: float = 0.0, **changes) -> Holder:
    """The lock of another process of ours, or what `changes` make of it, last touched `age` seconds ago."""
    other = dataclasses.replace(Holder.this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(other)))
    then = time.time() - age
    os.utime(folder / "lock", (then, then))
    return other


def take(folder: Path) -> None:
    with writing(folder):
        held_by = read_holder(folder)
        assert held_by and held_by.pid == os.getpid()


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_is_refused_at_once_and_told_who_holds_the_folder_and_for_how_long(holder, tmp_path):
    before, begun = contents(tmp_path / "run"), time.monotonic()
    with pytest.raises(ConfigError) as error:
        take(tmp_path / "run")
    assert time.monotonic() - begun < 1 and contents(tmp_path / "run") == before
    text = str(error.value)
    assert f"--output_dir {tmp_path / 'run'} is written by process {holder.pid} on {os.uname().nodename}" in text
    assert "for 0 s (since 2" in text or "for 1 s (since 2" in text or "for 2 s (since 2" in text
    assert "Wait for its end, stop it, or choose another --output_dir" in text


def test_a_killed_holder_is_followed_at_once(holder, tmp_path, capsys):
    holder.kill()
    holder.join()
    begun = time.monotonic()
    take(tmp_path / "run")
    assert time.monotonic() - begun < 1
    assert f"took over the lock of process {holder.pid}" in capsys.readouterr().out
    assert list((tmp_path / "run").iterdir()) == []


def test_a_suspended_holder_on_this_machine_is_not_followed(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    os.utime(tmp_path / "run" / "lock", (0, 0))
    with pytest.raises(ConfigError, match="is written by process"):
        take(tmp_path / "run")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_the_lock_is_given_back_however_the_block_ends(error, tmp_path):
    try:
        with writing(tmp_path):
            assert (tmp_path / "lock").is_file()
            if error:
                raise error
    except (ValueError, KeyboardInterrupt, SystemExit):
        pass
    assert list(tmp_path.iterdir()) == []
    require_lock(tmp_path)  # asks nothing of a process without a lock


def test_a_folder_that_a_failed_start_made_is_removed(tmp_path):
    with pytest.raises(ValueError), writing(tmp_path / "a"):
        raise ValueError
    assert not (tmp_path / "a").exists()
    with writing(tmp_path / "b"):
        (tmp_path / "b" / "made").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["made"]


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path, capsys):
    write_lock(tmp_path, started="1")
    take(tmp_path)
    assert "took over the lock of process" in capsys.readouterr().out


@pytest.mark.parametrize("boot", ["another machine", "the same machine pid:[1]"])
def test_a_holder_elsewhere_that_stands_still_is_followed_after_a_time(boot, fast, tmp_path, capsys):
    """By the clock of the file server: the age is that of the file, and what was waited for is not added twice."""
    write_lock(tmp_path, boot=boot, host="node7", pid=1)
    begun = time.monotonic()
    take(tmp_path)
    assert 0.4 < time.monotonic() - begun < 2
    out = capsys.readouterr().out
    assert f"{tmp_path} is locked by process 1 on node7" in out and "waiting for a sign of life" in out
    write_lock(tmp_path, boot=boot, age=60)
    begun = time.monotonic()
    take(tmp_path)
    assert time.monotonic() - begun < 0.3


def test_what_killed_starts_have_left_is_removed_and_what_a_living_one_has_made_is_not(holder, tmp_path):
    living = read_holder(tmp_path / "run")
    assert living
    for name, content, age in (
        (".lock.1.tmp", dataclasses.replace(living, started="1"), 0),
        (".lock_after_1", dataclasses.replace(living, started="1"), 0),
        (".lock.2.tmp", living, 0),
        (".lock.3.tmp", None, 1000),
        (".lock.4.tmp", None, 0),
    ):
        (tmp_path / name).write_text(json.dumps(dataclasses.asdict(content)) if content else "")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with writing(tmp_path):
        assert {path.name for path in tmp_path.glob(".*")} == {".lock.2.tmp", ".lock.4.tmp"}


def test_a_holder_elsewhere_that_lives_is_not_followed(fast, tmp_path, monkeypatch):
    write_lock(tmp_path, boot="another machine", host="node7", age=0.3)
    sleep = time.sleep

    def sleeping(seconds):
        sleep(seconds)
        os.utime(tmp_path / "lock")

    monkeypatch.setattr(lock.time, "sleep", sleeping)
    before = (tmp_path / "lock").read_bytes()
    with pytest.raises(ConfigError, match="is written by process .* on node7"):
        take(tmp_path)
    assert (tmp_path / "lock").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("restart, followed", [(0, True), (1, False)])
def test_a_job_that_slurm_has_started_again_follows_itself(restart, followed, tmp_path, monkeypatch):
    """Also on another node. A second task of the same start does not."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    write_lock(tmp_path, boot="another machine", job="77", restart=restart)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_by = read_holder(tmp_path)
    assert held_by and held_by.is_dead() is (True if followed else None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b'{"pid": "x"}', b"[" * 100_000])
def test_a_lock_that_says_nothing_is_judged_by_its_age(content, fast, tmp_path):
    (tmp_path / "lock").write_bytes(content)
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"pid": float("inf")}, {"token": "../../x"}, {"token": ""}])
def test_a_lock_that_somebody_has_edited_says_nothing(changes, fast, tmp_path):
    """The token becomes a part of a file name."""
    write_lock(tmp_path / "run", boot="another machine", **changes)
    take(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_a_lock_that_is_no_file_is_refused_at_once(make, tmp_path):
    make(tmp_path / "lock")
    with pytest.raises(ConfigError, match=f"--output_dir {tmp_path}: {tmp_path / 'lock'} is a .*; remove it"):
        take(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_lock_is_touched_while_it_is_held(fast, tmp_path):
    with writing(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        assert wait_for(lambda: (tmp_path / "lock").stat().st_mtime > 0, 5)


def test_a_holder_that_lost_its_lock_stops_before_it_writes_and_leaves_the_lock_to_the_other(fast, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ConfigError) as error, writing(tmp_path):
        require_lock(tmp_path)
        os.unlink(tmp_path / "lock")
        other = write_lock(tmp_path, host="node8", pid=5, token="other")
        checkpoints.save(2, {}, {}, {}, {"best": None})
    assert f"the lock of {tmp_path} was taken over by process 5 on node8" in str(error.value)
    assert "leaves the folder as it is" in str(error.value)
    assert read_holder(tmp_path) == other and not checkpoints.folder.exists()
    os.utime(tmp_path / "lock", (0, 0))
    time.sleep(0.3)
    assert (tmp_path / "lock").stat().st_mtime == 0  # the other's lock is not kept alive


def test_the_check_of_a_lock_that_is_gone_fails_too(tmp_path):
    with pytest.raises(ConfigError, match="was taken over while this process"), writing(tmp_path):
        (tmp_path / "lock").unlink()
        require_lock(tmp_path)


def test_without_hard_links_the_lock_is_as_exclusive(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_lock(tmp_path, started="1")
    with writing(tmp_path), pytest.raises(ConfigError, match="is written by"):
        take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def contend(folder: Path, gate, results) -> None:
    gate.wait()
    mine = RunLock(folder)
    try:
        mine.acquire()
    except ConfigError:
        results.put(False)
        return
    results.put(True)
    time.sleep(0.3)  # longer than any other of them needs
    mine.check()


@pytest.mark.parametrize("dead", ["holder", "heir too", "nobody"])
def test_of_several_that_take_over_at_once_one_gets_the_lock(dead, tmp_path):
    context = multiprocessing.get_context("fork")
    for trial in range(3):
        folder = tmp_path / str(trial)
        folder.mkdir()
        if dead != "nobody":
            old = write_lock(folder, started="1", token="old")
        if dead == "heir too":  # killed between the two steps of a takeover
            heir = dataclasses.replace(old, token="heir")
            (folder / ".lock_after_old").write_text(json.dumps(dataclasses.asdict(heir)))
        gate, results = context.Barrier(6), context.SimpleQueue()
        processes = [forked(contend, folder, gate, results) for _ in range(6)]
        for process in processes:
            process.join()
        assert sum(results.get() for _ in processes) == 1
        assert [process.exitcode for process in processes] == [0] * 6
        assert [path.name for path in folder.iterdir()] == ["lock"]


def test_train_py_refuses_a_second_start_but_not_a_look(holder, data_dir, write_config, tmp_path, capsys):
    folder = tmp_path / "run"
    config = write_config(tiny_config(max_steps=2, num_workers=0))
    flags = ("--config", config, "--data_dir", data_dir, "--output_dir", folder)
    before = contents(folder)
    assert run(*flags) == 1
    assert capsys.readouterr().err.startswith(f"error: --output_dir {folder} is written by process {holder.pid}")
    assert run(*flags, "--tryrun") == 0
    assert f"note: {folder} is locked by process {holder.pid}" in capsys.readouterr().out
    assert contents(folder) == before
    holder.kill()
    holder.join()
    assert run(*flags) == 0 and not (folder / "lock").exists()


def test_two_runs_in_one_folder_give_one_run_and_one_error(data_dir, write_config, tmp_path, capsys):
    """With other seeds, as two nodes that nobody joined."""
    flags = []
    for seed in (1, 2):
        config = write_config(tiny_config(max_steps=60, i_save=20, i_eval=60, seed=seed, num_workers=0))
        flags.append(("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "run"))
    first = forked(run, *flags[0])
    while not (tmp_path / "run" / "lock").exists():
        assert first.is_alive()
        time.sleep(0.001)
    assert run(*flags[1]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: --output_dir {tmp_path / 'run'} is written by process {first.pid}"
    )
    first.join()
    assert first.exitcode == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["trainer"]["args"]["seed"] == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()].count(0) == 1


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=re.escape(f"--output_dir {folder}: {tmp_path / 'file'} is not a folder")):
            RunLock(folder).acquire()
