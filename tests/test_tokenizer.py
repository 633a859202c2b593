"""The tokenizer object: its ids are the models' own, whatever file, folder, batch or process they come from."""

import json
import os
import re
import subprocess
import sys
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import DATA, PARITY, ROOT, assert_logits, make_tokenizer, solid_grids, tetrahedron, tiny_config
from safetensors.torch import load_file, save_file

from trellis import SparseStructureTokenizer, __version__
from trellis.grids.voxels import occupancy_to_points, write_ply
from trellis.models import build, from_pretrained
from trellis.runs import Run
from trellis.tokens.text import SHAPELLM
from trellis.trainers.vae.sparse_structure_vqvae import SparseStructureVqVaeTrainer
from trellis.utils.errors import CheckpointError, ConfigError, DataError

RESOLUTION = 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def make(seed: int = 0, **quantizer) -> SparseStructureTokenizer:
    """A tokenizer of 16³ grids with random weights; quantizer: {"name", "args"} in place of a VectorQuantizer's."""
    torch.manual_seed(seed)
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    if quantizer:
        models["quantizer"] = quantizer
    tokenizer = SparseStructureTokenizer(models, RESOLUTION, up_axis="y", info={"scores": {"iou": 0.5}})
    for name, value in tokenizer.quantizer.named_parameters():
        if name.startswith("embeddings"):
            value.data.normal_()  # far enough apart for different ids
    return tokenizer


def grids(number: int = 5) -> torch.Tensor:
    return torch.from_numpy(solid_grids(number, RESOLUTION, seed=3))[:, None]


QUANTIZERS = {
    "one": {"name": "VectorQuantizer", "args": {"n_embed": 32, "embed_dim": 4, "latent_channels": 4}},
    "along z": {"name": "EMAVectorQuantizer", "args": {"n_embed": 32, "embed_dim": 16, "latent_channels": 4}},
    "blocks": {
        "name": "VectorQuantizer",
        "args": {"n_embed": 32, "embed_dim": 32, "latent_channels": 4, "group": [2, 2, 2]},
    },
    "two codes": {"name": "ResidualVectorQuantizer", "args": {"n_embed": 32, "embed_dim": 8, "latent_channels": 4}},
    "a grid": {
        "name": "FiniteScalarQuantizer",
        "args": {"n_embed": 36, "levels": [6, 6], "embed_dim": 4, "latent_channels": 4},
    },
}


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_encode_and_decode_are_what_the_trainer_reconstructs(kind):
    tokenizer, ss = make(**QUANTIZERS[kind]), grids()
    models = {name: getattr(tokenizer, name) for name in ("encoder", "quantizer", "decoder")}
    with torch.no_grad():
        want = [SparseStructureVqVaeTrainer.reconstruct(models, grid[None]) for grid in ss]
    ids = tokenizer.encode(ss)
    assert ids.shape == (5, tokenizer.num_tokens) and ids.dtype == torch.int64
    assert torch.equal(ids, torch.cat([one.indices.flatten(1) for one in want]))
    logits = torch.cat([one.logits for one in want])
    assert torch.equal(tokenizer.decode(ids), tokenizer.decode(ids.to(torch.int32)))
    torch.testing.assert_close(tokenizer.decode(ids), logits, rtol=0, atol=1e-5)
    assert torch.equal(tokenizer.reconstruct(ss), tokenizer.decode(ids) > 0)
    assert torch.equal(tokenizer.to_coords(ids), torch.nonzero(tokenizer.decode(ids)[:, 0] > 0).int())


