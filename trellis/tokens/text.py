"""Ids as a language model reads and writes them: words of its text, or ids of its vocabulary.

ShapeLLM-Omni (arXiv:2506.01853) adds one word for each code to the vocabulary of Qwen2.5-VL, and two that enclose an
object: <mesh-start><mesh17><mesh4085>…<mesh-end>. `SHAPELLM` is that vocabulary; `TokenFormat.at` puts the same words
elsewhere.

Ids are the tokenizer's, ids of the vocabulary the language model's. To tell them apart, *code* stands here for a code's
number too, the id of a token.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.errors import ConfigError, DataError

QUOTED = 40  # characters of a text that a message quotes
# A longer number is not a code, and int() refuses thousands of digits.
MAX_DIGITS = 18
# Maximum number of characters inside a damaged word such as <mesh-5>; anything longer is text.
MAX_DAMAGED = 32
WORDS = ("code", "unknown", "damaged")  # kinds of items that count among the object's T ids


class Parsed(NamedTuple):
    """An object read from a text or a vocabulary sequence."""

    ids: Tensor  # [T] int64 in [0, n_embed)
    problems: list[str]  # the repairs, one sentence for each kind; empty for an intact object


class Item(NamedTuple):
    """A piece of a model's output."""

    kind: str  # "start", "end", "code", "unknown" (a number out of range), "damaged" (instead of a code), "foreign"
    position: int  # index of its first character in a text, or of the vocabulary id
    word: str  # quoted for a message
    code: int = -1


class Problem(NamedTuple):
    """A defect of an object."""

    position: int  # as in `Item`
    message: str
    repair: str = ""  # what strict=False does about it, if that needs saying

    def repaired(self) -> str:
        """Return the message with the repair."""
        return f"{self.message}; {self.repair}" if self.repair else self.message


