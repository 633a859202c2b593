"""Validation during training: on a fixed sample of the objects, stopped by signals, and made up for."""

import hashlib
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, VQ, assert_equal, checkpoint, course, logged, run, solid_grids, tiny_config

from benchmarks import runs
from trellis.runs.checkpoint import Checkpoints, misc_file
from trellis.runs.status import read_status
from trellis.runs.sums import save_summed
from trellis.trainers import basic
from trellis.trainers.validation import change, mixed, sample, scored_before


class Names:
    """A dataset that has nothing but names."""

    def __init__(self, sha256s: list[str]):
        self.sha256s = sha256s

    def __len__(self) -> int:
        return len(self.sha256s)

    def keys(self) -> np.ndarray:
        return np.array([int(name[:16], 16) for name in self.sha256s], np.uint64)

    def chosen(self, number: int | None) -> set[str]:
        indices = sample(self, number)  # type: ignore[arg-type]
        assert (np.diff(indices) > 0).all()
        return {self.sha256s[index] for index in indices}


NAMES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(3000)]


def test_a_sample_depends_on_the_names_alone():
    whole = Names(NAMES)
    assert whole.chosen(None) == whole.chosen(3000) == whole.chosen(4000) == set(NAMES)
    chosen = whole.chosen(1024)
    assert len(chosen) == 1024 and chosen == Names(NAMES[::-1]).chosen(1024)
    assert whole.chosen(100) < chosen
    # What stays is chosen again, and one object in three that are added enters.
    before = Names(NAMES[:2900]).chosen(1024)
    assert len(before - chosen) == len(chosen - before) == len(chosen & set(NAMES[2900:])) < 60


def test_a_sample_has_nothing_to_do_with_the_digits_that_choose_the_split():
    held_out = [name for name in NAMES if int(name[:8], 16) / 2**32 < 0.5]
    chosen = Names(held_out).chosen(len(held_out) // 2)
    values = [int(name[:8], 16) / 2**31 for name in chosen]
    assert abs(np.mean(values) - 0.5) < 0.05 and abs(np.std(values) - 12**-0.5) < 0.03


def test_the_hash_tells_all_numbers_apart():
    numbers = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(mixed(numbers))) == len(numbers)
    # SplitMix64 after the seed 0 gives this first: the finalizer of its increment.
    assert mixed(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    "misc, total, wanted",
    [
        ({"objects": {"val": torch.zeros(30, 8)}, "scored": 10}, 40, (10, 30)),
        ({"objects": {"val": torch.zeros(30, 8)}}, 40, (30, 30)),
        ({"objects": {}}, 40, (0, 0)),
        ({}, 40, (40, 40)),
    ],
)
def test_what_a_checkpoint_says_of_its_validations(misc, total, wanted):
    assert scored_before(misc, total) == wanted


@pytest.mark.parametrize(
    "before, now, setting",
    [
        ((10, 30), (10, 40), None),
        ((30, 30), (40, 40), None),
        ((30, 30), (10, 30), "null"),
        ((10, 30), (30, 30), "10"),
        ((10, 30), (20, 30), "10"),
    ],
)
def test_another_share_of_objects_is_said(before, now, setting):
    text = change(before, now)
    assert (text is None) == (setting is None)
    if text is not None:
        assert text.startswith(f"validations so far scored {before[0]} of {before[1]} objects, and now {now[0]} of")
        assert f"trainer.args.val_objects {setting} goes on as before" in text


# --- runs ---


def scores_of(run_dir) -> list[dict]:
    return [entry for entry in logged(run_dir) if "val/iou" in entry]


