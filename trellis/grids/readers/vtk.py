"""VTK surfaces: legacy .vtk files, versions 1.0 to 5.1; .vtp files go on to `vtk_xml`.

After the VTK file formats documentation (docs.vtk.org/en/latest/vtk_file_formats). Small readers of our own: the vtk
package has 100 MB and more, and prints its errors instead of raising them. Read are PolyData, and UnstructuredGrids of
flat cells; point and cell data are not.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from .vtk_cells import NO_CELLS, Cells, cells_of_offsets, surface
from .vtk_xml import read_xml

# Binary data are big-endian. vtkIdType is written as int.
TYPES = {
    "char": "i1",
    "signed_char": "i1",
    "unsigned_char": "u1",
    "short": ">i2",
    "unsigned_short": ">u2",
    "int": ">i4",
    "unsigned_int": ">u4",
    "long": ">i8",
    "unsigned_long": ">u8",
    "float": ">f4",
    "double": ">f8",
    "vtkidtype": ">i4",
    "vtktypeint64": ">i8",
    "vtktypeuint64": ">u8",
}
HEADER = re.compile(rb"\s*#\s*vtk\s+DataFile\s+Version\s+[\d.]+[^\n]*\n[^\n]*\n\s*(\w+)\s+DATASET\s+(\w+)", re.I)
CELL_SECTIONS = ("VERTICES", "LINES", "POLYGONS", "TRIANGLE_STRIPS", "CELLS")
# Sections of text files end where the next one begins.
KEYWORD = re.compile(
    rb"(?<!\S)(POINTS|VERTICES|LINES|POLYGONS|TRIANGLE_STRIPS|CELLS|CELL_TYPES|OFFSETS|CONNECTIVITY|METADATA|FIELD|"
    rb"POINT_DATA|CELL_DATA)(?!\S)",
    re.I,
)
WHY_NOT = {
    "STRUCTURED_POINTS": "an image (STRUCTURED_POINTS), not a surface: save it as .nii.gz with 3D Slicer or ParaView",
    "RECTILINEAR_GRID": "a RECTILINEAR_GRID, not a surface: apply Extract Surface in ParaView and save it as .vtp",
    "STRUCTURED_GRID": "a STRUCTURED_GRID, not a surface: apply Extract Surface in ParaView and save it as .vtp",
}
TRIANGLE, STRIP, POLYGON, PIXEL, QUAD = 5, 6, 7, 8, 9
THIN = (0, 1, 2, 3, 4)  # empty cells, points and lines


def read(path: Path) -> Geometry:
    """Read all triangles of a legacy or XML file of VTK; see `Geometry`. Which it is, the content says.

    A file with points alone gives these. Raise DataError with the reason if it is damaged or no surface.
    """
    content = path.read_bytes()
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<":
        return read_xml(content)
    header = HEADER.match(content)
    if not header:
        raise DataError('does not begin as a VTK file: "# vtk DataFile Version", a title, ASCII or BINARY, DATASET')
    encoding, dataset = header[1].decode().upper(), header[2].decode().upper()
    if encoding not in ("ASCII", "BINARY"):
        raise DataError(f"has {encoding[:20]!r} in its third line, which must be ASCII or BINARY")
    if dataset not in ("POLYDATA", "UNSTRUCTURED_GRID"):
        raise DataError("is " + WHY_NOT.get(dataset, f"a VTK data set {dataset[:30]}, which is not read"))
    sections = (_text_sections if encoding == "ASCII" else _binary_sections)(content, header.end())
    if sections.points is None:
        raise DataError("has no POINTS: the file is damaged or cut off")
    if dataset == "UNSTRUCTURED_GRID":
        return _flat_cells(sections)
    strips = sections.cells.get("TRIANGLE_STRIPS", NO_CELLS)
    polygons = sections.cells.get("POLYGONS", NO_CELLS)
    return surface(sections.points, polygons, strips, "LINES" in sections.cells and len(sections.cells["LINES"].sizes))


class _Sections(NamedTuple):
    """What a file has: points [V, 3], cells by the keyword of their section, and the types of CELLS."""

    points: np.ndarray | None
    cells: dict[str, Cells]
    types: np.ndarray | None


def _flat_cells(sections: _Sections) -> Geometry:
    """Return the triangles of an unstructured grid's cells. Raise DataError if one of them is no flat linear cell."""
    assert sections.points is not None
    cells, types = sections.cells.get("CELLS", NO_CELLS), sections.types
    types = np.zeros(0, dtype=np.int64) if types is None else types
    if len(types) != len(cells.sizes):
        raise DataError(f"has {len(types)} types of {len(cells.sizes)} cells: the file is damaged or cut off")
    other = types[~np.isin(types, (*THIN, TRIANGLE, STRIP, POLYGON, PIXEL, QUAD))]
    if len(other):
        raise DataError(
            f"has cells of VTK's type {other[0]}, solid or curved, which are not read: apply Extract Surface in "
            "ParaView and save it as .vtp"
        )
    cell = np.repeat(np.arange(len(types)), cells.sizes)
    corners = cells.corners.copy()
    pixels = np.flatnonzero((types == PIXEL) & (cells.sizes == 4))
    last = (np.cumsum(cells.sizes) - 1)[pixels]  # a pixel lists its rows, a quad goes round
    corners[last], corners[last - 1] = cells.corners[last - 1], cells.corners[last]
    round_cells, strips = np.isin(types, (TRIANGLE, POLYGON, PIXEL, QUAD)), types == STRIP
    return surface(
        sections.points,
        Cells(corners[round_cells[cell]], cells.sizes[round_cells]),
        Cells(corners[strips[cell]], cells.sizes[strips]),
        has_lines=np.isin(types, (3, 4)).any(),
    )