def test_shape_of_the_tokens():
    tokenizer = make(**QUANTIZERS["two codes"])
    assert (tokenizer.lattice, tokenizer.codes_per_token, tokenizer.num_tokens) == ((4, 4, 2), 2, 64)
    assert make(**QUANTIZERS["blocks"]).lattice == (2, 2, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_ids_do_not_depend_on_what_is_encoded_together(device):
    """Nor on what ran before: a GPU's layers are otherwise timed, and the quickest way rounds in its own manner."""
    tokenizer, ss = make().to(device), grids(19)
    together = tokenizer.encode(ss)
    assert torch.equal(together, torch.cat([tokenizer.encode(grid[0]) for grid in ss]))
    assert torch.equal(together.flip(0), tokenizer.encode(ss.flip(0)))
    logits = tokenizer.decode(together)
    assert torch.equal(logits, torch.cat([tokenizer.decode(row) for row in together]))


def test_grids_may_come_as_arrays_files_and_lists(tmp_path):
    tokenizer, ss = make(), grids(2)
    want = tokenizer.encode(ss)
    for i, grid in enumerate(ss):
        write_ply(tmp_path / f"{i}.ply", occupancy_to_points(grid[0]))
    files = [tmp_path / "0.ply", str(tmp_path / "1.ply")]
    for given in (ss.numpy(), ss.float() * 3 - 1, ss.to(torch.uint8), files, iter(files)):
        assert torch.equal(tokenizer.encode(given), want)
    assert torch.equal(tokenizer.encode(ss[1, 0].numpy()), want[1:])
    assert torch.equal(tokenizer.encode(files[0]), want[:1])


@pytest.mark.parametrize("up_axis", ["auto", "y", "z"])
def test_a_mesh_in_memory_is_that_of_its_file(up_axis, tmp_path):
    """A scene is all of its triangles, moved by its nodes; paths and points in it are left out."""
    trimesh = pytest.importorskip("trimesh")
    tokenizer = make_tokenizer()
    mesh = tetrahedron()
    mesh.export(tmp_path / "mesh.obj")  # of no known axis, as a mesh in memory
    scene = trimesh.Scene()
    half = np.diag([0.5, 0.5, 0.5, 1])
    for transform in (np.eye(4), half):
        scene.add_geometry(mesh, transform=transform)
    scene.add_geometry(trimesh.PointCloud(np.full((1, 3), 99.0)))
    both = trimesh.util.concatenate([mesh, mesh.copy().apply_transform(half)])
    both.export(tmp_path / "both.obj")
    for given, file in ((mesh, "mesh.obj"), (scene, "both.obj")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            want = tokenizer.encode(tmp_path / file, up_axis=up_axis)
            assert torch.equal(tokenizer.encode(given, up_axis=up_axis), want)
            mixed = tokenizer.encode([tmp_path / file, given], up_axis=up_axis)
        assert torch.equal(mixed, want.expand(2, -1))
    if up_axis == "auto":
        with pytest.warns(
            UserWarning, match="a Trimesh does not say which axis is up: taken as z-up. Say it by up_axis"
        ):
            tokenizer.encode(mesh, up_axis="auto")


def test_what_is_no_mesh_is_refused_in_words():
    trimesh = pytest.importorskip("trimesh")
    tokenizer = make_tokenizer()
    for given, name in (
        (3, "a int is no mesh"),
        (object(), "a object is no mesh"),
        ([3], "a int among them is no mesh"),
    ):
        with pytest.raises(TypeError, match=f"{name}.*; give grids as a tensor or an array, the path of a mesh"):
            tokenizer.encode(given)
    with pytest.raises(DataError, match="the Scene: has no triangles"):
        tokenizer.encode(trimesh.Scene(), up_axis="y")
    with pytest.raises(DataError, match=r"the Trimesh: vertex \[0.0, nan, 0.0\] is not finite"):
        tokenizer.encode(
            trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], process=False), up_axis="y"
        )


