"""Reading and checking configurations."""

import copy
import json
from typing import Annotated, Literal

import pytest
import torch
from helpers import ROOT, VQ, tiny_config

import train
from trellis.models import MODELS, build
from trellis.modules.quantizers.base import Quantizer
from trellis.trainers import SparseStructureVaeTrainer, SparseStructureVqVaeTrainer
from trellis.trainers.configuration import TRELLIS_ARGS, as_list, complete_config
from trellis.utils.config import (
    Count,
    Range,
    apply_override,
    check_args,
    check_component,
    config_arguments,
    describe,
    differences,
    differing_keys,
    load_config,
    matches,
)
from trellis.utils.errors import ConfigError

# (annotation, its description, values that fit, values that do not)
KINDS = [
    (int, "integer", [0, -3, 2**63 - 1], [1.0, "1", True, None, [1], 2**63, 10**30]),
    (float, "number", [0.5, 3, -1e300], [True, "0.5", None, float("inf"), float("nan")]),
    (str, "string", ["", "x"], [1, None, ["x"]]),
    (bool, "boolean", [True, False], [0, 1, "true", None]),
    (dict, "object", [{}, {"a": 1}], [[], None, "x"]),
    (list, "list", [[], [1, "x"]], [{}, "x", None]),
    (None.__class__, "null", [None], [0, False, "", []]),
    (Literal["a", "b"], '"a" or "b"', ["a"], ["c", None, ["a"]]),
    (Literal[1], "1", [1], [True, 1.0]),
    (int | None, "integer or null", [1, None], [0.5, False]),
    (float | list[float], "number or list of number", [1, [], [0.5, 2]], [["x"], [[1]], [True], None]),
    (dict[str, str], "object", [{}, {"a": "b"}], [{"a": 1}, {"a": None}, []]),
    (list[dict[str, int]], "list of object", [[{"a": 1}]], [[{"a": "1"}], {"a": 1}]),
    (Count, "integer >= 1", [1, 7], [0, -1, 1.0, True]),
    (Annotated[float, Range(0, 1)], "number >= 0 and <= 1", [0, 1, 0.5], [-1e-9, 1.0001, True]),
    (Annotated[float, Range(0, open_min=True)], "number > 0", [1e-300], [0, -1]),
    (Annotated[float, Range(max=2)], "number <= 2", [-1e9, 2], [2.5]),
    (list[Count] | None, "list of integer >= 1 or null", [None, [1, 2]], [[0], [1, 0], 1]),
]


@pytest.mark.parametrize("annotation, words, good, bad", KINDS, ids=[words for _, words, *_ in KINDS])
def test_each_kind_of_annotation(annotation, words, good, bad):
    assert describe(annotation) == words
    assert [value for value in good if not matches(value, annotation)] == []
    assert [value for value in bad if matches(value, annotation)] == []


class Grandparent:
    runtime_args = ("device",)

    def __init__(self, device, *, size: int, rate: float = 0.5, mode: str = "x"):
        pass


class Parent(Grandparent):
    def __init__(self, *args, rate: Annotated[float, Range(0, 1)] = 0.25, **kwargs):
        pass


class Child(Parent):
    dropped_args = ("mode",)

    def __init__(self, *args, extra: Literal["p", "q"] = "p", **kwargs):
        pass


class Closed(Child):
    def __init__(self, only: bool):
        pass


def test_arguments_follow_keywords_up_to_the_constructor_that_takes_no_more():
    assert {name: default for name, (_, default) in config_arguments(Parent).items() if name != "size"} == {
        "rate": 0.25,
        "mode": "x",
    }
    assert set(config_arguments(Child)) == {"extra", "rate", "size"}  # neither device nor mode
    assert set(config_arguments(Closed)) == {"only"}


