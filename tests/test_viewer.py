"""What the viewer computes and draws: faces, figures, codes, curves, and what travels between page and server."""

import base64
import json
import re
import time

import numpy as np
import pytest
import torch
from helpers import RESOLUTION, make_tokenizer, solid_grids

from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.preview import CORRECT, EXTRA, MISSING
from trellis.runs.status import RunStatus
from trellis.utils.errors import DataError
from trellis.viewer import curves, details, faces, figures, page_state
from trellis.viewer.backend import Backend, pack_grid, pack_ids, unpack_grid, unpack_ids
from trellis.viewer.callbacks import similar_code
from trellis.viewer.code_usage import UsageCounter

# --- faces ---


def exposed(labels: np.ndarray) -> set[tuple]:
    """(side, plane, u, v, label) of every outer unit square, found voxel by voxel."""
    found = set()
    for voxel in np.argwhere(labels):
        for axis in range(3):
            for upper in (0, 1):
                beside = voxel.copy()
                beside[axis] += 2 * upper - 1
                outside = beside.min() < 0 or beside.max() >= len(labels)
                if outside or not labels[tuple(beside)]:
                    u, v = (voxel[other] for other in range(3) if other != axis)
                    found.add((axis, voxel[axis] + upper, u, v, labels[tuple(voxel)]))
    return found


def squares(drawn: faces.Faces) -> list[tuple]:
    """The unit squares that the drawn rectangles cover, each as often as it is covered."""
    found = []
    for number in range(0, len(drawn.triangles), 2):
        points = drawn.corners[np.unique(drawn.triangles[number : number + 2])]
        assert len(points) == 4
        low, high = points.min(0), points.max(0)
        (axis,) = np.flatnonzero(low == high)
        u, v = (other for other in range(3) if other != axis)
        found += [
            (axis, low[axis], i, j, drawn.labels[number])
            for i in range(low[u], high[u])
            for j in range(low[v], high[v])
        ]
    return found


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["noise", "shapes", "one", "full", "empty"])
def test_faces_cover_each_outer_square_once_with_its_label(kind, merged, monkeypatch):
    if merged:
        monkeypatch.setattr(faces, "SHADED_FACES", -1)
    rng = np.random.default_rng(0)
    labels = {
        "noise": rng.integers(0, 4, (6, 6, 6)),
        "full": np.ones((5, 5, 5), int),
        "empty": np.zeros((3,) * 3, int),
        "one": np.eye(3, dtype=int)[:, :, None] * np.eye(3, dtype=int)[0],
        "shapes": solid_grids(2, 12, 0)[1] * 2,
    }[kind]
    drawn = faces.outer_faces(labels)
    found, wanted = squares(drawn), exposed(labels)
    # Both sides of a plane may be drawn, for two voxels that meet at an edge.
    assert len(found) == len(set(found)) or kind in ("noise", "one")
    assert set(found) == wanted and drawn.coarser == 1
    if merged and kind == "full":
        assert len(drawn.triangles) == 12
    if not merged:
        assert len(found) * 2 == len(drawn.triangles) == len(drawn.shade)


