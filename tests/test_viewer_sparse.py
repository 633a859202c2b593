"""The page for tokenizers with an empty code, several codes per token, and a transformer around the codebook."""

import json

import numpy as np
import pytest
import torch
from helpers import RESOLUTION, VQ, tiny_config
from test_viewer_server import ask, walk

from trellis import SparseStructureTokenizer
from trellis.datasets.sparse_structure import SparseStructure
from trellis.evaluation.metrics import occupied_blocks
from trellis.tokens.octree import Octree
from trellis.utils.errors import DataError
from trellis.viewer import details, figures, page_state
from trellis.viewer.backend import Backend, pack_ids
from trellis.viewer.callbacks import saved, similar_code
from trellis.viewer.code_usage import UsageCounter
from trellis.viewer.uploads import Opener

K = 16
FORMS = {  # quantizer, and whether there is a transformer
    "one code": ({"name": "VectorQuantizer", "args": {"embed_dim": 4}}, False),
    "two codes": ({"name": "ResidualVectorQuantizer", "args": {"embed_dim": 8, "num_codes": 2}}, True),
}


@pytest.fixture(scope="module", params=FORMS)
def sparse(request, data_dir) -> Backend:
    """A tokenizer with an empty code and random weights, whose reconstructions are half full, and all grids."""
    torch.manual_seed(0)
    quantizer, transformer = FORMS[request.param]
    models = tiny_config(VQ)["models"]
    models["quantizer"] = {
        "name": quantizer["name"],
        "args": {"n_embed": K, "latent_channels": 4, "empty_code": True, **quantizer["args"]},
    }
    if transformer:
        args = {"channels": 8, "lattice": [4, 4, 2], "width": 8, "heads": 2, "layers_before": 1, "layers_after": 2}
        models["transformer"] = {"name": "CodebookTransformer", "args": args}
    tokenizer = SparseStructureTokenizer(models, RESOLUTION, up_axis="z")
    for name, value in tokenizer.named_parameters():
        if name.startswith(("quantizer", "transformer")):
            value.data.normal_()
    backend = Backend(tokenizer, SparseStructure(data_dir, resolution=RESOLUTION, split="all"), name="tiny")
    logits = tokenizer.decode(torch.from_numpy(backend.encode(backend.object(0))))
    *_, bias = (value for name, value in tokenizer.decoder.named_parameters() if name.endswith("bias"))
    bias.data -= logits[logits > logits.min()].median()
    return Backend(tokenizer, backend.dataset, name="tiny")


@pytest.fixture(scope="module")
def client(sparse):
    """Ask the page's server: ask(output, values)."""
    from trellis.viewer.app import create_app

    opener, usage = Opener(workers=1), UsageCounter(sparse, 4)
    app = create_app(sparse, usage, opener)
    yield lambda output, values: ask(app.server.test_client(), app, output, values)
    opener.close()


def state_of(backend: Backend) -> dict:
    return page_state.new_object(backend, backend.object(0), "a", "k", "z")


def opened(backend: Backend, *edits: list[int]) -> page_state.EditedObject:
    return page_state.open_object(backend, state_of(backend), {"of": "k", "list": list(edits)})


def tokens_of(backend: Backend, shown: page_state.EditedObject, empty: bool) -> np.ndarray:
    """The tokens that are empty, or those that are not."""
    first = backend.of_tokens(shown.ids)[:, 0]
    return np.flatnonzero((first == 0) == empty)


def texts(parts) -> str:
    """All words of parts of the page."""
    found = []
    for part in parts:
        found += [str(each) for _, each in walk(part) if isinstance(each, (str, int))]
        found += [part.children for _, part in walk(part) if isinstance(getattr(part, "children", None), str)]
    return " | ".join(found)


# --- codes ---


