"""Where scripts/from_tokens.py takes ids from: Parquet files of scripts/to_tokens.py, or answers of a language model.

Axes: T ids of an object.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trellis.tokenizer import SparseStructureTokenizer
from trellis.tokens import parquet
from trellis.tokens.forms import Form
from trellis.utils.errors import DataError
from trellis.utils.inputs import require_file, require_memory
from trellis.utils.progress import say

ANSWERS = ("predict", "output", "response", "text")
STEM_LENGTH = 40  # characters of an object's name that are kept; each may be four bytes of the file's name


class IdObject(NamedTuple):
    """An object as a file is named after it."""

    stem: str  # of the file
    sha256: str = ""  # with `name`, as in the Parquet files; without them, an answer
    name: str = ""


# Reads the ids of one object and its frame in a scan, if any, later: one may fail while others are fine.
Reader = Callable[[], tuple[Tensor, str | None]]


def stem_of(name: str, sha256: str, digits: int = 8) -> str:
    """Return what an object's file is called, without suffix: its name, and as names need not differ, the hash.

    name: as in the Parquet files, such as folder/chair.glb or scan.nii.gz#liver. What is no letter, digit, dot, hyphen
        or underscore becomes an underscore. If it equals the hash, the object has no name.
    digits: of the hash.
    """
    if name == sha256:
        return sha256
    file, _, part = name.rpartition("#") if "#" in PurePosixPath(name).name else (name, "", "")
    file = re.sub(r"(\.gz)?$", "", PurePosixPath(file.replace("\\", "/")).name, flags=re.IGNORECASE)
    words = [re.sub(r"\.[A-Za-z][A-Za-z0-9]{1,3}$", "", file), *([part] if part else [])]
    stem = re.sub(r"[^\w.-]+", "_", "_".join(words))[:STEM_LENGTH].strip("._-")
    return f"{stem}_{sha256[:digits]}" if stem else sha256


def objects_of_parquet(path: str) -> list[IdObject]:
    """Return the objects of a folder or file, in order. Those that would be called the same have their whole hash.

    Raise DataError for a hash that is none, or that occurs twice.
    """
    objects, found = [], set()
    for sha256, name in parquet.read_names(path):
        if not re.fullmatch(r"[\w-]+", sha256 or ""):
            raise DataError(f"{path}: sha256 {sha256!r} is not a hash and cannot name a file.")
        if sha256 in found:
            raise DataError(f"{path}: has {sha256} several times. Give the files one by one.")
        found.add(sha256)
        objects.append(IdObject(stem_of(name or sha256, sha256), sha256, name))
    # Case does not tell files apart everywhere.
    number = Counter(each.stem.casefold() for each in objects)
    return [
        each
        if number[each.stem.casefold()] == 1
        else each._replace(stem=stem_of(each.name or each.sha256, each.sha256, len(each.sha256)))
        for each in objects
    ]


def ids_of_parquet(path: str, tokenizer: SparseStructureTokenizer) -> Iterator[Reader]:
    """Yield a reader for each object, in the order of `objects_of_parquet`, which raises DataError for ids that are no
    object's."""
    for row in parquet.read_shards(path):
        yield partial(_of_row, row, tokenizer)


def check_tokenizer(path: str, info: parquet.TokenInfo, tokenizer: SparseStructureTokenizer) -> None:
    """Raise DataError if another tokenizer made the ids. info: of the files in `path`."""
    if info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{path}: its ids come from the tokenizer with hash {info.tokenizer_hash[:12]}…, but this one has "
            f"{tokenizer.hash[:12]}…. Give the one that made them{_settings_that_differ(info, tokenizer)}."
        )


def _settings_that_differ(info: parquet.TokenInfo, tokenizer: SparseStructureTokenizer) -> str:
    here = tokenizer.token_info()
    names = ("resolution", "normalization", "up_axis")
    pairs = [(name, getattr(info, name), getattr(here, name)) for name in names]
    differing = ", ".join(f"{name} {there} and not {value}" for name, there, value in pairs if there != value)
    return f", with {differing}" if differing else ""


def _of_row(row: dict[str, Any], tokenizer: SparseStructureTokenizer) -> tuple[Tensor, str | None]:
    return _checked(torch.from_numpy(row["tokens"]), tokenizer), row.get("frame")


def _checked(ids: Tensor, tokenizer: SparseStructureTokenizer) -> Tensor:
    """Return ids [T]. Raise DataError for what `check_ids` refuses."""
    try:
        tokenizer.check_ids(ids)
    except ValueError as error:
        raise DataError(str(error)) from error
    return ids


def read_lines(path: str) -> dict[int, str]:
    """Return the lines that are not blank, {number from 1: line}. Raise DataError if the file cannot be read."""
    require_file(path, DataError, "give a text file or a .jsonl")
    require_memory(4 * Path(path).stat().st_size, f"{path}: takes", DataError, "give a part of it")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a text file or a .jsonl.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Give a text file or a .jsonl.") from error
    found = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise DataError(f"{path}: is empty. Give a text file with an answer in each line, or a .jsonl.")
    return found


def objects_of_text(path: str) -> list[IdObject]:
    """Return the answers of a file. Raise DataError if it cannot be read."""
    return [IdObject(f"line{number:06d}") for number in read_lines(path)]


def ids_of_text(path: str, form: Form, tokenizer: SparseStructureTokenizer, repair: bool) -> Iterator[Reader]:
    """Yield a reader for each answer, which raises DataError for a damaged one. form: of the answers."""
    start, parse = tokenizer.token_format(form=form).start, tokenizer.text_reader(not repair, form)

    def read(line: str, name: str) -> tuple[Tensor, None]:
        answer = answer_of(line, start) if path.lower().endswith(".jsonl") else line
        parsed = parse(answer)
        for problem in parsed.problems:
            say(f"repaired: {name}: {problem}")
        return parsed.ids, None

    for number, line in read_lines(path).items():
        yield partial(read, line, f"line{number:06d}")


def answer_of(line: str, start: str) -> str:
    """Return the answer in a line of a .jsonl. Raise DataError if there is none. start: the first word of a mesh."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error})") from error
    if isinstance(value, dict):
        turns = value.get("conversations")
        # The mesh is gpt's answer, or part of the question if gpt describes it.
        texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
        texts = [text for text in texts if isinstance(text, str) and start in text]
        answers = [value[key] for key in ANSWERS if key in value]
        value = answers[0] if answers else texts[-1] if texts else None
    if not isinstance(value, str):
        raise DataError(f"has no text as {', '.join(ANSWERS)} or in conversations")
    return value
