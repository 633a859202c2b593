"""benchmarks/cost.py: differences of two runs, meshes in groups, hours."""

import json
import re
from pathlib import Path

import pytest
from helpers import ROOT, tetrahedron

pytest.importorskip("trimesh")
pytest.importorskip("numba")

from benchmarks import cost  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402

RESULT = ROOT / "benchmarks/results/cost_cpu.json"


def test_start_up_is_left_out(monkeypatch):
    noise = iter((0.0, 3.0, 1.0, 5.0, 0.0, 2.0))
    monkeypatch.setattr(cost, "cpu_seconds", lambda command: 7.0 + 0.25 * command[0] + next(noise))
    assert cost.seconds_an_object(lambda number: [number], 8, 64) == pytest.approx(0.25)
    monkeypatch.setattr(cost, "cpu_seconds", lambda command: 7.0)
    with pytest.raises(DataError, match="64 objects took no longer than 8: too few to measure 8. Give more."):
        cost.seconds_an_object(lambda number: [number], 8, 64)


def test_cpu_time_is_that_of_a_program_and_its_children():
    work = "import time\nwhile time.process_time() < 0.3: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    assert 0.3 <= cost.cpu_seconds(["-c", start]) < 3
    with pytest.raises(DataError, match="-c exit\\(3\\) ended with 3"):
        cost.cpu_seconds(["-c", "exit(3)"])


def test_hours_are_work_over_cores():
    step = cost.Step("a", "core", 0.36, 64, True)
    assert step.hours(10**6, 1) == pytest.approx(100 / 64) and step.hours(10**7, 16) == pytest.approx(1000 / 64 / 16)
    alone = cost.Step("b", "core", 0.36, 1, False)
    assert alone.hours(10**6, 256) == alone.hours(10**6, 1) == pytest.approx(100)
    assert cost.plan_rows([step, alone])[0] == ["a", "1e6", step.hours(10**6, 1), step.hours(10**6, 16), "< 0.01"]
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
        return (
            0.5 if asked.count(program) % (2 * cost.REPEATS) in range(1, cost.REPEATS + 1) else 1.0
        )  # the smaller runs come first

    monkeypatch.setattr(cost, "cpu_seconds", run)
    monkeypatch.setattr(cost, "SPHERES", (1, 2))
    monkeypatch.setattr(cost, "IMAGE_BYTES", 4000)
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
    plain, larger, textured = meshes[-3:]
    assert (plain[0], textured[0]) == ("made-up sphere 1, .glb", "made-up sphere 1 with 0 MB of images, .glb")
    assert plain[3] == textured[3] == 80 and larger[3] == 320 and textured[2] == pytest.approx(plain[2] + 4e-3, rel=0.2)
    by_name = {row[0]: row[2] for row in steps}
    assert by_name["pack.py, npz to shards"] == pytest.approx(1e3 * 0.5 / 9)
    assert by_name["to_tokens.py, fp32"] == pytest.approx(1e3 * 0.5 / 4)
    assert len(plan) == 2 * len(steps)


def test_the_committed_table_follows_from_the_committed_times():
    *_, steps, plan = json.loads(RESULT.read_text())["tables"]
    places = {"dataset.py verify": (cost.CORES, False), "dataset.py dedupe": (1, False)}
    made = [
        cost.Step(name, on, ms / 1e3, *places.get(name, (cost.CORES if on == "core" else cost.GPUS, True)))
        for name, on, ms, _ in steps["rows"]
    ]
    for row, expected in zip(plan["rows"], cost.plan_rows(made), strict=True):
        assert row == [pytest.approx(each) if isinstance(each, float) else each for each in expected]


def test_the_documents_have_the_table_that_was_measured():
    shown = [line for line in (ROOT / "docs/data.md").read_text().splitlines() if line.startswith("|")]
    measured = (ROOT / "benchmarks/results/cost_cpu.md").read_text()
    for heading in ("Bytes", "An object", "A million objects"):
        table = re.search(rf"## {heading}\n\n((?:\|.*\n)+)", measured)[1].splitlines()
        assert set(table) <= set(shown), heading


def test_what_half_a_million_take_follows_from_what_was_measured():
    sizes, meshes, steps, _ = (table["rows"] for table in json.loads(RESULT.read_text())["tables"])
    ms, size, mesh = (
        {row[0]: row[2] for row in steps},
        {row[0]: row[1] for row in sizes},
        {row[0]: row for row in meshes},
    )
    text = " ".join((ROOT / "docs/large_scale.md").read_text().split())
    spheres = [mesh[f"made-up sphere {number}, .glb"] for number in (1, 2, 3)]
    textured = mesh["made-up sphere 1 with 20 MB of images, .glb"]
    image = (textured[5] - spheres[0][5]) / (textured[2] - spheres[0][2])
    least, most = min(row[7] for row in spheres), max(row[7] for row in spheres)
    voxelize, dedupe = ms["voxelize.py, into shards"], ms["dataset.py dedupe"]
    hours = 500_000 / 1e3 / 3600
    for said in (
        f"a mesh takes {voxelize:.1f} ms of a core: 500,000 take {hours * voxelize / 64 * 60:.1f} minutes of 64 cores",
        f"{least:.0f} to {most:.0f} ms for each MB of geometry, and {image:.1f} ms for each MB of images",
        f"takes {size['shards'] / 1e3:.1f} KB an object, where a voxel file takes {size['PLY'] / 1e3:.0f} KB",
        f"{dedupe:.2f} ms an object: {hours * dedupe * 60:.0f} minutes",
        f"0.27 MB as measured | {hours * voxelize / 64:.2f} | {size['shards'] / 2e3:.2f} GB of shards |",
        f"5 MB of images a file | {hours * 5 * (most + image) / 64:.2f}, or",
        f"| {hours * (2 * dedupe + ms['dataset.py verify']):.2f} on one core |",
        f"bf16 | at most {size['tokens, Parquet'] / 2e3:.1f} GB |",
        f"a CPU core takes {ms['to_tokens.py, fp32'] / 1e3:.1f} s an object",
    ):
        assert said in text, said