@pytest.mark.parametrize(
    "cls, args, message",
    [
        (Child, {"size": 1, "extra": "q", "rate": 1}, None),
        (Child, {}, "w.args.size is missing; give it as integer"),
        (Child, {"size": 1, "device": "cpu"}, "w.args.device is unknown"),
        (Child, {"size": 1, "mode": "y"}, "w.args.mode is unknown"),
        (Child, {"size": 1, "ratee": 0.5}, "w.args.ratee is unknown; did you mean rate?"),
        (Child, {"size": 1, "qqqqqq": 0.5}, "w.args.qqqqqq is unknown; it can be one of: extra, rate, size"),
        (Child, {"size": 1, "rate": 2}, "w.args.rate is 2; it must be number >= 0 and <= 1"),
        (Child, {"size": 1, "extra": None}, 'w.args.extra is null; it must be "p" or "q"'),
        (Grandparent, {"size": 1, "rate": 2}, None),
        (Child, [1], "w.args has type list; it must be an object of arguments of Child"),
    ],
)
def test_arguments_are_checked_against_the_constructor(cls, args, message):
    if message is None:
        completed = check_args(args, cls, "w.args")
        defaults = {name: default for name, (_, default) in config_arguments(cls).items()}
        assert completed == {**defaults, **args} and list(completed) == list(defaults)
        assert check_args(completed, cls, "w.args") == completed
        return
    with pytest.raises(ConfigError) as error:
        check_args(args, cls, "w.args")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        (None, "w has type null; it must be an object"),
        ({}, "w.name is missing"),
        ({"name": 3}, "w.name is missing; give the class name as a string"),
        ({"name": "A", "args": None}, "w.args has type null; it must be an object"),
        ({"name": "A", "agrs": {}}, "w.agrs is unknown; did you mean args?"),
    ],
)
def test_components_have_a_name_and_arguments(spec, message):
    with pytest.raises(ConfigError) as error:
        check_component(spec, "w")
    assert message in str(error.value)
    check_component({"name": "A"}, "w")


