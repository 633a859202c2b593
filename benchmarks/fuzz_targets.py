"""What is fuzzed: readers of files and texts that strangers write, and valid seeds for each."""

import io
import json
import signal
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

import train
from benchmarks.common import tiny_models
from benchmarks.fuzz_mutations import (
    NASTY,
    mutate_arrays,
    mutate_bytes,
    mutate_json,
    mutate_parquet,
    mutate_safetensors,
    mutate_tensors,
    mutate_words,
    mutate_zip,
)
from trellis import SparseStructureTokenizer
from trellis.datasets import shards
from trellis.datasets.packed import load_packed, load_text, save_packed
from trellis.datasets.shards import write_shard
from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.voxels import pack_bits, points_to_voxels, read_ply, voxel_centers, write_ply
from trellis.models import read_weights
from trellis.tokens import parquet
from trellis.tokens.octree import Octree
from trellis.tokens.sources import read_note
from trellis.tokens.text import TokenFormat
from trellis.utils.config import apply_override, load_config
from trellis.utils.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = 16
LONGEST_MESSAGE = 4000  # characters


class Target(NamedTuple):
    """A reader.

    seeds: valid inputs.
    run: reads an input in an empty folder; a UserError is a good end.
    mutate: changes an input by what it knows of the format.
    """

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], object]
    mutate: Callable[[Random, bytes], bytes]


class Finding(NamedTuple):
    """A bad end.

    kind: "traceback", "hang", "memory" or "message".
    text: the traceback or the message.
    """

    kind: str
    text: str


def mutated(target: Target, rng: Random, data: bytes) -> bytes:
    """Return an input after one to three mutations."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            data = target.mutate(rng, data)
        except Exception:  # a library that cannot write what is asked for
            data = mutate_bytes(rng, data)
    return data


class _TooSlow(BaseException):
    """More seconds than an input may take."""


def attempt(target: Target, data: bytes, folder: Path, seconds: float) -> Finding | None:
    """Run a target on an input, in the main thread. Return what is wrong with how it ends, None if nothing is."""

    def stop(signum: int, frame: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data, folder)
    except UserError as error:
        if "\n" in str(error) or len(str(error)) > LONGEST_MESSAGE:
            return Finding("message", str(error)[:LONGEST_MESSAGE])
    except _TooSlow:
        return Finding("hang", traceback.format_exc())
    except MemoryError:
        return Finding("memory", traceback.format_exc())
    except Exception:
        return Finding("traceback", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return None


# --- seeds and targets -----------------------------------------------------------------------------------


@cache
def _tokenizer(empty_code: bool = False) -> SparseStructureTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = SparseStructureTokenizer(tiny_models(empty_code=empty_code), RESOLUTION)
        tokenizer.quantizer.table().data.normal_()
    return tokenizer


def _written(write: Callable[[Path], object], name: str) -> bytes:
    """Return the bytes of a file that `write` makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path)
        return path.read_bytes()


