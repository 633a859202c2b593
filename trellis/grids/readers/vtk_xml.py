"""VTK XML PolyData (.vtp): text, base64 and appended data, compressed or not.

After the VTK file formats documentation (docs.vtk.org/en/latest/vtk_file_formats, "XML file formats").
"""

import lzma
import re
import zlib
from xml.etree.ElementTree import Element

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from .vtk_cells import NO_CELLS, Cells, cells_of_offsets, surface
from .xml_tree import base64_bytes, integer, numbers, parse

TYPES = {
    **{f"Int{8 * size}": f"i{size}" for size in (1, 2, 4, 8)},
    **{f"UInt{8 * size}": f"u{size}" for size in (1, 2, 4, 8)},
    "Float32": "f4",
    "Float64": "f8",
}
APPENDED = re.compile(rb"<AppendedData\b[^>]*>")
MAX_BYTES = 2**30  # of one array when it is decompressed


def read_xml(content: bytes) -> Geometry:
    """Return all triangles of a .vtp file, or its points if it has no cells but points; see `Geometry`.

    Raise DataError with the reason if it is damaged or no PolyData.
    """
    file = _File(content)
    pieces = file.root.findall("PolyData/Piece")
    points, polygons, strips = [np.zeros((0, 3), dtype=np.float32)], [NO_CELLS], [NO_CELLS]
    has_lines, total = False, 0
    for piece in pieces:
        positions = file.array(piece.find("Points/DataArray"))
        if len(positions) != 3 * integer(piece, "NumberOfPoints"):
            raise DataError(
                f"has {len(positions)} coordinates of {piece.get('NumberOfPoints')} points: the file is damaged"
            )
        for name, found in (("Polys", polygons), ("Strips", strips)):
            corners = file.array(piece.find(f"{name}/DataArray[@Name='connectivity']"))
            offsets = file.array(piece.find(f"{name}/DataArray[@Name='offsets']"))
            if len(offsets) != integer(piece, f"NumberOf{name}", len(offsets)):
                raise DataError(f"has {len(offsets)} of {piece.get(f'NumberOf{name}')} {name}: the file is damaged")
            cells = cells_of_offsets(offsets.astype(np.int64), corners.astype(np.int64))
            if len(cells.corners) and not 0 <= cells.corners.min() <= cells.corners.max() < len(positions) // 3:
                raise DataError(
                    f"its {name} use points {cells.corners.min()} to {cells.corners.max()} of {len(positions) // 3}"
                )
            found.append(Cells(cells.corners + total, cells.sizes))
        has_lines |= integer(piece, "NumberOfLines", 0) > 0
        points.append(positions.reshape(-1, 3))
        total += len(positions) // 3
    joined_polygons, joined_strips = (
        Cells(*map(np.concatenate, zip(*cells, strict=True))) for cells in (polygons, strips)
    )
    return surface(np.concatenate(points[1:] or points), joined_polygons, joined_strips, has_lines)


