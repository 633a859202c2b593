"""status.json: what a run says of itself, what is read out of it, and the table of many runs."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, VQ, command, logged, run, tiny_config, wait_for

from trellis.runs.lock import Holder
from trellis.runs.status import (
    DEAD_AFTER,
    FILE,
    HEARTBEAT,
    STUCK_AFTER,
    RunStatus,
    ending,
    judge,
    life,
    read_status,
)
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.processes import RankFailedError
from trellis.utils.signals import Stopped
from trellis.utils.units import duration

spec = importlib.util.spec_from_file_location("scripts_status", ROOT / "scripts" / "status.py")
scripts_status = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripts_status)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> Path:
    """A finished run with a codebook."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "config.json"
    config.write_text(json.dumps(tiny_config(VQ)))
    assert run("--config", config, "--data_dir", data_dir, "--output_dir", folder / "run") == 0
    return folder / "run"


# --- what a run writes ---


def test_a_finished_run_says_what_its_log_and_checkpoints_say(finished):
    status, log = read_status(finished), logged(finished)
    last = next(line for line in reversed(log) if "loss" in line)
    scores = next(line for line in reversed(log) if "val/iou" in line)
    assert status["state"] == "finished" and status["doing"] is None and status["reason"] is None
    assert (status["step"], status["max_steps"], status["checkpoint_step"]) == (6, 6, 6)
    assert status["loss"] == last["loss"] and status["samples_per_second"] > 0 and status["eta_s"] is None
    assert status["health"]["lr"] == last["lr"]
    assert status["health"]["codebook_window_usage"] == last["codebook_window_usage"]
    expected = {key.removeprefix("val/"): value for key, value in scores.items() if key.startswith("val/")}
    assert status["scores"] == {"step": 6, **expected}
    assert status["best"] == json.loads((finished / "best.json").read_text())
    assert status["objects"] == {"train": 24, "val": 6} and status["ranks"] == 1 and status["card"]


def watched_states(folder: Path, process: subprocess.Popen) -> list[str]:
    """States of a run as a reader sees them, without repetitions. No read may fail."""
    seen = []
    while process.poll() is None:
        status = read_status(folder)
        if status is not None and (not seen or seen[-1] != status["state"]):
            seen.append(status["state"])
        time.sleep(0.002)
    return seen


