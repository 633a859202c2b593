"""Ids as text and as a language model's vocabulary: the way there and back is exact, and what a model gets wrong is
refused or repaired as described."""

import random
import re

import pytest
import torch

from trellis.tokens.octree import Octree
from trellis.tokens.problems import Parsed
from trellis.tokens.text import SHAPELLM, TokenFormat
from trellis.utils.errors import ConfigError, DataError

FORMAT = TokenFormat.at(first_id=100, n_embed=10)
FILL = [9, 8, 7, 6]


def words(*codes: int | str) -> str:
    return "".join(f"<mesh{code}>" for code in codes)


def whole(*codes: int | str) -> str:
    return f"<mesh-start>{words(*codes)}<mesh-end>"


def test_the_text_and_the_vocabulary_are_those_of_shapellm():
    assert SHAPELLM.to_text([0, 8191, 17]) == "<mesh-start><mesh0><mesh8191><mesh17><mesh-end>"
    assert SHAPELLM.to_vocabulary([0, 8191, 17]) == [159857, 151665, 159856, 151682, 159858]
    assert (SHAPELLM.first_id, SHAPELLM.start_id, SHAPELLM.end_id) == (151665, 159857, 159858)


@pytest.mark.parametrize("form", [SHAPELLM, FORMAT, TokenFormat(7, 65536, 3, 4, "[BOM]", "[EOM]", "|v{}")])
def test_ids_survive_both_forms(form):
    generator = torch.Generator().manual_seed(0)
    for ids in (torch.arange(form.n_embed), torch.randint(form.n_embed, (1024,), generator=generator)):
        for strict in (True, False):
            for parsed in (
                form.from_text(form.to_text(ids), len(ids), strict=strict),
                form.from_text(form.to_text(ids), None, strict=strict),
                form.from_vocabulary(form.to_vocabulary(ids), len(ids), strict=strict),
                form.from_vocabulary(torch.tensor(form.to_vocabulary(ids)), None, strict=strict),
            ):
                assert torch.equal(parsed.ids, ids) and parsed.ids.dtype == torch.int64
                assert parsed.problems == []


@pytest.mark.parametrize(
    "text",
    [
        whole(1, 2, 3, 4),
        f"Here is your chair: {whole(1, 2, 3, 4)}<|im_end|>",
        "<mesh-start> <mesh1> <mesh2>\n<mesh3>\t<mesh4> <mesh-end>",  # as tokenizers with spaces between words write it
    ],
)
def test_an_answer_around_the_object_and_white_space_are_no_problem(text):
    assert FORMAT.from_text(text, 4) == Parsed(pytest.approx([1, 2, 3, 4]), [])


# text, the ids it is repaired to, what the first message says
BAD = {
    "nothing": ("", FILL, "there is no object"),
    "no object": ("Sorry, I cannot do that.", FILL, "there is no object"),
    "empty object": (whole(), FILL, "has 0 ids, not 4"),
    "too few": (whole(1, 2, 3), [1, 2, 3, 6], "has 3 ids, not 4"),
    "too many": (whole(1, 2, 3, 4, 5), [1, 2, 3, 4], "has 5 ids, not 4"),
    "no end": ("<mesh-start>" + words(1, 2, 3, 4), [1, 2, 3, 4], "has no end"),
    "cut off": ("<mesh-start>" + words(1, 2), [1, 2, 7, 6], "has no end|has 2 ids"),
    "cut off within a word": (
        "<mesh-start>" + words(1, 2, 3) + "<mes",
        [1, 2, 3, 6],
        "the object breaks off at '<mes'",
    ),
    "no start": (words(1, 2, 3, 4) + "<mesh-end>", [1, 2, 3, 4], "no start before '<mesh1>'"),
    "no start, out of range": (words(10, 2, 3, 4) + "<mesh-end>", [9, 2, 3, 4], "no start before '<mesh10>'"),
    "neither": (words(1, 2, 3, 4), [1, 2, 3, 4], "no start"),
    "only an end": ("<mesh-end>", FILL, "no start before '<mesh-end>'"),
    "out of range": (whole(1, 10, 3, 4), [1, 8, 3, 4], "'<mesh10>' is not one of the codes 0 to 9"),
    "out of range, surplus": (
        whole(1, 10, 2, 3, 4),
        [1, 2, 3, 4],
        "'<mesh10>' is not one of the codes 0 to 9; left out",
    ),
    "out of range, too few": (whole(1, 10, 3), [1, 8, 3, 6], "'<mesh10>' is not one of the codes 0 to 9; replaced"),
    "huge number": (whole(1, 2, "9" * 10_000, 4), [1, 2, 7, 4], "'<mesh9999.*…' is not one"),
    "negative": (whole(1, -2, 3, 4), [1, 8, 3, 4], "'<mesh-2>' is not one"),
    "leading zero": (whole(1, 2, "03", 4), [1, 2, 7, 4], "'<mesh03>' is not one"),
    "other digits": (whole(1, 2, "\u0663", 4), [1, 2, 7, 4], "is not one"),
    "no number": (whole(1, 2, "", 4), [1, 2, 7, 4], "'<mesh>' is not one"),
    "text between": (f"<mesh-start>{words(1, 2)} and then {words(3, 4)}<mesh-end>", [1, 2, 3, 4], "'and then' stands"),
    "text before the end": (f"<mesh-start>{words(1, 2, 3, 4)}.<mesh-end>", [1, 2, 3, 4], "'.' stands"),
    "two objects": (whole(1, 2, 3, 4) + whole(5, 6, 7, 8), [1, 2, 3, 4], "there are 2 objects"),
    "the second is whole": (
        whole(1) + whole(5, 6, 1, 8),
        [5, 6, 1, 8],
        "there are 2 objects, .*; number 2 is read",
    ),
    "two starts": ("<mesh-start>" + whole(1, 2, 3, 4), [1, 2, 3, 4], "there are 2 objects"),
    "two ends": (whole(1, 2, 3, 4) + "<mesh-end>", [1, 2, 3, 4], "there are 2 objects"),
    "words after the end": (whole(1, 2, 3, 4) + words(5), [1, 2, 3, 4], "there are 2 objects"),
    "words before the start": (words(5) + whole(1, 2, 3, 4), [1, 2, 3, 4], "there are 2 objects"),
}


