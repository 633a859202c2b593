"""What is fuzzed: readers of files and texts that strangers write, valid seeds for each, and mutations of these.

Mutations know the formats: they change a value of a JSON document, an array of an archive, a column of a table or a
word of a header, and write a valid container around it. Plain damage of bytes ends in the first check.
"""

import io
import json
import signal
import struct
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

import train
from trellis import SparseStructureTokenizer
from trellis.datasets.packed import load_packed, load_text, save_packed
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
NASTY: tuple[Any, ...] = (
    *(None, True, [], {}, "", "x" * 300, "../../x", -1, 0, 1, 2, 3, 7, 255, 65536, 2**20, 2**31 - 1, 2**31, 2**53),
    *(2**62, 2**63, 2**64, -(2**63), 10**30, 1e308, 0.5, float("nan"), float("inf"), [[]], [1], ["a"], {"name": "x"}),
)


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


# --- mutations -------------------------------------------------------------------------------------------


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or overwrite some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 2, 4, 8, 64, 1000)))
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:end]
            case 2:
                out[at:at] = out[at:end]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
            case 4:
                number = rng.choice((0, 1, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
                out[at : at + 8] = struct.pack(rng.choice("<>") + "Q", number)
            case _:
                del out[at:]
    return bytes(out)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value inside."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            if isinstance(node[key], dict | list):
                waiting.append(node[key])


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Change a value or a key of a JSON document."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    match rng.randrange(20):
        case 0:
            return b"[" * rng.choice((100, 100_000)) + data
        case 1:
            return data.replace(b'"', b'"\\ud800', 1)
        case 2:
            return mutate_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value)) if isinstance(value, dict | list) else []
        if not places:
            return json.dumps(rng.choice(NASTY)).encode()
        node, key = rng.choice(places)
        other, other_key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1 | 2:
                node[key] = rng.choice(NASTY)
            case 3:
                del node[key]
            case 4:
                node[key] = json.loads(json.dumps(other[other_key]))
            case 5:
                node[key] = [node[key]]
            case 6 if isinstance(node, dict):
                node[f"{key}{rng.choice(('', 'x', ' '))}"] = rng.choice(NASTY)
            case _:
                if isinstance(node[key], int | float) and not isinstance(node[key], bool):
                    node[key] = rng.choice((node[key] + 1, node[key] * 1000, node[key] * 2**31, -node[key]))
                else:
                    value = json.loads(json.dumps(value))
                    return json.dumps(value).encode().replace(b"{", b'{"name": 1, "name": 2, ', 1)
    return json.dumps(value).encode()


def mutate_words(rng: Random, data: bytes) -> bytes:
    """Change a word of a text, also of the text at the start of a binary file."""
    if not rng.randrange(4):
        return mutate_bytes(rng, data)
    head, tail = data[:2000], data[2000:]
    words = head.split(b" ")
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(len(words))
        nasty = rng.choice(NASTY)
        match rng.randrange(4):
            case 0:
                words[at] = str(nasty).encode()
            case 1:
                words[at] = rng.choice(words)
            case 2:
                lines = words[at].split(b"\n")
                lines[rng.randrange(len(lines))] = str(nasty).encode()
                words[at] = b"\n".join(lines)
            case _:
                words[at:at] = [rng.choice(words)]
    return b" ".join(words) + tail


