"""What the accessors of a glTF 2.0 file hold: buffers, buffer views, sparse values, Draco data.

Specification 2.0.1, sections 2.8 (URIs) and 3.6 (binary data); KHR_mesh_quantization, KHR_draco_mesh_compression,
EXT_meshopt_compression.
Axes: N elements of an accessor, W components of each.
"""

import base64
import binascii
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np

from ...utils.errors import ConfigError, DataError
from .gltf_file import File, Item

COMPONENTS: dict[int, np.dtype] = {
    5120: np.dtype("i1"),
    5121: np.dtype("u1"),
    5122: np.dtype("<i2"),
    5123: np.dtype("<u2"),
    5125: np.dtype("<u4"),
    5126: np.dtype("<f4"),
}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
DRACO = "KHR_draco_mesh_compression"
# Packings of buffer views that are not read, and what to do about them.
MESHOPT = {
    "EXT_meshopt_compression": "npx @gltf-transform/cli copy IN.glb OUT.glb unpacks it",
    "KHR_meshopt_compression": "export it without compression",
    "MESHOPT_compression": "export it without compression",
}
# An accessor without data is zeros. So many may be claimed; more only if the file has as many bytes.
ZEROS = 1 << 20


class Values(NamedTuple):
    """The elements of an accessor as they are stored.

    stored: [N, W], of the accessor's component type; a view of the file's bytes where it can be one.
    normalized: whether integers stand for fractions of their type's largest.
    path: where in the JSON they are, for messages.
    """

    stored: np.ndarray
    normalized: bool
    path: str

    def rows(self, rows: np.ndarray | None) -> "Values":
        """Return the given elements, all for None."""
        return self if rows is None else self._replace(stored=self.stored[rows])

    def floats(self) -> np.ndarray:
        """Return the numbers that are meant: float32 as stored, else float64 (section 3.6.2.2)."""
        if self.stored.dtype.kind == "f":
            return self.stored.astype(np.float32, copy=False)
        numbers = self.stored.astype(np.float64)
        if self.normalized:
            numbers = np.maximum(numbers / np.iinfo(self.stored.dtype).max, -1)
        return numbers


class Accessors:
    """The binary data of a file, loaded from its buffers as they are asked for.

    folder: where the file is, to find buffers beside it.
    """

    def __init__(self, file: File, folder: Path):
        self.binary = file.binary
        self.folder = folder
        self.buffers = file.tree.items("buffers")
        self.views = file.tree.items("bufferViews")
        self.accessors = file.tree.items("accessors")
        self.loaded: dict[int, bytes] = {}

    def accessor(self, owner: Item, key: str) -> Item:
        """Return the JSON of the accessor that `owner` names under `key`."""
        return self.accessors[owner.index(key, len(self.accessors), "accessors")]

    def values(self, owner: Item, key: str, kind: str, zeros: bool = False) -> Values:
        """Return the elements of the accessor that `owner` names under `key`.

        kind: the type that it must have, such as "VEC3".
        zeros: whether it may be without data, which the specification has stand for zeros.
        Raise DataError if it has another type or needs bytes that are not there.
        """
        accessor = self.accessor(owner, key)
        if accessor.text("type") != kind:
            raise accessor.wrong("type", f"{kind!r}, for {owner.where(key)}")
        dtype, count, width = _component(accessor), accessor.whole("count"), WIDTHS[kind]
        normalized = accessor.flag("normalized", False)
        if normalized and dtype.itemsize == 4 and dtype.kind == "u":
            raise DataError(f"{accessor.path} is normalized, which glTF allows for 8 and 16 bits only")
        if not zeros and not self.has_data(accessor):
            raise DataError(f"{accessor.path} has no data for {owner.where(key)}: it has no bufferView")
        if "bufferView" in accessor:
            stored = self._array(accessor, dtype, count, width)
        else:
            stored = np.broadcast_to(np.zeros(1, dtype), (count, width))
        if "sparse" in accessor:
            stored = self._with_sparse(stored, accessor)
        return Values(stored, normalized, accessor.path)

    def loaded_bytes(self) -> int:
        """Return how many bytes the buffers have that were asked for so far."""
        return sum(map(len, self.loaded.values()))

    def has_data(self, accessor: Item) -> bool:
        """Return whether an accessor has values of its own, not only the zeros that stand for missing ones."""
        return "bufferView" in accessor or "sparse" in accessor

    def view(self, owner: Item) -> memoryview:
        """Return the bytes of the buffer view that `owner` names, as far as its buffer has them."""
        view = self.views[owner.index("bufferView", len(self.views), "bufferViews")]
        number = view.index("buffer", len(self.buffers), "buffers")
        packed = next((name for name in MESHOPT if view.extension(name) is not None), None)
        if packed and not self._has_bytes(number):
            raise DataError(f"{view.path} has its data in {packed} alone, which is not read: {MESHOPT[packed]}")
        start = view.whole("byteOffset", 0)
        return memoryview(self._buffer(number))[start : start + view.whole("byteLength")]

    def _array(self, owner: Item, dtype: np.dtype, count: int, width: int) -> np.ndarray:
        """Return [count, width] elements from the buffer view that `owner` names. Nothing is allocated."""
        content = self.view(owner)
        view = self.views[owner.whole("bufferView")]
        size = dtype.itemsize * width
        stride = view.whole("byteStride", 0) or size
        if stride < size:
            raise view.wrong("byteStride", f"at least {size}, the bytes of an element of {owner.path}")
        start = owner.whole("byteOffset", 0)
        end = start + stride * (count - 1) + size if count else start
        if end > len(content):
            claimed = view.whole("byteLength")
            raise DataError(
                f"{owner.path} needs {end} bytes of {view.path}, which has {len(content)}"
                + (f" of the {claimed} that it claims: its buffer is cut off" if claimed > len(content) else "")
            )
        return np.ndarray((count, width), dtype, content, start, (stride, dtype.itemsize))

    def _with_sparse(self, stored: np.ndarray, accessor: Item) -> np.ndarray:
        """Return a copy of an accessor's elements with its sparse values put in."""
        sparse = accessor.item("sparse")
        count, where = sparse.whole("count"), sparse.item("indices")
        dtype = _component(where)
        if dtype.kind != "u":
            raise where.wrong("componentType", "5121, 5123 or 5125 (unsigned)")
        rows = self._array(where, dtype, count, 1)[:, 0]
        if count and rows.max() >= len(stored):
            raise DataError(f"{where.path} has {rows.max()}, and there are {len(stored)} elements")
        values = self._array(sparse.item("values"), stored.dtype, count, stored.shape[1])
        if "bufferView" not in accessor and len(stored) > max(ZEROS, self.loaded_bytes()):
            raise DataError(f"{accessor.path} claims {len(stored)} elements without data for them")
        stored = stored.copy()
        stored[rows] = values
        return stored

    def _has_bytes(self, number: int) -> bool:
        return "uri" in self.buffers[number] or (number == 0 and self.binary is not None)

    def _buffer(self, number: int) -> bytes:
        if number not in self.loaded:
            buffer = self.buffers[number]
            if "uri" in buffer:
                self.loaded[number] = _fetch(buffer, self.folder)
            elif number == 0 and self.binary is not None:
                self.loaded[number] = self.binary
            else:
                raise DataError(f"{buffer.path} has no data: it names no file, and the binary chunk is not its")
        return self.loaded[number]


