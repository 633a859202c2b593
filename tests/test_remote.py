"""Shards at a URL are copied once into a cache, by as many processes as there are, and read as those of a folder."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, free_port, run, tiny_config
from test_shards import opened, random_grids, shard
from test_sparse_structure_dataset import all_items, packed_root

from trellis.datasets import remote
from trellis.datasets.metadata import settings_of_data
from trellis.trainers.data_changes import facts_of
from trellis.utils.errors import ConfigError, DataError

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRELLIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory(tmp_path):
    """Files in memory, under a URL."""
    system = fsspec.filesystem("memory")

    def put(source: Path, target: str) -> None:
        system.pipe(target, source.read_bytes())

    yield put
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3():
    """A bucket `data` on a server of this machine, and the settings that reach it."""
    pytest.importorskip("s3fs")
    port = free_port()
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    server.start()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("data")
        yield system
    server.stop()


def test_where_a_server_cannot_be_reached_whole_copies_of_the_last_list_are_used(memory, tmp_path, cache, monkeypatch):
    shard(tmp_path / "a.arrow", random_grids(3))
    memory(tmp_path / "a.arrow", "/set/a.arrow")
    before = opened("memory://set")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "ls", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="cannot be read .*The copies of its last list are used"):
        offline = opened("memory://set")
    assert offline.content_key() == before.content_key() and torch.equal(all_items(offline), all_items(before))
    with pytest.raises(DataError, match="memory://other: cannot be read"):
        opened("memory://other")
    [copy] = cache.glob("*.arrow")
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(DataError, match="memory://set: cannot be read"):
        opened("memory://set")


def test_a_bucket_of_shards_is_a_data_root(s3, tmp_path, cache):
    grids = random_grids(20)
    local = tmp_path / "local"
    for number in range(4):
        shard(local / f"{number}.arrow", grids[5 * number : 5 * number + 5], 5 * number, up_axis=["y"] * 5)
        s3.put_file(str(local / f"{number}.arrow"), f"data/set/{number}.arrow")
    s3.pipe_file("data/set/readme.txt", b"no shard")
    data, plain = opened("s3://data/set"), opened(local)
    assert torch.equal(all_items(data), all_items(plain)) and data.content_key() == plain.content_key()
    assert data.texts("root") == ["s3://data/set"] * 20 and data.texts("sha256") == plain.texts("sha256")
    assert facts_of(data)["data_dir"] == "s3://data/set"
    assert settings_of_data(["s3://data/set"], "up_axis") == {"y": "s3://data/set"}
    copies = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}
    assert len(copies) == 4
    one = opened("s3://data/set/2.arrow")
    assert torch.equal(all_items(one), all_items(plain)[10:15])
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.arrow")} == copies  # nothing was copied again
    assert len(opened(f"s3://data/set, {packed_root(tmp_path / 'x.npz', random_grids(3, 1))}")) == 23
    shard(local / "2.arrow", ~grids[10:15], 10, up_axis=["y"] * 5)
    s3.put_file(str(local / "2.arrow"), "data/set/2.arrow")
    assert torch.equal(all_items(opened("s3://data/set")), all_items(opened(local)))  # a file that changed


@pytest.mark.parametrize(
    "url, kind, message",
    [
        ("s3://data/nothing", DataError, "s3://data/nothing: does not exist"),
        ("s3://no-such-bucket/set", DataError, "s3://no-such-bucket/set: (does not exist|cannot be read)"),
        ("s3://data/none.arrow", DataError, "s3://data/none.arrow: does not exist"),
        ("s3://data/other", DataError, "s3://data/other: has no .arrow file.*pack.py"),
        ("nonsense://data", ConfigError, "nonsense://data: .*nonsense.*Give a protocol that fsspec knows"),
    ],
)
def test_a_bad_address_is_one_error_that_names_it(s3, url, kind, message):
    s3.pipe_file("data/other/a.txt", b"text")
    with pytest.raises(kind, match=message) as error:
        opened(url)
    assert "\n" not in str(error.value)


def test_without_credentials_the_error_names_the_address(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match="s3://data/set: cannot be read .*credentials"):
        opened("s3://data/set")
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="gs://bucket/set: gs:// needs a package .*pip install gcsfs"):
        opened("gs://bucket/set")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match="pip install fsspec"):
        opened("memory://set")


def test_too_little_room_is_said_before_anything_is_copied(memory, tmp_path, cache, monkeypatch):
    memory(shard(tmp_path / "a.arrow", random_grids(3)), "/set/a.arrow")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ConfigError, match="memory://set: its shards take .* but .*cache has 100 bytes free.*TRELLIS_CACHE"
    ):
        opened("memory://set")
    assert not list(cache.glob("*.arrow"))


def test_a_file_of_unknown_size_is_not_copied(memory, tmp_path, cache, monkeypatch):
    memory(shard(tmp_path / "a.arrow", random_grids(3)), "/set/a.arrow")
    info = {"name": "/set/a.arrow", "size": None, "type": "file"}
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "ls", lambda *args, **flags: [info])
    with pytest.raises(DataError, match="memory://set/a.arrow: the server does not say its size"):
        opened("memory://set")


def test_a_copy_that_breaks_off_is_no_copy(memory, tmp_path, cache, monkeypatch):
    memory(shard(tmp_path / "a.arrow", random_grids(3)), "/set/a.arrow")
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.implementations.memory.MemoryFile, "read", lambda self, size=-1: b"")
        with pytest.raises(DataError, match="memory://set/a.arrow: 0 of .* bytes have come"):
            opened("memory://set")
    assert not list(cache.glob("*.arrow"))
    assert len(opened("memory://set")) == 3


def test_a_damaged_shard_is_named_by_its_url_and_its_copy(memory, tmp_path, cache):
    path = shard(tmp_path / "a.arrow", random_grids(3))
    path.write_bytes(path.read_bytes()[:-50])
    memory(path, "/set/a.arrow")
    with pytest.raises(DataError, match=rf"memory://set/a.arrow \({cache}/.*-a.arrow\): is not a readable shard"):
        opened("memory://set")


def test_processes_share_the_work_of_copying(s3, tmp_path, cache):
    """Each shard is copied by one of them, and a half copy of one that was killed stops nobody."""
    for number in range(6):
        path = shard(tmp_path / f"{number}.arrow", random_grids(5, number), 5 * number)
        s3.put_file(str(path), f"data/many/{number}.arrow")
    code = """
