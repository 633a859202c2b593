"""Optimizer, learning-rate schedule and gradient clipper, each by name from a configuration."""

import contextlib
import inspect
import math
from collections.abc import Iterator, Set
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from ..utils import dist_utils
from ..utils.config import Count, Range, check_args, check_component, matches
from ..utils.errors import ConfigError
from ..utils.registry import did_you_mean
from .muon import Muon

LrScaling = Literal["none", "rms"]

# Smaller RMS values are raised to this, the floor of Adafactor's relative step (arXiv:1804.04235, Sec. 8). Tensors
# that start at zero (biases, zero-initialized convolutions) could not move otherwise.
RMS_FLOOR = 1e-3

# Ours, beside those of torch.optim; torch's own Muon takes matrices alone. ConvMuon is the name of earlier versions.
OWN = {"Muon": Muon, "ConvMuon": Muon}
# Optimizers that have one kernel for the whole step on a GPU, and the arguments that exclude it.
FUSED = ("Adam", "AdamW", "SGD")
ONE_OF_FUSED = {"fused", "foreach", "capturable", "differentiable"}


# --- optimizer -------------------------------------------------------------------------------------------


def check_optimizer(spec: dict, where: str) -> None:
    """Raise ConfigError unless the spec builds an optimizer that can take a step."""
    check_component(spec, where)
    weight = nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.ones(1, 1)
    optimizer = build_optimizer(spec, {"weight": weight}, "none", where)
    try:
        optimizer.step()
    except Exception as error:  # what torch raises for a wrong value can be of any type
        raise ConfigError(f"{where} cannot take a step with {spec['name']}: {error}") from error


def check_lr_factors(
    lr_scaling: LrScaling, lr_multipliers: dict[str, float] | None, trained: list[str], optimizer_spec: dict, where: str
) -> None:
    """Raise ConfigError for multipliers of models that are not trained, or if there is no lr to multiply.

    where: the path of both arguments' parent.
    """
    for name in lr_multipliers or ():
        if name not in trained:
            raise ConfigError(
                f"{where}.lr_multipliers has {name!r}, which is not trained here{did_you_mean(name, trained)}"
            )
    weights = {f"{name}.weight": nn.Parameter(torch.zeros(1, 1)) for name in trained}
    build_optimizer(optimizer_spec, weights, lr_scaling, f"{where}.optimizer", lr_multipliers)


