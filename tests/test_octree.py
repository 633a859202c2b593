"""The octree form is exactly invertible on any lattice; every damage is found at its place, and repaired as said."""

import itertools
import re

import numpy as np
import pytest
import torch
from helpers import TEST_DATA, needs_test_data

from trellis.tokens.octree import Expected, Node, Octree
from trellis.utils.errors import ConfigError, DataError

LATTICES = [(1, 1, 1), (2, 2, 2), (1, 1, 9), (3, 1, 2), (4, 4, 1), (6, 5, 3), (8, 8, 8), (16, 16, 4)]
K = 7  # codes 1 to 6; mask m is 6 + m


def random_ids(octree: Octree, share: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, octree.n_embed, (int(np.prod(octree.lattice)), octree.codes_per_token))
    return (codes * (rng.random((len(codes), 1)) < share)).reshape(-1)


class Wrong(Exception):
    """A value that may not stand at its index."""


def reference(octree: Octree, values: list[int]) -> np.ndarray:
    """Read a sequence recursively, from the description alone. Raise Wrong(index) at the first wrong place."""
    grid = np.zeros((*octree.lattice, octree.codes_per_token), dtype=np.int64)
    side = 1
    while side < max(octree.lattice):
        side *= 2
    position = 0

    def take(lowest: int, highest: int) -> int:
        nonlocal position
        if position == len(values) or not lowest <= values[position] <= highest:
            raise Wrong(position)
        position += 1
        return values[position - 1]

    def exists(corner) -> bool:
        return all(a < b for a, b in zip(corner, octree.lattice, strict=True))

    def children(corner, size: int) -> list[tuple[int, int, int]]:
        mask, half, found = take(K, K + 254) - K + 1, size // 2, []
        for bit, offset in enumerate(itertools.product((0, 1), repeat=3)):
            child = tuple(a + b * half for a, b in zip(corner, offset, strict=True))
            if mask & 2**bit:
                if not exists(child):
                    raise Wrong(position - 1)
                found.append(child)
        return found

    def codes(corner) -> None:
        grid[corner] = [take(1, K - 1) for _ in range(octree.codes_per_token)]

    def downwards(corner, size: int) -> None:
        if size == 1:
            codes(corner)
            return
        for child in children(corner, size):
            downwards(child, size // 2)

    if values and octree.order == "depth":
        downwards((0, 0, 0), side)
    elif values:
        level = [(0, 0, 0)]
        while side > 1:
            level = [child for corner in level for child in children(corner, side)]
            side //= 2
        for corner in level:
            codes(corner)
    if position < len(values):
        raise Wrong(position)
    return grid.reshape(-1)


orders = pytest.mark.parametrize("order", ["breadth", "depth"])


@orders
@pytest.mark.parametrize("codes", [1, 3])
@pytest.mark.parametrize("lattice", LATTICES)
def test_ids_survive_and_lengths_are_known_ahead(lattice, codes, order):
    octree = Octree(lattice, K, codes, order)
    shares = [0.0, 0.02, 0.3, 0.9, 1.0]
    batch = np.stack([random_ids(octree, share, seed) for seed, share in enumerate(shares)])
    lengths = octree.lengths(batch)
    for ids, masks, number in zip(batch, *lengths, strict=True):
        values = octree.to_values(ids)
        assert np.array_equal(reference(octree, values.tolist()), ids)
        for strict in (True, False):
            parsed = octree.from_values(values, strict=strict)
            assert np.array_equal(parsed.ids, ids) and parsed.problems == [] and parsed.ids.dtype == torch.int64
        assert (int((values >= K).sum()), int((values < K).sum())) == (masks, number)
        assert octree.lengths(torch.from_numpy(ids)) == (masks, number)


@orders
def test_every_object_of_a_small_lattice_has_a_sequence_of_its_own(order):
    octree, found = Octree((3, 2, 1), 3, 1, order), set()
    for ids in itertools.product(range(3), repeat=6):
        values = octree.to_values(ids)
        found.add(tuple(values.tolist()))
        assert octree.from_values(values).ids.tolist() == list(ids)
    assert len(found) == 3**6


def test_the_sequences_are_as_described():
    """Tokens (0, 0, 0), (1, 0, 1) and (3, 3, 0) of 4×4×2: two blocks of 2³, children 0 and 6 of the root."""
    ids = np.zeros((4, 4, 2), dtype=np.int64)
    ids[0, 0, 0], ids[1, 0, 1], ids[3, 3, 0] = 1, 2, 3
    root, low, high = (K - 1 + sum(2**bit for bit in bits) for bits in ((0, 6), (0, 5), (6,)))
    assert Octree((4, 4, 2), K).to_values(ids.reshape(-1)).tolist() == [root, low, high, 1, 2, 3]
    assert Octree((4, 4, 2), K, order="depth").to_values(ids.reshape(-1)).tolist() == [root, low, 1, 2, high, 3]
    assert Octree((1, 1, 1), K, 3).to_values([4, 5, 6]).tolist() == [4, 5, 6]
    assert Octree((4, 4, 2), K).to_values([0] * 32).tolist() == []


@orders
@pytest.mark.parametrize(("lattice", "codes"), [((3, 2, 1), 1), ((4, 3, 4), 2), ((1, 1, 1), 2)])
def test_any_single_damage_is_what_it_says_or_found_at_its_place(lattice, codes, order):
    """Every truncation, and every replacement, insertion and removal of a value at every place."""
    octree = Octree(lattice, K, codes, order)
    values = octree.to_values(random_ids(octree, 0.3, seed=2)).tolist()
    assert len(values) >= codes
    anything = [-1, 0, *range(1, K + 255, 1 if len(values) < 20 else 9), K + 255, 10**9]
    damaged = [values[:length] for length in range(len(values))]
    damaged += [values[:place] + values[place + 1 :] for place in range(len(values))]
    for place in range(len(values) + 1):
        damaged += [values[:place] + [value] + values[place + 1 :] for value in anything]
        damaged += [values[:place] + [value] + values[place:] for value in (0, 1, K - 1, K, K + 14, K + 254)]
    refused = 0
    for sequence in damaged:
        repaired = octree.from_values(sequence, strict=False)
        assert np.array_equal(octree.from_values(octree.to_values(repaired.ids)).ids, repaired.ids)  # a valid object
        try:
            expected = reference(octree, sequence)
        except Wrong as wrong:
            refused += 1
            with pytest.raises(DataError) as error:
                octree.from_values(sequence)
            place = re.match(r"value (\d+) is |the sequence ends after (\d+) values", str(error.value))
            assert place and int(place[1] or place[2]) == wrong.args[0]
            defect = str(error.value).partition(". Refused")[0]
            assert repaired.problems[0].startswith(defect) and len(repaired.problems[0]) > len(defect)
        else:
            assert np.array_equal(octree.from_values(sequence).ids, expected)
            assert np.array_equal(repaired.ids, expected) and repaired.problems == []
    assert refused > len(damaged) / 4


@orders
@pytest.mark.parametrize("lattice", LATTICES)
def test_whole_sequences_are_read_at_once_as_value_by_value(lattice, order, monkeypatch):
    octree = Octree(lattice, K, 2, order)
    ids = [random_ids(octree, share, seed) for seed, share in enumerate((0.05, 0.5, 1))]
    values = [octree.to_values(each).tolist() for each in ids]
    monkeypatch.setattr(Octree, "walk", None)  # cannot be called
    assert all(
        np.array_equal(octree.from_values(each).ids, want) for each, want in zip(values, ids, strict=True) if each
    )
    monkeypatch.undo()
    monkeypatch.setattr(Octree, "_read_whole", lambda self, values: None)
    assert all(np.array_equal(octree.from_values(each).ids, want) for each, want in zip(values, ids, strict=True))


# A 3×2×1 lattice: the root has the children 0 and 4, at (0, 0, 0) and (2, 0, 0); the first of them 0, 2, 4 and 6, the
# other 0 and 2. All tokens but (0, 1, 0) hold something.
WHOLE = [K - 1 + 0b10001, K - 1 + 0b1010001, K - 1 + 0b101, 1, 2, 3, 4, 5]
IDS = [1, 0, 2, 3, 4, 5]  # (0,0) (0,1) (1,0) (1,1) (2,0) (2,1)
NEAREST = "replaced by the nearest token's"
MISSING = "missing blocks are taken as empty, missing codes are the nearest token's"
# sequence, the ids it is repaired to, the problems
DAMAGE = {
    "no code": (
        [*WHOLE[:3], 1, 0, 3, K, 5],
        [1, 0, 1, 3, 3, 5],
        [f"value 4 is code 0; the code of the token at (1, 0, 0) must stand there (2 such); {NEAREST}"],
    ),
    "no first code": (
        [*WHOLE[:3], K + 4, 2, 3, 4, 5],
        [2, 0, 2, 3, 4, 5],
        [f"value 3 is mask 5; the code of the token at (0, 0, 0) must stand there; {NEAREST}"],
    ),
    "cut among codes": (
        WHOLE[:5],
        [1, 0, 2, 2, 2, 2],
        [f"the sequence ends after 5 values, but the code of the token at (1, 1, 0) must follow; {MISSING}"],
    ),
    "cut before the codes": (
        WHOLE[:3],
        [1, 0, 1, 1, 1, 1],
        [f"the sequence ends after 3 values, but the code of the token at (0, 0, 0) must follow; {MISSING}"],
    ),
    "cut among masks": (
        WHOLE[:2],
        [1, 0, 1, 1, 0, 0],
        [
            "the sequence ends after 2 values, but the mask of the block of 2³ tokens at (2, 0, 0) must follow; "
            + MISSING
        ],
    ),
    "code instead of a mask": (
        [WHOLE[0], WHOLE[1], 6, *WHOLE[3:6]],
        [1, 0, 2, 3, 0, 0],
        [
            "value 2 is code 6; the mask of the block of 2³ tokens at (2, 0, 0) must stand there; "
            "the block is taken as empty"
        ],
    ),
    "children outside": (
        [WHOLE[0], WHOLE[1], K - 1 + 0b1010101, *WHOLE[3:]],
        IDS,
        [
            "value 2 is mask 85; the mask of the block of 2³ tokens at (2, 0, 0) can name the children 0, 2 alone; "
            "children outside the lattice are left out"
        ],
    ),
    "children outside alone": (
        [WHOLE[0], WHOLE[1], K - 1 + 0b1000000, *WHOLE[3:6]],
        [1, 0, 2, 3, 0, 0],
        [
            "value 2 is mask 64; the mask of the block of 2³ tokens at (2, 0, 0) can name the children 0, 2 alone; "
            "children outside the lattice are left out"
        ],
    ),
    "surplus": (
        [*WHOLE, 6, K],
        IDS,
        ["value 8 is code 6, but the object is complete before it; the last 2 are dropped"],
    ),
    "no root": (
        WHOLE[3:],
        [0] * 6,
        [
            "value 0 is code 1; the mask of the block of 4³ tokens at (0, 0, 0) must stand there; "
            "the block is taken as empty",
            "value 1 is code 2, but the object is complete before it; the last 4 are dropped",
        ],
    ),
}


@pytest.mark.parametrize(("values", "ids", "problems"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_repaired_as_described(values, ids, problems):
    octree = Octree((3, 2, 1), K)
    assert octree.to_values(IDS).tolist() == WHOLE
    parsed = octree.from_values(values, strict=False)
    assert parsed.ids.tolist() == ids
    assert parsed.problems == problems


def test_a_missing_code_is_that_of_its_place_in_the_token_before():
    octree = Octree((2, 1, 1), K, 2)
    values = [K - 1 + 0b10001, 1, 2, 3, 4]
    assert octree.from_values(values).ids.tolist() == [1, 2, 3, 4]
    assert octree.from_values(values[:4], strict=False).ids.tolist() == [1, 2, 3, 2]
    assert octree.from_values([values[0], 0, 2, 3, 4], strict=False).ids.tolist() == [3, 2, 3, 4]
    with pytest.raises(
        DataError, match=r"ends after 4 values, but code 2 of 2 of the token at \(1, 0, 0\) must follow"
    ):
        octree.from_values(values[:4])


@orders
def test_a_walk_tells_what_comes_next_and_where(order):
    """Fed with a sequence, it visits every node that holds something once; what it allows is what it takes."""
    octree = Octree((6, 5, 3), K, 2, order)
    ids = random_ids(octree, 0.2, seed=3)
    holds = ids.reshape(6, 5, 3, 2)[..., 0] > 0
    walk, visited = octree.walk(), []
    for value in octree.to_values(ids).tolist():
        node, expected, fork = walk.node, walk.expected, walk.copy()
        assert expected.kind == ("code" if node.level == octree.depth else "mask")
        assert expected.may_end == (not visited)
        if walk.code == 0:
            visited.append(node)
        taken = [each for each in range(-2, K + 257) if walk.copy().advance(each)]
        masks = [mask for mask in range(1, 256) if expected.kind == "mask" and not mask & ~expected.children]
        assert taken == (list(range(1, K)) if expected.kind == "code" else [K - 1 + mask for mask in masks])
        assert walk.advance(value)
        assert fork.node == node and fork.expected == expected
    assert walk.node is None and walk.expected == Expected("end", 0, True) and not walk.advance(1)
    for level in range(octree.depth + 1):
        side = 2 ** (octree.depth - level)
        corners = {tuple(corner // side * side) for corner in np.argwhere(holds)}
        assert sorted(node[1:] for node in visited if node.level == level) == sorted(corners)
    assert visited[0] == Node(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1, 0], r"integers \[4\] or \[B, 4\], not int64 \[3\]"),
        ([1.0, 1.0, 0.0, 0.0], "integers"),
        ([[1, 1, 0, 0], [1, 1, 0, 0]], "of one object"),
        ([1, 1, 0, K], "id 3 is 7"),
        ([-1, 1, 0, 0], "id 0 is -1"),
        ([0, 0, 2, 0], r"token 1 has the ids \[2, 0\]"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message):
    with pytest.raises(DataError, match=message):
        Octree((2, 1, 1), K, 2).to_values(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lattice": (0, 1, 1)}, "lattice"),
        ({"lattice": (4, 4)}, "lattice"),
        ({"n_embed": 1}, "n_embed >= 2"),
        ({"codes_per_token": 0}, "codes_per_token >= 1"),
        ({"order": "morton"}, "breadth or depth"),
    ],
)
def test_an_octree_that_there_is_not_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Octree(**{"lattice": (4, 4, 4), "n_embed": 8, **changes})


@needs_test_data
def test_real_objects_have_the_lengths_that_the_documents_state():
    bits = np.load(TEST_DATA / "data" / "voxels64_val.npz")["bits"]
    holds = np.unpackbits(bits, axis=1).reshape(-1, 64, 64, 64)
    for side, block, masks, codes in ((16, 4, 176.1, 595.2), (8, 2, 39.9, 136.2)):
        for axis in (1, 2, 3):
            holds = np.bitwise_or.reduceat(holds, range(0, side * block, block), axis)
        ids = holds.reshape(len(holds), -1) * np.arange(1, side**3 + 1)
        for order in ("breadth", "depth"):
            octree = Octree((side,) * 3, 8192, 1, order)
            lengths = octree.lengths(ids)
            assert lengths.masks.mean() == pytest.approx(masks, abs=0.05)
            assert lengths.codes.mean() == pytest.approx(codes, abs=0.05)
            for row, total in zip(ids[::20], (lengths.masks + lengths.codes)[::20], strict=True):
                values = octree.to_values(row)
                assert len(values) == total
                assert np.array_equal(octree.from_values(values).ids, row)