@pytest.mark.parametrize(("text", "repaired", "message"), BAD.values(), ids=BAD)
def test_bad_text_is_refused_or_repaired(text, repaired, message):
    defect = message.partition("; ")[0]  # a refusal names no repair
    with pytest.raises(DataError, match=defect):
        FORMAT.from_text(text, 4)
    with pytest.raises(DataError, match=defect):
        FORMAT.from_text(text, 4, fill=FILL)
    parsed = FORMAT.from_text(text, 4, strict=False, fill=FILL)
    assert parsed.ids.tolist() == repaired
    assert re.search(message, parsed.problems[0])
    # Without a fill, code 0 takes its part.
    filled = [code != default for code, default in zip(repaired, FILL, strict=True)]
    zeros = FORMAT.from_text(text, 4, strict=False)
    assert zeros.ids.tolist() == [code if kept else 0 for code, kept in zip(repaired, filled, strict=True)]
    assert zeros.problems == parsed.problems


# the same, as vocabulary ids: codes 100 to 109, start 110, end 111
BAD_IDS = {
    "nothing": ([], FILL, "there is no object"),
    "too few": ([110, 101, 102, 111], [1, 2, 7, 6], "has 2 ids, not 4"),
    "too many": ([110, 101, 102, 103, 104, 105, 111], [1, 2, 3, 4], "has 5 ids, not 4"),
    "no end": ([5, 110, 101, 102, 103, 104], [1, 2, 3, 4], "has no end"),
    "no start": ([101, 102, 103, 104, 111], [1, 2, 3, 4], "no start before 101"),
    "out of range": ([110, 101, 112, 103, 104, 111], [1, 8, 3, 4], "112 is not one of the codes"),
    "below the range": ([110, 101, 99, -100, 104, 111], [1, 8, 7, 4], r"99 is not one of the codes.*\(2 such\)"),
    "one more between": (
        [110, 101, 99, 102, 103, 104, 111],
        [1, 2, 3, 4],
        "99 is not one.* 0 to 9; left out",
    ),
    "two objects": ([110, 101, 111, 110, 101, 102, 103, 104, 111], [1, 2, 3, 4], "there are 2 objects"),
}


