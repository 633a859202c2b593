"""What an object costs against the IoU of the decoded grids: in bits, and in tokens that a language model writes.

    python benchmarks/rate_distortion.py --ablation outputs/ablation --quality outputs/quality --output outputs/rate.png
    python benchmarks/rate_distortion.py --report "sparse=outputs/sparse/eval/val_step0002800.json" \\
        --baselines benchmarks/results/baselines.json --output outputs/forms.png

The first draws the results in output folders of ablation.py and quality.py by their bits. The second draws forms of
tokens, of which evaluate.py wrote the reports, beside what takes no network (baselines.py) and beside published
figures: once by tokens, once by bits. Both may be in one picture. The points are written beside it as Markdown and
JSON.

Bits are the entropy of single ids over all validation objects times the ids of an object, which is an upper bound of
their information; masks of an octree count likewise. A VAE without a codebook is shown at its KL and the IoU of a
sample of its posterior, since that many bits can transmit such a sample.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ablation, quality
from benchmarks.report import Column, Report, Table
from trellis.tokens.stats_report import require_matplotlib
from trellis.utils.command import run_command
from trellis.utils.errors import ConfigError

COLUMNS = (Column("variant", "key"), Column("kbit used"), Column("IoU", format=".4f"))
FORM_COLUMNS = (
    Column("form", "key"),
    Column("origin"),
    Column("LM tokens", format=".1f"),
    Column("kbit", format=".2f"),
    Column("kbit used", format=".2f"),
    Column("IoU", format=".4f"),
)
ORIGINS = {"tokenizer": "#3a5a8c", "baseline": "#8a8f98", "published": "#b0522e"}  # and the colors of their points


class Point(NamedTuple):
    name: str
    kbit: float  # per object
    iou: float


class Form(NamedTuple):
    """A form of tokens. Means over objects; None if unknown or if there is no such thing."""

    name: str
    origin: str  # one of ORIGINS
    tokens: float | None  # that a language model writes
    kbit: float | None  # each token at a fixed length
    kbit_used: float | None  # by the entropy of single tokens
    iou: float


# What others state, and why it does not compare. Not measured here.
PUBLISHED = (
    (
        Form(
            "SuperVoxelGPT, as stated, other grids",
            "published",
            512,
            512 * math.log2(5625) / 1e3,
            None,
            0.9996 / (2 - 0.9996),
        ),
        "SuperVoxelGPT (arXiv:2605.29655): its repository states 512 tokens of 5625 codes and an occupancy dice of "
        "0.9996 for the stage that writes 64³ grids, without saying on which shapes. It is shown as the IoU of a grid "
        "with that dice. Other grids (closed surfaces of 20,000 shapes of one collection), tokens that carry a second "
        "field as well, and weights that are not public: not checked and not comparable.",
    ),
)
NOT_PUBLISHED = (
    "ShapeLLM-Omni (arXiv:2506.01853), whose layout of 1024 ids of 8192 codes the drop-in form has, states no "
    "reconstruction score."
)


def of_ablation(folder: Path) -> list[Point]:
    """Return the finished codebooks in an output folder of ablation.py."""
    points = []
    for tokens in (1024, 4096):
        for variant in ablation.variants(tokens):
            path = variant.folder(folder) / "result.json"
            if variant.start is not None and path.is_file():
                last = json.loads(path.read_text())["last"]
                points.append(Point(variant.name, last["val/entropy_bits_per_object"] / 1e3, last["val/iou"]))
    return points


def of_quality(folder: Path) -> list[Point]:
    """Return the scored phases in an output folder of quality.py."""
    points = []
    for name in quality.PHASES:
        for path in (folder / "eval" / name).glob("val_*.json"):
            found = next(iter(json.loads(path.read_text())["weights"].values()))
            if "kl_bits_per_object" in found:
                points.append(Point(f"{name}, sampled", found["kl_bits_per_object"] / 1e3, found["sampled_iou"]))
            else:
                points.append(Point(name, found["entropy_bits_per_object"] / 1e3, found["iou"]))
    return points


def of_report(text: str) -> Form:
    """Return the form that a report of evaluate.py scored, from NAME=FILE. Raise ConfigError."""
    name, _, path = text.partition("=")
    try:
        found = next(iter(json.loads(Path(path).read_text(encoding="utf-8"))["weights"].values()))
        sizes = found["lm_tokens"], found["bits_per_object"] / 1e3, found["entropy_bits_per_object"] / 1e3
        return Form(name, "tokenizer", *sizes, found["iou"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ConfigError(
            f"--report {text}: give NAME=FILE with a JSON file that evaluate.py wrote for models with a codebook "
            f"({type(error).__name__}: {error})"
        ) from error


def of_baselines(path: Path, grids: str) -> list[Form]:
    """Return the baselines on a set of grids, from the JSON file of baselines.py. Raise ConfigError."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["tables"][0]
        names = [column["name"] for column in table["columns"]]
        rows = [dict(zip(names, row, strict=True)) for row in table["rows"]]
        forms = [
            Form(row["baseline"], "baseline", row["LM tokens"], row["kbit"], row["kbit used"], row["IoU"])
            for row in rows
            if row["grids"] == grids
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"--baselines {path}: is no JSON file of baselines.py ({type(error).__name__}: {error})"
        ) from error
    if not forms:
        known = ", ".join(sorted({str(row["grids"]) for row in rows}))
        raise ConfigError(f"--grids {grids}: {path} has no such grids, only {known}")
    return forms


