"""A row from the cache is the one that was computed, whatever happened to the files in between."""

import collections
import errno
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT

from trellis.models.sparse_structure_vae import SparseStructureEncoder
from trellis.trainers.vae import latent_cache
from trellis.trainers.vae.latent_cache import LatentCache, cache_folder, latent_key
from trellis.utils.errors import ConfigError

SHAPE = (12, 2, 3, 3, 3)
KEY = {"format": 1, "weights": "abc", "data": "def"}
CPU = torch.device("cpu")


def latent(row: int) -> torch.Tensor:
    return torch.full(SHAPE[1:], 1.0 + row) + torch.arange(54.0).view(SHAPE[1:]) / 64


class Opened:
    """A cache whose encoder knows every row and keeps a record of those it was asked for."""

    def __init__(self, root: Path, device: torch.device = CPU):
        self.lines, self.encoded, self.device = [], [], device
        self.folder = cache_folder(root, KEY, SHAPE)
        self.cache = LatentCache(self.folder, SHAPE, device, self.lines.append)

    def fetch(self, rows) -> None:
        """Read rows and check them."""
        rows = np.array(rows)

        def encode(places: np.ndarray) -> torch.Tensor:
            self.encoded += rows[places].tolist()
            return torch.stack([latent(row) for row in rows[places].tolist()]).to(self.device)

        got = self.cache.fetch(rows, encode)
        assert got.dtype == torch.float32 and got.device == self.device
        assert torch.equal(got.cpu(), torch.stack([latent(row) for row in rows.tolist()]))


# --- rows ---


def test_a_row_is_computed_once_for_all_processes(tmp_path):
    first = Opened(tmp_path)
    for rows in ([3, 0, 7], [7, 3], [5, 0, 11, 5]):
        first.fetch(rows)
    assert first.encoded == [3, 0, 7, 5, 11, 5] and not first.cache.complete
    second = Opened(tmp_path)
    assert second.lines == [f"latent cache: 5 of 12 objects in {second.folder}"]
    second.fetch(range(12))
    assert second.encoded == [1, 2, 4, 6, 8, 9, 10] and second.cache.complete
    assert second.lines[1:] == ["latent cache: complete with 12 objects; it is read from disk"]
    first.fetch([11])  # what the other has written is found
    first.fetch(range(12))
    assert first.encoded == [3, 0, 7, 5, 11, 5] and first.cache.complete and len(first.lines) == 2
    third = Opened(tmp_path)
    assert third.cache.complete and "12 of 12" in third.lines[0]


def test_the_files_are_as_described(tmp_path):
    opened = Opened(tmp_path)
    opened.fetch([4, 1])
    rows = np.fromfile(opened.folder / "latents.bin", np.float32).reshape(SHAPE)
    assert all(np.array_equal(rows[row], latent(row)) for row in (1, 4)) and not rows[[0, 2, 3, *range(5, 12)]].any()
    checks = np.fromfile(opened.folder / "checks.bin", np.uint32)
    assert np.flatnonzero(checks).tolist() == [1, 4] and checks[4] == latent_cache._checksum(rows[4])
    assert json.loads((opened.folder / "key.json").read_text()) == KEY
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"latents.bin", "checks.bin", "key.json"}
    large = cache_folder(tmp_path / "large", KEY, (5000, 8, 16, 16, 16))
    status = (large / "latents.bin").stat()
    assert status.st_size == 5000 * 128 * 1024 and status.st_blocks * 512 < 1 << 20  # holes


def damage(offset: int, content: bytes, file: str = "latents.bin"):
    def apply(folder: Path) -> None:
        with open(folder / file, "r+b") as stream:
            stream.seek(offset)
            stream.write(content)

    return apply


def cut(file: str, size: int):
    return lambda folder: os.truncate(folder / file, size)


DAMAGE = {
    "a bit of a row": (damage(5 * 216 + 100, b"\x07"), [5]),
    "two rows torn": (damage(2 * 216 + 200, bytes(40)), [2, 3]),
    "no checksum yet": (damage(4 * 7, bytes(4), "checks.bin"), [7]),
    "another checksum": (damage(4 * 8, b"abcd", "checks.bin"), [8]),
    "rows cut off": (cut("latents.bin", 9 * 216 + 4), [9, 10, 11]),
    "checksums cut off": (cut("checks.bin", 4 * 10 + 1), [10, 11]),
    "no rows": (lambda folder: (folder / "latents.bin").unlink(), list(range(12))),
    "no checksums": (lambda folder: (folder / "checks.bin").unlink(), list(range(12))),
}


