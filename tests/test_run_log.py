"""log.txt, TensorBoard and Weights & Biases: damage and absence of any of them stops no run."""

import json
import re
import sys
import tracemalloc
import types

import pytest
from helpers import assert_equal, checkpoint, logged, run, tiny_config

from trellis.trainers import logger, sinks
from trellis.trainers.logger import UNREADABLE, RunLog
from trellis.trainers.sinks import Sinks, check_wandb
from trellis.utils.errors import ConfigError


@pytest.fixture
def open_log(tmp_path, monkeypatch):
    """Open the log of tmp_path after a step, without TensorBoard; return what it says."""
    monkeypatch.setattr(logger, "TensorBoard", types.SimpleNamespace(name="TensorBoard", __call__=None))

    def open_it(step: int) -> list[str]:
        told: list[str] = []
        monkeypatch.setattr(Sinks, "add", lambda self, name, build: None)
        RunLog(tmp_path, step, {}, None, told.append)
        return told

    return open_it


def line(step: int, **values) -> str:
    return json.dumps({"step": step, **values}) + "\n"


# --- log.txt ---


def test_later_entries_and_a_cut_off_line_go_without_a_word(tmp_path, open_log):
    path = tmp_path / "log.txt"
    path.write_text("".join(line(step, loss=0.5) for step in range(9)) + '{"step": 9, "lo')
    inode = path.stat().st_ino
    assert open_log(5) == []
    assert path.read_text() == "".join(line(step, loss=0.5) for step in range(6))
    assert path.stat().st_ino == inode  # cut in place, not written anew
    assert open_log(5) == [] and not (tmp_path / UNREADABLE).exists()


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\x00 no text\n",
        b'{"loss": 1}\n',
        b"[1, 2]\n",
        b'{"step": "6"}\n',
        b'{"step": 1.5}\n',
        b"\n",
        b"[" * 9999 + b"\n",
    ],
)
def test_damaged_lines_are_kept_aside_and_said(damage, tmp_path, open_log):
    path = tmp_path / "log.txt"
    path.write_bytes(line(1).encode() + damage + line(2).encode() + line(3).encode())
    (told,) = open_log(2)
    assert "log.txt has 1 lines that are no entries" in told and UNREADABLE in told
    assert path.read_text() == line(1) + line(2)
    assert (tmp_path / UNREADABLE).read_bytes() == damage
    assert open_log(2) == []


def test_a_line_without_end_is_kept_aside_whole(tmp_path, open_log, monkeypatch):
    monkeypatch.setattr(logger, "LONGEST_LINE", 100)
    long = b"x" * 1234 + b"\n"
    (tmp_path / "log.txt").write_bytes(line(1).encode() + long + line(2).encode())
    open_log(2)
    assert (tmp_path / "log.txt").read_text() == line(1) + line(2)
    assert (tmp_path / UNREADABLE).read_bytes() == long


def test_a_folder_in_its_place_is_kept_aside(tmp_path, open_log):
    (tmp_path / "log.txt").mkdir()
    (told,) = open_log(2)
    assert "log_unreadable_1" in told and (tmp_path / "log_unreadable_1").is_dir()
    assert not (tmp_path / "log.txt").exists()


def test_a_large_log_is_not_held_in_memory(tmp_path, open_log):
    with open(tmp_path / "log.txt", "w") as file:
        for step in range(20_000):
            file.write(line(step, loss="x" * 300))
    tracemalloc.start()
    open_log(19_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "log.txt").stat().st_size > 5_000_000 > 10 * peak


def test_a_run_goes_on_over_a_damaged_log_with_the_same_weights(data_dir, write_config, tmp_path, capsys):
    flags = ("--config", write_config(tiny_config()), "--data_dir", data_dir)
    half = ("--set", "trainer.args.max_steps=2")
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    assert run(*flags, "--output_dir", tmp_path / "parts", *half) == 0
    with open(tmp_path / "parts" / "log.txt", "r+b") as file:
        file.write(b"\xff\xff")
    assert run(*flags, "--output_dir", tmp_path / "parts") == 0
    assert "1 lines that are no entries" in capsys.readouterr().out
    assert_equal(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6))
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    assert [entry for entry in whole if entry["step"] > 2] == [entry for entry in parts if entry["step"] > 2]


# --- sinks ---


class Recorder:
    """A sink that fails at a call of a name."""

    def __init__(self, fails_in: str = ""):
        self.name, self.fails_in, self.got = "Recorder", fails_in, []

    def _call(self, name: str, *args) -> None:
        if name == self.fails_in:
            raise OSError("disk full")
        self.got.append((name, *args))

    def scalars(self, values, step):
        self._call("scalars", values, step)

    def image(self, name, picture, step):
        self._call("image", name, step)

    def close(self):
        self._call("close")


