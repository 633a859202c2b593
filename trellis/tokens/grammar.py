"""A grammar that lets a causal language model write nothing but whole objects between start and end.

For transformers: `model.generate(..., logits_processor=LogitsProcessorList([Grammar(words)]))`, greedy, with sampling
or with beams. It asks of a processor only to be called with ids and scores, so nothing of it is imported here.

Axes: B rows of a batch, or beams, S ids of a row so far, V ids of the model's vocabulary.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..utils.errors import ConfigError, DataError
from .octree import MASKS, Expected, Walk
from .text import TokenFormat


class Grammar:
    """A logits processor: an id that would break an object gets a score of minus infinity.

    A row's object begins behind its last start, wherever that is. In the dense form T codes follow, in the octree form
    (`words.octree`) what `Walk` expects, and then the end. Outside of objects anything may come.

    words: the words of codes, and the form.
    num_tokens: T; None for the octree's, which knows it.
    codes_per_token: Q of the dense form, if the tokenizer has an empty code: a token's ids are then all 0, or none is.
    eos_id: vocabulary id that must come right behind an object's end; None lets the model go on.
    force_start: whether a row without an open object must begin one at once.
    Raise ConfigError if T is missing or not the octree's.
    """

    def __init__(
        self,
        words: TokenFormat,
        num_tokens: int | None = None,
        *,
        codes_per_token: int = 1,
        eos_id: int | None = None,
        force_start: bool = False,
    ):
        if words.octree is not None and num_tokens not in (None, words.octree.num_tokens):
            raise ConfigError(f"num_tokens is {num_tokens}; the octree's objects have {words.octree.num_tokens} ids")
        if words.octree is None and (num_tokens is None or num_tokens < 1):
            raise ConfigError(f"num_tokens is {num_tokens}; the dense form needs the number of ids of an object")
        self.words, self.num_tokens, self.codes_per_token = words, num_tokens, codes_per_token
        self.eos_id, self.force_start = eos_id, force_start
        self._highest = max([*words.vocabulary.values(), eos_id or 0])
        # Where the rows' open objects stand, by their ids so far: beams exchange rows, so a row's number tells nothing.
        # None is a row that did not keep to the grammar: a beam of probability 0, or one that ended and is padded.
        self._walks: dict[bytes, Walk | _DenseWalk | None] = {}
        self._rows: dict[tuple, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, with minus infinity for ids that may not come next.

        input_ids: [B, S] int64.
        scores: [B, V], of the next id.
        Raise DataError for a prompt that opens an object and goes on with what cannot stand there, ConfigError if V is
        too small for the words.
        """
        if scores.shape[1] <= self._highest:
            raise ConfigError(
                f"the model has scores for {scores.shape[1]} ids, but the words have ids up to {self._highest}; "
                "give it more by resize_token_embeddings"
            )
        before, self._walks = self._walks, {}
        expected = [self._expected(row, number, before) for number, row in enumerate(input_ids.cpu().numpy())]
        return scores.masked_fill(torch.stack([self._forbidden(each, scores) for each in expected]), -torch.inf)

    def _expected(
        self, row: np.ndarray, number: int, before: "dict[bytes, Walk | _DenseWalk | None]"
    ) -> Expected | range | Literal["start", "eos"] | None:
        """Return what must come next in a row [S], codes of the dense form as a range; None if anything may."""
        starts = np.flatnonzero(row == self.words.start_id)
        opened = row[starts[-1] + 1 :] if len(starts) else row[:0]
        if not len(starts) or self.words.end_id in opened:
            if self.eos_id is not None and len(row) and row[-1] == self.words.end_id:
                return "eos"
            return "start" if self.force_start else None
        prefix = opened[:-1].tobytes()
        if len(opened) and prefix in before:
            walk = before[prefix]
            walk = walk.copy() if walk is not None else None
            if walk is not None and not walk.advance(self.words.value(int(opened[-1]))):
                walk = None
        else:
            walk = self._replayed(opened, number)
        self._walks[opened.tobytes()] = walk
        return None if walk is None else walk.expected

    def _replayed(self, opened: np.ndarray, number: int) -> "Walk | _DenseWalk":
        """Return where an open object stands. Raise DataError if it is damaged already."""
        words = self.words
        walk: Walk | _DenseWalk = _DenseWalk(self.num_tokens or 0, words.n_embed, self.codes_per_token)
        if words.octree is not None:
            walk = words.octree.walk()
        for index, value in enumerate(opened.tolist()):
            if not walk.advance(words.value(value)):
                raise DataError(
                    f"row {number}: id {index} behind the start is {value}, but {walk} must stand there. Give a prompt "
                    "without a damaged object."
                )
        return walk

    def _forbidden(self, expected: Expected | range | Literal["start", "eos"] | None, scores: Tensor) -> Tensor:
        """Return which ids may not come next, bool [V] beside the scores."""
        key = (expected, scores.shape[1], scores.device)
        if key not in self._rows:
            row = torch.full(scores.shape[1:], expected is not None)
            if expected is not None:
                row[self._ids(expected)] = False
            self._rows[key] = row.to(scores.device)
        return self._rows[key]

    def _ids(self, expected: Expected | range | Literal["start", "eos"]) -> list[int]:
        words = self.words
        if isinstance(expected, range):
            return [words.vocabulary_id(code) for code in expected]
        if not isinstance(expected, Expected):
            return [words.start_id if expected == "start" else self.eos_id or 0]
        values: list[int] = []
        if expected.kind == "code":
            values = list(range(1, words.n_embed))
        elif expected.kind == "mask":
            values = [words.n_embed + mask - 1 for mask in range(1, MASKS + 1) if not mask & ~expected.children]
        return [*map(words.vocabulary_id, values), *([words.end_id] if expected.may_end else [])]


class _DenseWalk:
    """The place in an object of the dense form, as `Walk` in the octree's."""

    def __init__(self, num_tokens: int, n_embed: int, codes_per_token: int):
        self.num_tokens, self.n_embed, self.codes_per_token = num_tokens, n_embed, codes_per_token
        self.count = 0
        self.empty = False  # whether the last token that began is empty

    @property
    def expected(self) -> Expected | range:
        """The codes that may come next, or the end."""
        if self.count == self.num_tokens:
            return Expected("end", 0, True)
        if self.count % self.codes_per_token == 0:
            return range(self.n_embed)
        return range(1) if self.empty else range(1, self.n_embed)

    def advance(self, value: int) -> bool:
        expected = self.expected
        if isinstance(expected, Expected) or value not in expected:
            return False
        if self.count % self.codes_per_token == 0:
            self.empty = value == 0
        self.count += 1
        return True

    def copy(self) -> "_DenseWalk":
        walk = _DenseWalk(self.num_tokens, self.n_embed, self.codes_per_token)
        walk.count, walk.empty = self.count, self.empty
        return walk

    def __str__(self) -> str:
        expected = self.expected
        if isinstance(expected, Expected):
            return "the end"
        return f"a code from {expected[0]} to {expected[-1]}" if len(expected) > 1 else "code 0"
