"""The GPU's kernels and the fused layers on top of them, against the plain modules.

With a GPU the kernels run on it. Without one they run in Triton's interpreter.
"""

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, solid_grids, tiny_config
from safetensors.torch import save_file
from torch import nn

pytest.importorskip("triton")

import train  # noqa: E402
from trellis.models import build  # noqa: E402
from trellis.modules import conv, fused  # noqa: E402
from trellis.modules.blocks3d import ResBlock3d  # noqa: E402
from trellis.modules.kernels import norm_silu as norm_kernels  # noqa: E402
from trellis.modules.kernels import one_channel  # noqa: E402
from trellis.modules.norm import ChannelLayerNorm32  # noqa: E402
from trellis.trainers.optim import build_optimizer  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAST = torch.channels_last_3d
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def full_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.contiguous(memory_format=LAST) if x.ndim == 5 else x


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


# --- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [5, 8, 32, 48])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_silu_and_its_gradients(channels, shifted, residual):
    x, grad, more = draw(2, channels, 5, 3, 4), draw(2, channels, 5, 3, 4, seed=1), draw(2, channels, 5, 3, 4, seed=2)
    shift, gamma, beta = draw(channels, seed=3), draw(channels, seed=4), draw(channels, seed=5)
    wide = [t.double().requires_grad_() for t in (x, shift, gamma, beta)]
    rows = (wide[0] + (wide[1].view(-1, 1, 1, 1) if shifted else 0)).movedim(1, -1)
    y = F.silu(F.layer_norm(rows, (channels,), wide[2], wide[3], 1e-5)).movedim(-1, 1)
    y.backward(grad.double())

    given = shift if shifted else None
    assert relative(norm_kernels.norm_silu(x, given, gamma, beta, 1e-5), y.detach()) < 1e-6
    grad_x, grad_gamma, grad_beta, grad_bias = norm_kernels.norm_silu_backward(
        x, given, gamma, beta, 1e-5, grad, more if residual else None
    )
    torch.testing.assert_close(grad_x.double(), wide[0].grad + (more.double() if residual else 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_gamma.double(), wide[2].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_beta.double(), wide[3].grad, rtol=1e-4, atol=1e-5)
    expected_bias = (more if residual else wide[0].grad).double().sum((0, 2, 3, 4))
    torch.testing.assert_close(grad_bias.double(), expected_bias, rtol=1e-4, atol=1e-4)


def test_norm_silu_rounds_once():
    """In half precision the result is that of float32 arithmetic on the same input, within one rounding."""
    x, gamma, beta = draw(2, 32, 4, 4, 4).bfloat16(), draw(32, seed=1), draw(32, seed=2)
    half = norm_kernels.norm_silu(x, None, gamma, beta, 1e-5)
    full = norm_kernels.norm_silu(x.float(), None, gamma, beta, 1e-5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=2**-7, atol=0)  # the interpreter rounds towards zero


def test_without_parameter_gradients_the_rest_is_the_same():
    x, grad, gamma, beta = draw(1, 32, 4, 4, 4), draw(1, 32, 4, 4, 4, seed=1), draw(32, seed=2), draw(32, seed=3)
    full = norm_kernels.norm_silu_backward(x, None, gamma, beta, 1e-5, grad)
    lean = norm_kernels.norm_silu_backward(x, None, gamma, beta, 1e-5, grad, needs_sums=False)
    assert torch.equal(full[0], lean[0]) and lean[1:] == (None, None, None)


def test_kernels_refuse_another_layout():
    x = torch.zeros(2, 8, 3, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match="need channels_last_3d"):
        norm_kernels.norm_silu(x, None, torch.ones(8), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="need channels_last_3d"):
        one_channel.contract(x, torch.ones(8, 27), torch.ones(1))


@pytest.mark.parametrize("channels", [5, 8, 32])
def test_one_channel_convolutions(channels):
    one, many = draw(3, 1, 4, 3, 5), draw(3, channels, 4, 3, 5, seed=1)
    out, into = draw(channels, 1, 3, 3, 3, seed=2), draw(1, channels, 3, 3, 3, seed=3)
    bias = draw(channels, seed=4)
    expanded = one_channel.expand(one, out.flatten(1), bias, torch.float32)
    torch.testing.assert_close(expanded, F.conv3d(one, out, bias, padding=1), rtol=1e-4, atol=1e-5)
    contracted = one_channel.contract(many, into.flatten(2)[0], bias[:1])
    torch.testing.assert_close(contracted, F.conv3d(many, into, bias[:1], padding=1), rtol=1e-4, atol=1e-5)
    out.requires_grad_()
    F.conv3d(one, out, padding=1).backward(many)
    torch.testing.assert_close(one_channel.weight_grad(one, many), out.grad.flatten(1), rtol=1e-4, atol=1e-4)


def test_every_kernel_compiles_for_an_h200():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# --- layers ------------------------------------------------------------------------------------------------------


def run(module, x: torch.Tensor, parameters: list[nn.Parameter], grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], grad.to(y.dtype))]


