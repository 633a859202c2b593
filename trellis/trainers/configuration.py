"""A whole configuration: `models`, `dataset` and `trainer`, completed before anything is built.

What fits together is checked by the trainer's `check_config`.
"""

import json
from types import NoneType
from typing import Any, Literal

from ..datasets import DATASETS
from ..models import MODELS
from ..utils.config import check_args, check_component, check_value, complete_component
from ..utils.errors import ConfigError
from ..utils.registry import did_you_mean
from . import TRAINERS
from .schedule_length import with_length

KEYS = ("models", "dataset", "trainer")

# Trainer arguments of TRELLIS's configurations that are no constructor argument here: {name: annotation}.
TRELLIS_ARGS: dict[str, Any] = {
    "fp16_mode": Literal["amp", "inflat_all"] | None,  # mix_precision_mode, with float16
    "elastic": NoneType,  # memory control of TRELLIS's sparse models
}


def complete_config(config: dict) -> dict[str, Any]:
    """Return the configuration with defaults filled in and equal settings in one form.

    Completing it again changes nothing. Raise ConfigError for a key or value that is wrong by itself.
    """
    for key in config:
        if key not in KEYS:
            raise ConfigError(f"{key} is unknown{did_you_mean(key, KEYS)}")
    for key in KEYS:
        if not isinstance(config.get(key), dict):
            raise ConfigError(f"{key} is missing or not a JSON object")
    models = {name: complete_component(spec, MODELS, f"models.{name}") for name, spec in config["models"].items()}
    dataset = complete_component(config["dataset"], DATASETS, "dataset")
    return {"models": models, "dataset": dataset, "trainer": _complete_trainer(config["trainer"])}


def _complete_trainer(spec: dict) -> dict[str, Any]:
    check_component(spec, "trainer")
    cls = TRAINERS.get(spec["name"], "trainer.name")
    args = check_args(_without_trellis_args(spec.get("args", {})), cls, "trainer.args")
    args |= {
        "freeze": sorted(args["freeze"]),
        "ema_rate": as_list(args["ema_rate"]),
        "optimizer": _with_present_name(args["optimizer"]),
        "lr_scheduler": with_length(args["lr_scheduler"], args["max_steps"]),
    }
    return {"name": spec["name"], "args": args}


def _with_present_name(optimizer: dict) -> dict:
    """Return the optimizer's spec with the name that its class has now, so that a run goes on under either."""
    return {**optimizer, "name": "Muon"} if optimizer.get("name") == "ConvMuon" else optimizer


def _without_trellis_args(args: dict) -> dict[str, Any]:
    """Return trainer arguments with TRELLIS_ARGS, and a null that only TRELLIS has, in this package's form."""
    for name, annotation in TRELLIS_ARGS.items():
        if name in args:
            check_value(args[name], annotation, f"trainer.args.{name}")
    own = {name: value for name, value in args.items() if name not in TRELLIS_ARGS}
    if "fp16_mode" in args:
        meant = {"mix_precision_mode": args["fp16_mode"], "mix_precision_dtype": "float16"}
        for name, value in meant.items():
            if own.get(name, value) != value:
                raise ConfigError(
                    f"trainer.args has fp16_mode, which means {name} {json.dumps(value)}, and {name} "
                    f"{json.dumps(own[name])}; leave fp16_mode out"
                )
        own |= meant
    if own.get("batch_split", 1) is None:
        own["batch_split"] = 1
    return own


def as_list(value: Any) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]