class _File:
    """The elements of a VTK XML file, and its appended data."""

    def __init__(self, content: bytes):
        # Appended data may be raw, which is no XML: they are cut out first.
        appended = APPENDED.search(content)
        self.data, self.is_raw = b"", False
        self.ends: dict[int, int] = {}
        if appended:
            end = content.rfind(b"</AppendedData")
            if end < appended.end():
                raise DataError("its AppendedData have no end: the file is cut off")
            start = content.find(b"_", appended.end(), end) + 1
            if start == 0:
                raise DataError("its AppendedData do not begin with an underscore: the file is damaged")
            self.data = content[start:end]
            content = content[: appended.end()] + content[end:]
        self.root = parse(content)
        if self.root.tag != "VTKFile":
            raise DataError(f"is XML, but no VTK file: its first element is <{self.root.tag[:50]}>, not <VTKFile>")
        kind = self.root.get("type", "")
        if kind != "PolyData":
            raise DataError(
                f"has VTK data of type {kind[:30]!r}, not PolyData: apply Extract Surface in ParaView and save as .vtp"
            )
        self.compressor = self.root.get("compressor", "")
        order = self.root.get("byte_order", "LittleEndian")
        if order not in ("LittleEndian", "BigEndian"):
            raise DataError(f"has byte_order {order[:30]!r}, which must be LittleEndian or BigEndian")
        self.order = "<" if order == "LittleEndian" else ">"
        self.header_type = self._dtype(self.root.get("header_type", "UInt32"))
        if self.header_type.kind != "u":
            raise DataError(f"has header_type {self.root.get('header_type')!r}, which must be UInt32 or UInt64")
        section = self.root.find("AppendedData")
        if section is not None:
            self.is_raw = section.get("encoding", "base64") == "raw"
        if not self.is_raw:  # base64 of one array ends where the next one begins
            arrays = [each for each in self.root.iter("DataArray") if each.get("format") == "appended"]
            starts = sorted({integer(each, "offset") for each in arrays})
            self.ends = dict(zip(starts, [*starts[1:], len(self.data)], strict=False))

    def _dtype(self, name: str) -> np.dtype:
        if name not in TYPES:
            raise DataError(f"has numbers of type {name[:30]!r}, which is not one of VTK's")
        return np.dtype(self.order + TYPES[name])

    def array(self, element: Element | None) -> np.ndarray:
        """Return the numbers of a <DataArray>, in the machine's byte order; none if there is no such element."""
        if element is None:
            return np.zeros(0, dtype=np.float32)
        dtype = self._dtype(element.get("type", ""))
        name = f'<DataArray Name="{element.get("Name", "")}">'
        text = (element.text or "") + "".join(child.tail or "" for child in element)  # it may have keys between
        kind = element.get("format", "ascii")
        if kind == "ascii":
            return numbers(text, dtype.newbyteorder("="), name)
        if kind == "binary":
            stream = base64_bytes(text, name)
        elif kind == "appended":
            offset = integer(element, "offset")
            if offset > len(self.data):
                raise DataError(f"{name} begins at {offset} of {len(self.data)} bytes of appended data: it is damaged")
            stream = self.data[offset:] if self.is_raw else base64_bytes(self.data[offset : self.ends[offset]], name)
        else:
            raise DataError(f"{name} has the format {kind[:30]!r}, which must be ascii, binary or appended")
        content = self._content(stream, name)
        if len(content) % dtype.itemsize:
            raise DataError(f"{name} has {len(content)} bytes, no multiple of {dtype.itemsize}: the file is damaged")
        return np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))

    def _content(self, stream: bytes, name: str) -> bytes:
        """Return the bytes of an array: its stream has a header of sizes first, and may be compressed in blocks."""
        size = self.header_type.itemsize
        if not self.compressor:
            if not stream:
                return b""
            (length,) = self._header(stream, 0, 1, name)
            if length > len(stream) - size:
                raise DataError(f"{name} has {len(stream) - size} of {length} bytes: the file is damaged or cut off")
            return stream[size : size + length]
        if not stream:
            return b""
        (count,) = self._header(stream, 0, 1, name)
        if not count:
            return b""
        block, last = self._header(stream, size, 2, name)
        compressed = self._header(stream, 3 * size, count, name)
        lengths = [block] * (count - 1) + [last or block]  # 0: the last block is full
        if sum(lengths) > MAX_BYTES:
            raise DataError(f"{name} has {sum(lengths):,} bytes when decompressed, more than {MAX_BYTES:,}")
        at = (3 + count) * size
        if sum(compressed) > len(stream) - at:
            raise DataError(
                f"{name} has {len(stream) - at} of {sum(compressed)} compressed bytes: the file is damaged or cut off"
            )
        blocks = []
        for length, packed in zip(lengths, compressed, strict=True):
            blocks.append(self._decompressed(stream[at : at + packed], length, name))
            at += packed
        return b"".join(blocks)

    def _header(self, stream: bytes, at: int, count: int, name: str) -> list[int]:
        if count * self.header_type.itemsize > len(stream) - at:
            raise DataError(f"{name} ends within its header of {count} sizes: the file is damaged or cut off")
        return np.frombuffer(stream, self.header_type, count, at).tolist()

    def _decompressed(self, packed: bytes, length: int, name: str) -> bytes:
        decompressor: zlib._Decompress | lzma.LZMADecompressor
        if self.compressor == "vtkZLibDataCompressor":
            decompressor = zlib.decompressobj()
        elif self.compressor == "vtkLZMADataCompressor":
            decompressor = lzma.LZMADecompressor()
        else:
            raise DataError(
                f"is compressed by {self.compressor[:50]}, which is not read: save it in ParaView with zlib compression"
            )
        try:
            content = decompressor.decompress(packed, length + 1)
        except (zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{name} cannot be decompressed ({error}): the file is damaged") from error
        if len(content) != length:
            raise DataError(f"{name} has a block that decompresses to another size than {length} bytes: it is damaged")
        return content