class Panel(NamedTuple):
    """A diagram of the picture."""

    title: str
    size: str  # what the horizontal axis shows
    marks: list[tuple[str, float, float, str]]  # name, size, IoU, origin


def panels_of_points(panels: dict[str, list[Point]]) -> list[Panel]:
    """Return a panel for each list of points, by their bits. panels: by title."""
    return [
        Panel(title, "kbit per object, by the entropy of single ids", [(*point, "tokenizer") for point in points])
        for title, points in panels.items()
    ]


def panels_of_forms(forms: list[Form]) -> list[Panel]:
    """Return forms by their tokens and by their bits; where the entropy is not known, at a fixed length."""
    tokens = [(form.name, form.tokens, form.iou, form.origin) for form in forms if form.tokens is not None]
    bits = []
    for form in forms:
        if form.kbit_used is not None:
            bits.append((form.name, form.kbit_used, form.iou, form.origin))
        elif form.kbit is not None:
            bits.append((f"{form.name} (fixed length)", form.kbit, form.iou, form.origin))
    return [
        Panel("Tokens of a language model", "tokens per object, mean", tokens),
        Panel("Bits", "kbit per object, by the entropy of single tokens", bits),
    ]


def draw(panels: list[Panel], path: Path) -> None:
    """Draw the panels. The names of points stand beside theirs, the best first, with a line to each point.

    Points of published figures are hollow.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 * len(panels), 6), layout="constrained")
    for axes, (title, size_label, marks) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=title, xlabel=size_label, ylabel="mean IoU, validation")
        axes.margins(x=0.08)
        axes.grid(alpha=0.3)
        marks = sorted(marks, key=lambda mark: -mark[2])
        for number, (name, size, iou, origin) in enumerate(marks):
            color = ORIGINS[origin]
            axes.plot(size, iou, "o", color=color, mfc="none" if origin == "published" else color, markersize=4)
            axes.annotate(
                name,
                (size, iou),
                xytext=(1.03, 1 - (number + 0.5) / len(marks)),
                va="center",
                fontsize=7,
                color=color if origin != "tokenizer" else "black",
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": "#9eb2ce", "lw": 0.5, "relpos": (0, 0.5)},
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ablation", type=Path, help="output folder of ablation.py")
    flags.add_argument("--quality", type=Path, help="output folder of quality.py")
    flags.add_argument(
        "--report",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="JSON file of evaluate.py, by the name that the picture shows; may be repeated",
    )
    flags.add_argument("--baselines", type=Path, help="JSON file of baselines.py")
    flags.add_argument("--grids", default="val", help="the set in --baselines that the reports scored (default: val)")
    flags.add_argument(
        "--output", type=Path, required=True, help="picture to write, .png; the points go to .md and .json beside it"
    )
    options = flags.parse_args(argv)
    if options.output.suffix != ".png":
        flags.error(f"--output {options.output} must end in .png")
    require_matplotlib()
    panels = {}
    for title, script, folder, read in (
        ("Narrow network, equal budget", "ablation.py", options.ablation, of_ablation),
        ("Full size", "quality.py", options.quality, of_quality),
    ):
        if folder is not None:
            panels[title] = read(folder)
            if not panels[title]:
                flags.error(f"{folder} has no finished result of {script}; give the --output_dir of that command")
    forms = [of_report(text) for text in options.report]
    forms += of_baselines(options.baselines, options.grids) if options.baselines else []
    parts: list[str | Table] = []
    if panels:
        parts.append(Table(COLUMNS, [point for found in panels.values() for point in found]))
    if forms:
        forms += [form for form, _ in PUBLISHED]
        parts += [Table(FORM_COLUMNS, forms, "Forms of tokens"), *(note for _, note in PUBLISHED), NOT_PUBLISHED]
    if not parts:
        flags.error("give --ablation, --quality, --report or --baselines")
    drawn = panels_of_points(panels) + (panels_of_forms(forms) if forms else [])
    draw(drawn, options.output)
    report = Report("Rate and distortion", __file__, argv, torch.device("cpu"), options.output.with_suffix(".md"))
    print(report.write(*parts))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