def _split(values: np.ndarray, count: int, keyword: str) -> Cells:
    """Return cells of the layout before version 5: each has its number of points, then the points."""
    if not count and not len(values):
        return NO_CELLS
    damaged = DataError(f"{keyword} does not have {count} cells in {len(values)} numbers: the file is damaged")
    width = int(values[0]) + 1 if len(values) else 0
    if width > 0 and width * count == len(values) and (values[::width] == width - 1).all():
        return Cells(values.reshape(count, width)[:, 1:].reshape(-1), np.full(count, width - 1))
    heads, at, sizes = [], 0, []
    numbers = values.tolist()
    while at < len(numbers):
        heads.append(at)
        sizes.append(numbers[at])
        if numbers[at] < 0:
            raise damaged
        at += numbers[at] + 1
    if at != len(numbers) or len(heads) != count:
        raise damaged
    return Cells(np.delete(values, heads), np.array(sizes, dtype=np.int64))


def _numbers_in(line: bytes, count: int, keyword: str) -> list[int]:
    """Return the counts that follow a keyword."""
    words = line.split()[:count]
    if len(words) < count or not all(word.isdigit() for word in words):
        raise DataError(f"{keyword} is not followed by its {count} counts: the file is damaged")
    return [int(word) for word in words]


def _type_of(name: bytes) -> np.dtype:
    dtype = TYPES.get(name.decode("latin-1").lower())
    if dtype is None:
        raise DataError(f"has numbers of type {name[:20].decode('latin-1')!r}, which is not one of VTK's")
    return np.dtype(dtype)


# --- text ---


def _text_sections(content: bytes, start: int) -> _Sections:
    """Return the sections of an ASCII file: each ends where the next keyword is."""
    marks = list(KEYWORD.finditer(content, start))
    ends = [mark.start() for mark in marks[1:]] + [len(content)]
    words: list[tuple[str, list[bytes]]] = []
    for mark, end in zip(marks, ends, strict=False):  # without a keyword, there is one end too many
        if mark[1].upper() in (b"POINT_DATA", b"CELL_DATA"):
            break  # what follows is no geometry
        words.append((mark[1].decode().upper(), content[mark.end() : end].split()))
    points: np.ndarray | None = None
    types: np.ndarray | None = None
    cells: dict[str, Cells] = {}
    for index, (keyword, body) in enumerate(words):
        if keyword == "POINTS":
            (count,) = _numbers_in(b" ".join(body[:1]), 1, keyword)
            dtype = _type_of(body[1] if len(body) > 1 else b"")
            points = _parsed(body[2:], 3 * count, dtype, keyword).reshape(-1, 3)
        elif keyword == "CELL_TYPES":
            (count,) = _numbers_in(b" ".join(body[:1]), 1, keyword)
            types = _parsed(body[1:], count, np.dtype(np.int64), keyword)
        elif keyword in CELL_SECTIONS:
            first, second = _numbers_in(b" ".join(body[:2]), 2, keyword)
            following = [word for word, _ in words[index + 1 : index + 3]]
            if following == ["OFFSETS", "CONNECTIVITY"]:
                offsets = _parsed(words[index + 1][1][1:], first, np.dtype(np.int64), "OFFSETS")
                corners = _parsed(words[index + 2][1][1:], second, np.dtype(np.int64), "CONNECTIVITY")
                cells[keyword] = cells_of_offsets(offsets[1:], corners)
            else:
                cells[keyword] = _split(_parsed(body[2:], second, np.dtype(np.int64), keyword), first, keyword)
    return _Sections(points, cells, types)