@cache
def _saved() -> tuple[bytes, bytes]:
    """Return config.json and model.safetensors of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        _tokenizer().save_pretrained(folder)
        return Path(folder, "config.json").read_bytes(), Path(folder, "model.safetensors").read_bytes()


@cache
def _grid() -> np.ndarray:
    x, y, z = np.ogrid[:RESOLUTION, :RESOLUTION, :RESOLUTION]
    return abs((x - 7) ** 2 + (y - 8) ** 2 + (z - 9) ** 2 - 30) < 9


def _packed() -> list[bytes]:
    bits = pack_bits(np.stack([_grid()] * 2))
    texts = {"name": np.array(["a", "b"]), "split": np.array(["train", "val"]), "frame": np.array(["{}", ""])}
    plain = io.BytesIO()
    np.savez(plain, bits=bits)
    return [_written(lambda path: save_packed(path, bits, texts), "a.npz"), plain.getvalue()]


def _run_packed(data: bytes, folder: Path) -> None:
    path = _put(data, folder, "a.npz")
    try:
        load_packed(path)
    finally:
        load_text(path, "split")


def _grid_shards() -> list[bytes]:
    bits = pack_bits(np.stack([_grid()] * 3))
    names = {"sha256": [digit * 64 for digit in "abc"]}
    columns = {"captions": [["a", "b"], None, []], "split": ["val", None, ""], "mm_per_cell": [1.0, None, 2.5]}
    return [
        _written(lambda path, columns=each: write_shard(path, bits, RESOLUTION, columns), "a.arrow")  # type: ignore[misc]
        for each in (names, {**names, **columns, "fill": ["solid"] * 3, "license": ["CC0", None, "x"]})
    ]


def _mutate_shard(rng: Random, data: bytes) -> bytes:
    """Mutate bytes around the columns, mostly, and let the sum of the framing fit, so that Arrow gets to see them."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    content = bytearray(data)
    edge = rng.choice((0, max(0, len(content) - 2000)))
    place = min(edge + rng.randrange(2000), len(content) - 1)
    content[place] = rng.choice((content[place] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
    framing, places = shards.framing(content)
    for place in places:
        content[place : place + 8] = f"{zlib.crc32(framing):08x}".encode()
    return bytes(content)


def _run_grid_shard(data: bytes, folder: Path) -> None:
    dataset = SparseStructure(str(_put(data, folder, "a.arrow")), resolution=RESOLUTION, split="all")
    dataset.get_batch(np.arange(len(dataset)))
    dataset.columns_of(np.arange(len(dataset)))


def _voxels() -> list[bytes]:
    centers = voxel_centers(np.argwhere(_grid()), RESOLUTION)
    rows = "".join(f"{x:g} {y:g} {z:g}\n" for x, y, z in centers[:9].tolist())
    head = "ply\nformat ascii 1.0\nelement vertex 9\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    return [_written(lambda path: write_ply(path, centers), "a.ply"), (head + rows).encode()]


def _texts() -> list[bytes]:
    ids = torch.arange(64) % 32
    sparse = torch.where(torch.arange(64) % 5 == 0, ids.clamp(min=1), 0)
    made = [_formats()[0].to_text(ids), *(words.to_text(sparse) for words in _formats()[1:])]
    return [text.encode() for text in (*made, f"Here it is: {made[0]} I hope that helps.", "<mesh-start><mesh-end>")]


@cache
def _formats() -> list[TokenFormat]:
    trees = (Octree((4, 4, 4), 32, 1, order) for order in ("breadth", "depth"))
    return [TokenFormat.at(0, 32), *(TokenFormat.at(0, 32, tree) for tree in trees)]


def _run_text(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    for words in _formats():
        whole = words.from_text(text, 64 if words.octree is None else None, strict=False).ids
        if whole.shape != (64,) or int(whole.min()) < 0 or int(whole.max()) >= 32:
            raise AssertionError(f"repaired to {whole}")
        try:
            strict = words.from_text(text, 64 if words.octree is None else None).ids
        except UserError:
            continue
        if not torch.equal(strict, whole):
            raise AssertionError(f"strict {strict} and repaired {whole} differ")


def _mutate_text(rng: Random, data: bytes) -> bytes:
    """Move words of a token text, or damage them."""
    if not rng.randrange(3):
        return mutate_bytes(rng, data)
    words = data.replace(b"><", b">\0<").split(b"\0")
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(words))
        new = (b"<mesh-start>", b"<mesh-end>", b"<mesh-5>", b"<mesh99>", b"<mesh" + b"9" * 5000 + b">", b"<octree0>")
        words[at : at + rng.randrange(3)] = [rng.choice((*new, b"<octree255>", b"<mesh0>", b" text ", *words))]
    return b"".join(words)


def _shards() -> list[bytes]:
    seeds = []
    for empty, form in ((False, "dense"), (True, "dense"), (True, "octree"), (True, "octree-depth")):
        info = _tokenizer(empty).token_info(form=form)
        ids = np.arange(3 * 64).reshape(3, 64) % 32

        def write(path: Path, info: parquet.TokenInfo = info, ids: np.ndarray = ids) -> None:
            left_out = [{"file": "c", "sha256": "3", "reason": "why"}]
            lists = list("abc"), ["x", "y", "z"], [None, "s", "t"], ids, np.arange(3)
            parquet.write_shard(path, info, *lists, np.ones(3), left_out, ["{}", None, None], {"data": {"a": 1}})

        seeds.append(_written(write, "a.parquet"))
    return seeds


def _run_parquet(data: bytes, folder: Path) -> None:
    path = _put(data, folder, "a.parquet")
    steps: tuple[Callable[[], object], ...] = (
        lambda: list(parquet.read_shards(path)),
        lambda: list(parquet.read_names(path)),
        lambda: parquet.read_left_out(path),
        lambda: parquet.read_data_key(path),
        lambda: parquet.read_column(path, "iou"),
        lambda: parquet.count_rows(path),
    )
    errors = []
    for step in steps:
        try:
            step()
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _run_weights(data: bytes, folder: Path) -> None:
    path = _put(data, folder, "model.safetensors")
    (folder / "config.json").write_bytes(_saved()[0])
    read_weights(path)
    read_note(path, "canary")
    SparseStructureTokenizer.load(folder)


def _run_folder(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(_saved()[1])
    _put(data, folder, "config.json")
    SparseStructureTokenizer.load(folder).token_info()


def _run_shapellm(data: bytes, folder: Path) -> None:
    SparseStructureTokenizer.load(_put(data, folder, "3DVQVAE.bin"))


def _configs() -> list[bytes]:
    names = ("demo_vae", "demo_stage1", "demo_stage2", "recipe_1024_stage2", "recipe_sparse8x4_stage2")
    return [Path(ROOT, "configs", "vae", f"{name}.json").read_bytes() for name in names]


def _run_config(data: bytes, folder: Path) -> None:
    train.check_config(load_config(str(_put(data, folder, "config.json"))), 1)


def _overrides() -> list[bytes]:
    return [b"trainer.args.max_steps=5", b"models.encoder.args.channels=[16, 32, 64]", b"dataset.name=SparseStructure"]


def _run_override(data: bytes, folder: Path) -> None:
    config = json.loads(_configs()[1])
    apply_override(config, data.decode("utf-8", "replace"))
    train.check_config(config, 1)


def _mutate_override(rng: Random, data: bytes) -> bytes:
    key, _, value = data.partition(b"=")
    match rng.randrange(5):
        case 0:
            return mutate_bytes(rng, data)
        case 1:
            return key + b"=" + b"[" * 100_000
        case 2:
            paths = (
                b"trainer.args.optimizer",
                b"models.decoder.args.channels",
                b"trainer.args.lr_scheduler",
                b"models",
            )
            return rng.choice(paths) + b"=" + json.dumps(rng.choice(NASTY)).encode()
        case 3:
            return b".".join([key] * rng.choice((2, 1000))) + b"=" + value
        case _:
            return key + b"=" + mutate_json(rng, value)


def _page() -> list[bytes]:
    from trellis.viewer.backend import pack_grid, pack_ids

    return [json.dumps({"grid": pack_grid(_grid()), "ids": pack_ids(np.arange(64) % 32), "code": 3}).encode()]


def _run_page(data: bytes, folder: Path) -> None:
    from trellis.viewer.backend import unpack_grid, unpack_ids

    try:
        sent = json.loads(data)
    except (ValueError, RecursionError):
        return  # the web framework's part
    if isinstance(sent, dict):
        unpack_grid(sent.get("grid"), RESOLUTION)  # type: ignore[arg-type]
        unpack_ids(sent.get("ids"), 64, 32)  # type: ignore[arg-type]


CORNERS = np.array([(0, 0, 0), (4, 0, 0), (0, 2, 0), (1, 0.5, 3)])
TRIANGLES = np.array([(0, 2, 1), (0, 1, 3), (1, 2, 3), (2, 0, 3)])


def _meshes(suffix: str) -> list[bytes]:
    import trimesh

    mesh = trimesh.Trimesh(CORNERS, TRIANGLES, process=False)
    made: Any = mesh.export(file_type=suffix)
    return [made if isinstance(made, bytes) else made.encode()]


def _3mf() -> list[bytes]:
    vertices = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in CORNERS)
    triangles = "".join(f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in TRIANGLES)
    model = (
        '<model unit="millimeter" xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02"><resources>'
        f'<object id="1"><mesh><vertices>{vertices}</vertices><triangles>{triangles}</triangles></mesh></object>'
        '</resources><build><item objectid="1"/></build></model>'
    )
    start = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r0" '
        'Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel" Target="/3D/3dmodel.model"/>'
        "</Relationships>"
    )
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("_rels/.rels", start)
        archive.writestr("3D/3dmodel.model", model)
    return [made.getvalue()]


def _gltf() -> list[bytes]:
    import base64

    points, corners = CORNERS.astype("<f4").tobytes(), TRIANGLES.astype("<u2").tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"children": [1], "scale": [2, 2, 2]}, {"mesh": 0, "translation": [1, 0, 0]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3", "min": [0, 0, 0], "max": [4, 2, 3]},
            {"bufferView": 1, "componentType": 5123, "count": 12, "type": "SCALAR"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteLength": len(points)},
            {"buffer": 0, "byteOffset": len(points), "byteLength": len(corners)},
        ],
        "buffers": [
            {
                "byteLength": len(points + corners),
                "uri": "data:application/octet-stream;base64," + base64.b64encode(points + corners).decode(),
            }
        ],
    }
    return [json.dumps(tree).encode()]


