"""Checkpoints of a run folder: file names, atomic writes, and which sets are complete.

The checkpoint of step N is a set of files in `ckpts/`, named as TRELLIS names them:

    {model}_step0000100.pt            state dict of each model, frozen ones included
    {model}_ema0.9999_step0000100.pt  state dict of a trained model's average (EMA)
    misc_step0000100.pt               step, optimizer and all other state; written last, so it marks completeness

Every file is written atomically and read back before it gets its name. The misc file lists the sizes of the set's
files, so a set that lost or shortened one is incomplete and never picked, and their sums, so a flipped bit is found
before weights are used (see `sums.py`). Sets of earlier versions and TRELLIS's have the sums of zip archives alone.
Its `format` is "trellis-vqvae-" and the version of the format; TRELLIS's own misc files have none.
"""

import errno
import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.errors import CheckpointError
from ..utils.files import atomic_write, sync_folder
from ..utils.formats import check_version
from .lock import require_lock
from .sums import file_sum, save_summed, seal_holds, zip_holds

FORMAT_VERSION = 1
_FORMAT = "trellis-vqvae-"
_MISC = re.compile(r"misc_step(\d{7,})\.pt")


def model_file(name: str, step: int, ema_rate: float | None = None) -> str:
    """Return the file name of a model's weights; of its average if a rate is given."""
    return f"{name}_step{step:07d}.pt" if ema_rate is None else f"{name}_ema{ema_rate}_step{step:07d}.pt"


def misc_file(step: int) -> str:
    """Return the file name of a step's training state."""
    return f"misc_step{step:07d}.pt"


# Errors that come again until somebody does something about them, and what.
NO_USE_TO_RETRY = {
    errno.ENOSPC: "Free some space (trainer.args.keep_last keeps fewer checkpoints)",
    errno.EDQUOT: "Free some of your quota (trainer.args.keep_last keeps fewer checkpoints)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Give yourself the right to write there",
}


class IncompleteError(CheckpointError):
    """A checkpoint that lacks a file or a part of one."""


class DamagedError(CheckpointError):
    """A checkpoint with other bytes than were written."""


