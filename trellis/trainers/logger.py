"""A run's logs: log.txt (JSON lines), TensorBoard and other sinks, and the terminal."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..runs.status import json_numbers
from ..utils import dist_utils, progress
from ..utils.files import atomic_write, naming
from .sinks import Sinks, TensorBoard, WeightsAndBiases

UNREADABLE = "log_unreadable.txt"  # beside log.txt: what was no entry of it
LONGEST_LINE = 2**20  # bytes; an entry has a few hundred


class RunLog:
    """The log.txt and the sinks of one run folder. Only the main process has one.

    config: the run's, for sinks that show it.
    wandb: arguments of Weights & Biases; None without it.
    say: prints a line.
    """

    def __init__(self, run_dir: Path, step: int, config: dict, wandb: dict | None, say: Callable[[str], None]):
        """Continue after `step`. Drop later lines of log.txt, which an interrupted run left."""
        self.path, self.say = run_dir / "log.txt", say
        self._cut_back(step)
        self.sinks = Sinks(say)
        self.sinks.add(TensorBoard.name, lambda: TensorBoard(run_dir, step))
        if wandb is not None:
            self.sinks.add(WeightsAndBiases.name, lambda: WeightsAndBiases(run_dir, wandb, config, say))

    def _cut_back(self, step: int) -> None:
        """Keep the entries up to a step. What is no entry is kept aside, and said. A log of any size fits in memory."""
        if not self.path.exists():
            return
        if not self.path.is_file():
            self._put_aside()
            return
        end, damaged, holes = 0, 0, False  # end: of the last entry to keep; holes: something else lies before it
        try:
            with progress.waiting(f"reading {self.path}"), open(self.path, "rb") as file:
                for start, line in _lines(file):
                    found = _step_of(line)
                    damaged += found is None and not _is_cut_off(line)
                    if found is not None and found <= step:
                        holes |= start > end
                        end = start + len(line)
        except PermissionError:
            self._put_aside()
            return
        if damaged:
            self.say(f"{self.path} has {damaged} lines that are no entries; they are kept in {UNREADABLE}")
        if damaged or holes:
            self._keep_entries(step)
        elif end < self.path.stat().st_size:
            os.truncate(self.path, end)

    def _keep_entries(self, step: int) -> None:
        """Write log.txt anew with the entries up to a step, and append lines that are none to UNREADABLE."""
        aside = self.path.with_name(UNREADABLE)
        with atomic_write(self.path) as partial, open(self.path, "rb") as file, open(partial, "wb") as kept:
            with open(aside, "ab") as unreadable:
                for _, line in _lines(file):
                    found = _step_of(line)
                    if found is None:
                        unreadable.write(line)
                    elif found <= step:
                        kept.write(line)

    def _put_aside(self) -> None:
        """Rename what is no log that can be read, so that a new one can begin."""
        number = 1
        while (target := self.path.with_name(f"log_unreadable_{number}")).exists():
            number += 1
        self.path.rename(target)
        self.say(f"{self.path} cannot be read; it is kept as {target.name}, and a new log begins")

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append one line per entry; each has "step". Return once they are in the file."""
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(json_numbers(entry), allow_nan=False) + "\n" for entry in entries)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.sinks.scalars(values, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Show a picture, [H, W, 3] uint8, in the sinks."""
        self.sinks.image(name, picture, step)

    def close(self) -> None:
        self.sinks.close()


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of a file. A line longer than LONGEST_LINE comes in pieces, none of which is an entry."""
    start = 0
    while line := file.readline(LONGEST_LINE):
        yield start, line
        start += len(line)


def _is_cut_off(line: bytes) -> bool:
    """Return whether a line is the last one, during which the process was killed."""
    return not line.endswith(b"\n") and len(line) < LONGEST_LINE


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of log.txt; None if it is cut off or no entry."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


class PendingSteps:
    """Losses and status of steps, kept on the device so that no step waits for the host."""

    def __init__(self):
        self.steps: list[tuple[int, dict[str, Tensor], dict[str, float]]] = []

    def add(self, step: int, values: dict[str, Tensor], **known: float) -> None:
        """Add a step. The names must be the same at every step.

        values: scalars on the device.
        known: numbers that are the same on all ranks.
        """
        self.steps.append((step, values, known))

    def fetch(self) -> list[dict[str, float]]:
        """Return the steps since the last call, averaged over ranks: [{"step", name: value}]. Call it on all ranks."""
        if not self.steps:
            return []
        names = list(self.steps[0][1])
        table = torch.stack([torch.stack([values[name].float() for name in names]) for _, values, _ in self.steps])
        rows = [
            {"step": step, **dict(zip(names, row, strict=True)), **known}
            for (step, _, known), row in zip(self.steps, dist_utils.all_mean(table).tolist(), strict=True)
        ]
        self.steps = []
        return rows


class Progress:
    """A progress bar with time left on a terminal; elsewhere a line every `every` steps, and after a long silence."""

    def __init__(self, max_steps: int, every: int):
        self.max_steps, self.every = max_steps, every
        self._shown = contextlib.ExitStack()

    def open(self, step: int) -> None:
        """Begin after `step`."""
        self.first, self.step, self.started = step, step, time.monotonic()
        self.work = progress.Work("training", self.max_steps, "step", done=step, text=self._line)
        self._shown.enter_context(progress.show(self.work))

    def show(self, step: int, values: dict[str, Tensor]) -> None:
        """Show a step; call it after each. values: scalars on the device, read only when they are shown."""
        self.step = step
        self.work(step)
        if step % self.every and step != self.max_steps:
            return
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        if self.work.bar is not None:
            self.work.bar.set_postfix_str(text)
        else:
            self.say(f"step {step}/{self.max_steps}  {text}  {self._left()}")

    def _left(self) -> str:
        passed = time.monotonic() - self.started
        if self.step == self.first:
            return f"{passed:.0f} s in the first step: data are loaded and kernels made"
        return f"{passed / (self.step - self.first) * (self.max_steps - self.step) / 60:.1f} min left"

    def _line(self) -> str:
        return f"step {self.step}/{self.max_steps}  {self._left()}"

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        progress.say(text)

    def close(self) -> None:
        self._shown.close()
