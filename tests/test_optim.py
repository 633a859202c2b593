"""Optimizers, schedules and clippers by name: what they do, that their state continues exactly, and mistakes."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from trellis.trainers import optim
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer
from trellis.utils.config import check_args
from trellis.utils.errors import ConfigError

LR = 0.5
SGD = {"name": "SGD", "args": {"lr": LR, "momentum": 0.5}}

# One set of arguments per class; the test below compares the names with torch's own list.
SCHEDULES = {
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 5, 5], "gamma": 0.5},
    "ConstantLR": {"factor": 0.25, "total_iters": 4},
    "LinearLR": {"start_factor": 0.25, "total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 12, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 12, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.6, "step_size_up": 3, "mode": "exp_range", "gamma": 0.9},
    "OneCycleLR": {"max_lr": 0.6, "total_steps": 14},
    "ReduceLROnPlateau": {"factor": 0.5, "patience": 1},
    "LinearWarmupLRScheduler": {"warmup_steps": 5},
}
NOT_FROM_JSON = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}  # take functions, schedules
OPTIMIZERS = [
    "Adafactor",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    *(["Muon"] if hasattr(torch.optim, "Muon") else []),  # from torch 2.9 on
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(3, 4, generator=generator) * scale) for name, scale in (("a", 1.0), ("b", 0.01))
    }


class Run:
    """An optimizer and a schedule over two tensors, with gradients and losses that follow from the step."""

    def __init__(self, optimizer: dict, scheduler: dict | None, lr_scaling: str = "none"):
        self.parameters = parameters()
        self.optimizer = optim.build_optimizer(optimizer, self.parameters, lr_scaling)
        self.scheduler = optim.build_lr_scheduler(scheduler, self.optimizer)

    def step(self, number: int) -> list[float]:
        """One step; the groups' lr it used."""
        used = [group["lr"] for group in self.optimizer.param_groups]
        generator = torch.Generator().manual_seed(number)
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        optim.step_lr_scheduler(self.scheduler, self.optimizer, torch.tensor(1.0 if number < 4 else 0.5))
        return used

    def saved(self) -> dict:
        """The state after a way through a file that is read without unpickling objects."""
        state = {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
        }
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state: dict) -> None:
        for name, value in state["parameters"].items():
            self.parameters[name].data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def assert_continues_exactly(*spec) -> list[list[float]]:
    """14 steps in a row equal 5, a save, and 9 more, in every bit. Returns the lr of each step."""
    whole = Run(*spec)
    rates = [whole.step(number) for number in range(14)]
    first, second = Run(*spec), Run(*spec)
    early = [first.step(number) for number in range(5)]
    second.load(first.saved())
    assert early + [second.step(number) for number in range(5, 14)] == rates
    for name, value in whole.parameters.items():
        assert torch.equal(value, second.parameters[name])
    return rates


# --- schedules ---


