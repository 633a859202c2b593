"""Score a run, a tokenizer or exported models: how well they reconstruct grids, and how their codebook is used.

    python scripts/evaluate.py --run outputs/stage2
    python scripts/evaluate.py --pretrained pretrained/base --data_dir data/voxels --output_dir outputs/eval
    python scripts/evaluate.py --run outputs/stage2 --baselines --kinds kinds.csv

A voxel is occupied if its logit is above 0; everything runs in fp32. Averaged (EMA) and raw weights are scored; a VAE
without a codebook is scored from the mean of its posterior and from a sample. trellis/evaluation/metrics.py defines
Chamfer distance and F-score (`distance_metrics`) and narrow gaps, by which thin structure has scores of its own.
--baselines adds what takes no network (trellis/evaluation/baselines.py), fitted to the training grids: a table of
patterns with as many ids and tokens, a lossless code, and deflate. It takes a minute or more.
Scores by kind are those of objects whose data root has a column `kind`, such as "anatomy". --kinds adds kinds, or puts
others in their place, by a CSV table that says which kind of objects each source has:

    source,kind
    bones,anatomy
    chairs,objects

Writes {run}/eval/{split}_step0000100.json, with contact sheets beside it: the worst, median and best objects, and the
twenty worst (…_worst.png).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trellis.datasets import DATASETS
from trellis.datasets.base import StandardDatasetBase
from trellis.datasets.metadata import SETTINGS, common_setting, settings_of_data
from trellis.datasets.remote import absolute
from trellis.evaluation.baselines import Baselines, Lattice
from trellis.evaluation.evaluate import Reconstruction, evaluate
from trellis.evaluation.summary import ID_BITS, Labels, read_kinds, summarize, summarize_bits
from trellis.grids.preview import contact_sheet, save_png
from trellis.models import build, load_weights
from trellis.runs.open import open_run
from trellis.tokens.sources import CONFIG, MODELS, OPTIONAL_MODELS, WEIGHTS, check_folder
from trellis.trainers import TRAINERS
from trellis.trainers.vae.sparse_structure_vae import SparseStructureVaeTrainer
from trellis.utils.command import DEVICES, check_output_folder, pick_device, run_command
from trellis.utils.config import load_config
from trellis.utils.environment import versions
from trellis.utils.errors import CheckpointError, ConfigError
from trellis.utils.files import atomic_write
from trellis.utils.progress import waiting

OBJECTS_PER_BLOCK = 3  # objects on the contact sheet for each of worst, median and best
WORST = 20  # objects on the sheet of the worst
MOST_TRAINING_GRIDS = 10_000  # that baselines are fitted to; more take their time and change little
# Ids of the table of patterns beside models without a codebook.
IDS_WITHOUT_CODEBOOK = 8192

WRITTEN = "written for an object"
# {title: {column: key of the scores}}
TABLES = {
    "reconstruction": {
        "objects": "objects",
        "IoU": "iou",
        "median": "iou_median",
        "5 %": "iou_p5",
        "precision": "precision",
        "recall": "recall",
        "exact": "exact",
        "F-score": "f_score",
        "chamfer, voxels": "chamfer",
    },
    "codebook, over all objects and within one": {
        "tokens": "tokens",
        "usage": "codebook_usage",
        "perplexity": "codebook_perplexity",
        "usage/object": "object_usage",
        "perplexity/object": "object_perplexity",
        "entropy bits/object": "entropy_bits_per_object",
        "quant. error": "quantization_error",
    },
    WRITTEN: {
        "codes": "codes_per_object",
        "masks": "masks",
        "LM tokens": "lm_tokens",
        "bits": "bits_per_object",
        "entropy bits": "entropy_bits_per_object",
    },
    f"KL in bits; an id of ShapeLLM-Omni, for four cells, has {ID_BITS:.0f}": {
        "groups": "groups",
        "cell": "kl_bits_per_cell",
        "group": "kl_bits_per_group",
        "object": "kl_bits_per_object",
    },
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--pretrained", help="folder of save_pretrained, or of exported models")
    parser.add_argument("--ckpt", default="latest", help="latest, best or a step (default: latest)")
    parser.add_argument(
        "--resolution", type=int, help="voxels along an axis, with exported models that do not say it (default: 64)"
    )
    parser.add_argument("--data_dir", help="data roots, separated by commas (default: the run's)")
    parser.add_argument("--split", choices=("train", "val", "all"), default="val", help="default: val")
    parser.add_argument(
        "--weights",
        choices=("all", "averaged"),
        default="all",
        help="averaged: only the weights that a later stage would start from, in half the time",
    )
    parser.add_argument("--baselines", action="store_true", help="also score what takes no network")
    parser.add_argument("--kinds", metavar="FILE.csv", help="the kind of objects of each source, for scores by kind")
    parser.add_argument("--output_dir", help="default: {run}/eval")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--batch_size", type=int, default=8, help="default: 8")
    args = parser.parse_args(argv)
    if args.ckpt not in ("latest", "best") and not args.ckpt.isdigit():
        parser.error(f"--ckpt is {args.ckpt!r}; it must be latest, best or a step")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; it must be at least 1")
    if args.pretrained and not (args.data_dir and args.output_dir):
        parser.error("--pretrained needs --data_dir and --output_dir")
    if args.pretrained and args.ckpt != "latest":
        parser.error("--ckpt goes with --run: exported models and tokenizers are of one step")
    if args.run and args.resolution is not None:
        parser.error("--resolution goes with --pretrained: a run knows its own")
    return args


@dataclass
class Subject:
    """The models to score."""

    name: str  # the folder, as it was given
    step: int
    config: dict  # of train.py
    # {label: {model: weights file}}; first the set that a later stage starts from. A tokenizer's models share a file.
    sets: dict[str, dict[str, Path]]
    data_dir: str | None = None
    training_seconds: float | None = None


def run_subject(run_dir: str, ckpt: str) -> Subject:
    """Return a checkpoint of a run. Raise CheckpointError if there is none."""
    exported = (Path(run_dir) / WEIGHTS).is_file() or (Path(run_dir) / f"{MODELS[0]}.json").is_file()
    if exported and not (Path(run_dir) / "ckpts").is_dir():
        raise CheckpointError(f"--run {run_dir}: is no run folder, but has models: give it as --pretrained")
    run = open_run(run_dir, ckpt, "--run")
    return Subject(run_dir, run.step, run.config, run.weight_sets(), run.data_dir, run.training_seconds)


def pretrained_subject(folder: str, resolution: int) -> Subject:
    """Return a tokenizer that save_pretrained wrote, or exported models.

    resolution: of exported models.
    Raise CheckpointError if encoder or decoder is missing.
    """
    if not Path(folder).is_dir():
        what = "is a file" if Path(folder).exists() else "there is no such folder"
        raise CheckpointError(
            f"--pretrained {folder}: {what}. Give a folder of save_pretrained or export_pretrained.py"
        )
    if (Path(folder) / "ckpts").is_dir():
        raise CheckpointError(f"--pretrained {folder}: is a run folder: give it as --run")
    weights = Path(folder) / WEIGHTS
    if weights.is_file():
        check_folder(Path(folder))
        about = load_config(f"{folder}/{CONFIG}")
        models, resolution = about["models"], about.get("resolution", resolution)
        return Subject(folder, 0, config_of(models, resolution), {"pretrained": dict.fromkeys(models, weights)})
    names = [name for name in (*MODELS, *OPTIONAL_MODELS) if (Path(folder) / f"{name}.json").is_file()]
    if not names:
        raise CheckpointError(
            f"--pretrained {folder}: has neither {WEIGHTS} of save_pretrained nor {MODELS[0]}.json of "
            "export_pretrained.py. Give a folder that has one of them"
        )
    for name in ("encoder", "decoder"):
        if name not in names:
            raise CheckpointError(f"--pretrained {folder}: {name}.json is not there; export_pretrained.py writes it")
    config = config_of({name: load_config(f"{folder}/{name}.json") for name in names}, resolution)
    return Subject(folder, 0, config, {"pretrained": {name: Path(folder) / f"{name}.safetensors" for name in names}})


def config_of(models: dict[str, dict], resolution: int) -> dict:
    """Return what a configuration of train.py says of these models, as far as scores depend on it."""
    return {
        "models": models,
        "dataset": {"name": "SparseStructure", "args": {"resolution": resolution}},
        "trainer": {"name": "SparseStructureVqVaeTrainer" if "quantizer" in models else "SparseStructureVaeTrainer"},
    }


def format_report(results: dict[str, dict], baselines: dict[str, dict]) -> str:
    """Return a table per subject with a row for each set of weights, and tables of the sources, the kinds and the
    classes of narrow gaps for the first set. Below the sets of weights are the baselines.

    "sampled" rows: from a sample of the posterior. "occupied" and "empty" rows: over the tokens, or groups of latent
    cells, with and without occupied voxels.
    """
    whole, rows = {**results, **baselines}, {}
    for label, result in results.items():
        rows[label] = result
        sampled = {key.removeprefix("sampled_"): value for key, value in result.items() if key.startswith("sampled_")}
        rows[f"{label}, sampled"] = sampled
        for kind in ("occupied", "empty"):
            suffix = f"_{kind}"
            part = {key.removesuffix(suffix): value for key, value in result.items() if key.endswith(suffix)}
            rows[f"{label}, {kind}"] = part
    rows |= baselines
    tables = [format_table(title, columns, whole if title == WRITTEN else rows) for title, columns in TABLES.items()]
    label, first = next(iter(results.items()))
    columns = {name: TABLES["reconstruction"][name] for name in ("objects", "IoU", "5 %", "F-score", "chamfer, voxels")}
    if "sampled_iou" in first:
        columns |= {"sampled IoU": "sampled_iou"}
    if "masks" in first:
        columns |= {"tokens": "tokens", "masks": "masks"}
    for key, title in (("sources", "sources"), ("kinds", "kinds"), ("narrow", "narrow gaps per occupied voxel")):
        tables.append(format_table(f"{title}, {label}", columns, first[key]))
    return "\n\n".join(table for table in tables if table)


def format_table(title: str, columns: dict[str, str], rows: dict[str, dict]) -> str:
    """Return a table, without rows that have none of the keys but "objects"; "" if no row is left.

    columns: {heading: key}.
    rows: {label: {key: number}}.
    """

    def cell(value: float | int | None) -> str:
        if value is None:
            return "-"
        if isinstance(value, int):
            return str(value)
        return f"{value:.4f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"

    lines = [["", *columns]]
    for label, row in rows.items():
        if any(row.get(key) is not None for key in columns.values() if key != "objects"):
            lines.append([label, *(cell(row.get(key)) for key in columns.values())])
    if len(lines) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([f"{title}:", *text])


def pick_examples(iou: torch.Tensor) -> list[tuple[str, int]]:
    """Return (label, object) of the worst, median and best objects by IoU; of few objects, all of them, in thirds."""
    order = iou.argsort().tolist()
    if len(order) > 3 * OBJECTS_PER_BLOCK:
        third, middle = OBJECTS_PER_BLOCK, len(order) // 2 - OBJECTS_PER_BLOCK // 2
        between = order[middle : middle + OBJECTS_PER_BLOCK]
    else:
        third = len(order) // 3
        between = order[third : len(order) - third]
    blocks = {"worst": order[:third], "median": between, "best": order[len(order) - third :]}
    return [(label, number) for label, objects in blocks.items() for number in objects]


def tables_of_patterns(models: dict, resolution: int) -> list[tuple[Lattice, int]]:
    """Return (lattice, ids) of the tables to compare models with: that of their tokens, or of their latent cells.

    Beside several codes per token stands another table, with half as many voxels along each axis in a block.
    """
    cells = resolution // models["encoder"].downsampling
    if "quantizer" not in models:
        return [((cells, cells, cells), IDS_WITHOUT_CODEBOOK)]
    quantizer = models["quantizer"]
    lattice = quantizer.lattice((cells, cells, cells))
    tables = [(lattice, quantizer.n_embed)]
    X, Y, Z = (2 * tokens for tokens in lattice)
    if quantizer.codes_per_token > 1 and not any(resolution % tokens for tokens in (X, Y, Z)):
        tables.append(((X, Y, Z), quantizer.n_embed))
    return tables


def same_roots(one: str, other: str | None) -> bool:
    """Return whether two lists of data roots, separated by commas, name the same ones in the same order."""
    return other is not None and [*map(absolute, one.split(","))] == [*map(absolute, other.split(","))]


def training_data(subject: Subject, dataset: StandardDatasetBase) -> StandardDatasetBase:
    """Return the training grids of a run, or of exported models those in `dataset`'s roots.

    Raise DataError if there are none.
    """
    if subject.data_dir is None or same_roots(subject.data_dir, ",".join(dataset.roots)):
        return dataset.for_split("train")
    config = subject.config["dataset"]
    return DATASETS.get(config["name"], "dataset.name")(subject.data_dir, split="train", **config.get("args", {}))


def score_baselines(
    training: StandardDatasetBase, dataset: StandardDatasetBase, tables: list, sources: Labels, kinds: Labels
) -> dict[str, dict]:
    """Return {baseline: its scores}; see `summary`. tables: as `tables_of_patterns` returns them."""
    number = min(len(training), MOST_TRAINING_GRIDS)
    chosen = np.linspace(0, len(training) - 1, number).round().astype(int).tolist()
    with waiting("fitting baselines", number) as progress:
        fitted = Baselines.fit(training, chosen, tables, progress)
    with waiting("scoring baselines"):
        scores = fitted.scores(dataset, range(len(dataset)))
        result = {name: summarize(each, sources, kinds) for name, each in scores.items()}
        for name, bits in fitted.bits(dataset, range(len(dataset))).items():
            result[name] = summarize_bits(bits, sources, kinds)
    return {name: {"training_grids": fitted.training_grids, **scores} for name, scores in result.items()}


def notes_on_data(subject: Subject, dataset: StandardDatasetBase) -> list[str]:
    """Return a note if the grids to score were made in another way than those that a run was trained on."""
    trained = [root for root in (subject.data_dir or "").split(",") if root]
    notes = []
    for name in SETTINGS:
        before = set(filter(None, settings_of_data(trained, name)))
        now = {value for values in dataset.settings.values() for value in values[name] if value}
        if before and now and common_setting(before | now) is None:
            notes.append(
                f"{name} of these grids is {' and '.join(sorted(now))}, but the models were trained on grids of "
                f"{' and '.join(sorted(before))}"
            )
    return notes


Sheet = list[tuple[np.ndarray, np.ndarray, str]]  # rows of a contact sheet: a grid, what is made of it, and a title


def score_run(args: argparse.Namespace) -> tuple[dict, Path, list[Sheet]]:
    """Score the models. Return the content of the JSON file, its path, and the contact sheets beside it."""
    if args.pretrained:
        subject = pretrained_subject(args.pretrained, args.resolution or 64)
    else:
        subject = run_subject(args.run, args.ckpt)
    config, data_dir = subject.config, args.data_dir or subject.data_dir
    if data_dir is None:
        raise ConfigError(f"{subject.name} does not say which data it used; give --data_dir")
    kind_of = read_kinds(args.kinds) if args.kinds else {}
    folder = check_output_folder(args.output_dir or Path(subject.name) / "eval")
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False

    dataset_class = DATASETS.get(config["dataset"]["name"], "dataset.name")
    own = config["dataset"].get("args", {})
    if not same_roots(data_dir, subject.data_dir):
        own = {**own, "weights": None}  # those of the roots that were trained on say nothing about others
    dataset = dataset_class(data_dir, split=args.split, **own)
    differing = notes_on_data(subject, dataset) if args.data_dir else []
    for note in (*dataset.notes, *differing):
        print(f"note: {note}")
    sources = dataset.texts("source")
    own_kinds = dataset.texts("kind")
    kinds = [kind_of.get(source or "") or own for source, own in zip(sources, own_kinds, strict=True)]
    if args.kinds and None in kinds:
        unknown = sorted({source or "(no source)" for source, kind in zip(sources, kinds, strict=True) if kind is None})
        print(
            f"note: {args.kinds} has no kind for {kinds.count(None)} of {len(kinds)} objects, from {len(unknown)} "
            f"sources such as {unknown[0]}"
        )
    training = training_data(subject, dataset) if args.baselines else None
    if training is not None and args.split != "val":
        print("note: the baselines are fitted to training grids, and some or all of the grids scored here are such")
    trainer_class: type[SparseStructureVaeTrainer] = TRAINERS.get(config["trainer"]["name"], "trainer.name")
    reconstruct = trainer_class.reconstruct
    models = {name: build(spec, f"models.{name}").to(device).eval() for name, spec in config["models"].items()}
    for model in models.values():
        model.convert_to_fp32()
    try:
        trainer_class.check_networks(models, dataset.resolution)
    except ConfigError as error:
        raise ConfigError(
            f"{subject.name} does not fit grids of resolution {dataset.resolution}. Give the --resolution that "
            f"exported models were trained with, or see: {error}"
        ) from error

    results: dict[str, dict] = {}
    sheets: list[Sheet] = []
    # Seeds the sample of each object, independent of the other objects.
    sample_ids = torch.from_numpy((dataset.keys() >> np.uint64(4)).astype(np.int64))

    def reconstruct_all(ss: torch.Tensor, numbers: Sequence[int]) -> Reconstruction:
        return reconstruct(models, ss, sample_ids[list(numbers)])

    @torch.no_grad()
    def draw(kind: str, number: int, iou: torch.Tensor) -> tuple[np.ndarray, np.ndarray, str]:
        """Return an object's row of a contact sheet. It is reconstructed again, so that not all of them are kept."""
        ss = dataset[number]["ss"]
        made = reconstruct_all(ss[None].to(device), [number]).logits[0, 0] > 0
        name = Path(dataset.name(number)).name
        return ss[0].bool().numpy(), made.cpu().numpy(), f"{kind}: {name}, IoU {iou[number].item():.3f}"

    sets = list(subject.sets.items())
    print(f"scoring {len(dataset)} objects", flush=True)
    for label, files in sets if args.weights == "all" else sets[:1]:
        for name, model in models.items():
            load_weights(model, files[name], part=name if files[name].name == WEIGHTS else None)
        with waiting(label, len(dataset)) as progress:
            scores = evaluate(
                reconstruct_all,
                dataset,
                range(len(dataset)),
                batch_size=args.batch_size,
                device=device,
                detailed=True,
                progress=progress,
            )
        results[label] = summarize(scores, sources, kinds)
        if not sheets:  # a later stage and the export take the first set
            results[label]["per_object"] = {
                sha256: {"name": name, **{k: v[i].item() for k, v in scores.objects.items()}}
                for i, (sha256, name) in enumerate(zip(dataset.texts("sha256"), dataset.texts("name"), strict=True))
            }
            iou = scores.objects["iou"]
            worst = [("worst", number) for number in iou.argsort()[:WORST].tolist()]
            for chosen in (pick_examples(iou), worst):
                sheets.append([draw(kind, number, iou) for kind, number in chosen])
    baselines = {}
    if training is not None:
        tables = tables_of_patterns(models, dataset[0]["ss"].shape[-1])
        baselines = score_baselines(training, dataset, tables, sources, kinds)

    path = folder / f"{args.split}_step{subject.step:07d}.json"
    report = {
        "models": subject.name, "step": subject.step, "split": args.split, "data_dir": data_dir, "kinds": args.kinds,
        "device": str(device), "training_seconds": subject.training_seconds, "versions": versions(),
        "weights": results, **({"baselines": baselines} if baselines else {}),
    }  # fmt: skip
    return report, path, sheets


def worst_sheet(path: Path) -> Path:
    """Return the picture of the worst objects beside a report."""
    return path.with_name(f"{path.stem}_worst.png")


def print_scores(args: argparse.Namespace) -> None:
    report, path, sheets = score_run(args)
    step = f" at step {report['step']}" if args.run else ""
    print(f"{report['models']}{step}, split {args.split}")
    print(format_report(report["weights"], report.get("baselines", {})))
    print(end="", flush=True)  # scores took their time: they are told before the disk may turn out to be full
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for file, sheet in zip((path.with_suffix(".png"), worst_sheet(path)), sheets, strict=True):
        save_png(file, contact_sheet(sheet))
    print(f"written: {path}, {path.with_suffix('.png')}, {worst_sheet(path)}")


def main(argv: list[str] | None = None) -> int:
    return run_command(print_scores, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
