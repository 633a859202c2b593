"""Checkpoint folders: which step is picked, what is kept, and where weights come from."""

import copy
import errno
import json
import os
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, run, tiny_config

from trellis import __version__
from trellis.models import build, read_weights
from trellis.runs import open_run, sums
from trellis.runs.checkpoint import Checkpoints, misc_file, model_file
from trellis.runs.saver import Saver
from trellis.trainers import SparseStructureVaeTrainer, SparseStructureVqVaeTrainer
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.weights import plan_weights
from trellis.utils.errors import CheckpointError, ConfigError


def weights(value: float) -> dict:
    return {"w": torch.full((50,), value)}


def save(checkpoints: Checkpoints, step: int, best: int | None = None, frozen=("encoder",), **misc) -> None:
    """A set in which trained weights hold the step, averages the step plus a half, frozen ones 7."""
    trained = {name: weights(step) for name in ("decoder", "quantizer")}
    averages = {rate: {name: weights(step + 0.5) for name in trained} for rate in (0.9, 0.9999)}
    score = None if best is None else {"step": best, "by": "iou", "score": 0.5}
    frozen = {name: weights(7) for name in frozen}
    checkpoints.save(step, trained, averages, frozen, {"best": score, **misc})


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    """Steps 0, 2, 4 and 6, the best of which is 2."""
    result = Checkpoints(tmp_path / "run")
    for step in (0, 2, 4, 6):
        save(result, step, best=min(step, 2))
    return result


def files(checkpoints: Checkpoints, step: int) -> set[str]:
    return {path.name for path in checkpoints.folder.glob(f"*step{step:07d}.pt")}


# --- finding ---


def test_names_are_those_of_trellis(checkpoints):
    assert files(checkpoints, 4) == {
        "decoder_step0000004.pt",
        "decoder_ema0.9_step0000004.pt",
        "decoder_ema0.9999_step0000004.pt",
        "quantizer_step0000004.pt",
        "quantizer_ema0.9_step0000004.pt",
        "quantizer_ema0.9999_step0000004.pt",
        "encoder_step0000004.pt",
        "misc_step0000004.pt",
    }
    assert model_file("decoder", 12345678, 0.9999) == "decoder_ema0.9999_step12345678.pt"
    state = torch.load(checkpoints.folder / "decoder_ema0.9_step0000004.pt", weights_only=True)
    assert torch.equal(state["w"], weights(4.5)["w"])


def test_resolve(checkpoints):
    assert checkpoints.steps() == [0, 2, 4, 6]
    assert [checkpoints.resolve(ckpt) for ckpt in ("latest", "best", "none", "4", "0000002")] == [6, 2, None, 4, 2]
    with pytest.raises(CheckpointError, match="no complete checkpoint for --ckpt 5; complete steps: 0, 2, 4, 6"):
        checkpoints.resolve("5")


def test_a_folder_without_checkpoints_has_none(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        empty = Checkpoints(folder)
        assert empty.steps() == [] and empty.latest() is None and empty.best() is None
        assert empty.resolve("latest") is None and empty.resolve("none") is None
        for ckpt in ("best", "3"):
            with pytest.raises(CheckpointError, match="complete steps: none"):
                empty.resolve(ckpt)


def test_best_is_none_before_any_validation(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 0)
    assert checkpoints.best() is None
    with pytest.raises(CheckpointError, match="--ckpt best; complete steps: 0"):
        checkpoints.resolve("best")


def test_steps_sort_by_number_beyond_seven_digits(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (9999999, 10000000, 123):
        save(checkpoints, step)
    assert checkpoints.steps() == [123, 9999999, 10000000] and checkpoints.latest() == 10000000


def test_a_set_that_lost_or_shortened_any_file_is_never_picked(checkpoints):
    for name in sorted(files(checkpoints, 6) - {misc_file(6)}):
        path = checkpoints.folder / name
        whole = path.read_bytes()
        for damage, told in (
            (None, "is missing"),
            (b"", f"has 0 bytes; it had {len(whole)} when it was written"),
            (whole[:-1], f"has {len(whole) - 1} bytes"),
            (whole + b"x", f"has {len(whole) + 1} bytes"),
        ):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.warns(UserWarning, match=f"passed over: {path} {told}"):
                assert not checkpoints.is_complete(6) and checkpoints.latest() == 4, name
            with pytest.raises(CheckpointError, match=f"--ckpt 6; complete steps: 0, 2, 4; {path} {told}"):
                checkpoints.resolve("6")
            path.write_bytes(whole)
    assert checkpoints.latest() == 6


@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "no end"])
def test_a_damaged_misc_file_is_passed_over_aloud(damage, checkpoints):
    path = checkpoints.folder / misc_file(6)
    whole = path.read_bytes()
    kinds = {"empty": b"", "half": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "no end": whole[:-30]}
    path.write_bytes(kinds[damage])
    with pytest.warns(UserWarning, match="passed over: .*misc_step0000006.pt is damaged"):
        assert checkpoints.latest() == 4


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(checkpoints):
    """Passing over it would start again from an older step, or from nothing."""
    path = checkpoints.folder / misc_file(6)
    misc = checkpoints.read_misc(6)
    assert misc["format"] == "trellis-vqvae-1"
    for version, message in (
        ("2", f"its format version is 2, but trellis-vqvae {__version__} reads versions up to 1; install a newer"),
        ("x", "its format version is 'x', but must be a whole number of at least 1"),
    ):
        torch.save({**misc, "format": f"trellis-vqvae-{version}"}, path)
        for read in (checkpoints.latest, lambda: checkpoints.read_misc(6), lambda: checkpoints.resolve("6")):
            with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")):
                read()
    assert checkpoints.read_misc(4) is not None and checkpoints.resolve("4") == 4


