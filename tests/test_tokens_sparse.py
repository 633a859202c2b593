"""The sparse form turns back into the same ids; Morton order is the textbook's on any lattice."""

import itertools

import pytest
import torch

from trellis.tokens.sparse import from_sparse, morton_order, to_sparse
from trellis.tokens.text import TokenFormat
from trellis.utils.errors import DataError


def test_every_sequence_survives_and_no_two_share_a_form():
    empty, forms = [0, 1, 2, 0, 1, 2], set()
    for ids in itertools.product(range(3), repeat=6):
        sparse = to_sparse(ids, empty, 3)
        forms.add(tuple(sparse))
        assert from_sparse(sparse, empty, 3).tolist() == list(ids)
        assert all(0 <= value < 3 + 6 for value in sparse)
        assert len(sparse) <= 6
    assert len(forms) == 3**6


def test_the_form_is_as_described():
    empty = [5, 5, 6, 5, 5, 5]
    assert to_sparse(empty, empty, 8) == [8 + 5]
    assert to_sparse([1, 1, 1, 1, 1, 1], empty, 8) == [1] * 6
    assert to_sparse([5, 5, 6, 3, 5, 6], empty, 8) == [8 + 2, 3, 8 + 0, 6]  # 6 is empty at place 2, not at 5
    assert to_sparse([], [], 8) == [] and from_sparse([], [], 8).tolist() == []


def test_forms_that_are_not_the_shortest_are_read_too():
    """A language model may split a run, or write an empty token's id."""
    assert from_sparse([8 + 1, 8 + 0, 5, 2], [5, 5, 6, 5, 5], 8).tolist() == [5, 5, 6, 5, 2]


@pytest.mark.parametrize(("lattice", "codes"), [((4, 4, 1), 1), ((2, 4, 8), 2), ((3, 5, 2), 1), ((16, 16, 4), 1)])
def test_ids_survive_in_morton_order(lattice, codes):
    order = morton_order(lattice, codes)
    generator = torch.Generator().manual_seed(0)
    empty = torch.randint(3, order.shape, generator=generator)
    for share in (0.0, 0.1, 0.9, 1.0):
        random = torch.randint(50, order.shape, generator=generator)
        ids = torch.where(torch.rand(order.shape, generator=generator) < share, random, empty)
        sparse = to_sparse(ids, empty, 50, order)
        assert sparse == to_sparse(ids[order], empty[order], 50)
        back = from_sparse(torch.tensor(sparse), empty, 50, order)
        assert torch.equal(back, ids) and back.dtype == torch.int64


def test_the_sparse_form_has_a_text_form():
    empty, ids = [0] * 12, [0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0]
    form = TokenFormat.at(0, 5 + len(ids))
    text = form.to_text(to_sparse(ids, empty, 5))
    assert text == "<mesh-start><mesh6><mesh3><mesh7><mesh4><mesh9><mesh-end>"
    assert from_sparse(form.from_text(text, None).ids, empty, 5).tolist() == ids


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ([1, 2, 8], "stands for 3 tokens, not 4"),
        ([1, 2, 10], "stands for 5 tokens, not 4"),
        ([12], r"number 0 is 12.*\[0, 12\)"),
        ([1, -1, 1, 1], "number 1 is -1"),
        ([0.5], "integers"),
    ],
)
def test_what_is_no_sparse_form_is_refused(sparse, message):
    with pytest.raises(DataError, match=message):
        from_sparse(sparse, [0] * 4, 8)


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="3 ids, but 2 of an empty grid"):
        to_sparse([0, 1, 2], [0, 0], 8)
    with pytest.raises(DataError, match=r"ids: number 1 is 8; it must lie in \[0, 8\)"):
        to_sparse([0, 8], [0, 0], 8)


def morton_key(place: tuple[int, int, int], lattice: tuple[int, int, int]) -> str:
    """Bits of x, y, z in turn, the highest first, as text of equal length."""
    bits = max(lattice).bit_length()
    digits = [f"{value:0{bits}b}" for value in place]
    return "".join(axis[bit] for bit in range(bits) for axis in digits)


@pytest.mark.parametrize("lattice", [(4, 4, 4), (8, 8, 2), (2, 4, 8), (3, 5, 7), (1, 1, 6), (1, 1, 1)])
def test_morton_order_interleaves_the_bits(lattice):
    places = list(itertools.product(*map(range, lattice)))  # raster: z fastest
    order = morton_order(lattice).tolist()
    assert [places[i] for i in order] == sorted(places, key=lambda place: morton_key(place, lattice))
    assert sorted(order) == list(range(len(places)))


def test_the_first_places_of_shapellms_lattice_are_a_cube():
    order = morton_order((16, 16, 4)).view(16, 64)
    for block in order:  # 4³ places each
        x, y, z = block // 64, block // 4 % 16, block % 4
        assert [(axis.min() // 4 * 4, axis.max() - axis.min()) for axis in (x, y, z)] == [(x[0], 3), (y[0], 3), (0, 3)]
    assert order[0, :8].tolist() == [0, 1, 4, 5, 64, 65, 68, 69]


def test_codes_of_a_token_stay_together():
    order = morton_order((2, 4, 2))
    assert torch.equal(morton_order((2, 4, 2), 3), (3 * order[:, None] + torch.arange(3)).flatten())
