"""Ids as conversations to fine-tune a language model on, in the ShareGPT form that LLaMA-Factory reads.

Its rules (github.com/hiyouga/LLaMA-Factory, data/README.md, section ShareGPT):

- A record has `conversations`, a list of {"from": role, "value": text}. Roles take turns: human (or observation) at the
  odd places, the first, third …, and gpt (or function_call) at the even ones. A record that ends with human is skipped.
- `dataset_info.json`, in the folder that training gets as `dataset_dir`, has an entry for each data set: the file, or
  the folder of files of one kind, `formatting` "sharegpt", and the names of columns, tags and roles.
- <image>, <video> and <audio> in a text stand for a file of a column of their own.

Here a record is one question of human and one answer of gpt, neither of them empty. Of an object with captions there
are two records for each caption, one in either direction.
"""

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.errors import ConfigError, DataError
from ..utils.files import written_aside

DATASET = "mesh_tokens"
FOLDER = "sharegpt"
CAPTION_COLUMNS = ("caption", "captions")
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
PROMPT_OF_CAPTION = "Make a 3D model of this: {caption}"
PROMPT_OF_NAME = "Make a 3D model of this: {name}"
DESCRIBE_PROMPT = "Describe this 3D model: {mesh}"

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """What human says. make: asks for a mesh, may name {caption} and {name} (of the file, without folders and suffix).
    describe: asks for a caption of {mesh}, may name {name} too. Raises ConfigError for other names in braces."""

    make: str
    describe: str = DESCRIBE_PROMPT

    def __post_init__(self):
        for flag, template, known in (
            ("prompt", self.make, {"caption", "name"}),
            ("describe_prompt", self.describe, {"mesh", "name"}),
        ):
            unknown = sorted(_fields(template, flag) - known)
            if unknown:
                raise ConfigError(
                    f"--{flag} {template!r}: {{{unknown[0]}}} is not known, only "
                    f"{' and '.join(f'{{{name}}}' for name in sorted(known))}. Braces as such are "
                    "doubled: {{ and }}"
                )
            if not template.strip():
                raise ConfigError(f"--{flag} is empty; LLaMA-Factory needs a text of human's")
        if "mesh" not in _fields(self.describe, "describe_prompt"):
            raise ConfigError(f"--describe_prompt {self.describe!r}: must say {{mesh}}, where the object's ids go")

    @property
    def need_captions(self) -> bool:
        """Whether `make` names {caption}."""
        return "caption" in _fields(self.make, "prompt")


def records(sha256: str, name: str, mesh: str, captions: Iterable[str], prompts: Prompts) -> list[Record]:
    """The records of an object; none where a prompt needs what the object lacks.

    name: its file, or its sha256, which is no name. mesh: its ids as text. Raises DataError as `check_record`.
    """
    captions, named = list(captions), name != sha256
    name = re.sub(r"\.[A-Za-z][A-Za-z0-9]{1,3}$", "", PurePosixPath(name).name)
    made = []
    if named or "name" not in _fields(prompts.make, "prompt"):
        for caption in captions if prompts.need_captions else [""]:
            made.append((prompts.make.format(caption=caption, name=name), mesh))
    if named or "name" not in _fields(prompts.describe, "describe_prompt"):
        made += [(prompts.describe.format(mesh=mesh, name=name), caption) for caption in captions]
    result = []
    for question, answer in made:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        result.append({"conversations": turns, "sha256": sha256})
        check_record(result[-1], sha256)
    return result


def check_record(record: Record, where: str) -> None:
    """Raise DataError, naming `where` it is, for a record that breaks the rules above."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise DataError(f"{where}: conversations must be a list of turns, as many of gpt as of human")
    for place, turn in enumerate(turns):
        role = ("human", "gpt")[place % 2]
        if turn.get("from") != role:
            raise DataError(f"{where}: turn {place + 1} is of {turn.get('from')!r}; it must be of {role}")
        text = turn.get("value")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: turn {place + 1}, of {role}, has no text")
        for word in PLACEHOLDERS:
            if word in text:
                raise DataError(
                    f"{where}: turn {place + 1}, of {role}, holds {word}, which stands for a file. Take it "
                    "out of the caption."
                )


def dataset_info() -> dict[str, Any]:
    """What dataset_info.json says of the folder `sharegpt` beside it."""
    return {
        DATASET: {
            "file_name": FOLDER,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations"},
            "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
        }
    }


def write_jsonl(path: Path, lines: Iterable[Record]) -> int:
    """Write records, one a line, aside and renamed; return how many. Without any there is no file: LLaMA-Factory's
    reader refuses empty ones."""
    count = 0
    with written_aside(path) as aside:
        with open(aside, "w", encoding="utf-8") as file:
            for record in lines:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    if not count:
        path.unlink()
    return count


def read_captions(path: Path, required: bool) -> dict[str, list[str]]:
    """Captions by sha256, without those that are blank.

    path: a CSV file with a column sha256 and one of caption and captions, or JSON: {sha256: captions}, or a list of
    {"sha256", "caption" or "captions"}. Captions are a text or a list of texts; within CSV, a list is written as JSON,
    as TRELLIS's metadata.csv has it. required: whether it must have such a column.
    Raises DataError where the file cannot be read or has another layout.
    """
    try:
        pairs = _pairs_of_json(path) if path.suffix.lower() == ".json" else _pairs_of_csv(path, required)
        captions: dict[str, list[str]] = {}
        for sha256, value in pairs:
            if not isinstance(sha256, str):
                raise ValueError(f"sha256 {sha256!r} is no text")
            captions.setdefault(sha256, []).extend(_captions(value))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a CSV or JSON file of captions.") from error
    except (ValueError, KeyError, TypeError) as error:  # of the parsers too
        raise DataError(
            f"{path}: has no captions by sha256 ({error}). Give CSV with the columns sha256 and caption, "
            "or JSON {sha256: caption}."
        ) from error
    return {sha256: texts for sha256, texts in captions.items() if texts}


def captions_digest(captions: Mapping[str, list[str]]) -> str:
    """sha256 over all captions, whatever their order in the file."""
    return hashlib.sha256(json.dumps(sorted(captions.items())).encode()).hexdigest()


def _pairs_of_json(path: Path) -> Iterator[tuple[Any, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        yield from content.items()
        return
    for row in content:
        column = next((name for name in CAPTION_COLUMNS if name in row), None)
        if column is None:
            raise ValueError(f"{str(row)[:80]} has neither caption nor captions")
        yield row["sha256"], row[column]


def _pairs_of_csv(path: Path, required: bool) -> Iterator[tuple[str, str]]:
    import pandas as pd

    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    column = next((name for name in CAPTION_COLUMNS if name in table), None)
    if column is None and not required:
        return iter(())
    if column is None or "sha256" not in table:
        raise ValueError(f"its columns are {', '.join(table.columns)}")
    return zip(table["sha256"], table[column], strict=True)


def _captions(value: Any) -> list[str]:
    """A caption, or several, as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a caption that begins with a bracket
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"a caption is {str(value)[:80]!r}, neither text nor a list of texts")
    return [text.strip() for text in value if text.strip()]


def _fields(template: str, flag: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"--{flag} {template!r}: {error}. Braces as such are doubled: {{{{ and }}}}") from error
