"""Encoder, codebook and decoder as one object: from grids and meshes to ids, and from ids to grids, meshes and text.

Axes: B batch, R voxels along an axis, X' Y' Z' the lattice of tokens, Q codes of a token, T = X'·Y'·Z'·Q ids of an
object, K codes.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from .grids.meshes import mesh_to_grid
from .grids.placing import check_settings
from .grids.voxels import has_faces, points_to_occupancy, read_ply
from .models import build, load_weights
from .modules.conv import as_the_library_does
from .tokens.shapellm import read_shapellm, shapellm_state
from .tokens.text import TokenFormat
from .utils.config import load_config
from .utils.errors import CheckpointError, ConfigError, DataError
from .utils.files import written_aside

Precision = Literal["fp32", "bf16"]
MODELS = ("encoder", "quantizer", "decoder")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
# Objects that pass through the networks together. Always as many, filled up with empty ones: a convolution of another
# batch may sum in another order, and a rounding decides between two codes that are equally near.
OBJECTS_AT_ONCE = {"cpu": 1, "cuda": 16}

Source = str | Path
Grids = Tensor | np.ndarray | Source | Iterable[Source]


class SparseStructureTokenizer(nn.Module, PyTorchModelHubMixin):
    """What a language model needs of a trained VQ-VAE.

    models: {"encoder" | "quantizer" | "decoder": {"name", "args"}} as in a configuration, with fresh weights; see
    `from_pretrained`, `from_run`, `from_shapellm` and `load` for trained ones. resolution: R of the grids.
    normalization, up_axis: how meshes become the grids it was trained on, as of voxelize.py. info: what its model card
    says of scores and data.

    ids are those of fp32 arithmetic unless bf16 is asked for. They depend on the weights, on the device and its
    libraries in the last digits of a latent, and on nothing else: not on what is encoded together.
    Raises ConfigError where the models do not fit each other.
    """

    def __init__(
        self,
        models: dict[str, dict],
        resolution: int = 64,
        normalization: str = "cube",
        up_axis: str = "keep",
        info: dict | None = None,
    ):
        super().__init__()
        check_settings(up_axis, normalization)
        if not isinstance(resolution, int) or resolution < 1:
            raise ConfigError(f"resolution is {resolution!r}; it must be a whole number of at least 1")
        missing = [name for name in MODELS if name not in models]
        if missing:
            raise ConfigError(f"models.{missing[0]} is missing: a tokenizer has {', '.join(MODELS)}")
        self.resolution, self.normalization, self.up_axis = resolution, normalization, up_axis
        self.specs = {name: {"name": models[name]["name"], "args": models[name].get("args", {})} for name in MODELS}
        self.info = info or {}
        for name in MODELS:
            model = build(self.specs[name], f"models.{name}")
            if hasattr(model, "convert_to_fp32"):
                model.convert_to_fp32()  # the precision is this class's to choose
            setattr(self, name, model)
        if resolution % self.encoder.downsampling:
            raise ConfigError(
                f"resolution is {resolution}; the encoder halves it, so a multiple of "
                f"{self.encoder.downsampling} is needed"
            )
        cells = resolution // self.encoder.downsampling
        try:
            self.lattice: tuple[int, int, int] = self.quantizer.lattice((cells, cells, cells))
        except ValueError as error:
            raise ConfigError(f"models.quantizer.args: {error}") from error
        self.eval()

    # --- what it is ---

    @property
    def n_embed(self) -> int:
        """K, the codes of the codebook."""
        return self.quantizer.n_embed

    @property
    def codes_per_token(self) -> int:
        """Q, ids of a token."""
        return self.quantizer.codes_per_token

    @property
    def num_tokens(self) -> int:
        """T, the ids of an object."""
        return int(np.prod(self.lattice)) * self.codes_per_token

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.encoder.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        """What ids depend on besides the weights."""
        return {
            "models": self.specs,
            "resolution": self.resolution,
            "normalization": self.normalization,
            "up_axis": self.up_axis,
        }

    @property
    def hash(self) -> str:
        """sha256 over settings and weights, in hexadecimal. Ids of the same hash mean the same objects."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def empty_ids(self) -> Tensor:
        """The ids of an object without voxels, [T] int64 on the CPU: what empty space looks like."""
        return self.encode(torch.zeros(1, 1, *(self.resolution,) * 3))[0].cpu()

    # --- ids ---

    @torch.no_grad()
    def encode(self, grids: Grids, precision: Precision = "fp32") -> Tensor:
        """The ids of objects, [B, T] int64 on this device: tokens in order of x, y, z of the lattice with z fastest,
        and a token's Q codes one after the other.

        grids: [B, 1, R, R, R] or [R, R, R], occupied where > 0; or a mesh, a voxel file (.ply without faces), or
        several of either. Raises ValueError for another shape, DataError where a file is damaged or missing.
        """
        parts = []
        for part, number in self._parts(self._to_grids(grids)):
            with self._arithmetic(precision):
                z = self.encoder(part)
            parts.append(self.quantizer(z).indices.flatten(1)[:number])
        return torch.cat(parts)

    def agreement(self, grids: Grids, precision: Precision = "bf16") -> float:
        """The share of ids, in [0, 1], that encoding in another precision gives as fp32 does. grids: as of `encode`."""
        grids = self._to_grids(grids)
        return (self.encode(grids, precision) == self.encode(grids)).float().mean().item()

    @torch.no_grad()
    def decode(self, ids: Tensor, precision: Precision = "fp32") -> Tensor:
        """Logits [B, 1, R, R, R] float32 of ids [B, T] or [T]; a voxel is occupied where they are above 0.

        Raises ValueError where the shape is another or an id is none of the codebook's.
        """
        ids = self._check_ids(ids).to(self.device)
        parts = []
        for part, number in self._parts(ids):
            codes = self.quantizer.lookup(part.view(len(part), *self._indices_shape))
            with self._arithmetic(precision):
                parts.append(self.decoder(codes)[:number].float())
        return torch.cat(parts)

    def reconstruct(self, grids: Grids, precision: Precision = "fp32") -> Tensor:
        """What is left of objects after encoding and decoding, [B, 1, R, R, R] bool. grids: as of `encode`."""
        return self.decode(self.encode(grids, precision), precision) > 0

    def to_coords(self, ids: Tensor) -> Tensor:
        """The occupied voxels of ids [B, T] or [T], [N, 4] int32: number of the object, x, y, z. In this form TRELLIS's
        second stage takes a sparse structure (arXiv:2412.01506, Sec. 3.3)."""
        return torch.argwhere(self.decode(ids) > 0)[:, [0, 2, 3, 4]].int()

    # --- meshes and text ---

    def to_mesh(self, ids: Tensor, smooth: bool = True):
        """The surface of one object's voxels, a trimesh.Trimesh in the cube [-0.5, 0.5]³ with the grid's axes.

        ids: [T]. smooth: take off the voxels' steps. Raises DataError where no voxel is occupied, ConfigError without
        the packages of the extra `meshes`.
        """
        from .grids.surface import surface_mesh

        return surface_mesh(self._one_grid(ids), smooth=smooth)

    def save_mesh(self, ids: Tensor, path: Source, smooth: bool = True) -> None:
        """Write `to_mesh` as GLB, OBJ, PLY or STL, by the suffix of path, with the axes that `encode` takes a mesh to
        have: y-up where `up_axis` is "y". ids: [T] or [1, T]. Raises ConfigError where there is no such folder."""
        from .grids.surface import save_mesh

        save_mesh(self.to_mesh(ids, smooth), path, to_y_up=self.up_axis == "y")

    def _one_grid(self, ids: Tensor) -> np.ndarray:
        logits = self.decode(ids)
        if len(logits) != 1:
            raise ValueError(f"a mesh is made of one object; ids are {list(ids.shape)}")
        return (logits[0, 0] > 0).cpu().numpy()

    def token_format(self, first_id: int = 0) -> TokenFormat:
        """Where this codebook's ids lie in a vocabulary that gives it ids from `first_id` on."""
        return TokenFormat.at(first_id, self.n_embed)

    def to_text(self, ids: Tensor) -> str | list[str]:
        """`<mesh-start><mesh0>…<mesh-end>`: a text for ids [T], a list of them for [B, T]."""
        texts = [self.token_format().to_text(row) for row in self._check_ids(ids)]
        return texts if ids.ndim == 2 else texts[0]

    def from_text(self, text: str | list[str], strict: bool = True) -> Tensor:
        """The ids of a text [T], or of several [B, T]; the inverse of `to_text`.

        strict: a text that is not exactly one object is a DataError. Otherwise it is repaired: missing ids become those
        of empty space, surplus ones are dropped, and a warning says so; `TokenFormat.from_text` returns what it says.
        """
        fill = None if strict else self.empty_ids
        texts = [text] if isinstance(text, str) else text
        parsed = [self.token_format().from_text(each, self.num_tokens, strict=strict, fill=fill) for each in texts]
        for number, (_, problems) in enumerate(parsed):
            if problems:
                warnings.warn(f"text {number} is repaired: {'; '.join(problems)}", stacklevel=2)
        ids = [each.ids for each in parsed]
        return ids[0] if isinstance(text, str) else torch.stack(ids)

    # --- where it comes from ---

    @classmethod
    def load(cls, source: Source) -> "SparseStructureTokenizer":
        """A tokenizer from wherever it is: a folder of `save_pretrained`, a run folder, a file of ShapeLLM-Omni's
        layout, or an id on the Hub. Raises CheckpointError where it is none of these."""
        path = Path(source)
        if path.is_file():
            if path.suffix not in WEIGHT_SUFFIXES:
                raise CheckpointError(
                    f"{path}: is no tokenizer. Give a folder, or a file of ShapeLLM-Omni's layout, "
                    f"whose name ends in {', '.join(WEIGHT_SUFFIXES)}"
                )
            return cls.from_shapellm(path)
        if (path / WEIGHTS).is_file():
            return cls.from_pretrained(path)
        if (path / "ckpts").is_dir():
            return cls.from_run(path)
        if path.is_dir():
            raise CheckpointError(
                f"{path}: has neither {WEIGHTS} of save_pretrained nor ckpts/ of a run. Give a "
                "folder that has one of them, such as outputs/stage2"
            )
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise CheckpointError(f"{source}: there is no such file or folder, and it is no id on the Hub (org/name)")
        if path.parent.is_dir():  # a slip in a path, which the Hub would take long to not know
            raise CheckpointError(
                f"{source}: {path.parent}/ has no file or folder {path.name}. For an id on the Hub use from_pretrained"
            )
        return cls.from_pretrained(str(source))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, **kwargs) -> "SparseStructureTokenizer":
        """A tokenizer that `save_pretrained` wrote, from a folder or the Hub. kwargs: `revision`, `token` and others of
        huggingface_hub's `ModelHubMixin.from_pretrained`. Raises CheckpointError where there is none."""
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{path}: {missing[0]} is missing, so save_pretrained did not write it. For a "
                    "run folder use from_run"
                )
            _read_config(path / CONFIG)
        try:
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{path}: no such folder, and the Hub did not give it ({reason})") from error

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **settings):
        """huggingface_hub's hook: settings are those of config.json."""
        from huggingface_hub import hf_hub_download

        if Path(model_id).is_dir():
            weights = Path(model_id) / WEIGHTS
        else:
            options = {
                "revision": revision,
                "cache_dir": cache_dir,
                "force_download": force_download,
                "token": token,
                "local_files_only": local_files_only,
            }
            _read_config(hf_hub_download(model_id, CONFIG, **options))
            weights = hf_hub_download(model_id, WEIGHTS, **options)
        tokenizer = cls(**settings)
        load_weights(tokenizer, weights)
        return tokenizer.eval()

    @classmethod
    def from_run(
        cls,
        output_dir: Source,
        ckpt: str = "latest",
        *,
        normalization: str | None = None,
        up_axis: str | None = None,
    ) -> "SparseStructureTokenizer":
        """The tokenizer that a run of train.py has come to, with averaged weights where it has them.

        ckpt: "latest", "best" or a step. normalization, up_axis: of the run's data; by default what metadata.csv says,
        where the data are still there, else "cube" and "keep".
        Raises CheckpointError where the run has no such checkpoint, or no codebook.
        """
        from .runs.open import open_run

        run = open_run(output_dir, ckpt)
        data = ", ".join(Path(root).name for root in (run.data_dir or "").split(",") if root)
        training = {"step": run.step, "objects": run.dataset_size, "data": data}
        info = {"training": {key: value for key, value in training.items() if value}, "scores": run.scores()}
        tokenizer = cls(
            run.config["models"],
            run.resolution,
            normalization or run.data_setting("normalization") or "cube",
            up_axis or run.data_setting("up_axis") or "keep",
            {key: value for key, value in info.items() if value},
        )
        weights = run.weights()
        for name in MODELS:
            load_weights(getattr(tokenizer, name), weights[name])
        return tokenizer

    @classmethod
    def from_shapellm(
        cls, path: Source, *, normalization: str = "shapellm", up_axis: str = "y"
    ) -> "SparseStructureTokenizer":
        """The tokenizer of a file in ShapeLLM-Omni's layout, `3DVQVAE.bin`; sizes are those of its tensors.

        normalization, up_axis: how its meshes became grids, which the file does not say; by default as ShapeLLM-Omni
        does it. Raises CheckpointError where the file is none of this layout.
        """
        models, state = read_shapellm(path)
        # 16 cells a side are what that model has; another number makes other lattices, not other weights.
        tokenizer = cls(models, 64, normalization, up_axis, {"source": f"ShapeLLM-Omni's layout, {Path(path).name}"})
        _load_state(tokenizer, state, path)
        return tokenizer

    def export_shapellm(self, path: Source) -> None:
        """Write the tokenizer in that layout; `from_shapellm` and ShapeLLM-Omni's own class read it.

        The file does not say how meshes were normalised, and its readers do it as ShapeLLM-Omni; a warning says so
        where this tokenizer does not. Raises ConfigError where ids are not the nearest rows of one table over cells
        along z, CheckpointError where the file exists.
        """
        table, along_z = self.quantizer.table(), self.quantizer.group[:2] == (1, 1)
        if table is None or not self.quantizer.nearest_of_table or not along_z:
            raise ConfigError(
                f"{type(self.quantizer).__name__} with group {list(self.quantizer.group)}: that layout "
                "has one table, whose nearest row is the id of cells along z. Train a VectorQuantizer or "
                "EMAVectorQuantizer without group"
            )
        if Path(path).exists():
            raise CheckpointError(f"{path} exists already; choose another file")
        if self.normalization != "shapellm":
            warnings.warn(
                f"{path}: readers of this layout normalise meshes as ShapeLLM-Omni does, but this one's are "
                f'normalised as "{self.normalization}". Give grids, or load it by from_shapellm(..., '
                f'normalization="{self.normalization}", up_axis="{self.up_axis}")',
                stacklevel=2,
            )
        with written_aside(path) as aside:
            torch.save(shapellm_state(self.encoder.state_dict(), self.decoder.state_dict(), table), aside)

    def save_pretrained(self, save_directory: Source, **kwargs) -> str | None:
        """Write config.json, model.safetensors and README.md, the model card, into a folder. kwargs: of
        huggingface_hub's `ModelHubMixin.save_pretrained`. Raises CheckpointError where a tokenizer is there."""
        for name in (CONFIG, WEIGHTS):
            if (Path(save_directory) / name).exists():
                raise CheckpointError(f"{Path(save_directory) / name} exists already; choose another folder")
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        config = {**self.settings, "info": self.info}
        (save_directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card: what it is, how to use it, its scores and data, and its hash. kwargs: `license`, `repo_id` …, of
        huggingface_hub's ModelCardData."""
        data = ModelCardData(library_name="trellis-vqvae", tags=["3d", "tokenizer", "vq-vae", "trellis"], **kwargs)
        rows = {
            "tokens of an object": f"{self.num_tokens} on a lattice of {' × '.join(map(str, self.lattice))}",
            "codes": self.n_embed,
            "grid": f"{self.resolution}³",
            "normalisation": self.normalization,
            "up axis": self.up_axis,
            "hash": f"`{self.hash}`",
        }
        text = f"---\n{data.to_yaml()}\n---\n\n# Sparse-structure tokenizer\n\n"
        text += "Turns the surface of a 3D object, voxels of a cubic grid, into ids and back.\n\n"
        text += "```python\nfrom trellis import SparseStructureTokenizer\n\n"
        text += 'tokenizer = SparseStructureTokenizer.from_pretrained("…")\nids = tokenizer.encode("mesh.glb")\n'
        text += 'tokenizer.save_mesh(ids[0], "back.glb")\n```\n\n' + _table(rows)
        for title in self.info:
            text += f"\n## {title.capitalize()}\n\n{_section(self.info[title])}"
        return ModelCard(text)

    # --- within ---

    @property
    def _indices_shape(self) -> tuple[int, ...]:
        several = (self.codes_per_token,) if self.codes_per_token > 1 else ()
        return (*self.lattice, *several)

    def _parts(self, objects: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Equal parts of a batch on this device, the last filled up with zeros, and how many objects each has."""
        size = OBJECTS_AT_ONCE.get(self.device.type, 1)
        for part in objects.split(size):
            missing = size - len(part)
            padding = (0, 0) * (part.ndim - 1) + (0, missing)
            part = part.to(self.device)
            yield F.pad(part, padding) if missing else part, size - missing

    @contextlib.contextmanager
    def _arithmetic(self, precision: Precision) -> Iterator[None]:
        """bf16 under autocast, or fp32 without TF32 and without a choice by time, which may differ from run to run."""
        if precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}; it must be {' or '.join(get_args(Precision))}")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            if precision == "bf16":
                yield
                return
            before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
            try:
                with as_the_library_does():
                    yield
            finally:
                torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before

    def _to_grids(self, grids: Grids) -> Tensor:
        """[B, 1, R, R, R] float32, 0 or 1."""
        if isinstance(grids, (str, Path)):
            grids = [grids]
        if not isinstance(grids, (Tensor, np.ndarray)):
            grids = torch.stack([self.grid_of_file(path) for path in grids])
        grids, side = torch.as_tensor(grids), (self.resolution,) * 3
        if grids.ndim == 3:
            grids = grids[None, None]
        if grids.ndim != 5 or grids.shape[1:] != (1, *side) or not len(grids):
            raise ValueError(
                f"grids must be [B, 1, {', '.join(map(str, side))}] with B >= 1; they are {list(grids.shape)}"
            )
        return (grids > 0).float()

    def grid_of_file(self, path: Source) -> Tensor:
        """The grid of a mesh, normalised and turned as this tokenizer's were, or of a voxel file: uint8 [1, R, R, R].
        Raises DataError where it cannot be read."""
        path = Path(path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "there is no such file"
            raise DataError(f"{path}: {what}. Give a mesh or a voxel file, or a list of them")
        if path.suffix.lower() == ".ply" and not has_faces(path):
            return points_to_occupancy(read_ply(path), self.resolution, name=str(path))
        return mesh_to_grid(path, self.resolution, self.up_axis, self.normalization)

    def _check_ids(self, ids: Tensor) -> Tensor:
        """ids as [B, T]."""
        ids = torch.as_tensor(ids)
        if ids.ndim not in (1, 2) or ids.shape[-1] != self.num_tokens or ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"ids must be [B, {self.num_tokens}] or [{self.num_tokens}] integers; they are "
                f"{list(ids.shape)} {ids.dtype}"
            )
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.n_embed:
            raise ValueError(f"an id is {low if low < 0 else high}; the codebook has 0 to {self.n_embed - 1}")
        return ids.reshape(-1, self.num_tokens).long()


def _read_config(path: Source) -> None:
    """Raise CheckpointError where a config.json is none of a tokenizer."""
    config = load_config(str(path))
    known = {"models", "resolution", "normalization", "up_axis", "info"}
    if "models" not in config or not set(config) <= known:
        strange = sorted(set(config) - known) or ["no models"]
        raise CheckpointError(f"{path}: has {', '.join(strange)}, so save_pretrained did not write it")


def _load_state(tokenizer: SparseStructureTokenizer, state: dict[str, Tensor], path: Source) -> None:
    try:
        tokenizer.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def _table(rows: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _section(content: Any) -> str:
    if isinstance(content, dict):
        return _table({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in content.items()})
    return f"{content}\n"
