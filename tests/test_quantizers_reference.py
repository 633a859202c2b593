"""The quantizers against an independent implementation, if it has the same algorithm."""

import pytest
import torch

from trellis.modules.quantizers import (
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    ResidualVectorQuantizer,
    RotationVectorQuantizer,
    SimVQ,
    VectorQuantizer,
)

reference = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is of the test extra")

SHAPE = {"n_embed": 32, "embed_dim": 4, "latent_channels": 4}


def codes_and_latents() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 4), torch.randn(2, 4, 4, 4, 4)


def as_rows(z: torch.Tensor) -> torch.Tensor:
    """[B, C, X, Y, Z] to [B, N, C]."""
    return z.permute(0, 2, 3, 4, 1).flatten(1, 3)


def reference_vq(codes: torch.Tensor, **args):
    quantizer = reference.VectorQuantize(dim=4, codebook_size=len(codes), **args)
    set_codebook(quantizer, codes)
    return quantizer


def set_codebook(quantizer, codes: torch.Tensor) -> None:
    state = quantizer._codebook
    state.embed.data.copy_(codes[None])
    state.embed_avg.data.copy_(codes[None])
    state.cluster_size.data.fill_(1)


def test_vector_quantizer():
    codes, z = codes_and_latents()
    ours = VectorQuantizer(**SHAPE)
    ours.fill(codes)
    want, indices, loss = reference_vq(codes, commitment_weight=1.0).train()(as_rows(z))
    got = ours(z)
    assert torch.equal(got.indices.flatten(1), indices)
    torch.testing.assert_close(as_rows(got.codes), want)
    torch.testing.assert_close(got.losses["commit"], loss.squeeze())


def test_ema_update():
    codes, z = codes_and_latents()
    ours = EMAVectorQuantizer(**SHAPE, decay=0.7, epsilon=1e-4).train()
    ours.fill(codes)
    theirs = reference_vq(codes, decay=0.7, eps=1e-4).train()
    for step in range(3):
        _, indices, _ = theirs(as_rows(z + step))
        assert torch.equal(ours(z + step).indices.flatten(1), indices)
        torch.testing.assert_close(ours.table(), theirs._codebook.embed[0])
        torch.testing.assert_close(ours.counts, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.sums, theirs._codebook.embed_avg[0])


def test_rotation_gradient():
    codes, z = codes_and_latents()
    weight = torch.randn(2, 64, 4)
    ours = RotationVectorQuantizer(**SHAPE)
    ours.fill(codes)
    theirs = reference_vq(codes, rotation_trick=True).train()
    gradients = []
    for forward in (lambda x: as_rows(ours(x).codes), lambda x: theirs(as_rows(x))[0]):
        x = z.clone().requires_grad_()
        (forward(x) * weight).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(as_rows(gradients[0]), weight)


def test_simvq():
    codes, z = codes_and_latents()
    ours = SimVQ(**SHAPE).train()
    ours.fill(codes)
    theirs = reference.SimVQ(dim=4, codebook_size=32, rotation_trick=False, commitment_weight=1.0).train()
    theirs.frozen_codebook.data.copy_(codes)
    with torch.no_grad():
        ours.map += 0.3 * torch.randn(4, 4)
        theirs.code_transform.weight.copy_(ours.map.T)
    want, indices, loss = theirs(as_rows(z))
    got = ours(z)
    assert torch.equal(got.indices.flatten(1), indices)
    torch.testing.assert_close(as_rows(got.codes), want)
    torch.testing.assert_close(got.losses["vq"] + 0.25 * got.losses["commit"], loss)  # its default share
    (got.losses["vq"]).backward()
    loss.backward()
    torch.testing.assert_close(ours.map.grad.T, theirs.code_transform.weight.grad)


@pytest.mark.parametrize("levels", [[8, 5, 4], [3, 3, 3], [3, 7, 6]])
def test_finite_scalars(levels):
    torch.manual_seed(0)
    z = 2 * torch.randn(4, 3, 4, 4, 4)
    product = levels[0] * levels[1] * levels[2]
    ours = FiniteScalarQuantizer(n_embed=product, embed_dim=3, latent_channels=3, levels=levels)
    with torch.no_grad():
        for projection in (ours.proj_in, ours.proj_out):
            projection.weight.copy_(torch.eye(3))
            projection.bias.zero_()
    theirs = reference.FSQ(levels=levels)
    want, indices = theirs(as_rows(z))
    got = ours(z)
    # It stretches the bound by a thousandth, so the boundaries between levels differ slightly.
    place = ours.soft(as_rows(z).double()) * ours.middle
    clear = ((place - place.floor() - 0.5).abs() > 0.01).all(-1)
    assert clear.float().mean() > 0.8
    assert torch.equal(got.indices.flatten(1)[clear], indices.long()[clear])
    torch.testing.assert_close(as_rows(got.codes)[clear], want[clear])
    torch.testing.assert_close(ours.table(), theirs.indices_to_codes(torch.arange(product)))


def test_lookup_free():
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, 4, 4)
    ours = LookupFreeQuantizer(n_embed=32, embed_dim=5, latent_channels=5, temperature=0.5).train()
    with torch.no_grad():
        for projection in (ours.proj_in, ours.proj_out):
            projection.weight.copy_(torch.eye(5))
            projection.bias.zero_()
    theirs = reference.LFQ(dim=5, codebook_size=32, commitment_loss_weight=1.0).train()
    (want, indices, _), parts = theirs(as_rows(z), inv_temperature=2.0, return_loss_breakdown=True)
    got = ours(z)
    torch.testing.assert_close(as_rows(got.codes), want)
    bits = [indices >> place & 1 for place in reversed(range(5))]  # it takes the first sign as the highest bit
    assert torch.equal(got.indices.flatten(1), sum(bit << place for place, bit in enumerate(bits)))
    torch.testing.assert_close(
        got.losses["entropy"], parts.per_sample_entropy - parts.batch_entropy, rtol=1e-3, atol=1e-3
    )  # it keeps probabilities away from zero
    torch.testing.assert_close(got.losses["commit"], parts.commitment)


def test_residual_codes():
    codes, z = codes_and_latents()
    ours = ResidualVectorQuantizer(**SHAPE, num_codes=3)
    ours.fit(as_rows(z).flatten(0, 1), lambda vectors, count: vectors[:count])
    theirs = reference.ResidualVQ(dim=4, codebook_size=32, num_quantizers=3).eval()
    for layer, table in zip(theirs.layers, ours.tables(), strict=True):
        set_codebook(layer, table.detach())
    want, indices, _ = theirs(as_rows(z))
    got = ours(z)
    assert torch.equal(got.indices.flatten(1, 3), indices)
    torch.testing.assert_close(as_rows(got.codes), want)
