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


def phases_table(phases: dict[str, dict]) -> str:
    columns = [
        "phase",
        "trained",
        "steps",
        "seconds",
        "samples/s",
        "GiB",
        "IoU before",
        "IoU after",
        "usage",
        "perplexity",
    ]
    rows = []
    for name, phase in phases.items():
        after = phase["after"]
        codebook = [after.get(f"codebook_{key}") for key in ("usage", "perplexity")]
        ious = _iou(phase["before"]["iou"]), _iou(after["iou"])
        rows.append(
            [
                name,
                TRAINED[name.split("_")[-1]],
                phase["steps"],
                phase["wall"],
                phase["samples_per_second"],
                phase["peak_memory_gib"],
                *ious,
                *codebook,
            ]
        )
    total = sum(phase["wall"] for phase in phases.values())
    return (
        f"{common.markdown_table(columns, rows)}\n\n{total / 60:.1f} minutes in all, start-up and validation included. "
        "IoU of the validation split, averaged weights, in the precision of training."
    )


def scores_table(scores: dict[str, dict]) -> str:
    """Return the table of scores.

    "kbit" is the length of an object's ids. "kbit used" is their entropy over all objects; for a VAE, the KL.
    """
    columns = ["model", "IoU", "median", "5 %", "F-score", "chamfer", "usage", "perplexity", "kbit", "kbit used"]
    rows = []
    for name, found in scores.items():
        used = found.get("entropy_bits_per_object", found.get("kl_bits_per_object"))
        kbits = [bits if bits is None else bits / 1e3 for bits in (found.get("bits_per_object"), used)]
        rows.append(
            [
                name,
                *(_iou(found[key]) for key in ("iou", "iou_median", "iou_p5", "f_score")),
                found["chamfer"],
                found.get("codebook_usage"),
                found.get("codebook_perplexity"),
                *kbits,
            ]
        )
    return common.markdown_table(columns, rows)


def sources_table(scores: dict[str, dict]) -> str:
    """Return the table of IoU by source, for sources with enough objects."""
    sources = {
        name: part
        for name, part in next(iter(scores.values()))["sources"].items()
        if part["objects"] >= OBJECTS_OF_A_SOURCE
    }
    rows = [
        [source, part["objects"], *(_iou(found["sources"][source]["iou"]) for found in scores.values())]
        for source, part in sources.items()
    ]
    return common.markdown_table(["source", "objects", *scores], rows)


def _iou(value: float) -> str:
    return f"{value:.4f}"


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
    device = common.pick_device(options.device)

    names = ", ".join(Path(root).name for root in options.data_dir.split(","))
    header = [common.describe_machine(device), f"Data: {names}."]
    phases, scores = {}, {}
    for name in with_ancestors(options.phases):
        phases[name] = train(options, device.type, name)
        if PHASES[name].scored:
            scores[name] = score(options, device.type, name)
        parts = [*header, "## Phases", phases_table(phases)]
        if scores:
            parts += ["## Scores", scores_table(scores), "## Sources", sources_table(scores)]
        for path in filter(None, (options.output_dir / "results.md", options.output)):
            text = common.write_report("Quality", parts, path)
    print(text)


if __name__ == "__main__":
    main()
