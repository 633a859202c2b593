"""The recipe and the ablations run from start to end, go on where they stopped, and report what was measured."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from benchmarks import ablation, quality, rate_distortion
from benchmarks.report import Table
from trellis.trainers import TRAINERS
from trellis.utils.config import apply_override, load_config
from trellis.utils.errors import ConfigError, DataError

TINY = {
    "models.encoder.args.channels": [4, 8, 8],
    "models.decoder.args.channels": [8, 8, 4],
    "models.encoder.args.num_res_blocks": 1,
    "models.decoder.args.num_res_blocks": 1,
    "models.quantizer.args.n_embed": 64,
    "dataset.args.resolution": 16,
    "trainer.args.max_steps": 2,
    "trainer.args.batch_size_per_gpu": 4,
    "trainer.args.i_log": 1,
}


@pytest.mark.parametrize("name", quality.PHASES)
def test_every_phase_has_a_valid_configuration(name):
    phase = quality.PHASES[name]
    config = load_config(str(ROOT / "configs" / "vae" / f"{phase.config}.json"))
    TRAINERS.get(config["trainer"]["name"], "trainer.name").check_config(config, 1)
    args = config["trainer"]["args"]
    frozen = {"vae": set(), "stage1": {"encoder", "decoder"}, "stage2": set()}
    assert set(args.get("freeze", ())) == frozen[name.split("_")[-1]]
    if phase.start is not None:  # it has all networks of the phase before
        models = load_config(str(ROOT / "configs" / "vae" / f"{quality.PHASES[phase.start].config}.json"))["models"]
        assert all(config["models"][key]["args"] == spec["args"] for key, spec in models.items())


def test_every_form_goes_from_a_vae_to_a_scored_stage_2():
    for form in quality.FORMS:
        phases = quality.with_ancestors([f"{form}_stage2"])
        assert [name.split("_")[-1] for name in phases] == ["vae", "stage1", "stage2"]
        assert [quality.PHASES[name].scored for name in phases] == [True, False, True]
    assert {
        path.stem for path in (ROOT / "configs" / "vae").glob("*.json") if path.stem.startswith(("recipe", "base"))
    } == {phase.config for phase in quality.PHASES.values()}


@pytest.mark.parametrize("codes", ablation.LEVELS)
@pytest.mark.parametrize("tokens", ablation.GROUPS)
def test_a_variant_sets_existing_sections_and_starts_from_a_variant(tokens, codes):
    found = ablation.variants(tokens, codes)
    assert all(variant.start is None or variant.start in found for variant in found)
    assert len({variant.folder(ROOT) for variant in found}) == len(found)
    for variant in found:
        config = load_config(ROOT / "configs" / "vae" / f"{variant.config}.json")
        for key in variant.settings:
            section = config
            for part in key.split(".")[:-1]:
                assert part in section, f"{variant.name}: {key}"
                section = section[part]
        for key, value in variant.settings.items():
            apply_override(config, f"{key}={json.dumps(value)}")
        TRAINERS.get(config["trainer"]["name"], "trainer.name").check_config(config, 1)
    # No two rows train the same.
    assert len({str((v.config, v.settings, v.start and v.start.settings)) for v in found}) == len(found)


def train_commands(monkeypatch, folder: Path, *flags: str) -> list[dict]:
    """Return train.py's flags for every variant that ablation.py runs, without the free port it picks."""
    commands = []

    def run_train(line: list[str]) -> None:
        flags = dict(zip(line[::2], line[1::2], strict=True))
        settings = [value for name, value in zip(line[::2], line[1::2], strict=True) if name == "--set"]
        commands.append({**flags, "--set": settings, "--master_port": None})
        raise RuntimeError("not in this test")

    monkeypatch.setattr(ablation.runs, "run_train", run_train)
    with pytest.raises(SystemExit):
        ablation.main(["--data_dir", "data", "--output_dir", str(folder), "--device", "cpu", *flags])
    return commands