def test_an_interrupted_save_is_not_a_checkpoint(checkpoints, monkeypatch):
    """Whichever write fails, what was there stays the latest, and nothing half-written has a final name."""
    written, space = [], []
    original = torch.save

    def failing(content, file):
        if not space:
            file.write(b"half")
            raise OSError("disk full")
        space.pop()
        written.append(Path(file.file.name).name)
        original(content, file)

    monkeypatch.setattr(torch, "save", failing)
    for survives in range(7):
        space[:] = [None] * survives
        with pytest.raises(OSError, match="disk full"):
            save(checkpoints, 8)
        assert checkpoints.latest() == 6
        assert not [path for path in checkpoints.folder.iterdir() if path.read_bytes() == b"half"]
    space[:] = [None] * 7
    save(checkpoints, 8)
    assert misc_file(8) in written[-1] and checkpoints.latest() == 8


def test_clean_removes_what_a_killed_write_left(checkpoints):
    (checkpoints.folder / ".decoder_step0000008.pt.123.tmp").write_bytes(b"half")
    before = {path.name for path in checkpoints.folder.iterdir() if not path.name.startswith(".")}
    checkpoints.clean()
    assert {path.name for path in checkpoints.folder.iterdir()} == before


def test_a_state_that_would_not_load_again_is_refused(checkpoints):
    with pytest.raises(RuntimeError, match="misc_step0000008.pt holds objects that could only be unpickled"):
        save(checkpoints, 8, optimizer={"path": Path("x")})
    assert checkpoints.latest() == 6


def test_ema_rates_are_of_this_model_and_step(checkpoints):
    assert checkpoints.ema_rates("decoder", 4) == [0.9999, 0.9]
    assert checkpoints.ema_rates("encoder", 4) == [] and checkpoints.ema_rates("decoder", 5) == []
    for name in ("decoder_x", "x_decoder"):
        (checkpoints.folder / model_file(name, 9, 0.5)).touch()
    for rate in (0.999999, 1e-05, 1.0):
        (checkpoints.folder / model_file("decoder", 9, rate)).touch()
    assert checkpoints.ema_rates("decoder", 9) == [1.0, 0.999999, 1e-05]  # as in a folder of TRELLIS's


def test_a_file_that_a_set_does_not_list_is_not_its_average(checkpoints):
    (checkpoints.folder / model_file("decoder", 4, 0.5)).touch()
    assert checkpoints.ema_rates("decoder", 4) == [0.9999, 0.9]


# --- damage ---


