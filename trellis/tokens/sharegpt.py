"""Ids as conversations for fine-tuning a language model, in the ShareGPT form that LLaMA-Factory reads.

LLaMA-Factory's rules (github.com/hiyouga/LLaMA-Factory, data/README.md, section ShareGPT):

- A record has `conversations`, a list of {"from": role, "value": text}. Roles alternate: human (or observation) first,
  third and so on, gpt (or function_call) second, fourth and so on. A record that ends with human is skipped.
- `dataset_info.json`, in the folder that training gets as `dataset_dir`, has an entry for each data set: the file, or
  a folder of files of one type, `formatting` "sharegpt", and the names of columns, tags and roles.
- <image>, <video> and <audio> in a text refer to files in columns of their own.

Here a record is one question by human and one answer by gpt, neither of them empty. An object with captions has two
records for each caption, one in either direction.
"""

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..utils.config import differing_keys, parse_json
from ..utils.errors import ConfigError, DataError
from ..utils.files import atomic_write

DATASET = "mesh_tokens"  # of dataset_info.json, and the folder of its files
INFO = "dataset_info.json"
FLAGS = {"make": "--prompt", "describe": "--describe_prompt", "captions": "--captions"}  # of what SETTINGS has
SETTINGS = "settings.json"  # what the conversations of a folder are made of
CAPTION_COLUMNS = ("caption", "captions")
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
MESH_WORD = re.compile(r"<mesh-start>|<mesh-end>|<(mesh|octree)[0-9]+>")  # of TokenFormat
PROMPT_OF_CAPTION = "Make a 3D model of this: {caption}"
PROMPT_OF_NAME = "Make a 3D model of this: {name}"
DESCRIBE_PROMPT = "Describe this 3D model: {mesh}"

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The questions. Raise ConfigError for other names in braces, and without {mesh} in `describe`.

    {name} is the file's name, without folders and suffix.
    """

    make: str  # asks for a mesh; may contain {caption} and {name}
    describe: str = DESCRIBE_PROMPT  # asks for a caption of {mesh}; may contain {name}

    def __post_init__(self):
        for flag, template, known in (
            ("prompt", self.make, {"caption", "name"}),
            ("describe_prompt", self.describe, {"mesh", "name"}),
        ):
            unknown = sorted(_fields(template, flag) - known)
            if unknown:
                raise ConfigError(
                    f"--{flag} {template!r}: {{{unknown[0]}}} is not known, only "
                    f"{' and '.join(f'{{{name}}}' for name in sorted(known))}. Write a literal "
                    "brace twice: {{ or }}"
                )
            if not template.strip():
                raise ConfigError(f"--{flag} is empty; LLaMA-Factory needs a question")
        if "mesh" not in _fields(self.describe, "describe_prompt"):
            raise ConfigError(f"--describe_prompt {self.describe!r}: must contain {{mesh}}, where the object's ids go")

    @property
    def fields(self) -> list[str]:
        """Names in braces of `make`, sorted."""
        return sorted(_fields(self.make, "prompt"))

    @property
    def need_captions(self) -> bool:
        """Whether `make` contains {caption}."""
        return "caption" in self.fields


def claim(folder: Path, prompts: Prompts, captions: str, tokens: dict[str, Any], alone: bool) -> bool:
    """Make a folder one of these conversations, and return True if those of other prompts or captions are removed.

    captions: their `captions_digest`.
    tokens: what identifies the tokens; JSON.
    alone: whether no other machine writes into the folder.
    Raise ConfigError if the folder has conversations of other tokens, or of other prompts or captions which another
    machine may be writing.
    """
    path, replaced = folder / SETTINGS, False
    wanted = {**asdict(prompts), "captions": captions, "tokens": json.loads(json.dumps(tokens))}
    if path.exists():
        try:
            found = parse_json(path.read_text(encoding="utf-8"), SETTINGS)
            of_other_tokens = found["tokens"] != wanted["tokens"]
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise ConfigError(f"{path} is damaged ({error}); delete it together with the files beside it") from error
        if of_other_tokens:
            keys = ", ".join(differing_keys(found["tokens"], wanted["tokens"]))
            raise ConfigError(f"{folder}: has conversations of other tokens ({keys}). Give --sharegpt another folder.")
        if found == wanted:
            return False
        old = sorted((folder / DATASET).glob("shard-*.jsonl"))
        if old and not alone:
            keys = ", ".join(FLAGS.get(key, key) for key in differing_keys(found, wanted))
            raise ConfigError(
                f"{folder}: has conversations of other prompts or captions ({keys}), which another machine may be "
                "writing. Delete the folder, or give --sharegpt another one."
            )
        for each in old:
            each.unlink()
        replaced = bool(old)
    elif (folder / INFO).exists() or any((folder / DATASET).glob("*")):
        raise ConfigError(f"{folder}: has other data. Give --sharegpt another folder.")
    (folder / DATASET).mkdir(parents=True, exist_ok=True)
    _write_json(path, wanted)
    if not (folder / INFO).exists():  # a user may have added data sets to it
        _write_json(folder / INFO, dataset_info())
    return replaced


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def records(sha256: str, name: str, mesh: str, captions: Iterable[str], prompts: Prompts) -> list[Record]:
    """Return the records of an object; none for a prompt that needs a caption or a name which the object lacks.

    name: its file. If it equals sha256, the object has no name.
    mesh: its ids as text.
    Raise DataError as `check_record` does, and for a caption or a name with a word of meshes.
    """
    captions, named = list(captions), name != sha256
    name = re.sub(r"\.[A-Za-z][A-Za-z0-9]{1,3}$", "", PurePosixPath(name).name)
    names = [name] if "name" in (*prompts.fields, *_fields(prompts.describe, "describe_prompt")) else []
    for text in (*captions, *names):
        if word := MESH_WORD.search(text):
            raise DataError(f"{sha256}: {text!r:.100} contains {word[0]}, a word of meshes. Remove it from the text.")
    made = []
    if named or "name" not in prompts.fields:
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
    """Raise DataError for a record that breaks the rules above. where: names the record in the message."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise DataError(f"{where}: conversations must be a list of turns, as many by gpt as by human")
    for number, turn in enumerate(turns, start=1):
        role = "human" if number % 2 else "gpt"
        if turn.get("from") != role:
            raise DataError(f"{where}: turn {number} is by {turn.get('from')!r}; it must be by {role}")
        text = turn.get("value")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: turn {number}, by {role}, has no text")
        for word in PLACEHOLDERS:
            if word in text:
                raise DataError(
                    f"{where}: turn {number}, by {role}, contains {word}, which stands for a file. Remove it from "
                    "the caption."
                )


