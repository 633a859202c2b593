"""The files that --input names: which are read, which are not and why, and what their bytes hash to."""

import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trellis.grids.formats import MESH_SUFFIXES, VOLUME_SUFFIXES, reader_of, why_not
from trellis.grids.readers.gltf_accessors import file_names
from trellis.grids.readers.gltf_file import HEADER, MAGIC
from trellis.utils.errors import DataError
from trellis.utils.inputs import obstacle

READ_SUFFIXES = " ".join((*MESH_SUFFIXES, *VOLUME_SUFFIXES))
LINE_BREAK = re.compile("[\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")  # all that str.splitlines knows
# Headers whose data lie in a second file. All scans of one machine may have the same header.
DATA_FILE = {
    ".mhd": re.compile(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*(?!(?:LOCAL|LIST)\s*$)(\S[^\r\n]*)", re.M),
    ".nhdr": re.compile(rb"^data ?file:[ \t]*(?!LIST(?:\s|$))(\S[^\r\n]*)", re.M | re.I),
}


class Found(NamedTuple):
    """Files by recorded name, sorted.

    files: {name: path} of files that are read.
    left_out: {name: reason} of files of 3D formats that are not read, and of files and folders that cannot be.
    """

    files: dict[str, Path]
    left_out: dict[str, str]


def find_files(inputs: Iterable[str | os.PathLike], exclude: Path) -> Found:
    """Find the files of meshes and volumes. Links are followed.

    inputs: files and folders, which are searched recursively.
    exclude: a folder that is not searched: grids written there are PLY files as well.
    Raise DataError if an input is missing, a file of inputs is not read, or no file is.
    """
    paths = [Path(item) for item in inputs]
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in paths:
        reason = obstacle(path)
        if path.is_dir():
            for below, why in _walk(path, exclude.resolve()):
                if why is None:
                    found[os.path.abspath(below)] = below
                else:
                    left_out[printable(below)] = why
        elif not os.path.lexists(path):
            raise DataError(f"{path}: no such file or folder. Give a mesh or a folder of meshes.")
        elif reason is not None:
            raise DataError(f"{path}: {reason}. Give a mesh or a folder of meshes.")
        elif reader_of(path) is None:
            raise DataError(f"{path}: {why_not(path) or f'is not one of {READ_SUFFIXES}. Convert it to one of them'}.")
        else:
            found[os.path.abspath(path)] = path
    if not found:
        others = "".join(
            f" {len(left_out)} left out{', such as' if len(left_out) > 1 else ':'} {name}: {reason}."
            for name, reason in sorted(left_out.items())[:1]
        )
        raise DataError(
            f"{', '.join(map(str, paths))}: no mesh or volume there or below.{others} Give a folder of meshes. "
            f"Read are {READ_SUFFIXES}."
        )
    files = dict(sorted((printable(path), path) for path in found.values()))
    return Found(files, dict(sorted(left_out.items())))


def _walk(folder: Path, exclude: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the files to read with None, and those of 3D formats that are left out with the reason."""
    visited = set()  # else a link to a parent would never end
    closed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        real = Path(parent).resolve()
        if real in visited or real == exclude:
            folders.clear()
            continue
        visited.add(real)
        for name in names:
            path = Path(parent, name)
            is_read = reader_of(path) is not None
            reason = obstacle(path)
            if reason is None and not is_read:
                try:
                    reason = why_not(path)
                except OSError as error:
                    reason = f"cannot be read: {error.strerror}"
                if reason is None:
                    continue  # a texture, a text, …
            elif not (is_read or (path.is_symlink() and not path.suffix)):  # a broken link may be one to a folder
                continue
            yield path, reason
    for failed in closed:
        yield Path(failed.filename), f"the folder cannot be read: {failed.strerror}"


def printable(path: Path) -> str:
    """Return a path as one line of valid UTF-8. File names on Linux can be other bytes."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return LINE_BREAK.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sha256_of(path: Path, known: Container[str] = ()) -> str:
    """Return the sha256 of a file's bytes in hexadecimal, reading it in pieces.

    A file whose data lie in others, such as the buffers of a .gltf, is hashed with these. Raise OSError if a file
    cannot be read.
    known: grids that exist. A .gltf whose own bytes gave one keeps its name; earlier versions hashed them alone.
    """
    digest = hashlib.sha256()
    _add(digest, path)
    if digest.hexdigest() in known:
        return digest.hexdigest()
    for data in _data_files(path):
        if obstacle(data) is None:  # else reading the file says what is missing
            _add(digest, data)
    return digest.hexdigest()


Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp_of(path: Path) -> Stamp:
    """Return size, time of change and number of each file that `sha256_of` hashes; None for one that is not there.

    Two equal stamps mean that nobody wrote the file in between. Raise OSError if the file itself cannot be read.
    """
    return (_stamp(path.stat()), *(_stamp(data.stat()) if data.exists() else None for data in _data_files(path)))


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _data_files(path: Path) -> list[Path]:
    """Return the files that hold a file's data. Damaged files name none: reading them says what is wrong."""
    suffix = path.suffix.lower()
    if pattern := DATA_FILE.get(suffix):
        named = pattern.search(path.read_bytes()[: 1 << 16])
        return [path.parent / os.fsdecode(named[1].strip())] if named else []
    if suffix not in (".gltf", ".glb"):
        return []
    candidates = [[path.parent / name for name in file_names(uri)] for uri in _buffer_uris(path)]
    return [next((name for name in names if obstacle(name) is None), names[0]) for names in candidates]


def _buffer_uris(path: Path) -> list[str]:
    """Return the URIs of the buffers of a glTF file that are not in it."""
    with open(path, "rb") as file:
        text = file.read(HEADER + 8)
        if text.startswith(MAGIC):
            text = file.read(min(int.from_bytes(text[HEADER : HEADER + 4], "little"), path.stat().st_size))
        else:
            text += file.read()
    if b'"uri"' not in text:
        return []
    try:
        buffers = json.loads(text.rstrip(b"\0"))["buffers"]
        uris = [buffer["uri"] for buffer in buffers if isinstance(buffer.get("uri"), str)]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return []
    return [uri for uri in uris if not uri.startswith("data:") and "\0" not in uri]


def _add(digest: "hashlib._Hash", path: Path) -> None:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
