"""What holds for every quantizer."""

import copy

import pytest
import torch

from trellis.models import MODELS, build
from trellis.modules.quantizers import Quantizer
from trellis.modules.quantizers.base import nearest_ids
from trellis.modules.quantizers.kmeans import kmeans
from trellis.utils.config import config_arguments, describe
from trellis.utils.errors import ConfigError

K, C = 32, 4
OWN_ARGS = {
    "VectorQuantizer": {},
    "EMAVectorQuantizer": {"decay": 0.9},
    "SimVQ": {},
    "RotationVectorQuantizer": {},
    "FiniteScalarQuantizer": {"levels": [8, 4]},
    "LookupFreeQuantizer": {},
    "IndexBackpropagationQuantizer": {},
    "ResidualVectorQuantizer": {"num_codes": 3},
    "ProductVectorQuantizer": {"num_codes": 2},
    "ResidualVectorQuantizer by averages": {"num_codes": 3, "decay": 0.9},
    "ProductVectorQuantizer by averages": {"num_codes": 2, "decay": 0.9},
}
NAMES = list(OWN_ARGS)
CLASSES = [name for name in NAMES if " " not in name]
GRIDS = ("FiniteScalarQuantizer", "LookupFreeQuantizer")
SEVERAL = [name for name in NAMES if name.startswith(("Residual", "Product"))]
AVERAGES = ["EMAVectorQuantizer", *(name for name in NAMES if name.endswith("averages"))]
TABLES = [name for name in NAMES if name not in SEVERAL]
REVIVABLE = [name for name in TABLES if name not in GRIDS]
GROUPS = [None, [2, 1, 1], [2, 2, 1], [1, 1, 4]]


def quantizer_of(name: str, group=None, codes_from=lambda vectors, count: vectors[:count].clone()) -> Quantizer:
    """A quantizer of 4-channel latents in evaluation mode, fitted to `latents`, of which some are codes."""
    torch.manual_seed(0)
    cells = 1 if group is None else group[0] * group[1] * group[2]
    shape = {"n_embed": K, "embed_dim": C * cells, "latent_channels": C, "group": group}
    quantizer = build({"name": name.split()[0], "args": {**shape, **OWN_ARGS[name]}})
    quantizer.fit(quantizer.to_vectors(latents()).flatten(0, -2), codes_from)
    return quantizer.eval()


