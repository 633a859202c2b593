"""Losses against formulas written out in float64 numpy."""

import math
import typing

import numpy as np
import pytest
import torch

from trellis.evaluation.metrics import voxel_metrics
from trellis.modules import losses


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def bce_iou(logits: np.ndarray, target: np.ndarray) -> float:
    """Object by object, with the union as 1 - (1 - p)(1 - t)."""
    missing = []
    for p, t in zip(sigmoid(logits), target, strict=True):
        missing.append(1 - (np.sum(p * t) + 1) / (np.sum(1 - (1 - p) * (1 - t)) + 1))
    return FORMULAS["bce"](logits, target) + np.mean(missing)


def focal(x: np.ndarray, t: np.ndarray) -> float:
    right = np.where(t > 0, sigmoid(x), sigmoid(-x))
    return np.mean(-((1 - right) ** 2) * np.log(right))


FORMULAS = {
    "bce": lambda x, t: np.mean(-t * np.log(sigmoid(x)) - (1 - t) * np.log(sigmoid(-x))),
    "l1": lambda x, t: np.mean(np.abs(sigmoid(x) - t)),
    "l2": lambda x, t: np.mean((sigmoid(x) - t) ** 2),
    "l1_l2": lambda x, t: np.mean(np.abs(sigmoid(x) - t)) + np.mean((sigmoid(x) - t) ** 2),
    "dice": lambda x, t: 1 - (2 * np.sum(sigmoid(x) * t) + 1) / (np.sum(sigmoid(x)) + np.sum(t) + 1),
    "bce_dice": lambda x, t: FORMULAS["bce"](x, t) + FORMULAS["dice"](x, t),
    "bce_iou": bce_iou,
    "focal": focal,
}


def batch(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 6, 6, 6, generator=generator) * 4
    return logits.to(dtype), (torch.rand(3, 1, 6, 6, 6, generator=generator) < 0.2).to(torch.uint8)


def test_every_loss_has_its_name_and_a_formula_here():
    names = typing.get_args(losses.ReconstructionLoss)
    assert names == tuple(losses.RECONSTRUCTION_LOSSES) and set(names) == FORMULAS.keys()
    assert all(loss.__name__ == name for name, loss in losses.RECONSTRUCTION_LOSSES.items())


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula(name):
    logits, target = batch()
    value = losses.RECONSTRUCTION_LOSSES[name](logits, target)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(FORMULAS[name](logits.double().numpy(), target.double().numpy()), rel=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_and_any_target_dtype_are_computed_in_fp32(name, dtype):
    logits, target = batch(dtype)
    loss = losses.RECONSTRUCTION_LOSSES[name]
    want = loss(logits.float(), target.float())
    for kind in (torch.uint8, torch.bool, torch.int64, torch.float16, torch.float32):
        assert torch.equal(loss(logits, target.to(kind)), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(logits, target), want)


@pytest.mark.parametrize("name", FORMULAS)
def test_extreme_logits_stay_finite_with_their_gradient(name):
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4]).view(1, 1, 1, 2, 2).requires_grad_()
    target = torch.tensor([0, 1, 1, 0]).view(1, 1, 1, 2, 2)
    value = losses.RECONSTRUCTION_LOSSES[name](logits, target)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()
    # Two of four voxels are wrong: by 1 in probability, by 1e4 in log-likelihood.
    want = {
        "bce": 5e3,
        "l1": 0.5,
        "l2": 0.5,
        "l1_l2": 1.0,
        "dice": 1 - 3 / 5,
        "bce_dice": 5e3 + 1 - 3 / 5,
        "bce_iou": 5e3 + 1 - 2 / 4,
        "focal": 5e3,
    }[name]
    assert value.item() == pytest.approx(want)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_perfect_reconstruction_costs_nothing(name):
    _, target = batch()
    for grid in (target, torch.zeros_like(target), torch.ones_like(target)):
        assert losses.RECONSTRUCTION_LOSSES[name](grid.float() * 200 - 100, grid).item() == pytest.approx(0, abs=1e-6)


