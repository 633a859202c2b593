"""Train a model from a configuration.

    python train.py --config configs/vae/vqvae_stage1.json --output_dir outputs/stage1 --data_dir data/voxels

The same command continues a run that was cut off. `--help` lists the flags; docs/configuration.md explains them.
"""

import argparse
import gc
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing

from trellis import models as model_registry
from trellis.datasets import DATASETS
from trellis.runs.checkpoint import Checkpoints, misc_file
from trellis.runs.lock import writing
from trellis.trainers import TRAINERS
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.configuration import complete_config
from trellis.trainers.profile import profile
from trellis.trainers.report import describe, tryrun
from trellis.trainers.weights import plan_weights
from trellis.utils import dist_utils
from trellis.utils.command import DEVICES, pick_device
from trellis.utils.config import apply_override, load_config
from trellis.utils.environment import keep_freed_memory
from trellis.utils.errors import ConfigError, UserError
from trellis.utils.random_utils import derive_seed

# --- flags -----------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file with models, dataset and trainer")
    parser.add_argument("--output_dir", required=True, help="run folder; a run found there is continued")
    parser.add_argument("--data_dir", required=True, help="data roots, separated by commas")
    parser.add_argument("--load_dir", help="run folder to take weights from, such as stage 1's, or a saved tokenizer")
    parser.add_argument(
        "--ckpt",
        default="latest",
        help="checkpoint of --output_dir, else of --load_dir: latest, best, none or a step (default: latest)",
    )
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
    parser.add_argument("--device", choices=DEVICES, default="auto")
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
    """The processes of a run."""

    device: str  # "cuda" or "cpu"
    local: int  # processes that this program starts on this node; 1 if torchrun has started it
    world: int  # processes on all nodes


def plan_launch(args: argparse.Namespace) -> Launch:
    """Return the processes to start. Raise ConfigError for a device or a number of GPUs that the machine lacks."""
    device = pick_device(args.device).type
    if dist_utils.under_torchrun():
        return Launch(device, 1, int(os.environ["WORLD_SIZE"]))
    available = torch.cuda.device_count() if device == "cuda" else 1
    local = available if args.num_gpus == -1 else args.num_gpus
    if device == "cuda" and local > available:
        raise ConfigError(f"--num_gpus is {local}, but this machine has {available}; give at most {available}")
    return Launch(device, local, local * args.num_nodes)


def launch(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Run on every process of this node and wait for them. Return the exit code."""
    if dist_utils.under_torchrun():
        return join_and_run(args, config, plan, int(os.environ["LOCAL_RANK"]))
    if plan.world > 1:
        return spawn(args, config, plan)
    return run(args, config, rank_device(plan, 0))


def rank_device(plan: Launch, local_rank: int) -> torch.device:
    """Return the device of a process."""
    return torch.device("cuda", local_rank) if plan.device == "cuda" else torch.device("cpu")


def spawn(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Start this node's processes and wait for them, passing on signals. Raise the error that ended one of them."""
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    processes = torch.multiprocessing.spawn(_spawned, (args, config, plan, errors), nprocs=plan.local, join=False)

    def pass_on(signum: int, frame) -> None:
        for process in processes.processes:
            os.kill(process.pid, signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not processes.join():
            pass
        return 0
    except torch.multiprocessing.ProcessExitedException as error:
        if not errors.empty():  # ranks tend to find the same error, so one of them is enough
            raise errors.get() from None
        if error.exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return error.exit_code
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _spawned(local_rank: int, args: argparse.Namespace, config: Configuration, plan: Launch, errors) -> None:
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
        errors.put(error)
        sys.exit(1)


def join_and_run(args: argparse.Namespace, config: Configuration, plan: Launch, local_rank: int) -> int:
    """Run as one rank of the process group. Return the exit code."""
    device = rank_device(plan, local_rank)
    dist_utils.init_process_group(device)
    try:
        return run(args, config, device)
    finally:
        gc.collect()  # a trainer and its DDP refer to each other; both must go before the group they use
        dist.destroy_process_group()


# --- one process -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace, config: Configuration, device: torch.device) -> int:
    """Build the trainer, then try, profile or train. Return the exit code."""
    if not dist_utils.is_main():
        return build_and_run(args, config, device)
    with writing(args.output_dir, looking=args.tryrun or args.profile):
        return build_and_run(args, config, device)


def build_and_run(args: argparse.Namespace, config: Configuration, device: torch.device) -> int:
    """Do what `run` says, with the run folder's lock."""
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
    """Return the trainer around data and models with their weights."""
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


def last_checkpoint(run_dir: str) -> tuple[int, int] | None:
    """Return the last complete step of a run folder and when it was written, in ns; None if there is none."""
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.latest()
    return None if step is None else (step, (checkpoints.folder / misc_file(step)).stat().st_mtime_ns)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        plan = plan_launch(args)
        config = read_config(args, plan.world)
        last = last_checkpoint(args.output_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # torchrun restarts all ranks of a failed group itself; one of them alone could not go on.
    retries = 0 if args.tryrun or args.profile or dist_utils.under_torchrun() else args.auto_retry
    for attempt in range(retries + 1):
        try:
            # Once the run has saved, or gone back to --ckpt, a retry continues it. Before, --ckpt still holds.
            if attempt and last_checkpoint(args.output_dir) != last:
                args.ckpt = "latest"
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
                print(f"failed; trying again ({attempt + 1} of {retries})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
