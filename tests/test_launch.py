"""Whether the GPU kernels can run, found out before one is tried."""

import importlib.util
import shutil
import sysconfig

import pytest
import torch

from trellis.modules.kernels import launch

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with all that the kernels need; a test takes one thing away."""
    launch.obstacle.cache_clear()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    yield monkeypatch
    launch.obstacle.cache_clear()


def test_nothing_stands_in_the_way(gpu):
    assert launch.obstacle(DEVICE) is None


def test_without_triton(gpu):
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.obstacle(DEVICE) == "Triton is not installed; pip install triton"


def test_on_an_older_gpu(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert launch.obstacle(DEVICE) == "Tesla T4 is older than what Triton compiles for"


def test_without_a_compiler(gpu):
    gpu.setattr(shutil, "which", lambda name: None)
    assert launch.obstacle(DEVICE) == "Triton finds no C compiler; install gcc or clang, or set CC"
    launch.obstacle.cache_clear()
    gpu.setenv("CC", "/opt/cc")
    assert launch.obstacle(DEVICE) is None


def test_without_pythons_headers(gpu, tmp_path):
    (tmp_path / "Python.h").unlink()
    assert "Python.h; install Python's headers" in launch.obstacle(DEVICE)


def test_a_cpu_tensor_never_takes_a_kernel():
    assert not launch.kernels_run(torch.zeros(1))
