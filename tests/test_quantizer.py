"""What quantizers share: the nearest code, k-means, the layout of tokens; and a new quantizer by the guide."""

import pytest
import torch
import torch.nn.functional as F
from helpers import VQ, checkpoint, exact_nearest, logged, run, tiny_config
from torch import nn

from trellis import SparseStructureTokenizer
from trellis.models import MODELS
from trellis.modules.quantizers import Quantizer, nearest
from trellis.modules.quantizers.base import straight_through
from trellis.modules.quantizers.kmeans import kmeans
from trellis.modules.quantizers.nearest import nearest_code
from trellis.modules.quantizers.vq import VectorQuantizer


@pytest.mark.parametrize("offset, spread", [(0, 1), (100, 1), (0, 1e-3), (3, 1e-6), (0, 1e6)])
def test_nearest_code_is_the_exact_one(offset, spread):
    """Also for codes so close, or so far from the origin, that fp32 distances cannot tell them apart."""
    torch.manual_seed(0)
    codebook = offset + spread * torch.randn(300, 8)
    vectors = offset + spread * torch.randn(500, 8)
    assert torch.equal(nearest_code(vectors, codebook), exact_nearest(vectors, codebook))


def test_nearest_code_takes_the_lowest_index_on_ties():
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    vectors = torch.tensor([[0.0, 0.0], [0.9, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    assert nearest_code(vectors, codebook).tolist() == [1, 1, 2, 1]
    assert nearest_code(vectors, torch.ones(50, 2)).tolist() == [0, 0, 0, 0]


def test_ids_do_not_depend_on_how_many_vectors_come_at_once():
    torch.manual_seed(0)
    codebook = 7 + 1e-4 * torch.randn(777, 32)
    vectors = 7 + 1e-4 * torch.randn(1001, 32)
    at_once = nearest_code(vectors, codebook)
    one_by_one = torch.cat([nearest_code(vector[None], codebook) for vector in vectors])
    assert torch.equal(at_once, one_by_one)


def test_no_matrix_of_all_distances_exists(monkeypatch):
    monkeypatch.setitem(nearest.TILE_ELEMENTS, "cpu", 1000)
    sizes = []
    real = torch.mm

    def recording(*args, **kwargs):
        result = real(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "mm", recording)
    nearest_code(torch.randn(5000, 4), torch.randn(100, 4))
    assert max(sizes) <= 1000 and sum(sizes) == 5000 * 128  # codes are filled up to whole blocks


def test_search_is_fp32_under_autocast():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(n_embed=64, embed_dim=8)
    z = torch.randn(2, 8, 4, 4, 4) / 64
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z)
    assert torch.equal(quantized.indices, quantizer(z).indices)
    assert quantized.codes.dtype == torch.float32


def test_token_t_covers_four_cells_along_z():
    """t = 64 x + 4 y + z/4 on the 16×16×4 lattice; a code holds its cells one after the other."""
    quantizer = VectorQuantizer(n_embed=16, embed_dim=32)
    z = torch.randn(1, 8, 16, 16, 16)
    tokens = quantizer.to_vectors(z).reshape(1024, 32)
    for t in (0, 1, 5, 64, 777, 1023):
        x, y, first = t // 64, (t // 4) % 16, 4 * (t % 4)
        expected = torch.cat([z[0, :, x, y, first + cell] for cell in range(4)])
        assert torch.equal(tokens[t], expected)


@pytest.mark.parametrize("embed_dim", [8, 16, 32])
def test_forward_and_lookup_agree_bit_for_bit(embed_dim):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(n_embed=50, embed_dim=embed_dim)
    z = torch.randn(2, 8, 4, 4, 4, requires_grad=True)
    quantized = quantizer(z)
    assert quantized.codes.shape == z.shape
    assert torch.equal(quantized.codes, quantizer.lookup(quantized.indices))
    assert torch.equal(quantized.codes, quantizer.lookup(quantized.indices.flatten(1)))
    again = quantizer(quantized.codes.detach())
    assert torch.equal(again.codes, quantized.codes)


def test_reconstruction_gradient_reaches_codes_and_encoder():
    """d(codes)/d(e) and d(codes)/d(z) are both the identity."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(n_embed=10, embed_dim=8)
    z = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
    weight = torch.randn(1, 8, 2, 2, 2)
    quantized = quantizer(z)
    (quantized.codes * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    per_code = torch.zeros(10, 8).index_add_(0, quantized.indices.flatten(), weight.permute(0, 2, 3, 4, 1).view(8, 8))
    torch.testing.assert_close(quantizer.embeddings.weight.grad, per_code)


def test_codes_learn_from_the_reconstruction_under_a_frozen_encoder():
    quantizer = VectorQuantizer(n_embed=10, embed_dim=8)
    quantized = quantizer(torch.randn(1, 8, 2, 2, 2))
    quantized.codes.sum().backward()
    assert quantizer.embeddings.weight.grad.abs().sum() > 0


def test_losses_pull_only_their_own_side():
    quantizer = VectorQuantizer(n_embed=10, embed_dim=8)
    z = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
    losses = quantizer(z).losses
    assert torch.autograd.grad(losses["vq"], z, retain_graph=True, allow_unused=True)[0] is None
    assert (
        torch.autograd.grad(losses["commit"], quantizer.embeddings.weight, allow_unused=True, retain_graph=True)[0]
        is None
    )
    error = F.mse_loss(z, quantizer.lookup(quantizer(z).indices))
    torch.testing.assert_close(losses["vq"], error)
    torch.testing.assert_close(losses["commit"], error)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="embed_dim 12 is not a multiple of the latent's 8 channels"):
        VectorQuantizer(embed_dim=12)
    with pytest.raises(ValueError, match="covers 4 cells along z, and the latent's 6 cells do not divide"):
        VectorQuantizer(n_embed=4, embed_dim=32)(torch.randn(1, 8, 4, 4, 6))
    with pytest.raises(ValueError, match="60 tokens of 4 cells do not make a cubic latent"):
        VectorQuantizer(n_embed=4, embed_dim=32).lookup(torch.zeros(1, 60, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the latent must be \[B, 8, X, Y, Z\]"):
        VectorQuantizer(n_embed=4)(torch.randn(1, 4, 4, 4, 4))


def test_kmeans_recovers_separate_clusters():
    torch.manual_seed(0)
    centers = 10 * torch.randn(20, 4)
    vectors = (centers[:, None] + 0.01 * torch.randn(20, 50, 4)).flatten(0, 1)
    codes = kmeans(vectors, 20, iterations=10, generator=torch.Generator().manual_seed(0))
    expected = vectors.view(20, 50, 4).mean(1)
    order = nearest_code(expected, codes)
    assert len(order.unique()) == 20
    torch.testing.assert_close(codes[order], expected, atol=1e-5, rtol=1e-5)


def test_kmeans_never_gets_worse_and_is_seeded():
    torch.manual_seed(0)
    vectors = torch.randn(2000, 8)

    def error(iterations, seed=0):
        codes = kmeans(vectors, 64, iterations=iterations, generator=torch.Generator().manual_seed(seed))
        return (vectors - codes[nearest_code(vectors, codes)]).square().sum().item(), codes

    errors = [error(iterations)[0] for iterations in (0, 1, 3, 10)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    assert torch.equal(error(3)[1], error(3)[1])
    assert not torch.equal(error(3)[1], error(3, seed=1)[1])


def test_kmeans_gives_few_codes_to_near_identical_vectors():
    """Most cells of a latent are empty space and alike; they must not take most of the codebook."""
    torch.manual_seed(0)
    vectors = torch.cat([1e-4 * torch.randn(9000, 8), 5 + torch.randn(1000, 8)])
    codes = kmeans(vectors, 100, iterations=5, generator=torch.Generator().manual_seed(0))
    assert (codes.norm(dim=1) < 1).sum() <= 2


def test_kmeans_with_fewer_vectors_than_codes_uses_them_all():
    vectors = torch.arange(12.0).view(6, 2)
    codes = kmeans(vectors, 10, iterations=3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes.unique(dim=0), vectors)
    with pytest.raises(ValueError, match="finite"):
        kmeans(torch.full((4, 2), torch.nan), 2, iterations=1, generator=torch.Generator())


class ManhattanQuantizer(Quantizer):
    """A codebook searched by the sum of absolute differences, written by CONTRIBUTING.md and `Quantizer` alone."""

    nearest_of_table = False
    code_rows = ("codes",)

    def __init__(self, *, power: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.power = power
        self.codes = nn.Parameter(torch.zeros(self.n_embed, self.embed_dim))

    def quantize(self, vectors):
        flat = vectors.flatten(0, -2)
        indices = torch.cdist(flat, self.codes, p=self.power).argmin(1).view(vectors.shape[:-1])
        codes = self.decode(indices)
        losses = {"vq": F.l1_loss(codes, vectors.detach()), "commit": F.l1_loss(vectors, codes.detach())}
        return straight_through(codes, vectors), indices, losses

    def table(self):
        return self.codes

    @torch.no_grad()
    def fill(self, codes):
        self.codes.copy_(codes)

    @torch.no_grad()
    def replace_codes(self, rows, vectors):
        self.codes[rows] = vectors


def test_a_quantizer_by_the_guide_runs_stage_1_from_kmeans(vae_run, data_dir, write_config, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS.classes, "ManhattanQuantizer", __name__)
    config = tiny_config(VQ, freeze=["encoder", "decoder"], loss_type="l1", max_steps=4, revive_every=2)
    config["models"]["quantizer"]["name"] = "ManhattanQuantizer"
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    before, after = (checkpoint(tmp_path / "run", n)[f"quantizer_step000000{n}.pt"]["codes"] for n in (0, 4))
    assert before.any(1).sum() > 1 and not torch.equal(before, after)
    assert all({"vq", "commit", "l1"} <= line.keys() for line in logged(tmp_path / "run") if "loss" in line)
    tokenizer = SparseStructureTokenizer.load(tmp_path / "run")
    ids = tokenizer.encode(torch.ones(1, 1, 16, 16, 16))
    assert ids.shape == (1, 64) and tokenizer.decode(ids).shape == (1, 1, 16, 16, 16)
