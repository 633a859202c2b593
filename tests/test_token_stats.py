"""Numbers of tokens/stats.py against sets whose entropies are known and against plain counting; and the script."""

import importlib.util
import itertools
import json
import lzma
import math
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config

from trellis.tokenizer import SparseStructureTokenizer
from trellis.tokens import stats
from trellis.tokens.octree import Octree
from trellis.tokens.sparse import morton_order, to_sparse
from trellis.tokens.stats import TokenSet
from trellis.tokens.stats_report import CONTEXTS
from trellis.utils.errors import ConfigError

needs_plots = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


def token_set(ids, lattice, n_embed, codes=1, empty=None, objects=None) -> TokenSet:
    ids = np.array(ids, dtype=np.int32)
    empty = None if empty is None else np.array(empty)
    return TokenSet(ids, np.arange(len(ids)) if objects is None else np.array(objects), lattice, codes, n_embed, empty)


def plug_in(tokens: TokenSet) -> dict[str, float]:
    return {name: entry["plug_in"] for name, entry in stats.conditional_entropies(tokens).items()}


# --- entropies that are known -----------------------------------------------------------------------------------


def test_all_objects_there_are_carry_log2_k_bits_whatever_is_known():
    """Every object of 1×2×2 positions once: ids are uniform and independent, exactly."""
    tokens = token_set(list(itertools.product(range(4), repeat=4)), (1, 2, 2), 4)
    for name, bits in plug_in(tokens).items():
        assert bits == pytest.approx(2, abs=1e-12), name
    book = stats.codebook_stats(tokens)
    assert book["usage"] == 1 and book["entropy"] == 2 and book["perplexity"] == 4
    assert book["coverage"] == [{"codes": n, "share": n / 4} for n in (1, 2, 4)]


def test_a_periodic_sequence_is_known_from_the_id_before():
    """012012… with a random phase: log2 3 bits for the first id, none for the rest."""
    tokens = token_set([[(phase + i) % 3 for i in range(12)] for phase in range(3)], (1, 1, 12), 3)
    bits = plug_in(tokens)
    for name in ("nothing", "place", "neighbour_x"):
        assert bits[name] == pytest.approx(math.log2(3), abs=1e-12), name
    for name in ("previous_raster", "neighbour_z", "neighbours_xyz"):
        assert bits[name] == pytest.approx(math.log2(3) / 12, abs=1e-12), name


def test_a_constant_carries_nothing():
    tokens = token_set([[3] * 8] * 4, (2, 2, 2), 5)
    assert set(plug_in(tokens).values()) == {0.0}
    book = stats.codebook_stats(tokens)
    assert book["entropy"] == 0 and book["perplexity"] == 1 and book["usage"] == 0.2
    assert book["object_perplexity"] == {"mean": 1, "median": 1, "p5": 1, "p95": 1}


def test_a_markov_chain_has_its_entropy_rate():
    """Two states that change with probability 1/4, each sequence of 5 as often as it is likely."""
    sequences = []
    for ids in itertools.product((0, 1), repeat=5):
        changes = sum(a != b for a, b in itertools.pairwise(ids))
        sequences += [ids] * 3 ** (4 - changes)  # of 2·4⁴ objects
    assert len(sequences) == 2 * 4**4
    rate = 2 - 0.75 * math.log2(3)  # entropy of (1/4, 3/4)
    bits = plug_in(token_set(sequences, (1, 1, 5), 2))
    assert [bits["nothing"], bits["place"]] == pytest.approx([1, 1])
    assert bits["previous_raster"] == pytest.approx((1 + 4 * rate) / 5, abs=1e-12)


def test_each_axis_has_its_own_neighbor():
    """Along y ids repeat; along x and z they are independent. Objects are all there are."""
    rows = []
    for a, b, c, d in itertools.product(range(2), repeat=4):  # ids at (x, z)
        rows.append([a, b, a, b, a, b, c, d, c, d, c, d])  # [2, 3, 2]
    bits = plug_in(token_set(rows, (2, 3, 2), 2))
    assert [bits[name] for name in ("nothing", "neighbour_x", "neighbour_z")] == pytest.approx([1, 1, 1])
    assert [bits[name] for name in ("neighbour_y", "neighbours_xyz")] == pytest.approx([1 / 3, 1 / 3])


