"""What --tryrun says of memory, of Muon, of a codebook without codes, and of a run that continues."""

import re

import pytest
import torch
from helpers import VQ, run, tiny_config

from trellis.trainers import memory
from trellis.trainers.memory import GIB, Need, lines, measure


class FakeTrainer:
    """A trainer of which `measure` asks no more than this. Each step notes its samples."""

    device = torch.device("cpu")
    batch_split = 4

    def __init__(self, micro_batch_size: int):
        self.micro_batch_size, self.steps = micro_batch_size, []

    def batches(self):
        yield {"ss": torch.arange(3), "sample_ids": torch.arange(3)}

    def run_step(self, batch):
        assert self.batch_split == 1 and len(batch["ss"]) == len(batch["sample_ids"])
        self.steps.append(len(batch["ss"]))


@pytest.fixture
def machine(monkeypatch):
    """Memory of a process that held 3 GiB before, and needs 1 GiB and 0.5 GiB a sample; 20 GiB are free."""
    held = {"now": 3 * GIB}

    def peak(trainer, batch, samples):
        trainer.run_step({name: value[torch.arange(samples) % 3] for name, value in batch.items()})
        held["now"] = max(held["now"], (1 + samples / 2) * GIB)
        return held["now"]

    monkeypatch.setattr(memory, "_peak_of_step", peak)
    monkeypatch.setattr(memory, "_resident", lambda: held["now"])
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * GIB)
    return held


def test_a_line_through_two_sizes(machine):
    machine["now"] = 0
    trainer = FakeTrainer(micro_batch_size=16)
    need = measure(trainer)
    assert trainer.steps == [1, 1, 2] and trainer.batch_split == 4
    assert (need.base, need.sample) == (1 * GIB, 0.5 * GIB)
    assert need.of(16) == 9 * GIB and need.limit == 22 * GIB
    assert need.most() == int((0.92 * 22 - 1) / 0.5)


def test_what_was_held_before_hides_small_steps_and_is_not_taken_for_nothing(machine):
    trainer = FakeTrainer(micro_batch_size=16)
    need = measure(trainer)
    assert trainer.steps == [1, 1, 2, 4, 8]  # 4 samples need what was held: 3 GiB
    assert need.of(8) == 5 * GIB  # as measured
    small = measure(FakeTrainer(micro_batch_size=2))
    assert small.sample is None and small.most() is None
    (text,) = lines(small, 2, 2)
    assert "takes too little to be seen" in text


def test_what_does_not_fit_is_said_with_the_split_that_does():
    need = Need(1 * GIB, 0.5 * GIB, (1, 2), 6 * GIB, "allocated on the GPU")
    assert need.most() == 9
    (text,) = lines(need, 8, 16)
    assert "8 at once, as configured, take about 5.00 GiB; about 9 would fit into the 6.0 GiB" in text
    _, warning = lines(need, 16, 16)
    assert warning.startswith("WARNING: that does not fit into the 6.0 GiB") and "batch_split to 2," in warning
    _, warning = lines(need, 30, 30)
    assert "batch_split to 5," in warning  # 4 does not divide 30
    _, warning = lines(Need(7 * GIB, GIB, (1, 2), 6 * GIB, "x"), 1, 1)
    assert "not even one sample fits" in warning


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_line_meets_a_step_of_the_configured_size(data_dir, write_config, tmp_path):
    import train

    config = tiny_config(batch_size=16, mix_precision_mode=None)
    config["models"]["encoder"]["args"]["channels"] = [32, 64, 64]
    config["models"]["decoder"]["args"]["channels"] = [64, 64, 32]
    flags = ["--config", write_config(config), "--data_dir", data_dir, "--output_dir", str(tmp_path / "run")]
    args = train.parse_args(flags)
    trainer = train.build_trainer(args, train.read_config(args, 1), torch.device("cuda", 0))
    trainer.build_training_state()
    need = measure(trainer)
    found = memory._peak_of_step(trainer, next(trainer.batches()), 16)
    assert need.of(16) == pytest.approx(found, rel=0.15)
    assert need.most() > 16


# --- what --tryrun prints ---


def test_tryrun_says_what_a_run_would_do(data_dir, write_config, tmp_path, capsys):
    config = write_config(tiny_config(VQ, optimizer={"name": "Muon", "args": {"lr": 1e-2}}, max_steps=4))
    flags = ("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--tryrun") == 0
    out = capsys.readouterr().out
    assert "quantizer: k-means over latents of the data fills it when the run starts" in out
    # Each residual block has two convolutions, each level one more that resamples, and each end one.
    assert re.search(r"encoder: orthogonalized are 12 of \d+ tensors: input_layer.weight, ", out)
    assert "quantizer: none of 1 tensors is orthogonalized" in out
    assert out.count("memory: ") == 1 and "would go on" not in out and not (tmp_path / "run").exists()
    assert run(*flags, "--set", "trainer.args.max_steps=2") == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert run(*flags, "--tryrun") == 0
    out = capsys.readouterr().out
    assert "it would go on after step 2 of 4 with sample 8 in the order of the data" in out and "k-means" not in out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
