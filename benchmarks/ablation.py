"""What each choice is worth: quantizers, losses, learning rates, augmentation, at equal budget on a narrow network.

    python benchmarks/ablation.py --data_dir DATA --output_dir outputs/ablation

Each variant is train.py on a configuration of the recipe (see quality.py), with the demo's network in place of the
full one and the settings below, for the same number of samples. VAEs of different losses start from random weights;
those of different KL weights from the demo's VAE; codebooks from one of the latter, by k-means and joint training. The
score is the validation's, of averaged weights. Finished variants are not run again; --parallel runs several at a time,
which a GPU has room for.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.datasets.packed import load_packed
from trellis.utils.command import pick_device, run_command

NETWORK = {
    "models.encoder.args.channels": [8, 32, 64],
    "models.decoder.args.channels": [64, 32, 8],
    **{
        f"models.{name}.args.{key}": 1
        for name in ("encoder", "decoder")
        for key in ("num_res_blocks", "num_res_blocks_middle")
    },
}
BATCH = 16
WARM_UP = 25
COLUMNS = (
    Column("variant", "key"),
    Column("IoU before", format=".4f"),
    Column("IoU after", format=".4f"),
    Column("usage"),
    Column("perplexity"),
    Column("kbit used"),
    Column("seconds"),
)
POOLED_VAL = 160  # so that scoring takes no longer than training
# Of AdamW, which every variant has unless its name says otherwise. Narrow layers bear larger steps than the full
# network's.
LR = 2e-3


@dataclass(frozen=True)
class Variant:
    """config: of the recipe. settings: what differs from it. start: the VAE whose weights it continues."""

    config: str
    settings: dict
    start: str | None = None


def args(**values) -> dict:
    """Settings of the trainer."""
    return {f"trainer.args.{key}": value for key, value in values.items()}


def quantizer(name: str, **values) -> dict:
    return {"models.quantizer.name": name, **{f"models.quantizer.args.{key}": value for key, value in values.items()}}


def adamw(lr: float) -> dict:
    return {"name": "AdamW", "args": {"lr": lr, "weight_decay": 0.0}}


DEMO_VAE = args(
    finetune_ckpt={name: str(common.ROOT / "pretrained" / "demo_vae" / name) for name in ("encoder", "decoder")}
)
BASE_VAE = "lambda_kl 4e-3"
VAES = {
    **{
        f"from random weights: {loss}": args(loss_type=loss)
        for loss in ("bce_dice", "bce", "dice", "focal", "bce_iou", "l1_l2")
    },
    "from random weights: all 48 symmetries": {"dataset.args.augmentation": "all"},
    **{
        f"lambda_kl {weight}": DEMO_VAE | args(lambda_kl=float(weight))
        for weight in ("1e-3", "4e-3", "1.6e-2", "6.4e-2")
    },
}
COMMIT = 2.5  # the recipe's weight of the commitment loss
VECTOR = quantizer("VectorQuantizer")
CODEBOOKS = {
    "EMAVectorQuantizer": {},
    "lambda_commit 0.25": args(lambda_commit=0.25),
    "lambda_commit 10": args(lambda_commit=10.0),
    "VectorQuantizer": VECTOR | args(lambda_vq=4 * COMMIT),
    "VectorQuantizer, lambda_vq 1, lambda_commit 0.25": VECTOR | args(lambda_vq=1.0, lambda_commit=0.25),
    "SimVQ": quantizer("SimVQ") | args(lambda_vq=4 * COMMIT),
    "RotationVectorQuantizer": quantizer("RotationVectorQuantizer") | args(lambda_vq=4 * COMMIT),
    "FiniteScalarQuantizer": quantizer("FiniteScalarQuantizer") | args(lambda_commit=0.0),
    "LookupFreeQuantizer": quantizer("LookupFreeQuantizer"),
    "IndexBackpropagationQuantizer": quantizer("IndexBackpropagationQuantizer") | args(lambda_vq=4 * COMMIT),
    "two codes a token: residual": quantizer("ResidualVectorQuantizer", num_codes=2) | args(lambda_vq=4 * COMMIT),
    "two codes a token: product": quantizer("ProductVectorQuantizer", num_codes=2) | args(lambda_vq=4 * COMMIT),
    "groups of 2x2x1 cells": {"models.quantizer.args.group": [2, 2, 1]},
    "no revival": args(revive_every=0),
    "decay 0.9": {"models.quantizer.args.decay": 0.9},
    "l1_l2": args(loss_type="l1_l2"),
    "dice": args(loss_type="dice"),
    "bce_dice": args(loss_type="bce_dice"),
    "the 8 symmetries about z": {"dataset.args.augmentation": "z"},
    "all 48 symmetries": {"dataset.args.augmentation": "all"},
    **{
        f"ConvMuon, lr {lr}": args(optimizer=adamw(float(lr)) | {"name": "ConvMuon"}) for lr in ("1e-3", "2e-3", "4e-3")
    },
    "lr 5e-4": args(optimizer=adamw(5e-4)),
    "lr 5e-3": args(optimizer=adamw(5e-3)),
    "lr 5e-3, warm-up over half": args(optimizer=adamw(5e-3)),
    "lr 5e-3 relative to RMS": args(optimizer=adamw(5e-3), lr_scaling="rms"),
    "lr 5e-3, decoder's a fifth": args(optimizer=adamw(5e-3), lr_multipliers={"decoder": 0.2}),
}
LEVELS = {8192: [8, 8, 8, 4, 4], 1024: [8, 8, 4, 4]}  # of finite scalars, by the number of codes


def variants(tokens: int) -> dict[str, Variant]:
    """All of them by name; those of a codebook begin with the number of tokens."""
    config = f"recipe_{tokens}_stage2"
    found = {name: Variant("recipe_vae", settings) for name, settings in VAES.items()}
    for name, settings in CODEBOOKS.items():
        found[f"{tokens}: {name}"] = Variant(config, settings, BASE_VAE)
    for start in VAES:
        if start.startswith("lambda_kl") and start != BASE_VAE:
            found[f"{tokens}: after {start}"] = Variant(config, {}, start)
    return found


def schedule(steps: int, warm_up: int) -> dict:
    return {"name": "CosineAnnealingLR", "args": {"T_max": steps - warm_up}, "warmup_steps": warm_up}


def pooled(data_dir: Path, resolution: int, folder: Path) -> Path:
    """Packed grids of `data_dir` at a lower resolution, a cell on where any of it was, each once, as files of the same
    names in `folder`; of a validation file the first POOLED_VAL. What is in two files stays in the validation's."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = set()
    for path in sorted(data_dir.glob("*.npz"), key=lambda path: not path.stem.endswith("val")):
        bits = load_packed(path)["bits"]
        if path.stem.endswith("val"):
            bits = bits[:POOLED_VAL]
        before = round((bits.shape[1] * 8) ** (1 / 3))
        rows = []
        for row in bits:
            blocks = np.unpackbits(row).reshape(
                resolution, before // resolution, resolution, before // resolution, -1, before // resolution
            )
            row = np.packbits(blocks.max((1, 3, 5)))
            if row.tobytes() not in seen:
                seen.add(row.tobytes())
                rows.append(row)
        np.savez(folder / path.name, bits=np.stack(rows))
    return folder


