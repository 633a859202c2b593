"""scripts/to_tokens.py: rows and conversations against the tokenizer's own ids, object by object."""

import csv
import hashlib
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, VQ, save_tokenizer, solid_grids, tetrahedron, tiny_config

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from scripts import to_tokens as script
from trellis import SparseStructureTokenizer, __version__
from trellis.datasets.shards import write_shard
from trellis.evaluation.metrics import voxel_metrics
from trellis.grids.voxels import voxel_centers, write_ply
from trellis.tokens import parquet, sharegpt
from trellis.tokens.footer import read_row_groups
from trellis.utils.errors import ConfigError, DataError

OBJECTS, SHARD_SIZE = 30, 8
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """tokenizer/, other/ with other weights, and objects.npz with 30 grids of 16³."""
    folder = tmp_path_factory.mktemp("tokenize")
    save_tokenizer(folder / "tokenizer", 0)
    save_tokenizer(folder / "other", 1)
    grids = solid_grids(OBJECTS, 16, 0)
    np.savez(
        folder / "objects.npz",
        bits=np.packbits(grids.reshape(OBJECTS, -1), axis=1),
        name=np.array([f"folder/object {i}.glb" for i in range(OBJECTS)]),
        source=np.array(["" if i % 5 == 0 else "shop" for i in range(OBJECTS)]),
    )
    return folder


