"""Stage 1 with the latent cache is stage 1 without it, and without a reconstruction loss it runs no decoder."""

import collections
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, VQ, assert_equal, checkpoint, free_port, logged, run, solid_grids, tiny_config

import train
from trellis.datasets.sparse_structure import SparseStructure
from trellis.models.sparse_structure_vae import SparseStructureDecoder, SparseStructureEncoder
from trellis.modules.quantizers import VectorQuantizer
from trellis.trainers.vae import latent_sample, sparse_structure_vqvae
from trellis.trainers.vae.sparse_structure_vqvae import SparseStructureVqVaeTrainer
from trellis.utils.random_utils import permutation

pytestmark = pytest.mark.usefixtures("without_pictures")


def stage1(init: str = "uniform", **args) -> dict:
    """24 objects at 4 a step: epochs of 6 steps."""
    config = tiny_config(VQ, freeze=["encoder", "decoder"], **{"loss_type": "l1", "max_steps": 14, "i_eval": 7, **args})
    config["models"]["quantizer"]["args"]["init"] = init
    return config


@pytest.fixture
def counts(monkeypatch) -> collections.Counter:
    """How many objects pass encoder and decoder outside validation, and how many batches of grids are loaded."""
    counted, training = collections.Counter(), [True]

    def count(cls, name):
        forward = cls.forward

        def counting(self, x, *args, **kwargs):
            counted[name] += len(x) * training[0]
            return forward(self, x, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", counting)

    validate = SparseStructureVqVaeTrainer.validate

    def validate_uncounted(self):
        training[0] = False
        scores = validate(self)
        training[0] = True
        return scores

    get_batch = SparseStructure.get_batch

    def counting_batches(self, indices):
        counted["batches"] += training[0]
        return get_batch(self, indices)

    count(SparseStructureEncoder, "encoder")
    count(SparseStructureDecoder, "decoder")
    monkeypatch.setattr(SparseStructureVqVaeTrainer, "validate", validate_uncounted)
    monkeypatch.setattr(SparseStructure, "get_batch", counting_batches)
    return counted


@pytest.mark.parametrize(
    "init, loss_type, split",
    [
        ("uniform", "l1", 1),
        ("uniform", "l1", 2),
        ("uniform", "l1", 4),
        ("uniform", "none", 1),
        ("kmeans", "l1", 1),
        ("kmeans", "none", 4),
    ],
)
def test_a_run_with_the_cache_is_bit_equal_to_one_without(
    init, loss_type, split, vae_run, data_dir, write_config, tmp_path, counts
):
    flags = ("--data_dir", data_dir, "--load_dir", vae_run)
    for cache in (False, True):
        counts.clear()
        config = write_config(stage1(init, loss_type=loss_type, batch_split=split, latent_cache=cache))
        assert run("--config", config, *flags, "--output_dir", tmp_path / str(cache)) == 0
        kmeans = 24 * (init == "kmeans")
        assert counts["encoder"] == (24 if cache else 14 * 4 + kmeans)  # k-means takes all of so few
        assert counts["decoder"] == (0 if loss_type == "none" else 14 * 4)
    for step in (0, 2, 14):
        assert_equal(checkpoint(tmp_path / "False", step), checkpoint(tmp_path / "True", step))
    assert logged(tmp_path / "False") == logged(tmp_path / "True")


def test_a_complete_cache_and_no_reconstruction_loss_need_no_grids(
    vae_run, data_dir, write_config, tmp_path, counts, capsys
):
    config = write_config(stage1(loss_type="none", latent_cache=str(tmp_path / "shared")))
    flags = ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "first") == 0
    assert counts["batches"] == 6  # the first epoch
    output = capsys.readouterr().out
    assert "latent cache: 0 of 24 objects in" in output and "complete with 24 objects" in output
    assert run(*flags, "--output_dir", tmp_path / "second") == 0
    assert counts["batches"] == 6 and counts["encoder"] == 24 and counts["decoder"] == 0
    assert f"latent cache: 24 of 24 objects in {tmp_path / 'shared'}" in capsys.readouterr().out
    assert_equal(checkpoint(tmp_path / "first", 14), checkpoint(tmp_path / "second", 14))


def test_no_reconstruction_loss_leaves_the_codebook_loss(vae_run, data_dir, write_config, tmp_path):
    config = write_config(stage1(loss_type="none", lambda_vq=2.0, lambda_commit=0.5))
    assert run("--config", config, "--data_dir", data_dir, "--load_dir", vae_run, "--output_dir", tmp_path / "run") == 0
    lines = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert len(lines) == 14
    for line in lines:
        assert line["loss"] == pytest.approx(2 * line["vq"] + 0.5 * line["commit"], rel=1e-6) and "none" not in line
    assert lines[-1]["vq"] < 0.9 * lines[0]["vq"]