def build_optimizer(
    spec: dict,
    parameters: dict[str, nn.Parameter],
    lr_scaling: LrScaling,
    where: str = "optimizer",
    lr_multipliers: dict[str, float] | None = None,
    hidden: Set[str] = frozenset(),
) -> torch.optim.Optimizer:
    """Build any class of torch.optim by name, or `Muon`.

    parameters: {model.name: parameter} to train.
    lr_scaling: "none" uses the given lr; "rms" gives each tensor its own group, whose lr is the given one times the
        tensor's present RMS, so that lr is a relative step.
    lr_multipliers: {model: factor of its lr}; 1 for a model that is not named.
    hidden: names of the matrices that `Muon` orthogonalizes beside convolutions; other optimizers treat all alike.
    Each group stores its factor as `lr_scale` and the lr without it as `relative_lr`. On a GPU, optimizers that have a
    fused form use it unless args say otherwise.
    """
    name, args = spec["name"], spec.get("args", {})
    multipliers = lr_multipliers or {}
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    known |= OWN
    if name not in known:
        raise ConfigError(
            f"{where}.name is {name!r}, which is neither in torch.optim nor Muon{did_you_mean(name, known)}"
        )
    for key in hidden:
        if key not in parameters or parameters[key].ndim != 2:
            raise ValueError(f"{key} is in `hidden`, but is not a matrix that is trained")
    cls = known[name]
    if name == "LBFGS":
        raise ConfigError(f"{where}.name is 'LBFGS', which needs a closure per step; use AdamW or another")
    _check_keywords(cls, args, f"{where}.args")
    if "lr" in args and not (matches(args["lr"], float) and args["lr"] > 0):
        raise ConfigError(f"{where}.args.lr is {args['lr']}; it must be a number > 0")
    if (lr_scaling != "none" or multipliers) and "lr" not in args:
        what = f"lr_scaling {lr_scaling!r}" if lr_scaling != "none" else "lr_multipliers"
        raise ConfigError(f"{where}.args.lr is missing; {what} multiplies it")
    groups: list[dict] = []
    if lr_scaling == "rms":
        for key, parameter in parameters.items():
            rms = parameter.detach().float().square().mean().sqrt().item()
            scale = multipliers.get(key.split(".")[0], 1.0) * max(rms, RMS_FLOOR)
            groups.append({"params": [parameter], "lr": args["lr"] * scale, "lr_scale": scale, "name": key})
    elif multipliers:
        by_model: dict[str, list[nn.Parameter]] = {}
        for key, parameter in parameters.items():
            by_model.setdefault(key.split(".")[0], []).append(parameter)
        for model, own in by_model.items():
            scale = multipliers.get(model, 1.0)
            groups.append({"params": own, "lr": args["lr"] * scale, "lr_scale": scale, "name": model})
    else:
        groups = [{"params": list(parameters.values()), "lr_scale": 1.0}]
    if cls is Muon:
        groups = _with_hidden_apart(groups, {id(parameters[key]) for key in hidden})
    if name in FUSED and not args.keys() & ONE_OF_FUSED and all(p.is_cuda for p in parameters.values()):
        args = {**args, "fused": True}
    try:
        optimizer = cls(groups, **args)
    except Exception as error:  # what torch raises for a wrong value can be of any type
        raise ConfigError(f"{where}.args does not build {name}: {error}") from error
    for group in optimizer.param_groups:
        group["relative_lr"] = args["lr"] if "lr" in args else group["lr"]
    return optimizer


def scale_for_batch(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    """Multiply the lr of every group by √ratio, beside its own factor; an earlier call's factor no longer counts.

    ratio: samples per step, relative to the batch that the configuration's lr is meant for.
    """
    for group in optimizer.param_groups:
        group["lr_scale"] *= math.sqrt(ratio) / group.get("batch_scale", 1.0)
        group["batch_scale"] = math.sqrt(ratio)
        group["lr"] = group["relative_lr"] * group["lr_scale"]


def _with_hidden_apart(groups: list[dict], hidden: Set[int]) -> list[dict]:
    """Return the groups with hidden matrices, given by their `id`, in groups of their own, after the rest of each.

    Groups without any stay as they are, and so does the optimizer's state.
    """
    split = []
    for group in groups:
        matrices = [parameter for parameter in group["params"] if id(parameter) in hidden]
        rest = [parameter for parameter in group["params"] if id(parameter) not in hidden]
        split += [{**group, "params": rest}] if rest else []
        split += [{**group, "params": matrices, "hidden": True}] if matrices else []
    return split


def forget_rows(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Set the optimizer's state for rows [n] int64 of a parameter to zero. Do nothing if it is not trained."""
    for name, value in optimizer.state.get(parameter, {}).items():
        per_row = isinstance(value, Tensor) and value.ndim == parameter.ndim and len(value) == len(parameter)
        if per_row and name != "step_size":  # Rprop's rate of each element, which could not grow from zero
            value[rows] = 0


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the lr on the configuration's scale: the first group's, without its factors."""
    return float(optimizer.param_groups[0]["relative_lr"])


@contextlib.contextmanager
def _relative_lrs(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take the groups' factors off their lr inside the block.

    So a schedule's own rates (OneCycleLR's max_lr, eta_min …) are on the same scale as the configuration's lr.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["relative_lr"]
    yield
    for group in optimizer.param_groups:
        group["relative_lr"] = group["lr"]
        group["lr"] = group["relative_lr"] * group["lr_scale"]


def _check_keywords(cls: type, args: dict, where: str) -> None:
    known = [name for name in inspect.signature(cls).parameters if name not in ("params", "optimizer", "last_epoch")]
    for key in args:
        if key not in known:
            raise ConfigError(f"{where}.{key} is unknown to {cls.__name__}{did_you_mean(key, known)}")


# --- schedule --------------------------------------------------------------------------------------------


class LinearWarmupLRScheduler(schedulers.LambdaLR):
    """A linear rise of lr over `warmup_steps` steps, then a constant. TRELLIS's configurations use this name."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, last_epoch: int = -1):
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / warmup_steps), last_epoch)


