"""Train a model from a configuration.

    python train.py --config configs/vae/vqvae_stage1.json --output_dir outputs/stage1 --data_dir data/voxels

The same command continues a run that was cut off. `--help` lists the flags; README.md explains them.
"""

import argparse
import gc
import math
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing

from trellis import models as model_registry
from trellis.datasets import DATASETS
from trellis.modules.kernels.launch import obstacle
from trellis.trainers import TRAINERS
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.configuration import complete_config
from trellis.trainers.optim import preview_schedule
from trellis.trainers.profile import profile
from trellis.trainers.weights import plan_weights
from trellis.utils import dist_utils
from trellis.utils.config import apply_override, load_config
from trellis.utils.environment import keep_freed_memory
from trellis.utils.errors import ConfigError, UserError
from trellis.utils.random_utils import derive_seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file with models, dataset and trainer")
    parser.add_argument("--output_dir", required=True, help="run folder; a run found there is continued")
    parser.add_argument("--data_dir", required=True, help="data roots, separated by commas")
    parser.add_argument("--load_dir", help="run folder to take weights from, such as stage 1's")
    parser.add_argument("--ckpt", default="latest", help="latest, best, none or a step (default: latest)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH.TO.KEY=VALUE",
        dest="overrides",
        help="change the configuration; may be repeated",
    )
    parser.add_argument("--auto_retry", type=int, default=3, help="retries after a failure (default: 3)")
    parser.add_argument("--tryrun", action="store_true", help="check that a run would start, and show it")
    parser.add_argument("--profile", action="store_true", help="trace a few steps instead of training")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num_nodes", type=int, default=1)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument(
        "--num_gpus", type=int, default=-1, help="processes on this node; -1: one per GPU, or one on a CPU"
    )
    parser.add_argument("--master_addr", default="localhost")
    parser.add_argument("--master_port", type=int, default=12345)
    args = parser.parse_args(argv)
    if args.ckpt not in ("latest", "best", "none") and not args.ckpt.isdigit():
        parser.error(f"--ckpt is {args.ckpt!r}; it must be latest, best, none or a step")
    for name, low in (("auto_retry", 0), ("num_nodes", 1), ("node_rank", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least {low}")
    if args.node_rank >= args.num_nodes:
        parser.error(f"--node_rank is {args.node_rank}; with --num_nodes {args.num_nodes} it must be below that")
    if args.num_gpus == 0 or args.num_gpus < -1:
        parser.error(f"--num_gpus is {args.num_gpus}; it must be -1 or at least 1")
    return args


# --- configuration ---------------------------------------------------------------------------------------


@dataclass
class Configuration:
    """A configuration in two forms."""

    written: dict  # the file with `--set` applied: what the run folder keeps
    completed: dict  # with every default filled in: what is built


def read_config(args: argparse.Namespace, world_size: int) -> Configuration:
    """Return the configuration with `--set` applied. Raise ConfigError for any mistake in it."""
    config = load_config(args.config)
    for assignment in args.overrides:
        apply_override(config, assignment)
    try:
        return Configuration(config, check_config(config, world_size))
    except ConfigError as error:
        raise ConfigError(f"{args.config}: {error}") from error


def check_config(config: dict, world_size: int) -> dict:
    """Return the completed configuration. Raise ConfigError for any mistake in it."""
    completed = complete_config(config)
    return TRAINERS.get(completed["trainer"]["name"], "trainer.name").check_config(completed, world_size)


# --- processes -------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """The processes of a run. local: those of this node that we start; 1 where torchrun started us."""

    device: str
    local: int
    world: int


def plan_launch(args: argparse.Namespace) -> Launch:
    """Raises ConfigError for a device or a number of GPUs that is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu, or install a CUDA build of torch")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if dist_utils.under_torchrun():
        return Launch(device, 1, int(os.environ["WORLD_SIZE"]))
    there = torch.cuda.device_count() if device == "cuda" else 1
    local = there if args.num_gpus == -1 else args.num_gpus
    if device == "cuda" and local > there:
        raise ConfigError(f"--num_gpus is {local}, but this machine has {there}")
    return Launch(device, local, local * args.num_nodes)


def launch(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Run on every process of this node, waiting for them. Returns the exit code."""
    if dist_utils.under_torchrun():
        return join_and_run(args, config, plan, int(os.environ["LOCAL_RANK"]))
    if plan.world > 1:
        return spawn(args, config, plan)
    return run(args, config, torch.device(plan.device, 0) if plan.device == "cuda" else torch.device("cpu"))


def spawn(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Start this node's processes and wait for them, passing on signals. Raises what they failed with."""
    mistakes = torch.multiprocessing.get_context("spawn").SimpleQueue()
    processes = torch.multiprocessing.spawn(_spawned, (args, config, plan, mistakes), nprocs=plan.local, join=False)

    def pass_on(signum: int, frame) -> None:
        for process in processes.processes:
            os.kill(process.pid, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not processes.join():
            pass
        return 0
    except torch.multiprocessing.ProcessExitedException as error:
        if not mistakes.empty():  # the ranks tend to find the same one; the first will do
            raise mistakes.get() from None
        if error.exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return error.exit_code
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _spawned(local_rank: int, args: argparse.Namespace, config: Configuration, plan: Launch, mistakes) -> None:
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which passes it on once
    os.environ.update(
        RANK=str(args.node_rank * plan.local + local_rank),
        WORLD_SIZE=str(plan.world),
        LOCAL_WORLD_SIZE=str(plan.local),
        MASTER_ADDR=args.master_addr,
        MASTER_PORT=str(args.master_port),
    )
    if plan.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // plan.local))
    try:
        sys.exit(join_and_run(args, config, plan, local_rank))
    except UserError as error:
        mistakes.put(error)
        sys.exit(1)


def join_and_run(args: argparse.Namespace, config: Configuration, plan: Launch, local_rank: int) -> int:
    device = torch.device("cuda", local_rank) if plan.device == "cuda" else torch.device("cpu")
    dist_utils.init_process_group(device)
    try:
        return run(args, config, device)
    finally:
        gc.collect()  # a trainer and its DDP refer to each other; both must go before the group they use
        dist.destroy_process_group()


# --- one process -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace, config: Configuration, device: torch.device) -> int:
    """Build everything by name, then try, profile or train. Returns the exit code."""
    trainer = build_trainer(args, config, device)
    if dist_utils.is_main():
        describe(trainer)
    if args.tryrun:
        tryrun(trainer)
    elif args.profile:
        print(f"trace for https://ui.perfetto.dev: {profile(trainer)}")
    else:
        signum = trainer.run()
        return 128 + signum if signum else 0
    return 0


def build_trainer(args: argparse.Namespace, config: Configuration, device: torch.device) -> BasicTrainer:
    """Data, models with their weights, and the trainer around them."""
    if device.type == "cpu":
        keep_freed_memory()
    models, dataset, trainer = (config.completed[key] for key in ("models", "dataset", "trainer"))
    trainer_class = TRAINERS.get(trainer["name"], "trainer.name")
    plan = None
    if dist_utils.is_main():
        plan = plan_weights(config.completed, trainer_class, args.output_dir, args.load_dir, args.ckpt)
    plan = dist_utils.broadcast_object(plan)
    data = DATASETS.get(dataset["name"], "dataset.name")(args.data_dir, split="train", **dataset["args"])
    torch.manual_seed(derive_seed("models", trainer["args"]["seed"]))
    return trainer_class(
        {name: model_registry.build(spec, f"models.{name}") for name, spec in models.items()},
        data,
        output_dir=args.output_dir,
        device=device,
        plan=plan,
        config=config.written,
        **trainer["args"],
    )


def describe(trainer: BasicTrainer) -> None:
    """What is about to run: models, where their weights come from, data."""
    plan = trainer.plan
    print(f"{'model':<12}{'class':<26}{'parameters':>12}  {'':<10}{'dtype':<8}weights")
    for name, model in trainer.models.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        role = "frozen" if name in trainer.frozen else "trainable"
        origin = plan.origin[name]
        if origin == "initialised" and getattr(model, "init", None) == "kmeans":
            origin = "initialised from the data's latents when the run starts"
        dtype = str(next(iter(model.state_dict().values())).dtype).removeprefix("torch.")
        print(f"{name:<12}{type(model).__name__:<26}{count:>12,}  {role:<10}{dtype:<8}{origin}")
    for name, model in trainer.models.items():
        if name not in trainer.frozen and not list(model.parameters()):
            print(f"note: {name} has no parameters: its codes follow averages of the latents, not the optimizer")
    for note in plan.notes:
        print(f"note: {note}")
    random = [name for name, origin in plan.origin.items() if origin == "initialised" and name != "quantizer"]
    if random and plan.resume is None:
        print(f"note: {', '.join(random)} start from random weights; give --load_dir to start from a trained run")
    print(trainer.dataset.summary())
    if not trainer.dataset.split_sizes()["val"]:
        print(
            "note: no object is in the validation split, so nothing is validated and no checkpoint is the best; "
            "set the split column of some objects in metadata.csv to val"
        )
    where = f"{dist_utils.world_size()} x {trainer.device.type}"
    print(f"{where}, {trainer.precision.name}, {trainer.global_batch} samples per step, {trainer.max_steps} steps")
    if trainer.precision.note:
        print(f"note: {trainer.precision.note}")
    if trainer.device.type == "cuda" and obstacle(trainer.device):
        print(f"note: plain modules run in place of the GPU kernels, which are faster: {obstacle(trainer.device)}")
    sys.stdout.flush()


def tryrun(trainer: BasicTrainer) -> None:
    """Show what a run would do and take one sample forward and backward. Writes nothing."""
    started = time.monotonic()
    losses = trainer.tryrun()
    seconds = time.monotonic() - started
    if not dist_utils.is_main():
        return
    groups: dict[str, list[float]] = {}
    for group in trainer.optimizer.param_groups:
        groups.setdefault(group.get("name", "all").split(".")[0], []).append(group["lr"])
    print(f"optimizer {type(trainer.optimizer).__name__}, lr_scaling {trainer.lr_scaling}")
    for name, rates in groups.items():
        span = f"{min(rates):.3g}" if len(rates) == 1 else f"{min(rates):.3g} to {max(rates):.3g}"
        print(f"  {name}: {len(rates)} group{'s' if len(rates) > 1 else ''}, lr {span}")
    schedule = preview_schedule(trainer.optimizer_spec, trainer.scheduler_spec, trainer.max_steps)
    name = trainer.scheduler_spec["name"] if trainer.scheduler_spec else "constant"
    print(f"schedule {name}: " + ", ".join(f"lr {rate:.3g} at step {step}" for step, rate in schedule.items()))
    quantizer, encoder = trainer.models.get("quantizer"), trainer.models["encoder"]
    if quantizer is not None:
        cells = trainer.dataset.resolution // encoder.downsampling
        tokens = cells**3 // quantizer.cells_per_token
        each = f" ({quantizer.codes_per_token} a token)" if quantizer.codes_per_token > 1 else ""
        bits = tokens * quantizer.codes_per_token * math.log2(quantizer.n_embed)
        print(f"{tokens} tokens of {quantizer.n_embed} codes{each} per object: {bits:.0f} bits")
    print("one sample, forward and backward: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    if trainer.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(trainer.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{seconds:.1f} s, peak memory {memory / 2**30:.2f} GiB; a run would start")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        plan = plan_launch(args)
        config = read_config(args, plan.world)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # torchrun restarts all ranks of a failed group itself; one of them alone could not go on.
    retries = 0 if args.tryrun or args.profile or dist_utils.under_torchrun() else args.auto_retry
    for attempt in range(retries + 1):
        try:
            return launch(args, config, plan)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except Exception:
            traceback.print_exc()
            if attempt < retries:
                print(f"failed; trying again from the last checkpoint ({attempt + 1} of {retries})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
