"""What a run is about to do, printed before it starts and by --tryrun."""

import time

import torch

from ..modules.kernels.launch import obstacle
from ..modules.quantizers.base import Quantizer
from ..utils import dist_utils
from ..utils.progress import waiting
from . import memory
from .basic import BasicTrainer
from .muon import CONVOLUTION, Muon
from .optim import preview_schedule
from .schedule_length import notes as notes_on_schedule

EXAMPLES = 3  # names of tensors that stand for all
LONGEST_SAMPLE = 5.0  # seconds of a sample on a CPU beyond which steps that measure memory would be long waited for


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
    for note in _notes(trainer):
        print(f"note: {note}")
    print(trainer.dataset.summary())
    if not trainer.dataset.split_sizes()["val"]:
        print(
            "note: no object is in the validation split, so nothing is validated and no checkpoint is the best; "
            "set the column split of some objects to val (in metadata.csv, or before packing)"
        )
    if trainer.scored < trainer.size.val:
        print(
            f"validation scores {trainer.scored:,} of {trainer.size.val:,} objects, the same in every run; "
            "trainer.args.val_objects null takes all"
        )
    devices = f"{dist_utils.world_size()} x {trainer.device.type}"
    print(f"{devices}, {trainer.precision.name}, {trainer.global_batch} samples per step, {trainer.max_steps} steps")
    if trainer.precision.note:
        print(f"note: {trainer.precision.note}")
    if trainer.device.type == "cuda" and obstacle(trainer.device):
        print(f"note: plain modules run in place of the GPU kernels, which are faster: {obstacle(trainer.device)}")
    print(end="", flush=True)  # unlike sys.stdout.flush, also where standard output is closed


def _notes(trainer: BasicTrainer) -> list[str]:
    """Return notes on codebooks without parameters, on the plan, on the schedule, and on random weights."""
    notes = [
        f"{name} has no parameters: its codes follow averages of the latents, not the optimizer"
        for name, model in trainer.trained.items()
        if not list(model.parameters())
    ]
    notes += trainer.plan.notes
    notes += notes_on_schedule(trainer.scheduler_spec, trainer.max_steps)
    origins = trainer.plan.origin.items()
    fresh = ("quantizer", *trainer.optional_models)  # made for what the others have learned
    random = [name for name, origin in origins if origin == "initialized" and name not in fresh]
    if random and trainer.plan.resume is None:
        notes.append(f"{', '.join(random)} start from random weights; give --load_dir to start from a trained run")
    return notes


def tryrun(trainer: BasicTrainer) -> None:
    """Run one sample forward and backward, and a few steps for their memory. Print optimizer, schedule, losses, what
    fits, and how a run would go on. Write nothing."""
    started = time.monotonic()
    with waiting("one sample, forward and backward", shown=dist_utils.is_main()):
        losses = trainer.tryrun()
    if dist_utils.is_main():
        _print_optimizer(trainer)
        for fact in [*trainer.facts(), *_codebook(trainer)]:
            print(fact)
        print("one sample, forward and backward: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    found = _memory(trainer, time.monotonic() - started)
    if dist_utils.is_main():
        finished = trainer.plan.resume is not None and trainer.plan.resume[1] >= trainer.max_steps
        end = "a run would find nothing left to do" if finished else "a run would start"
        print("\n".join([*found, *_way_on(trainer), f"{time.monotonic() - started:.1f} s; {end}"]))


def _memory(trainer: BasicTrainer, seconds: float) -> list[str]:
    """Return what is to say of memory. seconds: of one sample, forward and backward."""
    seconds = dist_utils.broadcast_object(seconds)  # all ranks decide alike
    if trainer.device.type == "cpu" and seconds > LONGEST_SAMPLE:
        return [f"memory: not measured on this CPU, where one sample takes {seconds:.0f} s; on a GPU it is"]
    try:
        with waiting("steps that measure memory", shown=dist_utils.is_main()):
            need = memory.measure(trainer)
    except torch.cuda.OutOfMemoryError:
        return ["WARNING: the GPU's memory is too small for steps of few samples; take smaller models or another GPU"]
    return memory.lines(need, trainer.micro_batch_size, trainer.batch_per_rank)


def _codebook(trainer: BasicTrainer) -> list[str]:
    """Return a note on a codebook that is still without codes."""
    quantizer = trainer.models.get("quantizer")
    if isinstance(quantizer, Quantizer) and trainer.plan.origin["quantizer"] == "initialized":
        if quantizer.init == "kmeans":
            return ["quantizer: k-means over latents of the data fills it when the run starts; losses here are before"]
    return []


def _way_on(trainer: BasicTrainer) -> list[str]:
    """Return how a run that continues would go on."""
    if trainer.plan.resume is None:
        return []
    checkpoints, step = trainer.plan.resume
    misc = checkpoints.read_misc(step) or {}
    if step >= trainer.max_steps:
        return [f"{checkpoints.run_dir} is finished at step {step}; with a larger max_steps it would go on"]
    best = (
        f", best {misc['best']['by']} {misc['best']['score']:.4f} at step {misc['best']['step']}"
        if misc["best"]
        else ""
    )
    return [
        f"it would go on after step {step} of {trainer.max_steps} with sample {misc['samples_seen']} in the order of "
        f"the data; weights, optimizer, schedule and averages continue{best}"
    ]


def _print_muon(trainer: BasicTrainer) -> None:
    """Print which tensors Muon orthogonalizes: how many of each model, and examples."""
    for model, module in trainer.trained.items():
        hidden = module.hidden_matrices()
        names = [name for name, value in module.named_parameters() if value.ndim == CONVOLUTION or name in hidden]
        total = sum(1 for _ in module.parameters())
        if names:
            shown = ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")
            print(f"  {model}: orthogonalized are {len(names)} of {total} tensors: {shown}; AdamW moves the others")
        else:
            print(f"  {model}: none of {total} tensors is orthogonalized; AdamW moves them")


def _print_optimizer(trainer: BasicTrainer) -> None:
    """Print the optimizer with the lr of each model, and the schedule at a few steps."""
    rates: dict[str, list[float]] = {}
    for group in trainer.optimizer.param_groups:
        rates.setdefault(group.get("name", "all").split(".")[0], []).append(group["lr"])
    print(f"optimizer {type(trainer.optimizer).__name__}, lr_scaling {trainer.lr_scaling}")
    for model, lrs in rates.items():
        span = f"{min(lrs):.3g}" if len(lrs) == 1 else f"{min(lrs):.3g} to {max(lrs):.3g}"
        print(f"  {model}: {len(lrs)} group{'s' if len(lrs) > 1 else ''}, lr {span}")
    if isinstance(trainer.optimizer, Muon):
        _print_muon(trainer)
    schedule = preview_schedule(trainer.optimizer_spec, trainer.scheduler_spec, trainer.max_steps)
    name = trainer.scheduler_spec["name"] if trainer.scheduler_spec else "constant"
    print(f"schedule {name}: " + ", ".join(f"lr {rate:.3g} at step {step}" for step, rate in schedule.items()))
