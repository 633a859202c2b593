"""The shipped configurations: valid, described in configs/README.md, and alike within a family."""

import copy
import math
import re

import pytest
from helpers import ROOT

import train
from trellis.trainers.optim import preview_schedule
from trellis.trainers.schedule_length import misfit, notes
from trellis.utils.config import apply_override, differing_keys, load_config

FILES = {path.stem: path for path in sorted((ROOT / "configs").rglob("*.json"))}


def trainer(*names: str) -> set[str]:
    """Paths of trainer arguments."""
    return {f"trainer.args.{name}" for name in names}


TOKENS = {"models.quantizer.args.embed_dim"}
# Tokens of 2x2x2 cells instead of 1x1x4 or one.
BLOCKS = TOKENS | {"models.quantizer.args.group"}
TRANSFORMER = {"models.transformer"}
DECAY = "models.quantizer.args.decay"
EMPTY_CODE = {"models.quantizer.args.empty_code", DECAY}
SEVERAL_CODES = {"models.quantizer.name", "models.quantizer.args.num_codes"}
CODES = {"models.quantizer.args.n_embed"}
REVIVAL = {"trainer.args.revive_every", "trainer.args.revive_until"}
# The small network of `base_*`.
NARROW = {
    f"models.{model}.args.{key}" for model in ("encoder", "decoder") for key in ("channels", "num_res_blocks_middle")
}
INTERVALS = trainer("i_eval", "i_sample", "i_save")
LOG_INTERVALS = trainer("i_print", "i_log")
WARM_UP = trainer("lr_scheduler.warmup_steps")
LR = trainer("optimizer.args.lr")
OPTIMIZER = trainer("optimizer.name")
CODEBOOK_WEIGHTS = trainer("lambda_vq", "lambda_commit")
# Stage 1 freezes the networks, and so can keep their latents.
TRAINED = trainer("freeze", "latent_cache")
# A VAE has a KL divergence; a VQ-VAE has a codebook.
OBJECTIVE = trainer("lambda_kl", "lambda_commit") | {"trainer.name", "models.quantizer"}

