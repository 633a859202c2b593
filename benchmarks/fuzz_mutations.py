"""How inputs of fuzzing are changed.

Mutations know the formats: they change a value of a JSON document, an array of an archive, a column of a table or a
word of a header, and write a valid container around it. Plain damage of bytes ends in the first check.
"""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import torch

NASTY: tuple[Any, ...] = (
    *(None, True, [], {}, "", "x" * 300, "../../x", -1, 0, 1, 2, 3, 7, 255, 65536, 2**20, 2**31 - 1, 2**31, 2**53),
    *(2**62, 2**63, 2**64, -(2**63), 10**30, 1e308, 0.5, float("nan"), float("inf"), [[]], [1], ["a"], {"name": "x"}),
)


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