@pytest.mark.parametrize("loss_type", ["l1", "none"])
def test_parts_equal_the_whole_and_lost_rows_come_back(loss_type, vae_run, data_dir, write_config, tmp_path):
    config = write_config(stage1(loss_type=loss_type, latent_cache=True, max_steps=20))
    flags = ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    for steps in (4, 10, 20):
        assert run(*flags, "--output_dir", tmp_path / "parts", "--set", f"trainer.args.max_steps={steps}") == 0
        (folder,) = (tmp_path / "parts" / "latents").iterdir()
        if steps == 4:  # in the first epoch
            os.truncate(folder / "checks.bin", 90)
        if steps == 10:  # one row: alone in a batch it would be rounded otherwise
            with open(folder / "latents.bin", "r+b") as stream:
                stream.seek(5 * 1024 + 100)
                stream.write(b"damaged")
    assert_equal(checkpoint(tmp_path / "whole", 20), checkpoint(tmp_path / "parts", 20))
    assert [(folder / name).read_bytes() for name in ("latents.bin", "checks.bin")] == [
        (next((tmp_path / "whole" / "latents").iterdir()) / name).read_bytes() for name in ("latents.bin", "checks.bin")
    ]


def test_killed_and_continued_ends_in_the_same_weights(vae_run, data_dir, write_config, tmp_path):
    config = write_config(stage1(latent_cache=True, i_save=1))
    flags = [str(flag) for flag in ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run)]
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--device", "cpu", "--auto_retry", "0"]
    process = subprocess.Popen([*command, "--output_dir", str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "ckpts" / "misc_step0000003.pt").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert run(*flags, "--output_dir", tmp_path / "killed") == 0
    assert_equal(checkpoint(tmp_path / "whole", 14), checkpoint(tmp_path / "killed", 14))
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


@pytest.mark.parametrize("init, loss_type", [("kmeans", "l1"), ("uniform", "none")])
def test_two_ranks_equal_one(init, loss_type, vae_run, data_dir, write_config, tmp_path, capfd):
    config = write_config(stage1(init, loss_type=loss_type, latent_cache=True, i_ddpcheck=2))
    flags = ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run, "--master_port", free_port())
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    capfd.readouterr()
    assert run(*flags, "--output_dir", tmp_path / "two", "--num_gpus", 2) == 0
    output = capfd.readouterr().out
    assert output.count("latent cache: 0 of 24") == output.count("complete with 24 objects") == 1
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "vq", "commit", "val/iou"} & a.keys():
            assert abs(a[name] - b[name]) < 1e-5, (a["step"], name)
    (first,), (second,) = ((tmp_path / name / "latents").iterdir() for name in ("one", "two"))
    assert first.name == second.name
    rows = [np.fromfile(folder / "latents.bin", np.float32) for folder in (first, second)]
    assert np.abs(rows[0] - rows[1]).max() < 1e-6 and np.abs(rows[0]).max() > 0.1