def dataset_info() -> dict[str, Any]:
    """Return the content of dataset_info.json for the folder DATASET beside it."""
    return {
        DATASET: {
            "file_name": DATASET,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations"},
            "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
        }
    }


def write_jsonl(path: Path, lines: Iterable[Record]) -> int:
    """Write records atomically, one per line. Return how many.

    Without any record write no file: LLaMA-Factory's reader refuses empty files.
    """
    count = 0
    with atomic_write(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            for record in lines:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    if not count:
        path.unlink()
    return count


def read_captions(path: Path, required: bool) -> dict[str, list[str]]:
    """Return captions by sha256, without blank ones.

    path: a CSV file with the columns sha256 and caption (or captions); or JSON, {sha256: captions} or a list of
        {"sha256", "caption" or "captions"}. Captions are a text or a list of texts; in CSV a list is written as JSON,
        as in TRELLIS's metadata.csv.
    required: raise DataError for a CSV file without a column of captions.
    Raise DataError if the file cannot be read or has another layout.
    """
    try:
        pairs = _pairs_of_json(path) if path.suffix.lower() == ".json" else _pairs_of_csv(path, required)
        captions: dict[str, list[str]] = {}
        for sha256, value in pairs:
            if not isinstance(sha256, str):
                raise ValueError(f"sha256 {sha256!r} is not text")
            captions.setdefault(sha256, []).extend(captions_of(value))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Give a CSV or JSON file of captions.") from error
    except (ValueError, KeyError, TypeError, ConfigError) as error:  # of the parsers too
        raise DataError(
            f"{path}: has no captions by sha256 ({error}). Give CSV with the columns sha256 and caption, "
            "or JSON {sha256: caption}."
        ) from error
    return {sha256: texts for sha256, texts in captions.items() if texts}


def captions_digest(captions: Mapping[str, list[str]]) -> str:
    """Return the sha256 of all captions, independent of their order in the file."""
    return hashlib.sha256(json.dumps(sorted(captions.items())).encode()).hexdigest()


def _pairs_of_json(path: Path) -> Iterator[tuple[Any, Any]]:
    content = parse_json(path.read_text(encoding="utf-8"), "the file")
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


def captions_of(value: Any) -> list[str]:
    """Return a caption, or several, as a list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, "a caption")
        except (ValueError, ConfigError):
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
        raise ConfigError(f"--{flag} {template!r}: {error}. Write a literal brace twice: {{{{ or }}}}") from error