def random_(module: nn.Module) -> nn.Module:
    for number, parameter in enumerate(module.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=number) * 0.3)
    return module.to(DEVICE, memory_format=LAST)


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_residual_block_equals_the_plain_one(precision, tolerance, monkeypatch):
    block = random_(ResBlock3d(32))
    x, grad = draw(2, 32, 4, 4, 4), draw(2, 32, 4, 4, 4, seed=1)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    plain = run(block, x, list(block.parameters()), grad)
    monkeypatch.setattr(fused, "usable", lambda x: True)
    with torch.autocast(DEVICE.type, precision, enabled=precision != torch.float32):
        quick = run(block, x, list(block.parameters()), grad)
    assert max(relative(a, b) for a, b in zip(quick, plain, strict=True)) < tolerance


def test_residual_block_keeps_its_input_and_one_result(monkeypatch):
    monkeypatch.setattr(fused, "usable", lambda x: True)
    block, x = random_(ResBlock3d(32)), draw(1, 32, 4, 4, 4).requires_grad_()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        block(x)
    assert sizes.count(x.numel()) == 2


@pytest.mark.parametrize("outputs, merge", [(1, 1), (6, 1), (6, 2)])
def test_last_layer_equals_the_plain_one(outputs, merge, monkeypatch):
    monkeypatch.setattr(conv, "_fastest_of", lambda task, x, weight, by: by(merge))  # on a GPU, timing would choose
    layer = random_(nn.Sequential(ChannelLayerNorm32(32), nn.SiLU(), nn.Conv3d(32, outputs, 3, padding=1)))
    x, grad = draw(2, 32, 4, 4, 4), draw(2, outputs, 4, 4, 4, seed=1)
    plain = run(layer, x, list(layer.parameters()), grad)
    with torch.autocast(DEVICE.type, torch.bfloat16):  # sums and result stay fp32 whatever is around
        quick = run(lambda x: fused.last_layer(x, layer[0], layer[2]), x, list(layer.parameters()), grad)
    assert quick[0].dtype == torch.float32
    assert max(relative(a, b) for a, b in zip(quick, plain, strict=True)) < 1e-5


def autoencoder(narrow: int = 8, wide: int = 32) -> tuple[nn.Module, nn.Module]:
    args = {"latent_channels": 4, "num_res_blocks": 1, "num_res_blocks_middle": 1}
    specs = (
        {"name": "SparseStructureEncoder", "args": {**args, "in_channels": 1, "channels": [narrow, wide]}},
        {"name": "SparseStructureDecoder", "args": {**args, "out_channels": 1, "channels": [wide, narrow]}},
    )
    return tuple(random_(build(spec)) for spec in specs)


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_models_equal_the_plain_ones(frozen, monkeypatch):
    encoder, decoder = autoencoder()
    ss = torch.from_numpy(solid_grids(2, 8, 0)).float()[:, None].to(DEVICE)
    results = []
    for quick in (False, True):
        monkeypatch.setattr(fused, "usable", lambda x, quick=quick: quick)
        for model in (encoder, decoder):
            model.requires_grad_(not frozen).zero_grad()
        z = encoder(ss)
        if frozen:
            z.requires_grad_()
        logits = decoder(z)
        F.binary_cross_entropy_with_logits(logits, ss).backward()
        parameters = [] if frozen else [*encoder.parameters(), *decoder.parameters()]
        grads = [z.grad] if frozen else [p.grad.clone() for p in parameters]
        results.append([z.detach(), logits.detach(), *grads])
    for plain, quick in zip(*results, strict=True):
        assert relative(quick, plain) < 1e-4


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_reduced_precision_costs_gradients_no_more_than_in_the_plain_modules(precision, monkeypatch):
    """Errors are in units of the largest relative error of one rounding, by which both kinds of modules can be held to
    one bound: the interpreter rounds to bf16 towards zero, at twice that error."""
    models = autoencoder(16, 32)
    encoder, decoder = models
    ss = torch.from_numpy(solid_grids(1, 8, 0)).float()[:, None].to(DEVICE)
    scale = 2.0**10 if precision == torch.float16 else 1.0  # of the loss, so that no gradient underflows
    half = torch.finfo(precision).eps / 2
    unit = {False: half, True: half if GPU or precision == torch.float16 else 2 * half}  # by whether kernels run

    def gradient(dtype: torch.dtype, quick: bool) -> torch.Tensor:
        monkeypatch.setattr(fused, "usable", lambda x: quick)
        parameters = [value for model in models for value in model.parameters()]
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = F.binary_cross_entropy_with_logits(decoder(encoder(ss)), ss)
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss * scale, parameters)]).double() / scale

    want = gradient(torch.float32, False)
    got = {quick: gradient(precision, quick) for quick in (False, True)}
    error = {quick: relative(got[quick], want) / unit[quick] for quick in (False, True)}
    assert error[True] < min(2, 1.5 * error[False])
    # Roundings are nearly independent, so their sum has little along the gradient; a wrong factor is all along it.
    assert abs((got[True] @ want / (want @ want)).item() - 1) < unit[True]


