"""Precision modes: their names, fp16 loss scaling, and what stays fp32."""

import copy
import io

import pytest
import torch
from helpers import solid_grids, tiny_config
from torch import nn

from trellis.models import build
from trellis.modules import fused
from trellis.trainers.precision import Precision
from trellis.trainers.skip import SkippableOptimizer

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MODES = [
    (None, "bfloat16", "fp32"),
    (None, "float16", "fp32"),
    ("amp", "bfloat16", "bf16"),
    ("amp", "float16", "fp16"),
    ("inflat_all", "float16", "fp16"),
]


@pytest.fixture
def scaled(monkeypatch):
    """fp16 with its loss scale at work on CPU tensors; autocast is not entered."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    return lambda **args: Precision("inflat_all", "float16", torch.device("cuda"), **args)


def take_step(precision: Precision, optimizer: torch.optim.Optimizer) -> None:
    """As the training loop does: a gradient that is not finite is skipped."""
    grads = [value.grad for group in optimizer.param_groups for value in group["params"]]
    skip = ~torch.stack([grad.isfinite().all() for grad in grads]).all()
    precision.step(SkippableOptimizer(optimizer), skip)


def regression(precision: Precision, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        precision.backward((model(x) - 1).square().mean())
        precision.unscale(optimizer)
        take_step(precision, optimizer)
    return model


@pytest.mark.parametrize("mode, dtype, asked", MODES)
def test_on_a_cpu_everything_runs_in_fp32_and_says_so(mode, dtype, asked):
    precision = Precision(mode, dtype, CPU)
    assert precision.name == "fp32" and precision.dtype == torch.float32
    assert precision.note == (None if asked == "fp32" else f"{asked} was asked for; on a CPU training runs in fp32")
    assert not precision.skips_overflow and not precision.hopeless and precision.state_dict() == {}
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
    model = regression(precision, 5)
    torch.manual_seed(0)
    plain = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for number in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        (plain(x) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, plain.weight) and torch.equal(model.bias, plain.bias)


@pytest.mark.parametrize("mode, dtype, name", MODES)
def test_names_on_a_gpu(mode, dtype, name, scaled):
    precision = Precision(mode, dtype, torch.device("cuda"))
    assert precision.name == name and precision.note is None
    assert precision.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert precision.skips_overflow == (name == "fp16")


def test_the_loss_scale_grows_a_little_each_step_and_halves_on_overflow(scaled):
    precision = scaled(scale_growth=0.25)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scales = []
    for factor in (2.0, 2.0, float("inf"), 2.0, float("nan")):
        before = weight.detach().clone()
        optimizer.zero_grad()
        precision.backward((weight * factor).sum())
        scale = precision.scaler.get_scale()
        scales.append(scale)
        if factor == 2.0:
            assert torch.allclose(weight.grad, torch.full((3,), 2.0 * scale))
        precision.unscale(optimizer)
        if factor == 2.0:
            torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))  # what the clipper sees
        take_step(precision, optimizer)
        if factor == 2.0:
            torch.testing.assert_close(weight.detach(), before - 2.0)
        else:
            assert torch.equal(weight, before)
    scales.append(precision.scaler.get_scale())
    growth = 2.0**0.25
    want = [2.0**20, growth, growth, 0.5, growth, 0.5]
    assert scales == pytest.approx([torch.tensor(want[: n + 1]).prod().item() for n in range(6)], rel=1e-5)


def test_the_default_growth_doubles_the_scale_in_a_thousand_steps(scaled):
    precision = scaled()
    assert precision.scaler.get_growth_factor() ** 1000 == pytest.approx(2.0)
    assert precision.scaler.get_growth_interval() == 1 and precision.scaler.get_backoff_factor() == 0.5


def test_scaling_leaves_no_trace_in_fp32_weights(scaled):
    """The scale starts at a power of two, so the first step is exact; later ones are close."""
    assert torch.equal(regression(scaled(), 1).weight, regression(Precision(None, "float16", CPU), 1).weight)
    torch.testing.assert_close(regression(scaled(), 9).weight, regression(Precision(None, "float16", CPU), 9).weight)


def test_the_scale_continues_exactly(scaled):
    first, second = scaled(), scaled()
    regression(first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state_dict() == first.state_dict() != scaled().state_dict()
    fp32 = Precision(None, "float16", CPU)
    fp32.load_state_dict(first.state_dict())  # a run that goes on in fp32 has no use for it
    assert fp32.state_dict() == {}
    second.load_state_dict(fp32.state_dict())
    assert second.state_dict() == first.state_dict()


def test_endless_overflow_is_noticed(scaled):
    precision = scaled()
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for number in range(31):
        assert not precision.hopeless, number
        precision.backward((weight * float("inf")).sum())
        precision.unscale(optimizer)
        take_step(precision, optimizer)
    assert precision.hopeless and weight == 1


def test_prepare_makes_masters_fp32_and_leaves_the_torso_to_the_trainer():
    spec = copy.deepcopy(tiny_config()["models"]["encoder"])
    spec["args"]["use_fp16"] = True
    encoder = build(spec)
    assert encoder.use_fp16
    Precision("inflat_all", "float16", CPU).prepare(encoder.half())
    assert not encoder.use_fp16 and {value.dtype for value in encoder.parameters()} == {torch.float32}


def test_trellis_callers_switch_the_precision_of_a_torso():
    """By the method names of its published code."""
    encoder = build(tiny_config()["models"]["encoder"])
    encoder.convert_to_fp16()
    assert encoder.use_fp16 and {value.dtype for value in encoder.parameters()} == {torch.float32}
    encoder.convert_to_fp32()
    assert not encoder.use_fp16


# --- outputs and gradients ---


def vae(seed: int = 0, **args) -> tuple[nn.Module, nn.Module]:
    """Models whose second convolutions are not zero, so that every layer counts. args: of both, in place of tiny's."""
    torch.manual_seed(seed)
    models = [build({**spec, "args": {**spec["args"], **args}}) for spec in tiny_config()["models"].values()]
    for model in models:
        for value in model.parameters():
            if value.ndim == 5 and not value.any():
                nn.init.normal_(value, std=0.05)
    return tuple(models)


