"""Numbers gone bad: steps that are not finite leave no trace and are named, lost runs end, and weights are checked."""

import contextlib
import copy
import hashlib
import json
import math

import numpy as np
import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, course, logged, run, tiny_config
from torch import nn

import train
from trellis.datasets import batches
from trellis.datasets.sampler import Order, ResumableSampler
from trellis.datasets.sparse_structure import SparseStructure
from trellis.runs.checkpoint import Checkpoints
from trellis.trainers import ema, optim, skip
from trellis.trainers.bad_steps import STEPS_BETWEEN_LOOKS, BadSteps
from trellis.trainers.ema import EMA
from trellis.trainers.skip import SkippableOptimizer
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer
from trellis.trainers.vae.sparse_structure_vqvae import SparseStructureVqVaeTrainer
from trellis.trainers.verdict import Course, drop_by_chance, student_tail
from trellis.utils import dist_utils

OPTIMIZERS = {
    "AdamW": {},
    "AdamW amsgrad": {"amsgrad": True},
    "Adam": {},
    "SGD": {},
    "SGD momentum": {"momentum": 0.9, "dampening": 0.5},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adamax": {},
    "ASGD": {"t0": 1},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "Muon": {},
    "AdamW fused": {"fused": True},
    "SGD fused": {"fused": True, "momentum": 0.9},
}


@pytest.fixture(params=["host", "device"])
def way(request, monkeypatch) -> str:
    """Whether the host reads the flag, as on a CPU, or the device must go by it alone, as on a GPU."""
    if request.param == "device":
        for module in (skip, ema):
            monkeypatch.setattr(module, "host_knows", lambda flag: False)
    return request.param


# --- a skipped step leaves no trace ---


@contextlib.contextmanager
def no_waiting(forbidden: bool):
    """Let torch raise an error where the host waits for the GPU, if that is forbidden."""
    if not forbidden:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights(device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"m.conv": (4, 3, 3, 3, 3), "m.hidden": (6, 5), "m.bias": (7,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(device)) for name, shape in shapes.items()}


def walk(name: str, steps: list[bool], device: str = "cpu") -> tuple[dict, dict]:
    """Weights and optimizer state after steps, those with True skipped; gradients depend on the good ones alone."""
    named = weights(device)
    spec = {"name": name.split()[0], "args": {"lr": 0.1, **OPTIMIZERS[name]}}
    optimizer = optim.build_optimizer(spec, named, "none", hidden={"m.hidden"} if name == "Muon" else frozenset())
    skippable, number = SkippableOptimizer(optimizer), 0
    for bad in steps:
        for key, value in named.items():
            generator = torch.Generator().manual_seed(number)
            value.grad = torch.randn(value.shape, generator=generator).to(device)
            if bad and key != "m.hidden":
                value.grad.view(-1)[1:3] = torch.tensor([math.nan, math.inf], device=device)
        flag = torch.tensor(bad, device=device)
        with no_waiting(device == "cuda" and number > 0):
            skippable.step(flag)
        number += not bad
    skippable.settle()
    return {key: value.detach() for key, value in named.items()}, optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_of_any_optimizer_changes_nothing(name, way):
    good, bad = False, True
    want = walk(name, [good] * 4)
    assert_equal(want, walk(name, [good, bad, good, bad, bad, good, good, bad]), name)
    assert_equal(want, walk(name, [bad, good, good, good, good]), name)
    assert all(value.isfinite().all() for value in want[0].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_on_a_gpu_changes_nothing_and_waits_for_nothing(name):
    good, bad = False, True
    want = walk(name, [good] * 4, "cuda")
    assert_equal(want, walk(name, [good, bad, good, bad, bad, good, good, bad], "cuda"), name)
    assert_equal(want, walk(name, [bad, good, good, good, good], "cuda"), name)


def test_skipping_itself_changes_nothing():
    """Without a bad step, weights are those of the bare optimizer."""
    named = weights()
    optimizer = torch.optim.AdamW(named.values(), lr=0.1)
    for number in range(4):
        for value in named.values():
            value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    assert_equal(walk("AdamW", [False] * 4)[0], {key: value.detach() for key, value in named.items()})


def test_averages_stay_and_are_the_same_by_both_ways(monkeypatch):
    models = {"m": nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))}
    ways = [EMA(models, [0.9, 0.999], 2.0) for _ in range(3)]
    for step, bad in enumerate([False, True, False, True, False], 1):
        if not bad:
            with torch.no_grad():
                for value in models["m"].parameters():
                    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(step)))
            models["m"][1].num_batches_tracked += 1
            ways[0].update(step)
        ways[1].update(step, torch.tensor(bad))
        with monkeypatch.context() as patch:
            patch.setattr(ema, "host_knows", lambda flag: False)
            ways[2].update(step, torch.tensor(bad))
    assert_equal(ways[0].averages, ways[1].averages)
    assert_equal(ways[0].averages, ways[2].averages)