def test_a_run_scores_the_sample_alone(data_dir, write_config, tmp_path, capsys):
    """Its means are those of the chosen objects in a run that scores all, and nothing else changes."""
    config = write_config(tiny_config(VQ, max_steps=3))
    for name, value in (("all", "null"), ("default", "1024"), ("some", "4")):
        flags = ("--data_dir", data_dir, "--output_dir", tmp_path / name, "--set", f"trainer.args.val_objects={value}")
        assert run("--config", config, *flags) == 0
        assert ("validation scores 4 of 6 objects, the same in every run" in capsys.readouterr().out) == (
            name == "some"
        )
    assert logged(tmp_path / "all") == logged(tmp_path / "default")
    new = ["--config", config, "--data_dir", data_dir, "--output_dir", str(tmp_path / "new"), "--device", "cpu"]
    trainer = runs.build_trainer(new, torch.device("cpu"))
    chosen = sample(trainer.dataset.for_split("val"), 4)
    every, some = (course(tmp_path / name, 3) for name in ("all", "some"))
    assert every["objects"].shape == (6,) and torch.equal(every["objects"][chosen], some["objects"])
    for entry in scores_of(tmp_path / "some"):
        assert entry["step"] in (0, 3)
    assert scores_of(tmp_path / "some")[0]["val/iou"] == pytest.approx(every["objects"][chosen].mean().item(), abs=1e-6)
    for name in ("all", "some"):
        for files in (saved := checkpoint(tmp_path / name, 3)).values():
            for key in ("best", "scored"):
                files.pop(key, None)
        if name == "all":
            wanted = saved
    assert_equal(wanted, saved)


