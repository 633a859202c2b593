"""Losses against formulas written out in float64 numpy."""

import math

import numpy as np
import pytest
import torch

from trellis.modules import losses


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "bce": lambda x, t: np.mean(-t * np.log(sigmoid(x)) - (1 - t) * np.log(sigmoid(-x))),
    "l1": lambda x, t: np.mean(np.abs(sigmoid(x) - t)),
    "l2": lambda x, t: np.mean((sigmoid(x) - t) ** 2),
    "l1_l2": lambda x, t: np.mean(np.abs(sigmoid(x) - t)) + np.mean((sigmoid(x) - t) ** 2),
    "dice": lambda x, t: 1 - (2 * np.sum(sigmoid(x) * t) + 1) / (np.sum(sigmoid(x)) + np.sum(t) + 1),
}


def batch(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 6, 6, 6, generator=generator) * 4
    return logits.to(dtype), (torch.rand(3, 1, 6, 6, 6, generator=generator) < 0.2).to(torch.uint8)


def test_every_loss_has_a_formula_here():
    assert losses.RECONSTRUCTION_LOSSES.keys() == FORMULAS.keys()


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
    want = {"bce": 5e3, "l1": 0.5, "l2": 0.5, "l1_l2": 1.0, "dice": 1 - 3 / 5}[name]
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
