"""The whole pipeline: a ready tokenizer and a real mesh first, then meshes, voxels, VAE, stage 1, stage 2, scores and
pictures.

    bash scripts/demo.sh [--meshes DIR [--up_axis auto|y|z|keep]] [--output_dir DIR] [--device auto|cpu|cuda]
                         [--from_scratch]

Each step is a command of this repository, printed before it runs. A rerun skips finished steps and resumes an
interrupted one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import json
import shlex
import signal
import subprocess
import time

from dataset_toolkits import records
from trellis.grids.placing import UP_AXES
from trellis.utils.command import DEVICES, pick_device, run_command
from trellis.utils.errors import ConfigError, DataError
from trellis.utils.signals import Stopped

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "pretrained" / "base"  # the tokenizer
PRETRAINED = ROOT / "pretrained" / "demo_vae"  # the VAE that training starts from
MESH = ROOT / "docs" / "teapot.glb"
CONFIGS = ROOT / "configs" / "vae"
# One in HELD_OUT of the user's meshes is held out for scoring.
HELD_OUT = 8
STAGES = {"vae": "VAE", "stage1": "stage 1", "stage2": "stage 2"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", help="folder of meshes (default: the built-in shapes)")
    parser.add_argument(
        "--up_axis",
        choices=UP_AXES,
        help="with --meshes, how their axes are taken, as voxelize.py's flag (default: auto)",
    )
    parser.add_argument("--output_dir", default=str(ROOT / "outputs" / "demo"), help="default: outputs/demo")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument(
        "--from_scratch", action="store_true", help="train the VAE here instead of starting from pretrained/demo_vae"
    )
    args = parser.parse_args(argv)
    if args.up_axis and not args.meshes:
        parser.error("--up_axis goes with --meshes: the built-in shapes are z-up")
    if args.meshes:
        args.up_axis = args.up_axis or "auto"
    return args


def run(*command: object) -> None:
    """Run a script of this repository with this Python. Raise CalledProcessError if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    started = time.monotonic()
    with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
        try:
            code = process.wait()
        except Stopped as stopped:  # the step saves before it ends
            if stopped.signum != signal.SIGINT:  # Ctrl-C reaches it by itself
                process.send_signal(stopped.signum)
            process.wait()
            raise
    if code:
        raise subprocess.CalledProcessError(code, words)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def remember_options(args: argparse.Namespace, folder: Path) -> None:
    """Record the options. Raise ConfigError if the folder was made with other options."""
    if args.meshes and not Path(args.meshes).is_dir():
        raise ConfigError(f"--meshes {args.meshes} is not a folder")
    options = {
        "meshes": args.meshes and str(Path(args.meshes).resolve()),
        "up_axis": args.up_axis,
        "from_scratch": args.from_scratch,
    }
    path = folder / "demo.json"
    before = json.loads(path.read_text()) if path.exists() else options
    # Folders of before there was a choice do not say it.
    before.setdefault("up_axis", "keep" if before["meshes"] else None)
    if before != options:
        flags = [f"--meshes {before['meshes']} --up_axis {before['up_axis']}"] * bool(before["meshes"])
        flags += ["--from_scratch"] * before["from_scratch"]
        made_with = " ".join(flags) or "neither --meshes nor --from_scratch"
        raise ConfigError(f"{folder} was made with {made_with}; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options) + "\n")


def make_data(args: argparse.Namespace, folder: Path) -> Path:
    """Voxelize the meshes, or the built-in shapes. Return the data root."""
    voxels = folder / "voxels"
    if args.meshes is None:
        run("dataset_toolkits/shapes/make_shapes.py", "--output_dir", folder / "shapes")
        for split in ("train", "val"):
            run(
                "dataset_toolkits/voxelize.py",
                "--input",
                folder / "shapes" / split,
                "--output_dir",
                voxels,
                "--up_axis",
                "z",
                "--split",
                split,
            )
    else:
        meshes = Path(args.meshes).resolve()
        flags = ["--input", meshes, "--output_dir", voxels, "--up_axis", args.up_axis]
        run("dataset_toolkits/voxelize.py", *flags)
        hold_out(voxels)
    return voxels


def hold_out(voxels: Path) -> None:
    """Assign a split to every mesh without one, in the order of their hashes."""
    fields, rows = records.read_rows(voxels)
    done = [row for row in rows.values() if records.is_voxelized(row)]
    if len(done) < 2:
        raise DataError(f"{voxels} has {len(done)} voxelized mesh; give at least 2, one to train on and one to score")
    for number, row in enumerate(sorted(done, key=lambda row: row["sha256"])):
        row["split"] = row.get("split") or ("train" if number % HELD_OUT else "val")
    records.write_table(voxels / "metadata.csv", [*fields, *({"split"} - set(fields))], rows.values())


def train(args: argparse.Namespace, folder: Path, voxels: Path, stage: str, load_dir: Path | None) -> None:
    run(
        "train.py",
        "--config",
        CONFIGS / f"demo_{stage}.json",
        "--data_dir",
        voxels,
        "--output_dir",
        folder / stage,
        "--device",
        args.device,
        "--num_gpus",
        1,
        *(("--load_dir", load_dir) if load_dir else ()),
    )


def score(args: argparse.Namespace, folder: Path, voxels: Path, stage: str) -> dict:
    """Return the scores on the held-out objects, and the seconds of training.

    stage: a run in the folder, of which the averaged weights are scored; or "base", the ready tokenizer.
    """
    output = folder / "eval" / stage
    ready = {"base": BASE} | ({} if args.from_scratch else {"vae": PRETRAINED})
    source = ("--pretrained", ready[stage]) if stage in ready else ("--run", folder / stage)
    held_out = {row["sha256"] for row in records.read_rows(voxels)[1].values() if row.get("split") == "val"}
    reports = [json.loads(path.read_text()) for path in output.glob("val*.json")]
    scored = [set(next(iter(report["weights"].values()))["per_object"]) for report in reports]
    if held_out not in scored:
        run("scripts/evaluate.py", *source, "--data_dir", voxels, "--output_dir", output, "--device", args.device)
    path = max(output.glob("val*.json"))
    report = json.loads(path.read_text())
    seconds = report["training_seconds"]
    if seconds is None:
        logs = [path.read_text().splitlines() for path in ready[stage].glob("log_*.txt")]
        seconds = sum(json.loads(lines[-1])["seconds"] for lines in logs)
    return {**next(iter(report["weights"].values())), "seconds": seconds, "sheet": path.with_suffix(".png")}


def round_trip(args: argparse.Namespace, folder: Path) -> dict:
    """Turn a real mesh into tokens and back with the ready tokenizer. Return its scores.

    Write the tokens as text, the mesh that was made of them, and a picture.
    """
    from trellis import SparseStructureTokenizer
    from trellis.evaluation.metrics import voxel_metrics
    from trellis.grids.preview import contact_sheet, save_png

    output = folder / "eval" / "base"
    text, back, sheet = (output / f"{MESH.stem}{end}" for end in ("_tokens.txt", "_back.glb", ".png"))
    print(f"\n# {MESH.relative_to(ROOT)}, tokens and back", flush=True)
    tokenizer = SparseStructureTokenizer.load(BASE).to(pick_device(args.device))
    grid = tokenizer.grid_of_file(MESH)
    started = time.monotonic()
    ids = tokenizer.encode(grid[0])
    encoded = time.monotonic()
    made = tokenizer.decode(ids).cpu() > 0
    decoded = time.monotonic()
    text.write_text(tokenizer.to_text(ids[0]) + "\n", encoding="utf-8")
    tokenizer.save_mesh(ids, back)

    scores = {name: value.item() for name, value in voxel_metrics(made, grid[None]).items()}
    scores["lm_tokens"] = len(tokenizer.token_format().to_vocabulary(ids[0])) - 2  # without start and end
    save_png(sheet, contact_sheet([(grid[0].numpy(), made[0, 0].numpy(), f"{MESH.name}, IoU {scores['iou']:.3f}")]))
    print(f"encoded in {encoded - started:.1f} s, decoded in {decoded - encoded:.1f} s; written:", *(text, back, sheet))
    return scores | {"sheet": sheet}


def table(rows: dict[str, dict]) -> str:
    columns = {
        "IoU": ("iou", ".4f"), "median": ("iou_median", ".4f"), "precision": ("precision", ".4f"),
        "recall": ("recall", ".4f"), "exact": ("exact", ".4f"),
        "LM tokens": ("lm_tokens", ".0f"), "bits/object": ("bits_per_object", ".0f"),
        "usage": ("codebook_usage", ".3f"), "perplexity": ("codebook_perplexity", ".0f"), "train s": ("seconds", ".0f"),
    }  # fmt: skip
    lines = [["", *columns]]
    for name, row in rows.items():
        lines.append([name, *(format(row[key], form) if key in row else "-" for key, form in columns.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def demo(args: argparse.Namespace) -> int:
    """Run all steps. Return the exit code of the step that failed, or 0."""
    try:
        run_steps(args)
    except subprocess.CalledProcessError as error:
        print(
            f"error: the step above ended with exit code {error.returncode}; run the same command again to go on",
            file=sys.stderr,
        )
        return error.returncode if error.returncode > 0 else 1
    return 0


def run_steps(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir).resolve()
    remember_options(args, folder)
    voxels = make_data(args, folder)
    rows = {"base": score(args, folder, voxels, "base"), MESH.stem: round_trip(args, folder)}
    print(
        f"\nA ready tokenizer: {rows['base']['objects']} held-out objects, and a real mesh.\n\n{table(rows)}",
        flush=True,
    )

    if args.from_scratch:
        train(args, folder, voxels, "vae", None)
    train(args, folder, voxels, "stage1", folder / "vae" if args.from_scratch else None)
    train(args, folder, voxels, "stage2", folder / "stage1")
    rows |= {name: score(args, folder, voxels, stage) for stage, name in STAGES.items()}

    print(f"\nHeld-out objects: {rows['base']['objects']}\n\n{table(rows)}")
    print("(base was trained beforehand, on a GPU and other, real objects; see pretrained/base)")
    if not args.from_scratch:
        print("(the VAE was trained beforehand, on a GPU and then a CPU; see pretrained/demo_vae)")
    print("\nPictures, input | reconstruction | difference:")
    for row in rows.values():
        print(f"  {row['sheet']}")
    tensorboard = Path(sys.executable).with_name("tensorboard")
    print(f"Curves: {shlex.join([str(tensorboard), '--logdir', str(folder)])}")


def main(argv: list[str] | None = None) -> int:
    return run_command(demo, parse_args(argv), interrupted="interrupted: run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