def check_lr_scheduler(spec: dict | None, optimizer_spec: dict, where: str) -> None:
    """Raise ConfigError unless the spec builds a schedule that can take a step. `schedule_length` judges its length."""
    if spec is None:
        return
    check_component(spec, where, ("name", "args", "warmup_steps"))
    named = {key: value for key, value in spec.items() if key != "warmup_steps"}
    for trial in (spec, named):  # under a warm-up, the named schedule's own first steps would come late
        optimizer = build_optimizer(optimizer_spec, {"weight": nn.Parameter(torch.zeros(1, 1))}, "none")
        scheduler = build_lr_scheduler(trial, optimizer, where)
        optimizer.step()  # torch warns when a schedule moves before its optimizer
        try:
            step_lr_scheduler(scheduler, optimizer, torch.zeros(()))
            rate = current_lr(optimizer)
        except Exception as error:  # what torch raises for a wrong value can be of any type
            raise ConfigError(f"{where}.args: {spec['name']} cannot take a step with them: {error}") from error
        if not 0 <= rate < math.inf:
            raise ConfigError(f"{where}.args: {spec['name']} leads to lr {rate}")


def build_lr_scheduler(spec: dict | None, optimizer: torch.optim.Optimizer, where: str = "lr_scheduler"):
    """Build any class of torch.optim.lr_scheduler by name, or LinearWarmupLRScheduler; None for a constant lr.

    With "warmup_steps": n beside name and args, lr rises linearly over n steps, and then the named schedule starts.
    """
    if spec is None:
        return None
    name, args, warmup_steps = spec["name"], spec.get("args", {}), spec.get("warmup_steps", 0)
    known = {
        key: value
        for key, value in vars(schedulers).items()
        if inspect.isclass(value) and issubclass(value, schedulers.LRScheduler) and not key.startswith("_")
    }
    del known["LRScheduler"]  # abstract
    known["LinearWarmupLRScheduler"] = LinearWarmupLRScheduler
    if name not in known:
        raise ConfigError(
            f"{where}.name is {name!r}, which torch.optim.lr_scheduler does not have{did_you_mean(name, known)}"
        )
    if not matches(warmup_steps, int) or warmup_steps < 0:
        raise ConfigError(f"{where}.warmup_steps is {warmup_steps!r}; it must be an integer >= 0")
    if warmup_steps and name == "ReduceLROnPlateau":
        raise ConfigError(f"{where}.warmup_steps cannot precede ReduceLROnPlateau, which follows the loss; drop one")
    _check_keywords(known[name], args, f"{where}.args")
    try:
        with _relative_lrs(optimizer):
            if not warmup_steps:
                return known[name](optimizer, **args)
            warmup = LinearWarmupLRScheduler(optimizer, warmup_steps)
            return schedulers.SequentialLR(optimizer, [warmup, known[name](optimizer, **args)], [warmup_steps])
    except Exception as error:  # what torch raises for a wrong value can be of any type
        raise ConfigError(f"{where}.args does not build {name} from JSON values: {error}") from error