# --- reading ---


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "key 'b' is given twice in one object"),
        ('{"a": NaN}', "NaN is not a number that JSON knows"),
        ('{"a": -Infinity}', "-Infinity is not a number that JSON knows"),
        ('{"a": 1,}', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "the file must hold one JSON object"),
        (b"\xff\xfe", "is not UTF-8 text; --config takes a JSON file, saved as UTF-8"),
    ],
)
def test_a_damaged_file_is_one_clear_error(text, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert load_config(str(tmp_path / "config.json")) == {"a": 1}


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path, told in ((tmp_path / "gone.json", "cannot be read .No such file"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=told):
            load_config(str(path))


def test_the_same_key_in_different_objects_is_fine(tmp_path):
    config = {"a": {"name": "x"}, "b": [{"name": "é"}, {"name": 1e-3}], "name": None}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert load_config(str(path)) == config


# --- overrides ---


@pytest.mark.parametrize(
    "assignment, value",
    [
        ("a.b.c=3", 3),
        ("a.b.c=3.0", 3.0),
        ("a.b.c=true", True),
        ("a.b.c=null", None),
        ("a.b.c=l1_l2", "l1_l2"),
        ('a.b.c="3"', "3"),
        ('a.b.c={"x": [1, 2]}', {"x": [1, 2]}),
        ("a.b.c=k=v", "k=v"),
        ("a.b.c=", ""),
    ],
)
def test_an_override_is_json_or_else_text(assignment, value):
    config = {"a": {"b": {"c": 1, "d": 2}}}
    apply_override(config, assignment)
    assert config == {"a": {"b": {"c": value, "d": 2}}} and type(config["a"]["b"]["c"]) is type(value)


def test_an_override_may_add_a_key_but_no_parent():
    config = {"a": {}}
    apply_override(config, "a.new=1")
    apply_override(config, "top=2")
    assert config == {"a": {"new": 1}, "top": 2}
    for assignment, message in (
        (
            "a.c.d=1",
            "a.c is not in the configuration; it can be one of: new; to add it, --set a.c to a",
        ),
        ("aa.d=1", "aa is not in the configuration; did you mean a?"),
        ("a.new.d=1", "a.new has type integer, not object"),
        ("top.x.y=1", "top.x is not in the configuration"),
        ("a.new", "write it as path.to.key=value"),
        ("=1", "write it as path.to.key=value"),
        ("a..b=1", "write it as path.to.key=value"),
        ("a.new=NaN", "NaN is not a number that JSON knows"),
        ('a.new={"x": 1, "x": 2}', "key 'x' is given twice"),
    ):
        before = copy.deepcopy(config)
        with pytest.raises(ConfigError) as error:
            apply_override(config, assignment)
        assert message in str(error.value) and f"--set {assignment}" in str(error.value)
        assert config == before


def test_differing_keys_are_the_deepest_paths():
    old = {"a": {"x": 1, "y": [1, 2], "z": {"w": None}}, "b": 1, "same": {"k": [{"v": 1}]}}
    new = {"a": {"x": 1.0, "y": [1, 3], "z": {"w": None, "n": 0}}, "c": 1, "same": {"k": [{"v": 1}]}}
    assert differing_keys(old, new) == ["a.x", "a.y", "a.z.n", "b", "c"]
    assert differing_keys(old, copy.deepcopy(old)) == []
    assert differences({"a.b": 1, "c": True}, {"c": 1}) == [("a.b", "1", "absent"), ("c", "true", "1")]
    assert differing_keys({"a": {}}, {"a": None}, "top") == ["top.a"]
    assert differing_keys(True, 1, "flag") == ["flag"]


# --- whole configurations ---


def flat(config: dict, where: str = "") -> dict:
    """Values by dotted path, without the args of optimizers, schedules and clippers."""
    values = {}
    for key, value in config.items():
        deeper = isinstance(value, dict) and key not in ("optimizer", "lr_scheduler", "grad_clip")
        values |= flat(value, f"{where}{key}.") if deeper else {f"{where}{key}": value}
    return values


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_passes(path):
    config = load_config(str(path))
    unchanged = copy.deepcopy(config)
    for world_size in (1, 2):
        completed = train.check_config(config, world_size)
        assert train.check_config(completed, world_size) == completed == json.loads(json.dumps(completed))
    assert config == unchanged
    # Whatever the file says comes back, but for TRELLIS's names.
    own = copy.deepcopy(config)
    own["trainer"]["args"] = {k: v for k, v in own["trainer"]["args"].items() if k not in TRELLIS_ARGS}
    filled = {k: v for k, v in flat(completed).items() if k in flat(own)}
    args = own["trainer"]["args"]
    if (schedule := args.get("lr_scheduler")) and schedule["name"] == "CosineAnnealingLR":
        schedule["args"] = {"T_max": args["max_steps"] - schedule.get("warmup_steps", 0)}
    same_form = {"trainer.args.freeze": sorted, "trainer.args.ema_rate": as_list}
    assert filled == {k: same_form.get(k, lambda value: value)(v) for k, v in flat(own).items()}


def trellis_config() -> dict:
    """The arguments of a VAE configuration as users of TRELLIS have them."""
    model = {"latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2, "use_fp16": True}
    encoder = {**model, "in_channels": 1, "channels": [32, 128, 512]}
    decoder = {**model, "out_channels": 1, "channels": [512, 128, 32]}
    clipper = {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "clip_percentile": 95}}
    return {
        "models": {
            "encoder": {"name": "SparseStructureEncoder", "args": encoder},
            "decoder": {"name": "SparseStructureDecoder", "args": decoder},
        },
        "dataset": {"name": "SparseStructure", "args": {"resolution": 64, "min_aesthetic_score": 4.5}},
        "trainer": {
            "name": "SparseStructureVaeTrainer",
            "args": {
                "max_steps": 1000000,
                "batch_size_per_gpu": 4,
                "batch_split": 1,
                "optimizer": {"name": "AdamW", "args": {"lr": 1e-4, "weight_decay": 0.0}},
                "ema_rate": [0.9999],
                "fp16_mode": "inflat_all",
                "fp16_scale_growth": 0.001,
                "elastic": None,
                "grad_clip": clipper,
                "i_log": 500,
                "i_sample": 10000,
                "i_save": 10000,
                "loss_type": "dice",
                "lambda_kl": 0.001,
            },
        },
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fp16_mode": None},
        {"fp16_mode": "amp"},
        {"batch_split": None},
        {"ema_rate": 0.9999, "log_param_stats": True, "prefetch_data": False, "finetune_ckpt": None},
        {"i_print": 1000, "i_ddpcheck": 10000, "grad_clip": 1.0, "lr_scheduler": None},
        {"lr_scheduler": {"name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 1000}}},
        {"mix_precision_mode": "inflat_all", "mix_precision_dtype": "float16", "fp16_mode": "inflat_all"},
    ],
)
def test_a_configuration_of_trellis_passes_as_it_is(change):
    config = trellis_config()
    config["trainer"]["args"].update(change)
    unchanged = copy.deepcopy(config)
    args = train.check_config(config, 8)["trainer"]["args"]
    assert config == unchanged and not args.keys() & TRELLIS_ARGS.keys()
    assert args["mix_precision_mode"] == config["trainer"]["args"]["fp16_mode"]
    assert args["mix_precision_dtype"] == "float16" and args["batch_split"] == 1


def test_defaults_are_filled_in_once_and_equal_settings_get_one_form():
    config = tiny_config(VQ, freeze=["encoder", "decoder"], ema_rate=0.9)
    del config["dataset"]["args"]["resolution"]
    config["models"]["quantizer"]["name"] = "FiniteScalarQuantizer"
    config["models"]["quantizer"]["args"] = {}
    completed = complete_config(config)
    quantizer = {"n_embed": 8192, "embed_dim": 8, "latent_channels": 8, "group": None, "init": "kmeans"}
    quantizer["empty_code"] = False
    assert completed["models"]["quantizer"]["args"] == {**quantizer, "levels": [8, 8, 8, 4, 4]}
    assert completed["dataset"]["args"] == {
        "resolution": 64,
        "min_aesthetic_score": None,
        "augmentation": "none",
        "weights": None,
    }
    args = completed["trainer"]["args"]
    assert (args["freeze"], args["ema_rate"], args["lambda_commit"]) == (["decoder", "encoder"], [0.9], 0.25)
    assert complete_config(completed) == completed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"elastic": {"name": "LinearMemoryController"}}, "trainer.args.elastic is"),
        ({"batch_size_per_gpu": None}, "give either batch_size (over all ranks) or batch_size_per_gpu"),
        ({"batch_size": 32}, "give either batch_size (over all ranks) or batch_size_per_gpu"),
        ({"batch_split": 3}, "batch_split is 3, which does not divide the 4 samples of a rank"),
        ({"batch_size": 12, "batch_size_per_gpu": None}, "batch_size is 12, which does not divide over 8 ranks"),
        ({"ema_rate": [0.9, 1.5]}, "ema_rate is [0.9, 1.5]; it must be"),
        ({"seed": -1}, "seed is -1; it must be integer >= 0"),
        ({"fp16_mode": "fp16"}, 'fp16_mode is "fp16"; it must be "amp" or "inflat_all"'),
        ({"fp16_mode": "unset"}, 'fp16_mode is "unset"; it must be "amp" or "inflat_all"'),
        (
            {"mix_precision_mode": None},
            'means mix_precision_mode "inflat_all", and mix_precision_mode null; leave',
        ),
        (
            {"mix_precision_dtype": "bfloat16"},
            'means mix_precision_dtype "float16", and mix_precision_dtype "bfloat16"',
        ),
        ({"lambda_kl": float("inf")}, "lambda_kl is Infinity; it must be number >= 0"),
        ({"finetune_ckpt": {"decodr": "x"}}, "finetune_ckpt has 'decodr'; did you mean decoder?"),
        ({"finetune_ckpt": {"decoder": None}}, "finetune_ckpt is"),
        ({"plan": {}}, "trainer.args.plan is unknown"),
    ],
)
def test_a_wrong_trainer_argument_is_named(change, message):
    config = trellis_config()
    config["trainer"]["args"].update(change)
    with pytest.raises(ConfigError) as error:
        train.check_config(config, 8)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("model",), {}, "model is unknown; did you mean models?"),
        (("models",), [], "models is missing or not a JSON object"),
        (("trainer",), None, "trainer is missing or not a JSON object"),
        (("dataset", "name"), "Shapes", "dataset.name is 'Shapes', which is not known"),
        (("dataset", "args", "roots"), "x", "dataset.args.roots is unknown"),
        (("dataset", "args", "resolution"), 0, "dataset.args.resolution is 0; it must be integer >= 1"),
        (("models", "encoder", "args", "channels"), [4, 0], "models.encoder.args.channels is [4, 0]"),
        (("models", "encoder", "args", "norm_type"), "batch", 'norm_type is "batch"; it must be "layer" or "group"'),
        (("models", "encoder", "args", "norm_type"), "group", "models.encoder.args: norm_type 'group' uses 32 groups"),
        (("models", "encoder", "args", "model_channels"), 1, "models.encoder.args.model_channels is unknown"),
        (("models", "encoder", "name"), "VectorQuantiser", "did you mean VectorQuantizer?"),
        (("models", "quantizer"), {"name": "VectorQuantizer", "args": {"embed_dim": 12}}, "12 is not a multiple"),
        (("models", "quantizer"), {"name": "VectorQuantizer"}, "quantizer is unknown to SparseStructureVaeTrainer"),
    ],
)
def test_a_wrong_part_of_a_configuration_is_named(path, value, message):
    config = tiny_config()
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ConfigError) as error:
        train.check_config(config, 1)
    assert message in str(error.value)


