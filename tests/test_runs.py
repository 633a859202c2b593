"""A run folder opened at a checkpoint: which weights count, and what is said of configuration, data and scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from trellis.runs.checkpoint import Checkpoints, misc_file, model_file
from trellis.runs.open import open_run
from trellis.utils.errors import CheckpointError, ConfigError, DataError

CONFIG = {
    "models": {"encoder": {"name": "E"}, "quantizer": {"name": "Q"}, "decoder": {"name": "D"}},
    "dataset": {"name": "SparseStructure", "args": {"resolution": 32}},
}
TRAINED, FROZEN = ("quantizer", "decoder"), ("encoder",)


def state(value: float) -> dict:
    return {"w": torch.full((3,), value)}


def save(folder: Path, step: int, rates=(0.9, 0.9999), best: int | None = None, **misc) -> Checkpoints:
    """A set of ours: trained weights hold the step, averages the step plus their rate, frozen ones -1."""
    checkpoints = Checkpoints(folder)
    trained = {name: state(step) for name in TRAINED}
    averages = {rate: {name: state(step + rate) for name in TRAINED} for rate in rates}
    score = None if best is None else {"step": best, "by": "iou", "score": 0.5}
    frozen = {name: state(-1) for name in FROZEN}
    checkpoints.save(step, trained, averages, frozen, {"best": score, "config": CONFIG, **misc})
    return checkpoints


def save_as_trellis(folder: Path, step: int, rates=()) -> None:
    """TRELLIS's files: numpy objects in the misc file, raw weights, and averages at these rates."""
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    for name in CONFIG["models"]:
        torch.save(state(step), folder / "ckpts" / model_file(name, step))
        for rate in rates:
            torch.save(state(step + rate), folder / "ckpts" / model_file(name, step, rate))
    torch.save({"step": step, "log_scale": np.float64(20)}, folder / "ckpts" / misc_file(step))


def held(weights: dict[str, Path]) -> dict[str, float]:
    return {name: torch.load(path, weights_only=True)["w"][0].item() for name, path in weights.items()}


# --- which weights count ---


@pytest.mark.parametrize(
    "rates, averaged", [((), 4), ((0.5,), 4.5), ((0.5, 0.9999), 4.9999), ((0.9999, 0.5), 4.9999), ((0.5, 1e-05), 4.5)]
)
def test_weights_are_averaged_at_the_highest_rate_else_raw(rates, averaged, tmp_path):
    save(tmp_path, 4, rates)
    run = open_run(tmp_path)
    assert held(run.weights()) == pytest.approx({"encoder": -1, "quantizer": averaged, "decoder": averaged}, abs=1e-6)
    assert held(run.weights(averaged=False)) == {"encoder": -1, "quantizer": 4, "decoder": 4}
    for name in CONFIG["models"]:
        assert run.weight_file(name) == run.weights()[name]
        assert run.weight_file(name, averaged=False) == run.weights(averaged=False)[name]


@pytest.mark.parametrize("rates", [(), (0.9,), (0.9, 0.9999)])
def test_a_folder_of_trellis_has_weights_by_the_same_rule(rates, tmp_path):
    save_as_trellis(tmp_path, 10, rates)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = open_run(tmp_path)
    expected = 10 + max(rates, default=0)
    assert held(run.weights()) == pytest.approx(dict.fromkeys(CONFIG["models"], expected), abs=1e-6)
    assert held(run.weights(averaged=False)) == dict.fromkeys(CONFIG["models"], 10)


def test_weights_of_a_model_need_no_configuration(tmp_path):
    save_as_trellis(tmp_path, 10, rates=(0.9,))
    run = open_run(tmp_path)
    assert run.weight_file("decoder") == tmp_path / "ckpts" / "decoder_ema0.9_step0000010.pt"
    assert run.weight_file("decoder", averaged=False) == tmp_path / "ckpts" / "decoder_step0000010.pt"
    assert run.weight_file("discriminator") == tmp_path / "ckpts" / "discriminator_step0000010.pt"  # which is not there
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "config.json"))):
        run.weights()