def step_lr_scheduler(scheduler, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Advance by one optimizer step. loss: this rank's; ReduceLROnPlateau alone uses it, as the mean over ranks.

    ReduceLROnPlateau does not count a loss that is not finite.
    """
    if scheduler is None:
        return
    with _relative_lrs(optimizer):
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            mean = dist_utils.all_mean(loss).item()
            if math.isfinite(mean):
                scheduler.step(mean)
        else:
            scheduler.step()


def preview_schedule(optimizer_spec: dict, scheduler_spec: dict | None, max_steps: int) -> dict[int, float]:
    """Return {step: lr} at 0, 25, 50 and 100 % of training, by running the schedule on a stand-in parameter."""
    marks = [0, max_steps // 4, max_steps // 2, max_steps]
    optimizer = build_optimizer(optimizer_spec, {"weight": nn.Parameter(torch.zeros(1, 1))}, "none")
    scheduler = build_lr_scheduler(scheduler_spec, optimizer)
    if scheduler is None or isinstance(scheduler, schedulers.ReduceLROnPlateau):
        return dict.fromkeys(marks, current_lr(optimizer))
    rates = {}
    optimizer.step()  # torch warns when a schedule moves before its optimizer
    for step in range(max_steps + 1):
        if step in marks:
            rates[step] = current_lr(optimizer)
        if step < max_steps:
            step_lr_scheduler(scheduler, optimizer, torch.zeros(()))
    return rates


# --- clipping --------------------------------------------------------------------------------------------


class AdaptiveGradClipper:
    """A clipper of the global gradient norm at a percentile of its own recent values.

    Norms that are not finite are left out.
    """

    def __init__(
        self,
        max_norm: Annotated[float, Range(0, open_min=True)] | None = None,  # always an upper bound; null for none
        clip_percentile: Annotated[float, Range(0, 100, open_min=True)] = 95.0,  # of the norms in the buffer, once full
        buffer_size: Count = 1000,  # norms of the last steps
    ):
        self.max_norm, self.clip_percentile, self.buffer_size = max_norm, clip_percentile, buffer_size
        self.norms: Tensor | None = None  # [buffer_size] on the gradients' device, in order of arrival mod size
        self.count = 0

    def __call__(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.norms is None:
            self.norms = torch.full((self.buffer_size,), torch.nan, device=norm.device)
        self.norms = self.norms.to(norm.device)
        limit = torch.full_like(norm, math.inf if self.max_norm is None else self.max_norm)
        if self.count >= self.buffer_size:
            limit = torch.fmin(limit, self.norms.nanquantile(self.clip_percentile / 100))
        # A tensor works as the limit too, and the host need not wait for it.
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)  # type: ignore[arg-type]
        self.norms[self.count % self.buffer_size] = torch.where(norm.isfinite(), norm, torch.nan)
        self.count += 1
        return norm

    def state_dict(self) -> dict:
        return {"norms": self.norms, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue with the norms so far. Start afresh if another clipper or buffer_size collected them."""
        if state.get("norms") is not None and len(state["norms"]) == self.buffer_size:
            self.norms, self.count = state["norms"], state["count"]


class NormClipper:
    """A clipper of the global gradient norm at a constant; it only measures the norm if max_norm is None."""

    def __init__(self, max_norm: float | None):
        self.max_norm = math.inf if max_norm is None else max_norm

    def __call__(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.max_norm)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        del state  # a constant has none


def build_grad_clipper(spec: dict | float | None, where: str = "grad_clip") -> AdaptiveGradClipper | NormClipper:
    """Build a clipper from None, a number, or {"name": "AdaptiveGradClipper", "args": {…}}.

    Raise ConfigError for anything else.
    """
    if spec is None or (not isinstance(spec, dict) and matches(spec, float)):
        if spec is not None and spec <= 0:
            raise ConfigError(f"{where} is {spec}; the largest gradient norm must be > 0, or null for none")
        return NormClipper(spec)
    check_component(spec, where)
    assert isinstance(spec, dict)  # checked above
    if spec["name"] != "AdaptiveGradClipper":
        raise ConfigError(f"{where}.name is {spec['name']!r}; it can be AdaptiveGradClipper, or give a number")
    check_args(spec.get("args", {}), AdaptiveGradClipper, f"{where}.args")
    return AdaptiveGradClipper(**spec.get("args", {}))
