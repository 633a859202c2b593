"""When k-means ends, and what it says. What it finds is in test_quantizer.py."""

import re

import torch

from trellis.modules.quantizers.kmeans import kmeans
from trellis.modules.quantizers.nearest import nearest_code


def found(vectors: torch.Tensor, num_codes: int, said: list | None = None, **options) -> torch.Tensor:
    report = (said if said is not None else []).append
    return kmeans(vectors, num_codes, generator=torch.Generator().manual_seed(0), report=report, **options)


def test_it_ends_at_the_first_iteration_that_helps_less_than_the_tolerance():
    vectors, tolerance, said = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1)), 0.003, []
    codes = found(vectors, 50, said, tolerance=tolerance)
    last = int(re.search(r"converged after iteration (\d+) of at most 100", said[-1])[1])
    assert 3 < last < 50
    distances = []
    for iterations in range(last + 1):
        after = found(vectors, 50, iterations=iterations, tolerance=0)
        distances.append((vectors - after[nearest_code(vectors, after)]).square().sum(1).double().mean().item())
    assert torch.equal(after, codes)
    helped = [1 - now / before for before, now in zip(distances, distances[1:], strict=False)]
    assert helped[-1] <= tolerance and min(helped[:-1]) > tolerance
    assert f"mean squared distance {distances[-1] / 6:.4g} a channel, 50 of 50 codes used" in said[-1]


def test_it_says_where_it_stands():
    vectors, said = torch.randn(500, 2, generator=torch.Generator().manual_seed(1)), []
    found(vectors, 20, said, iterations=25, tolerance=-1.0)
    assert said[0] == "k-means: 20 codes of 2 channels from 500 vectors"
    assert [re.search(r"at iteration (\d+) of", line)[1] for line in said[1:]] == ["0", "10", "20", "24"]


def test_a_codebook_that_fits_exactly_ends_at_once():
    vectors, said = torch.arange(12.0).view(6, 2).repeat(10, 1), []
    assert torch.equal(found(vectors, 9, said).unique(dim=0), vectors[:6])
    assert "converged after iteration 1 " in said[-1] and "mean squared distance 0 " in said[-1]
