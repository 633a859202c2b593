"""OFF, the object file format of Geomview.

Format: "OFF Files" in the chapter "OOGL File Formats" of the Geomview manual, version 1.9. Each vertex and each face
has a line; normals, colors and texture coordinates follow the coordinates and are left out. The word in front says
which. Files without it, with the counts on its line, or without the count of edges are common, and read. So are files
without any of these extras that break lines elsewhere.
"""

import re
from pathlib import Path

import numpy as np

from ...utils.errors import DataError
from .. import geometry
from .polygons import triangulate
from .text import are_floats, quote, read_text, to_coordinates, to_count, to_ints

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
    dimensions = 4 if homogeneous else 3
    try:
        vertices, corners, sizes = _rows(lines, dimensions)
    except DataError:
        plain = keyword is None or keyword[0].lower() in (b"off", b"4off")
        found = _free(lines, dimensions) if plain else None
        if found is None:
            raise
        vertices, corners, sizes = found
    if homogeneous:
        if (vertices[:, 3] == 0).any():
            raise DataError("has a vertex whose fourth coordinate is 0, which lies at infinity")
        vertices = vertices[:, :3] / vertices[:, 3:]
    return geometry.Geometry(vertices, triangulate(vertices, corners, sizes))


def _rows(lines: list[bytes], dimensions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vertices [V, dimensions] float64, corners [C] and sizes [P] of faces int64: each has a line."""
    vertex_count, face_count = _counts(lines[0] if lines else b"")
    lines = lines[1:]
    if len(lines) != vertex_count + face_count:
        raise DataError(
            f"its header counts {vertex_count} vertices and {face_count} faces, but {len(lines)} lines follow "
            f"instead of {vertex_count + face_count}: it is cut, or its counts are wrong"
        )
    return _vertices(lines[:vertex_count], dimensions), *_faces(lines[vertex_count:])


def _free(lines: list[bytes], dimensions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return what `_rows` does where lines break anywhere. None if the numbers are not exactly as many as counted."""
    rows = [line.split() for line in lines]
    counts = [to_count(row[0]) for row in rows]
    of_rows = [len(row) == dimensions or bool(n and n < len(row)) for row, n in zip(rows, counts, strict=True)]
    if not rows or (len(rows[0]) <= 3 and all(of_rows[1:])):
        return None  # each line is a vertex or a face, so it is the counts that are wrong
    words = [word for row in rows for word in row]
    vertex_count, face_count, edge_count = (*map(to_count, words[:3]), None, None, None)[:3]
    if vertex_count is None or face_count is None or edge_count is None:
        return None
    at = 3 + dimensions * vertex_count
    coordinates = words[3:at]
    sizes: list[int] = []
    corners: list[bytes] = []
    while at < len(words) and len(sizes) < face_count:
        size = to_count(words[at])
        if size is None:
            return None
        sizes.append(size)
        corners += words[at + 1 : at + 1 + size]
        at += 1 + size
    if at != len(words) or len(sizes) != face_count or not vertex_count or not are_floats(coordinates):
        return None
    if any(to_count(word) is None for word in corners):
        return None
    vertices = to_coordinates([coordinates[axis::dimensions] for axis in range(dimensions)])
    return vertices, to_ints(corners), np.array(sizes, dtype=np.int64)


def _counts(line: bytes) -> tuple[int, int]:
    """Return the numbers of vertices and faces of the header's line; that of edges may be missing and is not used."""
    counts = [to_count(word) for word in line.split()]
    if len(counts) not in (2, 3) or counts[0] is None or counts[1] is None:
        raise DataError(f"has {quote(line)} where the numbers of vertices, faces and edges are expected")
    return counts[0], counts[1]


def _vertices(lines: list[bytes], dimensions: int) -> np.ndarray:
    """Return the vertices [V, dimensions] float64 of their lines."""
    if not lines:
        return np.zeros((0, dimensions))
    words = b" ; ".join([*lines, b""]).split()
    columns = len(words) // len(lines)  # with the separator
    try:
        if columns <= dimensions or words[columns - 1 :: columns].count(b";") != len(lines):
            raise ValueError("vertices of different or too short lines")
        coordinates = to_coordinates([words[axis::columns] for axis in range(dimensions)])
    except ValueError:
        length = len(lines[0].split())
        for line in lines:
            numbers = line.split()
            if len(numbers) < dimensions or not are_floats(numbers[:dimensions]):
                raise DataError(f"{quote(line)} is no vertex: it needs {dimensions} numbers") from None
            if len(numbers) != length:
                raise DataError(f"has {quote(line)} among vertices of {length} numbers: its counts are wrong") from None
        raise
    return coordinates


def _faces(lines: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners [C] int64, and how many each face has [P] int64, of the faces' lines."""
    rows = [line.split() for line in lines]
    sizes = [to_count(row[0]) for row in rows]
    corners = []
    for line, row, size in zip(lines, rows, sizes, strict=True):
        if size is None or size >= len(row):
            raise DataError(f"{quote(line)} is no face: it needs the number of its corners, then so many vertices")
        corners.extend(row[1 : size + 1])
    try:
        return to_ints(corners), np.array(sizes, dtype=np.int64)
    except ValueError:
        wrong = next(word for word in corners if to_count(word) is None)
        raise DataError(f"has a face with vertex {quote(wrong)}, which is no number") from None