def mutate_zip(rng: Random, data: bytes) -> bytes:
    """Change the content, the name or a header of a member of a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename for info in archive.infolist()]
            contents = [archive.read(info) for info in archive.infolist()]
    except Exception:  # what is damaged already
        return mutate_bytes(rng, data)
    if not names:
        return mutate_bytes(rng, data)
    number = rng.randrange(len(names))
    kind = rng.randrange(6)
    if kind == 0:
        names.append(names[number])
        contents.append(rng.choice(contents))
    elif kind == 1:
        names[number] = rng.choice(("", "../x", "bits.npy", "sha256.npy", "format.npy", "a" * 300))
    elif kind == 2:
        del names[number], contents[number]
    else:
        contents[number] = mutate_bytes(rng, contents[number])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in zip(names, contents, strict=True):
                archive.writestr(name or "x", content)
    out = bytearray(buffer.getvalue())
    if kind == 5 and (start := out.find(b"PK\x01\x02")) > 0:  # version, flags, method, CRC, sizes of a member
        out[start + rng.randrange(4, 46)] = rng.randrange(256)
    return bytes(out)


def mutate_arrays(rng: Random, data: bytes) -> bytes:
    """Give an array of an .npz another type or shape."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception:
        return mutate_bytes(rng, data)
    if not arrays or rng.randrange(2):
        return mutate_zip(rng, data)
    name = rng.choice(sorted(arrays))
    old: Any = arrays[name]
    changed = (
        lambda: np.array(rng.choice([value for value in NASTY if value is not None]), dtype=object),
        lambda: np.asarray(old).astype(rng.choice(("<f2", ">i8", "<U3", "S2", "?", "<c8"))),
        lambda: np.asarray(old)[..., None],
        lambda: np.asarray(old).reshape(-1)[:0],
        lambda: np.array(rng.choice((0, 1, 2, 2**31, -1, 1.5, "1"))),
        lambda: np.array([np.datetime64("2020"), np.datetime64("NaT")]),
        lambda: np.zeros(3, dtype=[("a", "<i4"), ("b", "<U2")]),
    )
    try:
        arrays[rng.choice((name, "format", "split", "sha256"))] = rng.choice(changed)()
    except (ValueError, TypeError):
        return mutate_zip(rng, data)
    buffer = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(buffer, allow_pickle=True, **arrays)
    return buffer.getvalue()


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, or its length."""
    if len(data) < 8 or not rng.randrange(4):
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    try:
        notes = json.loads(header)
        meta = notes["__metadata__"]
        if rng.randrange(2):  # what a note says is JSON inside JSON
            key = rng.choice(sorted(meta))
            meta[key] = mutate_json(rng, meta[key].encode()).decode("utf-8", "replace")
            header = json.dumps(notes).encode()
        else:
            header = mutate_json(rng, header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        header = mutate_json(rng, header)
    length = len(header) if rng.randrange(8) else rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + body


def mutate_tensors(rng: Random, data: bytes) -> bytes:
    """Put something else into a file of `torch.save`."""
    try:
        state: Any = torch.load(io.BytesIO(data), weights_only=True)
        keys = sorted(state)
        key = rng.choice(keys)
        old = state[key]
    except Exception:
        return mutate_zip(rng, data)
    if not rng.randrange(3):
        return mutate_zip(rng, data)
    shapes = ((), (0,), (1,), (3, 3), (1, 1, 1, 1, 1), (2, 0, 3), (2**20,))
    changed = (
        lambda: torch.zeros(rng.choice(shapes)),
        lambda: torch.zeros(1).expand(rng.choice((2**30, 2**40)), 8),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.zeros(2, dtype=rng.choice((torch.complex64, torch.bool, torch.int8, torch.float64))),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.full_like(old, float("nan")),
        lambda: old.half(),
        lambda: old[None],
        lambda: rng.choice(NASTY),
        lambda: torch.nn.Parameter(torch.zeros(2)),
    )
    try:
        match rng.randrange(6):
            case 0:
                state = rng.choice(([state], old, {}, None, {"state_dict": state}, {1: old}, [old], (state, 3)))
            case 1:
                del state[key]
            case 2:
                state[rng.choice((f"{key}.x", key.replace("blocks.0", "blocks.99999999999"), key[:-1]))] = old
            case _:
                state[key] = rng.choice(changed)()
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return mutate_zip(rng, data)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=bool(rng.randrange(4)))
    return buffer.getvalue()


def mutate_parquet(rng: Random, data: bytes) -> bytes:
    """Change a column or the metadata of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        meta = dict(table.schema.metadata or {})
    except Exception:
        return mutate_bytes(rng, data)
    n, names = table.num_rows, table.schema.names
    if not names or not rng.randrange(4):
        return mutate_bytes(rng, data)
    place = rng.randrange(len(names))
    columns = (
        lambda: pa.array([1] * n),
        lambda: pa.array(["x"] * n),
        lambda: pa.array([b"\xff"] * n),
        lambda: pa.array([None] * n, pa.string()),
        lambda: pa.array([[1, None]] * n),
        lambda: pa.array([[2**40] * 64] * n),
        lambda: pa.array([[0] * rng.choice((0, 1, 63, 64, 65, 1000))] * n, pa.list_(pa.uint16())),
        lambda: pa.array([{"a": 1}] * n),
        lambda: pa.array([["a"]] * n),
        lambda: pa.array([1.5] * n),
        lambda: pa.array(["x"] * n).dictionary_encode(),
        lambda: table.column(rng.choice(names)),
        lambda: pa.array([None] * n),
    )
    match rng.randrange(6):
        case 0 | 1:
            table = table.set_column(place, names[place], rng.choice(columns)())
        case 2:
            table = table.append_column(rng.choice((names[place], "frame", "iou", "x")), rng.choice(columns)())
        case 3:
            table = table.drop_columns([names[place]]) if len(set(names)) == len(names) else table
        case _:
            key = rng.choice(sorted(meta) or [b"x"])
            plain = rng.choice((b"", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"octree", b"true", b"[4,4,1000000]"))
            meta[key] = mutate_json(rng, meta.get(key, b"1")) if rng.randrange(2) else plain
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(meta), buffer, write_page_checksum=bool(rng.randrange(2)))
    return buffer.getvalue()


# --- seeds and targets -----------------------------------------------------------------------------------


def tiny_models(**quantizer: Any) -> dict[str, dict]:
    """Return the models of a tokenizer of 16³ grids with 4³ tokens."""
    shape = {"latent_channels": 4, "num_res_blocks": 1, "num_res_blocks_middle": 1}
    return {
        "encoder": {"name": "SparseStructureEncoder", "args": {"in_channels": 1, "channels": [4, 8, 8], **shape}},
        "decoder": {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "channels": [8, 8, 4], **shape}},
        "quantizer": {
            "name": "VectorQuantizer",
            "args": {"n_embed": 32, "embed_dim": 4, "latent_channels": 4, **quantizer},
        },
    }


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
