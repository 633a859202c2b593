"""The recipes from random weights: VAE, codebook and joint training of each form of tokens, and their scores.

    python benchmarks/quality.py --data_dir DATA --output_dir outputs/quality --forms base

Every phase runs train.py on a configuration of configs/vae and starts from the weights of an earlier phase. The short
budget of a form is 25 minutes of one GPU, all its phases together. The long one is about as long on four GPUs, with
larger batches, more data, and all 48 symmetries of the cube:

    python benchmarks/quality.py --data_dir DATA,MORE --output_dir outputs/long --forms base --long --num_gpus 4

A finished phase is not run again; one that was cut off continues from its last checkpoint. scripts/evaluate.py scores
the VAE and the results of stages 2, in fp32, on the validation split of DATA and of each --eval_dir. After every phase
results.md is written into --output_dir, and phase.json, with the command, into the phase's folder.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.datasets import DATASETS
from trellis.evaluation.summary import read_kinds
from trellis.trainers.configuration import complete_config
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import apply_override, differing_keys, load_config
from trellis.utils.errors import ConfigError
from trellis.utils.files import atomic_write


@dataclass(frozen=True)
class Phase:
    """A training run of a recipe."""

    config: str  # its configuration in configs/vae
    start: str | None = None  # the phase whose weights it starts from
    scored: bool = False  # whether evaluate.py scores its result


def stages(form: str, config: str, vae: str) -> dict[str, Phase]:
    """Return the phases of a form of tokens after its VAE."""
    return {
        f"{form}_stage1": Phase(f"{config}_stage1", vae),
        f"{form}_stage2": Phase(f"{config}_stage2", f"{form}_stage1", scored=True),
    }


FORMS = ("4096", "1024", "512", "sparse", "sparse8x2", "sparse8x4", "base")
PHASES = {"vae": Phase("recipe_vae", scored=True)}
for form in FORMS[:-1]:
    PHASES |= stages(form, f"recipe_{form}", "vae")
PHASES |= {"base_vae": Phase("base_vae", scored=True), **stages("base", "base", "base_vae")}

TRAINED = {"vae": "VAE", "stage1": "codebook", "stage2": "everything"}
# The name of the validation split of --data_dir among the sets that are scored.
VAL = "val"
# With fewer objects, a source's mean is mostly chance.
OBJECTS_OF_A_SOURCE = 10
PHASE_COLUMNS = (
    Column("phase", "key"),
    Column("seed", "key"),
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
    Column("seed", "key"),
    Column("GPU-minutes", format=".1f"),
    Column("LM tokens", format=".1f"),
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


SET_COLUMNS = (
    Column("model", "key"),
    Column("seed", "key"),
    Column("grids", "key"),
    Column("objects"),
    Column("IoU", format=".4f"),
    Column("5 %", format=".4f"),
)


@dataclass(frozen=True)
class Run:
    """A phase with one seed."""

    phase: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.phase}_seed{self.seed}" if self.seed else self.phase

    @property
    def start(self) -> "Run | None":
        """The run whose weights it starts from."""
        start = PHASES[self.phase].start
        return None if start is None else Run(start, self.seed)


def with_ancestors(names: list[str]) -> list[str]:
    """Return these phases and all that they start from, in the order of PHASES."""
    wanted: set[str] = set()
    for name in names:
        before: str | None = name
        while before is not None and before not in wanted:
            wanted.add(before)
            before = PHASES[before].start
    return [name for name in PHASES if name in wanted]


def train(options: argparse.Namespace, device: str, run: Run) -> dict:
    """Run a phase unless it is finished. Return its command, its figures (see read_log), seconds and GPUs.

    Raise ConfigError if it is finished with other settings.
    """
    folder = options.output_dir / run.name
    result = folder / "phase.json"
    path = runs.config_path(PHASES[run.phase].config)
    settings = settings_of(options, run, load_config(str(path)))
    origin = {"num_gpus": options.num_gpus, "data_dir": options.data_dir}
    if not result.exists():
        command = ["train.py", "--config", str(path.relative_to(common.ROOT)), "--data_dir", options.data_dir]
        command += ["--output_dir", str(folder), "--device", device, "--num_gpus", str(options.num_gpus)]
        if run.start:
            command += ["--load_dir", str(options.output_dir / run.start.name)]
        for setting in settings:
            command += ["--set", setting]
        continued, started = (folder / "ckpts").exists(), time.monotonic()
        execute(command)
        wall = time.monotonic() - started
        found = {"command": shlex.join(command), **read_log(folder), "wall": wall}
        with atomic_write(result) as partial:
            partial.write_text(json.dumps({**found, **origin, "continued": continued}, indent=2) + "\n")
    else:
        wanted, had = load_config(str(path)), load_config(str(folder / "config.json"))
        for setting in settings:
            apply_override(wanted, setting)
        keys = differing_keys(complete_config(had), complete_config(wanted))
        finished = json.loads(result.read_text())
        keys += [f"--{key}" for key, value in origin.items() if finished.get(key, value) != value]
        if keys:
            raise ConfigError(
                f"{folder} is finished, but with another value of {', '.join(keys)}; choose another --output_dir"
            )
    return json.loads(result.read_text())


def settings_of(options: argparse.Namespace, run: Run, config: dict) -> list[str]:
    """Return what `--set` gives train.py for a phase with this configuration."""
    settings = [f"trainer.args.seed={run.seed}"] if run.seed else []
    if options.long and not config["trainer"]["args"].get("latent_cache"):  # which keeps one latent of each object
        settings.append("dataset.args.augmentation=all")
    for setting in options.set:
        section, _, rest = setting.partition(".")
        if section != "models" or rest.split(".")[0] in config["models"]:
            settings.append(setting)
    return settings


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


def score(options: argparse.Namespace, device: str, run: Run, grids: str) -> dict:
    """Return evaluate.py's scores of a run's averaged weights on the validation split of a set of grids.

    Scores of the same grids with the same table of kinds are taken from an earlier start.
    """
    folder = options.output_dir / ("eval" if grids == VAL else f"eval_{grids}") / run.name
    kinds = str(options.kinds) if options.kinds else None
    origin = {"data_dir": options.eval_dir[grids], "kinds": kinds}

    def found() -> dict | None:
        reports = (json.loads(path.read_text()) for path in folder.glob("val_*.json"))
        return next((report for report in reports if {"kinds": None, **report}.items() >= origin.items()), None)

    if found() is None:
        command = ["scripts/evaluate.py", "--run", str(options.output_dir / run.name)]
        command += ["--data_dir", options.eval_dir[grids], "--output_dir", str(folder), "--weights", "averaged"]
        command += ["--batch_size", str(options.eval_batch), "--device", device]
        if kinds:
            command += ["--kinds", kinds]
        execute(command)
    report = found()
    if report is None:
        raise ConfigError(f"{folder} has no report of {origin['data_dir']}; remove the folder and run this again")
    return next(iter(report["weights"].values()))


def gpu_minutes(phases: dict[Run, dict], run: Run | None) -> float:
    """Return what a run and all runs that it started from took."""
    if run is None:
        return 0.0
    return phases[run]["wall"] * phases[run].get("num_gpus", 1) / 60 + gpu_minutes(phases, run.start)


def phases_table(phases: dict[Run, dict]) -> Table:
    """Return what each phase took and reached. IoU is that of validation, by averaged weights."""
    rows = []
    for run, phase in phases.items():
        after = phase["after"]
        codebook = [after.get(f"codebook_{key}") for key in ("usage", "perplexity")]
        rows.append(
            [
                run.phase,
                run.seed,
                TRAINED[run.phase.split("_")[-1]],
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


def scores_table(minutes: dict[Run, float], scores: dict[Run, dict[str, dict]]) -> Table:
    """Return the scores on the validation split of --data_dir.

    GPU-minutes: of all phases from random weights. LM tokens: what a language model writes for the mean object.
    kbit: of an object's ids. kbit used: by the ids' entropy over all objects; for a VAE, the KL of a sample.
    """
    rows = []
    for run, sets in scores.items():
        found = sets[VAL]
        used = found.get("entropy_bits_per_object", found.get("kl_bits_per_object"))
        kbits = [bits if bits is None else bits / 1e3 for bits in (found.get("bits_per_object"), used)]
        rows.append(
            [
                run.phase,
                run.seed,
                minutes[run],
                found.get("lm_tokens"),
                *(found[key] for key in ("iou", "iou_median", "iou_p5", "f_score", "chamfer")),
                found.get("codebook_usage"),
                found.get("codebook_perplexity"),
                *kbits,
            ]
        )
    return Table(SCORE_COLUMNS, rows, "Scores")


def sets_table(scores: dict[Run, dict[str, dict]]) -> Table:
    """Return the IoU on each set of grids, and on each kind of objects in it where kinds are known."""
    rows = []
    for run, sets in scores.items():
        for grids, found in sets.items():
            parts = {grids: found, **{f"{grids}, {kind}": part for kind, part in found.get("kinds", {}).items()}}
            for name, part in parts.items():
                rows.append([run.phase, run.seed, name, part["objects"], part["iou"], part["iou_p5"]])
    return Table(SET_COLUMNS, rows, "Sets and kinds")


def spread(scores: dict[Run, dict[str, dict]]) -> list[str]:
    """Return a line on each phase that several seeds have finished."""
    lines = []
    for phase in dict.fromkeys(run.phase for run in scores):
        ious = {run.seed: sets[VAL]["iou"] for run, sets in scores.items() if run.phase == phase}
        if len(ious) > 1:
            seeds = ", ".join(map(str, ious))
            mean, deviation = statistics.mean(ious.values()), statistics.stdev(ious.values())
            lines.append(f"{phase}, seeds {seeds}: IoU {mean:.4f} on average, standard deviation {deviation:.4f}.")
    return lines


def sources_table(scores: dict[Run, dict[str, dict]]) -> Table:
    """Return the IoU by source in the validation split of --data_dir, for sources with enough objects."""
    found = {run: sets[VAL]["sources"] for run, sets in scores.items()}
    sources = {
        name: part["objects"]
        for name, part in next(iter(found.values())).items()
        if part["objects"] >= OBJECTS_OF_A_SOURCE
    }
    rows = [[name, objects, *(own[name]["iou"] for own in found.values())] for name, objects in sources.items()]
    columns = (Column("source", "key"), Column("objects"), *(Column(run.name, format=".4f") for run in found))
    return Table(columns, rows, "Sources")


def absolute(roots: str) -> str:
    """Return data roots, separated by commas, as absolute paths. Raise ConfigError for one that is not there."""
    for root in roots.split(","):
        if not Path(root).exists():
            raise ConfigError(f"{root} is not there; give data roots, separated by commas")
    return ",".join(str(Path(root).resolve()) for root in roots.split(","))


def parse_eval_dirs(assignments: list[str]) -> dict[str, str]:
    """Return {name: data roots}. Raise ConfigError for what is not NAME=ROOTS with a name of its own."""
    found: dict[str, str] = {}
    for assignment in assignments:
        name, _, roots = assignment.partition("=")
        if not (name.replace("_", "").isalnum() and roots) or name == VAL or name in found:
            raise ConfigError(
                f"--eval_dir {assignment}: write it as NAME=ROOTS, with a name of its own of letters, digits and _ "
                f"other than {VAL}"
            )
        found[name] = absolute(roots)
    return found


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    flags = common.parser(__doc__, data=False)
    flags.add_argument("--data_dir", required=True, help="data roots with a validation split, separated by commas")
    flags.add_argument("--output_dir", type=Path, required=True)
    flags.add_argument("--forms", nargs="+", choices=FORMS, default=["base"], help="forms of tokens (default: base)")
    flags.add_argument(
        "--phases", nargs="+", choices=PHASES, help="in place of --forms: these phases and all that they start from"
    )
    flags.add_argument("--seeds", nargs="+", type=int, default=[0], help="run everything with each (default: 0)")
    flags.add_argument("--num_gpus", type=int, default=1, help="GPUs of a training run (default: 1)")
    flags.add_argument("--long", action="store_true", help="the long budget: training in all 48 symmetries")
    flags.add_argument(
        "--eval_dir",
        action="append",
        default=[],
        metavar="NAME=ROOTS",
        help="other data roots whose validation split is scored apart; may be repeated",
    )
    flags.add_argument("--kinds", type=Path, help="CSV file with the kind of each source, for evaluate.py")
    flags.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH.TO.KEY=VALUE",
        help="passed on to train.py; a setting of a model only in phases that have the model",
    )
    flags.add_argument("--eval_batch", type=int, default=32)
    options = flags.parse_args(argv)
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        flags.error(f"--seeds {' '.join(map(str, options.seeds))}: give different numbers >= 0")
    if options.num_gpus < 1:
        flags.error(f"--num_gpus is {options.num_gpus}; it must be at least 1")
    options.phases = with_ancestors(options.phases or [f"{form}_stage2" for form in options.forms])
    options.output_dir, options.data_dir = options.output_dir.resolve(), absolute(options.data_dir)
    options.eval_dir = {VAL: options.data_dir, **parse_eval_dirs(options.eval_dir)}
    options.kinds = options.kinds and options.kinds.resolve()
    if options.kinds:
        read_kinds(str(options.kinds))
    return options


def check_data(options: argparse.Namespace) -> None:
    """Raise ConfigError or DataError for grids that the first phase could not read, or cannot be scored."""
    config = load_config(str(runs.config_path(PHASES[options.phases[0]].config)))
    for setting in settings_of(options, Run(options.phases[0], 0), config):
        apply_override(config, setting)
    dataset = complete_config(config)["dataset"]
    for roots in options.eval_dir.values():
        DATASETS.get(dataset["name"], "dataset.name")(roots, split="val", **dataset["args"])


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    device = pick_device(options.device)
    check_data(options)
    outputs = [path for path in (options.output_dir / "results.md", options.output) if path]
    reports = [Report("Quality", __file__, argv, device, path) for path in outputs]
    phases: dict[Run, dict] = {}
    scores: dict[Run, dict[str, dict]] = {}
    for seed in options.seeds:
        for phase in options.phases:
            run = Run(phase, seed)
            phases[run] = train(options, device.type, run)
            if PHASES[phase].scored:
                scores[run] = {grids: score(options, device.type, run, grids) for grids in options.eval_dir}
            parts = report_parts(options, phases, scores)
            for report in reports:
                text = report.write(*parts)
    print(text)


def report_parts(
    options: argparse.Namespace, phases: dict[Run, dict], scores: dict[Run, dict[str, dict]]
) -> list[str | Table]:
    """Return the paragraphs and tables of the report on what is finished so far."""
    names = ", ".join(Path(root).name for root in options.data_dir.split(","))
    minutes = {run: gpu_minutes(phases, run) for run in phases}
    symmetries = "all 48 symmetries" if options.long else "the symmetries of each configuration"
    parts: list[str | Table] = [
        f"Data: {names}. {options.num_gpus} GPU{'s' if options.num_gpus > 1 else ''} a run, {symmetries}.",
        phases_table(phases),
        "Seconds are of the command, start-up and validation included. IoU of the validation split, averaged weights, "
        "in the precision of training.",
    ]
    continued = [run.name for run, phase in phases.items() if phase.get("continued")]
    if continued:
        parts.append(f"Cut off and continued, so that seconds and GPU-minutes lack a part: {', '.join(continued)}.")
    if scores:
        parts += [scores_table(minutes, scores), *spread(scores), sets_table(scores)]
        sources = sources_table(scores)
        parts += [sources] if sources.rows else []
    return parts


if __name__ == "__main__":
    sys.exit(run_command(main, None))
