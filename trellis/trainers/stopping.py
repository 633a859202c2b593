"""Signals that end a run: a request to any rank stops all of them at the same step, or round of a validation."""

import time

import torch
import torch.distributed as dist

from ..utils import dist_utils

# Between ranks a request travels with a collective, which is not worth one every step: so many seconds, or steps.
SECONDS_BETWEEN_CHECKS, STEPS_BETWEEN_CHECKS = 2.0, 50


class StoppedError(Exception):
    """Work in rounds that a signal has stopped, on every rank in the same round."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StopRequests:
    """What the ranks know of each other's signals. device: of the collective."""

    def __init__(self, device: torch.device):
        self.device = device
        self._checked_at, self._checked_step, self._next_step = time.monotonic(), 0, 0

    def stop_requested(self, step: int, signum: int | None) -> int | None:
        """Return the signal to stop for after a step, the same on every rank; None to go on.

        signum: what this rank has got. All ranks must call this at each step.
        """
        if dist_utils.world_size() == 1:
            return signum
        if step < self._next_step:
            return None
        # All ranks learn the slowest one's pace, and so agree on the step of the next check.
        now = time.monotonic()
        pace = (now - self._checked_at) / max(1, step - self._checked_step)
        request = torch.tensor([signum or 0, pace], device=self.device, dtype=torch.float64)
        dist.all_reduce(request, op=dist.ReduceOp.MAX)
        found, pace = request.tolist()
        steps = min(STEPS_BETWEEN_CHECKS, max(1, int(SECONDS_BETWEEN_CHECKS / max(pace, 1e-9))))
        self._checked_at, self._checked_step, self._next_step = now, step, step + steps
        return int(found) or None

    def require_none(self, step: int, signum: int | None) -> None:
        """Raise StoppedError if there is a signal to stop for; arguments as for `stop_requested`."""
        found = self.stop_requested(step, signum)
        if found is not None:
            raise StoppedError(found)
