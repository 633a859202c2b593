"""Scores of a run, against a recomputation object by object in numpy."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VQ, run, solid_grids, tiny_config
from PIL import Image

from scripts import evaluate as script
from trellis import SparseStructureTokenizer
from trellis.evaluation.baselines import Baselines, NeighborCounts, PatternCounts, deflated_bits
from trellis.models import build
from trellis.modules.quantizers import ResidualVectorQuantizer
from trellis.runs.checkpoint import Checkpoints, model_file
from trellis.tokens.octree import Octree
from trellis.utils.errors import CheckpointError
from trellis.utils.random_utils import derive_seed

SOURCES = ["chairs", "tables", "chairs", "", "tables", "chairs", "lamps"]  # "": unknown


@pytest.fixture(scope="module")
def sourced_data(tmp_path_factory) -> Path:
    """12 training and 7 validation grids of 16³; the latter have names and, but for one, sources."""
    folder = tmp_path_factory.mktemp("sourced")
    for split, number, seed in (("train", 12, 3), ("val", 7, 4)):
        grids = solid_grids(number, 16, seed)
        known = {"name": [f"object {i}" for i in range(7)], "source": SOURCES} if split == "val" else {}
        bits = np.packbits(grids.reshape(number, -1), axis=1)
        np.savez(folder / f"shapes_{split}.npz", bits=bits, **{key: np.array(value) for key, value in known.items()})
    return folder


def trained(folder: Path, data: Path, config: dict, *flags) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    assert run("--config", path, "--data_dir", data, "--output_dir", folder / "run", *flags) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def vae_run(sourced_data, tmp_path_factory) -> Path:
    """Long enough that grids come back in part: the average leads to other scores than the raw weights."""
    config = tiny_config(max_steps=20, ema_rate=[0.5, 0.9], i_eval=100, i_save=100, loss_type="dice")
    return trained(tmp_path_factory.mktemp("vae"), sourced_data, config)


@pytest.fixture(scope="module")
def vq_run(vae_run, sourced_data, tmp_path_factory) -> Path:
    """Stage 1, so that encoder and decoder have raw weights only."""
    config = tiny_config(VQ, freeze=["encoder", "decoder"], max_steps=4, embed_dim=8, i_save=2, i_eval=2)
    return trained(tmp_path_factory.mktemp("vq"), sourced_data, config, "--load_dir", vae_run)


def score(run: Path, out: Path, *flags) -> dict:
    """The report, without the time that the picture takes."""
    flags = ["--run", str(run), "--output_dir", str(out), "--device", "cpu", *map(str, flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "contact_sheet", lambda examples: np.zeros((8, 8, 3), dtype=np.uint8))
        assert script.main(flags) == 0
    (report,) = out.glob("*.json")
    return json.loads(report.read_text())


def compare(predicted: np.ndarray, grid: np.ndarray) -> dict:
    """Scores of one grid [R, R, R] bool. Distances are those of all pairs; None in large grids, where there are too
    many."""
    hits, union = (predicted & grid).sum(), (predicted | grid).sum()
    row = {
        "iou": hits / union,
        "recall": hits / grid.sum(),
        "precision": hits / predicted.sum() if predicted.any() else 1.0,
        "exact": float((predicted == grid).all()),
        "chamfer": None,
        "f_score": None,
    }
    if grid.size > 16**3:
        return row
    if not predicted.any():
        return row | {"chamfer": math.sqrt(3) * (len(grid) - 1), "f_score": 0.0}
    apart = np.argwhere(predicted)[:, None] - np.argwhere(grid)
    apart = np.sqrt((apart**2).sum(-1))
    nearest = apart.min(1), apart.min(0)
    precision, recall = ((distance <= 1).mean() for distance in nearest)
    row["f_score"] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return row | {"chamfer": (nearest[0].mean() + nearest[1].mean()) / 2}


def percentile_5(values: list[float]) -> float:
    values = sorted(values)
    place = 0.05 * (len(values) - 1)
    low = int(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def entropy_of(codes: list[int]) -> float:
    shares = [codes.count(code) / len(codes) for code in set(codes)]
    return -sum(share * math.log2(share) for share in shares)


def by_hand(run: Path, data: Path, rate: float | None, split: str = "val") -> dict:
    """Every number of one set of weights. Codes are searched in float64 and counts made object by object; the
    networks see the batches that the script gives them, since one voxel whose logit is 0 but for rounding counts."""
    checkpoints = Checkpoints(run)
    step = checkpoints.latest()
    config = json.loads((run / "config.json").read_text())
    models = {}
    for name, spec in config["models"].items():
        averaged = checkpoints.folder / model_file(name, step, rate)
        path = averaged if averaged.is_file() else checkpoints.folder / model_file(name, step)
        models[name] = build(spec).eval()
        models[name].load_state_dict(torch.load(path, weights_only=True))
    bits = np.load(data / f"shapes_{split}.npz")["bits"]
    size = round((bits.shape[1] * 8) ** (1 / 3))
    grids = np.unpackbits(bits, axis=1).reshape(-1, size, size, size).astype(bool)

    predicted, sampled, rows = [], [], [{} for _ in grids]
    used: list[tuple[bool, int]] = []  # of all objects: whether a voxel of the token is occupied, and its code
    groups: list[tuple[bool, float]] = []  # likewise, and the KL in bits
    for start in range(0, len(grids), 8):
        with torch.no_grad():
            ss = torch.from_numpy(grids[start : start + 8])[:, None].float()
            z, mean, logvar = models["encoder"](ss, return_raw=True)
            if "quantizer" in models:
                codebook = models["quantizer"].embeddings.weight.double().numpy()  # [K, 8]: two cells of 4
                latent = z.double().numpy()  # [B, 4, R/4, R/4, R/4]: channels, x, y, z
                quantized = np.empty_like(latent)
                for b in range(len(z)):
                    own = []
                    for x, y, t in np.ndindex(size // 4, size // 4, size // 8):
                        vector = latent[b, :, x, y, 2 * t : 2 * t + 2].T.reshape(8)
                        code = int(((codebook - vector) ** 2).sum(1).argmin())
                        quantized[b, :, x, y, 2 * t : 2 * t + 2] = codebook[code].reshape(2, 4).T
                        part = grids[start + b, 4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 8 * t : 8 * t + 8]
                        own.append((bool(part.any()), code))
                    inside = [code for occupied, code in own if occupied]
                    rows[start + b] |= {
                        "quantization_error": ((latent[b] - quantized[b]) ** 2).mean(),
                        "tokens": len(own),
                        "tokens_occupied": len(inside),
                        "object_usage": len({code for _, code in own}) / len(codebook),
                        "object_perplexity": 2 ** entropy_of([code for _, code in own]),
                        "object_usage_occupied": len(set(inside)) / len(codebook),
                        "object_perplexity_occupied": 2 ** entropy_of(inside),
                    }
                    used += own
                z = torch.from_numpy(quantized).float().contiguous(memory_format=torch.channels_last_3d)
            else:
                noise = []
                for b in range(len(z)):
                    number = int(hashlib.sha256(bits[start + b]).hexdigest()[:15], 16)
                    generator = torch.Generator().manual_seed(derive_seed("noise", 0, number))
                    noise.append(torch.randn(mean.shape[1:], generator=generator))
                    own = []
                    for x, y, t in np.ndindex(size // 4, size // 4, size // 16):
                        m, v = (part[b, :, x, y, 4 * t : 4 * t + 4].double().numpy() for part in (mean, logvar))
                        part = grids[start + b, 4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 16 * t : 16 * t + 16]
                        own.append((bool(part.any()), ((m**2 + np.exp(v) - 1 - v) / 2).sum() / math.log(2)))
                    rows[start + b] |= {
                        "kl_bits_per_object": sum(kl for _, kl in own),
                        "kl_bits_per_object_occupied": sum(kl for occupied, kl in own if occupied),
                        "groups_occupied": sum(occupied for occupied, _ in own),
                    }
                    groups += own
                sample = mean + torch.exp(0.5 * logvar) * torch.stack(noise)
                sampled += list(models["decoder"](sample)[:, 0].numpy() > 0)
            predicted += list(models["decoder"](z)[:, 0].numpy() > 0)

    for number, grid in enumerate(grids):
        rows[number] |= compare(predicted[number], grid)
        gaps = np.zeros_like(grid)
        for turned, lines in zip((gaps, gaps.swapaxes(0, 1), gaps.T), (grid, grid.swapaxes(0, 1), grid.T), strict=True):
            turned[1:-1] |= lines[:-2] & ~lines[1:-1] & lines[2:]
        rows[number]["narrow_gaps"] = gaps.sum() / grid.sum()
        if sampled:
            rows[number] |= {f"sampled_{key}": value for key, value in compare(sampled[number], grid).items()}

    def mean_of(key: str, chosen: list[dict]) -> float | None:
        return None if chosen[0][key] is None else np.mean([row[key] for row in chosen])

    result = {"objects": len(rows), **{key: mean_of(key, rows) for key in rows[0]}}
    ious = [key for key in ("iou", "sampled_iou") if key in rows[0]]
    for key in ious:
        result[f"{key}_median"] = np.median([row[key] for row in rows])
        result[f"{key}_p5"] = percentile_5([row[key] for row in rows])
    if used:
        result["codes_per_object"] = result["lm_tokens"] = result["tokens"]
        result["bits_per_object"] = result["tokens"] * math.log2(len(codebook))
        for suffix, kinds in (("", (True, False)), ("_occupied", (True,)), ("_empty", (False,))):
            codes = [code for occupied, code in used if occupied in kinds]
            result |= {
                f"tokens{suffix}": len(codes) / len(rows),
                f"codebook_usage{suffix}": len(set(codes)) / len(codebook),
                f"codebook_perplexity{suffix}": 2 ** entropy_of(codes),
                f"entropy_bits_per_object{suffix}": len(codes) / len(rows) * entropy_of(codes),
            }
    else:
        result |= {"kl_cells_per_group": 4, "id_bits": 13}
        result["kl_bits_per_cell"] = result["kl_bits_per_object"] / (size // 4) ** 3
        for suffix, kinds in (("", (True, False)), ("_occupied", (True,)), ("_empty", (False,))):
            kl = [kl for occupied, kl in groups if occupied in kinds]
            result |= {
                f"groups{suffix}": len(kl) / len(rows),
                f"kl_bits_per_object{suffix}": sum(kl) / len(rows),
                f"kl_bits_per_group{suffix}": np.mean(kl),
            }
    sources = SOURCES if split == "val" and size == 16 else [""] * len(rows)
    result["kinds"] = {}
    thinness = [sum(row["narrow_gaps"] >= least for least in (0.002, 0.015, 0.05)) for row in rows]
    names = ["0: below 0.002", "1: from 0.002", "2: from 0.015", "3: from 0.05"]
    for title, labels in (("sources", sources), ("narrow", [names[number] for number in thinness])):
        result[title] = {}
        for label in sorted(set(labels) - {""}):
            chosen = [row for row, other in zip(rows, labels, strict=True) if other == label]
            result[title][label] = {
                "objects": len(chosen),
                **{key: mean_of(key, chosen) for key in (*ious, "f_score", "chamfer")},
                **{f"{key}_p5": percentile_5([row[key] for row in chosen]) for key in ious},
            }
    result["rows"] = rows
    return result


def assert_same(got: dict, want: dict) -> None:
    """A None by hand is a number that was not worked out."""
    want = {key: value for key, value in want.items() if key != "rows"}
    assert got.keys() - {"per_object"} == want.keys()
    for key, value in want.items():
        if key in ("sources", "kinds", "narrow"):
            assert got[key].keys() == value.keys()
            for label, numbers in value.items():
                numbers = {name: number for name, number in numbers.items() if number is not None}
                found = {name: number for name, number in got[key][label].items() if name in numbers}
                assert found == pytest.approx(numbers, rel=1e-5), label
        elif value is not None:
            assert got[key] == pytest.approx(value, rel=1e-5), key


def test_numbers_of_a_vae_equal_those_by_hand_for_every_set_of_weights(vae_run, sourced_data, tmp_path):
    report = score(vae_run, tmp_path)
    assert list(report["weights"]) == ["ema0.9", "ema0.5", "raw"]
    for label, rate in (("ema0.9", 0.9), ("ema0.5", 0.5), ("raw", None)):
        assert_same(report["weights"][label], by_hand(vae_run, sourced_data, rate))
    ious = {label: part["iou"] for label, part in report["weights"].items()}
    assert len(set(ious.values())) == 3 and 0 < ious["raw"] < 1  # or the test would compare nothing
    raw = report["weights"]["raw"]
    assert raw["sampled_iou"] != raw["iou"] and 0 < raw["f_score"] < 1 and 0 < raw["groups_empty"] < 16
    assert raw["sources"].keys() == {"chairs", "tables", "lamps"}


def test_numbers_of_stage_1_equal_those_by_hand(vq_run, sourced_data, tmp_path):
    report = score(vq_run, tmp_path)
    assert list(report["weights"]) == ["ema0.9999", "raw"]
    assert_same(report["weights"]["ema0.9999"], by_hand(vq_run, sourced_data, 0.9999))
    assert_same(report["weights"]["raw"], by_hand(vq_run, sourced_data, None))
    assert report["weights"]["raw"]["bits_per_object"] == 32 * 5  # 4·4·2 tokens of 32 codes


def test_objects_are_listed_with_name_and_scores(vq_run, sourced_data, tmp_path):
    report = score(vq_run, tmp_path)
    rows = by_hand(vq_run, sourced_data, 0.9999)["rows"]
    listed = list(report["weights"]["ema0.9999"]["per_object"].values())
    assert [item.pop("name") for item in listed] == [f"object {i}" for i in range(7)]
    for got, want in zip(listed, rows, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert "per_object" not in report["weights"]["raw"]


def test_batch_size_does_not_matter(vq_run, tmp_path):
    reports = [score(vq_run, tmp_path / str(size), "--batch_size", size) for size in (1, 4, 100)]
    for report in reports[1:]:
        for label, part in report["weights"].items():
            for key, value in part.items():
                if isinstance(value, float):  # up to voxels that rounding decides
                    assert value == pytest.approx(reports[0]["weights"][label][key], rel=2e-3), key


def table(lines: list[str], title: str) -> dict[str, dict[str, str]]:
    """{label: {column: text}} of a printed table."""
    start = lines.index(f"{title}:") + 1
    end = next((number for number in range(start, len(lines)) if not lines[number]), len(lines))
    columns, *rows = (re.split(r"\s{2,}", line.strip()) for line in lines[start:end])
    return {label: dict(zip(columns, cells, strict=True)) for label, *cells in rows if cells}


def test_the_report_says_what_was_scored_and_the_sheet_is_a_picture(vae_run, sourced_data, capsys):
    assert script.main(["--run", str(vae_run), "--device", "cpu"]) == 0
    path = vae_run / "eval" / "val_step0000020.json"
    report = json.loads(path.read_text())
    assert (report["models"], report["step"], report["split"], report["device"]) == (str(vae_run), 20, "val", "cpu")
    assert report["data_dir"] == str(sourced_data) and report["training_seconds"] > 0
    assert report["versions"]["torch"] == torch.__version__
    with Image.open(path.with_suffix(".png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10
    lines = capsys.readouterr().out.splitlines()
    scores, printed = report["weights"]["ema0.9"], table(lines, "reconstruction")
    row = list(printed["ema0.9"].values())
    assert row[:4] == ["7", *(f"{scores[key]:.4f}" for key in ("iou", "iou_median", "iou_p5"))]
    assert list(printed) == [f"{label}{kind}" for label in ("ema0.9", "ema0.5", "raw") for kind in ("", ", sampled")]
    assert printed["ema0.9, sampled"]["IoU"] == f"{scores['sampled_iou']:.4f}"
    source = scores["sources"]["chairs"]
    assert table(lines, "sources, ema0.9")["chairs"] == {
        "objects": "3",
        "IoU": f"{source['iou']:.4f}",
        "5 %": f"{source['iou_p5']:.4f}",
        "F-score": f"{source['f_score']:.4f}",
        "chamfer, voxels": f"{source['chamfer']:.4f}",
        "sampled IoU": f"{source['sampled_iou']:.4f}",
    }
    kl = table(lines, "KL in bits; an id of ShapeLLM-Omni, for four cells, has 13")
    for kind in ("", "_occupied", "_empty"):
        row = kl["ema0.5" + kind.replace("_", ", ")]
        for column, key in (("groups", "groups"), ("group", "kl_bits_per_group"), ("object", "kl_bits_per_object")):
            assert float(row[column]) == pytest.approx(report["weights"]["ema0.5"][key + kind], rel=1e-2), row
    assert kl["raw, empty"]["cell"] == "-"
    assert not any(line.startswith("codebook") for line in lines)  # there is none


def test_the_codebook_is_printed_with_and_without_empty_tokens(vq_run, tmp_path, capsys):
    scores = score(vq_run, tmp_path)["weights"]["raw"]
    lines = capsys.readouterr().out.splitlines()
    assert list(table(lines, "written for an object")) == ["ema0.9999", "raw"]
    printed = table(lines, "codebook, over all objects and within one")
    assert list(printed) == [
        f"{label}{kind}" for label in ("ema0.9999", "raw") for kind in ("", ", occupied", ", empty")
    ]
    columns = {
        "tokens": "tokens",
        "perplexity": "codebook_perplexity",
        "perplexity/object": "object_perplexity",
        "entropy bits/object": "entropy_bits_per_object",
    }
    for kind in ("", "_occupied", "_empty"):
        row = printed["raw" + kind.replace("_", ", ")]
        for column, key in columns.items():
            if key + kind in scores:
                assert float(row[column]) == pytest.approx(scores[key + kind], rel=1e-2), (kind, column)
            else:
                assert row[column] == "-"


def test_step_split_and_data_can_be_chosen(vq_run, sourced_data, tmp_path):
    assert score(vq_run, tmp_path / "a", "--ckpt", 2)["step"] == 2
    assert score(vq_run, tmp_path / "b", "--ckpt", "best")["step"] == Checkpoints(vq_run).best()
    training = score(vq_run, tmp_path / "c", "--split", "train")
    assert_same(training["weights"]["raw"], by_hand(vq_run, sourced_data, None, "train"))
    assert score(vq_run, tmp_path / "d", "--split", "all")["weights"]["raw"]["objects"] == 19
    other = score(vq_run, tmp_path / "e", "--split", "all", "--data_dir", sourced_data / "shapes_val.npz")
    assert other["weights"]["raw"]["objects"] == 7


def test_exported_weights_are_scored_without_their_run(vq_run, tmp_path, capsys):
    from scripts import export_pretrained

    pretrained, data = tmp_path / "pretrained", tmp_path / "data"
    assert export_pretrained.main(["--run", str(vq_run), "--output_dir", str(pretrained)]) == 0
    data.mkdir()
    np.savez(data / "shapes_val.npz", bits=np.packbits(solid_grids(2, 64, 0).reshape(2, -1), axis=1))
    flags = ["--pretrained", str(pretrained), "--data_dir", str(data), "--device", "cpu"]
    assert script.main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "val_step0000000.json").read_text())
    assert list(report["weights"]) == ["pretrained"]
    assert_same(report["weights"]["pretrained"], by_hand(vq_run, data, 0.9999))
    (pretrained / "decoder.json").unlink()
    assert script.main([*flags, "--output_dir", str(tmp_path / "out")]) == 1
    assert "decoder.json is not there" in capsys.readouterr().err


def test_an_export_that_was_killed_is_gone_on_with_and_another_one_refused(vq_run, tmp_path, capsys):
    from scripts import export_pretrained

    command = ["--run", str(vq_run), "--output_dir", str(tmp_path / "models")]
    assert export_pretrained.main(command) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert len(before) == 6
    for name in ("quantizer.json", "decoder.safetensors"):
        (tmp_path / "models" / name).unlink()
    assert export_pretrained.main([*command, "--raw"]) == 1
    assert ".safetensors exists already, of other models; choose another" in capsys.readouterr().err
    assert len(list((tmp_path / "models").iterdir())) == 4
    assert export_pretrained.main(command) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()} == before
    assert export_pretrained.main(command) == 1
    assert "exists already; choose another" in capsys.readouterr().err


def test_scores_are_told_though_the_disk_is_full(vq_run, tmp_path, monkeypatch, capsys):
    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(script, "atomic_write", fail)
    assert script.main(["--run", str(vq_run), "--output_dir", str(tmp_path), "--device", "cpu"]) == 1
    out, error = capsys.readouterr()
    assert "reconstruction:" in out and error == f"error: {tmp_path}/val_step0000004.json: No space left on device\n"


def test_a_run_and_a_tokenizer_that_are_mixed_up_are_told_apart(vq_run, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "encoder.json").touch()
    (tmp_path / "file").touch()
    rest = ["--data_dir", "x", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):  # exported files beside it make it no other
        (tmp_path / "models" / "ckpts").mkdir()
        script.run_subject(str(tmp_path / "models"), "latest")
    (tmp_path / "models" / "ckpts").rmdir()
    from scripts import export_pretrained

    assert export_pretrained.main(["--run", str(vq_run), "--output_dir", str(vq_run)]) == 1
    assert f"--output_dir {vq_run}: is a run folder; give another" in capsys.readouterr().err
    for flags, message in (
        (["--run", "models"], "--run models: is no run folder, but has models: give it as --pretrained"),
        (["--pretrained", str(vq_run)], "is a run folder: give it as --run"),
        (["--pretrained", "file"], "--pretrained file: is a file. Give a folder of save_pretrained"),
        (["--pretrained", "gone"], "--pretrained gone: there is no such folder. Give a folder of save_pretrained"),
        (["--pretrained", "."], "has neither model.safetensors of save_pretrained nor encoder.json of"),
        (["--run", str(vq_run), "--output_dir", "file"], "file is not a folder. Give another --output_dir"),
    ):
        with contextlib.chdir(tmp_path):
            assert script.main([*rest, *flags]) == 1
        assert message in capsys.readouterr().err


def test_exported_models_for_another_resolution_are_one_clear_error(tmp_path, capsys):
    models = tiny_config(VQ)["models"]
    shape = {"channels": 4, "lattice": [4, 4, 4], "width": 16, "heads": 2}
    models["transformer"] = {"name": "CodebookTransformer", "args": shape}
    pretrained, data = tmp_path / "pretrained", tmp_path / "data"
    pretrained.mkdir()
    for name, spec in models.items():
        (pretrained / f"{name}.json").write_text(json.dumps(spec))
    data.mkdir()
    np.savez(data / "shapes_val.npz", bits=np.packbits(solid_grids(2, 64, 0).reshape(2, -1), axis=1))
    flags = ["--pretrained", str(pretrained), "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
    assert script.main([*flags, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "does not fit grids of resolution 64. Give the --resolution that" in error and "Traceback" not in error
    assert "models.transformer.args.lattice is [4, 4, 4], but the quantizer's tokens have [16, 16, 16]" in error
    assert not (tmp_path / "out").exists()


def test_a_saved_tokenizer_is_scored_with_its_own_resolution(vq_run, sourced_data, tmp_path, capsys):
    from trellis import SparseStructureTokenizer

    SparseStructureTokenizer.from_run(vq_run).save_pretrained(tmp_path / "saved")
    flags = ["--pretrained", str(tmp_path / "saved"), "--data_dir", str(sourced_data), "--device", "cpu"]
    assert script.main([*flags, "--resolution", "999", "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "val_step0000000.json").read_text())
    assert list(report["weights"]) == ["pretrained"]
    assert_same(report["weights"]["pretrained"], by_hand(vq_run, sourced_data, 0.9999))
    (tmp_path / "saved" / "config.json").unlink()
    assert script.main([*flags, "--output_dir", str(tmp_path / "out")]) == 1
    assert "config.json is missing" in capsys.readouterr().err


def test_a_run_of_trellis_is_scored_from_its_config(vae_run, sourced_data, tmp_path, capsys):
    """Its misc file is not ours, so the configuration comes from config.json and the data must be given."""
    (tmp_path / "run" / "ckpts").mkdir(parents=True)
    for path in (vae_run / "ckpts").glob("*coder_step0000020.pt"):
        (tmp_path / "run" / "ckpts" / path.name).write_bytes(path.read_bytes())
    torch.save({"step": 20, "norms": np.ones(3)}, tmp_path / "run" / "ckpts" / "misc_step0000020.pt")
    (tmp_path / "run" / "config.json").write_bytes((vae_run / "config.json").read_bytes())
    assert script.main(["--run", str(tmp_path / "run"), "--device", "cpu"]) == 1
    assert "does not say which data it used; give --data_dir" in capsys.readouterr().err
    report = score(tmp_path / "run", tmp_path / "out", "--data_dir", sourced_data)
    assert list(report["weights"]) == ["raw"]
    assert_same(report["weights"]["raw"], by_hand(vae_run, sourced_data, None))


def test_grids_made_in_another_way_than_those_of_the_run_are_named(sourced_data, tmp_path, capsys):
    bits = np.packbits(solid_grids(4, 16, 0).reshape(4, -1), axis=1)
    for name, (normalization, up_axis) in {"a": ("cube", "y"), "b": ("cube", "z"), "c": ("shapellm", "keep")}.items():
        texts = {"normalization": np.full(4, normalization), "up_axis": np.full(4, up_axis)}
        np.savez(tmp_path / f"{name}.npz", bits=bits, split=np.array(["train"] * 2 + ["val"] * 2), **texts)
    run = trained(tmp_path, tmp_path / "a.npz", tiny_config(max_steps=1, i_eval=100, i_save=1))
    capsys.readouterr()
    for name, noted in (("a", 0), ("b", 0), ("c", 2)):
        score(run, tmp_path / f"out_{name}", "--data_dir", tmp_path / f"{name}.npz")
        said = capsys.readouterr().out
        assert said.count("note: ") == noted
        assert ("normalization of these grids is shapellm, but the models were trained on grids of cube" in said) == (
            name == "c"
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--run", "{tmp}/gone"], "--run {tmp}/gone does not exist; give a run folder"),
        (["--run", "{tmp}"], "--run {tmp} has no complete checkpoint in {tmp}/ckpts; give a run folder"),
        (["--ckpt", "3"], "no complete checkpoint for --ckpt 3; complete steps: 0, 2, 4"),
        (["--data_dir", "{tmp}/gone"], "{tmp}/gone: does not exist"),
        (["--kinds", "{tmp}/gone.csv"], "--kinds {tmp}/gone.csv: cannot be read"),
        (["--data_dir", "{tmp}/train.npz"], "no object is in split 'val'"),
        (["--data_dir", "{tmp}/coarse_val.npz"], "hold grids of resolution 8, but resolution is 16"),
    ],
)
def test_a_mistake_is_one_clear_error_and_writes_nothing(flags, message, vq_run, sourced_data, tmp_path, capsys):
    (tmp_path / "train.npz").write_bytes((sourced_data / "shapes_train.npz").read_bytes())
    np.savez(tmp_path / "coarse_val.npz", bits=np.packbits(solid_grids(2, 8, 0).reshape(2, -1), axis=1))
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert script.main(["--run", str(vq_run), "--output_dir", str(tmp_path / "out"), "--device", "cpu", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(tmp=tmp_path) in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--ckpt", "none"],
        ["--batch_size", "0"],
        ["--split", "test"],
        ["--pretrained", "x", "--data_dir", "y", "--output_dir", "z"],
    ],
)
def test_a_wrong_flag_ends_non_zero(flags):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--run", "x", *flags])
    assert stop.value.code == 2


def test_damaged_weights_are_one_clear_error(vq_run, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "ckpts").mkdir(parents=True)
    for path in (vq_run / "ckpts").glob("*step0000004.pt"):
        (run / "ckpts" / path.name).write_bytes(path.read_bytes())
    decoder = run / "ckpts" / "decoder_step0000004.pt"
    decoder.write_bytes(bytes(decoder.stat().st_size))
    assert script.main(["--run", str(run), "--device", "cpu"]) == 1
    assert f"error: {decoder} is damaged (its sum is not the one it was written with)" in capsys.readouterr().err


# --- an empty code ---


def test_numbers_of_an_empty_code_are_those_of_the_ids_that_the_tokenizer_writes(
    vae_run, sourced_data, tmp_path, capsys
):
    """With two codes for each token; every code and mask is counted by itself."""
    config = tiny_config(VQ, freeze=["encoder", "decoder"], max_steps=2, i_save=2, i_eval=2)
    arguments = {"n_embed": 9, "embed_dim": 4, "latent_channels": 4, "num_codes": 2}
    config["models"]["quantizer"] = {"name": "ResidualVectorQuantizer", "args": {**arguments, "empty_code": True}}
    folder = trained(tmp_path, sourced_data, config, "--load_dir", vae_run)
    scores = score(folder, tmp_path / "out")["weights"]["ema0.9999"]

    tokenizer = SparseStructureTokenizer.from_run(str(folder))
    grids = torch.from_numpy(val_grids(sourced_data))[:, None]
    ids = tokenizer.encode(grids)  # [7, 128]
    octree = Octree((4, 4, 4), 9, 2)
    values = [octree.to_values(own).tolist() for own in ids]
    masks = [value for own in values for value in own if octree.mask(value)]
    codes = [[code for code in ids[:, q::2].flatten().tolist() if code] for q in range(2)]
    tokens = len(codes[0]) / 7
    want = {
        "tokens": tokens,
        "masks": len(masks) / 7,
        "codes_per_object": 2 * tokens,
        "lm_tokens": sum(map(len, values)) / 7,
        "bits_per_object": 2 * tokens * 3 + len(masks) / 7 * math.log2(255),
        "entropy_bits_per_object": tokens * sum(map(entropy_of, codes)) + len(masks) / 7 * entropy_of(masks),
        "codebook_usage": sum(len(set(own)) for own in codes) / 16,
        "codebook_perplexity": 2 ** (sum(map(entropy_of, codes)) / 2),
    }
    assert {name: scores[name] for name in want} == pytest.approx(want)
    assert 0 < tokens < 64 and not any(name.endswith(("_occupied", "_empty")) for name in scores)
    decoded = (tokenizer.decode(ids)[:, 0] > 0).cpu().numpy()
    iou = [compare(own, grid)["iou"] for own, grid in zip(decoded, grids[:, 0].numpy(), strict=True)]
    assert scores["iou"] == pytest.approx(np.mean(iou), rel=1e-5)
    written = table(capsys.readouterr().out.splitlines(), "written for an object")
    assert list(written) == ["ema0.9999", "raw"]
    assert float(written["ema0.9999"]["LM tokens"]) == pytest.approx(want["lm_tokens"], rel=1e-2)


# --- kinds and baselines ---


def val_grids(data: Path, split: str = "val") -> np.ndarray:
    bits = np.load(data / f"shapes_{split}.npz")["bits"]
    return np.unpackbits(bits, axis=1).reshape(-1, 16, 16, 16).astype(bool)


def test_scores_by_kind_are_means_over_their_sources(vq_run, tmp_path, capsys):
    (tmp_path / "kinds.csv").write_text("source,kind\nchairs,furniture\ntables,furniture\nshoes,clothes\n")
    scores = score(vq_run, tmp_path / "out", "--kinds", tmp_path / "kinds.csv")["weights"]["ema0.9999"]
    printed = capsys.readouterr().out
    assert "kinds.csv has no kind for 2 of 7 objects, from 2 sources such as (no source)" in printed
    rows = [
        row
        for row, source in zip(scores["per_object"].values(), SOURCES, strict=True)
        if source in ("chairs", "tables")
    ]
    want = {key: np.mean([row[key] for row in rows]) for key in ("iou", "f_score", "chamfer")}
    want |= {"objects": 5, "iou_p5": percentile_5([row["iou"] for row in rows])}
    assert scores["kinds"].keys() == {"furniture"} and scores["kinds"]["furniture"] == pytest.approx(want)
    lines = printed.splitlines()
    assert table(lines, "kinds, ema0.9999")["furniture"]["IoU"] == f"{want['iou']:.4f}"
    classes = table(lines, "narrow gaps per occupied voxel, ema0.9999")
    assert {label: int(row["objects"]) for label, row in classes.items()} == {
        label: part["objects"] for label, part in scores["narrow"].items()
    }


def test_kinds_of_the_data_are_scored_and_a_table_comes_before_them(vq_run, sourced_data, tmp_path):
    arrays = dict(np.load(sourced_data / "shapes_val.npz"))
    np.savez(tmp_path / "val.npz", **arrays, kind=np.array(["bones", "", "tools", "bones", "", "bones", "tools"]))
    (tmp_path / "kinds.csv").write_text("source,kind\nchairs,seats\n")
    flags = ["--data_dir", tmp_path / "val.npz"]
    alone = score(vq_run, tmp_path / "alone", *flags)["weights"]["ema0.9999"]
    both = score(vq_run, tmp_path / "both", *flags, "--kinds", tmp_path / "kinds.csv")["weights"]["ema0.9999"]
    assert {kind: part["objects"] for kind, part in alone["kinds"].items()} == {"bones": 3, "tools": 2}
    assert {kind: part["objects"] for kind, part in both["kinds"].items()} == {"bones": 1, "seats": 3, "tools": 1}


def test_weights_are_those_of_the_roots_of_the_run(vae_run, sourced_data, tmp_path, monkeypatch):
    """A root of weight 0 is none of the run's training data; other roots have no weights."""
    roots = []
    for number in range(2):
        roots.append(tmp_path / f"{number}_train.npz")
        bits = np.packbits(solid_grids(3 + number, 16, number).reshape(3 + number, -1), axis=1)
        np.savez(roots[-1], bits=bits)
    subject = script.run_subject(str(vae_run), "latest")
    subject.config["dataset"]["args"]["weights"] = [1, 0]
    subject.data_dir = ",".join(map(str, roots))
    monkeypatch.setattr(script, "run_subject", lambda *args: subject)

    def objects(name: str, *flags) -> int:
        return score(vae_run, tmp_path / name, "--split", "train", *flags)["weights"]["raw"]["objects"]

    assert objects("own") == 3
    monkeypatch.chdir(tmp_path)
    assert objects("relative", "--data_dir", ",".join(root.name for root in roots)) == 3
    assert objects("one", "--data_dir", roots[1]) == 4
    assert objects("turned", "--data_dir", f"{roots[1]},{roots[0]}") == 7
    assert objects("other", "--data_dir", sourced_data) == 12


