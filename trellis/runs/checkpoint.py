"""Checkpoints of a run folder: names, atomic files, and which sets are complete.

A checkpoint of step N is a set of files in `ckpts/`, named as TRELLIS names them:

    {model}_step0000100.pt            state dict of each model, frozen ones included
    {model}_ema0.9999_step0000100.pt  the same of its average, for trained models
    misc_step0000100.pt               step, optimizer and all else; written last, so it marks completeness

Every file is written aside, synced and renamed. The misc file lists the files of its set, so a set that lost
one is never picked.
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
from ..utils.files import written_aside

FORMAT = "trellis-vqvae-1"
_MISC = re.compile(r"misc_step(\d{7,})\.pt")


def model_file(name: str, step: int, ema_rate: float | None = None) -> str:
    """File name of a model's weights."""
    return f"{name}_step{step:07d}.pt" if ema_rate is None else f"{name}_ema{ema_rate}_step{step:07d}.pt"


def misc_file(step: int) -> str:
    return f"misc_step{step:07d}.pt"


class Checkpoints:
    """The checkpoints of one run folder, ours or TRELLIS's."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "ckpts"

    # --- finding ---

    def steps(self) -> list[int]:
        """Steps that have a misc file, ascending, complete or not."""
        if not self.folder.is_dir():
            return []
        found = (_MISC.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def is_complete(self, step: int) -> bool:
        """Whether the misc file of this step is readable and all files that it lists are there in full."""
        if not (self.folder / misc_file(step)).is_file():
            return False
        try:
            misc = self.read_misc(step)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
            return False
        if misc is None:
            return True
        files = ((self.folder / name, size) for name, size in misc["files"].items())
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return next((step for step in reversed(self.steps()) if self.is_complete(step)), None)

    def best(self) -> int | None:
        """The step with the best validation score so far, or None before any validation."""
        latest = self.latest()
        misc = None if latest is None else self.read_misc(latest)
        return misc["best"]["step"] if misc and misc["best"] else None

    def resolve(self, ckpt: str) -> int | None:
        """The step that `--ckpt` means here: latest, best, none or a number. None where there is none to
        take. Raises CheckpointError for a step that is not here or not complete."""
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
        """Rates of the averages that the step holds of a model, highest first."""
        pattern = re.compile(re.escape(name) + r"_ema(\d[\d.e-]*)_step" + f"{step:07d}" + r"\.pt")
        misc = self.read_misc(step) if step in self.steps() else None
        names = misc["files"] if misc else (path.name for path in self.folder.iterdir())
        return sorted((float(match[1]) for match in map(pattern.fullmatch, names) if match), reverse=True)

    # --- reading ---

    def read_misc(self, step: int, mmap: bool = True) -> dict | None:
        """The training state of a step, or None where another program (TRELLIS) wrote it.

        mmap: leave tensors on disk until they are used, for a look at the rest.
        """
        path = self.folder / misc_file(step)
        try:
            misc = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            # TRELLIS stores numpy objects in its misc file, which is never unpickled here.
            return None
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
        return misc if isinstance(misc, dict) and misc.get("format") == FORMAT else None

    # --- writing ---

    def save(
        self,
        step: int,
        trained: dict[str, dict[str, Tensor]],
        averages: dict[float, dict[str, dict[str, Tensor]]],
        frozen: dict[str, dict[str, Tensor]],
        misc: dict[str, Any],
    ) -> None:
        """Write the set of a step. Frozen weights never change, so later sets link the first one's files."""
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
        self._write(misc_file(step), {"format": FORMAT, "step": step, "files": sizes, **misc})
        if self.read_misc(step) is None:
            (self.folder / misc_file(step)).unlink()
            raise RuntimeError(
                f"{misc_file(step)} holds objects that could only be unpickled, so it would not load again; "
                "an optimizer or schedule keeps them in its state"
            )

    def _write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        with written_aside(path) as aside:
            torch.save(content, aside)
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
        """Remove the set of a step, its misc file first, so that what is left never looks complete."""
        misc = self.read_misc(step)
        (self.folder / misc_file(step)).unlink()
        for name in misc["files"] if misc else ():
            (self.folder / name).unlink(missing_ok=True)

    def prune(self, keep_last: int, best: int | None) -> None:
        """Remove all complete sets but the last `keep_last` and the best."""
        for step in self.steps()[:-keep_last]:
            if step != best:
                self.remove(step)

    def clean(self) -> None:
        """Remove what an interrupted write left behind."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink()

    def set_aside(self, after: int) -> Path | None:
        """Move the checkpoints after a step into a sub-folder, so that going back to that step loses nothing
        and nothing later is picked by mistake. Returns the folder, or None where there was no later checkpoint
        (files without a misc file, left by a crash, are not one: they will be written again)."""
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
