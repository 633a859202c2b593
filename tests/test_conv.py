"""Convolutions: every variant gives what torch gives."""

import pytest
import torch
import torch.nn.functional as F

from trellis.modules import conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS = [(1, 8), (8, 8), (8, 1), (3, 5), (8, 2), (12, 32)]


def layer(inputs: int, outputs: int, z: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(inputs * 100 + outputs)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(2, inputs, 3, 4, z), draw(outputs, inputs, 3, 3, 3), draw(outputs), draw(2, outputs, 3, 4, z)


def reference(x, weight, bias, grad) -> tuple[torch.Tensor, ...]:
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    y = F.conv3d(x, weight, bias, padding=1)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)


@pytest.mark.parametrize("inputs, outputs", CHANNELS)
@pytest.mark.parametrize("m", [1, 2, 4])
def test_merging_changes_no_result(inputs, outputs, m, monkeypatch):
    monkeypatch.setattr(conv, "_fastest_of", lambda task, x, weight, by: by(m))
    x, weight, bias, grad = layer(inputs, outputs)
    expected = reference(x, weight, bias, grad)
    x, weight, grad = (conv._channels_last(t).to(DEVICE) for t in (x, weight, grad))
    weight_grad, bias_grad = conv.weight_and_bias_grad(x, grad, weight)
    results = conv.forward(x, weight, bias.to(DEVICE)), conv.input_grad(grad, weight), weight_grad, bias_grad
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.weight_grad(x, grad, weight).cpu(), expected[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inputs, outputs", CHANNELS)
@pytest.mark.parametrize("z", [8, 6, 5])
def test_layer_equals_torch_with_gradients(inputs, outputs, z):
    """Merged or not, and for a z that no factor divides."""
    x, weight, bias, grad = (t.float() for t in layer(inputs, outputs, z))
    module = conv.Conv3d(inputs, outputs)
    module.load_state_dict({"weight": weight, "bias": bias})
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    y = module.to(memory_format=torch.channels_last_3d)(x)
    y.backward(grad)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    results = y.detach(), x.grad, module.weight.grad, module.bias.grad
    for result, wanted in zip(results, reference(x.detach(), weight, bias, grad), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


def test_narrow_layers_are_merged_on_a_cpu_and_wide_ones_are_not(monkeypatch):
    used = []
    merged = conv._merged
    monkeypatch.setattr(conv, "_merged", lambda x, w, b, m: (used.append(m), merged(x, w, b, m))[1])
    for inputs, outputs in ((1, 8), (8, 8), (8, 1), (8, 32), (32, 32)):
        conv.Conv3d(inputs, outputs)(torch.zeros(1, inputs, 4, 4, 8))
    assert used == [2, 2, 4, 1]  # the last never comes near it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_times_the_variants_once_per_shape():
    conv._fastest.clear()
    x = torch.randn(4, 32, 16, 16, 16, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last_3d)
    weight = torch.randn(32, 32, 3, 3, 3, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last_3d)
    first = conv.forward(x, weight)
    chosen = dict(conv._fastest)
    assert len(chosen) == 1 and next(iter(chosen.values())) in (1, *conv.MERGES)
    assert torch.equal(conv.forward(x, weight), first)
    conv.forward(x[:2], weight)
    assert conv._fastest == chosen
