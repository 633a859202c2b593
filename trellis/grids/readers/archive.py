"""Meshes in archives: a zip file with one mesh and its buffers, and single files in gzip.

The archive is unpacked into a temporary folder and read by the reader of the mesh inside.
"""

import gzip
import importlib
import shutil
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from zipfile import ZipInfo

from ...utils.errors import DataError
from .. import formats
from ..geometry import Geometry
from ..meshes import HEAD, check_content
from .zipped import MAX_BYTES, check_members, opened_zip

# A .gltf's buffers may have any name; these members are no buffers and often the largest.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".ktx2", ".basis", ".dds", ".tga", ".bmp", ".tif", ".tiff")


def read(path: Path) -> Geometry:
    """Read the one mesh in an archive; see `Geometry`. `usual_up` is the rule of its format.

    Raise DataError with the reason if the archive is damaged, encrypted or too large, has no mesh or several, or if the
    mesh cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        mesh = (_unpack_gzip if path.suffix.lower() == ".gz" else _unpack_zip)(path, Path(folder))
        known = formats.reader_of(mesh)
        assert known is not None and known.reader is not None  # the member was chosen for it
        reader = importlib.import_module(f".{known.reader}", __package__)
        try:
            with open(mesh, "rb") as file:
                check_content(file.read(HEAD))
            geometry: Geometry = reader.read(mesh)
        except DataError as error:
            raise DataError(f"{mesh.name} in it: {error}") from error
    return geometry._replace(usual_up=geometry.usual_up or known.up)


def _unpack_gzip(path: Path, folder: Path) -> Path:
    """Decompress a file into the folder, under its name without .gz, and return where it is."""
    target = folder / path.name[: -len(".gz")]
    try:
        with gzip.open(path) as source, open(target, "wb") as copy:
            while block := source.read(2**20):
                copy.write(block)
                if copy.tell() > MAX_BYTES:
                    raise DataError(f"has more than {MAX_BYTES:,} bytes when unpacked: unpack it")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"is not in gzip, or damaged or cut off ({error})") from error
    return target


def _unpack_zip(path: Path, folder: Path) -> Path:
    """Unpack the one mesh of a zip file, with its buffers if it is a .gltf, and return where it is."""
    with opened_zip(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir() and not _is_hidden(_inside(member))]
        found = [(member, formats.reader_of(Path(_inside(member)))) for member in members]
        meshes = [member for member, known in found if known and known.kind == "mesh" and known.reader != "archive"]
        if not meshes:
            suffixes = sorted({_inside(member).suffix.lower() for member in members} - {""})
            raise DataError(f"holds no mesh of a format that is read, only {' '.join(suffixes[:8]) or 'other files'}")
        if len(meshes) > 1:
            names = ", ".join(_inside(member).name for member in meshes[:3])
            raise DataError(f"holds {len(meshes)} meshes ({names}{', …' if len(meshes) > 3 else ''}): unpack it")
        (mesh,) = meshes
        needed = meshes
        if _inside(mesh).suffix.lower() == ".gltf":
            needed = [member for member in members if _inside(member).suffix.lower() not in PICTURES]
        check_members(needed)
        for member in needed:
            target = folder / _inside(member)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        return folder / _inside(mesh)


def _inside(member: ZipInfo) -> PurePosixPath:
    """Return the path of a member, relative to the archive. Raise DataError if it leads out of it."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.name or not name.parts or ":" in name.parts[0]:
        raise DataError(f'"{member.filename[:100]}" in it is a path out of the archive: unpack it')
    return name


def _is_hidden(name: PurePosixPath) -> bool:
    """Return whether a member is one of macOS's or of version control: no file that the user put there."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
