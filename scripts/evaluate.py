"""Score a run, or exported models: how well they bring grids back, and what their codebook does.

    python scripts/evaluate.py --run outputs/stage2
    python scripts/evaluate.py --pretrained pretrained/demo_vae --data_dir data/voxels --output_dir outputs/eval

Occupied is where the logit is above 0; everything runs in fp32. Averaged (EMA) and raw weights are scored.
Writes {run}/eval/{split}_step0000100.json and a contact sheet of the worst, median and best objects beside it.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trellis.datasets import DATASETS
from trellis.models import build, load_weights
from trellis.renderers.voxel_preview import contact_sheet, save_png
from trellis.trainers import TRAINERS
from trellis.trainers.checkpoint import Checkpoints, model_file
from trellis.utils.config import load_config
from trellis.utils.environment import versions
from trellis.utils.errors import CheckpointError, ConfigError, UserError
from trellis.utils.evaluation import Scores, codebook_scores, evaluate
from trellis.utils.files import written_aside

OBJECTS_PER_BLOCK = 3  # of the worst, the median and the best


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--pretrained", help="folder with exported encoder, decoder and, if any, quantizer")
    parser.add_argument("--ckpt", default="latest", help="latest, best or a step (default: latest)")
    parser.add_argument("--resolution", type=int, default=64, help="of the data, with --pretrained (default: 64)")
    parser.add_argument("--data_dir", help="data roots, separated by commas (default: those of the run)")
    parser.add_argument("--split", choices=("train", "val", "all"), default="val")
    parser.add_argument("--output_dir", help="default: {run}/eval")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--batch_size", type=int, default=8)
    args = parser.parse_args(argv)
    if args.ckpt not in ("latest", "best") and not args.ckpt.isdigit():
        parser.error(f"--ckpt is {args.ckpt!r}; it must be latest, best or a step")
    if args.batch_size < 1:
        parser.error(f"--batch_size is {args.batch_size}; it must be at least 1")
    if args.pretrained and not (args.data_dir and args.output_dir):
        parser.error("--pretrained needs --data_dir and --output_dir")
    return args


@dataclass
class Subject:
    """What is scored. config: as of train.py; sets: {label: {model: weights file}}, the one that a later
    stage would take first."""

    name: str
    step: int
    config: dict
    sets: dict[str, dict[str, Path]]
    data_dir: str | None = None
    training_seconds: float | None = None


def run_subject(run_dir: str, ckpt: str) -> Subject:
    """A step of a run. Raises CheckpointError where there is none."""
    checkpoints = Checkpoints(run_dir)
    step = checkpoints.resolve(ckpt)
    if step is None:
        raise CheckpointError(f"--run {run_dir}: {checkpoints.folder} has no complete checkpoint")
    misc = checkpoints.read_misc(step) or {"config": load_config(str(Path(run_dir) / "config.json"))}
    sets = weight_sets(checkpoints, list(misc["config"]["models"]), step)
    return Subject(run_dir, step, misc["config"], sets, misc.get("data_dir"), misc.get("seconds"))


def pretrained_subject(folder: str, resolution: int) -> Subject:
    """Exported models. Raises CheckpointError where encoder or decoder is missing."""
    names = [name for name in ("encoder", "quantizer", "decoder") if (Path(folder) / f"{name}.json").is_file()]
    for name in ("encoder", "decoder"):
        if name not in names:
            raise CheckpointError(f"--pretrained {folder}: {name}.json is not there; export_pretrained.py writes it")
    trainer = "SparseStructureVqVaeTrainer" if "quantizer" in names else "SparseStructureVaeTrainer"
    config = {
        "models": {name: load_config(f"{folder}/{name}.json") for name in names},
        "dataset": {"name": "SparseStructure", "args": {"resolution": resolution}},
        "trainer": {"name": trainer},
    }
    return Subject(folder, 0, config, {"pretrained": {name: Path(folder) / f"{name}.safetensors" for name in names}})


def weight_sets(checkpoints: Checkpoints, names: list[str], step: int) -> dict[str, dict[str, Path]]:
    """{label: {model: weights file}}: one set per EMA rate, then raw. A frozen model has raw weights only."""
    raw = {name: checkpoints.folder / model_file(name, step) for name in names}
    rates = {name: checkpoints.ema_rates(name, step) for name in names}
    sets = {}
    for rate in sorted(set().union(*rates.values()), reverse=True):
        averaged = {name: checkpoints.folder / model_file(name, step, rate) for name in names}
        sets[f"ema{rate}"] = {name: averaged[name] if rate in rates[name] else raw[name] for name in names}
    return {**sets, "raw": raw}


def summarize(scores: Scores, sources: list[str | None]) -> dict:
    """Mean of every metric, median and 5th percentile of the IoU, mean IoU per source, and the codebook."""
    iou = scores.objects["iou"]
    summary = {
        "objects": scores.number,
        **{name: value.mean().item() for name, value in scores.objects.items()},
        "iou_median": iou.quantile(0.5).item(),
        "iou_p5": iou.quantile(0.05).item(),
    }
    if scores.counts is not None:
        summary.update(codebook_scores(scores.counts, scores.tokens))
    known = sorted({source for source in sources if source})
    picks = {source: [i for i, other in enumerate(sources) if other == source] for source in known}
    summary["sources"] = {
        source: {"objects": len(rows), "iou": iou[rows].mean().item()} for source, rows in picks.items()
    }
    return summary


def format_table(results: dict[str, dict]) -> str:
    """One row per set of weights; a metric that a set does not have is a dash."""
    columns = {
        "objects": "objects", "IoU": "iou", "median": "iou_median", "5 %": "iou_p5", "precision": "precision",
        "recall": "recall", "exact": "exact", "usage": "codebook_usage", "perplexity": "codebook_perplexity",
        "bits": "bits_per_object", "entropy bits": "entropy_bits_per_object", "quant. error": "quantization_error",
    }  # fmt: skip

    def cell(value: float | int | None) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if isinstance(value, float) and value < 10 else f"{value:.0f}"

    rows = [["weights", *columns]]
    rows += [[label, *(cell(result.get(key)) for key in columns.values())] for label, result in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def pick_examples(iou: torch.Tensor) -> list[tuple[str, int]]:
    """(label, object) of the worst, the median and the best by IoU; of few objects, all of them in thirds."""
    order = iou.argsort().tolist()
    if len(order) > 3 * OBJECTS_PER_BLOCK:
        third, middle = OBJECTS_PER_BLOCK, len(order) // 2 - OBJECTS_PER_BLOCK // 2
        between = order[middle : middle + OBJECTS_PER_BLOCK]
    else:
        third = len(order) // 3
        between = order[third : len(order) - third]
    blocks = {"worst": order[:third], "median": between, "best": order[len(order) - third :]}
    return [(label, number) for label, objects in blocks.items() for number in objects]


def score_run(args: argparse.Namespace) -> tuple[dict, Path]:
    """Score the models and write the files. Returns what the JSON file holds, and its path."""
    if args.pretrained:
        subject = pretrained_subject(args.pretrained, args.resolution)
    else:
        subject = run_subject(args.run, args.ckpt)
    config, data_dir = subject.config, args.data_dir or subject.data_dir
    if data_dir is None:
        raise ConfigError(f"{subject.name} does not say which data it used; give --data_dir")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False

    dataset_class = DATASETS.get(config["dataset"]["name"], "dataset.name")
    dataset = dataset_class(data_dir, split=args.split, **config["dataset"].get("args", {}))
    reconstruct = TRAINERS.get(config["trainer"]["name"], "trainer.name").reconstruct
    models = {name: build(spec, f"models.{name}").to(device).eval() for name, spec in config["models"].items()}
    for model in models.values():
        if hasattr(model, "convert_to_fp32"):
            model.convert_to_fp32()

    results, examples = {}, None
    sources = [dataset.source(i) for i in range(len(dataset))]
    for label, files in subject.sets.items():
        for name, model in models.items():
            load_weights(model, files[name])
        with tqdm(total=len(dataset), desc=label, unit="object", disable=not sys.stderr.isatty()) as bar:
            scores = evaluate(
                lambda ss: reconstruct(models, ss),
                dataset,
                range(len(dataset)),
                batch_size=args.batch_size,
                device=device,
                progress=lambda done: bar.update(done - bar.n),  # noqa: B023 - called within this turn
            )
        results[label] = summarize(scores, sources)
        if examples is None:  # the first set is what a later stage and the export take
            results[label]["per_object"] = {
                dataset.sha256(i): {"name": dataset.name(i), **{k: v[i].item() for k, v in scores.objects.items()}}
                for i in range(len(dataset))
            }
            examples = []
            for kind, number in pick_examples(scores.objects["iou"]):
                ss = dataset[number]["ss"][None].to(device)
                with torch.no_grad():
                    logits = reconstruct(models, ss).logits
                iou = scores.objects["iou"][number].item()
                caption = f"{kind}: {Path(dataset.name(number)).name}, IoU {iou:.3f}"
                examples.append((ss[0, 0].bool().cpu().numpy(), (logits[0, 0] > 0).cpu().numpy(), caption))

    folder = Path(args.output_dir or Path(subject.name) / "eval")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.split}_step{subject.step:07d}.json"
    report = {
        "models": subject.name, "step": subject.step, "split": args.split, "data_dir": data_dir,
        "device": str(device), "training_seconds": subject.training_seconds, "versions": versions(),
        "weights": results,
    }  # fmt: skip
    with written_aside(path) as aside:
        aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    save_png(path.with_suffix(".png"), contact_sheet(examples))
    return report, path


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        report, path = score_run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{report['models']} at step {report['step']}, split {args.split}")
    print(format_table(report["weights"]))
    for source, part in next(iter(report["weights"].values()))["sources"].items():
        print(f"  {source}: IoU {part['iou']:.4f} over {part['objects']}")
    print(f"written: {path}, {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
