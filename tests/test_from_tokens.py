"""scripts/from_tokens.py: what comes back is what the tokenizer makes of the ids."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VQ, save_tokenizer, solid_grids, tiny_config

pytest.importorskip("pyarrow")

from scripts import from_tokens as script
from scripts.id_sources import stem_of
from trellis import SparseStructureTokenizer
from trellis.grids.placing import turn_to_y_up
from trellis.grids.volumes import Frame
from trellis.grids.voxels import points_to_occupancy, read_ply
from trellis.tokens import parquet

OBJECTS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """tokenizer/, other/ and tokens/, a folder of three objects in two shards."""
    folder = tmp_path_factory.mktemp("from_tokens")
    tokenizer = save_tokenizer(folder / "tokenizer", 0)
    save_tokenizer(folder / "other", 1)
    ids = tokenizer.encode(torch.from_numpy(solid_grids(OBJECTS, 16, 0))[:, None]).numpy()
    assert len(np.unique(ids, axis=0)) == OBJECTS and (tokenizer.decode(torch.from_numpy(ids)) > 0).any()
    info = tokenizer.token_info("fp32")
    (folder / "tokens").mkdir()
    for number, rows in enumerate((slice(0, 2), slice(2, 3))):
        names = [f"{i:064x}" for i in range(OBJECTS)[rows]]
        path = folder / "tokens" / parquet.shard_name(number, 2)
        parquet.write_shard(path, info, names, names, [None] * len(names), ids[rows], np.ones(len(names)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(base) -> SparseStructureTokenizer:
    return SparseStructureTokenizer.load(base / "tokenizer")


@pytest.fixture(scope="module")
def ids(base) -> torch.Tensor:
    return torch.from_numpy(np.stack([row["tokens"] for row in parquet.read_shards(base / "tokens")]))


def run(base: Path, out: Path, *more) -> int:
    command = ["--tokenizer", base / "tokenizer", "--output_dir", out, "--device", "cpu", "--max_workers", 1, *more]
    return script.main(list(map(str, command)))


def made(folder: Path) -> list[Path]:
    """The files of a folder without the hidden one that says how they were made."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_voxels(path: Path) -> torch.Tensor:
    return points_to_occupancy(read_ply(path), 16)[0].bool()


def test_voxels_are_those_that_ids_decode_to(base, tokenizer, ids, tmp_path):
    assert run(base, tmp_path, "--tokens", base / "tokens", "--format", "voxels") == 0
    names = [f"{i:064x}" for i in range(OBJECTS)]
    assert [path.name for path in made(tmp_path)] == [*(f"{name}.ply" for name in names), "names.csv"]
    rows = [["sha256", "name", "file"], *([name, name, f"{name}.ply"] for name in names)]
    assert (tmp_path / "names.csv").read_text() == "".join(",".join(row) + "\n" for row in rows)
    for i, want in enumerate(tokenizer.decode(ids) > 0):
        assert torch.equal(read_voxels(tmp_path / f"{i:064x}.ply"), want[0])


def test_one_file_and_nothing_is_overwritten(base, tmp_path, capsys):
    file = base / "tokens" / parquet.shard_name(1, 2)
    path = tmp_path / f"{OBJECTS - 1:064x}.ply"
    path.write_text("mine")
    assert run(base, tmp_path, "--tokens", base / "tokens", "--format", "voxels") == 1
    assert f"{path}: exists already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "mine"
    path.unlink()
    table = tmp_path / "names.csv"
    table.write_text("mine")
    assert run(base, tmp_path, "--tokens", file, "--format", "voxels") == 1
    assert f"{table}: is a table of something else (mine)" in capsys.readouterr().err
    assert [table] == list(tmp_path.iterdir()) and table.read_text() == "mine"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made(folder)}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in made(folder) if path.name != "names.csv"}


