"""Each algorithm against its formula, and two ranks against one."""

import copy
import socket

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F

from trellis.models import load_weights
from trellis.modules.quantizers import (
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    IndexBackpropagationQuantizer,
    LookupFreeQuantizer,
    ProductVectorQuantizer,
    ResidualVectorQuantizer,
    RotationVectorQuantizer,
    SimVQ,
    VectorQuantizer,
    ibq,
)
from trellis.modules.quantizers.rotation import rotated_onto
from trellis.utils import dist_utils
from trellis.utils.errors import CheckpointError

SMALL = {"n_embed": 16, "embed_dim": 4, "latent_channels": 4}


def latents(batch: int = 4, channels: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, channels, 2, 2, 2, generator=torch.Generator().manual_seed(seed))


def vectors_of(z: torch.Tensor) -> torch.Tensor:
    return z.permute(0, 2, 3, 4, 1).flatten(0, -2)


def filled(cls, **args):
    torch.manual_seed(0)
    quantizer = cls(**{**SMALL, **args})
    quantizer.fit(torch.randn(200, 4), lambda vectors, count: vectors[:count].clone())
    return quantizer.train()


# --- moving averages ------------------------------------------------------------------------------------------


def test_ema_codes_follow_the_formula():
    quantizer = filled(EMAVectorQuantizer, decay=0.9, epsilon=1e-3)
    codes = quantizer.table().double().clone()
    codes[5] = 1e3  # no vector comes near
    quantizer.fill(codes.float())
    sums, counts = codes.clone(), torch.ones(16, dtype=torch.float64)
    for step in range(4):
        z = latents(seed=step)
        vectors = vectors_of(z).double()
        nearest = torch.cdist(vectors, codes).argmin(1)
        assert torch.equal(quantizer(z).indices.flatten(), nearest)
        chosen = F.one_hot(nearest, 16).double()
        counts = 0.9 * counts + 0.1 * chosen.sum(0)
        sums = 0.9 * sums + 0.1 * chosen.T @ vectors
        smoothed = (counts + 1e-3) / (counts.sum() + 16e-3) * counts.sum()
        codes = sums / smoothed[:, None]
        torch.testing.assert_close(quantizer.table().double(), codes, rtol=1e-5, atol=1e-6)
    state = quantizer.state_dict()
    assert state.keys() == {"embeddings.weight", "sums", "counts"} and not list(quantizer.parameters())


def test_ema_codes_move_in_training_mode_only_also_without_gradients():
    quantizer = filled(EMAVectorQuantizer)
    before = quantizer.table().clone()
    quantizer.eval()(latents().requires_grad_())
    assert torch.equal(quantizer.table(), before)
    with torch.no_grad():
        quantizer.train()(latents())
    assert not torch.equal(quantizer.table(), before)


def test_ema_codes_stay_finite_in_a_step_with_an_overflow():
    quantizer = filled(EMAVectorQuantizer)
    z = latents()
    usual = copy.deepcopy(quantizer)
    z[0, 1, 0, 0, 0] = torch.inf
    quantizer(z)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    usual(latents())
    assert quantizer.counts.sum() < usual.counts.sum()


