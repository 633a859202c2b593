"""What the page shows, computed: ids, reconstructions, scores, and the mesh files of a data set.

Nothing here belongs to a visitor: every method is a function of its arguments.
A `grid` is [R, R, R] bool; `ids` are [T] int64, the Q codes of a token one after the other (see trellis/tokenizer.py).
"""

import base64
import hashlib
import math
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..datasets.base import StandardDatasetBase
from ..datasets.metadata import common_setting, read_metadata
from ..evaluation.metrics import distance_metrics, voxel_metrics
from ..grids.placing import Axis
from ..grids.voxels import pack_bits, packed_size, unpack_bits
from ..tokens.forms import Form
from ..utils.errors import DataError

if TYPE_CHECKING:
    from ..tokenizer import SparseStructureTokenizer

KEPT_GRIDS = 64  # reconstructions, 32 KiB each


class MeshFile(NamedTuple):
    """A mesh that a grid of the data set was made of."""

    path: Path
    up_axis: str  # see `grids.placing`
    normalization: str | None


class Backend:
    """A tokenizer and, if any, the data it is tried on.

    dataset: objects to pick from, or None.
    run_dir: folder whose log.txt has the training curves, or None.
    name: what the page calls the tokenizer.
    """

    def __init__(
        self,
        tokenizer: "SparseStructureTokenizer",
        dataset: StandardDatasetBase | None = None,
        run_dir: Path | None = None,
        name: str = "tokenizer",
    ):
        self.tokenizer, self.dataset, self.run_dir, self.name = tokenizer, dataset, run_dir, name
        self.resolution, self.lattice = tokenizer.resolution, tokenizer.lattice
        self.codes_per_token, self.n_embed = tokenizer.codes_per_token, tokenizer.n_embed
        self.empty_code, self.first_code = tokenizer.empty_code, tokenizer.quantizer.first_code
        self.codebook_size = tokenizer.quantizer.codebook_size  # learned codes, whose ids begin at first_code
        self.num_tokens = tokenizer.num_tokens
        self.block = tuple(self.resolution // count for count in self.lattice)  # voxels per token
        self.hash = tokenizer.hash
        self.forms: tuple[Form, ...] = ("dense", "octree") if self.empty_code else ("dense",)  # of texts
        self.octree = tokenizer.token_format(form=self.forms[-1]).octree
        self.empty_ids = tokenizer.empty_ids.numpy()
        self.compute = threading.Lock()  # one pass through the networks at a time, to bound memory
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._mesh_files = self._find_meshes()

    # --- the tokenizer ---

    def encode(self, grid: np.ndarray) -> np.ndarray:
        """Return the ids of a grid."""
        with self.compute:
            return self.tokenizer.encode(grid.astype(np.float32))[0].cpu().numpy()

    def decode(self, ids: np.ndarray, keep: bool = True) -> np.ndarray:
        """Return the reconstruction of ids, a grid. keep: add it to the cache of recent ones."""
        key = hashlib.sha256(ids.astype("<i8").tobytes()).digest()
        with self.compute:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            grid = (self.tokenizer.decode(torch.from_numpy(ids))[0, 0] > 0).cpu().numpy()
            if keep:
                self._kept[key] = grid
                if len(self._kept) > KEPT_GRIDS:
                    self._kept.popitem(last=False)
            return grid

    def scores(self, grid: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
        """Return iou, precision, recall, f_score and chamfer, see trellis/evaluation/metrics.py."""
        prediction, target = (torch.from_numpy(each)[None, None] for each in (reconstruction, grid))
        scores = voxel_metrics(prediction, target) | distance_metrics(prediction, target)
        return {name: value.item() for name, value in scores.items()}

    def of_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return ids [T] as those of the L tokens, [L, Q]."""
        return ids.reshape(-1, self.codes_per_token)

    def empty(self, ids: np.ndarray) -> np.ndarray:
        """Return which tokens have the ids of an empty grid at the same place, [L] bool; all 0 with an empty code."""
        return np.all(self.of_tokens(ids == self.empty_ids), axis=1)

    def repeated(self, codes: np.ndarray) -> np.ndarray:
        """Return the block, bool, that a token with these codes [Q] decodes to amid 26 copies of it, in empty space.

        A single such token often decodes to nothing, since its neighbors are empty.
        """
        ids = self.empty_ids.reshape(*self.lattice, self.codes_per_token).copy()
        middle = [count // 2 for count in self.lattice]
        x, y, z = (slice(max(0, at - 1), at + 2) for at in middle)
        ids[x, y, z] = codes
        grid = self.decode(ids.reshape(-1))
        return grid[tuple(slice(at * size, (at + 1) * size) for at, size in zip(middle, self.block, strict=True))]

    def neighbors(self, code: int, number: int) -> list[int]:
        """Return the codes nearest to a learned code, the nearest first; none without a single codebook."""
        table, row = self.tokenizer.quantizer.table(), code - self.first_code
        if table is None:
            return []
        distances = (table - table[row]).square().sum(1)
        distances[row] = -1
        return (distances.argsort()[1 : number + 1] + self.first_code).tolist()

    def colors(self) -> np.ndarray:
        """Return a color for each learned code, [codebook_size, 3] uint8; similar codes have similar colors.

        The ranks along the first three principal components of the codebook become blue to yellow, green to red, and
        brightness. Without a single codebook, or with fewer components, hues are spread by number.
        """
        table = self.tokenizer.quantizer.table()
        if table is None or table.shape[1] < 3 or len(table) < 4:
            turns = np.arange(self.codebook_size) * 0.618034 % 1.0  # golden ratio: neighbors far apart
            hue = 2 * math.pi * (turns[:, None] + np.array([0, 1 / 3, 2 / 3]))
            return (150 + 90 * np.cos(hue)).astype(np.uint8)
        vectors = table.detach().double().cpu()
        vectors = vectors - vectors.mean(0)
        components = (vectors @ torch.linalg.svd(vectors, full_matrices=False).Vh[:3].T).numpy()
        ranks = components.argsort(0).argsort(0) / (len(vectors) - 1)  # [K, 3] in [0, 1]
        warm, red, light = ranks.T
        rgb = np.stack([0.25 + 0.6 * red, 0.8 - 0.45 * red * 0.9, 0.9 - 0.75 * warm], 1)
        rgb[:, :2] += 0.12 * (warm[:, None] - 0.5)
        return np.clip(255 * rgb * (0.72 + 0.38 * light[:, None]), 0, 255).astype(np.uint8)

    # --- the data ---

    def object(self, index: int) -> np.ndarray:
        """Return the grid of an object of the data set. Raise DataError if there is no such object."""
        if self.dataset is None or not 0 <= index < len(self.dataset):
            raise DataError(f"object {index}: the data set has {len(self.dataset) if self.dataset else 0} objects")
        return self.dataset[index]["ss"][0].numpy() > 0

    def object_names(self) -> list[str]:
        """Return the file names of all objects of the data set."""
        assert self.dataset is not None
        return [Path(name).name for name in self.dataset.texts("name")]

    def grid_axis(self, index: int | None = None) -> Axis:
        """Return how the axes of the files that grids come from were taken, by the setting of the data. Files of the
        setting "auto" differ, and all grids are z-up: "z".

        index: of an object of the data set. Without one, and where the data do not say, the tokenizer's setting counts.
        """
        setting = None
        if index is not None and self.dataset is not None:
            root, _ = self.dataset.instances[index]
            setting = common_setting(self.dataset.settings[root]["up_axis"])
        axes: dict[str, Axis] = {"auto": "z", "y": "y", "z": "z", "keep": "keep"}
        return axes[setting or self.tokenizer.up_axis]

    def mesh_file(self, index: int) -> MeshFile | None:
        """Return the mesh file of an object, None if there is none any more."""
        assert self.dataset is not None
        found = self._mesh_files.get(self.dataset.instances[index])
        return found if found and found.path.is_file() else None

    def _find_meshes(self) -> dict[tuple[str, str], MeshFile]:
        """Return {(root, sha256): mesh file}, as metadata.csv says or in TRELLIS's layout."""
        found = {}
        for root in self.dataset.roots if self.dataset else ():
            if not Path(root, "metadata.csv").is_file():
                continue
            metadata = read_metadata(root).astype(object)
            for row in metadata.where(metadata.notna(), None).to_dict("records"):
                if row.get("file"):
                    mesh = MeshFile(Path(row["file"]), row.get("up_axis") or "keep", row.get("normalization") or "cube")
                else:
                    mesh = MeshFile(Path(root, "renders", row["sha256"], "mesh.ply"), "z", None)
                found[root, row["sha256"]] = mesh
        return found


def pack_grid(grid: np.ndarray) -> str:
    """Return a grid as text of a few kB, which the visitor's tab keeps."""
    return base64.b64encode(zlib.compress(pack_bits(grid[None])[0].tobytes(), 6)).decode()


def unpack_grid(text: str, resolution: int) -> np.ndarray:
    """Undo `pack_grid`. Raise DataError for another text."""
    bits = np.frombuffer(_inflate(text, packed_size(resolution)), dtype=np.uint8)
    return unpack_bits(bits[None], resolution)[0].numpy() > 0


def pack_ids(ids: np.ndarray) -> str:
    """Return ids as text, which the visitor's tab keeps."""
    return base64.b64encode(zlib.compress(ids.astype("<i4").tobytes(), 6)).decode()


def unpack_ids(text: str, num_tokens: int, n_embed: int) -> np.ndarray:
    """Undo `pack_ids`. Raise DataError for another text, or ids out of range."""
    ids = np.frombuffer(_inflate(text, 4 * num_tokens), dtype="<i4").astype(np.int64)
    if ids.min() < 0 or ids.max() >= n_embed:
        raise DataError(f"an id lies outside 0 to {n_embed - 1}: reload the page")
    return ids


def _inflate(text: str, size: int) -> bytes:
    """Decompress what the page sent, exactly `size` bytes. Anyone can send text, so never decompress more."""
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, TypeError, zlib.error) as error:
        raise DataError(f"the page sent damaged data ({error}): reload it") from error
    if len(content) != size:
        raise DataError(f"the page sent {len(content)} bytes for {size}, perhaps of another tokenizer: reload it")
    return content