@dataclass(frozen=True)
class TokenFormat:
    """Words and vocabulary ids of codes, and of the start and the end of an object.

    Raise ConfigError for vocabulary ids that overlap, and for words that could be mistaken for each other.
    """

    first_id: int  # vocabulary id of code 0; code k has first_id + k
    n_embed: int  # K, number of codes
    start_id: int
    end_id: int
    start: str = "<mesh-start>"
    end: str = "<mesh-end>"
    token: str = "<mesh{}>"  # the word of a code, with {} where its number goes

    @classmethod
    def at(cls, first_id: int, n_embed: int) -> "TokenFormat":
        """Return ShapeLLM-Omni's layout: the codes from first_id on, then start, then end."""
        return cls(first_id, n_embed, first_id + n_embed, first_id + n_embed + 1)

    def __post_init__(self):
        if self.n_embed < 1 or self.first_id < 0:
            raise ConfigError(
                f"a token format needs first_id >= 0 and n_embed >= 1, not {self.first_id} and {self.n_embed}"
            )
        codes = range(self.first_id, self.first_id + self.n_embed)
        for name, value in (("start_id", self.start_id), ("end_id", self.end_id)):
            if value < 0 or value in codes:
                raise ConfigError(
                    f"{name} is {value}; it must be >= 0 and none of the codes' ids, {codes[0]} to {codes[-1]}"
                )
        if self.start_id == self.end_id:
            raise ConfigError(f"start_id and end_id are both {self.start_id}; give each an id of its own")
        before, braces, after = self.token.partition("{}")
        if not braces or "{" in before + after or "}" in before + after:
            raise ConfigError(f"token is {self.token!r}; it must have {{}} once, where the code's number goes")
        if not before + after or before[-1:].isdigit() or after[:1].isdigit():
            raise ConfigError(
                f"token is {self.token!r}; beside {{}} there must be something other than a digit, or "
                "numbers would run into each other"
            )
        codes_word = re.compile(re.escape(before) + "[0-9]+" + re.escape(after))
        for name, word in (("start", self.start), ("end", self.end)):
            if not word.strip() or codes_word.search(word):
                raise ConfigError(f"{name} is {word!r}; it must not be blank or contain a code's word ({self.token})")
        if self.start in self.end or self.end in self.start:
            raise ConfigError(f"start {self.start!r} and end {self.end!r}: one holds the other")

    # --- writing ---

    def to_text(self, ids: Sequence[int] | Tensor) -> str:
        """Return the object as text: start, a word for each id, end.

        ids: [T].
        Raise DataError for an id outside [0, n_embed).
        """
        return self.start + "".join(self.token.format(code) for code in self._checked(ids)) + self.end

    def to_vocabulary(self, ids: Sequence[int] | Tensor) -> list[int]:
        """Return the object as T + 2 ids of the language model's vocabulary. Argument and errors: as in `to_text`."""
        return [self.start_id, *(self.first_id + code for code in self._checked(ids)), self.end_id]

    def _checked(self, ids: Sequence[int] | Tensor) -> list[int]:
        codes = _integers(ids, "ids")
        for index, code in enumerate(codes):
            if not 0 <= code < self.n_embed:
                raise DataError(
                    f"id {index} is {code}; ids must lie in [0, {self.n_embed}). Use the format of the "
                    "tokenizer that made them."
                )
        return codes

    # --- reading ---

    def from_text(
        self, text: str, num_tokens: int | None, *, strict: bool = True, fill: Sequence[int] | Tensor | None = None
    ) -> Parsed:
        """Read the object in a text.

        Text before the start and after the end belongs to the answer and is ignored. So is white space between words,
        which some language models' tokenizers insert.

        num_tokens: T; None if it is unknown, as for the sparse form.
        strict: raise DataError with the first problem: start or end missing, a number of words other than T, a code
            outside [0, n_embed), other text inside the object, words outside any object, several objects.
            If False, repair instead, and describe each kind of repair in `problems`:
            - Of several objects, read the one whose number of words is nearest to T; the first of equals.
            - Drop text that is not a word.
            - Replace a word with a damaged or unknown number by the id of `fill` at its index; drop the word if that
              leaves exactly T.
            - Drop surplus ids at the end; take missing ids from `fill`.
        fill: [T] ids, such as an empty grid's; None for code 0. Raise ValueError if it is not T ids in range.
        """
        return self._parse(self._items_of_text(text), len(text), num_tokens, strict, fill)

    def from_vocabulary(
        self,
        values: Sequence[int] | Tensor,
        num_tokens: int | None,
        *,
        strict: bool = True,
        fill: Sequence[int] | Tensor | None = None,
    ) -> Parsed:
        """Read the object in ids of the language model's vocabulary.

        Ids before the start and after the end are ignored; an id inside that is not a code's counts as a code out of
        range. Otherwise as `from_text`.
        """
        integers = _integers(values, "values")
        return self._parse(self._items_of_vocabulary(integers), len(integers), num_tokens, strict, fill)

    @cached_property
    def _pattern(self) -> re.Pattern:
        before, after = map(re.escape, self.token.split("{}"))
        damaged = ""
        if before and after:
            damaged = f"|(?P<damaged>{before}(?:(?!{before}|{after}).){{0,{MAX_DAMAGED}}}{after})"
        return re.compile(
            f"(?P<start>{re.escape(self.start)})|(?P<end>{re.escape(self.end)})|{before}(?P<number>[0-9]+){after}{damaged}",
            re.DOTALL,
        )

    def _items_of_text(self, text: str) -> Iterable[Item]:
        done = 0
        for match in self._pattern.finditer(text):
            if text[done : match.start()].strip():
                yield _foreign(text, done, match.start())
            done = match.end()
            word = _quote(match[0])
            kind = match.lastgroup or ""  # every alternative of the pattern has a name
            if kind in ("start", "end"):
                yield Item(kind, match.start(), word)
                continue
            if kind == "number":
                code = int(match["number"]) if len(match["number"]) <= MAX_DIGITS else self.n_embed
                # <mesh007> is not a word of the vocabulary.
                kind = "code" if code < self.n_embed and str(code) == match["number"] else "unknown"
            yield Item(kind, match.start(), word, code if kind == "code" else -1)
        if text[done:].strip():
            yield _foreign(text, done, len(text))

    def _items_of_vocabulary(self, values: Sequence[int]) -> Iterable[Item]:
        ends = {self.start_id: "start", self.end_id: "end"}
        for position, value in enumerate(values):
            code = value - self.first_id
            if value in ends:
                yield Item(ends[value], position, str(value))
            elif 0 <= code < self.n_embed:
                yield Item("code", position, str(value), code)
            else:
                yield Item("damaged", position, str(value))

    def _parse(
        self,
        items: Iterable[Item],
        length: int,
        num_tokens: int | None,
        strict: bool,
        fill: Sequence[int] | Tensor | None,
    ) -> Parsed:
        chosen, problems = _choose(_objects(items), num_tokens, length)
        codes, further = self._repaired(chosen, num_tokens, self._checked_fill(fill, num_tokens), length)
        problems = sorted(problems + further, key=lambda problem: problem.position)
        if strict and problems:
            raise DataError(f"{problems[0].message}. Refused: strict=False, or from_tokens.py --repair, repairs it.")
        return Parsed(torch.tensor(codes, dtype=torch.int64), [problem.repaired() for problem in problems])

    def _checked_fill(self, fill: Sequence[int] | Tensor | None, num_tokens: int | None) -> list[int]:
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
        if fill is None:
            return [0] * (num_tokens or 0)
        codes = _integers(fill, "fill")
        if len(codes) != num_tokens or not all(0 <= code < self.n_embed for code in codes):
            raise ValueError(f"fill must be num_tokens = {num_tokens} ids in [0, {self.n_embed}); it has {len(codes)}")
        return codes

    def _repaired(
        self, items: list[Item], num_tokens: int | None, fill: list[int], length: int
    ) -> tuple[list[int], list[Problem]]:
        """Return the ids of an object, and its problems."""
        problems = []
        if foreign := [item for item in items if item.kind == "foreign"]:
            problems.append(
                Problem(
                    foreign[0].position,
                    f"{foreign[0].word} stands between the object's words{_further(foreign)}",
                    "left out",
                )
            )
        words = [item for item in items if item.kind in WORDS]
        bad = [item for item in words if item.kind != "code"]
        written = len(words)
        if bad:
            keep = num_tokens is not None and written - len(bad) != num_tokens
            problems.append(
                Problem(
                    bad[0].position,
                    f"{bad[0].word} is not one of the codes 0 to {self.n_embed - 1}{_further(bad)}",
                    "replaced by the fill id at its index" if keep else "left out",
                )
            )
            if not keep:
                words = [item for item in words if item.kind == "code"]
        if num_tokens is None:
            return [item.code for item in words], problems
        codes = [item.code if item.kind == "code" else default for item, default in zip(words, fill, strict=False)]
        if len(words) != num_tokens:
            repair = "the last are dropped" if len(words) > num_tokens else "the last are filled"
            position = words[num_tokens].position if len(words) > num_tokens else length
            problems.append(Problem(position, f"the object has {written} ids, not {num_tokens}", repair))
        elif written != num_tokens:
            problems.append(
                Problem(
                    length, f"the object has {written} ids, not {num_tokens}", f"{num_tokens} without those left out"
                )
            )
        return codes + fill[len(codes) :], problems