def test_too_many_faces_are_drawn_coarser(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, (8, 8, 8))
    half = labels.reshape(4, 2, 4, 2, 4, 2).max((1, 3, 5))
    whole = faces.outer_faces(half)
    monkeypatch.setattr(faces, "SHADED_FACES", len(whole.triangles) // 2)
    monkeypatch.setattr(faces, "MOST_FACES", len(whole.triangles) // 2)
    drawn = faces.outer_faces(labels)
    assert drawn.coarser == 2
    assert np.array_equal(drawn.corners, 2 * whole.corners) and np.array_equal(drawn.triangles, whole.triangles)


def test_any_grid_of_64_is_drawn_with_at_most_a_hundred_thousand_triangles():
    noise = np.random.default_rng(0).random((64, 64, 64)) < 0.5
    assert len(faces.outer_faces(noise).triangles) <= 100_000


# --- figures ---


def array(spec: dict) -> np.ndarray:
    """What figures.typed wrote."""
    values = np.frombuffer(base64.b64decode(spec["bdata"]), dtype=spec["dtype"])
    return values.reshape([int(size) for size in spec["shape"].split(",")]) if "shape" in spec else values


def test_difference_shows_missing_extra_and_correct_voxels_in_the_colors_of_the_contact_sheet():
    target, reconstruction = solid_grids(2, RESOLUTION, 0)
    traces = [trace for trace in figures.difference_figure(target, reconstruction)["data"] if trace["type"] == "mesh3d"]
    wanted = {MISSING: target & ~reconstruction, EXTRA: reconstruction & ~target, CORRECT: target & reconstruction}
    found = {trace["colorscale"][1][1]: trace for trace in traces}
    assert set(found) == {figures.css(color) for color in wanted}
    wrong = np.where(wanted[MISSING], 1, np.where(wanted[EXTRA], 2, 0))
    for color, label in ((MISSING, 1), (EXTRA, 2)):
        number = sum(square[-1] == label for square in exposed(wrong))
        assert len(array(found[figures.css(color)]["i"])) == 2 * number
    assert len(array(found[figures.css(CORRECT)]["i"])) == 2 * len(exposed(wanted[CORRECT].astype(int)))


def test_a_layer_and_the_lattice_say_which_token_is_where(backend):
    lattice, colors = (3, 4, 2), np.arange(72).reshape(24, 3)
    ids = np.arange(100, 124)[:, None]
    occupied = np.arange(24) % 5 == 0
    tokens = figures.Tokens(lattice, ids, 0, occupied, ~occupied, np.arange(24) == 7, np.arange(24) * 10, colors)
    heat, edited = figures.layer_figure(tokens, 1, chosen=7)["data"]
    want = np.arange(24).reshape(lattice)[:, :, 1].T

    def text(token: int) -> str:
        return f"code {token + 100}<br>used {10 * token} times in the sample"

    assert np.array_equal(array(heat["customdata"]), want[..., None])
    assert heat["text"] == [[text(token) for token in row] for row in want]
    assert (edited["x"], edited["y"]) == ([0], [3])  # token 7 is x 0, y 3, z 1
    boxes = figures.lattice_figure(tokens, 24)["data"][0]
    assert np.array_equal(array(boxes["customdata"])[:, 0], np.flatnonzero(occupied).repeat(8))
    assert boxes["text"] == [text(token) for token in np.flatnonzero(occupied).repeat(8)]
    x = array(boxes["x"]).reshape(-1, 8)
    assert np.array_equal(np.floor(x.mean(1) / 8), np.flatnonzero(occupied) // 8)  # 8 voxels a token along x


# --- what travels ---


def test_grids_and_ids_come_back_as_they_were(backend):
    grid = backend.object(3)
    ids = backend.encode(grid)
    assert np.array_equal(unpack_grid(pack_grid(grid), RESOLUTION), grid)
    assert np.array_equal(unpack_ids(pack_ids(ids), backend.num_tokens, backend.n_embed), ids)
    bomb = pack_ids(np.zeros(10**7, dtype=np.int64))
    for damaged in ("", "?", pack_grid(grid), pack_ids(ids[:-1]), pack_ids(ids + backend.n_embed), bomb, None):
        with pytest.raises(DataError):
            unpack_ids(damaged, backend.num_tokens, backend.n_embed)


def test_edits_change_their_ids_and_no_other_object(backend):
    grid = backend.object(0)
    state = page_state.new_object(backend, grid, "a", "object-0", "z")
    ids = backend.tokenizer.encode(torch.from_numpy(grid))[0].numpy()
    code = (int(ids[5]) + 1) % backend.n_embed
    edits = {"of": "object-0", "list": [[3, 1], [5, code], [3, int(ids[3])]]}
    opened = page_state.open_object(backend, state, edits)
    want = ids.copy()
    want[5] = code
    assert np.array_equal(opened.ids, want) and np.array_equal(opened.before, ids) and opened.edits == {5: code}
    assert page_state.open_object(backend, state, {**edits, "of": "object-1"}).edits == {}
    for place, value in ((backend.num_tokens, 0), (0, backend.n_embed), (0, -1), (0, None), (0, 1.5)):
        with pytest.raises(DataError):
            page_state.open_object(backend, state, {"of": "object-0", "list": [[place, value]]})


# --- codes ---


@pytest.mark.parametrize(
    "quantizer",
    [
        {},
        {
            "name": "ResidualVectorQuantizer",
            "args": {"n_embed": 16, "embed_dim": 8, "latent_channels": 4, "num_codes": 2},
        },
    ],
    ids=["one code", "two codes"],
)
def test_usage_is_counted_over_the_sample(quantizer, data_dir):
    backend = Backend(make_tokenizer(**quantizer), SparseStructure(data_dir, resolution=RESOLUTION, split="all"))
    usage = UsageCounter(backend, 5).start()
    usage.wait()
    assert usage.done == usage.sampled == 5 and usage.problem is None
    grids = torch.from_numpy(np.stack([backend.object(int(i)) for i in usage.indices]))[:, None]
    ids = backend.tokenizer.encode(grids).view(5, *backend.lattice, backend.codes_per_token)
    voxels = (backend.tokenizer.decode(ids.flatten(1)) > 0)[:, 0]
    bx, by, bz = backend.block
    for part in range(backend.codes_per_token):
        own = ids[..., part]
        assert usage.counts(part).tolist() == torch.bincount(own.flatten(), minlength=backend.n_embed).tolist()
        code = int(own.flatten().mode().values)
        places = (own == code).nonzero().tolist()
        blocks = [
            voxels[n, x * bx : (x + 1) * bx, y * by : (y + 1) * by, z * bz : (z + 1) * bz] for n, x, y, z in places
        ]
        found = usage.of(code, part)
        assert (found.tokens, found.rank) == (len(places), 1)
        assert found.objects == len({n for n, *_ in places})
        assert np.allclose(found.voxels, torch.stack(blocks).float().mean(0), atol=1e-6)
    absent = np.flatnonzero(usage.counts(0) == 0)
    assert all(usage.of(int(code)).voxels is None for code in absent)


def test_similar_codes_are_gone_through_by_distance(backend):
    state = page_state.new_object(backend, backend.object(0), "a", "k", "z")
    table = backend.tokenizer.quantizer.table().detach()
    first = page_state.open_object(backend, state, None)
    order = torch.cdist(table[first.before[2]][None].double(), table.double())[0].argsort().tolist()
    edits = []
    for wanted in order[1:5]:
        code = similar_code(backend, page_state.open_object(backend, state, {"of": "k", "list": edits}), 2)
        assert code == wanted
        edits.append([2, code])


def test_a_token_repeated_is_the_decoder_s(backend):
    ids = backend.tokenizer.empty_ids.view(4, 4, 4).clone()
    ids[1:4, 1:4, 1:4] = 7
    want = (backend.tokenizer.decode(ids.flatten())[0, 0] > 0).numpy()[8:12, 8:12, 8:12]
    assert want.any() and np.array_equal(backend.repeated(np.array([7])), want)


def test_colors_of_codes_are_distinct_and_fit_any_quantizer(backend):
    assert len(np.unique(backend.colors(), axis=0)) == backend.n_embed
    several = Backend(
        make_tokenizer(name="ResidualVectorQuantizer", args={"n_embed": 16, "embed_dim": 4, "latent_channels": 4})
    )
    assert several.colors().shape == (16, 3)


# --- curves ---


def test_curves_are_those_of_the_log(tmp_path):
    other = {"l1_l2": 0.5, "lr": 1e-3, "codebook_usage": 0.1}
    lines = [{"step": step, "loss": 1 / (step + 1), **other} for step in range(40)]
    lines.append({"step": 39, "seconds": 3.0, "val/iou": 0.7, "peak_memory_gib": 5.0})
    (tmp_path / "log.txt").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 40, "lo')
    figures = curves.curves_figures(curves.read_log(tmp_path / "log.txt"))
    assert {title: [trace["name"] for trace in figure["data"]] for title, figure in figures.items()} == {
        "losses": ["loss", "l1_l2"],
        "validation": ["val/iou"],
        "share of codes in use": ["codebook_usage"],
        "learning rate": ["lr"],
    }
    found = {trace["name"]: (trace["x"], trace["y"]) for figure in figures.values() for trace in figure["data"]}
    assert found["loss"] == (list(range(40)), [1 / (step + 1) for step in range(40)])
    assert found["val/iou"] == ([39], [0.7])
    many = [(step, float(step)) for step in range(10**5)]
    assert len(curves.thinned(many)) < 2 * curves.POINTS and curves.thinned(many)[-1] == many[-1]
    with pytest.raises(DataError, match="cannot be read"):
        curves.read_log(tmp_path / "none.txt")


def test_lines_of_a_log_that_are_damaged_are_passed_over(tmp_path):
    lines = [b'{"step": 1, "loss": 0.5}', b"\xff\xfe{", b"5", b"[]", b"{}", b"[" * 100_000, b'{"step": "2", "loss": 1}']
    lines += [
        b'{"step": NaN, "loss": 1}',
        b'{"step": 3, "loss": null}',
        b'{"step": 4, "loss": Infinity}',
        b'{"step": 5',
    ]
    (tmp_path / "log.txt").write_bytes(b"\n".join(lines))
    assert curves.read_log(tmp_path / "log.txt") == {"loss": [(1, 0.5)]}
    (tmp_path / "log.txt").write_bytes(b"")
    assert curves.curves_figures(curves.read_log(tmp_path / "log.txt")) == {}
    with pytest.raises(DataError, match="cannot be read"):
        curves.read_log(tmp_path)


def test_the_state_of_a_run_is_what_its_status_says(tmp_path):
    assert curves.state_of(tmp_path) == ""
    with RunStatus(tmp_path, shown=False) as status:
        assert curves.state_of(tmp_path) == "starting"
        status.set(state="training", step=1200, max_steps=3600, eta_s=4000.0)
        status._write()
        assert curves.state_of(tmp_path) == "training, step 1,200 of 3,600, 1 h 6 min left"
        status.set(state="finished", step=3600, eta_s=0.0)
    assert curves.state_of(tmp_path) == "finished, step 3,600 of 3,600"
    path = tmp_path / "status.json"
    died = json.loads(path.read_text()) | {"state": "training", "host": "elsewhere", "time": time.time() - 600}
    path.write_text(json.dumps(died))
    assert re.fullmatch("died .*, step 3,600 of 3,600", curves.state_of(tmp_path))
    for damage in (b"", b"\xff", b'{"state": "tra', b"[]", b"[" * 100_000):
        path.write_bytes(damage)
        said = curves.state_of(tmp_path)
        assert said and "\n" not in said


@pytest.mark.parametrize("code, said", [
    (None, "the field of the code holds no number: type a whole number from 0 to 31"),
    (99999, "the code is 99999; it must be a whole number from 0 to 31"),
    (-1, "the code is -1; "), (1.5, "the code is 1.5; "), (1e999, "the code is inf; "), ("7", "the code is '7'; "),
])  # fmt: skip
def test_a_code_that_is_none_is_named_with_the_range(code, said, backend):
    with pytest.raises(DataError) as caught:
        page_state.check_code(backend, code)
    assert str(caught.value).startswith(said)


def test_score_tiles_hold_the_metrics(backend):
    pytest.importorskip("dash")
    state = page_state.new_object(backend, backend.object(0), "a", "k", "z")
    tiles = details.score_tiles(backend, page_state.open_object(backend, state, None))
    shown = {tile.children[0].children: tile.children[1].children for tile in tiles}
    grid, back = backend.object(0), backend.decode(backend.encode(backend.object(0)))
    assert shown["IoU"] == f"{(grid & back).sum() / (grid | back).sum():.4f}"
    assert shown["ids"] == "64" and shown["edited"] == "0"
