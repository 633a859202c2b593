"""Benchmarks: baselines compute what trellis computes, counts are right, and each command's figures are consistent."""

import contextlib
import importlib
import itertools
import json
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config

from benchmarks import (
    check,
    common,
    data_wait,
    encode,
    layers,
    nearest_code,
    plain,
    plain_train,
    runs,
    save,
    scaling,
    startup,
    tokenizer,
    train_speed,
)
from benchmarks.report import Column, Report, Table
from trellis.models import SparseStructureEncoder, build, load_weights, read_weights
from trellis.utils.config import load_config

SCRIPTS = (
    "train_speed",
    "nearest_code",
    "data_wait",
    "faults",
    "save",
    "startup",
    "encode",
    "layers",
    "scaling",
    "plain_train",
    "tokenizer",
    "meshes",
    "packed",
)
CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--resolution", "16", "--objects", "8"]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Four packed grids of 16³."""
    return np.packbits(common.make_grids(4, 16).reshape(4, -1), axis=1)


def pairs(models: dict[str, dict], rows: np.ndarray, folder: Path) -> dict[str, tuple]:
    """{name: (ours, plain)} with the same random weights."""
    weights = common.random_weights(models, rows, folder, CPU)
    found = {}
    for name, spec in models.items():
        ours, other = build(spec), plain.build(spec)
        load_weights(ours, f"{weights[name]}.safetensors")
        other.load_state_dict(read_weights(f"{weights[name]}.safetensors"), strict=True)
        found[name] = ours, other
    return found


# --- baselines -------------------------------------------------------------------------------------------


def test_plain_network_and_ours_agree_in_outputs_and_gradients(rows, tmp_path):
    models = load_config(ROOT / "configs" / "vae" / "demo_vae.json")["models"]
    encoder, decoder = pairs(models, rows, tmp_path).values()
    grid = common.grids_of(rows, CPU).float()
    _, mean, logvar = encoder[0](grid, return_raw=True)
    plain_mean, plain_logvar = encoder[1](grid)
    logits, plain_logits = decoder[0](mean), decoder[1](plain_mean)
    for ours, other in ((mean, plain_mean), (logvar, plain_logvar), (logits, plain_logits)):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    for result in (logits, plain_logits):
        result.square().mean().backward()
    for ours, other in (encoder, decoder):
        gradients = dict(other.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=1e-5, rtol=1e-3)


def test_no_weight_of_the_random_networks_is_zero(rows, tmp_path):
    """A fresh network's residual convolutions are, and so are the products that a benchmark would time."""
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    for path in common.random_weights(models, rows, tmp_path, CPU).values():
        kernels = [value for value in read_weights(f"{path}.safetensors").values() if value.ndim > 1]
        assert kernels and all(value.ne(0).all() for value in kernels)


@pytest.mark.parametrize("embed_dim", [4, 8])
def test_plain_quantizer_and_ours_agree(rows, tmp_path, embed_dim):
    models = tiny_config("SparseStructureVqVaeTrainer", embed_dim=embed_dim)["models"]
    encoder, _, quantizer = (pairs(models, rows, tmp_path)[name] for name in ("encoder", "decoder", "quantizer"))
    z = encoder[0](common.grids_of(rows, CPU).float()).detach()
    ours = quantizer[0](z)
    codes, indices, vq, commit = quantizer[1](z)
    assert torch.equal(ours.indices.flatten(), indices)
    torch.testing.assert_close(ours.codes, codes)
    torch.testing.assert_close(torch.stack([ours.losses["vq"], ours.losses["commit"]]), torch.stack([vq, commit]))


def test_a_norm_that_the_plain_network_lacks_is_refused():
    spec = {
        "name": "SparseStructureEncoder",
        "args": {"in_channels": 1, "latent_channels": 4, "num_res_blocks": 1, "channels": [32], "norm_type": "group"},
    }
    with pytest.raises(ValueError, match="norm_type is 'group'"):
        plain.build(spec)