def test_a_mesh_is_what_voxelize_makes_of_it(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("numba")
    from dataset_toolkits import voxelize

    tokenizer = make()
    mesh = trimesh.creation.cylinder(radius=0.7, height=3.0)
    (tmp_path / "meshes").mkdir()
    for suffix in ("glb", "ply"):
        mesh.export(tmp_path / "meshes" / f"mesh.{suffix}")
        path = tmp_path / "meshes" / f"mesh.{suffix}"
        out = tmp_path / suffix
        line = ["--input", str(path), "--output_dir", str(out), "--up_axis", "y", "--resolution", str(RESOLUTION)]
        assert voxelize.main(line) == 0
        assert torch.equal(tokenizer.encode(path), tokenizer.encode(next((out / "voxels").glob("*.ply"))))


def test_a_saved_tokenizer_gives_the_same_ids_in_a_fresh_process(tmp_path):
    tokenizer = make(**QUANTIZERS["along z"])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    np.save(tmp_path / "grids.npy", grids().numpy())
    code = (
        "import sys, json, numpy as np\nfrom trellis import SparseStructureTokenizer\n"
        "tokenizer = SparseStructureTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.encode(np.load(sys.argv[2]))\n"
        "print(json.dumps([tokenizer.hash, tokenizer.settings, tokenizer.info, ids.tolist()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path / "grids.npy")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout) == [
        tokenizer.hash,
        tokenizer.settings,
        tokenizer.info,
        tokenizer.encode(grids()).tolist(),
    ]


def test_the_hash_is_that_of_settings_and_weights():
    assert make(seed=0).hash == make(seed=0).hash
    others = [make(seed=1), make(**QUANTIZERS["one"])]
    others.append(SparseStructureTokenizer(make().specs, RESOLUTION, up_axis="z"))
    others[-1].load_state_dict(make().state_dict())
    changed = make()
    changed.decoder.out_layer[2].bias.data += 1e-3
    assert make().hash not in {others[0].hash, others[2].hash, changed.hash}
    assert make().hash == others[1].hash  # the same settings, written out


def test_a_folder_without_a_version_is_version_1_and_a_newer_one_is_refused(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("format_version") == 1
    path.write_text(json.dumps(config))  # as written before there were versions
    assert SparseStructureTokenizer.load(tmp_path).hash == tokenizer.hash
    for version, message in (
        (2, f"its format version is 2, but trellis-vqvae {__version__} reads versions up to 1; install a newer"),
        ("1", "its format version is '1', but must be a whole number"),
        (True, "its format version is True, but must be a whole number"),
    ):
        path.write_text(json.dumps({**config, "format_version": version}))
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")):
            SparseStructureTokenizer.load(tmp_path)


def test_push_to_hub_sends_the_folder(tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    sent = {}

    class Repo:
        repo_id = "someone/tokens"

    def upload_folder(self, *, repo_id, folder_path, **_):
        sent.update(repo=repo_id, files={path.name: path.read_bytes() for path in folder_path.iterdir()})
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    tokenizer = make()
    tokenizer.push_to_hub("someone/tokens")
    tokenizer.save_pretrained(tmp_path / "here")
    assert sent["repo"] == "someone/tokens"
    assert sent["files"] == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    card = sent["files"]["README.md"].decode()
    for fact in (tokenizer.hash, "4 × 4 × 4", "| up axis | y |", "| normalization | cube |", "| iou | 0.5000 |"):
        assert fact in card


def test_a_tokenizer_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import hub_mixin

    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "hub")

    def download(repo_id=None, filename=None, *_, **options):
        assert repo_id == "someone/tokens" and options["revision"] == "v2"
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    assert SparseStructureTokenizer.from_pretrained("someone/tokens", revision="v2").hash == tokenizer.hash


def test_a_run_gives_its_averaged_weights_and_what_its_data_were(tmp_path, data_dir, write_config, capsys):
    import train
    from scripts import export_pretrained

    run = tmp_path / "run"
    config = write_config(tiny_config("SparseStructureVqVaeTrainer", ema_rate=0.5))
    assert train.main(["--config", config, "--data_dir", data_dir, "--output_dir", str(run), "--device", "cpu"]) == 0
    tokenizer = SparseStructureTokenizer.load(run)
    export_pretrained.main(["--run", str(run), "--output_dir", str(tmp_path / "exported")])
    for name in ("encoder", "quantizer", "decoder"):
        exported = load_file(tmp_path / "exported" / f"{name}.safetensors")
        state = getattr(tokenizer, name).state_dict()
        assert state.keys() == exported.keys() and all(torch.equal(state[key], exported[key]) for key in state)
    assert (tokenizer.resolution, tokenizer.normalization, tokenizer.up_axis) == (16, "cube", "keep")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder says everything
        assert SparseStructureTokenizer.load(tmp_path / "exported").hash == tokenizer.hash
    assert tokenizer.info["training"]["step"] == 6 and 0 <= tokenizer.info["scores"]["iou"] <= 1
    assert SparseStructureTokenizer.from_run(run, ckpt="4", up_axis="z").settings["up_axis"] == "z"
    with pytest.raises(CheckpointError, match="outputs/stage2"):
        SparseStructureTokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        SparseStructureTokenizer.from_run(tmp_path)
    with pytest.raises(CheckpointError, match="from_run"):
        SparseStructureTokenizer.from_pretrained(run)


def test_an_exported_folder_of_an_earlier_version(tmp_path):
    tokenizer = make(**QUANTIZERS["along z"])
    for name, spec in tokenizer.specs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
        state = {key: value.contiguous() for key, value in getattr(tokenizer, name).state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.warns(UserWarning, match="resolution 64, normalization cube, up_axis keep is taken"):
        assert SparseStructureTokenizer.load(tmp_path).settings["resolution"] == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = {"resolution": RESOLUTION, "normalization": "cube", "up_axis": "y"}
        assert SparseStructureTokenizer.from_exported(tmp_path, **given).hash == tokenizer.hash
    state = {key: value.contiguous() for key, value in tokenizer.quantizer.state_dict().items()}
    save_file(state, tmp_path / "quantizer.safetensors", {"grids": '{"resolution": 32, "side": 1}'})
    with pytest.raises(CheckpointError, match="says side of its grids, which this version does not know"):
        SparseStructureTokenizer.load(tmp_path)
    (tmp_path / "quantizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="quantizer.safetensors: there is no such file"):
        SparseStructureTokenizer.load(tmp_path)
    (tmp_path / "quantizer.json").unlink()
    with pytest.raises(CheckpointError, match="quantizer.json: there is no such file"):
        SparseStructureTokenizer.load(tmp_path)
    (tmp_path / "transformer.json").write_text("{}")
    make().save_pretrained(tmp_path)  # a saved tokenizer comes first
    assert SparseStructureTokenizer.load(tmp_path).hash == make().hash


def test_text_of_lists_and_of_no_object():
    tokenizer = make()
    ids = tokenizer.encode(grids())
    assert tokenizer.to_text(ids.tolist()) == tokenizer.to_text(ids)
    assert tokenizer.to_text(ids[0].tolist()) == tokenizer.to_text(ids[0])
    assert tokenizer.from_text([]).shape == (0, tokenizer.num_tokens)


@pytest.mark.parametrize("form", [None, "dense", "octree", "octree-depth"])
@pytest.mark.parametrize("kind", ["one", "two codes", "blocks"])
def test_text_of_every_form_gives_the_ids_back(kind, form):
    quantizer = {**QUANTIZERS[kind], "args": {**QUANTIZERS[kind]["args"], "empty_code": True}}
    tokenizer = make(**quantizer)
    ids = tokenizer.encode(grids())
    texts = tokenizer.to_text(ids, form)
    assert torch.equal(tokenizer.from_text(texts, form=form), ids)
    assert torch.equal(tokenizer.from_text(tokenizer.to_text(ids[0], form), form=form), ids[0])
    assert ("<octree" in texts[0]) == (form != "dense")
    cut = texts[0].removesuffix("<mesh-end>")
    with pytest.raises(DataError, match="has no end"):
        tokenizer.from_text(cut, form=form)
    with pytest.warns(UserWarning, match="has no end"):
        assert torch.equal(tokenizer.from_text(cut, strict=False, form=form), ids[0])


def test_forms_that_a_tokenizer_does_not_have():
    tokenizer = make()
    assert tokenizer.token_format() == tokenizer.token_format(form="dense")
    for form, message in (("octree", "no id for empty blocks"), ("spiral", "must be dense, octree, octree-depth")):
        with pytest.raises(ConfigError, match=message):
            tokenizer.to_text(torch.zeros(tokenizer.num_tokens, dtype=torch.int64), form)


# --- ShapeLLM-Omni's layout ---


@pytest.mark.parametrize("parity", PARITY)
def test_shapellm_parity(parity, tmp_path):
    folder = parity / "shapellm_vqvae"
    tokenizer = SparseStructureTokenizer.load(folder / "3DVQVAE_small.bin")
    expected = load_file(folder / "expected.safetensors")
    ids = tokenizer.encode(expected["x"])
    assert torch.equal(ids, expected["tokens"].long())
    assert_logits(tokenizer.decode(ids), expected, atol=1e-3)

    tokenizer.export_shapellm(tmp_path / "again.bin")
    again, original = (
        torch.load(path, weights_only=True) for path in (tmp_path / "again.bin", folder / "3DVQVAE_small.bin")
    )
    assert again.keys() == original.keys() and all(torch.equal(again[key], original[key]) for key in again)


@pytest.mark.parametrize("depth, middle, channels", [(1, 0, [4, 8, 8]), (3, 1, [4, 8]), (2, 2, [2, 4, 8, 8])])
def test_sizes_are_read_from_the_tensors(tmp_path, depth, middle, channels):
    torch.manual_seed(0)
    shape = {"latent_channels": 2, "num_res_blocks": depth, "num_res_blocks_middle": middle}
    models = {
        "encoder": {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": channels, **shape}},
        "decoder": {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": channels[::-1], **shape}},
        "quantizer": {"name": "VectorQuantizer", "args": {"n_embed": 16, "embed_dim": 8, "latent_channels": 2}},
    }  # fmt: skip
    encoder, decoder = build(models["encoder"]), build(models["decoder"])
    state = {f"Encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {f"Decoder.{key}": value for key, value in decoder.state_dict().items()}
    torch.save({**state, "vq.embeddings.weight": torch.randn(16, 8)}, tmp_path / "vae.bin")
    tokenizer = SparseStructureTokenizer.from_shapellm(tmp_path / "vae.bin")
    for name, own in (("encoder", encoder), ("decoder", decoder)):
        given = models[name]["args"]
        assert {key: value for key, value in tokenizer.specs[name]["args"].items() if key in given} == given
        assert all(
            torch.equal(getattr(tokenizer, name).state_dict()[key], value) for key, value in own.state_dict().items()
        )
    assert (tokenizer.normalization, tokenizer.up_axis) == ("shapellm", "y")


def test_what_that_layout_cannot_hold_is_refused(tmp_path):
    for kind in ("two codes", "blocks", "a grid"):
        with pytest.raises(ConfigError, match="one table"):
            make(**QUANTIZERS[kind]).export_shapellm(tmp_path / "x.bin")
    with pytest.warns(UserWarning, match="normalize meshes"):
        make(**QUANTIZERS["along z"]).export_shapellm(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="exists already"):
        make().export_shapellm(tmp_path / "x.bin")
    state = torch.load(tmp_path / "x.bin", weights_only=True)
    torch.save({**state, "quant_conv.weight": torch.zeros(1)}, tmp_path / "more.bin")
    torch.save({key: value for key, value in state.items() if "conv2.bias" not in key}, tmp_path / "less.bin")
    for name, message in (("more", "quant_conv"), ("less", "conv2.bias")):
        with pytest.raises(CheckpointError, match=message):
            SparseStructureTokenizer.from_shapellm(tmp_path / f"{name}.bin")


def test_export_says_that_the_file_does_not_know_the_normalization(tmp_path):
    tokenizer = make(**QUANTIZERS["along z"])
    with pytest.warns(UserWarning, match='normalization="cube", up_axis="y"'):
        tokenizer.export_shapellm(tmp_path / "x.bin")
    again = SparseStructureTokenizer.from_shapellm(tmp_path / "x.bin", normalization="cube", up_axis="z")
    assert (again.normalization, again.up_axis) == ("cube", "z")


@pytest.mark.parametrize("up_axis", ["auto", "keep", "y", "z"])
@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl"])
def test_a_mesh_comes_back_with_the_axes_it_went_in_with(tmp_path, up_axis, suffix):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    tokenizer = SparseStructureTokenizer(make().specs, RESOLUTION, up_axis=up_axis)
    mesh = trimesh.creation.box((1.0, 0.25, 0.5))
    mesh.export(tmp_path / f"in.{suffix}")
    grid = tokenizer.grid_of_file(tmp_path / f"in.{suffix}")
    tokenizer.decode = lambda ids, precision="fp32": grid[None].float() - 0.5  # a perfect reconstruction
    tokenizer.save_mesh(torch.zeros(1, tokenizer.num_tokens), tmp_path / f"out.{suffix}")
    extents = trimesh.load(tmp_path / f"out.{suffix}", force="mesh").extents
    assert np.allclose(extents / extents.max(), (1.0, 0.25, 0.5), atol=2 / RESOLUTION)  # whole cells


def pointer(resolution: int = RESOLUTION) -> torch.Tensor:
    """A grid [R, R, R] bool that looks different from every side: a cone that stands, with an arm to +x."""
    x, y, z = np.indices((resolution,) * 3)
    middle = resolution / 2 - 0.5
    cone = np.hypot(x - middle, y - middle) <= 0.45 * (resolution - 1 - z)
    arm = (abs(z - 3) <= 1) & (abs(y - middle - 1) <= 1) & (x > middle)
    return torch.from_numpy(cone | arm)


@pytest.mark.parametrize("normalization", ["cube", "shapellm"])
def test_files_of_one_grid_stand_by_the_rule_of_their_format_and_read_back_alike(tmp_path, normalization):
    pytest.importorskip("skimage")
    from trellis.grids.meshes import load_mesh
    from trellis.grids.placing import turn_to_z_up
    from trellis.grids.surface import surface_mesh

    tokenizer = SparseStructureTokenizer(make().specs, RESOLUTION, normalization)
    assert tokenizer.up_axis == "auto"
    grid = pointer()
    tokenizer.decode = lambda ids, precision="fp32": grid[None, None].float() - 0.5
    want = surface_mesh(grid.numpy())
    exact = sorted(want.triangles.astype(np.float32).reshape(-1, 9).tolist())
    for suffix, up in (("glb", "y"), ("stl", "z"), ("ply", None), ("obj", None)):
        path = tmp_path / f"mesh.{suffix}"
        tokenizer.save_mesh(torch.zeros(tokenizer.num_tokens), path)
        geometry = load_mesh(path)
        assert (geometry.up or geometry.usual_up) == up
        y_up = up == "y" or (up is None and normalization == "shapellm")  # which takes other files as y-up
        vertices = turn_to_z_up(geometry.vertices) if y_up else geometry.vertices
        if suffix == "obj":  # as text, with eight digits
            assert np.array_equal(geometry.faces, want.faces) and np.abs(vertices - want.vertices).max() < 1e-8
        else:
            assert sorted(vertices[geometry.faces].reshape(-1, 9).tolist()) == exact


def test_what_is_encoded_comes_back_standing_and_is_encoded_alike(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    pytest.importorskip("numba")
    from trellis.grids.placing import turn_to_y_up
    from trellis.grids.surface import surface_mesh

    tokenizer = SparseStructureTokenizer(make().specs, RESOLUTION)
    shape = surface_mesh(pointer().numpy())
    trimesh.Trimesh(turn_to_y_up(shape.vertices), shape.faces, process=False).export(tmp_path / "in.glb")
    grid = tokenizer.grid_of_file(tmp_path / "in.glb")
    above, below = grid[0, :, :, RESOLUTION // 2 :].sum(), grid[0, :, :, : RESOLUTION // 2].sum()
    assert above < below / 2  # the cone stands
    tokenizer.decode = lambda ids, precision="fp32": grid[None].float() - 0.5  # a perfect reconstruction
    for suffix in ("glb", "stl", "ply"):
        tokenizer.save_mesh(torch.zeros(tokenizer.num_tokens), tmp_path / f"out.{suffix}")
    again = [tokenizer.grid_of_file(tmp_path / f"out.{suffix}") for suffix in ("glb", "stl", "ply")]
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], again[2])
    assert again[0][0, :, :, RESOLUTION // 2 :].sum() < again[0][0, :, :, : RESOLUTION // 2].sum() / 2


def test_the_axes_of_files_may_be_taken_and_written_in_another_way(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    pytest.importorskip("numba")
    from trellis.grids.meshes import mesh_to_grid

    path = tmp_path / "box.glb"
    trimesh.creation.box((1.0, 0.25, 0.5)).export(path)
    tokenizer = SparseStructureTokenizer(make().specs, RESOLUTION)
    for up_axis in ("auto", "y", "z", "keep"):
        grid = mesh_to_grid(path, RESOLUTION, up_axis)
        assert torch.equal(tokenizer.grid_of_file(path, up_axis), grid)
        assert torch.equal(tokenizer.encode(path, up_axis=up_axis), tokenizer.encode(grid[None]))
        tokenizer.decode = lambda ids, precision="fp32", grid=grid: grid[None].float() - 0.5
        tokenizer.save_mesh(torch.zeros(tokenizer.num_tokens), tmp_path / f"{up_axis}.glb", up_axis=up_axis)
        extents = trimesh.load(tmp_path / f"{up_axis}.glb", force="mesh").extents
        assert np.allclose(extents / extents.max(), (1.0, 0.25, 0.5), atol=2 / RESOLUTION)
    assert torch.equal(tokenizer.grid_of_file(path), mesh_to_grid(path, RESOLUTION, "y"))
    write_ply(tmp_path / "voxels.ply", np.zeros((1, 3), np.float32) + 0.5 / RESOLUTION)
    for file in (path, tmp_path / "voxels.ply"):
        with pytest.raises(ConfigError, match="up_axis 'x'"):
            tokenizer.encode(file, up_axis="x")
    with pytest.raises(ValueError, match="no grids or files to encode"):
        tokenizer.encode([])
    for name, content, reason in (
        ("scan.NII.gz", b"", "is a volume \\(NIfTI\\). Make grids of it with voxelize.py"),
        ("cut.ply", b"ply\nformat ascii 1.0\nelement vertex 3\n", 'has no "end_header": it is cut or damaged'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            tokenizer.encode(tmp_path / name)
    with pytest.raises(ValueError, match="up_axis 'y' goes with meshes"):
        tokenizer.encode(grid[None], up_axis="y")
    with pytest.raises(ConfigError, match="up_axis 'x'"):
        tokenizer.save_mesh(torch.zeros(tokenizer.num_tokens), tmp_path / "x.glb", up_axis="x")


@pytest.mark.parametrize(
    ("suffix", "unknown"), [("obj", True), ("ply", True), ("off", True), ("glb", False), ("stl", False)]
)
def test_a_file_that_does_not_say_which_axis_is_up_warns_unless_told(tmp_path, suffix, unknown):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("numba")
    path = tmp_path / f"box.{suffix}"
    trimesh.creation.box((1.0, 0.25, 0.5)).export(path)
    tokenizer = SparseStructureTokenizer(make().specs, RESOLUTION)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tokenizer.encode([path, path])
    said = [str(warning.message) for warning in warned]
    asked = f'{path}: its format does not say which axis is up: taken as z-up. Say it by up_axis="y" or "z"'
    assert said == [asked] * 2 * unknown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for up_axis in ("y", "z", "keep"):
            tokenizer.encode(path, up_axis=up_axis)


def test_settings_may_be_given_when_a_tokenizer_is_loaded(tmp_path):
    make().save_pretrained(tmp_path / "saved")
    make(**QUANTIZERS["along z"]).save_pretrained(tmp_path / "along_z")
    with pytest.warns(UserWarning):
        SparseStructureTokenizer.load(tmp_path / "along_z").export_shapellm(tmp_path / "x.bin")
    for source, before in ((tmp_path / "saved", ("y", "cube")), (tmp_path / "x.bin", ("y", "shapellm"))):
        tokenizer = SparseStructureTokenizer.load(source)
        assert (tokenizer.up_axis, tokenizer.normalization) == before
        other = SparseStructureTokenizer.load(source, up_axis="auto", normalization="cube")
        assert (other.up_axis, other.normalization) == ("auto", "cube") and other.hash != tokenizer.hash
        assert torch.equal(other.encoder.input_layer.weight, tokenizer.encoder.input_layer.weight)
        with pytest.raises(ConfigError, match="up_axis 'keep': normalization \"shapellm\""):
            SparseStructureTokenizer.load(source, "keep", "shapellm")


@pytest.mark.parametrize(
    "axes, up_axis, warned",
    [
        (("y",), "y", False),
        (("z", "z"), "z", False),
        (("keep", "keep"), "keep", False),
        ((None, None), "keep", False),  # as before there was another choice
        (("auto",), "auto", False),
        (("y", "z"), "auto", False),  # all grids are z-up
        (("auto", "z"), "auto", False),
        (("y", "keep"), "auto", True),
        (("z", None), "auto", True),
    ],
)
def test_the_up_axis_of_a_run_is_what_holds_for_its_data(tmp_path, axes, up_axis, warned, recwarn):
    import train

    roots = []
    for number, axis in enumerate(axes):
        bits = np.packbits(solid_grids(4, RESOLUTION, number).reshape(4, -1), axis=1)
        texts = {"split": np.array(["train", "train", "train", "val"])}
        texts |= {} if axis is None else {"up_axis": np.full(4, axis)}
        roots.append(str(tmp_path / f"{number}.npz"))
        np.savez(roots[-1], bits=bits, **texts)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config("SparseStructureVqVaeTrainer", max_steps=1)))
    flags = ["--config", str(config), "--data_dir", ",".join(roots), "--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--device", "cpu"]) == 0
    recwarn.clear()
    tokenizer = SparseStructureTokenizer.load(tmp_path / "run")
    said = [str(warning.message) for warning in recwarn if "up_axis" in str(warning.message)]
    assert tokenizer.up_axis == up_axis and len(said) == warned
    assert not warned or all(root in said[0] for root in roots)
    recwarn.clear()
    assert SparseStructureTokenizer.load(tmp_path / "run", up_axis="z").up_axis == "z"
    assert not [warning for warning in recwarn if "up_axis" in str(warning.message)]


def test_data_that_say_a_setting_that_does_not_exist_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(Run, "data_setting", {"up_axis": "Y", "normalization": "sphere"}.get)
    for given, message in (({}, "up_axis 'Y'"), ({"up_axis": "z"}, "normalization 'sphere'")):
        with pytest.raises(ConfigError, match=f"stage2: {message}: must be.*from_run\\(..., normalization="):
            SparseStructureTokenizer.load(DATA / "v0.1.0" / "stage2", **given)
    tokenizer = SparseStructureTokenizer.load(DATA / "v0.1.0" / "stage2", "z", "cube")
    assert (tokenizer.up_axis, tokenizer.normalization) == ("z", "cube")


def test_id_text_id_file_id(tmp_path):
    tokenizer = make()
    ids = tokenizer.encode(grids())
    (tmp_path / "objects.txt").write_text("\n".join(tokenizer.to_text(ids)))
    assert torch.equal(tokenizer.from_text((tmp_path / "objects.txt").read_text().splitlines()), ids)
    assert torch.equal(tokenizer.from_text(tokenizer.to_text(ids[2])), ids[2])
    large = make(name="VectorQuantizer", args={**QUANTIZERS["one"]["args"], "n_embed": 8192})
    assert SHAPELLM == large.token_format(first_id=151665)
    with pytest.raises(DataError):
        tokenizer.from_text("<mesh-start><mesh0><mesh-end>")
    with pytest.warns(UserWarning, match="text 0 is repaired"):
        repaired = tokenizer.from_text("<mesh-start><mesh7><mesh-end>", strict=False)
    assert repaired[0] == 7 and torch.equal(repaired[1:], tokenizer.empty_ids[1:])


def test_bf16_ids_agree_mostly_and_it_says_how_many():
    tokenizer, ss = make(), grids()
    equal = (tokenizer.encode(ss, precision="bf16") == tokenizer.encode(ss)).float().mean().item()
    assert 0.5 < tokenizer.agreement(ss) == equal
    assert tokenizer.agreement(ss, "fp32") == 1
    with pytest.raises(ValueError, match="fp32 or bf16"):
        tokenizer.encode(ss, precision="fp16")


# --- what it refuses ---


def test_grids_and_ids_of_another_shape_are_errors(tmp_path):
    tokenizer = make()
    ids = tokenizer.encode(grids(1))
    for wrong in (torch.zeros(2, 16, 16, 16), torch.zeros(1, 1, 8, 8, 8), torch.zeros(0, 1, 16, 16, 16)):
        with pytest.raises(ValueError, match="grids must be"):
            tokenizer.encode(wrong)
    for wrong in (ids[:, 1:], ids.float(), ids[None]):
        with pytest.raises(ValueError, match="ids must be"):
            tokenizer.decode(wrong)
    for value in (-1, 32):
        with pytest.raises(ValueError, match=f"an id is {value}"):
            tokenizer.decode(torch.where(torch.arange(64) == 3, value, ids))
    for path, message in ((tmp_path / "gone.glb", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=message):
            tokenizer.encode(path)
    with pytest.raises(ConfigError, match="no folder"):
        tokenizer.save_mesh(ids, tmp_path / "gone" / "mesh.glb")
    with pytest.raises(ValueError, match="one object"):
        tokenizer.save_mesh(ids.repeat(2, 1), tmp_path / "mesh.glb")
    (tmp_path / "mesh.glb").write_bytes(b"glTF")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        SparseStructureTokenizer.load(tmp_path / "mesh.glb")


def test_models_that_do_not_fit_are_errors():
    models = make().specs
    cases = [
        ({"models": {"encoder": models["encoder"]}}, "models.quantizer is missing"),
        ({"models": models, "resolution": 18}, "resolution is 18"),
        ({"models": models, "resolution": 0}, "resolution is 0"),
        ({"models": models, "up_axis": "x"}, "up_axis"),
        ({"models": models, "normalization": "sphere"}, "normalization"),
        (
            {
                "models": {
                    **models,
                    "quantizer": {
                        "name": "VectorQuantizer",
                        "args": {"embed_dim": 12, "latent_channels": 4, "group": [1, 1, 3]},
                    },
                },
                "resolution": 16,
            },
            "quantizer",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(ConfigError, match=message):
            SparseStructureTokenizer(**settings)


def test_nothing_is_overwritten_and_damage_is_named(tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        make(seed=1).save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    (tmp_path / "a" / "model.safetensors").write_bytes(before[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        SparseStructureTokenizer.load(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        SparseStructureTokenizer.from_pretrained(tmp_path / "a")
    for source in ("./gone", "a/b/c", "gone"):
        with pytest.raises(CheckpointError, match="gone|a/b/c"):
            SparseStructureTokenizer.load(source)


@pytest.mark.parametrize("load", [SparseStructureTokenizer.load, SparseStructureTokenizer.from_pretrained])
def test_a_hub_out_of_reach_is_asked_once(load, tmp_path, monkeypatch):
    """Its client would try six times within half a minute."""
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.chdir(tmp_path)
    message = rf"^outputs/x: there is no such file or folder in {tmp_path}, .* cannot be reached \(Name or service not"
    with pytest.raises(CheckpointError, match=message):
        load("outputs/x")
    assert len(calls) == 1
    with pytest.raises(CheckpointError, match="^a/b/sub/encoder: there is no such file or folder .* cannot be reached"):
        from_pretrained("a/b/sub/encoder")
    assert len(calls) == 2


def test_files_of_a_tokenizer_are_no_tokenizers(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "a")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=rf"{name}: is part of a tokenizer\. Give its folder, {tmp_path / 'a'}"
        ):
            SparseStructureTokenizer.load(tmp_path / "a" / name)


def test_a_slip_in_a_path_does_not_ask_the_hub(tmp_path, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(SparseStructureTokenizer, "from_pretrained", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    message = r"outputs/stage: outputs/ has no file or folder stage\. .*from_pretrained"
    with pytest.raises(CheckpointError, match=message):
        SparseStructureTokenizer.load("outputs/stage")
    with pytest.raises(AssertionError, match="asked"):
        SparseStructureTokenizer.load("someone/stage")
