"""What is asked of the operating system and of other packages."""

import platform
import re
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT, wait_for
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from trellis.utils.command import available_memory
from trellis.utils.files import atomic_write, host_name, is_running, remove_leftovers

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
    """scripts/test.sh runs constraints.txt, scripts/test_lowest.sh the lower end of each range but those of llm."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claims = [Requirement(text) for text in sum(project["optional-dependencies"].values(), project["dependencies"])]
    claims = [claim for claim in claims if canonicalize_name(claim.name) != project["name"]]
    lowest, tested = pins("constraints_lowest.txt"), pins("constraints.txt")
    alone = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"]["llm"]}
    assert lowest.keys() == {canonicalize_name(claim.name) for claim in claims} - alone
    for claim in claims:
        name = canonicalize_name(claim.name)
        (floor,) = (Version(part.version) for part in claim.specifier if part.operator == ">=")
        assert tested[name] in claim.specifier, name
        assert name in alone or lowest[name] == floor, name


def test_what_the_run_of_the_lowest_versions_leaves_out_is_there():
    script = (ROOT / "scripts" / "test_lowest.sh").read_text()
    left_out = re.findall(r"(tests/test_\w+\.py)(?:::(\w+))?", script)
    assert len(left_out) > 10
    for path, name in left_out:
        assert f"def {name}" in (ROOT / path).read_text(), f"{path}::{name}"


HELP_OF_ALL = """
import builtins, contextlib, io, runpy, sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path[:0] = [str(root)]
original = builtins.__import__

def without_posix(name, globals=None, *args, **kwargs):
    file = str((globals or {}).get("__file__"))
    if name in ("fcntl", "resource", "termios", "pwd", "grp") and str(root) in file and "site-packages" not in file:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, globals, *args, **kwargs)

builtins.__import__ = without_posix
for path in sys.argv[2:]:
    sys.argv = [path, "--help"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            if path.endswith("__main__.py"):
                runpy.run_module(".".join(Path(path).relative_to(root).parent.parts), run_name="__main__")
            else:
                runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(Path(path).relative_to(root).as_posix(), end.code, output.getvalue().startswith("usage: "))
"""


def test_programs_start_where_there_is_no_posix():
    """Windows has neither fcntl nor resource. Modules of other packages are not looked at."""
    folders = (ROOT / "dataset_toolkits", ROOT / "scripts", ROOT / "benchmarks", ROOT / "trellis" / "viewer")
    programs = [ROOT / "train.py", *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    programs = [path for path in programs if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert len(programs) > 12
    command = [sys.executable, "-c", HELP_OF_ALL, str(ROOT), *map(str, programs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [f"{path.relative_to(ROOT).as_posix()} 0 True" for path in programs]
    assert [line for line in done.stdout.splitlines() if not line.startswith("#")] == expected


def test_shell_scripts_use_what_macos_has_too():
    """sha256sum, readlink -f, nproc and GNU's options of sed, date and stat are Linux's."""
    wrong = re.compile(r"\b(sha256sum|md5sum|nproc|tac|timeout)\b|readlink -f|sed -i |date -d|stat -c|grep -P|realpath")
    for path in (ROOT / "scripts").glob("*.sh"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not wrong.search(line.partition("#")[0]), f"{path.name}: {line}"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_peak_memory_is_in_bytes():
    code = (
        "import torch; from trellis.utils.environment import peak_memory\nx = torch.zeros(2**27); print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 2**29 < int(done.stdout) < 2**31  # 512 MiB, and torch


def test_available_memory_is_that_of_the_machine():
    found = available_memory()
    assert found is None or 2**20 < found < 2**50


def test_temporary_files_of_killed_processes_are_removed_and_those_of_others_are_not(tmp_path):
    code = "import os, sys; from pathlib import Path; from trellis.utils.files import atomic_write\n"
    code += "with atomic_write(Path(sys.argv[1])) as partial:\n    partial.write_bytes(b'half'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "grid.ply")], cwd=ROOT, check=True)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".grid.ply.")
    with atomic_write(tmp_path / "mine.ply") as mine:
        mine.write_bytes(b"half")
        elsewhere = left.with_name(left.name.replace(host_name(), "another-machine"))
        elsewhere.write_bytes(b"half")
        others = tmp_path / ".notes.tmp"
        others.write_bytes(b"")
        remove_leftovers(tmp_path)
        assert set(tmp_path.iterdir()) == {mine, elsewhere, others}
    assert (tmp_path / "mine.ply").read_bytes() == b"half" and not mine.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_nobody_waited_for_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_running(process.pid)
    process.kill()
    assert wait_for(lambda: not is_running(process.pid), 10)
    process.communicate()
    assert not is_running(process.pid)


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Not even threads of one process, or processes of one number on two machines."""
    path = tmp_path / "a"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
