"""Latents of a frozen encoder on disk, so that each object passes through it once.

A cache folder holds `latents.bin`, float32 [N, C, X, Y, Z], one row for each object of the training split in its
order (128 KiB at 16^3 x 8; holes, until a row is there, take no space); `checks.bin`, uint32 [N], the CRC-32 of
each row or 0 where it is absent; and `key.json`, in the open, everything that the rows follow from. The folder's
name is a hash of that, so other weights, data, resolution or precision find another folder, and a data set that
grew starts a new one: one epoch of encoding. Nothing refers to a folder but the runs that use it; old ones may be
deleted.

Several ranks, and several runs, may share a folder. A row's checksum is written after the row and checked
when a process first reads it, so that a row that was cut off or damaged counts as absent and is computed anew.
Two writers of one row write the same values, up to what rounding owes to the size of their batches.
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

# To be raised with every change that gives the same key other latents or another layout.
FORMAT = 1
# Of the GPU's memory that is free, at most this share: the models and their activations need the rest.
DEVICE_SHARE = 1 / 4
ROWS_PER_COPY = 256


def latent_key(spec: dict, encoder: nn.Module, content: dict, precision: str, device: torch.device) -> dict:
    """What latents follow from, as JSON values.

    spec: the encoder's name and arguments. content: the dataset's `content_key`. precision: that the encoder
    runs in. device: its type counts, since a CPU and a GPU round differently.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return {
        "format": FORMAT,
        "encoder": spec,
        "weights": digest.hexdigest(),
        **content,
        "precision": precision,
        "device": device.type,
    }


def folder_of(root: Path, key: dict) -> Path:
    """Where below `root` the cache of this key lies."""
    return root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(root: Path, key: dict, shape: tuple[int, ...]) -> Path:
    """The folder of this key below `root`, made where it is not there; one rank does this before all open it.

    shape: [N, C, X, Y, Z]. Raises ConfigError where it cannot be made, where the disk has too little room, or
    where a folder of this name is no cache of this key.
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
            # What a file lost at its end comes back as zeros, which no checksum fits.
            if not (folder / file).exists() or (folder / file).stat().st_size < size:
                with open(folder / file, "ab") as stream:
                    stream.truncate(size)
    return folder


def _make(folder: Path, key: dict, sizes: dict[str, int]) -> None:
    """Make a folder of empty files, whole or not at all; another run that makes the same one may come first."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    for file, size in sizes.items():
        with open(aside / file, "wb") as stream:
            stream.truncate(size)
    (aside / "key.json").write_text(json.dumps(key, indent=4) + "\n", encoding="utf-8")
    try:
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def require_place(root: Path, folder: Path, shape: tuple[int, ...]) -> None:
    """Raise ConfigError where `root` is no folder that can be written to, or its disk has too little room for
    `folder`, unless that is there already. Writes nothing. shape: [N, C, X, Y, Z]."""
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
            f"{folder} holds latents that {', '.join(differing_keys(found, key))} in its key.json set apart from "
            f"this run's; delete {folder} or name another folder as trainer.args.latent_cache"
        )


@contextlib.contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Turn a failure of the file system into one message."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"trainer.args.latent_cache: {folder}: {error.strerror or error}; name a folder that every process can "
            "write to, with room, or set it to false"
        ) from error


class LatentCache:
    """The rows of a cache folder that is there already, for one process.

    folder: see `cache_folder`. shape: [N, C, X, Y, Z]. device: where latents are wanted; once every row is
    there, they move to a GPU that has room. say: prints a line.
    complete: whether every row is there and has been checked by this process.
    Raises ConfigError where the files cannot be opened or written.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], device: torch.device, say: Callable[[str], None]):
        self.folder, self.shape, self.device, self.say = folder, shape, device, say
        # Written by pwrite and not through the map, where a full disk would end the process without a word.
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
        """Latents [B, C, X, Y, Z] float32 of these rows, [B] int64, on the device. Those absent are computed
        and kept.

        encode: gets the places in `rows` of those absent, [n] int64; returns their latents [n, C, X, Y, Z].
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
        """Which of the rows are there and whole, [B] bool. A row is checked once, then trusted."""
        for row in np.unique(rows[~self._trusted[rows]]):
            self._trusted[row] = self._checks[row] and self._checks[row] == _checksum(self._latents[row])
            if self._checks[row] and not self._trusted[row] and not self._damage_told:
                self.say(f"latent cache: {self.folder} has damaged rows; they are computed anew")
                self._damage_told = True
        return self._trusted[rows]

    def _read(self, rows: np.ndarray) -> Tensor:
        latents = torch.empty(len(rows), *self.shape[1:], pin_memory=self.device.type == "cuda")
        np.take(self._latents, rows, axis=0, out=latents.numpy(), mode="clip")  # "raise" would buffer `out`
        return latents.to(self.device, non_blocking=True)

    def _write(self, rows: np.ndarray, latents: np.ndarray) -> None:
        """Rows first, then their checksums: what is cut off in between counts as absent."""
        with _reported(self.folder):
            for row, latent in zip(rows.tolist(), latents, strict=True):
                _write_at(self._files["latents.bin"].fileno(), row * latent.nbytes, latent)
            for row, latent in zip(rows.tolist(), latents, strict=True):
                _write_at(self._files["checks.bin"].fileno(), row * 4, np.uint32(_checksum(latent)))
        self._trusted[rows] = True

    def _note_completion(self) -> None:
        """See whether this process and others have made all rows by now, and move them to the device."""
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
    """The CRC-32 of a row, but never 0, which stands for absent."""
    return zlib.crc32(latent.data) or 1


def _write_at(file: int, offset: int, values: np.ndarray | np.generic) -> None:
    rest = memoryview(values.tobytes())
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
