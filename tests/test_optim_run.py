"""What a run makes of its batch and its length: `reference_batch`, and a schedule that follows max_steps."""

import math

import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, logged, run, tiny_config
from torch import nn

from benchmarks import runs
from trellis.trainers import optim, weights
from trellis.trainers.configuration import complete_config
from trellis.trainers.ema import EMA, ramped_rate

SGD = {"name": "SGD", "args": {"lr": 0.01}}
COSINE = {"name": "CosineAnnealingLR", "warmup_steps": 2}


# --- the batch ---


@pytest.mark.parametrize("lr_scaling", ["none", "rms"])
def test_the_factor_of_the_batch_stands_beside_the_groups_own(lr_scaling):
    def rates(*ratios: float) -> list[list[float]]:
        parameters = {"a.weight": nn.Parameter(torch.ones(2, 2)), "b.weight": nn.Parameter(torch.full((2, 2), 3.0))}
        optimizer = optim.build_optimizer(SGD, parameters, lr_scaling, lr_multipliers={"b": 0.5})
        for ratio in ratios:
            optim.scale_for_batch(optimizer, ratio)
        schedule = optim.build_lr_scheduler(
            {"name": "OneCycleLR", "args": {"max_lr": 0.5, "total_steps": 9}}, optimizer
        )
        found = []
        for _ in range(8):
            assert (
                optim.current_lr(optimizer) * optimizer.param_groups[0]["lr_scale"] == optimizer.param_groups[0]["lr"]
            )
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            optim.step_lr_scheduler(schedule, optimizer, torch.zeros(()))
        return found

    plain = rates()
    assert rates(1.0) == plain
    assert rates(4.0) == [[2 * rate for rate in step] for step in plain]
    assert rates(16.0, 4.0, 4.0) == rates(4.0)  # the last one counts


def test_averages_follow_a_larger_batch_as_they_follow_several_steps():
    """While the weights rest, κ steps of the rate equal one at batch ratio κ, once the rate no longer ramps up."""
    start, model = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), nn.Linear(4, 3, bias=False)
    averages = []
    for ratio, steps in ((1.0, 12), (4.0, 3), (0.5, 24)):
        ema = EMA({"model": model}, [0.5], ratio)
        ema.averages[0.5]["model"]["weight"].copy_(start)
        assert ramped_rate(0.5, 100) == 0.5
        for step in range(100, 100 + steps):
            ema.update(step)
        averages.append(ema.averages[0.5]["model"]["weight"])
    for average in averages:
        torch.testing.assert_close(average, start * 0.5**12 + model.weight * (1 - 0.5**12))


def trained(folder, data_dir, write_config, *flags: str, **args) -> dict:
    """The checkpoint of step 4 of a run."""
    config = tiny_config(max_steps=4, **{"optimizer": SGD, "ema_rate": 0.9, **args})
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", folder, *flags) == 0
    return checkpoint(folder, 4)


def test_a_run_at_its_reference_batch_is_the_run_without_one(data_dir, write_config, tmp_path):
    plain = trained(tmp_path / "plain", data_dir, write_config)
    assert_equal(trained(tmp_path / "same", data_dir, write_config, reference_batch=4), plain)


def test_a_run_at_four_times_the_reference_has_twice_the_lr(data_dir, write_config, tmp_path):
    """To the last bit, and the log keeps the configuration's lr."""
    scaled = trained(tmp_path / "scaled", data_dir, write_config, reference_batch=1, lr_scheduler=COSINE)
    twice = {"name": "SGD", "args": {"lr": 0.02}}
    plain = trained(tmp_path / "plain", data_dir, write_config, optimizer=twice, lr_scheduler=COSINE)
    for name in ("encoder_step0000004.pt", "decoder_step0000004.pt"):
        assert_equal(scaled[name], plain[name])
    key = "decoder_ema0.9_step0000004.pt"  # named as in the configuration
    assert any(not torch.equal(scaled[key][name], plain[key][name]) for name in plain[key])
    one, two = ([line["lr"] for line in logged(tmp_path / name) if "lr" in line] for name in ("scaled", "plain"))
    assert one == [rate / 2 for rate in two] and len(one) == 4


def test_a_run_that_continues_with_another_batch_is_scaled_to_that(data_dir, write_config, tmp_path):
    flags = ("--set", "trainer.args.max_steps=2")
    config = write_config(tiny_config(max_steps=4, optimizer=SGD, reference_batch=4))
    command = ("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*command, *flags) == 0
    assert run(*command, "--set", "trainer.args.batch_size=8") == 0
    for step, ratio in ((2, 1), (4, 2)):
        (group,) = checkpoint(tmp_path / "run", step)[f"misc_step000000{step}.pt"]["optimizer"]["param_groups"]
        assert group["lr"] == pytest.approx(0.01 * math.sqrt(ratio)) and group["relative_lr"] == 0.01


def test_tryrun_shows_what_is_scaled(data_dir, write_config, tmp_path, capsys):
    config = write_config(tiny_config(reference_batch=1, ema_rate=[0.9, 0.99]))
    assert run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / "run", "--tryrun") == 0
    text = capsys.readouterr().out
    assert "all: 1 group, lr 0.02" in text
    assert "4 samples per step, 4 times the reference_batch: lr times 2, ema_rate 0.9 becomes 0.6561, 0.99" in text


