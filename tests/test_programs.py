"""Programs start from any folder and are not taken for modules of Python's own."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

FOLDERS = ("scripts", "dataset_toolkits", "dataset_toolkits/shapes", "benchmarks")
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("scripts", "dataset_toolkits", "dataset_toolkits/shapes")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_beside_a_program_shadows_a_module_of_python(folder):
    """The folder of a program that is started by its path comes first on Python's search path."""
    assert not {path.stem for path in (ROOT / folder).glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_start_from_any_folder(program, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "--help"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
