"""What several test files use: tiny data and configurations, runs of train.py, meshes with known grids."""

import csv
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from trellis import SparseStructureTokenizer
from trellis.runs.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
# A folder with what is too large to be kept with the code: real meshes and grids (data/), full-size outputs (parity/).
TEST_DATA = Path(os.environ.get("TRELLIS_TEST_DATA", ""))
needs_test_data = pytest.mark.skipif(
    "TRELLIS_TEST_DATA" not in os.environ, reason="TRELLIS_TEST_DATA is not set: see tests/data/README.md"
)
# Outputs of TRELLIS and ShapeLLM-Omni.
PARITY = [
    pytest.param(DATA / "parity", id="small"),
    pytest.param(TEST_DATA / "parity", id="large", marks=needs_test_data),
]
VQ = "SparseStructureVqVaeTrainer"


# --- data and configurations ---


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


# --- runs ---


def run(*flags) -> int:
    return train.main([*map(str, flags), "--device", "cpu", "--auto_retry", "0"])


def command(*flags) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--device", "cpu", "--auto_retry", "0"]


def forked(function: Callable, *args) -> BaseProcess:
    """Start a function in a copy of this process, which has no imports to wait for, and return it. What it returns is
    its exit code."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(function(*args)))
    process.start()
    return process


def wait_for(condition: Callable[[], object], seconds: float = 20) -> bool:
    """Return whether a condition comes true within some time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(met)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def checkpoint(run_dir, step: int) -> dict[str, dict]:
    """All files of a step, without the wall-clock time and the command's own config.

    `course` is left out too: a run that stopped has validated once more. It is for `course` to compare.
    """
    checkpoints = Checkpoints(run_dir)
    assert checkpoints.is_complete(step)
    files = {path.name: torch.load(path, weights_only=True) for path in checkpoints.folder.glob(f"*step{step:07d}.pt")}
    for key in ("seconds", "files", "sums", "config", "course"):
        files[f"misc_step{step:07d}.pt"].pop(key)
    return files


def course(run_dir, step: int) -> dict:
    """What a checkpoint holds of the validations that the end of a run is judged by."""
    misc = Checkpoints(run_dir).read_misc(step, mmap=False)
    assert misc is not None
    return misc["course"]


def assert_equal(a, b, where=""):
    """The same numbers, to the last bit, of the same types and shapes."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), where  # NaN is NaN


def logged(run_dir) -> list[dict]:
    """Lines of log.txt without timings."""
    lines = [json.loads(line) for line in (Path(run_dir) / "log.txt").read_text().splitlines()]
    timings = ("seconds", "samples_per_second", "validation_seconds")
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def ranks_of(run_dir: Path) -> list[int]:
    """The number of ranks of each start."""
    lines = (run_dir / "command.txt").read_text().splitlines()
    return [json.loads(line.split(maxsplit=3)[3])["ranks"] for line in lines if line.startswith("#")]


# --- reference outputs ---


def assert_logits(logits: torch.Tensor, expected: dict[str, torch.Tensor], atol: float) -> None:
    """Close to those of a file of reference outputs, which may keep only every fourth along each axis."""
    if "logits_every_4th" in expected:
        torch.testing.assert_close(logits[..., ::4, ::4, ::4], expected["logits_every_4th"], atol=atol, rtol=0)
    else:
        torch.testing.assert_close(logits, expected["logits"], atol=atol, rtol=0)


def exact_nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The lowest index among the closest codes, all in fp64. argmin gives the first of equal ones."""
    result = []
    for rows in vectors.double().split(2**25 // len(codebook)):
        distance = rows.new_zeros(len(rows), len(codebook))
        for z, e in zip(rows.T, codebook.double().T, strict=True):
            distance += (z[:, None] - e).square()
        result.append(distance.argmin(1))
    return torch.cat(result)


# --- tokenizers ---


def save_tokenizer(folder: Path, seed: int, **settings) -> SparseStructureTokenizer:
    """Write a tokenizer of 16³ grids with random weights, whose codes are far enough apart for different ids."""
    torch.manual_seed(seed)
    tokenizer = SparseStructureTokenizer(tiny_config(VQ)["models"], 16, **settings)
    tokenizer.quantizer.embeddings.weight.data.normal_()
    tokenizer.save_pretrained(folder)
    return tokenizer


# --- viewer ---


RESOLUTION = 16


def make_tokenizer(**quantizer) -> SparseStructureTokenizer:
    """A tokenizer of 16³ grids with random weights, whose reconstructions are half full: every edit shows."""
    torch.manual_seed(0)
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    models["quantizer"] = quantizer or models["quantizer"]
    tokenizer = SparseStructureTokenizer(models, RESOLUTION, up_axis="z")
    for name, value in tokenizer.quantizer.named_parameters():
        if name.startswith("embeddings"):
            value.data.normal_()
    ids = torch.randint(tokenizer.n_embed, (tokenizer.num_tokens,), generator=torch.Generator().manual_seed(1))
    *_, bias = (value for name, value in tokenizer.decoder.named_parameters() if name.endswith("bias"))
    bias.data -= tokenizer.decode(ids).median()
    return tokenizer


# --- meshes ---


TETRAHEDRON = (
    np.array([(0, 0, 0), (4, 0, 0), (0, 2, 0), (1, 0.5, 3)]),
    np.array([(0, 2, 1), (0, 1, 3), (1, 2, 3), (2, 0, 3)]),
)
BROKEN = {
    "nan.obj": (b"v 0 0 0\nv 1 0 0\nv 0 nan 1\nf 1 2 3\n", "not finite"),
    "points.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "cloud of 3 points without triangles"),
    "nothing.stl": (b"", "0 bytes"),
    "speck.obj": (b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "longest edge is 0"),
    "astray.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "0 to 7 of 3"),
    "astray.ply": (
        b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
        b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
        b"0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n",
        "0 to 7 of 3",
    ),
    "text.glb": (b"this is no mesh", "neither a GLB nor JSON"),
    "packed.gltf": (
        b'{"asset": {"version": "2.0"}, "extensionsRequired": ["EXT_meshopt_compression"]}',
        "requires EXT_meshopt_compression, which is not read: .*gltf-transform",
    ),
}


def tetrahedron(scale: float = 1.0):
    """A trimesh.Trimesh whose coordinates are short in binary, so that every format stores them exactly."""
    import trimesh

    return trimesh.Trimesh(TETRAHEDRON[0] * (1, 1, scale), TETRAHEDRON[1], process=False)


def cells_met(vertices: np.ndarray, faces: np.ndarray, resolution: int) -> np.ndarray:
    """Reference: [R, R, R] bool by separating axes of every triangle and every cell, all in float64."""
    centres = (
        np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5
    ) / resolution - 0.5
    half = 0.5 / resolution
    met = np.zeros(len(centres), dtype=bool)
    for triangle in np.clip(vertices, -0.5 + 1e-6, 0.5 - 1e-6)[faces]:
        edges = np.roll(triangle, -1, axis=0) - triangle
        axes = [*np.eye(3), np.cross(edges[0], edges[1]), *np.cross(np.eye(3)[:, None], edges).reshape(-1, 3)]
        apart = np.zeros(len(centres), dtype=bool)
        for axis in axes:
            corners = triangle @ axis - (centres @ axis)[:, None]
            reach = half * np.abs(axis).sum()
            apart |= (corners.min(axis=1) > reach) | (corners.max(axis=1) < -reach)
        met |= ~apart
    return met.reshape((resolution,) * 3)


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(newline="")))