def flags(base: Path, out: Path, *more) -> list[str]:
    return [
        "--tokenizer",
        str(base / "tokenizer"),
        "--data_dir",
        str(base / "objects.npz"),
        "--output_dir",
        str(out),
        "--shard_size",
        str(SHARD_SIZE),
        "--device",
        "cpu",
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def tokens(base) -> Path:
    """The folder of a run with --iou."""
    assert script.main(flags(base, base / "tokens", "--iou")) == 0
    return base / "tokens"


def same_rows(first: Path, second: Path) -> bool:
    rows = [list(parquet.read_shards(folder)) for folder in (first, second)]
    return len(rows[0]) == len(rows[1]) and all(
        row.keys() == other.keys() and all(np.array_equal(row[key], other[key]) for key in row)
        for row, other in zip(*rows, strict=True)
    )


# --- Parquet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_what_the_tokenizer_makes_of_each_grid(base, tmp_path, precision, device, capsys):
    out = tmp_path / "out"
    more = ("--iou", "--precision", precision, "--device", device, "--verify", OBJECTS)
    assert script.main(flags(base, out, *more)) == 0
    report = capsys.readouterr().out
    assert "30 objects, 30 of them new" in report
    assert "verified 30 objects read back: 100.00% of the ids equal" in report
    tokenizer = SparseStructureTokenizer.load(base / "tokenizer").to(device)
    with np.load(base / "objects.npz") as file:
        data = dict(file)
    grids = np.unpackbits(data["bits"], axis=1).reshape(-1, 16, 16, 16)
    rows = list(parquet.read_shards(out))
    first = script.COMPARED
    equal = tokenizer.encode(torch.from_numpy(grids[:first])[:, None]).cpu().numpy() == [
        row["tokens"] for row in rows[:first]
    ]
    said = f"{equal.mean():.2%} of the ids of {first} objects equal fp32's" in report
    assert said == (precision == "bf16")
    assert len(rows) == OBJECTS and len({tuple(row["tokens"]) for row in rows}) > OBJECTS / 2
    for i, row in enumerate(rows):
        grid = torch.from_numpy(grids[i])[None, None].to(device)
        ids = tokenizer.encode(grid, precision)
        iou = voxel_metrics(tokenizer.decode(ids, precision), grid)["iou"].item()
        assert np.array_equal(row.pop("tokens"), ids[0].cpu().numpy())
        assert row == {
            "sha256": hashlib.sha256(data["bits"][i]).hexdigest(),
            "name": f"folder/object {i}.glb",
            "source": None if i % 5 == 0 else "shop",
            "num_voxels": grids[i].sum(),
            "iou": pytest.approx(iou, abs=1e-6),
        }


def test_files_say_how_their_ids_were_made(base, tokens):
    tokenizer = SparseStructureTokenizer.load(base / "tokenizer")
    files = sorted(path.name for path in tokens.glob("*.parquet"))
    assert files == [f"shard-{i:05d}-of-00004.parquet" for i in range(4)]
    assert [pq.read_metadata(tokens / name).num_rows for name in files] == [8, 8, 8, 6]
    for name in files:
        file = pq.ParquetFile(tokens / name)
        assert file.metadata.row_group(0).column(3).compression == "ZSTD"
        types = {field.name: field.type for field in file.schema_arrow}
        assert types == {
            "sha256": pa.string(),
            "name": pa.string(),
            "source": pa.string(),
            "tokens": pa.list_(pa.uint16()),
            "num_voxels": pa.int32(),
            "iou": pa.float32(),
        }
        metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
        assert metadata.pop("format_version") == "1"
        made_from = json.loads(metadata.pop("made_from"))
        assert made_from.pop("data")["objects"] == OBJECTS
        assert made_from == {"iou": True, "shard_size": SHARD_SIZE, "shards": 4}
        assert metadata == {
            "tokenizer_hash": tokenizer.hash,
            "normalization": "cube",
            "up_axis": "auto",
            "lattice": "[4, 4, 4]",
            "codes_per_token": "1",
            "n_embed": "32",
            "resolution": "16",
            "precision": "fp32",
            "empty_code": "false",
            "form": "dense",
            "left_out": "[]",
        }
    assert parquet.read_info(tokens) == tokenizer.token_info("fp32")


def test_a_rerun_makes_what_is_missing_and_nothing_else(base, tokens, tmp_path, capsys):
    out = tmp_path / "out"
    assert script.main(flags(base, out, "--iou")) == 0
    (out / "shard-00002-of-00004.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert script.main(flags(base, out, "--iou")) == 0
    assert "30 objects, 8 of them new" in capsys.readouterr().out
    assert same_rows(out, tokens)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert script.main(flags(base, out, "--iou")) == 0
    assert "30 objects, 0 of them new" in capsys.readouterr().out


def test_a_shard_that_fails_leaves_no_file_behind(base, tokens, tmp_path, monkeypatch, capsys):
    write_table = pq.write_table

    def fail(table, path, **options):
        write_table(table, path, **options)
        if "00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    assert script.main(flags(base, tmp_path / "out", "--iou")) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_common_metadata",
        "shard-00000-of-00004.parquet",
        "shard-00001-of-00004.parquet",
    ]
    monkeypatch.undo()
    assert script.main(flags(base, tmp_path / "out", "--iou")) == 0
    assert same_rows(tmp_path / "out", tokens)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (["--tokenizer", "{base}/other"], "tokenizer_hash"),
        (["--split", "train"], "data.data"),
        (["--precision", "bf16"], "precision"),
        (["--shard_size", "9"], "shard_size"),
        ([], "iou"),
    ],
)
def test_a_folder_takes_one_kind_of_ids(base, tokens, changed, key, capsys):
    before = {path: path.stat().st_mtime_ns for path in tokens.iterdir()}
    more = [word.format(base=base) for word in changed] + ["--iou"] * (key != "iou")
    assert script.main(flags(base, tokens, *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and key in error and str(tokens) in error
    assert {path: path.stat().st_mtime_ns for path in tokens.iterdir()} == before


def test_shards_say_by_themselves_how_they_were_made(base, tokens, tmp_path, capsys):
    """Copied without the rest of their folder, they are gone on with, and settings are compared with theirs."""
    name = "shard-00002-of-00004.parquet"
    (tmp_path / name).write_bytes((tokens / name).read_bytes())
    assert script.main(flags(base, tmp_path)) == 1
    assert f"{name} has other values of iou (true, now false)" in capsys.readouterr().err
    assert script.main(flags(base, tmp_path, "--iou")) == 0
    assert "22 of them new" in capsys.readouterr().out and same_rows(tmp_path, tokens)


def test_shards_that_do_not_say_how_they_were_made_are_refused(base, tokens, tmp_path, capsys):
    table = pq.read_table(tokens / "shard-00000-of-00004.parquet")
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"made_from"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "shard-00000-of-00004.parquet")
    assert script.main(flags(base, tmp_path, "--iou")) == 1
    assert "neither _common_metadata nor tokens.json" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_is_gone_on_with(base, tokens, tmp_path, capsys):
    """Its shards lack what is new in their metadata, and tokens.json has it instead."""
    lacking = (b"made_from", b"empty_code", b"form")
    for path in tokens.glob("shard-0000[01]*"):
        table = pq.read_table(path)
        kept = {key: value for key, value in table.schema.metadata.items() if key not in lacking}
        pq.write_table(table.replace_schema_metadata(kept), tmp_path / path.name)
    metadata = pq.read_schema(tokens / parquet.COMMON).metadata
    info = asdict(parquet.read_info(tmp_path / "shard-00000-of-00004.parquet"))
    manifest = {**info, **json.loads(metadata[b"made_from"])}
    del manifest["empty_code"], manifest["form"]
    (tmp_path / "tokens.json").write_text(json.dumps(manifest))
    assert script.main(flags(base, tmp_path)) == 1
    assert "tokens.json has other values of iou (true, now false)" in capsys.readouterr().err
    assert script.main(flags(base, tmp_path, "--iou")) == 0
    assert "14 of them new" in capsys.readouterr().out and same_rows(tmp_path, tokens)
    assert (tmp_path / "tokens.json").read_text() == json.dumps(manifest) and not (tmp_path / parquet.COMMON).exists()


def test_readers_of_parquet_folders_open_it(base, tokens):
    """pandas and Hugging Face's datasets, with failures and conversations beside the folder."""
    import pandas as pd

    rows = list(parquet.read_shards(tokens))
    tables = [pd.read_parquet(tokens)]
    if datasets := optional("datasets"):
        datasets.disable_progress_bars()
        for loaded in (
            datasets.load_dataset(str(tokens), cache_dir=str(base / "cache")),
            datasets.load_dataset("parquet", data_dir=str(tokens), cache_dir=str(base / "cache")),
        ):
            assert list(loaded) == ["train"]
            tables.append(loaded["train"].to_pandas())
    for table in tables:
        assert list(table.columns) == ["sha256", "name", "source", "tokens", "num_voxels", "iou"]
        assert len(table) == OBJECTS
        for row, (_, read) in zip(rows, table.iterrows(), strict=True):
            assert read["sha256"] == row["sha256"] and np.array_equal(read["tokens"], row["tokens"])
            assert read["num_voxels"] == row["num_voxels"] and read["iou"] == np.float32(row["iou"])


def optional(name: str):
    """A module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def test_machines_share_a_folder(base, tokens, tmp_path):
    for rank in (1, 0):
        assert script.main(flags(base, tmp_path, "--iou", "--rank", rank, "--world_size", 2, "--verify", 3)) == 0
        if rank:
            with pytest.raises(DataError, match="shard-00000-of-00004.parquet is missing \\(2 such"):
                list(parquet.read_shards(tmp_path))
    assert same_rows(tmp_path, tokens)


def test_two_processes_write_what_one_writes_wherever_they_are_started(base, tokens, tmp_path):
    """From the scripts' own folder, as a user may start it."""
    command = [sys.executable, "to_tokens.py", *flags(base, tmp_path / "out", "--iou", "--num_gpus", 2)]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30 of them new" in done.stdout and "processes: 2" in done.stdout
    assert same_rows(tmp_path / "out", tokens)


def test_a_process_that_is_killed_is_one_error(base, tmp_path):
    """As by a system whose memory has run out."""
    (tmp_path / "killed.py").write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from scripts import to_tokens
def write_shard(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
to_tokens.parquet.write_shard = write_shard
if __name__ == "__main__":
    sys.exit(to_tokens.main(sys.argv[1:]))
"""
    )
    command = [sys.executable, tmp_path / "killed.py", *flags(base, tmp_path / "out", "--num_gpus", 2)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: process ") and "was killed by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_notices_rows_that_are_not_those_of_their_grids(base, tokens, tmp_path, capsys):
    for path in tokens.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "shard-00001-of-00004.parquet"
    table = pq.read_table(path)
    order = [1, 0, *range(2, 8)]
    swapped = table.set_column(3, "tokens", table["tokens"].take(pa.array(order))).replace_schema_metadata(
        table.schema.metadata
    )
    pq.write_table(swapped, path)
    assert script.main(flags(base, tmp_path, "--iou", "--verify", OBJECTS)) == 1
    assert "of the ids that its grid has now" in capsys.readouterr().err


def test_grids_of_another_normalization_are_refused(base, tmp_path, capsys):
    with np.load(base / "objects.npz") as file:
        np.savez(tmp_path / "shapes.npz", **file, normalization=np.full(OBJECTS, "shapellm"))
    more = ("--data_dir", tmp_path / "shapes.npz")
    assert script.main(flags(base, tmp_path / "out", *more)) == 1
    assert "have normalization shapellm, but the tokenizer's is cube" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axis, noted", [("keep", True), ("y", False), ("auto", False), (None, False)])
def test_grids_that_may_have_other_axes_up_than_the_tokenizer_s_are_named(base, tmp_path, axis, noted, capsys):
    with np.load(base / "objects.npz") as file:
        np.savez(tmp_path / "turned.npz", **file, **({} if axis is None else {"up_axis": np.full(OBJECTS, axis)}))
    assert script.main(flags(base, tmp_path / "out", "--data_dir", tmp_path / "turned.npz")) == 0
    said = f"note: {tmp_path / 'turned.npz'}: its grids were made with up_axis {axis}, but the tokenizer's is auto"
    assert (said in capsys.readouterr().out) == noted
    assert parquet.read_info(tmp_path / "out").up_axis == "auto"


def test_roots_that_differ_are_refused_or_named(base, tmp_path, capsys):
    with np.load(base / "objects.npz") as file:
        for name, texts in (("a", {"normalization": "cube", "up_axis": "y"}), ("b", {"normalization": "shapellm"})):
            half = {key: array[:15] if name == "a" else array[15:] for key, array in file.items()}
            np.savez(tmp_path / f"{name}.npz", **half, **{key: np.full(15, text) for key, text in texts.items()})
    roots = f"{tmp_path / 'a.npz'},{tmp_path / 'b.npz'}"
    assert script.main(flags(base, tmp_path / "out", "--data_dir", roots)) == 1
    error = capsys.readouterr().err
    assert all(root in error for root in roots.split(",")) and not (tmp_path / "out").exists()
    np.savez(tmp_path / "b.npz", **half)
    assert script.main(flags(base, tmp_path / "out", "--data_dir", roots)) == 0
    said = capsys.readouterr().out
    assert "b.npz does not say how its grids were normalized" in said and "may have different axes up" in said


def info(n_embed: int = 32) -> parquet.TokenInfo:
    return parquet.TokenInfo("ab", "cube", "keep", (1, 1, 2), 2, n_embed, 16, "fp32")


def write(path: Path, info: parquet.TokenInfo, tokens: np.ndarray) -> None:
    names = [f"{i:064x}" for i in range(len(tokens))]
    parquet.write_shard(path, info, names, names, [None] * len(tokens), tokens, np.arange(len(tokens)))


def test_large_codebooks_take_four_bytes(tmp_path):
    for n_embed, kind in ((2**16, pa.uint16()), (2**16 + 1, pa.int32())):
        path = tmp_path / f"{n_embed}.parquet"
        tokens = np.array([[0, 1, n_embed - 2, n_embed - 1]])
        write(path, info(n_embed), tokens)
        assert pq.read_schema(path).field("tokens").type.value_type == kind
        (row,) = parquet.read_shards(path)
        assert row["tokens"].dtype == np.int64 and row["tokens"].tolist() == tokens[0].tolist()


def test_an_empty_shard_is_a_shard(tmp_path):
    write(tmp_path / "shard-00000-of-00001.parquet", info(), np.zeros((0, 4), int))
    assert list(parquet.read_shards(tmp_path)) == []


@pytest.mark.parametrize(
    "version, message",
    [
        (None, None),
        ("3", f"its format version is 3, but trellis-vqvae {__version__} reads versions up to 2; install a newer"),
        ("0", "its format version is 0, but must be a whole number of at least 1; the file is damaged"),
        ("new", "its format version is 'new'"),
    ],
)
def test_a_file_without_a_version_is_version_1_and_a_newer_one_is_refused(version, message, tmp_path):
    path = tmp_path / "shard-00000-of-00001.parquet"
    tokens = np.array([[0, 1, 2, 3]])
    write(path, info(), tokens)
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"format_version": (version or "").encode()}
    if version is None:
        del metadata[b"format_version"]
    pq.write_table(table.replace_schema_metadata(metadata), path)
    if message is None:
        assert parquet.read_info(tmp_path) == info()
        assert [row["tokens"].tolist() for row in parquet.read_shards(path)] == tokens.tolist()
        return
    for read in (
        parquet.read_info,
        parquet.count_rows,
        parquet.read_left_out,
        lambda path: list(parquet.read_shards(path)),
    ):
        with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
            read(path)


@pytest.mark.parametrize("damage", ["id", "count", "cut", "metadata", "mixed", "none", "absent"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "shard-00000-of-00002.parquet"
    tokens = np.array([[0, 1, 2, 3], [0, 1, 2, 31 + (damage == "id")]])
    for file in (path, tmp_path / "shard-00001-of-00002.parquet"):
        write(file, info(), tokens)
    source, table = tmp_path, pq.read_table(path)
    if damage == "count":
        short = pa.array([[0, 1, 2, 3], [0, 1, 2]], table.schema.field("tokens").type)
        pq.write_table(table.set_column(3, "tokens", short).replace_schema_metadata(table.schema.metadata), path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "metadata":
        pq.write_table(table.replace_schema_metadata({"lattice": "[1, 1, 2]"}), path)
    elif damage == "mixed":
        path.unlink()
        write(path, info(64), tokens)
    elif damage == "none":
        source = tmp_path / "empty"
        source.mkdir()
    elif damage == "absent":
        source = tmp_path / "nowhere"
    want = {
        "id": "id outside",
        "count": "has 3 ids",
        "cut": "not a readable Parquet",
        "metadata": "tokenizer_hash",
        "mixed": "another n_embed",
        "none": "has no shard",
        "absent": "no such file",
    }[damage]
    with pytest.raises(DataError, match=want):
        list(parquet.read_shards(source))


@pytest.mark.parametrize("word", ["<mesh-start>", "<mesh-end>", "<mesh17>", "<octree255>"])
def test_captions_and_names_have_no_word_of_meshes(word):
    prompts = sharegpt.Prompts("Make {caption}")
    with pytest.raises(DataError, match=f"contains {word}, a word of meshes"):
        sharegpt.records("ab", "chair.glb", "<mesh-start><mesh-end>", [f"a {word} b"], prompts)
    assert len(sharegpt.records("ab", f"{word}.glb", "-", ["a chair"], prompts)) == 2  # the name is in no text
    with pytest.raises(DataError, match=f"contains {word}"):
        sharegpt.records("ab", f"{word}.glb", "-", ["a chair"], sharegpt.Prompts("Make {caption}, {name}"))


def test_more_objects_than_a_file_holds_are_refused(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parquet.TokenInfo, "num_tokens", 2**29)
    assert script.main(flags(base, tmp_path / "out")) == 1
    said = f"--shard_size is {SHARD_SIZE}; a file holds at most 2 objects of this tokenizer"
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [".", "sharegpt", "a/../b"])
def test_conversations_do_not_go_into_the_folder_of_tokens(base, tmp_path, inside, capsys):
    with pytest.raises(SystemExit):
        script.main(flags(base, tmp_path / "out", "--sharegpt", tmp_path / "out" / inside))
    assert "in --output_dir, which has Parquet files alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key, texts",
    [
        (
            "lattice",
            ["null", "5", "[1, 2]", "[1, 1, 2.0]", '["a", 1, 2]', "[1, 1, 0]", "[1, 1, -2]", "[true, 1, 2]", ""],
        ),
        ("n_embed", ["null", "0", "-1", "32.0", "1e9", "[]", '"x"', "true", str(2**31)]),
        ("codes_per_token", ["null", "0", "1e9", "{}"]),
        ("resolution", ["null", "[64]", "NaN"]),
        ("empty_code", ["null", "0", '"true"']),
        ("left_out", ["", "5", "[5]", "{}x"]),
    ],
)
def test_metadata_that_cannot_be_are_refused(key, texts, tmp_path):
    path = tmp_path / "shard-00000-of-00001.parquet"
    write(path, info(), np.array([[0, 1, 2, 3]]))
    table = pq.read_table(path)
    for text in texts:
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key.encode(): text.encode()}), path)
        with pytest.raises(DataError, match=f"its metadata have no valid {key}"):
            list(parquet.read_shards(path))
            parquet.read_left_out(path)


def test_a_column_of_something_else_is_refused(tmp_path):
    path = tmp_path / "shard-00000-of-00001.parquet"
    write(path, info(), np.array([[0, 1, 2, 3]]))
    table = pq.read_table(path)
    for kind, value in (
        (pa.string(), "a"),
        (pa.int64(), 1),
        (pa.list_(pa.float32()), [0.0, 1.0, 2.0, 3.0]),
        (pa.list_(pa.string()), ["0"]),
    ):
        pq.write_table(table.set_column(3, "tokens", pa.array([value], kind)), path)
        with pytest.raises(DataError, match="not lists of whole numbers"):
            list(parquet.read_shards(path))
    pq.write_table(table.drop_columns(["sha256"]), path)
    with pytest.raises(DataError, match="has no column sha256"):
        list(parquet.read_names(path))
    pq.write_table(table.set_column(3, "tokens", pa.array([[0, 1, 2, 3]], pa.large_list(pa.int64()))), path)
    assert [row["tokens"].tolist() for row in parquet.read_shards(path)] == [[0, 1, 2, 3]]


def test_the_footer_is_read_as_pyarrow_reads_it(tmp_path):
    path = tmp_path / "shard-00000-of-00001.parquet"
    write(path, info(), np.random.default_rng(0).integers(0, 32, (40, 4)))
    pq.write_table(pq.read_table(path), path, row_group_size=17)
    found, metadata = read_row_groups(path), pq.read_metadata(path)
    assert [group.num_rows for group in found] == [17, 17, 6]
    for number, group in enumerate(found):
        columns = map(metadata.row_group(number).column, range(metadata.num_columns))
        assert group.num_values == {column.path_in_schema: column.num_values for column in columns}
        assert group.num_values["tokens.list.element"] == 4 * group.num_rows


def test_a_flipped_bit_never_gives_other_objects(tmp_path):
    path = tmp_path / "shard-00000-of-00001.parquet"
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (40, 4))
    write(path, info(), tokens)
    whole, found, harmless = path.read_bytes(), 0, 0
    flips = [(position, int(rng.integers(8))) for position in rng.permutation(len(whole))[:300].tolist()]
    # Checksums leave out headers of pages and the footer, whose fields often begin with one of these bytes.
    unguarded = [position for position in range(len(whole)) if whole[position] in (0x02, 0x15, 0x18, 0x25)]
    flips += [(position, bit) for position in unguarded for bit in range(8)]
    for position, bit in flips:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            rows = list(parquet.read_shards(path))
        except DataError:
            found += 1
        else:
            harmless += 1
            assert np.array_equal([row["tokens"] for row in rows], tokens)
            assert [row["sha256"] for row in rows] == [f"{i:064x}" for i in range(40)]
    assert found > harmless


# --- forms ---


@pytest.fixture(scope="module", params=["one", "two"])
def sparse(request, base) -> Path:
    """A tokenizer with an empty code and one or two codes a token."""
    models = tiny_config(VQ)["models"]
    models["quantizer"]["args"]["empty_code"] = True
    if request.param == "two":
        args = {"n_embed": 32, "embed_dim": 8, "latent_channels": 4, "empty_code": True}
        models["quantizer"] = {"name": "ResidualVectorQuantizer", "args": args}
    torch.manual_seed(0)
    tokenizer = SparseStructureTokenizer(models, 16)
    for name, value in tokenizer.quantizer.named_parameters():
        if name.startswith("embeddings"):
            value.data.normal_()
    tokenizer.save_pretrained(base / request.param)
    return base / request.param


def test_files_of_every_form_hold_the_same_ids(base, sparse, tmp_path, capsys):
    tokenizer = SparseStructureTokenizer.load(sparse)
    with np.load(base / "objects.npz") as file:
        grids = np.unpackbits(file["bits"], axis=1).reshape(-1, 1, 16, 16, 16)
    ids = tokenizer.encode(torch.from_numpy(grids)).numpy()
    assert 0.1 < (ids == 0).mean() < 0.9
    for form, flag in (("octree", ()), ("dense", ("--form", "dense")), ("octree-depth", ("--form", "octree-depth"))):
        out = tmp_path / form
        more = ("--tokenizer", sparse, *flag, "--sharegpt", "--verify", OBJECTS)
        assert script.main(flags(base, out, *more)) == 0
        assert "100.00% of the ids equal" in capsys.readouterr().out
        assert np.array_equal(np.stack([row["tokens"] for row in parquet.read_shards(out)]), ids)
        info = parquet.read_info(out)
        assert info == tokenizer.token_info("fp32", form) and info.empty_code
        words = tokenizer.token_format(form=form)
        stored = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path)["tokens"].to_pylist()]
        octree = words.octree
        assert stored == [row.tolist() if octree is None else octree.to_values(row).tolist() for row in ids]
        version = pq.read_schema(out / "shard-00000-of-00004.parquet").metadata[b"format_version"]
        assert version == (b"1" if form == "dense" else b"2")
        answers = [record["conversations"][1]["value"] for record in read_jsonl(tmp_path / f"{form}_sharegpt")]
        assert answers == tokenizer.to_text(torch.from_numpy(ids), form)
    assert script.main(flags(base, tmp_path / "octree", "--tokenizer", sparse, "--form", "dense")) == 1
    assert 'has other values of form ("octree", now "dense")' in capsys.readouterr().err


def test_an_octree_needs_an_empty_code(base, tmp_path, capsys):
    assert script.main(flags(base, tmp_path / "out", "--form", "octree")) == 1
    assert "form is 'octree', but the tokenizer has no id for empty blocks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["short", "long", "code", "null", "form"])
def test_damaged_sequences_are_refused(tmp_path, damage):
    path = tmp_path / "shard-00000-of-00001.parquet"
    octree = replace(info(), form="octree", empty_code=True)
    tokens = np.array([[0, 0, 0, 0], [1, 2, 0, 0], [3, 4, 5, 6]])
    write(path, octree, tokens)
    assert np.array_equal(np.stack([row["tokens"] for row in parquet.read_shards(path)]), tokens)
    table = pq.read_table(path)
    rows = table["tokens"].to_pylist()
    assert rows[0] == [] and len(rows[2]) == 5
    metadata = dict(table.schema.metadata)
    if damage == "form":
        metadata[b"form"] = b"spiral"
    else:
        rows[2] = {"short": rows[2][:-1], "long": [*rows[2], 1], "code": [1, *rows[2][1:]], "null": None}[damage]
    changed = table.set_column(3, "tokens", pa.array(rows, table.schema.field("tokens").type))
    pq.write_table(changed.replace_schema_metadata(metadata), path)
    where = re.escape(f"{path}: {2:064x}: " if damage in ("short", "long", "code") else str(path))
    want = {
        "short": "ends after 4 values",
        "long": "value 5 is code 1",
        "code": "value 0 is code 1",
        "null": "tokens of row 2 is missing",
        "form": "spiral",
    }
    with pytest.raises(DataError, match=f"{where}.*{want[damage]}"):
        list(parquet.read_shards(path))


def test_masks_count_among_the_numbers_that_files_can_hold(tmp_path):
    for n_embed, kind in ((2**16 - 255, pa.uint16()), (2**16 - 254, pa.int32())):
        path = tmp_path / f"{n_embed}.parquet"
        write(path, replace(info(n_embed), form="octree", empty_code=True), np.array([[n_embed - 1] * 4]))
        assert pq.read_schema(path).field("tokens").type.value_type == kind
        assert [row["tokens"].tolist() for row in parquet.read_shards(path)] == [[n_embed - 1] * 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_ends_all_processes_in_one_line_and_a_rerun_goes_on(processes, base, tokens, tmp_path):
    """Each shard is slow, and the signal comes after the first."""
    (tmp_path / "slow.py").write_text(
        f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from scripts import to_tokens
write = to_tokens.parquet.write_shard
def slowly(*args, **kwargs):
    write(*args, **kwargs)
    time.sleep(1)
to_tokens.parquet.write_shard = slowly
if __name__ == "__main__":
    sys.exit(to_tokens.main(sys.argv[1:]))
"""
    )
    command = [sys.executable, tmp_path / "slow.py", *flags(base, tmp_path / "out", "--iou", "--num_gpus", processes)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list((tmp_path / "out").glob("shard-*")):
            time.sleep(0.02)
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == "interrupted: run the same command again to go on" and "Traceback" not in errors
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert 2 <= len(made) < len(list(tokens.iterdir())) and not [name for name in made if name.endswith(".tmp")]
    assert script.main(flags(base, tmp_path / "out", "--iou")) == 0
    assert same_rows(tmp_path / "out", tokens)


def test_shards_give_the_ids_and_conversations_of_a_folder_of_the_same_objects(base, tmp_path):
    """Captions are a list in one object, a text in another, and missing in a third."""
    sha256 = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(3)]
    captions = ['["a box", "a cube"]', "a ball", ""]
    (tmp_path / "ply" / "voxels").mkdir(parents=True)
    with open(tmp_path / "ply" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sha256", "captions"), *zip(sha256, captions, strict=True)])
    for name, grid in zip(sha256, solid_grids(3, 16, 1), strict=True):
        write_ply(tmp_path / "ply" / "voxels" / f"{name}.ply", voxel_centers(np.argwhere(grid), 16))
    (tmp_path / "shards").mkdir()
    bits = np.packbits(solid_grids(3, 16, 1).reshape(3, -1), axis=1)
    columns = {"sha256": sha256, "captions": [["a box", "a cube"], ["a ball"], None]}
    write_shard(tmp_path / "shards" / "0.arrow", bits, 16, columns)
    for name in ("ply", "shards"):
        out = tmp_path / f"tokens_{name}"
        args = [*flags(base, out, "--sharegpt", tmp_path / f"talks_{name}", "--verify", 3)]
        args[args.index("--data_dir") + 1] = str(tmp_path / name)
        assert script.main(args) == 0
    assert same_rows(tmp_path / "tokens_ply", tmp_path / "tokens_shards")
    talks = [
        {path.name: path.read_bytes() for path in (tmp_path / f"talks_{name}" / sharegpt.DATASET).iterdir()}
        for name in ("ply", "shards")
    ]
    assert talks[0] == talks[1] and b"".join(talks[0].values()).count(b"\n") == 6


# --- meshes ---------------------------------------------------------------------------------------------------


def test_meshes_are_voxelized_as_the_tokenizer_has_it(base, tmp_path, capsys):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("numba")
    folder, out = tmp_path / "meshes", tmp_path / "out"
    folder.mkdir()
    meshes = {
        "box.obj": trimesh.creation.box((1, 2, 3)),
        "cone.stl": trimesh.creation.cone(1, 2),
        "ball.ply": trimesh.creation.icosphere(1),
    }
    for name, mesh in meshes.items():
        mesh.export(folder / name)
    (folder / "copy.stl").write_bytes((folder / "cone.stl").read_bytes())
    (folder / "broken.stl").write_bytes(b"solid nothing\nendsolid nothing\n")
    save_tokenizer(tmp_path / "y", 2, up_axis="y")
    tokenizer = SparseStructureTokenizer.load(tmp_path / "y")
    command = [
        "--tokenizer",
        str(tmp_path / "y"),
        "--output_dir",
        str(out),
        "--device",
        "cpu",
        "--max_workers",
        "1",
        "--shard_size",
        "2",
    ]
    assert script.main([*command, "--meshes", str(folder), "--verify", "3"]) == 0
    assert "verified 3 objects" in capsys.readouterr().out
    rows = {Path(row["name"]).name: row for row in parquet.read_shards(out)}
    assert rows.keys() == meshes.keys()
    for name, row in rows.items():
        assert row["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert np.array_equal(row["tokens"], tokenizer.encode(folder / name)[0].numpy())
        assert row["num_voxels"] == tokenizer.grid_of_file(folder / name).sum()
    (left_out,) = csv.DictReader((tmp_path / "out_failed.csv").read_text().splitlines())
    assert left_out["file"] == str(folder / "broken.stl") and left_out["reason"] == "has no triangles"
    # The same files under other names are the same data.
    (folder / "box.obj").rename(folder / "cube.obj")
    assert script.main([*command, "--meshes", *map(str, folder.iterdir())]) == 0
    assert "0 of them new" in capsys.readouterr().out

    assert script.main([*command, "--meshes", str(folder / "broken.stl"), "--output_dir", str(tmp_path / "none")]) == 1
    assert "no object has ids" in capsys.readouterr().err


def test_meshes_that_go_or_change_while_it_runs_cost_themselves_alone(base, tmp_path, monkeypatch, capsys):
    from dataset_toolkits import plan, work

    for i in range(4):
        tetrahedron(1 + i).export(tmp_path / f"{i}.stl")
    planned = plan.plan_meshes

    def plan_and_change(*args):
        made = planned(*args)
        (tmp_path / "1.stl").unlink()
        (tmp_path / "2.stl").write_bytes((tmp_path / "3.stl").read_bytes())
        return made

    monkeypatch.setattr(plan, "plan_meshes", plan_and_change)
    command = ["--tokenizer", base / "tokenizer", "--meshes", tmp_path, "--output_dir", tmp_path / "out"]
    assert script.main([*map(str, command), "--device", "cpu", "--max_workers", "1"]) == 0
    assert sorted(Path(row["name"]).name for row in parquet.read_shards(tmp_path / "out")) == ["0.stl", "3.stl"]
    lines = (tmp_path / "out_failed.csv").read_text().splitlines()
    failed = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(lines)}
    assert failed == {"1.stl": "cannot be read: No such file or directory", "2.stl": work.CHANGED}


def test_the_axes_of_meshes_may_be_taken_in_another_way(base, tmp_path, capsys):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("numba")
    mesh = tmp_path / "box.glb"
    trimesh.creation.box((1.0, 0.25, 0.5)).export(mesh)
    tokenizer = SparseStructureTokenizer.load(base / "tokenizer")
    command = ["--tokenizer", str(base / "tokenizer"), "--meshes", str(mesh), "--device", "cpu", "--max_workers", "1"]
    trimesh.creation.box((1.0, 0.5, 0.25)).export(tmp_path / "box.obj")
    for up_axis in ("auto", "z"):
        out = ["--output_dir", str(tmp_path / up_axis)]
        more = [] if up_axis == "auto" else ["--up_axis", up_axis]
        assert script.main([*command, *out, *more, "--verify", "1"]) == 0
        (row,) = parquet.read_shards(tmp_path / up_axis)
        assert np.array_equal(row["tokens"], tokenizer.encode(mesh, up_axis=up_axis)[0].numpy())
        found = parquet.read_info(tmp_path / up_axis)
        assert found.up_axis == up_axis and found.tokenizer_hash == tokenizer.hash
        assert ("noted: " + str(mesh) in capsys.readouterr().out) == (up_axis == "z")
        for other in {"auto", "y", "z"} - {up_axis}:
            assert script.main([*command, *out, "--up_axis", other]) == 1
            assert f'has other values of up_axis ("{up_axis}", now "{other}")' in capsys.readouterr().err
        assert script.main([*command, *out, "--up_axis", up_axis]) == 0  # said aloud
        assert "0 of them new" in capsys.readouterr().out
    command[3] = str(tmp_path / "box.obj")
    assert script.main([*command, "--output_dir", str(tmp_path / "obj"), "--verify", "1"]) == 0
    said = f"  noted: {tmp_path / 'box.obj'}: its format does not say which axis is up: taken as they are."
    assert capsys.readouterr().out.count(said) == 1
    save_tokenizer(tmp_path / "shapellm", 0, normalization="shapellm")
    command[1] = str(tmp_path / "shapellm")
    assert script.main([*command, "--output_dir", str(tmp_path / "shapellm_tokens")]) == 0
    said = f"  noted: {tmp_path / 'box.obj'}: its format does not say which axis is up: taken as y-up\n"
    assert said in capsys.readouterr().out  # and nothing else can be said


def test_the_up_axis_goes_with_meshes_and_the_normalization(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(flags(base, tmp_path / "out", "--up_axis", "y"))
    assert "--up_axis goes with --meshes" in capsys.readouterr().err
    save_tokenizer(tmp_path / "shapellm", 0, normalization="shapellm")
    (tmp_path / "a.stl").write_bytes(b"")
    command = ["--tokenizer", tmp_path / "shapellm", "--meshes", tmp_path / "a.stl", "--output_dir", tmp_path / "out"]
    assert script.main([*map(str, command), "--device", "cpu", "--up_axis", "z"]) == 1
    assert "up_axis 'z': normalization \"shapellm\"" in capsys.readouterr().err


# --- conversations -----------------------------------------------------------------------------------------------


def read_jsonl(folder: Path) -> list[dict]:
    files = sorted((folder / "mesh_tokens").iterdir())
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def assert_published_rules(folder: Path) -> None:
    """data/README.md of LLaMA-Factory: the entry of dataset_info.json, files of one kind in its folder, and turns of
    human at odd and of gpt at even places, none empty."""
    (entry,) = json.loads((folder / "dataset_info.json").read_text()).values()
    assert entry["formatting"] == "sharegpt"
    assert {path.suffix for path in (folder / entry["file_name"]).iterdir()} == {".jsonl"}
    tags, column = entry["tags"], entry["columns"]["messages"]
    for record in read_jsonl(folder):
        turns = record[column]
        assert len(turns) % 2 == 0
        for place, turn in enumerate(turns, 1):
            assert turn[tags["role_tag"]] == tags["user_tag" if place % 2 else "assistant_tag"]
            assert isinstance(turn[tags["content_tag"]], str) and turn[tags["content_tag"]].strip()


@pytest.fixture(scope="module")
def captioned(base) -> tuple[Path, dict[str, list[str]]]:
    """A PLY root of four objects with two, one, one and no captions."""
    root = base / "captioned"
    captions = {
        f"{i:064x}": texts
        for i, texts in enumerate((["a {round} thing", 'ein "Ding"\nmit Ecken'], ["[a bracket"], ["Größe, 2 × 3"], []))
    }
    (root / "voxels").mkdir(parents=True)
    for sha256, grid in zip(captions, solid_grids(4, 16, 5), strict=True):
        write_ply(root / "voxels" / f"{sha256}.ply", voxel_centers(np.argwhere(grid), 16))
    with open(root / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sha256", "captions"])
        rows.writerows(
            (sha256, json.dumps(texts) if len(texts) > 1 else "".join(texts)) for sha256, texts in captions.items()
        )
    return root, captions


def test_captions_give_a_record_in_either_direction(base, captioned, tmp_path, capsys, monkeypatch):
    root, captions = captioned
    more = ("--data_dir", root, "--shard_size", 1, "--sharegpt")
    asked = ("--prompt", "Build {caption}.", "--describe_prompt", "What is {mesh}?")
    out, texts = tmp_path / "out", tmp_path / "out_sharegpt"
    assert script.main(flags(base, out, *more, *asked)) == 0
    said = capsys.readouterr().out
    assert "8 new conversations" in said
    assert "note: 1 of 4 objects have no {caption}, and so no conversation" in said and "names" not in said
    assert_published_rules(texts)
    words = SparseStructureTokenizer.load(base / "tokenizer").token_format()

    def wanted(build: str, describe: str, captions: dict[str, list[str]]) -> list[tuple[str, str, str]]:
        records = []
        for row in parquet.read_shards(out):
            mesh, each = words.to_text(row["tokens"]), captions.get(row["sha256"], [])
            records += [(row["sha256"], build.format(text), mesh) for text in each]
            records += [(row["sha256"], describe.format(mesh), text) for text in each]
            assert np.array_equal(words.from_text(mesh, len(row["tokens"])).ids, row["tokens"])
        return records

    def got() -> list[tuple[str, str, str]]:
        records = read_jsonl(texts)
        return [(record["sha256"], *(turn["value"] for turn in record["conversations"])) for record in records]

    assert got() == wanted("Build {}.", "What is {}?", captions)
    (texts / "mesh_tokens" / "shard-00001-of-00004.jsonl").unlink()
    assert script.main(flags(base, out, *more, *asked)) == 0
    assert "2 new conversations" in capsys.readouterr().out

    # Other prompts and captions replace the texts alone.
    def encode(*_):
        raise AssertionError("encoded anew")

    monkeypatch.setattr(SparseStructureTokenizer, "encode", encode)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (texts / "dataset_info.json").write_text(json.dumps({"mine": {}, **sharegpt.dataset_info()}))
    assert script.main(flags(base, out, *more, "--prompt", "Make {caption}.")) == 0
    said = capsys.readouterr().out
    assert "8 new conversations" in said and "had other prompts or captions and are replaced" in said
    assert got() == wanted("Make {}.", "Describe this 3D model: {}", captions)
    sha256 = list(captions)[2]
    (tmp_path / "new.json").write_text(json.dumps({sha256: "a chair"}))
    changed = (*more, "--captions", tmp_path / "new.json")
    assert script.main(flags(base, out, *changed, "--rank", 0, "--world_size", 2)) == 1
    assert "other prompts or captions (--captions, --prompt), which another machine" in capsys.readouterr().err
    assert script.main(flags(base, out, *changed)) == 0
    assert got() == wanted("Make a 3D model of this: {}", "Describe this 3D model: {}", {sha256: ["a chair"]})
    assert "mine" in json.loads((texts / "dataset_info.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_conversations_do_not_mix_with_what_is_there(base, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "dataset_info.json").write_text("{}")
    assert script.main(flags(base, tmp_path / "out", "--sharegpt", texts)) == 1
    assert f"{texts}: has other data. Give --sharegpt another folder" in capsys.readouterr().err
    (texts / "dataset_info.json").unlink()
    assert script.main(flags(base, tmp_path / "out", "--sharegpt", texts)) == 0
    before = {path: path.read_bytes() for path in texts.rglob("*.json*")}
    assert script.main(flags(base, tmp_path / "part", "--sharegpt", texts, "--split", "train")) == 1
    assert f"{texts}: has conversations of other tokens (data.data, data.objects" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in texts.rglob("*.json*")} == before


@pytest.mark.parametrize("form", ["csv", "dict.json", "list.json"])
def test_captions_of_a_file(base, captioned, tmp_path, form):
    sha256, other = list(captioned[1])[:2]
    content = {
        "csv": f"caption,sha256\na chair,{sha256}\n,{other}\n",
        "dict.json": json.dumps({sha256: "a chair", other: []}),
        "list.json": json.dumps([{"sha256": sha256, "captions": ["a chair"]}]),
    }[form]
    (tmp_path / form).write_text(content)
    more = ("--data_dir", captioned[0], "--sharegpt", "--captions", tmp_path / form)
    assert script.main(flags(base, tmp_path / "out", *more)) == 0
    first, second = read_jsonl(tmp_path / "out_sharegpt")
    assert first["sha256"] == second["sha256"] == sha256
    assert first["conversations"][0]["value"] == "Make a 3D model of this: a chair"
    assert second["conversations"][1]["value"] == "a chair"


def test_objects_without_captions_are_asked_for_by_name(base, tmp_path, capsys):
    assert script.main(flags(base, tmp_path / "out", "--sharegpt", tmp_path / "texts")) == 0
    said = "note: the objects have no captions: conversations ask for them by the names of their files\n"
    assert said in capsys.readouterr().out
    assert_published_rules(tmp_path / "texts")
    questions = [record["conversations"][0]["value"] for record in read_jsonl(tmp_path / "texts")]
    assert questions == [f"Make a 3D model of this: object {i}" for i in range(OBJECTS)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "Make {color}"], "{color} is not known"),
        (["--prompt", "Make {"], "Single '{'"),
        (["--prompt", " "], "--prompt is empty"),
        (["--describe_prompt", "What?"], "must contain {mesh}"),
        (["--prompt", "Make {caption}"], "Give --captions"),
        (["--captions", "{here}/none.csv"], "cannot be read"),
        (["--captions", "{here}/foreign.json"], "no caption of any object"),
        (["--captions", "{here}/columns.csv"], "columns are sha256, text"),
    ],
)
def test_conversations_that_cannot_be_are_refused_first(base, tmp_path, more, message, capsys):
    (tmp_path / "foreign.json").write_text('{"ab": "a chair"}')
    (tmp_path / "columns.csv").write_text("sha256,text\nab,a chair\n")
    more = [word.replace("{here}", str(tmp_path)) for word in more]
    assert script.main(flags(base, tmp_path / "out", "--sharegpt", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "as many by gpt"),
        ([("human", "a")], "as many by gpt"),
        ([("gpt", "a"), ("human", "b")], "turn 1 is by 'gpt'"),
        ([("human", "a"), ("human", "b")], "turn 2 is by 'human'"),
        ([("human", "a"), ("gpt", " ")], "has no text"),
        ([("human", "an <image>"), ("gpt", "b")], "<image>"),
    ],
)
def test_records_against_the_rules_are_refused(turns, message):
    with pytest.raises(DataError, match=message):
        sharegpt.check_record({"conversations": [{"from": role, "value": text} for role, text in turns]}, "here")


# --- scripts ------------------------------------------------------------------------------------------------------


def test_absent_pyarrow_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        parquet.require_pyarrow()