def test_a_rerun_makes_what_is_missing_and_nothing_else(base, tokenizer, ids, tmp_path, capsys, monkeypatch):
    def stop(*fields):
        if script.Task(*fields).path.stem.endswith("1"):
            raise KeyboardInterrupt
        return write_file(*fields)

    write_file = script.write_file
    command = (base, tmp_path / "out", "--tokens", base / "tokens", "--format", "voxels")
    monkeypatch.setattr(script, "write_file", stop)
    assert run(*command) == 130
    assert "interrupted: run the same command again to go on" in capsys.readouterr().err
    assert [path.name for path in made(tmp_path / "out")] == [f"{0:064x}.ply"]
    before = times(tmp_path / "out")
    monkeypatch.undo()
    assert run(*command) == 0
    assert "2 files written, 1 were there already" in capsys.readouterr().out
    after = times(tmp_path / "out")
    assert before.items() <= after.items()
    assert run(*command) == 0
    assert "0 files written, 3 were there already" in capsys.readouterr().out
    assert times(tmp_path / "out") == after
    assert run(base, tmp_path / "whole", *command[2:]) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_files_of_other_settings_are_not_gone_on_with(base, tokenizer, ids, tmp_path, capsys):
    info = tokenizer.token_info()
    file, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for path, precision in ((file, "fp32"), (other, "bf16")):
        parquet.write_shard(path, replace(info, precision=precision), ["a"], ["a"], [None], ids[:1].numpy(), np.ones(1))
    out = tmp_path / "out"
    assert run(base, out, "--tokens", file, "--format", "stl") == 0
    before = contents(out)
    capsys.readouterr()
    for more, name in ((("--tokens", other), "precision"), (("--tokens", file, "--up_axis", "y"), "to_y_up")):
        assert run(base, out, *more, "--format", "stl") == 1
        assert f"{out}: has stl files of other ids or settings ({name})" in capsys.readouterr().err
    answers = tmp_path / "answers.txt"
    answers.write_text("\n".join(tokenizer.to_text(ids)))
    assert run(base, tmp_path / "text", "--text", answers, "--format", "voxels") == 0
    for content, more, name in (
        ("\n".join(tokenizer.to_text(ids[:2])), (), "answers"),
        (None, ("--repair",), "repair"),
    ):
        if content:
            answers.write_text(content)
        assert run(base, tmp_path / "text", "--text", answers, "--format", "voxels", *more) == 1
        assert name in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize("kind", ["ply", "voxels"])
def test_several_workers_write_what_one_writes(base, tmp_path, kind):
    pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    pytest.importorskip("numba")
    for workers in (1, 2):
        more = ("--tokens", base / "tokens", "--format", kind, "--max_workers", workers)
        assert run(base, tmp_path / str(workers), *more) == 0
    one, two = (contents(tmp_path / each) for each in "12")
    assert one == two and len(one) == OBJECTS + 1


@pytest.mark.parametrize(
    "name, stem",
    [
        ("chair.glb", "chair_0123abcd"),
        ("folder/chair.v2.OBJ", "chair.v2_0123abcd"),
        ("C:\\meshes\\arm chair.stl", "arm_chair_0123abcd"),
        ("case_1.nii.gz#liver (left)", "case_1_liver_left_0123abcd"),
        ("../../etc/passwd", "passwd_0123abcd"),
        ("Größe 2×3.ply", "Größe_2_3_0123abcd"),
        ("x" * 300, "x" * 40 + "_0123abcd"),
        ("...", "0123abcd"),
        ("0123abcd", "0123abcd"),
        ("", "0123abcd"),
    ],
)
def test_files_are_called_after_the_object(name, stem):
    assert stem_of(name, "0123abcd") == stem


def test_files_of_one_name_are_distinct(base, tokenizer, ids, tmp_path):
    hashes = [f"{i}" * 64 for i in range(OBJECTS)]
    file = tmp_path / "a.parquet"
    names = ["a/chair.glb", "b/chair.glb", "chair.obj"]
    parquet.write_shard(file, tokenizer.token_info(), hashes, names, [None] * OBJECTS, ids.numpy(), np.ones(OBJECTS))
    assert run(base, tmp_path / "out", "--tokens", file, "--format", "voxels") == 0
    files = [f"chair_{i}{i}{i}{i}{i}{i}{i}{i}.ply" for i in range(OBJECTS)]
    assert [path.name for path in made(tmp_path / "out")] == [*files, "names.csv"]
    rows = (tmp_path / "out" / "names.csv").read_text().splitlines()[1:]
    assert rows == [",".join(row) for row in zip(hashes, names, files, strict=True)]
    for path, want in zip(files, tokenizer.decode(ids) > 0, strict=True):
        assert torch.equal(read_voxels(tmp_path / "out" / path), want[0])
    parquet.write_shard(file, tokenizer.token_info(), [hashes[0]] * 3, names, [None] * 3, ids.numpy(), np.ones(3))
    assert run(base, tmp_path / "twice", "--tokens", file, "--format", "voxels") == 1


