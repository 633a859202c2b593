import json

import pytest
import torch
import torch.nn.functional as F
from helpers import PARITY, assert_logits

from trellis.models import build, from_pretrained
from trellis.modules.blocks3d import ResBlock3d, UpsampleBlock3d
from trellis.modules.norm import ChannelLayerNorm32
from trellis.modules.spatial import voxel_shuffle_3d
from trellis.utils.errors import CheckpointError, ConfigError


def encoder_spec(**args) -> dict:
    defaults = {"in_channels": 1, "latent_channels": 4, "num_res_blocks": 1, "channels": [4, 8]}
    return {"name": "SparseStructureEncoder", "args": {**defaults, **args}}


@pytest.mark.parametrize("parity", PARITY)
def test_published_architecture_gives_the_expected_outputs(parity):
    from safetensors.torch import load_file

    expected = load_file(parity / "ss_vae" / "expected.safetensors")
    encoder = from_pretrained(str(parity / "ss_vae" / "encoder"))
    decoder = from_pretrained(str(parity / "ss_vae" / "decoder"))
    with torch.no_grad():
        z, mean, logvar = encoder(expected["x"].float(), return_raw=True)
        logits = decoder(mean)
    assert torch.equal(z, mean)
    for got, want in ((mean, "mean"), (logvar, "logvar"), (logits, "logits")):
        torch.testing.assert_close(got, expected[want], atol=1e-4, rtol=0)


@pytest.mark.parametrize("parity", PARITY)
def test_published_token_layout_gives_the_expected_tokens(parity):
    from safetensors.torch import load_file

    folder = parity / "shapellm_vqvae"
    expected = load_file(folder / "expected.safetensors")
    weights = torch.load(folder / "3DVQVAE_small.bin", weights_only=True)
    sizes = json.loads((folder / "config.json").read_text())
    depths = {"num_res_blocks": 2, "num_res_blocks_middle": 2}  # if the file does not say
    shape = {"latent_channels": 8, **{key: sizes.get(key, depth) for key, depth in depths.items()}}
    specs = {
        "Encoder.": ("SparseStructureEncoder", {"in_channels": 1, "channels": sizes["channels"], **shape}),
        "Decoder.": ("SparseStructureDecoder", {"out_channels": 1, "channels": sizes["channels"][::-1], **shape}),
        "vq.": ("VectorQuantizer", {"n_embed": sizes["num_embeddings"], "embed_dim": sizes["embedding_dim"]}),
    }
    models = []
    for prefix, (name, args) in specs.items():
        model = build({"name": name, "args": args})
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        models.append(model)
    encoder, decoder, quantizer = models
    with torch.no_grad():
        quantized = quantizer(encoder(expected["x"].float()))
        assert list(quantized.indices.shape[1:]) == sizes["token_grid"]
        assert torch.equal(quantized.indices.flatten(1).int(), expected["tokens"])
        assert_logits(decoder(quantized.codes), expected, atol=1e-4)


def test_posterior_sample_has_the_posterior_moments():
    torch.manual_seed(0)
    encoder = build(encoder_spec())
    x = torch.ones(1, 1, 16, 16, 16)
    with torch.no_grad():
        z, mean, logvar = encoder(x, return_raw=True)
        draws = torch.stack([encoder(x, sample_posterior=True) for _ in range(500)])
    assert torch.equal(z, mean)
    spread = ((draws - mean) / torch.exp(0.5 * logvar)).flatten()
    assert abs(spread.mean()) < 0.01 and abs(spread.std() - 1) < 0.01


def test_a_fresh_residual_block_is_the_identity():
    x = torch.randn(2, 8, 4, 4, 4)
    assert torch.equal(ResBlock3d(8)(x), x)


def test_layer_norm_is_over_channels_and_in_fp32():
    norm = ChannelLayerNorm32(8)
    x = torch.randn(2, 8, 3, 4, 5, dtype=torch.bfloat16) * 100
    y = norm(x)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    wide = x.float()
    mean, var = wide.mean(1, keepdim=True), wide.var(1, keepdim=True, unbiased=False)
    assert torch.equal(y, ((wide - mean) / (var + norm.eps).sqrt()).to(torch.bfloat16))


def test_voxel_shuffle_sends_each_channel_to_its_voxel():
    x = torch.arange(2 * 16 * 3 * 2 * 4).view(2, 16, 3, 2, 4)
    y = voxel_shuffle_3d(x, 2)
    for c in range(2):
        for i, j, k in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
            assert torch.equal(y[:, c, i::2, j::2, k::2], x[:, (i * 4 + j * 2 + k) * 2 + c])


def test_upsampling_is_a_convolution_and_a_pixel_shuffle():
    block, x = UpsampleBlock3d(3, 4), torch.randn(2, 3, 3, 4, 2)
    wide = F.conv3d(x, block.conv.weight, block.conv.bias, padding=1)  # channel 8·c + s for voxel s
    expected = wide.unflatten(1, (4, 2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, 4, 6, 8, 4)
    torch.testing.assert_close(block(x), expected)


def test_group_norm_goes_to_the_last_layer_only():
    model = build(encoder_spec(channels=[4, 32], norm_type="group"))
    assert type(model.out_layer[0]).__name__ == "GroupNorm32"
    assert all(type(m.norm1).__name__ == "ChannelLayerNorm32" for m in model.modules() if isinstance(m, ResBlock3d))


@pytest.mark.parametrize(
    "args, message",
    [
        ({"chanels": [4]}, r"model\.args\.chanels is unknown; did you mean channels\?"),
        ({"channels": [4, 0]}, r"channels is \[4, 0\]; it must be list of integer >= 1"),
        ({"norm_type": "batch"}, 'norm_type is "batch"; it must be "layer" or "group"'),
        ({"norm_type": "group"}, "8 channels do not divide by 32"),
        ({"use_fp16": 1}, "use_fp16 is 1; it must be boolean"),
    ],
)
def test_wrong_arguments_name_the_key(args, message):
    with pytest.raises(ConfigError, match=message):
        build(encoder_spec(**args))


def test_weights_that_do_not_fit_are_named(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "small.json").write_text(json.dumps(encoder_spec()))
    save_file(
        {k: v.contiguous() for k, v in build(encoder_spec(channels=[4, 16])).state_dict().items()},
        tmp_path / "small.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"small\.safetensors does not fit .*blocks\.1\.conv\.weight is \[16"):
        from_pretrained(str(tmp_path / "small"))


def test_a_missing_pair_and_a_damaged_file_are_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a Hub path"):
        from_pretrained("nowhere")
    (tmp_path / "model.json").write_text(json.dumps(encoder_spec()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing beside"):
        from_pretrained(str(tmp_path / "model"))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        from_pretrained(str(tmp_path / "model"))


def test_loading_never_unpickles_objects(tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"x": Trap()}, protocol=2))
    from trellis.models import read_weights

    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "weights.pt")
    assert not (tmp_path / "sprung").exists()