def test_the_twenty_worst_objects_have_a_sheet(vq_run, sourced_data, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(script, "contact_sheet", lambda rows: sheets.append(rows) or np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(script, "WORST", 4)
    flags = ["--run", str(vq_run), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert script.main(flags) == 0
    assert (tmp_path / "val_step0000004_worst.png").is_file()
    (report,) = tmp_path.glob("*.json")
    objects = json.loads(report.read_text())["weights"]["ema0.9999"]["per_object"].values()
    ious = sorted(row["iou"] for row in objects)[:4]
    grids = list(val_grids(sourced_data))
    names = {row["name"]: grid for row, grid in zip(objects, grids, strict=True)}
    assert [caption for *_, caption in sheets[1]] == [
        f"worst: {row['name']}, IoU {row['iou']:.3f}" for row in sorted(objects, key=lambda row: row["iou"])[:4]
    ]
    for (target, decoded, caption), iou in zip(sheets[1], ious, strict=True):
        assert np.array_equal(target, names[caption.split(": ")[1].split(",")[0]])
        assert (target & decoded).sum() / (target | decoded).sum() == pytest.approx(iou, abs=2e-3)


def fitted(training: np.ndarray, lattice: tuple[int, int, int], n_embed: int):
    patterns, neighbors = PatternCounts(lattice), NeighborCounts()
    patterns.add(training)
    neighbors.add(training)
    return patterns.table(n_embed), neighbors.model()


@pytest.mark.parametrize("from_the_run", [True, False])
def test_baselines_have_the_tokens_of_the_models_and_their_training_grids(
    from_the_run, vq_run, sourced_data, tmp_path, capsys
):
    flags = [] if from_the_run else ["--data_dir", sourced_data / "shapes_val.npz"]
    report = score(vq_run, tmp_path, "--baselines", *flags)
    found, grids = report["baselines"], val_grids(sourced_data)
    patterns, model = fitted(val_grids(sourced_data, "train"), (4, 4, 2), 32)
    assert list(found) == ["patterns 4×4×2, 32 ids", "lossless", "deflate"]
    assert {part["training_grids"] for part in found.values()} == {12}
    name, decoded = "patterns 4×4×2, 32 ids", patterns.decode(patterns.encode(grids))
    iou = [compare(predicted, grid)["iou"] for predicted, grid in zip(decoded, grids, strict=True)]
    assert (found[name]["iou"], found[name]["iou_p5"]) == pytest.approx((np.mean(iou), percentile_5(iou)))
    chairs = [value for value, source in zip(iou, SOURCES, strict=True) if source == "chairs"]
    assert found[name]["sources"]["chairs"]["iou"] == pytest.approx(np.mean(chairs))
    assert found["lossless"]["bits_per_object"] == pytest.approx(model.bits(grids).mean())
    assert found["deflate"]["bits_per_object"] == deflated_bits(grids).mean()
    lines = capsys.readouterr().out.splitlines()
    assert table(lines, "reconstruction")[name]["IoU"] == f"{np.mean(iou):.4f}"
    written = table(lines, "written for an object")
    assert written[name]["LM tokens"] == f"{found[name]['lm_tokens']:.1f}" and written["lossless"]["codes"] == "-"
    assert float(written["deflate"]["bits"]) == pytest.approx(found["deflate"]["bits_per_object"], rel=1e-2)


def test_models_without_one_code_per_token_have_tables_too(vae_run, tmp_path):
    assert list(score(vae_run, tmp_path, "--baselines")["baselines"])[:-2] == ["patterns 4×4×4, 8192 ids"]
    encoder = build(tiny_config()["models"]["encoder"])
    several = ResidualVectorQuantizer(n_embed=16, embed_dim=32, latent_channels=4, group=[2, 2, 2], num_codes=2)
    models = {"encoder": encoder, "quantizer": several}
    assert script.tables_of_patterns(models, 16) == [((2, 2, 2), 16), ((4, 4, 4), 16)]


def test_baselines_are_fitted_to_grids_from_all_parts_of_a_large_training_set(vq_run, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MOST_TRAINING_GRIDS", 3)
    seen = []
    fit = Baselines.fit
    monkeypatch.setattr(Baselines, "fit", lambda dataset, rows, *rest: seen.append(rows) or fit(dataset, rows, *rest))
    found = score(vq_run, tmp_path, "--baselines")["baselines"]
    assert seen == [[0, 6, 11]] and found["lossless"]["training_grids"] == 3


def test_baselines_without_training_grids_are_refused_before_anything_is_scored(
    vae_run, sourced_data, tmp_path, capsys
):
    from scripts import export_pretrained

    assert export_pretrained.main(["--run", str(vae_run), "--output_dir", str(tmp_path / "models")]) == 0
    flags = ["--pretrained", str(tmp_path / "models"), "--data_dir", str(sourced_data / "shapes_val.npz")]
    flags += ["--output_dir", str(tmp_path / "out"), "--resolution", "16", "--device", "cpu", "--baselines"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", None)
        assert script.main(flags) == 1
    assert "no object is in split 'train'" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- the parts ---


def test_examples_are_the_worst_the_median_and_the_best_each_once():
    iou = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.0, 1.0])
    picked = script.pick_examples(iou)
    assert [(label, round(iou[number].item(), 1)) for label, number in picked] == [
        ("worst", 0.0),
        ("worst", 0.1),
        ("worst", 0.2),
        ("median", 0.4),
        ("median", 0.5),
        ("median", 0.6),
        ("best", 0.8),
        ("best", 0.9),
        ("best", 1.0),
    ]
    for number in range(1, 12):
        objects = [index for _, index in script.pick_examples(iou[:number])]
        assert len(objects) == len(set(objects)) == min(number, 9)
        assert {int(iou[:number].argmin()), int(iou[:number].argmax())} <= set(objects)
