"""Encoder, codebook and decoder as one object: from grids and meshes to ids, and from ids to grids, meshes and text.

Folders of save_pretrained are checked in tokens/sources.py, runs opened in runs/open.py; tokens/card.py is the model
card, tokens/shapellm.py the layout of ShapeLLM-Omni's files.

Axes: B batch, R voxels along an axis, X' Y' Z' the lattice of tokens, Q codes of a token, T = X'·Y'·Z'·Q ids of an
object, K codes.
"""

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from .grids.formats import reader_of
from .grids.meshes import is_trimesh, mesh_to_grid, trimesh_to_grid
from .grids.placing import axis_to_write, check_settings
from .grids.voxels import has_faces, points_to_occupancy, read_ply
from .models import build, check_state, load_state, load_weights, read_weights
from .models.codebook_transformer import CodebookTransformer
from .models.sparse_structure_vae import SparseStructureDecoder, SparseStructureEncoder, check_networks
from .models.vqvae import VqVae
from .modules.conv import deterministic_convolutions
from .modules.quantizers.base import Quantizer
from .runs.open import open_run
from .tokens import sources
from .tokens.canary import Canary
from .tokens.card import model_card
from .tokens.forms import Form, form_of, octree_of
from .tokens.grammar import Grammar
from .tokens.parquet import TokenInfo
from .tokens.problems import Parsed
from .tokens.shapellm import read_shapellm, shapellm_state
from .tokens.sources import CONFIG, FORMAT_VERSION, MODELS, OPTIONAL_MODELS, WEIGHTS
from .tokens.text import TokenFormat
from .utils.config import check_component, load_config
from .utils.errors import CheckpointError, ConfigError, DataError
from .utils.files import atomic_write
from .utils.inputs import obstacle, require_memory

if TYPE_CHECKING:
    import trimesh

Precision = Literal["fp32", "bf16"]
# Objects that pass through the networks together. The number never varies, the last part is filled up with empty grids:
# convolutions of other batch sizes may sum in another order, and rounding decides between two equally near codes.
OBJECTS_AT_ONCE = {"cpu": 1, "cuda": 16}

STORED_AS = (torch.float32, torch.float16, torch.bfloat16)  # precisions of saved weights

Source = str | Path
Mesh = Union[Source, "trimesh.Trimesh", "trimesh.Scene"]  # noqa: UP007 - trimesh is not imported
Grids = Tensor | np.ndarray | Mesh | Iterable[Mesh]
ENCODED = (
    "grids as a tensor or an array, the path of a mesh or voxel file, a trimesh.Trimesh or Scene, or a list of these"
)


