"""Runs that are killed or whose disk fails: the same command goes on, and nothing is lost but a few steps.

The long form is benchmarks/faults.py.
"""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import I_SAVE, STEPS, Fault
from trellis.runs.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(arguments without a folder, calls of each kind, final state) of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "config.json").write_text(json.dumps(faults.tiny_config()))
    arguments = folder / "config.json", faults.make_data(folder)
    run, output = folder / "run", folder / "output.txt"
    faults.warm(faults.command(*arguments, run))
    calls = faults.count_calls(faults.command(*arguments, run), run, output)
    return arguments, calls, faults.state(run, STEPS)


def fractions(call: str) -> list[tuple[str, float]]:
    """Places of a call in a run, as parts of how often it is made."""
    return [(call, place) for place in {"write": (0.3, 0.62, 0.93), "replace": (0.5, 0.95)}.get(call, (0.7,))]


@pytest.mark.parametrize(
    "call, part", sum((fractions(call) for call in ("open", "write", "fsync", "replace", "rename", "unlink")), [])
)
def test_a_run_killed_inside_a_call_goes_on_to_the_same_bits(call, part, undisturbed, tmp_path):
    arguments, calls, want = undisturbed
    run, output, stop = tmp_path / "run", tmp_path / "output.txt", multiprocessing.get_context("fork").Event()
    flags, counts = faults.command(*arguments, run), multiprocessing.get_context("fork").Array("l", 3)
    reader = faults.forked(faults.read_until, stop, run, counts)
    ended = faults.disturbed(flags, run, output, Fault(call, max(1, round(part * calls[call]))))
    assert ended.exit_code == -signal.SIGKILL, output.read_text()
    assert 0 <= ended.repeated <= 2 * I_SAVE  # to the last whole set, while the next one may be in flight
    assert faults.what_differs(flags, run, output, want) == ""
    stop.set()
    reader.join()
    assert reader.exitcode == 0 and counts[0] > 0


@pytest.mark.parametrize(
    "number, call, part",
    [
        (errno.ENOSPC, "write", 0.7),
        (errno.EDQUOT, "fsync", 0.6),
        (errno.EROFS, "replace", 0.6),
        (errno.EROFS, "open", 0.01),
        (errno.EIO, "write", 0.5),
    ],
)
def test_a_disk_that_fails_is_one_line_and_the_same_command_goes_on(number, call, part, undisturbed, tmp_path):
    arguments, calls, want = undisturbed
    run, output = tmp_path / "run", tmp_path / "output.txt"
    flags = faults.command(*arguments, run)
    ended = faults.disturbed(flags, run, output, Fault(call, max(1, round(part * calls[call])), number))
    text = output.read_text()
    assert ended.exit_code == 1 and "Traceback" not in text and f"\n{text}".count("\nerror: ") == 1, text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert os.strerror(number) in error and str(run) in error and ".tmp" not in error
    kept = Checkpoints(run).steps()
    assert faults.what_differs(flags, run, output, want) == ""
    assert kept == [] or kept[-1] <= STEPS


def test_a_folder_of_someone_else_is_one_line(undisturbed, tmp_path):
    """As root everything may be written, so the call itself is made to fail."""
    arguments, _, _ = undisturbed
    output = tmp_path / "output.txt"
    ended = faults.disturbed(
        faults.command(*arguments, tmp_path / "run"), tmp_path / "run", output, Fault("mkdir", 1, errno.EACCES)
    )
    assert ended.exit_code == 1
    assert output.read_text().splitlines()[-1] == (
        f"error: --output_dir {tmp_path / 'run'} cannot be written ({os.strerror(errno.EACCES)})"
    )


def test_the_reader_of_these_tests_sees_a_set_that_is_not_whole(undisturbed, tmp_path):
    """A test that cannot fail is worth nothing."""
    arguments, _, _ = undisturbed
    run, output = tmp_path / "run", tmp_path / "output.txt"
    assert faults.what_differs(faults.command(*arguments, run), run, output, {}) == "other bits"
    (path,) = (run / "ckpts").glob(f"decoder_ema*_step{STEPS:07d}.pt")
    whole = path.read_bytes()
    for damage in (None, whole[:-1], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        stop, counts = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").Array("l", 3)
        reader = faults.forked(faults.read_until, stop, Path(run), counts)
        reader.join()
        assert reader.exitcode == 1
