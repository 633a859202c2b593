"""Exponential moving averages of the trained models, buffers and codebook included."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..models import read_weights
from ..runs.checkpoint import Checkpoints, model_file
from ..utils.errors import CheckpointError
from .skip import host_knows


def ramped_rate(rate: float, step: int) -> float:
    """Return the decay at optimizer step n = `step` (from 1): min(rate, (1 + n) / (10 + n)).

    So short runs are averaged over a part of their length, and long runs at the full rate.
    """
    return min(rate, (1 + step) / (10 + step))


class EMA:
    """One average per rate.

    models: {name: module} being trained.
    rates: such as [0.9999], by which the averages are named.
    batch_ratio: samples per step, relative to the batch that the rates are meant for.
    """

    def __init__(self, models: Mapping[str, nn.Module], rates: list[float], batch_ratio: float = 1.0):
        self.models, self.rates, self.batch_ratio = models, rates, batch_ratio
        self.averages: dict[float, dict[str, dict[str, Tensor]]] = {
            rate: {name: self._copy(model) for name, model in models.items()} for rate in rates
        }

    @staticmethod
    def _copy(model: nn.Module) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move each average towards the live models. Integer buffers are copied.

        skip: bool scalar on the models' device; if it is set, averages stay as they are. The models must then be
            finite and as they were before the step.
        """
        if skip is not None and host_knows(skip):
            if skip:
                return
            skip = None
        for rate, averages in self.averages.items():
            weight = 1 - ramped_rate(rate, step) ** self.batch_ratio
            for name, model in self.models.items():
                pairs = [(averages[name][key], live) for key, live in model.state_dict().items()]
                floats = [(mean, live) for mean, live in pairs if mean.is_floating_point()]
                if floats:
                    means, lives = zip(*floats, strict=True)
                    if skip is None:
                        torch._foreach_lerp_(means, lives, weight)
                    else:
                        torch._foreach_lerp_(means, lives, [torch.where(skip, 0.0, weight)] * len(means))
                for mean, live in pairs:
                    if not mean.is_floating_point():
                        mean.copy_(live)

    def copy_rows(self, name: str, keys: tuple[str, ...], rows: Tensor) -> None:
        """Set rows [n] int64 of a model's tensors to the live values in each average."""
        live = self.models[name].state_dict()
        for averages in self.averages.values():
            for key in keys:
                averages[name][key][rows] = live[key][rows]

    def load(self, checkpoints: Checkpoints, step: int) -> None:
        """Load the averages of a checkpoint. Raise CheckpointError if one is missing, does not fit or is not finite."""
        for rate, averages in self.averages.items():
            for name, average in averages.items():
                path = checkpoints.folder / model_file(name, step, rate)
                state = read_weights(path)
                if state.keys() != average.keys():
                    raise CheckpointError(f"{path} does not hold the tensors of {name}; the folder is damaged")
                for key, value in state.items():
                    if not value.isfinite().all():
                        raise CheckpointError(
                            f"{path}: {key} has numbers that are not finite; go back to an earlier --ckpt"
                        )
                    average[key].copy_(value)

    def module(self, name: str, rate: float) -> nn.Module:
        """Return a copy of the model with the averaged weights, for evaluation."""
        model = copy.deepcopy(self.models[name])
        model.load_state_dict(self.averages[rate][name])
        return model.requires_grad_(False).eval()
