"""Work that takes long shows that it goes on: lines elsewhere, bars on a terminal."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ROOT, wait_for

from trellis.trainers.logger import Progress
from trellis.utils import progress
from trellis.utils.progress import waiting


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.05)


def wait_for_lines(capsys, number: int) -> list[str]:
    lines: list[str] = []
    deadline = time.monotonic() + 10
    while len(lines) < number and time.monotonic() < deadline:
        time.sleep(0.01)
        lines += capsys.readouterr().out.splitlines()
    return lines


def test_silence_is_broken_by_a_line_with_the_count(capsys):
    with waiting("validation", 9) as work:
        work(4)
        lines = wait_for_lines(capsys, 2)
    assert all(line.startswith("validation: 4 of 9 objects, 0 s so far") for line in lines)
    with waiting("reading data"):
        assert wait_for_lines(capsys, 1)[0] == "reading data: 0 s so far"


def test_the_innermost_work_speaks_and_the_outer_one_afterwards(capsys):
    with waiting("outer"):
        with waiting("inner"):
            inner = wait_for_lines(capsys, 2)
        outer = wait_for_lines(capsys, 2)
    assert {line.split(":")[0] for line in inner} == {"inner"}
    assert "outer" in {line.split(":")[0] for line in outer}


def test_works_that_follow_each_other_are_one_silence(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.5)
    with waiting("first"):
        time.sleep(0.35)
    with waiting("second"):
        time.sleep(0.35)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("second: 0 s so far")


def test_whoever_speaks_is_not_interrupted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.5)
    with waiting("work"):
        for number in range(20):
            progress.say(f"line {number}")
            time.sleep(0.02)
    assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(20)]


def test_nothing_is_shown_of_short_or_hidden_work_and_no_thread_is_left(capsys):
    with pytest.raises(ValueError), waiting("short"):
        raise ValueError
    with waiting("hidden", shown=False):
        time.sleep(0.2)
    assert capsys.readouterr().out == ""
    assert wait_for(lambda: not any(thread.name == "progress" for thread in threading.enumerate()), 5)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_there_is_a_bar_and_lines_stand_above_it():
    import fcntl
    import pty
    import struct
    import termios

    program = (
        "import time\n"
        "from trellis.utils import progress\n"
        "progress.REFRESH = 0.05\n"
        "with progress.waiting('validation', 4) as work:\n"
        "    for done in range(5):\n"
        "        work(done); time.sleep(0.1)\n"
        "    progress.say('a line')\n"
    )
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=child, stderr=child, cwd=ROOT)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # Linux's word for the end
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    assert "2/4" in text and "4/4" in text and "\ra line\r\n" in text.replace("\x1b[A", "")


def test_steps_show_where_training_is_without_their_losses(capsys):
    steps = Progress(max_steps=10, every=1000)
    steps.open(4)
    try:
        first = wait_for_lines(capsys, 1)
        steps.show(5, {"loss": Unread()})
        later = wait_for_lines(capsys, 1)
    finally:
        steps.close()
    assert "step 4/10  0 s in the first step" in first[0]
    assert any(re.fullmatch(r"step 5/10  0\.0 min left", line) for line in later)


class Unread:
    """A loss on a device, which no line may wait for."""

    def __float__(self) -> float:
        raise AssertionError("the host waited for the device")


def test_steps_that_are_due_show_their_losses(capsys):
    steps = Progress(max_steps=3, every=2)
    steps.open(0)
    for step in (1, 2, 3):
        steps.show(step, {"loss": torch.tensor(step / 4)})
    steps.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.rsplit("  ", 1)[0] for line in lines] == ["step 2/3  loss 0.5", "step 3/3  loss 0.75"]