def test_morton_and_raster_order_know_different_ids():
    """Ids equal within a pair along Morton's curve, and independent between pairs: 1 bit for each pair."""
    lattice = (2, 2, 2)
    order = morton_order(lattice).numpy()
    rows = []
    for pairs in itertools.product((0, 1), repeat=4):
        row = np.empty(8, dtype=int)
        row[order] = np.repeat(pairs, 2) + np.tile([0, 2], 4)  # 0 or 1, then 2 or 3 accordingly
        rows.append(row)
    bits = plug_in(token_set(rows, lattice, 4))
    assert bits["previous_morton"] == pytest.approx(0.5, abs=1e-12)


def test_the_codes_of_a_token_are_measured_one_by_one():
    """Two codes a token: the second is the first's double; the first is uniform in 0, 1 and independent."""
    rows = [[value for code in codes for value in (code, 2 * code)] for codes in itertools.product((0, 1), repeat=3)]
    tokens = token_set(rows, (1, 1, 3), 4, codes=2)
    bits = plug_in(tokens)
    # 1 bit each, not the 1.5 of 0, 0, 1, 2 mixed.
    assert [bits["nothing"], bits["neighbour_z"]] == pytest.approx([1, 1])
    assert [bits["previous_raster"], bits["previous_morton"]] == pytest.approx([0.5, 0.5])
    assert stats.codebook_stats(tokens)["entropy"] == pytest.approx(1)
    # 0 and 1 of the first, 0 and 2 of the second code, of four each.
    assert stats.codebook_stats(tokens)["usage"] == 0.5


# --- the model that is tested on other objects ----------------------------------------------------------------------


def sequence_contexts(ids: tuple, place: int) -> dict[str, list[tuple]]:
    """The same contexts as stats.contexts, for a lattice of 2×2×2, from coarse to fine."""
    x, y, z = place // 4, place // 2 % 2, place % 2
    order = morton_order((2, 2, 2)).tolist()
    at = order.index(place)
    near = {"x": ids[place - 4] if x else None, "y": ids[place - 2] if y else None, "z": ids[place - 1] if z else None}
    return {
        "nothing": [()],
        "place": [(), (place,)],
        "previous_raster": [(), (ids[place - 1] if place else None,)],
        "previous_morton": [(), (ids[order[at - 1]] if at else None,)],
        **{f"neighbour_{axis}": [(), (near[axis],)] for axis in "xyz"},
        "neighbours_xyz": [(), (near["z"],), (near["z"], near["y"]), (near["z"], near["y"], near["x"])],
    }


def witten_bell(train: list[tuple], test: tuple, name: str, n_embed: int) -> float:
    """Bits of an object, by the formula in the docstring of stats.conditional_entropies, counted plainly."""
    seen = defaultdict(Counter)
    for ids in train:
        for place, code in enumerate(ids):
            for context in sequence_contexts(ids, place)[name]:
                seen[context][code] += 1
    bits = 0.0
    for place, code in enumerate(test):
        p = 1 / n_embed
        for context in sequence_contexts(test, place)[name]:
            counts = seen[context]
            if counts:
                p = (counts[code] + len(counts) * p) / (counts.total() + len(counts))
        bits -= math.log2(p)
    return bits


@pytest.mark.parametrize("number", [2, 4, 13])
def test_held_out_bits_are_those_of_plain_counting(number):
    rng = np.random.default_rng(number)
    rows = rng.integers(0, 3, (number, 8)) * rng.integers(0, 2, (number, 8))
    tokens = token_set(rows, (2, 2, 2), 6)
    folds = np.arange(number) % min(5, number)
    rows = [tuple(row) for row in rows.tolist()]
    for name, entry in stats.conditional_entropies(tokens).items():
        bits = [
            witten_bell([rows[j] for j in range(number) if folds[j] != folds[i]], rows[i], name, 6)
            for i in range(number)
        ]
        assert entry["held_out"] == pytest.approx(np.mean(bits) / 8), name
        assert entry["bits_per_object"]["median"] == pytest.approx(np.median(bits)), name
        assert entry["contexts"] == len({sequence_contexts(row, i)[name][-1] for row in rows for i in range(8)}), name


@pytest.mark.parametrize("name", CONTEXTS)
def test_held_out_probabilities_add_up_to_one(name):
    """Over all objects that there could be. In plain counting, which the test above compares with."""
    train = [(0, 1, 0, 0, 1, 1, 0, 1), (1, 1, 0, 0, 0, 0, 0, 0)]
    bits = [witten_bell(train, ids, name, 2) for ids in itertools.product((0, 1), repeat=8)]
    assert sum(2.0**-each for each in bits) == pytest.approx(1)


