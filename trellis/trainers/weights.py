"""Where each model's weights come from when a run starts.

Per model, the first that has it: a complete checkpoint in the run's own folder, `--load_dir`,
`finetune_ckpt`, or fresh initialisation. The plan is made before data or GPU is touched.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..models import load_weights, pretrained_files
from ..runs.checkpoint import Checkpoints, model_file
from ..runs.open import open_run
from ..utils.config import config_arguments, differing_keys
from ..utils.errors import CheckpointError, ConfigError

# Trainer arguments that a resumed run must keep: the optimizer's state or the models' roles depend on them.
FIXED_ON_RESUME = ("optimizer", "lr_scheduler", "lr_scaling", "lr_multipliers", "freeze", "ema_rate")


@dataclass
class WeightPlan:
    """files: {model: its weights file, or None to initialise}; origin: the same in words. resume: the
    checkpoint whose training state continues too, as (checkpoints, step). notes: what the user should know."""

    files: dict[str, Path | None] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    resume: tuple[Checkpoints, int] | None = None
    notes: list[str] = field(default_factory=list)

    def load(self, models: dict) -> None:
        """Load the planned files into the models. Raises CheckpointError where a file does not fit."""
        for name, model in models.items():
            if self.files[name] is not None:
                load_weights(model, self.files[name])


def plan_weights(config: dict, trainer_class: type, output_dir: str, load_dir: str | None, ckpt: str) -> WeightPlan:
    """Decide where weights come from, downloading from the Hub only what nothing nearer has.

    ckpt: "latest", "best", "none" or a step, of output_dir if it has a complete checkpoint, else of load_dir.
    Raises CheckpointError or ConfigError where a source that was named cannot serve, or where a frozen model
    would have no weights.
    """
    names = list(config["models"])
    own = Checkpoints(output_dir)
    if own.latest() is not None:
        if ckpt == "none":
            raise CheckpointError(
                f"{output_dir} already has checkpoints, which --ckpt none would start over; choose another --output_dir"
            )
        return _resume(config, trainer_class, own, own.resolve(ckpt))

    plan = WeightPlan(dict.fromkeys(names), {})
    if load_dir is not None and ckpt != "none":
        run = open_run(load_dir, ckpt, "--load_dir")
        if run.misc and _same_kind(config, trainer_class, run.misc["config"]):
            return _resume(config, trainer_class, run.checkpoints, run.step)
        for name in names:
            path = run.weight_file(name)
            if path.is_file():
                kind = "raw" if path == run.weight_file(name, averaged=False) else "EMA"
                plan.files[name], plan.origin[name] = path, f"{path} ({kind} weights)"
            else:
                plan.notes.append(f"{load_dir} at step {run.step} has no {name}")
    elif ckpt not in ("latest", "none"):
        raise CheckpointError(f"--ckpt {ckpt}: {own.folder} has no complete checkpoint; give --load_dir too")

    args = config["trainer"].get("args", {})
    for name in names:
        source = (args.get("finetune_ckpt") or {}).get(name)
        if plan.files[name] is None and source is not None:
            plan.files[name] = _finetune_file(source, name)
            plan.origin[name] = f"{source} (finetune_ckpt)"
    for name in names:
        if plan.files[name] is None:
            if name in args.get("freeze", []):
                raise CheckpointError(
                    f"{name} is frozen but has no weights: give --load_dir with a run that trained it, or "
                    f"trainer.args.finetune_ckpt.{name} with a file, an exported pair or a Hub path"
                )
            plan.origin[name] = "initialised"
    return plan


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


def _argument(config: dict, trainer_class: type, key: str):
    """A trainer argument, with the default where the configuration leaves it out, in one form for equal values."""
    default = config_arguments(trainer_class)[key][1]
    value = config["trainer"].get("args", {}).get(key, default)
    if key == "freeze":
        return sorted(value)
    if key == "ema_rate":
        return value if isinstance(value, list) else [value]
    return value


def _same_kind(config: dict, trainer_class: type, other: dict) -> bool:
    if other["trainer"]["name"] != config["trainer"]["name"]:
        return False
    return _argument(config, trainer_class, "freeze") == _argument(other, trainer_class, "freeze")


def _fixed_on_resume(config: dict, trainer_class: type) -> dict:
    """The part of a configuration that a resumed run must keep, with defaults filled in."""
    name = config["trainer"]["name"]
    same_class = name == trainer_class.__name__
    args = {key: _argument(config, trainer_class, key) for key in FIXED_ON_RESUME} if same_class else {}
    return {"models": config["models"], "trainer": {"name": name, "args": args}}


def _value_at(config: dict, path: str) -> str:
    """The value at a dotted path as JSON, or "absent"."""
    node = config
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return "absent"
        node = node[key]
    return json.dumps(node)


def _resume(config: dict, trainer_class: type, checkpoints: Checkpoints, step: int) -> WeightPlan:
    misc = checkpoints.read_misc(step)
    if misc is None:
        raise CheckpointError(
            f"{checkpoints.run_dir} is a run of another program; give it as --load_dir and choose a new --output_dir"
        )
    old = misc["config"]
    fixed = [_fixed_on_resume(c, trainer_class) for c in (old, config)]
    changed = differing_keys(*fixed)
    if changed:
        old_new = [(key, *(_value_at(part, key) for part in fixed)) for key in changed]
        changes = "; ".join(f"{key} was {before} and is {now}" for key, before, now in old_new)
        raise ConfigError(
            f"{checkpoints.run_dir} cannot continue under another configuration: {changes}. Restore what was, or "
            f"start a new --output_dir from its weights alone: python scripts/export_pretrained.py --run "
            f"{checkpoints.run_dir} --output_dir DIR, then --set trainer.args.finetune_ckpt.MODEL=DIR/MODEL"
        )
    plan = WeightPlan(resume=(checkpoints, step))
    for key in differing_keys(old, config):
        plan.notes.append(f"{key} differs from the run so far; the new value is used from step {step} on")
    for name in config["models"]:
        plan.files[name] = checkpoints.folder / model_file(name, step)
        plan.origin[name] = f"{plan.files[name]} (resumed)"
    return plan
