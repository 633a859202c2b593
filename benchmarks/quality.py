"""The whole recipe from random weights at full size: VAE, codebooks of 4096 and of 1024 tokens, and their scores.

    python benchmarks/quality.py --data_dir DATA --output_dir outputs/quality

Every phase runs train.py on a configuration configs/vae/recipe_*.json and starts from the weights of an earlier phase.
A finished phase is not run again; one that was cut off continues from its last checkpoint. scripts/evaluate.py scores
the VAE and the results of both stages 2, in fp32. After every phase results.md is written into --output_dir, and
phase.json, with the command, into the phase's folder.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config


@dataclass(frozen=True)
class Phase:
    """A training run of the recipe."""

    start: str | None = None  # the phase whose weights it starts from
    scored: bool = False  # whether evaluate.py scores its result


PHASES = {
    "vae": Phase(scored=True),
    "4096_stage1": Phase("vae"),
    "4096_stage2": Phase("4096_stage1", scored=True),
    "1024_stage1": Phase("vae"),
    "1024_stage2": Phase("1024_stage1", scored=True),
}
TRAINED = {"vae": "VAE", "stage1": "codebook", "stage2": "everything"}
# With fewer objects, a source's mean is mostly chance.
OBJECTS_OF_A_SOURCE = 10
PHASE_COLUMNS = (
    Column("phase", "key"),
    Column("trained"),
    Column("steps"),
    Column("seconds"),
    Column("samples/s"),
    Column("GiB"),
    Column("IoU before", format=".4f"),
    Column("IoU after", format=".4f"),
    Column("usage"),
    Column("perplexity"),
)
SCORE_COLUMNS = (
    Column("model", "key"),
    Column("IoU", format=".4f"),
    Column("median", format=".4f"),
    Column("5 %", format=".4f"),
    Column("F-score", format=".4f"),
    Column("chamfer"),
    Column("usage"),
    Column("perplexity"),
    Column("kbit"),
    Column("kbit used"),
)


def with_ancestors(names: list[str]) -> list[str]:
    """Return these phases and all that they start from, in the order of PHASES."""
    wanted = set()
    for name in names:
        while name is not None and name not in wanted:
            wanted.add(name)
            name = PHASES[name].start
    return [name for name in PHASES if name in wanted]


def train(options: argparse.Namespace, device: str, name: str) -> dict:
    """Run a phase unless it is finished. Return its command, its figures (see read_log) and its seconds."""
    folder = options.output_dir / name
    result = folder / "phase.json"
    if not result.exists():
        command = [
            "train.py",
            "--config",
            f"configs/vae/recipe_{name}.json",
            "--data_dir",
            options.data_dir,
            "--output_dir",
            str(folder),
            "--device",
            device,
            "--num_gpus",
            "1",
        ]
        if PHASES[name].start:
            command += ["--load_dir", str(options.output_dir / PHASES[name].start)]
        models = load_config(runs.config_path(f"recipe_{name}"))["models"]
        for setting in options.set:
            section, _, rest = setting.partition(".")
            if section != "models" or rest.split(".")[0] in models:
                command += ["--set", setting]
        started = time.monotonic()
        execute(command)
        wall = time.monotonic() - started
        found = {"command": shlex.join(command), **read_log(folder), "wall": wall}
        result.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(result.read_text())


def execute(command: list[str]) -> None:
    """Run a script of this repository. Raise SystemExit if it fails."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=common.ROOT).returncode
    if code:
        raise SystemExit(f"error: the command above ended with exit code {code}; rerun this program to continue")


def read_log(folder: Path) -> dict:
    """Return steps, seconds, speed, memory, and the first and last validation of a finished run."""
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    scores = [{key[4:]: value for key, value in line.items() if key.startswith("val/")} for line in log]
    scores = [score for score in scores if score]
    speed = runs.read_speed(folder, warm=0)
    return {
        "steps": log[-1]["step"],
        "seconds": log[-1]["seconds"],
        "samples_per_second": speed.samples_per_second,
        "peak_memory_gib": speed.peak_memory_gib,
        "before": scores[0],
        "after": scores[-1],
    }


