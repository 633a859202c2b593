"""Scores of a run, against a recomputation object by object in numpy."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VQ, run, solid_grids, tiny_config
from PIL import Image

from scripts import evaluate as script
from trellis.models import build
from trellis.runs.checkpoint import Checkpoints, model_file
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
        result["tokens"] = len(used) // len(rows)
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
    result["sources"] = {}
    for source in sorted(set(sources) - {""}):
        chosen = [row for row, other in zip(rows, sources, strict=True) if other == source]
        result["sources"][source] = {
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
        if key == "sources":
            assert got[key].keys() == value.keys()
            for source, numbers in value.items():
                assert got[key][source] == pytest.approx(numbers, rel=1e-5), source
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
    kl = table(lines, "KL in bits; an id has 13 bits")
    for kind in ("", "_occupied", "_empty"):
        row = kl["ema0.5" + kind.replace("_", ", ")]
        for column, key in (("groups", "groups"), ("group", "kl_bits_per_group"), ("object", "kl_bits_per_object")):
            assert float(row[column]) == pytest.approx(report["weights"]["ema0.5"][key + kind], rel=1e-2), row
    assert kl["raw, empty"]["cell"] == "-"
    assert not any(line.startswith("codebook") for line in lines)  # there is none


def test_the_codebook_is_printed_with_and_without_empty_tokens(vq_run, tmp_path, capsys):
    scores = score(vq_run, tmp_path)["weights"]["raw"]
    printed = table(capsys.readouterr().out.splitlines(), "codebook, over all objects and within one")
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
    assert f"error: {decoder}: not a readable weights file" in capsys.readouterr().err


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
