"""Where each model's weights come from when a run starts.

Each model takes the first of these that has it: a complete checkpoint in the run's own folder, `--load_dir` (a run or a
saved tokenizer), `finetune_ckpt`, fresh initialization. The plan is made before data or a GPU are touched.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..models import load_weights, pretrained_files
from ..runs.checkpoint import Checkpoints, model_file
from ..runs.open import open_run
from ..tokens.sources import CONFIG, WEIGHTS, check_folder
from ..utils.config import differences, differing_keys, fill_in, load_config
from ..utils.errors import CheckpointError, ConfigError
from .configuration import complete_config
from .schedule_length import LENGTHS, misfit

SCHEDULE = "trainer.args.lr_scheduler"
# Trainer arguments that a resumed run must keep: the optimizer's state or the models' roles depend on them.
FIXED_ON_RESUME = ("optimizer", "lr_scheduler", "lr_scaling", "lr_multipliers", "freeze", "ema_rate")


@dataclass
class WeightPlan:
    """Where the weights of a run come from."""

    files: dict[str, Path | None] = field(default_factory=dict)  # {model: weights file, or None to initialize}
    origin: dict[str, str] = field(default_factory=dict)  # {model: the same in words}
    tokenizer: Path | None = None  # the file among these that has the weights of several models
    resume: tuple[Checkpoints, int] | None = None  # the checkpoint and step whose training state continues too
    notes: list[str] = field(default_factory=list)  # for the user

    def load(self, models: dict) -> None:
        """Load the planned files into the models. Raise CheckpointError if a file does not fit or is not finite."""
        for name, model in models.items():
            file = self.files[name]
            if file is not None:
                load_weights(model, file, part=name if file == self.tokenizer else None)
                _require_finite(model.state_dict(), name, file)


def plan_weights(config: dict, trainer_class: type, output_dir: str, load_dir: str | None, ckpt: str) -> WeightPlan:
    """Decide where weights come from. The Hub is asked only for what nothing local has.

    config: as written or completed.
    ckpt: "latest", "best", "none" or a step, of output_dir if it has a complete checkpoint, else of load_dir.
    Raise CheckpointError or ConfigError if a source that was named cannot serve, or a frozen model has no weights.
    """
    config = complete_config(config)
    names = list(config["models"])
    own = Checkpoints(output_dir)
    if own.steps():
        own_step = own.resolve(ckpt)
        if own_step is None:
            raise CheckpointError(
                f"{output_dir} already has checkpoints, which --ckpt none would start over; choose another --output_dir"
            )
        return _resume(config, own, own_step)

    args = config["trainer"]["args"]
    plan = WeightPlan(dict.fromkeys(names), {})
    if load_dir is not None and ckpt != "none" and (Path(load_dir) / WEIGHTS).is_file():
        _take_tokenizer(plan, Path(load_dir), ckpt)
    elif load_dir is not None and ckpt != "none":
        run = open_run(load_dir, ckpt, "--load_dir")
        if run.misc and _same_kind(config, trainer_class, run.misc["config"]):
            return _resume(config, run.checkpoints, run.step)
        for name in names:
            path = run.weight_file(name)
            if path.is_file():
                kind = "raw" if path == run.weight_file(name, averaged=False) else "averaged"
                plan.files[name], plan.origin[name] = path, f"{path} ({kind} weights)"
            else:
                plan.notes.append(f"{load_dir} at step {run.step} has no {name}")
    elif ckpt not in ("latest", "none"):
        raise CheckpointError(f"--ckpt {ckpt}: {own.folder} has no complete checkpoint; give --load_dir too")

    # A run that goes on keeps its schedule, and is judged by `_resume`.
    if problem := misfit(args["lr_scheduler"], args["max_steps"], SCHEDULE):
        raise ConfigError("; ".join(problem))
    for name in names:
        source = (args["finetune_ckpt"] or {}).get(name)
        if plan.files[name] is None and source is not None:
            plan.files[name] = _finetune_file(source, name)
            plan.origin[name] = f"{source} (finetune_ckpt)"
    for name in names:
        if plan.files[name] is None:
            if name in args["freeze"]:
                raise CheckpointError(
                    f"{name} is frozen but has no weights: give --load_dir with a run that trained it, or "
                    f"trainer.args.finetune_ckpt.{name} with a file, an exported pair or a Hub path"
                )
            plan.origin[name] = "initialized"
    return plan


def _take_tokenizer(plan: WeightPlan, folder: Path, ckpt: str) -> None:
    """Plan to take weights from a folder of a tokenizer's `save_pretrained`. Raise CheckpointError if it is none."""
    check_folder(folder)
    if ckpt != "latest":
        raise CheckpointError(f"--ckpt {ckpt}: {folder} is a saved tokenizer and has no steps; leave --ckpt out")
    plan.tokenizer = folder / WEIGHTS
    known = load_config(str(folder / CONFIG))["models"]
    for name in plan.files:
        if name in known:
            plan.files[name], plan.origin[name] = plan.tokenizer, f"{folder} (saved tokenizer)"
        else:
            plan.notes.append(f"{folder} has no {name}")