def test_the_time_of_a_validation_is_logged(data_dir, write_config, tmp_path, monkeypatch, capsys):
    assert run("--config", write_config(tiny_config()), "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 0
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    timed = [entry for entry in entries if "validation_seconds" in entry]
    assert [entry["step"] for entry in timed] == [0, 3, 6] == [e["step"] for e in entries if "val/iou" in e]
    lines = [line for line in capsys.readouterr().out.splitlines() if "  validation  iou " in line]
    assert [line.rpartition("  in ")[2] for line in lines] == [f"{e['validation_seconds']:.1f} s" for e in timed]


def test_a_run_that_scored_all_objects_says_that_it_goes_on_otherwise(data_dir, write_config, tmp_path, capsys):
    """As runs of earlier versions, whose checkpoints do not say how many."""
    config = write_config(tiny_config(val_objects=None, i_save=3))
    flags = ("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--set", "trainer.args.max_steps=3") == 0
    path = Checkpoints(tmp_path / "run").folder / misc_file(3)
    misc = torch.load(path, weights_only=True)
    for key in ("scored", "validation_owed"):
        del misc[key]
    save_summed(misc, path, sealed=True)
    capsys.readouterr()
    assert run(*flags, "--set", "trainer.args.val_objects=4") == 0
    assert (
        "note: validations so far scored 6 of 6 objects, and now 4 of 6: their scores do not compare, nor does the "
        "best step; trainer.args.val_objects null goes on as before"
    ) in capsys.readouterr().out
    assert course(tmp_path / "run", 6)["objects"] is None  # what was before step 1 is not compared with
    assert run(*flags, "--ckpt", "3", "--set", "trainer.args.val_objects=null") == 0
    assert "validations so far" not in capsys.readouterr().out
    assert course(tmp_path / "run", 6)["objects"].shape == (6,)


def test_a_signal_stops_a_validation_and_the_same_command_begins_with_it(
    data_dir, write_config, tmp_path, monkeypatch, capsys
):
    config = write_config(tiny_config(VQ, batch_split=2))  # three rounds of two objects
    flags = ("--config", config, "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    rounds = []

    def signum(self) -> int | None:
        rounds.append(self.step)
        return signal.SIGTERM if self.step == 3 and rounds.count(3) == 2 else None

    with monkeypatch.context() as patch:
        patch.setattr(basic.BasicTrainer, "signum", property(signum))
        assert run(*flags, "--output_dir", tmp_path / "parts") == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "step 3  SIGTERM has stopped the validation; the same command begins with it" in out
    assert "stopped at step 3; the same command continues" in out and rounds == [0, 0, 3, 3]
    assert Checkpoints(tmp_path / "parts").latest() == 3 and len(scores_of(tmp_path / "parts")) == 1
    assert run(*flags, "--output_dir", tmp_path / "parts") == 0
    assert "step 3  validation  iou" in capsys.readouterr().out
    assert_equal(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6))
    assert_equal(course(tmp_path / "whole", 6), course(tmp_path / "parts", 6))
    numbers = [
        [{key: value for key, value in entry.items() if key.startswith(("step", "val/"))} for entry in entries]
        for entries in (scores_of(tmp_path / "whole"), scores_of(tmp_path / "parts"))
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3


def test_the_scores_so_far_are_in_the_status_of_a_run_that_continues(data_dir, write_config, tmp_path, monkeypatch):
    flags = ("--config", write_config(tiny_config(i_save=4)), "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--set", "trainer.args.max_steps=4") == 0
    before = read_status(tmp_path / "run")
    assert before is not None and before["scores"]["step"] == 4 and "iou" in before["scores"]

    def fail(self, batch: dict) -> None:
        raise RuntimeError("no step is taken")

    monkeypatch.setattr(basic.BasicTrainer, "run_step", fail)
    assert run(*flags) == 1
    after = read_status(tmp_path / "run")
    assert after is not None and after["state"] == "failed" and after["scores"] == before["scores"]


ONE_RANK_IS_TOLD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train
from trellis.trainers.vae import sparse_structure_vae as vae
from trellis.utils import dist_utils

evaluate = vae.evaluate

def slow(*args, progress, **kwargs):
    def after(done):
        os.write(1, f"rank {{dist_utils.rank()}} did {{done}} at step {{trainer.step}}\\n".encode())
        if trainer.step == 3 and dist_utils.rank() == 1 and done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while trainer.signum is None:
                time.sleep(0.01)
        progress(done)
    return evaluate(*args, progress=after, **kwargs)

def validate(self):
    global trainer
    trainer = self
    return own(self)

own, vae.SparseStructureVaeTrainer.validate, vae.evaluate = vae.SparseStructureVaeTrainer.validate, validate, slow
if __name__ == "__main__":
    sys.exit(train.main())
"""


def test_all_ranks_stop_in_the_same_round_if_one_is_told_to(data_dir, write_config, tmp_path):
    """Of five objects, the same ones as on one rank, the first rank has three rounds and the second two."""
    config = write_config(tiny_config(val_objects=5, batch_split=2))
    flags = ("--config", config, "--data_dir", data_dir, "--device", "cpu", "--auto_retry", "0")
    (tmp_path / "told.py").write_text(ONE_RANK_IS_TOLD.format(root=str(ROOT)))
    command = [sys.executable, tmp_path / "told.py", *flags, "--output_dir", tmp_path / "two", "--num_gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "step 3  SIGTERM has stopped the validation" in done.stdout
    assert sorted(re.findall(r"rank \d did \d at step \d", done.stdout)) == sorted(
        [f"rank 0 did {number} at step 0" for number in (1, 2, 3)]
        + [f"rank 1 did {number} at step 0" for number in (1, 2)]
        + [f"rank {rank} did 1 at step 3" for rank in (0, 1)]
    )
    assert Checkpoints(tmp_path / "two").latest() == 3
    assert run(*flags, "--output_dir", tmp_path / "two", "--set", "trainer.args.max_steps=4") == 0
    assert [entry["step"] for entry in scores_of(tmp_path / "two")] == [0, 3, 4]
    assert run(*flags, "--output_dir", tmp_path / "one", "--set", "trainer.args.max_steps=4") == 0
    for step in (0, 4):
        one, two = (course(tmp_path / name, step)["objects"] for name in ("one", "two"))
        assert one.shape == (5,)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_the_objects_of_a_step_are_those_that_were_drawn_from_weighted_roots(data_dir, write_config, tmp_path):
    """Reports of bad steps name them."""
    config = tiny_config()
    config["dataset"]["args"]["weights"] = [3, 1]
    roots = f"{data_dir}/shapes_train.npz,{tmp_path}/more_train.npz"
    np.savez(tmp_path / "more_train.npz", bits=np.packbits(solid_grids(4, 16, 5).reshape(4, -1), axis=1))
    flags = ["--config", write_config(config), "--data_dir", roots, "--output_dir", str(tmp_path / "run")]
    trainer = runs.build_trainer([*flags, "--device", "cpu"], torch.device("cpu"))
    for batch, step in zip(trainer.batches(), range(1, 20), strict=False):
        trainer.step, trainer.samples_seen = step, 4 * step
        grids = trainer.dataset.get_batch(trainer.objects_of_step(step))
        assert torch.equal(trainer.dataset.unpack_batch(grids)["ss"], batch["ss"]), step