def test_what_the_program_gives_is_not_for_a_configuration_to_set():
    runtime = {"models", "dataset", "output_dir", "device", "plan", "config"}
    vae, vq = config_arguments(SparseStructureVaeTrainer), config_arguments(SparseStructureVqVaeTrainer)
    assert not runtime & (vae.keys() | vq.keys())
    codebook = {"lambda_vq", "lambda_commit", "lambda_entropy", "latent_cache", "revive_every", "revive_until"}
    assert vq.keys() - vae.keys() == codebook
    assert vae.keys() - vq.keys() == {"lambda_kl"}
    assert (vq["lambda_vq"][1], vq["lambda_commit"][1]) == (1.0, 0.25)


# --- quantizers ---


@pytest.mark.parametrize("name", sorted(name for name in MODELS.classes if issubclass(MODELS.get(name, ""), Quantizer)))
def test_every_quantizer_names_its_losses_and_each_has_a_weight(name):
    """The trainer weighs losses by name; a loss that no argument weighs could not be added unnoticed."""
    sizes = {"n_embed": 8, "embed_dim": 4, "latent_channels": 4}
    if name == "FiniteScalarQuantizer":
        sizes = {**sizes, "n_embed": 12, "levels": [4, 3]}
    quantizer = build({"name": name, "args": sizes})
    assert isinstance(quantizer, Quantizer)
    z = torch.randn(2, 4, 2, 2, 2, requires_grad=True)
    for training in (True, False):
        assert tuple(quantizer.train(training)(z).losses) == quantizer.losses
    assert {f"lambda_{loss}" for loss in quantizer.losses} <= config_arguments(SparseStructureVqVaeTrainer).keys()
