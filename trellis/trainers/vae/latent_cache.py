"""Latents of a frozen encoder on disk, so that each object passes through it once.

A cache folder holds

    latents.bin   float32 [N, C, X, Y, Z], a row per object of the training split in its order (128 KiB at 16^3 x 8;
                  the file is sparse, so that absent rows take no space)
    checks.bin    uint32 [N], the CRC-32 of each row, or 0 if it is absent
    key.json      lists everything the cached rows depend on

The folder's name is a hash of the key: other weights, data, resolution or precision use another folder, and so does a
data set that grew, at the price of one epoch of encoding. Only the runs that use a folder need it; old ones may be
deleted.

Several ranks, and several runs, may share a folder. A row's checksum is written after the row and checked when a
process first reads it, so that a torn or damaged row counts as absent and is computed again. Two writers of a row
write equal values, up to rounding that depends on the size of their batches.

Axes: N objects, B objects of a batch, n absent ones, C latent channels, X Y Z latent cells.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...utils.config import differing_keys
from ...utils.errors import ConfigError

# Raise this with every change that gives the same key other latents or another layout.
FORMAT_VERSION = 1
# Largest share of a GPU's free memory to use: the models and their activations need the rest.
DEVICE_SHARE = 1 / 4
ROWS_PER_COPY = 256


def latent_key(spec: dict, encoder: nn.Module, content: dict, precision: str, device: torch.device) -> dict:
    """Return everything that latents depend on, as JSON values.

    spec: the encoder's name and arguments.
    content: the dataset's `content_key`.
    precision: the encoder's.
    device: its type counts, since a CPU and a GPU round differently.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return {
        "format": FORMAT_VERSION,
        "encoder": spec,
        "weights": digest.hexdigest(),
        **content,
        "precision": precision,
        "device": device.type,
    }


def folder_of(root: Path, key: dict) -> Path:
    """Return the folder below `root` for the cache of this key."""
    return root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(root: Path, key: dict, shape: tuple[int, ...]) -> Path:
    """Return the folder of this key below `root`, and make it if it is absent. One rank calls this before all open it.

    shape: [N, C, X, Y, Z].
    Raise ConfigError if the folder cannot be made, the disk has too little room, or the folder holds another key.
    """
    folder = folder_of(root, key)
    sizes = {"latents.bin": 4 * math.prod(shape), "checks.bin": 4 * shape[0]}
    require_place(root, folder, shape)
    with _reported(folder):
        root.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            _make(folder, key, sizes)
        _require_key(folder, key)
        for file, size in sizes.items():
            # A truncated file is filled up with zeros, which fit no checksum.
            if not (folder / file).exists() or (folder / file).stat().st_size < size:
                with open(folder / file, "ab") as stream:
                    stream.truncate(size)
    return folder