def _parsed(words: list[bytes], count: int, dtype: np.dtype, keyword: str) -> np.ndarray:
    if len(words) != count:
        raise DataError(f"{keyword} has {len(words)} of {count} numbers: the file is damaged or cut off")
    try:
        return np.array(words, dtype=dtype.newbyteorder("=") if dtype.kind == "f" else np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{keyword} has something that is not a number ({str(error)[:100]})") from error


# --- binary ---


class _Cursor:
    """A position in a binary file."""

    def __init__(self, content: bytes, at: int):
        self.content, self.at = content, at

    def line(self) -> bytes:
        """Return the next line without white space around it."""
        end = self.content.find(b"\n", self.at)
        end = len(self.content) if end < 0 else end
        line = self.content[self.at : end].strip()
        self.at = min(end + 1, len(self.content))
        return line

    def line_of_words(self) -> bytes:
        """Return the next line that is not empty; empty at the end of the file."""
        while self.at < len(self.content):
            if line := self.line():
                return line
        return b""

    def skip(self, size: int, what: str) -> int:
        """Pass over `size` bytes and return where they begin. Raise DataError if there are fewer."""
        start = self.at
        if size > len(self.content) - start:
            raise DataError(f"{what} has {len(self.content) - start} of {size} bytes: the file is damaged or cut off")
        self.at += size
        return start

    def array(self, count: int, dtype: np.dtype, what: str) -> np.ndarray:
        start = self.skip(count * dtype.itemsize, what)
        array = np.frombuffer(self.content, dtype, count, start)
        return array.astype(dtype.newbyteorder("=") if dtype.kind == "f" else np.int64)


def _binary_sections(content: bytes, start: int) -> _Sections:
    """Return the sections of a BINARY file, read one after the other."""
    cursor = _Cursor(content, start)
    cursor.line()  # the rest of the line of DATASET
    points: np.ndarray | None = None
    types: np.ndarray | None = None
    cells: dict[str, Cells] = {}
    while line := cursor.line_of_words():
        word, _, rest = line.partition(b" ")
        keyword = word.decode("latin-1").upper()
        if keyword in ("POINT_DATA", "CELL_DATA"):
            break
        if keyword == "METADATA":
            while cursor.line():
                pass  # it ends with an empty line
        elif keyword == "FIELD":
            _pass_field(cursor, rest)
        elif keyword == "POINTS":
            (count,) = _numbers_in(rest, 1, keyword)
            points = cursor.array(3 * count, _type_of((rest.split() + [b""])[1]), keyword).reshape(-1, 3)
        elif keyword == "CELL_TYPES":
            (count,) = _numbers_in(rest, 1, keyword)
            types = cursor.array(count, np.dtype(">i4"), keyword)
        elif keyword in CELL_SECTIONS:
            first, second = _numbers_in(rest, 2, keyword)
            before = cursor.at
            offsets_line = cursor.line_of_words()
            if offsets_line[:8].upper() == b"OFFSETS ":
                offsets = cursor.array(first, _type_of(offsets_line[8:].strip()), "OFFSETS")
                connectivity_line = cursor.line_of_words()
                if connectivity_line[:13].upper() != b"CONNECTIVITY ":
                    raise DataError(f"{keyword} has OFFSETS, but no CONNECTIVITY: the file is damaged or cut off")
                corners = cursor.array(second, _type_of(connectivity_line[13:].strip()), "CONNECTIVITY")
                cells[keyword] = cells_of_offsets(offsets[1:], corners)
            else:
                cursor.at = before
                cells[keyword] = _split(cursor.array(second, np.dtype(">i4"), keyword), first, keyword)
        else:
            raise DataError(f"has {keyword[:30]!r} where a section should begin: the file is damaged")
    return _Sections(points, cells, types)


def _pass_field(cursor: _Cursor, rest: bytes) -> None:
    """Pass over the arrays of a FIELD, whose line ends with their number."""
    words = rest.split()
    (count,) = _numbers_in(words[-1] if words else b"", 1, "FIELD")
    for _ in range(count):
        line = cursor.line_of_words()
        if line.upper() == b"METADATA":
            while cursor.line():
                pass
            line = cursor.line_of_words()
        words = line.split()
        if len(words) < 4:
            raise DataError("FIELD has an array without name, size and type: the file is damaged or cut off")
        columns, rows = _numbers_in(b" ".join(words[1:3]), 2, "FIELD")
        name = words[3].decode("latin-1").lower()
        if name in ("string", "utf8_string"):
            for _ in range(columns * rows):
                _pass_string(cursor)
        elif name == "bit":
            cursor.skip(-(-columns * rows // 8), "FIELD")
        else:
            cursor.skip(columns * rows * _type_of(words[3]).itemsize, "FIELD")


def _pass_string(cursor: _Cursor) -> None:
    """Pass over a string: the two highest bits say that its length has 8, 4, 2 or 1 bytes, the others the length."""
    start = cursor.skip(1, "FIELD")
    width = 8 >> (cursor.content[start] >> 6)
    cursor.skip(width - 1, "FIELD")
    cursor.skip(int.from_bytes(cursor.content[start : start + width], "big") & ((1 << (8 * width - 2)) - 1), "FIELD")
