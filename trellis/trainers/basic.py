"""The training loop, and the parts it is put together from.

Read `run` first. A new objective is a subclass with `training_losses`; it inherits the rest.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from ..datasets.base import StandardDatasetBase
from ..datasets.batches import check_num_workers, endless_batches
from ..grids.preview import save_png
from ..models import build
from ..modules.model import Model
from ..runs.checkpoint import Checkpoints
from ..runs.folder import prepare_run_folder
from ..runs.lock import require_lock
from ..runs.saver import Saver
from ..runs.status import RunStatus, signal_name
from ..utils import dist_utils, signals
from ..utils.config import Count, Range
from ..utils.environment import tuned_convolutions, versions
from ..utils.errors import ConfigError
from ..utils.registry import did_you_mean
from . import data_changes, optim
from .bad_steps import BadSteps, require_finite
from .configuration import as_list, complete_config
from .ema import EMA
from .logger import PendingSteps, Progress, RunLog
from .part import Part
from .precision import Precision
from .sinks import check_wandb
from .skip import SkippableOptimizer, Undo
from .standing import Reference, RunSize, health, run_facts
from .stopping import StopRequests
from .validation import change, sample, scored_before
from .verdict import Course
from .weights import WeightPlan

# Timing cuDNN's algorithms takes about as long as 50 steps of a large network and makes them 4 % faster, so it pays for
# the shapes of training in a run of this many steps, and never for those of validation.
STEPS_WORTH_TUNING = 2000
# A quantizer reduces its statistics over ranks itself; DDP must not overwrite them with rank 0's. torch 2.13 renamed
# the argument.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


class BasicTrainer:
    """Trainer of models on a dataset, on one process or as one rank of several."""

    model_keys: tuple[str, ...] = ()  # keys that `models` must have
    optional_models: tuple[str, ...] = ()  # keys that `models` may have
    best_by = "iou"  # the validation score that is highest at the best step
    runtime_args = ("models", "dataset", "output_dir", "device", "plan", "config")

    def __init__(
        self,
        models: dict[str, Model],
        dataset: StandardDatasetBase,  # the training split
        *,
        output_dir: str,  # the run folder
        device: torch.device,
        plan: WeightPlan,  # where weights come from
        config: dict,  # as the user wrote it; kept in the run folder and in checkpoints
        # All that follows is `trainer.args` of a configuration.
        max_steps: Count,  # optimizer steps
        batch_size: Count | None = None,  # samples per step over all ranks
        batch_size_per_gpu: Count | None = None,  # samples per step of each rank; give one of the two
        batch_split: Count = 1,  # micro-batches per step of each rank (gradient accumulation)
        # the batch that lr, ema_rate and the codebook's rates are meant for; with another one they are scaled (see
        # `batch_ratio`); null: they are taken as they are
        reference_batch: Count | None = None,
        optimizer: dict,  # {"name", "args"} of a class of torch.optim, or Muon
        # {"name", "args", "warmup_steps"} of a class of torch.optim.lr_scheduler, or LinearWarmupLRScheduler
        lr_scheduler: dict | None = None,
        # "rms": the lr of each tensor is the given one times its RMS at the start of the run
        lr_scaling: optim.LrScaling = "none",
        lr_multipliers: dict[str, Annotated[float, Range(0, open_min=True)]] | None = None,  # {model: factor of its lr}
        grad_clip: dict | float | None = None,  # largest gradient norm, or {"name": "AdaptiveGradClipper", "args"}
        freeze: Sequence[str] = (),  # keys of models that are not trained
        # decay of the averaged weights per step; a list keeps several averages
        ema_rate: Annotated[float, Range(0, 1)] | list[Annotated[float, Range(0, 1)]] = 0.9999,
        # null: fp32; "amp": autocast around fp32 weights; "inflat_all": TRELLIS's name, the same (see `precision`)
        mix_precision_mode: Literal["amp", "inflat_all"] | None = "amp",
        mix_precision_dtype: Literal["float16", "bfloat16"] = "bfloat16",
        fp16_scale_growth: Annotated[float, Range(0)] = 1e-3,  # log2 growth of the fp16 loss scale per step
        finetune_ckpt: dict[str, str] | None = None,  # {model: weights file, exported pair or Hub path} to start from
        log_param_stats: bool = False,  # log the RMS of every parameter
        prefetch_data: bool = True,  # load several batches ahead
        num_workers: Annotated[int, Range(0)] | None = None,  # loading processes per rank; null: chosen by the machine
        seed: Annotated[int, Range(0)] = 0,  # of all random numbers
        i_print: Count = 1000,  # steps between lines on the terminal
        i_log: Count = 500,  # steps between entries in log.txt and TensorBoard
        i_eval: Count = 10000,  # steps between validations
        val_objects: Count | None = 1024,  # most validation objects that these score; null: all
        i_sample: Count = 10000,  # steps between pictures
        i_save: Count = 10000,  # steps between checkpoints
        i_ddpcheck: Count = 10000,  # steps between checks that ranks have equal weights
        keep_last: Count | None = None,  # checkpoints to keep beside the best one; null: all
        # steps in a row whose loss or gradient is not finite that end the run; half of max_steps if that is less
        max_bad_steps: Count = 20,
        wandb: dict | None = None,  # {"project", …} for curves in Weights & Biases too; see `sinks.WANDB_ARGS`
    ):
        self.models, self.dataset, self.device, self.config = models, dataset, device, config
        self.output_dir, self.plan = Path(output_dir), plan
        self.checkpoints = Checkpoints(output_dir)
        self.max_steps, self.batch_split, self.seed = max_steps, batch_split, seed
        world = dist_utils.world_size()
        self.batch_per_rank = samples_per_rank(batch_size, batch_size_per_gpu, world, "trainer.args")
        self.global_batch = self.batch_per_rank * world
        self.micro_batch_size = self.batch_per_rank // batch_split
        self.reference_batch = reference_batch
        self.optimizer_spec, self.scheduler_spec = optimizer, lr_scheduler
        self.lr_scaling, self.lr_multipliers = lr_scaling, lr_multipliers
        self.clipper = optim.build_grad_clipper(grad_clip)
        self.ema_rates = [float(rate) for rate in as_list(ema_rate)]
        self.log_param_stats, self.prefetch_data, self.num_workers = log_param_stats, prefetch_data, num_workers
        self.wandb = wandb
        self.i_log, self.i_eval, self.val_objects = i_log, i_eval, val_objects
        self.i_sample, self.i_save, self.i_ddpcheck, self.keep_last = i_sample, i_save, i_ddpcheck, keep_last

        self.max_bad_steps = min(max_bad_steps, max(2, (max_steps + 1) // 2))

        self.precision = Precision(mix_precision_mode, mix_precision_dtype, device, fp16_scale_growth)

        self.trained = {name: model for name, model in models.items() if name not in freeze}
        self.frozen = {name: model for name, model in models.items() if name in freeze}
        plan.load(models)
        for name, model in models.items():
            self.precision.prepare(model)
            model.to(device).requires_grad_(name in self.trained).train(name in self.trained)

        self.parts: dict[str, Part] = {}  # a subclass adds its own; the name is the key of a part's state
        self.step, self.samples_seen = 0, 0
        self.seconds, self.logged_seconds = 0.0, 0.0  # spent in steps, since the run began
        self.best: dict | None = None  # {"step", "by", "score"} of the best validation
        self.object_scores: Tensor | None = None  # [n], `best_by` of each object in the last validation, on every rank
        self.course = Course(self.best_by)
        self.stop_requests = StopRequests(device)
        self.stop: signals.Signals | None = None  # what this rank has got of signals, in the loop
        self.validation_stopped: int | None = None  # the signal that stopped the last validation, on every rank
        self.validation_owed = False  # the checkpoint to continue from lacks its step's validation
        self.checkpoint_owed = False  # one was due while steps were bad
        self.order = dataset.order(seed)
        self.pending = PendingSteps()
        self.progress = Progress(max_steps, i_print)
        self.saver = Saver(self.checkpoints, lambda step: self.status.set(checkpoint_step=step))  # of the main process
        # train.py gives the two: a status that keeps its file, and the curve beside the configuration.
        self.status = RunStatus(None, shown=dist_utils.is_main())
        self.reference: Reference | None = None

    # --- for subclasses ---

    def training_losses(self, *args: Any, **batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (losses, status) of a micro-batch: scalars. losses["loss"] is optimized, all are logged."""
        raise NotImplementedError

    def no_grad_if_frozen(self, name: str) -> contextlib.AbstractContextManager:
        """Return `no_grad` for a frozen model whose inputs need no gradient, else an empty context."""
        return torch.no_grad() if name in self.frozen else contextlib.nullcontext()

    def initialize_models(self) -> None:
        """Give models without loaded weights a start that depends on the data."""

    def validate(self) -> dict[str, float] | None:
        """Return scores on the validation split, the same on every rank; None without such a split.

        The step with the highest score `best_by` is the best one. Also set `object_scores`, if objects have it, or
        `validation_stopped`, with a result of None, if `signum` told to stop on any rank.
        """
        return None

    def run_snapshot(self) -> dict[str, Any]:
        """Return pictures by name, [H, W, 3] uint8."""
        return {}

    def facts(self) -> list[str]:
        """Return lines on what is trained, for --tryrun."""
        if self.batch_ratio == 1:
            return []
        rates = ", ".join(f"{rate:g} becomes {rate**self.batch_ratio:.6g}" for rate in self.ema_rates)
        return [
            f"{self.global_batch} samples per step, {self.batch_ratio:g} times the reference_batch: lr times "
            f"{self.batch_ratio**0.5:.3g}, ema_rate {rates or 'none'}"
        ]

    @property
    def batch_ratio(self) -> float:
        """Samples per step in reference batches, κ; 1 without a reference.

        With κ times the samples, a step is to do what κ steps did: decays are raised to the power of κ
        (arXiv:2307.13813, Sec. 3) and intervals divided by it. lr is multiplied by √κ, the rule for Adam
        (arXiv:2205.10287), whose steps do not grow with the gradient either.
        """
        return self.global_batch / self.reference_batch if self.reference_batch else 1.0

    @classmethod
    def check_config(cls, config: dict, world_size: int) -> dict[str, Any]:
        """Return the completed configuration (see `complete_config`).

        Raise ConfigError for anything in it that cannot run, before data are read or memory is allocated.
        """
        config = complete_config(config)
        with torch.device("meta"):  # shapes only: finds what a constructor refuses, at no cost
            models = {name: build(spec, f"models.{name}") for name, spec in config["models"].items()}
        known = (*cls.model_keys, *cls.optional_models)
        for key in models:
            if key not in known:
                raise ConfigError(f"models.{key} is unknown to {cls.__name__}{did_you_mean(key, known)}")
        for key in cls.model_keys:
            if key not in models:
                raise ConfigError(f"models.{key} is missing; {cls.__name__} trains {', '.join(cls.model_keys)}")

        args, where = config["trainer"]["args"], "trainer.args"
        for name in args["freeze"]:
            if name not in models:
                raise ConfigError(f"{where}.freeze has {name!r}{did_you_mean(name, models)}")
        trained = [name for name in models if name not in args["freeze"]]
        if not trained:
            raise ConfigError(f"{where}.freeze names every model, so nothing would be trained; leave one out")
        for name in args["finetune_ckpt"] or ():
            if name not in models:
                raise ConfigError(f"{where}.finetune_ckpt has {name!r}{did_you_mean(name, models)}")
        per_rank = samples_per_rank(args["batch_size"], args["batch_size_per_gpu"], world_size, where)
        if per_rank % args["batch_split"]:
            split = args["batch_split"]
            raise ConfigError(f"{where}.batch_split is {split}, which does not divide the {per_rank} samples of a rank")
        check_num_workers(args["num_workers"], f"{where}.num_workers")
        optim.check_optimizer(args["optimizer"], f"{where}.optimizer")
        optim.check_lr_factors(args["lr_scaling"], args["lr_multipliers"], trained, args["optimizer"], where)
        optim.check_lr_scheduler(args["lr_scheduler"], args["optimizer"], f"{where}.lr_scheduler")
        optim.build_grad_clipper(args["grad_clip"], f"{where}.grad_clip")
        check_wandb(args["wandb"], f"{where}.wandb")
        cls.check_models(models, config)
        return config

    @classmethod
    def check_models(cls, models: dict[str, Model], config: dict) -> None:
        """Raise ConfigError for models that do not fit each other, the data's settings or the trainer's arguments.

        models: on the meta device. config: completed.
        """

    # --- the loop ---

    def run(self) -> int | None:
        """Train until max_steps, continuing from the plan's checkpoint.

        Return the signal that stopped training, after a checkpoint; None if it reached max_steps.
        """
        self.status.set(max_steps=self.max_steps, **run_facts(self.size, self.device))
        for part in self.parts.values():
            with self.status.doing("opening caches"):
                part.open()
        self.open_folder()
        if self.plan.resume is None:
            with self.status.doing("initializing models from the data"):
                self.initialize_models()
                self.broadcast_models()
        self.build_training_state()
        if self.plan.resume is not None:
            with self.status.doing("loading the training state"):
                self.load_training_state(*self.plan.resume)
            scores = self.course.last_scores()
            self.status.set(step=self.step, scores=scores, best=self.best, checkpoint_step=self.step)
            before = self.samples_seen / self.step if self.step else self.global_batch
            if before != self.global_batch:
                self.say(f"from here on a step has {self.global_batch} samples; so far it had {before:g} on average")
        self.check_ranks_agree(ConfigError)
        self.open_log()

        if self.plan.resume is None:
            # Step 0 keeps the scores before training and, in the checkpoint, the codebook's first state.
            self.log(self.measure())
            self.snapshot()
            self.save()
        elif self.validation_owed:
            self.log(self.measure())
        if self.step >= self.max_steps:
            self.say(f"{self.output_dir} is finished at step {self.step}; nothing is left to do")
        stopping: int | None = None
        tuned = self.max_steps - self.step >= STEPS_WORTH_TUNING
        self.status.set(state="training")
        with (
            signals.noted() as stop,
            self.saver,
            contextlib.closing(self.progress),
            contextlib.closing(self.batches()) as batches,
        ):
            self.stop = stop
            if dist_utils.is_main():
                self.progress.open(self.step)
            while self.step < self.max_steps:
                started, lr = time.monotonic(), self.lr
                batch = next(batches)
                with tuned_convolutions(tuned):
                    losses, status = self.run_step(batch)
                self.seconds += time.monotonic() - started
                self.step += 1
                self.samples_seen += self.global_batch
                self.pending.add(self.step, {**losses, **status}, lr=lr)
                if dist_utils.is_main():
                    self.progress.show(self.step, losses)
                    self.status.at_step(self.step)
                    self.saver.check()

                scores = self.measure() if self.due(self.i_eval) else {}
                improved = bool(scores) and self.best_step == self.step
                if self.step < self.max_steps:
                    stopping = self.validation_stopped or self.stop_requests.stop_requested(self.step, stop.signum)
                saving = self.due(self.i_save) or improved or stopping or self.checkpoint_owed
                if self.due(self.i_log) or scores or saving or self.bad_steps.look(self.step):
                    self.log(scores)
                if scores and self.step == self.max_steps and self.best_step == 0:
                    self.warn_if_worse()
                if self.due(self.i_sample):
                    self.snapshot()
                if self.due(self.i_ddpcheck):
                    self.check_ranks_agree()
                if saving:
                    # While steps are bad, the last good checkpoint stays the last one.
                    must = improved or stopping or self.step == self.max_steps
                    self.checkpoint_owed = not must and self.bad_steps.running
                    if not self.checkpoint_owed:
                        self.save()
                if stopping:
                    break
            with self.status.doing("writing the last checkpoint", state="saving"):
                self.saver.wait()
        if stopping:
            self.say(f"stopped at step {self.step}; the same command continues from there")
        if dist_utils.is_main():
            self.log_files.close()
        ended = {"state": "stopped", "reason": signal_name(stopping)} if stopping else {"state": "finished"}
        self.status.set(**ended, eta_s=None)
        return stopping

    def due(self, every: int) -> bool:
        """Return whether something done every `every` steps is due now; at the last step everything is."""
        return self.step % every == 0 or self.step == self.max_steps

    def batches(self) -> Generator[dict[str, Tensor], None, None]:
        """Yield this rank's batches without end, from the first sample not seen yet."""
        return endless_batches(
            self.dataset,
            self.batch_per_rank,
            seed=self.seed,
            start=self.samples_seen,
            device=self.device,
            num_workers=self.num_workers,
            prefetch=self.prefetch_data,
            needs_items=lambda: not any(part.replaces_items() for part in self.parts.values()),
            prepare=self.prepare,
        )

    def prepare(self, batch: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        """Return the batch as `training_losses` takes it. indices: [B] int64 on the CPU, the items in the dataset."""
        for part in self.parts.values():
            batch = part.prepare(batch, indices)
        return batch

    def objects_of_step(self, step: int) -> np.ndarray:
        """Return the items in the dataset, [B] int64, that all ranks had in a step of this process."""
        first = self.samples_seen - (self.step - step + 1) * self.global_batch
        return self.order.items(first, self.global_batch)

    def run_step(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take one optimizer step on this rank's share of the batch.

        Return losses and status, averaged over micro-batches, as tensors on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.undo.remember()
        losses, status = self.accumulate_gradients(batch)
        norm = torch.zeros((), device=self.device)
        if self.parameters:
            with record_function("clip"):
                self.precision.unscale(self.optimizer)
                norm = self.clipper(self.parameters)
        skip = self.bad_steps.judge(losses["loss"], norm, overflow_expected=self.precision.skips_overflow)
        if self.parameters:
            with record_function("optimizer"):
                self.precision.step(self.skippable, skip)
        else:
            self.optimizer.step()  # of nothing; torch warns when a schedule moves before its optimizer
        with record_function("schedule"):
            optim.step_lr_scheduler(self.scheduler, self.optimizer, losses["loss"])
        with record_function("ema"):
            self.undo.undo(skip)
            self.ema.update(self.step + 1, skip)
        status |= {"grad_norm": norm, "bad_steps": self.bad_steps.total}
        for part in self.parts.values():
            status |= part.after_step(self.step + 1)
        return losses, status

    def accumulate_gradients(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the objective forward and backward on each micro-batch; ranks reduce their gradients after the last.

        Return losses and status, averaged over micro-batches.
        """
        micro_batches = self.split_batch(batch)
        losses: dict[str, Tensor] = {}
        status: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            with contextlib.nullcontext() if last else self.without_reduction():
                with record_function("forward"), self.precision.autocast():
                    new_losses, new_status = self.objective(micro_batch)
                if self.parameters:
                    with record_function("backward"):
                        self.precision.backward(new_losses["loss"] / len(micro_batches))
            for total, values in ((losses, new_losses), (status, new_status)):
                for name, value in values.items():
                    total[name] = total.get(name, 0) + value.detach() / len(micro_batches)
        return losses, status

    def split_batch(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the batch's micro-batches."""
        chunks = {name: value.chunk(self.batch_split) for name, value in batch.items()}
        return [dict(zip(chunks, values, strict=True)) for values in zip(*chunks.values(), strict=True)]

    def without_reduction(self) -> contextlib.AbstractContextManager:
        """Return a context in which backward leaves gradients on this rank."""
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return contextlib.nullcontext()

    # --- set-up ---

    def open_folder(self) -> None:
        """Make the run folder ready to continue after the plan's checkpoint."""
        if dist_utils.is_main():
            step = self.plan.resume[1] if self.plan.resume else 0
            prepare_run_folder(self.checkpoints, self.config, step, {"seed": self.seed, "device": str(self.device)})
        dist_utils.barrier()

    def broadcast_models(self) -> None:
        """Give every rank the trained models of the main process."""
        for model in self.trained.values():
            dist_utils.broadcast_(model.state_dict().values())

    def build_training_state(self) -> None:
        """Build optimizer, schedule, averages and gradient reduction around the models as they are now.

        Not part of the constructor, since "rms" scaling and averages start from the initialized weights.
        """
        named = {
            f"{key}.{name}": parameter
            for key, model in self.trained.items()
            for name, parameter in model.named_parameters()
        }
        self.parameters = list(named.values())
        # A codebook of moving averages has no parameters. Schedules need an optimizer, and that needs a parameter: this
        # one stands in and never gets a gradient.
        self.optimizer = optim.build_optimizer(
            self.optimizer_spec,
            named or {"none": nn.Parameter(torch.zeros(1, 1, device=self.device))},
            self.lr_scaling,
            lr_multipliers=self.lr_multipliers,
            hidden={f"{key}.{name}" for key, model in self.trained.items() for name in model.hidden_matrices()},
        )
        optim.scale_for_batch(self.optimizer, self.batch_ratio)
        self.scheduler = optim.build_lr_scheduler(self.scheduler_spec, self.optimizer)
        self.ema = EMA(self.trained, self.ema_rates, self.batch_ratio)
        self.skippable = SkippableOptimizer(self.optimizer)
        self.undo = Undo(self.trained.values(), self.parts.values())
        self.bad_steps = BadSteps(
            self.max_bad_steps, len(self.dataset), self.objects_of_step, self.dataset.sha256, self.device
        )
        self.objective = build_objective(self.trained, self.training_losses, self.device)

    def open_log(self) -> None:
        """Open the logs after the step reached so far."""
        if dist_utils.is_main():
            # A new run also logs step 0.
            step = self.step if self.plan.resume else -1
            with self.status.doing("opening the logs"):
                self.log_files = RunLog(self.output_dir, step, self.config, self.wandb, self.say)

    def forget_rows(self, name: str, keys: tuple[str, ...], rows: Tensor) -> None:
        """Reset what the optimizer and the averages remember of rows [n] int64 of these tensors of a model."""
        parameters = dict(self.models[name].named_parameters())
        for key in keys:
            if key in parameters:
                optim.forget_rows(self.optimizer, parameters[key], rows)
        self.ema.copy_rows(name, keys, rows)

    # --- checkpoints ---

    def save(self) -> None:
        """Begin to write this step's checkpoint. Raise DivergedError if steps are bad or a weight is not finite."""
        self.require_finite()
        for name, model in self.trained.items():
            require_finite(model.state_dict(), f"step {self.step}: {name}")
        self.skippable.settle()
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if dist_utils.is_main():
            misc = {
                "config": self.config,
                "samples_seen": self.samples_seen,
                "seconds": self.seconds,
                "seed": self.seed,
                **self.data_facts,
                "scored": self.scored,
                "validation_owed": self.validation_stopped is not None,
                "best": self.best,
                "versions": versions(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "grad_clip": self.clipper.state_dict(),
                "precision": self.precision.state_dict(),
                "bad_steps": self.bad_steps.state_dict(),
                "course": self.course.state_dict(),
                **{name: state for name, state in states.items() if state},
            }
            with self.status.doing("writing the checkpoint", state="saving"):
                self.saver.save(
                    self.step,
                    {name: model.state_dict() for name, model in self.trained.items()},
                    self.ema.averages,
                    {name: model.state_dict() for name, model in self.frozen.items()},
                    misc,
                    None if self.bad_steps.running else self.keep_last,
                )

    def load_training_state(self, checkpoints: Checkpoints, step: int) -> None:
        """Load all that a step needs to continue exactly, except the models' weights, which the plan has loaded."""
        misc = checkpoints.read_misc(step, mmap=False)
        assert misc is not None  # plan_weights resumes only from misc files of this program
        self.step, self.samples_seen = step, misc["samples_seen"]
        self.seconds = self.logged_seconds = misc["seconds"]
        self.best = misc["best"]
        self.validation_owed = misc.get("validation_owed", False)
        self.optimizer.load_state_dict(misc["optimizer"])
        optim.scale_for_batch(self.optimizer, self.batch_ratio)  # the run so far may have had another batch
        if self.scheduler is not None:
            self.scheduler.load_state_dict(misc["lr_scheduler"])
        self.clipper.load_state_dict(misc["grad_clip"])
        self.precision.load_state_dict(misc["precision"])
        self.bad_steps.load_state_dict(misc.get("bad_steps", {}))  # older checkpoints have none
        self.ema.load(checkpoints, step)
        if dist_utils.is_main():
            for line in data_changes.changes(misc, self.data_facts, self.dataset):
                self.say(f"note: the data have changed since step {step}: {line}")
            before = scored_before(misc, self.size.val)
            if said := change(before, (self.scored, self.size.val)):
                self.say(f"note: {said}")
            if before[0] == self.scored and data_changes.same_validation(misc, self.data_facts):
                self.course.load_state_dict(misc["course"])
        for name, part in self.parts.items():
            if name in misc:  # older checkpoints lack parts that were added since
                part.load_state_dict(misc[name])

    def require_finite(self) -> None:
        """Raise DivergedError after too many bad steps, or if fp16 no longer recovers from overflow."""
        if self.bad_steps.too_many:
            self.saver.wait()  # the last good checkpoint may be in the making
            dist_utils.barrier()
            raise self.bad_steps.diverged(self.step, self.checkpoints, self.lr, ", ".join(self.plan.origin.values()))
        self.precision.require_hope(self.step)

    @cached_property
    def data_facts(self) -> dict[str, Any]:
        """What identifies the data, as they were when the run started."""
        with self.status.doing("looking at the data's files"):
            return data_changes.facts_of(self.dataset)

    # --- reporting ---

    @cached_property
    def size(self) -> RunSize:
        """The size of models, data and schedule."""
        return RunSize.of(self.models, self.dataset, self.max_steps, self.global_batch)

    @cached_property
    def validation(self) -> tuple[StandardDatasetBase, np.ndarray] | None:
        """The validation split, and the indices of its objects that are scored, [n] int64; None without such a split.

        See `validation.sample`.
        """
        if not self.dataset.split_sizes()["val"]:
            return None
        dataset = self.dataset.for_split("val")
        return dataset, sample(dataset, self.val_objects)

    @property
    def signum(self) -> int | None:
        """The signal to stop for that this rank has got in the loop; None at the last step, which ends it anyway."""
        return self.stop.signum if self.stop is not None and self.step < self.max_steps else None

    @property
    def scored(self) -> int:
        """Objects that a validation scores."""
        return 0 if self.validation is None else len(self.validation[1])

    @property
    def lr(self) -> float:
        """Learning rate on the configuration's scale."""
        return optim.current_lr(self.optimizer)

    @property
    def best_step(self) -> int | None:
        """Step of the best validation so far."""
        return self.best["step"] if self.best else None

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if dist_utils.is_main():
            self.progress.say(text)

    def measure(self) -> dict[str, float]:
        """Validate, print the scores, and remember the best step. Return scores to log; {} without validation."""
        started = time.monotonic()
        scores = self.validate()
        if self.validation_stopped is not None:
            name = signal_name(self.validation_stopped)
            self.say(f"step {self.step}  {name} has stopped the validation; the same command begins with it")
            return {}
        if scores is None:
            return {}
        seconds = time.monotonic() - started
        said = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.say(f"step {self.step}  validation  {said}  in {seconds:.1f} s")
        self.course.add(self.step, scores, self.object_scores)
        if self.best is None or scores[self.best_by] > self.best["score"]:
            self.best = {"step": self.step, "by": self.best_by, "score": scores[self.best_by]}
        self.status.set(scores=self.course.last_scores(), best=self.best)
        return {f"val/{name}": value for name, value in scores.items()} | {"validation_seconds": seconds}

    def warn_if_worse(self) -> None:
        """Say so if the run has made the models worse. Call it at its end, after `log`."""
        first_loss, last_loss = self.bad_steps.mean_losses()
        warning = self.course.verdict(
            trained=list(self.trained),
            lr=self.lr,
            first_loss=first_loss,
            last_loss=last_loss,
            bad_steps=int(self.bad_steps.total),
        )
        if warning is not None:
            self.say(warning)

    def log(self, scores: dict[str, float]) -> None:
        """Write pending steps to log.txt, one line each, then the scores; their means and the scores to TensorBoard."""
        started = time.monotonic()
        rows = self.pending.fetch()  # waits for the device
        self.seconds += time.monotonic() - started
        for line in self.bad_steps.report(rows):
            self.say(line)
        if dist_utils.is_main():
            self.write_log(rows, scores)
        self.require_finite()

    def write_log(self, rows: list[dict[str, Any]], scores: dict[str, float]) -> None:
        """Write fetched steps and scores to the log files."""
        require_lock(self.output_dir)
        summary = dict(scores)
        if rows:
            elapsed, self.logged_seconds = self.seconds - self.logged_seconds, self.seconds
            summary["samples_per_second"] = len(rows) * self.global_batch / elapsed
            if self.device.type == "cuda":
                summary["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        good = [row for row in rows if "objects" not in row]  # the others have NaN
        names = [name for name in (good[0] if good else ()) if name != "step"]
        means = {name: sum(row[name] for row in good) / len(good) for name in names}
        beside = {}
        if self.reference and scores:
            beside = self.reference.beside(
                self.size, self.step, self.samples_seen, iou=scores.get("val/iou"), loss=means.get("loss")
            )
        if beside:
            self.say(beside["note"])
            summary |= {"reference/iou": beside["iou"]} if beside["iou"] is not None else {}
        self.log_files.write([*rows, {"step": self.step, "seconds": self.seconds, **summary}])
        self.status.set(step=self.step, **health(rows, summary), **({"reference": beside} if beside else {}))
        if self.log_param_stats:
            for key, model in self.trained.items():
                for name, parameter in model.named_parameters():
                    means[f"rms/{key}.{name}"] = parameter.detach().float().square().mean().sqrt().item()
        self.log_files.scalars({**means, **summary}, self.step)

    def snapshot(self) -> None:
        """Save pictures as samples/{name}_step0000100.png and show them in TensorBoard."""
        if dist_utils.is_main():
            require_lock(self.output_dir)
            with self.status.doing("drawing pictures"):
                pictures = self.run_snapshot()
            for name, picture in pictures.items():
                path = self.output_dir / "samples" / f"{name}_step{self.step:07d}.png"
                path.parent.mkdir(exist_ok=True)
                save_png(path, picture)
                self.log_files.image(name, picture, self.step)
        dist_utils.barrier()

    def check_ranks_agree(self, error: type[Exception] = RuntimeError) -> None:
        """Raise an error if a rank's weights differ from rank 0's in any bit, naming both."""
        if dist_utils.world_size() > 1:
            dist_utils.agree(
                {
                    f"{key}.{name} at step {self.step}": dist_utils.digest(value)
                    for key, model in self.models.items()
                    for name, value in model.state_dict().items()
                },
                error,
            )

    # --- without training ---

    def tryrun(self) -> dict[str, float]:
        """Run one sample forward and backward, without a step; write nothing. Return losses."""
        if dist_utils.is_main():
            for part in self.parts.values():
                part.preview()
        self.build_training_state()
        batch = next(self.batches())
        losses, _ = self.accumulate_gradients({name: value[:1] for name, value in batch.items()})
        return {name: value.item() for name, value in losses.items()}


def samples_per_rank(batch_size: int | None, batch_size_per_gpu: int | None, world_size: int, where: str) -> int:
    """Return the samples per step of a rank from one of the two arguments. Raise ConfigError unless there is one that
    divides over the ranks. where: the path of both arguments' parent."""
    if batch_size is not None and batch_size_per_gpu is None:
        if batch_size % world_size:
            raise ConfigError(f"{where}.batch_size is {batch_size}, which does not divide over {world_size} ranks")
        return batch_size // world_size
    if batch_size is None and batch_size_per_gpu is not None:
        return batch_size_per_gpu
    raise ConfigError(f"{where}: give either batch_size (over all ranks) or batch_size_per_gpu, not both or none")


# --- the loss as one module ---


class Objective(nn.Module):
    """`training_losses` as a module, which DDP can wrap."""

    def __init__(self, trained: Mapping[str, nn.Module], training_losses: Callable):
        super().__init__()
        self.models = nn.ModuleDict(trained)
        self.training_losses = training_losses

    def forward(self, batch: dict[str, Tensor]):
        return self.training_losses(**batch)


def build_objective(trained: Mapping[str, nn.Module], training_losses: Callable, device: torch.device) -> nn.Module:
    """Return the objective, wrapped in DDP if there are several ranks and gradients to reduce."""
    module = Objective(trained, training_losses)
    if not dist.is_initialized() or not any(True for _ in module.parameters()):
        return module
    ids = [device.index] if device.type == "cuda" else None
    options: dict[str, Any] = {"device_ids": ids, "gradient_as_bucket_view": True, _SYNC_BUFFERS: False}
    return DistributedDataParallel(module, **options)
