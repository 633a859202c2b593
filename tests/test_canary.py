"""Saved tokenizers: the canary finds what is wrong, half precision is exact, and everyone may read the files."""

import json
import os
import stat
import struct
import warnings
from pathlib import Path

import pytest
import torch
from helpers import solid_grids, tiny_config
from safetensors.torch import load_file, save_file

from trellis import SparseStructureTokenizer
from trellis.models.vqvae import VqVae
from trellis.tokens import canary
from trellis.tokens.sources import CANARY, read_note
from trellis.utils.errors import CheckpointError, ConfigError
from trellis.utils.files import atomic_write

SHARED = {"n_embed": 32, "latent_channels": 4}
KINDS = {
    "one": {"name": "VectorQuantizer", "args": {**SHARED, "embed_dim": 4}},
    "averaged": {"name": "EMAVectorQuantizer", "args": {**SHARED, "embed_dim": 16}},
    "empty": {"name": "VectorQuantizer", "args": {**SHARED, "embed_dim": 4, "empty_code": True}},
    "several": {"name": "ResidualVectorQuantizer", "args": {**SHARED, "embed_dim": 8, "group": [1, 2, 1]}},
    "levels": {
        "name": "FiniteScalarQuantizer",
        "args": {"n_embed": 36, "levels": [6, 6], "embed_dim": 4, "latent_channels": 4},
    },
}


