"""Where a run writes its numbers: log.txt (JSON lines), TensorBoard, and the terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm


class RunLog:
    """log.txt and TensorBoard of one run folder. Only the main process has one."""

    def __init__(self, run_dir: Path, step: int):
        """Continue after `step`: later lines of log.txt, left by a run that was cut off, are dropped."""
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
                continue  # the line at which the process was killed
            if entry["step"] <= step:
                kept.append(line)
        aside = self.path.with_name("log.txt.tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(self.path)

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Append one line per entry; each has "step". Reaches the disk before this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """picture: [H, W, 3] uint8."""
        self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        self.tensorboard.flush()

    def close(self) -> None:
        self.tensorboard.close()


class Progress:
    """A bar with time left on a terminal; elsewhere a plain line every `every` steps."""

    def __init__(self, step: int, max_steps: int, every: int):
        self.max_steps, self.every = max_steps, every
        self.first, self.started = step, time.monotonic()
        self.bar = tqdm(total=max_steps, initial=step, unit="step") if sys.stderr.isatty() else None

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def line_is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.max_steps

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show the latest values."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        left = (time.monotonic() - self.started) / (step - self.first) * (self.max_steps - step)
        print(f"step {step}/{self.max_steps}  {text}  left {left / 60:.1f} min", flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