# (one, the other, the keys at which they differ and no others)
SIBLINGS = [
    ("recipe_4096_stage1", "recipe_1024_stage1", TOKENS),
    (
        "recipe_4096_stage2",
        "recipe_1024_stage2",
        # 4096 tokens need no transformer, and fewer steps.
        TOKENS | TRANSFORMER | INTERVALS | trainer("max_steps"),
    ),
    ("recipe_1024_stage1", "recipe_512_stage1", BLOCKS),
    (
        "recipe_1024_stage2",
        "recipe_512_stage2",
        BLOCKS | {"models.transformer.args.channels", "models.transformer.args.lattice"},
    ),
    (
        "recipe_4096_stage1",
        "recipe_sparse_stage1",
        # Codes of averages, without a decoder: nothing is learned by gradient.
        CODES | EMPTY_CODE | CODEBOOK_WEIGHTS | {"models.quantizer.name"} | trainer("loss_type"),
    ),
    (
        "recipe_4096_stage2",
        "recipe_sparse_stage2",
        CODES | EMPTY_CODE | INTERVALS | trainer("max_steps", "lambda_commit", "revive_every"),
    ),
    ("recipe_sparse_stage1", "recipe_sparse8x2_stage1", BLOCKS | SEVERAL_CODES | {DECAY}),
    (
        "recipe_512_stage2",
        "recipe_sparse8x2_stage2",
        CODES | EMPTY_CODE | SEVERAL_CODES | REVIVAL | trainer("lambda_commit"),
    ),
    *(
        (f"recipe_sparse8x2_{stage}", f"recipe_sparse8x4_{stage}", {"models.quantizer.args.num_codes"})
        for stage in ("stage1", "stage2")
    ),
    ("recipe_vae", "base_vae", NARROW | LR | INTERVALS | trainer("max_steps")),
    ("recipe_sparse_stage1", "base_stage1", NARROW),
    ("recipe_sparse_stage2", "base_stage2", NARROW | LR | INTERVALS | trainer("max_steps")),
    (
        "recipe_vae",
        "recipe_4096_stage2",
        OBJECTIVE | INTERVALS | WARM_UP | trainer("max_steps", "loss_type", "freeze", "revive_every")
        # Stage 2 makes nine passes over the data it was measured on, the VAE three.
        | {"dataset.args.augmentation"},
    ),
    (
        "recipe_1024_stage1",
        "recipe_1024_stage2",
        # Stage 2 as it measured best: a codebook of moving averages, a transformer around it, Muon, bce_iou.
        TRAINED | CODEBOOK_WEIGHTS | INTERVALS | OPTIMIZER | LR | {"models.quantizer.name"} | TRANSFORMER
        | {"dataset.args.augmentation"}
        | trainer("max_steps", "loss_type", "lr_scheduler", "revive_every"),
    ),
    *((f"vqvae_stage{stage}", f"vqvae_1024_stage{stage}", TOKENS) for stage in (1, 2, 3)),
    (
        "vqvae_stage1",
        "vqvae_stage2",
        TRAINED | INTERVALS | LR | trainer("finetune_ckpt", "loss_type", "lr_scaling", "lr_scheduler", "max_steps"),
    ),
    (
        "vqvae_stage2",
        "vqvae_stage3",
        TRAINED | CODEBOOK_WEIGHTS | LR | trainer("lr_scaling")
        | trainer("lr_scheduler.name", "lr_scheduler.args"),
    ),
    (
        "vqvae_stage1",
        "recipe_4096_stage1",
        # Thousands of steps per GPU on a large collection, or a hundred in all on a small one.
        INTERVALS | LOG_INTERVALS | {"dataset.args.min_aesthetic_score"}
        | trainer("max_steps", "reference_batch", "ema_rate", "finetune_ckpt", "keep_last"),
    ),
    (
        "demo_vae",
        "demo_vae_pretrain",
        INTERVALS | LOG_INTERVALS | WARM_UP | trainer("max_steps", "batch_size", "ema_rate", "seed"),
    ),
    (
        "demo_vae_pretrain",
        "demo_vae_finetune",
        INTERVALS | LOG_INTERVALS | WARM_UP | OPTIMIZER
        | trainer("max_steps", "batch_size", "ema_rate", "seed", "loss_type", "lambda_kl"),
    ),
    (
        "demo_vae",
        "demo_stage1",
        OBJECTIVE | INTERVALS | LOG_INTERVALS | TRAINED | trainer("lambda_vq", "lr_scheduler")
        | trainer("max_steps", "batch_size", "finetune_ckpt", "loss_type"),
    ),
    (
        "demo_stage1",
        "demo_stage2",
        TRAINED | CODEBOOK_WEIGHTS | OPTIMIZER | trainer("i_eval", "i_sample", "lr_scheduler", "revive_every")
        | trainer("max_steps", "loss_type", "finetune_ckpt"),
    ),
    (
        "ss_vae_conv3d_16l8_fp16",
        "recipe_vae",
        # TRELLIS's training, and ours.
        INTERVALS | LOG_INTERVALS | OPTIMIZER | LR | {"dataset.args.min_aesthetic_score"}
        | trainer("max_steps", "batch_size_per_gpu", "reference_batch", "batch_split", "ema_rate", "grad_clip")
        | trainer("lambda_kl")
        | trainer("fp16_mode", "fp16_scale_growth", "mix_precision_mode", "mix_precision_dtype")
        | trainer("lr_scheduler", "keep_last"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_passes(name):
    config = load_config(str(FILES[name]))
    unchanged = copy.deepcopy(config)
    for world_size in (1, 2):
        train.check_config(config, world_size)
    assert config == unchanged


@pytest.mark.parametrize("one, other, keys", SIBLINGS, ids=[f"{one}-{other}" for one, other, _ in SIBLINGS])
def test_siblings_differ_where_they_are_meant_to(one, other, keys):
    assert set(differing_keys(*(load_config(str(FILES[name])) for name in (one, other)))) == keys


def test_every_configuration_has_siblings():
    """One family, so that no file drifts away alone."""
    assert {name for one, other, _ in SIBLINGS for name in (one, other)} == FILES.keys()


def test_the_table_has_a_row_per_file():
    rows = re.findall(r"^\| `(\w+)\.json` \|", (ROOT / "configs/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(FILES)


def test_what_a_row_starts_from_has_the_same_networks():
    """`--load_dir` takes weights that fit. Stage 1 is the first with a codebook."""
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    starts = re.findall(r"^\| `(\w+)\.json` \|.*\| the run of `(\w+)\.json` \|", text, re.MULTILINE)
    assert len(starts) == 20
    for name, start in starts:
        models, before = (load_config(str(FILES[stem]))["models"] for stem in (name, start))
        for key, spec in before.items():
            assert models[key]["args"] == spec["args"], f"{name}: {key}"


def test_the_vqvae_stages_keep_their_settings():
    """Stage 1: codebook alone, AdamW at 1e-3, L1. Stage 2: everything, AdamW at 5e-3 with decay, L1 + L2."""
    stage1, stage2, stage3 = (load_config(str(FILES[f"vqvae_stage{n}"])) for n in (1, 2, 3))
    assert stage1["models"] == stage2["models"] == stage3["models"]
    assert stage1["models"]["quantizer"]["args"] == {"n_embed": 8192, "embed_dim": 8}
    one, two, three = (stage["trainer"]["args"] for stage in (stage1, stage2, stage3))
    assert (
        one["freeze"] == ["encoder", "decoder"] and two["freeze"] == [] and three["freeze"] == ["encoder", "quantizer"]
    )
    assert (one["loss_type"], two["loss_type"]) == ("l1", "l1_l2")
    for args, lr in ((one, 1e-3), (two, 5e-3)):
        assert args["optimizer"] == {"name": "AdamW", "args": {"lr": lr, "weight_decay": 0.0}}
    assert two["lr_scaling"] == "rms" and two["lr_scheduler"] == {"name": "ExponentialLR", "args": {"gamma": 0.999}}


def test_tokens_per_object():
    """A token of embed_dim 8 is one of 16³ cells; of 32, four of them; of 64, eight."""
    tokens = {"1024": 1024, "512": 512, "sparse8x2": 512, "sparse8x4": 512}
    for name, path in FILES.items():
        args = load_config(str(path))["models"].get("quantizer", {}).get("args")
        if args is not None:
            wanted = next((count for form, count in tokens.items() if f"_{form}_" in name), 4096)
            assert 16**3 * 8 // args["embed_dim"] == wanted, name


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("recipe_", "base_"))])
def test_recipes_run_on_any_number_of_gpus_and_for_any_number_of_steps(name):
    config = load_config(str(FILES[name]))
    args = config["trainer"]["args"]
    assert args["batch_size_per_gpu"] == args["reference_batch"] == 16
    args["max_steps"] = 12345
    for world_size in (1, 2, 3, 4):
        train.check_config(config, world_size)
    assert (args.get("lr_scheduler") is None) == name.endswith("stage1")


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if "CosineAnnealingLR" in path.read_text()])
def test_every_cosine_ends_with_the_training_whatever_its_length(name):
    args = load_config(str(FILES[name]))["trainer"]["args"]
    lr, warm_up = args["optimizer"]["args"]["lr"], args["lr_scheduler"].get("warmup_steps", 0)
    for max_steps in (args["max_steps"], 1000, 300, warm_up + 1):
        config = load_config(str(FILES[name]))
        apply_override(config, f"trainer.args.max_steps={max_steps}")
        spec = train.check_config(config, 1)["trainer"]["args"]["lr_scheduler"]
        assert misfit(spec, max_steps, "where") is None and not list(notes(spec, max_steps))
        for step, rate in preview_schedule(args["optimizer"], spec, max_steps).items():
            share = (step - warm_up) / (max_steps - warm_up)
            wanted = (1 + math.cos(math.pi * share)) / 2 if step >= warm_up else (step + 1) / warm_up
            assert rate == pytest.approx(lr * wanted, rel=1e-6, abs=1e-12), (max_steps, step)


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_may_run_for_any_number_of_steps(name):
    for max_steps in (1, 300, 1000, 12345):
        config = load_config(str(FILES[name]))
        apply_override(config, f"trainer.args.max_steps={max_steps}")
        spec = train.check_config(config, 1)["trainer"]["args"]["lr_scheduler"]
        assert misfit(spec, max_steps, "where") is None