@pytest.mark.parametrize("fails_in", ["scalars", "image", "close"])
def test_a_sink_that_fails_is_left_out_with_one_line_and_the_others_get_all(fails_in):
    told: list[str] = []
    all_sinks, good, bad = Sinks(told.append), Recorder(), Recorder(fails_in)
    all_sinks.add("bad", lambda: bad)
    all_sinks.add("good", lambda: good)
    for step in (1, 2):
        all_sinks.scalars({"loss": 1.0}, step)
        all_sinks.image("picture", None, step)
    all_sinks.close()
    assert told == ["Recorder gets nothing more (OSError: disk full); training goes on, and log.txt has all numbers"]
    assert [call[0] for call in good.got] == ["scalars", "image", "scalars", "image", "close"]
    assert bad.got == good.got[: len(bad.got)]


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_training_goes_on_without_tensorboard(how, data_dir, write_config, tmp_path, monkeypatch, capsys):
    broken = types.ModuleType("torch.utils.tensorboard")
    if how == "broken":
        broken.SummaryWriter = lambda *args, **kwargs: 1 / 0
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None if how == "missing" else broken)
    flags = ("--config", write_config(tiny_config(max_steps=2)), "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert len(re.findall("TensorBoard gets nothing", out)) == 1
    assert logged(tmp_path / "run")[-1]["val/iou"] >= 0


# --- Weights & Biases ---


class FakeRun:
    def __init__(self, calls: list):
        self.calls = calls

    def define_metric(self, name, **kwargs):
        self.calls.append(("define", name, kwargs))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` that keeps its calls; `unreachable` makes init raise unless it is offline."""
    module = types.ModuleType("wandb")
    module.calls, module.unreachable = [], False

    def init(**kwargs):
        module.calls.append(("init", kwargs))
        if module.unreachable and kwargs.get("mode") != "offline":
            raise RuntimeError("no network\nand more")
        return FakeRun(module.calls)

    module.init, module.Image = init, lambda picture: ("image", picture.shape)
    module.teardown = lambda: module.calls.append(("teardown",))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def with_wandb(write_config, max_steps: int, **spec) -> str:
    return write_config(tiny_config(max_steps=max_steps, wandb={"project": "shapes", **spec}))


def test_wandb_gets_what_tensorboard_gets_and_a_resumed_run_stays_the_same_run(
    fake_wandb, data_dir, write_config, tmp_path
):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run("--config", with_wandb(write_config, 4, tags=["a"]), *flags) == 0
    assert run("--config", with_wandb(write_config, 6, tags=["a"]), *flags) == 0
    first, second = (kwargs for name, *rest in fake_wandb.calls if name == "init" for kwargs in rest)
    assert (first["project"], first["tags"], first["resume"]) == ("shapes", ["a"], "allow")
    assert first["dir"] == str(tmp_path / "run") and first["config"]["trainer"]["args"]["max_steps"] == 4
    assert first["id"] == second["id"] == json.loads((tmp_path / "run" / sinks.WANDB_ID).read_text())["id"]
    values = [rest[0] for name, *rest in fake_wandb.calls if name == "log"]
    ious = {entry["step"]: entry["val/iou"] for entry in values if "val/iou" in entry}
    assert ious == {entry["step"]: entry["val/iou"] for entry in logged(tmp_path / "run") if "val/iou" in entry}
    assert any("reconstruction" in entry for entry in values)
    assert [name for name, *_ in fake_wandb.calls].count("finish") == 2
    steps = ("define", "*", {"step_metric": "step"})
    assert fake_wandb.calls.count(steps) == 2


def test_without_a_network_wandb_writes_to_the_run_folder(fake_wandb, data_dir, write_config, tmp_path, capsys):
    fake_wandb.unreachable = True
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run("--config", with_wandb(write_config, 2), *flags) == 0
    out = capsys.readouterr().out
    assert out.count("Weights & Biases cannot be used now (no network)") == 1 and "wandb sync" in out
    modes = [rest[0].get("mode") for name, *rest in fake_wandb.calls if name == "init"]
    assert modes == [None, "offline"]


def test_wandb_that_breaks_stops_nothing(fake_wandb, data_dir, write_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FakeRun, "log", lambda self, values: 1 / 0)
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run("--config", with_wandb(write_config, 2), *flags) == 0
    assert capsys.readouterr().out.count("Weights & Biases gets nothing more (ZeroDivisionError") == 1


def test_a_sender_that_hangs_does_not_hold_the_end_up(fake_wandb, tmp_path, monkeypatch):
    import threading

    release, told = threading.Event(), []
    monkeypatch.setattr(sinks, "CLOSING", 0.05)
    monkeypatch.setattr(FakeRun, "finish", lambda self: release.wait(30))
    sinks.WeightsAndBiases(tmp_path, {"project": "shapes"}, {}, told.append).close()
    release.set()
    assert len(told) == 1 and "wandb sync" in told[0]


@pytest.mark.parametrize(
    "spec, message",
    [
        ({}, "wandb.project is missing"),
        ({"project": ""}, 'wandb.project is ""; it must be a text'),
        ({"project": "a", "tags": "b"}, 'wandb.tags is "b"; it must be a list of texts'),
        ({"project": "a", "mode": "disabled"}, "wandb.mode is 'disabled'; it must be online or offline"),
        ({"project": "a", "entitiy": "b"}, "wandb.entitiy is unknown; did you mean entity"),
    ],
)
def test_wrong_arguments_of_wandb(spec, message, fake_wandb):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_wandb(spec, "trainer.args.wandb")


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_without_wandb_a_run_that_asks_for_it_does_not_start(
    folder_of_that_name, data_dir, write_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb") if folder_of_that_name else None)
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run("--config", with_wandb(write_config, 2), *flags) == 1
    err = capsys.readouterr().err
    assert "trainer.args.wandb: a Python package is missing" in err and "pip install wandb" in err
    assert not (tmp_path / "run").exists()