@pytest.mark.parametrize("apply, lost", DAMAGE.values(), ids=DAMAGE)
def test_damaged_rows_and_they_alone_are_computed_anew(tmp_path, apply, lost):
    Opened(tmp_path).fetch(range(12))
    apply(tmp_path / Opened(tmp_path).folder.name)
    opened = Opened(tmp_path)
    assert not opened.cache.complete
    opened.fetch(range(12))
    assert opened.encoded == lost and opened.cache.complete
    absent = opened.lines[0] != f"latent cache: 12 of 12 objects in {opened.folder}"
    told = f"latent cache: {opened.folder} has damaged rows; they are computed again" in opened.lines
    assert absent or told  # damage that the count at the start does not show is told
    assert Opened(tmp_path).cache.complete


def test_a_row_of_zeros_and_its_checksum_count(tmp_path, monkeypatch):
    """Checksum 0 means absent, so that no row may have it."""
    monkeypatch.setattr(latent_cache.zlib, "crc32", lambda data: 0)
    opened = Opened(tmp_path)
    opened.fetch([2])
    assert np.fromfile(opened.folder / "checks.bin", np.uint32)[2] == 1


WRITER = """
import sys, time, numpy as np, torch
from pathlib import Path
from trellis.trainers.vae.latent_cache import LatentCache
shape = (400, 8, 16, 16, 16)
cache = LatentCache(Path(sys.argv[1]), shape, torch.device("cpu"), lambda line: None)
for rows in np.arange(400).reshape(-1, 4):
    cache.fetch(rows, lambda places: torch.stack([torch.full(shape[1:], 1.0 + row) for row in rows[places].tolist()]))
    time.sleep(0.01)  # a second in all, for the kill to fall into
"""


def test_whatever_a_killed_writer_leaves_is_a_right_row_or_none(tmp_path):
    shape, moments = (400, 8, 16, 16, 16), random.Random(time.time_ns())
    folder = cache_folder(tmp_path, KEY, shape)
    right = torch.arange(1.0, 401).view(-1, 1, 1, 1, 1).expand(shape)
    for _ in range(2):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        enough = moments.randrange(1, 200)
        while np.count_nonzero(np.fromfile(folder / "checks.bin", np.uint32)) < enough:
            assert all(writer.poll() in (None, 0) for writer in writers)
            time.sleep(0.001)
        for writer in writers:
            writer.kill()
            writer.communicate()
        cache = LatentCache(folder, shape, CPU, lambda line: None)
        rows = cache.fetch(np.arange(400), lambda places: torch.full((len(places), *shape[1:]), -1.0))
        absent = (rows == -1).flatten(1).all(1)
        assert torch.equal(rows[~absent], right[~absent]) and 400 - absent.sum() >= enough
        (folder / "checks.bin").write_bytes(bytes(4 * 400))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_a_complete_cache_moves_to_a_gpu_with_room(tmp_path, monkeypatch, share):
    monkeypatch.setattr(latent_cache, "DEVICE_SHARE", share)
    monkeypatch.setattr(latent_cache, "ROWS_PER_COPY", 5)
    where = r"has moved to cuda:0 \(0.00 GiB\)" if share else "is read from disk"
    gpu = torch.device("cuda", 0)
    opened = Opened(tmp_path, gpu)
    for rows in ([3, 0, 7], [7, 3], [7, 4, 3], range(12), [11, 0, 0, 5]):
        opened.fetch(rows)
    assert opened.encoded == [3, 0, 7, 4, 1, 2, 5, 6, 8, 9, 10, 11]
    assert re.fullmatch(f"latent cache: complete with 12 objects; it {where}", opened.lines[-1])
    if share:  # a step no longer touches the files
        (opened.folder / "latents.bin").write_bytes(bytes(12 * 216))
    opened.fetch([2, 9])
    assert share or Opened(tmp_path, gpu).cache.complete


# --- folders ---


