"""Stateless random numbers, derived from the seed and the training position.

Neither the number of ranks nor an interruption changes them, and no generator state has to be saved.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """Return a permutation of range(size) fixed by the parts, int64."""
    return np.random.Generator(np.random.Philox(derive_seed(*parts))).permutation(size)


def sample_noise(sample_ids: Tensor, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return standard normal noise, [B, *shape] float32, whose row i depends on (seed, sample_ids[i]) alone.

    sample_ids: [B] int64 on the CPU, the running number of each sample since training began.
    Devices of one type draw equal numbers; a CPU and a GPU draw different ones.
    """
    generator = torch.Generator(device)
    rows = []
    for sample_id in sample_ids.tolist():
        generator.manual_seed(derive_seed("noise", seed, sample_id))
        rows.append(torch.randn(shape, generator=generator, device=device))
    return torch.stack(rows)