@pytest.mark.parametrize(("values", "repaired", "message"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_vocabulary_ids_are_refused_or_repaired(values, repaired, message):
    with pytest.raises(DataError, match=message.partition("; ")[0]):
        FORMAT.from_vocabulary(values, 4)
    parsed = FORMAT.from_vocabulary(values, 4, strict=False, fill=torch.tensor(FILL))
    assert parsed.ids.tolist() == repaired
    assert re.search(message, parsed.problems[0])


def test_what_stands_around_the_object_in_the_vocabulary_is_not_looked_at():
    assert FORMAT.from_vocabulary([1, 2, 110, 101, 102, 103, 104, 111, 3], 4).ids.tolist() == [1, 2, 3, 4]


def test_a_refusal_names_the_defect_and_a_repair_what_was_done():
    surplus, replaced = whole(1, 10, 2, 3, 4), whole(1, 10, 3, 4)
    for text, problems in (
        (surplus, ["{}; left out", "the object has 5 ids, not 4; 4 without those left out"]),
        (replaced, ["{}; replaced by the fill id at its index"]),
    ):
        defect = "'<mesh10>' is not one of the codes 0 to 9"
        with pytest.raises(DataError) as error:
            FORMAT.from_text(text, 4)
        assert str(error.value) == f"{defect}. Refused: strict=False, or from_tokens.py --repair, repairs it."
        assert FORMAT.from_text(text, 4, strict=False).problems == [problem.format(defect) for problem in problems]


def test_each_kind_of_repair_is_reported_once_in_order():
    text = f"<mesh-start>{words(1, 12, 13)}so{words(14)}so{words(2)}"
    parsed = FORMAT.from_text(text, 6, strict=False, fill=[0, 1, 2, 3, 4, 5])
    assert parsed.ids.tolist() == [1, 1, 2, 3, 2, 5]
    assert parsed.problems == [
        "'<mesh12>' is not one of the codes 0 to 9 (3 such); replaced by the fill id at its index",
        "'so' stands between the object's words (2 such); left out",
        "the object has no end",
        "the object has 5 ids, not 6; the last are filled",
    ]


@pytest.mark.parametrize("form", [FORMAT, TokenFormat.at(100, 10, Octree((2, 1, 1), 10))], ids=["dense", "octree"])
def test_no_text_raises_and_every_repair_is_reported_when_not_strict(form):
    """Random mixtures of words, halves of words and noise. A text without problems is the strict one's, the rest give
    T ids in range."""
    pieces = [
        "<mesh-start>",
        "<mesh-end>",
        "<mesh",
        "-",
        ">",
        "<",
        "mesh",
        "0",
        "7",
        "99",
        " ",
        "\n",
        "\ud800",
        "\0",
        "<mesh1>",
        "<mesh2>",
        "<mesh3>",
        "<mesh4>",
        "<mesh-1>",
        "<meshmesh>",
        "²",
        "١",
        "9" * 5000,
        "<octree1>",
        "<octree17>",
        "<octree255>",
        "<octree256>",
        "<octree",
    ]
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        parsed = form.from_text(text, 2, strict=False, fill=[5, 6])
        assert len(parsed.ids) == 2 and all(0 <= code < 10 for code in parsed.ids.tolist())
        for problem in parsed.problems:
            problem.encode()  # can be printed
        if parsed.problems:
            with pytest.raises(DataError) as caught:
                form.from_text(text, 2)
            assert parsed.problems[0].startswith(str(caught.value).rpartition(". Refused: ")[0])
        else:
            assert torch.equal(form.from_text(text, 2).ids, parsed.ids)


def test_long_noise_is_read_in_linear_time():
    """Half a million characters each; quadratic work would take hours."""
    for noise in ("<mesh" * 100_000, "<mesh1" * 80_000, "<" * 500_000, "<mesh-start>" * 40_000):
        assert FORMAT.from_text(noise, 4, strict=False, fill=FILL).ids.tolist() == FILL


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 10], "id 1 is 10"),
        ([-1], "id 0 is -1"),
        ([1.5], "integers"),
        ([[1]], "integers"),
        ("12", "sequence"),
        ([2**70], "sequence"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message):
    for write in (FORMAT.to_text, FORMAT.to_vocabulary):
        with pytest.raises(DataError, match=message):
            write(ids)


@pytest.mark.parametrize("fill", [[0, 1], [0, 1, 2, 10]])
def test_a_fill_must_be_an_object(fill):
    with pytest.raises(ValueError, match="fill must be num_tokens = 4"):
        FORMAT.from_text(whole(1, 2, 3, 4), 4, fill=fill)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_id": -1}, "first_id"),
        ({"n_embed": 0}, "n_embed"),
        ({"start_id": 105}, "start_id is 105"),
        ({"end_id": 110}, "both 110"),
        ({"token": "<mesh>"}, "have {} once"),
        ({"token": "<{}{}>"}, "have {} once"),
        ({"token": "{}"}, "run into each other"),
        ({"token": "m1{}"}, "run into each other"),
        ({"start": "<mesh5>"}, "must not be blank or contain a code's word"),
        ({"end": " "}, "must not be blank"),
        ({"end": "<mesh-start>>"}, "one holds"),
    ],
)
def test_words_and_ids_that_could_be_mistaken_are_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TokenFormat(**{"first_id": 100, "n_embed": 10, "start_id": 110, "end_id": 111, **changes})