def test_renaming_a_variant_changes_nothing_but_its_folder(tmp_path, monkeypatch, capsys):
    before = train_commands(monkeypatch, tmp_path)
    chosen = ablation.variants(1024)
    renamed: dict[int, ablation.Variant] = {}
    for number, variant in enumerate(chosen):
        start = variant.start and renamed[id(variant.start)]
        renamed[id(variant)] = dataclasses.replace(variant, name=f"row {number}", start=start)
    monkeypatch.setattr(ablation, "variants", lambda *args: list(renamed.values()))
    after = train_commands(monkeypatch, tmp_path)
    names = {variant.folder(tmp_path): renamed[id(variant)].folder(tmp_path) for variant in chosen}
    for command in before:
        for flag in ("--output_dir", "--load_dir"):
            if flag in command:
                command[flag] = str(names[Path(command[flag])])
    assert len(before) == len(chosen) and after == before


def test_what_a_variant_adds_to_the_shared_settings(tmp_path, monkeypatch, capsys):
    """Warm-up, levels and codes are data of the row."""
    flags = ("--codes", "1024", "--steps", "300")
    commands = {
        Path(command["--output_dir"]).name: command for command in train_commands(monkeypatch, tmp_path, *flags)
    }
    plain, half = (set(commands[f"1024__lr_5e-3{name}"]["--set"]) for name in ("", "__warm-up_over_half"))
    cosine = 'trainer.args.lr_scheduler={{"name": "CosineAnnealingLR", "args": {{"T_max": {}}}, "warmup_steps": {}}}'
    assert plain - half == {cosine.format(275, 25)} and half - plain == {cosine.format(150, 150)}
    assert "models.quantizer.args.levels=[8, 8, 4, 4]" in commands["1024__FiniteScalarQuantizer"]["--set"]
    for command in commands.values():
        has_codebook = any(setting.startswith("models.quantizer.args.n_embed=") for setting in command["--set"])
        assert has_codebook == ("--load_dir" in command) == ("_stage2" in command["--config"])


def test_finished_codebooks_of_the_ablations_become_points(tmp_path):
    vae, codebook = ablation.BASE_VAE, next(v for v in ablation.variants(4096) if v.start is not None)
    for variant in (vae, codebook):
        variant.folder(tmp_path).mkdir()
        last = {"val/iou": 0.75, "val/entropy_bits_per_object": 1500.0}
        (variant.folder(tmp_path) / "result.json").write_text(json.dumps({"first": {}, "last": last}))
    assert rate_distortion.of_ablation(tmp_path) == [rate_distortion.Point(codebook.name, 1.5, 0.75)]


def test_a_finished_variant_is_not_taken_for_one_of_other_settings(data_dir, tmp_path, monkeypatch, capsys):
    def run_train(line: list[str]) -> None:
        folder = Path(line[line.index("--output_dir") + 1])
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(json.dumps({"val/iou": 0.5, "seconds": 1.0}) + "\n")

    monkeypatch.setattr(ablation.runs, "run_train", run_train)
    flags = ["--data_dir", data_dir, "--output_dir", str(tmp_path), "--device", "cpu", "--only", "lambda_kl 4e-3"]
    ablation.main(flags)
    monkeypatch.setattr(ablation.runs, "run_train", lambda line: pytest.fail("it trains again"))
    ablation.main(flags)
    with pytest.raises(ConfigError, match="lambda_kl_4e-3 is finished, but with another value of .*max_steps"):
        ablation.main([*flags, "--steps", "500"])
    with pytest.raises(ConfigError, match="lambda_kl_4e-3 is finished, but with another value of data_dir"):
        ablation.main([*flags, "--data_dir", str(tmp_path)])


def scores_of(folder: Path, phase: str) -> dict:
    report = json.loads(next((folder / "eval" / phase).glob("val_*.json")).read_text())
    (scores,) = report["weights"].values()
    return scores


def flags_of(data_dir: str, output_dir: Path, *flags: str) -> list[str]:
    common = ["--data_dir", data_dir, "--output_dir", str(output_dir), "--device", "cpu", *flags]
    return common + [text for key, value in TINY.items() for text in ("--set", f"{key}={json.dumps(value)}")]


