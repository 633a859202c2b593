import math

import pytest
import torch

from trellis.utils.metrics import codebook_counts, entropy_bits, perplexity, usage, voxel_metrics


def reference(prediction: list[bool], target: list[bool]) -> dict[str, float]:
    """Counts cell by cell, in plain Python."""
    cells = list(zip(prediction, target, strict=True))
    hits = sum(p and t for p, t in cells)
    union = sum(p or t for p, t in cells)

    def ratio(whole):
        return hits / whole if whole else 1.0

    return {"iou": ratio(union), "precision": ratio(sum(prediction)), "recall": ratio(sum(target)),
            "exact": float(all(p == t for p, t in cells))}


def test_metrics_equal_a_count_cell_by_cell():
    generator = torch.Generator().manual_seed(0)
    density = torch.linspace(-3, 3, 24).view(-1, 1, 1, 1, 1)
    logits = torch.randn(24, 1, 4, 4, 4, generator=generator) + density
    target = (torch.randn(24, 1, 4, 4, 4, generator=generator) + density.flip(0) > 0).to(torch.uint8)
    logits[0], target[0] = -1, 0  # both empty
    logits[1], target[2] = -1, 0  # one empty
    logits[3] = target[3].float() * 2 - 1  # exact
    logits[4], target[4] = 0, 0  # a logit of 0 is not occupied

    from_logits = voxel_metrics(logits, target)
    from_bool = voxel_metrics(logits > 0, target.bool())
    for row in range(24):
        expected = reference((logits[row] > 0).flatten().tolist(), (target[row] > 0).flatten().tolist())
        for name, value in expected.items():
            assert from_logits[name][row].item() == pytest.approx(value, abs=1e-7), (name, row)
    for name, values in from_logits.items():
        assert values.shape == (24,)
        assert torch.equal(values, from_bool[name])
    assert [from_logits[name][0].item() for name in ("iou", "precision", "recall", "exact")] == [1, 1, 1, 1]
    assert from_logits["exact"][[3, 4]].tolist() == [1, 1]


def test_one_wrong_cell_in_a_large_grid_is_not_exact():
    target = torch.ones(1, 1, 257, 257, 257, dtype=torch.bool)  # more than 2^24 cells
    prediction = target.clone()
    prediction[0, 0, 0, 0, 0] = False
    metrics = voxel_metrics(prediction, target)
    assert metrics["exact"].item() == 0
    assert metrics["precision"].item() == 1
    assert 0 < 1 - metrics["recall"].item() < 1e-6


def test_integer_predictions_and_unequal_shapes_are_refused():
    grid = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="uint8"):
        voxel_metrics(grid.to(torch.uint8), grid)
    with pytest.raises(ValueError, match="shape|is \\["):
        voxel_metrics(grid, grid[0])


def test_counts_are_those_of_each_index():
    indices = torch.randint(0, 7, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    counts = codebook_counts(indices, 9)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(i == k for i in indices.flatten().tolist()) for k in range(9)]
    assert torch.equal(counts, codebook_counts(indices[:1], 9) + codebook_counts(indices[1:], 9))


def test_entropy_and_perplexity_of_known_distributions():
    uniform = torch.tensor([5, 0, 5, 5, 5])
    assert entropy_bits(uniform) == pytest.approx(2)
    assert perplexity(uniform) == pytest.approx(4)
    assert usage(uniform) == pytest.approx(0.8)

    skewed = [1, 2, 3, 10, 0]
    expected = -sum(c / 16 * math.log2(c / 16) for c in skewed if c)
    assert entropy_bits(torch.tensor(skewed)) == pytest.approx(expected, abs=1e-12)
    assert perplexity(torch.tensor(skewed)) == pytest.approx(2**expected)

    single = torch.tensor([0, 9])
    assert (entropy_bits(single), perplexity(single), usage(single)) == (0, 1, 0.5)
    assert math.copysign(1, entropy_bits(single)) == 1
    assert entropy_bits(torch.zeros(4, dtype=torch.int64)) == 0
