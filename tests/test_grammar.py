"""What a language model writes under the grammar is a whole object, whatever it would rather write."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from trellis.tokens.grammar import Grammar
from trellis.tokens.octree import Octree
from trellis.tokens.text import TokenFormat
from trellis.utils.errors import ConfigError, DataError

FIRST, K = 20, 12
PAD, EOS = 0, 1
DENSE = TokenFormat.at(FIRST, K)
BREADTH = TokenFormat.at(FIRST, K, Octree((3, 2, 4), K, 2))
DEPTH = TokenFormat.at(FIRST, K, Octree((3, 2, 4), K, 1, "depth"))
V = FIRST + K + 2 + 255 + 5  # some ids behind the words
FORMS = pytest.mark.parametrize(
    ("words", "number"), [(DENSE, 9), (BREADTH, None), (DEPTH, None)], ids=["dense", "breadth", "depth"]
)


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.5,  # preferences that differ
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(model, prompts: list[list[int]], processors: list, **options) -> Tensor:
    from transformers import LogitsProcessorList

    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processors = LogitsProcessorList(processors)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=300, logits_processor=processors, **{"do_sample": False, **options}
    )
    return output[:, width:]


def read(words: TokenFormat, number: int | None, prompt: list[int], answer: Tensor) -> Tensor:
    """The ids of the object that a prompt began, read strictly; what follows is eos and padding."""
    answer = answer.tolist()
    length = answer.index(words.end_id) + 1
    assert answer[length] == EOS and set(answer[length:]) <= {EOS, PAD}
    start = len(prompt) - 1 - prompt[::-1].index(words.start_id) if words.start_id in prompt else len(prompt)
    return words.from_vocabulary((prompt + answer[:length])[start:], number).ids


def prompts_of(words: TokenFormat, number: int | None) -> list[list[int]]:
    """Prompts of different lengths: an object is begun, or well under way, or a whole one comes before."""
    whole = words.to_vocabulary([3] * (number or words.octree.num_tokens))
    return [[words.start_id], [5, 6, 7, words.start_id], [9, *whole, 8, words.start_id], [4, *whole[:4]], whole[:-1]]


@FORMS
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {},
    ],
    ids=["sample", "beams", "sampled beams", "greedy"],
)
def test_a_random_model_writes_whole_objects(model, words, number, options):
    torch.manual_seed(0)
    prompts = prompts_of(words, number)
    answers = generate(model, prompts, [Grammar(words, number, eos_id=EOS)], **options)
    repeats = len(answers) // len(prompts)
    objects = [
        read(words, number, prompt, answer)
        for prompt, several in zip(prompts, answers.view(len(prompts), repeats, -1), strict=True)
        for answer in several
    ]
    assert len({tuple(ids.tolist()) for ids in objects}) > 1


class Preference:
    """A model's wish for some ids, above anything else."""

    def __init__(self, *wanted: int):
        self.wanted = list(wanted)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.wanted] += 1e4
        return scores


