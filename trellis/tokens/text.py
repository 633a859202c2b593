"""Ids as a language model reads and writes them: words of its text, or ids of its vocabulary.

ShapeLLM-Omni (arXiv:2506.01853) adds one word for each code to the vocabulary of Qwen2.5-VL, and two that enclose an
object: <mesh-start><mesh17><mesh4085>…<mesh-end>. `SHAPELLM` is that vocabulary; `TokenFormat.at` puts the same words
elsewhere. A format with an `octree` writes the octree form (tokens/octree.py) of the same ids: it has a word for each
mask beside those of the codes, <mesh-start><octree129><mesh17><mesh4085><mesh-end>.

Ids are the tokenizer's, ids of the vocabulary the language model's. To tell them apart, *code* stands here for a code's
number too, the id of a token. *Values* are what words stand for: codes, and behind them the masks of an octree.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..utils.errors import ConfigError, DataError
from .octree import MASKS, Octree
from .problems import QUOTED, Parsed, Problem, further, integers, parsed, quote

# A longer number is not a code, and int() refuses thousands of digits.
MAX_DIGITS = 18
# Maximum number of characters inside a damaged word such as <mesh-5>; anything longer is text.
MAX_DAMAGED = 32
# Characters of a text that are read, with however many for each id: a million words take a second and 300 MB.
MAX_TEXT, MAX_WORD = 2**22, 64
WORDS = ("value", "unknown", "damaged")  # kinds of items that count among the object's ids


class Item(NamedTuple):
    """A piece of a model's output."""

    kind: str  # "start", "end", "value", "unknown" (a number out of range), "damaged" (instead of a value), "foreign"
    position: int  # index of its first character in a text, or of the vocabulary id
    word: str  # quoted for a message
    value: int = -1  # a code, or K + mask - 1