@pytest.mark.parametrize(
    "trainer, args",
    [
        ("SparseStructureVaeTrainer", {"loss_type": "dice"}),
        ("SparseStructureVqVaeTrainer", {"freeze": ["encoder", "decoder"], "loss_type": "l1"}),
    ],
)
def test_training_through_the_kernels_gives_the_plain_losses(trainer, args, tmp_path, write_config, monkeypatch):
    """train.py, with everything that surrounds the models, on 8³ grids: the interpreter is slow."""
    bits = np.packbits(solid_grids(4, 8, 0).reshape(4, -1), axis=1)
    np.savez(tmp_path / "train.npz", bits=bits)
    config = tiny_config(trainer, max_steps=2, batch_size=2, i_log=1, i_sample=1000, mix_precision_mode=None, **args)
    config["dataset"]["args"]["resolution"] = 8
    weights = {name: str(tmp_path / f"{name}.safetensors") for name in config["models"] if name != "quantizer"}
    for name, path in weights.items():
        state = random_(build(config["models"][name])).state_dict()
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, path)
    config["trainer"]["args"]["finetune_ckpt"] = weights
    path, losses = write_config(config), []
    for quick in (False, True):
        monkeypatch.setattr(fused, "usable", lambda x, quick=quick: quick)
        run_dir = tmp_path / f"run{quick}"
        flags = ["--config", path, "--data_dir", str(tmp_path / "train.npz"), "--output_dir", str(run_dir)]
        assert train.main([*flags, "--auto_retry", "0", "--device", DEVICE.type, "--num_gpus", "1"]) == 0
        log = [json.loads(line) for line in (run_dir / "log.txt").read_text().splitlines()]
        losses.append([line[key] for line in log if "loss" in line for key in ("loss", "grad_norm")])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# --- on a GPU ----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_loss_curve_follows_fp32_over_200_steps(precision, monkeypatch):
    """The fused half-precision run learns what the plain float32 run learns."""
    grids = torch.from_numpy(solid_grids(64, 32, 0)).float()[:, None].to(DEVICE)
    curves = []
    for quick in (False, True):
        monkeypatch.setattr(fused, "usable", lambda x, quick=quick: quick)
        torch.manual_seed(0)
        encoder, decoder = (m.requires_grad_() for m in autoencoder())
        parameters = dict(nn.ModuleList([encoder, decoder]).named_parameters())
        optimizer = build_optimizer({"name": "AdamW", "args": {"lr": 1e-3}}, parameters, "none")
        scaler = torch.amp.GradScaler("cuda", enabled=quick and precision == torch.float16)
        losses = []
        for step in range(200):
            ss = grids[step % 8 * 8 :][:8]
            with torch.autocast("cuda", precision) if quick else contextlib.nullcontext():
                loss = F.binary_cross_entropy_with_logits(decoder(encoder(ss)), ss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
        curves.append(torch.stack(losses).view(10, 20).mean(1))
    plain, quick = curves
    assert plain[-1] < 0.5 * plain[0]
    torch.testing.assert_close(quick, plain, rtol=0.05, atol=0.005)


@needs_gpu
def test_training_holds_less_memory_than_the_plain_modules(monkeypatch):
    encoder, decoder = (m.requires_grad_() for m in autoencoder(32, 64))
    ss = torch.from_numpy(solid_grids(8, 64, 0)).float()[:, None].to(DEVICE)
    peaks = []
    for quick in (False, True):
        monkeypatch.setattr(fused, "usable", lambda x, quick=quick: quick)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.binary_cross_entropy_with_logits(decoder(encoder(ss)), ss)
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        encoder.zero_grad(), decoder.zero_grad()
    assert peaks[1] < 0.6 * peaks[0]
