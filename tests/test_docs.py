"""What is in docs/: notebook and recipes run, the reference builds, and what is public has a docstring."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ROOT

import trellis.modules.quantizers
import trellis.tokens

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "mesh_to_tokens.ipynb"
LARGEST_NOTEBOOK = 200_000  # bytes

# What a comment before a block of a document, <!-- run: one step, … -->, adds to its calls of train.py.
ADDED = {
    "tryrun": ["--tryrun"],
    "one step": [f"--set trainer.args.{name}" for name in ("max_steps=1", "i_eval=100", "i_sample=100")],
    "one sample": ["--set trainer.args.batch_size_per_gpu=1"],
    "64 codes": ["--set models.quantizer.args.n_embed=64"],
    "small networks": [
        f"--set models.{model}.args.{argument}"
        for model, channels in (("encoder", "[8,32,64]"), ("decoder", "[64,32,8]"))
        for argument in (f"channels={channels}", "num_res_blocks=1", "num_res_blocks_middle=1")
    ],
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECORD = r"""python() { printf '%s\0' "$@"; echo; }"""
MARK = re.compile(r"<!-- run(?:: (.*))? -->\n\Z")


class Block(NamedTuple):
    """A fenced block of a document. added: flags for train.py, or None where it is not to be run."""

    line: int
    language: str
    code: str
    added: str | None
    text_before: str


def blocks(path: Path) -> Iterator[Block]:
    text, done = path.read_text(encoding="utf-8"), 0
    for found in BLOCK.finditer(text):
        before = text[done : found.start()]
        mark = MARK.search(before)
        wishes = [wish for wish in (mark[1] or "").split(", ") if wish] if mark else []
        added = " ".join(flag for wish in wishes for flag in ADDED[wish]) if mark else None
        yield Block(text.count("\n", 0, found.start()) + 2, found[1], found[2], added, before)
        done = found.end()


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """What the recipes take for granted: configurations, meshes, a run, a tokenizer file, two scans."""
    for package in ("trimesh", "open3d", "pebble", "skimage", "pyarrow", "matplotlib"):
        pytest.importorskip(package)
    (tmp_path / "pretrained").mkdir()  # where the recipes write too
    for name in ("configs", "pretrained/demo_vae"):
        (tmp_path / name).symlink_to(ROOT / name)
    for folder in ("meshes/chairs", "meshes/chairs_val", "meshes/organs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # small enough for a CPU
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    grids = make_meshes()
    make_run(grids)
    make_shapellm_file(grids)
    for case, edge in (("case_01", 9), ("case_02", 11)):
        x, y, z = np.indices((40, 30, 14)) - np.array([16, 15, 7])[:, None, None, None]
        liver = (x / edge) ** 2 + (y / 8) ** 2 + (z / 4) ** 2 < 1
        spleen = (abs(x - 18) < 4) & (abs(y) < edge / 2) & (abs(z) < 3)
        np.save(f"{case}.npy", np.where(liver, 1, np.where(spleen, 2, 0)))
    return tmp_path


def make_meshes() -> torch.Tensor:
    """Write chairs; returns the grids of some, uint8 [2, 1, 64, 64, 64]."""
    from dataset_toolkits.shapes.make_shapes import make_shape, write_shape
    from trellis.grids.meshes import mesh_to_grid

    for folder, numbers in (("chairs", range(2)), ("chairs_val", range(2, 3))):
        for number in numbers:
            write_shape(make_shape(0, "train", 13 * number), Path(f"meshes/{folder}/{number}.obj"))
    return torch.stack([mesh_to_grid(f"meshes/chairs/{number}.obj", 64) for number in range(2)])


def make_run(grids: torch.Tensor) -> None:
    """Train for a step into outputs/general."""
    from trellis.grids.voxels import pack_bits

    Path("data").mkdir()
    np.savez("data/general_train.npz", bits=pack_bits(grids[:, 0]))
    run_bash(
        "python train.py --config configs/vae/demo_stage1.json --data_dir data/general_train.npz "
        "--output_dir outputs/general",
        " ".join(ADDED["64 codes"] + ADDED["one step"]),
    )


def make_shapellm_file(grids: torch.Tensor) -> None:
    """Write 3DVQVAE.bin: the demo's networks around 8192 codes that are latents of the grids."""
    from trellis import SparseStructureTokenizer
    from trellis.models import from_pretrained

    encoder, decoder = (from_pretrained(f"pretrained/demo_vae/{name}") for name in ("encoder", "decoder"))
    specs = json.loads(Path("configs/vae/demo_stage1.json").read_text())["models"]
    specs["quantizer"]["args"] = {"n_embed": 8192, "embed_dim": 32}
    tokenizer = SparseStructureTokenizer(specs)
    tokenizer.encoder.load_state_dict(encoder.state_dict())
    tokenizer.decoder.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        latents = tokenizer.quantizer.to_vectors(encoder(grids.float())).flatten(0, 3)  # [2 · 1024, 32]
    tokenizer.quantizer.fill(latents[torch.arange(8192) % len(latents)])
    tokenizer.export_shapellm("3DVQVAE.bin")


