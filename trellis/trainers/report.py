"""What a run is about to do, printed before it starts and by --tryrun."""

import sys
import time

import torch

from ..modules.kernels.launch import obstacle
from ..modules.quantizers.base import Quantizer
from ..utils import dist_utils
from ..utils.environment import peak_memory
from .basic import BasicTrainer
from .optim import preview_schedule


def describe(trainer: BasicTrainer) -> None:
    """Print models, the origin of their weights, data, precision, and notes on what a user may not expect."""
    print(f"{'model':<12}{'class':<26}{'parameters':>12}  {'':<10}{'dtype':<8}weights")
    for name, model in trainer.models.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        role = "frozen" if name in trainer.frozen else "trainable"
        origin = trainer.plan.origin[name]
        if origin == "initialized" and isinstance(model, Quantizer) and model.init == "kmeans":
            origin = "initialized from the data's latents when the run starts"
        dtype = str(next(iter(model.state_dict().values())).dtype).removeprefix("torch.")
        print(f"{name:<12}{type(model).__name__:<26}{count:>12,}  {role:<10}{dtype:<8}{origin}")
    for note in _notes_on_weights(trainer):
        print(f"note: {note}")
    print(trainer.dataset.summary())
    if not trainer.dataset.split_sizes()["val"]:
        print(
            "note: no object is in the validation split, so nothing is validated and no checkpoint is the best; "
            "set the split column of some objects in metadata.csv to val"
        )
    devices = f"{dist_utils.world_size()} x {trainer.device.type}"
    print(f"{devices}, {trainer.precision.name}, {trainer.global_batch} samples per step, {trainer.max_steps} steps")
    if trainer.precision.note:
        print(f"note: {trainer.precision.note}")
    if trainer.device.type == "cuda" and obstacle(trainer.device):
        print(f"note: plain modules run in place of the GPU kernels, which are faster: {obstacle(trainer.device)}")
    sys.stdout.flush()


def _notes_on_weights(trainer: BasicTrainer) -> list[str]:
    """Return notes on codebooks without parameters, on the plan, and on random weights."""
    notes = [
        f"{name} has no parameters: its codes follow averages of the latents, not the optimizer"
        for name, model in trainer.trained.items()
        if not list(model.parameters())
    ]
    notes += trainer.plan.notes
    origins = trainer.plan.origin.items()
    fresh = ("quantizer", *trainer.optional_models)  # made for what the others have learned
    random = [name for name, origin in origins if origin == "initialized" and name not in fresh]
    if random and trainer.plan.resume is None:
        notes.append(f"{', '.join(random)} start from random weights; give --load_dir to start from a trained run")
    return notes


def tryrun(trainer: BasicTrainer) -> None:
    """Run one sample forward and backward, and print optimizer, schedule, losses and memory. Write nothing."""
    started = time.monotonic()
    losses = trainer.tryrun()
    seconds = time.monotonic() - started
    if not dist_utils.is_main():
        return
    _print_optimizer(trainer)
    for fact in trainer.facts():
        print(fact)
    print("one sample, forward and backward: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    on_gpu = trainer.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else peak_memory()
    used = "" if memory is None else f", peak memory {memory / 2**30:.2f} GiB"
    print(f"{seconds:.1f} s{used}; a run would start")


def _print_optimizer(trainer: BasicTrainer) -> None:
    """Print the optimizer with the lr of each model, and the schedule at a few steps."""
    rates: dict[str, list[float]] = {}
    for group in trainer.optimizer.param_groups:
        rates.setdefault(group.get("name", "all").split(".")[0], []).append(group["lr"])
    print(f"optimizer {type(trainer.optimizer).__name__}, lr_scaling {trainer.lr_scaling}")
    for model, lrs in rates.items():
        span = f"{min(lrs):.3g}" if len(lrs) == 1 else f"{min(lrs):.3g} to {max(lrs):.3g}"
        print(f"  {model}: {len(lrs)} group{'s' if len(lrs) > 1 else ''}, lr {span}")
    schedule = preview_schedule(trainer.optimizer_spec, trainer.scheduler_spec, trainer.max_steps)
    name = trainer.scheduler_spec["name"] if trainer.scheduler_spec else "constant"
    print(f"schedule {name}: " + ", ".join(f"lr {rate:.3g} at step {step}" for step, rate in schedule.items()))
