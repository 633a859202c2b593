"""Results of the benchmarks: tables shown as Markdown and kept as Markdown and JSON.

The JSON file holds the same rows as the Markdown file, with all digits, and says what measured them:

    benchmark   name of the program, such as "nearest_code"
    command     command line that repeats the run
    date        UTC time at which the run began, ISO 8601
    commit      commit of this repository, with "-dirty" after local changes; null outside a git checkout
    device      "cpu" or "cuda"
    machine     processor or GPU and the versions that decide speed
    torch       version of PyTorch
    work        what every row of the run was measured on, such as {"resolution": 64}
    notes       the report's paragraphs
    tables      [{"title", "columns": [{"name", "kind"}], "rows": [[…]]}]

check.py compares two such files.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parents[1]

Kind = Literal["key", "ratio", "figure"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    kind: "key" if the column is part of a row's name, "ratio" if its figures hold on other machines and higher is
        better (a share of the limit, a speed relative to plain PyTorch), otherwise "figure".
    format: format of floats in Markdown; three digits by default.
    """

    name: str
    kind: Kind = "figure"
    format: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of strings, numbers and None. Rows have a value for each column."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[object]]
    title: str = ""

    def markdown(self) -> str:
        """Return the table in Markdown. None shows as a dash."""
        lines = ["| " + " | ".join(column.name for column in self.columns) + " |", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            cells = [_cell(value, column.format) for value, column in zip(row, self.columns, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(([f"## {self.title}", ""] if self.title else []) + lines)


def _cell(value: object, form: str | None) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:{form or ('.0f' if abs(value) >= 1000 else '.3g')}}"


class Report:
    """Result of one run of a benchmark.

    script: the program's `__file__`.
    argv: its arguments; None for those of the process.
    output: Markdown file to write, with the JSON file of the same name beside it; None for neither.
    work: what every row was measured on; results of other work do not compare.
    """

    def __init__(
        self,
        title: str,
        script: str,
        argv: Sequence[str] | None,
        device: torch.device,
        output: Path | None,
        work: dict[str, object] | None = None,
    ):
        self.title, self.output = title, output
        self.origin = {
            "benchmark": Path(script).stem,
            "command": shlex.join(
                ["python", f"benchmarks/{Path(script).name}", *(sys.argv[1:] if argv is None else argv)]
            ),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": current_commit(),
            "device": device.type,
            "machine": describe_machine(device),
            "torch": torch.__version__,
            "work": work or {},
        }

    def write(self, *parts: str | Table) -> str:
        """Return the report in Markdown, and write it if there is an output file.

        parts: paragraphs and tables in their order. A long benchmark writes after each row, so that a run that is
        stopped leaves the rows it has.
        """
        shown = [part.markdown() if isinstance(part, Table) else part for part in parts]
        text = "\n\n".join([f"# {self.title}", self.origin["machine"], *shown]) + "\n"
        if self.output is not None:
            tables = [
                {"title": part.title, "columns": [_column(column) for column in part.columns], "rows": part.rows}
                for part in parts
                if isinstance(part, Table)
            ]
            content = {**self.origin, "notes": [part for part in parts if isinstance(part, str)], "tables": tables}
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(text, encoding="utf-8")
            write_json(self.output.with_suffix(".json"), content)
        return text


def _column(column: Column) -> dict[str, str]:
    return {"name": column.name, "kind": column.kind}


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a result as JSON, with each row of a table on a line of its own."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    innermost = re.compile(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])")
    text = innermost.sub(lambda found: found[1] + re.sub(r"\s*\n\s*", " ", found[2]) + found[3], text)
    path.write_text(text + "\n", encoding="utf-8")


def current_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" after local changes; None if it is not a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_machine(device: torch.device) -> str:
    """Return one line: processor or GPU, threads, and the versions that decide speed."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device.type == "cpu":
        return f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    count = torch.cuda.device_count()
    return (
        f"{count} x {torch.cuda.get_device_name(device)}, {os.cpu_count()} CPU cores, {versions}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, triton {triton}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
