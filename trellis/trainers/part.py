"""What a trainer takes along beside its models."""

from typing import Any

from torch import Tensor


class Part:
    """Base of the parts of a trainer, such as the codebook's statistics or the cache of latents.

    The loop in `basic.py` calls each hook for all of `trainer.parts`. Every hook does nothing by default, so a part
    has only those that it needs. Each hook is called on all ranks unless it says otherwise. There are two:
    `TrainingLatents` in vae/latents.py and `CodebookWatch` in vae/codebook_watch.py.
    """

    def preview(self) -> None:
        """Say what `open` would make, or raise ConfigError if it could not. Write nothing. Main process only."""

    def open(self) -> None:
        """Open files. Called before anything else in a run; not called under --tryrun and --profile."""

    def replaces_items(self) -> bool:
        """Return whether `prepare` no longer needs the dataset's items. Asked before each batch."""
        return False

    def prepare(self, batch: dict[str, Tensor], indices: Tensor) -> dict[str, Tensor]:
        """Return the batch as a training step takes it. indices: [B] int64 on the CPU, the items in the dataset."""
        return batch

    def remember(self) -> None:
        """Keep what the forward passes of a step are about to change, for `undo`."""

    def undo(self, skip: Tensor) -> None:
        """Go back to what was kept if `skip`, a bool scalar on the device: the step was not finite and is skipped.

        Called after the forward passes of each step. Do not wait for the device: see `skip.put_back`.
        """

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Act on optimizer step `step` (from 1), which is done. Return scalars to log, the same names at every step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly, for the checkpoint; empty if nothing is."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` that was not empty."""
