"""Schedules that last as long as their run, and what is said of those that do not."""

import copy

import pytest
import torch
from torch import nn

from trellis.trainers import optim
from trellis.trainers.schedule_length import LENGTHS, misfit, notes, with_length

LR = 0.5
SGD = {"name": "SGD", "args": {"lr": LR}}
STEPS = 12
OWN = {"LinearLR": {"start_factor": 1.0, "end_factor": 0.0}, "OneCycleLR": {"max_lr": 0.5, "final_div_factor": 1e9}}


def rates(spec: dict, steps: int = STEPS) -> list[float]:
    """Return lr at the start of each step, and after the last."""
    optimizer = optim.build_optimizer(SGD, {"weight": nn.Parameter(torch.zeros(1, 1))}, "none")
    scheduler = optim.build_lr_scheduler(spec, optimizer)
    found = [optim.current_lr(optimizer)]
    for _ in range(steps):
        optimizer.step()
        optim.step_lr_scheduler(scheduler, optimizer, torch.zeros(()))
        found.append(optim.current_lr(optimizer))
    return found


def spec(name: str, warmup_steps: int | None = None, **args) -> dict:
    return {"name": name, "args": args} | ({} if warmup_steps is None else {"warmup_steps": warmup_steps})


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("warmup_steps", [None, 4])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_that_is_not_given_ends_with_the_run(name, warmup_steps, null):
    key, own = LENGTHS[name], OWN.get(name, {})
    written = spec(name, warmup_steps, **own, **({key: None} if null else {}))
    before = copy.deepcopy(written)
    filled = with_length(written, STEPS)
    assert (
        filled is not None
        and filled == spec(name, warmup_steps, **own, **{key: STEPS - (warmup_steps or 0)})
        and written == before
    )
    assert with_length(filled, 99) == filled and misfit(filled, STEPS, "where") is None
    curve = rates(filled)
    if name == "OneCycleLR":  # its last rate is that of the last step
        assert max(curve) > 0.9 * LR > curve[warmup_steps or 0] > 0 and curve[-2] == pytest.approx(0, abs=1e-9)
    else:
        assert curve[-1] == pytest.approx(0, abs=1e-9)
        falling = curve[warmup_steps or 0 :]
        assert falling[0] == pytest.approx(LR) and falling == sorted(falling, reverse=True) and falling[-2] > 1e-3
    if not own:
        bare = {key: value for key, value in written.items() if key != "args"}
        assert with_length(bare, STEPS) == filled


@pytest.mark.parametrize(
    "written",
    [
        None,
        spec("ExponentialLR", gamma=0.9),
        spec("CosineAnnealingWarmRestarts", T_0=4),
        spec("StepLR", step_size=3),
        spec("ConstantLR"),
        spec("OneCycleLR", max_lr=1, epochs=3, steps_per_epoch=4),
        spec("CosineAnnealingLR", T_max=3),
        {"name": "CosineAnnealingLR", "args": 3},
        {"args": {}},
    ],
)
def test_what_is_given_and_what_has_no_length_is_left_alone(written):
    assert with_length(written, STEPS) == written


def test_a_warm_up_longer_than_the_run_leaves_one_step():
    assert with_length(spec("CosineAnnealingLR", 20), STEPS) == spec("CosineAnnealingLR", 20, T_max=1)


MISFITS = [
    (spec("CosineAnnealingLR", T_max=11), "lasts 11 steps (T_max), but", "leaves 12: lr would rise again", 12),
    (spec("CosineAnnealingLR", T_max=13), "lasts 13 steps (T_max)", "the training would end before it does", 12),
    (spec("CosineAnnealingLR", 4, T_max=12), "lasts 12 steps (T_max)", "8 after a warm-up of 4: the training", 8),
    (spec("PolynomialLR", total_iters=5), "lasts 5 steps (total_iters)", "lr would be 0 for the rest", 12),
    (spec("LinearLR", end_factor=0, total_iters=5), "lasts 5 steps (total_iters)", "lr would be 0 for the rest", 12),
    (spec("LinearLR", total_iters=13), "lasts 13 steps (total_iters)", "the training would end before it does", 12),
    (spec("OneCycleLR", max_lr=1, total_steps=11), "lasts 11 steps (total_steps)", "it has no lr for the steps", 12),
    (spec("OneCycleLR", 3, max_lr=1, total_steps=10), "lasts 10 steps (total_steps)", "the training would end", 9),
    (
        spec("OneCycleLR", max_lr=1, epochs=2, steps_per_epoch=7),
        "lasts 14 steps (epochs times steps_per_epoch)", "the training would end before it does", 12,
    ),
]  # fmt: skip


