"""What a tokenizer has to beat: a table of patterns, a lossless code under a fixed model, and deflate.

Table and model are fitted to training grids by counting. None has a network.

Axes: B objects, R voxels along an axis, X' Y' Z' the lattice of tokens, P voxels of a token's block.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .evaluate import GridDataset, Reconstruction, Scores, evaluate
from .metrics import codebook_counts, narrow_gaps

# Entries of the matrix of similarities of blocks and patterns that are worked out at once: 64 MiB.
ENTRIES_AT_ONCE = 2**24
BYTES_AT_ONCE = 2**28  # of blocks that wait to be counted
# Grids that are counted or coded together. Those of a table are more, since blocks that repeat are looked up once.
GRIDS_AT_ONCE, GRIDS_OF_TABLE_AT_ONCE = 32, 128

Lattice = tuple[int, int, int]  # blocks, or voxels of one, along x, y and z


@dataclass(frozen=True)
class Baselines:
    """The baselines, fitted.

    tables: {name: table}.
    training_grids: how many grids they were fitted to.
    """

    tables: dict[str, "PatternTable"]
    model: "NeighborModel"
    training_grids: int

    @classmethod
    def fit(
        cls,
        dataset: GridDataset,
        indices: Sequence[int],
        tables: Sequence[tuple[Lattice, int]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> "Baselines":
        """Fit to the grids of a dataset at these indices.

        tables: (lattice, n_embed) of each table of patterns.
        progress: called with the number of grids done so far.
        """
        patterns = {lattice: PatternCounts(lattice) for lattice, _ in tables}
        neighbors, done = NeighborCounts(), 0
        for grids in grid_batches(dataset, indices):
            for counts in patterns.values():
                counts.add(grids)
            neighbors.add(grids)
            done += len(grids)
            progress(done)
        named = {
            f"patterns {'×'.join(map(str, lattice))}, {n_embed} ids": patterns[lattice].table(n_embed)
            for lattice, n_embed in tables
        }
        return cls(named, neighbors.model(), done)

    def scores(self, dataset: GridDataset, indices: Sequence[int]) -> dict[str, Scores]:
        """Return {table: its scores} on the grids of a dataset at these indices.

        They are those of `evaluate`, without its details but for narrow gaps.
        """
        cpu = torch.device("cpu")
        gaps = torch.cat([narrow_gaps(torch.from_numpy(grids)[:, None]) for grids in grid_batches(dataset, indices)])
        result = {}
        for name, table in self.tables.items():
            scores = evaluate(table.reconstruct, dataset, indices, batch_size=GRIDS_OF_TABLE_AT_ONCE, device=cpu)
            scores.objects["narrow_gaps"] = gaps
            result[name] = scores
        return result

    def bits(self, dataset: GridDataset, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the bits of each grid without loss, [n] float64: {"lossless": by the model, "deflate": …}."""
        parts = [(self.model.bits(grids), deflated_bits(grids)) for grids in grid_batches(dataset, indices)]
        lossless, deflate = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        return {"lossless": lossless, "deflate": deflate}


