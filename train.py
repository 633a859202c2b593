"""Train a model from a configuration.

    python train.py --config configs/vae/vqvae_stage1.json --output_dir outputs/stage1 --data_dir data/voxels

The same command continues a run that was cut off. `--help` lists the flags; docs/configuration.md explains them.
"""

# ruff: noqa: E402 - handlers come first
import os
import signal
import sys

from trellis.utils import signals

# Importing torch takes seconds, in which a signal may come too. `main` sets other handlers.
if __name__ in ("__main__", "__mp_main__"):
    for _signum in signals.STOPPING:
        if signal.getsignal(_signum) is not signal.SIG_IGN:
            signal.signal(_signum, signals.end_at_once)
    # torch prints a page of C++ frames about each connection that breaks; what broke it is said in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import contextlib
import errno
import functools
import gc
import hashlib
import json
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import trellis
from trellis import models as model_registry
from trellis.datasets import DATASETS
from trellis.runs.checkpoint import NO_USE_TO_RETRY, Checkpoints, misc_file
from trellis.runs.lock import writing
from trellis.runs.status import RunStatus
from trellis.trainers import TRAINERS
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.configuration import complete_config
from trellis.trainers.profile import profile
from trellis.trainers.report import describe, tryrun
from trellis.trainers.standing import Reference
from trellis.trainers.weights import plan_weights
from trellis.utils import dist_utils, rendezvous
from trellis.utils.cluster import BY_VARIABLES, Flags, Joined, Nodes, where_started
from trellis.utils.command import DEVICES, error_of_system, pick_device, run_command
from trellis.utils.config import apply_override, load_config
from trellis.utils.environment import keep_freed_memory
from trellis.utils.errors import ConfigError, UserError
from trellis.utils.processes import UNWIND_SECONDS, RankFailedError, end, run_all
from trellis.utils.random_utils import derive_seed
from trellis.utils.watch import LOOK_EVERY, Watch

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
    parser.add_argument("--num_nodes", type=int, help="nodes; this program is started on each (default: 1)")
    parser.add_argument("--node_rank", type=int, help="number of this node (default: 0)")
    parser.add_argument(
        "--num_gpus", type=int, help="processes on this node (default: -1, one per GPU, or one on a CPU)"
    )
    parser.add_argument("--master_addr", help="name of the first node")
    parser.add_argument("--master_port", type=int, help="port of the first node; 0: any free one, on one node")
    parser.add_argument(
        "--timeout",
        type=float,
        default=10,
        metavar="MINUTES",
        help="longest wait for another rank to start, or to take a step (default: 10)",
    )
    args = parser.parse_args(argv)
    if not args.output_dir:  # such as from an unset variable of a shell; it would be the current folder
        parser.error("--output_dir is empty; give the run folder")
    for name in ("config", "output_dir", "data_dir", "load_dir"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError:
            parser.error(f"--{name} is not UTF-8 text; rename the folder, or set PYTHONUTF8=1 if its name is UTF-8")
    if args.ckpt not in ("latest", "best", "none") and not args.ckpt.isdigit():
        parser.error(f"--ckpt is {args.ckpt!r}; it must be latest, best, none or a step")
    for name, low in (("auto_retry", 0), ("num_nodes", 1), ("node_rank", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name} is {value}; it must be at least {low}")
    if args.node_rank is not None and args.node_rank >= (args.num_nodes or 1):
        parser.error(f"--node_rank is {args.node_rank}; with --num_nodes {args.num_nodes or 1} it must be below that")
    if args.num_gpus is not None and (args.num_gpus == 0 or args.num_gpus < -1):
        parser.error(f"--num_gpus is {args.num_gpus}; it must be -1 or at least 1")
    if args.master_port is not None and not 0 <= args.master_port <= 65535:
        parser.error(f"--master_port is {args.master_port}; it must be from 0 to 65535")
    if not 0 < args.timeout < 1e6:
        parser.error(f"--timeout is {args.timeout:g}; it must be a number of minutes above 0")
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
    place: Joined | Nodes  # what started this process
    local: int  # processes that this program starts on this node; 1 if it is itself a rank
    world: int  # processes on all nodes


def plan_launch(args: argparse.Namespace) -> Launch:
    """Return the processes to start. Raise ConfigError for flags, variables or a device that do not fit together."""
    flags = Flags(args.num_nodes, args.node_rank, args.num_gpus, args.master_addr, args.master_port)
    place = where_started(os.environ, flags)
    device = pick_device(args.device).type
    available = torch.cuda.device_count() if device == "cuda" else 1
    if isinstance(place, Joined):
        # A starter may show each process its own GPU alone.
        if device == "cuda" and 1 < available <= place.local_rank:
            raise ConfigError(
                f"{place.starter} has started {place.local_world} processes on this node, which has {available} GPUs; "
                f"start at most {available}"
            )
        return Launch(device, place, 1, place.world)
    local = available if args.num_gpus in (None, -1) else args.num_gpus
    if device == "cuda" and local > available:
        raise ConfigError(f"--num_gpus is {local}, but this machine has {available}; give at most {available}")
    return Launch(device, place, local, local * place.num_nodes)


def launch(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Run on every process of this node and wait for them. Return the exit code."""
    if isinstance(plan.place, Joined):
        return join_and_run(args, config, plan.device, plan.place)
    if plan.world > 1:
        return spawn(args, config, plan, plan.place)
    return run(args, config, torch.device("cuda", 0) if plan.device == "cuda" else torch.device("cpu"))


def spawn(args: argparse.Namespace, config: Configuration, plan: Launch, node: Nodes) -> int:
    """Start this node's processes and wait for them, passing on signals. Raise the error that ended one of them."""
    # Hosted here and not by rank 0, so that a free port is known before the ranks start.
    store = rendezvous.host_store(node.port) if node.node_rank == 0 else None
    first = Joined(
        starter=node.starter,
        rank=node.node_rank * plan.local,
        world=plan.world,
        local_rank=0,
        local_world=plan.local,
        address=node.address,
        port=store.port if store is not None else node.port,
        hosted=True,
    )
    try:
        code = run_all(functools.partial(_spawned, args, config, plan.device, first), plan.local)
        if code:
            print(f"stopped by {signal.Signals(code - 128).name}; the same command continues", file=sys.stderr)
        return code
    except (RankFailedError, UserError, OSError) as error:
        if node.num_nodes > 1:
            rendezvous.end_all(first.address, first.port, f"node {node.node_rank}: {error}")
            time.sleep(2 * LOOK_EVERY)  # the other nodes' ranks read that in the store, which ends with this program
        if store is not None and isinstance(error, RankFailedError):
            print(f"the ranks stood: {rendezvous.where_all(store, plan.world)}", file=sys.stderr)
        raise


def _spawned(args: argparse.Namespace, config: Configuration, device: str, first: Joined, local_rank: int) -> int:
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // first.local_world))
    return join_and_run(args, config, device, replace(first, rank=first.rank + local_rank, local_rank=local_rank))


def join_and_run(args: argparse.Namespace, config: Configuration, device_type: str, place: Joined) -> int:
    """Run as one rank. Return the exit code. Raise RankFailedError if another rank has failed before."""
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", place.local_rank if torch.cuda.device_count() > 1 else 0)
    os.environ["LOCAL_WORLD_SIZE"] = str(place.local_world)  # for the number of loading processes
    host = rendezvous.host_store(place.port) if place.rank == 0 and not place.hosted else None
    # The first rank of a node speaks for the others; one that something started by itself may have its own terminal.
    speaks = place.local_rank == 0 or (place.starter == BY_VARIABLES and not place.hosted)
    group_store, watch_store = (
        rendezvous.join_store(place.address, place.port, place.attempt, args.timeout, speak=speaks) for _ in range(2)
    )
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    try:
        rendezvous.check_in(group_store, place.rank, place.world, args.timeout, gpu=gpu, speak=speaks)
    except dist.DistError as error:
        raise RankFailedError(
            f"rank {place.rank}: the host of the ranks' store at {place.address}:{place.port} has ended before all had "
            "come; its output says why"
        ) from error
    watch = Watch(watch_store, place.rank, place.world, args.timeout, speaks=speaks)
    watch.start()
    with watch.failing():
        dist_utils.init_process_group(device, group_store, place.rank, place.world)
        dist_utils.agree({"the configuration": digest(json.dumps(config.completed)), "the code": code_version()})
        code = run(args, config, device, watch)
        dist_utils.barrier()  # rank 0 may still be writing
        watch.stop()
        dist_utils.barrier()  # from here on ranks leave one by one, which none may take for a failure
    gc.collect()  # a trainer and its DDP refer to each other; both must go before the group they use
    dist.destroy_process_group()
    del host
    return code


def code_version() -> str:
    """Return the versions of this package, with a digest of its files, and of torch."""
    package = Path(trellis.__file__).parent
    files = [Path(__file__), *sorted(package.rglob("*.py"))]
    text = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return f"version {trellis.__version__} {digest(text)}, torch {torch.__version__}"


def digest(content: str | bytes) -> str:
    """Return text that differs for other content."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:12]


# --- one process -----------------------------------------------------------------------------------------


def run(args: argparse.Namespace, config: Configuration, device: torch.device, watch: Watch | None = None) -> int:
    """Build the trainer, then try, profile or train. Return the exit code."""
    main, training = dist_utils.is_main(), not (args.tryrun or args.profile)
    reference = Reference.of_config(args.config)
    lock = writing(args.output_dir, looking=not training) if main else contextlib.nullcontext()
    # Inside of the status, which then says what has ended another rank and not how this one noticed.
    failing = watch.failing() if watch is not None else contextlib.nullcontext()
    with lock, RunStatus(args.output_dir if main and training else None, shown=main) as status, failing:
        with status.doing("reading data and weights"):
            trainer = build_trainer(args, config, device)
        trainer.status, trainer.reference = status, reference
        if watch is not None:
            watch.step = lambda: trainer.step
        if main:
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
    if dist.is_initialized():
        whole = data.for_split("all")  # ranks that differ in validation objects would wait for each other
        dist_utils.agree(
            {"the data": f"{len(whole)} objects, {digest(json.dumps(whole.content_key(), sort_keys=True))}"}
        )
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
    """Return the last step that a run folder has saved and when, in ns; None if there is none."""
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps()
    return (steps[-1], (checkpoints.folder / misc_file(steps[-1])).stat().st_mtime_ns) if steps else None


# Trying again cannot help against a full or read-only disk, a quota, or missing permissions.
LASTING = (*NO_USE_TO_RETRY, errno.EPERM)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code.

    0: finished. 1: an error. 2 (by argparse): wrong flags. 128 + signal: stopped by it; the same command continues.
    """
    stopped = "stopped outside of training; the same command continues"
    return run_command(start, parse_args(argv), stopped, UNWIND_SECONDS)


def start(args: argparse.Namespace) -> int:
    """Check flags and configuration, and train. Return the exit code."""
    plan = plan_launch(args)
    return train(args, read_config(args, plan.world), plan)


def train(args: argparse.Namespace, config: Configuration, plan: Launch) -> int:
    """Launch the run, again if it fails in a way that may end otherwise. Return the exit code."""
    last = last_checkpoint(args.output_dir)
    # What has started the ranks restarts them, too; one of them alone could not go on.
    retries = 0 if args.tryrun or args.profile or isinstance(plan.place, Joined) else args.auto_retry
    before = None
    for attempt in range(retries + 1):
        try:
            # Once the run has saved, or gone back to --ckpt, a retry continues it. Before, --ckpt still holds.
            if attempt and last_checkpoint(args.output_dir) != last:
                args.ckpt = "latest"
            return launch(args, config, plan)
        except UserError:
            raise
        except OSError as error:
            print(f"error: {error_of_system(error)}", file=sys.stderr)
            if error.errno in LASTING:
                return 1
            failure = str(error)
        except RankFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            failure = str(error)
        except Exception as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error}"
        if attempt == retries:
            break
        saved = last_checkpoint(args.output_dir)
        if (saved, failure) == before:
            print("failed twice in the same way from the same state; not trying again", file=sys.stderr)
            break
        before = saved, failure
        print(f"failed; trying again ({attempt + 1} of {retries})", file=sys.stderr)
    return 1


if __name__ == "__main__":
    code = main()
    if code and dist.is_initialized():
        end(code)
    sys.exit(code)