# --- the octree form ---

OCTREE = Octree((3, 2, 1), 10)
OBJECT = [1, 0, 2, 3, 4, 5]  # values: masks 17, 81 and 5, codes 1 to 5
WORDS = TokenFormat.at(100, 10, OCTREE)  # codes 100 to 109, start 110, end 111, masks 112 to 366


def test_the_octree_has_words_behind_those_of_shapellm():
    words = "<octree17><octree81><octree5><mesh1><mesh2><mesh3><mesh4><mesh5>"
    assert WORDS.to_text(OBJECT) == f"<mesh-start>{words}<mesh-end>"
    assert WORDS.to_vocabulary(OBJECT) == [110, 128, 192, 116, 101, 102, 103, 104, 105, 111]
    assert WORDS.to_text([0] * 6) == "<mesh-start><mesh-end>"
    shapellm = TokenFormat.at(SHAPELLM.first_id, 8192, Octree((16, 16, 4), 8192))
    assert shapellm.vocabulary.items() > SHAPELLM.vocabulary.items()
    assert list(shapellm.vocabulary)[8192:8196] == ["<mesh-start>", "<mesh-end>", "<octree1>", "<octree2>"]
    for form, number in ((SHAPELLM, 8194), (shapellm, 8194 + 255)):
        assert list(form.vocabulary.values()) == list(range(151665, 151665 + number))


