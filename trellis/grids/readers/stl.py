"""STL, text and binary.

Format: "StereoLithography Interface Specification", 3D Systems, 1989. Binary files have 80 bytes of any content, the
number of triangles as uint32, then 50 bytes per triangle, all little-endian. Text files have facets between "solid" and
"endsolid". Neither says which it is, and binary files may begin with "solid" too: the size decides, then the words.
"""

import re
from pathlib import Path

import numpy as np

from ...utils.errors import DataError
from .. import geometry
from .text import BOM, are_floats, quote, refuse_utf16, to_coordinates, unify_line_ends

HEADER = 84
TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
STATEMENT = rb"[ \n](?=(?:facet|outer|vertex|endloop|endfacet|endsolid)[ \n])|\n(?=solid\b)"


def read(path: Path) -> geometry.Geometry:
    """Read all triangles of a file, of all its solids. Each triangle has its own three vertices.

    vertices: [3 F, 3], float32 of a binary file, float64 of a text file, in the file's units.
    Bytes after the last triangle are left out if they can hold no triangle: fewer than 50, zeros, or text.
    Raise DataError if the file is cut, or its count of triangles is not what it has.
    """
    data = path.read_bytes()
    if len(data) >= HEADER and len(data) == HEADER + TRIANGLE.itemsize * _count(data, 0):
        return _geometry(_binary(data, 0))
    if data[:20].replace(b"\0", b"").lower()[2:].startswith(b"solid"):
        refuse_utf16(data)
    text = data.removeprefix(BOM).strip(b" \t\r\n\f\v\0")
    if text[:5].lower() in (b"solid", b"facet") and (b"\0" not in text or b"endloop" in text[HEADER:].lower()):
        return _text(text)
    return _several(data)


def _geometry(corners: np.ndarray) -> geometry.Geometry:
    """Return triangles [F, 3, 3] as a Geometry."""
    return geometry.Geometry(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3))


def _count(data: bytes, start: int) -> int:
    """Return the number of triangles that the header at `start` claims."""
    return int.from_bytes(data[start + 80 : start + HEADER], "little")


def _binary(data: bytes, start: int) -> np.ndarray:
    """Return the corners of the solid that starts there, [F, 3, 3] float32. All its bytes must be there."""
    return np.frombuffer(data, TRIANGLE, _count(data, start), start + HEADER)["corners"]


def _several(data: bytes) -> geometry.Geometry:
    """Return the triangles of a binary file that is longer than its first header says.

    It may be several files in one, or end with what is no triangle.
    """
    if _is_text(data):
        raise DataError('is text that does not begin with "solid": it is no STL file')
    if len(data) < HEADER:
        raise DataError(f"is cut, or no STL file: it has {len(data)} bytes, and a binary one at least {HEADER}")
    solids: list[np.ndarray] = []
    start = 0
    while len(data) - start >= HEADER:
        count = _count(data, start)
        end = start + HEADER + TRIANGLE.itemsize * count
        # Zeros are common between triangles, so only the first may have a count of 0.
        if end > len(data) or (solids and not count):
            break
        solids.append(_binary(data, start))
        start = end

    rest = data[start:]
    if not solids or len(rest) >= TRIANGLE.itemsize and rest.strip(b"\0") and not _is_text(rest):
        counted, room = _count(data, 0), (len(data) - HEADER) // TRIANGLE.itemsize
        if solids:
            counted = sum(map(len, solids))
            room = counted + len(rest) // TRIANGLE.itemsize
        raise DataError(
            f"its header counts {counted} triangles, its {len(data)} bytes have room for {room}: "
            "it is cut, or its count is wrong"
        )
    left = len(rest.strip(b"\0 \t\r\n"))
    notes = (f"ends with {left} bytes that are no triangle, or the beginning of one",) if left else ()
    return _geometry(np.concatenate(solids))._replace(notes=notes)


def _is_text(data: bytes) -> bool:
    return not re.search(rb"[^\t\n\r -~]", data)


def _text(text: bytes) -> geometry.Geometry:
    """Return the triangles of a text file. Case does not matter, names may have any bytes and words."""
    text = unify_line_ends(text.lower())
    lines = [line.strip() for line in text.split(b"\n")]
    try:
        return _facets(lines)
    except DataError:
        try:  # the format allows any white space: statements that share a line or span several
            return _facets(re.split(STATEMENT, b"\n".join([b" ".join(line.split()) for line in lines if line] + [b""])))
        except DataError:
            pass
        raise


def _facets(statements: list[bytes]) -> geometry.Geometry:
    """Return the triangles of the statements of a text file. Raise DataError if they are not complete facets."""
    kinds = [statement[:5] for statement in statements]
    starts, ends, vertices = (
        [i for i, kind in enumerate(kinds) if kind == word] for word in (b"facet", b"endfa", b"verte")
    )
    if not starts:
        raise DataError("has no triangles")
    last = statements[-1].strip()
    # The statement that ends a solid may have the beginning of the next one, if they share a line.
    closed = [i for i, kind in enumerate(kinds) if kind == b"endso"]
    complete = len(closed) >= kinds.count(b"solid") and (not closed or not ends or closed[-1] > ends[-1])
    between = last == b"endfacet" or b"endsolid".startswith(last)
    if len(ends) != len(starts) or not (complete or between):
        raise DataError(f"is cut: of {len(starts)} facets {len(ends)} are complete, and its last line is {quote(last)}")
    per_facet = np.searchsorted(vertices, ends) - np.searchsorted(vertices, starts)
    if len(vertices) != 3 * len(starts) or (per_facet != 3).any():
        raise DataError(f"has {len(vertices)} vertices for {len(starts)} facets; each needs 3 of its own")
    words = b" ".join([statements[i] for i in vertices]).split()
    try:
        if len(words) != 4 * len(vertices) or words[::4].count(b"vertex") != len(vertices):
            raise ValueError("other than three numbers in a vertex")
        corners = to_coordinates([words[axis::4] for axis in (1, 2, 3)])
    except ValueError:
        for i in vertices:
            keyword, *numbers = statements[i].split()
            if keyword != b"vertex" or len(numbers) != 3 or not are_floats(numbers):
                raise DataError(f"{quote(statements[i])} is no vertex: it needs three numbers") from None
        raise
    notes = () if complete else ('has no "endsolid" at its end: facets may be missing',)
    return _geometry(corners.reshape(-1, 3, 3))._replace(notes=notes)
