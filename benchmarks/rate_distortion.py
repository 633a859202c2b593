"""Rate against distortion: the bits that an object's ids use, and the IoU of the decoded grids.

    python benchmarks/rate_distortion.py --ablation outputs/ablation --quality outputs/quality --output outputs/rate.png

Draws the results in output folders of ablation.py and quality.py, and writes the points beside the picture as Markdown
and JSON. Bits are the entropy of single ids over all validation objects times the ids of an object, which is an upper
bound of their information. A VAE without a codebook is shown at its KL and the IoU of a sample of its posterior, since
that many bits can transmit such a sample.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ablation, quality
from benchmarks.report import Column, Report, Table
from trellis.tokens.stats_report import require_matplotlib
from trellis.utils.command import run_command

COLUMNS = (Column("variant", "key"), Column("kbit used"), Column("IoU", format=".4f"))


class Point(NamedTuple):
    name: str
    kbit: float  # per object
    iou: float


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


def draw(panels: dict[str, list[Point]], path: Path) -> None:
    """Draw a panel for each list of points. Their names stand beside it, the best first, with a line to each point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 * len(panels), 6), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set(title=title, xlabel="kbit per object, by the entropy of single ids", ylabel="mean IoU, validation")
        axes.margins(x=0.08)
        axes.grid(alpha=0.3)
        points = sorted(points, key=lambda point: -point.iou)
        for number, (name, kbit, iou) in enumerate(points):
            axes.plot(kbit, iou, "o", color="#3a5a8c", markersize=4)
            line = {"arrowstyle": "-", "color": "#9eb2ce", "lw": 0.5, "relpos": (0, 0.5)}
            axes.annotate(
                name,
                (kbit, iou),
                xytext=(1.03, 1 - (number + 0.5) / len(points)),
                va="center",
                fontsize=7,
                textcoords="axes fraction",
                arrowprops=line,
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ablation", type=Path, help="output folder of ablation.py")
    flags.add_argument("--quality", type=Path, help="output folder of quality.py")
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
    if not panels:
        flags.error("give --ablation, --quality or both")
    draw(panels, options.output)
    points = [point for found in panels.values() for point in found]
    report = Report("Rate and distortion", __file__, argv, torch.device("cpu"), options.output.with_suffix(".md"))
    print(report.write(Table(COLUMNS, points)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
