"""Reference curves: what a run says beside one, how one is made, and those that are shipped."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT, VQ, logged, run, tiny_config

from trellis.models import build
from trellis.runs.status import read_status
from trellis.trainers.configuration import complete_config
from trellis.trainers.standing import COLUMNS, Point, Reference, RunSize, parameter_count
from trellis.utils.config import load_config
from trellis.utils.errors import ConfigError

spec = importlib.util.spec_from_file_location("reference_curve", ROOT / "scripts" / "reference_curve.py")
reference_curve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference_curve)

CURVES = sorted((ROOT / "configs" / "vae" / "curves").glob("*.csv"))


@pytest.fixture(scope="module")
def with_curve(data_dir, tmp_path_factory) -> Path:
    """A configuration whose curve was made from a run of it, in the folder `run` beside it."""
    folder = tmp_path_factory.mktemp("curve")
    (folder / "tiny.json").write_text(json.dumps(tiny_config(VQ)))
    flags = ("--config", folder / "tiny.json", "--data_dir", data_dir, "--output_dir", folder / "run")
    assert run(*flags) == 0
    assert reference_curve.main(["--run", str(folder / "run"), "--config", str(folder / "tiny.json")]) == 0
    return folder / "tiny.json"


def test_a_curve_holds_what_the_run_logged(with_curve, data_dir):
    reference, log = Reference.of_config(with_curve), logged(with_curve.parent / "run")
    size = reference.size
    assert (size.max_steps, size.samples_per_step, size.train, size.val) == (6, 4, 24, 6)
    assert reference.card == read_status(with_curve.parent / "run")["card"]
    ious = {entry["step"]: round(entry["val/iou"], 4) for entry in log if "val/iou" in entry}
    assert {point.step: point.iou for point in reference.points if point.iou is not None} == ious
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert [point.step for point in reference.points] == [0, 1, 2, 3, 4, 5, 6]  # fewer steps than POINTS
    assert all(point.loss == pytest.approx(losses[point.step], rel=1e-4) for point in reference.points[1:])


def test_the_same_run_again_stands_where_the_curve_is(with_curve, data_dir, tmp_path, capsys):
    flags = ("--config", with_curve, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "the reference has" in line]
    reference = Reference.of_config(with_curve)
    assert [int(re.match(r"step (\d+) ", note)[1]) for note in notes] == [0, 3, 6]
    for note in notes:
        iou, other = re.match(r"step \d+  IoU (\S+?)[,;] .*has IoU (\S+) at step", note).groups()
        assert float(iou) == pytest.approx(float(other), abs=1e-4) and note.endswith(f"({reference.card})")
    logged_ious = {
        entry["step"]: entry["reference/iou"] for entry in logged(tmp_path / "run") if "reference/iou" in entry
    }
    assert logged_ious == {point.step: point.iou for point in reference.points if point.iou is not None}
    assert read_status(tmp_path / "run")["reference"] == {"step": 6, "iou": logged_ious[6], "note": notes[-1]}


def test_what_differs_is_said(with_curve, data_dir, tmp_path, capsys):
    shutil.copytree(with_curve.parent / "curves", tmp_path / "curves")
    curve = tmp_path / "curves" / "tiny.csv"
    curve.write_text(curve.read_text().replace(",24,6\n", ",4695,650\n"))
    shutil.copy(with_curve, tmp_path)
    flags = ("--config", tmp_path / "tiny.json", "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--set", "trainer.args.max_steps=3", "--set", "trainer.args.batch_size=8") == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 3  IoU"))
    assert "at step 6 (" in note  # as many samples
    assert "other data: 4695 objects, 650 for validation" in note
    assert "another schedule: 6 steps in all, 3 here" in note and "4 samples a step, 8 here" in note


def test_other_models_are_not_compared(with_curve, data_dir, tmp_path, capsys):
    flags = ("--config", with_curve, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--set", "models.quantizer.args.n_embed=16", "--set", "trainer.args.max_steps=1") == 0
    assert "the reference has" not in capsys.readouterr().out
    assert not any("reference/iou" in entry for entry in logged(tmp_path / "run"))


def reference(points: list[Point]) -> Reference:
    return Reference(points, "card", RunSize(1000, 16, 0, 1, 1))


@pytest.mark.parametrize("step, found", [(0, 0.1), (1, None), (960, 0.9), (940, None), (1040, 0.9), (2000, None)])
def test_only_near_points_are_compared(step, found):
    curve = reference([Point(0, None, 0.1), Point(500, 0.2, None), Point(1000, 0.3, 0.9)])
    nearest = curve.near(16 * step, "iou")
    assert (nearest and nearest[1]) == found


@pytest.mark.parametrize(
    "text", ["", "step,loss\n1,2\n", ",".join(COLUMNS) + "\n", ",".join(COLUMNS) + "\n1,x,,,,,,,\n"]
)
def test_a_damaged_curve_is_named_before_data_are_read(text, write_config, tmp_path, capsys):
    config = Path(write_config(tiny_config()))
    (config.parent / "curves").mkdir()
    curve = config.parent / "curves" / f"{config.stem}.csv"
    curve.write_text(text)
    with pytest.raises(ConfigError, match="is no reference curve"):
        Reference.of_config(config)
    assert run("--config", config, "--data_dir", tmp_path / "gone", "--output_dir", tmp_path / "run") == 1
    assert str(curve) in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_unfinished_run_and_one_without_status_make_no_curve(with_curve, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(with_curve.parent / "run" / "config.json", run_dir)
    (run_dir / "log.txt").write_text('{"step": 1, "loss": 0.5}\n')
    flags = ["--run", str(run_dir), "--config", str(tmp_path / "tiny.json")]
    assert reference_curve.main(flags) == 1
    assert "give --card" in capsys.readouterr().err
    assert reference_curve.main([*flags, "--card", "A", "--train", "1", "--val", "1"]) == 1
    assert "ends at step 1 of 6; take a finished run" in capsys.readouterr().err
    (run_dir / "log.txt").write_text('{"step": 1, "loss": 0.5}\n{"loss": 1}\n')
    assert reference_curve.main([*flags, "--card", "A", "--train", "1", "--val", "1"]) == 1
    assert "line 2 has no step" in capsys.readouterr().err
    assert not (tmp_path / "curves").exists()


@pytest.mark.parametrize("curve", CURVES, ids=lambda path: path.stem)
def test_a_shipped_curve_fits_its_configuration(curve):
    config = ROOT / "configs" / "vae" / f"{curve.stem}.json"
    completed = complete_config(load_config(str(config)))
    with torch.device("meta"):
        models = {name: build(spec, f"models.{name}") for name, spec in completed["models"].items()}
    reference, args = Reference.of_config(config), completed["trainer"]["args"]
    assert parameter_count(models) == reference.size.parameters
    assert reference.size.samples_per_step == (args["batch_size"] or args["batch_size_per_gpu"])
    steps = [point.step for point in reference.points]
    assert steps == sorted(set(steps)) and steps[-1] == reference.size.max_steps <= args["max_steps"]
    assert reference.points[-1].iou is not None and reference.card
    assert all(point.iou is None or 0 <= point.iou <= 1 for point in reference.points)


def test_curves_are_shipped():
    assert {"base_vae", "base_stage1", "base_stage2", "recipe_vae"} <= {path.stem for path in CURVES}