def test_usage_is_that_of_learned_codes_in_occupied_tokens(sparse):
    usage = UsageCounter(sparse, 5).start()
    usage.wait()
    assert usage.problem is None and usage.done == 5
    grids = torch.from_numpy(np.stack([sparse.object(int(i)) for i in usage.indices]))[:, None]
    ids = sparse.tokenizer.encode(grids).view(5, -1, sparse.codes_per_token)
    occupied = occupied_blocks(grids, sparse.lattice).flatten(1)
    assert 0 < occupied.sum() < occupied.numel()
    for part in range(sparse.codes_per_token):
        own = ids[..., part]
        counts = torch.bincount(own[occupied], minlength=K)
        assert counts[0] == 0 and usage.counts(part).tolist() == counts[1:].tolist()
        code = int(counts.argmax())
        found = usage.of(code, part)
        assert (found.tokens, found.rank) == (int(counts.max()), 1)
        assert found.share == found.tokens / int(occupied.sum())
        assert found.objects == int((own == code).any(1).sum())
        blocks = []
        for number, token in (own == code).nonzero().tolist():
            grid = sparse.decode(ids[number].flatten().numpy())
            at = np.unravel_index(token, sparse.lattice)
            blocks.append(grid[tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, sparse.block, strict=True))])
        assert np.allclose(found.voxels, np.mean(blocks, 0), atol=1e-6)
    assert details.usage_text(usage, found).endswith(f"rank 1 of {K - 1}")


def test_colors_and_neighbors_are_those_of_learned_codes(sparse):
    assert sparse.colors().shape == (K - 1, 3) and len(np.unique(sparse.colors(), axis=0)) == K - 1
    table = sparse.tokenizer.quantizer.table()
    if table is None:
        assert sparse.neighbors(5, 3) == []
        return
    for code in (1, 5, K - 1):
        order = torch.cdist(table[code - 1][None].double(), table.double())[0].argsort() + 1
        assert sparse.neighbors(code, 4) == order[1:5].tolist()


def test_an_empty_token_has_no_similar_code(sparse):
    shown = opened(sparse)
    index = tokens_of(sparse, shown, empty=True)[0] * sparse.codes_per_token
    with pytest.raises(DataError, match="found this token empty"):
        similar_code(sparse, shown, index)


# --- edits ---


def test_a_token_is_emptied_and_filled_as_a_whole_and_every_undo_is_exact(sparse):
    """No list of edits makes a token with the empty code beside others, so each can be decoded."""
    Q, rng = sparse.codes_per_token, np.random.default_rng(0)
    edits, seen = [], [opened(sparse).ids]
    full, empty = (tokens_of(sparse, opened(sparse), kind)[0] for kind in (False, True))
    for _ in range(40):
        edits.append([int(rng.choice([full, empty]) * Q + rng.integers(Q)), int(rng.choice([0, 3, 7]))])
        ids = opened(sparse, *edits).ids
        (index, code), before = edits[-1], seen[-1].copy()
        token = slice(index // Q * Q, index // Q * Q + Q)
        before[token if code == 0 or before[index] == 0 else index] = code
        assert np.array_equal(ids, before)
        sparse.tokenizer.decode(torch.from_numpy(ids))  # raises for a mixed token
        seen.append(ids)
    while edits:
        edits.pop()
        seen.pop()
        assert np.array_equal(opened(sparse, *edits).ids, seen[-1])


def test_an_emptied_token_has_no_voxel_and_a_filled_one_may_have_some(sparse):
    shown, Q = opened(sparse), sparse.codes_per_token
    full, empty = tokens_of(sparse, shown, empty=False), tokens_of(sparse, shown, empty=True)

    def voxels(token: int, *edits: list[int]) -> int:
        grid = sparse.decode(opened(sparse, *edits).ids)
        at = np.unravel_index(token, sparse.lattice)
        return grid[tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, sparse.block, strict=True))].sum()

    token = max(full, key=voxels)
    assert voxels(token) > 0 == voxels(token, [int(token) * Q, 0])
    assert all(voxels(token) == 0 for token in empty)
    assert any(voxels(token, [int(token) * Q, code]) for token in empty[:4] for code in range(1, K))