def check_outputs(autocast, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Inside, the torso computes in dtype; latents and logits are fp32 and close to plain fp32's."""
    ss = torch.from_numpy(solid_grids(4, 16, 0))[:, None].float()
    encoder, decoder = vae()
    with torch.no_grad():
        want_z, want_mean, want_logvar = encoder(ss, return_raw=True)
        want_logits = decoder(want_z)
    encoder, decoder = encoder.to(device), decoder.to(device)
    inside, ends = [], []
    for block in (encoder.blocks[0], decoder.middle_block[0]):
        block.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    for end in (encoder.input_layer, encoder.out_layer[2], decoder.input_layer, decoder.out_layer[2]):
        end.register_forward_hook(lambda module, args, out: ends.append(out.dtype))
    with torch.no_grad(), autocast:
        z, mean, logvar = encoder(ss.to(device), return_raw=True)
        logits = decoder(want_z.to(device))
    assert inside == [dtype] * 2
    if device == "cpu":  # a GPU's kernels take first and last layers apart; tests/test_fused.py has their precision
        assert ends == [torch.float32] * 4
    for got, want in ((z, want_z), (mean, want_mean), (logvar, want_logvar), (logits, want_logits)):
        assert got.dtype == torch.float32
        error = (got.cpu() - want).norm() / want.norm()
        assert error < tolerance
        assert dtype == torch.float32 or error > 1e-6  # reduced precision was really used


def test_bf16_autocast_leaves_latents_and_logits_in_fp32():
    check_outputs(torch.autocast("cpu", torch.bfloat16), "cpu", torch.bfloat16, 5e-2)
    check_outputs(Precision("amp", "bfloat16", CPU).autocast(), "cpu", torch.float32, 1e-6)


@needs_gpu
@pytest.mark.parametrize(
    "mode, dtype, tolerance", [("amp", "bfloat16", 5e-2), ("amp", "float16", 1e-2), (None, "float16", 1e-4)]
)
def test_outputs_on_a_gpu(mode, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    precision = Precision(mode, dtype, torch.device("cuda"))
    check_outputs(precision.autocast(), "cuda", precision.dtype, tolerance)


def gradients(precision: Precision, seed: int) -> torch.Tensor:
    """The gradient of all parameters as one vector, after the steps that fp16 skips until its loss scale fits.

    Layers of 32 channels: a layer norm over 4 or 8 divides by small deviations and multiplies every rounding, until
    bf16's error in the gradient is 5 to 40 %, in the plain modules too.
    """
    ss = torch.from_numpy(solid_grids(4, 16, 0))[:, None].float().to(precision.device)
    models = [model.to(precision.device) for model in vae(seed, channels=[32, 32])]
    optimizer = torch.optim.SGD([value for model in models for value in model.parameters()], lr=0.0)
    encoder, decoder = models
    for _ in range(20):
        optimizer.zero_grad()
        with precision.autocast():
            loss = nn.functional.binary_cross_entropy_with_logits(decoder(encoder(ss)), ss)
        precision.backward(loss)
        precision.unscale(optimizer)
        grads = [value.grad for value in optimizer.param_groups[0]["params"]]
        assert {grad.dtype for grad in grads} == {torch.float32}
        grad = torch.cat([grad.flatten() for grad in grads])
        if grad.isfinite().all():
            break
        take_step(precision, optimizer)
    return grad.double()


@needs_gpu
@pytest.mark.parametrize("mode, dtype", [("amp", "bfloat16"), ("inflat_all", "float16")])
def test_gradients_of_reduced_precision_are_fp32_and_close(mode, dtype, monkeypatch):
    """Errors are a few units of rounding, and no larger than the plain modules' under the same autocast."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device, usable = torch.device("cuda"), fused.usable

    def error(seed: int, quick: bool) -> float:
        monkeypatch.setattr(fused, "usable", usable if quick else lambda x: False)
        want, got = (gradients(Precision(kind, dtype, device), seed) for kind in (None, mode))
        return ((got - want).norm() / want.norm()).item()

    unit = torch.finfo(getattr(torch, dtype)).eps / 2  # the largest relative error of one rounding
    errors = {quick: torch.tensor([error(seed, quick) for seed in range(4)]) for quick in (False, True)}
    assert errors[True].max() < 4 * unit
    assert errors[True].square().mean().sqrt() < 1.5 * errors[False].square().mean().sqrt()


@needs_gpu
def test_a_published_model_runs_its_torso_in_fp16_outside_training():
    spec = copy.deepcopy(tiny_config()["models"]["encoder"])
    spec["args"]["use_fp16"] = True
    encoder = build(spec).cuda()
    inside = []
    encoder.blocks[0].register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    ss = torch.from_numpy(solid_grids(1, 16, 0))[:, None].cuda()
    assert encoder(ss).dtype == torch.float32 and inside == [torch.float16]


@needs_gpu
def test_codes_are_searched_in_fp32_under_fp16():
    quantizer = build({"name": "VectorQuantizer", "args": {"n_embed": 64, "embed_dim": 4, "latent_channels": 4}}).cuda()
    z = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0)) / 64
    codes = quantizer.embeddings.weight.detach().cpu().double()
    distance = (z.permute(0, 2, 3, 4, 1).double()[..., None, :] - codes).square().sum(-1)
    with Precision("amp", "float16", torch.device("cuda")).autocast():
        result = quantizer(z.cuda())
    assert result.codes.dtype == torch.float32 and torch.equal(result.indices.cpu(), distance.argmin(-1))
