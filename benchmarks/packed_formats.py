"""Ways to store many grids, each written and read at random as its makers mean it to be: compared by packed.py."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.packed_data import RESOLUTION
from trellis.datasets.shards import LEVEL, Shard, write_shard

SIZE = RESOLUTION**3 // 8
Read = Callable[[np.ndarray], np.ndarray]  # rows [n] int64 -> bits [n, R^3 / 8] uint8


class Format(NamedTuple):
    """A way to store grids.

    write: puts grids, [N, R^3 / 8] uint8, and their names into an empty folder. open: returns what reads them.
    """

    write: Callable[[Path, np.ndarray, list[str]], None]
    open: Callable[[Path], Read]


def _write_shard(folder: Path, bits: np.ndarray, names: list[str]) -> None:
    write_shard(folder / "a.arrow", bits, RESOLUTION, {"sha256": names})


def _open_shard(folder: Path) -> Read:
    shard = Shard(folder / "a.arrow")
    return lambda rows: np.stack([shard.bits(row) for row in rows.tolist()])


def _parquet(rows_of_group: int) -> Format:
    """Parquet compresses pages, and reads a row group as a whole."""

    def write(folder: Path, bits: np.ndarray, names: list[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"sha256": names, "grid": [row.tobytes() for row in bits]})
        pq.write_table(
            table, folder / "a.parquet", row_group_size=rows_of_group, compression="zstd", compression_level=LEVEL,
            use_dictionary=False, write_page_checksum=True,
        )  # fmt: skip

    def open_file(folder: Path) -> Read:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(folder / "a.parquet", memory_map=True, page_checksum_verification=True)

        def read(rows: np.ndarray) -> np.ndarray:
            grids = []
            for group, row in zip(*(part.tolist() for part in np.divmod(rows, rows_of_group)), strict=True):
                column = file.read_row_group(group, columns=["grid"], use_threads=False).column(0)
                grids.append(np.frombuffer(column[row].as_buffer(), np.uint8))
            return np.stack(grids)

        return read

    return Format(write, open_file)


def _write_tar(folder: Path, bits: np.ndarray, names: list[str]) -> None:
    """A member for each grid, as WebDataset has it."""
    import pyarrow as pa

    codec = pa.Codec("zstd", compression_level=LEVEL)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, row in zip(names, bits, strict=True):
            frame = codec.compress(row, asbytes=True)
            member = tarfile.TarInfo(f"{name}.bits.zst")
            member.size = len(frame)
            tar.addfile(member, io.BytesIO(frame))


def _open_tar(folder: Path) -> Read:
    import pyarrow as pa

    codec = pa.Codec("zstd")
    with tarfile.open(folder / "a.tar") as tar:
        places = [(member.offset_data, member.size) for member in tar]
    content = np.memmap(folder / "a.tar", np.uint8, "r")

    def read(rows: np.ndarray) -> np.ndarray:
        frames = (content[start : start + size] for start, size in (places[row] for row in rows.tolist()))
        return np.stack([np.frombuffer(codec.decompress(frame.data, SIZE), np.uint8) for frame in frames])

    return read


def _write_npz(folder: Path, bits: np.ndarray, names: list[str]) -> None:
    np.savez_compressed(folder / "a.npz", bits=bits, sha256=np.array(names))


def _open_npz(folder: Path) -> Read:
    bits = np.load(folder / "a.npz")["bits"]
    return lambda rows: bits[rows]


def _zarr(rows_of_chunk: int) -> Format:
    """Chunks that are read alone, in files of 4096 rows."""

    def write(folder: Path, bits: np.ndarray, names: list[str]) -> None:
        import zarr

        array = zarr.create_array(
            str(folder / "a.zarr"), shape=bits.shape, dtype="uint8", chunks=(rows_of_chunk, SIZE), shards=(4096, SIZE),
            compressors=zarr.codecs.ZstdCodec(level=LEVEL, checksum=True),
        )  # fmt: skip
        array[:] = bits

    def open_file(folder: Path) -> Read:
        import zarr

        array = zarr.open_array(str(folder / "a.zarr"), mode="r")
        return lambda rows: np.stack([array[row] for row in rows.tolist()])

    return Format(write, open_file)


def _write_lance(folder: Path, bits: np.ndarray, names: list[str]) -> None:
    import lance
    import pyarrow as pa

    codec = pa.Codec("zstd", compression_level=LEVEL)
    frames = [codec.compress(row, asbytes=True) for row in bits]
    lance.write_dataset(pa.table({"sha256": names, "grid": frames}), str(folder / "a.lance"))


def _open_lance(folder: Path) -> Read:
    import lance
    import pyarrow as pa

    codec, dataset = pa.Codec("zstd"), lance.dataset(str(folder / "a.lance"))

    def read(rows: np.ndarray) -> np.ndarray:
        frames = dataset.take(rows.tolist(), columns=["grid"]).column(0)
        return np.stack([np.frombuffer(codec.decompress(frame.as_buffer(), SIZE), np.uint8) for frame in frames])

    return read


FORMATS = {
    "Arrow, a zstd frame for each grid (shards)": Format(_write_shard, _open_shard),
    "Parquet, row groups of 64": _parquet(64),
    "Parquet, row groups of 256": _parquet(256),
    "Parquet, row groups of 1024": _parquet(1024),
    "tar of zstd frames (WebDataset)": Format(_write_tar, _open_tar),
    "Zarr 3, chunks of 1 in files of 4096": _zarr(1),
    "Zarr 3, chunks of 64 in files of 4096": _zarr(64),
    "Lance, a zstd frame for each grid": Format(_write_lance, _open_lance),
    "npz (packed file, as a whole in memory)": Format(_write_npz, _open_npz),
}
