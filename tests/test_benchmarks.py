"""The benchmarks: their baselines compute what trellis computes, their counts are right, and each one runs."""

import contextlib
import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config

from benchmarks import common, data_wait, encode, nearest_code, plain, runs
from trellis.models import SparseStructureEncoder, build, load_weights, read_weights
from trellis.utils.config import load_config

SCRIPTS = (
    "train_speed",
    "nearest_code",
    "data_wait",
    "startup",
    "encode",
    "layers",
    "scaling",
    "plain_train",
    "tokenizer",
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


# --- commands --------------------------------------------------------------------------------------------


def run(script: str, capsys, *flags: str) -> str:
    importlib.import_module(f"benchmarks.{script}").main(list(flags))
    return capsys.readouterr().out


def cells(text: str) -> list[list[str]]:
    """The rows of the table at the end of a report."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, capsys, "--help")
    assert stop.value.code == 0 and "--device" in capsys.readouterr().out


def test_nearest_code(capsys, tmp_path):
    text = run("nearest_code", capsys, "--device", "cpu", "--sizes", "2000,300,8", "--output", str(tmp_path / "n.md"))
    rows = cells(text)
    assert [row[1] for row in rows] == ["plain", "ours"] and rows[1][-1] == "1.000000"
    assert (tmp_path / "n.md").read_text().strip() == text.strip()


def test_encode(capsys):
    (row,) = cells(run("encode", capsys, *TINY, "--batch_size", "2"))
    assert row[:2] == ["fp32", "2"] and row[-1] == "1.0000"


def test_data_wait(capsys):
    (row,) = cells(run("data_wait", capsys, *TINY, "--batch_sizes", "2", "--steps", "2"))
    assert row[0] == "2" and float(row[1]) > 0


def test_layers(capsys):
    names = [row[0] for row in cells(run("layers", capsys, *TINY, "--batch_size", "1", "--seconds", "0"))]
    assert {
        "ResBlock3d 8 at 16³",
        "DownsampleBlock3d 32 at 8³",
        "UpsampleBlock3d 64 at 4³",
        "– shuffle",
        "first layer, encoder",
        "last layer, decoder",
        "optimizer",
        "averages",
    } <= set(names)


def test_scaling(capsys):
    text = run("scaling", capsys, *TINY, "--of", "codes", "--values", "64", "--batch", "2", "--intervals", "1")
    ((axis, value, batch, rate, to_first, *_),) = cells(text)
    assert (axis, value, batch, to_first) == ("codes", "64", "2", "1") and float(rate) > 0


def test_startup(capsys):
    flags = ("--of", "imports", "first_step", "--repeats", "1", "--batch_size", "1")
    names = [row[0] for row in cells(run("startup", capsys, *TINY, *flags))]
    assert names[0] == "import torch" and names[-1].endswith("filled kernel caches")


def test_train_speed(capsys):
    (row,) = cells(run("train_speed", capsys, *TINY, "--rows", "codebook", "--batch_sizes", "2", "--intervals", "1"))
    assert row[:2] == ["codebook", "2"] and float(row[3]) > 0 and float(row[7]) > 0


def test_tokenizer(capsys):
    rows = cells(run("tokenizer", capsys, *TINY, "--batch_size", "2"))
    assert [row[:2] for row in rows] == [["fp32", "encode"], ["fp32", "encode, IoU"]]
    assert all(float(row[3]) > 0 and row[-1] == "1.0000" for row in rows)