def test_all_sets_of_weights_highest_rate_first_then_raw(tmp_path):
    save(tmp_path, 4, rates=(0.9, 0.9999))
    sets = open_run(tmp_path).weight_sets()
    assert list(sets) == ["ema0.9999", "ema0.9", "raw"]
    for label, trained in (("ema0.9999", 4.9999), ("ema0.9", 4.9), ("raw", 4)):
        assert held(sets[label]) == pytest.approx({"encoder": -1, "quantizer": trained, "decoder": trained}, abs=1e-6)
    assert sets["ema0.9999"] == open_run(tmp_path).weights() and sets["raw"] == open_run(tmp_path).weights(False)
    save(tmp_path, 8, rates=())
    assert list(open_run(tmp_path).weight_sets()) == ["raw"]


# --- which checkpoint ---


def test_the_step_is_the_one_asked_for(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, best=2)
    assert [open_run(tmp_path, ckpt).step for ckpt in ("latest", "best", "4")] == [6, 2, 4]
    assert open_run(str(tmp_path)).folder == tmp_path
    assert held(open_run(tmp_path, "2").weights(averaged=False))["decoder"] == 2


@pytest.mark.parametrize(
    "folder, ckpt, message",
    [
        ("gone", "latest", "--run {tmp}/gone does not exist; give a run folder"),
        ("file", "latest", "--run {tmp}/file is a file; give a run folder"),
        ("run/ckpts", "latest", "--run {tmp}/run/ckpts has the checkpoints of a run; give {tmp}/run"),
        ("", "latest", "--run {tmp} has no complete checkpoint in {tmp}/ckpts; give a run folder"),
        ("run", "3", "{tmp}/run/ckpts has no complete checkpoint for --ckpt 3; complete steps: 4"),
        ("run", "best", "{tmp}/run/ckpts has no complete checkpoint for --ckpt best; complete steps: 4"),
    ],
)
def test_a_folder_without_the_checkpoint_is_one_clear_error(folder, ckpt, message, tmp_path):
    save(tmp_path / "run", 4)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        open_run(tmp_path / folder, ckpt, "--run")
    assert str(error.value) == message.format(tmp=tmp_path)


def test_without_a_flag_the_message_begins_with_the_folder(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/gone does not exist"):
        open_run(tmp_path / "gone")


# --- what else is known ---


def test_a_run_of_ours_says_what_it_was_trained_on(tmp_path):
    save(tmp_path, 4, data_dir="data/a,data/b", dataset_size=12, seconds=3.5)
    (tmp_path / "config.json").write_text('{"models": {"later": {}}}')  # of a later start; the checkpoint's own counts
    run = open_run(tmp_path)
    assert run.config == CONFIG and run.resolution == 32
    assert (run.data_dir, run.dataset_size, run.training_seconds) == ("data/a,data/b", 12, 3.5)
    assert run.about() == {"training": {"step": 4, "objects": 12, "data": "a, b"}}


def test_a_folder_of_trellis_says_what_its_config_says(tmp_path):
    save_as_trellis(tmp_path, 10)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "dataset": {"name": "SparseStructure"}}))
    run = open_run(tmp_path)
    assert run.misc is None and run.config["models"] == CONFIG["models"] and run.resolution == 64
    assert (run.data_dir, run.dataset_size, run.training_seconds) == (None, None, None)
    assert run.data_setting("normalization") is None and run.scores() == {}


@pytest.fixture
def run_on(tmp_path):
    """Return a run on packed files with these values of a setting, None for a file without it."""

    def make(name: str, *values: str | None):
        roots = []
        for number, value in enumerate(values):
            roots.append(tmp_path / f"{number}.npz")
            texts = {} if value is None else {name: np.array([value])}
            np.savez(roots[-1], bits=np.zeros((1, 8), np.uint8), **texts)
        save(tmp_path / "run", 4, data_dir=",".join(map(str, roots)))
        return open_run(tmp_path / "run")

    return make


