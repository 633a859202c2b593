"""Muon: the step it takes, against singular values, torch's own Muon and AdamW; and that it continues exactly."""

import copy
import pickle

import pytest
import torch
from torch import nn

from trellis.trainers import optim
from trellis.trainers.muon import NEWTON_SCHULZ, STEPS, UPDATE_RMS, orthogonalized
from trellis.utils.errors import ConfigError

ARGS = {"lr": 0.01, "weight_decay": 0.1}


def weights(seed: int = 0) -> dict[str, nn.Parameter]:
    """Two convolutions of one shape and a wide one of another, and what else a network has."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 4, 3, 3, 3), "b": (8, 4, 3, 3, 3), "wide": (64, 2, 2, 2, 2)}
    shapes |= {"bias": (8,), "codes": (5, 3), "places": (4, 4, 2, 3)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


@pytest.mark.parametrize("shape", [(2, 6, 50), (3, 40, 7), (1, 1, 9)])
def test_orthogonalized_is_the_polynomial_of_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.65 and s.max() < 1.25
    torch.testing.assert_close(orthogonalized(matrices).double(), u * s[:, None] @ vh, atol=1e-4, rtol=0)


def test_convolutions_step_as_torchs_muon_does_on_matrices():
    """Which has the iteration in bf16, and so agrees to two digits."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = {name: value for name, value in weights().items() if value.ndim == 5}
    matrices = {name: nn.Parameter(value.detach().flatten(1).clone()) for name, value in ours.items()}
    optimizer = optim.build_optimizer({"name": "Muon", "args": ARGS}, ours, "none")
    reference = torch.optim.Muon(matrices.values(), **ARGS, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = {name: value.detach().clone() for name, value in ours.items()}
    for step in range(4):
        give_gradients(ours, step)
        for name, value in matrices.items():
            value.grad = ours[name].grad.flatten(1)
        optimizer.step()
        reference.step()
    for name, value in ours.items():
        moved, wanted = value - before[name], matrices[name].view_as(value) - before[name]
        assert (moved - wanted).norm() < 0.02 * wanted.norm()


def test_a_step_has_the_size_of_adams():
    parameters = weights()
    spec = {"name": "Muon", "args": {"lr": 1.0, "weight_decay": 0.0}}
    optimizer = optim.build_optimizer(spec, parameters, "none")
    before = {name: value.detach().clone() for name, value in parameters.items()}
    run(optimizer, parameters, range(1))
    for name in ("a", "b", "wide"):
        rms = (parameters[name].detach() - before[name]).square().mean().sqrt().item()
        assert rms == pytest.approx(UPDATE_RMS, rel=0.25)


def test_all_else_steps_as_adamw_does():
    parameters = weights()
    rest = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items() if value.ndim < 5}
    optimizer = optim.build_optimizer({"name": "Muon", "args": ARGS}, parameters, "none")
    reference = torch.optim.AdamW(rest.values(), **ARGS)
    for step in range(5):
        give_gradients(parameters, step)
        for name, value in rest.items():
            value.grad = parameters[name].grad.clone()
        optimizer.step()
        reference.step()
        assert all(parameter.grad is not None for parameter in parameters.values())
    for name, value in rest.items():
        assert torch.equal(parameters[name], value)


HIDDEN = frozenset({"layer.qkv", "layer.out"})


def transformer_weights() -> dict[str, nn.Parameter]:
    """What a transformer has beside convolutions: hidden matrices, and others of the same shape."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"layer.qkv": (12, 4), "layer.in": (12, 4), "layer.out": (4, 4), "layer.places": (4, 4)}
    return weights() | {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


@pytest.mark.parametrize("groups", [{}, {"lr_scaling": "rms"}, {"lr_multipliers": {"layer": 0.5}}])
def test_hidden_matrices_step_as_convolutions_of_the_same_numbers(groups):
    """And all other matrices as AdamW's."""
    options: dict = {"lr_scaling": "none"} | groups
    ours, other = transformer_weights(), transformer_weights()
    for name in HIDDEN:  # a convolution [C', C, 1, 1, 1] is the matrix [C', C]
        other[name] = nn.Parameter(other[name].detach()[..., None, None, None])
    optimizer = optim.build_optimizer({"name": "Muon", "args": ARGS}, ours, **options, hidden=HIDDEN)
    reference = optim.build_optimizer({"name": "Muon", "args": ARGS}, other, **options)
    before = {name: value.detach().clone() for name, value in ours.items()}
    for step in range(4):
        give_gradients(ours, step)
        for name, value in other.items():
            value.grad = ours[name].grad.view(value.shape)
        optimizer.step()
        reference.step()
    for name, value in ours.items():
        assert torch.equal(value, other[name].view(value.shape)) and not torch.equal(value, before[name]), name
    spec = {"name": "AdamW", "args": ARGS}
    plain = transformer_weights()
    adamw = optim.build_optimizer(spec, plain, **options)
    run(adamw, plain, range(4))
    alike = {name for name, value in plain.items() if torch.allclose(value, ours[name], atol=1e-7)}
    assert alike == {"bias", "codes", "places", "layer.in", "layer.places"}