def _require_finite(state: dict[str, Tensor], name: str, file: Path) -> None:
    """Raise CheckpointError naming the first tensor of a model that has NaN or infinity. file: where it is from."""
    for key, value in state.items():
        bad = ~value.isfinite()
        if bad.any():
            at = [int(place) for place in bad.nonzero()[0]]
            raise CheckpointError(
                f"{file}: {key} of {name} has {int(bad.sum())} numbers of {bad.numel()} that are not finite, such as "
                f"{value[tuple(at)].item()} at {at}; nothing can be trained from it. Give weights of an earlier "
                "checkpoint (--ckpt), or of another run"
            )


def _finetune_file(source: str, name: str) -> Path:
    if source.endswith((".pt", ".safetensors")):
        if not Path(source).is_file():
            raise CheckpointError(f"trainer.args.finetune_ckpt.{name} is {source}, which is not there")
        return Path(source)
    try:
        return Path(pretrained_files(source)[1])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. The weights of {name} are needed: give --load_dir with a run that trained it, or set "
            f"trainer.args.finetune_ckpt.{name} to a local file or exported pair"
        ) from error


def _same_kind(config: dict, trainer_class: type, other: dict) -> bool:
    """Return whether another run's configuration trains the same models with the same trainer.

    config: completed. other: as that run's user wrote it; only weights may be taken of it, so it is not checked.
    """
    name, frozen = config["trainer"]["name"], config["trainer"]["args"]["freeze"]
    if other["trainer"]["name"] != name:
        return False
    return sorted(fill_in(other["trainer"].get("args", {}), trainer_class)["freeze"]) == frozen


def _fixed_on_resume(config: dict) -> dict:
    """Return the part of a completed configuration that a resumed run must keep."""
    args = config["trainer"]["args"]
    fixed = {key: args[key] for key in FIXED_ON_RESUME}
    return {"models": config["models"], "trainer": {"name": config["trainer"]["name"], "args": fixed}}


def _resume(config: dict, checkpoints: Checkpoints, step: int) -> WeightPlan:
    """Plan to continue the run of a checkpoint. config: completed."""
    misc = checkpoints.read_misc(step)
    if misc is None:
        raise CheckpointError(
            f"{checkpoints.run_dir} is a run of another program; give it as --load_dir and choose a new --output_dir"
        )
    exported = json.dumps({name: f"DIR/{name}" for name in config["models"]})
    weights_alone = (
        f"start a new --output_dir from its weights alone: python scripts/export_pretrained.py --run "
        f"{checkpoints.run_dir} --output_dir DIR, then --set 'trainer.args.finetune_ckpt={exported}'"
    )
    try:
        old = complete_config(misc["config"])
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoints.run_dir} cannot continue, since this version does not take its configuration: {error}. "
            f"Continue with the version that made it, or {weights_alone}"
        ) from error
    fixed = differences(_fixed_on_resume(old), _fixed_on_resume(config))
    changes = [f"{key} was {before} and is {now}" for key, before, now in fixed]
    before, now = (args["trainer"]["args"]["max_steps"] for args in (old, config))
    problem = misfit(config["trainer"]["args"]["lr_scheduler"], now, SCHEDULE)
    if before != now:
        lengths = {f"{SCHEDULE}.args.{key}" for key in LENGTHS.values()}
        changes += [
            f"{key} follows trainer.args.max_steps where it is not given, and that was {before} and is {now}"
            for key, _, _ in fixed
            if key in lengths
        ]
        changes += problem[:1] if problem else []
    if changes:
        raise ConfigError(
            f"{checkpoints.run_dir} cannot continue under another configuration: {'; '.join(changes)}. Restore what "
            f"was, or {weights_alone}"
        )
    checkpoints.verify(step)
    plan = WeightPlan(resume=(checkpoints, step))
    if problem:
        plan.notes.append(f"{problem[0]}; the run goes on with the schedule that it began with")
    for key in differing_keys(old, config):
        plan.notes.append(f"{key} differs from the run so far; the new value is used from step {step} on")
    for name in config["models"]:
        plan.files[name] = checkpoints.folder / model_file(name, step)
        plan.origin[name] = f"{plan.files[name]} (resumed)"
    return plan
