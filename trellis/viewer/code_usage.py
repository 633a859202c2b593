"""How often each learned code occurs in a sample of the data, and what it decodes to there on average."""

import logging
import threading
from typing import NamedTuple

import numpy as np

from ..utils.errors import UserError
from .backend import Backend

OBJECTS = 64
PAUSE = 0.02  # seconds after each object, so that a visitor who waits for the networks comes first
log = logging.getLogger(__name__)


class CodeUsage(NamedTuple):
    """A code in the sample."""

    tokens: int  # that have this code
    objects: int  # with such a token
    share: float  # of all tokens that are not empty; without an empty code, of all
    rank: int  # 1 for the most frequent code
    voxels: np.ndarray | None  # [bx, by, bz] in [0, 1], how often each voxel of its block is occupied; None if unused


class UsageCounter:
    """Counter of codes over a sample of the data set, in a thread, so that the page need not wait.

    Attributes:
        sampled: objects to count.
        done: objects counted so far.
        problem: why counting ended early, or None.
    """

    def __init__(self, backend: Backend, objects: int = OBJECTS):
        self.backend = backend
        size = len(backend.dataset) if backend.dataset else 0
        self.indices = np.unique(np.linspace(0, size - 1, min(objects, size)).round().astype(int))
        self.sampled, self.done = len(self.indices), 0
        self.problem: str | None = None
        parts = backend.codes_per_token, backend.codebook_size
        self._tokens = np.zeros(parts, dtype=np.int64)  # [Q, codebook_size]: in row k, code k + first_code
        self._objects = np.zeros(parts, dtype=np.int64)
        self._voxels = np.zeros((*parts, int(np.prod(backend.block))), dtype=np.float32)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._count_all, daemon=True)

    def start(self) -> "UsageCounter":
        """Start counting."""
        self._thread.start()
        return self

    def wait(self) -> None:
        """Wait until counting has ended."""
        self._thread.join()

    def stop(self) -> None:
        """End counting. A thread amid torch's work when Python ends would abort the process."""
        self._ended.set()
        self.wait()

    def _count_all(self) -> None:
        try:
            for index in self.indices:
                grid = self.backend.object(int(index))
                ids = self.backend.encode(grid)
                self.count(ids, self.backend.decode(ids, keep=False))
                if self._ended.wait(PAUSE):
                    return
        except (UserError, OSError) as error:  # OSError: a file of the data is there no more
            self.problem = str(error)
        except Exception as error:  # in a thread it would go unseen, and the page would wait forever
            log.exception("counting codes failed")
            self.problem = f"{type(error).__name__}, see the terminal"

    def count(self, ids: np.ndarray, reconstruction: np.ndarray) -> None:
        """Add an object: its ids [T] and its reconstruction [R, R, R] bool."""
        lattice, block = self.backend.lattice, self.backend.block
        split = [size for pair in zip(lattice, block, strict=True) for size in pair]
        blocks = reconstruction.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(int(np.prod(lattice)), -1)
        rows = self.backend.of_tokens(ids) - self.backend.first_code
        learned = rows[:, 0] >= 0
        blocks = blocks[learned]
        with self._lock:
            for part, codes in enumerate(rows[learned].T):
                np.add.at(self._tokens[part], codes, 1)
                np.add.at(self._objects[part], np.unique(codes), 1)
                np.add.at(self._voxels[part], codes, blocks)
            self.done += 1

    def of(self, code: int, part: int = 0) -> CodeUsage:
        """Return how a learned code is used as a token's code number `part`."""
        row = code - self.backend.first_code
        with self._lock:
            tokens = self._tokens[part]
            count = int(tokens[row])
            voxels = (self._voxels[part, row] / count).reshape(self.backend.block) if count else None
            rank = int((tokens > count).sum()) + 1
            return CodeUsage(count, int(self._objects[part, row]), count / max(1, int(tokens.sum())), rank, voxels)

    def counts(self, part: int) -> np.ndarray:
        """Return how often each learned code occurs as a token's code number `part`, [codebook_size] int64."""
        with self._lock:
            return self._tokens[part].copy()
