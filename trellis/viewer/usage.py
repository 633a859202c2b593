"""How often each code is used over a sample of the data, and what it decodes to there on average."""

import logging
import threading
import time
from typing import NamedTuple

import numpy as np

from ..utils.errors import UserError
from .workbench import Workbench

OBJECTS = 64
PAUSE = 0.02  # seconds after each, so that a visitor who waits for the networks comes first
log = logging.getLogger(__name__)


class CodeUsage(NamedTuple):
    """A code over the sample. share: of all tokens. rank: 1 for the most frequent. voxels: [bx, by, bz], how often each
    voxel of its block is occupied in the reconstructions, in [0, 1]; None where the code does not occur."""

    tokens: int
    objects: int
    share: float
    rank: int
    voxels: np.ndarray | None


class Usage:
    """Counts in a thread of its own, so that the page is there at once.

    sampled: objects to count. done: objects counted so far. problem: why counting ended early, or None.
    """

    def __init__(self, workbench: Workbench, objects: int = OBJECTS):
        self.workbench = workbench
        size = len(workbench.dataset) if workbench.dataset else 0
        self.indices = np.unique(np.linspace(0, size - 1, min(objects, size)).round().astype(int)) if size else []
        self.sampled, self.done, self.problem = len(self.indices), 0, None
        parts = workbench.codes_per_token, workbench.n_embed
        self._tokens = np.zeros(parts, dtype=np.int64)  # [Q, K]
        self._objects = np.zeros(parts, dtype=np.int64)
        self._voxels = np.zeros((*parts, int(np.prod(workbench.block))), dtype=np.float32)
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._count_all, daemon=True)

    def start(self) -> "Usage":
        self._thread.start()
        return self

    def wait(self) -> None:
        self._thread.join()

    def _count_all(self) -> None:
        try:
            for index in self.indices:
                grid = self.workbench.object(int(index))
                ids = self.workbench.encode(grid)
                self.count(ids, self.workbench.decode(ids, keep=False))
                time.sleep(PAUSE)
        except UserError as error:
            self.problem = str(error)
        except Exception as error:  # a thread's exception would go unseen, and the page would wait for ever
            log.exception("counting codes failed")
            self.problem = f"{type(error).__name__}, see the terminal"

    def count(self, ids: np.ndarray, reconstruction: np.ndarray) -> None:
        """Add an object: ids [T], and their voxels [R, R, R] bool."""
        lattice, block = self.workbench.lattice, self.workbench.block
        split = [size for pair in zip(lattice, block, strict=True) for size in pair]
        blocks = reconstruction.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(int(np.prod(lattice)), -1)
        with self._lock:
            for part, codes in enumerate(ids.reshape(-1, self.workbench.codes_per_token).T):
                np.add.at(self._tokens[part], codes, 1)
                np.add.at(self._objects[part], np.unique(codes), 1)
                np.add.at(self._voxels[part], codes, blocks)
            self.done += 1

    def of(self, code: int, part: int = 0) -> CodeUsage:
        with self._lock:
            tokens = self._tokens[part]
            count = int(tokens[code])
            voxels = (self._voxels[part, code] / count).reshape(self.workbench.block) if count else None
            rank = int((tokens > count).sum()) + 1
            return CodeUsage(count, int(self._objects[part, code]), count / max(1, int(tokens.sum())), rank, voxels)

    def counts(self, part: int) -> np.ndarray:
        """How often each code occurs as a token's code number `part`, [K] int64."""
        with self._lock:
            return self._tokens[part].copy()
