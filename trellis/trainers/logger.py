"""A run's logs: log.txt (JSON lines), TensorBoard, and the terminal."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..utils import dist_utils
from ..utils.files import atomic_write


class RunLog:
    """The log.txt and TensorBoard files of one run folder. Only the main process has one."""

    def __init__(self, run_dir: Path, step: int):
        """Continue after `step`. Drop later lines of log.txt, which an interrupted run left."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "log.txt"
        self._cut_back(step)
        self.tensorboard = SummaryWriter(str(run_dir / "tb_logs"), purge_step=step + 1)

    def _cut_back(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line during which the process was killed
            if entry["step"] <= step:
                kept.append(line)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append one line per entry; each has "step". Return once they are in the file."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(entry), allow_nan=False) + "\n" for entry in entries)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, [H, W, 3] uint8, to TensorBoard."""
        self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.tensorboard.close()


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace values that are not finite by None: JSON has no infinity, which fp16 gradients may reach."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }


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
    """A progress bar with time left on a terminal; elsewhere a plain line every `every` steps."""

    def __init__(self, max_steps: int, every: int):
        self.max_steps, self.every = max_steps, every
        self.first: int | None = None
        self.bar: tqdm | None = None

    def show(self, step: int, values: dict[str, Tensor]) -> None:
        """Show a step; call it after each. values: scalars on the device, read only when they are shown."""
        if self.first is None:
            self.first, self.started = step - 1, time.monotonic()
            if sys.stderr.isatty():
                self.bar = tqdm(total=self.max_steps, initial=step - 1, unit="step")
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        if step % self.every and step != self.max_steps:
            return
        text = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            left = (time.monotonic() - self.started) / (step - self.first) * (self.max_steps - step)
            print(f"step {step}/{self.max_steps}  {text}  {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
