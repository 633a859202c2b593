"""Objects that were read from what a language model wrote, and what is wrong with them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.errors import DataError

QUOTED = 40  # characters of a text that a message quotes


class Parsed(NamedTuple):
    """An object read from a text or a vocabulary sequence."""

    ids: Tensor  # [T] int64 in [0, n_embed)
    problems: list[str]  # the repairs, one sentence for each kind; empty for an intact object


class Problem(NamedTuple):
    """A defect of an object."""

    position: int  # index of the character in a text, of the id in a vocabulary sequence, or of the value
    message: str
    repair: str = ""  # what strict=False does about it, if that needs saying

    def repaired(self) -> str:
        """Return the message with the repair."""
        return f"{self.message}; {self.repair}" if self.repair else self.message


def parsed(ids: Tensor, problems: list[Problem], strict: bool) -> Parsed:
    """Return ids with their problems in order of place. Raise DataError with the first one if strict."""
    problems = sorted(problems, key=lambda problem: problem.position)
    if strict and problems:
        raise DataError(f"{problems[0].message}. Refused: strict=False, or from_tokens.py --repair, repairs it.")
    return Parsed(ids, [problem.repaired() for problem in problems])


def integers(values: Sequence[int] | Tensor, name: str) -> list[int]:
    """Return values [n] as Python integers. Raise DataError for another shape or type."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must be a sequence of integers, not {quote(repr(values))}") from error
    if tensor.ndim != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise DataError(f"{name} must be integers [T], not {tensor.dtype} {list(tensor.shape)}")
    return tensor.tolist()


def further(items: Sequence[object]) -> str:
    """Return how many there are, for a message about the first of several."""
    return f" ({len(items)} such)" if len(items) > 1 else ""


def quote(text: str) -> str:
    """Return a text in quotation marks, shortened."""
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")