def score(options: argparse.Namespace, device: str, name: str) -> dict:
    """Return evaluate.py's scores of a phase's averaged weights on the validation split."""
    output = options.output_dir / "eval" / name
    if not list(output.glob("val_*.json")):
        execute(
            [
                "scripts/evaluate.py",
                "--run",
                str(options.output_dir / name),
                "--data_dir",
                options.data_dir,
                "--output_dir",
                str(output),
                "--weights",
                "averaged",
                "--batch_size",
                str(options.eval_batch),
                "--device",
                device,
            ]
        )
    report = json.loads(next(output.glob("val_*.json")).read_text())
    return next(iter(report["weights"].values()))


def phases_table(phases: dict[str, dict]) -> Table:
    """Return what each phase took and reached. IoU is that of validation, by averaged weights."""
    rows = []
    for name, phase in phases.items():
        after = phase["after"]
        codebook = [after.get(f"codebook_{key}") for key in ("usage", "perplexity")]
        rows.append(
            [
                name,
                TRAINED[name.split("_")[-1]],
                phase["steps"],
                phase["wall"],
                phase["samples_per_second"],
                phase["peak_memory_gib"],
                phase["before"]["iou"],
                after["iou"],
                *codebook,
            ]
        )
    return Table(PHASE_COLUMNS, rows, "Phases")


def scores_table(scores: dict[str, dict]) -> Table:
    """Return the table of scores.

    kbit: of an object's ids. kbit used: by the ids' entropy over all objects; for a VAE, the KL of a sample.
    """
    rows = []
    for name, found in scores.items():
        used = found.get("entropy_bits_per_object", found.get("kl_bits_per_object"))
        kbits = [bits if bits is None else bits / 1e3 for bits in (found.get("bits_per_object"), used)]
        rows.append(
            [
                name,
                *(found[key] for key in ("iou", "iou_median", "iou_p5", "f_score", "chamfer")),
                found.get("codebook_usage"),
                found.get("codebook_perplexity"),
                *kbits,
            ]
        )
    return Table(SCORE_COLUMNS, rows, "Scores")


def sources_table(scores: dict[str, dict]) -> Table:
    """Return the IoU by source, for sources with enough objects."""
    sources = {
        name: part
        for name, part in next(iter(scores.values()))["sources"].items()
        if part["objects"] >= OBJECTS_OF_A_SOURCE
    }
    rows = [
        [source, part["objects"], *(found["sources"][source]["iou"] for found in scores.values())]
        for source, part in sources.items()
    ]
    columns = (Column("source", "key"), Column("objects"), *(Column(name, format=".4f") for name in scores))
    return Table(columns, rows, "Sources")


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument("--data_dir", required=True, help="data root with a validation split")
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument(
        "--phases",
        nargs="+",
        choices=PHASES,
        default=list(PHASES),
        help="run these phases and all that they start from (default: all)",
    )
    flags.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH.TO.KEY=VALUE",
        help="passed on to train.py; a setting of a model only in phases that have the model",
    )
    flags.add_argument("--eval_batch", type=int, default=32)
    options = flags.parse_args(argv)
    options.output_dir = options.output_dir.resolve()
    options.data_dir = ",".join(str(Path(root).resolve()) for root in options.data_dir.split(","))
    device = pick_device(options.device)

    names = ", ".join(Path(root).name for root in options.data_dir.split(","))
    outputs = [path for path in (options.output_dir / "results.md", options.output) if path]
    reports = [Report("Quality", __file__, argv, device, path) for path in outputs]
    phases, scores = {}, {}
    for name in with_ancestors(options.phases):
        phases[name] = train(options, device.type, name)
        if PHASES[name].scored:
            scores[name] = score(options, device.type, name)
        total = sum(phase["wall"] for phase in phases.values())
        parts = [
            f"Data: {names}.",
            phases_table(phases),
            f"{total / 60:.1f} minutes in all, start-up and validation included. IoU of the validation split, averaged "
            "weights, in the precision of training.",
        ]
        if scores:
            parts += [scores_table(scores), sources_table(scores)]
        for report in reports:
            text = report.write(*parts)
    print(text)


if __name__ == "__main__":
    sys.exit(run_command(main, None))