@pytest.mark.parametrize("batch_split, kept", [(1, "0.960596"), (2, "0.9801")])
def test_codebooks_move_as_far_over_a_step_whatever_its_micro_batches(
    batch_split, kept, data_dir, write_config, tmp_path, capsys
):
    """4 samples are four reference batches: 0.99⁴ is kept over a step, its root at each of two micro-batches."""
    config = tiny_config(VQ, reference_batch=1, batch_split=batch_split, revive_every=8)
    config["models"]["quantizer"]["name"] = "EMAVectorQuantizer"
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run(*flags, "--tryrun") == 0
    assert f"averages keep {kept} at each micro-batch" in capsys.readouterr().out
    trainer = runs.build_trainer([*map(str, flags), "--device", "cpu"], torch.device("cpu"))
    assert trainer.watch.window == 2  # steps, in place of 8


# --- the length ---


@pytest.mark.parametrize("max_steps, warmup_steps, T_max", [(10, None, 10), (10, 4, 6), (3, 4, 1)])
def test_a_schedule_without_a_length_lasts_as_long_as_the_run(max_steps, warmup_steps, T_max):
    schedule = {"name": "CosineAnnealingLR", "args": {"T_max": None}}
    if warmup_steps is not None:
        schedule["warmup_steps"] = warmup_steps
    config = tiny_config(max_steps=max_steps, lr_scheduler=schedule)
    completed = complete_config(config)
    assert completed["trainer"]["args"]["lr_scheduler"] == {**schedule, "args": {"T_max": T_max}}
    assert complete_config(completed) == completed and schedule["args"] == {"T_max": None}


def test_a_run_whose_schedule_would_change_its_length_does_not_continue(data_dir, write_config, tmp_path, capsys):
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    config = write_config(tiny_config(max_steps=4, lr_scheduler=COSINE))
    assert run("--config", config, *flags) == 0
    assert run("--config", config, *flags, "--set", "trainer.args.max_steps=6") == 1
    error = capsys.readouterr().err
    assert "trainer.args.lr_scheduler.args.T_max was 2 and is 4" in error
    assert "follows trainer.args.max_steps where it is not given, and that was 4 and is 6" in error
    assert """--set 'trainer.args.finetune_ckpt={"encoder": "DIR/encoder", """ in error
    for same in ({"T_max": 2}, {"T_max": None}):  # as the run began
        given = write_config(tiny_config(max_steps=4, lr_scheduler={**COSINE, "args": same}))
        assert run("--config", given, *flags) == 0
    assert run("--config", given, *flags, "--set", "trainer.args.lr_scheduler.args.T_max=2") == 0
    longer = ("--set", "trainer.args.max_steps=6", "--set", "trainer.args.lr_scheduler.args.T_max=2")
    assert run("--config", given, *flags, *longer) == 1
    error = capsys.readouterr().err
    assert "lasts 2 steps (T_max), but trainer.args.max_steps 6 leaves 4 after a warm-up of 2: lr would rise" in error
    assert "Restore what was, or start a new --output_dir" in error and "leave T_max out" not in error


@pytest.mark.parametrize("tryrun", [[], ["--tryrun"]])
def test_a_length_that_does_not_fit_is_an_error_before_anything_is_made(tryrun, write_config, tmp_path, capsys):
    config = write_config(tiny_config(lr_scheduler={**COSINE, "args": {"T_max": 4}}))
    flags = ("--config", config, "--data_dir", tmp_path / "none", "--output_dir", tmp_path / "run", *tryrun)
    assert run(*flags, "--set", "trainer.args.max_steps=1000") == 1
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1] == (
        "error: trainer.args.lr_scheduler.args: CosineAnnealingLR lasts 4 steps (T_max), but trainer.args.max_steps "
        "1000 leaves 998 after a warm-up of 2: lr would rise again; leave T_max out, so that it lasts to the end of "
        "any max_steps, or set it to 998"
    )
    assert not list((tmp_path / "run").glob("*"))


def test_a_run_that_began_with_such_a_length_goes_on_as_it_began(data_dir, write_config, tmp_path, monkeypatch, capsys):
    """Earlier versions took any length."""
    config = write_config(tiny_config(VQ, max_steps=6, i_save=3, lr_scheduler={**COSINE, "args": {"T_max": 2}}))

    def train(folder: str, *flags: str) -> int:
        return run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / folder, *flags)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "misfit", lambda *args: None)
        assert train("whole") == train("parts") == 0
    assert train("parts", "--ckpt", "3") == 0
    assert "lr would rise again; the run goes on with the schedule that it began with" in capsys.readouterr().out
    assert_equal(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_a_run_says_what_its_schedule_does_not_reach(data_dir, write_config, tmp_path, capsys):
    schedule = {"name": "MultiStepLR", "args": {"milestones": [2, 70]}}
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run", "--tryrun")
    assert run("--config", write_config(tiny_config(lr_scheduler=schedule)), *flags) == 0
    assert "note: MultiStepLR has 6 steps and does not reach 70 of its milestones" in capsys.readouterr().out


def test_a_run_continues_under_the_other_name_of_muon(data_dir, write_config, tmp_path):
    def flags(name: str, folder: str) -> tuple:
        config = write_config(tiny_config(max_steps=4, optimizer={"name": name, "args": {"lr": 0.01}}))
        return ("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path / folder)

    assert run(*flags("Muon", "whole")) == 0
    assert run(*flags("ConvMuon", "parts"), "--set", "trainer.args.max_steps=2") == 0
    assert run(*flags("Muon", "parts")) == 0
    assert_equal(checkpoint(tmp_path / "whole", 4), checkpoint(tmp_path / "parts", 4))
