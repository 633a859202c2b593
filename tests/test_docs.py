"""The documents: commands, snippets and the notebook run; paths, flags, settings, tables and figures are right; the
reference builds, and everything public has a docstring."""

import argparse
import ast
import fnmatch
import functools
import hashlib
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
from helpers import table as rows_of

import train
import trellis.modules.quantizers
import trellis.tokens
from trellis.datasets import DATASETS
from trellis.models import MODELS
from trellis.trainers import TRAINERS
from trellis.trainers.configuration import TRELLIS_ARGS
from trellis.utils.config import apply_override, config_arguments, describe, load_config
from trellis.utils.errors import ConfigError

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PRETRAINED = (ROOT / "pretrained/base", ROOT / "pretrained/demo_vae")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path
    for folder in (ROOT, DOCS, ROOT / "configs", ROOT / "benchmarks", *PRETRAINED)
    for path in sorted(folder.glob("*.md"))
}
CONFIGS = sorted((ROOT / "configs/vae").glob("*.json"))
NOTEBOOK = DOCS / "mesh_to_tokens.ipynb"
LARGEST_NOTEBOOK = 200_000  # bytes
LARGEST_README = 10_000  # bytes

# What a comment before a block of a document, <!-- run: one step, … -->, adds to its calls of train.py.
ADDED = {
    "tryrun": ["--tryrun"],
    "one step": [f"--set trainer.args.{name}" for name in ("max_steps=1", "i_eval=100", "i_sample=100")],
    "one sample": ["--set trainer.args.batch_size_per_gpu=1"],
    "batch of one": ["--set trainer.args.batch_size=1"],
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
    """A fenced block of a document."""

    line: int
    language: str
    code: str
    added: str | None  # flags for train.py; None if the block is not to be run
    text_before: str


def blocks(path: Path) -> Iterator[Block]:
    """Yield a document's blocks that name a language."""
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
    """An empty folder in which documents run: with the configurations, what is pretrained, a mesh, and no GPU."""
    for package in ("trimesh", "numba", "skimage", "pyarrow", "matplotlib", "nibabel"):
        pytest.importorskip(package)
    (tmp_path / "pretrained").mkdir()  # documents write here too
    (tmp_path / "docs").mkdir()
    for name in ("configs", "pretrained/base", "pretrained/demo_vae", "docs/teapot.glb"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # small enough for a CPU
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return tmp_path


def prepare_readme() -> None:
    """Write two meshes, one of which is held out by its sha256."""
    from dataset_toolkits.shapes.make_shapes import make_shape, write_shape
    from trellis.datasets.metadata import split_of

    Path("meshes").mkdir()
    chair = Path("meshes/chair.obj")
    write_shape(make_shape(0, "train", 0), chair)
    text = chair.read_text()
    variants = (f"{text}# {number}\n" for number in range(1000))
    held_out = next(other for other in variants if split_of(hashlib.sha256(other.encode()).hexdigest()) == "val")
    Path("meshes/stool.obj").write_text(held_out)


def prepare_recipes() -> None:
    """Make what the recipes take for granted: meshes, a run, a tokenizer file, two scans."""
    for folder in ("meshes/chairs", "meshes/chairs_val"):
        Path(folder).mkdir(parents=True)
    grids = make_meshes()
    make_run(grids)
    make_shapellm_file(grids)
    for name, scan in make_scans().items():
        Path(name).parent.mkdir(parents=True)
        scan.to_filename(name)


def make_scans() -> dict:
    """Return two label maps: oblique, of unequal spacing, one stored from right to left; the second has no spleen."""
    import nibabel

    x, y, z = np.indices((40, 30, 14)) - np.array([16, 15, 7])[:, None, None, None]
    affine = np.array([[0.8, 0.1, 0, -5], [-0.1, 0.8, 0, 30], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    scans = {}
    for name, edge, sign in (("scans/train/case_01.nii.gz", 9, 1), ("scans/val/case_02.nii.gz", 11, -1)):
        liver = (x / edge) ** 2 + (y / 8) ** 2 + (z / 4) ** 2 < 1
        spleen = (abs(x - 18) < 4) & (abs(y) < edge / 2) & (abs(z) < 3) & (sign > 0)
        labels = np.where(liver, 1, np.where(spleen, 2, 0)).astype(np.uint8)
        scans[name] = nibabel.Nifti1Image(labels[::sign], affine @ np.diag([sign, 1, 1, 1]))
    return scans


def make_meshes() -> torch.Tensor:
    """Write chairs and return the grids of two, uint8 [2, 1, 64, 64, 64]."""
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
        " ".join(ADDED["64 codes"] + ADDED["batch of one"] + ADDED["one step"]),
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
    """Let bash read the commands, and run the Python programs in this process, which has loaded torch."""
    for path, *flags in python_calls(code):
        program = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        if path == "train.py":
            flags += [*added.split(), "--auto_retry", "0"]
        assert program.main(flags) == 0, f"{path} {' '.join(flags)}"


def python_calls(code: str) -> list[list[str]]:
    """Return the arguments of each call of Python in a bash script, as bash expands them."""
    found = subprocess.run(["bash", "-euo", "pipefail", "-c", f"{RECORD}\n{code}"], capture_output=True, check=True)
    calls = [call.decode().split("\0") for call in found.stdout.split(b"\0\n")[:-1]]
    assert len(calls) == len(re.findall(r"^python ", code, re.MULTILINE)) > 0
    return calls


def run_document(path: Path) -> None:
    """Run the blocks of a document that are marked so."""
    for block in blocks(path):
        if block.added is None:
            continue
        try:
            if block.language == "bash":
                run_bash(block.code, block.added)
            else:
                exec(compile(block.code, path.name, "exec"), {"__name__": "__main__"})
        except Exception as error:
            raise AssertionError(f"{path.name}, line {block.line}: {error}") from error


def test_the_readme_and_the_snippet_of_the_api_run(workplace):
    prepare_readme()
    run_document(README)
    run_document(DOCS / "api.md")
    made = [*Path("outputs/tokens").glob("*.parquet"), *Path("outputs/meshes").glob("*.glb"), Path("chair_back.glb")]
    assert len(made) == 4 and Path("tokenizers/mine/model.safetensors").is_file()
    assert list(Path("outputs/stage2/eval").glob("val_*.png"))


def test_the_recipes_run(workplace):
    prepare_recipes()
    run_document(DOCS / "recipes.md")
    check_what_the_recipes_made()


def check_what_the_recipes_made() -> None:
    """The decoder alone was trained, coordinates are those of TRELLIS, and organs lie in their scans."""
    import nibabel

    from trellis import SparseStructureTokenizer
    from trellis.datasets.sparse_structure import SparseStructure
    from trellis.grids.volumes import Frame, write_nifti

    before, after = map(SparseStructureTokenizer.from_shapellm, ("3DVQVAE.bin", "3DVQVAE_chairs.bin"))
    ids = before.encode("meshes/chairs/1.obj")
    assert torch.equal(ids, after.encode("meshes/chairs/1.obj"))
    assert not torch.equal(before.decode(ids), after.decode(ids))
    assert before.hash == SparseStructureTokenizer.from_shapellm("3DVQVAE_copy.bin").hash

    tokenizer = SparseStructureTokenizer.load("outputs/chairs")
    coords = np.load("coords.npy")
    assert coords.dtype == np.int32 and not coords[:, 0].any()
    assert (coords[:, 1:] == np.argwhere(tokenizer.reconstruct("meshes/chairs/0.obj")[0, 0].numpy())).all()

    metadata = rows_of(Path("data/organs/metadata.csv"))
    assert sorted((Path(row["file"]).name, row["split"]) for row in metadata) == [
        ("case_01.nii.gz#liver", "train"),
        ("case_01.nii.gz#spleen", "train"),
        ("case_02.nii.gz#liver", "val"),
    ]
    lacking = sorted((Path(row["file"]).name, row["reason"]) for row in rows_of(Path("data/organs/failed.csv")))
    assert [name for name, _ in lacking] == [
        "case_01.nii.gz#kidneys",
        "case_02.nii.gz#kidneys",
        "case_02.nii.gz#spleen",
    ]
    assert all("is not in this scan" in reason for _, reason in lacking)

    # Way back: each grid, as it is, covers its organ in the scan; what the tokenizer makes of it has the scan's space.
    organs = SparseStructure("data/organs", split="all")
    scans = {Path(name).name: scan for name, scan in make_scans().items()}
    files = {row["sha256"]: row["file"] for row in rows_of(Path("outputs/organ_maps/names.csv"))}
    for entry, item in zip(organs.entries, organs, strict=True):
        row = next(row for row in metadata if row["sha256"] == entry.sha256)
        case, _, organ = Path(row["file"]).name.partition("#")
        write_nifti(Path("organ.nii.gz"), item["ss"][0], Frame.from_json(row["frame"]))
        back, scan = nibabel.load("organ.nii.gz"), scans[case]
        truth = np.asarray(scan.dataobj) == {"liver": 1, "spleen": 2}[organ]
        np.testing.assert_allclose(back.affine, scan.affine, atol=1e-5)
        assert np.array_equal(np.asarray(back.dataobj) == 1, truth)
        assert (
            0.5
            < float(row["mm_per_cell"]) * 64 / np.ptp(np.argwhere(truth) @ scan.affine[:3, :3].T, axis=0).max()
            < 1.5
        )
        made = nibabel.load(Path("outputs/organ_maps", files[entry.sha256]))
        assert made.shape == scan.shape and np.allclose(made.affine, scan.affine, atol=1e-5)
    assert len(list(Path("outputs/organ_meshes").glob("*.glb"))) == 3


# Commands of the README that other tests run: the demo's steps, the suite, the page, the recipe.
RUN_ELSEWHERE = ("bash scripts/", "python3 -m venv", "pip install", "python -m trellis.viewer", "python benchmarks/")


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md", "docs/api.md"])
def test_every_block_is_run_or_says_that_it_is_not(name):
    found = [block for block in blocks(DOCUMENTS[name]) if block.language in ("python", "bash")]
    assert found
    for block in found:
        if block.language == "python":
            ast.parse(block.code, f"{name}:{block.line}")
        paragraph = block.text_before.strip().split("\n\n")[-1]
        said = "scripts/docs.py" in block.code or "**not run here**" in paragraph.lower()  # that script runs below
        if name == "README.md":
            said = all(line.startswith(RUN_ELSEWHERE) for line in block.code.splitlines())
        assert block.added is not None or said, f"{name}, line {block.line}"


# --- links and paths --------------------------------------------------------------------------------------

FOLDERS = (
    *("benchmarks", "configs", "dataset_toolkits", "docs", "pretrained/base", "pretrained/demo_vae", "scripts"),
    *("tests", "trellis"),
)
PATH = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/(?:[\w./-]*\w\.(?:py|json|md|sh|png|ipynb)\b|[\w./-]*/)?")
# Files that the documents name and the programs write.
WRITTEN = {
    *("best.json", "config.json", "dataset_info.json", "encoder.json", "generated_predictions.json", "key.json"),
    *("name.json", "phase.json", "results.md", "stats.json", "stats.md", "status.json", "wandb_id.json"),
}


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*DOCUMENTS, "docs/mesh_to_tokens.ipynb"])
def test_links_and_paths_lead_somewhere(name):
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)]*)\)", text):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"
    if name == "CHANGELOG.md":  # names what is gone, too
        return
    for found in PATH.findall(text):
        assert (ROOT / found).exists(), found
    files = {file.name for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")} | WRITTEN
    for file in re.findall(r"`([\w/]+\.(?:py|json|md|sh))`", text):
        assert (ROOT / file).is_file() or file.rpartition("/")[2] in files, file


def test_the_tree_of_the_readme():
    """Each path in it exists, with the files that its line names; every room is in it."""
    tree = re.search(r"^```\n(train\.py .*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    rooms, above = set(), ROOT
    for line in tree.splitlines():
        entry, _, words = line.strip().partition(" ")
        above = ROOT / "trellis" if line.startswith("  ") else ROOT
        path = above / entry
        assert path.exists(), entry
        rooms.add(entry.partition("/")[0])
        folder = path if path.is_dir() else path.parent
        for name in re.findall(r"\b(\w+\.(?:py|md)|\w+/)", words):
            assert (folder / name).exists(), f"{entry}: {name}"
    packages = [path.parent for path in (ROOT / "trellis").glob("*/__init__.py")]
    assert {path.name for path in packages} - {"utils"} <= rooms


# --- commands ---------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised in place of parsing."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """Return the parser of a program, a path or a module after -m, without running it."""

    def stop(parser, *args, **kwargs):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as found:
            importlib.import_module(program.removesuffix(".py").replace("/", ".")).main()
    return found.value.parser


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return set(re.findall(r"(?<![\w-])--\w+", parser.format_help()))


def program_of(name: str) -> str | None:
    """Return the path of a program that a document names, perhaps without its folder."""
    folders = ("", "scripts/", "dataset_toolkits/", "benchmarks/")
    return next((folder + name for folder in folders if (ROOT / folder / name).is_file()), None)


def check_set(assignment: str, config: dict) -> None:
    """Raise ConfigError unless the configuration is valid with an assignment of --set."""
    apply_override(config, assignment)
    train.check_config(config, 1)


def as_python(line: str) -> str:
    """Return the call of Python that a batch script makes of its flags; other lines as they are."""
    found = re.match(r"sbatch (?:--\S+ )*scripts/slurm/(\w+)\.sbatch (.*)", line)
    if not found:
        return line
    script = (ROOT / "scripts/slurm" / f"{found[1]}.sbatch").read_text(encoding="utf-8")
    (program,) = re.findall(r"^(?:srun)? .*python (\S+\.py) ", script, re.MULTILINE)
    return f"python {program} {found[2]}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_have_flags_and_settings_that_exist(name, capsys):
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    for block in blocks(DOCUMENTS[name]):
        lines = map(as_python, block.code.replace("\\\n", " ").splitlines())
        lines = [line for line in lines if re.match(r"python |[A-Z]+=", line)]
        if block.language != "bash" or not any(line.startswith("python ") for line in lines):
            continue
        for program, *flags in python_calls("\n".join(lines)):
            if program == "-m":
                program, flags = flags[0] + ".__main__", flags[1:]
            try:
                args = parser_of(program).parse_args(flags)
            except SystemExit:
                pytest.fail(f"{name}, line {block.line}: {capsys.readouterr().err}")
            if program == "train.py":
                config = load_config(str(ROOT / args.config))
                for assignment in args.overrides:
                    check_set(assignment, config)
                train.check_config(config, 1)

    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    everything = {flag for program in PROGRAMS for flag in flags_of(parser_of(program))}
    for code in inline:
        found = re.match(r"(?:python )?([\w/]+\.py) ", code)
        program = program_of(found[1]) if found else None
        known = flags_of(parser_of(program)) if program in PROGRAMS else everything
        for flag in re.findall(r"(?<!\S)--\w+", code):
            assert flag in known or not found and code.startswith(OTHER_PROGRAMS), f"{name}: {code}"
        for assignment in re.findall(r"--set ([\w.]+=[^\s…]+)$", code):
            if assignment == "path.to.key=value":
                continue
            assert any(accepts(path, assignment) for path in CONFIGS), f"{name}: {code}"


def accepts(path: Path, assignment: str) -> bool:
    try:
        check_set(assignment, load_config(str(path)))
    except ConfigError:
        return False
    return True


PROGRAMS = [
    "train.py",
    "trellis.viewer.__main__",
    *(
        str(path.relative_to(ROOT))
        for folder in ("scripts", "dataset_toolkits", "dataset_toolkits/shapes", "benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    ),
]
OTHER_PROGRAMS = ("pip ", "ssh ", "jupyter ", "tensorboard ", "pytest ", "ruff ", "mypy ", "bash ")
OTHER_PROGRAMS += ("torchrun ", "accelerate ", "sbatch ", "srun ")


# --- tables -----------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of a document."""

    header: list[str]
    rows: list[list[str]]
    text_before: str

    def column(self, name: str, key: str | None = None) -> dict[str, str]:
        """Return {first cell, or cell of column `key`: cell}."""
        place, first = self.header.index(name), self.header.index(key) if key else 0
        return {row[first]: row[place] for row in self.rows}


def tables(path: Path) -> list[Table]:
    found, text = [], path.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = match[0].replace(r"\|", "/").splitlines()
        cells = [
            [cell.strip(" `").removeprefix("**").removesuffix("**") for cell in line.strip("|").split("|")]
            for line in lines
        ]
        found.append(Table(cells[0], cells[2:], text[: match.start()]))
    return found


def table(path: Path, *header: str) -> Table:
    """Return the document's first table that has these columns."""
    return next(found for found in tables(path) if set(header) <= set(found.header))


COMPONENTS = {name: registry.get(name, name) for registry in (MODELS, DATASETS, TRAINERS) for name in registry.classes}


def documented_arguments(component: str) -> list[tuple[str, str, str]]:
    """Return (name, type, default) of each row in docs/configuration.md that is about a class."""
    found = []
    for part in tables(DOCS / "configuration.md"):
        if not {"argument", "type", "default"} <= set(part.header):
            continue
        classes = re.search(r"<!-- arguments: (.*) -->\n\n\Z", part.text_before)
        for row in part.rows:
            cells = dict(zip(part.header, row, strict=True))
            patterns = [cells["class"]] if "class" in cells else classes[1].split()
            assert all(fnmatch.filter(COMPONENTS, pattern) for pattern in patterns), patterns
            if any(fnmatch.fnmatch(component, pattern) for pattern in patterns):
                found.append((cells["argument"], cells["type"], cells["default"]))
    return sorted(found)


@pytest.mark.parametrize("component", COMPONENTS)
def test_tables_of_arguments_are_the_constructors(component):
    expected = []
    for name, (annotation, default) in config_arguments(COMPONENTS[component]).items():
        required = default is inspect.Parameter.empty
        expected.append((name, describe(annotation), "required" if required else json.dumps(default)))
    assert documented_arguments(component) == sorted(expected)


def test_other_tables_of_the_configuration():
    path = DOCS / "configuration.md"
    quantizers = [name for name, cls in COMPONENTS.items() if issubclass(cls, trellis.modules.quantizers.Quantizer)]
    assert sorted(table(path, "class", "how its codes come about").column("class")) == sorted(quantizers)
    shown = table(path, "key of TRELLIS").column("type")
    assert shown == {name: describe(annotation) for name, annotation in TRELLIS_ARGS.items()}
    flags = {flag for row in table(path, "flag").rows for flag in re.findall(r"--\w+", row[0])}
    assert flags == flags_of(parser_of("train.py")) - {"--help"}


# --- figures ----------------------------------------------------------------------------------------------

RESULTS = ROOT / "benchmarks/results"
# Labels in the tables of results -> phases of benchmarks/quality.py.
PHASES = {
    f"{tokens} tokens, {label}": f"{tokens}_{stage}"
    for tokens in (4096, 1024)
    for label, stage in (("right after k-means / after stage 1", "stage1"), ("after stage 2", "stage2"))
}


def test_the_results_are_the_measured_ones():
    results = table(DOCS / "results.md", "held-out objects", "IoU")
    for file, column in (("h100.md", "IoU"), ("h200.md", "with AdamW")):
        shown = results.column(column)
        phases, scores = table(RESULTS / file, "phase"), table(RESULTS / file, "IoU", "median", "kbit")
        before, after = phases.column("IoU before"), phases.column("IoU after")
        for label, phase in PHASES.items():
            pair = f"{before[phase]} / {after[phase]}"
            assert shown[label] == (pair if " / " in label else after[phase]), (file, label)
        for label, score in (
            ("VAE, mean of the posterior", "VAE, mean"),
            ("VAE, a sample of the posterior", "VAE, sampled"),
        ):
            assert shown[label] == scores.column("IoU")[score], (file, label)
    usage, found = results.column("usage"), table(RESULTS / "h100.md", "phase").column("usage")
    assert {label: usage[label] for label in PHASES} == {
        label: f"{float(found[phase]):.0%}".replace("%", " %") for label, phase in PHASES.items()
    }


def test_the_readme_has_the_results_of_the_lab_book():
    shown = table(README, "form of tokens", "LM tokens")
    results = table(DOCS / "results.md", "form", "LM tokens")
    assert len(shown.rows) == 5
    for column in shown.header[1:]:
        known = results.column(column)
        for label, cell in shown.column(column).items():
            assert cell == known[label], (label, column)


def test_forms_of_tokens_have_the_scores_that_were_measured():
    forms = table(DOCS / "results.md", "form", "LM tokens")
    sparse = table(RESULTS / "sparse_h100.md", "grids", "LM tokens")
    baselines = table(RESULTS / "baselines.md", "grids", "baseline", "IoU")
    for column, grids in (("val", "val"), ("extra val", "extra val"), ("anatomy", "extra val, anatomy")):
        shown = forms.column(column)
        for label, measured in (
            ("sparse 16³, small network", "base"),
            ("sparse 16³, TRELLIS's size", "recipe_sparse`, 2200 steps"),
            ("table of 65,536 patterns", "table of 65,536 patterns"),
        ):
            assert shown[label] == sparse.column(measured)[grids], (label, grids)
        now = table(RESULTS / "forms_h200.md", "form", "GPU-minutes")
        for label, minutes in now.column("GPU-minutes").items():
            name = "sparse 16³, small network, the 4695 grids" if label == "sparse 16³, small network" else label
            assert shown[name] == now.column(column)[label], (label, grids)
            assert (
                forms.column("minutes")[name] == minutes
                and forms.column("LM tokens")[name] == now.column("LM tokens")[label]
            )
        for label, name in (("65,536", "65536"), ("8192", "8192")):
            (row,) = [r for r in baselines.rows if r[:2] == [grids, f"patterns 16×16×16, {name} ids"]]
            assert shown[f"table of {label} patterns"] == row[baselines.header.index("IoU")]
    h100 = table(RESULTS / "h100.md", "phase").column("IoU after")
    assert forms.column("val")["4096 tokens"] == h100["4096_stage2"]
    assert forms.column("val")["1024 tokens, no transformer"] == h100["1024_stage2"]


def test_the_table_of_configurations_has_the_results():
    """Of recipes of earlier versions and of the present ones. Those that were shortened or never run say so."""
    shown = table(ROOT / "configs/README.md", "file").column("IoU reached")
    measured = table(RESULTS / "h100.md", "phase").column("IoU after")
    recipes = {name: iou for name, iou in shown.items() if name.startswith("recipe_") and "not measured" not in iou}
    for name, file in (("recipe_sparse_stage1.json", "sparse_h100.md"), ("recipe_512_stage1.json", "forms_h200.md")):
        phases = table(RESULTS / file, "phase", "configuration")
        assert [name, recipes.pop(name)] in [[row[1].strip("`"), row[-1]] for row in phases.rows]
    assert recipes and recipes == {f"recipe_{phase}.json": measured[phase] for phase in map(phase_of, recipes)}
    demo = dict(re.findall(r"^ *(VAE|stage \d) +(\S+)", demo_output(), re.MULTILINE))
    for stage, name in (("VAE", "demo_vae_finetune"), ("stage 1", "demo_stage1"), ("stage 2", "demo_stage2")):
        assert f"{demo[stage]} (24 shapes)" in shown[f"{name}.json"]


def phase_of(name: str) -> str:
    return name.removeprefix("recipe_").removesuffix(".json")


def demo_output() -> str:
    return re.search(r"^```\n( +IoU .*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_score_was_measured(name):
    """Figures of four decimals are in benchmarks/results, the demo's output, or the pretrained VAE's report."""
    sources = [*RESULTS.glob("*.md"), *(folder / "README.md" for folder in PRETRAINED)]
    measured = " ".join([demo_output(), *(path.read_text(encoding="utf-8") for path in sources)])
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    if name == "README.md":
        text = text.replace(demo_output(), "")
    scores = set(re.findall(r"(?<![\w.])0\.\d{4}(?!\d)", text)) - {"0.0001", "0.9999"}  # settings
    assert scores <= set(re.findall(r"0\.\d{4}(?!\d)", measured))


def test_the_readme_is_short():
    assert README.stat().st_size <= LARGEST_README


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
    for package in ("trimesh", "numba", "skimage", "ipykernel"):
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