def test_files_whose_names_begin_alike_are_distinct(base, tokenizer, ids, tmp_path, capsys):
    """Only the last digits of the hashes differ, and only the case of a name."""
    hashes, names = [f"{i:064x}" for i in range(OBJECTS)], ["a/chair.glb", "Chair.obj", "table.obj"]
    file, single = tmp_path / "a.parquet", tmp_path / "b.parquet"
    info = tokenizer.token_info()
    parquet.write_shard(file, info, hashes, names, [None] * OBJECTS, ids.numpy(), np.ones(OBJECTS))
    parquet.write_shard(single, info, hashes[1:2], names[:1], [None], ids[1:2].numpy(), np.ones(1))
    parquet.write_shard(tmp_path / "c.parquet", info, hashes[:1], names[:1], [None], ids[:1].numpy(), np.ones(1))
    more = ("--format", "voxels")
    assert run(base, tmp_path / "out", "--tokens", file, *more) == 0
    files = [f"chair_{hashes[0]}.ply", f"Chair_{hashes[1]}.ply", "table_00000000.ply"]
    assert (tmp_path / "out" / "names.csv").read_text().splitlines()[1:] == [
        ",".join(row) for row in zip(hashes, names, files, strict=True)
    ]
    for path, want in zip(files, tokenizer.decode(ids) > 0, strict=True):
        assert torch.equal(read_voxels(tmp_path / "out" / path), want[0])
    # One by one they do not know of each other, but the table does.
    assert run(base, tmp_path / "single", "--tokens", single, *more) == 0
    before = contents(tmp_path / "single")
    capsys.readouterr()
    assert run(base, tmp_path / "single", "--tokens", tmp_path / "c.parquet", *more) == 1
    assert f"chair_00000000.ply: is of {hashes[1]}, not of {hashes[0]}" in capsys.readouterr().err
    assert contents(tmp_path / "single") == before


def test_an_object_of_other_data_is_not_taken_as_there(base, tokenizer, ids, tmp_path, capsys):
    """The same mesh may have another grid, such as a solid one."""
    for number in range(2):
        rows, made_from = ids[number : number + 1].numpy(), {"data": {"data": f"{number}"}}
        file = tmp_path / f"{number}.parquet"
        parquet.write_shard(file, tokenizer.token_info(), ["a"], ["a"], [None], rows, np.ones(1), made_from=made_from)
    out = ("--format", "voxels")
    assert run(base, tmp_path / "out", "--tokens", tmp_path / "0.parquet", *out) == 0
    assert run(base, tmp_path / "out", "--tokens", tmp_path / "1.parquet", *out) == 1
    assert "has voxels files of other ids or settings (data)" in capsys.readouterr().err
    assert torch.equal(read_voxels(tmp_path / "out" / "a.ply"), tokenizer.decode(ids[:1])[0, 0] > 0)


def test_the_table_keeps_what_another_run_adds_meanwhile(base, tmp_path, monkeypatch):
    def meanwhile(*fields):
        monkeypatch.undo()
        assert run(base, tmp_path, "--tokens", file, "--format", "stl") == 0
        return script.write_file(*fields)

    file, name = base / "tokens" / parquet.shard_name(1, 2), f"{OBJECTS - 1:064x}"
    monkeypatch.setattr(script, "write_file", meanwhile)
    assert run(base, tmp_path, "--tokens", file, "--format", "voxels") == 0
    lines = (tmp_path / "names.csv").read_text().splitlines()
    assert lines == ["sha256,name,file", f"{name},{name},{name}.stl", f"{name},{name},{name}.ply"]


def test_the_table_of_names_grows_with_the_formats_of_a_folder(base, tmp_path):
    file, name = base / "tokens" / parquet.shard_name(1, 2), f"{OBJECTS - 1:064x}"
    for kind in ("voxels", "stl"):
        assert run(base, tmp_path, "--tokens", file, "--format", kind) == 0
    lines = (tmp_path / "names.csv").read_text().splitlines()
    assert lines == ["sha256,name,file", f"{name},{name},{name}.ply", f"{name},{name},{name}.stl"]


