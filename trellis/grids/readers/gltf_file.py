"""The container of glTF 2.0 (specification 2.0.1): binary or text to a checked view of its JSON and the binary chunk.

https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html, sections 3 and 4. `gltf_accessors` reads the data that the
JSON describes, `gltf` the scene.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...utils.errors import DataError

MAGIC = b"glTF"
HEADER = 12  # bytes: magic, version, length of the file
JSON_CHUNK, BINARY_CHUNK = 0x4E4F534A, 0x004E4942
PIPELINE = "npx gltf-pipeline -i OLD -o NEW.glb makes it 2.0"


class Item:
    """An object of the JSON with the path to it, such as nodes[3]. Its methods give values of the type that the
    specification demands, or raise DataError with the path, the value and what it should be. null is as if missing."""

    def __init__(self, value: dict[str, Any], path: str = ""):
        self.value = value
        self.path = path

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def where(self, key: str) -> str:
        """Return the path to a key."""
        return f"{self.path}.{key}" if self.path else key

    def wrong(self, key: str, what: str) -> DataError:
        """Return the error for a value that is not what it should be."""
        if key not in self:
            return DataError(f"{self.where(key)} is missing; it should be {what}")
        return DataError(f"{self.where(key)} is {_short(self.value[key])}; it should be {what}")

    def items(self, key: str) -> list["Item"]:
        """Return an array of objects; empty if missing."""
        value = self._array(key)
        if not all(isinstance(item, dict) for item in value):
            raise DataError(f"{self.where(key)} has an entry that is not an object")
        path = self.where(key)
        return [Item(item, f"{path}[{number}]") for number, item in enumerate(value)]

    def item(self, key: str) -> "Item":
        """Return an object; an empty one if missing."""
        value = self.value.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Item(value, self.where(key))

    def extension(self, name: str) -> "Item | None":
        """Return what an extension adds to this object, None if nothing."""
        extensions = self.item("extensions")
        return extensions.item(name) if name in extensions else None

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number >= 0. Without a default, it must be there."""
        if default is not None and key not in self:
            return default
        number = _whole(self.value.get(key))
        if number is None:
            raise self.wrong(key, "a whole number")
        return number

    def index(self, key: str, number: int, kind: str) -> int:
        """Return an index of one of `number` things called `kind`."""
        index = _whole(self.value.get(key))
        if index is None or index >= number:
            raise self.wrong(key, f"an index of the {number} {kind}")
        return index

    def indices(self, key: str, number: int, kind: str) -> list[int]:
        """Return an array of indices; empty if missing."""
        found = []
        for value in self._array(key):
            index = _whole(value)
            if index is None or index >= number:
                raise DataError(f"{self.where(key)} has {_short(value)}, which is no index of the {number} {kind}")
            found.append(index)
        return found

    def numbers(self, key: str, default: tuple[float, ...] | None = None) -> np.ndarray:
        """Return finite numbers, float64 [n]. n is that of the default; without one it is any, and 0 if missing."""
        if key not in self:
            return np.array(default or (), dtype=np.float64)
        value = self._array(key)
        good = all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
        if not good or (default is not None and len(value) != len(default)):
            raise self.wrong(key, f"{len(default)} numbers" if default is not None else "numbers")
        try:
            numbers = np.array([float(number) for number in value], dtype=np.float64)
        except OverflowError:  # an integer beyond float64
            numbers = np.array([math.inf])
        if not np.isfinite(numbers).all():
            raise DataError(f"{self.where(key)} has a number that is not finite")
        return numbers

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = self.value.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; empty if missing."""
        value = self._array(key)
        if not all(isinstance(text, str) for text in value):
            raise DataError(f"{self.where(key)} has an entry that is not a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.value.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def _array(self, key: str) -> list:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, "an array")
        return value


class File(NamedTuple):
    """A glTF file taken apart. binary: the content of the binary chunk, None if there is none."""

    tree: Item
    binary: bytes | None


def open_file(path: Path) -> File:
    """Read a .glb or .gltf file; its first bytes tell which it is. Raise DataError if it is damaged or not glTF 2."""
    content = path.read_bytes()
    text, binary = _chunks(content) if content[:4] == MAGIC else (content, None)
    tree = Item(_parse(text))
    _check_version(tree)
    return File(tree, binary)


def _chunks(content: bytes) -> tuple[bytes, bytes | None]:
    """Return the JSON and the binary chunk of a GLB. What follows the length that its header gives is no part of it."""
    if len(content) < HEADER + 8:
        raise DataError(f"is cut off: {len(content)} bytes are too few for a GLB")
    version, length = (int.from_bytes(content[start : start + 4], "little") for start in (4, 8))
    if version == 1:
        raise DataError(f"is glTF 1.0, and 2.0 is read: {PIPELINE}")
    if version != 2:
        raise DataError(f"is a GLB of version {version}, and version 2 is read: export it as glTF 2.0")
    if length > len(content):
        raise DataError(f"is cut off: its header says {length} bytes, and {len(content)} are there")
    text, binary = None, None
    start = HEADER
    while start + 8 <= length and binary is None:
        size, kind = (int.from_bytes(content[at : at + 4], "little") for at in (start, start + 4))
        start += 8
        name = {JSON_CHUNK: "JSON chunk", BINARY_CHUNK: "binary chunk"}.get(kind, "chunk")
        if text is None and kind != JSON_CHUNK:
            raise DataError("is damaged: its first chunk is not JSON")
        if start + size > len(content):
            raise DataError(f"is damaged: its {name} claims {size} bytes, and {len(content) - start} are left")
        if text is None:
            text = content[start : start + size].rstrip(b"\0")  # spaces should pad it; some writers take zeros
        elif kind == BINARY_CHUNK:
            binary = content[start : start + size]
        start += size
    if text is None:
        raise DataError(f"is damaged: its header says {length} bytes, which is too few for a GLB")
    return text, binary


def _parse(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)  # takes a byte-order mark
    except (ValueError, RecursionError) as error:
        if text.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[") and not text.startswith((b"\xff", b"\xfe")):
            raise DataError("is not glTF: it is neither a GLB nor JSON") from error
        raise DataError(f"cannot be read: its JSON is damaged ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(tree, dict):
        raise DataError(f"is not glTF: its JSON is {_short(tree)}, not an object")
    if not {"asset", "scenes", "nodes", "meshes"} & tree.keys():
        raise DataError("is not glTF: its JSON has no asset, scenes, nodes or meshes")
    return tree


def _check_version(tree: Item) -> None:
    """Raise DataError if the asset is not of a version 2. A missing version is no reason: its parts show what it is."""
    asset = tree.item("asset")
    # In glTF 1.0 the collections are objects with names as keys, and the version may be missing.
    collections = (tree.value.get(key) for key in ("buffers", "accessors", "meshes", "nodes", "scenes"))
    if "version" not in asset and any(isinstance(collection, dict) for collection in collections):
        raise DataError(f"is glTF 1.0, and 2.0 is read: {PIPELINE}")
    for key in ("version", "minVersion"):
        version = str(asset.value[key]) if key in asset else "2.0"
        if version.split(".")[0] != "2" or (key == "minVersion" and version != "2.0"):
            remedy = PIPELINE if version[:1] in ("0", "1") else "export it as 2.0"
            raise DataError(f"{asset.where(key)} is {_short(version)}, and glTF 2.0 is read: {remedy}")


def _whole(value: Any) -> int | None:
    """Return a JSON value as an int if it is a whole number in [0, 2^53); 3.0 is one too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if 0 <= value < 1 << 53 else None


def _short(value: Any) -> str:
    """Return a value of the JSON as it may stand in a message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"an array of {len(value)}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:60]}…")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a number of more than 64 bits"
    return json.dumps(value)
