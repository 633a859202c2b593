"""The recipe and the ablations run from start to end, go on where they stopped, and report what was measured."""

import json
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from benchmarks import ablation, quality, rate_distortion
from benchmarks.report import Table
from trellis.trainers import TRAINERS
from trellis.utils.config import load_config

TINY = {
    "models.encoder.args.channels": [4, 8, 8],
    "models.decoder.args.channels": [8, 8, 4],
    "models.encoder.args.num_res_blocks": 1,
    "models.decoder.args.num_res_blocks": 1,
    "models.quantizer.args.n_embed": 64,
    "dataset.args.resolution": 16,
    "trainer.args.max_steps": 2,
    "trainer.args.batch_size": 4,
    "trainer.args.i_log": 1,
}


@pytest.mark.parametrize("name", quality.PHASES)
def test_every_phase_has_a_valid_configuration(name):
    config = load_config(ROOT / "configs" / "vae" / f"recipe_{name}.json")
    TRAINERS.get(config["trainer"]["name"], "trainer.name").check_config(config, 1)
    args = config["trainer"]["args"]
    frozen = {"vae": set(), "stage1": {"encoder", "decoder"}, "stage2": set()}
    assert set(args.get("freeze", ())) == frozen[name.split("_")[-1]]
    schedule = args.get("lr_scheduler")
    if schedule is not None:  # the cosine ends with the training
        assert schedule["args"]["T_max"] + schedule["warmup_steps"] == args["max_steps"]
    if "quantizer" in config["models"]:
        tokens = 4096 * 8 // config["models"]["quantizer"]["args"]["embed_dim"]
        assert name.startswith(str(tokens)) and config["models"]["quantizer"]["args"]["n_embed"] == 8192


def test_a_variant_changes_what_its_name_says_and_starts_from_a_variant():
    for tokens in (1024, 4096):
        found = ablation.variants(tokens)
        assert all(variant.start is None or variant.start in found for variant in found.values())
        assert len({str(ablation.folder_of(ROOT, name)) for name in found}) == len(found)
    for name, variant in found.items():
        config = load_config(ROOT / "configs" / "vae" / f"{variant.config}.json")
        for key in variant.settings:
            section = config
            for part in key.split(".")[:-1]:
                assert part in section, f"{name}: {key}"
                section = section[part]


def scores_of(folder: Path, phase: str) -> dict:
    report = json.loads(next((folder / "eval" / phase).glob("val_*.json")).read_text())
    (scores,) = report["weights"].values()
    return scores


def test_the_recipe_runs_reports_and_is_not_run_again(data_dir, tmp_path, capfd):
    flags = ["--data_dir", data_dir, "--output_dir", str(tmp_path), "--device", "cpu", "--phases", "1024_stage2"]
    for key, value in TINY.items():
        flags += ["--set", f"{key}={json.dumps(value)}"]
    quality.main(flags)
    text = (tmp_path / "results.md").read_text()
    phases = ["vae", "1024_stage1", "1024_stage2"]
    assert [name for name in quality.PHASES if f"| {name} |" in text.split("## Scores")[0]] == phases
    for name in ("vae", "1024_stage2"):
        scores = scores_of(tmp_path, name)
        assert f"| {name} | {scores['iou']:.4f} | {scores['iou_median']:.4f} | {scores['iou_p5']:.4f} |" in text
    last = json.loads((tmp_path / "1024_stage2" / "phase.json").read_text())
    assert last["steps"] == 2 and f"{last['before']['iou']:.4f} | {last['after']['iou']:.4f}" in text

    rate_distortion.main(["--quality", str(tmp_path), "--output", str(tmp_path / "picture" / "rate.png")])
    printed = capfd.readouterr().out
    for name, rate, iou in (
        ("vae, sampled", "kl_bits_per_object", "sampled_iou"),
        ("1024_stage2", "entropy_bits_per_object", "iou"),
    ):
        found = scores_of(tmp_path, name.split(",")[0])
        row = [name, found[rate] / 1e3, found[iou]]
        assert Table(rate_distortion.COLUMNS, [row]).markdown().splitlines()[-1] in printed
        points = json.loads((tmp_path / "picture" / "rate.json").read_text())["tables"][0]["rows"]
        assert row in points
    with Image.open(tmp_path / "picture" / "rate.png") as picture:
        assert picture.size == (900, 600)

    quality.main(flags)
    assert "$ python" not in capfd.readouterr().out
    assert (tmp_path / "results.md").read_text() == text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution", "32"], "has no *val.npz, which pooling needs"),
        (["--steps", "25"], "--steps is 25; it must be more than the 25 of the warm-up"),
        (["--only", "EMA", "nothing"], None),
        (["--only", "nothing"], "--only fits none of: from random weights"),
    ],
)
def test_ablations_find_mistakes_before_they_train(flags, message, tmp_path, capsys, monkeypatch):
    started = []

    def run_train(line: list[str]) -> None:
        started.append(line)
        raise RuntimeError("not in this test")

    monkeypatch.setattr(ablation.runs, "run_train", run_train)
    monkeypatch.chdir(tmp_path)
    command = ["--data_dir", "data", "--output_dir", "out", "--device", "cpu", *flags]
    with pytest.raises(SystemExit):
        ablation.main(command)
    if message:
        assert message in capsys.readouterr().err and not started
    else:  # by the name that the tables have, with the VAE it needs, and with paths that hold in any folder
        assert [line[line.index("--output_dir") + 1] for line in started] == [
            str(ablation.folder_of(tmp_path / "out", name)) for name in (ablation.BASE_VAE, "1024: EMAVectorQuantizer")
        ]
        assert all(line[line.index("--data_dir") + 1] == str(tmp_path / "data") for line in started)
