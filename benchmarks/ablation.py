"""Effect of each choice: quantizers, losses, learning rates, augmentation, at equal budget on a narrow network.

    python benchmarks/ablation.py --data_dir DATA --output_dir outputs/ablation

Each variant runs train.py on a configuration of the recipe (see quality.py), with the demo's narrow network and the
settings below, for the same number of samples. VAEs with different losses start from random weights, VAEs with
different KL weights from the demo's VAE, and codebooks from one of the latter, by k-means and joint training. The score
is that of validation, by averaged weights. Finished variants are not run again. --parallel runs several at a time, for
which a GPU has room.

What a variant trains follows from its settings alone. Its name is shown in the table, chosen by --only, and names the
run's folder.
"""

import argparse
import json
import math
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
from trellis.utils.config import differing_keys
from trellis.utils.errors import ConfigError
from trellis.utils.files import atomic_write

NETWORK = {
    "models.encoder.args.channels": [8, 32, 64],
    "models.decoder.args.channels": [64, 32, 8],
    **{
        f"models.{name}.args.{key}": 1
        for name in ("encoder", "decoder")
        for key in ("num_res_blocks", "num_res_blocks_middle")
    },
}
BATCH = 16  # the reference_batch of the configurations
WARM_UP = 25
STEPS = 400
CODES = 8192
GROUPS = {4096: [1, 1, 1], 1024: [1, 1, 4], 512: [2, 2, 2]}  # cells of a token along x, y, z, by tokens at 64³
POOLED_VAL = 160  # validation grids after pooling, so that scoring takes no longer than training
# The lr of AdamW, unless a variant sets the optimizer. Narrow layers bear larger steps than the full network's.
LR = 2e-3
COLUMNS = (
    Column("variant", "key"),
    Column("IoU before", format=".4f"),
    Column("IoU after", format=".4f"),
    Column("usage"),
    Column("perplexity"),
    Column("kbit used"),
    Column("seconds"),
)


@dataclass(frozen=True)
class Variant:
    """A training run of the comparison."""

    name: str
    """Shown in the table, and names the run's folder."""
    config: str
    """Configuration of the recipe."""
    settings: dict
    """Differences from that configuration and the settings that all variants share."""
    start: "Variant | None" = None
    """The VAE from whose weights it starts."""

    def folder(self, root: Path) -> Path:
        """Return its run folder in an output folder of this program."""
        return root / "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name)


def args(**values) -> dict:
    """Return settings of the trainer."""
    return {f"trainer.args.{key}": value for key, value in values.items()}


def quantizer(name: str, **values) -> dict:
    """Return settings of a quantizer."""
    return {"models.quantizer.name": name, **{f"models.quantizer.args.{key}": value for key, value in values.items()}}


def adamw(lr: float) -> dict:
    return {"name": "AdamW", "args": {"lr": lr, "weight_decay": 0.0}}


def schedule(steps: int, warm_up: int) -> dict:
    """Return a linear warm-up followed by a cosine to the end of the training."""
    return {"name": "CosineAnnealingLR", "args": {"T_max": steps - warm_up}, "warmup_steps": warm_up}


VAE = "recipe_vae"
DEMO_VAE = args(
    finetune_ckpt={name: str(common.ROOT / "pretrained" / "demo_vae" / name) for name in ("encoder", "decoder")}
)
VAES = [
    *(
        Variant(f"from random weights: {loss}", VAE, args(loss_type=loss))
        for loss in ("bce_dice", "bce", "dice", "focal", "bce_iou", "l1_l2")
    ),
    Variant("from random weights: all 48 symmetries", VAE, {"dataset.args.augmentation": "all"}),
]
KL_VAES = {
    weight: Variant(f"lambda_kl {weight}", VAE, DEMO_VAE | args(lambda_kl=float(weight)))
    for weight in ("1e-3", "4e-3", "1.6e-2", "6.4e-2")
}
BASE_VAE = KL_VAES["4e-3"]  # all codebooks start from it, and one from each of the others
CODEBOOK = "recipe_4096_stage2"  # of all codebooks, which set the tokens: it has no transformer
COMMIT = 2.5  # the recipe's weight of the commitment loss
SPARSE_COMMIT = 1.2  # the same, with an empty code
LEVELS = {8192: [8, 8, 8, 4, 4], 1024: [8, 8, 4, 4]}  # of FiniteScalarQuantizer, by the number of codes