def test_with_many_objects_both_estimates_meet_at_the_entropy_rate():
    """A chain of 8 states with random transitions: the plug-in from below, held-out from above, both within 1 %."""
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(8, 0.5), size=8)
    stationary = np.linalg.matrix_power(transitions, 200)[0]
    rate = -(stationary[:, None] * transitions * np.log2(transitions)).sum()
    first = -(stationary * np.log2(stationary)).sum()
    state, rows = rng.choice(8, 2000, p=stationary), []
    for _ in range(64):
        rows.append(state)
        state = (rng.random((2000, 1)) > transitions[state].cumsum(1)).sum(1)
    truth = (first + 63 * rate) / 64
    entry = stats.conditional_entropies(token_set(np.stack(rows, 1), (1, 1, 64), 8))["previous_raster"]
    assert entry["plug_in"] < entry["held_out"]
    assert entry["plug_in"] == pytest.approx(truth, rel=0.01) and entry["held_out"] == pytest.approx(truth, rel=0.01)


def test_counting_is_fooled_by_contexts_seen_once_but_held_out_is_not():
    """Independent uniform ids, K = 4096 contexts, 8000 ids: log2 K bits, whatever is known."""
    rows = np.random.default_rng(0).integers(0, 4096, (125, 64))
    entry = stats.conditional_entropies(token_set(rows, (4, 4, 4), 4096))["previous_raster"]
    assert entry["plug_in"] < 2 and 12 <= entry["held_out"] < 13.5


def test_copies_of_an_object_do_not_give_it_away():
    """Ten copies of two random objects: coded from the other object alone, ids that it has not cost no less."""
    rows = np.repeat([range(0, 8), range(8, 16)], 10, axis=0)
    entry = stats.conditional_entropies(token_set(rows, (2, 2, 2), 16, objects=[0] * 10 + [1] * 10))["nothing"]
    # Eight ids in ten copies: n = 80, d = 8, and an unseen id has d/(n + d) of 1/16.
    assert entry["held_out"] == pytest.approx(-math.log2(8 / 88 / 16))


def test_a_single_object_leaves_nothing_to_test_on():
    entries = stats.conditional_entropies(token_set([[0, 1]] * 3, (1, 1, 2), 2, objects=["a"] * 3))
    assert all(entry["held_out"] is entry["bits_per_object"] is None for entry in entries.values())


# Of the set below, by a program that looked every id up in counts of its own: plug_in, held_out, p95 of an object,
# contexts.
COUNTED = {
    "nothing": (6.28256842006882, 11.059082381528048, 807.5148758771024, 2),
    "place": (2.250490608105905, 10.306418925505364, 793.7484697788864, 64),
    "previous_raster": (1.8039238319123516, 11.077279237747959, 815.3138231009219, 395),
    "previous_morton": (1.792654271974782, 11.061381127766941, 815.9565240385547, 395),
    "neighbour_x": (2.489200259017917, 11.082513430065523, 815.8334928499623, 298),
    "neighbour_y": (2.4948545274449763, 11.101971358591316, 817.9428186915826, 308),
    "neighbour_z": (3.5704205817651022, 11.247281291471182, 831.109479298318, 207),
    "neighbours_xyz": (0.48478307967086937, 11.375897570687032, 842.3026125001145, 591),
}


def test_two_codes_a_token_of_65536_each():
    """Contexts of three tokens and an id have more than 2⁶³ combinations. Objects repeat."""
    rng = np.random.default_rng(7)
    ids = np.where(rng.random((12, 64)) < 0.5, rng.integers(0, 65536, (12, 64)), rng.integers(0, 9, 64))
    tokens = token_set(ids, (4, 4, 2), 65536, codes=2, objects=rng.integers(0, 7, 12))
    for name, entry in stats.conditional_entropies(tokens).items():
        found = entry["plug_in"], entry["held_out"], entry["bits_per_object"]["p95"], entry["contexts"]
        assert found == pytest.approx(COUNTED[name], rel=1e-12), name