def test_ids_of_the_page_with_a_mixed_token_are_refused(sparse):
    damaged = opened(sparse).ids.copy()
    damaged[tokens_of(sparse, opened(sparse), empty=False)[0] * sparse.codes_per_token] = 0
    state = {**state_of(sparse), "ids": pack_ids(damaged)}
    if sparse.codes_per_token == 1:
        assert np.array_equal(page_state.open_object(sparse, state, None).ids, damaged)
    else:
        with pytest.raises(DataError, match="empty id 0 beside codes: reload"):
            page_state.open_object(sparse, state, None)


# --- the page ---


def test_the_page_says_what_the_tokenizer_is(sparse, client):
    from trellis.viewer.layout import about, editor, tokens

    said = texts(about(sparse))
    assert "sparse" in said and "15 codes + empty (id 0)" in said
    several = sparse.codes_per_token > 1
    assert ("4×4×2 tokens of 2 codes" if several else "4×4×4 tokens") in said
    assert ("transformer, 1 + 2 layers" in said) == several
    said = texts([tokens(sparse)])
    assert "Boxes: non-empty tokens" in said and "gray: empty;" in said
    assert ("by first code" in said) == several
    titles = {part.id: part.title for each in editor(sparse) for _, part in walk(each) if hasattr(part, "title")}
    assert titles["edit-empty"] == "no voxel here: id 0"
    assert titles["edit-set"].endswith("for all of its codes") == several


def test_scores_count_empty_tokens_and_learned_codes(sparse):
    shown = opened(sparse)
    tiles = details.score_tiles(sparse, shown)
    said = {tile.children[0].children: tile.children[1].children for tile in tiles}
    empty = ~occupied_blocks(torch.from_numpy(shown.grid)[None, None], sparse.lattice)
    codes = sum(len(set(own.tolist()) - {0}) for own in sparse.of_tokens(shown.ids).T)
    octree = len(Octree(sparse.lattice, K, sparse.codes_per_token).to_values(shown.ids))
    wanted = {"ids": sparse.num_tokens, "as octree": octree, "empty tokens": empty.sum(), "different codes": codes}
    assert {name: said[name] for name in wanted} == {name: str(int(number)) for name, number in wanted.items()}
    notes = {tile.children[0].children: tile.children[2].children for tile in tiles}
    learned = int((shown.ids > 0).sum())
    assert notes["as octree"] == f"{octree - learned} + {learned}"


def test_the_lattice_shows_tokens_that_are_not_empty_and_the_layer_says_which_are(sparse, client):
    state = state_of(sparse)
    shown = opened(sparse)
    full = tokens_of(sparse, shown, empty=False)
    answer = client("figure-lattice", {"object.data": state, "edits.data": None})["response"]
    assert answer["caption-lattice"]["children"] == f"{len(full)} of {len(sparse.of_tokens(shown.ids))} are not empty"
    assert answer["chosen"]["data"] in full
    boxes = answer["figure-lattice"]["data"]["data"][0]
    names = [f"code{'s' if sparse.codes_per_token > 1 else ''} {', '.join(map(str, sparse.of_tokens(shown.ids)[t]))}"
             for t in full]  # fmt: skip
    assert boxes["text"] == [name for name in names for _ in range(8)]
    rows = sparse.of_tokens(shown.ids)[full, 0] - 1
    assert boxes["vertexcolor"][::8] == [figures.css(sparse.colors()[row]) for row in rows]

    emptied = int(full[0])
    edits = {"of": "k", "list": [[emptied * sparse.codes_per_token, 0]]}
    x, y, z = (int(at) for at in np.unravel_index(emptied, sparse.lattice))
    values = {"object.data": state, "edits.data": edits, "chosen.data": None, "layer-number.value": z}
    heat, marks = client("layer.figure", values)["response"]["layer"]["figure"]["data"]
    assert heat["text"][y][x] == "empty" and (marks["x"], marks["y"]) == ([x], [y])
    empty = sparse.empty(opened(sparse, *edits["list"]).ids).reshape(sparse.lattice)[:, :, z].T
    assert np.array_equal(np.array(heat["text"]) == "empty", empty)
    scale, kinds = heat["colorscale"], np.array(heat["z"])
    gray = [kind for kind in np.unique(kinds) if scale[2 * kind][1] == figures.css(figures.EMPTY)]
    assert len(gray) == 1 and np.array_equal(kinds == gray[0], empty)