def _component(item: Item) -> np.dtype:
    dtype = COMPONENTS.get(item.whole("componentType"))
    if dtype is None:
        raise item.wrong("componentType", f"one of {', '.join(map(str, COMPONENTS))}")
    return dtype


def _fetch(buffer: Item, folder: Path) -> bytes:
    """Return the bytes behind the URI of a buffer. Raise DataError if they are not in the file or beside it."""
    uri = buffer.text("uri")
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", uri)  # two letters at least: C: is a drive
    if scheme and scheme[0].lower() == "data:":
        return _data_uri(buffer, uri)
    if scheme or uri.startswith("//"):
        raise DataError(f"{buffer.path}.uri is {uri[:80]}, which is not fetched: export it as .glb, all in one")
    names = file_names(uri)
    shown = names[0][:80].encode(errors="replace").decode()
    for name in names:
        if "\0" in name or Path(name).is_absolute():
            raise DataError(f"{buffer.path}.uri is {shown!r}, which is no relative path")
        try:
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"needs {shown!r}, which cannot be read ({error.strerror})") from error
    raise DataError(f"needs {shown!r}, which is not there: put it beside the file, or export it as .glb, all in one")


def file_names(uri: str) -> list[str]:
    """Return the names that the file of a relative URI may have, the likeliest first.

    Percent-encoded by the specification, but many writers put the name as it is. Systems differ in how they compose
    accents in the names of files.
    """
    names = {os.fsdecode(unquote_to_bytes(uri)): None, uri: None}
    names |= {unicodedata.normalize(form, name): None for name in list(names) for form in ("NFC", "NFD")}
    names |= {name.replace("\\", "/"): None for name in list(names)}
    return list(names)


def _data_uri(buffer: Item, uri: str) -> bytes:
    """Decode a data URI (RFC 2397)."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise DataError(f"{buffer.path}.uri is a data URI without a comma")
    content = unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return content
    content = b"".join(content.translate(bytes.maketrans(b"-_", b"+/")).split()).rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise DataError(f"{buffer.path}.uri is damaged: its base64 cannot be read ({error})") from error


class Draco:
    """A mesh that was packed with Draco.

    faces: [F, 3] int64.
    """

    def __init__(self, accessors: Accessors, extension: Item):
        """Raise DataError if the data are damaged, ConfigError if DracoPy is missing."""
        try:
            import DracoPy
        except ModuleNotFoundError as error:
            raise ConfigError(f"a Python package is missing ({error}): pip install DracoPy") from error
        content = bytes(accessors.view(extension))
        try:
            self.mesh: Any = DracoPy.decode(content)
        except MemoryError:
            raise
        except Exception as error:  # it raises anything on damaged data; it becomes the recorded reason
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{extension.path} is damaged ({type(error).__name__}: {reason})") from error
        faces = getattr(self.mesh, "faces", None)
        if faces is None:
            raise DataError(f"{extension.path} holds points; glTF allows triangles only")
        self.faces = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
        self.names = extension.item("attributes")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def values(self, name: str, width: int, accessor: Item) -> Values:
        """Return an attribute by its name in glTF, such as "POSITION".

        width: the number of components that it must have.
        accessor: the accessor of the primitive, which says what its numbers mean.
        """
        path = self.names.where(name)
        identity = self.names.whole(name)
        found = next((each for each in self.mesh.attributes if each["unique_id"] == identity), None)
        if found is None:
            raise DataError(f"{path} is {identity}, which the Draco data do not have")
        numbers = np.asarray(found["data"])
        if numbers.ndim != 2 or numbers.shape[1] != width:
            raise DataError(f"{path} has {found['num_components']} components, not {width}")
        # DracoPy gives 16-bit integers as 32-bit ones and signed integers as floats.
        with np.errstate(invalid="ignore"):
            stored = numbers.astype(_component(accessor))
        if stored.dtype.kind != "f" and not np.array_equal(stored, numbers):
            raise DataError(f"{path} has numbers that are not of the type that {accessor.path} gives")
        return Values(stored, accessor.flag("normalized", False), path)
