"""k-means for a first codebook.

Seeding by squared distance (k-means++, Arthur and Vassilvitskii 2007), several codes at a time once there are
many (as in k-means||, arXiv:1203.6402), then Lloyd's iterations (Lloyd 1982), in which an empty cluster restarts
at a vector far from its code.

Axes: N vectors, K codes, D channels.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from .nearest import nearest_code

# Codes added in one round of seeding, as a share of those so far. Codes of one round are drawn independently, so small
# rounds seed better. Each vector is compared with each code once, so many rounds cost little more.
SEEDING_GROWTH = 1 / 16
ITERATIONS_BETWEEN_REPORTS = 10


@torch.no_grad()
def kmeans(
    vectors: Tensor,
    num_codes: int,
    *,
    generator: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-3,
    report: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """Return a codebook [K, D] float32 that minimizes the mean squared distance from `vectors` [N, D].

    generator: on the CPU; the same seed and vectors give the same codes.
    iterations: the most that are run.
    tolerance: stop once an iteration lowers the distance by less than this share of it.
    report: called with a line at the start, now and then, and at the end.
    With fewer vectors than codes, the remaining codes repeat vectors.
    Raise ValueError if there are no vectors or one is not finite.
    """
    vectors = vectors.float()
    if not len(vectors) or not vectors.isfinite().all():
        raise ValueError(f"k-means needs finite vectors; it got {tuple(vectors.shape)}, not all finite")

    def sample(count: int, distance: Tensor) -> Tensor:
        # On the CPU in fp64, so that every device draws the same vectors. The cumulative sum has none of
        # torch.multinomial's limit of 2**24 categories.
        cumulative = distance.double().cpu().cumsum(0)
        if not cumulative[-1] > 0:
            cumulative = torch.ones(len(distance), dtype=torch.float64).cumsum(0)
        draw = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
        picked = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(distance) - 1)
        return vectors[picked.to(vectors.device)]

    started = time.monotonic()
    report(f"k-means: {num_codes} codes of {vectors.shape[1]} channels from {len(vectors)} vectors")
    codes = sample(1, torch.ones(len(vectors)))
    distance = (vectors - codes).square().sum(1)
    while len(codes) < num_codes:
        new = sample(min(num_codes - len(codes), max(1, int(len(codes) * SEEDING_GROWTH))), distance)
        codes = torch.cat([codes, new])
        distance = torch.minimum(distance, (vectors - new[nearest_code(vectors, new)]).square().sum(1))

    before = torch.inf
    for iteration in range(iterations):
        index = nearest_code(vectors, codes)
        distance = (vectors - codes[index]).square().sum(1)
        count = torch.bincount(index, minlength=num_codes)
        distortion = distance.double().mean().item()
        converged = iteration > 0 and before - distortion <= tolerance * before
        if converged or iteration % ITERATIONS_BETWEEN_REPORTS == 0 or iteration == iterations - 1:
            report(
                f"k-means: {'converged after' if converged else 'at'} iteration {iteration} of at most {iterations}, "
                f"mean squared distance {distortion / vectors.shape[1]:.4g} a channel, {int((count > 0).sum())} of "
                f"{num_codes} codes used, {time.monotonic() - started:.0f} s"
            )
        if converged:
            break
        before = distortion
        total = torch.zeros(codes.shape, dtype=torch.float64, device=codes.device)
        total.index_add_(0, index, vectors.double())
        codes = torch.where(count[:, None] > 0, total / count[:, None].clamp(min=1), codes.double()).float()
        empty = (count == 0).nonzero()[:, 0]
        if len(empty):
            codes[empty] = sample(len(empty), distance)
    return codes