def test_the_card_of_an_empty_token_says_so_and_that_of_another_shows_it(sparse, client):
    Q, shown = sparse.codes_per_token, opened(sparse)
    full, empty = (int(tokens_of(sparse, shown, kind)[0]) for kind in (False, True))
    usage = UsageCounter(sparse, 2)
    said = texts(details.token_card(sparse, usage, shown, empty, Q - 1))
    assert "empty, id 0" in said and "used" not in said and "encoder" not in said
    emptied = opened(sparse, [full * Q, 0])
    said = texts(details.token_card(sparse, usage, emptied, full, Q - 1))
    assert "empty, id 0" in said and f"the encoder chose {shown.ids[full * Q + Q - 1]}" in said
    filled = opened(sparse, [empty * Q, 5])
    said = texts(details.token_card(sparse, usage, filled, empty, Q - 1))
    assert "the encoder chose empty, id 0" in said
    assert ("all its codes" in said) == (Q > 1)
    answer = client("token.children", {"object.data": state_of(sparse), "edits.data": None, "chosen.data": empty,
                                       "part.value": str(Q - 1)})["response"]  # fmt: skip
    assert answer["code"]["value"] == 0


def test_a_token_repeated_is_decoded_among_copies_in_empty_space(sparse):
    codes = np.arange(1, 1 + sparse.codes_per_token)
    ids = np.zeros((*sparse.lattice, sparse.codes_per_token), dtype=np.int64)
    ids[tuple(slice(max(0, size // 2 - 1), size // 2 + 2) for size in sparse.lattice)] = codes
    grid = sparse.tokenizer.decode(torch.from_numpy(ids.reshape(-1)))[0, 0] > 0
    cut = tuple(slice(size // 2 * b, (size // 2 + 1) * b) for size, b in zip(sparse.lattice, sparse.block, strict=True))
    assert np.array_equal(sparse.repeated(codes), grid[cut].numpy())


def test_buttons_empty_and_set_and_refuse_what_is_no_code(sparse, client):
    Q, shown = sparse.codes_per_token, opened(sparse)
    full = int(tokens_of(sparse, shown, empty=False)[0])
    values = {"object.data": state_of(sparse), "edits.data": None, "chosen.data": full, "part.value": str(Q - 1)}
    edits = client("edits.data", {"edit-empty.n_clicks": 1, **values})["response"]["edits"]["data"]
    assert not sparse.of_tokens(opened(sparse, *edits["list"]).ids)[full].any()
    said = client("edits.data", {"edit-set.n_clicks": 1, **values, "code.value": K})["sideUpdate"]["message"][
        "children"
    ]
    assert said == f"the code is {K}; it must be a whole number from 0 (empty) to {K - 1}"


def test_texts_are_copied_and_downloaded_as_they_are_shown(sparse, client):
    Q, shown = sparse.codes_per_token, opened(sparse)
    edit = [int(tokens_of(sparse, shown, empty=False)[0]) * Q, 0]
    ids = opened(sparse, edit).ids
    values = {"object.data": state_of(sparse), "edits.data": {"of": "k", "list": [edit]}}
    for form in ("dense", "octree"):
        text = client(f"copy-{form}.content", {f"copy-{form}.n_clicks": 1, **values})["response"][f"copy-{form}"][
            "content"
        ]
        assert np.array_equal(sparse.tokenizer.from_text(text, form=form), ids)
    facts = json.loads(saved(sparse, opened(sparse, edit), "tokens")[1])
    assert facts["tokens"] == ids.tolist() and facts["empty_code"] is True
    assert facts["form"] == "octree" and facts["text"] == text
    said = client("copy-octree.content", {"copy-octree.n_clicks": 1})["sideUpdate"]["message"]["children"]
    assert said.startswith("there is no object yet")