def test_ema_takes_a_plain_codebook_with_fresh_statistics(tmp_path):
    plain = VectorQuantizer(n_embed=8, embed_dim=4, latent_channels=4)
    torch.save(plain.state_dict(), tmp_path / "quantizer.pt")
    taken, fresh = (EMAVectorQuantizer(n_embed=8, embed_dim=4, latent_channels=4) for _ in range(2))
    load_weights(taken, tmp_path / "quantizer.pt")
    fresh.fill(plain.embeddings.weight.detach())
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in taken.state_dict().items())
    torch.save(taken.state_dict() | {"sums": torch.zeros(7, 4)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="sums is .7, 4. there"):
        load_weights(taken, tmp_path / "other.pt")


def test_a_replaced_ema_code_keeps_its_place_and_has_fresh_statistics():
    quantizer = filled(EMAVectorQuantizer, decay=0.5)
    for step in range(3):
        quantizer(latents(seed=step))
    quantizer.replace_codes(torch.tensor([3]), torch.full((1, 4), 50.0))
    assert quantizer.counts[3] == 1 and torch.equal(quantizer.sums[3], torch.full((4,), 50.0))
    near = torch.full((1, 4, 2, 2, 2), 51.0)
    quantizer(near)  # eight vectors at 51: (0.5·50 + 0.5·8·51) / (0.5 + 0.5·8)
    torch.testing.assert_close(quantizer.table()[3], torch.full((4,), 229 / 4.5), rtol=1e-4, atol=0)


def _a_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = _steps_over_ranks(rank, 2)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # a rank that leaves early takes the store with it
    torch.distributed.destroy_process_group()


def _steps_over_ranks(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What one of `ranks` ranks has after steps on its share of the same batches."""
    results = {}
    ema = filled(EMAVectorQuantizer, decay=0.8)
    for step in range(3):
        ema(latents(seed=step).chunk(ranks)[rank])
    results |= {f"ema.{key}": value for key, value in ema.state_dict().items()}
    for cls in (ResidualVectorQuantizer, ProductVectorQuantizer):
        quantizer = filled(cls, num_codes=2, decay=0.8)
        for step in range(3):
            quantizer(latents(seed=step).chunk(ranks)[rank])
        results |= {f"ema.{cls.__name__}.{key}": value for key, value in quantizer.state_dict().items()}
    occupied = torch.rand(3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(7)) < 0.5
    occupied[1, 2:] = False  # a rank without a vector must not let the other one wait
    sizes = {"n_embed": 17, "empty_code": True}
    for cls in (EMAVectorQuantizer, ResidualVectorQuantizer, ProductVectorQuantizer):
        quantizer = filled(cls, decay=0.8, **sizes)
        for step in range(3):
            share = (whole.chunk(ranks)[rank] for whole in (latents(seed=step), occupied[step]))
            quantizer(*share)
        results |= {f"ema.{cls.__name__}.empty.{key}": value for key, value in quantizer.state_dict().items()}
    for cls in (LookupFreeQuantizer, IndexBackpropagationQuantizer):
        quantizer = filled(cls, **sizes)
        share = (whole.chunk(ranks)[rank] for whole in (latents(), occupied[1]))
        assert all(value.isfinite() for value in quantizer(*share).losses.values())
    for cls in (LookupFreeQuantizer, IndexBackpropagationQuantizer):
        quantizer = filled(cls)
        quantized = quantizer(latents().chunk(ranks)[rank])
        value = quantized.losses["entropy"] + quantized.losses["vq"]
        value.backward()
        results[f"{cls.__name__}.loss"] = dist_utils.all_mean(value.detach())
        for key, parameter in quantizer.named_parameters():
            if parameter.grad is not None:
                results[f"{cls.__name__}.{key}"] = dist_utils.all_mean(parameter.grad)
    return results


def test_two_ranks_equal_one_with_the_joint_batch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_a_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    one = _steps_over_ranks(0, 1)
    assert one.keys() == first.keys() and "IndexBackpropagationQuantizer.embeddings.weight" in one
    assert "ema.ResidualVectorQuantizer.embeddings.1.sums" in one
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        if key.startswith("ema."):
            assert torch.equal(first[key], value), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6, msg=key)


# --- gradients ------------------------------------------------------------------------------------------------


def test_the_rotation_is_one_and_turns_the_gradient_back():
    torch.manual_seed(0)
    z, e = torch.randn(5, 6, requires_grad=True), 3 * torch.randn(5, 6)
    rotated = rotated_onto(z, e)
    torch.testing.assert_close(rotated, e)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda x, row=row: rotated_onto(x, e[row]), z[row].detach())
        rotation = jacobian * z[row].norm() / e[row].norm()
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(6))
        assert torch.linalg.det(rotation) > 0
        # A gradient keeps its angle to the code as its angle to the latent.
        gradient = torch.randn(6)
        back = jacobian.T @ gradient
        angle = F.cosine_similarity(back, z[row].detach(), dim=0)
        torch.testing.assert_close(angle, F.cosine_similarity(gradient, e[row], dim=0))


def test_rotation_at_zero_and_at_opposite_vectors_has_finite_gradients():
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]], requires_grad=True)
    rotated_onto(z, torch.tensor([[1.0, 1.0], [-1.0, -2.0], [0.0, 0.0]])).sum().backward()
    assert z.grad.isfinite().all()


def test_the_rotated_gradient_reaches_latents_and_the_plain_one_the_codes():
    quantizer, z = filled(RotationVectorQuantizer), latents().requires_grad_()
    weight = torch.randn(vectors_of(z).shape)
    quantized = quantizer(z)
    (vectors_of(quantized.codes) * weight).sum().backward()
    plain = torch.zeros(16, 4).index_add_(0, quantized.indices.flatten(), weight)
    torch.testing.assert_close(quantizer.embeddings.weight.grad, plain)
    other = z.detach().clone().requires_grad_()
    (rotated_onto(vectors_of(other), vectors_of(quantized.codes.detach())) * weight).sum().backward()
    torch.testing.assert_close(z.grad, other.grad)


@pytest.mark.parametrize("chunk", [2**24, 80])  # five vectors at a time, and so in seven chunks
def test_ibq_equals_the_whole_matrix_of_soft_choices(monkeypatch, chunk):
    monkeypatch.setattr(ibq, "CHUNK_ELEMENTS", chunk)
    quantizer, z = filled(IndexBackpropagationQuantizer, temperature=0.7), latents().requires_grad_()
    weight = torch.randn(vectors_of(z).shape)
    quantized = quantizer(z)
    got = (vectors_of(quantized.codes) * weight).sum() + 0.3 * quantized.losses["entropy"]
    got_gradients = torch.autograd.grad(got, [z, quantizer.embeddings.weight])

    table, vectors = quantizer.embeddings.weight, vectors_of(z)
    p = (-(vectors[:, None] - table).square().sum(-1) / 0.7).softmax(1)
    choice = F.one_hot(quantized.indices.flatten(), 16).float() + p - p.detach()
    entropy = torch.special.entr(p).sum(1).mean() - torch.special.entr(p.mean(0)).sum()
    want = (choice @ table * weight).sum() + 0.3 * entropy
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_gradients, torch.autograd.grad(want, [z, table]), rtol=1e-4, atol=1e-5)
    assert (got_gradients[1].abs().amax(1) > 0).all()  # all codes, chosen or not


def test_ibq_makes_no_soft_choice_without_a_gradient(monkeypatch):
    quantizer = filled(IndexBackpropagationQuantizer)
    monkeypatch.setattr(ibq, "_soft_choice", None)
    with torch.no_grad():
        quantizer(latents())
    quantizer.requires_grad_(False)(latents())


def test_the_whole_simvq_codebook_moves_with_one_vector():
    quantizer = filled(SimVQ)
    assert torch.equal(quantizer.table(), quantizer.base)
    z = latents(1)[:, :, :1, :1, :1]
    before = quantizer.table().detach().clone()
    quantizer(z).losses["vq"].backward()
    with torch.no_grad():
        quantizer.map -= 0.1 * quantizer.map.grad
    assert ((quantizer.table() - before).abs().amax(1) > 0).all()
    torch.testing.assert_close(quantizer.table(), quantizer.base @ quantizer.map)
    assert quantizer.state_dict().keys() == {"base", "map"}


# --- several codes a token ------------------------------------------------------------------------------------


def test_residual_codes_are_nearest_to_what_is_left():
    quantizer, z = filled(ResidualVectorQuantizer, num_codes=3), latents()
    quantized = quantizer(z)
    left, total, vq, commit = vectors_of(z), 0, 0, 0
    for stage, table in enumerate(quantizer.tables()):
        ids = torch.cdist(left, table).argmin(1)
        assert torch.equal(quantized.indices[..., stage].flatten(), ids)
        vq = vq + (left - table[ids]).square().mean() / 3
        left, total = left - table[ids], total + table[ids]
        commit = commit + (vectors_of(z) - total).square().mean() / 3
    torch.testing.assert_close(vectors_of(quantized.codes), total)
    torch.testing.assert_close(quantized.losses, {"vq": vq, "commit": commit})
    averages = filled(ResidualVectorQuantizer, num_codes=3, decay=0.9)(z)
    assert torch.equal(averages.codes, quantized.codes) and torch.equal(averages.indices, quantized.indices)
    torch.testing.assert_close(averages.losses, {"vq": torch.zeros(()), "commit": commit})


def test_product_codes_are_nearest_part_by_part():
    quantizer, z = filled(ProductVectorQuantizer, num_codes=2), latents()
    quantized = quantizer(z)
    for part, (vectors, table) in enumerate(zip(vectors_of(z).chunk(2, 1), quantizer.tables(), strict=True)):
        ids = torch.cdist(vectors, table).argmin(1)
        assert table.shape == (16, 2) and torch.equal(quantized.indices[..., part].flatten(), ids)
        assert torch.equal(vectors_of(quantized.codes).chunk(2, 1)[part], table[ids])


def test_fits_go_stage_by_stage_and_part_by_part():
    vectors = torch.randn(100, 4)
    asked = []

    def first_ones(data, count):
        asked.append(data.clone())
        return data[:count]

    residual = ResidualVectorQuantizer(**SMALL)
    residual.fit(vectors, first_ones)
    first = residual.tables()[0].detach()
    assert torch.equal(asked[0], vectors)
    torch.testing.assert_close(asked[1], vectors - first[torch.cdist(vectors, first).argmin(1)])
    product = ProductVectorQuantizer(**SMALL)
    product.fit(vectors, first_ones)
    assert torch.equal(torch.cat(asked[2:], 1), vectors)
    assert torch.equal(torch.cat(product.tables(), 1), vectors[:16])


@pytest.mark.parametrize("cls", [ResidualVectorQuantizer, ProductVectorQuantizer])
def test_each_of_several_codebooks_follows_averages_as_one_alone(cls):
    """Bit for bit: every codebook beside an EMAVectorQuantizer that is given what that codebook quantizes."""
    rates = {"decay": 0.8, "epsilon": 1e-3}
    quantizer = filled(cls, num_codes=2, **rates)
    channels = quantizer.tables()[0].shape[1]
    alone = []
    for table in quantizer.tables():
        alone.append(EMAVectorQuantizer(n_embed=16, embed_dim=channels, latent_channels=channels, **rates).train())
        alone[-1].fill(table)
    for step in range(3):
        z = latents(seed=step)
        quantized = quantizer(z)
        left, codes = z, []
        for place, one in enumerate(alone):
            got = one(left if cls is ResidualVectorQuantizer else z.chunk(2, 1)[place])
            assert torch.equal(got.indices, quantized.indices[..., place])
            codes.append(got.codes)
            left = left - got.codes if cls is ResidualVectorQuantizer else left
            state = {f"embeddings.{place}.{key.split('.')[-1]}": value for key, value in one.state_dict().items()}
            assert all(torch.equal(quantizer.state_dict()[key], value) for key, value in state.items())
        together = sum(codes) if cls is ResidualVectorQuantizer else torch.cat(codes, 1)
        assert torch.equal(quantized.codes, together)
    assert len(quantizer.state_dict()) == 6 and not list(quantizer.parameters())
    quantizer.decay = 1.0  # nothing of a batch enters
    before = {key: value.clone() for key, value in quantizer.state_dict().items() if "weight" not in key}
    quantizer(latents(seed=9))
    assert all(torch.equal(quantizer.state_dict()[key], value) for key, value in before.items())
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer.decay = 0.5
    quantizer.eval()(latents(seed=10))
    assert all(torch.equal(quantizer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("cls", [ResidualVectorQuantizer, ProductVectorQuantizer])
def test_several_codebooks_that_followed_gradients_go_on_by_averages(cls, tmp_path):
    plain, averages = filled(cls), filled(cls, decay=0.9)
    assert plain.state_dict().keys() == {"embeddings.0.weight", "embeddings.1.weight"}
    assert len(list(plain.parameters())) == 2
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    averages(latents())
    torch.save(plain.state_dict(), tmp_path / "quantizer.pt")
    load_weights(averages, tmp_path / "quantizer.pt")
    state = averages.state_dict()
    for place, table in enumerate(plain.tables()):
        assert torch.equal(state[f"embeddings.{place}.weight"], table)
        assert torch.equal(state[f"embeddings.{place}.sums"], table)
        assert torch.equal(state[f"embeddings.{place}.counts"], torch.ones(16))
    whole = {key: value + 1 for key, value in state.items()}
    assert averages.completed(whole) is whole and plain.completed(whole) is whole
    torch.save({**state, "embeddings.1.sums": torch.zeros(7, 4)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="embeddings.1.sums is .7, 4. there"):
        load_weights(averages, tmp_path / "other.pt")


@pytest.mark.parametrize("cls", [ResidualVectorQuantizer, ProductVectorQuantizer])
def test_fresh_codebooks_are_drawn_in_order(cls):
    """As ever, so that a seed gives the weights that it gave before, by gradient or averages."""
    torch.manual_seed(5)
    quantizers = [cls(**SMALL, num_codes=2)]
    torch.manual_seed(5)
    quantizers.append(cls(**SMALL, num_codes=2, decay=0.9))
    torch.manual_seed(5)
    width = 4 if cls is ResidualVectorQuantizer else 2
    for tables in zip(*(quantizer.tables() for quantizer in quantizers), strict=True):
        want = torch.empty(16, width).uniform_(-1 / 16, 1 / 16)
        assert all(torch.equal(table, want) for table in tables)


# --- fixed grids ----------------------------------------------------------------------------------------------


def without_projections(cls, width: int, **args):
    quantizer = cls(embed_dim=width, latent_channels=width, **args)
    with torch.no_grad():
        for projection in (quantizer.proj_in, quantizer.proj_out):
            projection.weight.copy_(torch.eye(width))
            projection.bias.zero_()
    return quantizer


def test_fsq_rounds_each_dimension_to_its_levels():
    quantizer = without_projections(FiniteScalarQuantizer, 3, n_embed=60, levels=[5, 4, 3])
    table = quantizer.table()
    assert table.unique(dim=0).shape == (60, 3)
    assert [column.unique().tolist() for column in table.T] == [[-1, -0.5, 0, 0.5, 1], [-1, -0.5, 0, 0.5], [-1, 0, 1]]
    assert table[:5, 0].tolist() == [-1, -0.5, 0, 0.5, 1] and (table[:5, 1:] == -1).all()  # the first is fastest
    far = torch.tensor([-9.0, 0, 9]).view(3, 1, 1, 1, 1).expand(3, 3, 1, 1, 1)
    assert quantizer(far).codes[:, :, 0, 0, 0].tolist() == [[-1, -1, -1], [0, 0, 0], [1, 0.5, 1]]


@pytest.mark.parametrize("cls", [FiniteScalarQuantizer, LookupFreeQuantizer])
def test_a_fitted_grid_uses_its_levels_alike_and_projects_back_best(cls):
    torch.manual_seed(0)
    levels = {"levels": [8, 8, 8]} if cls is FiniteScalarQuantizer else {}
    quantizer = cls(n_embed=512, embed_dim=6, latent_channels=6, **levels)
    vectors = 5 + torch.randn(4000, 6) @ torch.randn(6, 6)
    quantizer.fit(vectors, None)
    indices = quantizer.ids_of(quantizer.project(vectors))
    levels = quantizer.points[indices]
    for column in levels.T:
        _, counts = column.unique(return_counts=True)
        assert counts.min() > 0.5 * counts.float().mean()
    ones = torch.cat([levels, torch.ones(4000, 1)], 1).double()
    best = ones @ torch.linalg.lstsq(ones, vectors.double()).solution
    torch.testing.assert_close(quantizer.table()[indices].double(), best, rtol=1e-4, atol=1e-4)


def test_a_fit_to_vectors_that_vary_in_no_direction_is_finite():
    for quantizer in (FiniteScalarQuantizer(n_embed=16, levels=[4, 4]), LookupFreeQuantizer(n_embed=16)):
        quantizer.fit(torch.full((50, 8), 3.0), None)
        quantized = quantizer(torch.full((1, 8, 2, 2, 2), 3.0))
        torch.testing.assert_close(quantized.codes, torch.full((1, 8, 2, 2, 2), 3.0))
        assert all(parameter.isfinite().all() for parameter in quantizer.parameters())


def test_lfq_ids_are_signs_and_its_entropies_those_of_the_softmax_over_all_codes():
    quantizer = without_projections(LookupFreeQuantizer, 5, n_embed=32, temperature=1.7).train()
    z = latents(channels=5).requires_grad_()
    quantized = quantizer(z)
    vectors = vectors_of(z)
    assert torch.equal(vectors_of(quantized.codes.detach()), torch.where(vectors > 0, 1.0, -1.0))
    assert torch.equal(quantized.indices.flatten(), ((vectors > 0) * 2 ** torch.arange(5)).sum(1))
    p = (-(vectors[:, None] - quantizer.points).square().sum(-1) / 1.7).softmax(1)
    want = torch.special.entr(p).sum(1).mean() - torch.special.entr(p.mean(0)).sum()
    torch.testing.assert_close(quantized.losses["entropy"], want)
    (got_gradient,) = torch.autograd.grad(quantized.losses["entropy"], z)
    torch.testing.assert_close(got_gradient, *torch.autograd.grad(want, z), rtol=1e-4, atol=1e-6)


def test_entropy_has_finite_gradients_where_a_choice_is_certain():
    for cls in (LookupFreeQuantizer, IndexBackpropagationQuantizer):
        quantizer, z = filled(cls, temperature=1e-3), (100 * latents()).requires_grad_()
        quantizer(z).losses["entropy"].backward()
        assert z.grad.isfinite().all()
        assert all(value.grad is None or value.grad.isfinite().all() for value in quantizer.parameters())
