"""MetaImage label maps, `.mha` and `.mhd` with its data file (https://itk.org/Wiki/ITK/MetaIO/Documentation).

ITK's reader gives wrong voxels for damaged compressed data and only prints a line, so this one is our own.
"""

import re
import zlib
from pathlib import Path

import numpy as np

from ...utils.errors import DataError
from .volume import (
    DEFLATE_RATIO,
    LPS_TO_RAS,
    Volume,
    affine_of,
    as_labels,
    as_volume_shape,
    check_affine,
    check_size,
    unit_in_mm,
)

LONGEST_HEADER = 1 << 20  # bytes
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_metaimage(path: Path) -> Volume:
    """Read a label map. MetaImage's space is left-posterior-superior. Raise DataError with the reason."""
    with open(path, "rb") as file:
        head = file.read(LONGEST_HEADER)
    fields, start = _fields(head)
    size = tuple(int(value) for value in _numbers(fields, ("DimSize",)))
    dimensions = len(size)
    kind = fields.get("ElementType", "none")
    if kind not in TYPES:
        raise DataError(f"its ElementType is {kind}, not one of {', '.join(TYPES)}")
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise DataError(f"has {fields['ElementNumberOfChannels']} numbers for each voxel: a label map has one")
    order = ">" if _is_true(fields, ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), False) else "<"
    flat = _voxels(path, fields, start, size, np.dtype(order + TYPES[kind]))
    labels = as_labels(as_volume_shape(flat.reshape(size, order="F")))

    spacing = _numbers(fields, ("ElementSpacing", "ElementSize"), [1.0] * dimensions)
    rows = _numbers(fields, ("TransformMatrix", "Rotation", "Orientation"), list(np.eye(dimensions).ravel()))
    origin = _numbers(fields, ("Offset", "Position", "Origin"), [0.0] * dimensions)
    if (len(spacing), len(rows), len(origin)) != (dimensions, dimensions**2, dimensions):
        raise DataError(f"its spacing, directions and origin have not the {dimensions} dimensions of DimSize")
    steps = np.reshape(rows, (dimensions, dimensions))[:3, :3].T * np.array(spacing)[:3]  # a row is an axis
    scale, notes = unit_in_mm(fields.get("DistanceUnits", ""))
    affine = LPS_TO_RAS @ affine_of(steps * scale, np.array(origin)[:3] * scale)
    return Volume((labels,), check_affine(affine), {}, notes)


def _fields(head: bytes) -> tuple[dict[str, str], int]:
    """Return the fields of a header, and where the data begin: after ElementDataFile, which is the last field."""
    found = re.search(rb"^[ \t]*ElementDataFile[ \t]*=[^\n]*(\n|\Z)", head, re.MULTILINE)
    if not found:
        raise DataError("is not a MetaImage: its header has no ElementDataFile")
    fields = {}
    for line in head[: found.end()].decode("utf-8", "replace").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            fields[name.strip()] = value.strip()
    return fields, found.end()


def _numbers(fields: dict[str, str], names: tuple[str, ...], default: list[float] | None = None) -> list[float]:
    for name in names:
        if name in fields:
            try:
                return [float(value) for value in fields[name].split()]
            except ValueError:
                raise DataError(f"its {name} is {fields[name]!r}, not numbers") from None
    if default is None:
        raise DataError(f"has no {names[0]}")
    return default


def _is_true(fields: dict[str, str], names: tuple[str, ...], default: bool) -> bool:
    value = next((fields[name] for name in names if name in fields), str(default))
    return value.lower() in ("true", "t", "1", "yes")


def _voxels(path: Path, fields: dict[str, str], start: int, size: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the voxels as one row, the first axis fastest."""
    name = fields["ElementDataFile"]
    if name == "LIST" or "%" in name:
        raise DataError("keeps its voxels in several files: save it as one .mha")
    source = path
    if name.upper() != "LOCAL":
        source, start = path.parent / name, int(_numbers(fields, ("HeaderSize",), [0])[0])
        if not source.is_file():
            raise DataError(f"its voxels are in {name}, which is not there")
    present = source.stat().st_size
    packed, binary = _is_true(fields, ("CompressedData",), False), _is_true(fields, ("BinaryData",), True)
    wanted = int(np.prod(size, dtype=object)) * dtype.itemsize
    if start < 0:  # the data are the end of the file
        start = max(0, present - wanted)
    there = max(0, present - start)
    # In text, a number takes a digit and a space at least.
    check_size(size, dtype.itemsize, there * (DEFLATE_RATIO if packed else 1 if binary else dtype.itemsize))
    with open(source, "rb") as file:
        file.seek(start)
        content = file.read() if packed or not binary else file.read(wanted)
    if packed:
        content = _inflate(content, wanted)
    if binary:
        return np.frombuffer(content, dtype)
    values = content.split()
    if len(values) != wanted // dtype.itemsize:
        raise DataError(f"is truncated or damaged: has {len(values)} of {wanted // dtype.itemsize} voxels")
    return np.array(values).astype(dtype)


def _inflate(content: bytes, wanted: int) -> bytes:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip, by its first bytes
    try:
        unpacked = unpacker.decompress(content, wanted + 1)
    except zlib.error as error:
        raise DataError(f"its compressed voxels are damaged ({error})") from error
    if len(unpacked) != wanted or not unpacker.eof:
        raise DataError(f"is truncated or damaged: its voxels unpack to {len(unpacked)} of {wanted} bytes")
    return unpacked
