"""What a run folder says of how it came about."""

import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..datasets.metadata import setting_of_data
from ..utils import dist_utils
from ..utils.config import load_config
from ..utils.environment import versions
from ..utils.errors import CheckpointError, ConfigError
from ..utils.files import written_aside
from .checkpoint import Checkpoints, model_file


def open_run_folder(checkpoints: Checkpoints, config: dict, step: int, facts: dict) -> None:
    """Make the folder ready to continue after `step`: config.json, and a line in command.txt with the facts.

    An earlier config.json that differs is kept beside it; checkpoints after the step are set aside with the
    log. Raises ConfigError where the folder cannot be made.
    """
    folder = checkpoints.run_dir
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made ({error.strerror})") from error
    checkpoints.clean()
    later = checkpoints.set_aside(after=step)
    if later is not None:
        if (folder / "log.txt").exists():
            shutil.copy(folder / "log.txt", later)
        print(f"later checkpoints and the log so far are kept in {later}", flush=True)

    path, text = folder / "config.json", json.dumps(config, indent=4) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.rename(folder / f"config_until_step{step:07d}_{time.strftime('%Y%m%d_%H%M%S')}.json")
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    facts = {**versions(), **facts, "ranks": dist_utils.world_size()}
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(facts)}\npython {shlex.join(sys.argv)}\n")


@dataclass(frozen=True)
class Run:
    """What a run has come to. models: specs as in its configuration; weights: {model: file}, averaged where there are
    such; normalization, up_axis: of its data; info: its step, data and scores, for a reader."""

    step: int
    models: dict[str, dict]
    weights: dict[str, Path]
    resolution: int
    normalization: str
    up_axis: str
    info: dict


def describe_run(output_dir: str | Path, ckpt: str) -> Run:
    """ckpt: "latest", "best" or a step. Raises CheckpointError where the folder has no such checkpoint."""
    checkpoints = Checkpoints(output_dir)
    step = checkpoints.resolve(ckpt)
    if step is None:
        raise CheckpointError(f"{output_dir}: {checkpoints.folder} has no complete checkpoint, so it is no run folder")
    misc = checkpoints.read_misc(step) or {"config": load_config(str(Path(output_dir) / "config.json"))}
    config, data = misc["config"], misc.get("data_dir") or ""
    roots = [Path(root) for root in data.split(",") if root]
    weights = {}
    for name in config["models"]:
        rates = checkpoints.ema_rates(name, step)
        weights[name] = checkpoints.folder / model_file(name, step, rates[0] if rates else None)
    settings = {
        name: setting_of_data(roots, name) or default
        for name, default in (("normalization", "cube"), ("up_axis", "keep"))
    }
    about = {"step": step, "objects": misc.get("dataset_size"), "data": ", ".join(root.name for root in roots)}
    info = {"training": {key: value for key, value in about.items() if value}, "scores": _scores(checkpoints, step)}
    resolution = config["dataset"].get("args", {}).get("resolution", 64)
    return Run(
        step,
        config["models"],
        weights,
        resolution,
        **settings,
        info={key: value for key, value in info.items() if value},
    )


def _scores(checkpoints: Checkpoints, step: int) -> dict[str, float]:
    """Of evaluate.py's report on a step, or else of the validation in the log; empty where there is neither."""
    wanted = (
        "objects",
        "iou",
        "iou_p5",
        "f_score",
        "chamfer",
        "codebook_usage",
        "codebook_perplexity",
        "entropy_bits_per_object",
    )
    report = checkpoints.run_dir / "eval" / f"val_step{step:07d}.json"
    if report.is_file():
        found = next(iter(json.loads(report.read_text(encoding="utf-8"))["weights"].values()))
    else:
        log = checkpoints.run_dir / "log.txt"
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
        found = {
            key[4:]: value
            for line in lines
            if line["step"] == step
            for key, value in line.items()
            if key.startswith("val/")
        }
    return {key: found[key] for key in wanted if found.get(key) is not None}
