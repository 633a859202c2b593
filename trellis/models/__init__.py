"""Models by class name, and published weights.

`from_pretrained` reads `path.json` (class name and arguments) and `path.safetensors` (weights), locally or
from the Hugging Face Hub.
"""

import json
from pathlib import Path

import torch

from ..modules.model import Model
from ..utils.config import check_args, check_component, load_config
from ..utils.errors import CheckpointError, ConfigError
from ..utils.registry import Registry

MODELS = Registry(
    __name__,
    {
        "SparseStructureEncoder": ".sparse_structure_vae",
        "SparseStructureDecoder": ".sparse_structure_vae",
        "CodebookTransformer": ".codebook_transformer",
        "VectorQuantizer": "..modules.quantizers.vq",
        "EMAVectorQuantizer": "..modules.quantizers.ema_vq",
        "SimVQ": "..modules.quantizers.simvq",
        "RotationVectorQuantizer": "..modules.quantizers.rotation",
        "FiniteScalarQuantizer": "..modules.quantizers.fsq",
        "LookupFreeQuantizer": "..modules.quantizers.lfq",
        "IndexBackpropagationQuantizer": "..modules.quantizers.ibq",
        "ResidualVectorQuantizer": "..modules.quantizers.residual_vq",
        "ProductVectorQuantizer": "..modules.quantizers.product_vq",
    },
)

__all__ = ["MODELS", "build", "from_pretrained", "load_weights", *MODELS.classes]


def __getattr__(name: str):
    if name in MODELS.classes:
        return MODELS.get(name, "trellis.models")
    raise AttributeError(f"module {__name__} has no attribute {name}")


def build(spec: dict, where: str = "model") -> Model:
    """Build a model from {"name", "args"}. Raise ConfigError naming the wrong key.

    Parameters are laid out in channels_last_3d, which makes 3-D convolutions two to four times as fast.
    """
    check_component(spec, where)
    cls = MODELS.get(spec["name"], f"{where}.name")
    args = spec.get("args", {})
    check_args(args, cls, f"{where}.args")
    try:
        return cls(**args).to(memory_format=torch.channels_last_3d)
    except ValueError as error:
        raise ConfigError(f"{where}.args: {error}") from error


def from_pretrained(path: str) -> Model:
    """Build a model and load its weights, in evaluation mode on the CPU.

    path: `dir/name` for the files dir/name.json and dir/name.safetensors, or `org/repo/sub/name` on the
    Hub. A local pair comes first. Raise CheckpointError if there is neither, or if they do not fit.
    """
    config_file, weights_file = pretrained_files(path)
    model = build(load_config(config_file), str(config_file))
    load_weights(model, weights_file)
    return model.eval()


def pretrained_files(path: str) -> tuple[str, str]:
    """Return the paths of a pretrained model's JSON and safetensors files, downloaded if they are on the Hub."""
    local = [f"{path}.json", f"{path}.safetensors"]
    present = [Path(file).is_file() for file in local]
    if all(present):
        return local[0], local[1]
    if any(present):
        raise CheckpointError(f"{local[present.index(False)]} is missing beside {local[present.index(True)]}")
    parts = path.split("/")
    looks_like_hub = len(parts) > 2 and all(part and part not in (".", "..") for part in parts)
    if not looks_like_hub:
        raise CheckpointError(
            f"{path}: there is no {local[0]} and {local[1]}, and it is not a Hub path (org/repo/sub/name)"
        )
    # Imported here: local files do not need the Hub client.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return hf_hub_download(repo, f"{name}.json"), hf_hub_download(repo, f"{name}.safetensors")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: no such local pair {local[0]} + .safetensors, and the Hub did not give it ({reason})"
        ) from error


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors or .pt file, on the CPU. Never unpickle objects."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except Exception as error:  # torch and safetensors raise many types for one damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable weights file ({reason})") from error


def load_weights(model: Model, path: str | Path, part: str | None = None) -> None:
    """Load a file of weights once the model has `completed` them. Raise CheckpointError if they do not fit.

    part: the model's name, if the file has several and each key begins with one, as a saved tokenizer's.
    """
    state = read_weights(path)
    if part is not None:
        state = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    load_state(model, model.completed(state), path)


def load_state(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a state dict strictly. path: the file it is from, for errors.

    Raise CheckpointError naming the first tensors that do not fit.
    """
    own = module.state_dict()
    shapes = [
        f"{key} is {list(state[key].shape)} there and {list(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [f"{key} is missing there" for key in own if key not in state] + shapes
    problems += [f"{key} is not in the model" for key in state if key not in own]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}. "
            "Give the weights that belong to this configuration's models, or change name or args of the model in it"
        )
    module.load_state_dict(state)


def model_spec(model_config: dict) -> str:
    """Return the JSON text that `from_pretrained` reads beside the weights."""
    return json.dumps({"name": model_config["name"], "args": model_config.get("args", {})}, indent=4) + "\n"
