"""OFF, the object file format of Geomview.

Format: "OFF Files" in the chapter "OOGL File Formats" of the Geomview manual, version 1.9. Each vertex and each face
has a line; normals, colors and texture coordinates follow the coordinates and are left out. The word in front says which.
Files without it, with the counts on its line, or without the count of edges are common, and read.
"""

import re
from itertools import chain
from pathlib import Path

import numpy as np

from ...utils.errors import DataError
from .. import geometry
from .polygons import triangulate
from .text import are_floats, quote, read_text, to_coordinates, to_ints

KEYWORD = re.compile(rb"(ST)?C?N?(4?)(n?)(?:OFF|off)(?=[\s\d]|$)")


def read(path: Path) -> geometry.Geometry:
    """Read all polygons of a file as triangles.

    vertices: [V, 3] float64 in the file's units; those of 4OFF are divided by their fourth coordinate.
    Faces of less than three corners are left out. A file without faces gives its vertices alone.
    Raise DataError if the file has not what its header counts, or is of a kind that is not read.
    """
    with path.open("rb") as file:
        if re.match(KEYWORD.pattern + rb"[ \t]+BINARY\b", file.readline(100)):
            raise DataError("is binary OFF, which is not read: save it as text")
    text = read_text(path)
    if b"#" in text:
        text = re.sub(rb"#[^\n]*", b"", text)
    lines = [line for line in text.split(b"\n") if line and not line.isspace()]
    if not lines:
        raise DataError("has no header: it is empty or no OFF file")
    keyword = KEYWORD.match(lines[0].lstrip())
    homogeneous = bool(keyword and keyword[2])
    if keyword:
        if keyword[3]:
            raise DataError(f"has vertices of other than three dimensions ({quote(keyword[0])})")
        lines[0] = lines[0].lstrip()[keyword.end() :].strip()
        lines = lines if lines[0] else lines[1:]
    vertex_count, face_count = _counts(lines[0] if lines else b"")

    lines = lines[1:]
    if len(lines) != vertex_count + face_count:
        raise DataError(
            f"its header counts {vertex_count} vertices and {face_count} faces, but {len(lines)} lines follow "
            f"instead of {vertex_count + face_count}: it is cut, or its counts are wrong"
        )
    vertices = _vertices(lines[:vertex_count], 4 if homogeneous else 3)
    corners, sizes = _faces(lines[vertex_count:])
    return geometry.Geometry(vertices, triangulate(vertices, corners, sizes))


def _counts(line: bytes) -> tuple[int, int]:
    """Return the numbers of vertices and faces of the header's line; that of edges may be missing and is not used."""
    words = line.split()
    if len(words) not in (2, 3) or not all(word.isdigit() for word in words):
        raise DataError(f"has {quote(line)} where the numbers of vertices, faces and edges are expected")
    return int(words[0]), int(words[1])


def _vertices(lines: list[bytes], dimensions: int) -> np.ndarray:
    """Return the vertices [V, 3] float64 of their lines; of four dimensions, the fourth is the divisor."""
    words = b" ; ".join([*lines, b""]).split()
    columns = len(words) // max(len(lines), 1)  # with the separator
    if columns <= dimensions or len(words) != columns * len(lines) or set(words[columns - 1 :: columns]) - {b";"}:
        rows = [line.split()[:dimensions] for line in lines]
        words, columns = list(chain.from_iterable(rows)), dimensions
        if any(len(row) < dimensions for row in rows):
            words = [b""]
    try:
        coordinates = to_coordinates([words[axis::columns] for axis in range(dimensions)])
    except ValueError:
        for line in lines:
            numbers = line.split()[:dimensions]
            if len(numbers) < dimensions or not are_floats(numbers):
                raise DataError(f"{quote(line)} is no vertex: it needs {dimensions} numbers") from None
        raise
    if dimensions == 4:
        if (coordinates[:, 3] == 0).any():
            raise DataError("has a vertex whose fourth coordinate is 0, which lies at infinity")
        coordinates = coordinates[:, :3] / coordinates[:, 3:]
    return coordinates


def _faces(lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners [C] int64, and how many each face has [P] int64, of the faces' lines."""
    rows = [line.split() for line in lines]
    try:
        sizes = to_ints([row[0] for row in rows])
        short = sizes > np.fromiter(map(len, rows), np.int64, len(rows)) - 1
        if short.any() or (sizes < 0).any():
            raise ValueError("a face of fewer corners than it says")
        return to_ints(
            list(chain.from_iterable([row[1 : size + 1] for row, size in zip(rows, sizes.tolist(), strict=True)]))
        ), sizes
    except ValueError:
        for line, row in zip(lines, rows, strict=True):
            if (
                not row[0].isdigit()
                or len(row) <= int(row[0])
                or not all(w.isdigit() for w in row[1 : int(row[0]) + 1])
            ):
                raise DataError(
                    f"{quote(line)} is no face: it needs the number of its corners, then so many vertices"
                ) from None
        raise