def test_another_key_is_another_folder_and_a_foreign_one_is_refused(tmp_path):
    folder = cache_folder(tmp_path, KEY, SHAPE)
    assert cache_folder(tmp_path, dict(reversed(KEY.items())), SHAPE) == folder
    assert cache_folder(tmp_path, {**KEY, "weights": "abd"}, SHAPE) != folder
    (folder / "key.json").write_text(json.dumps({**KEY, "weights": "x"}))
    with pytest.raises(
        ConfigError, match=f"{folder} holds other latents than this run's: its key.json differs in weights; delete"
    ):
        cache_folder(tmp_path, KEY, SHAPE)
    for content in ("{", None):
        (folder / "key.json").write_text(content) if content else (folder / "key.json").unlink()
        with pytest.raises(ConfigError, match=f"{folder}/key.json is missing or damaged .*delete {folder}"):
            cache_folder(tmp_path, KEY, SHAPE)


def test_a_disk_without_room_is_one_clear_error_and_nothing_is_made(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(latent_cache.shutil, "disk_usage", lambda path: usage(2**30 - 1))
    with pytest.raises(ConfigError, match=r"latents of 8192 objects take 1.00 GiB, but .* has 1.00 GiB free"):
        cache_folder(tmp_path, KEY, (8192, 8, 16, 16, 16))
    assert not list(tmp_path.iterdir())
    assert cache_folder(tmp_path, KEY, (8191, 8, 16, 16, 16)).is_dir()


def test_a_disk_that_fills_up_is_one_clear_error(tmp_path, monkeypatch):
    opened = Opened(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="No space left on device; name a folder"):
        patch.setattr(latent_cache.os, "pwrite", full)
        opened.fetch([1])
    opened.fetch([1])
    assert opened.encoded == [1, 1]


def test_rows_are_written_whole_where_the_system_takes_them_piece_by_piece(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(latent_cache.os, "pwrite", lambda file, data, offset: pwrite(file, data[:50], offset))
    Opened(tmp_path).fetch(range(12))
    assert Opened(tmp_path).cache.complete


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="latent_cache: .*/file is not a folder; name .*set it to false"):
            cache_folder(root, KEY, SHAPE)
    with monkeypatch.context() as patch:
        patch.setattr(latent_cache.os, "access", lambda path, mode: False)
        with pytest.raises(ConfigError, match=f"latent_cache: {tmp_path} cannot be written to; name"):
            cache_folder(tmp_path / "new", KEY, SHAPE)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="none: No such file or directory"):
        LatentCache(tmp_path / "none", SHAPE, CPU, print)


def _make(root: Path, barrier, results) -> None:
    barrier.wait()
    results.put(cache_folder(root, KEY, SHAPE))


def test_runs_that_make_the_folder_at_once_share_one(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        barrier, results = context.Barrier(4), context.SimpleQueue()
        processes = [context.Process(target=_make, args=(tmp_path / str(attempt), barrier, results)) for _ in range(4)]
        for process in processes:
            process.start()
        folders = {results.get() for _ in processes}
        for process in processes:
            process.join()
        assert list((tmp_path / str(attempt)).iterdir()) == [*folders]


# --- key ---


def test_the_key_follows_from_weights_and_all_that_makes_a_latent():
    def encoder(seed: int = 0) -> SparseStructureEncoder:
        torch.manual_seed(seed)
        return SparseStructureEncoder(1, 4, 1, [4, 8])

    spec, content = {"name": "SparseStructureEncoder", "args": {}}, {"data": "abc", "resolution": 16}
    base = latent_key(spec, encoder(), content, "fp32", CPU)
    assert latent_key(spec, encoder(), content, "fp32", CPU) == base == json.loads(json.dumps(base))
    changed = encoder()
    with torch.no_grad():
        changed.out_layer[2].bias[3] = changed.out_layer[2].bias[3].nextafter(torch.tensor(9.0))
    others = [
        latent_key(spec, changed, content, "fp32", CPU),
        latent_key({**spec, "args": {"norm_type": "group"}}, encoder(), content, "fp32", CPU),
        latent_key(spec, encoder(), {**content, "resolution": 32}, "fp32", CPU),
        latent_key(spec, encoder(), {**content, "data": "abd"}, "fp32", CPU),
        latent_key(spec, encoder(), content, "bf16", CPU),
        latent_key(spec, encoder(), content, "fp32", torch.device("cuda", 1)),
    ]
    assert len({json.dumps(key, sort_keys=True) for key in [base, *others]}) == 7
