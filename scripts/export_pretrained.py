"""Write the models of a run as published weights: {model}.json and {model}.safetensors.

    python scripts/export_pretrained.py --run outputs/stage2 --output_dir pretrained/my_vqvae

`trellis.models.from_pretrained("pretrained/my_vqvae/encoder")` and `finetune_ckpt` read them. With a codebook, the
folder is a tokenizer too: `SparseStructureTokenizer.load("pretrained/my_vqvae")`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

import argparse
import json

import torch

from trellis.models import build, load_weights, model_spec
from trellis.runs.open import Run, open_run
from trellis.tokens.sources import GRIDS
from trellis.utils.command import check_output_folder, run_command
from trellis.utils.errors import CheckpointError, ConfigError, DataError
from trellis.utils.files import atomic_write, remove_leftovers


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--ckpt", default="latest", help="latest, best or a step (default: latest)")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of averaged ones (EMA)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="precision of the stored weights; TRELLIS publishes float16",
    )
    args = parser.parse_args(argv)
    if args.ckpt not in ("latest", "best") and not args.ckpt.isdigit():
        parser.error(f"--ckpt is {args.ckpt!r}; it must be latest, best or a step")
    return args


def grid_settings(run: Run) -> dict[str, str | int]:
    """Return how the run's grids were made, for a tokenizer; without what its data do not agree on."""
    settings: dict[str, str | int] = {"resolution": run.resolution}
    try:
        normalization, up_axis = run.tokenizer_settings()
    except DataError as error:  # the models are good without it
        print(f"note: {error}", file=sys.stderr)
        return settings
    return {**settings, "normalization": normalization, "up_axis": up_axis}


def export(args: argparse.Namespace) -> None:
    """Write the files. What a killed export of the same models has left is kept; anything else there is an error."""
    from safetensors.torch import save

    folder = check_output_folder(args.output_dir)
    if (folder / "ckpts").is_dir():  # the copy would be taken for the run's newest weights
        raise ConfigError(f"--output_dir {folder}: is a run folder; give another --output_dir")
    run = open_run(args.run, args.ckpt, "--run")
    paths = [folder / f"{name}{suffix}" for name in run.config["models"] for suffix in (".safetensors", ".json")]
    present = [path for path in paths if path.exists()]
    if len(present) == len(paths):
        raise CheckpointError(f"{present[0]} exists already; choose another --output_dir")
    weights = run.weights(averaged=not args.raw)
    files: dict[Path, bytes] = {}
    dtype = getattr(torch, args.dtype)
    for name, spec in run.config["models"].items():
        model = build(spec, f"models.{name}")
        load_weights(model, weights[name])
        state = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}
        note = {GRIDS: json.dumps(grid_settings(run))} if name == "quantizer" else None
        files[folder / f"{name}.safetensors"] = save(state, note)
        files[folder / f"{name}.json"] = model_spec(spec).encode()
    for path in present:
        if path.read_bytes() != files[path]:
            raise CheckpointError(f"{path} exists already, of other models; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    for path, content in files.items():
        if path not in present:
            with atomic_write(path) as partial:  # a full disk is an OSError, unlike in safetensors' save_file
                partial.write_bytes(content)
    for name in run.config["models"]:
        print(f"written: {folder / name}.json, {folder / name}.safetensors")


def main(argv: list[str] | None = None) -> int:
    return run_command(export, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