@pytest.mark.parametrize("largest_table", [0, 10**8])
@pytest.mark.parametrize("different", [3, 700])
def test_combinations_are_numbered_in_order(different, largest_table, monkeypatch):
    """A few many times over, and many once each: all ways to find them, in parts."""
    monkeypatch.setattr(stats, "LARGEST_TABLE", largest_table)
    monkeypatch.setattr(stats, "VALUES_AT_ONCE", 50)
    rng = np.random.default_rng(0)
    digits = [(rng.integers(0, different, (40, 20)), different), (rng.integers(0, 2, (40, 20)), 2)]
    numbers, found = stats._numbered(digits)
    rows = np.stack([values.ravel() for values, _ in digits], 1)
    unique, inverse = np.unique(rows, axis=0, return_inverse=True)
    assert np.array_equal(np.stack(found, 1), unique) and np.array_equal(numbers.ravel(), inverse.ravel())


@pytest.mark.parametrize("number", [1, 2, 9, 1000])
def test_percentiles_of_counts_are_those_of_numpy(number):
    values = np.random.default_rng(number).geometric(0.1, number)
    described = stats._describe_runs(np.bincount(values), 5)
    wanted = stats.summary(values)
    assert {name: described[name] for name in wanted} == pytest.approx(wanted, rel=1e-14)
    assert described["per_object"] == number / 5 and described["longest"] == values.max()


# --- lengths and sizes ----------------------------------------------------------------------------------------------


@pytest.fixture
def sparse_set() -> TokenSet:
    rng = np.random.default_rng(0)
    empty = rng.integers(0, 3, 64)
    return token_set(
        np.where(rng.random((20, 64)) < rng.random((20, 1)), rng.integers(0, 9, (20, 64)), empty),
        (4, 4, 2),
        9,
        codes=2,
        empty=empty,
    )


def test_sparse_lengths_are_those_of_the_sparse_form(sparse_set):
    for name, order in (("raster", None), ("morton", morton_order((4, 4, 2), 2))):
        expected = [len(to_sparse(row, sparse_set.empty_ids, 9, order)) for row in sparse_set.ids]
        assert stats.sparse_lengths(sparse_set, name).tolist() == expected


def test_runs_are_those_of_itertools(sparse_set):
    results = stats.run_stats(sparse_set)
    for name in stats.ORDERS:
        equal, empty = [], []
        for row in sparse_set.ids:
            row, gone = row[sparse_set.order(name)], sparse_set.empty_ids[sparse_set.order(name)]
            equal += [len(list(run)) for _, run in itertools.groupby(map(tuple, row.reshape(-1, 2)))]
            empty += [len(list(run)) for is_empty, run in itertools.groupby(row == gone) if is_empty]
        for kind, lengths in (("equal", equal), ("empty", empty)):
            runs = results[name][kind]
            assert runs["per_object"] == len(lengths) / 20
            assert runs["mean"] == pytest.approx(np.mean(lengths)) and runs["median"] == np.median(lengths)
            assert runs["longest"] == max(lengths)
            assert Counter(n.bit_length() - 1 for n in lengths) == Counter(dict(enumerate(runs["doubling"])))


def test_objects_without_empty_ids_have_no_empty_runs():
    runs = stats.run_stats(token_set([[1, 1, 2, 1]], (1, 2, 2), 3, empty=[0] * 4))["raster"]
    assert runs["empty"] == {"per_object": 0.0, "longest": 0, "doubling": []}
    assert runs["equal"]["doubling"] == [2, 1]


def test_shares_of_empty_ids():
    tokens = token_set([[5, 6, 5, 1], [5, 6, 2, 6]], (1, 1, 4), 8, empty=[5, 6, 5, 6])
    occupied = np.array([[False, False, True, True], [False, True, True, False]])
    result = stats.empty_stats(tokens, occupied)
    assert result["share"] == {"mean": 0.75, "median": 0.75, "p5": 0.75, "p95": 0.75} and result["different"] == 2
    assert result["places_without_voxels"] == 0.5
    assert result["without_voxels"] == {"empty_ids": 1.0, "different": 2, "entropy": pytest.approx(1)}
    assert result["with_voxels"] == {"empty_ids": 0.5, "different": 4, "entropy": pytest.approx(2)}  # 5, 1, 6, 2
    assert stats.empty_stats(tokens, np.ones_like(occupied))["without_voxels"] is None
    assert "with_voxels" not in stats.empty_stats(tokens)