def latents(batch: int = 4, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(batch, C, 4, 4, 4, generator=generator) * torch.tensor([3, 1, 1, 0.5]).view(C, 1, 1, 1)


def test_every_quantizer_of_the_name_table_is_tested():
    classes = {name for name in MODELS.classes if issubclass(MODELS.get(name, ""), Quantizer)}
    assert classes == set(CLASSES)


SHARED_ARGUMENTS = {
    "n_embed": ("integer >= 2", 8192),
    "embed_dim": ("integer >= 1", 8),
    "latent_channels": ("integer >= 1", 8),
    "group": ("list of integer >= 1 or null", None),
    "init": ('"kmeans" or "uniform"', "kmeans"),
    "empty_code": ("boolean", False),
}
SEVERAL_CODEBOOKS = {
    "num_codes": ("integer >= 2", 2),
    "decay": ("number >= 0 and <= 1 or null", None),
    "epsilon": ("number > 0", 1e-5),
}
OWN_ARGUMENTS = {
    "EMAVectorQuantizer": {"decay": ("number >= 0 and <= 1", 0.99), "epsilon": ("number > 0", 1e-5)},
    "SimVQ": {"init": ('"kmeans" or "normal"', "kmeans")},
    "FiniteScalarQuantizer": {"levels": ("list of integer >= 3", [8, 8, 8, 4, 4])},
    "LookupFreeQuantizer": {"temperature": ("number > 0", 1.0)},
    "IndexBackpropagationQuantizer": {"temperature": ("number > 0", 1.0)},
    "ResidualVectorQuantizer": SEVERAL_CODEBOOKS,
    "ProductVectorQuantizer": SEVERAL_CODEBOOKS,
}


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_defaults_and_sizes(name):
    arguments = config_arguments(MODELS.get(name, ""))
    found = {key: (describe(annotation), default) for key, (annotation, default) in arguments.items()}
    assert found == SHARED_ARGUMENTS | OWN_ARGUMENTS.get(name, {})
    quantizer = build({"name": name, "args": {}})
    assert (quantizer.n_embed, quantizer.cells_per_token, quantizer.init) == (8192, 1, "kmeans")
    table = quantizer.table()
    assert (table is None) == (name in SEVERAL)
    assert table is None or table.shape == (8192, 8)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_lookup_agree_bit_for_bit(name, group):
    quantizer, z = quantizer_of(name, group), latents(2).requires_grad_()
    several = () if quantizer.codes_per_token == 1 else (quantizer.codes_per_token,)
    before = copy.deepcopy(quantizer)
    for training in (False, True):
        quantized = quantizer.train(training)(z)
        indices = quantized.indices
        assert quantized.codes.shape == z.shape and quantized.codes.dtype == torch.float32
        assert indices.shape == (2, *quantizer.lattice((4, 4, 4)), *several) and indices.dtype == torch.int64
        assert 0 <= indices.min() and indices.max() < K
        # From before: training moves the codebook of a moving average once its codes are given out.
        assert torch.equal(quantized.codes, before.lookup(indices))
        assert torch.equal(quantized.codes, before.lookup(indices.flatten(1)))
    with torch.no_grad():
        alone = before(z[:1])
    assert torch.equal(alone.codes, quantized.codes[:1]) and torch.equal(alone.indices, indices[:1])


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    quantizer, z = quantizer_of(name), latents(1)
    want = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        got = quantizer(z)
        assert torch.equal(quantizer.lookup(got.indices), want.codes)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.indices, want.indices)
    assert all(torch.equal(got.losses[key], value) for key, value in want.losses.items())


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_what_ids_stand_for(name):
    quantizer, z = quantizer_of(name), latents()
    table = quantizer.table()
    codes = quantizer.lookup(torch.arange(K).view(1, 2, 4, 4))
    assert torch.equal(quantizer.to_vectors(codes).view(K, C), table)
    ids = quantizer(z).indices
    assert torch.equal(ids, nearest_ids(quantizer.to_vectors(z), table)) == quantizer.nearest_of_table
    assert quantizer.nearest_of_table == (name not in GRIDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_makes_the_codebook_stand_for_the_data(name):
    """Far less error than one code at the mean leaves, and nearly all codes in use, at every stage."""

    def codes_from(vectors, count):
        return kmeans(vectors, count, iterations=3, generator=torch.Generator().manual_seed(0))

    quantizer, z = quantizer_of(name, codes_from=codes_from), latents()
    vectors = quantizer.to_vectors(z)
    spread = (vectors - vectors.flatten(0, -2).mean(0)).square().mean()
    quantized = quantizer(z)
    error = (quantized.codes - z).square().mean()
    assert error < (0.4 if name in GRIDS else 0.25) * spread
    used = [ids.unique().numel() for ids in quantized.indices.reshape(-1, quantizer.codes_per_token).unbind(1)]
    assert min(used) > 0.8 * K
    assert {"vq", "commit"} <= quantized.losses.keys() <= {"vq", "commit", "entropy"}
    assert all(value.ndim == 0 and value.isfinite() for value in quantized.losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_latents_and_every_parameter(name):
    quantizer, z = quantizer_of(name).train(), latents().requires_grad_()
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (quantizer(z).codes * weight).sum().backward()
    assert z.grad.isfinite().all() and z.grad.abs().amax() > 0
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().amax() > 0, key
    assert (len(list(quantizer.parameters())) == 0) == (name in AVERAGES)


@pytest.mark.parametrize("name", NAMES)
def test_codes_learn_from_the_reconstruction_and_from_vq_under_a_frozen_encoder(name):
    for loss in ("reconstruction", "vq"):
        quantizer = quantizer_of(name).train()
        quantized = quantizer(latents())
        value = quantized.codes.square().sum() if loss == "reconstruction" else quantized.losses["vq"]
        if name in AVERAGES:
            assert not value.requires_grad
            continue
        value.backward()
        assert all(parameter.grad.abs().amax() > 0 for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_vq_leaves_the_latents_alone_and_commit_the_codes(name):
    quantizer, z = quantizer_of(name).train(), latents().requires_grad_()
    losses = quantizer(z).losses
    if losses["vq"].requires_grad:
        assert torch.autograd.grad(losses["vq"], z, allow_unused=True, retain_graph=True)[0] is None
    if losses["commit"].requires_grad:
        codes = [value for key, value in quantizer.named_parameters() if not key.startswith("proj_in")]
        gradients = torch.autograd.grad(losses["commit"], [z, *codes], allow_unused=True)
        assert gradients[0].abs().amax() > 0 and not any(gradient is not None for gradient in gradients[1:])
    assert losses["commit"].requires_grad == (name != "FiniteScalarQuantizer")


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(name):
    quantizer, z = quantizer_of(name).train(), latents()
    quantizer(z)
    args = {"n_embed": K, "embed_dim": C, "latent_channels": C, **OWN_ARGS[name]}
    torch.manual_seed(99)
    other = build({"name": name.split()[0], "args": args})
    other.load_state_dict(quantizer.state_dict())
    other.train()
    for _ in range(2):  # training moves statistics, which must be there too
        want, got = quantizer(z), other(z)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.indices, want.indices)
    assert set(quantizer.code_rows) <= quantizer.state_dict().keys()
    if name in ("VectorQuantizer", "EMAVectorQuantizer", "RotationVectorQuantizer", "IndexBackpropagationQuantizer"):
        assert torch.equal(quantizer.state_dict()["embeddings.weight"], quantizer.table())


@pytest.mark.parametrize("name", REVIVABLE)
def test_replaced_codes_stand_for_their_vectors_and_others_stay(name):
    quantizer = quantizer_of(name)
    with torch.no_grad():
        for parameter in quantizer.parameters():  # a map that is not the identity
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    before = quantizer.table().clone()
    rows, vectors = torch.tensor([7, 0, 31]), 100 + torch.randn(3, C)
    quantizer.replace_codes(rows, vectors)
    torch.testing.assert_close(quantizer.table()[rows], vectors, rtol=1e-5, atol=1e-5)
    rest = torch.ones(K, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(quantizer.table()[rest], before[rest])
    assert torch.equal(nearest_ids(vectors, quantizer.table()), rows)
    assert all(len(quantizer.state_dict()[key]) == K for key in quantizer.code_rows)


@pytest.mark.parametrize("name", SEVERAL)
def test_replaced_codes_of_several_codebooks_keep_their_place_and_others_stay(name):
    quantizer = quantizer_of(name)
    Q, d = quantizer.codes_per_token, quantizer.code_channels()
    before = torch.cat(quantizer.tables()).detach().clone()
    rows, vectors = torch.tensor([K + 7, 0, Q * K - 1]), 100 + torch.randn(3, d)
    quantizer.replace_codes(rows, vectors)
    after = torch.cat(quantizer.tables())
    assert torch.equal(after[rows], vectors)
    rest = torch.ones(Q * K, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(after[rest], before[rest])
    state = quantizer.state_dict()
    assert set(quantizer.code_rows) == state.keys() and all(len(value) == K for value in state.values())
    places = [key.split(".")[1] for key in quantizer.code_rows]
    assert places == sorted(places) and all(places.count(place) == len(places) / Q for place in places)


@pytest.mark.parametrize("name", GRIDS)
def test_quantizers_without_single_codes_say_so(name):
    quantizer = quantizer_of(name)
    assert quantizer.code_rows == ()
    with pytest.raises(NotImplementedError, match=f"{name} has no codes to replace"):
        quantizer.replace_codes(torch.tensor([0]), torch.zeros(1, C))
    with pytest.raises(NotImplementedError, match=f"{name} has no codebook to fill"):
        quantizer.fill(torch.zeros(K, C))


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_vectors_are_quantized_to_their_codes(name):
    quantizer, z = quantizer_of(name), latents(1)
    quantized = quantizer(z)
    vectors, codes = quantizer.to_vectors(z), quantizer.to_vectors(quantized.codes)
    parts = quantizer.parts(vectors, codes, quantized.indices)
    assert len(parts) == quantizer.codes_per_token
    assert all(own.shape == code.shape == (1, 4, 4, 4, quantizer.code_channels()) for own, code in parts)
    if name not in SEVERAL:
        assert parts[0][0] is vectors and parts[0][1] is codes
        return
    for place, ((own, code), table) in enumerate(zip(parts, quantizer.tables(), strict=True)):
        assert torch.equal(nearest_ids(own, table), quantized.indices[..., place])
        assert torch.equal(code, table[quantized.indices[..., place]])


# --- the empty code -------------------------------------------------------------------------------------------


def with_empty_code(plain: Quantizer, name: str) -> Quantizer:
    """The same learned codes, with ids from 1 on."""
    shape = {"n_embed": K + 1, "embed_dim": plain.embed_dim, "latent_channels": C, "group": list(plain.group)}
    quantizer = build({"name": name.split()[0], "args": {**shape, **OWN_ARGS[name], "empty_code": True}})
    quantizer.load_state_dict(plain.state_dict())
    return quantizer


@pytest.mark.parametrize("group", [None, [2, 2, 1]])
@pytest.mark.parametrize("name", NAMES)
def test_with_an_empty_code_only_occupied_tokens_exist(name, group):
    """Bit for bit what the occupied vectors alone give, whatever the latents of the others are."""
    alone = quantizer_of(name, group)
    fresh = copy.deepcopy(with_empty_code(alone, name))
    assert (fresh.n_embed, fresh.codebook_size, fresh.first_code) == (K + 1, K, 1)
    assert (alone.n_embed, alone.codebook_size, alone.first_code) == (K, K, 0)
    several = () if fresh.codes_per_token == 1 else (fresh.codes_per_token,)
    generator = torch.Generator().manual_seed(5)
    tokens = fresh.to_vectors(latents())
    occupied = torch.rand(tokens.shape[:-1], generator=generator) < 0.4
    weight = torch.randn(tokens.shape, generator=generator)

    own = tokens[occupied].requires_grad_()
    codes, rows, losses = alone.train().quantize(own)
    ((codes * weight[occupied]).sum() + sum(losses.values())).backward()
    for others in (0.0, 1e9, torch.inf, torch.nan):
        quantizer = copy.deepcopy(fresh).train()
        z = quantizer.ungroup_cells(tokens.masked_fill(~occupied[..., None], others)).detach().requires_grad_()
        got = quantizer(z, occupied)
        assert got.indices.shape == (*occupied.shape, *several) and got.codes.shape == z.shape
        assert torch.equal(got.indices[occupied], rows + 1) and (got.indices[~occupied] == 0).all()
        assert 1 <= got.indices[occupied].min() and got.indices.max() <= K
        got_codes = quantizer.to_vectors(got.codes)
        assert torch.equal(got_codes[occupied], codes) and (got_codes[~occupied] == 0).all()
        assert got.losses.keys() == losses.keys()
        assert all(torch.equal(value, losses[key]) for key, value in got.losses.items())
        ((got_codes * weight).sum() + sum(got.losses.values())).backward()
        gradient = quantizer.to_vectors(z.grad)
        assert torch.equal(gradient[occupied], own.grad) and (gradient[~occupied] == 0).all()
        for (key, parameter), want in zip(quantizer.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(parameter.grad, want.grad), key
        for key, value in alone.state_dict().items():
            assert torch.equal(quantizer.state_dict()[key], value), key
        for ids in (got.indices, got.indices.flatten(1)):
            assert torch.equal(fresh.lookup(ids), got.codes)
        assert torch.equal(fresh.occupied(got.indices), occupied)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_an_occupied_token_is_all_zero_and_moves_no_code(name):
    alone = quantizer_of(name)
    quantizer, z = with_empty_code(alone, name).train(), latents(2).requires_grad_()
    got = quantizer(z, torch.zeros(2, 4, 4, 4, dtype=torch.bool))
    assert (got.codes == 0).all() and (got.indices == 0).all() and got.codes.shape == z.shape
    assert got.losses.keys() == set(quantizer.losses) and all(value == 0 for value in got.losses.values())
    (got.codes.sum() + sum(got.losses.values())).backward()
    assert (z.grad == 0).all()
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in quantizer.parameters())
    ids = with_empty_code(alone, name).eval()(latents(1), torch.ones(1, 4, 4, 4, dtype=torch.bool)).indices
    torch.testing.assert_close(quantizer.lookup(ids), alone.lookup(ids - 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_asks_for_the_learned_codes(name):
    asked = []

    def first_ones(vectors, count):
        asked.append(count)
        return vectors[:count].clone()

    plain = quantizer_of(name)
    quantizer = with_empty_code(quantizer_of(name), name)
    quantizer.fit(quantizer.to_vectors(latents()).flatten(0, -2), first_ones)
    assert set(asked) <= {K} and len(asked) == (0 if name in GRIDS else quantizer.codes_per_token)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in quantizer.state_dict().items())


def test_occupied_tokens_must_be_told_with_an_empty_code_and_are_unused_without():
    plain, z = quantizer_of("VectorQuantizer", [1, 1, 4]), latents(2)
    quantizer = with_empty_code(plain, "VectorQuantizer")
    with pytest.raises(ValueError, match=r"occupied must be \[2, 4, 4, 1\]; it is missing"):
        quantizer(z)
    with pytest.raises(ValueError, match=r"occupied must be \[2, 4, 4, 1\]; it is \[2, 4, 4, 4\]"):
        quantizer(z, torch.ones(2, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"occupied must be \[2, 4, 4, 1\]; it is \[2, 16\]"):
        quantizer(z, torch.ones(2, 16, dtype=torch.bool))
    some, none = plain(z, torch.zeros(2, 4, 4, 1, dtype=torch.bool)), plain(z)
    assert torch.equal(some.codes, none.codes) and torch.equal(some.indices, none.indices)
    assert plain.occupied(none.indices).all()


def test_fixed_grids_have_one_id_more_than_points():
    for name in GRIDS:
        quantizer = with_empty_code(quantizer_of(name), name)
        assert quantizer.table().shape == (K, C) and quantizer.points.shape[0] == K
    fsq, lfq = (MODELS.get(name, "") for name in GRIDS)
    for size in (K, K + 2):
        message = rf"make 32 codes, but n_embed is {size}, of which one is the empty code; set n_embed to 33"
        with pytest.raises(ValueError, match=message):
            fsq(n_embed=size, levels=[8, 4], empty_code=True)
        with pytest.raises(ValueError, match=f"n_embed {size} is not a power of two plus one for the empty code; use"):
            lfq(n_embed=size, empty_code=True)


# --- the layout of tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [[1, 1, 4], [2, 2, 1], [4, 1, 1], [1, 2, 2], [2, 2, 2]])
def test_a_token_holds_its_cells_in_order_of_x_y_z(group):
    cells = group[0] * group[1] * group[2]
    layout = Quantizer(2, 3 * cells, 3, group)
    z = torch.arange(2 * 3 * 4 * 8 * 12.0).view(2, 3, 4, 8, 12)
    tokens = layout.to_vectors(z)
    assert tokens.shape == (2, 4 // group[0], 8 // group[1], 12 // group[2], 3 * cells)
    assert tuple(tokens.shape[1:4]) == layout.lattice((4, 8, 12))
    for b, i, j, k in [(0, 0, 0, 0), (1, 0, 1, 2), (1, tokens.shape[1] - 1, tokens.shape[2] - 1, tokens.shape[3] - 1)]:
        x, y, w = i * group[0], j * group[1], k * group[2]
        own = z[b, :, x : x + group[0], y : y + group[1], w : w + group[2]]
        assert torch.equal(tokens[b, i, j, k], own.permute(1, 2, 3, 0).flatten())
    assert torch.equal(layout.ungroup_cells(tokens), z)
    mask = z[:, :1]
    assert torch.equal(layout.ungroup_cells(layout.group_cells(mask)), mask)


def test_without_a_group_cells_lie_along_z():
    layouts = [Quantizer(2, 32, 8, group) for group in (None, [1, 1, 4])]
    z = torch.randn(1, 8, 16, 16, 16)
    assert layouts[0].group == layouts[1].group == (1, 1, 4)
    assert torch.equal(layouts[0].to_vectors(z), layouts[1].to_vectors(z))
    t = 777
    x, y, first = t // 64, (t // 4) % 16, 4 * (t % 4)
    cells = torch.cat([z[0, :, x, y, first + cell] for cell in range(4)])
    assert torch.equal(layouts[0].to_vectors(z).view(1024, 32)[t], cells)


def test_groups_that_do_not_fit_are_named():
    for group in ([1, 1, 2], [2, 2], [1, 1, 1, 4]):
        with pytest.raises(ValueError, match=r"along x, y and z, 4 in all.*Use one such as \[1, 1, 4\]"):
            Quantizer(2, 32, 8, group)
    with pytest.raises(ValueError, match="covers 2 cells along y, and the latent's 5 cells do not divide"):
        Quantizer(2, 32, 8, [2, 2, 1]).lattice((4, 5, 4))
    with pytest.raises(ValueError, match="2 tokens of 4 cells do not make a cubic latent"):
        quantizer_of("VectorQuantizer", [1, 1, 4]).lookup(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be \[B, X', Y', Z', 3\]; they are \[1, 4, 4, 4\]"):
        quantizer_of("ResidualVectorQuantizer").lookup(torch.zeros(1, 4, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="in 63 codes, 3 per token, of 1 cells do not make a cubic latent"):
        quantizer_of("ResidualVectorQuantizer").lookup(torch.zeros(1, 63, dtype=torch.int64))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"levels \[4, 4\] make 16 codes, but n_embed is 8192"):
        MODELS.get("FiniteScalarQuantizer", "")(levels=[4, 4])
    with pytest.raises(ValueError, match="n_embed 1000 is not a power of two; use 512 or 1024"):
        MODELS.get("LookupFreeQuantizer", "")(n_embed=1000)
    with pytest.raises(ValueError, match="num_codes 3 does not divide embed_dim 8"):
        MODELS.get("ProductVectorQuantizer", "")(num_codes=3)


@pytest.mark.parametrize("args", [{"name": "LookupFreeQuantizer"}, {"name": "FiniteScalarQuantizer", "levels": []}])
def test_a_grid_of_one_code_is_refused(args):
    args = dict(args)
    spec = {"name": args.pop("name"), "args": {"n_embed": 2, "empty_code": True, **args}}
    with pytest.raises(ConfigError, match="n_embed 2 leaves a grid of a single code"):
        build(spec)


# --- numbers gone bad ---


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e18, 1e30, -3e38])
@pytest.mark.parametrize("name", NAMES)
def test_absurd_numbers_leave_codes_finite_and_other_vectors_alone(name, value):
    quantizer, z = quantizer_of(name).train(), latents(2)
    want = copy.deepcopy(quantizer)(z)
    z[0, :, 1, 2, 3], z[1, 2, 0] = value, value
    others = torch.ones(2, 4, 4, 4, dtype=torch.bool)
    others[0, 1, 2, 3] = others[1, 0] = False
    got = quantizer(z)
    assert torch.equal(got.indices[others], want.indices[others])
    assert torch.equal(got.codes.movedim(1, -1)[others], want.codes.movedim(1, -1)[others])
    for batch in (z, torch.full_like(z, value), z):
        indices = quantizer(batch).indices
        assert 0 <= indices.min() and indices.max() < K
        assert all(state.isfinite().all() for state in quantizer.state_dict().values())


@pytest.mark.parametrize("name", AVERAGES)
def test_codes_stay_if_no_vector_is_left_to_follow(name):
    """With a decay of 0 nothing of the counts is kept, as after very many steps with another one."""
    quantizer = quantizer_of(name).train()
    quantizer.decay = 0.0
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.full((1, C, 4, 4, 4), torch.nan))
    after = quantizer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key.endswith("weight"))
    assert all(value.isfinite().all() for value in after.values())
