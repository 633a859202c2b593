"""Tables of patterns, the lossless code and summaries, against counts in plain Python."""

import itertools
import json
import math
import re
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEST_DATA, needs_test_data, solid_grids
from PIL import Image

from benchmarks import baselines as benchmark
from benchmarks import rate_distortion
from trellis.evaluation import baselines
from trellis.evaluation.baselines import (
    NEIGHBORS,
    Baselines,
    NeighborCounts,
    NeighborModel,
    PatternCounts,
    _Decoder,
    _Encoder,
    deflated_bits,
)
from trellis.evaluation.evaluate import Scores
from trellis.evaluation.summary import read_kinds, summarize, summarize_bits
from trellis.tokens.octree import Octree
from trellis.utils.errors import ConfigError


class Grids:
    """A dataset of grids [n, R, R, R] bool."""

    def __init__(self, grids: np.ndarray):
        self.grids = torch.from_numpy(grids)[:, None]

    def get_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"ss": self.grids[torch.from_numpy(indices)].to(torch.uint8)}

    def unpack_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch


def sparse_grids(number: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Random voxels in half of the space, so that blocks of every number of voxels occur, empty ones too."""
    rng = np.random.default_rng(seed)
    return (rng.random((number, *shape)) < 0.3) & (rng.random((number, shape[0], 1, 1)) < 0.5)


# --- table of patterns ---


def blocks_of(grid: np.ndarray, lattice: tuple[int, int, int]) -> list[tuple[int, ...]]:
    x, y, z = (size // blocks for size, blocks in zip(grid.shape, lattice, strict=True))
    return [
        tuple(grid[i * x : (i + 1) * x, j * y : (j + 1) * y, k * z : (k + 1) * z].astype(int).ravel().tolist())
        for i, j, k in np.ndindex(*lattice)
    ]


@pytest.mark.parametrize("shape, lattice", [((6, 4, 8), (3, 2, 4)), ((6, 6, 6), (3, 2, 1)), ((8, 8, 8), (2, 2, 2))])
@pytest.mark.parametrize("n_embed", [2, 9, 40, 100_000])
def test_a_table_has_the_most_frequent_patterns_and_takes_the_nearest(shape, lattice, n_embed, monkeypatch):
    """Blocks of 8, 36 and 64 voxels, met in batches, and some of them more than once."""
    monkeypatch.setattr(baselines, "BYTES_AT_ONCE", 500)  # so that counts are merged between batches
    monkeypatch.setattr(baselines, "ENTRIES_AT_ONCE", 1000)
    training = sparse_grids(12, shape, 1)
    training = np.concatenate([training, training[:5], training[:2]])
    counts = PatternCounts(lattice)
    for start in range(0, len(training), 4):
        counts.add(training[start : start + 4])
    table = counts.table(n_embed)

    met = Counter(block for grid in training for block in blocks_of(grid, lattice) if any(block))
    patterns = sorted(met, key=lambda block: (-met[block], block))[: n_embed - 1]
    assert [tuple(row) for row in table.patterns.astype(int).tolist()] == patterns

    grids = np.concatenate([sparse_grids(5, shape, 2), np.zeros((1, *shape), bool), training[:1]])
    ids = table.encode(grids)
    assert ids.shape == (len(grids), *lattice) and ids.dtype == np.int64
    decoded = table.decode(ids)
    assert decoded.shape == grids.shape
    for grid, own, back in zip(grids, ids, decoded, strict=True):
        for block, number, again in zip(blocks_of(grid, lattice), own.ravel(), blocks_of(back, lattice), strict=True):
            if not any(block):
                assert number == 0 and not any(again)
                continue
            distances = [sum(a != b for a, b in zip(block, pattern, strict=True)) for pattern in patterns]
            assert number == 1 + distances.index(min(distances))
            assert again == patterns[number - 1]
    if n_embed > len(met):
        assert np.array_equal(decoded[-1], training[0])


def test_a_table_is_scored_as_a_tokenizer_with_an_empty_code_is():
    grids = solid_grids(5, 16, 3)
    fitted = Baselines.fit(Grids(solid_grids(8, 16, 2)), range(1, 8), [((4, 4, 4), 20), ((8, 8, 8), 50)])
    assert fitted.training_grids == 7
    scores = fitted.scores(Grids(grids), range(5))
    assert list(scores) == ["patterns 4×4×4, 20 ids", "patterns 8×8×8, 50 ids"]
    for name, lattice in (("patterns 4×4×4, 20 ids", 4), ("patterns 8×8×8, 50 ids", 8)):
        table, found = fitted.tables[name], scores[name]
        ids = table.encode(grids)
        decoded = table.decode(ids)
        iou = [(a & b).sum() / (a | b).sum() for a, b in zip(grids, decoded, strict=True)]
        assert found.objects["iou"].tolist() == pytest.approx(iou) and 0.1 < min(iou) < 1
        assert found.objects["quantization_error"].tolist() == pytest.approx((grids ^ decoded).mean((1, 2, 3)))
        occupied = grids.reshape(5, lattice, 16 // lattice, lattice, 16 // lattice, lattice, -1).any((2, 4, 6))
        assert found.objects["tokens"].tolist() == occupied.sum((1, 2, 3)).tolist()
        assert np.array_equal(found.counts, np.bincount(ids[ids > 0] - 1, minlength=table.n_embed - 1))
        lengths = Octree(table.lattice, table.n_embed).lengths(ids.reshape(5, -1))
        assert found.objects["masks"].tolist() == lengths.masks.tolist()
        means = summarize(found, [])
        assert means["lm_tokens"] == pytest.approx((lengths.masks + lengths.codes).mean())


# --- the lossless code ---


def probability_of(training: np.ndarray, grid: np.ndarray, place: tuple[int, ...], known: dict) -> Fraction:
    """The probability, in 65536ths, that a voxel is occupied, from the definition."""
    if not known:
        for other in training:
            for spot in np.ndindex(other.shape):
                full = neighbors(other, spot)
                for key in (full, full[:13]):
                    met = known.setdefault(key, [0, 0])
                    met[0] += 1
                    met[1] += int(other[spot])
    full = neighbors(grid, place)
    n, ones = known.get(full, [0, 0])
    m, near_ones = known.get(full[:13], [0, 0])
    prior = Fraction(2 * near_ones + 1, 2 * m + 2)
    share = (ones + 2 * prior) / (n + 2)
    return Fraction(min(max(round(share * 65536), 1), 65535), 65536)


def neighbors(grid: np.ndarray, place: tuple[int, ...]) -> tuple[bool, ...]:
    values = []
    for step in NEIGHBORS:
        spot = tuple(n + d for n, d in zip(place, step, strict=True))
        inside = all(0 <= n < size for n, size in zip(spot, grid.shape, strict=True))
        values.append(inside and bool(grid[spot]))
    return tuple(values)


def fitted_model(training: np.ndarray) -> NeighborModel:
    counts = NeighborCounts()
    for start in range(0, len(training), 2):
        counts.add(training[start : start + 2])
    return counts.model()


def test_neighbors_come_before_their_voxel_each_once():
    assert len(set(NEIGHBORS)) == 22 and all(step < (0, 0, 0) for step in NEIGHBORS)
    assert {step for step in itertools.product((-1, 0, 1), repeat=3) if step < (0, 0, 0)} == set(NEIGHBORS[:13])


def test_code_lengths_are_those_of_the_definition():
    training = np.concatenate([solid_grids(3, 8, 0), sparse_grids(2, (8, 8, 8), 1)])
    grids = np.concatenate([solid_grids(2, 8, 5), sparse_grids(1, (8, 8, 8), 6), np.zeros((1, 8, 8, 8), bool)])
    known: dict = {}
    want = []
    for grid in grids:
        bits = 0.0
        for place in np.ndindex(grid.shape):
            p = probability_of(training, grid, place, known)
            bits -= math.log2(p if grid[place] else 1 - p)
        want.append(bits)
    model = fitted_model(training)
    assert model.bits(grids).tolist() == pytest.approx(want, rel=1e-12)
    assert want[0] < 0.5 * 512  # the model knows something, or the test would say little


def test_grids_come_back_from_their_code_which_is_as_short_as_it_should_be():
    """Shells as those in training, noise that the model does not expect, and grids without a voxel or full of them."""
    model = fitted_model(solid_grids(20, 16, 0))
    grids = np.concatenate(
        [
            solid_grids(4, 16, 9),
            sparse_grids(2, (16, 16, 16), 3),
            np.zeros((1, 16, 16, 16), bool),
            np.ones((1, 16, 16, 16), bool),
        ]
    )
    for grid, bits in zip(grids, model.bits(grids), strict=True):
        code = model.compress(grid)
        assert np.array_equal(model.decompress(code, 16), grid)
        assert -8 < 8 * len(code) - bits < 16 + 0.004 * bits
    assert len(model.compress(grids[6])) <= 2


def coded(bits: list[int], probabilities: list[int]) -> bytes:
    encoder = _Encoder()
    for bit, probability in zip(bits, probabilities, strict=True):
        encoder.write(bool(bit), probability)
    code = encoder.finish()
    decoder = _Decoder(code)
    assert [decoder.read(probability) for probability in probabilities] == bits
    return code


def test_every_short_sequence_of_bits_comes_back():
    for length in range(11):
        for bits in itertools.product((0, 1), repeat=length):
            for probabilities in ([1] * length, [65535] * length, [40000, 3, 65535] * 4):
                coded(list(bits), probabilities[:length])


def test_long_sequences_of_bits_come_back_and_take_their_length():
    """Likely and unlikely ones; zeros alone and ones alone, which drive the interval to its ends."""
    rng = np.random.default_rng(0)
    for likely in (0.0, 0.02, 0.5, 1.0):
        for scale in (1, 30, 65535):
            probabilities = rng.integers(1, scale + 1, 4000)
            bits = (rng.random(4000) < likely).astype(int)
            costs = np.where(bits, probabilities, 65536 - probabilities) / 65536
            code = coded(bits.tolist(), probabilities.tolist())
            assert abs(8 * len(code) + np.log2(costs).sum()) < 32 + 0.004 * -np.log2(costs).sum()


def test_a_carry_runs_through_digits_of_255():
    """Probabilities close to a bound of the interval make runs of that digit, which a later bit turns over."""
    met = False
    for seed in range(300):
        rng = np.random.default_rng(seed)
        encoder, probabilities = _Encoder(), []
        bits: list[int] = []
        for _ in range(60):  # stay at the upper end of the interval
            bits.append(0)
            probabilities.append(int(rng.integers(60000, 65536)))
            encoder.write(False, probabilities[-1])
        met |= b"\xff\xff" in bytes(encoder.digits)
        for bit in (1, 0, 1, 1):
            bits.append(bit)
            probabilities.append(int(rng.integers(1, 65536)))
        coded(bits, probabilities)
    assert met


def test_deflate_is_measured_on_packed_bits():
    grids = solid_grids(3, 16, 0)
    for grid, bits in zip(grids, deflated_bits(grids), strict=True):
        packed = np.packbits(grid).tobytes()
        assert bits == 8 * (len(zlib.compress(packed, 9)) - 6)  # without header and checksum


def test_bits_are_those_of_model_and_deflate_in_order():
    grids = solid_grids(70, 8, 1)
    fitted = Baselines.fit(Grids(grids), range(70), [])
    picked = [69, 3, *range(10, 50)]
    bits = fitted.bits(Grids(grids), picked)
    assert bits["lossless"].tolist() == fitted.model.bits(grids[picked]).tolist()
    assert bits["deflate"].tolist() == deflated_bits(grids[picked]).tolist()


# --- summaries ---


def test_scores_by_kind_and_by_narrow_gaps():
    objects = {
        "iou": [0.1, 0.5, 0.9, 0.7, 0.3],
        "tokens": [1, 2, 3, 4, 5],
        "masks": [1, 1, 1, 1, 6],
        "narrow_gaps": [0.0, 0.0019, 0.002, 0.06, 0.05],
    }
    scores = Scores(
        {name: torch.tensor(values, dtype=torch.float64) for name, values in objects.items()},
        counts=torch.tensor([10, 5]),
        masks=torch.tensor([4, 6] + [0] * 253),
    )
    summary = summarize(scores, ["a", None, "b", "a", "b"], ["bones", "bones", None, "tools", "bones"])
    assert summary["iou_median"] == 0.5 and summary["iou_p5"] == pytest.approx(0.14)
    assert summary["sources"].keys() == {"a", "b"} and summary["kinds"].keys() == {"bones", "tools"}
    assert summary["kinds"]["bones"] == pytest.approx(
        {"objects": 3, "iou": 0.3, "iou_p5": 0.12, "tokens": 8 / 3, "masks": 8 / 3}
    )
    assert {label: part["objects"] for label, part in summary["narrow"].items()} == {
        "0: below 0.002": 2,
        "1: from 0.002": 1,
        "3: from 0.05": 2,
    }
    assert summary["narrow"]["3: from 0.05"]["iou"] == pytest.approx(0.5)
    assert summary["lm_tokens"] == pytest.approx(3 + 2)
    bits = summarize_bits(torch.tensor([1.0, 2, 6, 3, 3], dtype=torch.float64), [None] * 5, ["x", "y", "x", None, "y"])
    assert bits == {
        "objects": 5,
        "bits_per_object": 3.0,
        "bits_per_object_median": 3.0,
        "sources": {},
        "kinds": {"x": {"objects": 2, "bits_per_object": 3.5}, "y": {"objects": 2, "bits_per_object": 2.5}},
    }


def test_kinds_are_read_from_a_table(tmp_path):
    path = tmp_path / "kinds.csv"
    path.write_text('\ufeffsource,note, kind\n"a, b/c",x, anatomy \nd/e,,tools\nd/e,,tools\n', encoding="utf-8")
    assert read_kinds(str(path)) == {"a, b/c": "anatomy", "d/e": "tools"}


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read (No such file or directory); give a CSV table with the columns source and kind"),
        (b"", "has no column source, only none"),
        (b"source,sort\na,b\n", "has no column kind, only source, sort"),
        (b"source,kind\na,b\nc\n", "line 3 lacks a kind"),
        (b"source,kind\na,b\n,c\n", "line 3 lacks a source"),
        (b"source,kind\na,b\na,c\n", "line 3 says c of a, an earlier one b"),
        (b"source,kind\na, b,c\n", "line 2 has more than 2 values; put a text with a comma into quotes"),
        (b"source,kind,kind\na,b,c\n", "has two columns kind; leave one out"),
        (b"source,kind\n\xff\xfe,b\n", "is not a CSV table"),
        (b'source,kind\n"a,b\n', "is not a CSV table"),
    ],
)
def test_a_wrong_table_of_kinds_is_one_clear_error(text, message, tmp_path):
    path = tmp_path / "kinds.csv"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        read_kinds(str(path))
    assert str(error.value).startswith(f"--kinds {path}: ") and message in str(error.value)


# --- the benchmark and the picture ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, dict]:
    """The folder of a run of the benchmark on 16³ grids, and its JSON file."""
    folder = tmp_path_factory.mktemp("measured")
    for split, number in (("train", 9), ("val", 4)):
        bits = np.packbits(solid_grids(number, 16, number).reshape(number, -1), axis=1)
        np.savez(folder / f"shapes_{split}.npz", bits=bits, source=np.array(["a", "b", "a", "c", "a"] * 2)[:number])
    (folder / "kinds.csv").write_text("source,kind\na,bones\nb,tools\n")
    flags = ["--data_dir", str(folder / "shapes_train.npz"), "--eval_dir", f"val={folder / 'shapes_val.npz'}"]
    flags += ["--kinds", str(folder / "kinds.csv"), "--table", "4:16", "--table", "2,4,8:64", "--resolution", "16"]
    benchmark.main([*flags, "--output", str(folder / "baselines.md")])
    return folder, json.loads((folder / "baselines.json").read_text())


def test_the_benchmark_reports_each_baseline_on_each_kind(measured):
    folder, result = measured
    grids = {split: np.load(folder / f"shapes_{split}.npz")["bits"] for split in ("train", "val")}
    train, val = (np.unpackbits(bits, axis=1).reshape(-1, 16, 16, 16).astype(bool) for bits in grids.values())
    fitted = Baselines.fit(Grids(train), range(9), [((4, 4, 4), 16), ((2, 4, 8), 64)])
    names = [*fitted.tables, "lossless", "deflate"]
    rows = {(row[0], row[1]): row[2:] for row in result["tables"][0]["rows"]}
    assert list(rows) == [(f"val{kind}", name) for name in names for kind in ("", ", bones", ", tools")]
    for name, scores in fitted.scores(Grids(val), range(4)).items():
        found = summarize(scores, [])
        keys = ("objects", "iou", "iou_median", "iou_p5", "codes_per_object", "lm_tokens")
        bits = [found[key] / 1e3 for key in ("bits_per_object", "entropy_bits_per_object")]
        assert rows["val", name] == pytest.approx([*(found[key] for key in keys), *bits])
        assert rows["val, bones", name][:2] == pytest.approx([2, scores.objects["iou"][[0, 2]].mean().item()])
    written = np.mean([8 * len(fitted.model.compress(grid)) for grid in val]) / 1e3
    ideal = fitted.model.bits(val).mean() / 1e3
    assert rows["val", "lossless"] == pytest.approx([4, 1.0, None, None, None, None, written, ideal])
    classes = {row[1]: row[2:] for row in result["tables"][1]["rows"]}
    numbers = classes.pop("number of objects")
    assert sum(numbers) == 4 and classes.keys() == fitted.tables.keys()
    for name, ious in classes.items():
        assert sum(n * iou for n, iou in zip(numbers, ious, strict=True) if n) == pytest.approx(
            4 * rows["val", name][1]
        )
        assert [iou is None for iou in ious] == [n == 0 for n in numbers]
    assert str(folder) not in json.dumps(result["tables"]) + json.dumps(result["notes"])


def test_the_benchmark_takes_the_kinds_of_the_data(tmp_path):
    bits = np.packbits(solid_grids(4, 16, 4).reshape(4, -1), axis=1)
    np.savez(tmp_path / "shapes_val.npz", bits=bits, source=np.array(list("abab")), kind=np.array(["x", "x", "y", ""]))
    np.savez(tmp_path / "shapes_train.npz", bits=bits)
    (tmp_path / "kinds.csv").write_text("source,kind\nb,tools\n")
    flags = ["--data_dir", str(tmp_path / "shapes_train.npz"), "--eval_dir", f"val={tmp_path / 'shapes_val.npz'}"]
    flags += ["--table", "4:16", "--resolution", "16", "--output", str(tmp_path / "out.md")]
    for more, kinds in (
        ([], {"x": 2, "y": 1}),
        (["--kinds", str(tmp_path / "kinds.csv")], {"x": 1, "y": 1, "tools": 2}),
    ):
        benchmark.main([*flags, *more])
        rows = json.loads((tmp_path / "out.json").read_text())["tables"][0]["rows"]
        found = {row[0]: row[2] for row in rows if row[1] == "deflate"}
        assert found == {"val": 4, **{f"val, {kind}": number for kind, number in kinds.items()}}


def test_the_benchmark_refuses_tables_that_do_not_fit_before_it_reads_grids(tmp_path):
    flags = ["--data_dir", str(tmp_path / "none.npz"), "--eval_dir", f"val={tmp_path / 'none.npz'}"]
    with pytest.raises(ConfigError, match="--table 4,4,5: 64 voxels do not divide into 5 blocks"):
        benchmark.main([*flags, "--table", "4,4,5:16"])


def test_forms_of_tokens_are_drawn_beside_baselines_and_published_figures(measured, tmp_path, capsys):
    folder, result = measured
    scores = {"iou": 0.9, "lm_tokens": 20.0, "bits_per_object": 2e3, "entropy_bits_per_object": 1e3}
    report = {"weights": {"averaged": scores, "raw": {**scores, "iou": 0.1}}}
    (tmp_path / "val.json").write_text(json.dumps(report))
    flags = ["--report", f"new={tmp_path / 'val.json'}", "--baselines", str(folder / "baselines.json")]
    rate_distortion.main([*flags, "--output", str(tmp_path / "forms.png")])
    drawn = json.loads((tmp_path / "forms.json").read_text())
    rows = {row[0]: row[1:] for row in drawn["tables"][0]["rows"]}
    assert rows["new"] == ["tokenizer", 20, 2, 1, 0.9]
    baselines = {row[1]: row for row in result["tables"][0]["rows"] if row[0] == "val"}
    for name, row in baselines.items():
        assert rows[name] == ["baseline", *row[7:], row[3]]
    assert rows["SuperVoxelGPT, as stated, other grids"][0] == "published" and len(rows) == 1 + len(baselines) + 1
    assert "not comparable" in " ".join(drawn["notes"])
    with Image.open(tmp_path / "forms.png") as picture:
        assert picture.size == (1800, 600)
    for flags, message in (
        (["--report", "new"], "--report new: give NAME=FILE with a JSON file that evaluate.py wrote"),
        (["--report", f"x={folder / 'baselines.json'}"], "baselines.json: give NAME=FILE"),
        (["--baselines", str(tmp_path / "val.json")], "val.json: is no JSON file of baselines.py"),
        (["--baselines", str(folder / "baselines.json"), "--grids", "x"], "has no such grids, only val, val, bones"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            rate_distortion.main([*flags, "--output", str(tmp_path / "other.png")])
    assert not (tmp_path / "other.png").exists()


# --- real grids ---


@needs_test_data
def test_figures_on_real_grids():
    def grids(name: str, number: int | None = None) -> np.ndarray:
        bits = np.load(TEST_DATA / "data" / f"voxels64_{name}.npz")["bits"][:number]
        return np.unpackbits(bits, axis=1).reshape(-1, 64, 64, 64).astype(bool)

    train, val = grids("train", 500), grids("val", 100)
    fitted = Baselines.fit(Grids(train), range(500), [((16, 16, 16), 8192)])
    scores = summarize(fitted.scores(Grids(val), range(100))["patterns 16×16×16, 8192 ids"], [])
    lossless = fitted.bits(Grids(val), range(100))["lossless"].mean().item()
    assert (scores["iou"], scores["tokens"], lossless) == pytest.approx((0.927264, 584.49, 3531.897), rel=1e-5)
    code = fitted.model.compress(val[0])
    assert np.array_equal(fitted.model.decompress(code, 64), val[0])