def codebook_settings(codes: int, steps: int) -> dict[str, dict]:
    """Return {name: settings} of the codebooks, one choice each."""
    vector, fast = quantizer("VectorQuantizer"), adamw(5e-3)
    return {
        "EMAVectorQuantizer": {},
        "lambda_commit 0.25": args(lambda_commit=0.25),
        "lambda_commit 10": args(lambda_commit=10.0),
        "VectorQuantizer": vector | args(lambda_vq=4 * COMMIT),
        "VectorQuantizer, lambda_vq 1, lambda_commit 0.25": vector | args(lambda_vq=1.0, lambda_commit=0.25),
        "SimVQ": quantizer("SimVQ") | args(lambda_vq=4 * COMMIT),
        "RotationVectorQuantizer": quantizer("RotationVectorQuantizer") | args(lambda_vq=4 * COMMIT),
        "FiniteScalarQuantizer": quantizer("FiniteScalarQuantizer", levels=LEVELS[codes]) | args(lambda_commit=0.0),
        "LookupFreeQuantizer": quantizer("LookupFreeQuantizer"),
        "IndexBackpropagationQuantizer": quantizer("IndexBackpropagationQuantizer") | args(lambda_vq=4 * COMMIT),
        "two codes a token: residual": quantizer("ResidualVectorQuantizer", num_codes=2) | args(lambda_vq=4 * COMMIT),
        "two codes a token: product": quantizer("ProductVectorQuantizer", num_codes=2) | args(lambda_vq=4 * COMMIT),
        **{
            f"{number} codes a token: {name.lower()}, averages": quantizer(
                f"{name}VectorQuantizer", num_codes=number, decay=0.99
            )
            for name in ("Residual", "Product")
            for number in (2, 4)
        },
        "no revival": args(revive_every=0),
        "decay 0.9": {"models.quantizer.args.decay": 0.9},
        "l1_l2": args(loss_type="l1_l2"),
        "dice": args(loss_type="dice"),
        "bce_dice": args(loss_type="bce_dice"),
        "the 8 symmetries about z": {"dataset.args.augmentation": "z"},
        "all 48 symmetries": {"dataset.args.augmentation": "all"},
        **{f"Muon, lr {lr}": args(optimizer=adamw(float(lr)) | {"name": "Muon"}) for lr in ("1e-3", "2e-3", "4e-3")},
        "lr 5e-4": args(optimizer=adamw(5e-4)),
        "lr 5e-3": args(optimizer=fast),
        "lr 5e-3, warm-up over half": args(optimizer=fast, lr_scheduler=schedule(steps, steps // 2)),
        "lr 5e-3 relative to RMS": args(optimizer=fast, lr_scaling="rms"),
        "lr 5e-3, decoder's a fifth": args(optimizer=fast, lr_multipliers={"decoder": 0.2}),
    }


def sparse_settings(codes: int) -> dict[str, dict]:
    """Return {name: settings} of codebooks with an empty code, whose commitment is a mean over occupied tokens."""
    empty = {"models.quantizer.args.empty_code": True} | args(lambda_commit=SPARSE_COMMIT)
    return {
        "empty code": empty,
        **{f"empty code, lambda_commit {weight}": empty | args(lambda_commit=weight) for weight in (0.3, 5.0)},
        **{
            f"empty code, {factor} times the codes": empty
            | {"models.quantizer.args.n_embed": factor * codes, "models.quantizer.args.decay": 0.995}
            | args(revive_every=200)
            for factor in (4, 8)
        },
        "empty code, no revival": empty | args(revive_every=0),
        **{
            f"empty code, {number} codes a token: {name.lower()}": empty
            | quantizer(f"{name}VectorQuantizer", num_codes=number, decay=0.99)
            for name in ("Residual", "Product")
            for number in (2, 4)
        },
    }


def transformer(tokens: int, resolution: int) -> dict:
    """Return settings that put a narrow transformer around the codebook."""
    cells = resolution // 4
    lattice = [cells // size for size in GROUPS[tokens]]
    channels = 8 * math.prod(GROUPS[tokens])
    shape = {"channels": channels, "lattice": lattice, "width": 128, "heads": 4, "layers_before": 2, "layers_after": 2}
    return {"models.transformer": {"name": "CodebookTransformer", "args": shape}}


def variants(tokens: int, codes: int = CODES, steps: int = STEPS, resolution: int = 64) -> list[Variant]:
    """Return all variants for a number of tokens per object at 64³, of codes, of training steps, and of voxels."""
    size = {
        "models.quantizer.args.n_embed": codes,
        "models.quantizer.args.embed_dim": 8 * math.prod(GROUPS[tokens]),
        "models.quantizer.args.group": GROUPS[tokens],
    }
    around = transformer(tokens, resolution)
    muon = args(optimizer=adamw(1e-3) | {"name": "Muon"})
    settings = codebook_settings(codes, steps) | sparse_settings(codes)
    settings |= {"transformer": around, "transformer, Muon, lr 1e-3": around | muon}
    settings["empty code, transformer"] = settings["empty code"] | around
    if tokens == 1024:
        settings["groups of 2x2x1 cells"] = {"models.quantizer.args.group": [2, 2, 1]}
    return [
        *VAES,
        *KL_VAES.values(),
        *(Variant(f"{tokens}: {name}", CODEBOOK, size | own, BASE_VAE) for name, own in settings.items()),
        *(
            Variant(f"{tokens}: after {vae.name}", CODEBOOK, size, vae)
            for vae in KL_VAES.values()
            if vae is not BASE_VAE
        ),
    ]


def pooled(data_dir: Path, resolution: int, folder: Path) -> Path:
    """Write the packed grids of `data_dir` at a lower resolution to files of the same names in `folder`; return it.

    A voxel is occupied if any of the voxels in it was. Equal grids are kept once, in a validation file if one of them
    is there. A validation file keeps its first POOLED_VAL grids.
    """
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


def run(options: argparse.Namespace, device: torch.device, variant: Variant) -> dict:
    """Train a variant, unless it is finished, and return the log's first and last entries with a validation.

    The result of a failed training is {"failed": message}; the other variants go on. Raise ConfigError if the variant
    is finished with other settings or data.
    """
    folder = variant.folder(options.output_dir)
    result = folder / "result.json"
    settings = NETWORK | args(
        max_steps=options.steps,
        batch_size_per_gpu=BATCH,
        ema_rate=0.99,
        i_log=20,
        i_print=options.steps,
        i_eval=options.steps,
        i_save=options.steps,
        i_sample=runs.NEVER,
        i_ddpcheck=runs.NEVER,
        optimizer=adamw(LR),
        lr_scheduler=schedule(options.steps, WARM_UP),
    )
    settings |= {"dataset.args.resolution": options.resolution, "dataset.args.augmentation": "none"} | variant.settings
    origin = {"settings": settings, "data_dir": str(options.data_dir)}
    if result.exists():
        kept = json.loads(result.read_text())
        if keys := differing_keys({**origin, **kept.get("origin", {})}, origin):
            raise ConfigError(
                f"{folder} is finished, but with another value of {', '.join(keys)}; choose another --output_dir"
            )
        return kept
    flags = ["--num_gpus", "1"]
    if variant.start is not None:
        flags += ["--load_dir", str(variant.start.folder(options.output_dir))]
    line = runs.arguments(runs.config_path(variant.config), device, str(options.data_dir), folder, settings, *flags)
    print(f"{variant.name} ...", flush=True)
    try:
        runs.run_train(line)
    except RuntimeError as error:  # reported at the end
        return {"failed": str(error)}
    log = [json.loads(text) for text in (folder / "log.txt").read_text().splitlines()]
    scores = [entry for entry in log if "val/iou" in entry]
    kept = {"first": scores[0], "last": scores[-1], "origin": origin}
    with atomic_write(result) as partial:
        partial.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"{variant.name}: IoU {scores[0]['val/iou']:.4f} -> {scores[-1]['val/iou']:.4f}", flush=True)
    return kept


def row(variant: Variant, kept: dict) -> list:
    """Return the row of the table for what `run` returned."""
    if "failed" in kept:
        return [variant.name, None, "failed", None, None, None, None]
    first, last = kept["first"], kept["last"]
    codebook = [last.get(f"val/codebook_{key}") for key in ("usage", "perplexity")]
    bits = last.get("val/entropy_bits_per_object")
    kbit = None if bits is None else bits / 1e3
    return [variant.name, first["val/iou"], last["val/iou"], *codebook, kbit, last["seconds"]]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__, data=False)
    flags.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        help="data root with a validation split; with pooling, a folder of packed files, one of them named *val.npz",
    )
    flags.add_argument(
        "--resolution", type=int, default=64, help="voxels along an axis; below 64, grids are pooled (default: 64)"
    )
    flags.add_argument(
        "--codes", type=int, choices=LEVELS, default=CODES, help=f"codes of a codebook (default: {CODES})"
    )
    flags.add_argument("--output_dir", type=Path, required=True, help="parent of the variants' run folders")
    flags.add_argument(
        "--tokens", type=int, choices=GROUPS, default=1024, help="tokens of an object at 64³ (default: 1024)"
    )
    flags.add_argument("--steps", type=int, default=STEPS, help=f"steps of {BATCH} samples (default: {STEPS})")
    flags.add_argument("--only", nargs="+", help="variants whose names begin like this, and the VAEs they start from")
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
    chosen = variants(options.tokens, options.codes, options.steps, options.resolution)
    if options.only:
        wanted = tuple(options.only)
        picked = [
            variant
            for variant in chosen
            if variant.name.startswith(wanted) or variant.name.split(": ", 1)[-1].startswith(wanted)
        ]
        if not picked:
            flags.error(f"--only fits none of: {'; '.join(variant.name for variant in chosen)}")
        starts = [variant.start for variant in picked]
        chosen = [variant for variant in chosen if variant in picked or variant in starts]

    report, rows, text, failures = Report("Ablations", __file__, argv, device, options.output), [], "", {}
    about = (
        f"Narrow network (8/32/64 channels), {options.resolution}³, {options.codes} codes, {options.steps} steps of "
        f"{BATCH}, {options.parallel} runs at a time. IoU of averaged weights on the validation split, before and "
        "after; usage, perplexity and kbit per object, by the entropy of single ids, after."
    )
    with ThreadPoolExecutor(options.parallel) as pool:
        for first in (True, False):  # VAEs before the codebooks that start from them
            group = [variant for variant in chosen if (variant.start is None) is first]
            for variant, kept in zip(group, pool.map(lambda v: run(options, device, v), group), strict=True):
                rows.append(row(variant, kept))
                if "failed" in kept:
                    failures[variant.name] = kept["failed"]
                text = report.write(about, Table(COLUMNS, rows))
    print(text)
    if failures:
        raise SystemExit("\n".join(f"error: {name}: {message}" for name, message in failures.items()))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
