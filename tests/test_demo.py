"""scripts/demo.py without its training: which meshes are held out, the ready tokenizer, and how it ends."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_tokenizer

from scripts import demo
from trellis.grids.meshes import load_mesh
from trellis.tokens.octree import Octree
from trellis.utils.errors import DataError


def write_metadata(folder: Path, splits: list[str], voxelized: bool = True) -> list[str]:
    """metadata.csv as voxelize.py writes it, with a column of the user's. Returns the hashes in their order."""
    hashes = [f"{i:064x}" for i in range(len(splits))]
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sha256", "file", "voxelized", "num_voxels", "split", "mine"])
        for sha256, split in zip(hashes, splits, strict=True):
            writer.writerow([sha256, f"{sha256[-2:]}.glb", voxelized, 8, split, "kept"])
    return hashes


def test_one_mesh_in_eight_is_held_out_and_given_splits_stay(tmp_path):
    splits = [""] * 10
    splits[0], splits[3] = "train", "val"
    hashes = write_metadata(tmp_path, splits)
    demo.hold_out(tmp_path)
    with open(tmp_path / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = {row["sha256"]: row for row in csv.DictReader(file)}
    assert [rows[sha256]["split"] for sha256 in hashes] == [
        "train", "train", "train", "val", "train", "train", "train", "train", "val", "train",
    ]  # fmt: skip
    assert {row["mine"] for row in rows.values()} == {"kept"}


def test_one_mesh_is_too_few(tmp_path):
    write_metadata(tmp_path, [""])
    with pytest.raises(DataError, match="has 1 voxelized mesh; give at least 2"):
        demo.hold_out(tmp_path)


@pytest.mark.parametrize("code, ends_with", [(1, 1), (130, 130), (-9, 1)])
def test_a_step_that_fails_ends_the_demo_with_its_exit_code(code, ends_with, tmp_path, monkeypatch, capsys):
    def fail(*command):
        raise subprocess.CalledProcessError(code, command)

    monkeypatch.setattr(demo, "run", fail)
    assert demo.main(["--output_dir", str(tmp_path / "out")]) == ends_with
    assert f"the step above ended with exit code {code}; run the same command again" in capsys.readouterr().err


def test_another_folder_is_asked_for_with_other_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_steps", lambda args: demo.remember_options(args, Path(args.output_dir)))
    assert demo.main(["--output_dir", str(tmp_path)]) == 0
    assert demo.main(["--output_dir", str(tmp_path), "--from_scratch"]) == 1
    assert "was made with neither --meshes nor --from_scratch; choose another --output_dir" in capsys.readouterr().err


def test_the_up_axis_of_meshes_is_passed_on_and_remembered(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(demo, "run", lambda *words: commands.append(list(map(str, words))))
    monkeypatch.setattr(demo, "hold_out", lambda voxels: None)
    monkeypatch.setattr(
        demo,
        "run_steps",
        lambda args: (
            demo.remember_options(args, Path(args.output_dir)),
            demo.make_data(args, Path(args.output_dir)),
        ),
    )
    flags = ["--meshes", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    for more, axis in ((["--up_axis", "auto"], "auto"), ([], "auto")):
        assert demo.main([*flags, *more]) == 0
        assert commands.pop()[-2:] == ["--up_axis", axis]
    assert demo.main([*flags, "--up_axis", "z"]) == 1
    assert f"was made with --meshes {tmp_path} --up_axis auto; choose another" in capsys.readouterr().err
    # A folder of before there was a choice: its grids have the axes of their files.
    options = json.loads((tmp_path / "out" / "demo.json").read_text())
    del options["up_axis"]
    (tmp_path / "out" / "demo.json").write_text(json.dumps(options))
    assert demo.main(flags) == 1 and "--up_axis keep" in capsys.readouterr().err
    assert demo.main([*flags, "--up_axis", "keep"]) == 0
    assert not commands[1:] and commands.pop()[-2:] == ["--up_axis", "keep"]
    with pytest.raises(SystemExit):
        demo.main(["--up_axis", "y"])
    assert "--up_axis goes with --meshes" in capsys.readouterr().err


def test_a_mesh_goes_through_the_ready_tokenizer(tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer(
        name="VectorQuantizer", args={"n_embed": 32, "embed_dim": 4, "latent_channels": 4, "empty_code": True}
    )
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(demo, "BASE", tmp_path / "base")
    (tmp_path / "eval" / "base").mkdir(parents=True)
    row = demo.round_trip(demo.parse_args(["--device", "cpu"]), tmp_path)
    ids = tokenizer.encode(demo.MESH)[0]
    text = (tmp_path / "eval/base/teapot_tokens.txt").read_text()
    assert torch.equal(tokenizer.from_text(text), ids)
    masks, codes = Octree(tokenizer.lattice, tokenizer.n_embed).lengths(ids)
    assert row["lm_tokens"] == masks + codes < tokenizer.num_tokens
    grid = tokenizer.grid_of_file(demo.MESH)
    made = tokenizer.decode(ids)[0] > 0
    assert row["iou"] == pytest.approx(((grid > 0) & made).sum().item() / ((grid > 0) | made).sum().item())
    back = load_mesh(tmp_path / "eval/base/teapot_back.glb").vertices
    assert np.allclose(back, tokenizer.to_mesh(ids).vertices, atol=1e-6)
    assert row["sheet"].is_file()
    assert f"{masks + codes:.0f}" in demo.table({"teapot": row}).splitlines()[1].split()


def test_the_ready_tokenizer_comes_before_training(tmp_path, monkeypatch, capsys):
    calls = []
    row = {"iou": 0.5, "objects": 24, "sheet": Path("sheet.png")}
    monkeypatch.setattr(demo, "make_data", lambda args, folder: folder / "voxels")
    monkeypatch.setattr(demo, "score", lambda args, folder, voxels, stage: calls.append(f"score {stage}") or row)
    monkeypatch.setattr(demo, "round_trip", lambda args, folder: calls.append("round trip") or row)
    monkeypatch.setattr(demo, "train", lambda args, folder, voxels, stage, start: calls.append(f"train {stage}"))
    assert demo.main(["--output_dir", str(tmp_path / "out")]) == 0
    assert calls == [
        "score base", "round trip", "train stage1", "train stage2", "score vae", "score stage1", "score stage2"
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("0.5000")[0].strip() for line in lines if "0.5000" in line] == [
        "base", "teapot", "base", "teapot", "VAE", "stage 1", "stage 2"
    ]  # fmt: skip
