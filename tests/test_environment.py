"""What is asked of the operating system."""

import platform
import subprocess
import sys

import pytest
from helpers import ROOT

FAULTS = """
import resource
import torch
from trellis.utils.environment import keep_freed_memory

if {keep}:
    keep_freed_memory()
for _ in range(20):  # until the heap has settled
    torch.zeros(2**24)  # 64 MiB, or 16,384 pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again_with_few_page_faults():
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    assert 10 * faults(keep=True) < faults(keep=False)