def test_ids_are_packed_without_gaps():
    rng = np.random.default_rng(0)
    for n_embed, bits in ((8192, 13), (8193, 14), (2, 1), (1, 1), (65536, 16)):
        ids = rng.integers(0, n_embed, 24)
        text = "".join(f"{code:0{bits}b}" for code in ids)
        assert stats.pack_ids(ids, n_embed) == int(text, 2).to_bytes(len(text) // 8, "big")
    assert stats.whole_ids(np.array([1, 258]), 8192) == bytes([1, 0, 2, 1])
    assert stats.whole_ids(np.array([1, 65536]), 65537) == bytes([1, 0, 0, 0, 0, 0, 1, 0])


def test_compressed_sizes_are_those_of_streams_that_can_be_read_back():
    data = np.random.default_rng(0).integers(0, 4, 3000, dtype=np.uint8).tobytes()
    # A zlib stream is the same with 2 bytes before and 4 behind.
    assert stats.deflate_size(data) == len(zlib.compress(data, 9)) - 6
    # An xz file holds the same in a container of 12 + 12 + 4 + 8 + 12 bytes, give or take a block header's padding.
    assert 0 < len(lzma.compress(data, check=lzma.CHECK_NONE, preset=9)) - stats.lzma_size(data) < 80
    for size in stats.COMPRESSORS.values():
        assert 3000 / 4 < size(data) < 3000 / 2  # 2 bits a byte
        assert size(bytes(30_000)) < 100
    tokens = token_set(np.random.default_rng(1).integers(0, 8192, (3, 16)), (2, 2, 4), 8192)
    sizes = stats.id_sizes(tokens)
    assert sizes["packed"]["raw"] == 26 and sizes["whole"]["raw"] == 32
    by_hand = [stats.deflate_size(row.astype("<u2").tobytes()) for row in tokens.ids]
    assert sizes["whole"]["deflate"]["raster"]["mean"] == pytest.approx(np.mean(by_hand))
    assert (
        stats.grid_sizes(np.zeros((2, 512), np.uint8)).tolist()
        == [[f(bytes(512)) for f in stats.COMPRESSORS.values()]] * 2
    )


def test_of_many_objects_some_are_compressed(monkeypatch):
    tokens = token_set(np.random.default_rng(1).integers(0, 8192, (7, 16)), (2, 2, 4), 8192)
    whole = stats.id_sizes(tokens)
    monkeypatch.setattr(stats, "OBJECTS_TO_COMPRESS", 3)
    chosen = stats.spread(7, 3)
    assert chosen.tolist() == [0, 2, 4] and stats.spread(3, 7).tolist() == [0, 1, 2]
    assert stats.id_sizes(tokens) == stats.id_sizes(token_set(tokens.ids[chosen], (2, 2, 4), 8192))
    assert stats.id_sizes(tokens)["packed"]["raw"] == whole["packed"]["raw"]


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = SparseStructureTokenizer(tiny_config("SparseStructureVqVaeTrainer")["models"], resolution=16)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run the script's main in this process. Returns its exit code, and what it wrote to stdout and to stderr."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # which scripts change
    spec = importlib.util.spec_from_file_location("token_stats", ROOT / "scripts" / "token_stats.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*args) -> tuple[int, str, str]:
        try:
            code = script.main([*map(str, args), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@needs_plots
def test_the_script_encodes_measures_and_reads(run_script, tokenizer_folder, data_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, printed, errors = run_script("--tokenizer", tokenizer_folder, "--data_dir", data_dir, "--output_dir", out)
    assert code == 0, errors
    result = json.loads((out / "stats.json").read_text())
    tokenizer = SparseStructureTokenizer.load(tokenizer_folder)
    assert result["objects"] == result["objects_in_all"] == 30
    assert (result["lattice"], result["n_embed"]) == (list(tokenizer.lattice), 32)
    assert result["tokenizer_hash"] == tokenizer.hash
    assert set(result["entropy"]) == set(CONTEXTS)
    assert result["bytes"]["grid"]["raw"] == 512

    # The same from the library, with the grids as the tests made them.
    bits = np.concatenate([np.load(f"{data_dir}/shapes_{split}.npz")["bits"] for split in ("train", "val")])
    grids = torch.from_numpy(np.unpackbits(bits, axis=1)).view(30, 1, 16, 16, 16)
    ids = tokenizer.encode(grids).numpy()
    shares = (ids == tokenizer.empty_ids.numpy()).mean(1)
    assert result["empty"]["share"] == pytest.approx(stats.summary(shares))
    assert result["codebook"]["usage"] == len(np.unique(ids)) / 32
    X, Y, Z = tokenizer.lattice
    blocks = grids.view(30, X, 16 // X, Y, 16 // Y, Z, 16 // Z).amax((2, 4, 6))
    assert result["empty"]["places_without_voxels"] == pytest.approx((blocks == 0).double().mean().item())
    deflated = [stats.deflate_size(row.tobytes()) for row in bits]
    assert result["bytes"]["grid"]["deflate"] == pytest.approx(stats.summary(deflated))

    assert result["bytes"]["objects"] == 30
    monkeypatch.setattr(stats, "OBJECTS_TO_COMPRESS", 3)
    flags = ("--tokenizer", tokenizer_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "few")
    assert run_script(*flags)[0] == 0
    few = json.loads((tmp_path / "few" / "stats.json").read_text())
    assert few["bytes"]["objects"] == 3 and few["entropy"] == result["entropy"]
    assert few["bytes"]["grid"]["deflate"] == pytest.approx(stats.summary(np.array(deflated)[[0, 10, 20]]))
    assert "bytes of an object, each by itself (3 objects)" in (tmp_path / "few" / "stats.md").read_text()

    text = (out / "stats.md").read_text()
    assert text in printed and "by itself |" in text
    assert "30 objects, each of" in text and f"{result['empty']['places_without_voxels']:.1%} of the positions" in text
    for name in re.findall(r"\((\w+\.png)\)", text):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        "codes.png",
        "entropy.png",
        "runs.png",
        "sizes.png",
        "stats.json",
        "stats.md",
    ]

    code, _, errors = run_script("--tokenizer", tokenizer_folder, "--data_dir", data_dir, "--output_dir", out)
    assert code == 1 and errors.startswith("error: ") and "exists already" in errors


@needs_plots
def test_grids_of_other_settings_than_the_tokenizer_s_are_refused_or_named(
    run_script, tokenizer_folder, data_dir, tmp_path
):
    path = next(Path(data_dir).glob("*.npz"))
    with np.load(path) as file:
        arrays = {**file}
    for name, setting in (("normalization", "shapellm"), ("up_axis", "keep")):
        np.savez(tmp_path / f"{setting}.npz", **arrays, **{name: np.full(len(arrays["bits"]), setting)})
    flags = ["--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "out", "--data_dir"]
    code, _, errors = run_script(*flags, tmp_path / "shapellm.npz")
    assert code == 1 and "have normalization shapellm, but the tokenizer's is cube" in errors
    code, printed, errors = run_script(*flags, tmp_path / "keep.npz")
    assert code == 0 and printed.count("made with up_axis keep, but the tokenizer's is auto") == 1, errors


@needs_plots
@needs_pyarrow
def test_the_script_reads_parquet_files(run_script, tokenizer_folder, data_dir, tmp_path):
    from trellis.datasets.sparse_structure import SparseStructure
    from trellis.tokens import parquet

    tokenizer = SparseStructureTokenizer.load(tokenizer_folder)
    dataset = SparseStructure(data_dir, resolution=16, split="all")
    ids = tokenizer.encode(torch.stack([dataset[i]["ss"] for i in range(len(dataset))])).numpy()
    names = [dataset.sha256(i) for i in range(len(dataset))]
    folder, info = tmp_path / "tokens", tokenizer.token_info("fp32")
    folder.mkdir()
    for number, part in enumerate((slice(0, 20), slice(20, 30))):
        share = names[part]
        parquet.write_shard(
            folder / parquet.shard_name(number, 2),
            info,
            share,
            share,
            [None] * len(share),
            ids[part],
            np.full(len(share), 5),
        )

    def measured(name: str, *args: str) -> dict:
        code, _, errors = run_script(*args, "--output_dir", tmp_path / name)
        assert code == 0, errors
        return json.loads((tmp_path / name / "stats.json").read_text())

    read = measured("read", "--tokens", folder, "--tokenizer", tokenizer_folder, "--data_dir", data_dir)
    encoded = measured("encoded", "--tokenizer", tokenizer_folder, "--data_dir", data_dir)
    assert read.pop("tokens") == str(folder) and encoded.pop("tokenizer") == tokenizer_folder
    assert read == encoded

    few = measured("few", "--tokens", folder, "--max_objects", "7")
    assert (few["objects"], few["objects_in_all"]) == (7, 30)
    assert few["empty"] is few["sparse"] is few["bytes"]["grid"] is None
    text = (tmp_path / "few" / "stats.md").read_text()
    assert "7 of 30 objects" in text and "--tokenizer tells what is empty" in text
    rows = ids[np.arange(7) * 30 // 7]
    assert few["codebook"]["usage"] == len(np.unique(rows)) / 32

    code, _, errors = run_script(
        "--tokens", folder, "--output_dir", tmp_path / "no", "--data_dir", data_dir, "--split", "train"
    )
    assert code == 1 and "has no grid of" in errors and "(6 such objects" in errors
    assert not (tmp_path / "no").exists()

    another = tmp_path / "another"
    torch.manual_seed(1)
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    SparseStructureTokenizer(models, resolution=16).save_pretrained(another)
    code, _, errors = run_script("--tokens", folder, "--tokenizer", another, "--output_dir", tmp_path / "no")
    assert code == 1 and f"did not make {folder}" in errors


def test_without_matplotlib_the_command_is_named(monkeypatch):
    from trellis.tokens import stats_report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        stats_report.require_matplotlib()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --tokens, or --tokenizer with --data_dir"),
        (["--tokenizer", "x"], "give --tokens"),
        (["--tokens", "x", "--max_objects", "0"], "--max_objects is 0"),
    ],
)
def test_flags_that_lack_something_are_refused(run_script, args, message, tmp_path):
    code, _, errors = run_script(*args, "--output_dir", tmp_path)
    assert code == 2 and message in errors


def test_the_script_starts_beside_one_named_as_a_module_of_python():
    """scripts/to_tokens.py must not pass for Python's tokenize, which linecache and others import."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "token_stats.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--max_objects" in done.stdout, done.stderr


# --- the octree form ---


def test_octree_statistics_are_those_of_plain_counting():
    rng = np.random.default_rng(0)
    octree = Octree((4, 3, 5), 16, 2)
    rows = rng.integers(1, 16, (20, 60, 2)) * (rng.random((20, 60, 1)) < 0.2)
    rows[3] = 0
    tokens = token_set(rows.reshape(20, 120), (4, 3, 5), 16, codes=2)
    sequences = [octree.to_values(row).tolist() for row in tokens.ids]
    masks = Counter(value for row in sequences for value in row if value >= 16)
    codes = [Counter(code for code in rows[..., q].ravel().tolist() if code) for q in range(2)]

    def bits(counts: Counter) -> float:
        return -sum(n / counts.total() * math.log2(n / counts.total()) for n in counts.values())

    result = stats.octree_stats(tokens)
    assert result["mask_entropy"] == pytest.approx(bits(masks))
    assert result["code_entropy"] == pytest.approx((bits(codes[0]) + bits(codes[1])) / 2)
    assert result["values"] == pytest.approx(stats.summary(np.array([len(row) for row in sequences])))
    number = np.array([sum(value < 16 for value in row) for row in sequences])
    assert result["codes"] == pytest.approx(stats.summary(number)) and number[3] == 0
    want = (masks.total() * result["mask_entropy"] + number.sum() * result["code_entropy"]) / 20
    assert result["bits_per_object"] == pytest.approx(want)


@needs_plots
@needs_pyarrow
@pytest.mark.parametrize("form", ["dense", "octree", "octree-depth"])
def test_files_of_every_form_have_the_same_statistics(run_script, data_dir, tmp_path, form):
    from scripts import to_tokens

    torch.manual_seed(0)
    models = tiny_config("SparseStructureVqVaeTrainer")["models"]
    models["quantizer"]["args"]["empty_code"] = True
    tokenizer = SparseStructureTokenizer(models, resolution=16)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", tmp_path / "tokenizer", "--data_dir", data_dir, "--output_dir", tmp_path / "tokens"]
    assert to_tokens.main([*map(str, flags), "--form", form, "--device", "cpu"]) == 0
    results = []
    for name, source in (("read", ("--tokens", tmp_path / "tokens")), ("encoded", flags[:4])):
        code, printed, errors = run_script(*source, "--output_dir", tmp_path / name)
        assert code == 0, errors
        assert "The octree form has" in printed and "id 0" not in printed
        results.append(json.loads((tmp_path / name / "stats.json").read_text()))
    for key in ("empty", "sparse", "octree", "entropy", "codebook", "runs"):
        first, second = (result[key] for result in results)
        if key == "empty":  # with grids also
            second = {name: second[name] for name in first}
        assert first == second and first is not None