def test_hidden_matrices_must_be_trained_matrices():
    for name in ("layer.gone", "a", "bias"):
        with pytest.raises(ValueError, match=f"{name} is in `hidden`, but is not a matrix that is trained"):
            optim.build_optimizer({"name": "Muon", "args": ARGS}, transformer_weights(), "none", hidden={name})


def test_other_optimizers_treat_all_matrices_alike():
    one, other = transformer_weights(), transformer_weights()
    spec = {"name": "AdamW", "args": ARGS}
    run(optim.build_optimizer(spec, one, "none", hidden=HIDDEN), one, range(2))
    run(optim.build_optimizer(spec, other, "none"), other, range(2))
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_convmuon_is_the_same_optimizer_with_the_same_state():
    """Configurations and checkpoints of versions that knew it under this name continue."""
    old, new = weights(), weights()
    first = optim.build_optimizer({"name": "ConvMuon", "args": ARGS}, old, "none")
    run(first, old, range(3))
    state = copy.deepcopy(first.state_dict())
    for group in state["param_groups"]:  # as versions without hidden matrices wrote it
        assert "hidden" not in group
    second = optim.build_optimizer({"name": "Muon", "args": ARGS}, new, "none")
    for name, value in new.items():
        value.data.copy_(old[name])
    second.load_state_dict(state)
    run(first, old, range(3, 6))
    run(second, new, range(3, 6))
    assert all(torch.equal(new[name], value) for name, value in old.items())


@pytest.mark.parametrize("moved", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_the_optimizer_still_knows_hidden_matrices(moved):
    parameters = transformer_weights()
    optimizer = optim.build_optimizer({"name": "Muon", "args": ARGS}, parameters, "none", hidden=HIDDEN)
    twin = moved(optimizer)
    groups = [[parameter for group in o.param_groups for parameter in group["params"]] for o in (optimizer, twin)]
    for step in range(2):
        give_gradients(parameters, step)
        for parameter, copied in zip(*groups, strict=True):
            copied.grad = parameter.grad.clone()
        optimizer.step()
        twin.step()
    assert all(torch.equal(parameter, copied) for parameter, copied in zip(*groups, strict=True))


@pytest.mark.parametrize("lr_scaling", ["none", "rms"])
def test_it_continues_exactly(lr_scaling):
    spec = {"name": "Muon", "args": ARGS}
    whole = transformer_weights()
    run(optim.build_optimizer(spec, whole, lr_scaling, hidden=HIDDEN), whole, range(9))
    parameters = transformer_weights()
    first = optim.build_optimizer(spec, parameters, lr_scaling, hidden=HIDDEN)
    scales = [group["lr_scale"] for group in first.param_groups]
    run(first, parameters, range(4))
    resumed = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    second = optim.build_optimizer(spec, resumed, lr_scaling, hidden=HIDDEN)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr_scale"] for group in second.param_groups] == scales
    run(second, resumed, range(4, 9))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_layout_in_memory_changes_nothing_but_rounding():
    plain, other = weights(), weights()
    for value in other.values():
        if value.ndim == 5:
            value.data = value.data.contiguous(memory_format=torch.channels_last_3d)
    for parameters in (plain, other):
        run(optim.build_optimizer({"name": "Muon", "args": ARGS}, parameters, "none"), parameters, range(5))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)
        assert other[name].is_contiguous(memory_format=torch.channels_last_3d) or value.ndim < 5


def test_wrong_arguments_are_told():
    for args, message in (({"lr": 0.1, "momentum": 1.0}, "momentum is 1.0"), ({"lr": 0.1, "ns_steps": 3}, "ns_steps")):
        with pytest.raises(ConfigError, match=message):
            optim.check_optimizer({"name": "Muon", "args": args}, "where")