@dataclass(frozen=True)
class TokenFormat:
    """Words and vocabulary ids of codes, of the start and the end of an object, and of an octree's masks.

    Raise ConfigError for vocabulary ids that overlap, words that could be mistaken for each other, and an octree with
    another number of codes.
    """

    first_id: int  # vocabulary id of code 0; code k has first_id + k
    n_embed: int  # K, number of codes
    start_id: int
    end_id: int
    start: str = "<mesh-start>"
    end: str = "<mesh-end>"
    token: str = "<mesh{}>"  # the word of a code, with {} where its number goes
    mask: str = "<octree{}>"  # the word of a mask, likewise
    first_mask_id: int | None = None  # vocabulary id of mask 1; mask m has first_mask_id + m - 1. Only with an octree
    octree: Octree | None = None  # the form of an object between start and end; None: its T ids as they are

    @classmethod
    def at(cls, first_id: int, n_embed: int, octree: Octree | None = None) -> "TokenFormat":
        """Return ShapeLLM-Omni's layout: the codes from first_id on, then start, then end; then an octree's 255 masks.

        A language model's tokenizer that gets the `vocabulary` as new words gives them these ids, if it had first_id
        words before.
        """
        end_id = first_id + n_embed + 1
        return cls(first_id, n_embed, end_id - 1, end_id, first_mask_id=end_id + 1 if octree else None, octree=octree)

    def __post_init__(self):
        if self.n_embed < 1 or self.first_id < 0:
            raise ConfigError(
                f"a token format needs first_id >= 0 and n_embed >= 1, not {self.first_id} and {self.n_embed}"
            )
        codes = range(self.first_id, self.first_id + self.n_embed)
        if (self.octree is None) != (self.first_mask_id is None):
            raise ConfigError("octree and first_mask_id go together; give both, or neither")
        if self.octree is not None and self.octree.n_embed != self.n_embed:
            raise ConfigError(f"octree has {self.octree.n_embed} codes, but n_embed is {self.n_embed}")
        if self.first_mask_id is not None:
            masks = range(self.first_mask_id, self.first_mask_id + MASKS)
            shared = max(masks.start, codes.start) < min(masks.stop, codes.stop)
            if masks[0] < 0 or shared or self.start_id in masks or self.end_id in masks:
                raise ConfigError(
                    f"first_mask_id is {masks[0]}; {masks[0]} to {masks[-1]} must be >= 0 and no ids of the codes, the "
                    "start or the end"
                )
        for name, value in (("start_id", self.start_id), ("end_id", self.end_id)):
            if value < 0 or value in codes:
                raise ConfigError(
                    f"{name} is {value}; it must be >= 0 and none of the codes' ids, {codes[0]} to {codes[-1]}"
                )
        if self.start_id == self.end_id:
            raise ConfigError(f"start_id and end_id are both {self.start_id}; give each an id of its own")
        numbered = {"token": self.token} | ({"mask": self.mask} if self.octree else {})
        for name, word in numbered.items():
            before, braces, after = word.partition("{}")
            if not braces or "{" in before + after or "}" in before + after:
                raise ConfigError(f"{name} is {word!r}; it must have {{}} once, where the number goes")
            if not before + after or before[-1:].isdigit() or after[:1].isdigit():
                raise ConfigError(
                    f"{name} is {word!r}; beside {{}} there must be something other than a digit, or "
                    "numbers would run into each other"
                )
        for name, form in numbered.items():
            pattern = re.compile("[0-9]+".join(map(re.escape, form.split("{}"))))
            for other, word in {"start": self.start, "end": self.end, **numbered}.items():
                if not word.strip() or (other != name and pattern.search(word.replace("{}", "0"))):
                    what = f"a {'code' if name == 'token' else name}'s word ({form})"
                    raise ConfigError(f"{other} is {word!r}; it must not be blank or contain {what}")
        if self.start in self.end or self.end in self.start:
            raise ConfigError(f"start {self.start!r} and end {self.end!r}: one holds the other")

    # --- writing ---

    def to_text(self, ids: Sequence[int] | Tensor) -> str:
        """Return the object as text: start, a word for each value, end.

        ids: [T].
        Raise DataError for an id outside [0, n_embed), and as `Octree.to_values` does.
        """
        return self.start + "".join(map(self.word, self._values(ids))) + self.end

    def to_vocabulary(self, ids: Sequence[int] | Tensor) -> list[int]:
        """Return the object as ids of the language model's vocabulary; T + 2 of them without an octree. Argument and
        errors: as in `to_text`."""
        return [self.start_id, *map(self.vocabulary_id, self._values(ids)), self.end_id]

    def word(self, value: int) -> str:
        """Return the word of a code, or of a mask: value K + mask - 1."""
        return self.token.format(value) if value < self.n_embed else self.mask.format(value - self.n_embed + 1)

    def vocabulary_id(self, value: int) -> int:
        """Return the vocabulary id of a code, or of a mask: value K + mask - 1."""
        if self.first_mask_id is None or value < self.n_embed:
            return self.first_id + value
        return self.first_mask_id + value - self.n_embed

    def value(self, vocabulary_id: int) -> int:
        """Return the value that a vocabulary id stands for; -1 if it is neither a code's nor a mask's."""
        if 0 <= vocabulary_id - self.first_id < self.n_embed:
            return vocabulary_id - self.first_id
        if self.first_mask_id is not None and 0 <= vocabulary_id - self.first_mask_id < MASKS:
            return vocabulary_id - self.first_mask_id + self.n_embed
        return -1

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The words that a language model needs, with their vocabulary ids, in order of the ids."""
        values = range(self.n_embed + (MASKS if self.octree else 0))
        words = {self.word(value): self.vocabulary_id(value) for value in values}
        words |= {self.start: self.start_id, self.end: self.end_id}
        return dict(sorted(words.items(), key=lambda item: item[1]))

    def _values(self, ids: Sequence[int] | Tensor) -> list[int]:
        return self._checked(ids) if self.octree is None else self.octree.to_values(ids).tolist()

    def _checked(self, ids: Sequence[int] | Tensor) -> list[int]:
        codes = integers(ids, "ids")
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

        num_tokens: T; None if it is unknown, as for the sparse form, or the octree's.
        strict: raise DataError with the first problem: start or end missing, a number of words other than T, a code
            outside [0, n_embed), other text inside the object, words outside any object, several objects.
            If False, repair instead, and describe each kind of repair in `problems`:
            - Of several objects, read the one whose number of words is nearest to T; the first of equals.
            - Drop text that is not a word.
            - Replace a word with a damaged or unknown number by the id of `fill` at its index; drop the word if that
              leaves exactly T.
            - Drop surplus ids at the end; take missing ids from `fill`.
            With an octree read the longest of several objects, drop text that is not a word, and repair the rest as
            `Octree.from_values` does, whose value 0 is the first word after the start.
        fill: [T] ids, such as an empty grid's; None for code 0. Raise ValueError if it is not T ids in range. An octree
            needs none.
        Raise DataError, even then, for a text that is far longer than an object.
        """
        number = num_tokens if self.octree is None else self.octree.num_tokens
        longest = max(MAX_TEXT, MAX_WORD * (number or 0))
        if len(text) > longest:
            raise DataError(
                f"the text has {len(text)} characters, and at most {longest} are read: give one answer alone"
            )
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
        row = integers(values, "values")
        return self._parse(self._items_of_vocabulary(row), len(row), num_tokens, strict, fill)

    @cached_property
    def _pattern(self) -> re.Pattern:
        pattern = f"(?P<start>{re.escape(self.start)})|(?P<end>{re.escape(self.end)})"
        for kind, word in (("code", self.token), ("mask", self.mask))[: 2 if self.octree else 1]:
            before, after = map(re.escape, word.split("{}"))
            pattern += f"|{before}(?P<{kind}>[0-9]+){after}"
            if before and after:
                pattern += f"|(?P<damaged_{kind}>{before}(?:(?!{before}|{after}).){{0,{MAX_DAMAGED}}}{after})"
        return re.compile(pattern, re.DOTALL)

    def _items_of_text(self, text: str) -> Iterable[Item]:
        done = 0
        for match in self._pattern.finditer(text):
            if text[done : match.start()].strip():
                yield _foreign(text, done, match.start())
            done = match.end()
            word = quote(match[0])
            kind = match.lastgroup or ""  # every alternative of the pattern has a name
            if kind in ("start", "end"):
                yield Item(kind, match.start(), word)
            elif kind.startswith("damaged"):
                yield Item("damaged", match.start(), word)
            else:
                number, first, last = match[kind], *((0, self.n_embed - 1) if kind == "code" else (1, MASKS))
                # <mesh007> is not a word of the vocabulary.
                known = len(number) <= MAX_DIGITS and first <= int(number) <= last and str(int(number)) == number
                value = int(number) + (0 if kind == "code" else self.n_embed - 1) if known else -1
                yield Item("value" if known else "unknown", match.start(), word, value)
        if text[done:].strip():
            yield _foreign(text, done, len(text))

    def _items_of_vocabulary(self, values: Sequence[int]) -> Iterable[Item]:
        ends = {self.start_id: "start", self.end_id: "end"}
        for position, value in enumerate(values):
            if value in ends:
                yield Item(ends[value], position, str(value))
            else:
                code_or_mask = self.value(value)
                yield Item("damaged" if code_or_mask < 0 else "value", position, str(value), code_or_mask)

    def _parse(
        self,
        items: Iterable[Item],
        length: int,
        num_tokens: int | None,
        strict: bool,
        fill: Sequence[int] | Tensor | None,
    ) -> Parsed:
        if self.octree is not None:
            if num_tokens not in (None, self.octree.num_tokens):
                raise ValueError(f"num_tokens is {num_tokens}; the octree's objects have {self.octree.num_tokens} ids")
            chosen, problems = _choose(_objects(items), None, length)
            ids, more = self._read_octree(self.octree, chosen, length)
        else:
            chosen, problems = _choose(_objects(items), num_tokens, length)
            codes, more = self._repaired(chosen, num_tokens, self._checked_fill(fill, num_tokens), length)
            ids = torch.tensor(codes, dtype=torch.int64)
        return parsed(ids, problems + more, strict)

    def _checked_fill(self, fill: Sequence[int] | Tensor | None, num_tokens: int | None) -> list[int]:
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {num_tokens}")
        if fill is None:
            return [0] * (num_tokens or 0)
        codes = integers(fill, "fill")
        if len(codes) != num_tokens or not all(0 <= code < self.n_embed for code in codes):
            raise ValueError(f"fill must be num_tokens = {num_tokens} ids in [0, {self.n_embed}); it has {len(codes)}")
        return codes

    def _repaired(
        self, items: list[Item], num_tokens: int | None, fill: list[int], length: int
    ) -> tuple[list[int], list[Problem]]:
        """Return the ids of an object, and its problems."""
        problems = _foreign_problems(items)
        words = [item for item in items if item.kind in WORDS]
        bad = [item for item in words if item.kind != "value"]
        written = len(words)
        if bad:
            keep = num_tokens is not None and written - len(bad) != num_tokens
            problems.append(
                Problem(
                    bad[0].position,
                    f"{bad[0].word} is not one of the codes 0 to {self.n_embed - 1}{further(bad)}",
                    "replaced by the fill id at its index" if keep else "left out",
                )
            )
            if not keep:
                words = [item for item in words if item.kind == "value"]
        if num_tokens is None:
            return [item.value for item in words], problems
        codes = [item.value if item.kind == "value" else default for item, default in zip(words, fill, strict=False)]
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

    def _read_octree(self, octree: Octree, items: list[Item], length: int) -> tuple[Tensor, list[Problem]]:
        """Return the ids [T] of an object in the octree form, and its problems."""
        words = [item for item in items if item.kind in WORDS]
        ids, problems = octree.read([item.value for item in words], [item.word for item in words])
        positions = [*(item.position for item in words), length]
        return ids, _foreign_problems(items) + [each._replace(position=positions[each.position]) for each in problems]


SHAPELLM = TokenFormat.at(first_id=151665, n_embed=8192)


def _objects(items: Iterable[Item]) -> list[list[Item]]:
    """Group items into objects. Drop everything outside of them.

    An object begins with a start, or with a word outside of any object, and goes up to an end or the next start.
    """
    objects: list[list[Item]] = []
    inside = False
    for item in items:
        if item.kind == "start" or (not inside and item.kind in ("value", "unknown", "end")):
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


def _foreign_problems(items: list[Item]) -> list[Problem]:
    """Return what is said of text that is no word: at the end, where an answer was cut off, and before."""
    broken_off = items[-1:] if items and items[-1].kind == "foreign" else []
    between = [item for item in items[: len(items) - len(broken_off)] if item.kind == "foreign"]
    message = "{} stands between the object's words{}"
    problems = [Problem(item.position, message.format(item.word, further(between)), "left out") for item in between[:1]]
    return problems + [
        Problem(item.position, f"the object breaks off at {item.word}", "left out") for item in broken_off
    ]


def _foreign(text: str, start: int, stop: int) -> Item:
    return Item("foreign", start, quote(text[start : min(stop, start + 10 * QUOTED)].strip()))