def test_a_setting_of_the_data_is_what_all_roots_say(run_on, tmp_path, recwarn):
    assert run_on("normalization", "sphere").data_setting("normalization") == "sphere"
    run = run_on("normalization", "sphere", "sphere")
    assert run.data_setting("normalization") == "sphere" and run.data_setting("up_axis") is None
    assert run_on("up_axis", "y", "y").data_setting("up_axis") == "y"
    assert run_on("up_axis", "y", "z", "auto").data_setting("up_axis") == "auto"  # grids are z-up
    assert run_on("up_axis", None, None).data_setting("up_axis") is None
    save(tmp_path / "run", 4, data_dir=str(tmp_path / "gone"))
    assert open_run(tmp_path / "run").data_setting("up_axis") is None
    assert not recwarn


@pytest.mark.parametrize(
    "name, values, setting",
    [
        ("up_axis", ("y", "keep"), "auto"),
        ("up_axis", ("keep", "auto"), "auto"),
        ("up_axis", ("z", None), "auto"),
        ("normalization", ("shapellm", None), "shapellm"),
        ("normalization", (None, "cube"), "cube"),
    ],
)
def test_roots_that_do_not_agree_give_a_setting_and_a_warning(run_on, name, values, setting, tmp_path):
    run = run_on(name, *values)
    with pytest.warns(UserWarning, match=f"do not agree on their {name}") as warned:
        assert run.data_setting(name) == setting
    for number, value in enumerate(values):
        assert f"{tmp_path / f'{number}.npz'} ({value or 'does not say'})" in str(warned[0].message)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_folder_that_does_not_say_its_normalization_is_of_before_there_was_a_choice(run_on, tmp_path):
    run_on("normalization", "cube")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metadata.csv").write_text(f"sha256\n{'a' * 64}\n")
    save(tmp_path / "run", 4, data_dir=f"{tmp_path / '0.npz'},{tmp_path / 'old'}")
    assert open_run(tmp_path / "run").data_setting("normalization") == "cube"
    # A folder that has no grid any more says nothing.
    (tmp_path / "old" / "metadata.csv").write_text(f"sha256,voxelized,up_axis\n{'a' * 64},False,\n")
    run_on("up_axis", "y")
    save(tmp_path / "run", 4, data_dir=f"{tmp_path / '0.npz'},{tmp_path / 'old'}")
    assert open_run(tmp_path / "run").data_setting("up_axis") == "y"


def test_several_normalizations_are_refused(run_on, tmp_path):
    run = run_on("normalization", "cube", "shapellm")
    both = re.escape(f"{tmp_path / '0.npz'} (cube), {tmp_path / '1.npz'} (shapellm)")
    with pytest.raises(DataError, match=f"several normalizations: {both}.*normalization=..."):
        run.data_setting("normalization")


def test_scores_come_from_the_report_else_from_the_log_at_this_step(tmp_path):
    save(tmp_path, 4)
    run = open_run(tmp_path)
    lines = [
        {"step": 2, "val/iou": 0.2},
        {"step": 4, "val/iou": 0.4, "val/other": 1.0, "bce": 0.1},
        {"step": 4, "val/codebook_usage": 0.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.txt").write_bytes(b"\xff\n[4]\n" + text.encode() + b'{"step": 4, "val/iou": 0.')  # being written
    assert run.scores() == {"iou": 0.4, "codebook_usage": 0.5}
    (tmp_path / "eval").mkdir()
    report = {"weights": {"ema0.9": {"iou": 0.6, "objects": 3, "f_score": None, "tokens": 64}, "raw": {"iou": 0.1}}}
    (tmp_path / "eval" / "val_step0000004.json").write_text(json.dumps(report))
    assert run.scores() == {"objects": 3, "iou": 0.6}
    assert run.about() == {"training": {"step": 4}, "scores": {"objects": 3, "iou": 0.6}}