@pytest.mark.parametrize("kind", ["glb", "obj", "ply", "stl"])
def test_meshes_are_the_tokenizers(base, tokenizer, ids, tmp_path, kind):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    assert run(base, tmp_path, "--tokens", base / "tokens" / parquet.shard_name(1, 2), "--format", kind) == 0
    path, table = made(tmp_path)
    assert table.name == "names.csv"
    assert path.name == f"{OBJECTS - 1:064x}.{kind}"
    got, want = trimesh.load_mesh(path), tokenizer.to_mesh(ids[-1])
    if kind == "glb":
        want.vertices = turn_to_y_up(want.vertices)
    assert len(got.faces) == len(want.faces)
    assert np.allclose(got.bounds, want.bounds, atol=1e-6)
    assert np.isclose(got.volume, want.volume, rtol=1e-4)


@pytest.mark.parametrize("up_axis", ["auto", "y", "z", "keep"])
@pytest.mark.parametrize("kind", ["glb", "ply"])
def test_the_axes_of_meshes_may_be_chosen(base, tokenizer, ids, tmp_path, kind, up_axis):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    tokens = base / "tokens" / parquet.shard_name(1, 2)
    assert run(base, tmp_path, "--tokens", tokens, "--format", kind, "--up_axis", up_axis) == 0
    path, table = made(tmp_path)
    assert table.name == "names.csv"
    want = tokenizer.to_mesh(ids[-1])
    if up_axis == "y" or (up_axis == "auto" and kind == "glb"):
        want.vertices = turn_to_y_up(want.vertices)
    got = trimesh.load_mesh(path, process=False).triangles.astype(np.float32)
    assert sorted(got.reshape(-1, 9).tolist()) == sorted(want.triangles.astype(np.float32).reshape(-1, 9).tolist())


@pytest.mark.parametrize("made, y_up", [("auto", True), ("y", True), ("z", False), ("keep", False)])
def test_meshes_have_axes_by_the_setting_that_their_tokens_were_made_with(base, ids, tmp_path, made, y_up, capsys):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("skimage")
    tokenizer = save_tokenizer(tmp_path / "kept", 0, up_axis="keep")
    info = replace(tokenizer.token_info(), up_axis=made)
    file = tmp_path / "a.parquet"
    parquet.write_shard(file, info, ["a"], ["a"], [None], ids[-1:].numpy(), np.ones(1))
    assert run(base, tmp_path / "out", "--tokens", file, "--tokenizer", tmp_path / "kept") == 0
    assert run(base, tmp_path / "none", "--tokens", file) == 1  # the tokenizer with "auto"
    said = "Give the one that made them" + (f", with up_axis {made} and not auto" if made != "auto" else "") + ".\n"
    assert capsys.readouterr().err.endswith(said)
    want = tokenizer.to_mesh(ids[-1]).bounds
    if y_up:
        want = np.sort(turn_to_y_up(want), axis=0)
    assert np.allclose(trimesh.load_mesh(tmp_path / "out" / "a.glb").bounds, want, atol=1e-6)


def test_voxels_have_the_axes_of_the_grid(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, tmp_path, "--tokens", base / "tokens", "--format", "voxels", "--up_axis", "y")
    assert "--up_axis goes with meshes" in capsys.readouterr().err


