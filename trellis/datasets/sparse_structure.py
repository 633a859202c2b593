"""Sparse structures: occupancy grids of PLY roots and of packed roots.

PLY root, as TRELLIS makes it: `metadata.csv` and `voxels/<sha256>.ply`.
Packed root: an .npz file as packed.py describes it, or a folder of such files.
"""

import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..grids.symmetries import Augmentation, augment_grids
from ..grids.voxels import (
    pack_bits,
    points_to_voxels,
    read_ply,
    unpack_bits,
    unpack_bits_on_device,
    voxels_to_grid,
)
from ..utils.config import Count
from ..utils.errors import DataError
from .base import StandardDatasetBase
from .metadata import Split, read_flags, read_metadata, require_files
from .packed import check_resolution, load_packed, packed_resolution

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val)$", re.IGNORECASE)  # not in interval.npz


class SparseStructure(StandardDatasetBase):
    """Occupancy grids; an item is {"ss": uint8 [1, R, R, R], 0 or 1, axes x y z}.

    roots: comma-separated folders or .npz files.
    resolution: R, voxels per axis.
    min_aesthetic_score: keep objects whose `aesthetic_score` is at least this, in roots with that column.
    augmentation: symmetries of the cube to draw from for each training sample: "none"; "z", the 8 that keep the z
        axis and its direction; "all" 48. Items, batches and the other splits are as stored.
    split: "train", "val" or "all": by the `split` column or array; else, for an .npz, by a file name that
        ends in train or val; else by sha256.
    Packed rows stay packed in memory; PLY files are read item by item. Batches of either are packed.
    """

    def __init__(
        self,
        roots: str,
        *,
        resolution: Count = 64,
        min_aesthetic_score: float | None = None,
        augmentation: Augmentation = "none",
        split: Split = "train",
    ):
        self.resolution = resolution
        self.min_aesthetic_score = min_aesthetic_score
        self.augmentation = augmentation
        self._packed: dict[tuple[str, str], np.ndarray] = {}  # (root, sha256) -> a row of `bits`
        super().__init__(roots, split=split)

    def read_root(self, root: str) -> "DataFrame":
        path = Path(root)
        if path.suffix == ".npz":
            return self._read_packed(root, [path])
        if not path.is_dir():
            what = "is neither a folder nor an .npz file" if path.exists() else "does not exist"
            raise DataError(f"{root}: {what}. voxelize.py makes a folder of voxels out of meshes.")
        packed = sorted(path.glob("*.npz"))
        has_metadata = Path(path, "metadata.csv").exists()
        if packed and has_metadata:
            raise DataError(f"{root}: has both metadata.csv and {packed[0].name}; move one of them elsewhere")
        if packed:
            return self._read_packed(root, packed)
        if has_metadata:
            return read_metadata(root)
        raise DataError(
            f"{root}: has neither metadata.csv (with voxels/<sha256>.ply beside it) nor an .npz "
            "file of packed grids. voxelize.py makes the former out of meshes."
        )

    def filter_metadata(self, metadata: "DataFrame") -> tuple["DataFrame", dict[str, int | None]]:
        metadata, stats = super().filter_metadata(metadata)
        if "voxelized" in metadata:
            voxelized = read_flags(metadata, "voxelized")
            stats["voxelized = True"] = int((~voxelized).sum())
            metadata = metadata[voxelized]
        if self.min_aesthetic_score is not None:
            label = f"aesthetic_score >= {self.min_aesthetic_score:g}"
            stats[label] = None
            if "aesthetic_score" in metadata:
                good = _scores(metadata) >= self.min_aesthetic_score
                stats[label] = int((~good).sum())
                metadata = metadata[good]
        return metadata, stats

    def check_files(self, root: str, metadata: "DataFrame") -> None:
        if (root, metadata["sha256"].iloc[0]) in self._packed:
            return
        if "resolution" in metadata:  # TRELLIS's metadata lack it; reading the points tells
            other = metadata[metadata["resolution"].notna() & (metadata["resolution"] != self.resolution)]
            if len(other):
                self._compare_resolution(metadata.attrs["path"], int(other["resolution"].iloc[0]))
                raise DataError(
                    f"{metadata.attrs['path']}: resolution of {other['sha256'].iloc[0]} is "
                    f"{other['resolution'].iloc[0]}, but {self.resolution} is asked for. Ask for "
                    "that (dataset.args.resolution of a configuration, --resolution of a program), or make the grids "
                    "anew with voxelize.py --resolution."
                )
        require_files(Path(root, "voxels"), [f"{sha256}.ply" for sha256 in metadata["sha256"]])

    def get_instance(self, root: str, instance: str) -> dict[str, Tensor]:
        return {"ss": unpack_bits(self._bits(root, instance)[None], self.resolution)}

    def _bits(self, root: str, instance: str) -> np.ndarray:
        """Return a grid as bits, uint8 [ceil(R^3 / 8)]."""
        if (root, instance) in self._packed:
            return self._packed[root, instance]
        path = _ply_path(root, instance)
        voxels = points_to_voxels(read_ply(path), self.resolution, name=str(path))
        return pack_bits(voxels_to_grid(voxels, self.resolution)[None])[0]

    @property
    def in_memory(self) -> bool:
        return all(instance in self._packed for instance in self.instances)

    def get_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return {"bits": uint8 [B, ceil(R^3 / 8)]}: grids as in a packed file."""
        return {"bits": torch.from_numpy(np.stack([self._bits(*self.instances[i]) for i in indices.tolist()]))}

    def unpack_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with `ss` uint8 [B, 1, R, R, R] in place of `bits`."""
        others = {name: value for name, value in batch.items() if name != "bits"}
        return {"ss": unpack_bits_on_device(batch["bits"], self.resolution), **others}

    def augment(self, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the batch with each grid of `ss` under the symmetry that its sample number draws."""
        if self.augmentation == "none" or self.split != "train":
            return batch
        return {**batch, "ss": augment_grids(batch["ss"], self.augmentation, seed, batch["sample_ids"])}

    def content_key(self) -> dict[str, str | int]:
        return {**super().content_key(), "resolution": self.resolution}

    def item_version(self, root: str, instance: str) -> str:
        """Return the checksum of a packed row, or the size and modification time of a PLY file.

        Copying keeps that time only on request (cp -p, rsync -t).
        """
        if (root, instance) in self._packed:
            return f"{zlib.crc32(self._packed[root, instance].data):08x}"
        path = _ply_path(root, instance)
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}). Rerun voxelize.py.") from error
        return f"{status.st_size} {status.st_mtime_ns}"

    def _compare_resolution(self, path: Path | str, found: int | None) -> None:
        """Raise DataError if the grids of a file have another resolution than those of the roots before it."""
        if self.settings and found not in (None, self.resolution):
            raise DataError(
                f"{path}: has grids of resolution {found}, but those of {next(iter(self.settings))} have "
                f"{self.resolution}, as the config says. Make the former anew with voxelize.py --resolution "
                f"{self.resolution}, or leave this root out."
            )

    def _read_packed(self, root: str, paths: list[Path]) -> "DataFrame":
        import pandas as pd

        tables = []
        for path in paths:
            arrays = load_packed(path)
            bits = arrays.pop("bits")
            self._compare_resolution(path, packed_resolution(bits))
            check_resolution(path, bits, self.resolution)
            named_split = SPLIT_IN_NAME.search(path.stem)
            if "split" not in arrays and named_split:
                arrays["split"] = np.full(len(bits), named_split[1].lower())
            columns = {key: array.tolist() for key, array in arrays.items()}
            tables.append(pd.DataFrame(columns, dtype=object))
            self._packed.update(((root, sha256), row) for sha256, row in zip(columns["sha256"], bits, strict=True))
        metadata = pd.concat(tables, ignore_index=True)
        metadata.attrs["path"] = root
        return metadata


def _ply_path(root: str, instance: str) -> Path:
    return Path(root, "voxels", f"{instance}.ply")


def _scores(metadata: "DataFrame") -> "Series":
    """Return aesthetic_score as float64 [N]. Raise DataError for one that is blank or no number."""
    import pandas as pd

    scores = pd.to_numeric(metadata["aesthetic_score"], errors="coerce").astype("float64")
    if scores.isna().any():
        row = metadata[scores.isna()].iloc[0]
        raise DataError(
            f"{metadata.attrs['path']}: aesthetic_score of {row['sha256']} is "
            f"{row['aesthetic_score']!r} ({int(scores.isna().sum())} such objects in all). Fill "
            "them in or leave min_aesthetic_score out."
        )
    return scores
