import math

import numpy as np
import pytest
import torch
from helpers import solid_grids, tiny_config

from trellis.evaluation.evaluate import Reconstruction, evaluate, kl_scores, occupancy_scores
from trellis.evaluation.metrics import (
    code_entropy,
    codebook_counts,
    distance_metrics,
    entropy_bits,
    gaussian_kl_bits,
    narrow_gaps,
    object_counts,
    occupied_blocks,
    octree_masks,
    perplexity,
    usage,
    voxel_metrics,
)
from trellis.models import build
from trellis.modules.quantizers.vq import VectorQuantizer
from trellis.tokens.octree import Octree
from trellis.trainers import SparseStructureVaeTrainer


def reference(prediction: list[bool], target: list[bool]) -> dict[str, float]:
    """Counts cell by cell, in plain Python."""
    cells = list(zip(prediction, target, strict=True))
    hits = sum(p and t for p, t in cells)
    union = sum(p or t for p, t in cells)

    def ratio(whole):
        return hits / whole if whole else 1.0

    return {
        "iou": ratio(union),
        "precision": ratio(sum(prediction)),
        "recall": ratio(sum(target)),
        "exact": float(all(p == t for p, t in cells)),
    }


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


def test_one_wrong_voxel_in_a_large_grid_is_not_exact():
    target = torch.ones(1, 1, 257, 257, 257, dtype=torch.bool)  # more than 2^24 voxels
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
    with pytest.raises(ValueError, match="is \\["):
        voxel_metrics(grid, grid[0])
    with pytest.raises(ValueError, match="uint8"):
        distance_metrics(grid.to(torch.uint8), grid)
    with pytest.raises(ValueError, match="is \\["):
        distance_metrics(grid, grid[0])
    with pytest.raises(ValueError, match="\\[B, 1, X, Y, Z\\], not \\[1, 2, 2, 2\\]"):
        distance_metrics(grid[0], grid[0])


# --- distances ---