def _vtp() -> list[bytes]:
    points = " ".join(f"{value:g}" for value in CORNERS.ravel())
    corners = " ".join(map(str, TRIANGLES.ravel()))
    return [
        f'<VTKFile type="PolyData" version="0.1" byte_order="LittleEndian"><PolyData><Piece NumberOfPoints="4" '
        f'NumberOfVerts="0" NumberOfLines="0" NumberOfStrips="0" NumberOfPolys="4"><Points><DataArray type="Float32" '
        f'NumberOfComponents="3" format="ascii">{points}</DataArray></Points><Polys><DataArray type="Int32" '
        f'Name="connectivity" format="ascii">{corners}</DataArray><DataArray type="Int32" Name="offsets" '
        f'format="ascii">3 6 9 12</DataArray></Polys></Piece></PolyData></VTKFile>'.encode()
    ]


def _opens(suffix: str) -> Callable[[bytes, Path], None]:
    """Return what opens an upload of this suffix, as the page does."""

    def run(data: bytes, folder: Path) -> None:
        from trellis.viewer.uploads import open_shape

        path = _put(data, folder, f"a{suffix}")
        try:
            open_shape(path, RESOLUTION, "auto", "cube", True)
        except DataError as error:
            if "MemoryError" in str(error):
                raise MemoryError(str(error)) from error
            # A library's words may have several lines; the readers' own have one.
            raise DataError(" ".join(str(error).split())) from error

    return run


