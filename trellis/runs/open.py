"""A run folder as a reader sees it: one complete checkpoint, its configuration, data and weights."""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..datasets import DATASETS
from ..datasets.metadata import common_setting, settings_of_data
from ..utils.config import fill_in, load_config
from ..utils.errors import CheckpointError, DataError
from .checkpoint import Checkpoints, model_file

# Scores that stand in a tokenizer's model card: keys of evaluate.py's report and, after "val/", of the log.
SCORES = (
    "objects",
    "iou",
    "iou_p5",
    "f_score",
    "chamfer",
    "lm_tokens",
    "codebook_usage",
    "codebook_perplexity",
    "entropy_bits_per_object",
)


def open_run(folder: str | Path, ckpt: str = "latest", flag: str = "") -> "Run":
    """Open a run folder at a complete checkpoint.

    folder: written by train.py or by TRELLIS.
    ckpt: "latest", "best" or a step.
    flag: the command-line flag that gave the folder, for messages.
    Raise CheckpointError if the folder has no such checkpoint.
    """
    folder = Path(folder)
    checkpoints = Checkpoints(folder)
    step = None
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
    elif folder.absolute().name == checkpoints.folder.name and Checkpoints(folder.parent).steps():
        raise CheckpointError(f"{flag} {folder} has the checkpoints of a run; give {folder.absolute().parent}".lstrip())
    else:
        step, state = checkpoints.resolve(ckpt), f"has no complete checkpoint in {checkpoints.folder}"
    if step is None:
        raise CheckpointError(f"{flag} {folder} {state}; give a run folder".lstrip())
    return Run(checkpoints, step)


@dataclass(frozen=True)
class Run:
    """A run at one of its complete checkpoints.

    Files are read when they are asked for: weights of a TRELLIS folder can be found without its config.json.
    """

    checkpoints: Checkpoints
    step: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.checkpoints.run_dir

    @cached_property
    def misc(self) -> dict | None:
        """The training state, or None if TRELLIS wrote the folder."""
        return self.checkpoints.read_misc(self.step)

    @cached_property
    def config(self) -> dict:
        """The configuration at this step; the folder's config.json if TRELLIS wrote it."""
        return self.misc["config"] if self.misc else load_config(str(self.folder / "config.json"))

    @property
    def data_dir(self) -> str | None:
        """Data roots separated by commas, as train.py was given them; None if the folder does not say."""
        return (self.misc or {}).get("data_dir") or None

    @property
    def dataset_size(self) -> int | None:
        """Number of training objects; None if the folder does not say."""
        return (self.misc or {}).get("dataset_size")

    @property
    def training_seconds(self) -> float | None:
        """Seconds of training up to this step; None if the folder does not say."""
        return (self.misc or {}).get("seconds")

    @property
    def resolution(self) -> int:
        """Voxels along an axis of the data."""
        dataset = self.config["dataset"]
        return fill_in(dataset.get("args", {}), DATASETS.get(dataset["name"], "dataset.name"))["resolution"]

    def data_setting(self, name: str) -> str | None:
        """Return "normalization" or "up_axis" of the data, or None if the data are gone or do not say.

        Several up axes make "auto". Warn if their grids may have different axes, or if only a part of the data says its
        normalization. Raise DataError for several normalizations, which no tokenizer can have.
        """
        found = settings_of_data([root for root in (self.data_dir or "").split(",") if root], name)
        setting = common_setting(found)
        said = sorted(value for value in found if value is not None)
        if setting is not None or not said:
            return setting
        roots = ", ".join(f"{root} ({value or 'does not say'})" for value, root in found.items())
        if name == "normalization" and len(said) > 1:
            raise DataError(
                f"{self.folder}: its data have grids of several normalizations: {roots}. Say which one meshes shall "
                "have: from_run(..., normalization=...)"
            )
        setting = "auto" if name == "up_axis" else said[0]
        warnings.warn(
            f"{self.folder}: its data do not agree on their {name}: {roots}. {name} is taken as {setting!r}; give "
            f"another by from_run(..., {name}=...)",
            stacklevel=4,  # whoever called from_run
        )
        return setting

    def tokenizer_settings(self, normalization: str | None = None, up_axis: str | None = None) -> tuple[str, str]:
        """Return normalization and up axis of a tokenizer of this run: those given, else what the data say, else "cube"
        and "keep" ("y" with "shapellm").

        Errors and warnings: as in `data_setting`.
        """
        normalization = normalization or self.data_setting("normalization") or "cube"
        up_axis = up_axis or self.data_setting("up_axis") or ("keep" if normalization == "cube" else "y")
        return normalization, up_axis

    def scores(self) -> dict[str, float]:
        """Return SCORES at this step from evaluate.py's report, else from the log's validation, else {}."""
        report, log = self.folder / "eval" / f"val_step{self.step:07d}.json", self.folder / "log.txt"
        found: dict[str, float] = {}
        if report.is_file():
            found = next(iter(json.loads(report.read_text(encoding="utf-8"))["weights"].values()))
        elif log.is_file():
            with log.open(encoding="utf-8", errors="replace") as file:
                for entry in filter(None, map(_entry, file)):
                    if entry.get("step") == self.step:
                        found |= {key[4:]: value for key, value in entry.items() if key.startswith("val/")}
        return {key: found[key] for key in SCORES if found.get(key) is not None}

    def about(self) -> dict[str, dict]:
        """Return what a tokenizer's model card says of the run: {"training": facts, "scores": numbers}, those known."""
        data = ", ".join(Path(root).name for root in (self.data_dir or "").split(",") if root)
        training = {"step": self.step, "objects": self.dataset_size, "data": data}
        about: dict[str, dict] = {"training": {key: value for key, value in training.items() if value}}
        return about | ({"scores": scores} if (scores := self.scores()) else {})

    # --- weights ---

    def weight_file(self, model: str, averaged: bool = True) -> Path:
        """Return the file of a model's weights: averaged (EMA) at the highest rate, else raw.

        A frozen model has raw weights only. The file is not there if the run has no such model.
        averaged: False for raw weights of every model.
        Raise CheckpointError if the file's sum is not the one it was written with.
        """
        rates = self.checkpoints.ema_rates(model, self.step) if averaged else []
        return self._verified(model_file(model, self.step, rates[0] if rates else None))

    def _verified(self, name: str) -> Path:
        path = self.checkpoints.folder / name
        if path.exists() or (self.misc and name in self.misc["files"]):
            self.checkpoints.verify_file(self.step, name)
        return path

    def weights(self, averaged: bool = True) -> dict[str, Path]:
        """Return {model: weights file} of all models, each chosen as `weight_file` does."""
        return {model: self.weight_file(model, averaged) for model in self.config["models"]}

    def weight_sets(self) -> dict[str, dict[str, Path]]:
        """Return all sets of weights, {label: {model: weights file}}: "ema0.9999" and so on, highest rate first, then
        "raw". A model without an average at a set's rate is there with its raw weights."""
        raw = self.weights(averaged=False)
        rates = {model: self.checkpoints.ema_rates(model, self.step) for model in raw}
        sets = {}
        for rate in sorted(set().union(*rates.values()), reverse=True):
            sets[f"ema{rate}"] = {
                model: self._verified(model_file(model, self.step, rate)) if rate in rates[model] else raw[model]
                for model in raw
            }
        return {**sets, "raw": raw}


def _entry(line: str) -> dict | None:
    """Return an entry of a log; None for a line that is none, such as one that is being written."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