def run_bash(code: str, added: str) -> None:
    """Let bash read the commands, and run what they call Python for in this process, which has loaded torch."""
    found = subprocess.run(["bash", "-euo", "pipefail", "-c", f"{RECORD}\n{code}"], capture_output=True, check=True)
    calls = [call.decode().split("\0") for call in found.stdout.split(b"\0\n")[:-1]]
    assert len(calls) == len(re.findall(r"^python ", code, re.MULTILINE)) > 0
    for path, *flags in calls:
        program = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        if path == "train.py":
            flags += [*added.split(), "--auto_retry", "0"]
        assert program.main(flags) == 0, f"{path} {' '.join(flags)}"


def test_the_recipes_run(workplace):
    for block in blocks(DOCS / "recipes.md"):
        if block.added is None:
            continue
        try:
            if block.language == "bash":
                run_bash(block.code, block.added)
            else:
                exec(compile(block.code, "recipes.md", "exec"), {"__name__": "__main__"})
        except Exception as error:
            raise AssertionError(f"docs/recipes.md, line {block.line}: {error}") from error
    check_what_the_recipes_made()


def check_what_the_recipes_made() -> None:
    """The decoder alone was trained, coordinates are those of TRELLIS, and organs are whole surfaces."""
    from trellis import SparseStructureTokenizer
    from trellis.datasets.sparse_structure import SparseStructure

    before, after = map(SparseStructureTokenizer.from_shapellm, ("3DVQVAE.bin", "3DVQVAE_chairs.bin"))
    ids = before.encode("meshes/chairs/1.obj")
    assert torch.equal(ids, after.encode("meshes/chairs/1.obj"))
    assert not torch.equal(before.decode(ids), after.decode(ids))
    assert before.hash == SparseStructureTokenizer.from_shapellm("3DVQVAE_copy.bin").hash

    tokenizer = SparseStructureTokenizer.load("outputs/chairs")
    coords = np.load("coords.npy")
    assert coords.dtype == np.int32 and not coords[:, 0].any()
    assert (coords[:, 1:] == np.argwhere(tokenizer.reconstruct("meshes/chairs/0.obj")[0, 0].numpy())).all()

    directly, by_mesh = (SparseStructure(root, split="all") for root in ("data/organs", "data/organ_meshes"))
    assert [entry.name for entry in directly.entries] == [
        f"{case}_{organ}" for case in ("case_01", "case_02") for organ in ("liver", "spleen")
    ]
    names = [Path(entry.name).stem for entry in by_mesh.entries]
    for place, organ in enumerate(("case_01_liver", "case_01_spleen")):
        mine, meshed = directly[place]["ss"][0], by_mesh[names.index(organ)]["ss"][0]
        for axis in range(3):  # both fill the cube along the longest axis, and are as large along the others
            others = tuple({0, 1, 2} - {axis})
            extents = [grid.amax(others).nonzero() for grid in (mine, meshed)]
            assert abs(extents[0].min() - extents[1].min()) <= 2 and abs(extents[0].max() - extents[1].max()) <= 2
        # Their surfaces meet: a cell of one is near a cell of the other.
        near = torch.nn.functional.max_pool3d(meshed[None, None].float(), 5, stride=1, padding=2)[0, 0] > 0
        assert near[mine > 0].float().mean() > 0.95