SHAPELLM = TokenFormat.at(first_id=151665, n_embed=8192)


def _objects(items: Iterable[Item]) -> list[list[Item]]:
    """Group items into objects. Drop everything outside of them.

    An object begins with a start, or with a word outside of any object, and goes up to an end or the next start.
    """
    objects: list[list[Item]] = []
    inside = False
    for item in items:
        if item.kind == "start" or (not inside and item.kind in ("code", "unknown", "end")):
            objects.append([])
            inside = True
        if inside:
            objects[-1].append(item)
        if item.kind == "end":
            inside = False
    return objects


def _choose(objects: list[list[Item]], num_tokens: int | None, length: int) -> tuple[list[Item], list[Problem]]:
    """Return the object to read, and the problems of how objects begin and end."""
    if not objects:
        return [], [Problem(0, "there is no object in it: neither start nor end nor a code")]

    def words(items: list[Item]) -> int:
        return sum(item.kind in WORDS for item in items)

    wanted = max(map(words, objects)) if num_tokens is None else num_tokens
    chosen = min(objects, key=lambda items: abs(words(items) - wanted))
    problems = []
    if chosen[0].kind != "start":
        problems.append(Problem(chosen[0].position, f"the object has no start before {chosen[0].word}"))
    if chosen[-1].kind != "end":
        problems.append(Problem(length, "the object has no end"))
    if len(objects) > 1:
        number = next(i for i, items in enumerate(objects) if items is chosen)
        problems.append(
            Problem(
                objects[1][0].position,
                f"there are {len(objects)} objects, or parts of them",
                f"number {number + 1} is read",
            )
        )
    return chosen, problems


def _foreign(text: str, start: int, stop: int) -> Item:
    return Item("foreign", start, _quote(text[start : min(stop, start + 10 * QUOTED)].strip()))


def _quote(text: str) -> str:
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "…")


def _further(items: list[Item]) -> str:
    return f" ({len(items)} such)" if len(items) > 1 else ""


def _integers(values: Sequence[int] | Tensor, name: str) -> list[int]:
    """Return values [n] as Python integers. Raise DataError for another shape or type."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} must be a sequence of integers, not {_quote(repr(values))}") from error
    if tensor.ndim != 1 or (len(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise DataError(f"{name} must be integers [T], not {tensor.dtype} {list(tensor.shape)}")
    return tensor.tolist()
