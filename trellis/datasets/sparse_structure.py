"""Sparse structures: occupancy grids of PLY roots and of packed roots.

PLY root, as TRELLIS makes it: `metadata.csv` and `voxels/<sha256>.ply`.
Packed root: an .npz file as packed.py describes it, or a folder of such files.
Shards, for a million objects: an Arrow file as shards.py describes it, or a folder of such files.
"""

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..grids.symmetries import Augmentation, augment_grids
from ..grids.voxels import (
    pack_bits,
    packed_size,
    points_to_voxels,
    read_ply,
    unpack_bits,
    unpack_bits_on_device,
    voxels_to_grid,
)
from ..utils.config import Count
from ..utils.errors import DataError
from .base import StandardDatasetBase
from .metadata import NAME_COLUMNS, SPLIT_IN_NAME, Split, read_flags, read_metadata, require_files
from .packed import TEXT_ARRAYS, check_resolution, load_packed, other_resolution, packed_resolution
from .remote import is_url, shard_files
from .shard_table import FROM_GRID, ShardTable
from .shards import SUFFIX
from .tables import FrameTable, typed

if TYPE_CHECKING:
    from pandas import DataFrame, Series

# Columns of metadata.csv that shards do not have, or from the grids themselves.
NOT_IN_SHARDS = ("sha256", "split", "voxelized", "resolution", "num_voxels")


class PlyTable(FrameTable):
    """The objects of a PLY root. resolution: of its grids."""

    def __init__(self, root: str, metadata: "DataFrame", resolution: int):
        super().__init__(root, metadata)
        self.resolution = resolution
        self._all_columns: dict[str, list[Any]] | None = None

    def columns(self, rows: np.ndarray) -> dict[str, list[Any]]:
        """See `Table.columns`. They are read when they are first asked for.

        Raise DataError if metadata.csv has changed since the root was opened, or has a column of a name that shards
        use otherwise.
        """
        if self._all_columns is None:
            self._all_columns = self._read_columns()
        return {name: [values[row] for row in rows.tolist()] for name, values in self._all_columns.items()}

    def _read_columns(self) -> dict[str, list[Any]]:
        metadata = read_metadata(self.root, as_text=True).set_index("sha256", drop=False)
        names = self.sha256s(np.arange(len(self)))
        if not metadata.index.is_unique or not set(names) <= set(metadata.index):
            raise DataError(f"{self.where}: has changed since it was read. Start again.")
        metadata = metadata.loc[names].astype(object)
        metadata = metadata.where(metadata.notna(), None)
        name = next((column for column in NAME_COLUMNS if column in metadata), None)
        columns = {"name": name} if name else {}
        columns |= {column: column for column in metadata.columns if column not in (*NOT_IN_SHARDS, name)}
        if taken := [column for column in columns if column in FROM_GRID]:
            raise DataError(f"{self.where}: has a column {taken[0]}, a name that shards use themselves. Rename it.")
        return {new: typed(self.where, new, metadata[old].tolist()) for new, old in columns.items()}

    def _paths(self, rows: np.ndarray) -> list[Path]:
        return [Path(self.root, "voxels", f"{sha256}.ply") for sha256 in self.sha256s(rows)]

    def bits(self, rows: np.ndarray) -> np.ndarray:
        """Return grids as bits, uint8 [n, ceil(R^3 / 8)]. Raise DataError for a file that cannot be read."""
        bits = np.empty((len(rows), packed_size(self.resolution)), np.uint8)
        for number, path in enumerate(self._paths(rows)):
            voxels = points_to_voxels(read_ply(path), self.resolution, name=str(path))
            bits[number] = pack_bits(voxels_to_grid(voxels, self.resolution)[None])[0]
        return bits

    def versions(self, rows: np.ndarray) -> list[str]:
        """Return the size and modification time of files. Raise DataError for one that is missing.

        Copying keeps that time only on request (cp -p, rsync -t).
        """
        found = []
        for path in self._paths(rows):
            try:
                status = os.stat(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}). Rerun voxelize.py.") from error
            found.append(f"{status.st_size} {status.st_mtime_ns}")
        return found