@pytest.mark.parametrize("name", ["recipes.md", "api.md"])
def test_every_block_is_run_or_says_that_it_is_not(name):
    found = [block for block in blocks(DOCS / name) if block.language in ("python", "bash")]
    assert found
    for block in found:
        if block.language == "python":
            ast.parse(block.code, f"{name}:{block.line}")
        paragraph = block.text_before.strip().split("\n\n")[-1]
        said = "scripts/docs.py" in block.code or "**not run here**" in paragraph.lower()  # that script runs below
        assert block.added is not None or said, f"{name}, line {block.line}"


@pytest.mark.parametrize("name", ["recipes.md", "api.md", "mesh_to_tokens.ipynb"])
def test_links_and_paths_lead_somewhere(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (DOCS / target).is_file(), target
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    for path in re.findall(r"\b(?:configs|dataset_toolkits|scripts|tests|trellis)/[\w/]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    for config in re.findall(r"`(\w+\.json)`", text):
        assert (ROOT / "configs/vae" / config).is_file() or config == "dataset_info.json", config


# --- the notebook -----------------------------------------------------------------------------------------


def printed(notebook) -> list[str]:
    """What each cell printed and drew, numbers left out: they differ in the last digits from machine to machine."""
    texts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = [output.get("text", "") for output in cell.outputs]
            drawn = [sorted(output.data) for output in cell.outputs if "data" in output]
            texts.append(re.sub(r"[\d.]+", "#", "".join(streams)) + str(drawn))
    return texts


def test_the_notebook_runs_and_says_what_is_stored(tmp_path, monkeypatch):
    for package in ("trimesh", "open3d", "skimage", "ipykernel"):
        pytest.importorskip(package)
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    stored = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(stored)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(notebook) == printed(stored)
    (files,) = tmp_path.glob("mesh_to_tokens_*")
    assert {"back.glb", "back.stl", "coords.npy", "tokenizer"} <= {path.name for path in files.iterdir()}


def test_the_stored_notebook_is_small_and_ran_in_order():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert len(text) < LARGEST_NOTEBOOK
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)


# --- the reference ----------------------------------------------------------------------------------------


def modules() -> list[str]:
    packages = (trellis.tokens, trellis.modules.quantizers)
    found = [
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    ]
    return ["trellis.tokenizer", *(package.__name__ for package in packages), *found]


@pytest.mark.parametrize("name", modules())
def test_what_is_public_has_a_docstring(name):
    if name.endswith("triton"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not value.__doc__ or value.__doc__.startswith(f"{key}("):  # what dataclasses and named tuples make up
            missing.append(key)
        for method in vars(value) if inspect.isclass(value) else ():
            kind = inspect.getattr_static(value, method)
            public = not method.startswith("_") and (inspect.isroutine(kind) or isinstance(kind, property))
            if public and not inspect.getdoc(getattr(value, method)):  # or that of the method it overrides
                missing.append(f"{key}.{method}")
    assert missing == []


def test_the_reference_builds_without_a_warning(tmp_path):
    for package in ("pdoc", "triton", "dash"):  # the last two are imported by some modules
        pytest.importorskip(package)
    command = [sys.executable, ROOT / "scripts/docs.py", "--output_dir", tmp_path / "api"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in modules():
        assert (tmp_path / "api" / f"{name.replace('.', '/')}.html").is_file(), name
    page = (tmp_path / "api/trellis/tokens/text.html").read_text(encoding="utf-8")
    assert "&lt;mesh-start&gt;" in page and not re.search(r"<mesh[-\d]", page)
