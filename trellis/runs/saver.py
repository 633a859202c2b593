"""Checkpoints that are written while training goes on.

`save` copies the state to memory of the host and returns; a thread writes the copy. On a GPU the copies are queued
behind the step's own work, to page-locked memory, so that training waits for none of it. Tensors of the copy are used
again by the next one. There is never more than one set in flight: the next `save` waits for the one before.

A thread is enough: writing and summing let other threads run (see `SumWriter`).
"""

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoints
from .folder import write_best


class Saver:
    """A writer of a run's checkpoints in the background.

    As a context, it waits at the end for what is still being written; after an interruption (KeyboardInterrupt) it does
    not, which leaves the checkpoint before.
    """

    def __init__(self, checkpoints: Checkpoints, written: Callable[[int], None] = lambda step: None):
        """written: called by the writer with the step of each set that is whole."""
        self.checkpoints, self.written = checkpoints, written
        self._copies: dict[tuple, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._step = 0
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):
            try:
                self.wait()
            except Exception as other:
                if other is not error:
                    error.add_note(f"and the checkpoint of step {self._step} could not be written: {other}")

    def save(
        self,
        step: int,
        trained: dict[str, dict[str, Tensor]],
        averages: dict[float, dict[str, dict[str, Tensor]]],
        frozen: dict[str, dict[str, Tensor]],
        misc: dict[str, Any],
        keep_last: int | None = None,
    ) -> None:
        """Begin to write the set of a step; then best.json, and remove the sets that `keep_last` leaves over.

        Arguments: as in `Checkpoints.save`. Frozen weights are not copied: nothing changes them.
        Raise the error of the set before, if it had one.
        """
        self.wait()
        copies: dict[tuple, Tensor] = {}
        trained, averages, misc = (
            self._copy(value, (name,), copies)
            for name, value in (("trained", trained), ("averages", averages), ("misc", misc))
        )
        self._copies, self._step = copies, step
        copied = None
        if any(tensor.is_pinned() for tensor in copies.values()):
            copied = torch.cuda.Event()
            copied.record()

        def write() -> None:
            try:
                if copied is not None:
                    copied.synchronize()
                self.checkpoints.save(step, trained, averages, frozen, misc)
                if misc["best"] is not None:
                    write_best(self.checkpoints.run_dir, misc["best"])
                self.written(step)
                if keep_last is not None:
                    self.checkpoints.prune(keep_last, misc["best"] and misc["best"]["step"])
            except BaseException as error:  # raised by `check` or `wait`, in the main thread
                self._error = error

        # A daemon: a second Ctrl-C ends the program at once.
        self._thread = threading.Thread(target=write, daemon=True, name=f"checkpoint of step {step}")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last set, if it is known by now."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the last set is written. Raise its error, if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _copy(self, value: Any, key: tuple, copies: dict[tuple, Tensor]) -> Any:
        """Return a copy of a tree of dicts, lists and tensors, with its tensors in memory of the host.

        key: the place in the tree. copies: gets the tensors of the copy by their places.
        """
        if isinstance(value, Tensor):
            target = self._copies.get(key)
            if target is None or target.shape != value.shape or target.dtype != value.dtype:
                target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            copies[key] = target.copy_(value.detach(), non_blocking=True)
            return target
        if isinstance(value, Mapping):
            result = copy.copy(value)  # a state dict has a version beside its tensors
            for name, item in value.items():
                result[name] = self._copy(item, (*key, name), copies)  # type: ignore[index]
            return result
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, (*key, i), copies) for i, item in enumerate(value))
        return value if isinstance(value, (int, float, str, bytes, type(None))) else copy.deepcopy(value)