# --- in a trainer ---


def config_of(quantizer: str = "EMAVectorQuantizer", **args) -> dict:
    config = tiny_config(VQ, optimizer={"name": "Muon", "args": {"lr": 1e-3}}, **args)
    config["models"]["quantizer"]["name"] = quantizer
    config["models"]["quantizer"]["args"]["init"] = "uniform"
    return config


def trainer_of(config: dict, data_dir: str, folder) -> SparseStructureVqVaeTrainer:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    args = train.parse_args(["--config", str(path), "--data_dir", data_dir, "--output_dir", str(folder / "run")])
    trainer = train.build_trainer(args, train.read_config(args, 1), torch.device("cpu"))
    trainer.build_training_state()
    return trainer


def state_of(trainer) -> dict:
    trainer.skippable.settle()
    return copy.deepcopy(
        {
            "models": {name: model.state_dict() for name, model in trainer.models.items()},
            "optimizer": trainer.optimizer.state_dict()["state"],
            "averages": trainer.ema.averages,
            "watch": trainer.watch.state_dict(),
        }
    )


@pytest.mark.parametrize("quantizer", ["VectorQuantizer", "EMAVectorQuantizer"])
def test_a_bad_step_leaves_all_that_is_trained_as_it_was(quantizer, way, data_dir, tmp_path):
    trainer = trainer_of(config_of(quantizer, batch_split=2, max_steps=1000), data_dir, tmp_path)
    batches = trainer.batches()
    for _ in range(2):
        trainer.run_step(next(batches))
        trainer.step += 1
    before, batch = state_of(trainer), next(batches)
    assert before["watch"]["counts"].sum() > 0 and len(before["watch"]["vectors"])
    for value in (math.nan, math.inf):
        trainer.run_step({**batch, "ss": batch["ss"].float().index_fill(0, torch.tensor([3]), value)})
        assert_equal(before, state_of(trainer))
    assert (int(trainer.bad_steps.total), int(trainer.bad_steps.in_a_row)) == (2, 2)
    trainer.run_step(batch)
    assert int(trainer.bad_steps.in_a_row) == 0
    after = state_of(trainer)
    assert not torch.equal(
        before["models"]["encoder"]["input_layer.weight"], after["models"]["encoder"]["input_layer.weight"]
    )
    assert before["watch"]["counts"].sum() < after["watch"]["counts"].sum()


@pytest.fixture
def poisoned(monkeypatch):
    """Make the loss NaN in steps for which `poisoned.when(step, ss)` is true."""

    class Poison:
        when = staticmethod(lambda step, ss: False)

    for cls in (SparseStructureVaeTrainer, SparseStructureVqVaeTrainer):
        original = cls.training_losses

        def losses(self, *, ss, original=original, **batch):
            terms, status = original(self, ss=ss, **batch)
            if Poison.when(self.step + 1, ss):
                terms.loss = terms.loss * math.nan
            return terms, status

        monkeypatch.setattr(cls, "training_losses", losses)
    return Poison


def test_a_run_with_one_bad_object_goes_on_and_names_it(poisoned, data_dir, write_config, tmp_path, capsys):
    data = SparseStructure(data_dir, resolution=16)
    victim, grid = data.sha256(7), data[7]["ss"]
    poisoned.when = lambda step, ss: bool((ss == grid).flatten(1).all(1).any())
    path = write_config(config_of(max_steps=13, i_save=4, i_eval=5, i_log=3, ema_rate=[0.9]))
    flags = ("--config", path, "--data_dir", data_dir)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    rows = {row["step"]: row for row in logged(tmp_path / "run") if "loss" in row}
    order = Order(24, 0)
    with_it = [step for step in rows if 7 in order.items(4 * (step - 1), 4)]
    assert len(with_it) == 2 and [step for step, row in rows.items() if "objects" in row] == with_it
    for step in with_it:
        assert rows[step]["loss"] is None and victim in rows[step]["objects"]
        assert rows[step]["objects"] == sorted(data.sha256(i) for i in order.items(4 * (step - 1), 4).tolist())
    assert [row["bad_steps"] for row in rows.values()] == [sum(bad <= step for bad in with_it) for step in rows]
    out = capsys.readouterr().out
    assert out.count("BAD STEP") == 2 and f"no good step had {victim[:12]}…" in out
    files = checkpoint(tmp_path / "run", 13)
    for name, state in files.items():
        assert name.startswith("misc") or all(value.isfinite().all() for value in state.values()), name
    # The count is part of a checkpoint, and a resumed run goes on in the same bits.
    assert run(*flags, "--output_dir", tmp_path / "parts", "--set", "trainer.args.max_steps=5") == 0
    assert run(*flags, "--output_dir", tmp_path / "parts") == 0
    assert_equal(files, checkpoint(tmp_path / "parts", 13))