class SparseStructureTokenizer(nn.Module, PyTorchModelHubMixin):
    """A trained VQ-VAE as a language model needs it.

    Ids are computed in fp32 unless bf16 is asked for. They depend on the weights and, in the last digits of a latent,
    on the device and its libraries; not on what is encoded together.

    models: {"encoder" | "quantizer" | "decoder": {"name", "args"}} as in a configuration, and "transformer" if there is
        one, with fresh weights; `load` and the methods from_… give trained ones.
    resolution: R of the grids.
    normalization: how meshes become grids, as voxelize.py's flag; the same as for the training data.
    up_axis: how the axes of mesh files are taken, read and written, see `grids.placing`.
    info: scores and data for the model card, {title: facts or text}.
    Raise ConfigError if the models do not fit each other.
    """

    encoder: SparseStructureEncoder
    quantizer: Quantizer
    decoder: SparseStructureDecoder
    transformer: CodebookTransformer | None
    _dtype = torch.float32  # of the weights that save_pretrained writes

    def __init__(
        self,
        models: dict[str, dict],
        resolution: int = 64,
        normalization: str = "cube",
        up_axis: str = "auto",
        info: dict | None = None,
    ):
        super().__init__()
        check_settings(up_axis, normalization)
        if type(resolution) is not int or resolution < 1:
            raise ConfigError(f"resolution is {resolution!r}; it must be a whole number of at least 1")
        require_memory(4 * resolution**3, f"resolution is {resolution}: a grid takes", ConfigError, "use a smaller one")
        missing = [name for name in MODELS if not isinstance(models, dict) or name not in models]
        if missing:
            raise ConfigError(f"models.{missing[0]} is missing: a tokenizer has {', '.join(MODELS)}")
        self.resolution, self.normalization, self.up_axis = resolution, normalization, up_axis
        names = (*MODELS, *(name for name in OPTIONAL_MODELS if name in models))
        self.specs: dict[str, dict[str, Any]] = {}
        for name in names:
            check_component(models[name], f"models.{name}")
            self.specs[name] = {"name": models[name]["name"], "args": models[name].get("args", {})}
        self.info = info or {}
        self.transformer = None
        for name in names:
            setattr(self, name, build(self.specs[name], f"models.{name}"))
        check_networks(self.encoder, self.decoder)
        for network in (self.encoder, self.decoder):
            network.convert_to_fp32()  # the precision is this class's to choose
        if resolution % self.encoder.downsampling:
            raise ConfigError(
                f"resolution is {resolution}, but a latent cell covers {self.encoder.downsampling} voxels along an "
                f"axis; use a multiple of {self.encoder.downsampling}"
            )
        self.lattice = self.vqvae.check(resolution)
        self.eval()

    # --- what it is ---

    @property
    def vqvae(self) -> VqVae:
        """The models in the order in which a grid passes through them."""
        return VqVae(self.encoder, self.quantizer, self.decoder, self.transformer)

    @property
    def n_embed(self) -> int:
        """K, number of ids; with an empty code id 0 is the empty one."""
        return self.quantizer.n_embed

    @property
    def empty_code(self) -> bool:
        """Whether id 0 stands for a token whose block has no voxel."""
        return self.quantizer.empty_code

    @property
    def codes_per_token(self) -> int:
        """Q, ids of a token."""
        return self.quantizer.codes_per_token

    @property
    def num_tokens(self) -> int:
        """T, ids of an object."""
        return int(np.prod(self.lattice)) * self.codes_per_token

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.encoder.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the weights that ids depend on."""
        return {
            "models": self.specs,
            "resolution": self.resolution,
            "normalization": self.normalization,
            "up_axis": self.up_axis,
        }

    @property
    def hash(self) -> str:
        """sha256 over settings and weights, in hexadecimal. Equal hashes mean equal ids."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for key, value in sorted(self.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def empty_ids(self) -> Tensor:
        """The ids of a grid without voxels, [T] int64 on the CPU."""
        return self.encode(torch.zeros(1, 1, *(self.resolution,) * 3))[0].cpu()

    def __repr__(self) -> str:
        several = f" of {self.codes_per_token} codes" if self.codes_per_token > 1 else ""
        facts = [
            f"{self.n_embed} codes",
            *(["id 0 for blocks without a voxel"] if self.empty_code else []),
            f"{int(np.prod(self.lattice))} tokens{several} on a lattice of {'×'.join(map(str, self.lattice))}",
            f"grids of {self.resolution}³",
            f"normalization {self.normalization}",
            f"up axis {self.up_axis}",
            *([] if self.transformer is None else ["transformer around the codebook"]),
            f"hash {self.hash[:12]}",
        ]
        return f"{type(self).__name__}({', '.join(facts)})"

    def token_info(self, precision: Precision = "fp32", form: Form = "dense") -> TokenInfo:
        """Return what this tokenizer's ids mean, as Parquet files record it.

        precision: that ids are computed in.
        form: of the files.
        """
        return TokenInfo(
            self.hash,
            self.normalization,
            self.up_axis,
            self.lattice,
            self.codes_per_token,
            self.n_embed,
            self.resolution,
            precision,
            self.empty_code,
            form,
        )

    # --- ids ---

    @torch.no_grad()
    def encode(self, grids: Grids, precision: Precision = "fp32", up_axis: str | None = None) -> Tensor:
        """Return the ids of objects, [B, T] int64 on this device.

        Tokens are in order of the lattice's x, y, z with z fastest; a token's Q codes follow one another.

        grids: [B, 1, R, R, R] or [R, R, R], occupied where > 0; or a mesh, which is a file, a trimesh.Trimesh or a
            trimesh.Scene; or a voxel file (.ply without faces); or several of these.
        up_axis: how the axes of these meshes are taken (default: this tokenizer's setting).
        Raise ValueError for another shape and for an up_axis beside grids, which have theirs already, TypeError for
        anything else, DataError for a mesh that is damaged or missing, ConfigError for an up_axis that does not go with
        the normalization.
        """
        parts = []
        for part, number in self._parts(self._to_grids(grids, up_axis)):
            occupied = self.vqvae.occupied(part)
            with self._arithmetic(precision):
                z = self.vqvae.before(self.encoder(part), occupied)
            parts.append(self.quantizer(z, occupied).indices.flatten(1)[:number])
        return torch.cat(parts)

    def agreement(self, grids: Grids, precision: Precision = "bf16") -> float:
        """Return the share of ids, in [0, 1], that another precision encodes as fp32 does. grids: as `encode` takes."""
        grids = self._to_grids(grids)
        return (self.encode(grids, precision) == self.encode(grids)).float().mean().item()

    @torch.no_grad()
    def decode(self, ids: Tensor, precision: Precision = "fp32") -> Tensor:
        """Return logits [B, 1, R, R, R] float32; a voxel is occupied where its logit is above 0.

        ids: [B, T] or [T].
        Raise ValueError for another shape, for an id outside [0, K), and with an empty code for a token that has id 0
        beside others.
        """
        ids = self.check_ids(ids).to(self.device)
        parts = []
        for part, number in self._parts(ids):
            with self._arithmetic(precision):
                parts.append(self.vqvae.decode_ids(part.view(len(part), *self._indices_shape))[:number].float())
        return torch.cat(parts)

    def reconstruct(self, grids: Grids, precision: Precision = "fp32") -> Tensor:
        """Encode and decode. Return grids [B, 1, R, R, R] bool. grids: as `encode` takes."""
        return self.decode(self.encode(grids, precision), precision) > 0

    def to_coords(self, ids: Tensor) -> Tensor:
        """Return the occupied voxels, [N, 4] int32: number of the object, x, y, z.

        TRELLIS's second stage takes a sparse structure in this form (arXiv:2412.01506, Sec. 3.3). ids: [B, T] or [T].
        """
        return torch.argwhere(self.decode(ids) > 0)[:, [0, 2, 3, 4]].int()

    # --- meshes and text ---

    def to_mesh(self, ids: Tensor, smooth: bool = True) -> "trimesh.Trimesh":
        """Return the surface of one object's voxels, in the cube [-0.5, 0.5]³ with the grid's axes.

        ids: [T].
        smooth: even out the steps between voxels.
        Raise DataError if no voxel is occupied, ConfigError without the packages of the extra `meshes`.
        """
        from .grids.surface import surface_mesh

        return surface_mesh(self._one_grid(ids), smooth=smooth)

    def save_mesh(self, ids: Tensor, path: Source, smooth: bool = True, up_axis: str | None = None) -> None:
        """Write `to_mesh` as GLB, OBJ, PLY or STL, by the suffix of path, with the axes that `encode` finds in such a
        file: under "auto" a GLB is y-up, as glTF says, and the others have the grid's axes, z-up; but with
        normalization "shapellm" OBJ and PLY are y-up too.

        ids: [T] or [1, T].
        up_axis: as for `encode`; "keep" leaves the grid's axes.
        Raise ConfigError for another suffix or up_axis, or if the folder does not exist, DataError if no voxel is
        occupied.
        """
        from .grids.surface import save_mesh

        axis = axis_to_write(up_axis or self.up_axis, Path(path).suffix, self.normalization)
        save_mesh(self.to_mesh(ids, smooth), path, to_y_up=axis == "y")

    def _one_grid(self, ids: Tensor) -> np.ndarray:
        logits = self.decode(ids)
        if len(logits) != 1:
            raise ValueError(f"a mesh is made of one object; ids are {list(ids.shape)}")
        return (logits[0, 0] > 0).cpu().numpy()

    def token_format(self, first_id: int = 0, form: Form | None = None) -> TokenFormat:
        """Return the words and vocabulary ids of this codebook, for a vocabulary in which code 0 has `first_id`.

        form: "dense", all ids; "octree" or "octree-depth", which leave empty blocks out and need an empty code. None
            for "octree" with an empty code, "dense" without.
        Raise ConfigError for a form that this tokenizer does not have.
        """
        form = form_of(form, self.empty_code)
        octree = octree_of(form, self.lattice, self.n_embed, self.codes_per_token)
        return TokenFormat.at(first_id, self.n_embed, octree)

    def grammar(
        self, first_id: int = 0, form: Form | None = None, *, eos_id: int | None = None, force_start: bool = False
    ) -> Grammar:
        """Return a logits processor for transformers' `generate`, under which a model writes whole objects alone.

        first_id, form: as for `token_format`. eos_id, force_start: as for `Grammar`.
        """
        words = self.token_format(first_id, form)
        number = self.num_tokens if words.octree is None else None
        Q = self.codes_per_token if self.empty_code else 1
        return Grammar(words, number, codes_per_token=Q, eos_id=eos_id, force_start=force_start)

    def to_text(self, ids: Tensor, form: Form | None = None) -> str | list[str]:
        """Return `<mesh-start><mesh0>…<mesh-end>`: one text for ids [T], a list of texts for [B, T].

        form: as for `token_format`.
        """
        words, ids = self.token_format(form=form), torch.as_tensor(ids)
        texts = [words.to_text(row) for row in self.check_ids(ids)]
        return texts if ids.ndim == 2 else texts[0]

    def from_text(self, text: str | list[str], strict: bool = True, form: Form | None = None) -> Tensor:
        """Return the ids of a text, [T], or of several, [B, T]: the inverse of `to_text`.

        strict: raise DataError for a text that is not exactly one object. Otherwise repair it, and warn: fill missing
            ids of the dense form with those of an empty grid, drop surplus ones, take a token of which only some ids
            are 0 as empty if 0 is the empty code; take missing blocks of an octree as empty. `text_reader` returns the
            repairs instead.
        form: as for `token_format`.
        """
        parsed = list(map(self.text_reader(strict, form), [text] if isinstance(text, str) else text))
        for number, (_, problems) in enumerate(parsed):
            if problems:
                warnings.warn(f"text {number} is repaired: {'; '.join(problems)}", stacklevel=2)
        if not parsed:
            return torch.empty(0, self.num_tokens, dtype=torch.int64)
        return parsed[0].ids if isinstance(text, str) else torch.stack([each.ids for each in parsed])

    def text_reader(self, strict: bool = True, form: Form | None = None) -> Callable[[str], Parsed]:
        """Return what reads a text: its ids [T], and how they were repaired. strict, form: as for `from_text`."""
        words = self.token_format(form=form)
        num_tokens = self.num_tokens if words.octree is None else None
        fill = None if strict or words.octree is not None else self.empty_ids
        return lambda text: self._whole_tokens(words.from_text(text, num_tokens, strict=strict, fill=fill), strict)

    def _whole_tokens(self, parsed: Parsed, strict: bool) -> Parsed:
        """Raise DataError if a token is empty in part; take it as empty unless strict."""
        try:
            self.check_ids(parsed.ids)
            return parsed
        except ValueError as error:
            if strict:
                raise DataError(f"{error}. Refused: strict=False, or from_tokens.py --repair, repairs it.") from error
        tokens = parsed.ids.view(-1, self.codes_per_token)
        mixed = (tokens == 0).any(1) & (tokens != 0).any(1)
        problem = f"tokens with id 0 beside other ids ({int(mixed.sum())}) are taken as empty"
        return Parsed(torch.where(mixed[:, None], 0, tokens).flatten(), [*parsed.problems, problem])

    # --- where it comes from and where it goes ---

    @classmethod
    def load(
        cls, source: Source, up_axis: str | None = None, normalization: str | None = None
    ) -> "SparseStructureTokenizer":
        """Load a tokenizer from a folder of `save_pretrained` or of export_pretrained.py, a run folder, a file in
        ShapeLLM-Omni's layout, or an id on the Hub.

        up_axis, normalization: in place of those of the source. The hash covers them, so it changes too.
        Raise CheckpointError for any other source.
        """
        given = {"up_axis": up_axis, "normalization": normalization}
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        match sources.kind_of(source):
            case "run":
                return cls.from_run(source, **settings)
            case "exported":
                return cls.from_exported(source, **settings)
            case "shapellm":
                return cls.from_shapellm(source, **settings)
            case "pretrained":
                return cls.from_pretrained(source, **settings)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, **kwargs) -> "SparseStructureTokenizer":
        """Load a tokenizer that `save_pretrained` wrote, from a folder or the Hub.

        kwargs: of huggingface_hub's `ModelHubMixin.from_pretrained`, such as `revision` and `token`; and settings of
            the constructor in place of those of the folder.
        The ids and logits that were saved of one grid are compared with what the models make of it here; folders of
        earlier versions have none.
        Raise CheckpointError if there is none, for a folder that a newer version wrote, for damaged weights, and if the
        models compute otherwise than when they were saved. Warn if they merely round otherwise.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_dir():
            sources.check_folder(path)
        else:
            options = {name: kwargs[name] for name in sources.HUB_OPTIONS if name in kwargs}
            sources.check_hub(str(pretrained_model_name_or_path), **options)
        with sources.hub_errors(path), _named(path):
            return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **settings):
        """Build and load, as a hook of huggingface_hub, which reads `settings` from config.json."""
        weights: Source = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
            weights = sources.download(model_id, token=token, local_files_only=local_files_only, **options)
        tokenizer = cls._with_state(read_weights(weights), weights, **settings)
        if (canary := sources.read_note(weights, sources.CANARY)) is not None:
            with tokenizer._arithmetic("fp32"):
                Canary.from_dict(canary, weights).check(tokenizer.vqvae, tokenizer.state_dict(), weights)
        return tokenizer.eval()

    @classmethod
    def _with_state(cls, state: dict[str, Tensor], path: Source, **settings: Any) -> "SparseStructureTokenizer":
        """Build a tokenizer and load a state dict. Raise CheckpointError before memory is taken if it does not fit.

        path: the file that the state is from, for errors. settings: of the constructor.
        """
        with torch.device("meta"):
            check_state(cls(**settings), state, path)
        tokenizer = cls(**settings)
        load_state(tokenizer, state, path)
        return tokenizer

    @classmethod
    def from_run(
        cls,
        output_dir: Source,
        ckpt: str = "latest",
        *,
        normalization: str | None = None,
        up_axis: str | None = None,
    ) -> "SparseStructureTokenizer":
        """Load the tokenizer of a train.py run: averaged weights (`Run.weight_file` has the rule).

        ckpt: "latest", "best" or a step.
        normalization, up_axis: of the run's data; by default what the data themselves say if they are still there
            (see `Run.data_setting`), else "cube" and "keep" ("y" with "shapellm").
        Raise CheckpointError if the run has no such checkpoint, ConfigError if it has no codebook or its data
        say settings that do not exist, DataError if they have several normalizations.
        """
        run = open_run(output_dir, ckpt)
        normalization, up_axis = run.tokenizer_settings(normalization, up_axis)
        try:
            check_settings(up_axis, normalization)
        except ConfigError as error:
            remedy = "from_run(..., normalization=..., up_axis=...) takes others than the run's data say."
            raise ConfigError(f"{output_dir}: {error} {remedy}") from error
        tokenizer = cls(run.config["models"], run.resolution, normalization, up_axis, run.about())
        for name in tokenizer.specs:
            load_weights(getattr(tokenizer, name), run.weight_file(name))
        return tokenizer

    @classmethod
    def from_exported(
        cls,
        folder: Source,
        *,
        resolution: int | None = None,
        normalization: str | None = None,
        up_axis: str | None = None,
    ) -> "SparseStructureTokenizer":
        """Load a tokenizer from the models that scripts/export_pretrained.py wrote into a folder.

        resolution, normalization, up_axis: of the training data; by default what the folder says. Folders of earlier
            versions do not; then 64, "cube" and "keep", with a warning.
        Raise CheckpointError if one of the models is missing, or if weights do not fit them.
        """
        files = sources.exported_models(folder)
        said = sources.read_note(files["quantizer"][1], sources.GRIDS) or {}
        given = {"resolution": resolution, "normalization": normalization, "up_axis": up_axis}
        given = {name: value for name, value in given.items() if value is not None}
        defaults = {"resolution": 64, "normalization": "cube", "up_axis": "keep"}
        if strange := sorted(set(said) - set(defaults)):
            raise CheckpointError(
                f"{files['quantizer'][1]}: says {strange[0]} of its grids, which this version does not know; install a "
                "newer trellis-vqvae, or export the run again"
            )
        settings: dict[str, Any] = {**defaults, **said, **given}
        if unknown := [name for name in defaults if name not in said and name not in given]:
            warnings.warn(
                f"{folder}: does not say how its grids were made: "
                f"{', '.join(f'{name} {settings[name]}' for name in unknown)} is taken. from_exported(..., "
                f"{unknown[0]}=...) takes another",
                stacklevel=2,
            )
        models = {name: load_config(str(config)) for name, (config, _) in files.items()}
        with _named(folder):
            tokenizer = cls(models, **settings)
        for name, (_, weights) in files.items():
            load_weights(getattr(tokenizer, name), weights)
        return tokenizer

    @classmethod
    def from_shapellm(
        cls, path: Source, *, normalization: str = "shapellm", up_axis: str = "y"
    ) -> "SparseStructureTokenizer":
        """Load the tokenizer of a file in ShapeLLM-Omni's layout, `3DVQVAE.bin`; its tensors tell the sizes.

        normalization, up_axis: how its meshes became grids, which the file does not say; by default ShapeLLM-Omni's.
        Raise CheckpointError if the file is not of this layout.
        """
        models, state = read_shapellm(path)
        settings: dict[str, Any] = {
            "resolution": 64,  # of that model. Another one would change the lattice, not the weights
            "normalization": normalization,
            "up_axis": up_axis,
            "info": {"source": f"ShapeLLM-Omni's layout, {Path(path).name}"},
        }
        check_settings(up_axis, normalization)
        try:
            return cls._with_state(state, path, models=models, **settings)
        except ConfigError as error:
            raise CheckpointError(f"{path}: its tensors make no tokenizer: {error}") from error

    def export_shapellm(self, path: Source) -> None:
        """Write a file in ShapeLLM-Omni's layout; `from_shapellm` and ShapeLLM-Omni's own class read it.

        The file does not record how meshes are normalized, and its readers assume ShapeLLM-Omni's way. Warn if this
        tokenizer's way differs.
        Raise ConfigError if ids are not the nearest rows of one table over latent cells along z, CheckpointError if the
        file exists.
        """
        if self.transformer is not None:
            raise ConfigError(
                f"{path}: ShapeLLM-Omni's layout has no place for a transformer around the codebook, which this "
                "tokenizer has; train one without models.transformer, or use save_pretrained"
            )
        state = shapellm_state(self.encoder, self.quantizer, self.decoder)
        if Path(path).exists():
            raise CheckpointError(f"{path} exists already; choose another file")
        if self.normalization != "shapellm":
            warnings.warn(
                f"{path}: readers of this layout normalize meshes as ShapeLLM-Omni does, but this one's are "
                f'normalized as "{self.normalization}". Give grids, or load it by from_shapellm(..., '
                f'normalization="{self.normalization}", up_axis="{self.up_axis}")',
                stacklevel=2,
            )
        with atomic_write(path) as partial:
            torch.save(state, partial)

    def save_pretrained(self, save_directory: Source, *, dtype: torch.dtype = torch.float32, **kwargs) -> str | None:
        """Write config.json, model.safetensors and README.md, the model card, into a folder.

        dtype: of the stored weights, float32, float16 or bfloat16. Half precision halves the file. It is loaded as
            float32 weights of the rounded values; ids, hash and card are those of the rounded weights. Tensors with
            values beyond the range of dtype stay in float32.
        kwargs: of huggingface_hub's `ModelHubMixin.save_pretrained`.
        Raise CheckpointError if a tokenizer is there already, or if this one computes no numbers, ConfigError for
        another dtype.
        """
        if dtype not in STORED_AS:
            raise ConfigError(f"dtype is {dtype}; weights are stored as {', '.join(map(str, STORED_AS))}")
        for name in (CONFIG, WEIGHTS):
            if (Path(save_directory) / name).exists():
                raise CheckpointError(f"{Path(save_directory) / name} exists already; choose another folder")
        saved = self if dtype == self._dtype else self._stored_as(dtype)
        return super(SparseStructureTokenizer, saved).save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights with a canary, and config.json, as a hook of huggingface_hub."""
        from safetensors.torch import save

        with self._arithmetic("fp32"):
            canary = Canary.of(self.vqvae, self.resolution, self.state_dict())
        if not np.isfinite(canary.logits).all():
            raise CheckpointError(f"{save_directory}: not saved, since the tokenizer's logits are not finite numbers")
        state = {key: _in(value, self._dtype).contiguous() for key, value in self.state_dict().items()}
        with atomic_write(save_directory / WEIGHTS) as partial:
            partial.write_bytes(save(state, {sources.CANARY: json.dumps(asdict(canary))}))  # a full disk is an OSError
        config = {"format_version": FORMAT_VERSION, **self.settings, "info": self.info}
        with atomic_write(save_directory / CONFIG) as partial:
            partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _stored_as(self, dtype: torch.dtype) -> "SparseStructureTokenizer":
        """Return a copy with the weights that `save_pretrained` with this dtype would give back."""
        rounded = copy.deepcopy(self)
        rounded._dtype = dtype
        for value in rounded.state_dict().values():
            value.copy_(_in(value, dtype))
        return rounded

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """Return the model card. kwargs: fields of huggingface_hub's ModelCardData, such as `license`."""
        return model_card(self.token_info(), self.info, **kwargs)

    # --- within ---

    @property
    def _indices_shape(self) -> tuple[int, ...]:
        several = (self.codes_per_token,) if self.codes_per_token > 1 else ()
        return (*self.lattice, *several)

    def _parts(self, objects: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield equal parts of a batch on this device, the last one padded with zeros, and each one's object count."""
        size = OBJECTS_AT_ONCE.get(self.device.type, 1)
        for part in objects.split(size):
            missing = size - len(part)
            padding = (0, 0) * (part.ndim - 1) + (0, missing)
            part = part.to(self.device)
            yield F.pad(part, padding) if missing else part, size - missing

    @contextlib.contextmanager
    def _arithmetic(self, precision: Precision) -> Iterator[None]:
        """Compute in bf16 under autocast, or in fp32 without TF32 and without timing algorithms, so that the same
        algorithm runs every time."""
        if precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}; it must be {' or '.join(get_args(Precision))}")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            if precision == "bf16":
                yield
                return
            before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
            torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
            try:
                with deterministic_convolutions():
                    yield
            finally:
                torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before

    def _to_grids(self, grids: Grids, up_axis: str | None = None) -> Tensor:
        """Return [B, 1, R, R, R] float32, 0 or 1."""
        if up_axis is not None:
            check_settings(up_axis, self.normalization)
            if isinstance(grids, (Tensor, np.ndarray)):
                raise ValueError(f"up_axis {up_axis!r} goes with meshes; these are grids, whose axes are settled")
        if isinstance(grids, (str, Path)) or is_trimesh(grids):
            grids = [grids]
        if not isinstance(grids, (Tensor, np.ndarray)):
            if not isinstance(grids, Iterable):
                raise TypeError(f"a {type(grids).__name__} is no mesh or grids; give {ENCODED}")
            made = [self._grid_of(mesh, up_axis) for mesh in grids]
            if not made:
                raise ValueError("there are no grids or files to encode; give at least one")
            grids = torch.stack(made)
        grids, side = torch.as_tensor(grids), (self.resolution,) * 3
        if grids.ndim == 3:
            grids = grids[None, None]
        if grids.ndim != 5 or grids.shape[1:] != (1, *side) or not len(grids):
            raise ValueError(
                f"grids must be [B, 1, {', '.join(map(str, side))}] with B >= 1; they are {list(grids.shape)}"
            )
        return (grids > 0).float()

    def _grid_of(self, mesh: "Source | trimesh.Trimesh | trimesh.Scene", up_axis: str | None) -> Tensor:
        if is_trimesh(mesh):
            return trimesh_to_grid(mesh, self.resolution, up_axis or self.up_axis, self.normalization)
        if not isinstance(mesh, (str, Path)):
            raise TypeError(f"a {type(mesh).__name__} among them is no mesh; give {ENCODED}")
        return self.grid_of_file(mesh, up_axis)

    def grid_of_file(self, path: Source, up_axis: str | None = None) -> Tensor:
        """Return the grid of a mesh, normalized and turned by this tokenizer's settings, or of a voxel file: uint8
        [1, R, R, R].

        up_axis: as for `encode`.
        Raise DataError if the file cannot be read, ConfigError for an up_axis that does not go with the normalization.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: there is no such file. Give a mesh or a voxel file, or a list of them")
        if (reason := obstacle(path)) is not None:
            raise DataError(f"{path}: {reason}. Give a mesh or a voxel file, or a list of them")
        known = reader_of(path)
        if known is not None and known.kind == "volume":
            raise DataError(f"{path}: is a volume ({known.name}). Make grids of it with voxelize.py, and give those")
        if path.suffix.lower() == ".ply" and not has_faces(path):
            return points_to_occupancy(read_ply(path), self.resolution, name=str(path))
        return mesh_to_grid(path, self.resolution, up_axis or self.up_axis, self.normalization)

    def check_ids(self, ids: Tensor) -> Tensor:
        """Return ids as [B, T].

        Raise ValueError for another shape, for an id outside [0, K), and with an empty code for a token that has id 0
        beside others.
        """
        ids = torch.as_tensor(ids)
        if ids.ndim not in (1, 2) or ids.shape[-1] != self.num_tokens or ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"ids must be [B, {self.num_tokens}] or [{self.num_tokens}] integers; they are "
                f"{list(ids.shape)} {ids.dtype}. Texts become ids by from_text, token files by "
                "trellis.tokens.parquet.read_shards"
            )
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= self.n_embed:
            raise ValueError(f"an id is {low if low < 0 else high}; the codebook has 0 to {self.n_embed - 1}")
        ids = ids.reshape(-1, self.num_tokens).long()
        if self.empty_code and self.codes_per_token > 1:
            empty = ids.unflatten(1, (-1, self.codes_per_token)) == 0  # [B, L, Q]
            mixed = (empty.any(2) & ~empty.all(2)).nonzero()
            if len(mixed):
                number, token = mixed[0].tolist()
                first = token * self.codes_per_token
                raise ValueError(
                    f"ids {first} to {first + self.codes_per_token - 1} of object {number} are of one token, and only "
                    "some are 0: an empty token has 0 alone, and another one has none"
                )
        return ids


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Begin a ConfigError with the folder whose models or settings it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _in(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another precision; unchanged if it is no float, or if a value is beyond the range."""
    rounded = value.to(dtype) if value.is_floating_point() else value
    return value if (rounded.isinf() & value.isfinite()).any() else rounded
