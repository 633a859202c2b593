"""GIfTI surfaces (.gii) after the specification of GIfTI 1.0 (nitrc.org/projects/gifti).

A reader of our own instead of nibabel, which makes as many arrays as a damaged file claims to have, and decompresses
without a bound. Coordinates stay in the space of the point set; the coordinate systems that a file lists are other
spaces. All of them are RAS (x to the right, y to the front, z up).
"""

import math
import zlib
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ...utils.errors import DataError
from ..geometry import Geometry
from .xml_tree import base64_bytes, integer, numbers, read_tree

POINTS, TRIANGLES = "NIFTI_INTENT_POINTSET", "NIFTI_INTENT_TRIANGLE"
TYPES = {
    **{f"NIFTI_TYPE_INT{8 * size}": f"i{size}" for size in (1, 2, 4, 8)},
    **{f"NIFTI_TYPE_UINT{8 * size}": f"u{size}" for size in (1, 2, 4, 8)},
    "NIFTI_TYPE_FLOAT32": "f4",
    "NIFTI_TYPE_FLOAT64": "f8",
}
ORDERS = {"LittleEndian": "<", "BigEndian": ">"}


def read(path: Path) -> Geometry:
    """Read the triangles of a surface, or its points if it has no triangles; see `Geometry`.

    Raise DataError with the reason if the file is damaged or has only data on a surface.
    """
    arrays = read_tree(path, "GIFTI", "GIfTI").findall("DataArray")
    points = [_rows(array, "points") for array in arrays if array.get("Intent") == POINTS]
    triangles = [_rows(array, "triangles") for array in arrays if array.get("Intent") == TRIANGLES]
    if not points:
        intents = sorted({array.get("Intent", "without intent")[:50] for array in arrays})
        kinds = "triangles" if triangles else f"data ({', '.join(intents[:3]) or 'no arrays'})"
        raise DataError(f"has no points of a surface, only {kinds}: give the file that has them, such as .surf.gii")
    if triangles and len(triangles) != len(points):
        raise DataError(f"has {len(points)} sets of points and {len(triangles)} of triangles, which do not pair")
    faces = [np.zeros((0, 3), dtype=np.int64)]
    start = 0
    for vertices, corners in zip(points, triangles, strict=bool(triangles)):
        if corners.dtype.kind == "f":
            raise DataError("its triangles are not whole numbers: the file is damaged")
        if len(corners) and not 0 <= corners.min() <= corners.max() < len(vertices):
            raise DataError(f"its triangles use points {corners.min()} to {corners.max()} of {len(vertices)}")
        faces.append(corners.astype(np.int64) + start)
        start += len(vertices)
    vertices = np.concatenate(points)
    return Geometry(vertices if vertices.dtype.kind == "f" else vertices.astype(np.float64), np.concatenate(faces), "z")


def _rows(array: Element, what: str) -> np.ndarray:
    """Return the numbers [N, 3] of a <DataArray>, in the machine's byte order."""
    shape = tuple(integer(array, f"Dim{axis}") for axis in range(min(integer(array, "Dimensionality"), 8)))
    if len(shape) != 2 or shape[1] != 3:
        raise DataError(f"its {what} are an array of {list(shape)}, not [N, 3]: the file is damaged")
    kind, encoding = array.get("DataType", ""), array.get("Encoding", "")
    order, indexing = array.get("Endian", "LittleEndian"), array.get("ArrayIndexingOrder", "RowMajorOrder")
    if kind not in TYPES or order not in ORDERS or indexing not in ("RowMajorOrder", "ColumnMajorOrder"):
        raise DataError(f"its {what} are {kind[:30]!r}, {order[:30]!r}, {indexing[:30]!r}, which GIfTI does not have")
    dtype = np.dtype(ORDERS[order] + TYPES[kind])
    text, name = array.findtext("Data"), f"<Data> of its {what}"
    if encoding == "ASCII":
        values = numbers(text, dtype.newbyteorder("="), name)
    elif encoding in ("Base64Binary", "GZipBase64Binary"):
        content = base64_bytes(text or "", name)
        if encoding == "GZipBase64Binary":
            content = _decompressed(content, math.prod(shape) * dtype.itemsize, name)
        if len(content) % dtype.itemsize:
            raise DataError(f"{name} has {len(content)} bytes, no multiple of {dtype.itemsize}: the file is damaged")
        values = np.frombuffer(content, dtype).astype(dtype.newbyteorder("="))
    elif encoding == "ExternalFileBinary":
        raise DataError(f"has its {what} in another file, which is not read: convert it to GZipBase64Binary")
    else:
        raise DataError(f"has its {what} in the encoding {encoding[:30]!r}, which GIfTI does not have")
    if len(values) != math.prod(shape):
        raise DataError(f"{name} has {len(values)} numbers of {shape[0]} times 3: the file is damaged or cut off")
    return values.reshape(shape, order="C" if indexing == "RowMajorOrder" else "F")


def _decompressed(content: bytes, size: int, name: str) -> bytes:
    """Return `size` bytes out of a zlib or gzip stream, and not one more than one more."""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, size + 1)
    except (zlib.error, OverflowError) as error:
        raise DataError(f"{name} cannot be decompressed ({error}): the file is damaged or cut off") from error
