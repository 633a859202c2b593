"""The way from grids to ids and back with an empty code and with a transformer around the codebook."""

import json

import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, free_port, logged, run, solid_grids, tiny_config

from trellis import SparseStructureTokenizer
from trellis.evaluation.metrics import occupied_blocks
from trellis.models import build
from trellis.models.vqvae import EMPTY_LOGIT, VqVae
from trellis.modules.quantizers.vq import VectorQuantizer
from trellis.utils.errors import ConfigError

TRANSFORMER = {"width": 16, "heads": 2, "layers_before": 1, "layers_after": 2}
FORMS = {
    "sparse": {"embed_dim": 4, "group": [1, 1, 1]},
    "sparse groups": {"embed_dim": 32, "group": [2, 2, 2]},
    "residual": {"embed_dim": 32, "group": [2, 2, 2], "num_codes": 3},
    "columns": {"embed_dim": 16},
}


def tiny_models(form: str, empty_code: bool = True, transformer: bool = True) -> dict:
    models = tiny_config(VQ)["models"]
    quantizer = {"n_embed": 16, "latent_channels": 4, "empty_code": empty_code, **FORMS[form]}
    name = "ResidualVectorQuantizer" if "num_codes" in quantizer else "EMAVectorQuantizer"
    models["quantizer"] = {"name": name, "args": quantizer}
    if transformer:
        lattice = [4 // size for size in quantizer.get("group", [1, 1, 4])]
        args = {"channels": quantizer["embed_dim"], "lattice": lattice, **TRANSFORMER}
        models["transformer"] = {"name": "CodebookTransformer", "args": args}
    return models


@pytest.fixture(params=[(form, transformer) for form in FORMS for transformer in (True, False)], ids=str)
def tokenizer(request) -> SparseStructureTokenizer:
    """Random weights, none of them zero, so that nothing is right because something is zero."""
    torch.manual_seed(0)
    form, transformer = request.param
    tokenizer = SparseStructureTokenizer(tiny_models(form, transformer=transformer), resolution=16)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer


@pytest.fixture
def grids() -> torch.Tensor:
    """Two objects, one voxel in a corner, and no voxel: [4, 1, 16, 16, 16]."""
    grids = torch.zeros(4, 1, 16, 16, 16)
    grids[:2, 0] = torch.from_numpy(solid_grids(2, 16, seed=0))
    grids[0, :, :8] = 0  # half of the first is empty
    grids[2, 0, 15, 0, 15] = 1
    return grids


def test_id_zero_is_for_empty_blocks_alone_and_they_come_back_empty(tokenizer, grids):
    ids = tokenizer.encode(grids)
    lattice, Q = tokenizer.lattice, tokenizer.codes_per_token
    occupied = occupied_blocks(grids, lattice)
    assert torch.equal(ids.view(4, *lattice, Q) > 0, occupied[..., None].expand(*occupied.shape, Q))
    assert ids.max() < tokenizer.n_embed
    assert not tokenizer.empty_ids.any()
    logits = tokenizer.decode(ids)
    inside = occupied_blocks((logits != EMPTY_LOGIT).float(), lattice)
    assert torch.equal(inside, occupied) and not logits.isnan().any()
    assert (logits[3] == EMPTY_LOGIT).all()


def test_ids_do_not_depend_on_what_is_encoded_together(tokenizer, grids):
    together = tokenizer.encode(grids)
    for number, grid in enumerate(grids):
        assert torch.equal(tokenizer.encode(grid[None])[0], together[number])
        assert torch.equal(tokenizer.decode(together[number]), tokenizer.decode(together)[number][None])


def test_nothing_depends_on_the_latents_of_empty_tokens(tokenizer, grids):
    """Not even if they are not finite; the gradient there is zero."""
    vqvae, occupied = tokenizer.vqvae, tokenizer.vqvae.occupied(grids)
    tokens = torch.randn(4, *tokenizer.lattice, tokenizer.quantizer.embed_dim)
    results = []
    for value in (0.0, 1e4):
        changed = torch.where(occupied[..., None], tokens, value).requires_grad_()
        z = vqvae.before(vqvae.quantizer.ungroup_cells(changed), occupied)
        quantized = vqvae.quantizer(z, occupied)
        logits = vqvae.decode(quantized.codes, occupied)
        (logits.sum() + quantized.losses["commit"]).backward()
        assert not changed.grad.isnan().any() and not changed.grad[~occupied].any()
        results.append((quantized.indices, quantized.losses, logits, changed.grad))
    assert_equal(results[0], results[1])


def test_a_token_with_some_codes_empty_is_refused(grids):
    torch.manual_seed(0)
    tokenizer = SparseStructureTokenizer(tiny_models("residual"), resolution=16)
    ids = tokenizer.encode(grids)
    token = (ids[1] > 0).nonzero()[0].item() // 3 * 3
    ids[1, token + 1] = 0
    with pytest.raises(ValueError, match=f"ids {token} to {token + 2} of object 1 are of one token"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_transformer_changes_nothing(form, grids):
    """Neither ids nor logits: so a codebook that was fitted without it fits."""
    torch.manual_seed(0)
    models = {name: build(spec) for name, spec in tiny_models(form).items()}
    with_it, without = VqVae.of(models), VqVae(models["encoder"], models["quantizer"].eval(), models["decoder"])
    occupied = with_it.occupied(grids)
    z = torch.randn(4, 4, 4, 4, 4)
    assert torch.equal(with_it.before(z, occupied), without.before(z, occupied))
    assert torch.equal(with_it.decode(z, occupied), without.decode(with_it.before(z, occupied), occupied))


def test_attention_reaches_every_occupied_token(grids):
    """The code of one token depends on the other end of the object, and on no token of another object."""
    torch.manual_seed(0)
    transformer = build(tiny_models("sparse")["transformer"])
    torch.nn.init.normal_(transformer.stacks["before"].project_out.weight)
    occupied = torch.ones(2, 4, 4, 4, dtype=torch.bool)
    tokens = torch.randn(2, 4, 4, 4, 4, requires_grad=True)
    transformer.before(tokens, occupied)[0, 0, 0, 0].sum().backward()
    assert (tokens.grad[0].abs().sum(-1) > 0).all() and not tokens.grad[1].any()


def test_only_the_blocks_matrices_are_hidden():
    transformer = build(tiny_models("sparse")["transformer"])
    hidden = transformer.hidden_matrices()
    shapes = {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}
    assert len(hidden) == 3 * 4 and hidden < shapes.keys()
    assert {shapes[name] for name in hidden} == {(48, 16), (16, 16), (64, 16), (16, 64)}
    assert not any("project" in name or "positions" in name for name in hidden)
    assert build(tiny_models("sparse")["encoder"]).hidden_matrices() == set()


def test_the_layout_of_shapellm_has_no_place_for_either(tmp_path):
    for models, what in (
        (tiny_models("columns", empty_code=False), "transformer"),
        (tiny_models("columns", transformer=False), "an empty code"),
    ):
        with pytest.raises(ConfigError, match=what):
            SparseStructureTokenizer(models, resolution=16).export_shapellm(tmp_path / "3DVQVAE.bin")
    assert not list(tmp_path.iterdir())


def test_a_tokenizers_grammar_lets_its_objects_through(tokenizer, grids):
    """In every form; and the end follows nothing but the last id."""
    ids = tokenizer.encode(grids)
    for form in ("dense", "octree", "octree-depth"):
        words = tokenizer.token_format(first_id=3, form=form)
        grammar = tokenizer.grammar(3, form, eos_id=1)
        for row in ids:
            written = words.to_vocabulary(row)
            for length in range(1, len(written)):
                scores = grammar(torch.tensor([written[:length]]), torch.zeros(1, 400))[0]
                assert scores[written[length]] == 0
                if length > 1:
                    assert (scores[words.end_id] == 0) == (length + 1 == len(written))


# --- training ---


def stage(form: str, transformer: bool, **args) -> dict:
    config = tiny_config(VQ, **{"i_eval": 100, "revive_every": 2, "revive_until": 1.0, **args})
    config["models"] = tiny_models(form, transformer=transformer)
    return config


@pytest.mark.parametrize("form", FORMS)
def test_both_stages_and_a_resume(form, vae_run, data_dir, write_config, tmp_path):
    """Stage 1 without, stage 2 with a transformer; four steps equal two and a resume to the last bit."""
    data = ("--data_dir", data_dir)
    first = write_config(stage(form, False, freeze=["encoder", "decoder"], max_steps=4))
    assert run("--config", first, "--load_dir", vae_run, "--output_dir", tmp_path / "one", *data) == 0
    second = write_config(stage(form, True, max_steps=4))
    flags = ("--config", second, "--load_dir", tmp_path / "one", *data)
    assert run(*flags, "--output_dir", tmp_path / "two") == 0
    resumed = ("--output_dir", tmp_path / "resumed")
    assert run(*flags, *resumed, "--set", "trainer.args.max_steps=2") == 0
    assert run(*flags, *resumed) == 0
    assert_equal(checkpoint(tmp_path / "two", 4), checkpoint(tmp_path / "resumed", 4))

    before, after = logged(tmp_path / "one")[-1], logged(tmp_path / "two")[0]
    assert after["val/iou"] == before["val/iou"], "a fresh transformer changes no score"
    tokenizer = SparseStructureTokenizer.from_run(tmp_path / "two")
    moved = tokenizer.transformer.stacks["after"].project_out.weight
    assert tokenizer.empty_code and moved.any()


# {name: settings of a quantizer, and the weight of its entropy loss}
LEARNERS: dict[str, tuple[dict, float]] = {
    "VectorQuantizer": ({}, 0.0),
    "ResidualVectorQuantizer": ({"num_codes": 2}, 0.0),
    "ResidualVectorQuantizer, averages": ({"num_codes": 2, "decay": 0.9}, 0.0),
    "LookupFreeQuantizer": ({"n_embed": 17}, 0.5),
}


def unequal(learner: str, **args) -> dict:
    """Training of everything by plain steps, whose result is as exact as the gradient."""
    own, entropy = LEARNERS[learner]
    plain = {"optimizer": {"name": "SGD", "args": {"lr": 1e-2}}, "grad_clip": None, "loss_type": "bce_iou"}
    config = stage("sparse", True, max_steps=4, i_log=1, lambda_entropy=entropy, **plain, **args)
    quantizer = config["models"]["quantizer"]
    quantizer["name"] = learner.split(",")[0]
    quantizer["args"] |= {**own, "init": "uniform"}  # k-means may start from another vector by a rounding error
    return config


def assert_alike(one, other, names: tuple[str, ...]) -> None:
    """The same losses and scores at every step, and the same weights in the end, up to rounding."""
    for a, b in zip(logged(one), logged(other), strict=True):
        for name in ("loss", "bce_iou", *names, "val/iou", "codes_revived"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)
    for name, state in checkpoint(one, 4).items():
        if not name.startswith("misc"):
            torch.testing.assert_close(checkpoint(other, 4)[name], state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("learner", [name for name in LEARNERS if "," in name or LEARNERS[name][1]])
def test_two_ranks_weigh_every_token_alike(learner, vae_run, data_dir, write_config, tmp_path):
    """Their shares of a batch have unequal numbers of tokens, and codes are revived from tokens of both."""
    flags = ("--config", write_config(unequal(learner, i_ddpcheck=2)), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    two = ("--num_gpus", 2, "--master_port", free_port())
    assert run(*flags, *two, "--output_dir", tmp_path / "two") == 0
    entropy = ("entropy",) if LEARNERS[learner][1] else ()
    assert_alike(tmp_path / "one", tmp_path / "two", ("vq", "commit", *entropy))


@pytest.mark.parametrize("learner", ["VectorQuantizer", "ResidualVectorQuantizer"])
def test_micro_batches_weigh_every_token_alike(learner, vae_run, data_dir, write_config, tmp_path):
    """If codes learn by gradient. Four micro-batches of an object each equal one batch."""
    for name, batch_split in (("whole", 1), ("split", 4)):
        path = write_config(unequal(learner, batch_split=batch_split))
        flags = ("--config", path, "--data_dir", data_dir, "--load_dir", vae_run)
        assert run(*flags, "--output_dir", tmp_path / name) == 0
    assert_alike(tmp_path / "whole", tmp_path / "split", ("vq", "commit"))


def test_wrong_transformers_are_refused_before_anything_is_made(vae_run, data_dir, write_config, tmp_path, capsys):
    def refused(change) -> str:
        config = stage("sparse", True)
        change(config["models"]["transformer"])
        path = write_config(config)
        flags = ("--data_dir", data_dir, "--load_dir", vae_run, "--output_dir", tmp_path / "run")
        assert run("--config", path, *flags) == 1
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    told = refused(lambda spec: spec["args"].update(lattice=[4, 4, 1]))
    assert "models.transformer.args.lattice is [4, 4, 1], but the quantizer's tokens have [4, 4, 4]" in told
    assert "models.transformer.args.channels is 8, but" in refused(lambda spec: spec["args"].update(channels=8))
    assert "width 16 does not divide into 3 heads" in refused(lambda spec: spec["args"].update(heads=3))
    assert "it must be the tokens along x, y and z" in refused(lambda spec: spec["args"].update(lattice=[4, 4]))
    other = json.loads(json.dumps(tiny_models("sparse")["quantizer"]))
    assert "models.transformer.name is 'EMAVectorQuantizer'" in refused(lambda spec: spec.update(other))


def test_training_goes_on_from_a_saved_tokenizer(data_dir, write_config, tmp_path, capsys):
    """Its codes become averages; half precision comes back as its rounded values. It has no steps and no VAE's KL."""
    torch.manual_seed(0)
    models = tiny_models("sparse", transformer=False)
    models["quantizer"]["name"] = "VectorQuantizer"
    tokenizer = SparseStructureTokenizer(models, resolution=16)
    tokenizer.save_pretrained(tmp_path / "saved", dtype=torch.float16)
    saved = SparseStructureTokenizer.load(tmp_path / "saved")
    config = write_config(stage("sparse", True, max_steps=1))
    data, source = ("--data_dir", data_dir), ("--load_dir", tmp_path / "saved")
    assert run("--config", config, *data, *source, "--output_dir", tmp_path / "run") == 0
    assert "has no transformer" in capsys.readouterr().out
    before = checkpoint(tmp_path / "run", 0)
    for name in ("encoder", "quantizer", "decoder"):
        state = before[f"{name}_step0000000.pt"]
        assert_equal({key: state[key] for key in getattr(saved, name).state_dict()}, getattr(saved, name).state_dict())
    assert before["quantizer_step0000000.pt"]["counts"].eq(1).all()

    other = ("--output_dir", tmp_path / "other", "--ckpt", "3")
    assert run("--config", config, *data, *source, *other) == 1
    assert "is a saved tokenizer and has no steps" in capsys.readouterr().err
    wrong = stage("sparse", False)
    wrong["models"]["quantizer"]["args"]["n_embed"] = 8
    assert run("--config", write_config(wrong), *data, *source, *other[:2]) == 1
    assert "embeddings.weight is [15, 4] there and [7, 4] in the model" in capsys.readouterr().err


@pytest.mark.parametrize("empty_code", [False, True])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_ids_that_there_are_not_are_no_other_code(empty_code, wrong):
    quantizer = VectorQuantizer(n_embed=8, embed_dim=4, latent_channels=4, empty_code=empty_code)
    ids = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    ids[0, 0, 0, 0] = wrong
    with pytest.raises(IndexError):
        quantizer.lookup(ids)
