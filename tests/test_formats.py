"""Files that version 0.1.0 wrote are read, and its runs continued, as that version did; see data/README.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, run
from safetensors.torch import load_file

from trellis import SparseStructureTokenizer
from trellis.datasets.sparse_structure import SparseStructure
from trellis.runs.checkpoint import Checkpoints, model_file

pytestmark = pytest.mark.usefixtures("without_pictures")
OLD = DATA / "v0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def continued(old: Path, stage: str, *flags) -> dict[str, torch.Tensor]:
    """Resume a run at step 2 and return the weights of step 4 that are known, as {model.key: value}."""
    flags = ("--data_dir", old / "voxels.npz", "--output_dir", old / stage, *flags)
    assert run("--config", old / f"{stage}.json", *flags) == 0
    return {
        f"{model}.{key}": value
        for model in (("quantizer",) if stage == "stage1" else ("encoder", "quantizer", "decoder"))
        for key, value in torch.load(old / stage / "ckpts" / model_file(model, 4), weights_only=True).items()
    }


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_continues_to_the_same_weights(stage, old):
    models = (old / stage / "ckpts").glob("[!m]*.pt")  # all but misc
    before = {path.name: torch.load(path, weights_only=True) for path in models}
    assert len(before) == {"stage1": 4, "stage2": 6}[stage] and Checkpoints(old / stage).latest() == 2
    log = (old / stage / "log.txt").read_text()
    found = continued(old, stage, "--set", "trainer.args.latent_cache=false")
    expected = {key.removeprefix(f"{stage}."): value for key, value in load_file(OLD / "expected.safetensors").items()}
    assert found.keys() == {key for key in expected if not key.startswith("stage")}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)
    for model in {key.partition(".")[0] for key in found}:
        steps = [found[f"{model}.{key}"] - value for key, value in before[model_file(model, 2)].items()]
        assert max(step.abs().max() for step in steps) > 1e-4  # by more than the tolerance
    assert (old / stage / "log.txt").read_text().startswith(log)


def test_the_weights_of_a_run_are_those_of_the_tokenizer_made_from_it():
    # Its data were y-up. The run folder only says where they were, and they are no longer there.
    tokenizer = SparseStructureTokenizer.from_run(OLD / "stage2", up_axis="y")
    assert tokenizer.hash == EXPECTED["hash"]  # over all weights, to the bit, and the settings
    raw = torch.load(OLD / "stage2" / "ckpts" / model_file("decoder", 2), weights_only=True)
    averaged = torch.load(OLD / "stage2" / "ckpts" / model_file("decoder", 2, 0.9), weights_only=True)
    found = tokenizer.decoder.state_dict()
    assert all(torch.equal(found[key], averaged[key]) for key in raw)
    assert not all(torch.equal(found[key], raw[key]) for key in raw)


def test_the_latent_cache_is_used_as_it_is(old):
    """No other folder is begun beside it, and no row is written anew."""
    files = sorted((old / "latents").rglob("*.*"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    found = continued(old, "stage1", "--set", f"trainer.args.latent_cache={old / 'latents'}")
    assert sorted((old / "latents").rglob("*.*")) == files and len(files) == 3
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before
    expected = load_file(OLD / "expected.safetensors")
    for key, value in found.items():
        torch.testing.assert_close(value, expected[f"stage1.{key}"], atol=1e-5, rtol=0)


def test_a_tokenizer_has_the_same_hash_and_gives_the_same_ids():
    tokenizer = SparseStructureTokenizer.load(OLD / "tokenizer")
    assert tokenizer.hash == EXPECTED["hash"]
    assert tokenizer.settings["up_axis"] == "y"
    assert tokenizer.info["training"] == {"step": 2, "objects": 8, "data": "voxels.npz"}
    dataset = SparseStructure(str(OLD / "voxels.npz"), resolution=16, split="all")
    grids = torch.stack([dataset[index]["ss"] for index in range(4)])
    assert tokenizer.encode(grids).tolist() == EXPECTED["ids"]


def test_packed_grids_keep_their_split_and_names():
    dataset = SparseStructure(str(OLD / "voxels.npz"), resolution=16, split="all")
    assert dataset.split_sizes() == {"train": 8, "val": 4}
    assert [entry.name for entry in dataset.entries] == [f"box{i}.obj" for i in range(12)]
    assert {dataset.source(index) for index in range(12)} == {"boxes"}
    for index in range(12):
        occupied = np.argwhere(dataset[index]["ss"][0].numpy())
        low, high = occupied.min(0), occupied.max(0) + 1
        assert len(occupied) == np.prod(high - low) and (high - low >= 4).all()  # a solid box


def test_token_rows_are_read_and_a_lost_shard_is_made_again(old):
    pytest.importorskip("pyarrow")
    from scripts import to_tokens
    from trellis.tokens import parquet

    rows = list(parquet.read_shards(OLD / "tokens"))
    assert [row["sha256"] for row in rows] == [f"{i:064x}" for i in range(12)]
    assert [row["tokens"].tolist() for row in rows[:4]] == EXPECTED["ids"]
    assert [row["name"] for row in rows] == [f"box{i}.obj" for i in range(12)]
    dataset = SparseStructure(str(OLD / "voxels.npz"), resolution=16, split="all")
    assert [row["num_voxels"] for row in rows] == [int(dataset[index]["ss"].sum()) for index in range(12)]
    assert parquet.read_info(OLD / "tokens").tokenizer_hash == EXPECTED["hash"]

    manifest = (old / "tokens" / "tokens.json").read_bytes()
    (old / "tokens" / "shard-00001-of-00002.parquet").unlink()
    flags = ["--tokenizer", old / "tokenizer", "--data_dir", old / "voxels.npz", "--output_dir", old / "tokens"]
    assert to_tokens.main([*map(str, flags), "--iou", "--shard_size", "8", "--device", "cpu"]) == 0
    assert (old / "tokens" / "tokens.json").read_bytes() == manifest
    for row, again in zip(rows, parquet.read_shards(old / "tokens"), strict=True):
        assert again.keys() == row.keys()
        assert np.array_equal(again.pop("tokens"), row.pop("tokens"))
        assert abs(again.pop("iou") - row.pop("iou")) < 1e-6 and again == row
