"""Tiny data and configurations: 16³ grids of boxes and balls, networks of a few thousand parameters."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# The same in this process and in those that tests start: sums in another order differ in the last bit.
os.environ["OMP_NUM_THREADS"] = "2"
torch.set_num_threads(2)
# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Read when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def solid_grids(number: int, resolution: int, seed: int) -> np.ndarray:
    """Shells of random ellipsoids and boxes, bool [number, R, R, R]."""
    rng = np.random.default_rng(seed)
    axis = np.arange(resolution) + 0.5
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    grids = []
    for i in range(number):
        centre = rng.uniform(0.4, 0.6, 3) * resolution
        radius = rng.uniform(0.2, 0.4, 3) * resolution
        scaled = np.abs(points - centre) / radius
        distance = scaled.max(-1) if i % 2 else np.linalg.norm(scaled, axis=-1)
        grids.append((distance < 1) & (distance > 0.7))
    return np.stack(grids)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A packed root with 24 training and 6 validation grids of 16³."""
    folder = tmp_path_factory.mktemp("data")
    for split, number, seed in (("train", 24, 0), ("val", 6, 1)):
        grids = solid_grids(number, 16, seed)
        np.savez(folder / f"shapes_{split}.npz", bits=np.packbits(grids.reshape(number, -1), axis=1))
    return str(folder)


def tiny_config(trainer: str = "SparseStructureVaeTrainer", n_embed: int = 32, embed_dim: int = 4, **args) -> dict:
    """A configuration of a 16³ run; `args` go to the trainer."""
    shape = {"latent_channels": 4, "num_res_blocks": 1, "num_res_blocks_middle": 1}
    models = {
        "encoder": {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": [4, 8, 8], **shape}},
        "decoder": {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": [8, 8, 4], **shape}},
    }
    if trainer == "SparseStructureVqVaeTrainer":
        quantizer = {"n_embed": n_embed, "embed_dim": embed_dim, "latent_channels": 4}
        models["quantizer"] = {"name": "VectorQuantizer", "args": quantizer}
    defaults = {
        "max_steps": 6,
        "batch_size": 4,
        "optimizer": {"name": "AdamW", "args": {"lr": 1e-2}},
        "grad_clip": 1.0,
        "i_print": 2,
        "i_log": 2,
        "i_eval": 3,
        "i_sample": 100,
        "i_save": 2,
    }
    return {
        "models": models,
        "dataset": {"name": "SparseStructure", "args": {"resolution": 16}},
        "trainer": {"name": trainer, "args": {**defaults, **args}},
    }


@pytest.fixture
def write_config(tmp_path):
    """Write a configuration to a file of its own and return the path."""
    count = iter(range(100))

    def write(config: dict) -> str:
        path = tmp_path / f"config{next(count)}.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write