@pytest.mark.parametrize("order", ["breadth", "depth"])
@pytest.mark.parametrize(("lattice", "codes"), [((3, 2, 1), 1), ((4, 4, 4), 2), ((16, 16, 4), 1)])
def test_objects_survive_as_text_and_vocabulary_of_the_octree(lattice, codes, order):
    octree = Octree(lattice, 50, codes, order)
    rng = torch.Generator().manual_seed(0)
    for words in (TokenFormat.at(7, 50, octree), TokenFormat(7, 50, 3, 4, "[B]", "[E]", "|v{}", "#{}#", 400, octree)):
        ids_of = words.vocabulary
        for share in (0.0, 0.2, 1.0):
            ids = torch.randint(1, 50, (octree.num_tokens // codes, codes), generator=rng)
            ids = (ids * (torch.rand(len(ids), 1, generator=rng) < share)).reshape(-1)
            text, vocabulary = words.to_text(ids), words.to_vocabulary(ids)
            assert [ids_of[word] for word in re.findall(r"<[^>]*>|\[.\]|\|v\d+|#\d+#", text)] == vocabulary
            for number in (None, octree.num_tokens):
                for strict in (True, False):
                    for parsed in (
                        words.from_text(f"Here: {text}.", number, strict=strict),
                        words.from_vocabulary([1, *vocabulary, 2], number, strict=strict),
                    ):
                        assert torch.equal(parsed.ids, ids) and parsed.problems == []


MASK_WORDS = "<octree17><octree81><octree5>"
STANDS = "the code of the token at (1, 0, 0) must stand there"
BAD_OCTREES = {
    "text between": (
        f"<mesh-start>{MASK_WORDS}{words(1, 2)} and {words(3, 4, 5)}<mesh-end>",
        OBJECT,
        ["'and' stands between the object's words; left out"],
    ),
    "unknown code": (
        f"<mesh-start>{MASK_WORDS}{words(1, 10, 3, 4, 5)}<mesh-end>",
        [1, 0, 1, 3, 4, 5],
        [f"value 4 is '<mesh10>'; {STANDS}; replaced by the nearest token's"],
    ),
    "code 0": (
        f"<mesh-start>{MASK_WORDS}{words(1, 0, 3, 4, 5)}<mesh-end>",
        [1, 0, 1, 3, 4, 5],
        [f"value 4 is '<mesh0>'; {STANDS}; replaced by the nearest token's"],
    ),
    "damaged mask": (
        f"<mesh-start><octree17><octree81><octree-5>{words(1, 2, 3)}<mesh-end>",
        [1, 0, 2, 3, 0, 0],
        [
            "value 2 is '<octree-5>'; the mask of the block of 2³ tokens at (2, 0, 0) must stand there; "
            "the block is taken as empty"
        ],
    ),
    "unknown masks": (
        "<mesh-start><octree17><octree256><octree0><mesh-end>",
        [0] * 6,
        [
            "value 1 is '<octree256>'; the mask of the block of 2³ tokens at (0, 0, 0) must stand there (2 such); "
            "the block is taken as empty"
        ],
    ),
    "cut off": (
        f"<mesh-start>{MASK_WORDS}{words(1, 2)}<me",
        [1, 0, 2, 2, 2, 2],
        [
            "the object breaks off at '<me'; left out",
            "the object has no end",
            "the sequence ends after 5 values, but the code of the token at (1, 1, 0) must follow; "
            "missing blocks are taken as empty, missing codes are the nearest token's",
        ],
    ),
    "surplus": (
        f"<mesh-start>{MASK_WORDS}{words(1, 2, 3, 4, 5, 6, 7)}<mesh-end>",
        OBJECT,
        ["value 8 is '<mesh6>', but the object is complete before it; the last 2 are dropped"],
    ),
    "no start": (
        f"{MASK_WORDS}{words(1, 2, 3, 4, 5)}<mesh-end>",
        OBJECT,
        ["the object has no start before '<octree17>'"],
    ),
    "two objects": (
        f"{whole()}<mesh-start>{MASK_WORDS}{words(1, 2, 3, 4, 5)}<mesh-end>",
        OBJECT,
        ["there are 2 objects, or parts of them; number 2 is read"],
    ),
    "nothing": ("", [0] * 6, ["there is no object in it: neither start nor end nor a code"]),
}


@pytest.mark.parametrize(("text", "repaired", "problems"), BAD_OCTREES.values(), ids=BAD_OCTREES)
def test_a_damaged_octree_is_refused_or_repaired(text, repaired, problems):
    for parsed in (
        WORDS.from_text(text, 6, strict=False, fill=[0] * 6),
        WORDS.from_text(text, None, strict=False),
    ):
        assert parsed.ids.tolist() == repaired and parsed.problems == problems
    with pytest.raises(DataError) as error:
        WORDS.from_text(text, 6)
    assert problems[0].startswith(str(error.value).partition(". Refused: ")[0])


def test_damaged_vocabulary_ids_of_an_octree_are_refused_or_repaired():
    vocabulary = WORDS.to_vocabulary(OBJECT)
    with pytest.raises(DataError, match=r"value 2 is 367; the mask of the block of 2³ tokens at \(2, 0, 0\)"):
        WORDS.from_vocabulary([*vocabulary[:3], 367, *vocabulary[4:]], 6)
    parsed = WORDS.from_vocabulary([*vocabulary[:5], 99, *vocabulary[6:]], 6, strict=False)
    assert parsed.ids.tolist() == [1, 0, 1, 3, 4, 5]
    assert parsed.problems == [f"value 4 is 99; {STANDS}; replaced by the nearest token's"]


def test_the_dense_form_knows_no_octree():
    with pytest.raises(DataError, match="'<octree17>' stands between the object's words"):
        TokenFormat.at(100, 10).from_text("<mesh-start><octree17><mesh1><mesh-end>", 1)


def test_an_octree_of_another_number_of_ids_is_refused():
    with pytest.raises(ValueError, match="num_tokens is 7; the octree's objects have 6 ids"):
        WORDS.from_text("", 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"octree": None}, "octree and first_mask_id go together"),
        ({"first_mask_id": None}, "octree and first_mask_id go together"),
        ({"octree": Octree((3, 2, 1), 11)}, "octree has 11 codes, but n_embed is 10"),
        ({"first_mask_id": -1}, "first_mask_id is -1"),
        ({"first_mask_id": 109}, "109 to 363 must be >= 0 and no ids of the codes"),
        ({"first_mask_id": 0}, "0 to 254 must"),
        ({"first_mask_id": 111}, "111 to 365 must"),
        ({"mask": "<octree>"}, "have {} once"),
        ({"mask": "{}"}, "run into each other"),
        ({"mask": "<mesh{}>"}, "mask is '<mesh{}>'; it must not be blank or contain a code's word (<mesh{}>)"),
        ({"mask": "o{}<mesh7>"}, "contain a code's word"),
        ({"start": "<octree5>"}, "start is '<octree5>'; it must not be blank or contain a mask's word (<octree{}>)"),
    ],
)
def test_words_and_ids_of_masks_that_could_be_mistaken_are_refused(changes, message):
    settings = {"first_id": 100, "n_embed": 10, "start_id": 110, "end_id": 111, "first_mask_id": 112, "octree": OCTREE}
    with pytest.raises(ConfigError, match=re.escape(message)):
        TokenFormat(**{**settings, **changes})