import sys
from trellis.datasets import remote
copied = []
copy = remote._copy
remote._copy = lambda system, shard: (copied.append(shard.url), copy(system, shard))
assert len(remote.local_shards("s3://data/many")) == 6
print(len(copied))
"""
    [first, *_] = [shard.copy for shard in remote._list("s3://data/many")[1]]
    cache.mkdir()
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (cache / f".{first.name}.{remote.host_name()}.{done.stdout.strip()}.00000000.tmp").write_bytes(b"half")
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    copied = [int(rank.communicate()[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and 6 <= sum(copied) <= 8
    assert len(list(cache.glob("*.arrow"))) == 6 and len(opened("s3://data/many")) == 30
    assert not list(cache.glob(".*.tmp"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_whole_copies_in_a_cache_that_cannot_be_written_are_used(memory, tmp_path, cache, monkeypatch, code):
    grids = random_grids(3)
    memory(shard(tmp_path / "a.arrow", grids), "/set/a.arrow")
    before = all_items(opened("memory://set"))
    [known] = cache.glob("*.json")
    known.unlink()

    def fail(path):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(remote, "atomic_write", fail)
    with pytest.warns(UserWarning, match=f"{known}: {os.strerror(code)}: memory://set cannot be used where its server"):
        assert torch.equal(all_items(opened("memory://set")), before)


def test_another_process_that_gets_on_is_waited_for_and_one_that_hangs_is_not(memory, tmp_path, cache, monkeypatch):
    memory(shard(tmp_path / "a.arrow", random_grids(3)), "/set/a.arrow")
    [found] = remote._list("memory://set")[1]
    cache.mkdir()
    partial = cache / f".{found.copy.name}.{remote.host_name()}.{os.getppid()}.00000000.tmp"
    partial.write_bytes(b"half")
    assert remote._is_being_copied(found)
    os.utime(partial, (0, 0))
    assert not remote._is_being_copied(found)
    elsewhere = partial.rename(cache / f".{found.copy.name}.elsewhere.2000000000.00000000.tmp")
    assert not remote._is_being_copied(found)
    elsewhere.touch()  # of another machine only the time tells
    assert remote._is_being_copied(found)


def test_a_run_trains_on_a_url_and_continues_with_it(memory, write_config, tmp_path):
    grids = np.random.default_rng(0).random((12, 16, 16, 16)) < 0.1
    memory(shard(tmp_path / "a.arrow", grids, split=["train"] * 8 + ["val"] * 4), "/set/a.arrow")
    flags = ("--data_dir", "memory://set", "--output_dir", tmp_path / "run", "--device", "cpu")
    for steps in (1, 2):
        assert run("--config", write_config(tiny_config(max_steps=steps)), *flags) == 0
    misc = torch.load(tmp_path / "run" / "ckpts" / "misc_step0000002.pt", weights_only=True)
    assert misc["data_dir"] == "memory://set"
    assert "--data_dir was" not in (tmp_path / "run" / "log.txt").read_text()
