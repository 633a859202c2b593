"""Checkpoints of a run folder: file names, atomic writes, and which sets are complete.

The checkpoint of step N is a set of files in `ckpts/`, named as TRELLIS names them:

    {model}_step0000100.pt            state dict of each model, frozen ones included
    {model}_ema0.9999_step0000100.pt  state dict of a trained model's average (EMA)
    misc_step0000100.pt               step, optimizer and all other state; written last, so it marks completeness

Every file is written atomically. The misc file lists the sizes of the set's files, so a set that lost or shortened one
is never picked. Its `format` is "trellis-vqvae-" and the version of the format; TRELLIS's own misc files have none.
"""

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import CheckpointError
from ..utils.files import atomic_write
from ..utils.formats import check_version

FORMAT_VERSION = 1
_FORMAT = "trellis-vqvae-"
_MISC = re.compile(r"misc_step(\d{7,})\.pt")


def model_file(name: str, step: int, ema_rate: float | None = None) -> str:
    """Return the file name of a model's weights; of its average if a rate is given."""
    return f"{name}_step{step:07d}.pt" if ema_rate is None else f"{name}_ema{ema_rate}_step{step:07d}.pt"


def misc_file(step: int) -> str:
    """Return the file name of a step's training state."""
    return f"misc_step{step:07d}.pt"


