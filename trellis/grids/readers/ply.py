"""PLY, text and binary of both byte orders: the polygons of its faces, or its points.

Format: G. Turk, "The PLY Polygon File Format", 1994. A header describes elements, each a table whose columns are
numbers or lists. Read are the element with x, y and z, the lists of vertices of the faces, and tristrips (lists of
vertices that -1 divides, as the scans of Stanford have). All else is skipped.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.errors import DataError
from .. import geometry
from .polygons import triangulate
from .text import BOM, are_floats, quote, refuse_utf16, to_coordinates, to_count, to_ints, unify_line_ends

TYPES = {
    **{name: "i1" for name in ("char", "int8")},
    **{name: "u1" for name in ("uchar", "uint8")},
    **{name: "i2" for name in ("short", "int16")},
    **{name: "u2" for name in ("ushort", "uint16")},
    **{name: "i4" for name in ("int", "int32")},
    **{name: "u4" for name in ("uint", "uint32")},
    "int64": "i8",
    "uint64": "u8",
    **{name: "f4" for name in ("float", "float32")},
    **{name: "f8" for name in ("double", "float64")},
}
FORMATS = ("ascii", "binary_little_endian", "binary_big_endian")
FACES = ("face", "faces", "polygon", "polygons", "triangle", "triangles")
STRIPS = ("tristrips", "tristrip")
LISTS = ("vertex_indices", "vertex_index")
# Properties that only 3D Gaussian splats have, plain and compressed.
SPLATS = ("f_dc_0", "rot_0", "scale_0", "packed_position")


Starts = range | np.ndarray  # where values lie: evenly spaced, or [N] int64


class Property(NamedTuple):
    name: str  # in lower case
    type: str  # numpy's, without byte order; of a list, of its items
    count_type: str | None  # of the length of a list; None if it is no list


class Element(NamedTuple):
    name: str  # in lower case
    rows: int
    properties: list[Property]


class Layout(NamedTuple):
    """Where the values of an element lie in the body."""

    starts: list[Starts]  # of each property, its value or the first item of its list in each row
    counts: list[int | np.ndarray]  # of each property, the items of its list: in every row, or [rows] int64
    end: int


def read(path: Path) -> geometry.Geometry:
    """Read all faces and tristrips of a file as triangles.

    vertices: [V, 3], float32 if the file is binary and stores that, else float64, in the file's units.
    Faces of less than three corners are left out, with a note. A file without faces gives its points alone.
    Raise DataError if the file has not what its header describes, or holds Gaussian splats.
    """
    data = path.read_bytes().removeprefix(BOM)
    refuse_utf16(data)
    form, elements, start = _header(data)
    body: Words | Bytes
    if form == "ascii":
        body = Words(data[start:].split())
    else:
        body = Bytes(data[start:], "<" if form == "binary_little_endian" else ">")

    points = [element for element in elements if {"x", "y", "z"} <= {p.name for p in element.properties}]
    points.sort(key=lambda element: element.name != "vertex")
    vertices = np.zeros((0, 3))
    polygons: list[tuple[np.ndarray, np.ndarray]] = []
    strips = []
    notes = []
    position = 0
    for element in elements:
        layout = _layout(element, body, position)
        position = layout.end
        if points and element is points[0]:
            vertices = _coordinates(element, layout, body)
        elif element.name in FACES and element.rows:
            polygons.append(_lists(element, layout, body))
            if few := int((polygons[-1][1] < 3).sum()):
                notes.append(f"without {few} of its {element.rows} faces, which have less than three corners")
        elif element.name in STRIPS and element.rows:
            strips.append(_strip_triangles(*_lists(element, layout, body)))
        elif element.rows and any(p.name in LISTS for p in element.properties):
            notes.append(f'its element "{element.name}" has lists of vertices and is not read')
    rest = body.size - position
    if not body.is_blank(position):
        what = "values" if form == "ascii" else "bytes"
        raise DataError(f"has {rest} {what} more than its header describes: its header is wrong, or other data follow")

    if not polygons and not strips:
        names = {p.name for element in elements for p in element.properties}
        splats = [name for name in SPLATS if name in names]
        if splats:
            raise DataError(f"holds 3D Gaussian splats (property {splats[0]}), no surface: extract a mesh first")
    if not points:
        raise DataError("has no element with x, y and z")
    faces = np.zeros((0, 3), dtype=np.int64)
    faces = np.concatenate([faces, *(triangulate(vertices, *lists) for lists in polygons), *strips])
    return geometry.Geometry(vertices, faces, notes=tuple(notes))


def _header(data: bytes) -> tuple[str, list[Element], int]:
    """Return the format, the elements in order, and where the body starts."""
    first = re.match(rb"ply[ \t]*(\r\n|\r|\n)", data)
    if not first:
        raise DataError('is no PLY file: it does not begin with "ply"')
    # The body may begin with the byte of a line feed: after a carriage return alone, if that ends lines.
    end = rb"\r" if first[1] == b"\r" else rb"\r?\n"
    last = re.compile(rb"[\r\n][ \t]*end_header[ \t]*(?:" + end + rb"|\Z)").search(data)
    if not last:
        raise DataError('has no "end_header": it is cut or damaged')
    form = None
    elements: list[Element] = []
    for line in unify_line_ends(data[first.end() : last.start()]).split(b"\n"):
        match line.decode("latin-1").lower().split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", name, *_] if name in FORMATS:
                form = name
            case ["element", name, count] if (rows := to_count(count.encode())) is not None:
                elements.append(Element(name, rows, []))
            case ["property", "list", count_type, kind, name] if elements and {count_type, kind} <= TYPES.keys():
                if TYPES[count_type][0] == "f":
                    raise DataError(f"has {quote(line)} in its header: the length of a list is a whole number")
                elements[-1].properties.append(Property(name, TYPES[kind], TYPES[count_type]))
            case ["property", kind, name] if elements and kind in TYPES:
                elements[-1].properties.append(Property(name, TYPES[kind], None))
            case _:
                raise DataError(f"has {quote(line)} in its header, which is no statement of PLY")
    if form is None:
        raise DataError("does not say in its header whether it is ascii or binary")
    return form, elements, last.end()


class Words:
    """The body of a text file. Positions count words."""

    def __init__(self, words: list[bytes]):
        self.words = words
        self.size = len(words)

    def width(self, kind: str) -> int:
        return 1

    def count(self, position: int, kind: str) -> int:
        """Return the length of a list; 0 beyond the end."""
        if position >= self.size:
            return 0
        word = self.words[position]
        count = to_count(word)
        if count is None:
            raise DataError(f"has {quote(word)} where the length of a list is expected")
        return count

    def numbers(self, starts: Starts, kind: str) -> np.ndarray:
        """Return the whole numbers at these positions, [N] int64."""
        try:
            return to_ints(self.words_at(starts))
        except ValueError:
            raise DataError("has a face whose vertices are no whole numbers: rows or the header are wrong") from None

    def words_at(self, starts: Starts) -> list[bytes]:
        if isinstance(starts, range):
            return self.words[starts.start : starts.stop : starts.step]
        return [self.words[i] for i in starts.tolist()]

    def coordinates(self, starts: list[Starts], kinds: list[str]) -> np.ndarray:
        """Return the points with these numbers, [N, 3] float64."""
        columns = [self.words_at(axis) for axis in starts]
        try:
            return to_coordinates(columns)
        except ValueError:
            wrong = next(word for words in columns for word in words if not are_floats([word]))
            raise DataError(f"has {quote(wrong)} where a coordinate is expected") from None

    def all_are(self, count: int, starts: range, kind: str) -> bool:
        """Return whether all these lists have the same length."""
        return self.words_at(starts).count(str(count).encode()) == len(starts)

    def is_blank(self, position: int) -> bool:
        return position == self.size


class Bytes:
    """The body of a binary file. Positions count bytes."""

    def __init__(self, data: bytes, order: str):
        self.data = data
        self.size = len(data)
        self.order = order

    def width(self, kind: str) -> int:
        return int(kind[1])

    def count(self, position: int, kind: str) -> int:
        """Return the length of a list; 0 beyond the end."""
        value = self.data[position : position + self.width(kind)]
        count = int.from_bytes(value, "little" if self.order == "<" else "big", signed=kind[0] == "i")
        if count < 0:
            raise DataError(f"has a list of length {count}")
        return count

    def numbers(self, starts: Starts, kind: str) -> np.ndarray:
        """Return the numbers at these positions, [N] of their type."""
        dtype = np.dtype(self.order + kind)
        if not len(starts):
            return np.zeros(0, dtype)
        if isinstance(starts, range):
            return np.ndarray(len(starts), dtype, self.data, starts.start, (starts.step,))
        values = np.frombuffer(self.data, np.uint8)[starts[:, None] + np.arange(dtype.itemsize)]
        return values.view(dtype).reshape(-1)

    def coordinates(self, starts: list[Starts], kinds: list[str]) -> np.ndarray:
        """Return the points with these numbers, [N, 3]: float32 if all have that type, else float64."""
        single = all(kind == "f4" for kind in kinds)
        columns = [self.numbers(axis, kind) for axis, kind in zip(starts, kinds, strict=True)]
        return np.stack(columns, axis=1).astype(np.float32 if single else np.float64)

    def all_are(self, count: int, starts: range, kind: str) -> bool:
        """Return whether all these lists have the same length."""
        return bool((self.numbers(starts, kind) == count).all())

    def is_blank(self, position: int) -> bool:
        return not self.data[position:].strip(b"\0 \t\r\n")


def _layout(element: Element, body: Words | Bytes, start: int) -> Layout:
    """Find the values of an element that starts there: by arithmetic if all rows are alike, else row by row.

    Raise DataError if the body ends before its last row.
    """
    if not element.properties or not element.rows:
        return Layout([range(0)] * len(element.properties), [0] * len(element.properties), start)
    offsets = []  # in the first row: of values, or of the first item of a list
    counts = []
    position = start
    for p in element.properties:
        count = 1
        if p.count_type:
            count = body.count(position, p.count_type)
            position += body.width(p.count_type)
        offsets.append(position - start)
        counts.append(count)
        position += count * body.width(p.type)
    stride = position - start
    end = start + stride * element.rows

    def column(offset: int) -> range:
        return range(start + offset, start + offset + stride * element.rows, stride)

    if end <= body.size:
        if all(
            body.all_are(count, column(offset - body.width(p.count_type)), p.count_type)
            for p, offset, count in zip(element.properties, offsets, counts, strict=True)
            if p.count_type
        ):
            return Layout([column(offset) for offset in offsets], list(counts), end)
    elif not any(p.count_type for p in element.properties):
        raise _cut(element, (body.size - start) // stride)
    return _walk(element, body, start)


def _cut(element: Element, rows: int) -> DataError:
    return DataError(
        f'its header counts {element.rows} rows of "{element.name}", but the file has room for {rows}: '
        "it is cut, or its header is wrong"
    )


def _walk(element: Element, body: Words | Bytes, start: int) -> Layout:
    """Find the values of an element whose lists differ in length, or which is cut."""
    rows: list[list[int]] = [[] for _ in element.properties]
    lengths: list[list[int]] = [[] for _ in element.properties]
    steps = [
        (body.width(p.type), p.count_type, body.width(p.count_type or p.type), row.append, length.append)
        for p, row, length in zip(element.properties, rows, lengths, strict=True)
    ]
    position = start
    for row_number in range(element.rows):
        for width, count_type, count_width, add_start, add_length in steps:
            if count_type:
                count = body.count(position, count_type)
                position += count_width
                add_start(position)
                add_length(count)
                position += count * width
            else:
                add_start(position)
                position += width
        if position > body.size:
            raise _cut(element, row_number)
    return Layout([np.array(row) for row in rows], [np.array(length) for length in lengths], position)


def _coordinates(element: Element, layout: Layout, body: Words | Bytes) -> np.ndarray:
    """Return x, y and z [V, 3]: float32 where a binary file stores that, else float64."""
    names = [p.name for p in element.properties]
    axes = [names.index(axis) for axis in ("x", "y", "z")]
    if any(element.properties[axis].count_type for axis in axes):
        raise DataError("its coordinates are lists")
    return body.coordinates([layout.starts[axis] for axis in axes], [element.properties[axis].type for axis in axes])


def _lists(element: Element, layout: Layout, body: Words | Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the lists of vertices of an element's rows, one after the other [C] int64, and their lengths [P] int64."""
    lists = [i for i, p in enumerate(element.properties) if p.count_type and p.type[0] != "f"]
    named = [i for i in lists if element.properties[i].name in LISTS]
    if len(named or lists) != 1:
        raise DataError(f'its element "{element.name}" has {len(named or lists)} lists of vertices, not one')
    index = (named or lists)[0]
    kind = element.properties[index].type
    starts, count = layout.starts[index], layout.counts[index]
    width = body.width(kind)
    if isinstance(starts, range):
        columns = [
            body.numbers(range(starts.start + i * width, starts.stop + i * width, starts.step), kind)
            for i in range(int(count))
        ]
        corners = np.stack(columns, axis=1).ravel() if columns else np.zeros(0)
        return corners.astype(np.int64), np.full(element.rows, count)
    lengths = np.asarray(count)
    first = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(first, lengths)
    return body.numbers(np.repeat(starts, lengths) + width * within, kind).astype(np.int64), lengths


def _strip_triangles(corners: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the triangles [F, 3] int64 of strips: each corner makes one with the two before it, wound alternately.

    corners [C], lengths [P] int64: the strips, one after the other; -1 starts another one.
    """
    ends = np.cumsum(lengths)
    corners = np.insert(corners, ends, -1)
    position = np.arange(len(corners))
    after_break = np.maximum.accumulate(np.where(corners == -1, position + 1, 0))
    triangles = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
    odd = (position[:-2] - after_break[:-2]) % 2 == 1
    triangles[odd, :2] = triangles[odd, 1::-1]
    return triangles[(triangles != -1).all(axis=1)]