def distances_by_pairs(prediction: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Chamfer distance and F-score of two grids [X, Y, Z] bool, neither empty, from every pair of voxels."""
    apart = torch.cdist(
        prediction.nonzero().double(), target.nonzero().double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    to_target, to_prediction = apart.amin(1), apart.amin(0)
    precision, recall = (to_target <= 1).double().mean(), (to_prediction <= 1).double().mean()
    f_score = 2 * precision * recall / (precision + recall) if precision + recall else precision
    return (to_target.mean() + to_prediction.mean()).item() / 2, f_score.item()


@pytest.mark.parametrize("shape", [(12, 12, 12), (33, 5, 17), (200, 2, 3), (3, 150, 2), (3, 2, 150), (1, 1, 9)])
def test_distances_equal_those_of_all_pairs(shape):
    """From grids that nearly agree to single voxels at opposite ends, in one batch."""
    generator = torch.Generator().manual_seed(sum(shape))

    def grids(share):
        return torch.rand(2, 1, *shape, generator=generator) < share

    target, logits = [], []
    for share in (0.5, 0.1, 0.01):
        target.append(grids(share))
        logits += [(target[-1] ^ grids(0.02)).float() - 0.5, grids(share).float() - 0.5]
        target.append(target[-1].clone())
    ends = torch.zeros(2, 1, *shape, dtype=torch.bool)
    ends[0, 0, 0, 0, 0] = ends[1, 0, -1, -1, -1] = True
    target, logits = torch.cat([*target, ends]), torch.cat([*logits, ends.flip(0).float()])
    target[:, 0, 0, 0, 0] |= ~target.flatten(1).any(1)
    logits[:, 0, 0, 0, 0] = torch.where((logits > 0).flatten(1).any(1), logits[:, 0, 0, 0, 0], 1)

    got = distance_metrics(logits, target.to(torch.uint8))
    for row in range(len(target)):
        chamfer, f_score = distances_by_pairs(logits[row, 0] > 0, target[row, 0])
        assert got["chamfer"][row].item() == pytest.approx(chamfer, rel=1e-6), row
        assert got["f_score"][row].item() == pytest.approx(f_score, rel=1e-12), row
    assert got["chamfer"][-1].item() == pytest.approx(math.dist((0, 0, 0), [cells - 1 for cells in shape]))
    alone = distance_metrics(logits[3:4] > 0, target[3:4])
    for name, values in got.items():
        assert values.dtype == torch.float64
        assert torch.equal(values[3:4], alone[name])
        assert torch.equal(values, distance_metrics(target, (logits > 0))[name])  # they are symmetric


def test_one_voxel_is_the_threshold_of_the_f_score():
    grids = torch.zeros(4, 1, 5, 5, 5, dtype=torch.bool)
    target = grids.clone()
    target[:, 0, 2, 2, 2] = True
    for row, place in enumerate([(2, 2, 2), (2, 3, 2), (2, 3, 3), (2, 4, 2)]):
        grids[row, 0][place] = True
    got = distance_metrics(grids, target)
    assert got["f_score"].tolist() == [1, 1, 0, 0]
    assert got["chamfer"].tolist() == pytest.approx([0, 1, math.sqrt(2), 2])
    grids[3] = False
    grids[3, 0, 0, 0] = True  # 5 voxels, none near; the target's one at distance √8
    grids[3, 0, 2, 2, 1] = True  # near
    got = distance_metrics(grids, target)
    assert got["f_score"][3].item() == pytest.approx(2 * (1 / 6) / (1 / 6 + 1))
    far = [math.dist((0, 0, z), (2, 2, 2)) for z in range(5)]
    assert got["chamfer"][3].item() == pytest.approx(((sum(far) + 1) / 6 + 1) / 2)


def test_distances_of_empty_grids():
    """Both, the prediction, the target; and beside them a pair with voxels, which they leave alone."""
    prediction = torch.zeros(4, 1, 3, 4, 13, dtype=torch.bool)
    target = prediction.clone()
    target[1, 0, 0, 0, 0] = prediction[2, 0, 1, 1, 1] = target[3, 0, 0, 0, 0] = prediction[3, 0, 0, 0, 2] = True
    got = distance_metrics(prediction, target)
    diagonal = math.sqrt(2**2 + 3**2 + 12**2)
    assert got["chamfer"].tolist() == pytest.approx([0, diagonal, diagonal, 2])
    assert got["f_score"].tolist() == [1, 0, 0, 0]


# --- codes ---


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


def test_several_codes_of_a_token_are_counted_apart():
    indices = torch.randint(0, 5, (3, 2, 4, 6, 2), generator=torch.Generator().manual_seed(2))
    counts = codebook_counts(indices, 5, 2)
    first, second = (codebook_counts(indices[..., q], 5) for q in range(2))
    assert torch.equal(counts, torch.stack([first, second]))
    assert entropy_bits(counts) == pytest.approx(entropy_bits(first) + entropy_bits(second))
    assert perplexity(counts) == pytest.approx(math.sqrt(perplexity(first) * perplexity(second)))
    assert usage(torch.tensor([[3, 0, 0, 0], [1, 1, 1, 0]])) == 0.5


def test_counts_of_objects_are_of_the_tokens_chosen():
    generator = torch.Generator().manual_seed(3)
    indices = torch.randint(0, 4, (3, 10, 2), generator=generator)
    chosen = torch.rand(3, 10, generator=generator) < 0.4
    chosen[1] = False
    everything, part = object_counts(indices, 4), object_counts(indices, 4, chosen)
    assert everything.dtype == part.dtype == torch.int64
    for b in range(3):
        assert torch.equal(everything[b], codebook_counts(indices[b], 4, 2))
        assert torch.equal(part[b], codebook_counts(indices[b][chosen[b]], 4, 2))
    assert torch.equal(code_entropy(part[1]), torch.zeros(2, dtype=torch.float64))


# --- the posterior ---


def test_kl_in_bits():
    generator = torch.Generator().manual_seed(4)
    mean, logvar = torch.randn(2, 2, 3, 1, 2, 4, generator=generator)
    normal = torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp())
    nats = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    bits = gaussian_kl_bits(mean, logvar)
    assert bits.shape == (2, 1, 2, 4) and bits.dtype == torch.float64
    assert torch.allclose(bits, nats / math.log(2), rtol=1e-12)
    # A mean of 2 costs 2 nats, half the variance (1/2 - 1 + ln 2) / 2 nats.
    mean, logvar = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 0, -math.log(2)])
    by_channel = [gaussian_kl_bits(mean[c].view(1, 1, 1, 1, 1), logvar[c].view(1, 1, 1, 1, 1)).item() for c in range(3)]
    assert by_channel == pytest.approx([2 / math.log(2), 0, 0.5 - 0.25 / math.log(2)], abs=1e-7)


# --- over a dataset ---


class Grids:
    """A dataset of grids [n, 1, R, R, R]; batches travel negated."""

    def __init__(self, grids: torch.Tensor):
        self.grids = grids

    def get_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"not": ~self.grids[torch.from_numpy(indices)]}

    def unpack_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ss": ~batch["not"]}


def test_shares_of_ranks_add_up_to_the_whole():
    """Means and codebook scores over unequal shares, summed as ranks would, equal those of one process."""
    grids = torch.from_numpy(solid_grids(7, 8, 0))[:, None]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 1, 8, 8, 8, generator=generator)
    indices = torch.randint(0, 5, (7, 2, 2, 1), generator=generator)

    def reconstruct(ss, rows):
        rows = list(rows)
        assert torch.equal(ss, grids[rows])
        counts = torch.bincount(indices[rows].flatten(), minlength=6)
        return Reconstruction(logits[rows], indices[rows], counts, torch.tensor(rows, dtype=torch.float32))

    def scored(picked, batch_size=2):
        return evaluate(reconstruct, Grids(grids), picked, batch_size=batch_size, device=torch.device("cpu"))

    whole, shares = scored(range(7), 7), [scored(range(0, 7, 3)), scored(range(1, 7, 3)), scored(range(2, 7, 3))]
    sums: list[list[torch.Tensor]] = []
    for share in shares:
        sums.append([])
        share.means(lambda tensor: sums[-1].append(tensor) or tensor)  # noqa: B023 - called within this turn
    totals = iter([sum(parts) for parts in zip(*sums, strict=True)])
    assert shares[0].means(lambda tensor: next(totals)) == pytest.approx(whole.means())
    assert whole.means()["quantization_error"] == 3.0 and whole.means()["codebook_usage"] == 5 / 6
    done: list[int] = []
    evaluate(reconstruct, Grids(grids), range(7), batch_size=3, device=torch.device("cpu"), progress=done.append)
    assert done == [3, 6, 7]


def test_validation_measures_nothing_that_only_the_report_needs():
    grids = torch.from_numpy(solid_grids(2, 8, 0))[:, None]
    indices, counts = torch.zeros(2, 2, 2, 1, dtype=torch.int64), torch.tensor([8, 0])

    def reconstruct(ss, rows):
        return Reconstruction(ss.float() - 0.5, indices, counts, torch.zeros(2))

    means = evaluate(reconstruct, Grids(grids), range(2), batch_size=2, device=torch.device("cpu")).means()
    assert means == {
        "iou": 1,
        "precision": 1,
        "recall": 1,
        "exact": 1,
        "quantization_error": 0,
        "codebook_usage": 0.5,
        "codebook_perplexity": 1,
        "codes_per_object": 4,
        "lm_tokens": 4,
        "bits_per_object": 4,
        "entropy_bits_per_object": 0,
    }


def test_a_block_is_occupied_where_a_cell_of_its_token_is():
    """For any group, as the quantizer itself puts cells together; cells of 2³ voxels."""
    generator = torch.Generator().manual_seed(1)
    ss = (torch.rand(3, 1, 16, 16, 16, generator=generator) < 0.02).to(torch.uint8)
    cells = ss.view(3, 8, 2, 8, 2, 8, 2).amax((2, 4, 6))[:, None]
    for group in ([1, 1, 1], [1, 1, 4], [2, 2, 1], [2, 4, 8]):
        quantizer = VectorQuantizer(n_embed=4, embed_dim=2 * math.prod(group), latent_channels=2, group=group)
        want = quantizer.group_cells(cells).amax(-1) > 0
        assert 0 < want.float().mean()
        assert torch.equal(occupied_blocks(ss, quantizer.lattice((8, 8, 8))), want)


def test_tokens_of_several_codes_with_and_without_empty_ones():
    """Two objects, batch by batch, of 2·1·2 tokens with two of three codes each."""
    ss = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    ss[0, 0, 0, 3, 0] = ss[0, 0, 3, 0, 1] = ss[1, 0, 2, 2, 2] = True  # tokens 0 and 2; token 3
    codes = torch.tensor([[[0, 1], [2, 2], [0, 2], [2, 2]], [[2, 2], [2, 2], [1, 2], [0, 2]]]).view(2, 2, 1, 2, 2)
    batches = [torch.tensor([[2, 0, 2], [0, 1, 3]]), torch.tensor([[1, 1, 2], [0, 0, 4]])]

    def reconstruct(grids, rows):
        return Reconstruction(grids.float() - 0.5, codes[list(rows)], batches[rows[0]], torch.zeros(1))

    scores = evaluate(reconstruct, Grids(ss), range(2), batch_size=1, device=torch.device("cpu"), detailed=True)
    assert scores.masks is None and "masks" not in scores.objects
    assert scores.objects["tokens"].tolist() == [4, 4]
    assert scores.counts.tolist() == [[3, 1, 4], [0, 1, 7]]
    assert scores.counts_occupied.tolist() == [[3, 0, 0], [0, 1, 2]]
    objects = {name: value.tolist() for name, value in scores.objects.items()}
    assert objects["tokens_occupied"] == [2, 1]
    assert objects["object_usage"] == pytest.approx([4 / 6, 4 / 6])
    assert objects["object_usage_occupied"] == pytest.approx([3 / 6, 2 / 6])
    quarter = 2 - 0.75 * math.log2(3)  # the entropy of shares 1/4 and 3/4
    assert objects["object_perplexity"] == pytest.approx([2 ** ((1 + quarter) / 2), 2 ** (1.5 / 2)])
    assert objects["object_perplexity_occupied"] == pytest.approx([2**0.5, 1])
    third = math.log2(3) - 2 / 3  # of 1/3 and 2/3
    fifth = math.log2(5) - 0.8 * 2  # of 1/5 and 4/5
    assert occupancy_scores(scores) == pytest.approx(
        {
            "tokens_occupied": 1.5,
            "tokens_empty": 2.5,
            "codebook_usage_occupied": 3 / 6,
            "codebook_usage_empty": 3 / 6,
            "codebook_perplexity_occupied": 2 ** (third / 2),
            "codebook_perplexity_empty": 2 ** (fifth / 2),
            "entropy_bits_per_object_occupied": 1.5 * third,
            "entropy_bits_per_object_empty": 2.5 * fifth,
        }
    )
    assert scores.means()["bits_per_object"] == pytest.approx(4 * 2 * math.log2(3))
    assert scores.means()["codes_per_object"] == scores.means()["lm_tokens"] == 8
    assert scores.means()["codebook_usage"] == pytest.approx(5 / 6)


def test_with_an_empty_code_learned_codes_alone_count_and_masks_are_written():
    """Two objects, batch by batch, of 2·1·2 tokens with two of four ids each, 0 for empty ones."""
    ss = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    ss[0, 0, 0, 3, 0] = ss[0, 0, 3, 0, 1] = ss[1, 0, 2, 2, 2] = True  # tokens 0 and 2; token 3
    ids = torch.tensor([[[1, 2], [0, 0], [1, 3], [0, 0]], [[0, 0], [0, 0], [0, 0], [1, 3]]]).view(2, 2, 1, 2, 2)
    batches = [torch.tensor([[2, 0, 0], [0, 1, 1]]), torch.tensor([[1, 0, 0], [0, 0, 1]])]

    def reconstruct(grids, rows):
        return Reconstruction(grids.float() - 0.5, ids[list(rows)], batches[rows[0]], torch.zeros(1), first_code=1)

    brief, scores = (
        evaluate(reconstruct, Grids(ss), range(2), batch_size=1, device=torch.device("cpu"), detailed=detailed)
        for detailed in (False, True)
    )
    assert scores.counts.tolist() == [[3, 0, 0], [0, 1, 2]] and scores.counts_occupied is None
    objects = {name: value.tolist() for name, value in scores.objects.items()}
    assert objects["tokens"] == [2, 1] and objects["masks"] == [1, 1]
    assert objects["object_usage"] == pytest.approx([3 / 6, 2 / 6])
    assert objects["object_perplexity"] == pytest.approx([2**0.5, 1])
    third = math.log2(3) - 2 / 3  # the entropy of shares 1/3 and 2/3
    # The tokens are children 000 and 100 of the root in the first object, 101 in the second.
    assert scores.masks.nonzero()[:, 0].tolist() == [(1 << 0b000 | 1 << 0b100) - 1, (1 << 0b101) - 1]
    want = {
        "tokens": 1.5,
        "masks": 1,
        "codebook_usage": 3 / 6,
        "codebook_perplexity": 2 ** (third / 2),
        "codes_per_object": 3,
        "lm_tokens": 4,
        "bits_per_object": 3 * math.log2(3) + math.log2(255),
        "entropy_bits_per_object": 1.5 * third + 1,
    }
    for means in (brief.means(), scores.means()):
        assert {name: means[name] for name in want} == pytest.approx(want)
    assert not [name for name in scores.means() if name.endswith(("_occupied", "_empty"))]
    doubled = scores.means(lambda tensor: 2 * tensor)  # as of two ranks with the same objects
    assert {name: doubled[name] for name in want} == pytest.approx(want)
    with pytest.raises(ValueError, match="no empty code"):
        occupancy_scores(scores)


@pytest.mark.parametrize("lattice", [(4, 4, 4), (8, 8, 2), (6, 5, 3), (1, 1, 7), (2, 1, 1), (1, 1, 1)])
def test_masks_are_those_of_the_octree_form(lattice):
    generator = torch.Generator().manual_seed(sum(lattice))
    occupied = torch.rand(12, *lattice, generator=generator) < torch.linspace(0, 1, 12).view(-1, 1, 1, 1)
    octree = Octree(lattice, n_embed=2)
    for own, counts in zip(occupied, octree_masks(occupied), strict=True):
        masks = [octree.mask(value) for value in octree.to_values(own.long().flatten()).tolist()]
        assert torch.equal(counts, torch.bincount(torch.tensor([m for m in masks if m]).long(), minlength=256)[1:])


def test_narrow_gaps_are_empty_voxels_between_two_occupied_ones():
    generator = torch.Generator().manual_seed(0)
    ss = (torch.rand(6, 1, 5, 4, 7, generator=generator) < torch.linspace(0, 1, 6).view(-1, 1, 1, 1, 1)).to(torch.uint8)
    for grid, found in zip(ss[:, 0].numpy(), narrow_gaps(ss).tolist(), strict=True):
        gaps = 0
        for place in np.ndindex(grid.shape):
            lines = [np.moveaxis(grid, axis, -1)[tuple(np.delete(place, axis))] for axis in range(3)]
            sides = [line[max(n - 1, 0) : n + 2].tolist() for line, n in zip(lines, place, strict=True)]
            gaps += [1, 0, 1] in sides
        assert found == pytest.approx(gaps / max(1, grid.sum()))
    plate = torch.zeros(1, 1, 9, 9, 9)
    plate[0, 0, 2:7, 2:7, [3, 5]] = 1  # two walls of 5² voxels, one voxel apart
    assert narrow_gaps(plate).item() == 0.5


def test_kl_rates_of_groups_with_and_without_voxels():
    ss = torch.zeros(3, 1, 8, 8, 8, dtype=torch.bool)
    ss[0, 0, 7, 0, 0] = ss[2] = True  # of groups of 4·4·8 voxels, the third of the first object, all of the third
    kl = torch.arange(24, dtype=torch.float64).view(3, 2, 2, 2)

    def reconstruct(grids, rows):
        rows = list(rows)
        return Reconstruction(grids.float() - 0.5, sampled=0.5 - grids.float(), kl_bits=kl[rows])

    def scored(picked):
        return evaluate(reconstruct, Grids(ss), picked, batch_size=2, device=torch.device("cpu"), detailed=True)

    scores = scored(range(3))
    assert scores.objects["iou"].tolist() == [1, 1, 1] and scores.objects["sampled_iou"].tolist() == [0, 0, 0]
    assert scores.objects["kl_bits_per_object"].tolist() == [28, 92, 156]
    assert scores.objects["kl_bits_per_object_occupied"].tolist() == [4 + 5, 0, 156]
    assert scores.objects["groups_occupied"].tolist() == [1, 0, 4]
    # Two cells along z make one group, since two is not a multiple of four.
    assert kl_scores(scores) == pytest.approx(
        {
            "kl_cells_per_group": 2,
            "kl_bits_per_cell": 276 / 24,
            "groups": 4,
            "groups_occupied": 5 / 3,
            "groups_empty": 7 / 3,
            "kl_bits_per_group": 276 / 12,
            "kl_bits_per_group_occupied": 165 / 5,
            "kl_bits_per_group_empty": 111 / 7,
            "kl_bits_per_object": 92,
            "kl_bits_per_object_occupied": 55,
            "kl_bits_per_object_empty": 37,
        }
    )
    assert kl_scores(scored([2]))["kl_bits_per_group_empty"] is None
    assert kl_scores(scored([1]))["kl_bits_per_group_occupied"] is None


def test_a_sample_depends_on_its_object_alone():
    torch.manual_seed(0)
    config = tiny_config()
    models = {name: build(spec).eval() for name, spec in config["models"].items()}
    with torch.no_grad():
        models["encoder"].out_layer[-1].weight.normal_(0, 0.1)  # or every latent would be the same
        models["decoder"].out_layer[-1].weight.normal_(0, 0.1)
    ss = torch.from_numpy(solid_grids(3, 16, 5))[:, None]
    ids = torch.tensor([7, 2**59, 8])
    with torch.no_grad():
        whole = SparseStructureVaeTrainer.reconstruct(models, ss, ids)
        again = SparseStructureVaeTrainer.reconstruct(models, ss.flip(0), ids.flip(0))
        other = SparseStructureVaeTrainer.reconstruct(models, ss, ids + 1)
        plain = SparseStructureVaeTrainer.reconstruct(models, ss)
    assert torch.allclose(again.sampled.flip(0), whole.sampled, atol=1e-5)
    assert not torch.isclose(other.sampled, whole.sampled).all((1, 2, 3, 4)).any()
    assert torch.equal(other.logits, whole.logits) and torch.equal(other.kl_bits, whole.kl_bits)
    assert torch.equal(plain.logits, whole.logits) and plain.sampled is None and plain.kl_bits is None