def test_the_recipe_runs_reports_and_is_not_run_again(data_dir, tmp_path, capfd):
    """The recommended form, which is the default."""
    flags = flags_of(data_dir, tmp_path)
    quality.main(flags)
    text = (tmp_path / "results.md").read_text()
    phases = ["base_vae", "base_stage1", "base_stage2"]
    assert [name for name in quality.PHASES if f"| {name} |" in text.split("## Scores")[0]] == phases
    taken = {name: json.loads((tmp_path / name / "phase.json").read_text()) for name in phases}
    for name, before in (("base_vae", phases[:1]), ("base_stage2", phases)):
        scores = scores_of(tmp_path, name)
        minutes = sum(taken[phase]["wall"] for phase in before) / 60
        tokens = f"{scores['lm_tokens']:.1f}" if "lm_tokens" in scores else "–"
        start = f"| {name} | 0 | {minutes:.1f} | {tokens} | "
        assert start + f"{scores['iou']:.4f} | {scores['iou_median']:.4f} | {scores['iou_p5']:.4f} |" in text
        assert f"| {name} | 0 | val | {scores['objects']} | {scores['iou']:.4f} | {scores['iou_p5']:.4f} |" in text
    last = taken["base_stage2"]
    assert last["steps"] == 2 and f"{last['before']['iou']:.4f} | {last['after']['iou']:.4f}" in text
    assert "Cut off" not in text and "on average" not in text

    rate_distortion.main(["--quality", str(tmp_path), "--output", str(tmp_path / "picture" / "rate.png")])
    printed = capfd.readouterr().out
    for name, rate, iou in (
        ("base_vae, sampled", "kl_bits_per_object", "sampled_iou"),
        ("base_stage2", "entropy_bits_per_object", "iou"),
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
    with pytest.raises(ConfigError, match="base_vae is finished, but with another value of .*max_steps"):
        quality.main([*flags, "--set", "trainer.args.max_steps=3"])
    with pytest.raises(ConfigError, match="base_vae is finished, but with another value of --num_gpus; choose"):
        quality.main([*flags, "--num_gpus", "2"])
    copied = shutil.copytree(data_dir, tmp_path / "other data")
    other = [str(copied) if flag == data_dir else flag for flag in flags]
    with pytest.raises(ConfigError, match="base_vae is finished, but with another value of --data_dir; choose"):
        quality.main(other)


def test_scores_are_taken_again_for_other_grids_and_other_kinds(tmp_path, monkeypatch):
    started = []

    def execute(command: list[str]) -> None:
        flags = dict(zip(command[1::2], command[2::2], strict=True))
        report = {"data_dir": flags["--data_dir"], "kinds": flags.get("--kinds"), "weights": {"ema": len(started)}}
        path = Path(flags["--output_dir"]) / "val_step0000002.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
        started.append(path.parent.parent.name)

    monkeypatch.setattr(quality, "execute", execute)
    kinds = tmp_path / "kinds.csv"
    kinds.write_text("source,kind\na,b\n")
    common = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    more = ["--eval_dir", f"more={ROOT}"]
    moved = ["--eval_dir", f"more={ROOT},{tmp_path}"]
    for flags, wanted in ((more, 0), (more, 0), (moved, 1), ([*moved, "--kinds", str(kinds)], 2), (moved, 3)):
        options = quality.parse_args([*common, *flags])
        assert quality.score(options, "cpu", quality.Run("vae", 0), "more") == wanted
    assert started == ["eval_more"] * 4


def test_data_that_cannot_be_scored_are_refused_before_anything_is_trained(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "execute", lambda command: pytest.fail("it trains"))
    (tmp_path / "train").mkdir()
    shutil.copy(f"{data_dir}/shapes_train.npz", tmp_path / "train" / "shapes_train.npz")
    with pytest.raises(DataError, match="no object is in split 'val'"):
        quality.main(flags_of(str(tmp_path / "train"), tmp_path / "out"))
    with pytest.raises(DataError, match="no object is in split 'val'"):
        quality.main(flags_of(data_dir, tmp_path / "out", "--eval_dir", f"more={tmp_path / 'train'}"))
    with pytest.raises(DataError, match="resolution 16, but resolution is 32"):
        quality.main([*flags_of(data_dir, tmp_path / "out"), "--set", "dataset.args.resolution=32"])
    assert not (tmp_path / "out").exists()


def commands_of(monkeypatch, flags: list[str]) -> list[str]:
    """The commands of quality.py with these flags, without running them or reading data."""
    commands = []
    monkeypatch.setattr(quality, "check_data", lambda options: None)
    monkeypatch.setattr(quality, "execute", lambda command: commands.append(" ".join(command)))
    made_up = {
        "iou": 0.5,
        "iou_median": 0.5,
        "iou_p5": 0.5,
        "f_score": 1.0,
        "chamfer": 0.0,
        "objects": 1,
        "sources": {},
    }
    monkeypatch.setattr(quality, "read_log", lambda folder: (folder.mkdir(parents=True), LOG)[1])
    kinds = {"organs": {"iou": 0.25, "iou_p5": 0.125, "objects": 7}}
    monkeypatch.setattr(
        quality,
        "score",
        lambda options, device, run, grids: {**made_up, "kinds": kinds} if grids == "more" else dict(made_up),
    )
    quality.main(flags)
    return commands


LOG = {"steps": 2, "samples_per_second": 1.0, "peak_memory_gib": None, "before": {"iou": 0.1}, "after": {"iou": 0.5}}


def test_the_long_budget_has_more_gpus_and_symmetries_where_there_is_no_cache(monkeypatch, tmp_path):
    flags = ["--data_dir", f"{tmp_path},{ROOT}", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    vae, stage1, stage2 = commands_of(monkeypatch, [*flags, "--forms", "1024", "--long", "--num_gpus", "4"])
    for command in (vae, stage1, stage2):
        assert f"--data_dir {tmp_path},{ROOT} " in command and "--num_gpus 4" in command
    assert "--set dataset.args.augmentation=all" in vae and "--set dataset.args.augmentation=all" in stage2
    assert "augmentation" not in stage1


def test_other_grids_and_their_kinds_have_rows_of_their_own(monkeypatch, tmp_path):
    flags = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    commands_of(monkeypatch, [*flags, "--phases", "512_stage2", "--eval_dir", f"more={ROOT},{tmp_path}"])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["tables"][2]["rows"]
    assert rows == [
        [phase, 0, *row]
        for phase in ("vae", "512_stage2")
        for row in (["val", 1, 0.5, 0.5], ["more", 1, 0.5, 0.5], ["more, organs", 7, 0.25, 0.125])
    ]


def test_seeds_run_apart_from_each_other(monkeypatch, tmp_path):
    flags = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    commands = commands_of(monkeypatch, [*flags, "--forms", "sparse", "512", "--seeds", "0", "3"])
    phases = ["vae", "512_stage1", "512_stage2", "sparse_stage1", "sparse_stage2"]
    folders = [command.split("--output_dir ")[1].split()[0] for command in commands]
    assert folders == [f"{tmp_path}/out/{name}" for name in (*phases, *(f"{phase}_seed3" for phase in phases))]
    for phase, first, second in zip(phases, commands[:5], commands[5:], strict=True):
        other = first.replace(str(tmp_path / "out" / phase), str(tmp_path / "out" / f"{phase}_seed3"))
        start = quality.PHASES[phase].start
        if start is not None:
            other = other.replace(f"--load_dir {tmp_path}/out/{start}", f"--load_dir {tmp_path}/out/{start}_seed3")
        assert second == f"{other} --set trainer.args.seed=3"
    text = (tmp_path / "out" / "results.md").read_text()
    assert "sparse_stage2, seeds 0, 3: IoU 0.5000 on average, standard deviation 0.0000." in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data_dir", "gone"], "gone is not there; give data roots"),
        (["--eval_dir", "more"], "--eval_dir more: write it as NAME=ROOTS"),
        (["--eval_dir", "val=."], "with a name of its own of letters, digits and _ other than val"),
        (["--eval_dir", "a=.", "--eval_dir", "a=."], "--eval_dir a=.: write it as"),
        (["--eval_dir", "a=gone"], "gone is not there"),
        (["--seeds", "1", "1"], "--seeds 1 1: give different numbers"),
        (["--num_gpus", "0"], "--num_gpus is 0"),
        (["--kinds", "gone.csv"], "gone.csv: cannot be read"),
    ],
)
def test_quality_finds_mistakes_before_it_trains(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "execute", lambda command: pytest.fail("it trains"))
    common = [] if "--data_dir" in flags else ["--data_dir", str(tmp_path)]
    with pytest.raises((ConfigError, SystemExit)) as error:
        quality.main([*common, "--output_dir", str(tmp_path / "out"), "--device", "cpu", *flags])
    assert message in str(error.value) + capsys.readouterr().err


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
            str(tmp_path / "out" / name) for name in ("lambda_kl_4e-3", "1024__EMAVectorQuantizer")
        ]
        assert all(line[line.index("--data_dir") + 1] == str(tmp_path / "data") for line in started)
