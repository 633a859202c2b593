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

NAMES = (b"o", b"g", b"usemtl", b"mtllib")  # a name may end with a backslash, as Windows paths do
# Statements of what is a part of the object and is not read.
NOT_READ = {
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
    lines, kinds = _statements(read_text(path))
    vertex_lines = [i for i, kind in enumerate(kinds) if kind == b"v " or kind == b"v\t"]
    face_lines = [i for i, kind in enumerate(kinds) if kind == b"f " or kind == b"f\t"]
    for lone in (b"v", b"v "):
        if lone in kinds and lone in lines:
            raise DataError(f"line {lines.index(lone) + 1}: a vertex has no coordinates")
    vertices = _vertices(lines, vertex_lines)
    corners, sizes = _faces(lines, face_lines)
    last = lines[-1].split()  # empty where the file ends with a line end, as it should
    if last[:1] == [b"f"] and (len(last) < 4 or _references(last[1]) != _references(last[-1]) or last[-1][-1:] == b"-"):
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
    # Complete files often have one of the two; a copy that broke off has both.
    unused = len(vertices) - len(np.unique(indices)) if last and face_lines else 0
    cut = f"ends without a line end, and {unused} of its {len(vertices)} vertices are in no face: it may be cut"
    return geometry.Geometry(vertices, triangulate(vertices, indices, sizes), notes=(cut,) if unused else ())


def _references(corner: bytes) -> list[bool]:
    """Return which of vertex, texture and normal a corner of a face names, as far as its slashes go."""
    return [bool(part) for part in corner.split(b"/")]


def _statements(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of a file without comments and indentation; continued lines are joined in their first one."""
    if b"#" in data:
        data = re.sub(rb"#[^\n]*", b"", data)
    lines = data.split(b"\n")
    if b"\\\n" in data:
        _join_continued(lines)
    kinds = [line[:2] for line in lines]
    if any(kind[:1].isspace() for kind in set(kinds)):
        lines = [line.lstrip() for line in lines]
        kinds = [line[:2] for line in lines]
    if b"fo" in kinds:
        lines = [b"f " + line[3:] if line.split(None, 1)[:1] == [b"fo"] else line for line in lines]
        kinds = [line[:2] for line in lines]
    for keyword, what in NOT_READ.items():
        if keyword[:2] in kinds and any(line.split(None, 1)[:1] == [keyword] for line in lines):
            raise DataError(f"has {what}, which are not read: convert them to polygons in one file")
    return lines, kinds


def _join_continued(lines: list[bytes]) -> None:
    """Put each statement whose lines end with a backslash into its first line, and leave the others empty."""
    parts: list[bytes] = []
    for i, line in enumerate(lines):
        continues = line.endswith(b"\\") and (parts or line.split(None, 1)[0] not in NAMES)
        if not parts and not continues:
            continue
        parts.append(line.removesuffix(b"\\") if continues else line)
        lines[i] = b""
        if not continues or i == len(lines) - 1:
            lines[i + 1 - len(parts)] = b" ".join(parts)
            parts = []


def _vertices(lines: list[bytes], numbers: list[int]) -> np.ndarray:
    """Return the vertices [V, 3] float64 of the lines with these numbers."""
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
