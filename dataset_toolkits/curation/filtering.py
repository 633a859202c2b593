"""dataset.py filter: the objects that meet conditions on their columns or are in a list."""

import argparse
import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_toolkits.report import count
from dataset_toolkits.shard_files import chunks
from trellis.datasets.metadata import is_sha256
from trellis.datasets.sparse_structure import SparseStructure
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.inputs import require_file
from trellis.utils.progress import waiting

from .objects import bits_of, check_shard_folder, column_names, open_roots, voxel_counts, write_objects

CONDITION = re.compile(r"\s*([^\s=!<>][^=!<>]*?)\s*(==|!=|<=|>=|<|>|\sin\s)\s*(.*\S)\s*")
SEVERAL = re.compile(r"\s(and|or|&&?|\|\|?)\s.*(==|!=|<|>|\sin\s)", re.IGNORECASE)
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, choices: value in choices,
}
ORDERED = ("<", "<=", ">", ">=")
NUMBERS = ("num_voxels", "mm_per_cell", "aesthetic_score")


class Condition(NamedTuple):
    """A condition on a column: text as the user wrote it, operator, and a number, a text or several."""

    text: str
    column: str
    operator: str
    value: Any

    @property
    def numeric(self) -> bool:
        return self.column in NUMBERS or self.operator in ORDERED

    def holds(self, value: Any, sha256: str) -> bool:
        """Return whether a value of the column meets it. Raise DataError for text where a number is needed."""
        if value is None or value == "":
            return False
        if self.numeric:
            try:
                value = float(value)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{self.column} of {sha256} is {value!r}, which is no number, so --where {self.text!r} cannot be "
                    "decided. Use ==, != or in."
                ) from error
            if math.isnan(value):
                return False
        return COMPARISONS[self.operator](value, self.value)


def parse_condition(text: str) -> Condition:
    """Read COLUMN OPERATOR VALUE. Raise ConfigError for what is none."""
    found = CONDITION.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--where {text!r}: is no condition; give COLUMN OPERATOR VALUE, such as 'num_voxels >= 200', with one of "
            f"{', '.join(COMPARISONS)}"
        )
    column, sign, value = found[1], found[2].strip(), found[3]
    if SEVERAL.search(value) and _unquoted(value) == value:
        raise ConfigError(
            f"--where {text!r}: has several conditions; give a --where for each, of which all must hold, or quote a "
            "value that contains such words"
        )
    if column in ("captions", "grid", "checksum"):
        raise ConfigError(f"--where {text!r}: {column} cannot be compared; give another column")
    values = [_unquoted(part) for part in value.split(",")] if sign == "in" else [_unquoted(value)]
    if column in NUMBERS or sign in ORDERED:
        try:
            values = [float(part) for part in values]
            if any(math.isnan(part) for part in values):
                raise ValueError
        except ValueError as error:
            raise ConfigError(f"--where {text!r}: {value} is no number, which {column} {sign} needs") from error
    return Condition(text, column, sign, tuple(values) if sign == "in" else values[0])


def _unquoted(text: str) -> Any:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def read_names(path: Path, flag: str) -> set[str]:
    """Return the sha256 of a text file: the first word of each line; a heading `sha256` and blank lines are skipped.

    Raise ConfigError for another line.
    """
    require_file(path, ConfigError, f"{flag} takes a text file, a sha256 a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path}: is no text file ({error.reason}); give a sha256 a line") from error
    names = set()
    for number, line in enumerate(lines, 1):
        word = re.split(r"[,;\s]", line.strip(), maxsplit=1)[0].strip('"')
        if word and not (number == 1 and word == "sha256"):
            if not is_sha256(word):
                raise ConfigError(f"{flag} {path}: line {number} begins with {word!r:.80}, which is no sha256")
            names.add(word)
    return names


def run(args: argparse.Namespace) -> None:
    conditions = [parse_condition(text) for text in args.where]
    keep = None if args.keep is None else read_names(args.keep, "--keep")
    drop = None if args.drop is None else read_names(args.drop, "--drop")
    if not conditions and keep is None and drop is None:
        raise ConfigError("nothing to filter by: give --where, --keep or --drop")
    check_shard_folder(args)
    dataset = open_roots(args)
    kept = np.ones(len(dataset), bool)
    for names, flag, listed in ((keep, "--keep", True), (drop, "--drop", False)):
        if names is not None:
            found = np.zeros(len(dataset), bool)
            places = dataset.find(sorted(names))
            found[places[places >= 0]] = True
            kept &= found == listed
            print(f"{flag}: {int(found.sum())} of its {count(len(names), 'object')} are in the data")
    if conditions:
        kept &= _meeting(dataset, np.flatnonzero(kept), conditions)
    chosen = np.flatnonzero(kept)
    shards = write_objects(dataset, chosen, args.output)
    print(f"{args.output}: {len(chosen)} of {count(len(dataset), 'object')}, in {count(shards, 'shard')}")


def _meeting(dataset: SparseStructure, indices: np.ndarray, conditions: list[Condition]) -> np.ndarray:
    """Return [N] bool: which of the objects at indices [n] meet all conditions, and print what each one left out."""
    known = {"num_voxels", *column_names(dataset)} - {"captions"}
    for condition in conditions:
        if condition.column not in known:
            raise ConfigError(
                f"--where {condition.text!r}: the data have no column {condition.column}, only "
                f"{', '.join(sorted(known))}"
            )
    kept = np.zeros(len(dataset), bool)
    failed, lacking = dict.fromkeys(conditions, 0), dict.fromkeys(conditions, 0)
    with waiting("filtering", len(indices)) as progress:
        for part in chunks(indices):
            columns: dict[str, Any] = dataset.columns_of(part)
            if any(condition.column == "num_voxels" for condition in conditions):
                columns["num_voxels"] = voxel_counts(bits_of(dataset, part)).tolist()
            names = columns["sha256"]
            for row, index in enumerate(part.tolist()):
                kept[index] = True
                for condition in conditions:
                    value = columns.get(condition.column, [None] * len(part))[row]
                    lacking[condition] += value is None or value == ""
                    if not condition.holds(value, names[row]):
                        failed[condition] += 1
                        kept[index] = False
            progress(progress.done + len(part))
    for condition in conditions:
        without = f" ({lacking[condition]} have no value)" if lacking[condition] else ""
        print(f"{condition.text}: {count(failed[condition], 'object')} left out{without}")
    return kept