def test_every_schedule_of_torch_is_covered_here():
    classes = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type) and issubclass(value, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert classes - {"LRScheduler"} == (SCHEDULES.keys() | NOT_FROM_JSON) - {"LinearWarmupLRScheduler"}


@pytest.mark.parametrize("lr_scaling", ["none", "rms"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs_and_continues_exactly(name, lr_scaling):
    spec = {"name": name, "args": SCHEDULES[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.check_lr_scheduler(spec, SGD, "where")
        rates = assert_continues_exactly(SGD, spec, lr_scaling)
    assert len({first for first, *_ in rates}) > 1  # it moves


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"LinearWarmupLRScheduler", "ReduceLROnPlateau"}))
def test_after_a_warm_up_every_schedule_starts_at_its_beginning(name):
    spec = {"name": name, "args": SCHEDULES[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The epoch parameter in")  # of SequentialLR in older versions of torch
        rates = [rate for (rate,) in assert_continues_exactly(SGD, {**spec, "warmup_steps": 4})]
    alone = Run(SGD, spec)
    assert rates[:4] == pytest.approx([LR / 4, LR / 2, LR * 3 / 4, LR])
    assert rates[4:] == pytest.approx([alone.step(number)[0] for number in range(10)])


@pytest.mark.parametrize(
    "spec",
    [{"name": name, "args": args} for name, args in SCHEDULES.items()]
    + [{"name": "OneCycleLR", "args": SCHEDULES["OneCycleLR"], "warmup_steps": 3}],
)
def test_a_schedules_own_rates_are_relative_under_rms(spec):
    """max_lr, base_lr, eta_min and min_lr mean for each tensor what the configuration's lr means."""
    plain, scaled = Run(SGD, spec), Run(SGD, spec, "rms")
    scales = [value.detach().square().mean().sqrt().item() for value in scaled.parameters.values()]
    for number in range(14):
        (rate,) = plain.step(number)
        assert optim.current_lr(scaled.optimizer) == rate
        assert scaled.step(number) == pytest.approx([rate * scale for scale in scales], rel=1e-6)


def test_schedules_follow_their_formulas():
    def rates(spec, steps=8):
        run = Run(SGD, spec)
        return [run.step(number)[0] for number in range(steps)]

    assert rates(None) == [LR] * 8
    assert rates({"name": "ExponentialLR", "args": {"gamma": 0.9}}) == pytest.approx([LR * 0.9**n for n in range(8)])
    cosine = {"name": "CosineAnnealingLR", "args": {"T_max": 7, "eta_min": 0.1}}
    want = [0.1 + (LR - 0.1) * (1 + math.cos(math.pi * n / 7)) / 2 for n in range(8)]
    assert rates(cosine) == pytest.approx(want)
    warmup = {"name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 4}}
    assert rates(warmup) == pytest.approx([LR / 4, LR / 2, LR * 3 / 4] + [LR] * 5)


def test_plateau_halves_the_rate_only_when_the_loss_stops_falling():
    spec = {"name": "ReduceLROnPlateau", "args": {"factor": 0.5, "patience": 1}}
    run = Run(SGD, spec)
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0):
        optim.step_lr_scheduler(run.scheduler, run.optimizer, torch.tensor(loss))
        rates.append(optim.current_lr(run.optimizer))
    assert rates == [LR, LR, LR, LR / 2, LR / 2, LR / 2, LR / 4]


def test_plateau_follows_the_mean_over_ranks(monkeypatch):
    """On every rank the same loss, so the same rate: here this rank's falls, but not the mean."""
    run = Run(SGD, {"name": "ReduceLROnPlateau", "args": {"factor": 0.5, "patience": 0}})
    other = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(optim.dist_utils, "all_mean", lambda loss: (loss + next(other)) / 2)
    for loss in (2.0, 1.0, 0.0):
        optim.step_lr_scheduler(run.scheduler, run.optimizer, torch.tensor(loss))
    assert optim.current_lr(run.optimizer) == LR / 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_preview_is_what_a_run_would_do(name):
    spec = {"name": name, "args": SCHEDULES[name]}
    run = Run(SGD, spec)
    rates = []
    for _ in range(13):
        rates.append(optim.current_lr(run.optimizer))
        run.optimizer.step()
        if name != "ReduceLROnPlateau":  # depends on losses that no preview has
            optim.step_lr_scheduler(run.scheduler, run.optimizer, torch.zeros(()))
    assert optim.preview_schedule(SGD, spec, 12) == {step: rates[step] for step in (0, 3, 6, 12)}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "CosineLR"}, "'CosineLR', which torch.optim.lr_scheduler does not have; did you mean"),
        ({"name": "LRScheduler"}, "'LRScheduler', which torch.optim.lr_scheduler does not have"),
        ({"name": "ExponentialLR"}, "where.args does not build ExponentialLR"),
        ({"name": "ExponentialLR", "args": {"gama": 0.9}}, "where.args.gama is unknown"),
        ({"name": "ExponentialLR", "args": {"gamma": 0.9, "last_epoch": 3}}, "where.args.last_epoch is unknown"),
        ({"name": "ExponentialLR", "args": {"gamma": "x"}}, "where.args: ExponentialLR cannot take a step"),
        ({"name": "ExponentialLR", "args": {"gamma": "x"}, "warmup_steps": 3}, "where.args: ExponentialLR cannot"),
        ({"name": "ExponentialLR", "args": {"gamma": -1}}, "where.args: ExponentialLR leads to lr -0.5"),
        ({"name": "CosineAnnealingLR", "args": {"T_max": 0}}, "where.args: CosineAnnealingLR cannot take a step"),
        ({"name": "StepLR", "args": {"step_size": 0}}, "where.args: StepLR cannot take a step"),
        ({"name": "LambdaLR", "args": {"lr_lambda": "n"}}, "where.args does not build LambdaLR from JSON values"),
        ({"name": "SequentialLR", "args": {"schedulers": [1], "milestones": []}}, "does not build SequentialLR"),
        ({"name": "ChainedScheduler"}, "does not build ChainedScheduler"),
        ({"name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 0}}, "does not build LinearWarmupLRScheduler"),
        ({"name": "ReduceLROnPlateau", "warmup_steps": 3}, "warmup_steps cannot precede ReduceLROnPlateau"),
        ({"name": "ExponentialLR", "args": {"gamma": 0.9}, "warmup_steps": -1}, "where.warmup_steps is -1"),
        ({"name": "ExponentialLR", "args": {"gamma": 0.9}, "warmup_steps": 2.5}, "where.warmup_steps is 2.5"),
        (
            {"name": "ExponentialLR", "args": {"gamma": 0.9}, "warmup_step": 3},
            "where.warmup_step is unknown; did you mean warmup_steps?",
        ),
        ({"name": "ExponentialLR", "arg": {}}, "where.arg is unknown; did you mean args?"),
        ({"args": {"gamma": 0.9}}, "where.name is missing"),
    ],
)
def test_a_wrong_schedule_is_a_clear_error(spec, message):
    with pytest.raises(ConfigError) as error:
        optim.check_lr_scheduler(spec, SGD, "where")
    assert message in str(error.value)


def test_a_schedule_that_needs_momentum_is_checked_with_the_runs_own_optimizer():
    spec = {"name": "CyclicLR", "args": SCHEDULES["CyclicLR"]}
    with pytest.raises(ConfigError, match="momentum"):
        optim.check_lr_scheduler(spec, {"name": "Adagrad", "args": {"lr": LR}}, "where")
    optim.check_lr_scheduler(spec, {"name": "AdamW", "args": {"lr": LR}}, "where")


# --- optimizers ---


def test_every_optimizer_of_torch_is_covered_here():
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert classes - {"Optimizer", "LBFGS", "SparseAdam"} == set(OPTIMIZERS)


@pytest.mark.parametrize("lr_scaling", ["none", "rms"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_and_continues_exactly(name, lr_scaling):
    optim.check_optimizer({"name": name, "args": {"lr": 0.1}}, "where")
    assert_continues_exactly({"name": name, "args": {"lr": 0.1}}, None, lr_scaling)


def test_rms_scaling_multiplies_the_step_by_each_tensors_rms():
    def stepped(optimizer: dict, lr_scaling: str) -> dict[str, torch.Tensor]:
        run = Run(optimizer, None, lr_scaling)
        before = {name: value.detach().clone() for name, value in run.parameters.items()}
        run.step(0)
        return {name: value.detach() - before[name] for name, value in run.parameters.items()}

    rms = {name: np.sqrt(np.mean(np.square(value.detach().double().numpy()))) for name, value in parameters().items()}
    for spec in ({"name": "SGD", "args": {"lr": 0.1}}, {"name": "Adam", "args": {"lr": 0.1}}):
        plain, scaled = stepped(spec, "none"), stepped(spec, "rms")
        for name, scale in rms.items():
            torch.testing.assert_close(scaled[name], plain[name] * scale, rtol=1e-4, atol=1e-7)
    # Adam's first step is lr in every element, so here the step is lr times the tensor's RMS.
    for name, scale in rms.items():
        want = torch.full((3, 4), 0.1 * scale).float()
        torch.testing.assert_close(scaled[name].abs(), want, rtol=1e-3, atol=1e-7)


def test_a_scaling_of_older_configurations_is_a_clear_error():
    with pytest.raises(ConfigError, match='where.lr_scaling is "trust_ratio"; it must be "none" or "rms"'):
        check_args({"lr_scaling": "trust_ratio"}, SparseStructureVaeTrainer, "where")


@pytest.mark.parametrize("lr_scaling", ["none", "rms"])
def test_a_multiplier_is_a_factor_on_the_lr_of_a_models_tensors(lr_scaling):
    """Adam's steps are in proportion to lr: a run with twice the lr is the reference of a model with factor 2."""

    def tensors() -> dict[str, nn.Parameter]:
        a, b = parameters().values()
        return {"encoder.weight": a, "encoder.bias": b, "decoder.weight": nn.Parameter(a.detach() * 2)}

    def stepped(lr: float, multipliers: dict | None) -> dict[str, nn.Parameter]:
        weights = tensors()
        optimizer = optim.build_optimizer({"name": "Adam", "args": {"lr": lr}}, weights, lr_scaling, "", multipliers)
        schedule = optim.build_lr_scheduler({"name": "ExponentialLR", "args": {"gamma": 0.5}}, optimizer)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
            optim.step_lr_scheduler(schedule, optimizer, torch.zeros(()))
        assert optim.current_lr(optimizer) == lr / 16
        return weights

    got, plain, doubled = stepped(0.1, {"encoder": 2}), stepped(0.1, None), stepped(0.2, {})
    for key, value in got.items():
        want = (doubled if key.startswith("encoder") else plain)[key]
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(plain[key], doubled[key])


def test_rms_scaling_has_a_floor_for_tensors_that_start_at_zero():
    tensors = {
        "zero": nn.Parameter(torch.zeros(5)),
        "tiny": nn.Parameter(torch.full((5,), 1e-6)),
        "two": nn.Parameter(torch.full((5,), -2.0)),
    }
    optimizer = optim.build_optimizer({"name": "SGD", "args": {"lr": 0.1}}, tensors, "rms")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 0.2])
    assert [group["name"] for group in optimizer.param_groups] == list(tensors)
    for parameter in tensors.values():
        parameter.grad = torch.ones(5)
    optimizer.step()
    assert torch.allclose(tensors["zero"], torch.tensor(-1e-4))


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "AdamX"}, "where.name is 'AdamX', which is neither in torch.optim nor Muon; did you mean Adam"),
        ({"name": "Optimizer"}, "which is neither in torch.optim nor Muon"),
        ({"name": "LBFGS"}, "needs a closure"),
        ({"name": "SparseAdam"}, "cannot take a step with SparseAdam: SparseAdam does not support dense"),
        ({"name": "SGD", "args": {"params": []}}, "where.args.params is unknown to SGD"),
        ({"name": "AdamW", "args": {"beta": [0.9, 0.99]}}, "where.args.beta is unknown to AdamW; did you mean betas?"),
        ({"name": "AdamW", "args": {"lr": True}}, "where.args.lr is True; it must be a number > 0"),
        ({"name": "AdamW", "args": {"lr": "1e-3"}}, "where.args.lr is 1e-3; it must be a number > 0"),
        ({"name": "AdamW", "args": {"lr": 0}}, "where.args.lr is 0; it must be a number > 0"),
        ({"name": "AdamW", "args": {"lr": math.inf}}, "where.args.lr is inf; it must be a number > 0"),
        ({"name": "AdamW", "args": {"betas": [0.9]}}, "where.args does not build AdamW"),
        ({"name": "AdamW", "args": {"weight_decay": -1}}, "does not build AdamW: Invalid weight_decay"),
        ({"name": "AdamW", "args": {"fused": True, "foreach": True}}, "does not build AdamW"),
        ("AdamW", "where has type string; it must be an object"),
    ],
)
def test_a_wrong_optimizer_is_a_clear_error(spec, message):
    with pytest.raises(ConfigError) as error:
        optim.check_optimizer(spec, "where")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "spec, lr_scaling, multipliers, message",
    [
        ({"name": "AdamW", "args": {"lr": 0.1}}, "none", {"encoder": 2}, "in has 'encoder', which is not trained"),
        ({"name": "AdamW", "args": {"lr": 0.1}}, "none", {"decodr": 2}, "not trained here; did you mean decoder?"),
        ({"name": "AdamW"}, "none", {"decoder": 2}, "in.optimizer.args.lr is missing; lr_multipliers multiplies it"),
        ({"name": "AdamW"}, "rms", None, "in.optimizer.args.lr is missing; lr_scaling 'rms' multiplies it"),
    ],
)
def test_factors_of_the_lr_that_cannot_be_are_one_clear_error(spec, lr_scaling, multipliers, message):
    with pytest.raises(ConfigError) as error:
        optim.check_lr_factors(lr_scaling, multipliers, ["quantizer", "decoder"], spec, "in")
    assert message.replace("in has", "in.lr_multipliers has") in str(error.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_forgotten_as_if_they_had_never_moved(name):
    """The state of each row starts at zero in every optimizer but Rprop."""
    weight = nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    other = nn.Parameter(weight.detach().clone())
    optimizer = optim.build_optimizer({"name": name, "args": {"lr": 0.1}}, {"m.a": weight, "m.b": other}, "none")
    for _ in range(3):
        weight.grad, other.grad = torch.ones(6, 3), torch.ones(6, 3)
        optimizer.step()
    before = {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in optimizer.state.items()}
    rows = torch.tensor([4, 1])
    optim.forget_rows(optimizer, weight, rows)
    rest = torch.tensor([0, 2, 3, 5])
    for key, value in before.get(weight, {}).items():
        after = optimizer.state[weight][key]
        if value.ndim == 2 and len(value) == 6 and key != "step_size":
            assert torch.equal(after[rest], value[rest]) and (after[rows] == 0).all(), key
        else:
            assert torch.equal(after, value), key
    for key, value in before.get(other, {}).items():
        assert torch.equal(optimizer.state[other][key], value)
    optim.forget_rows(optimizer, nn.Parameter(torch.zeros(6, 3)), rows)  # not trained
    assert len(optimizer.state) == len(before)


def test_rms_scaling_needs_an_lr():
    with pytest.raises(ConfigError, match="args.lr is missing; lr_scaling 'rms' multiplies it"):
        optim.build_optimizer({"name": "AdamW"}, parameters(), "rms")


# --- clippers ---


def clip(clipper, *grads) -> tuple[float, list[np.ndarray]]:
    """The norm returned, and the gradients after. A gradient of None stays None."""
    weights = [nn.Parameter(torch.zeros(1 if grad is None else len(grad))) for grad in grads]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = None if grad is None else torch.tensor(grad, dtype=torch.float32)
    norm = clipper(weights)
    return norm.item(), [None if weight.grad is None else weight.grad.numpy() for weight in weights]


@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_adaptive_clipper_equals_a_numpy_reference(max_norm):
    spec = {"name": "AdaptiveGradClipper", "args": {"max_norm": max_norm, "clip_percentile": 70, "buffer_size": 5}}
    clipper = optim.build_grad_clipper(spec)
    rng = np.random.default_rng(0)
    norms: list[float] = []
    clipped = 0
    for step in range(40):
        grads = [rng.normal(size=4) * rng.uniform(0.1, 2), rng.normal(size=3), None]
        if step in (3, 20, 21):
            grads[0][1] = (np.inf, np.nan, -np.inf)[step % 3]
        bound = np.inf if max_norm is None else max_norm
        if step >= 5:
            bound = min(bound, np.nanpercentile([x if np.isfinite(x) else np.nan for x in norms[-5:]], 70))
        norm, after = clip(clipper, *grads)
        want = np.sqrt(sum((grad**2).sum() for grad in grads[:2]))
        norms.append(want)
        if np.isfinite(want):
            clipped += want > bound
            assert norm == pytest.approx(want, rel=1e-5)
            for grad, got in zip(grads[:2], after, strict=False):
                np.testing.assert_allclose(got, grad * min(1, bound / want), rtol=1e-4)
            assert after[2] is None
        else:
            assert not math.isfinite(norm)
    assert 5 < clipped < 35


def test_adaptive_clipper_with_no_finite_norm_yet_falls_back_to_max_norm():
    clipper = optim.AdaptiveGradClipper(max_norm=2.0, buffer_size=2)
    for _ in range(3):
        clip(clipper, [math.inf])
    assert clip(clipper, [8.0])[1][0] == pytest.approx([2.0], rel=1e-5)


def test_adaptive_clipper_continues_exactly():
    norms = np.random.default_rng(1).uniform(0.1, 5, 30)
    for split in (0, 2, 4, 17):
        make = lambda: optim.AdaptiveGradClipper(clip_percentile=60, buffer_size=4)  # noqa: E731
        whole, first, second = make(), make(), make()
        want = [clip(whole, [norm])[1][0].item() for norm in norms]
        got = [clip(first, [norm])[1][0].item() for norm in norms[:split]]
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert got + [clip(second, [norm])[1][0].item() for norm in norms[split:]] == want


def test_a_clipper_whose_settings_changed_starts_afresh():
    before = optim.AdaptiveGradClipper(buffer_size=3)
    for norm in (1.0, 2.0, 3.0, 4.0):
        clip(before, [norm])
    for state in (before.state_dict(), optim.NormClipper(1.0).state_dict()):
        clipper = optim.AdaptiveGradClipper(buffer_size=2)
        clipper.load_state_dict(state)
        assert [clip(clipper, [norm])[1][0].item() for norm in (9.0, 9.0)] == [9.0, 9.0]
    constant = optim.NormClipper(1.0)
    constant.load_state_dict(before.state_dict())
    assert clip(constant, [5.0])[1][0].item() == pytest.approx(1.0)


def test_numeric_clip_and_none():
    assert clip(optim.build_grad_clipper(2), [3.0, 0.0], [4.0])[0] == 5.0
    after = clip(optim.build_grad_clipper(2), [3.0, 0.0], [4.0])[1]
    np.testing.assert_allclose(np.concatenate(after), [1.2, 0, 1.6], rtol=1e-5)
    for limit in (5.5, None):
        norm, after = clip(optim.build_grad_clipper(limit), [3.0, 0.0], [4.0])
        assert norm == 5.0 and np.concatenate(after).tolist() == [3, 0, 4]
    assert optim.build_grad_clipper(2).state_dict() == {}


@pytest.mark.parametrize(
    "spec, message",
    [
        (0, "where is 0; the largest gradient norm must be > 0"),
        (-1.5, "where is -1.5; the largest gradient norm must be > 0"),
        ("1", "where has type string; it must be an object"),
        (True, "where has type boolean; it must be an object"),
        ({"name": "GradClipper"}, "where.name is 'GradClipper'; it can be AdaptiveGradClipper"),
        ({"name": "AdaptiveGradClipper", "args": {"maxnorm": 1}}, "maxnorm is unknown; did you mean max_norm?"),
        ({"name": "AdaptiveGradClipper", "args": {"max_norm": 0}}, "max_norm is 0; it must be number > 0 or null"),
        ({"name": "AdaptiveGradClipper", "args": {"clip_percentile": 101}}, "must be number > 0 and <= 100"),
        ({"name": "AdaptiveGradClipper", "args": {"clip_percentile": "x"}}, 'where.args.clip_percentile is "x"'),
        ({"name": "AdaptiveGradClipper", "args": {"buffer_size": 2.5}}, "buffer_size is 2.5; it must be integer >= 1"),
    ],
)
def test_a_wrong_clipper_is_a_clear_error(spec, message):
    with pytest.raises(ConfigError) as error:
        optim.build_grad_clipper(spec, "where")
    assert message in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_fused_step_unless_the_configuration_chooses():
    weight = {"weight": nn.Parameter(torch.ones(3, device="cuda"))}

    def defaults(name: str, **args) -> dict:
        return optim.build_optimizer({"name": name, "args": {"lr": 0.1, **args}}, weight, "none").defaults

    assert defaults("AdamW")["fused"] is True and defaults("AdamW", foreach=True)["fused"] is None
    assert "fused" not in defaults("Adamax")


def test_a_cpu_keeps_torchs_own_choice_of_step():
    weight = {"weight": nn.Parameter(torch.ones(3))}
    assert optim.build_optimizer({"name": "AdamW", "args": {"lr": 0.1}}, weight, "none").defaults["fused"] is None
