"""--profile: a trace that names the parts of each step, a table, and nothing else."""

import json
from collections import Counter

import pytest
from helpers import tiny_config

import train
from trellis.trainers.profile import ACTIVE


@pytest.mark.parametrize("trainer", ["SparseStructureVaeTrainer", "SparseStructureVqVaeTrainer"])
def test_profile_traces_the_parts_of_five_steps(trainer, data_dir, tmp_path, write_config, capsys):
    config = write_config(tiny_config(trainer))
    run_dir = tmp_path / "run"
    flags = ["--config", config, "--data_dir", data_dir, "--output_dir", str(run_dir), "--device", "cpu", "--profile"]
    assert train.main(flags) == 0
    assert [str(path.relative_to(run_dir)) for path in run_dir.rglob("*.*")] == ["profile/trace.json"]
    events = json.loads((run_dir / "profile" / "trace.json").read_text())["traceEvents"]
    spans = Counter(event["name"] for event in events if event.get("ph") == "X")
    assert [spans[name] for name in ("forward", "backward", "clip", "optimizer", "ema")] == [ACTIVE] * 5
    printed = capsys.readouterr().out
    assert "aten::mkldnn_convolution" in printed or "aten::convolution" in printed
    assert f"trace for https://ui.perfetto.dev: {run_dir / 'profile' / 'trace.json'}" in printed