class Checkpoints:
    """The checkpoints of one run folder, written by train.py or by TRELLIS."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "ckpts"

    # --- finding ---

    def steps(self) -> list[int]:
        """Return the steps that have a misc file, ascending, complete or not."""
        if not self.folder.is_dir():
            return []
        found = (_MISC.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def is_complete(self, step: int) -> bool:
        """Return whether a step's misc file is readable and every file that it lists has its full size.

        Warn about a damaged misc file. Raise CheckpointError for one of a newer format version.
        """
        path = self.folder / misc_file(step)
        if not path.is_file():
            return False
        try:
            content = _load(path)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
            return False
        misc = _checked(content, path)
        if misc is None:
            return True
        files = ((self.folder / name, size) for name, size in misc["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def latest(self) -> int | None:
        """Return the last complete step, or None."""
        return next((step for step in reversed(self.steps()) if self.is_complete(step)), None)

    def best(self) -> int | None:
        """Return the step with the best validation score so far, or None before any validation."""
        latest = self.latest()
        misc = None if latest is None else self.read_misc(latest)
        return misc["best"]["step"] if misc and misc["best"] else None

    def resolve(self, ckpt: str) -> int | None:
        """Return the step that `--ckpt` means here.

        ckpt: "latest", which is None without a complete checkpoint; "none", which is always None; "best"; or a step.
        Raise CheckpointError for "best" and for a step if there is no such complete checkpoint.
        """
        if ckpt == "none":
            return None
        if ckpt == "latest":
            return self.latest()
        step = self.best() if ckpt == "best" else int(ckpt)
        if step is None or not self.is_complete(step):
            have = ", ".join(str(step) for step in self.steps() if self.is_complete(step)) or "none"
            raise CheckpointError(f"{self.folder} has no complete checkpoint for --ckpt {ckpt}; complete steps: {have}")
        return step

    def ema_rates(self, name: str, step: int) -> list[float]:
        """Return the rates of a model's averages at a step, highest first."""
        pattern = re.compile(re.escape(name) + r"_ema(\d[\d.e-]*)_step" + f"{step:07d}" + r"\.pt")
        misc = self.read_misc(step) if step in self.steps() else None
        names = misc["files"] if misc else (path.name for path in self.folder.iterdir())
        return sorted((float(match[1]) for match in map(pattern.fullmatch, names) if match), reverse=True)

    # --- reading ---

    def read_misc(self, step: int, mmap: bool = True) -> dict | None:
        """Return the training state of a step, or None if another program (TRELLIS) wrote it.

        mmap: leave tensors on disk until they are used, which makes looking at the rest cheap.
        Raise CheckpointError if the file is missing, damaged or of a newer format version.
        """
        path = self.folder / misc_file(step)
        return _checked(_load(path, mmap), path)

    # --- writing ---

    def save(
        self,
        step: int,
        trained: dict[str, dict[str, Tensor]],
        averages: dict[float, dict[str, dict[str, Tensor]]],
        frozen: dict[str, dict[str, Tensor]],
        misc: dict[str, Any],
    ) -> None:
        """Write the set of a step. Frozen weights never change, so later sets link the first set's files.

        trained, frozen: {model: state dict}.
        averages: {EMA rate: {model: state dict}}.
        misc: the training state. Raise RuntimeError if it holds objects that `read_misc` would refuse to unpickle.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, state in trained.items():
            files.append(self._write(model_file(name, step), state))
        for rate, states in averages.items():
            for name, state in states.items():
                files.append(self._write(model_file(name, step, rate), state))
        for name, state in frozen.items():
            files.append(self._link_or_write(model_file(name, step), name, state))
        sizes = {path.name: path.stat().st_size for path in files}
        content = {"format": f"{_FORMAT}{FORMAT_VERSION}", "step": step, "files": sizes, **misc}
        self._write(misc_file(step), content)
        if self.read_misc(step) is None:
            (self.folder / misc_file(step)).unlink()
            raise RuntimeError(
                f"{misc_file(step)} holds objects that could only be unpickled, so it would not load again; "
                "an optimizer or schedule keeps them in its state"
            )

    def _write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        with atomic_write(path) as partial:
            torch.save(content, partial)
        return path

    def _link_or_write(self, file: str, name: str, state: dict[str, Tensor]) -> Path:
        for earlier in self.steps():
            source = self.folder / model_file(name, earlier)
            if source.is_file() and source.name != file:
                (self.folder / file).unlink(missing_ok=True)
                try:
                    os.link(source, self.folder / file)
                except OSError:  # a file system without hard links holds a copy instead
                    break
                return self.folder / file
        return self._write(file, state)

    def remove(self, step: int) -> None:
        """Remove the set of a step, its misc file first, so that an interruption leaves no set that looks complete."""
        misc = self.read_misc(step)
        (self.folder / misc_file(step)).unlink()
        for name in misc["files"] if misc else ():
            (self.folder / name).unlink(missing_ok=True)

    def prune(self, keep_last: int, best: int | None) -> None:
        """Remove all sets except the last `keep_last` and the step `best`."""
        for step in self.steps()[:-keep_last]:
            if step != best:
                self.remove(step)

    def clean(self) -> None:
        """Remove the temporary files of interrupted writes."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def set_aside(self, after: int) -> Path | None:
        """Move the checkpoints after a step into a sub-folder and return it, or None if there is no later checkpoint.

        Going back to a step then loses nothing, and no later checkpoint is picked by mistake. Files without a misc
        file, left by a crash, do not count as a checkpoint: they will be written again.
        """
        if not any(step > after for step in self.steps()):
            return None
        later = [path for path in self.folder.glob("*_step*.pt") if int(path.stem.rsplit("_step", 1)[1]) > after]
        number = 1
        while (target := self.folder / f"superseded_{number}").exists():
            number += 1
        target.mkdir()
        # Misc files first, so that an interruption leaves no set that looks complete.
        for path in sorted(later, key=lambda path: not path.name.startswith("misc_")):
            path.rename(target / path.name)
        return target


def _load(path: Path, mmap: bool = True) -> Any:
    """Return a misc file's content, or None if it could only be unpickled. Raise CheckpointError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        # TRELLIS stores numpy objects in its misc file, which is never unpickled here.
        return None
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]})") from error


def _checked(content: Any, path: Path) -> dict | None:
    """Return a misc file's content, or None if train.py did not write it. Raise CheckpointError if a newer one did."""
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name.startswith(_FORMAT):
        return None
    version = name.removeprefix(_FORMAT)
    check_version(int(version) if version.isdecimal() else version, FORMAT_VERSION, path, CheckpointError)
    return content
