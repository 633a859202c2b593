"""Fixtures of several test files, and what must be set before anything of the project is imported."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# The same in this process and in those that tests start: sums in another order differ in the last bit. One thread: tiny
# networks gain nothing from a second, and threads that wait for each other make a busy machine ten times as slow.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Without a GPU, Triton's kernels run in its interpreter, on CPU tensors. Read when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import RESOLUTION, make_tokenizer, run, solid_grids, tiny_config  # noqa: E402

from trellis.trainers.vae import sparse_structure_vae  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def blank_pictures():
    """Let runs in this process draw blank pictures, since drawing takes most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_structure_vae, "contact_sheet", lambda rows: np.zeros((8, 8, 3), dtype=np.uint8))
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A packed root with 24 training and 6 validation grids of 16³."""
    folder = tmp_path_factory.mktemp("data")
    for split, number, seed in (("train", 24, 0), ("val", 6, 1)):
        grids = solid_grids(number, 16, seed)
        np.savez(folder / f"shapes_{split}.npz", bits=np.packbits(grids.reshape(number, -1), axis=1))
    return str(folder)


@pytest.fixture(scope="session")
def vae_run(data_dir, tmp_path_factory) -> Path:
    """A short KL run, from which stage 1 can start. Tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("vae")
    config = folder / "config.json"
    config.write_text(json.dumps(tiny_config(max_steps=4)))
    assert run("--config", config, "--data_dir", data_dir, "--output_dir", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def write_config(tmp_path):
    """Write a configuration to a file of its own and return the path."""
    count = iter(range(100))

    def write(config: dict) -> str:
        path = tmp_path / f"config{next(count)}.json"
        path.write_text(json.dumps(config))
        return str(path)

    return write


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """Runs pass nothing through their models for pictures, so that what passes can be counted."""
    from trellis.trainers import SparseStructureVqVaeTrainer

    monkeypatch.setattr(SparseStructureVqVaeTrainer, "run_snapshot", lambda self: {})


@pytest.fixture(scope="module")
def backend(data_dir):
    """What the viewer's page computes with: a tiny tokenizer and all grids of `data_dir`."""
    from trellis.datasets.sparse_structure import SparseStructure
    from trellis.viewer.backend import Backend

    return Backend(make_tokenizer(), SparseStructure(data_dir, resolution=RESOLUTION, split="all"), name="tiny")
