"""Two minutes each of KL, stage-1 and stage-2 training at full size, with validation IoU before and after.

    python benchmarks/full_size.py --data_dir DATA --output_dir outputs/full_size

Starts from random weights, so it needs nothing but data. Each phase runs train.py on its shipped configuration
for the steps that fit, judged from a short run before. Writes results.md into --output_dir; phases that are
finished are not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PHASES = {
    # phase: (configuration, run to start from, changes)
    "kl": ("ss_vae_conv3d_16l8_fp16.json", None, []),
    "stage1": ("vqvae_stage1.json", "kl", ["trainer.args.finetune_ckpt=null"]),
    "stage2": ("vqvae_stage2.json", "stage1", []),
    "stage1_1024": ("vqvae_1024_stage1.json", "kl", ["trainer.args.finetune_ckpt=null"]),
    "stage2_1024": ("vqvae_1024_stage2.json", "stage1_1024", []),
}
SPEED_STEPS = 12


def train(args: argparse.Namespace, phase: str, run_dir: Path, steps: int, every: int) -> list[dict]:
    """Run a phase for `steps` steps. Returns the lines of its log."""
    config, source, changes = PHASES[phase]
    settings = [*changes, f"trainer.args.max_steps={steps}", f"trainer.args.batch_size_per_gpu={args.batch_size}"]
    settings += [f"trainer.args.{key}={every}" for key in ("i_log", "i_print")]
    settings += [f"trainer.args.{key}=1000000" for key in ("i_eval", "i_save", "i_sample")]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs" / "vae" / config),
               "--data_dir", args.data_dir, "--output_dir", str(run_dir), "--num_gpus", "1"]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    if source:
        command += ["--load_dir", str(args.output_dir / source)]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (run_dir / "log.txt").read_text().splitlines()]


def last_of(log: list[dict], key: str):
    return next(line[key] for line in reversed(log) if key in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each phase")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    args = parser.parse_args()

    rows = []
    for phase in args.phases:
        result = args.output_dir / f"{phase}.json"
        if not result.exists():
            speed_log = train(args, phase, args.output_dir / f"{phase}_speed", SPEED_STEPS, every=4)
            speed = last_of(speed_log, "samples_per_second")
            log = train(args, phase, args.output_dir / phase, max(1, int(args.seconds * speed / args.batch_size)), 50)
            scores = [line for line in log if "val/iou" in line]
            rates = sorted(line["samples_per_second"] for line in log[1:] if "samples_per_second" in line)
            result.write_text(json.dumps({
                "phase": phase, "steps": last_of(log, "step"), "seconds": last_of(log, "seconds"),
                "samples_per_second": rates[len(rates) // 2], "peak_memory_gib": last_of(log, "peak_memory_gib"),
                "before": scores[0], "after": scores[-1],
            }, indent=2))  # fmt: skip
        rows.append(json.loads(result.read_text()))

    lines = [
        f"Machine: {torch.cuda.get_device_name()}, torch {torch.__version__}. Batch {args.batch_size}, data "
        f"{Path(args.data_dir).name}, from random weights. IoU and codebook of the averaged weights, validation split.",
        "",
        "| phase | steps | seconds | samples/s | GiB | IoU before | IoU after | usage | perplexity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        after = row["after"]
        code = [f"{after['val/' + key]:.3g}" if "val/" + key in after else "-"
                for key in ("codebook_usage", "codebook_perplexity")]  # fmt: skip
        lines.append(
            f"| {row['phase']} | {row['steps']} | {row['seconds']:.0f} | {row['samples_per_second']:.1f} | "
            f"{row['peak_memory_gib']:.1f} | {row['before']['val/iou']:.4f} | {after['val/iou']:.4f} | "
            + " | ".join(code) + " |"
        )
    (args.output_dir / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
