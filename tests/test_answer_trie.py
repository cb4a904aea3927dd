"""Tries of tokenised answers: every field against a trie made of Python dicts, from every form of input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcalib import ValidSets
from fastcalib.answer_trie import AnswerTrie

from .trie_reference import END, answer_sets, below, next_tokens, prefixes_of

FIELDS = [f.name for f in dataclasses.fields(AnswerTrie)]
ANSWERS = [[5, 1], [7, 1, 3], [5, 2], [7, 1, 0], [6]]
FLAT, OFFSETS = [t for a in ANSWERS for t in a], [0, 2, 5, 7, 10, 11]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def check_against_dicts(trie, answers, weights=None):
    """``answers`` are whole, their end tokens included."""
    nodes = prefixes_of(answers)
    number = {prefix: n for n, prefix in enumerate(nodes)}
    weights = weights or [1.0] * len(answers)
    assert len(trie) == len(nodes) and trie.max_depth == max(map(len, nodes))
    assert trie.parent.tolist() == [-1] + [number[p[:-1]] for p in nodes[1:]]
    assert trie.token.tolist() == [-1] + [p[-1] for p in nodes[1:]]
    assert trie.depth.tolist() == [len(p) for p in nodes]
    assert trie.count.tolist() == [len(below(answers, p)) for p in nodes]
    assert trie.weight.tolist() == pytest.approx([sum(weights[i] for i in below(answers, p)) for p in nodes], rel=1e-12)
    assert trie.answer.tolist() == [answers.index(p) if p in answers else -1 for p in nodes]
    assert trie.first_child.tolist() == [
        1 + sum(len(next_tokens(answers, p)) for p in nodes[:n]) for n in range(len(nodes) + 1)
    ]
    assert trie.inner().tolist() == [n for n, p in enumerate(nodes) if p not in answers]
    assert trie.leaves().tolist() == [n for n, p in enumerate(nodes) if p in answers]
    assert trie.valid_sets().to_lists() == [next_tokens(answers, p) for p in nodes if p not in answers]
    assert all(getattr(trie, name).dtype == torch.int64 for name in FIELDS if name != "weight")
    assert trie.weight.dtype == torch.float64
    return nodes, number


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(answer_sets(), st.sampled_from([1, 1 << 25, 1 << 40]), st.data())
def test_against_dicts(answers, spread, data):
    """Ids far apart take the path without a table of the vocabulary."""
    answers = [tuple(t * spread for t in a) for a in answers]
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(answers), max_size=len(answers)))
    trie = AnswerTrie.from_token_ids([list(a) for a in answers], end_token=END, weights=weights)
    nodes, number = check_against_dicts(trie, [(*a, END) for a in answers], weights)
    for prefix, node in number.items():
        assert trie.find(prefix) == node and trie.prefix(node) == list(prefix)
    assert trie.find([spread * 3, 4]) == number.get((spread * 3, 4))
    chosen = data.draw(st.lists(st.integers(0, len(nodes) - 1), max_size=6))
    want = [next_tokens([(*a, END) for a in answers], nodes[n]) for n in chosen]
    assert trie.valid_sets(chosen).to_lists() == want
    children = [number[(*nodes[n], t)] for n, tokens in zip(chosen, want) for t in tokens]
    assert trie.children(chosen).tolist() == children
    assert trie.child_counts(torch.tensor(chosen, dtype=torch.int64)).tolist() == trie.count[children].tolist()
    assert trie.child_weights(chosen).tolist() == trie.weight[children].tolist()


def test_words_too_long_for_one_key():
    """50,000 distinct ids take 16 bits each: 63 bits hold three of up to twelve tokens, or fewer and a group."""
    generator = np.random.default_rng(1)
    answers = {
        tuple(
            np.where(generator.random(n) < 0.8, generator.integers(0, 3, n), generator.integers(0, 50_000, n)).tolist()
        )
        for n in generator.integers(1, 12, 2_500)
    }
    answers |= {(i,) for i in range(0, 50_000, 97)}
    answers = list(answers)
    trie = AnswerTrie.from_token_ids(answers, end_token=50_000)
    assert int(trie.token.max()) == 50_000 and trie.max_depth == 12
    whole = sorted((*a, 50_000) for a in answers)
    nodes = sorted({a[:n] for a in whole for n in range(len(a) + 1)}, key=lambda p: (len(p), p))
    assert [tuple(trie.prefix(n)) for n in range(len(trie))] == nodes
    leaves = trie.leaves()
    assert [(*answers[i], 50_000) for i in trie.answer[leaves].tolist()] == [nodes[n] for n in leaves.tolist()]


def test_default_sets_line_up_with_the_nodes():
    trie = AnswerTrie.from_token_ids(ANSWERS)
    assert trie.valid_sets().values.tolist() == trie.token[1:].tolist()
    assert trie.child_counts().tolist() == trie.count[1:].tolist()
    assert trie.child_weights().tolist() == trie.weight[1:].tolist()
    assert trie.children().tolist() == list(range(1, len(trie)))
    assert trie.valid_sets(trie.inner()).to_lists() == trie.valid_sets().to_lists()
    assert trie.levels().tolist() == [0, 1, 4, 7, 9]
    assert trie.valid_sets(trie.leaves()).to_lists() == [[]] * 5
    assert repr(trie) == "AnswerTrie(5 answers, 9 nodes, 4 prefixes, depth 3)"


@pytest.mark.parametrize("bad", [[9], [-1], [[0]], torch.tensor(0)])
def test_nodes_that_are_none(bad):
    with pytest.raises(ValueError, match=r"nodes must be \(n,\) numbers from 0 to 8"):
        AnswerTrie.from_token_ids(ANSWERS).valid_sets(bad)


FORMS = {
    "iterator": lambda: iter(ANSWERS),
    "tuples and ranges": lambda: [(5, 1), (7, 1, 3), [5, 2], np.array([7, 1, 0]), range(6, 7)],
    "tensors": lambda: [torch.tensor(a) for a in ANSWERS],
    "pair of tensors": lambda: (torch.tensor(FLAT), torch.tensor(OFFSETS)),
    "pair of arrays": lambda: (np.array(FLAT, np.int32), np.array(OFFSETS, np.uint32)),
    "strided pair": lambda: (torch.tensor(FLAT).repeat_interleave(2)[::2], torch.tensor(OFFSETS)),
    "sets": lambda: ValidSets.from_lists(ANSWERS),
    "arrow": lambda: pa.array(ANSWERS),
    "arrow int16": lambda: pa.array(ANSWERS, pa.list_(pa.int16())),
    "arrow large": lambda: pa.array(ANSWERS, pa.large_list(pa.uint32())),
    "arrow view": lambda: pa.array(ANSWERS, pa.list_view(pa.int64())),
    "arrow slice": lambda: pa.array([[8, 8], *ANSWERS, [9]]).slice(1, 5),
    "arrow chunks": lambda: pa.chunked_array([pa.array([[0], *ANSWERS[:2]])[1:], pa.array(ANSWERS[2:])]),
    "arrow empty chunk": lambda: pa.chunked_array([pa.array([], pa.list_(pa.int64())), pa.array(ANSWERS)]),
    "table column": lambda: pa.table({"ids": ANSWERS})["ids"],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input(form):
    trie = AnswerTrie.from_token_ids(FORMS[form]())
    check_against_dicts(trie, [tuple(a) for a in ANSWERS])
    assert same(trie, AnswerTrie.from_token_ids(ANSWERS))


def test_arrow_lists_of_one_size_and_views_with_gaps():
    fixed = pa.array([[9, 9], [5, 1], [5, 2], [7, 1]], pa.list_(pa.int64(), 2)).slice(1)
    want = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1]])
    assert same(AnswerTrie.from_token_ids(fixed), want)
    view = pa.ListViewArray.from_arrays(pa.array([4, 0, 2]), pa.array([2, 2, 2]), pa.array([5, 2, 7, 1, 5, 1]))
    assert same(AnswerTrie.from_token_ids(view), want)


@pytest.mark.parametrize(
    "answers, error, words",
    [
        ([], ValueError, "there are no answers"),
        ([[1], []], ValueError, "answer 1 is empty; .* end_token"),
        ([[4], [1, 2], [3], [1, 2]], ValueError, r"answers 1 and 3 are the same, \[1, 2\]; .*merge"),
        ([[4], [1, 2, 3], [1, 2]], ValueError, r"answer 2, \[1, 2\], is the beginning of answer 1, \[1, 2, 3\]"),
        ([[4], [1, -2]], ValueError, "answer 1 holds the id -2"),
        ([[4], [1.5]], TypeError, r"answer 1 must be a sequence of integers \(token ids\), got \[1.5\]"),
        ([[4], 7], TypeError, "answer 1 must be a sequence of integers"),
        (["Texas"], TypeError, "answer 0 must be a sequence of integers .*'Texas'"),
        ((torch.ones(2), torch.tensor([0, 2])), TypeError, r"values must be integers.*float32 \(2,\)"),
        ((torch.tensor([1, 2]), torch.tensor([0, 1])), ValueError, r"end at the number of values \(2\)"),
        ((torch.tensor([1, 2]), torch.tensor([1, 2])), ValueError, "start at 0"),
        ((torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1, 3])), ValueError, "never decrease"),
        (pa.array([[1], None]), ValueError, "answer 1 is null"),
        (pa.chunked_array([[[1]], [[2, 3], [4, None]]]), ValueError, "answer 2 holds a null"),
        (pa.array([[1.0]]), TypeError, r"lists of integers, got one of list<.*double>"),
        (pa.array([1, 2]), TypeError, "lists of integers, got one of int64"),
        (pa.table({"ids": [[1]]}), TypeError, r"take one of its columns: table\['name'\]"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_answers(answers, error, words):
    with pytest.raises(error, match=words):
        AnswerTrie.from_token_ids(answers)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"end_token": 7}, "answer 1 holds the end token 7 already"),
        ({"end_token": -1}, "end_token must be a token id >= 0 or None, got -1"),
        ({"end_token": True}, "end_token must be"),
        ({"weights": [1.0] * 4}, "one positive, finite number for each of the 5 answers"),
        ({"weights": [1.0, 1.0, 0.0, 1.0, 1.0]}, "positive"),
        ({"weights": [1.0, 1.0, float("nan"), 1.0, 1.0]}, "finite"),
        ({"duplicates": "drop"}, 'must be "error" or "merge"'),
        ({"answer_index": [0, 1, 2]}, "answer_index must be one integer >= 0 for each of the 5"),
        ({"answer_index": [0, 1, 2, -3, 4]}, "answer_index"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        AnswerTrie.from_token_ids(ANSWERS, **options)


def test_merged_duplicates():
    answers = [[3, 1], [2], [3, 1], [2], [3, 4], [3, 1]]
    trie = AnswerTrie.from_token_ids(answers, duplicates="merge")
    assert trie.count.tolist() == trie.weight.tolist() == [3, 1, 2, 1, 1]
    assert trie.answer.tolist() == [-1, 1, -1, 0, 4]
    weighted = AnswerTrie.from_token_ids(answers, duplicates="merge", weights=[1, 2, 4, 8, 16, 32])
    assert weighted.count.tolist() == trie.count.tolist()
    assert weighted.weight.tolist() == [63, 10, 53, 37, 16]
    distinct = AnswerTrie.from_token_ids(ANSWERS, duplicates="merge")
    assert same(distinct, AnswerTrie.from_token_ids(ANSWERS))


def test_sequences_of_one_answer():
    trie = AnswerTrie.from_token_ids([[1, 2], [3], [4]], answer_index=[0, 0, 7])
    assert trie.answer.tolist() == [-1, -1, 0, 7, 0] and trie.n_answers == 2 and trie.count[0] == 3


def test_input_is_not_written_to_and_the_trie_shares_none_of_it():
    values, offsets = torch.tensor([5, 1, 5, 2]), torch.tensor([0, 2, 4])
    trie = AnswerTrie.from_token_ids((values, offsets))
    values.zero_(), offsets.zero_()
    assert same(trie, AnswerTrie.from_token_ids([[5, 1], [5, 2]]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        trie.count = values