@FORMS
@pytest.mark.parametrize("wish", ["end", "start", "eos", "noise", "code 0", "mask 255", "mask 128"])
def test_no_wish_of_the_model_breaks_an_object(model, words, number, wish):
    wanted = {
        "end": [words.end_id],
        "start": [words.start_id],
        "eos": [EOS],
        "noise": [2, 3, V - 1],
        "code 0": [FIRST],
        "mask 255": [V - 6],
        "mask 128": [V - 6 - 127],
    }[wish]
    prompts = prompts_of(words, number)
    answers = generate(model, prompts, [Preference(*wanted), Grammar(words, number, eos_id=EOS)])
    objects = [read(words, number, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    if words.octree and wish == "end":
        assert not objects[0].any()  # the empty object, which may end at once


def allowed(grammar: Grammar, *rows: list[int]) -> list[set[int]]:
    """The ids that each row may go on with."""
    scores = grammar(torch.tensor(rows), torch.zeros(len(rows), V))
    assert set(scores.unique().tolist()) <= {0.0, -torch.inf}
    return [set(row.nonzero()[:, 0].tolist()) for row in scores == 0]


@FORMS
def test_an_object_may_go_on_exactly_with_what_keeps_it_readable(words, number):
    """Among all ids at every place, those allowed are the ones after which reading does not fail before the end."""
    total = number or words.octree.num_tokens
    ids = torch.randint(1, K, (total,), generator=torch.Generator().manual_seed(0))
    whole, grammar = words.to_vocabulary(ids), Grammar(words, number, eos_id=EOS)

    def keeps_readable(prefix: list[int], value: int) -> bool:
        try:
            words.from_vocabulary([*prefix, value] + [words.end_id] * (value != words.end_id), number)
        except DataError as error:
            short = re.search(r"the sequence ends after|the object has (\d+) ids, not", str(error))
            return value != words.end_id and bool(short) and int(short[1] or 0) < total
        return True

    for length in [1, 2, 3, 4, len(whole) // 2, len(whole) - 2, len(whole) - 1]:
        prefix = whole[:length]
        assert allowed(grammar, [7, *prefix])[0] == {value for value in range(V) if keeps_readable(prefix, value)}


def test_what_comes_before_and_behind_an_object():
    whole, everything = DENSE.to_vocabulary([3] * 9), set(range(V))
    for eos, start in ((None, False), (EOS, False), (None, True), (EOS, True)):
        grammar = Grammar(DENSE, 9, eos_id=eos, force_start=start)
        outside = {DENSE.start_id} if start else everything
        prompt, ended, answered = allowed(grammar, [5] * 12, [5, *whole], [*whole, 5])
        assert prompt == answered == outside
        assert ended == ({EOS} if eos is not None else outside)


def test_rows_may_change_places_and_processors_be_used_again():
    """The answers are those of a fresh processor for each call."""
    rng = np.random.default_rng(0)
    octree, rows = BREADTH.octree, []
    for _ in range(6):
        codes = rng.integers(1, K, (24, 2)) * (rng.random((24, 1)) < 0.5)
        rows.append(BREADTH.to_vocabulary(codes.reshape(-1).tolist()))
    assert octree is not None
    grammar = Grammar(BREADTH)
    for length in range(1, min(map(len, rows)) - 1):
        order = rng.permutation(6)
        prefixes = [rows[i][:length] for i in order]
        assert allowed(grammar, *prefixes) == [allowed(Grammar(BREADTH), prefix)[0] for prefix in prefixes]
    assert allowed(grammar, rows[0][:2]) == allowed(Grammar(BREADTH), rows[0][:2])


def test_a_row_that_leaves_the_grammar_is_let_go():
    """As beams of probability 0 do, and rows that stopped and are padded."""
    grammar = Grammar(DENSE, 9)
    for row in ([DENSE.start_id], [DENSE.start_id, PAD], [DENSE.start_id, PAD, PAD]):
        ids = allowed(grammar, row)[0]
    assert ids == set(range(V))


def test_bad_input_is_refused():
    with pytest.raises(DataError, match=f"row 1: id 2 behind the start is {PAD}, but a code from 0 to 11 must stand"):
        allowed(Grammar(DENSE, 9), [5, DENSE.start_id, FIRST, FIRST, FIRST], [DENSE.start_id, FIRST, FIRST, PAD, PAD])
    with pytest.raises(DataError, match=r"row 0: id 0 .* is 21, but the mask of the block of 4³ tokens at \(0, 0, 0\)"):
        allowed(Grammar(BREADTH), [BREADTH.start_id, FIRST + 1])
    with pytest.raises(ConfigError, match="the model has scores for 100 ids, but the words have ids up to 288"):
        Grammar(BREADTH)(torch.tensor([[5]]), torch.zeros(1, 100))
    for words, number in ((DENSE, None), (DENSE, 0), (BREADTH, 24)):
        with pytest.raises(ConfigError, match=f"num_tokens is {number}"):
            Grammar(words, number)


@FORMS
def test_each_id_is_looked_at_once(model, monkeypatch, words, number):
    """Long objects cost no more a step than short ones: rows are read from their starts in the first step alone."""
    replayed = []
    replay = Grammar._replayed
    monkeypatch.setattr(Grammar, "_replayed", lambda self, *args: replayed.append(args) or replay(self, *args))
    grammar = Grammar(words, number, eos_id=EOS)
    for options in ({"do_sample": True}, {"num_beams": 4}):
        generate(model, [[words.start_id], [5, words.start_id]], [grammar], **options)
        assert len(replayed) == 2 * options.get("num_beams", 1)
        replayed.clear()


def test_the_codes_of_a_dense_token_are_all_empty_or_none_is():
    """After a token's first code the others are decided as far: 0 after 0, and no 0 after another."""
    grammar = Grammar(DENSE, 6, codes_per_token=3)
    allowed = {(): range(K), (0,): [0], (0, 0): [0], (0, 0, 0): range(K), (5,): range(1, K), (5, 1): range(1, K)}
    for codes, wanted in allowed.items():
        row = torch.tensor([[DENSE.start_id, *(FIRST + code for code in codes)]])
        scores = grammar(row, torch.zeros(1, V))
        assert scores.isfinite().nonzero()[:, 1].tolist() == [FIRST + code for code in wanted]
    with pytest.raises(DataError, match="id 1 behind the start is 20, but a code from 1 to 11 must stand there"):
        Grammar(DENSE, 6, codes_per_token=3)(torch.tensor([[DENSE.start_id, FIRST + 5, FIRST]]), torch.zeros(1, V))
