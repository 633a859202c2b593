"""Bad steps, whose loss or gradient is not finite: found, counted and named; and runs that are lost, which end.

A bad step changes nothing (see `skip.py`), on any rank. An overflow of fp16, which its loss scale expects now and then,
is skipped as well, but is not a bad step. A run is lost after a number of steps in a row that are bad or whose loss has
exploded; while it may be, no checkpoint is written.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runs.checkpoint import Checkpoints
from ..utils import dist_utils
from ..utils.errors import CheckpointError, DivergedError

# Steps between looks at the count on the device, for which the host waits.
STEPS_BETWEEN_LOOKS = 50
# A finite loss that is more than so many times that of the first step, or 1 if that was less, has exploded: those of a
# learning rate far too high for SGD stay finite.
EXPLODED = 1e4
# Lines on bad steps in a row, names in a line, and their digits on the terminal; log.txt has all.
LINES_SHOWN, NAMES_SHOWN, DIGITS_SHOWN = 3, 4, 12
# A loss that is so many times its lowest, or a gradient norm that is so many times the usual one, shows divergence.
LOSS_ROSE, NORM_ROSE = 3.0, 30.0


class BadSteps:
    """The count of bad steps on the device, and what the host knows about them once it has fetched the log's rows.

    most: bad steps in a row that end the run.
    objects: number of training objects.
    batch_of: returns the objects, [B] int64, that all ranks together had in a step.
    name_of: returns the sha256 of an object.
    """

    def __init__(
        self,
        most: int,
        objects: int,
        batch_of: Callable[[int], np.ndarray],
        name_of: Callable[[int], str],
        device: torch.device,
    ):
        self.most, self.batch_of, self.name_of = most, batch_of, name_of
        # New tensors at each step: the log keeps the old ones.
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.first_loss = torch.full((), math.nan, dtype=torch.float64, device=device)  # of the first good step
        self.first: int | None = None  # the first step of this process
        self.running_for = 0  # bad steps in a row among those rows
        self.reported = 0  # bad steps among the rows fetched so far
        self.cleared = np.zeros(objects, dtype=bool)  # objects that a good step of this process had
        self.lowest_loss = math.inf
        self.good = 0  # good steps of this process
        # (loss, gradient norm) of the first and of the last good steps of this process
        self.early: list[tuple[float, float]] = []
        self.late: deque[tuple[float, float]] = deque(maxlen=STEPS_BETWEEN_LOOKS)

    # --- in a step ---

    def judge(self, loss: Tensor, norm: Tensor, *, overflow_expected: bool) -> Tensor:
        """Count this step, and return whether it must be skipped: bool scalar on the device, the same on all ranks.

        loss: this rank's. norm: of the gradient, reduced over ranks.
        overflow_expected: a gradient that is not finite does not make the step bad.
        """
        finite = loss.isfinite()
        facts = torch.stack([~finite, ~norm.isfinite(), torch.where(finite, loss, 0)]).detach().double()
        facts = dist_utils.all_mean(facts)
        flags, mean = facts[:2] > 0, facts[2]
        skip = flags.any()
        bad = flags[0] if overflow_expected else skip
        self.first_loss = torch.where(self.first_loss.isnan() & ~skip, mean, self.first_loss)
        lost = bad | (mean > EXPLODED * self.first_loss.clamp(min=1))
        self.total = self.total + bad
        # An overflow of fp16 tells nothing.
        self.in_a_row = torch.where(lost, self.in_a_row + 1, torch.where(skip, self.in_a_row, 0))
        return skip

    # --- when the log is written ---

    def report(self, rows: Sequence[dict]) -> list[str]:
        """Add the names of objects to the rows of bad steps, as "objects", and return lines to say.

        rows: of the log, with "step", "loss", "grad_norm" and "bad_steps", each once and in order.
        """
        lines = []
        if self.first is None and rows:
            self.first = rows[0]["step"]
        for row in rows:
            batch = self.batch_of(row["step"])
            if round(row["bad_steps"]) == self.reported:
                if self.running_for > LINES_SHOWN:
                    lines.append(
                        f"step {row['step']}  good again, after {self.running_for} bad steps; log.txt has their objects"
                    )
                self.running_for = 0
                self._good(row, batch)
                continue
            self.running_for += 1
            self.reported = round(row["bad_steps"])
            names = sorted({self.name_of(index) for index in batch.tolist()})
            row["objects"] = names
            if self.running_for <= LINES_SHOWN:
                lines.append(f"step {row['step']}  {self._named(row, batch, names)}")
        return lines

    def _good(self, row: dict, batch: np.ndarray) -> None:
        self.cleared[batch] = True
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.lowest_loss = min(self.lowest_loss, row["loss"])
            self.good += 1
            self.late.append((row["loss"], row["grad_norm"]))
            if len(self.early) < STEPS_BETWEEN_LOOKS:
                self.early.append(self.late[-1])

    def _named(self, row: dict, batch: np.ndarray, names: list[str]) -> str:
        what = "loss" if not math.isfinite(row["loss"]) else "gradient"
        text = f"BAD STEP, skipped: its {what} is not finite ({self.reported} so far). Objects: {_some(names)}"
        suspects = self.suspects(batch)
        if 0 < len(suspects) < len(names):
            text += f"; no good step had {_some(suspects)}"
        return text

    def suspects(self, batch: np.ndarray) -> list[str]:
        """Return the names of objects [B] that no good step had."""
        return sorted({self.name_of(index) for index in batch[~self.cleared[batch]].tolist()})

    # --- ending a run ---

    def look(self, step: int) -> bool:
        """Return whether to write the log and end the run. Waits for the device now and then."""
        return step % STEPS_BETWEEN_LOOKS == 0 and self.too_many

    @property
    def running(self) -> bool:
        """Whether the last step was bad. Waits for the device."""
        return int(self.in_a_row) > 0

    @property
    def too_many(self) -> bool:
        """Whether the run is lost. Waits for the device."""
        return int(self.in_a_row) >= self.most

    def diverged(self, step: int, checkpoints: Checkpoints, lr: float, origin: str) -> DivergedError:
        """Return the error that ends a lost run. Call it after `report`.

        checkpoints: of the run, all written. lr: its present rate. origin: where its weights came from.
        """
        in_a_row = int(self.in_a_row)
        return DivergedError(
            f"training has diverged: in {in_a_row} steps in a row, up to step {step}, the loss or its gradient was not "
            f"finite, or the loss above {EXPLODED * max(1, float(self.first_loss)):.3g} (by "
            f"trainer.args.max_bad_steps, {self.most} of them end this run). Nothing of them is saved; "
            f"{_last_good(checkpoints)}. {self._cause(step, in_a_row, lr, origin)}"
        )

    def _cause(self, step: int, in_a_row: int, lr: float, origin: str) -> str:
        """Return what is known of the cause, and the remedy for it."""
        lower = (
            f"lower trainer.args.optimizer.args.lr (now {lr:.3g}) or warm it up, or set trainer.args.grad_clip, in a "
            "new --output_dir"
        )
        first = max(step - in_a_row + 1, self.first or 0)
        batches = [set(self.batch_of(number).tolist()) for number in range(first, step + 1)]
        shared = set.intersection(*batches)
        suspects = [self.name_of(index) for index in sorted(shared) if not self.cleared[index]]
        if not self.cleared.any():
            named = f" Objects in all of them: {_some(suspects)}." if suspects else ""
            return (
                f"No step since the start was good, so it is not lr, but the weights it started from ({origin}), the "
                f"precision (trainer.args.mix_precision_mode null is fp32) or the data.{named}"
            )
        loss, norm = self.late[-1] if self.late else (math.nan, math.nan)
        norms = sorted(norm for _, norm in self.early)
        usual = norms[len(norms) // 2] if norms else math.nan
        rose = []
        if loss > LOSS_ROSE * self.lowest_loss:
            rose.append(f"the loss rose from {self.lowest_loss:.3g} to {loss:.3g}")
        if norm > NORM_ROSE * usual:
            rose.append(f"the gradient's norm rose from {usual:.3g} to {norm:.3g}")
        if rose:
            return f"Before, {' and '.join(rose)}: {lower}"
        if suspects:
            return f"All of them had {_some(suspects)}, which no good step had: leave that out, or else {lower}"
        return f"The objects differ from step to step, so the cause is rather the rate: {lower}"

    def mean_losses(self) -> tuple[float, float]:
        """Return the mean loss of the first and of the last good steps of this process, none in both; NaN for fewer
        than two. Call it after `report`."""
        count = min(STEPS_BETWEEN_LOOKS, self.good // 2)
        if not count:
            return math.nan, math.nan
        first, last = self.early[:count], [*self.late][-count:]
        return sum(loss for loss, _ in first) / count, sum(loss for loss, _ in last) / count

    def state_dict(self) -> dict[str, Any]:
        first = None if self.first_loss.isnan() else float(self.first_loss)
        return {"total": int(self.total), "in_a_row": int(self.in_a_row), "first_loss": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; from an empty one, which older checkpoints have, as from a fresh start."""
        self.reported = state.get("total", 0)
        self.total, self.in_a_row = self.total + self.reported, self.in_a_row + state.get("in_a_row", 0)
        if state.get("first_loss") is not None:
            self.first_loss = torch.full_like(self.first_loss, state["first_loss"])


def _last_good(checkpoints: Checkpoints) -> str:
    """Return in words which checkpoint is the last that was not saved among bad steps."""
    for step in reversed(checkpoints.steps()):
        try:
            misc = checkpoints.read_misc(step)
        except CheckpointError:  # a damaged one is not good
            continue
        if misc is not None and not misc.get("bad_steps", {}).get("in_a_row"):
            return f"the last good checkpoint is step {step} of {checkpoints.run_dir}"
    return f"{checkpoints.run_dir} has no good checkpoint"


def _some(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(f"{name[:DIGITS_SHOWN]}…" for name in names[:NAMES_SHOWN]) + more


def require_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raise DivergedError naming the first of these tensors that has NaN or infinity. Waits for the device once."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floats:
        return
    finite = torch.stack([value.isfinite().all() for value in floats.values()])
    if not finite.all():
        first = next(name for name, good in zip(floats, finite.tolist(), strict=True) if not good)
        raise DivergedError(
            f"{where}: {first} has numbers that are not finite, after a step whose gradient was. Nothing of it is "
            "saved; lower trainer.args.optimizer.args.lr in a new --output_dir"
        )
