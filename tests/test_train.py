"""train.py as a user runs it: continuing, carrying stages over, two ranks, and what a mistake looks like."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, command, course, free_port, logged, run, tiny_config

import train
from trellis.runs.checkpoint import Checkpoints
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer

ADAPTIVE = {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "clip_percentile": 90, "buffer_size": 4}}
MUON = {"name": "ConvMuon", "args": {"lr": 1e-2}}
STAGE2 = {
    "optimizer": {"name": "AdamW", "args": {"lr": 5e-3}},
    "lr_scaling": "rms",
    "lr_scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.9}},
    "loss_type": "l1_l2",
    "grad_clip": ADAPTIVE,
}


@pytest.fixture(scope="module")
def stage1_run(vae_run, data_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    config = folder / "config.json"
    config.write_text(json.dumps(tiny_config(VQ, freeze=["encoder", "decoder"], loss_type="l1", max_steps=4)))
    assert run("--config", config, "--data_dir", data_dir, "--output_dir", folder / "run", "--load_dir", vae_run) == 0
    return folder / "run"


# --- resume ---


@pytest.mark.parametrize(
    "config",
    [tiny_config(batch_split=2, ema_rate=[0.9, 0.99]), tiny_config(VQ, **STAGE2), tiny_config(VQ, optimizer=MUON)],
    ids=["kl", "vq stage 2", "muon"],
)
def test_two_halves_equal_the_whole(config, data_dir, write_config, tmp_path):
    path = write_config(config)
    common = ("--config", path, "--data_dir", data_dir)
    assert run(*common, "--output_dir", tmp_path / "whole") == 0
    assert run(*common, "--output_dir", tmp_path / "parts", "--set", "trainer.args.max_steps=2") == 0
    assert run(*common, "--output_dir", tmp_path / "parts") == 0
    assert_equal(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6))
    whole, parts = logged(tmp_path / "whole"), logged(tmp_path / "parts")
    # Stopping at 2 adds a validation there; every step's own line is the same.
    assert [line for line in whole if "loss" in line] == [line for line in parts if "loss" in line]


@pytest.mark.parametrize("stop, validated", [(3, [3, 6]), (4, [4, 6])])
def test_two_halves_are_judged_by_the_validations_of_both(stop, validated, data_dir, write_config, tmp_path):
    """Step 3 is validated in any case, step 4 only because the run stops there."""
    flags = ("--config", write_config(tiny_config(VQ, **STAGE2)), "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    assert run(*flags, "--output_dir", tmp_path / "parts", "--set", f"trainer.args.max_steps={stop}") == 0
    assert run(*flags, "--output_dir", tmp_path / "parts") == 0
    whole, parts = course(tmp_path / "whole", 6), course(tmp_path / "parts", 6)
    assert parts["objects"].shape == (6,) and parts["first"].keys() >= {"iou", "codebook_usage"}
    assert [step for step, _ in parts["last"]] == validated
    for each in () if stop == 3 else (whole, parts):
        del each["last"][0]
    assert_equal(parts, whole)


def test_killed_at_random_moments_ends_in_the_same_weights(stage1_run, data_dir, write_config, tmp_path):
    path = write_config(tiny_config(VQ, **STAGE2, max_steps=16, i_save=1, i_eval=4))
    flags = ("--config", path, "--data_dir", data_dir, "--load_dir", stage1_run)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    checkpoints, moments, kills = Checkpoints(tmp_path / "killed"), random.Random(time.time_ns()), 0
    for _ in range(3):
        before = max(checkpoints.steps(), default=-1)
        process = subprocess.Popen(command(*flags, "--output_dir", checkpoints.run_dir), stdout=subprocess.DEVNULL)
        while process.poll() is None and max(checkpoints.steps(), default=-1) <= before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert run(*flags, "--output_dir", checkpoints.run_dir) == 0
    assert_equal(checkpoint(tmp_path / "whole", 16), checkpoint(checkpoints.run_dir, 16))
    assert_equal(course(tmp_path / "whole", 16), course(checkpoints.run_dir, 16))
    assert logged(tmp_path / "whole") == logged(checkpoints.run_dir)


def stop_and_continue(flags: tuple, run_dir: Path, signum: signal.Signals, step: int, max_steps: int) -> None:
    """Send a signal to a run once it prints `step`: it saves and says how to go on, and the same command does."""
    process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, text=True)
    assert any(f"step {step}/{max_steps}" in line for line in iter(process.stdout.readline, ""))
    process.send_signal(signum)
    assert "the same command continues" in process.communicate()[0]
    assert process.returncode == 128 + signum
    saved = Checkpoints(run_dir).latest()
    assert step <= saved < max_steps
    assert run(*flags, "--set", f"trainer.args.max_steps={saved + 2}") == 0
    assert Checkpoints(run_dir).latest() == saved + 2


def test_interrupt_saves_and_the_same_command_continues(data_dir, write_config, tmp_path):
    path = write_config(tiny_config(max_steps=400, i_save=1000, i_eval=1000))
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    stop_and_continue(flags, tmp_path / "run", signal.SIGINT, step=2, max_steps=400)


def test_a_finished_run_is_left_as_it_is(vae_run, data_dir, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in (vae_run / "ckpts").iterdir()}
    config = json.loads((vae_run / "config.json").read_text())
    (vae_run.parent / "again.json").write_text(json.dumps(config))
    assert run("--config", vae_run.parent / "again.json", "--data_dir", data_dir, "--output_dir", vae_run) == 0
    assert "finished at step 4" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (vae_run / "ckpts").iterdir()}


def test_an_incomplete_checkpoint_is_never_picked(data_dir, write_config, tmp_path):
    path = write_config(tiny_config())
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags) == 0
    checkpoints = Checkpoints(tmp_path / "run")
    (checkpoints.folder / "decoder_step0000006.pt").unlink()
    assert checkpoints.latest() == 4
    truncated = checkpoints.folder / "encoder_step0000004.pt"
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert checkpoints.latest() == 2
    misc = checkpoints.folder / "misc_step0000002.pt"
    misc.write_bytes(misc.read_bytes()[:100])
    with pytest.warns(UserWarning, match="misc_step0000002.pt is damaged"):
        assert checkpoints.latest() == 0
    with pytest.warns(UserWarning):
        assert run(*flags) == 0
    assert checkpoints.latest() == 6


def test_going_back_to_a_step_keeps_what_came_after(data_dir, write_config, tmp_path):
    path = write_config(tiny_config())
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags) == 0
    last = checkpoint(tmp_path / "run", 6)
    assert run(*flags, "--ckpt", 2) == 0
    assert_equal(last, checkpoint(tmp_path / "run", 6))
    kept = tmp_path / "run" / "ckpts" / "superseded_1"
    assert (kept / "misc_step0000006.pt").is_file() and '"step": 6' in (kept / "log.txt").read_text()


def test_another_optimizer_cannot_continue_a_run(vae_run, data_dir, write_config, capsys):
    config = tiny_config(max_steps=8, optimizer={"name": "AdamW", "args": {"lr": 1e-4}})
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", vae_run) == 1
    assert "trainer.args.optimizer.args.lr was 0.01 and is 0.0001" in capsys.readouterr().err


# --- stages ---


def test_stage_1_trains_the_codebook_alone(vae_run, stage1_run):
    source, result = checkpoint(vae_run, 4), checkpoint(stage1_run, 4)
    for name in ("encoder", "decoder"):
        assert_equal(source[f"{name}_ema0.9999_step0000004.pt"], result[f"{name}_step0000004.pt"])
        assert f"{name}_ema0.9999_step0000004.pt" not in result
    first = checkpoint(stage1_run, 0)["quantizer_step0000000.pt"]["embeddings.weight"]
    last = result["quantizer_step0000004.pt"]["embeddings.weight"]
    assert not torch.equal(first, last)
    assert first.std() > 0.1  # k-means over latents, not the uniform ±1/32
    assert len(result["misc_step0000004.pt"]["optimizer"]["state"]) == 1


def test_stage_2_starts_from_stage_1s_averages(stage1_run, data_dir, write_config, tmp_path):
    config = tiny_config(VQ, **STAGE2, max_steps=1)
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", stage1_run)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    source, start = checkpoint(stage1_run, 4), checkpoint(tmp_path / "run", 0)
    assert_equal(source["quantizer_ema0.9999_step0000004.pt"], start["quantizer_step0000000.pt"])
    assert_equal(source["encoder_step0000004.pt"], start["encoder_step0000000.pt"])
    end = checkpoint(tmp_path / "run", 1)
    for name in ("encoder", "quantizer", "decoder"):
        for key, value in end[f"{name}_step0000001.pt"].items():
            assert not torch.equal(value, start[f"{name}_step0000000.pt"][key]), key


def test_a_load_dir_of_the_same_stage_resumes_everything(data_dir, write_config, tmp_path):
    path = write_config(tiny_config(VQ, **STAGE2))
    common = ("--config", path, "--data_dir", data_dir)
    assert run(*common, "--output_dir", tmp_path / "first") == 0
    assert run(*common, "--output_dir", tmp_path / "second", "--load_dir", tmp_path / "first", "--ckpt", 4) == 0
    assert Checkpoints(tmp_path / "second").steps()[0] > 4
    assert_equal(checkpoint(tmp_path / "first", 6), checkpoint(tmp_path / "second", 6))


def test_exported_weights_come_back_exactly(stage1_run, data_dir, write_config, tmp_path):
    from scripts import export_pretrained
    from trellis.models import from_pretrained

    assert export_pretrained.main(["--run", str(stage1_run), "--output_dir", str(tmp_path / "out")]) == 0
    source = checkpoint(stage1_run, 4)
    model = from_pretrained(str(tmp_path / "out" / "quantizer"))
    assert_equal(dict(source["quantizer_ema0.9999_step0000004.pt"]), dict(model.state_dict()))
    ckpts = {name: str(tmp_path / "out" / name) for name in ("encoder", "decoder", "quantizer")}
    config = write_config(tiny_config(VQ, **STAGE2, max_steps=1, finetune_ckpt=ckpts))
    assert run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "tuned") == 0
    start = checkpoint(tmp_path / "tuned", 0)
    assert_equal(source["quantizer_ema0.9999_step0000004.pt"], start["quantizer_step0000000.pt"])
    assert export_pretrained.main(["--run", str(stage1_run), "--output_dir", str(tmp_path / "out")]) == 1


def test_keep_last_keeps_the_last_and_the_best(data_dir, write_config, tmp_path):
    config = tiny_config(max_steps=12, keep_last=2, i_eval=5)
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 0
    checkpoints = Checkpoints(tmp_path / "run")
    assert set(checkpoints.steps()) == {10, 12, checkpoints.best()}
    scores = {line["step"]: line["val/iou"] for line in logged(tmp_path / "run") if "val/iou" in line}
    assert scores[checkpoints.best()] == max(scores.values())


@pytest.mark.parametrize(
    "scores, told",
    [
        ([0.5, 0.2, 0.4], True),
        ([0.5, 0.6, 0.4], False),
        ([0.5, 0.5, 0.5], False),
        ([0.5, 0.49, 0.4990], False),  # less than lies between two runs
    ],
)
@pytest.mark.parametrize("stop", [None, 3])
def test_a_run_that_ends_below_its_start_says_so(
    stop, scores, told, data_dir, write_config, tmp_path, monkeypatch, capsys
):
    """Also one that stopped in between."""
    found = iter(scores)

    def validate(self):
        score = next(found)
        self.object_scores = score + torch.linspace(-0.02, 0.02, 6)
        return {"iou": score}

    monkeypatch.setattr(SparseStructureVaeTrainer, "validate", validate)
    flags = ("--config", write_config(tiny_config(max_steps=6, i_eval=3)), "--data_dir", data_dir)
    flags += ("--output_dir", tmp_path / "run")
    if stop is not None:
        assert run(*flags, "--set", f"trainer.args.max_steps={stop}") == 0
        capsys.readouterr()
    assert run(*flags) == 0
    assert ("WARNING: this run made the models worse: iou 0.5000" in capsys.readouterr().out) is told
    assert Checkpoints(tmp_path / "run").best() == scores.index(max(scores)) * 3


# --- ranks ---


@pytest.mark.parametrize(
    "loss_type, args",
    [("bce", {}), ("l1_l2", {}), ("l1_l2", {"freeze": ["encoder", "decoder"]}), ("bce_iou", {"optimizer": MUON})],
)
def test_two_ranks_equal_one(loss_type, args, vae_run, data_dir, write_config, tmp_path):
    path = write_config(tiny_config(VQ, **{**STAGE2, "loss_type": loss_type, **args}, i_ddpcheck=2))
    flags = ("--config", path, "--data_dir", data_dir, "--load_dir", vae_run, "--master_port", free_port())
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    assert run(*flags, "--output_dir", tmp_path / "two", "--num_gpus", 2) == 0
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", loss_type, "vq", "commit", "val/iou"):
            if name in a:
                assert abs(a[name] - b[name]) < 1e-5, (a["step"], name)


def test_kl_noise_does_not_depend_on_ranks(data_dir, write_config, tmp_path):
    # A low rate, for Adam makes steps of full size out of what rounding does to the smallest gradients.
    path = write_config(tiny_config(lambda_kl=1e-3, optimizer={"name": "AdamW", "args": {"lr": 1e-3}}))
    flags = ("--config", path, "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    subprocess.run(
        [*torchrun, *command(*flags, "--output_dir", tmp_path / "two")[1:]],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        if "loss" in a:
            assert abs(a["loss"] - b["loss"]) < 1e-5


# --- tryrun ---


def test_tryrun_shows_the_run_and_writes_nothing(vae_run, data_dir, write_config, tmp_path, capsys):
    config = tiny_config(VQ, freeze=["encoder", "decoder"], lr_scheduler=STAGE2["lr_scheduler"])
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "new", "--tryrun") == 0
    assert not (tmp_path / "new").exists()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "frozen" in lines["encoder"] and "encoder_ema0.9999_step0000004.pt" in lines["encoder"]
    assert "trainable" in lines["quantizer"] and "from the data's latents" in lines["quantizer"]
    assert "64 tokens of 32 codes per object: 320 bits" in lines["64"]
    assert "lr 0.01 at step 0, lr 0.009 at step 1, lr 0.00729 at step 3, lr 0.00531 at step 6" in lines["schedule"]


@pytest.mark.parametrize("name", ["VectorQuantizer", "EMAVectorQuantizer"])
def test_tryrun_tells_of_a_codebook_that_no_optimizer_moves(name, data_dir, write_config, tmp_path, capsys):
    config = tiny_config(VQ)
    config["models"]["quantizer"]["name"] = name
    run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", tmp_path / "new", "--tryrun")
    assert ("note: quantizer has no parameters" in capsys.readouterr().out) == (name == "EMAVectorQuantizer")


def test_tryrun_fails_where_a_frozen_model_has_no_weights(data_dir, write_config, tmp_path, capsys):
    config = tiny_config(VQ, freeze=["encoder", "decoder"])
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "new", "--tryrun")
    assert run("--config", write_config(config), *flags) == 1
    assert "encoder is frozen but has no weights: give --load_dir" in capsys.readouterr().err
    config["trainer"]["args"]["finetune_ckpt"] = {"encoder": "gone/encoder.safetensors"}
    assert run("--config", write_config(config), *flags) == 1
    assert "finetune_ckpt.encoder is gone/encoder.safetensors, which is not there" in capsys.readouterr().err


# --- mistakes ---


def test_ranks_stop_together_and_go_on(data_dir, write_config, tmp_path):
    path = write_config(tiny_config(max_steps=4000, i_save=10000, i_eval=10000, i_print=10))
    flags = (
        "--config",
        path,
        "--data_dir",
        data_dir,
        "--output_dir",
        tmp_path / "run",
        "--num_gpus",
        2,
        "--master_port",
        free_port(),
    )
    stop_and_continue(flags, tmp_path / "run", signal.SIGTERM, step=10, max_steps=4000)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_item_is_one_clear_error(ranks, write_config, tmp_path):
    import numpy as np

    from trellis.grids.voxels import voxel_centers, write_ply

    voxels, names = tmp_path / "data" / "voxels", [f"{i:064x}" for i in range(2**31, 2**31 + 4)]
    voxels.mkdir(parents=True)
    for name in names:
        write_ply(voxels / f"{name}.ply", voxel_centers(np.array([[1, 2, 3]]), 16))
    (tmp_path / "data" / "metadata.csv").write_text(
        "sha256,voxelized,split\n" + "".join(f"{n},True,train\n" for n in names)
    )
    write_ply(voxels / f"{names[2]}.ply", np.array([[0.0, 0.0, 2.0]]))
    flags = (
        "--config",
        write_config(tiny_config(num_workers=1)),
        "--data_dir",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "run",
        "--num_gpus",
        ranks,
        "--master_port",
        free_port(),
    )
    done = subprocess.run(command(*flags), capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and f"{names[2]}.ply" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "override, message",
    [
        ("trainer.args.lamda_kl=0.1", "trainer.args.lamda_kl is unknown; did you mean lambda_kl?"),
        ("trainer.args.max_steps=0", "trainer.args.max_steps is 0; it must be integer >= 1"),
        ('trainer.args.max_steps="many"', 'trainer.args.max_steps is "many"; it must be integer >= 1'),
        ("trainer.args.batch_split=3", "batch_split is 3, which does not divide the 4 samples"),
        ("trainer.args.batch_size_per_gpu=4", "give either batch_size"),
        ("trainer.args.optimizer.name=AdamX", "'AdamX', which is neither in torch.optim nor Muon; did you mean"),
        ("trainer.args.optimizer.args.learning_rate=1", "learning_rate is unknown to AdamW"),
        ("trainer.args.optimizer.args.lr=-1", "lr is -1; it must be a number > 0"),
        ('trainer.args.lr_scheduler={"name": "ExponentialLR"}', "lr_scheduler.args does not build ExponentialLR"),
        ('trainer.args.freeze=["encodr"]', "freeze has 'encodr'; did you mean encoder?"),
        ('trainer.args.freeze=["encoder", "decoder"]', "freeze names every model"),
        ("trainer.args.loss_type=l3", 'loss_type is "l3"; it must be "bce" or'),
        ("trainer.args.loss_type=none", 'loss_type is "none"; it must be "bce" or'),  # of the VQ trainer alone
        ("trainer.args.grad_clip=0", "grad_clip is 0"),
        ("trainer.name=VaeTrainer", "trainer.name is 'VaeTrainer', which is not known"),
        ("models.encoder.args.latent_channels=0", "latent_channels is 0; it must be integer >= 1"),
        ("models.encoder.name=os.system", "models.encoder.name is 'os.system', which is not known"),
        ("dataset.args.resolutoin=16", "dataset.args.resolutoin is unknown; did you mean resolution?"),
        ("models.coder={}", "models.coder.name is missing"),
        ("trainer.arg.max_steps=1", "trainer.arg is not in the configuration; did you mean args?"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(override, message, write_config, tmp_path, capsys):
    """Before data is touched: the data folder does not even exist."""
    flags = ("--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out", "--set", override)
    assert run("--config", write_config(tiny_config()), *flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.args.lambda_entropy=0.5"], "lambda_entropy is 0.5, but VectorQuantizer has no entropy loss"),
        (["trainer.args.lambda_kl=0.1"], "trainer.args.lambda_kl is unknown"),
        (["trainer.args.loss_type=none"], 'loss_type is "none", which trains the codebook alone; add encoder and'),
        (["trainer.args.latent_cache=true"], "latent_cache keeps what a frozen encoder computes"),
        (
            ["trainer.args.latent_cache=true", 'trainer.args.freeze=["encoder"]', "dataset.args.augmentation=all"],
            'latent_cache keeps one latent of each object, but dataset.args.augmentation is "all"',
        ),
        (["models.quantizer.args.embed_dim=6"], "models.quantizer.args: embed_dim 6 is not a multiple"),
        (["models.quantizer.args.embed_dim=8", "models.quantizer.args.latent_channels=8"], "latent_channels is 8, but"),
        (
            ["models.quantizer.args.embed_dim=12", "models.quantizer.args.group=[3, 1, 1]"],
            "models.quantizer.args: a code of embed_dim 12 covers 3 cells along x, and the latent's 4 cells",
        ),
        (["models.quantizer.args.group=[2, 1, 1]"], "models.quantizer.args: group is [2, 1, 1]"),
        (["models.quantizer.args.levels=[8, 4]"], "models.quantizer.args.levels is unknown"),
        (
            ["models.quantizer.name=FiniteScalarQuantizer"],
            "models.quantizer.args: levels [8, 8, 8, 4, 4] make 8192 codes",
        ),
        (['models.quantizer={"name": "SparseStructureDecoder", "args": {}}'], "models.quantizer.args.out_channels is"),
        (["models.quantizer.name=LookupFreeQuantizer", "models.quantizer.args.n_embed=30"], "30 is not a power of two"),
        (
            ["models.decoder.args.latent_channels=8"],
            "models.decoder.args.latent_channels is 8, but the encoder's latent",
        ),
        (["models.decoder.args.channels=[8, 4]"], "models.decoder.args.channels has 2 levels, but the encoder's has 3"),
        (
            ["models.decoder.args.out_channels=2"],
            "models.decoder.args.out_channels is 2, but an occupancy grid has one",
        ),
        (
            ['models.encoder={"name": "VectorQuantizer"}'],
            "models.encoder.name is 'VectorQuantizer', which is not an encoder",
        ),
        (["dataset.args.resolution=18"], "dataset.args.resolution is 18, but a latent cell of the encoder covers 4"),
        (['trainer.args.lr_multipliers={"codebook": 2}'], "lr_multipliers has 'codebook', which is not trained here"),
        (["trainer.args.revive_until=2"], "trainer.args.revive_until is 2; it must be number >= 0 and <= 1"),
    ],
)
def test_a_wrong_vq_configuration_is_found_before_data(overrides, message, write_config, tmp_path, capsys):
    """The data folder does not even exist."""
    flags = ["--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out"]
    for override in overrides:
        flags += ["--set", override]
    assert run("--config", write_config(tiny_config(VQ)), *flags) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_old_run_whose_configuration_no_longer_holds_is_one_clear_error(data_dir, write_config, tmp_path, capsys):
    path = write_config(tiny_config(max_steps=1, i_eval=100))
    flags = ("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags) == 0
    misc_path = tmp_path / "run" / "ckpts" / "misc_step0000001.pt"
    misc = torch.load(misc_path, weights_only=True)
    misc["config"]["trainer"]["args"]["lr_scaling"] = "trust_ratios"
    del misc["sums"]  # as versions had it that took this value
    torch.save(misc, misc_path)
    capsys.readouterr()
    assert run(*flags) == 1
    error = capsys.readouterr().err
    assert (
        'does not take its configuration: trainer.args.lr_scaling is "trust_ratios"; it must be "none" or "rms"'
        in error
    )
    assert "scripts/export_pretrained.py" in error


def test_the_run_folder_keeps_what_the_user_wrote(vae_run):
    written = json.loads((vae_run.parent / "config.json").read_text())
    assert json.loads((vae_run / "config.json").read_text()) == written
    assert Checkpoints(vae_run).read_misc(4)["config"] == written and "seed" not in written["trainer"]["args"]


def test_the_vq_trainer_has_no_kl(write_config, tmp_path, capsys):
    config = tiny_config(VQ, lambda_kl=1e-3)
    assert run("--config", write_config(config), "--data_dir", tmp_path, "--output_dir", tmp_path / "out") == 1
    assert "trainer.args.lambda_kl is unknown" in capsys.readouterr().err


def test_latent_and_codebook_must_fit(write_config, tmp_path, capsys):
    cases = (
        ({"embed_dim": 6}, "embed_dim 6 is not a multiple"),
        ({"latent_channels": 8, "embed_dim": 8}, "latent_channels is 8, but the encoder's latent has 4"),
    )
    for quantizer, message in cases:
        config = tiny_config(VQ)
        config["models"]["quantizer"]["args"].update(quantizer)
        assert run("--config", write_config(config), "--data_dir", tmp_path, "--output_dir", tmp_path / "out") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "ckpt, fails_in, starts",
    [
        ("none", "open_folder", [0]),
        ("none", "save", [0, 2]),
        ("0", "open_folder", [0]),
        ("0", "save", [0, 2]),
        ("0", "open_log", [0, 0]),
    ],
)
def test_a_retry_goes_on_from_what_the_run_has_saved(ckpt, fails_in, starts, vae_run, tmp_path, monkeypatch):
    """ckpt: of the command. fails_in: where it fails once, after step 2 is saved if in `save`."""
    if ckpt != "none":
        shutil.copytree(vae_run, tmp_path / "run")
    started, failed = [], []
    originals = {name: getattr(BasicTrainer, name) for name in ("open_folder", "open_log", "save")}

    def break_once(name: str) -> None:
        if name == fails_in and not failed:
            failed.append(name)
            raise RuntimeError("broken on purpose")

    def open_folder(self):
        break_once("open_folder")
        originals["open_folder"](self)

    def open_log(self):
        started.append(self.step)
        break_once("open_log")
        originals["open_log"](self)

    def save(self):
        originals["save"](self)
        if self.step == 2:
            break_once("save")

    for method in (open_folder, open_log, save):
        monkeypatch.setattr(BasicTrainer, method.__name__, method)
    data_dir = Checkpoints(vae_run).read_misc(4)["data_dir"]
    flags = ["--config", str(vae_run / "config.json"), "--data_dir", data_dir, "--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--ckpt", ckpt, "--auto_retry", "1", "--device", "cpu"]) == 0
    assert started == starts and failed == [fails_in]
    assert_equal(checkpoint(tmp_path / "run", 4), checkpoint(vae_run, 4))
    later = sorted(path.name for path in (tmp_path / "run" / "ckpts").glob("superseded_*"))
    assert later == ([] if ckpt == "none" else ["superseded_1"])


@pytest.mark.parametrize(
    "message, times, last",
    [("the same", 2, "failed twice in the same way from the same state"), ("another, {}", 4, "another, 3")],
)
def test_a_bug_ends_non_zero_after_the_last_retry(
    message, times, last, data_dir, write_config, tmp_path, monkeypatch, capsys
):
    count = iter(range(10))

    def fail(self):
        raise RuntimeError(message.format(next(count)))

    monkeypatch.setattr(BasicTrainer, "run", fail)
    flags = ["--config", write_config(tiny_config()), "--data_dir", data_dir, "--output_dir", str(tmp_path / "out")]
    assert train.main([*flags, "--auto_retry", "3", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("Traceback") == times and error.count("; trying again (") == times - 1
    assert last in error.splitlines()[-1]


@pytest.mark.parametrize("number, times", [(errno.ENOSPC, 1), (errno.EROFS, 1), (errno.EIO, 2)])
def test_a_failing_disk_is_one_line_and_only_tried_again_where_that_can_help(
    number, times, data_dir, write_config, tmp_path, monkeypatch, capsys
):
    def fail(self):
        raise OSError(number, os.strerror(number), "outputs/log.txt")

    monkeypatch.setattr(BasicTrainer, "run", fail)
    flags = ["--config", write_config(tiny_config()), "--data_dir", data_dir, "--output_dir", str(tmp_path / "out")]
    assert train.main([*flags, "--auto_retry", "3", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count(f"error: outputs/log.txt: {os.strerror(number)}") == times
    assert "Traceback" not in error


def test_weights_gone_to_nan_are_not_saved(data_dir, write_config, tmp_path, capsys):
    config = tiny_config(optimizer={"name": "SGD", "args": {"lr": 1e30}}, max_steps=8, grad_clip=None, i_eval=100)
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    assert "training has diverged" in capsys.readouterr().err
    checkpoints = Checkpoints(tmp_path / "run")
    for step in checkpoints.steps():
        for path in checkpoints.folder.glob(f"*coder_step{step:07d}.pt"):
            assert all(value.isfinite().all() for value in torch.load(path, weights_only=True).values())


def test_a_run_folder_that_may_not_be_read_is_one_line(data_dir, write_config, tmp_path, monkeypatch, capsys):
    """As root everything may be read, so the call itself is made to fail."""

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))

    monkeypatch.setattr(Checkpoints, "steps", refuse)
    assert run("--config", write_config(tiny_config()), "--data_dir", data_dir, "--output_dir", tmp_path / "a") == 1
    message = f"error: {tmp_path / 'a' / 'ckpts'}: {os.strerror(errno.EACCES)}\n"
    assert capsys.readouterr().err == message
