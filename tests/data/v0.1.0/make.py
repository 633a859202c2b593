"""Write the files of this folder, in a checkout of version 0.1.0 and on a CPU:

cp make.py CHECKOUT && cd CHECKOUT && python make.py NEW_FOLDER
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from trellis.datasets.voxels import occupancy_to_points, write_ply
from trellis.trainers.checkpoint import model_file

import train
from dataset_toolkits.pack import pack
from scripts import tokenize
from trellis import SparseStructureTokenizer

R = 16
SHAPE = {"latent_channels": 2, "num_res_blocks": 1, "num_res_blocks_middle": 0}
ENCODER = {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": [2, 4], **SHAPE}}
DECODER = {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": [4, 2], **SHAPE}}
QUANTIZER = {"name": "VectorQuantizer", "args": {"n_embed": 16, "embed_dim": 2, "latent_channels": 2}}


def boxes(number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    grids = []
    for _ in range(number):
        low, high = rng.integers(0, 6, 3), rng.integers(10, R + 1, 3)
        grid = np.zeros((R, R, R), dtype=bool)
        grid[tuple(slice(*ends) for ends in zip(low, high, strict=True))] = True
        grids.append(grid)
    return grids


def voxel_folder(folder: Path) -> None:
    rows = ["sha256,voxelized,num_voxels,up_axis,normalization,file,source,split"]
    (folder / "voxels").mkdir(parents=True)
    for i, grid in enumerate(boxes(12)):
        sha256, points = f"{i:064x}", occupancy_to_points(torch.from_numpy(grid))
        write_ply(folder / "voxels" / f"{sha256}.ply", points)
        rows.append(f"{sha256},True,{len(points)},y,cube,box{i}.obj,boxes,{'val' if i % 3 == 2 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def trained(name: str, trainer: str, *flags: str, **args) -> None:
    """Train for 4 steps, and keep a copy of the run as it was after step 2."""
    models = {"encoder": ENCODER, "decoder": DECODER}
    if trainer == "SparseStructureVqVaeTrainer":
        models["quantizer"] = QUANTIZER
    args = {"max_steps": 4, "batch_size": 4, "optimizer": {"name": "AdamW", "args": {"lr": 0.01}}, "ema_rate": [0.9],
            "grad_clip": 1.0, "i_print": 2, "i_log": 2, "i_eval": 2, "i_sample": 100, "i_save": 2, **args}  # fmt: skip
    config = {
        "models": models,
        "dataset": {"name": "SparseStructure", "args": {"resolution": R}},
        "trainer": {"name": trainer, "args": args},
    }
    Path(f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")
    command = ["--config", f"{name}.json", "--data_dir", "voxels.npz", "--output_dir", name, *flags, "--device", "cpu"]
    assert train.main([*command, "--set", "trainer.args.max_steps=2"]) == 0
    shutil.copytree(name, f"{name}_after2")
    assert train.main(command) == 0


def main(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    voxel_folder(Path("grids"))
    pack("grids", Path("voxels.npz"), R)
    vq, frozen = "SparseStructureVqVaeTrainer", {"freeze": ["encoder", "decoder"], "loss_type": "l1"}
    trained("vae", "SparseStructureVaeTrainer", loss_type="bce", max_steps=40)
    trained("stage1", vq, "--load_dir", "vae", latent_cache="latents", **frozen)
    slow = {"name": "AdamW", "args": {"lr": 0.0001}}
    trained("stage2", vq, "--load_dir", "stage1", loss_type="l1_l2", optimizer=slow, latent_cache=False)

    tokenizer = SparseStructureTokenizer.from_run("stage2_after2")
    tokenizer.save_pretrained("tokenizer")
    flags = ["--tokenizer", "tokenizer", "--data_dir", "voxels.npz", "--output_dir", "tokens", "--iou"]
    assert tokenize.main([*flags, "--shard_size", "8", "--device", "cpu"]) == 0
    ids = tokenizer.encode(np.stack(boxes(4))[:, None])
    Path("expected.json").write_text(json.dumps({"hash": tokenizer.hash, "ids": ids.tolist()}) + "\n")

    trained_models = {"stage1": ("quantizer",), "stage2": ("encoder", "quantizer", "decoder")}
    weights = {}
    for stage, models in trained_models.items():
        for model in models:
            state = torch.load(Path(stage, "ckpts", model_file(model, 4)), weights_only=True)
            weights |= {
                f"{stage}.{model}.{key}": value.clone(memory_format=torch.contiguous_format)
                for key, value in state.items()
            }
    save_file(weights, "expected.safetensors")

    for stage in trained_models:
        shutil.rmtree(stage)
        shutil.move(f"{stage}_after2", stage)
        for left in ("tb_logs", "samples"):
            shutil.rmtree(Path(stage, left))
        for left in Path(stage, "ckpts").glob("*_step0000000.pt"):
            left.unlink()
    for left in ("vae", "vae_after2", "grids"):
        shutil.rmtree(left)
    Path("vae.json").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