def test_label_maps_lie_in_their_scans(base, tokenizer, ids, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    affine = np.array([[0, -2, 0, 50], [-1.5, 0, 0, 20], [0, 0, 3, -7], [0, 0, 0, 1]], dtype=float)
    frame = Frame((-10.0, -40.0, 53.0), 4.0, "solid", affine, (40, 50, 45))
    names = [f"{i:064x}" for i in range(OBJECTS)]
    parquet.write_shard(
        tmp_path / "a.parquet",
        tokenizer.token_info("fp32"),
        names,
        names,
        [None] * OBJECTS,
        ids.numpy(),
        np.ones(OBJECTS),
        frames=[frame.to_json(), None, frame.to_json()],
    )
    assert run(base, tmp_path / "out", "--tokens", tmp_path / "a.parquet", "--format", "nifti") == 1
    assert f"left out: {names[1]}: comes from no scan" in capsys.readouterr().out
    for i in (0, 2):
        image = nibabel.load(tmp_path / "out" / f"{names[i]}.nii.gz")
        assert np.array_equal(image.affine, affine) and image.shape == frame.shape
        grid = (tokenizer.decode(ids[i]) > 0)[0, 0].numpy()
        # The cell of each voxel's center, by hand.
        world = np.argwhere(np.ones(frame.shape)) @ affine[:3, :3].T + affine[:3, 3]
        cells = np.floor((world - frame.center) / frame.mm_per_cell + 8).astype(int)
        inside = ((cells >= 0) & (cells < 16)).all(axis=1)
        want = np.zeros(len(cells), dtype=bool)
        want[inside] = grid[tuple(cells[inside].T)]
        assert want.any() and np.array_equal(np.asarray(image.dataobj).reshape(-1) == 1, want)
    assert not (tmp_path / "out" / f"{names[1]}.nii.gz").exists()
    table = (tmp_path / "out" / "names.csv").read_text().splitlines()
    assert table == ["sha256,name,file", *(f"{names[i]},{names[i]},{names[i]}.nii.gz" for i in (0, 2))]


def test_surfaces_that_are_not_closed_are_told(base, tokenizer, ids, tmp_path, capsys, monkeypatch):
    pytest.importorskip("nibabel")
    solid = np.zeros((16,) * 3, dtype=bool)
    solid[2:14, 2:14, 2:14] = True
    surface = solid.copy()
    surface[3:13, 3:13, 3:13] = False
    opened = surface.copy()
    opened[5:11, 5:11, 13] = False  # six cells wide
    grids = torch.from_numpy(np.stack((surface, opened, opened)))[:, None].float()
    decoded = lambda self, ids: grids  # noqa: E731
    monkeypatch.setattr(SparseStructureTokenizer, "decode", decoded)
    frame = Frame((7.5, 7.5, 7.5), 1.0, "surface", np.eye(4), (16, 16, 16))
    frames = [frame.to_json(), frame.to_json(), frame._replace(fill="solid").to_json()]
    names = ["a", "b", "c"]
    file = tmp_path / "a.parquet"
    info = tokenizer.token_info("fp32")
    parquet.write_shard(file, info, names, names, [None] * 3, ids.numpy(), np.ones(3), frames=frames)
    assert run(base, tmp_path / "out", "--tokens", file, "--format", "nifti") == 0
    said = "1 of 2 surfaces were not closed, so their label maps are hollow: make grids with --fill solid\n"
    assert capsys.readouterr().out.endswith(said)


def test_answers_have_no_scan(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, tmp_path, "--text", tmp_path / "a.txt", "--format", "nifti")
    assert "--format nifti goes with --tokens" in capsys.readouterr().err


def test_ids_of_another_tokenizer_are_refused(base, tmp_path, capsys):
    more = ("--tokens", base / "tokens", "--tokenizer", base / "other")
    assert run(base, tmp_path / "out", *more) == 1
    assert "Give the one that made them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_hashes_are_refused(base, tokenizer, ids, tmp_path, capsys):
    parquet.write_shard(
        tmp_path / "a.parquet",
        tokenizer.token_info("fp32"),
        ["../../x"],
        ["x"],
        [None],
        ids[:1].numpy(),
        np.ones(1),
    )
    assert run(base, tmp_path / "out", "--tokens", tmp_path / "a.parquet", "--format", "voxels") == 1
    assert "'../../x' is not a hash" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def lines_of(form: str, texts: list[str]) -> str:
    """Answers as a text file or in one of the layouts of .jsonl."""
    if form == "txt":
        return "\n".join(f"Here it is: {text} Have fun." for text in texts) + "\n\n"
    make = {
        "string.jsonl": lambda text: text,
        "predict.jsonl": lambda text: {"prompt": "p", "predict": f"Sure. {text}", "label": "l"},
        "conversations.jsonl": lambda text: {
            "conversations": [{"from": "human", "value": f"What is {text}?"}, {"from": "gpt", "value": "A chair."}]
        },
    }[form]
    return "".join(json.dumps(make(text)) + "\n" for text in texts)


@pytest.mark.parametrize("form", ["txt", "string.jsonl", "predict.jsonl", "conversations.jsonl"])
def test_answers_of_a_language_model(base, tokenizer, ids, tmp_path, form):
    file = tmp_path / f"answers.{form}"
    file.write_text(lines_of(form, tokenizer.to_text(ids)))
    assert run(base, tmp_path / "out", "--text", file, "--format", "voxels") == 0
    files = made(tmp_path / "out")
    assert [path.name for path in files] == [f"line{i + 1:06d}.ply" for i in range(OBJECTS)]
    for path, want in zip(files, tokenizer.decode(ids) > 0, strict=True):
        assert torch.equal(read_voxels(path), want[0])


def test_damaged_answers_are_listed_or_repaired(base, tokenizer, ids, tmp_path, capsys):
    good, cut, foreign = tokenizer.to_text(ids)
    cut = cut[: cut.rindex("<mesh-end>")]
    cut = cut[: cut.rindex("<mesh")]  # without the end and the last id
    foreign = re.sub("><", "> and <", foreign, count=1)
    file = tmp_path / "answers.txt"
    file.write_text("\n".join([good, cut, foreign]))
    assert run(base, tmp_path / "strict", "--text", file, "--format", "voxels") == 1
    out, error = capsys.readouterr()
    assert "left out: line000002: the object has" in out
    assert "left out: line000003: " in out and "left out: line000001" not in out
    assert "2 of 3 objects could not be written" in error
    assert [path.name for path in made(tmp_path / "strict")] == ["line000001.ply"]

    assert run(base, tmp_path / "repaired", "--text", file, "--format", "voxels", "--repair") == 0
    report = capsys.readouterr().out
    assert "repaired: line000002: " in report and "repaired: line000003: " in report
    assert "repaired: line000001" not in report
    ids = ids.clone()
    ids[1, -1] = tokenizer.empty_ids[-1]
    for path, want in zip(made(tmp_path / "repaired"), tokenizer.decode(ids) > 0, strict=True):
        assert torch.equal(read_voxels(path), want[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no text as"),
        ('{"question": "a"}', "has no text as"),
        ('{"conversations": [{"from": "gpt", "value": "no"}]}', "has no text as"),
        ('"no mesh"', "no object in it"),
    ],
)
def test_lines_without_an_answer_are_listed(base, tmp_path, content, message, capsys):
    (tmp_path / "answers.jsonl").write_text(content + "\n")
    assert run(base, tmp_path / "out", "--text", tmp_path / "answers.jsonl", "--format", "voxels") == 1
    out, error = capsys.readouterr()
    assert f"left out: line000001: {message}" in out.replace("there is ", "") and "1 of 1 objects" in error
    assert made(tmp_path / "out") == []


def test_files_that_are_not_there_or_empty(base, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    for more, message in (
        (("--text", tmp_path / "none.txt"), "cannot be read"),
        (("--text", tmp_path / "empty.txt"), "is empty"),
        (("--tokens", tmp_path / "none"), "no such"),
    ):
        assert run(base, tmp_path / "out", *more) == 1
        assert message in capsys.readouterr().err


def test_files_without_an_object_are_one_error(base, tokenizer, tmp_path, capsys):
    empty = np.zeros((0, tokenizer.num_tokens), dtype=int)
    parquet.write_shard(tmp_path / "a.parquet", tokenizer.token_info(), [], [], [], empty, np.zeros(0))
    assert run(base, tmp_path / "out", "--tokens", tmp_path / "a.parquet") == 1
    assert "a.parquet: has no object. Give a folder of scripts/to_tokens.py" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_object_without_voxels_is_listed(base, tokenizer, ids, tmp_path, capsys):
    """Of a tokenizer whose decoder says no everywhere."""
    empty = SparseStructureTokenizer.load(base / "tokenizer")
    bias = [value for name, value in empty.decoder.named_parameters() if name.endswith("bias")][-1]
    bias.data.fill_(-100.0)
    empty.save_pretrained(tmp_path / "empty")
    assert not (empty.decode(ids) > 0).any()
    file = tmp_path / "answers.txt"
    file.write_text("\n".join(empty.to_text(ids[:2])))
    assert run(base, tmp_path / "out", "--tokenizer", tmp_path / "empty", "--text", file, "--format", "voxels") == 1
    assert "left out: line000002: decodes to no voxel" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["dense", "octree", "octree-depth"])
def test_files_and_answers_of_every_form(base, tmp_path, form, capsys):
    models = tiny_config(VQ)["models"]
    models["quantizer"]["args"]["empty_code"] = True
    torch.manual_seed(0)
    tokenizer = SparseStructureTokenizer(models, 16)
    tokenizer.quantizer.embeddings.weight.data.normal_()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = tokenizer.encode(torch.from_numpy(solid_grids(OBJECTS, 16, 0))[:, None])
    names = [f"{i:064x}" for i in range(OBJECTS)]
    file, answers = tmp_path / "a.parquet", tmp_path / "answers.txt"
    info = tokenizer.token_info("fp32", form)
    parquet.write_shard(file, info, names, names, [None] * OBJECTS, ids.numpy(), np.ones(OBJECTS))
    texts = tokenizer.to_text(ids, form)
    answers.write_text("\n".join(texts))
    given = [] if form == "octree" else ["--form", form]  # the default
    more = ("--tokenizer", tmp_path / "tokenizer", "--format", "voxels")
    assert run(base, tmp_path / "files", *more, "--tokens", file) == 0
    assert run(base, tmp_path / "text", *more, "--text", answers, *given) == 0
    for folder in ("files", "text"):
        voxels = [path for path in made(tmp_path / folder) if path.suffix == ".ply"]
        for path, want in zip(voxels, tokenizer.decode(ids) > 0, strict=True):
            assert torch.equal(read_voxels(path), want[0])
    answers.write_text(texts[0].replace("<mesh-end>", ""))
    assert run(base, tmp_path / "cut", *more, "--text", answers, *given) == 1
    assert "left out: line000001: the object has no end" in capsys.readouterr().out
    assert run(base, tmp_path / "repaired", *more, "--text", answers, *given, "--repair") == 0
    assert torch.equal(read_voxels(tmp_path / "repaired" / "line000001.ply"), tokenizer.decode(ids[:1])[0, 0] > 0)


def test_tokens_that_are_empty_in_part_are_listed(base, tmp_path, capsys):
    args = {"n_embed": 32, "embed_dim": 8, "latent_channels": 4, "empty_code": True}
    models = tiny_config(VQ)["models"] | {"quantizer": {"name": "ResidualVectorQuantizer", "args": args}}
    tokenizer = SparseStructureTokenizer(models, 16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = np.ones((2, tokenizer.num_tokens), dtype=int)
    ids[1, 3] = 0
    file = tmp_path / "a.parquet"
    parquet.write_shard(file, tokenizer.token_info(), ["a", "b"], ["a", "b"], [None] * 2, ids, np.ones(2))
    more = ("--tokenizer", tmp_path / "tokenizer", "--tokens", file, "--format", "voxels")
    assert run(base, tmp_path / "out", *more) == 1
    assert "left out: b: ids 2 to 3 of object 0 are of one token" in capsys.readouterr().out
    answers = tmp_path / "answers.txt"
    answers.write_text(tokenizer.token_format(form="dense").to_text(ids[1]))
    more = (*more[:2], "--text", answers, *more[4:], "--form", "dense")
    assert run(base, tmp_path / "strict", *more) == 1
    assert "Refused: strict=False, or from_tokens.py --repair, repairs it" in capsys.readouterr().out
    assert run(base, tmp_path / "repaired", *more, "--repair") == 0
    assert "repaired: line000001: tokens with id 0 beside other ids (1) are taken as empty" in capsys.readouterr().out
    ids[1, 2] = 0
    want = tokenizer.decode(torch.from_numpy(ids[1]))[0, 0] > 0
    assert torch.equal(read_voxels(tmp_path / "repaired" / "line000001.ply"), want)


def test_the_form_of_files_is_their_own(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, tmp_path, "--tokens", base / "tokens", "--form", "dense")
    assert "--form goes with --text" in capsys.readouterr().err
    answers = tmp_path / "answers.txt"
    answers.write_text("<mesh-start><mesh-end>")
    assert run(base, tmp_path / "out", "--text", answers, "--form", "octree") == 1
    assert "no id for empty blocks" in capsys.readouterr().err and not (tmp_path / "out").exists()
