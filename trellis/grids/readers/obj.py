"""Wavefront OBJ: the polygons of its f statements.

Format: "Advanced Visualizer Manual", appendix B1 "Object Files", Alias|Wavefront. Of its statements only v and f (and
fo, its older name) make surfaces that are read. Points, lines, free-form curves, groups, materials, normals and texture
coordinates make none. Free-form surfaces and included files would be missing, so files with them are refused.
"""

import re
from itertools import chain
from pathlib import Path

import numpy as np

from ...utils.errors import DataError
from .. import geometry
from .polygons import triangulate
from .text import are_floats, quote, read_text, to_coordinates, to_ints

VERTEX = (b"v ", b"v\t")
FACE = (b"f ", b"f\t")
NAMES = (b"o", b"g", b"usemtl", b"mtllib")  # a name may end with a backslash, as Windows paths do
# Statements of what is a part of the object and is not read.
MISSING = {
    b"surf": "free-form surfaces",
    b"bsp": "B-spline patches",
    b"bzp": "Bezier patches",
    b"cdp": "Cardinal patches",
    b"call": "parts in other files (call)",
}


def read(path: Path) -> geometry.Geometry:
    """Read all polygons of a file as triangles.

    vertices: [V, 3] float64 in the file's units; weights and colors that follow x y z are left out.
    Indices count from 1; negative ones count back from the last vertex before their statement. Faces of less than three
    corners are left out. A file without faces gives its vertices alone.
    Raise DataError with the line of the first statement that is no vertex or face, or names a vertex that is not there.
    """
    data = read_text(path)
    lines = _statements(data)
    vertex_lines = [i for i, line in enumerate(lines) if line.startswith(VERTEX)]
    face_lines = [i for i, line in enumerate(lines) if line.startswith(FACE)]
    vertices = _vertices(lines, vertex_lines)
    corners, sizes = _faces(lines, face_lines)
    if not data.endswith(b"\n") and face_lines and face_lines[-1] == len(lines) - 1 and sizes[-1] < 3:
        raise DataError(f"ends in the middle of a face: {quote(lines[-1])}")
    if not vertex_lines and not face_lines:
        raise DataError("has no vertices and no faces (v and f statements): it is no Wavefront OBJ file, or empty")
    if not face_lines and any(line.startswith(b"cstype") for line in lines):
        raise DataError("has free-form curves and no faces: convert them to polygons")

    # Vertices before each corner's statement: what negative indices count from.
    before = np.repeat(np.searchsorted(vertex_lines, face_lines), sizes)
    indices = np.where(corners < 0, corners + before, corners - 1)
    wrong = (indices < 0) | (indices >= len(vertices))
    if wrong.any():
        at = int(wrong.argmax())
        line = face_lines[int(np.searchsorted(np.cumsum(sizes), at, side="right"))]
        if corners[at] == 0:
            raise DataError(f"line {line + 1}: a face uses vertex 0; vertices count from 1")
        there = f"{before[at]} vertices come before it" if corners[at] < 0 else f"the file has {len(vertices)}"
        raise DataError(f"line {line + 1}: {quote(lines[line])} uses a vertex that is not there: {there}")
    return geometry.Geometry(vertices, triangulate(vertices, indices, sizes))


def _statements(data: bytes) -> list[bytes]:
    """Return the lines of a file without comments and indentation; continued lines are joined in their first one."""
    if b"#" in data:
        data = re.sub(rb"#[^\n]*", b"", data)
    lines = data.split(b"\n")
    if b"\\\n" in data:
        for i in range(len(lines) - 2, -1, -1):  # backwards, so that each joins what the next one has joined
            if lines[i].endswith(b"\\") and lines[i].split(None, 1)[0] not in NAMES:
                lines[i], lines[i + 1] = lines[i][:-1] + b" " + lines[i + 1], b""
    if data[:1].isspace() or b"\n " in data or b"\n\t" in data:
        lines = [line.lstrip() for line in lines]
    if b"fo " in data or b"fo\t" in data:
        lines = [b"f " + line[3:] if line.startswith((b"fo ", b"fo\t")) else line for line in lines]
    for keyword, what in MISSING.items():
        if keyword in data and any(line.startswith((keyword + b" ", keyword + b"\t")) for line in lines):
            raise DataError(f"has {what}, which are not read: convert them to polygons in one file")
    return lines


def _vertices(lines: list[bytes], numbers: list[int]) -> np.ndarray:
    """Return the vertices [V, 3] float64 of the lines with these numbers."""
    for line in (b"v", b"v "):
        if line in lines:
            raise DataError(f"line {lines.index(line) + 1}: a vertex has no coordinates")
    words = b" ".join([lines[i] for i in numbers]).split()
    columns = len(words) // max(len(numbers), 1)
    if columns < 4 or words[::columns].count(b"v") != len(numbers) or len(words) != columns * len(numbers):
        # Not all lines are of one length.
        rows = [lines[i].split()[:4] for i in numbers]
        for i, row in zip(numbers, rows, strict=True):
            if len(row) < 4:
                raise DataError(f"line {i + 1}: {quote(lines[i])} is no vertex: it needs three numbers")
        words, columns = list(chain.from_iterable(rows)), 4
    try:
        return to_coordinates([words[axis::columns] for axis in (1, 2, 3)])
    except ValueError:
        for i in numbers:
            if not are_floats(lines[i].split()[1:4]):
                raise DataError(f"line {i + 1}: {quote(lines[i])} is no vertex: it needs three numbers") from None
        raise


def _faces(lines: list[bytes], numbers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners [C] int64, as written, and how many each face has, [P] int64."""
    text = b" ".join([lines[i] for i in numbers])
    words = text.split()
    columns = len(words) // max(len(numbers), 1)
    if columns > 1 and words[::columns].count(b"f") == len(numbers) and len(words) == columns * len(numbers):
        sizes = np.full(len(numbers), columns - 1)
        del words[::columns]
    else:
        rows = [lines[i].split()[1:] for i in numbers]
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        words = list(chain.from_iterable(rows))
    if b"/" in text:  # vertex/texture/normal
        words = [word.partition(b"/")[0] for word in words]
    try:
        return to_ints(words), sizes
    except ValueError:
        for i in numbers:
            try:
                to_ints([word.partition(b"/")[0] for word in lines[i].split()[1:]])
            except ValueError:
                raise DataError(f"line {i + 1}: {quote(lines[i])} is no face: it needs whole numbers") from None
        raise
