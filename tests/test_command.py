"""What every program's main does alike."""

import errno

import pytest
import torch

from trellis.utils.command import pick_device, run_command
from trellis.utils.errors import CheckpointError, ConfigError, DataError


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
        OSError(errno.ENOSPC, "No space left on device", "outputs/a.json"),
    ],
)
def test_an_error_is_one_line_on_standard_error_and_exit_code_1(error, capsys):
    def fail(args):
        raise error

    assert run_command(fail, None) == 1
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize("more, line", [((), "interrupted\n"), (("run it again",), "run it again\n")])
def test_an_interruption_is_one_line_and_exit_code_130(more, line, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    assert run_command(interrupt, None, *more) == 130
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback():
    def fail(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
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