def _put(data: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _of_all(*mutations: Callable[[Random, bytes], bytes]) -> Callable[[Random, bytes], bytes]:
    return lambda rng, data: rng.choice(mutations)(rng, data)


TARGETS = {
    "voxels": Target(_voxels, lambda data, folder: points_to_voxels(read_ply(_put(data, folder, "a.ply")), RESOLUTION),
                     mutate_words),
    "packed": Target(_packed, _run_packed, mutate_arrays),
    "shard": Target(_grid_shards, _run_grid_shard, _mutate_shard),
    "text": Target(_texts, _run_text, _mutate_text),
    "parquet": Target(_shards, _run_parquet, mutate_parquet),
    "weights": Target(lambda: [_saved()[1]], _run_weights, mutate_safetensors),
    "folder": Target(lambda: [_saved()[0]], _run_folder, mutate_json),
    "shapellm": Target(lambda: [_written(_tokenizer().export_shapellm, "a.bin")], _run_shapellm, mutate_tensors),
    "config": Target(_configs, _run_config, mutate_json),
    "set": Target(_overrides, _run_override, _mutate_override),
    "page": Target(_page, _run_page, mutate_json),
    "gltf": Target(_gltf, _opens(".gltf"), mutate_json),
    "glb": Target(lambda: _meshes("glb"), _opens(".glb"), mutate_bytes),
    "obj": Target(lambda: _meshes("obj"), _opens(".obj"), mutate_words),
    "ply": Target(lambda: _meshes("ply"), _opens(".ply"), mutate_words),
    "stl": Target(lambda: _meshes("stl"), _opens(".stl"), mutate_bytes),
    "off": Target(lambda: _meshes("off"), _opens(".off"), mutate_words),
    "vtp": Target(_vtp, _opens(".vtp"), mutate_words),
    "3mf": Target(_3mf, _opens(".3mf"), mutate_zip),
}  # fmt: skip