def flip(path: Path, place: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def use(checkpoints: Checkpoints, step: int) -> None:
    """What a resume and a reader do before any weight is used."""
    assert checkpoints.resolve(str(step)) == step
    checkpoints.verify(step)
    open_run(checkpoints.run_dir, str(step)).weight_sets()


def test_any_flipped_bit_is_found_and_the_file_and_the_checkpoint_before_are_named(tmp_path):
    """300 bits, spread over the whole of three files."""
    checkpoints, config = Checkpoints(tmp_path), {"models": {"encoder": {}, "decoder": {}, "quantizer": {}}}
    for step in (4, 6):
        save(checkpoints, step, best=4, config=config, optimizer={"state": {i: weights(i) for i in range(5)}})
    use(checkpoints, 6)
    for name in (model_file("encoder", 6), model_file("decoder", 6, 0.9), misc_file(6)):
        path = checkpoints.folder / name
        size = path.stat().st_size
        for number in range(100):
            place = number * size // 100 if number < 60 else size - 100 + number  # the seal is at the end
            fresh = Checkpoints(tmp_path)
            flip(path, place, number % 8)
            with pytest.raises(CheckpointError, match=re.escape(f"{path} is damaged")) as error:
                use(fresh, 6)
            whole = "lacks its end" in str(error.value)
            remedy = "Restore the file, or take the checkpoint before it: --ckpt 4"
            assert whole or str(error.value).endswith(remedy), place
            assert fresh.resolve("4") == 4
            if name == misc_file(6) and not whole:
                with pytest.raises(CheckpointError, match="--ckpt 4$"):
                    fresh.latest()
            flip(path, place, number % 8)
    use(Checkpoints(tmp_path), 6)


def test_a_misc_file_of_another_step_is_found(checkpoints):
    """All that it lists is sound, and its own sum holds."""
    (checkpoints.folder / misc_file(6)).write_bytes((checkpoints.folder / misc_file(4)).read_bytes())
    with pytest.raises(CheckpointError, match=f"{misc_file(6)} is damaged .it is the one of step 4.*--ckpt 4"):
        Checkpoints(checkpoints.run_dir).latest()


def test_damage_after_a_file_was_read_is_found_too(checkpoints):
    checkpoints.verify(6)
    path = checkpoints.folder / model_file("decoder", 6)
    flip(path, path.stat().st_size // 2, 3)
    with pytest.raises(CheckpointError, match=f"{path} is damaged"):
        checkpoints.verify(6)


def test_a_checkpoint_without_sums_is_compared_with_those_of_its_zip_archives(checkpoints):
    """As versions before sums wrote it, and TRELLIS."""
    misc = checkpoints.read_misc(6, mmap=False)
    del misc["sums"]
    torch.save(misc, checkpoints.folder / misc_file(6))
    checkpoints.verify(6)
    for name in (model_file("decoder", 6), misc_file(6)):
        path = checkpoints.folder / name
        found = 0
        for place in range(0, path.stat().st_size, path.stat().st_size // 60):
            fresh = Checkpoints(checkpoints.run_dir)
            flip(path, place, place % 8)
            try:
                fresh.verify(6)
                loaded = read_weights(path) if name != misc_file(6) else fresh.read_misc(6, mmap=False)
                flip(path, place, place % 8)
                assert_equal(loaded, torch.load(path, weights_only=True))  # a bit of the archive that says nothing
            except CheckpointError as error:
                assert f"{path}" in str(error)
                flip(path, place, place % 8)
                found += 1
        assert found >= 20, name


def test_a_sum_of_another_program_counts_only_for_the_file_that_is_used(tmp_path):
    trellis_run(tmp_path, tiny_config())
    path = tmp_path / "ckpts" / "decoder_ema0.9999_step0000010.pt"
    flip(path, path.stat().st_size // 2, 0)
    run = open_run(tmp_path)
    assert run.weight_file("encoder").is_file()
    with pytest.raises(CheckpointError, match=f"{path} is damaged .*there is no checkpoint before it"):
        run.weight_file("decoder")


@pytest.mark.parametrize("name", [model_file("decoder", 4), misc_file(4)])
@pytest.mark.parametrize("ckpt, code", [("latest", 1), ("2", 0)])
def test_a_damaged_checkpoint_stops_a_resume_and_the_one_before_is_used_where_asked(
    ckpt, code, name, data_dir, write_config, tmp_path, capsys
):
    flags = ("--config", write_config(tiny_config(max_steps=4)), "--data_dir", data_dir, "--output_dir", tmp_path)
    assert run(*flags) == 0
    checkpoints = Checkpoints(tmp_path)
    want = checkpoint(tmp_path, 4)
    path = checkpoints.folder / name
    flip(path, path.stat().st_size // 2, 0)
    before = {path: path.read_bytes() for path in checkpoints.folder.iterdir()}
    assert run(*flags, "--ckpt", ckpt) == code
    if code:
        assert capsys.readouterr().err == (
            f"error: {path} is damaged (its sum is not the one it was written with). Restore the file, or take the "
            "checkpoint before it: --ckpt 2\n"
        )
        assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before
    else:
        assert_equal(checkpoint(tmp_path, 4), want)


def test_frozen_weights_that_were_damaged_are_written_anew(checkpoints):
    path = checkpoints.folder / model_file("encoder", 6)
    flip(path, path.stat().st_size // 2, 0)
    with pytest.warns(UserWarning, match=f"encoder_step0000008.pt is written anew: {path} is damaged"):
        save(checkpoints, 8)
    checkpoints.verify(8)
    assert torch.equal(torch.load(checkpoints.folder / model_file("encoder", 8))["w"], weights(7)["w"])


def test_what_reads_back_otherwise_is_no_checkpoint_and_removes_none(checkpoints, monkeypatch):
    original = sums.file_sum
    monkeypatch.setattr(sums, "file_sum", lambda path: original(path) ^ 1)
    with pytest.raises(CheckpointError, match="a file reads back other than it was written; check the disk"):
        save(checkpoints, 8)
    assert checkpoints.steps() == [0, 2, 4, 6] and not list(checkpoints.folder.glob(".*"))


@pytest.mark.parametrize(
    "number, told", [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota"), (errno.EROFS, "Read-only")]
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_disk_that_takes_no_more_is_one_error_that_names_the_file_and_the_remedy(
    call, number, told, checkpoints, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    original = open

    def failing_open(path, mode="r", **kwargs):
        if "x" in mode:
            fail()
        return original(path, mode, **kwargs)

    if call == "open":
        monkeypatch.setattr("builtins.open", failing_open)
    elif call == "write":
        init = sums.SumWriter.__init__
        full = SimpleNamespace(write=fail, flush=lambda: None)  # torch then says "unexpected pos"
        monkeypatch.setattr(sums.SumWriter, "__init__", lambda writer, file: init(writer, full))
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError) as error:
        save(checkpoints, 8)
    monkeypatch.undo()
    text = str(error.value)
    assert str(checkpoints.folder / model_file("decoder", 8)) in text and told in text and "step 6 is kept" in text
    assert text.endswith("then run the same command again") and "\n" not in text
    assert checkpoints.latest() == 6 and not list(checkpoints.folder.glob(".*"))


# --- keeping ---


@pytest.mark.parametrize(
    "keep_last, best, kept", [(1, 2, [2, 6]), (2, 2, [2, 4, 6]), (1, 6, [6]), (2, None, [4, 6]), (9, 2, [0, 2, 4, 6])]
)
def test_prune_keeps_the_last_and_the_best_whole(keep_last, best, kept, checkpoints):
    checkpoints.prune(keep_last, best)
    assert checkpoints.steps() == kept and all(checkpoints.is_complete(step) for step in kept)
    assert {path.name for path in checkpoints.folder.iterdir()} == set().union(*(files(checkpoints, s) for s in kept))
    for step in kept:  # also the frozen weights, whose first file may be gone
        state = torch.load(checkpoints.folder / model_file("encoder", step), weights_only=True)
        assert torch.equal(state["w"], weights(7)["w"])


def test_a_removed_set_loses_its_misc_file_first(checkpoints, monkeypatch):
    """Killed at any moment, the rest is removed by the next start."""
    whole = files(checkpoints, 2)
    original = Path.unlink
    for survives in range(len(whole)):
        save(checkpoints, 2)
        left = [None] * survives

        def failing(path, *args, left=left, **kwargs):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            original(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", failing)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.remove(2)
        assert checkpoints.steps() == [0, 4, 6] and len(files(checkpoints, 2)) == len(whole) - survives
        checkpoints.clean()
        assert [path for path in checkpoints.folder.iterdir() if "0000002" in path.name] == []


def test_frozen_weights_are_stored_once(checkpoints):
    inodes = {(checkpoints.folder / model_file("encoder", step)).stat().st_ino for step in (0, 2, 4, 6)}
    assert len(inodes) == 1
    save(checkpoints, 4)  # again, as after going back
    assert (checkpoints.folder / model_file("encoder", 4)).stat().st_ino in inodes
    checkpoints.prune(1, None)
    save(checkpoints, 8)
    assert (checkpoints.folder / model_file("encoder", 8)).stat().st_ino in inodes


def test_without_hard_links_frozen_weights_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints = Checkpoints(tmp_path)
    for step in (0, 2, 2):
        save(checkpoints, step)
        assert checkpoints.is_complete(step)
    paths = [checkpoints.folder / model_file("encoder", step) for step in (0, 2)]
    assert paths[0].read_bytes() and not paths[0].samefile(paths[1])
    assert torch.equal(torch.load(paths[1], weights_only=True)["w"], weights(7)["w"])


def test_set_aside_moves_all_that_is_later_and_loses_nothing(checkpoints):
    (checkpoints.folder / "decoder_step0000009.pt").write_bytes(b"of an interrupted save")
    want = {path.name: path.read_bytes() for path in checkpoints.folder.iterdir() if int(path.stem[-1]) > 2}
    target = checkpoints.set_aside(after=2)
    assert target == checkpoints.folder / "superseded_1"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == want
    assert checkpoints.steps() == [0, 2] and checkpoints.latest() == 2
    assert checkpoints.set_aside(after=2) is None
    assert checkpoints.set_aside(after=-1) == checkpoints.folder / "superseded_2" and checkpoints.steps() == []


def test_set_aside_interrupted_anywhere_leaves_no_later_set_complete(checkpoints, monkeypatch):
    original = Path.rename
    moved = []

    def failing(path, target):
        if len(moved) == 2:
            raise OSError("killed")
        moved.append(path.name)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="killed"):
        checkpoints.set_aside(after=2)
    assert sorted(moved) == [misc_file(4), misc_file(6)] and checkpoints.latest() == 2


# --- where weights come from ---


def models(config: dict, seed: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(seed)
    return {name: build(spec) for name, spec in config["models"].items()}


def trellis_run(folder: Path, config: dict, step: int = 10, ema: bool = True, misc=None) -> dict[str, dict]:
    """A run as TRELLIS leaves it, its misc file with numpy objects inside. Returns the raw weights."""
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    states = {name: model.state_dict() for name, model in models(config, seed=step).items()}
    for name, state in states.items():
        torch.save(state, folder / "ckpts" / f"{name}_step{step:07d}.pt")
        if ema:
            averaged = {key: value + 1 for key, value in state.items()}
            torch.save(averaged, folder / "ckpts" / f"{name}_ema0.9999_step{step:07d}.pt")
    misc = misc or {
        "optimizer": {"state": {}},
        "step": step,
        "log_scale": np.float64(20.0),
        "grad_clip": {"grad_norm": np.ones(3)},
    }
    torch.save(misc, folder / "ckpts" / f"misc_step{step:07d}.pt")
    return states


@pytest.mark.parametrize("misc", [None, {"step": 10, "optimizer": {}}], ids=["numpy inside", "tensors only"])
@pytest.mark.parametrize("ema", [True, False])
def test_a_trellis_run_gives_weights_only(ema, misc, tmp_path):
    config = tiny_config()
    trellis_run(tmp_path / "theirs", config, step=5)
    states = trellis_run(tmp_path / "theirs", config, step=10, ema=ema, misc=misc)
    theirs = Checkpoints(tmp_path / "theirs")
    assert theirs.latest() == 10 and theirs.read_misc(10) is None
    plan = plan_weights(config, SparseStructureVaeTrainer, str(tmp_path / "out"), str(theirs.run_dir), "latest")
    assert plan.resume is None
    loaded = models(config, seed=99)
    plan.load(loaded)
    for name, model in loaded.items():
        assert ("averaged" if ema else "raw") in plan.origin[name] and "step0000010" in plan.origin[name]
        for key, value in model.state_dict().items():
            assert torch.equal(value, states[name][key] + ema)


def test_a_trellis_run_feeds_stage_1_and_the_codebook_is_named(tmp_path):
    trellis_run(tmp_path / "theirs", tiny_config())
    config = tiny_config(VQ, freeze=["encoder", "decoder"])
    plan = plan_weights(config, SparseStructureVqVaeTrainer, str(tmp_path / "out"), str(tmp_path / "theirs"), "10")
    assert plan.files["quantizer"] is None and plan.origin["quantizer"] == "initialized"
    assert plan.notes == [f"{tmp_path / 'theirs'} at step 10 has no quantizer"]
    assert not (tmp_path / "out").exists()


def test_a_trellis_run_cannot_be_continued_in_place(tmp_path):
    config = tiny_config()
    trellis_run(tmp_path / "theirs", config)
    with pytest.raises(CheckpointError, match="is a run of another program; give it as --load_dir"):
        plan_weights(config, SparseStructureVaeTrainer, str(tmp_path / "theirs"), None, "latest")


def own_run(folder: Path, config: dict, step: int = 4) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    states = {name: model.state_dict() for name, model in models(config, seed=step).items()}
    frozen = {name: states.pop(name) for name in config["trainer"]["args"].get("freeze", ())}
    averages = {0.9999: {name: {k: v + 1 for k, v in state.items()} for name, state in states.items()}}
    checkpoints.save(step, states, averages, frozen, {"best": None, "config": config})
    return checkpoints


def test_the_runs_own_checkpoint_comes_before_load_dir_and_finetune_ckpt(tmp_path):
    config = tiny_config(finetune_ckpt={"encoder": "gone/encoder"})
    own_run(tmp_path / "other", config, step=8)
    own = own_run(tmp_path / "own", config)
    plan = plan_weights(config, SparseStructureVaeTrainer, str(own.run_dir), str(tmp_path / "other"), "latest")
    assert plan.resume[0].folder == own.folder and plan.resume[1] == 4
    assert plan.files == {name: own.folder / model_file(name, 4) for name in config["models"]}  # raw, not averaged
    with pytest.raises(CheckpointError, match="--ckpt 8; complete steps: 4"):
        plan_weights(config, SparseStructureVaeTrainer, str(own.run_dir), str(tmp_path / "other"), "8")
    with pytest.raises(CheckpointError, match="which --ckpt none would start over"):
        plan_weights(config, SparseStructureVaeTrainer, str(own.run_dir), None, "none")


def test_load_dir_comes_before_finetune_ckpt_which_fills_what_is_missing(tmp_path):
    config = tiny_config()
    trellis_run(tmp_path / "theirs", config, ema=False)
    (tmp_path / "theirs" / "ckpts" / "decoder_step0000010.pt").unlink()
    torch.save(models(config, seed=1)["decoder"].state_dict(), tmp_path / "decoder.pt")
    config = tiny_config(finetune_ckpt={"encoder": "no/such/path", "decoder": str(tmp_path / "decoder.pt")})
    plan = plan_weights(config, SparseStructureVaeTrainer, str(tmp_path / "out"), str(tmp_path / "theirs"), "latest")
    assert plan.origin["encoder"].endswith("encoder_step0000010.pt (raw weights)")
    assert plan.files["decoder"] == tmp_path / "decoder.pt" and plan.origin["decoder"].endswith("(finetune_ckpt)")


@pytest.mark.parametrize(
    "change, load_dir, ckpt, message",
    [
        ({}, "gone", "latest", "--load_dir {tmp}/gone does not exist; give a run folder"),
        ({}, "gone", "3", "--load_dir {tmp}/gone does not exist; give a run folder"),
        ({}, None, "3", "--ckpt 3: .* has no complete checkpoint; give --load_dir too"),
        ({}, None, "best", "--ckpt best: .* give --load_dir too"),
        ({"freeze": ["encoder"]}, None, "latest", "encoder is frozen but has no weights: give --load_dir"),
        ({"freeze": ["encoder"]}, "theirs", "none", "encoder is frozen but has no weights"),
        ({"finetune_ckpt": {"encoder": "gone.pt"}}, None, "latest", "encoder is gone.pt, which is not there"),
        ({"finetune_ckpt": {"encoder": "gone/encoder"}}, None, "latest", "The weights of encoder are needed"),
    ],
)
def test_a_source_that_cannot_serve_is_a_clear_error(change, load_dir, ckpt, message, tmp_path):
    trellis_run(tmp_path / "theirs", tiny_config())
    load_dir = load_dir and str(tmp_path / load_dir)
    with pytest.raises(CheckpointError, match=message.format(tmp=tmp_path)):
        plan_weights(tiny_config(**change), SparseStructureVaeTrainer, str(tmp_path / "out"), load_dir, ckpt)


@pytest.mark.parametrize(
    "before, after",
    [
        ({"freeze": []}, {}),
        ({"freeze": ["encoder", "decoder"]}, {"freeze": ["decoder", "encoder"]}),
        ({"ema_rate": 0.9999}, {}),
        ({"ema_rate": [0.9999]}, {"ema_rate": 0.9999}),
        ({"lr_scaling": "none", "lr_scheduler": None}, {}),
    ],
)
def test_the_same_settings_written_otherwise_continue_a_run(before, after, tmp_path):
    own = own_run(tmp_path, tiny_config(VQ, **before))
    plan = plan_weights(tiny_config(VQ, **after), SparseStructureVqVaeTrainer, str(tmp_path), None, "latest")
    assert plan.resume == (plan.resume[0], 4) and plan.resume[0].folder == own.folder


def test_intervals_may_change_and_are_noted(tmp_path):
    own_run(tmp_path, tiny_config())
    plan = plan_weights(
        tiny_config(max_steps=60, i_save=7, grad_clip=None), SparseStructureVaeTrainer, str(tmp_path), None, "latest"
    )
    assert plan.notes == [
        f"trainer.args.{key} differs from the run so far; the new value is used from step 4 on"
        for key in ("grad_clip", "i_save", "max_steps")
    ]


@pytest.mark.parametrize(
    "change, named",
    [
        (
            {"lr_scheduler": {"name": "StepLR", "args": {"step_size": 9}}},
            ['trainer.args.lr_scheduler was null and is {"name": "StepLR", "args": {"step_size": 9}}'],
        ),
        (
            {"lr_scaling": "rms", "ema_rate": 0.9},
            ["trainer.args.ema_rate was [0.9999] and is [0.9]", 'trainer.args.lr_scaling was "none" and is "rms"'],
        ),
        (
            {"optimizer": {"name": "SGD", "args": {"lr": 1e-2}}},
            ['trainer.args.optimizer.name was "AdamW" and is "SGD"'],
        ),
        ({"freeze": ["encoder"]}, ['trainer.args.freeze was [] and is ["encoder"]']),
        ({"n_embed": 16}, ["models.quantizer.args.n_embed was 32 and is 16"]),
    ],
)
def test_what_the_saved_state_depends_on_may_not_change(change, named, tmp_path):
    own_run(tmp_path, tiny_config(VQ))
    with pytest.raises(ConfigError) as error:
        plan_weights(tiny_config(VQ, **change), SparseStructureVqVaeTrainer, str(tmp_path), None, "latest")
    assert f"another configuration: {'; '.join(named)}. Restore" in str(error.value)


def test_a_run_starts_over_only_where_it_has_no_checkpoint_and_uses_its_own_frozen_weights(
    data_dir, write_config, tmp_path, capsys
):
    """What an earlier attempt left incomplete counts neither for keep_last nor as frozen weights to link."""
    stage1 = tiny_config(VQ, freeze=["encoder", "decoder"], keep_last=1, max_steps=1, i_eval=100)
    stale = own_run(tmp_path / "run", stage1, step=6)
    (stale.folder / model_file("quantizer", 6)).unlink()
    (tmp_path / "run" / "log.txt").write_text('{"step": 0, "old": 1}\n{"step": 6, "old": 1}\n')
    trellis_run(tmp_path / "theirs", tiny_config(), ema=False)
    flags = ("--config", write_config(stage1), "--data_dir", data_dir, "--load_dir", tmp_path / "theirs")
    before = {path: path.read_bytes() for path in stale.folder.iterdir()}
    assert run(*flags, "--output_dir", tmp_path / "run") == 1
    assert (
        f"error: {stale.folder / model_file('quantizer', 6)} is missing; {stale.folder} has no other complete "
        f"checkpoint. Restore the file, or move {stale.folder} away to start over" in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in stale.folder.iterdir()} == before
    (stale.folder / misc_file(6)).unlink()  # a start that was cut off before its first checkpoint was whole
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.steps()[-1] == 1 and 6 not in checkpoints.steps()
    for name in ("encoder", "decoder"):
        source = torch.load(tmp_path / "theirs" / "ckpts" / model_file(name, 10), weights_only=True)
        result = torch.load(checkpoints.folder / model_file(name, 1), weights_only=True)
        assert all(torch.equal(result[key], value) for key, value in source.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert steps.count(0) == 1 and 6 not in steps
    assert "old" not in (tmp_path / "run" / "log.txt").read_text()


# --- saving in the background ---


@pytest.fixture
def slow(monkeypatch):
    """Let each set be written only after `go` is set."""
    go, original = threading.Event(), Checkpoints.save

    def waiting(*args):
        assert go.wait(20)
        original(*args)

    monkeypatch.setattr(Checkpoints, "save", waiting)
    yield go
    go.set()


def state_of(value: float, kind=torch.float32) -> dict:
    """A state with all that may be in one: layouts, types, nesting, the version that a state dict has beside it."""
    module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm1d(3)).to(kind)
    module[0].to(memory_format=torch.channels_last_3d)
    torch.nn.init.constant_(module[0].weight, value)
    return module.state_dict()


def test_what_changes_right_after_a_save_is_not_in_it(slow, tmp_path):
    written: list[int] = []
    saver = Saver(Checkpoints(tmp_path), written.append)
    trained, frozen = {"m": state_of(1), "h": state_of(1, torch.bfloat16)}, {"f": state_of(7)}
    averages = {0.9: {"m": {"w": torch.full((3,), 1.5), "n": torch.tensor(4)}}}
    misc = {
        "best": {"step": 0, "score": 0.5},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [[1]]},
    }
    want = copy.deepcopy((trained, averages, misc))
    saver.save(0, trained, averages, frozen, misc)
    for tree in (*trained.values(), averages[0.9]["m"], misc["optimizer"]["state"][0]):
        for value in tree.values():
            value.zero_()
    misc["optimizer"]["groups"][0].append(2)
    misc["best"]["score"] = 9.0
    misc["late"] = True
    slow.set()
    saver.wait()
    assert written == [0]
    folder = tmp_path / "ckpts"
    for name in ("m", "h"):
        found = torch.load(folder / model_file(name, 0), weights_only=True)
        assert_equal(dict(found), dict(want[0][name]))
        assert found["0.weight"].stride() == want[0][name]["0.weight"].stride() != (16, 8, 4, 2, 1)
        assert found._metadata == want[0][name]._metadata
    assert_equal(torch.load(folder / model_file("m", 0, 0.9), weights_only=True), want[1][0.9]["m"])
    found = Checkpoints(tmp_path).read_misc(0)
    for key in ("format", "step", "files", "sums"):
        del found[key]
    assert_equal(found, want[2])
    assert json.loads((tmp_path / "best.json").read_text()) == want[2]["best"]
    assert sorted(path.stat().st_size for path in folder.glob("m_ema*"))[0] < 4000  # a tensor's own storage, no more


def test_two_sets_are_never_in_flight_and_the_copy_is_used_again(slow, tmp_path):
    saver = Saver(Checkpoints(tmp_path))
    save_weights = lambda step: saver.save(step, {"m": weights(step)}, {}, {}, {"best": None})  # noqa: E731
    save_weights(0)
    copies = dict(saver._copies)
    second = threading.Thread(target=save_weights, args=(2,))
    second.start()
    time.sleep(0.1)
    assert second.is_alive() and threading.active_count() <= 4 and not (tmp_path / "ckpts").exists()
    slow.set()
    second.join()
    saver.wait()
    assert Checkpoints(tmp_path).steps() == [0, 2]
    assert [saver._copies[key] is value for key, value in copies.items()] == [True]
    for step in (0, 2):
        assert torch.load(tmp_path / "ckpts" / model_file("m", step), weights_only=True)["w"][0] == step


@pytest.mark.parametrize("where", ["check", "wait", "save", "context"])
def test_an_error_of_the_writer_is_raised_in_training_once(where, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints)
    monkeypatch.setattr(checkpoints, "save", fail)
    arguments = (2, {"m": weights(0)}, {}, {}, {"best": None})
    with pytest.raises(OSError, match="somewhere"):
        with saver:
            saver.save(*arguments)
            saver._thread.join()
            if where == "save":
                saver.save(*arguments)
            elif where != "context":
                getattr(saver, where)()
    saver.check()
    saver.wait()


def test_an_error_of_training_waits_for_the_checkpoint_and_is_the_one_that_is_raised(slow, tmp_path):
    saver = Saver(Checkpoints(tmp_path))
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(ValueError, match="of training"), saver:
        saver.save(2, {"m": weights(0)}, {}, {}, {"best": None})
        raise ValueError("of training")
    assert Checkpoints(tmp_path).latest() == 2


def test_an_interruption_does_not_wait(slow, tmp_path):
    with pytest.raises(KeyboardInterrupt), Saver(Checkpoints(tmp_path)) as saver:
        saver.save(2, {"m": weights(0)}, {}, {}, {"best": None})
        raise KeyboardInterrupt
    assert Checkpoints(tmp_path).latest() is None


def test_the_old_checkpoint_is_kept_until_the_new_one_is_whole(checkpoints, monkeypatch):
    monkeypatch.setattr(sums, "file_sum", lambda path: 0)
    with pytest.raises(CheckpointError, match="reads back other"), Saver(checkpoints) as saver:
        saver.save(8, {"m": weights(0)}, {}, {}, {"best": None}, keep_last=1)
    monkeypatch.undo()
    assert checkpoints.steps() == [0, 2, 4, 6]
    with Saver(checkpoints) as saver:
        saver.save(8, {"m": weights(0)}, {}, {}, {"best": None}, keep_last=1)
    assert checkpoints.steps() == [8]


def test_a_run_goes_on_while_its_checkpoint_is_written(slow, data_dir, write_config, tmp_path, monkeypatch):
    """Steps 1 and 2 are taken before step 0 is on disk, and each file holds the state of its step."""
    for folder in ("plain", "slow"):
        steps, run_step = [], BasicTrainer.run_step

        def counting(self, batch, steps=steps, run_step=run_step, folder=folder):
            steps.append(self.step)
            if len(steps) == 2:
                assert folder == "plain" or not (tmp_path / folder / "ckpts" / misc_file(0)).exists()
                slow.set()
            return run_step(self, batch)

        monkeypatch.setattr(BasicTrainer, "run_step", counting)
        slow.set() if folder == "plain" else slow.clear()
        config = write_config(tiny_config(max_steps=4, i_eval=100))
        assert run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / folder) == 0
        assert len(steps) == 4
        monkeypatch.setattr(BasicTrainer, "run_step", run_step)
    for step in (0, 2, 4):
        assert_equal(checkpoint(tmp_path / "slow", step), checkpoint(tmp_path / "plain", step))
    assert [path.name for path in (tmp_path / "slow").glob(".*")] == []


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"", None, b"{}"])
def test_a_damaged_config_of_a_run_folder_is_kept_aside_and_stops_nothing(
    content, data_dir, write_config, tmp_path, capsys
):
    flags = ("--config", write_config(tiny_config(max_steps=1)), "--data_dir", data_dir, "--output_dir", tmp_path)
    assert run(*flags) == 0
    path = tmp_path / "config.json"
    whole = path.read_bytes()
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert run(*flags) == 0
    (kept,) = tmp_path.glob("config_until_step0000001_*.json")
    assert path.read_bytes() == whole and (content is None or kept.read_bytes() == content)
    assert (f"{path} is damaged; what it holds is kept as {kept}" in capsys.readouterr().out) == (content != b"{}")
