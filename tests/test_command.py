"""What every program's main does alike."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from trellis.utils.command import check_output_folder, pick_device, run_command
from trellis.utils.errors import CheckpointError, ConfigError, DataError
from trellis.utils.processes import UNWIND_SECONDS
from trellis.utils.signals import STOPPING, Stopped


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (3, 3)])
def test_the_exit_code_is_what_the_work_returns(result, code, capsys):
    assert run_command(lambda args: result, None) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("--flag is 0; it must be at least 1"),
        DataError("a.ply: is damaged"),
        CheckpointError("outputs: has no checkpoint"),
    ],
)
def test_an_error_is_one_line_on_standard_error_and_exit_code_1(error, capsys):
    def fail(args):
        raise error

    assert run_command(fail, None) == 1
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device", "outputs/a.json"), "outputs/a.json: No space left on device"),
        (
            OSError(errno.ENOSPC, "No space left on device", b"outputs/a.json"),
            "outputs/a.json: No space left on device",
        ),
        (OSError(errno.ENOSPC, "No space left on device", 3), "No space left on device"),
        (OSError("odd"), "odd"),
        (
            RuntimeError("can't start new thread"),
            "this user may start no more threads (ulimit -u): end other programs, or take fewer workers",
        ),
    ],
)
def test_an_error_of_the_system_names_the_file_first(error, line, capsys):
    def fail(args):
        raise error

    assert run_command(fail, None) == 1
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize("more, line", [((), "interrupted\n"), (("run it again",), "run it again\n")])
def test_an_interruption_is_one_line_and_exit_code_130(more, line, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    assert run_command(interrupt, None, *more) == 130
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_one_line_and_its_exit_code(number, capsys):
    """What the work has begun is cleaned up, and the handlers are as before."""
    before, cleaned = [signal.getsignal(each) for each in STOPPING], []

    def stop(args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except Stopped as stopped:
            cleaned.append(stopped.signum)
            raise

    assert run_command(stop, None) == 128 + number
    assert capsys.readouterr() == ("", "interrupted\n") and cleaned == [number]
    assert [signal.getsignal(each) for each in STOPPING] == before


def test_an_ignored_signal_stays_ignored():
    """As nohup sets it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(lambda args: os.kill(os.getpid(), signal.SIGHUP), None) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_a_program_that_cleans_up():
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from trellis.utils.command import run_command

def work(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep(60)

sys.exit(run_command(work, None))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        for line in ("ready\n", "cleaning up\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        # A group and a launcher may send the same one, and cleaning up may take longer than train.py allows.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(UNWIND_SECONDS + 0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "new" / "folder"):
        assert check_output_folder(path) == path
    monkeypatch.chdir(tmp_path)
    assert check_output_folder("new") == Path("new") and not list(tmp_path.glob("new*"))
    for path in ("file", "file/below"):
        with pytest.raises(ConfigError, match=rf"^--output_dir {path}: .*file is not a folder\. Give another"):
            check_output_folder(path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=rf"^--to new/folder: {tmp_path} cannot be written"):
        check_output_folder("new/folder", "--to")


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    def fail(args):
        raise error

    with pytest.raises(type(error)):
        run_command(fail, None)


@pytest.mark.parametrize(
    "name, there, device",
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device(name, there, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device(name) == torch.device(device)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: torch finds no GPU here; use --device cpu"):
        pick_device("cuda")
