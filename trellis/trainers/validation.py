"""Which objects of the validation split a run scores while it trains, and what a run that continues says of it."""

from typing import Any

import numpy as np

from ..datasets.base import StandardDatasetBase


def sample(dataset: StandardDatasetBase, number: int | None) -> np.ndarray:
    """Return the indices of the objects that are scored, [n] int64, ascending: all, or at most `number`.

    Those whose sha256 has the smallest hash are taken: the same in every run, whatever their order and the number of
    ranks. An added object takes the place of one other at most.
    """
    if number is None or len(dataset) <= number:
        return np.arange(len(dataset))
    return np.sort(np.argpartition(mixed(dataset.keys()), number - 1)[:number])


def mixed(keys: np.ndarray) -> np.ndarray:
    """Return a hash of numbers [n] uint64, different for different ones.

    The finalizer of SplitMix64 (Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014). The
    split itself, and shares of the work on a data set, go by the sha256's own first digits.
    """
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def scored_before(misc: dict[str, Any], total: int) -> tuple[int, int]:
    """Return how many objects a checkpoint's validations scored, and of how many.

    misc: of the checkpoint. Runs of earlier versions scored all; the oldest do not say how many.
    total: objects in the validation split now.
    """
    before = len(misc["objects"].get("val", ())) if "objects" in misc else total
    return misc.get("scored", before), before


def change(before: tuple[int, int], now: tuple[int, int]) -> str | None:
    """Return what has changed in the share of objects that are scored, with the remedy; None if nothing has.

    before, now: objects scored, and of how many.
    """
    if before[0] == now[0] or (before[0] == before[1] and now[0] == now[1]):  # that the data have changed is said apart
        return None
    setting = "null" if before[0] == before[1] else before[0]
    return (
        f"validations so far scored {before[0]:,} of {before[1]:,} objects, and now {now[0]:,} of {now[1]:,}: their "
        f"scores do not compare, nor does the best step; trainer.args.val_objects {setting} goes on as before"
    )
