"""Averages of the trained weights, against a plain loop."""

import copy

import pytest
import torch
from torch import nn

from trellis.models import build
from trellis.runs.checkpoint import Checkpoints
from trellis.trainers.ema import EMA, ramped_rate
from trellis.utils.errors import CheckpointError


class Counter(nn.Module):
    """A parameter, a float buffer and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        return x @ self.weight.T + (x * self.mean).sum(-1, keepdim=True)


def change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) if value.is_floating_point() else seed)


def test_the_ramp_reaches_the_rate_and_stays():
    assert [ramped_rate(0.9, n) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert ramped_rate(0.9, 80) == 81 / 90 and ramped_rate(0.9, 81) == 0.9 and ramped_rate(0.9, 10**9) == 0.9
    rates = [ramped_rate(0.9999, n) for n in range(1, 200_000, 97)]
    assert rates == sorted(rates) and rates[-1] == 0.9999


def test_equals_a_loop_in_float64_with_codebook_and_buffers():
    quantizer = build({"name": "VectorQuantizer", "args": {"n_embed": 8, "embed_dim": 4, "latent_channels": 4}})
    models = {"counter": Counter(), "quantizer": quantizer}
    ema = EMA(models, [0.5, 0.999])
    want = {
        rate: {name: {key: value.double() for key, value in m.state_dict().items()} for name, m in models.items()}
        for rate in (0.5, 0.999)
    }
    for n in range(1, 31):
        for name, model in models.items():
            change(model, seed=n)
            for rate, averages in want.items():
                decay = min(rate, (1 + n) / (10 + n))
                for key, live in model.state_dict().items():
                    averages[name][key] = decay * averages[name][key] + (1 - decay) * live.double()
        ema.update(n)
        assert ema.averages[0.5]["counter"]["seen"].dtype == torch.int64
        assert ema.averages[0.5]["counter"]["seen"] == n
    for rate, averages in want.items():
        for key in ("weight", "mean"):
            got = ema.averages[rate]["counter"][key]
            torch.testing.assert_close(got.double(), averages["counter"][key], rtol=1e-5, atol=1e-6)
        codes = ema.averages[rate]["quantizer"]["embeddings.weight"]
        torch.testing.assert_close(codes.double(), averages["quantizer"]["embeddings.weight"], rtol=1e-5, atol=1e-6)


def test_rate_1_follows_the_ramp_alone_and_rate_0_is_the_live_model():
    model = Counter()
    ema = EMA({"m": model}, [0.0, 1.0])
    for n in range(1, 5):
        change(model, seed=n)
        ema.update(n)
    assert torch.equal(ema.averages[0.0]["m"]["weight"], model.weight)
    assert not torch.allclose(ema.averages[1.0]["m"]["weight"], model.weight)


def test_copied_rows_are_the_live_ones_and_others_stay():
    model = Counter()
    ema = EMA({"m": model, "other": Counter()}, [0.5, 0.9])
    change(model, seed=1)
    before = copy.deepcopy(ema.averages)
    ema.copy_rows("m", ("weight",), torch.tensor([2, 0]))
    for rate, averages in ema.averages.items():
        assert torch.equal(averages["m"]["weight"][[0, 2]], model.weight[[0, 2]])
        assert torch.equal(averages["m"]["weight"][1], before[rate]["m"]["weight"][1])
        assert torch.equal(averages["m"]["mean"], before[rate]["m"]["mean"])
        assert torch.equal(averages["other"]["weight"], before[rate]["other"]["weight"])


def test_averages_share_nothing_with_the_live_model():
    model = Counter()
    ema = EMA({"m": model}, [0.9])
    before = copy.deepcopy(ema.averages)
    change(model, seed=1)
    for key, value in before[0.9]["m"].items():
        assert torch.equal(ema.averages[0.9]["m"][key], value) and not value.requires_grad


def test_module_is_a_copy_for_evaluation_that_holds_the_average():
    model = Counter().train()
    ema = EMA({"m": model}, [0.9])
    change(model, seed=1)
    ema.update(1)
    live = copy.deepcopy(model.state_dict())
    copied = ema.module("m", 0.9)
    for key, value in copied.state_dict().items():
        assert torch.equal(value, ema.averages[0.9]["m"][key])
        assert value.data_ptr() not in (model.state_dict()[key].data_ptr(), ema.averages[0.9]["m"][key].data_ptr())
        assert torch.equal(model.state_dict()[key], live[key])
    assert not copied.training and not any(value.requires_grad for value in copied.parameters())
    assert model.training and model.weight.requires_grad
    assert not torch.equal(copied(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_averages_come_back_from_a_checkpoint_exactly(tmp_path):
    model = Counter()
    ema = EMA({"m": model}, [0.9, 0.99])
    for n in range(1, 4):
        change(model, seed=n)
        ema.update(n)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"m": model.state_dict()}, ema.averages, {}, {"best": None})
    other = EMA({"m": Counter()}, [0.9, 0.99])
    other.load(checkpoints, 3)
    for rate in (0.9, 0.99):
        for key, value in ema.averages[rate]["m"].items():
            assert torch.equal(other.averages[rate]["m"][key], value)
    with pytest.raises(CheckpointError, match="m_ema0.5_step0000003.pt: there is no such file"):
        EMA({"m": Counter()}, [0.5]).load(checkpoints, 3)
    with pytest.raises(CheckpointError, match="does not hold the tensors of m"):
        EMA({"m": nn.Linear(2, 2)}, [0.9]).load(checkpoints, 3)
