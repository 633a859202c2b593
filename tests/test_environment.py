"""What is asked of the operating system and of other packages."""

import platform
import re
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def pins(name: str) -> dict[str, Version]:
    lines = [line.partition(";")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {
        canonicalize_name(package): Version(version)
        for package, _, version in (line.partition("==") for line in lines if line and line[0] != "#")
    }


def test_both_ends_of_the_claimed_versions_are_pinned():
    """scripts/test.sh runs constraints.txt, scripts/test_lowest.sh the lower end of each range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claims = [Requirement(text) for text in sum(project["optional-dependencies"].values(), project["dependencies"])]
    claims = [claim for claim in claims if canonicalize_name(claim.name) != project["name"]]
    lowest, tested = pins("constraints_lowest.txt"), pins("constraints.txt")
    assert lowest.keys() == {canonicalize_name(claim.name) for claim in claims}
    for claim in claims:
        name = canonicalize_name(claim.name)
        (floor,) = (Version(part.version) for part in claim.specifier if part.operator == ">=")
        assert lowest[name] == floor and tested[name] in claim.specifier, name


def test_what_the_run_of_the_lowest_versions_leaves_out_is_there():
    script = (ROOT / "scripts" / "test_lowest.sh").read_text()
    left_out = re.findall(r"(tests/test_\w+\.py)(?:::(\w+))?", script)
    assert len(left_out) > 10
    for path, name in left_out:
        assert f"def {name}" in (ROOT / path).read_text(), f"{path}::{name}"