def test_a_stopped_run_says_by_what_and_readers_never_see_half_a_file(data_dir, write_config, tmp_path):
    path = write_config(tiny_config(max_steps=4000, i_save=10000, i_eval=10000))
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True)
    assert any("step 2/4000" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    seen = watched_states(tmp_path / "run", process)
    process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert status["checkpoint_step"] == status["step"] >= 2
    assert seen[0] in ("starting", "validating", "training", "saving")
    assert judge(status, time.time()) == "stopped by SIGTERM; the same command continues"


def test_a_killed_run_is_dead_at_once_on_its_own_machine(data_dir, write_config, tmp_path, capsys):
    path = write_config(tiny_config(max_steps=4000, i_save=10000, i_eval=10000))
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True)
    assert any("step 2/4000" in line for line in iter(process.stdout.readline, ""))
    assert wait_for(lambda: (read_status(tmp_path / "run") or {}).get("state") == "training")
    assert life(read_status(tmp_path / "run"), time.time()) == "alive"
    process.kill()
    process.wait()
    assert life(read_status(tmp_path / "run"), time.time()) == "died"
    assert scripts_status.main([str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "died (" in line and f"process {process.pid}" in line and "the same command continues" in line


def test_a_start_that_fails_or_does_nothing_leaves_a_finished_run_as_it_was(data_dir, tmp_path, write_config):
    folder = tmp_path / "run"
    flags = ["--data_dir", data_dir, "--output_dir", folder]
    assert run("--config", write_config(tiny_config(VQ)), *flags) == 0
    kept = ("state", "reason", "step", "loss", "scores", "best", "checkpoint_step", "health", "objects")
    before = read_status(folder)
    assert before["loss"] is not None and before["scores"] and before["best"]
    assert run("--config", write_config(tiny_config()), *flags) == 1  # of another trainer
    assert {key: read_status(folder)[key] for key in kept} == {key: before[key] for key in kept}
    assert run("--config", write_config(tiny_config(VQ)), *flags) == 0  # nothing is left to do
    assert {key: read_status(folder)[key] for key in kept} == {key: before[key] for key in kept}


def test_a_failed_start_of_a_stopped_run_is_told_beside_how_far_it_was(tmp_path):
    (tmp_path / "log.txt").touch()
    with RunStatus(tmp_path) as status:
        status.set(state="stopped", reason="SIGTERM", step=4, loss=0.5, best={"step": 2, "by": "iou", "score": 0.9})
    with pytest.raises(DataError), RunStatus(tmp_path):
        raise DataError("nowhere: no such folder")
    found = read_status(tmp_path)
    assert (found["state"], found["reason"]) == ("failed", "nowhere: no such folder")
    assert (found["step"], found["loss"], found["best"]["step"]) == (4, 0.5, 2)
    with RunStatus(tmp_path) as status:  # steps of its own end what was known
        status.set(state="stopped", reason="SIGTERM", step=5)
    assert read_status(tmp_path)["loss"] is None


def test_an_error_is_kept_and_a_start_that_fails_leaves_no_folder(data_dir, write_config, tmp_path, monkeypatch):
    flags = ("--config", write_config(tiny_config()), "--data_dir", data_dir, "--output_dir", tmp_path / "run")

    def fail(self):
        raise RuntimeError("the third step\nis not to be")

    monkeypatch.setattr(SparseStructureVaeTrainer, "validate", fail)
    assert run(*flags) == 1
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("failed", "RuntimeError: the third step")
    assert run("--config", flags[1], "--data_dir", tmp_path / "gone", "--output_dir", tmp_path / "never") == 1
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "error, expected",
    [
        (ConfigError("a.json: lr is 0\nmore"), ("failed", "a.json: lr is 0")),
        (RankFailedError("rank 0 lost another"), ("failed", "rank 0 lost another")),
        (ValueError("wrong"), ("failed", "ValueError: wrong")),
        (MemoryError(), ("failed", "MemoryError")),
        (KeyboardInterrupt(), ("stopped", "SIGINT")),
        (Stopped(signal.SIGUSR1), ("stopped", "SIGUSR1")),
        (SystemExit(143), ("stopped", "SIGTERM")),
        (SystemExit(1), ("failed", "SystemExit: 1")),
    ],
)
def test_the_end_of_a_run_in_words(error, expected):
    assert ending(error) == expected


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    with RunStatus(tmp_path / "file" / "run", shown=False) as status:
        for step in range(3):
            status.set(step=step)
        with status.doing("work"):
            pass
    out = capsys.readouterr().out
    assert out.count("cannot be written") == 1 and "the run goes on" in out


def test_numbers_that_json_lacks_become_null(tmp_path):
    with RunStatus(tmp_path, shown=False) as status:
        status.set(loss=float("nan"), health={"lr": float("inf"), "grad_norm": 1.5})
    found = read_status(tmp_path)
    assert found["loss"] is None and found["health"] == {"lr": None, "grad_norm": 1.5}


def test_time_left_is_by_the_pace_after_the_first_step():
    status = RunStatus(None)
    status.set(max_steps=10)
    status.at_step(1)
    assert status.values["eta_s"] is None
    status._first = (1, time.time() - 6)
    status.at_step(4)
    assert status.values["eta_s"] == pytest.approx(2 * 6, abs=0.5)


def test_the_file_says_what_is_being_done(tmp_path):
    with RunStatus(tmp_path, shown=False) as status:
        with status.doing("validation", 9, state="validating") as work:
            work(4)
            deadline = time.monotonic() + 10
            while (found := read_status(tmp_path))["doing"] is None and time.monotonic() < deadline:
                status.set()
                time.sleep(0.01)
            assert found["state"] == "validating" and found["doing"].startswith("validation: 4 of 9 objects")
    assert read_status(tmp_path)["doing"] is None


# --- what a reader makes of it ---


def status_at(tmp_path: Path, now: float, **values) -> dict:
    with RunStatus(tmp_path, shown=False):
        pass
    return {**read_status(tmp_path), "time": now, "progressed": now, "state": "training", **values}


def test_life_and_death(tmp_path):
    now = time.time()
    mine = status_at(tmp_path, now)
    assert (life(mine, now), judge(mine, now)) == ("alive", "training")
    assert life(mine, now + DEAD_AFTER + 1) == "silent"
    assert "suspended or cannot write" in judge(mine, now + DEAD_AFTER + 1)
    elsewhere = {**mine, "host": "another-" + socket.gethostname()}
    assert HEARTBEAT * 3 < DEAD_AFTER
    assert life(elsewhere, now + HEARTBEAT * 3) == "alive" and life(elsewhere, now + DEAD_AFTER + 1) == "died"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = {**mine, "pid": ended.pid, "doing": "validation: 3 of 9 objects"}
    assert life(gone, now) == "died" and "died (validation: 3 of 9 objects): nothing written for 0 s" in judge(
        gone, now
    )
    assert life({**gone, "state": "finished"}, now + 1e6) == "ended"
    container = replace(Holder.this_process(), pid=gone["pid"], boot="another container")
    assert life(gone, now, container) == "alive"  # its numbers are not ours
    assert life(gone, now + DEAD_AFTER + 1, container) == "died"
    successor = replace(Holder.this_process(), started="-1")  # had this process's number before
    assert life(mine, now, successor) == "died"
    stuck = {**mine, "progressed": now - STUCK_AFTER - 1}
    assert judge(stuck, now) == "training; no progress for 15 min"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0 s"), (59.4, "59 s"), (61, "1 min"), (3600 * 3.5, "3 h 30 min"), (86400 * 2.5, "2 d 12 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is damaged"),
        ("[1]", "holds no JSON object"),
        ('{"state": "training"}', "format version"),
        ('{"format": 99}', "install a newer"),
        (b"\xff\xfe{", "cannot be read"),
    ],
)
def test_a_damaged_status_is_one_error(text, message, tmp_path):
    (tmp_path / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_status(tmp_path)


@pytest.mark.parametrize(
    "key, value", [("state", "dancing"), ("step", "6"), ("health", None), ("pid", True), ("time", None)]
)
def test_a_value_of_the_wrong_kind_is_named(key, value, finished, tmp_path):
    (tmp_path / FILE).write_text(json.dumps({**read_status(finished), key: value}))
    with pytest.raises(DataError, match=f"{key} is"):
        read_status(tmp_path)


# --- the table ---


def test_one_line_for_each_run_and_damage_hides_no_other(finished, tmp_path, capsys):
    good = json.loads((finished / FILE).read_text())
    for name, content in (
        ("a", json.dumps(good)),
        ("b", "broken"),
        ("sub/c", json.dumps({**good, "state": "failed", "reason": "no data", "health": {"bad_steps": 3.0}})),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / FILE).write_text(content)
    (tmp_path / "old" / "ckpts").mkdir(parents=True)
    (tmp_path / "old" / "ckpts" / "misc_step0000040.pt").write_bytes(b"")
    assert scripts_status.main([str(tmp_path), str(tmp_path / "nothing")]) == 1
    out, err = capsys.readouterr()
    header, first, second = out.splitlines()
    assert header.split()[:3] == ["run", "step", "of"]
    assert first.split()[0] == str(tmp_path / "a") and first.split()[1:3] == ["6", "6"] and first.endswith("finished")
    assert second.split()[0] == str(tmp_path / "sub" / "c") and second.endswith("failed: no data; 3 bad steps")
    errors = err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert (
        "b/status.json is damaged" in err and "last checkpoint is of step 40" in err and "nothing is no folder" in err
    )


def test_json_has_all_values(finished, capsys):
    assert scripts_status.main([str(finished), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {**read_status(finished), "run": str(finished), "life": "ended", "words": "finished"}