def folder_of(root: Path, name: str) -> Path:
    return root / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def run(options: argparse.Namespace, device: torch.device, name: str, variant: Variant) -> dict:
    """Train a variant and return the first and the last validation, the steps and seconds, or what is kept of them."""
    folder = folder_of(options.output_dir, name)
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    warm_up = options.steps // 2 if "warm-up over half" in name else WARM_UP
    settings = NETWORK | args(
        max_steps=options.steps,
        batch_size=BATCH,
        ema_rate=0.99,
        i_log=20,
        i_print=options.steps,
        i_eval=options.steps,
        i_save=options.steps,
        i_sample=runs.NEVER,
        i_ddpcheck=runs.NEVER,
        optimizer=adamw(LR),
        lr_scheduler=schedule(options.steps, warm_up),
    )
    flags = ["--num_gpus", "1"]
    if variant.start is not None:
        flags += ["--load_dir", str(folder_of(options.output_dir, variant.start))]
        settings["models.quantizer.args.n_embed"] = options.codes
        if "Finite" in name:
            settings["models.quantizer.args.levels"] = LEVELS[options.codes]
    settings |= {"dataset.args.resolution": options.resolution, "dataset.args.augmentation": "none"}
    line = runs.arguments(
        runs.config_path(variant.config), device, str(options.data_dir), folder, settings | variant.settings, *flags
    )
    print(f"{name} ...", flush=True)
    try:
        runs.run_train(line)
    except RuntimeError as error:  # told at the end; the others go on
        return {"failed": str(error)}
    log = [json.loads(text) for text in (folder / "log.txt").read_text().splitlines()]
    scores = [entry for entry in log if "val/iou" in entry]
    kept = {"first": scores[0], "last": scores[-1]}
    result.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{name}: IoU {scores[0]['val/iou']:.4f} -> {scores[-1]['val/iou']:.4f}", flush=True)
    return kept


