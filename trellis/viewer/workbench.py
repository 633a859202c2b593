"""What the page shows, computed: ids, reconstructions, scores, and where a data set's meshes are.

Nothing here belongs to a visitor: every method is a function of its arguments. `grid`: [R, R, R] bool; `ids`: [T]
int64, a token's Q codes one after the other (see trellis/tokenizer.py).
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
from ..datasets.metadata import read_metadata
from ..evaluation.metrics import distance_metrics, voxel_metrics
from ..grids.voxels import pack_bits, packed_size, unpack_bits
from ..utils.errors import DataError

if TYPE_CHECKING:
    from ..tokenizer import SparseStructureTokenizer

KEPT_GRIDS = 64  # reconstructions, 32 KiB each


class MeshFile(NamedTuple):
    """A mesh that a data set's grid was made of. up_axis, normalization: as of `meshes.mesh_cells`."""

    path: Path
    up_axis: str
    normalization: str | None


class Workbench:
    """A tokenizer and, if any, the data it is tried on.

    dataset: objects to pick from, or None. run_dir: folder whose log.txt has the curves, or None. name: what the page
    calls the tokenizer.
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
        self.num_tokens = tokenizer.num_tokens
        self.block = tuple(self.resolution // count for count in self.lattice)  # voxels that a token stands for
        self.hash = tokenizer.hash
        self.empty_ids = tokenizer.empty_ids.numpy()
        self.compute = threading.Lock()  # one pass through the networks at a time: memory for one
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._mesh_files = self._find_meshes()

    # --- the tokenizer ---

    def encode(self, grid: np.ndarray) -> np.ndarray:
        with self.compute:
            return self.tokenizer.encode(grid.astype(np.float32))[0].cpu().numpy()

    def decode(self, ids: np.ndarray, keep: bool = True) -> np.ndarray:
        """The voxels of ids, a grid. The last ones are kept, by the ids' content, where `keep` says so."""
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
        """iou, precision, recall, f_score, chamfer: as of trellis/evaluation/metrics.py."""
        prediction, target = (torch.from_numpy(each)[None, None] for each in (reconstruction, grid))
        scores = voxel_metrics(prediction, target) | distance_metrics(prediction, target)
        return {name: value.item() for name, value in scores.items()}

    def empties(self, ids: np.ndarray) -> int:
        """How many ids are those of empty space at their place."""
        return int((ids == self.empty_ids).sum())

    def code_repeated(self, code: int, part: int = 0) -> np.ndarray:
        """What a code decodes to among 3³ tokens that have it as their code number `part`, in the middle of empty
        space: next to empty space, a single token often comes to nothing. Returns the middle one's block, bool."""
        ids = self.empty_ids.reshape(*self.lattice, self.codes_per_token).copy()
        middle = [count // 2 for count in self.lattice]
        ids[(*(slice(max(0, at - 1), at + 2) for at in middle), part)] = code
        grid = self.decode(ids.reshape(-1))
        return grid[tuple(slice(at * size, (at + 1) * size) for at, size in zip(middle, self.block, strict=True))]

    def neighbours(self, code: int, number: int) -> list[int]:
        """The codes nearest to a code in the codebook, the nearest first; none where no one table says so."""
        table = self.tokenizer.quantizer.table()
        if table is None:
            return []
        distances = (table - table[code]).square().sum(1)
        distances[code] = -1
        return distances.argsort()[1 : number + 1].tolist()

    def colours(self) -> np.ndarray:
        """A colour for each code, [K, 3] uint8; similar codes have similar colours.

        The first three principal components of the codebook, by rank, are blue to yellow, green to red, and brightness.
        Without one table, or with fewer components, hues are spread by number.
        """
        table = self.tokenizer.quantizer.table()
        if table is None or table.shape[1] < 3 or len(table) < 4:
            turns = np.arange(self.n_embed) * 0.618034 % 1.0  # golden ratio: neighbours far apart
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
        """The grid of an object of the data set. Raises DataError where there is none such."""
        if self.dataset is None or not 0 <= index < len(self.dataset):
            raise DataError(f"object {index}: the data set has {len(self.dataset) if self.dataset else 0} objects")
        return self.dataset[index]["ss"][0].numpy() > 0

    def object_name(self, index: int) -> str:
        return Path(self.dataset.name(index)).name

    def mesh_file(self, index: int) -> MeshFile | None:
        """The mesh of an object, where it is still there."""
        found = self._mesh_files.get(self.dataset.instances[index])
        return found if found and found.path.is_file() else None

    def _find_meshes(self) -> dict[tuple[str, str], MeshFile]:
        """{(root, sha256): mesh} as metadata.csv says, or as TRELLIS lays them out."""
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
    """A grid as text of a few kB, for the visitor's tab to keep."""
    return base64.b64encode(zlib.compress(pack_bits(grid[None])[0].tobytes(), 6)).decode()


def unpack_grid(text: str, resolution: int) -> np.ndarray:
    """The inverse. Raises DataError for a text that is none."""
    bits = np.frombuffer(_inflate(text, packed_size(resolution)), dtype=np.uint8)
    return unpack_bits(bits[None], resolution)[0].numpy() > 0


def pack_ids(ids: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(ids.astype("<i4").tobytes(), 6)).decode()


def unpack_ids(text: str, num_tokens: int, n_embed: int) -> np.ndarray:
    """The inverse, [T] int64. Raises DataError for a text that is none, or ids out of range."""
    ids = np.frombuffer(_inflate(text, 4 * num_tokens), dtype="<i4").astype(np.int64)
    if ids.min() < 0 or ids.max() >= n_embed:
        raise DataError(f"an id lies outside 0 to {n_embed - 1}: reload the page")
    return ids


def _inflate(text: str, size: int) -> bytes:
    """What the page sent back, of exactly `size` bytes. It is anyone's to send, so no more is ever unpacked."""
    try:
        content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, TypeError, zlib.error) as error:
        raise DataError(f"the page sent damaged data ({error}): reload it") from error
    if len(content) != size:
        raise DataError(f"the page sent {len(content)} bytes for {size}, perhaps of another tokenizer: reload it")
    return content
