"""Shards at a URL: each is copied once into a cache folder of the machine, from where all its processes map it.

Any protocol of fsspec will do: s3://, gs://, hf://, http:// and others, as far as the package for it is installed. The
cache is $TRELLIS_CACHE, or else ~/.cache/trellis/shards. A copy's name has a hash of the URL, the size and what the
server says of the version, so that files that change are copied anew. The list of files is kept too: where a server
cannot be reached, whole copies of the last one are used, with a warning. Copies may be deleted while no run uses them.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..utils import units
from ..utils.errors import ConfigError, DataError
from ..utils.files import LEFTOVER, atomic_write, host_name, is_running, remove_leftovers
from ..utils.progress import waiting
from .shards import SUFFIX, shards_in

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]+://")
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
}
# What file systems call the version of a file, or its time.
VERSION_KEYS = (
    *("ETag", "etag", "checksum", "md5", "oid", "blob_id"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)
STALLED = 120.0  # seconds without a byte after which another process's copy is given up
PAUSE = 0.2  # seconds between looks at what other processes copy


class Shared(NamedTuple):
    """A shard at a URL and its copy."""

    url: str
    source: str  # the file as its file system calls it
    size: int  # bytes
    copy: Path


class _UnreachableError(DataError):
    """A server that does not answer, or not to this program."""


def is_url(root: str | os.PathLike) -> bool:
    """Return whether a data root is a URL and no path."""
    return isinstance(root, str) and URL.match(root) is not None


def absolute(root: str) -> str:
    """Return a data root as an absolute path; a URL as it is."""
    return root if is_url(root) else os.path.abspath(root)


def cache_folder() -> Path:
    """Return the folder of copies."""
    return Path(os.environ.get("TRELLIS_CACHE") or Path.home() / ".cache" / "trellis" / "shards")


def shard_files(root: str) -> list[tuple[Path, str]]:
    """Return the shards of a root, a folder, an .arrow file or a URL: paths, and what errors call them; none if it is
    no such root. See `local_shards`."""
    if is_url(root):
        return [(shard.copy, f"{shard.url} ({shard.copy})") for shard in local_shards(root)]
    path = Path(root)
    return [(each, root if each == path else str(each)) for each in shards_in(path)]


def local_shards(url: str) -> list[Shared]:
    """Copy the shards at a URL, a folder or one .arrow file, as far as the cache has none; return them by name.

    Processes, also of machines that share the cache, may do this at once: each copies what no other is copying, and
    waits for the rest.
    Raise ConfigError if a package is missing or the cache's disk has too little room, DataError if the URL has no
    shard, or cannot be read and the cache lacks any of its shards.
    """
    try:
        system, shards = _list(url)
    except _UnreachableError as error:
        known = _listed_before(url)
        if not known or not all(map(_is_whole, known)):
            raise
        warnings.warn(f"{error} The copies of its last list are used, in {cache_folder()}.", stacklevel=2)
        return known
    missing = [shard for shard in shards if not _is_whole(shard)]
    if missing:
        _require_room(url, missing)
        with waiting(f"copying {url}", len(shards), "shard") as progress:
            progress(len(shards) - len(missing))
            while missing:
                copied = False
                for shard in missing:
                    if not _is_whole(shard) and not _is_being_copied(shard):
                        _copy(system, shard)
                        copied = True
                missing = [shard for shard in missing if not _is_whole(shard)]
                progress(len(shards) - len(missing))
                if missing and not copied:
                    time.sleep(PAUSE)
    if _listed_before(url) != shards:
        _keep_list(url, shards)
    return shards


def _keep_list(url: str, shards: list[Shared]) -> None:
    """Write the list of shards. A cache that cannot be written, such as one of all users, does without."""
    try:
        with atomic_write(_list_file(url)) as partial:
            partial.write_text(json.dumps([[shard.url, shard.source, shard.size, shard.copy.name] for shard in shards]))
    except OSError as error:
        warnings.warn(
            f"{_list_file(url)}: {error.strerror}: {url} cannot be used where its server is not reached", stacklevel=3
        )


def _list_file(url: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.json"


def _listed_before(url: str) -> list[Shared] | None:
    """Return the shards that a URL had when all of them had been copied; None if that is not known."""
    try:
        rows = json.loads(_list_file(url).read_text())
        return [Shared(address, source, size, cache_folder() / name) for address, source, size, name in rows]
    except (OSError, ValueError, TypeError):  # none, or damaged: only what a server says counts then
        return None


def _list(url: str) -> tuple[Any, list[Shared]]:
    """Return the file system of a URL and its shards."""
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"{url}: data at a URL need fsspec ({error}): pip install fsspec") from error

    protocol = url.partition("://")[0]
    with _reported(url):
        try:
            system, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = PACKAGES.get(protocol.rpartition("::")[2], f"the package of fsspec for {protocol}")
            raise ConfigError(f"{url}: {protocol}:// needs a package ({error}): pip install {package}") from error
        except ValueError as error:
            raise ConfigError(f"{url}: {error}. Give a protocol that fsspec knows, or a path.") from error
        system.invalidate_cache()
        found = [system.info(path)] if path.endswith(SUFFIX) else system.ls(path, detail=True)
    shards = []
    for info in found:
        name = info["name"].rstrip("/").rpartition("/")[2]
        if info["type"] != "file" or not name.endswith(SUFFIX) or name.startswith("."):
            continue
        address = url if path.endswith(SUFFIX) else f"{url.rstrip('/')}/{name}"
        if info.get("size") is None:
            raise DataError(f"{address}: the server does not say its size, so that no copy could be checked.")
        version = {key: str(info[key]) for key in VERSION_KEYS if info.get(key) is not None}
        key = hashlib.sha256(repr((address, info["size"], sorted(version.items()))).encode()).hexdigest()[:24]
        shards.append(Shared(address, info["name"], info["size"], cache_folder() / f"{key}-{name}"))
    if not shards:
        raise DataError(f"{url}: has no {SUFFIX} file. Data at a URL are shards, which pack.py makes.")
    return system, sorted(shards, key=lambda shard: shard.url)


def _is_whole(shard: Shared) -> bool:
    return shard.copy.is_file() and shard.copy.stat().st_size == shard.size


def _is_being_copied(shard: Shared) -> bool:
    """Return whether another process, maybe of another machine with the same cache, is copying a shard, and gets on."""
    for partial in shard.copy.parent.glob(f".{shard.copy.name[:100]}.*.tmp"):
        found = LEFTOVER.fullmatch(partial.name)
        if not found:
            continue
        here, pid = found["host"] == host_name(), int(found["pid"])
        if here and (pid == os.getpid() or not is_running(pid)):
            continue
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime < STALLED:
                return True
    return False


def _require_room(url: str, missing: list[Shared]) -> None:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; set TRELLIS_CACHE to a folder for copies of {url}") from error
    needed = sum(shard.size for shard in missing)
    if needed > free:
        raise ConfigError(
            f"{url}: its shards take {units.size(needed)}, but {folder} has {units.size(free)} free; make room, or set "
            "TRELLIS_CACHE to a folder on another disk"
        )


def _copy(system: Any, shard: Shared) -> None:
    try:
        with atomic_write(shard.copy) as partial, open(partial, "wb") as sink:
            with _reported(shard.url), system.open(shard.source, "rb") as source:
                while block := source.read(2**22):
                    _write(sink, block, shard)
            if sink.tell() != shard.size:
                raise DataError(f"{shard.url}: {sink.tell()} of {shard.size} bytes have come. Start again.")
    except OSError as error:
        raise ConfigError(f"{shard.copy}: {error.strerror or error}; set TRELLIS_CACHE to another folder") from error


def _write(sink: Any, block: bytes, shard: Shared) -> None:
    try:
        sink.write(block)
    except OSError as error:
        raise ConfigError(
            f"{shard.copy}: {error.strerror}; make room, or set TRELLIS_CACHE to a folder on another disk"
        ) from error


@contextlib.contextmanager
def _reported(url: str) -> Iterator[None]:
    """Turn an error of a file system into a DataError. Each has types of its own, also for a wrong password."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url}: does not exist. Correct the address, or write the shards there.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _UnreachableError(
            f"{url}: cannot be read ({type(error).__name__}: {reason:.300}). Check the address, the bucket and the "
            "credentials."
        ) from error