def make(kind: str = "one", resolution: int = 32, transformer: bool = False) -> SparseStructureTokenizer:
    """A tokenizer of random weights, whose codes are far enough apart for different ids."""
    torch.manual_seed(0)
    models = {**tiny_config("SparseStructureVqVaeTrainer")["models"], "quantizer": KINDS[kind]}
    if transformer:
        args = {"channels": 4, "lattice": 3 * [resolution // 4], "width": 8, "heads": 2, "layers_before": 1}
        models["transformer"] = {"name": "CodebookTransformer", "args": {**args, "layers_after": 1}}
    tokenizer = SparseStructureTokenizer(models, resolution)
    for name, value in tokenizer.named_parameters():
        if name.startswith("quantizer.embeddings") or "project_out" in name:
            value.data.normal_()
    return tokenizer


def load(folder: Path) -> SparseStructureTokenizer:
    """Load a tokenizer, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return SparseStructureTokenizer.load(folder)


def weights_in_bytes(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    return {
        name: tuple(8 + size + offset for offset in entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_without_a_word(tmp_path, kind):
    for number, transformer in enumerate([False] + [True] * (kind in ("one", "empty"))):
        tokenizer = make(kind, transformer=transformer)
        tokenizer.save_pretrained(tmp_path / str(number))
        assert load(tmp_path / str(number)).hash == tokenizer.hash
        note = read_note(tmp_path / str(number) / "model.safetensors", CANARY)
        assert len(note["ids"]) == tokenizer.num_tokens and len(set(note["ids"])) > 1
        assert note["logits"][0] < note["logits"][1]
        assert (0 in note["ids"]) or kind != "empty"


def test_the_same_tokenizer_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        make().save_pretrained(tmp_path / name)
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_flipped_bit_in_any_tensor_is_found(tmp_path, dtype):
    make(transformer=True).save_pretrained(tmp_path, dtype=dtype)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for start, end in weights_in_bytes(path).values():
        damaged = bytearray(whole)
        damaged[(start + end) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checksum differs"):
            SparseStructureTokenizer.load(tmp_path)


def test_a_changed_configuration_is_found(tmp_path):
    make("several").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for group in ([2, 1, 1], [1, 1, 2]):  # ids of the same number, which mean other blocks
        config["models"]["quantizer"]["args"]["group"] = group
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="config.json or this version or machine computes otherwise"):
            SparseStructureTokenizer.load(tmp_path)


def test_rounding_is_a_warning_and_other_arithmetic_an_error(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    encode, logits = canary._encode, canary._logits

    def flip(number: int):
        def flipped(models: VqVae, resolution: int, grid):
            ids = encode(models, resolution, grid)
            ids.view(-1)[:number] = (ids.view(-1)[:number] + 1) % 32
            return ids

        return flipped

    tokens = 8**3
    allowed = int(canary.TOKENS_THAT_FLIP * tokens)
    for number in (1, allowed):
        monkeypatch.setattr(canary, "_encode", flip(number))
        with pytest.warns(UserWarning, match=f"{number} of {tokens} tokens differ"):
            SparseStructureTokenizer.load(tmp_path)
    monkeypatch.setattr(canary, "_encode", flip(allowed + 1))
    with pytest.raises(CheckpointError, match=f"{allowed + 1} of {tokens} tokens differ"):
        SparseStructureTokenizer.load(tmp_path)
    monkeypatch.setattr(canary, "_encode", encode)

    low, high = read_note(tmp_path / "model.safetensors", CANARY)["logits"]
    for moved, error in ((1e-5, None), (1e-3, UserWarning), (0.02, CheckpointError), (float("nan"), CheckpointError)):
        monkeypatch.setattr(canary, "_logits", lambda *_, moved=moved: (low, high + moved * (high - low)))
        if error is None:
            load(tmp_path)
        else:
            with pytest.warns(error) if error is UserWarning else pytest.raises(error):
                SparseStructureTokenizer.load(tmp_path)
    monkeypatch.setattr(canary, "_logits", logits)
    load(tmp_path)


def test_folders_of_earlier_versions_have_no_canary(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path), path)
    assert load(tmp_path).hash == tokenizer.hash
    save_file(load_file(path), path, {CANARY: "{}"})
    with pytest.raises(CheckpointError, match="its canary cannot be read"):
        SparseStructureTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": "32"}, "resolution is '32'"),
        ({"resolution": 32.5}, "resolution is 32.5"),
        ({"weights": None}, "weights is None"),
        ({"ids": None}, "ids are not whole numbers"),
        ({"ids": [0.5] * 512}, "ids are not whole numbers"),
        ({"ids": [[0]]}, "ids are not whole numbers"),
        ({"ids": [32] + [0] * 511}, "an id that was saved is 32, of 32 now"),
        ({"ids": [-1] + [0] * 511}, "an id that was saved is -1"),
        ({"logits": [1.0]}, "logits are not two numbers"),
        ({"logits": ["a", 2.0]}, "logits are not two numbers"),
        ({"grid": 5}, "its canary cannot be read"),
    ],
)
def test_a_damaged_canary_is_an_error(tmp_path, changes, message):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path), path, {CANARY: json.dumps({**read_note(path, CANARY), **changes})})
    with pytest.raises(CheckpointError, match=message):
        SparseStructureTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "models, error, message",
    [
        (5, CheckpointError, "models has type integer; save_pretrained writes an object"),
        ({"encoder": 5}, ConfigError, "models.encoder has type integer"),
        ({"encoder": {"args": {}}}, ConfigError, "models.encoder.name is missing"),
        ({"transformer": None}, ConfigError, "models.transformer has type null"),
    ],
)
def test_a_config_that_was_edited_is_an_error(tmp_path, models, error, message):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["models"] = {**config["models"], **models} if isinstance(models, dict) else models
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        SparseStructureTokenizer.load(tmp_path)


def test_what_computes_no_numbers_is_not_saved(tmp_path):
    tokenizer = make()
    tokenizer.decoder.out_layer[2].bias.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- half precision ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_gives_the_rounded_weights_back(tmp_path, kind, dtype):
    tokenizer = make(kind)
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    tokenizer.save_pretrained(tmp_path / "half", dtype=dtype)
    tokenizer.save_pretrained(tmp_path / "full")
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())
    half = load(tmp_path / "half")
    for key, value in half.state_dict().items():
        wanted = before[key].to(dtype).float() if before[key].is_floating_point() else before[key]
        assert value.dtype == before[key].dtype and torch.equal(value, wanted)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {dtype}
    assert half.hash in (tmp_path / "half" / "README.md").read_text() and half.hash != tokenizer.hash
    half.save_pretrained(tmp_path / "again")  # in full precision: the same tokenizer
    assert load(tmp_path / "again").hash == half.hash
    ss = torch.from_numpy(solid_grids(2, 32, 0))[:, None]
    assert torch.equal(half.encode(ss), load(tmp_path / "again").encode(ss))


def test_half_precision_keeps_what_it_cannot_hold(tmp_path):
    tokenizer = make("averaged")
    tokenizer.quantizer.counts[0] = 1e6
    tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["quantizer.counts"].dtype == torch.float32 and stored["quantizer.sums"].dtype == torch.float16
    assert load(tmp_path).quantizer.counts[0] == 1e6
    with pytest.raises(ConfigError, match="dtype is torch.int8"):
        tokenizer.save_pretrained(tmp_path / "other", dtype=torch.int8)


# --- files ---


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_may_be_read_by_whom_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        make().save_pretrained(tmp_path / "saved")
        with atomic_write(tmp_path / "private") as partial:
            partial.touch(0o600)
    finally:
        os.umask(before)
    for path in (*(tmp_path / "saved").iterdir(), tmp_path / "private"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass  # the block must write the file
    assert not list(tmp_path.iterdir())


# --- what it says of itself ---


def test_print_says_what_it_is():
    text = str(make("several"))
    assert text == repr(make("several")) and "\n" not in text
    for fact in (
        "32 codes",
        "256 tokens of",
        "8×4×8",
        "grids of 32³",
        "cube",
        "up axis auto",
        make("several").hash[:12],
    ):
        assert fact in text
    assert "empty" not in text and "transformer" not in text
    text = str(make("empty", transformer=True))
    assert "id 0 for blocks without a voxel" in text and "transformer" in text