def test_a_checkpoint_due_at_a_bad_step_waits_for_a_good_one(poisoned, data_dir, write_config, tmp_path):
    poisoned.when = lambda step, ss: step in (4, 5, 8)
    path = write_config(tiny_config(max_steps=10, i_save=4, i_eval=100))
    assert run("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 0
    assert Checkpoints(tmp_path / "run").steps() == [0, 6, 9, 10]


def test_a_lost_run_ends_at_once_with_its_last_good_checkpoint(
    poisoned, data_dir, write_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trellis.trainers.bad_steps.STEPS_BETWEEN_LOOKS", 10)
    poisoned.when = lambda step, ss: step > 5
    config = tiny_config(max_steps=10000, i_save=3, i_eval=20000, i_log=10000, keep_last=1, max_bad_steps=6)
    flags = ["--config", write_config(config), "--data_dir", data_dir, "--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--device", "cpu", "--auto_retry", "3"]) == 1
    captured = capsys.readouterr()
    (error,) = captured.err.strip().splitlines()
    assert error.startswith("error: training has diverged: in 6 steps in a row, up to step 11")
    assert f"the last good checkpoint is step 3 of {tmp_path / 'run'}" in error
    assert Checkpoints(tmp_path / "run").latest() == 3
    assert captured.out.count("BAD STEP") == 3
    rows = [row for row in logged(tmp_path / "run") if "objects" in row]
    assert [row["step"] for row in rows] == list(range(6, 12))


def test_a_run_that_starts_lost_does_not_blame_the_rate(poisoned, data_dir, write_config, tmp_path, capsys):
    poisoned.when = lambda step, ss: True
    path = write_config(tiny_config(max_steps=100, i_eval=100, max_bad_steps=3, i_log=3))
    assert run("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "No step since the start was good, so it is not lr" in error and "initialized" in error


# SGD's clipped steps leave the loss of a VQ-VAE finite, at 1e20.
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "SGD on VQ", "Muon", "RMSprop", "Adagrad", "NAdam", "rms"])
def test_an_absurd_rate_ends_soon(name, data_dir, write_config, tmp_path, capsys):
    spec = {"name": "AdamW" if name == "rms" else name.split()[0], "args": {"lr": 1e6}}
    trainer = VQ if name.endswith("VQ") else "SparseStructureVaeTrainer"
    scaling = "rms" if name == "rms" else "none"
    config = tiny_config(
        trainer, optimizer=spec, lr_scaling=scaling, max_steps=1000, i_eval=1000, i_save=10, i_log=10, keep_last=1
    )
    assert run("--config", write_config(config), "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "training has diverged" in error and "optimizer.args.lr (now 1e+06)" in error
    assert Checkpoints(tmp_path / "run").steps() == [0]
    assert max(row["step"] for row in logged(tmp_path / "run")) <= 60


def test_a_bad_step_on_one_rank_is_bad_on_all(monkeypatch):
    other = torch.tensor([1.0, 0.0, 0.0])  # its loss is not finite
    monkeypatch.setattr(dist_utils, "all_mean", lambda tensor: (tensor + other) / 2)
    steps = BadSteps(5, 4, lambda step: np.arange(2), str, torch.device("cpu"))
    assert steps.judge(torch.tensor(0.5), torch.tensor(1.0), overflow_expected=False)
    assert int(steps.total) == 1


def test_an_overflow_of_fp16_is_skipped_but_not_bad():
    steps = BadSteps(5, 4, lambda step: np.arange(2), str, torch.device("cpu"))
    assert steps.judge(torch.tensor(0.5), torch.tensor(math.inf), overflow_expected=True)
    assert int(steps.total) == int(steps.in_a_row) == 0
    assert steps.judge(torch.tensor(math.nan), torch.tensor(1.0), overflow_expected=True)
    assert int(steps.total) == int(steps.in_a_row) == 1


def test_the_objects_of_all_ranks_are_known():
    ranks = [iter(ResumableSampler(10, 3, rank=rank, world_size=2, seed=5, start=4)) for rank in range(2)]
    order = Order(10, 5)
    for first in range(4, 40, 6):
        want = np.concatenate([next(rank).indices for rank in ranks])
        assert np.array_equal(order.items(first, 6), want)


# --- weights ---


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, vae_run, data_dir, write_config, tmp_path, capsys):
    saved = checkpoint(vae_run, 4)["encoder_step0000004.pt"]
    saved["input_layer.weight"][2, 0, 1] = value
    file = tmp_path / "encoder.pt"
    torch.save(saved, file)
    config = tiny_config(VQ, freeze=["encoder"], finetune_ckpt={"encoder": str(file)})
    flags = ("--data_dir", data_dir, "--output_dir", tmp_path / "run")
    assert run("--config", write_config(config), *flags) == 1
    error = capsys.readouterr().err
    assert f"{file}: input_layer.weight of encoder has 9 numbers of 108 that are not finite" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_latent_that_is_not_finite_names_its_object(data_dir, write_config, tmp_path, capsys, monkeypatch):
    from trellis.models.sparse_structure_vae import SparseStructureEncoder

    data = SparseStructure(data_dir, resolution=16)
    grid, original = data[7]["ss"], SparseStructureEncoder.forward

    def forward(self, x, *args, **kwargs):
        bad = (x == grid).flatten(1).all(1).view(-1, 1, 1, 1, 1)
        return torch.where(bad, math.nan, original(self, x, *args, **kwargs))

    monkeypatch.setattr(SparseStructureEncoder, "forward", forward)
    path = write_config(tiny_config(VQ))
    assert run("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert f"{data_dir}: the latent of {data.sha256(7)} has numbers that are not finite" in error


# --- data that changed ---


def named(number: int) -> str:
    return hashlib.sha256(bytes([number])).hexdigest()


def packed(folder, train_grids: np.ndarray, val_grids: np.ndarray) -> str:
    folder.mkdir(exist_ok=True)
    for first, split, grids in ((0, "train", train_grids), (100, "val", val_grids)):
        names = np.array([named(first + number) for number in range(len(grids))])
        bits = np.packbits(grids.reshape(len(grids), -1), axis=1)
        np.savez(folder / f"a_{split}.npz", bits=bits, sha256=names)
    return str(folder)


def test_data_that_changed_under_a_run_are_told_before_it_goes_on(write_config, tmp_path, capsys):
    rng = np.random.default_rng(0)
    grids, val = rng.random((9, 16, 16, 16)) < 0.1, rng.random((3, 16, 16, 16)) < 0.1
    data = packed(tmp_path / "data", grids[:8], val)
    flags = ["--config", write_config(tiny_config(max_steps=2)), "--output_dir", tmp_path / "run"]
    assert run(*flags, "--data_dir", data) == 0
    capsys.readouterr()
    assert run(*flags, "--data_dir", data, "--set", "trainer.args.max_steps=3") == 0
    assert "have changed" not in capsys.readouterr().out

    changed = grids.copy()
    changed[3, 0, 0] ^= True
    packed(tmp_path / "data", changed, val[:2])
    assert run(*flags, "--data_dir", data, "--set", "trainer.args.max_steps=4") == 0
    out = capsys.readouterr().out
    added, replaced, removed = (named(number)[:10] for number in (8, 3, 102))
    assert (
        f"the data have changed since step 3: training objects: 1 added: {added}…; "
        f"1 replaced (another grid, or another time of its file): {replaced}…\n"
    ) in out
    assert f"the data have changed since step 3: validation objects: 1 removed: {removed}…\n" in out
    assert out.index("have changed") < out.index("step 4/4")
    assert [step for step, _ in course(tmp_path / "run", 3)["last"]] == [2, 3]
    assert [step for step, _ in course(tmp_path / "run", 4)["last"]] == [4]  # other objects say nothing of these
    assert course(tmp_path / "run", 4)["objects"] is None

    elsewhere = packed(tmp_path / "other", changed[::-1], val[:2])
    assert run(*flags, "--data_dir", elsewhere, "--set", "trainer.args.max_steps=5") == 0
    assert f"--data_dir was {data} and is {elsewhere}" in capsys.readouterr().out


def test_more_loading_processes_than_a_machine_can_run_are_refused(data_dir, write_config, tmp_path, capsys):
    path = write_config(tiny_config(num_workers=10**6))
    assert run("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    assert "trainer.args.num_workers is 1000000, but each is a process" in capsys.readouterr().err


@pytest.mark.parametrize("free", [0, 2**30])
def test_too_little_shared_memory_ends_in_one_line(free, data_dir, write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batches, "_free_shm", lambda: free)

    def no_room(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)  # also in the processes that are forked
    path = write_config(tiny_config(num_workers=1))
    assert run("--config", path, "--data_dir", data_dir, "--output_dir", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"/dev/shm has {free >> 20} MiB free. Set trainer.args.num_workers to 0" in error


# --- a run that made its models worse ---


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 649])
def test_the_tail_of_students_distribution(degrees):
    """Against the integral of its density, and in the limit of many degrees the normal distribution."""
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    for t in (-2.0, 0.0, 0.7, 3.1):
        x = torch.linspace(0, t, 20001, dtype=torch.float64)
        density = (log_norm - (degrees + 1) / 2 * torch.log1p(x.square() / degrees)).exp()
        assert student_tail(t, degrees) == pytest.approx(0.5 - torch.trapezoid(density, x).item(), abs=1e-8)
    assert student_tail(2.5, 10**5) == pytest.approx(0.5 * math.erfc(2.5 / 2**0.5), rel=1e-3)


def test_a_drop_counts_if_the_spread_over_objects_cannot_make_it():
    generator = torch.Generator().manual_seed(0)
    spread = 0.02 * torch.randn(5, generator=generator, dtype=torch.float64)
    assert drop_by_chance(spread - spread.mean() - 0.0005) > 0.1  # the change of a first stage on five objects
    assert drop_by_chance(0.001 * spread - 0.0005) < 1e-3  # but equal drops of all objects are no chance
    assert drop_by_chance(spread - 0.5) < 1e-3
    assert drop_by_chance(torch.full((4,), -0.1, dtype=torch.float64)) == 0
    assert drop_by_chance(torch.tensor([-0.9], dtype=torch.float64)) == 1
    # Of 4000 pairs of runs that are equal, one in a hundred has a drop of this probability.
    noise = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    assert sum(drop_by_chance(row) < 1e-2 for row in noise) == pytest.approx(40, abs=20)


@pytest.mark.parametrize(
    "facts, scores, wanted",
    [
        ({}, [(0, 0.9, 0.8), (6, 0.5, 0.1)], "The codebook has collapsed: 10% of its codes are in use, 80% before"),
        ({"last_loss": 2.0}, [(0, 0.9, 0.8), (6, 0.5, 0.8)], "The loss went from 1 to 2: lower trainer.args.optimizer"),
        (
            {"first_loss": math.nan, "last_loss": math.nan, "bad_steps": 1},
            [(0, 0.9, 0.8), (2, 0.5, 0.8)],
            "It took fewer than two good steps since it was started, and 1 step was not finite: train for longer",
        ),
        ({}, [(0, 0.9, 0.8), (3, 0.4, 0.8), (6, 0.5, 0.8)], "The score still rises (0.4000 at step 3, 0.5000 now)"),
        ({"trained": ["quantizer"]}, [(0, 0.9, 0.8), (6, 0.5, 0.8)], "start the next stage from step 0"),
        ({}, [(0, 0.9, 0.8), (6, 0.5, 0.8)], "lower trainer.args.ema_rate"),
        ({}, [(0, 0.9, 0.8), (6, 0.8985, 0.8)], None),
    ],
)
def test_the_advice_follows_the_cause(facts, scores, wanted):
    course = Course("iou")
    for step, iou, usage in scores:
        course.add(step, {"iou": iou, "codebook_usage": usage}, iou + torch.linspace(-0.01, 0.01, 6))
    defaults = {"trained": ["encoder", "decoder"], "lr": 1e-3, "first_loss": 1.0, "last_loss": 0.5, "bad_steps": 0}
    text = course.verdict(**{**defaults, **facts})
    assert text is None if wanted is None else wanted in text


def test_the_loss_at_the_start_and_at_the_end_is_that_of_different_steps():
    for steps in (0, 1, 2, 3, 40, 99, 150, 1000):
        bad = BadSteps(3, 1, lambda step: np.zeros(1, np.int64), str, torch.device("cpu"))
        losses = np.random.default_rng(0).random(steps)
        rows = [{"step": 1 + i, "loss": loss, "grad_norm": 1.0, "bad_steps": 0} for i, loss in enumerate(losses)]
        for start in range(0, steps, 7):
            assert bad.report(rows[start : start + 7]) == []
        count = min(STEPS_BETWEEN_LOOKS, steps // 2)
        wanted = (losses[:count].mean(), losses[-count:].mean()) if count else (math.nan, math.nan)
        assert bad.mean_losses() == pytest.approx(wanted, nan_ok=True)