def row(name: str, kept: dict) -> list:
    if "failed" in kept:
        return [name, None, "failed", None, None, None, None]
    first, last = kept["first"], kept["last"]
    codebook = [last.get(f"val/codebook_{key}") for key in ("usage", "perplexity")]
    bits = last.get("val/entropy_bits_per_object")
    kbit = None if bits is None else bits / 1e3
    return [name, first["val/iou"], last["val/iou"], *codebook, kbit, last["seconds"]]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        help="data root with a validation split; to be pooled, "
        "a folder of packed .npz files, that split's with names ending in val",
    )
    flags.add_argument(
        "--resolution", type=int, default=64, help="where lower than 64, grids are pooled to it (default: 64)"
    )
    flags.add_argument("--codes", type=int, choices=LEVELS, default=8192, help="of a codebook (default: 8192)")
    flags.add_argument("--output_dir", type=Path, required=True, help="for a run folder of each variant")
    flags.add_argument(
        "--tokens", type=int, choices=(1024, 4096), default=1024, help="of an object at 64³ (default: 1024)"
    )
    flags.add_argument("--steps", type=int, default=400, help=f"of {BATCH} samples (default: 400)")
    flags.add_argument("--only", nargs="+", help="names of variants, or beginnings of them; a codebook's VAE is added")
    flags.add_argument("--parallel", type=int, default=1, help="variants that run at a time (default: 1)")
    options = flags.parse_args(argv)
    device = pick_device(options.device)
    options.data_dir, options.output_dir = options.data_dir.resolve(), options.output_dir.resolve()
    if options.steps <= WARM_UP:
        flags.error(f"--steps is {options.steps}; it must be more than the {WARM_UP} of the warm-up")
    if options.resolution < 64:
        if not list(options.data_dir.glob("*val.npz")):
            flags.error(f"--data_dir {options.data_dir} has no *val.npz, which pooling needs; see pack.py")
        options.data_dir = pooled(options.data_dir, options.resolution, options.output_dir / "pooled")
    chosen = variants(options.tokens)
    if options.only:
        wanted = tuple(options.only)
        picked = {name for name in chosen if name.startswith(wanted) or name.split(": ", 1)[-1].startswith(wanted)}
        if not picked:
            flags.error(f"--only fits none of: {'; '.join(chosen)}")
        picked |= {chosen[name].start for name in picked} - {None}
        chosen = {name: variant for name, variant in chosen.items() if name in picked}

    rows, text, failures = [], "", {}
    report = Report("Ablations", __file__, argv, device, options.output)
    about = (
        f"Narrow network (8/32/64 channels), {options.resolution}³, {options.codes} codes, {options.steps} "
        f"steps of {BATCH}, {options.parallel} runs at a time. IoU of averaged weights on the validation split, before "
        "and after; usage, perplexity and kbit an object, by the entropy of single ids, after."
    )
    with ThreadPoolExecutor(options.parallel) as pool:
        for first in (True, False):  # VAEs before what starts from them
            names = [name for name, variant in chosen.items() if (variant.start is None) is first]
            results = pool.map(lambda name: run(options, device, name, chosen[name]), names)
            for name, kept in zip(names, results, strict=True):
                rows.append(row(name, kept))
                if "failed" in kept:
                    failures[name] = kept["failed"]
                text = report.write(about, Table(COLUMNS, rows))
    print(text)
    if failures:
        raise SystemExit("\n".join(f"error: {name}: {message}" for name, message in failures.items()))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