@pytest.mark.parametrize("written, length, outcome, fitting", MISFITS)
def test_a_length_that_does_not_fit_is_named_with_its_remedy(written, length, outcome, fitting):
    problem, remedy = misfit(written, STEPS, "where") or ("", "")
    assert problem.startswith(f"where.args: {written['name']} {length}") and outcome in problem
    assert "trainer.args.max_steps 12 leaves" in problem
    key = problem.partition("(")[2].partition(")")[0]
    assert remedy == f"leave {key} out, so that it lasts to the end of any max_steps, or set it to {fitting}"
    # The remedy helps.
    args = {name: value for name, value in written["args"].items() if name not in key}
    assert misfit(with_length({**written, "args": args}, STEPS), STEPS, "where") is None
    if " " not in key:
        assert misfit({**written, "args": {**args, key: fitting}}, STEPS, "where") is None


def test_restarts_must_begin_within_the_run():
    problem, remedy = misfit(spec("CosineAnnealingWarmRestarts", 4, T_0=9), STEPS, "where") or ("", "")
    assert problem.startswith("where.args.T_0 is 9, but trainer.args.max_steps 12 leaves 8 after a warm-up of 4")
    assert remedy == "set T_0 to at most 8"
    assert misfit(spec("CosineAnnealingWarmRestarts", 4, T_0=8), STEPS, "where") is None


@pytest.mark.parametrize(
    "written",
    [
        None,
        spec("LinearLR", start_factor=0.1, total_iters=5),  # a warm-up
        spec("StepLR", step_size=100),
        spec("ExponentialLR", 4, gamma=0.9),
        spec("OneCycleLR", max_lr=1, epochs=3, steps_per_epoch=4),
    ],
)
def test_other_lengths_are_the_users(written):
    assert misfit(written, STEPS, "where") is None


@pytest.mark.parametrize(
    "written, wanted",
    [
        (None, []),
        (spec("CosineAnnealingLR", 11), []),
        (spec("CosineAnnealingLR", 12), ["the warm-up of lr has 12 steps, all of the run: CosineAnnealingLR after it"]),
        (spec("CosineAnnealingLR", 13), ["the warm-up of lr has 13 steps, more than the 12 of the run"]),
        (
            {"name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 20}},
            ["the warm-up of lr has 20 steps, more than the 12"],
        ),
        ({"name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 12}}, []),
        (spec("StepLR", step_size=11), []),
        (spec("StepLR", 4, step_size=8), ["StepLR changes lr every 8 steps, but has 8: lr stays as it is"]),
        (spec("ConstantLR", factor=0.5, total_iters=12), ["ConstantLR multiplies lr by its factor to the end"]),
        (spec("MultiStepLR", milestones=[3, 11]), []),
        (spec("MultiStepLR", milestones=[99, 3, 12]), ["has 12 steps and does not reach 12, 99 of its milestones"]),
        (spec("CosineAnnealingWarmRestarts", T_0=4), []),
        (spec("CosineAnnealingWarmRestarts", T_0=4, T_mult=2), []),
        (spec("CosineAnnealingWarmRestarts", T_0=5), ["is cut off after 2 of 5 steps"]),
        (spec("CosineAnnealingWarmRestarts", 3, T_0=2, T_mult=2), ["is cut off after 3 of 8 steps"]),
    ],
)
def test_what_may_not_be_expected_is_noted(written, wanted):
    found = list(notes(written, STEPS))
    assert len(found) == len(wanted) and all(part in text for part, text in zip(wanted, found, strict=True))