class Checkpoints:
    """The checkpoints of one run folder, written by train.py or by TRELLIS."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "ckpts"
        self._sound: set[tuple | None] = set()  # files that have been read and found as they were written

    # --- finding ---

    def steps(self) -> list[int]:
        """Return the steps that have a misc file, ascending, complete or not."""
        if not self.folder.is_dir():
            return []
        found = (_MISC.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def is_complete(self, step: int) -> bool:
        """Return whether a step's misc file is sound and every file that it lists has its full size.

        Raise CheckpointError for a misc file of a newer format version.
        """
        try:
            self._check_complete(step)
        except (IncompleteError, DamagedError):
            return False
        return True

    def latest(self) -> int | None:
        """Return the last complete step, or None if no step has a misc file. Warn about incomplete sets after it.

        Raise CheckpointError if the set's misc file is damaged or of a newer version, or if all sets are incomplete: to
        start over, or from an older step, must be asked for.
        """
        incomplete: list[IncompleteError] = []
        for step in reversed(self.steps()):
            try:
                self._check_complete(step)
            except IncompleteError as error:
                if not (self.folder / misc_file(step)).exists():  # the run goes on and has removed it since
                    return self.latest()
                incomplete.append(error)
            else:
                for passed_over in incomplete:
                    warnings.warn(f"passed over: {passed_over}", stacklevel=2)
                return step
        if incomplete:
            raise CheckpointError(
                f"{incomplete[0]}; {self.folder} has no other complete checkpoint. Restore the file, or move "
                f"{self.folder} away to start over"
            )
        return None

    def _check_complete(self, step: int) -> None:
        """Raise IncompleteError for a set that lost or shortened a file, DamagedError for a damaged misc file."""
        misc = self.read_misc(step)
        for name, size in misc["files"].items() if misc else ():
            path = self.folder / name
            if not path.is_file():
                raise IncompleteError(f"{path} is missing")
            if path.stat().st_size != size:
                raise IncompleteError(f"{path} has {path.stat().st_size} bytes; it had {size} when it was written")

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
        if step in self.steps():
            try:
                self._check_complete(step)
            except IncompleteError as error:
                missing = f"; {error}"
            else:
                return step
        else:
            missing = ""
        have = ", ".join(str(step) for step in self.steps() if self.is_complete(step)) or "none"
        raise CheckpointError(
            f"{self.folder} has no complete checkpoint for --ckpt {ckpt}; complete steps: {have}{missing}"
        )

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
        Raise CheckpointError if the file is missing (IncompleteError), damaged (DamagedError) or of a newer version.
        """
        path = self.folder / misc_file(step)
        key = _identity(path)
        if key not in self._sound:
            self._check_misc(path, step)
        try:
            content = _load(path, mmap)
        except FileNotFoundError:
            raise IncompleteError(f"{path} is missing: the run has removed this checkpoint") from None
        except Exception as error:  # torch ends in many ways over bytes that make no sense
            raise DamagedError(self._damaged(path, step, str(error))) from error
        misc = _checked(content, path)
        if misc is not None and "sums" in misc and seal_holds(path) is None:
            raise DamagedError(self._damaged(path, step, "its own sum is lost"))
        if misc is not None and misc.get("step", step) != step:  # listing that one's files
            raise DamagedError(self._damaged(path, step, f"it is the one of step {misc['step']}"))
        self._sound.add(key)
        return misc

    def verify(self, step: int) -> None:
        """Read the files of a step and compare their sums. Raise CheckpointError for damage, before any is used.

        The set of another program is checked file by file, by `verify_file`.
        """
        misc = self.read_misc(step)
        for name in misc["files"] if misc else ():
            self.verify_file(step, name)

    def verify_file(self, step: int, name: str) -> None:
        """Raise CheckpointError unless a file of a step is as it was written. Each file is read once."""
        path = self.folder / name
        misc = self.read_misc(step)
        key = _identity(path)
        if key is None:
            raise IncompleteError(f"{path} is missing: the run has removed this checkpoint, or somebody this file")
        if key in self._sound:
            return
        expected = misc["sums"].get(name) if misc and "sums" in misc else None
        holds = zip_holds(path) if expected is None else file_sum(path) == expected
        if holds is False:
            raise DamagedError(self._damaged(path, step, "its sum is not the one it was written with"))
        self._sound.add(key)

    def _check_misc(self, path: Path, step: int) -> None:
        """Raise IncompleteError if a misc file is not whole, DamagedError if its sum does not hold."""
        try:
            holds = seal_holds(path)
            if holds is None:
                holds = zip_holds(path)
        except FileNotFoundError:
            raise IncompleteError(f"{path} is missing: the run has removed this checkpoint") from None
        if holds is None:
            raise IncompleteError(f"{path} is damaged: it is empty or lacks its end")
        if not holds:
            raise DamagedError(self._damaged(path, step, "its sum is not the one it was written with"))

    def _damaged(self, path: Path, step: int, why: str) -> str:
        """Return the message for a damaged file."""
        before = next((other for other in reversed(self.steps()) if other < step and self.is_complete(other)), None)
        remedy = (
            f"; there is no checkpoint before it. Or move {self.folder} away to start over"
            if before is None
            else f", or take the checkpoint before it: --ckpt {before}"
        )
        return f"{path} is damaged ({(why.splitlines() or ['?'])[0]}). Restore the file{remedy}"

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

        Each file is read back before it has its name, so a set with a misc file is known to be sound.
        trained, frozen: {model: state dict}.
        averages: {EMA rate: {model: state dict}}.
        misc: the training state. Raise RuntimeError if it holds objects that `read_misc` would refuse to unpickle.
        Raise CheckpointError if the disk is full or read-only, or if this process has lost the folder's lock.
        """
        try:
            self._save(step, trained, averages, frozen, misc)
        except OSError as error:
            if error.errno not in NO_USE_TO_RETRY:
                raise
            latest = next((step for step in reversed(self.steps()) if self.is_complete(step)), None)
            kept = "nothing was saved before" if latest is None else f"step {latest} is kept"
            raise CheckpointError(
                f"{error.filename or self.folder} cannot be written ({os.strerror(error.errno)}); {kept}. "
                f"{NO_USE_TO_RETRY[error.errno]}, then run the same command again"
            ) from error

    def _save(self, step: int, trained: dict, averages: dict, frozen: dict, misc: dict[str, Any]) -> None:
        require_lock(self.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / misc_file(step)).unlink(missing_ok=True)  # of the set whose files are now replaced
        sums = {}
        for name, state in trained.items():
            sums[model_file(name, step)] = self._write(model_file(name, step), state)
        for rate, states in averages.items():
            for name, state in states.items():
                sums[model_file(name, step, rate)] = self._write(model_file(name, step, rate), state)
        for name, state in frozen.items():
            sums[model_file(name, step)] = self._link_or_write(model_file(name, step), name, state)
        sync_folder(self.folder)
        sizes = {name: (self.folder / name).stat().st_size for name in sums}
        content = {"format": f"{_FORMAT}{FORMAT_VERSION}", "step": step, "files": sizes, "sums": sums, **misc}
        with atomic_write(self.folder / misc_file(step)) as partial:
            save_summed(content, partial, sealed=True)
            if _load(partial) is None:
                raise RuntimeError(
                    f"{misc_file(step)} holds objects that could only be unpickled, so it would not load again; "
                    "an optimizer or schedule keeps them in its state"
                )
            require_lock(self.run_dir)
        sync_folder(self.folder)

    def _write(self, name: str, content: Any) -> int:
        """Write a file of a set and return its sum."""
        with atomic_write(self.folder / name) as partial:
            return save_summed(content, partial)

    def _link_or_write(self, file: str, name: str, state: dict[str, Tensor]) -> int:
        for earlier in reversed(self.steps()):
            source = self.folder / model_file(name, earlier)
            if not source.is_file() or source.name == file:
                continue
            try:
                self.verify_file(earlier, source.name)
            except CheckpointError as error:
                warnings.warn(f"{file} is written anew: {error}", stacklevel=2)
                break
            (self.folder / file).unlink(missing_ok=True)
            try:
                os.link(source, self.folder / file)
            except OSError:  # a file system without hard links holds a copy instead
                break
            return file_sum(self.folder / file)
        return self._write(file, {key: value.cpu() for key, value in state.items()})

    def remove(self, step: int) -> None:
        """Remove the set of a step, its misc file first, so that an interruption leaves no set that looks complete."""
        misc, path = self.folder / misc_file(step), self.folder / f".removed_{misc_file(step)}"
        misc.rename(path)  # still says what belongs to the set, for `clean` after an interruption
        self._finish_removal(path)

    def _finish_removal(self, path: Path) -> None:
        try:
            content = _load(path)
        except Exception as error:  # damaged; what it lists is not known, and stays
            warnings.warn(f"{path} is damaged ({error}); files of its set may be left", stacklevel=2)
            content = None
        for name in content["files"] if isinstance(content, dict) and "files" in content else ():
            (self.folder / name).unlink(missing_ok=True)
        path.unlink()

    def prune(self, keep_last: int, best: int | None) -> None:
        """Remove all sets except the last `keep_last` and the step `best`."""
        require_lock(self.run_dir)
        for step in self.steps()[:-keep_last]:
            if step != best:
                self.remove(step)

    def clean(self) -> None:
        """Remove the temporary files of interrupted writes, and finish interrupted removals."""
        for path in self.folder.glob(".removed_misc_step*.pt"):
            self._finish_removal(path)
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
    """Return a misc file's content, or None if it could only be unpickled, as TRELLIS's, which has numpy objects."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        return None


def _identity(path: Path) -> tuple[str, int, int, int] | None:
    """Return what changes when a file is written again; None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return path.name, found.st_ino, found.st_size, found.st_mtime_ns


def _checked(content: Any, path: Path) -> dict | None:
    """Return a misc file's content, or None if train.py did not write it. Raise CheckpointError if a newer one did."""
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name.startswith(_FORMAT):
        return None
    version = name.removeprefix(_FORMAT)
    check_version(int(version) if version.isdecimal() else version, FORMAT_VERSION, path, CheckpointError)
    return content