# --- precision -------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_switch_on_cpu(monkeypatch):
    """Let `use_fp16` act on a CPU as it does on a GPU: the encoder runs in fp16, whatever surrounds it."""
    forward = SparseStructureEncoder.forward

    def in_fp16(self, x, *args, **kwargs):
        with torch.autocast("cpu", torch.float16, enabled=True) if self.use_fp16 else contextlib.nullcontext():
            return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(SparseStructureEncoder, "forward", in_fp16)


@pytest.fixture
def encoders(rows, tmp_path) -> dict[str, torch.nn.Module]:
    """Our and the plain encoder and codebook of a configuration that asks for fp16, as the full-size ones do."""
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    weights = common.random_weights(models, rows, tmp_path, CPU)
    models["encoder"]["args"]["use_fp16"] = True
    return encode.build(models, weights, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encode_measures_the_precision_that_a_row_names(dtype, rows, encoders, fp16_switch_on_cpu):
    bits = torch.from_numpy(rows)
    for tokenize in (encode.tokenize, encode.tokenize_plainly):
        assert encode.block_dtypes(encoders, lambda f=tokenize: f(encoders, bits, 16, dtype)) == {dtype}
    encode.check_precision(encoders, bits, 16, dtype)
    encoders["encoder"].convert_to_fp16()
    with pytest.raises(RuntimeError, match=f"tokenize: the encoder ran in .*float16.*, but {dtype} was to be measured"):
        encode.check_precision(encoders, bits, 16, dtype)


def test_fp32_of_encode_is_without_tf32():
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        with encode.arithmetic(CPU, torch.float32):
            assert not any(switch.allow_tf32 for switch in switches) and not torch.is_autocast_enabled("cpu")
        assert all(switch.allow_tf32 for switch in switches)
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


# --- counts ----------------------------------------------------------------------------------------------


def test_operations_of_the_full_size_network():
    models = load_config(runs.config_path("ss_vae_conv3d_16l8_fp16"))["models"]
    count = {kind: plain.convolution_flops(models, kind, 64) for kind in ("encode", "forward", *plain.KINDS)}
    assert count["encode"] == pytest.approx(0.65e12, rel=0.01)
    assert count["forward"] == pytest.approx(1.46e12, rel=0.01)
    assert count["kl"] == pytest.approx(4.38e12, rel=0.01)
    first = 2 * 27 * 32 * 64**3  # whose input needs no gradient
    assert count["kl"] == count["stage2"] == 3 * count["forward"] - first
    assert count["stage1_cached"] == 2 * (count["forward"] - count["encode"])
    assert count["stage1"] == count["encode"] + count["stage1_cached"]


def test_tokens_per_sample():
    def tokens(name: str) -> int:
        return plain.tokens_per_sample(load_config(runs.config_path(name))["models"], 64)

    assert (tokens("vqvae_stage1"), tokens("vqvae_1024_stage1")) == (4096, 1024)


def test_fp64_reference_takes_the_lowest_of_equal_codes():
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    vectors = torch.tensor([[0.9, 0.1], [0.5, 0.5], [8.0, 8.0], [0.0, 2.0]])
    assert nearest_code.fp64_nearest(vectors, codebook).tolist() == [1, 1, 0, 2]


def test_limit_is_the_larger_of_arithmetic_and_memory():
    ceilings = common.Ceilings(copy=10.0, arithmetic={torch.float32: 4.0, torch.bfloat16: 40.0})
    assert ceilings.seconds(8, 10, torch.float32) == 2
    assert ceilings.seconds(8, 10, torch.float16) == ceilings.seconds(8, 10, torch.bfloat16) == 1


def test_speed_is_the_median_after_warm_up(tmp_path):
    entries = [{"step": 0}, *({"step": n, "samples_per_second": rate} for n, rate in enumerate((1, 2, 9, 5, 7)))]
    (tmp_path / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert runs.read_speed(tmp_path, warm=2) == runs.Speed(7, None)
    with pytest.raises(RuntimeError, match="5 intervals, all of them warm-up"):
        runs.read_speed(tmp_path, warm=5)


def test_waiting_is_told_from_working():
    def loads():
        while True:
            time.sleep(0.02)
            yield {}

    marks = data_wait.Marks(CPU)
    for _, _ in zip(marks.around(loads()), range(5), strict=False):
        time.sleep(0.05)
    wait, step = marks.waits_and_steps(warm=1)
    assert 0.02 <= wait < 0.05 < 0.07 <= step


class Clock:
    """A clock that only `work` moves."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_call_is_timed_often_enough_and_without_its_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(common, "time", clock)
    seconds = itertools.chain([9.0, 9.0], itertools.repeat(0.25))
    times = common.call_seconds(lambda: clock.work(next(seconds)), CPU, budget=2.0)
    assert times == [0.25] * 8  # which fill the budget
    slow = common.call_seconds(lambda: clock.work(4.0), CPU, budget=1.0)
    assert slow == [4.0] * common.MIN_RUNS


def test_the_plain_trainers_rate_is_work_over_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(plain_train, "time", clock)

    class Trainer:
        seconds = iter([7.0, 7.0, *[0.5] * 3, *[1.0] * 3, *[3.0] * 3])

        def step(self, grid):
            clock.work(next(self.seconds))

    rate = plain_train.measure(Trainer(), itertools.repeat(None), batch=6, warm=2, steps=3, chunks=3)
    assert rate == pytest.approx(6 / 1.0)  # the median chunk


def test_memory_saving_takes_the_fewest_micro_batches_that_fit():
    bench = object.__new__(train_speed.Bench)
    bench.ours = lambda row, batch, split: runs.Speed(1.0, 64.0 / split)
    assert bench.saving(train_speed.ROWS["kl"], 32) == (8, runs.Speed(1.0, 8.0))
    bench.ours = lambda row, batch, split: runs.Speed(1.0, 64.0)
    assert bench.saving(train_speed.ROWS["kl"], 32)[0] == 32  # none fits


# --- data ------------------------------------------------------------------------------------------------


def test_made_up_grids_are_shells():
    occupied = common.make_grids(20, 64).mean((1, 2, 3))
    assert (occupied > 0.005).all() and 0.02 < occupied.mean() < 0.05


def test_only_training_rows_of_packed_data_are_read(tmp_path, rows):
    np.savez(tmp_path / "a.npz", bits=rows, split=np.array(["train", "val", "val", "train"]))
    np.savez(tmp_path / "b_val.npz", bits=rows)
    np.savez(tmp_path / "c.npz", bits=rows[1:2])
    assert np.array_equal(common.packed_rows(str(tmp_path)), rows[[0, 3, 1]])
    assert np.array_equal(common.packed_rows(str(tmp_path / "a.npz")), rows[[0, 3]])


# --- reports ---------------------------------------------------------------------------------------------


def test_a_report_holds_the_same_rows_in_markdown_and_json(tmp_path):
    columns = (Column("of [what]", "key"), Column("rate", "ratio"), Column("share", format=".2%"), Column("kind"))
    rows = [["a {b}", 1234.5678, 0.12345, None], ["c", 0.0123456, 0.5, "x"]]
    output = tmp_path / "new" / "result.md"
    report = Report("Title", "benchmarks/some.py", ["--flag", "a b"], CPU, output, {"resolution": 16})
    text = report.write("Before.", Table(columns, rows), "After.", Table(columns[:1], [["d"]], "Second"))
    assert output.read_text() == text and text.startswith("# Title\n")
    assert "| a {b} | 1235 | 12.35% | – |\n| c | 0.0123 | 50.00% | x |" in text and "## Second" in text
    content = json.loads(output.with_suffix(".json").read_text())
    assert [table["rows"] for table in content["tables"]] == [rows, [["d"]]]
    assert content["tables"][0]["columns"][:2] == [
        {"name": "of [what]", "kind": "key"},
        {"name": "rate", "kind": "ratio"},
    ]
    assert content["notes"] == ["Before.", "After."] and content["work"] == {"resolution": 16}
    assert content["benchmark"] == "some" and content["command"] == "python benchmarks/some.py --flag 'a b'"
    assert content["torch"] == torch.__version__ and content["machine"] in text and content["device"] == "cpu"


def test_output_is_the_markdown_files_name(capsys):
    with pytest.raises(SystemExit):
        nearest_code.main(["--output", "new.json"])
    assert "new.json: give the Markdown file's name" in capsys.readouterr().err


# --- comparison ------------------------------------------------------------------------------------------


def write_result(path: Path, ratios: dict[str, float | None], **changes) -> str:
    """Write a result with a row for each of {name: ratio to plain}. The time in each row differs by file."""
    columns = [{"name": "size", "kind": "key"}, {"name": "ms", "kind": "figure"}, {"name": "to plain", "kind": "ratio"}]
    rows = [[name, 1.0 + len(path.name), ratio] for name, ratio in ratios.items()]
    content = {"benchmark": "some", "device": "cpu", "machine": "M", "work": {"resolution": 64}}
    content["tables"] = [{"title": "", "columns": columns, "rows": rows}]
    path.write_text(json.dumps(content | changes))
    return str(path)


def test_check_tells_what_got_worse_and_what_did_not(tmp_path, capsys):
    old = write_result(tmp_path / "old.json", {"small": 2.0, "large": 10.0, "only old": 5.0})
    new = write_result(tmp_path / "newer.json", {"small": 1.9, "large": 6.0, "only new": 0.1})
    assert check.main([new, "--against", old]) == 1
    printed = capsys.readouterr().out
    assert "worse: large: to plain 10 -> 6 (-40%)" in printed and "small" not in printed and "only" not in printed
    assert "1 of 2 ratios fell by more than 20%" in printed
    assert check.main([old, "--against", new]) == 0  # the other way round both are better or within the tolerance
    assert "nothing got worse" in capsys.readouterr().out
    assert check.main([new, "--against", old, "--tolerance", "0.5"]) == 0
    assert check.main([new, "--against", old, "--tolerance", "0.01"]) == 1
    assert "2 of 2 ratios" in capsys.readouterr().out


def test_check_takes_a_ratio_that_is_no_number_for_worse(tmp_path):
    old = write_result(tmp_path / "old.json", {"small": 2.0})
    assert check.main([write_result(tmp_path / "new.json", {"small": float("nan")}), "--against", old]) == 1


@pytest.mark.parametrize(
    "ratios, changes, message",
    [
        ({"small": 2.0}, {"benchmark": "other"}, "benchmark is some, but other in"),
        ({"small": 2.0}, {"device": "cuda"}, "device is cpu, but cuda in"),
        ({"small": 2.0}, {"work": {"resolution": 32}}, "work is {'resolution': 64}, but {'resolution': 32} in"),
        ({"large": 2.0}, {}, "have no ratio in common"),
        ({"small": None}, {}, "have no ratio in common"),
        ({"small": 2.0}, {"tables": 3}, "is not a benchmark's result"),
        (
            {},
            {"tables": [{"title": "", "columns": [{"name": "a", "kind": "key"}], "rows": [["x"], ["x"]]}]},
            "two rows are called x",
        ),
    ],
)
def test_check_refuses_results_that_do_not_compare(ratios, changes, message, tmp_path, capsys):
    old = write_result(tmp_path / "old.json", {"small": 2.0})
    assert check.main([write_result(tmp_path / "new.json", ratios, **changes), "--against", old]) == 2
    assert message in capsys.readouterr().err


def test_check_compares_with_all_committed_results_that_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "RESULTS", tmp_path)
    write_result(tmp_path / "cuda.json", {"small": 9.0}, device="cuda")
    new = write_result(tmp_path / "new.json", {"small": 2.0})
    assert check.main([new]) == 2  # neither another device's nor itself
    write_result(tmp_path / "cpu.json", {"small": 2.0})
    assert check.main([new]) == 0
    write_result(tmp_path / "fast_cpu.json", {"small": 3.0})
    assert check.main([new]) == 1
    assert f"{tmp_path / 'fast_cpu.json'}, measured on M: 1 ratios compared, 1 worse" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text("{")
    assert check.main([new]) == 2


@pytest.mark.parametrize("path", sorted(check.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_can_be_compared(path):
    result = check.read(path)
    assert result.ratios and check.worse(result, result, check.common_ratios(result, result), 0.0) == []
    columns = [(column["name"], column["kind"]) for column in json.loads(path.read_text())["tables"][0]["columns"]]
    declared = importlib.import_module(f"benchmarks.{result.same['benchmark']}").COLUMNS
    assert {column for column in columns if column[1] != "figure"} == {
        (column.name, column.kind) for column in declared if column.kind != "figure"
    }


@pytest.mark.parametrize("path", sorted(check.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_transcribed_results_have_the_figures_of_the_markdown(path):
    content = json.loads(path.read_text())
    if content["commit"] is not None:
        pytest.skip("was written by a benchmark")
    source = content["notes"][0].removeprefix("Transcribed from ").split(",")[0]
    lines = [line.strip("|").split("|") for line in (check.RESULTS / source).read_text().splitlines()]
    printed = {cell.strip() for line in lines for cell in line}
    figures = [value for table in content["tables"] for row in table["rows"] for value in row]
    numbers = {float(cell) for cell in printed if cell.replace(".", "").isdigit()}
    assert {value for value in figures if isinstance(value, int | float)} <= numbers


# --- commands --------------------------------------------------------------------------------------------


@pytest.fixture
def ceilings(monkeypatch) -> common.Ceilings:
    """Ceilings out of any CPU's reach, in place of measured ones."""
    made_up = common.Ceilings(copy=1e15, arithmetic={torch.float32: 1e16})
    monkeypatch.setattr(common, "measure_ceilings", lambda device: made_up)
    return made_up


@pytest.fixture
def measure(tmp_path, capsys):
    """Run a benchmark; return its rows as {column: value} after checking that Markdown and JSON hold the same."""

    def call(script: ModuleType, *flags: str) -> list[dict]:
        output = tmp_path / "result.md"
        script.main([*flags, "--output", str(output)])
        printed = capsys.readouterr().out
        text = output.read_text()
        assert printed.strip().endswith(text.strip())
        (table,) = json.loads(output.with_suffix(".json").read_text())["tables"]
        assert Table(script.COLUMNS, table["rows"]).markdown() in text
        keys = [[row[i] for i, column in enumerate(script.COLUMNS) if column.kind == "key"] for row in table["rows"]]
        assert len({tuple(key) for key in keys}) == len(keys)
        return [dict(zip([column.name for column in script.COLUMNS], row, strict=True)) for row in table["rows"]]

    return call


def near(value: float):
    return pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{script}").main(["--help"])
    assert stop.value.code == 0 and "--device" in capsys.readouterr().out


def test_nearest_code(measure, ceilings):
    (row,) = measure(nearest_code, "--device", "cpu", "--sizes", "2000,300,8")
    assert row["N × K × D"] == "2000 × 300 × 8" and row["equal ids"] == row["plain equal ids"] == 1
    assert row["limit ms"] == near(1e3 * 2 * 2000 * 300 * 8 / 1e16) and row["limit ms"] < row["ms"]
    assert row["of limit"] == near(row["limit ms"] / row["ms"])
    assert row["ratio to plain"] == near(row["plain ms"] / row["ms"])


def test_encode(measure, ceilings):
    (row,) = measure(encode, *TINY, "--batch_size", "2")
    assert (row["precision"], row["batch"], row["equal ids"]) == ("fp32", 2, 1)
    models = load_config(runs.config_path("demo_stage1"))["models"]
    assert (
        row["limit"] == near(1e16 / plain.convolution_flops(models, "encode", 16)) and row["samples/s"] < row["limit"]
    )
    assert row["of limit"] == near(row["samples/s"] / row["limit"])
    assert row["ratio to plain"] == near(row["samples/s"] / row["plain samples/s"])


def test_data_wait(measure):
    (row,) = measure(data_wait, *TINY, "--batch_sizes", "2", "--steps", "2")
    assert row["samples/s"] * row["ms per step"] / 1e3 == near(row["batch"]) == near(2)
    assert 0 < row["ms waiting"] < row["ms per step"] and row["share"] == near(row["ms waiting"] / row["ms per step"])
    assert row["limit"] == near(row["samples/s"] / row["loader alone, samples/s"])


def test_save(measure):
    rows = measure(save, *TINY, "--batch_size", "1", "--every", "4", "--saves", "3")
    assert [(row["step"], row["written"]) for row in rows] == [
        (4, "while training waits"),
        (8, "in the background"),
        (12, "while training waits"),
    ]
    for row in rows:
        assert 0 < row["in save(), s"] <= row["writing, s"]
        assert row["written"] == "in the background" or row["steps meanwhile"] == 0


def test_layers(measure, ceilings, tmp_path):
    rows = measure(layers, *TINY, "--batch_size", "1", "--seconds", "0")
    found = {row["layer"]: row for row in rows}
    assert {
        "ResBlock3d 8 at 16³",
        "DownsampleBlock3d 32 at 8³",
        "UpsampleBlock3d 64 at 4³",
        "– shuffle, 256 at 4³",
        "first layer, encoder",
        "last layer, decoder",
        "optimizer",
        "averages",
    } <= set(found)
    for row in rows:
        assert row["of limit"] == near(row["limit ms"] / (row["forward ms"] + (row["backward ms"] or 0)))
        work = max(row["GFLOP"] / 1e16, row["GB"] / 1e15) * 1e12
        assert work <= row["limit ms"] * (1 + 1e-9) and row["limit ms"] < row["forward ms"]
    for channels, cells in ((8, 16), (32, 8), (64, 4)):  # a block has two convolutions, each with two gradients
        parts = [
            found[f"– {part}, {channels} at {cells}³"] for part in ("convolution", "input gradient", "weight gradient")
        ]
        assert all(part["GFLOP"] == near(2 * 27 * channels**2 * cells**3 / 1e9) for part in parts)
        block = found[f"ResBlock3d {channels} at {cells}³"]
        assert block["GFLOP"] == near(2 * sum(part["GFLOP"] for part in parts))
        assert all(part["times"] == 2 * block["times"] for part in parts)
    total = sum(row["share of step"] for row in rows if row["times"] and not row["layer"].startswith("–"))
    assert f"add up to {total:.0%} of it" in (tmp_path / "result.md").read_text()


def test_scaling(measure, ceilings):
    (row,) = measure(scaling, *TINY, "--of", "codes", "--values", "64", "--batch", "2", "--intervals", "1")
    assert (row["varied"], row["value"], row["batch"]) == ("codes", 64, 2)
    assert row["rate to first"] == row["time to first"] == row["work to first"] == 1
    assert row["samples/s"] * row["ms per step"] / 1e3 == near(2) and 0 < row["of limit"] < 1


def test_growth_is_relative_to_the_first_row_of_its_kind(measure, ceilings, monkeypatch):
    rates = iter([8.0, 12.0, 5.0, 0.5])
    monkeypatch.setattr(scaling, "run", lambda *args: runs.Speed(next(rates), None))
    monkeypatch.setitem(scaling.DEFAULTS["cpu"], "batch", [1, 2])
    monkeypatch.setitem(scaling.DEFAULTS["cpu"], "resolution", [16, 32])
    rows = measure(scaling, *TINY, "--of", "batch", "resolution")
    assert [row["samples/s"] for row in rows] == [8, 12, 5, 0.5]
    assert [row["ms per step"] for row in rows] == [near(125), near(1e3 / 6), near(400), near(4000)]
    assert [row["rate to first"] for row in rows] == [1, 1.5, 1, near(0.1)]
    assert [row["time to first"] for row in rows] == [1, near(8 / 6), 1, near(10)]
    assert [row["work to first"] for row in rows] == [1, 2, 1, near(8)]
    models = load_config(runs.config_path("demo_vae"))["models"]
    limits = [1e16 / plain.convolution_flops(models, "kl", resolution) for resolution in (16, 16, 16, 32)]
    assert [row["of limit"] * limit for row, limit in zip(rows, limits, strict=True)] == [
        near(8),
        near(12),
        near(5),
        near(0.5),
    ]


def test_startup(measure):
    flags = ("--of", "imports", "first_step", "--repeats", "1", "--batch_size", "1")
    rows = {row["start"]: row["seconds"] for row in measure(startup, *TINY, *flags)}
    *imports, empty, filled = rows
    assert (
        imports[0] == "import torch"
        and empty.endswith("empty kernel caches")
        and filled.endswith("filled kernel caches")
    )
    assert all(seconds > 0 for seconds in rows.values())
    assert rows["import trellis, beyond import torch"] < rows["import torch"] < min(rows[empty], rows[filled])


def test_train_speed(measure, ceilings):
    (row,) = measure(train_speed, *TINY, "--rows", "codebook", "--batch_sizes", "2", "--intervals", "1")
    assert (row["training"], row["batch"], row["micro-batches"]) == ("codebook", 2, 1)
    assert row["samples/s"] > 0 and row["plain samples/s"] > 0 and row["GiB"] is None
    assert row["limit"] == near(1e16 / plain.nearest_flops(4**3, 2048, 8))  # the demo's codebook at 16³
    assert row["of limit"] == near(row["samples/s"] / row["limit"]) and row["of limit"] < 1
    assert row["ratio to plain"] == near(row["samples/s"] / row["plain samples/s"])


def test_tokenizer(measure, ceilings):
    rows = measure(tokenizer, *TINY, "--batch_size", "2")
    assert [(row["precision"], row["task"]) for row in rows] == [("fp32", "encode"), ("fp32", "encode, IoU")]
    models = load_config(runs.config_path("demo_stage1"))["models"]
    for row, kind in zip(rows, ("encode", "forward"), strict=True):
        assert row["limit"] == near(1e16 / plain.convolution_flops(models, kind, 16))
        assert row["of limit"] == near(row["objects/s"] / row["limit"]) and row["of limit"] < 1
        assert row["script, objects/s"] > 0 and row["ids equal to fp32"] == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a shard of made-up objects, from small pools."""
    pytest.importorskip("pyarrow")
    from benchmarks import packed_data

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_data, "BASE_SHAPES", 4)
        patch.setattr(packed_data, "POOL", 9)
        packed_data._make_pools()
        packed_data._make_shard(folder / "made-00000.arrow", range(70))
        packed_data._make_shard(folder / "made-00001.arrow", range(70, 81))
    packed_data.make_shards(folder, 81, processes=1)  # 20,000 would be in the first: nothing to make
    return folder


def test_made_up_objects_differ(made):
    from trellis.datasets.sparse_structure import SparseStructure

    data = SparseStructure(str(made), split="all")
    grids = {row.tobytes() for row in data.get_batch(np.arange(81))["bits"].numpy()}
    assert len(data) == 81 and len(grids) >= 72  # all pairs of two pools of 9; two boxes are alike
    assert len(set(data.texts("source"))) == 50


def test_a_data_set_in_shards_is_measured_and_its_damages_are_named(made, monkeypatch):
    from benchmarks import packed

    monkeypatch.setattr(packed, "SECONDS", 0.01)
    assert [row[0] for row in packed.opening(made)][0] == "open"
    assert all(rate > 0 and ratio > 0 for _, rate, ratio in packed.random_access(made))
    for what, message in packed.damages(made):
        assert message.startswith("made-00001.arrow: "), what
        assert ("1 of 11 rows is lost" in message) == ("of the grid" in what)


def test_every_format_gives_the_grids_that_were_stored(made, tmp_path):
    from benchmarks.packed_formats import FORMATS
    from trellis.datasets.sparse_structure import SparseStructure

    data = SparseStructure(str(made), split="all")
    bits, read = data.get_batch(np.arange(81))["bits"].numpy(), 0
    order = np.random.default_rng(0).permutation(81)
    for number, stored in enumerate(FORMATS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with contextlib.suppress(ImportError):  # Zarr and Lance
            stored.write(folder, bits, data.texts("sha256"))
            assert np.array_equal(stored.open(folder)(order), bits[order])
            read += 1
    assert read >= 6