def test_gradient_of_l1_has_the_factor_that_stalls_confident_mistakes():
    logits, target = batch()
    logits.requires_grad_()
    losses.l1(logits, target).backward()
    p = logits.detach().sigmoid()
    want = torch.where(target > 0, -1.0, 1.0) * p * (1 - p) / logits.numel()
    torch.testing.assert_close(logits.grad, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name, slope",
    [
        ("bce", 0.25),
        ("bce_dice", 0.25),
        ("bce_iou", 0.25),
        ("focal", 0.25),
        ("l1", 0),
        ("l2", 0),
        ("l1_l2", 0),
        ("dice", 0),
    ],
)
def test_which_losses_teach_a_voxel_that_is_confidently_wrong(name, slope):
    logits = torch.tensor([30.0, -30.0, 30.0, -30.0]).view(1, 1, 1, 2, 2).requires_grad_()
    target = torch.tensor([0, 0, 1, 1]).view(1, 1, 1, 2, 2)
    losses.RECONSTRUCTION_LOSSES[name](logits, target).backward()
    want = slope * torch.tensor([1.0, 0.0, 0.0, -1.0])
    torch.testing.assert_close(logits.grad.flatten(), want, rtol=1e-5, atol=1e-12)


def test_gradients_of_the_others_equal_finite_differences():
    logits, target = batch()
    logits, target = logits[:1, :, :2, :2, :2], target[:1, :, :2, :2, :2]
    for name, formula in FORMULAS.items():
        x = logits.clone().requires_grad_()
        losses.RECONSTRUCTION_LOSSES[name](x, target).backward()
        point, t = logits.double().numpy(), target.double().numpy()
        for index in np.ndindex(point.shape):
            step = np.zeros_like(point)
            step[index] = 1e-5
            slope = (formula(point + step, t) - formula(point - step, t)) / 2e-5
            assert x.grad[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-7), name


def test_dice_is_over_the_whole_batch():
    logits, target = batch()
    alone = torch.stack([losses.dice(x, t) for x, t in zip(logits, target, strict=True)]).mean()
    assert losses.dice(logits, target) != alone
    assert losses.dice(logits, target) == losses.dice(logits.view(1, 1, 18, 6, 6), target.view(1, 1, 18, 6, 6))


def test_bce_iou_is_bce_and_what_is_missing_of_the_objects_mean_iou():
    """Of a decided prediction and many voxels, up to the 1 that is added."""
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(3, 1, 32, 32, 32, generator=generator) < 0.3).to(torch.uint8)
    mistakes = torch.rand(target.shape, generator=generator) < torch.tensor([0.0, 0.1, 0.5]).view(3, 1, 1, 1, 1)
    logits = 40 * ((target > 0) ^ mistakes).float() - 20
    missing = losses.bce_iou(logits, target) - losses.bce(logits, target)
    want = 1 - voxel_metrics(logits, target)["iou"].double().mean().item()
    assert 0.3 < want < 0.7 and missing.item() == pytest.approx(want, abs=1e-4)


def test_bce_iou_is_a_mean_over_objects_that_the_batch_does_not_change():
    logits, target = batch()
    alone = torch.stack([losses.bce_iou(x[None], t[None]) for x, t in zip(logits, target, strict=True)])
    assert losses.bce_iou(logits, target).item() == pytest.approx(alone.mean().item(), rel=1e-6)


def test_kl_equals_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 2, 4, 3, 3, 3, generator=generator).unbind()
    posterior = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    want = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    value = losses.gaussian_kl(mean, logvar)
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    assert losses.gaussian_kl(mean.half(), logvar.half()).dtype == torch.float32
    assert losses.gaussian_kl(torch.zeros(5), torch.zeros(5)) == 0
    # N(2, e) from N(0, 1), by hand.
    assert losses.gaussian_kl(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx((4 + math.e - 2) / 2)