class PackedTable(FrameTable):
    """The objects of packed files, in memory.

    bits: the rows of each file, [n, R^3 / 8] uint8, in the order of the table.
    """

    def __init__(self, root: str, metadata: "DataFrame", bits: list[np.ndarray]):
        super().__init__(root, metadata)
        self._bits, self._starts = bits, np.cumsum([0, *map(len, bits)])

    def kept_texts(self) -> tuple[str, ...]:
        return tuple(name for name in TEXT_ARRAYS if name not in ("sha256", "split"))

    def _each(self, rows: np.ndarray) -> list[np.ndarray]:
        rows = rows if self.rows is None else self.rows[rows]
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        own = rows - self._starts[numbers]
        return [self._bits[number][row] for number, row in zip(numbers.tolist(), own.tolist(), strict=True)]

    def bits(self, rows: np.ndarray) -> np.ndarray:
        """Return grids as bits, uint8 [n, R^3 / 8]."""
        return np.stack(self._each(rows))

    def versions(self, rows: np.ndarray) -> list[str]:
        """Return the checksums of packed rows."""
        return [f"{zlib.crc32(row.data):08x}" for row in self._each(rows)]


GridTable = PlyTable | PackedTable | ShardTable


class SparseStructure(StandardDatasetBase):
    """Occupancy grids; an item is {"ss": uint8 [1, R, R, R], 0 or 1, axes x y z}.

    roots: comma-separated folders, .npz files, .arrow files, or URLs of shards that fsspec opens.
    resolution: R, voxels per axis.
    min_aesthetic_score: keep objects whose `aesthetic_score` is at least this, in roots with that column.
    augmentation: symmetries of the cube to draw from for each training sample: "none"; "z", the 8 that keep the z
        axis and its direction; "all" 48. Items, batches and the other splits are as stored.
    weights: one of each root: the shares in which training samples are drawn from them; None: all objects alike. A root
        of weight 0 is not trained on, but validated.
    split: "train", "val" or "all": by the `split` column or array; else, for packed files and shards, by a file name
        that ends in train or val; else by sha256.
    Packed rows stay packed in memory; PLY files and rows of shards are read item by item. Batches of all are packed.
    """

    filter_columns = ("voxelized", "aesthetic_score")

    def __init__(
        self,
        roots: str,
        *,
        resolution: Count = 64,
        min_aesthetic_score: float | None = None,
        augmentation: Augmentation = "none",
        weights: list[float] | None = None,
        split: Split = "train",
    ):
        self.resolution = resolution
        self.min_aesthetic_score = min_aesthetic_score
        self.augmentation = augmentation
        super().__init__(roots, weights=weights, split=split)

    def read_root(self, root: str) -> GridTable:
        if is_url(root):
            return self._read_shards(root, shard_files(root))
        path = Path(root)
        if path.suffix == ".npz":
            return self._read_packed(root, [path])
        if path.suffix == SUFFIX and not path.is_dir():
            return self._read_shards(root, [(path, root)])
        if not path.is_dir():
            what = "is neither a folder nor an .npz or .arrow file" if path.exists() else "does not exist"
            raise DataError(f"{root}: {what}. voxelize.py makes a folder of voxels out of meshes.")
        packed, shards = sorted(path.glob("*.npz")), shard_files(root)
        tables = [
            found[0]
            for found in ([Path(path, "metadata.csv")], packed, [file for file, _ in shards])
            if found and found[0].exists()
        ]
        if len(tables) > 1:
            names = " and ".join(found.name for found in tables)
            raise DataError(f"{root}: has both {names}; move one of them elsewhere")
        if packed:
            return self._read_packed(root, packed)
        if shards:
            return self._read_shards(root, shards)
        if tables:
            return PlyTable(root, read_metadata(root), self.resolution)
        raise DataError(
            f"{root}: has neither metadata.csv (with voxels/<sha256>.ply beside it) nor an .npz "
            "file of packed grids nor an .arrow file of shards. voxelize.py makes the first out of meshes."
        )

    def filter_metadata(self, metadata: "DataFrame") -> tuple["DataFrame", dict[str, int | None]]:
        metadata, stats = super().filter_metadata(metadata)
        if "voxelized" in metadata:
            voxelized = read_flags(metadata, "voxelized")
            stats["voxelized = True"] = int((~voxelized).sum())
            metadata = metadata if voxelized.all() else metadata[voxelized]
        if self.min_aesthetic_score is not None:
            label = f"aesthetic_score >= {self.min_aesthetic_score:g}"
            stats[label] = None
            if "aesthetic_score" in metadata:
                good = _scores(metadata) >= self.min_aesthetic_score
                stats[label] = int((~good).sum())
                metadata = metadata if good.all() else metadata[good]
        return metadata, stats

    def check_files(self, root: str, metadata: "DataFrame") -> None:
        if "metadata.csv" != Path(metadata.attrs["path"]).name:
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
        return self[self._index(root, instance)]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ss": unpack_bits(self._bits(np.array([index])), self.resolution)}

    def _index(self, root: str, instance: str) -> int:
        """Return the index of an object. Raise KeyError if it is not in this split."""
        index = int(self.find([instance])[0])
        if index < 0 or self.texts("root", np.array([index])) != [root]:
            raise KeyError(f"{root} has no object {instance} in split {self.split}")
        return index

    def _bits(self, indices: np.ndarray) -> np.ndarray:
        """Return grids as bits, uint8 [B, ceil(R^3 / 8)]."""
        places, rows = self._places(self._objects[indices])
        used = np.unique(places).tolist()
        if len(used) == 1:
            return self._grids(used[0]).bits(rows)
        bits = np.empty((len(rows), packed_size(self.resolution)), np.uint8)
        for place in used:
            bits[places == place] = self._grids(place).bits(rows[places == place])
        return bits

    def _grids(self, place: int) -> GridTable:
        return cast(GridTable, self._tables[place])

    @property
    def in_memory(self) -> bool:
        used = np.unique(self._places(self._objects)[0])
        return all(isinstance(self._tables[place], PackedTable) for place in used)

    def get_batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return {"bits": uint8 [B, ceil(R^3 / 8)]}: grids as in a packed file."""
        return {"bits": torch.from_numpy(self._bits(indices))}

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
        """Return the checksum of a packed row or of a row of a shard, or the size and time of a PLY file."""
        return self.versions(np.array([self._index(root, instance)]))[0]

    def versions(self, indices: np.ndarray) -> list[str]:
        return self._gather(self._objects[indices], lambda table, rows: cast(GridTable, table).versions(rows))

    def _compare_resolution(self, path: Path | str, found: int | None) -> None:
        """Raise DataError if the grids of a file have another resolution than those of the roots before it."""
        if self.settings and found not in (None, self.resolution):
            raise DataError(
                f"{path}: has grids of resolution {found}, but those of {next(iter(self.settings))} have "
                f"{self.resolution}, as the config says. Make the former anew with voxelize.py --resolution "
                f"{self.resolution}, or leave this root out."
            )

    def _read_packed(self, root: str, paths: list[Path]) -> PackedTable:
        import pandas as pd

        tables, rows = [], []
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
            rows.append(bits)
        metadata = pd.concat(tables, ignore_index=True)
        metadata.attrs["path"] = root
        return PackedTable(root, metadata, rows)

    def _read_shards(self, root: str, files: list[tuple[Path, str]]) -> ShardTable:
        table = ShardTable(root, files)
        self._compare_resolution(root, table.resolution)
        if table.resolution != self.resolution:
            raise other_resolution(root, f"its grids have resolution {table.resolution}", self.resolution)
        return table


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