@pytest.mark.parametrize("per_code, at_least", [(4, 3), (24, 5), (24, 256), (128, 256)])
@pytest.mark.parametrize("embed_dim", [4, 8])
def test_kmeans_gets_an_equal_share_of_objects_and_mostly_what_is_occupied(
    per_code, at_least, embed_dim, vae_run, data_dir, write_config, tmp_path, monkeypatch
):
    taken = []

    def kmeans(vectors, n_embed, **kwargs):
        taken.append(vectors)
        return vectors[:n_embed]

    monkeypatch.setattr(sparse_structure_vqvae, "kmeans", kmeans)
    monkeypatch.setattr(latent_sample, "VECTORS_PER_CODE", per_code)
    monkeypatch.setattr(latent_sample, "OBJECTS_AT_LEAST", at_least)
    config = stage1("kmeans", max_steps=1, batch_size=3, i_eval=100)
    config["models"]["quantizer"]["args"]["embed_dim"] = embed_dim
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0

    encoder = SparseStructureEncoder(**config["models"]["encoder"]["args"]).eval()
    encoder.load_state_dict(torch.load(vae_run / "ckpts" / "encoder_ema0.9999_step0000004.pt", weights_only=True))
    dataset, want, found = SparseStructure(data_dir, resolution=16), [], 0
    wanted = per_code * 32 * 3 // 4
    for index in permutation(24, "kmeans", 0).tolist():
        if found >= wanted:
            break
        ss = dataset[index]["ss"]
        with torch.no_grad():
            cells = encoder(ss[None].float())[0].permute(1, 2, 3, 0)  # [4, 4, 4, 4]
        vectors = cells.reshape(-1, embed_dim)  # a token is a cell, or two along z
        occupied = ss.view(4, 4, 4, 4, -1, embed_dim).amax((1, 3, 5)).flatten() > 0
        assert len(occupied) == len(vectors)
        shuffled = permutation(len(vectors), "kmeans", 0, index).tolist()
        inside = [token for token in shuffled if occupied[token]][: -(-wanted // min(at_least, 24))]
        outside = [token for token in shuffled if not occupied[token]][: round(len(inside) / 3)]
        want.append(vectors[inside + outside])
        found += len(inside)
    torch.testing.assert_close(taken[0], torch.cat(want), rtol=0, atol=2e-6)


def test_kmeans_takes_objects_of_weighted_roots_in_their_shares(vae_run, data_dir, write_config, tmp_path, monkeypatch):
    """Whatever the sizes of the roots; one of weight 0 gives none."""
    roots = []
    for number, size in enumerate((3, 40, 9)):
        bits = np.packbits(solid_grids(size, 16, number).reshape(size, -1), axis=1)
        roots.append(tmp_path / f"{number}_train.npz")
        np.savez(roots[-1], bits=bits)
    taken = []
    monkeypatch.setattr(sparse_structure_vqvae, "latent_sample", lambda of, order, *rest, **more: taken.append(order))
    monkeypatch.setattr(VectorQuantizer, "fit", lambda *args: None)
    flags = ("--data_dir", ",".join(map(str, roots)), "--load_dir", vae_run)
    config = stage1("kmeans", max_steps=1, batch_size=3)
    for name, weights in (("alike", None), ("shares", [3, 1, 0])):
        config["dataset"]["args"]["weights"] = weights
        assert run("--config", write_config(config), *flags, "--output_dir", tmp_path / name) == 0
    alike, shares = taken
    assert np.array_equal(alike, permutation(52, "kmeans", 0))
    assert len(shares) == 43 and shares.max() < 43
    # 43 of a period of 1024 samples; the standard deviation of the number is 2.8.
    assert (shares < 3).sum() == pytest.approx(0.75 * 43, abs=8)


def test_other_weights_and_other_data_find_other_latents(vae_run, data_dir, write_config, tmp_path, counts):
    shared = tmp_path / "shared"
    config = stage1(latent_cache=str(shared), max_steps=6)
    other = tmp_path / "vae"
    assert (
        run("--config", write_config(tiny_config(max_steps=4, seed=1)), "--data_dir", data_dir, "--output_dir", other)
        == 0
    )
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for split in ("train", "val"):
        bits = np.load(Path(data_dir) / f"shapes_{split}.npz")["bits"]
        np.savez(mirrored / f"shapes_{split}.npz", bits=bits[::-1])
    for number, (weights, data) in enumerate([(vae_run, data_dir), (other, data_dir), (vae_run, mirrored)]):
        counts.clear()
        for attempt in ("first", "again"):
            flags = ("--config", write_config(config), "--data_dir", data, "--load_dir", weights)
            assert run(*flags, "--output_dir", tmp_path / f"{attempt}{number}") == 0
        assert counts["encoder"] == 24 and len(list(shared.iterdir())) == number + 1


def test_tryrun_shows_the_cache_and_writes_none(vae_run, data_dir, write_config, tmp_path, capsys):
    config = write_config(stage1(loss_type="none", latent_cache=True))
    flags = ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run, "--output_dir", tmp_path / "new")
    assert run(*flags, "--tryrun") == 0
    assert not (tmp_path / "new").exists()
    shown = re.search(r"latent cache: 0.00 GiB in (.*)", capsys.readouterr().out)
    assert run(*flags) == 0
    assert f"latent cache: 0 of 24 objects in {shown[1]}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert run(*flags, "--tryrun", "--set", f"trainer.args.latent_cache={tmp_path / 'file'}") == 1
    assert "file is not a folder; name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        ({"latent_cache": True, "freeze": ["decoder"]}, "latent_cache keeps what a frozen encoder computes"),
        ({"latent_cache": "folder", "freeze": []}, "latent_cache keeps what a frozen encoder computes"),
        ({"latent_cache": 1}, "latent_cache is 1; it must be boolean or string"),
        ({"loss_type": "none", "freeze": ["encoder"]}, "trains the codebook alone; add decoder to trainer.args.freeze"),
        ({"loss_type": "none", "freeze": []}, "add encoder and decoder to trainer.args.freeze"),
    ],
)
def test_what_cannot_be_is_one_clear_error(args, message, write_config, tmp_path, capsys):
    config = write_config(stage1(**args) if "freeze" not in args else tiny_config(VQ, **args))
    assert run("--config", config, "--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_the_published_stage_1_configurations_use_the_cache():
    for name in ("vqvae_stage1", "vqvae_1024_stage1", "demo_stage1"):
        config = train.load_config(str(ROOT / "configs" / "vae" / f"{name}.json"))
        train.check_config(config, 1)
        assert config["trainer"]["args"]["latent_cache"] is True
