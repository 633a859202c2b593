"""Where a tokenizer comes from: which kind of source a path is, and checks of saved folders and of the Hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..utils.config import json_type, load_config, parse_json
from ..utils.errors import CheckpointError, ConfigError
from ..utils.formats import check_version
from ..utils.hub import check_reachable
from ..utils.inputs import require_file

Kind = Literal["pretrained", "run", "exported", "shapellm"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of save_pretrained
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
KEYS = {"format_version", "models", "resolution", "normalization", "up_axis", "info"}  # of config.json
FORMAT_VERSION = 1
MODELS = ("encoder", "quantizer", "decoder")
OPTIONAL_MODELS = ("transformer",)
# Keys of weight files' metadata, JSON. One in a file: safetensors writes several in random order, and what is equal
# should be equal in every byte.
CANARY = "canary"  # of save_pretrained, see canary.py
GRIDS = "grids"  # of export_pretrained.py's quantizer: {"resolution", "normalization", "up_axis"}


def kind_of(source: str | Path) -> Kind:
    """Return what a source is: "pretrained" for a folder of save_pretrained and for an id on the Hub, "run" for a run
    folder, "exported" for a folder of export_pretrained.py, "shapellm" for a weights file. Raise CheckpointError for
    anything else."""
    path = Path(source)
    if path.is_file():
        if path.name in (CONFIG, WEIGHTS) and all((path.parent / name).is_file() for name in (CONFIG, WEIGHTS)):
            raise CheckpointError(f"{path}: is part of a tokenizer. Give its folder, {path.parent}")
        if path.suffix not in WEIGHT_SUFFIXES:
            raise CheckpointError(
                f"{path}: is not a tokenizer. Give a folder, or a file of ShapeLLM-Omni's layout, "
                f"whose name ends in {', '.join(WEIGHT_SUFFIXES)}"
            )
        return "shapellm"
    if (path / WEIGHTS).is_file():
        return "pretrained"
    if (path / "ckpts").is_dir():
        return "run"
    if any((path / f"{name}.json").is_file() for name in MODELS):
        return "exported"
    if path.is_dir():
        raise CheckpointError(
            f"{path}: has neither {WEIGHTS} of save_pretrained nor ckpts/ of a run nor quantizer.json of "
            "export_pretrained.py. Give a folder that has one of them, such as outputs/stage2"
        )
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: there is no such file or folder, and it is not an id on the Hub (org/name)")
    if path.parent.is_dir():  # a mistyped path; asking the Hub would only cost time
        raise CheckpointError(
            f"{source}: {path.parent}/ has no file or folder {path.name}. For an id on the Hub use from_pretrained"
        )
    return "pretrained"


def check_folder(path: Path) -> None:
    """Raise CheckpointError unless save_pretrained wrote the folder."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing, so save_pretrained did not write it. For a run folder use from_run"
        )
    check_config(path / CONFIG)


def check_config(path: str | Path) -> None:
    """Raise CheckpointError if a config.json is not a tokenizer's, or of a newer format version."""
    config = load_config(str(path))
    check_version(config.get("format_version", 1), FORMAT_VERSION, path, CheckpointError)
    if "models" not in config or not set(config) <= KEYS:
        strange = sorted(set(config) - KEYS)[:5] or ["no models"]
        raise CheckpointError(f"{path}: has {', '.join(strange)}, so save_pretrained did not write it")
    for key in ("models", "info"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{path}: {key} has type {json_type(config[key])}; save_pretrained writes an object")
    if missing := [name for name in MODELS if name not in (config["models"] or {})]:
        raise CheckpointError(f"{path}: models.{missing[0]} is missing: a tokenizer has {', '.join(MODELS)}")


def exported_models(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """Return {name: (JSON, weights)} of the models that export_pretrained.py wrote into a folder.

    Raise CheckpointError for a model of a tokenizer that is missing, or half missing.
    """
    found = {}
    for name in (*MODELS, *OPTIONAL_MODELS):
        config, weights = Path(folder) / f"{name}.json", Path(folder) / f"{name}.safetensors"
        if config.is_file() and weights.is_file():
            found[name] = config, weights
        elif name in MODELS or config.is_file() or weights.is_file():
            missing = weights if config.is_file() else config
            raise CheckpointError(
                f"{missing}: there is no such file. A tokenizer has {', '.join(MODELS)}: export a run that trained a "
                "codebook, with all its files"
            )
    return found


def read_note(weights: str | Path, key: str) -> dict[str, Any] | None:
    """Return what a safetensors file says under a key of its metadata, None if it has no such key.

    Raise CheckpointError if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    require_file(weights, CheckpointError, "give a file of weights")
    try:
        with safe_open(weights, "pt") as file:
            text = (file.metadata() or {}).get(key)
        note = None if text is None else parse_json(text, key)
        if not isinstance(note, dict | None):
            raise ValueError(f"{key} is no JSON object")
        return note
    except (OSError, SafetensorError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{weights}: not a readable weights file ({error})") from error


HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")  # of `hf_hub_download`


def check_hub(model_id: str, **options) -> None:
    """Raise CheckpointError if the config.json of an id on the Hub is not a tokenizer's, ConfigError if it is damaged.

    options: some of HUB_OPTIONS.
    """
    from huggingface_hub import hf_hub_download

    check_reachable(model_id, CONFIG, **options)
    with hub_errors(model_id):
        check_config(hf_hub_download(model_id, CONFIG, **options))


def download(model_id: str, **options) -> str:
    """Return the path of the weights of a tokenizer on the Hub, downloaded after a check of its config.json.

    options: of huggingface_hub's `hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download

    check_config(hf_hub_download(model_id, CONFIG, **options))
    return hf_hub_download(model_id, WEIGHTS, **options)


@contextlib.contextmanager
def hub_errors(source: str | Path) -> Iterator[None]:
    """Turn errors of the Hub and of the network into a CheckpointError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source}: no such folder, and the Hub did not give it ({reason})") from error