def grid_batches(dataset: GridDataset, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the grids at these indices in batches, [B, R, R, R] bool."""
    for start in range(0, len(indices), GRIDS_AT_ONCE):
        batch = dataset.get_batch(np.array(indices[start : start + GRIDS_AT_ONCE]))
        yield dataset.unpack_batch(batch)["ss"][:, 0].numpy() > 0


# --- table of patterns ---


class PatternCounts:
    """How often each pattern of voxels fills a block of training grids. Blocks without a voxel are left out.

    lattice: (X', Y', Z'), divisors of R: the blocks of a grid.
    """

    def __init__(self, lattice: Lattice):
        self.lattice = lattice
        self.block = (0, 0, 0)  # voxels of a block along x, y and z
        self._new: list[np.ndarray] = []
        self._patterns: np.ndarray | None = None  # [n] distinct, as bytes of packed bits
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, grids: np.ndarray) -> None:
        """Count the blocks of grids [B, R, R, R] bool."""
        x, y, z = (size // blocks for size, blocks in zip(grids.shape[1:], self.lattice, strict=True))
        self.block = x, y, z
        patterns = _patterns(_blocks(grids, self.lattice))
        self._new.append(patterns[patterns != b""])
        if sum(new.nbytes for new in self._new) > BYTES_AT_ONCE:
            self._merge()

    def _merge(self) -> None:
        known = [] if self._patterns is None else [self._patterns]
        weights = np.concatenate([self._counts, *(np.ones(len(new), dtype=np.int64) for new in self._new)])
        self._patterns, inverse = np.unique(np.concatenate([*known, *self._new]), return_inverse=True)
        self._counts = np.bincount(inverse, weights=weights, minlength=len(self._patterns)).astype(np.int64)
        self._new = []

    def table(self, n_embed: int) -> "PatternTable":
        """Return the table of the n_embed - 1 most frequent patterns, or of all if there are fewer.

        Of patterns that are equally frequent, the one whose bits are the smaller number comes first.
        """
        self._merge()
        assert self._patterns is not None
        order = np.argsort(-self._counts, kind="stable")[: n_embed - 1]
        return PatternTable(self.lattice, self.block, _bits(self._patterns[order], self.block), n_embed)


class PatternTable:
    """A tokenizer without a network: an id is the number of the pattern nearest to a block of the grid.

    Id 0 stands for a block without a voxel, ids 1 and up for patterns in the order of the table. A block takes the
    pattern at the smallest Hamming distance; of several, the first.

    lattice: (X', Y', Z').
    block: voxels of a block along x, y and z.
    patterns: [n, P] bool, none without a voxel.
    n_embed: ids in all, at least n + 1.
    """

    def __init__(self, lattice: Lattice, block: Lattice, patterns: np.ndarray, n_embed: int):
        self.lattice, self.block, self.patterns, self.n_embed = lattice, block, patterns, n_embed
        self._doubled = np.ascontiguousarray(2 * patterns.T.astype(np.float32))  # [P, n]
        self._sizes = patterns.sum(1, dtype=np.float32)

    def encode(self, grids: np.ndarray) -> np.ndarray:
        """Return the ids of grids [B, R, R, R] bool, [B, X', Y', Z'] int64."""
        distinct, inverse = np.unique(_patterns(_blocks(grids, self.lattice)), return_inverse=True)
        return self._nearest(_bits(distinct, self.block))[inverse].reshape(len(grids), *self.lattice)

    def _nearest(self, blocks: np.ndarray) -> np.ndarray:
        """Return the ids of blocks [n, P] bool, [n] int64."""
        ids = np.zeros(len(blocks), dtype=np.int64)
        # The Hamming distance of a and b is |a| + |b| - 2ab, so the nearest pattern b has the largest 2ab - |b|. These
        # are small integers, exact in fp32 in any order of summation. A product is faster than counting bits.
        occupied = np.flatnonzero(blocks.any(1))
        parts = 1 + len(occupied) * len(self.patterns) // ENTRIES_AT_ONCE
        for rows in np.array_split(occupied, parts):
            similarity = blocks[rows].astype(np.float32) @ self._doubled
            similarity -= self._sizes
            ids[rows] = 1 + similarity.argmax(1)  # the first of equal ones
        return ids

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Return the grids of ids [B, X', Y', Z'] int64, [B, R, R, R] bool."""
        patterns = np.concatenate([np.zeros_like(self.patterns[:1]), self.patterns])
        grids = patterns[ids].reshape(*ids.shape, *self.block).transpose(0, 1, 4, 2, 5, 3, 6)
        return grids.reshape(len(ids), *(n * size for n, size in zip(self.lattice, self.block, strict=True)))

    def reconstruct(self, ss: Tensor, indices: Sequence[int] = ()) -> Reconstruction:
        """Reconstruct grids [B, 1, R, R, R], as `evaluate` asks. The quantization error is a share of wrong voxels."""
        grids = ss[:, 0].numpy() > 0
        ids = self.encode(grids)
        decoded = self.decode(ids)
        error = torch.from_numpy((decoded != grids).reshape(len(grids), -1).mean(1))
        tokens = torch.from_numpy(ids)
        counts = codebook_counts(tokens, self.n_embed)[1:]
        return Reconstruction(torch.from_numpy(decoded)[:, None], tokens, counts, error, first_code=1)


def _blocks(grids: np.ndarray, lattice: Sequence[int]) -> np.ndarray:
    """Return the blocks of grids [B, R, R, R] in the order of the lattice, [B·X'·Y'·Z', P] bool."""
    split = [n for size, blocks in zip(grids.shape[1:], lattice, strict=True) for n in (blocks, size // blocks)]
    blocks = grids.reshape(len(grids), *split).transpose(0, 1, 3, 5, 2, 4, 6)
    return blocks.reshape(-1, split[1] * split[3] * split[5])


def _patterns(blocks: np.ndarray) -> np.ndarray:
    """Return blocks [n, P] bool as texts of bytes, [n]: numpy sorts and compares them as one item each.

    numpy takes zeros at the end of a text for padding, which all texts have to the same length, so none get mixed up.
    """
    packed = np.packbits(blocks, axis=1)
    return packed.view(f"S{packed.shape[1]}")[:, 0]


def _bits(patterns: np.ndarray, block: Sequence[int]) -> np.ndarray:
    """Undo `_patterns`: [n, P] bool."""
    packed = np.frombuffer(patterns.tobytes(), dtype=np.uint8).reshape(len(patterns), patterns.itemsize)
    return np.unpackbits(packed, axis=1, count=int(np.prod(block))).astype(bool)


# --- lossless ---

# Voxels that are known when a grid is coded in order of x, y, z: the 13 that touch the next one, and 9 two slices back.
NEAR = [step for step in itertools.product((-1, 0, 1), repeat=3) if step < (0, 0, 0)]
FAR = [(-2, y, z) for y, z in itertools.product((-1, 0, 1), repeat=2)]
NEIGHBORS = NEAR + FAR
PADDING = ((2, 0), (1, 1), (1, 1))  # empty voxels around a grid, so that each voxel has all neighbors
# Weight of the estimate from the near neighbors, in voxels, beside the counts of all neighbors.
PRIOR_WEIGHT = 2
PROBABILITY_BITS = 16
ONE = 1 << PROBABILITY_BITS


class NeighborCounts:
    """How often a voxel of training grids is occupied, by which of its 22 neighbors are."""

    def __init__(self) -> None:
        self.occupied = np.zeros(1 << len(NEIGHBORS), dtype=np.int64)
        self.all = np.zeros_like(self.occupied)

    def add(self, grids: np.ndarray) -> None:
        """Count the voxels of grids [B, R, R, R] bool."""
        contexts = _contexts(grids)
        self.all += np.bincount(contexts.ravel(), minlength=len(self.all))
        self.occupied += np.bincount(contexts[grids], minlength=len(self.all))

    def model(self) -> "NeighborModel":
        """Return the model with these counts.

        p = (n₁ + w q) / (n + w) in a context met n times, n₁ times occupied, with w = PRIOR_WEIGHT, where
        q = (m₁ + ½) / (m + 1) is the estimate of Krichevsky and Trofimov (IEEE Trans. Inform. Theory 27, 1981) from
        the near neighbors alone.
        """
        near = 1 << len(NEAR)
        occupied, everything = (counts.reshape(-1, near) for counts in (self.occupied, self.all))
        prior = (occupied.sum(0) + 0.5) / (everything.sum(0) + 1)
        share = (occupied + PRIOR_WEIGHT * prior) / (everything + PRIOR_WEIGHT)
        return NeighborModel(np.rint(share.ravel() * ONE).clip(1, ONE - 1).astype(np.int32))


class NeighborModel:
    """A lossless code of grids: arithmetic coding with fixed probabilities.

    A voxel is occupied with a probability that depends on which of 22 voxels coded before it are. Probabilities are
    whole numbers, so a code means the same on every machine.

    probabilities: [2^22] int32, in 65536ths; bit k of the place says whether NEIGHBORS[k] is occupied.
    """

    def __init__(self, probabilities: np.ndarray):
        self.probabilities = probabilities

    def bits(self, grids: np.ndarray) -> np.ndarray:
        """Return the ideal code length of grids [B, R, R, R] bool, minus log2 of their probability: [B] float64."""
        cost = PROBABILITY_BITS - np.log2([ONE - self.probabilities, self.probabilities])  # of empty, of occupied ones
        return cost[grids.astype(np.int8), _contexts(grids)].reshape(len(grids), -1).sum(1)

    def compress(self, grid: np.ndarray) -> bytes:
        """Return the code of a grid [R, R, R] bool, at most 4 bytes longer than `bits` but for rounding."""
        probabilities = self.probabilities[_contexts(grid[None])]
        encoder = _Encoder()
        for occupied, probability in zip(grid.ravel().tolist(), probabilities.ravel().tolist(), strict=True):
            encoder.write(occupied, probability)
        return encoder.finish()

    def decompress(self, code: bytes, resolution: int) -> np.ndarray:
        """Return the grid [R, R, R] bool of a code."""
        grid = np.pad(np.zeros((resolution,) * 3, dtype=np.uint8), PADDING)
        strides = [stride // grid.itemsize for stride in grid.strides]
        steps = [sum(n * stride for n, stride in zip(step, strides, strict=True)) for step in NEIGHBORS]
        places = np.arange(grid.size).reshape(grid.shape)[2:, 1:-1, 1:-1].ravel().tolist()
        voxels, probabilities, decoder = grid.ravel().tolist(), self.probabilities, _Decoder(code)
        for place in places:
            context = 0
            for k, step in enumerate(steps):
                context |= voxels[place + step] << k
            voxels[place] = decoder.read(int(probabilities[context]))
        return np.array(voxels, dtype=bool).reshape(grid.shape)[2:, 1:-1, 1:-1]


def deflated_bits(grids: np.ndarray) -> np.ndarray:
    """Return the bits that deflate (RFC 1951, zlib's level 9, no header) makes of grids [B, R, R, R] bool, packed to
    eight voxels a byte; [B] float64."""
    lengths = []
    for row in np.packbits(grids.reshape(len(grids), -1), axis=1):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        lengths.append(8.0 * len(deflate.compress(row.tobytes()) + deflate.flush()))
    return np.array(lengths)


def _contexts(grids: np.ndarray) -> np.ndarray:
    """Return which neighbors of each voxel are occupied, bit k for NEIGHBORS[k]: [B, R, R, R] int32."""
    padded = np.pad(grids, ((0, 0), *PADDING)).astype(np.int32)
    contexts = np.zeros(grids.shape, dtype=np.int32)
    X, Y, Z = grids.shape[1:]
    for k, (x, y, z) in enumerate(NEIGHBORS):
        contexts |= padded[:, 2 + x : 2 + x + X, 1 + y : 1 + y + Y, 1 + z : 1 + z + Z] << k
    return contexts


# --- arithmetic coding ---
# Range coding of bits (G. N. N. Martin, Video & Data Recording Conference, 1979) with bytes as digits. A code is a
# fraction in an interval of width `width` from `low`, which each bit narrows to its share. Both are in units of the
# last digit written so far times 2^-32.

TOP = 1 << 32
BOTTOM = 1 << 24  # a narrower interval gets a digit more


class _Encoder:
    def __init__(self) -> None:
        self.low, self.width, self.digits = 0, TOP - 1, bytearray()

    def write(self, bit: bool, probability: int) -> None:
        """Write a bit that is 1 with this probability, in 65536ths, from 1 to 65535."""
        ones = (self.width >> PROBABILITY_BITS) * probability
        if bit:
            self.width = ones
        else:
            self.low += ones
            self.width -= ones
        while self.width < BOTTOM:
            self._carry()
            self.digits.append(self.low >> 24)
            self.low = (self.low << 8) % TOP
            self.width <<= 8

    def _carry(self) -> None:
        if self.low >= TOP:
            self.low -= TOP
            place = len(self.digits) - 1
            while self.digits[place] == 255:
                self.digits[place] = 0
                place -= 1
            self.digits[place] += 1

    def finish(self) -> bytes:
        """Return all digits, with the fewest more that lie in the interval. The reader takes missing ones for 0."""
        for shift in (32, 24, 16, 8, 0):
            last = -(-self.low >> shift) << shift
            if last < self.low + self.width:
                break
        self.low = last
        self._carry()
        return bytes(self.digits) + self.low.to_bytes(4, "big")[: 4 - shift // 8]


class _Decoder:
    def __init__(self, digits: bytes):
        self.digits = iter(digits)
        self.width, self.offset = TOP - 1, 0  # offset: of the code from the interval's start
        for _ in range(4):
            self._next()

    def _next(self) -> None:
        self.offset = self.offset << 8 | next(self.digits, 0)

    def read(self, probability: int) -> int:
        """Return the next bit, which is 1 with this probability, in 65536ths."""
        ones = (self.width >> PROBABILITY_BITS) * probability
        bit = self.offset < ones
        if bit:
            self.width = ones
        else:
            self.offset -= ones
            self.width -= ones
        while self.width < BOTTOM:
            self._next()
            self.width <<= 8
        return int(bit)
