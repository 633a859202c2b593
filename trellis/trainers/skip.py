"""Steps that are skipped by a flag on the device, for which the host does not wait.

A flag is a bool scalar: whether what this step computed must leave no trace. On a CPU the host reads it at once, and
skips. On a GPU the host has already queued what comes next when the flag is known, so the device puts back what was.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .part import Part


def host_knows(flag: Tensor) -> bool:
    """Return whether the host can read the flag without waiting."""
    return flag.device.type == "cpu"


def put_back(skip: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """Return `before` if the step is skipped, else `now`."""
    if host_knows(skip):
        return before if skip else now
    return torch.where(skip, before, now)


class SkippableOptimizer:
    """Steps of an optimizer of any class that can be skipped: weights and state stay as they were.

    On a GPU, fused optimizers take the flag themselves (`found_inf` of torch's gradient scaling), at no cost. The
    others take the step, and the device puts back what was before; that takes memory for a copy of weights and state,
    and a copy and a selection of each tensor per step. Their counters live on the CPU (`step` of Adam): they are put
    back before they are used again, when the flag has long arrived.

    A parameter's first step waits for the device, once: only then does its state come about.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._stepped: set[int] = set()  # ids of parameters that have taken a step
        self._arrived: Callable[[], bool] | None = None  # waits for the last flag, if counters depend on it
        self._counters: list[tuple[dict, str, Any]] = []  # (state, key, value before that step)

    @torch.no_grad()
    def step(self, skip: Tensor) -> None:
        """Take a step with the gradients as they are, or none if `skip`."""
        self.settle()
        groups = self.optimizer.param_groups
        moved = [p for group in groups for p in group["params"] if p.grad is not None]
        if host_knows(skip) or not self._stepped.issuperset(map(id, moved)):
            if skip:
                # Without gradients every optimizer leaves all as it is. Schedules warn if it takes no step at all.
                self.optimizer.zero_grad(set_to_none=True)
            else:
                self._stepped.update(map(id, moved))
            self.optimizer.step()
        elif all(group.get("fused") for group in groups):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self._step_and_put_back(moved, skip)

    def _step_and_put_back(self, moved: Sequence[Tensor], skip: Tensor) -> None:
        tensors, self._counters = list(moved), []
        for p in moved:
            for key, value in self.optimizer.state[p].items():
                if isinstance(value, Tensor) and value.device == p.device and value.ndim:
                    tensors.append(value)
                else:
                    kept = value.clone() if isinstance(value, Tensor) else value
                    self._counters.append((self.optimizer.state[p], key, kept))
        before = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(before, tensors)
        self.optimizer.step()
        for old, tensor in zip(before, tensors, strict=True):
            torch.where(skip, old, tensor, out=tensor)
        self._arrived = _on_its_way(skip)

    def settle(self) -> None:
        """Put back the counters of a skipped step. Call it before the optimizer's state is saved."""
        if self._arrived is not None and self._arrived():
            for state, key, value in self._counters:
                state[key] = value
        self._arrived, self._counters = None, []


def _on_its_way(flag: Tensor) -> Callable[[], bool]:
    """Start to copy a flag to the CPU. Return what waits for it and reads it."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    copy = torch.empty((), dtype=torch.bool, pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(copy)

    return read


class Undo:
    """What a forward pass changes: buffers of trained models, such as a codebook of averages, and parts' samples."""

    def __init__(self, models: Iterable[nn.Module], parts: Iterable[Part]):
        self.parts = list(parts)
        self.buffers = [
            value
            for model in models
            for value in model.state_dict(keep_vars=True).values()
            if not isinstance(value, nn.Parameter)
        ]
        self._before: list[Tensor] = []

    def remember(self) -> None:
        """Keep the present state; call it before the first forward pass of a step."""
        self._before = [buffer.clone() for buffer in self.buffers]
        for part in self.parts:
            part.remember()

    @torch.no_grad()
    def undo(self, skip: Tensor) -> None:
        """Go back to what was kept if the step is skipped."""
        for buffer, before in zip(self.buffers, self._before, strict=True):
            if not host_knows(skip):
                torch.where(skip, before, buffer, out=buffer)
            elif skip:
                buffer.copy_(before)
        self._before = []
        for part in self.parts:
            part.undo(skip)