def _make(folder: Path, key: dict, sizes: dict[str, int]) -> None:
    """Make a folder of empty files by an atomic rename. Another run may make the same folder first."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    for file, size in sizes.items():
        with open(partial / file, "wb") as stream:
            stream.truncate(size)
    (partial / "key.json").write_text(json.dumps(key, indent=4) + "\n", encoding="utf-8")
    try:
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def require_place(root: Path, folder: Path, shape: tuple[int, ...]) -> None:
    """Raise ConfigError if `root` cannot be written to, or its disk has too little room for a new `folder`.

    Write nothing. shape: [N, C, X, Y, Z].
    """
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "cannot be written to"
        raise ConfigError(
            f"trainer.args.latent_cache: {there} {what}; name a folder that every process can write to, or set it "
            "to false"
        )
    size, free = 4 * math.prod(shape), shutil.disk_usage(there).free
    if free < size and not folder.exists():
        raise ConfigError(
            f"trainer.args.latent_cache: the latents of {shape[0]} objects take {size / 2**30:.2f} GiB, but {there} "
            f"has {free / 2**30:.2f} GiB free; make room, name a folder on another disk, or set it to false"
        )


def _require_key(folder: Path, key: dict) -> None:
    try:
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{folder}/key.json is missing or damaged ({error}); delete {folder}") from error
    if found != key:
        raise ConfigError(
            f"{folder} holds other latents than this run's: its key.json differs in "
            f"{', '.join(differing_keys(found, key))}; delete {folder} or name another folder as "
            "trainer.args.latent_cache"
        )


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"trainer.args.latent_cache: {folder}: {error.strerror or error}; name a folder that every process can "
            "write to, with room, or set it to false"
        ) from error


class LatentCache:
    """The rows of an existing cache folder, for one process.

    folder: see `cache_folder`.
    shape: [N, C, X, Y, Z].
    device: device of the latents that are returned. Once every row is present, they move to a GPU that has room.
    say: prints a line.
    complete: whether every row is present and has been checked by this process.
    Raise ConfigError if the files cannot be opened or written.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], device: torch.device, say: Callable[[str], None]):
        self.folder, self.shape, self.device, self.say = folder, shape, device, say
        # Written by pwrite and not through the memory map, where a full disk would kill the process without a message.
        with _reported(folder):
            self._files = {name: open(folder / name, "r+b", buffering=0) for name in ("latents.bin", "checks.bin")}
            self._latents = np.memmap(folder / "latents.bin", np.float32, "r", shape=shape)
            self._checks = np.memmap(folder / "checks.bin", np.uint32, "r", shape=shape[:1])
        self._trusted = np.zeros(shape[0], bool)
        self._on_device: Tensor | None = None
        self._damage_told = False
        self.complete = False
        self.say(f"latent cache: {np.count_nonzero(self._checks)} of {shape[0]} objects in {folder}")
        self._note_completion()

    def fetch(self, rows: np.ndarray, encode: Callable[[np.ndarray], Tensor]) -> Tensor:
        """Return latents [B, C, X, Y, Z] float32 of these rows, [B] int64, on the device. Compute and keep absent ones.

        encode: takes the indices of the absent rows within `rows`, [n] int64; returns their latents [n, C, X, Y, Z].
        """
        if self._on_device is not None:
            return self._on_device[torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)]
        absent = np.flatnonzero(~self._present(rows))
        if len(absent) < len(rows):
            latents = self._read(rows)
        else:
            latents = torch.empty(len(rows), *self.shape[1:], device=self.device)
        if len(absent):
            fresh = encode(absent).float()
            latents[torch.from_numpy(absent).to(self.device)] = fresh
            self._write(rows[absent], fresh.cpu().contiguous().numpy())
        if not self.complete:
            self._note_completion()
        return latents

    def _present(self, rows: np.ndarray) -> np.ndarray:
        """Return which of the rows are present and whole, [B] bool. A row is checked once, then trusted."""
        for row in np.unique(rows[~self._trusted[rows]]):
            self._trusted[row] = self._checks[row] and self._checks[row] == _checksum(self._latents[row])
            if self._checks[row] and not self._trusted[row] and not self._damage_told:
                self.say(f"latent cache: {self.folder} has damaged rows; they are computed again")
                self._damage_told = True
        return self._trusted[rows]

    def _read(self, rows: np.ndarray) -> Tensor:
        latents = torch.empty(len(rows), *self.shape[1:], pin_memory=self.device.type == "cuda")
        np.take(self._latents, rows, axis=0, out=latents.numpy(), mode="clip")  # "raise" would buffer `out`
        return latents.to(self.device, non_blocking=True)

    def _write(self, rows: np.ndarray, latents: np.ndarray) -> None:
        """Write rows, then their checksums: a row without its checksum counts as absent."""
        with _reported(self.folder):
            for row, latent in zip(rows.tolist(), latents, strict=True):
                _write_at(self._files["latents.bin"].fileno(), row * latent.nbytes, latent)
            for row, latent in zip(rows.tolist(), latents, strict=True):
                _write_at(self._files["checks.bin"].fileno(), row * 4, np.uint32(_checksum(latent)))
        self._trusted[rows] = True

    def _note_completion(self) -> None:
        """Find out whether all rows are present by now; if so, move them to a device that has room."""
        if not self._checks.all() or not self._present(np.arange(self.shape[0])).all():
            return
        self.complete = True
        where = "is read from disk"
        size = 4 * math.prod(self.shape)
        if self.device.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            on_device = torch.empty(self.shape, device=self.device)
            for start in range(0, self.shape[0], ROWS_PER_COPY):
                part = on_device[start : start + ROWS_PER_COPY]
                part.copy_(self._read(np.arange(start, start + len(part))))
            self._on_device = on_device
            where = f"has moved to {self.device} ({size / 2**30:.2f} GiB)"
        self.say(f"latent cache: complete with {self.shape[0]} objects; it {where}")


def _checksum(latent: np.ndarray) -> int:
    """Return the CRC-32 of a row, but never 0, which stands for absent."""
    return zlib.crc32(latent.data) or 1


def _write_at(file: int, offset: int, values: np.ndarray | np.generic) -> None:
    rest = memoryview(values.tobytes())
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
