"""Models by class name, and published weights.

`from_pretrained` reads `path.json` (class name and arguments) and `path.safetensors` (weights), locally or
from the Hugging Face Hub.
"""

import json
import zipfile
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from ..modules.model import Model
from ..utils.config import check_args, check_component, load_config
from ..utils.errors import CheckpointError, ConfigError
from ..utils.hub import check_reachable
from ..utils.inputs import require_file, require_memory
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


# Calls of torch while a model is built. The largest of the shipped configurations makes two thousand.
MAX_CALLS = 50_000


def build(spec: dict, where: str = "model") -> Model:
    """Build a model from {"name", "args"}. Raise ConfigError naming the wrong key, also for sizes beyond memory.

    Parameters are laid out in channels_last_3d, which makes 3-D convolutions two to four times as fast.
    """
    check_component(spec, where)
    cls = MODELS.get(spec["name"], f"{where}.name")
    args = spec.get("args", {})
    check_args(args, cls, f"{where}.args")
    _check_size(cls, args, f"{where}.args")
    return cls(**args).to(memory_format=torch.channels_last_3d)


def _check_size(cls: type[Model], args: dict, where: str) -> None:
    """Build a model on the meta device, where tensors take no memory.

    Raise ConfigError if the constructor refuses the arguments, or if building takes too many steps or too much memory.
    """
    counted = _Counted(where)
    try:
        with torch.device("meta"), counted:
            model = cls(**args)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (RuntimeError, TypeError, OverflowError) as error:  # torch, for sizes whose product is beyond 64 bits
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: no model can have these sizes ({reason}); use smaller ones") from error
    own = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    # A constructor holds at most two large tensors beside those that it keeps.
    require_memory(own + 2 * counted.largest, f"{where}: the model takes", ConfigError, "use smaller sizes")


class _Counted(TorchFunctionMode):
    """Counts calls of torch, so that absurd numbers of layers end early, and keeps the bytes of the largest result."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.calls, self.largest = where, 0, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise ConfigError(f"{self.where}: the model has thousands of layers or codebooks; use fewer")
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


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
    check_reachable(repo, f"{name}.json", path)
    try:
        return hf_hub_download(repo, f"{name}.json"), hf_hub_download(repo, f"{name}.safetensors")
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: no such local pair {local[0]} + .safetensors, and the Hub did not give it ({reason})"
        ) from error


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors or .pt file, on the CPU. Never unpickle objects.

    Raise CheckpointError if the file is missing, damaged, or holds anything but dense tensors by name.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: there is no such file")
    require_file(path, CheckpointError, "give a file of weights")
    require_memory(Path(path).stat().st_size, f"{path}: takes", CheckpointError, "give a smaller file")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            _refuse_compressed(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch and safetensors raise many types for one damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable weights file ({reason})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not tensors by name; give a state dict")
    for key, value in state.items():
        dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not dense or value.is_quantized or value.is_complex():
            raise CheckpointError(
                f"{path}: its entry {key!r:.80} is no dense tensor of real numbers; give a state dict"
            )
    return state


def _refuse_compressed(path: str | Path) -> None:
    """Raise CheckpointError for a .pt file whose content is larger than the file. torch compresses none."""
    if not zipfile.is_zipfile(path):  # torch's format before 1.6
        return
    with zipfile.ZipFile(path) as file:
        content = sum(member.file_size for member in file.infolist())
    if content > Path(path).stat().st_size:
        raise CheckpointError(f"{path}: is compressed or damaged, since torch's files are not; copy it again")


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
    check_state(module, state, path)
    module.load_state_dict(state)


def check_state(module: torch.nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise CheckpointError unless a state dict has the module's tensors, which may be on the meta device."""
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


def model_spec(model_config: dict) -> str:
    """Return the JSON text that `from_pretrained` reads beside the weights."""
    return json.dumps({"name": model_config["name"], "args": model_config.get("args", {})}, indent=4) + "\n"
