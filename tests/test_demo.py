"""scripts/demo.py without its training: which meshes are held out, and how it ends."""

import csv
import json
import subprocess
from pathlib import Path

import pytest

from scripts import demo
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
