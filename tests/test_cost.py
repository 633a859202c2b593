"""benchmarks/cost.py: differences of two runs, meshes in groups, hours; its result, and the documents."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, tetrahedron

pytest.importorskip("trimesh")
pytest.importorskip("numba")

from benchmarks import cost  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402

RESULT = ROOT / "benchmarks/results/cost_cpu.json"


def test_start_up_is_left_out(monkeypatch):
    monkeypatch.setattr(cost, "cpu_seconds", lambda command: 7.0 + 0.25 * command[0])
    assert cost.seconds_an_object(lambda number: [number], 8, 64) == pytest.approx(0.25)


def test_cpu_time_is_that_of_a_program_and_its_children():
    work = "import time\nwhile time.process_time() < 0.3: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    assert 0.3 <= cost.cpu_seconds(["-c", start]) < 3
    with pytest.raises(DataError, match="-c exit\\(3\\) ended with 3"):
        cost.cpu_seconds(["-c", "exit(3)"])


def test_hours_are_work_over_cores():
    step = cost.Step("a", "core", 0.36, 64)
    assert step.hours(10**6, 1) == pytest.approx(100 / 64) and step.hours(10**7, 16) == pytest.approx(1000 / 64 / 16)
    assert [row[:2] for row in cost.plan_rows([step])] == [["a", "1e6"], ["a", "1e7"]]


def test_meshes_are_grouped_by_suffix_and_size(tmp_path):
    tetrahedron().export(tmp_path / "a.off")
    tetrahedron().export(tmp_path / "b.stl")
    (tmp_path / "c.stl").write_bytes(b"")
    measured = cost.measure_meshes(sorted(tmp_path.iterdir()), tmp_path, 16)
    rows = cost.mesh_rows(measured)
    assert [row[:2] for row in rows] == [[".off", 1], [".stl", 1], ["0 to 10,000 triangles", 2], ["all", 2]]
    assert rows[-1][3] == 4 and all(row[4] > 0 for row in rows)


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    """With made-up data and without the programs, whose command lines must be valid."""
    asked = []

    def run(command):
        program, *words = map(str, command)
        asked.append(program)
        if program == "scripts/to_tokens.py":
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            (folder / "a.parquet").write_bytes(bytes(100))
        return 1.0 if asked.count(program) % 2 else 0.5  # the larger run comes first

    monkeypatch.setattr(cost, "cpu_seconds", run)
    monkeypatch.setattr(cost, "SPHERES", (1, 2))
    monkeypatch.setattr(
        cost, "make_meshes", lambda folder: [tetrahedron(i).export(folder / f"{i}.off") for i in (1, 2)]
    )
    output = tmp_path / "result.md"
    cost.main(["--resolution", "16", "--objects", "10", "--tokenized", "5", "--output", str(output)])
    text = output.read_text()
    assert text.strip() in capsys.readouterr().out
    sizes, meshes, steps, plan = (
        table["rows"] for table in json.loads(output.with_suffix(".json").read_text())["tables"]
    )
    assert [row[0] for row in sizes] == ["PLY", "npz", "shards", "tokens, Parquet"] and sizes[3][1] == 20
    assert [row[0] for row in meshes][-2:] == ["made-up sphere 1, .glb", "made-up sphere 2, .glb"]
    by_name = {row[0]: row[2] for row in steps}
    assert by_name["pack.py, npz to shards"] == pytest.approx(1e3 * 0.5 / 9)
    assert by_name["to_tokens.py, fp32"] == pytest.approx(1e3 * 0.5 / 4)
    assert len(plan) == 2 * len(steps)


def test_the_committed_table_follows_from_the_committed_times():
    *_, steps, plan = json.loads(RESULT.read_text())["tables"]
    made = [
        cost.Step(name, on, ms / 1e3, cost.CORES if on == "core" else cost.GPUS) for name, on, ms, _ in steps["rows"]
    ]
    np.testing.assert_allclose([row[2:] for row in plan["rows"]], [row[2:] for row in cost.plan_rows(made)], rtol=1e-9)


def test_the_documents_have_the_table_that_was_measured():
    shown = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("|")]
    measured = (ROOT / "benchmarks/results/cost_cpu.md").read_text()
    for heading in ("Bytes", "An object", "A million objects"):
        table = re.search(rf"## {heading}\n\n((?:\|.*\n)+)", measured)[1].splitlines()
        assert set(table) <= set(shown), heading
