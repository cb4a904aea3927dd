"""ValidSets: every converter gives the same sets, and what is no family of sets is refused in words."""

from __future__ import annotations

import dataclasses
import sys

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcalib
from fastcalib import ValidSets

SETS = [[0, 31, 32], [], [7], [63, 1]]


def mask_of(sets, v):
    mask = torch.zeros(len(sets), v, dtype=torch.bool)
    for row, ids in zip(mask, sets):
        row[ids] = True
    return mask


def bitmask_of(sets, v):
    """Packed as grammar engines do: bit v & 31 of the int32 word v >> 5."""
    words = [[0] * ((v + 31) // 32) for _ in sets]
    for row, ids in zip(words, sets):
        for i in ids:
            row[i >> 5] |= 1 << (i & 31)
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # wraps into the sign bit


def test_lists_there_and_back():
    sets = ValidSets.from_lists(SETS)
    assert sets.to_lists() == SETS and len(sets) == 4
    assert sets.counts().tolist() == [3, 0, 1, 2] and sets.rows().tolist() == [0, 0, 0, 2, 3, 3]
    assert sets.values.dtype == sets.offsets.dtype == torch.int64
    assert ValidSets.from_lists(iter([(1, 2), range(3)])).to_lists() == [[1, 2], [0, 1, 2]]
    assert ValidSets.from_lists([]).to_lists() == [] and ValidSets.from_lists([[]]).to_lists() == [[]]


@pytest.mark.parametrize("v", [64, 65, 70, 96])
def test_masks(v):
    want = [sorted(s) for s in SETS]
    assert ValidSets.from_mask(mask_of(SETS, v)).to_lists() == want
    assert ValidSets.from_bitmask(bitmask_of(SETS, v), v).to_lists() == want
    assert ValidSets.from_mask(mask_of(SETS, v).reshape(2, 2, v)).to_lists() == want
    assert ValidSets.from_bitmask(bitmask_of(SETS, v).reshape(2, 2, -1), v).to_lists() == want
    assert ValidSets.from_mask(torch.zeros(0, 5, dtype=torch.bool)).to_lists() == []
    assert ValidSets.from_mask(torch.ones(3, dtype=torch.bool)).to_lists() == [[0, 1, 2]]


def test_a_bitmask_is_longer_than_the_vocabulary():
    """The engine's mask is sized by the padded logits, the tokenizer has fewer tokens: bits beyond are no tokens."""
    full = torch.full((2, 4), -1, dtype=torch.int32)
    assert ValidSets.from_bitmask(full, 70).to_lists() == [list(range(70))] * 2
    with pytest.raises(TypeError, match=r"int32 tensor \(\*, 5\) for vocab_size=130, got torch\.int32 \(2, 4\)"):
        ValidSets.from_bitmask(full, 130)
    with pytest.raises(TypeError, match="int64"):
        ValidSets.from_bitmask(full.long(), 70)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 140).flatmap(
        lambda v: st.tuples(st.just(v), st.lists(st.sets(st.integers(0, v - 1)), min_size=1, max_size=5))
    )
)
def test_converters_agree(drawn):
    v, sets = drawn
    lists = [sorted(s) for s in sets]
    assert ValidSets.from_lists(lists).to_lists() == lists
    assert ValidSets.from_mask(mask_of(lists, v)).to_lists() == lists
    assert ValidSets.from_bitmask(bitmask_of(lists, v), v).to_lists() == lists
    assert torch.equal(ValidSets.from_lists(lists).to_mask(v), mask_of(lists, v))
    assert torch.equal(ValidSets.from_lists(lists).to_bitmask(v), bitmask_of(lists, v))


def test_jagged():
    parts = [torch.tensor([5, 1]), torch.tensor([], dtype=torch.long), torch.tensor([2])]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert ValidSets.from_jagged(nested).to_lists() == [[5, 1], [], [2]]
    padded = torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9]])
    holes = torch.nested.narrow(padded, 1, torch.tensor([0, 0]), torch.tensor([3, 1]), layout=torch.jagged)
    assert ValidSets.from_jagged(holes).to_lists() == [[1, 2, 3], [4]]
    with pytest.raises(TypeError, match=r"layout=torch\.jagged"):
        ValidSets.from_jagged(torch.zeros(2, 2))


@pytest.mark.parametrize("v", [64, 65, 96, 100])
def test_back_to_masks(v):
    sets = ValidSets.from_lists(SETS)
    assert torch.equal(sets.to_mask(v), mask_of(SETS, v)) and torch.equal(sets.to_bitmask(v), bitmask_of(SETS, v))
    assert sets.to_bitmask(v).dtype == torch.int32 and sets.to_bitmask(v).shape == (4, (v + 31) // 32)
    full = ValidSets.from_lists([range(v)])
    assert torch.equal(full.to_bitmask(v), bitmask_of([range(v)], v))
    none = ValidSets.from_lists([])
    assert none.to_mask(v).shape == (0, v) and none.to_bitmask(v).shape == (0, (v + 31) // 32)


@pytest.mark.parametrize("to", ["to_mask", "to_bitmask"])
def test_masks_that_are_too_small(to):
    with pytest.raises(ValueError, match=f"{to}: token id 63 does not fit into vocab_size=63"):
        getattr(ValidSets.from_lists(SETS), to)(63)
    with pytest.raises(ValueError, match="vocab_size must be a positive int, got 0"):
        getattr(ValidSets.from_lists(SETS), to)(0)


def test_arrow():
    column = pa.array([[1], *SETS, [2, 2]])  # outside the slice ids may be anything
    assert ValidSets.from_arrow(column.slice(1, 4)).to_lists() == SETS
    chunks = pa.chunked_array([column[1:3], column[3:3], column[3:5]])
    assert ValidSets.from_arrow(chunks).to_lists() == SETS
    assert ValidSets.from_arrow(pa.array(SETS, pa.large_list(pa.int32()))).to_lists() == SETS
    assert ValidSets.from_arrow(pa.chunked_array([], pa.list_(pa.int64()))).to_lists() == []
    with pytest.raises(ValueError, match=r"from_arrow: set 2 is null; drop such rows"):
        ValidSets.from_arrow(pa.chunked_array([[[1], [2]], [None]]))
    with pytest.raises(ValueError, match="token id 2 stands twice in set 5"):
        ValidSets.from_arrow(column)
    with pytest.raises(TypeError, match="from_arrow: needs a column of lists of integers, got one of string"):
        ValidSets.from_arrow(pa.array(["1"]))
    with pytest.raises(TypeError, match="from_arrow: needs a pyarrow array or column of lists, got list"):
        ValidSets.from_arrow([[1]])


def test_arrow_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="from_arrow reads pyarrow columns and needs pyarrow: pip install pyarrow"):
        ValidSets.from_arrow([[1]])


def test_prefix_allowed_tokens_fn():
    calls = []

    def allowed(batch_id, input_ids):
        calls.append((batch_id, input_ids.tolist()))
        return [[4, 1], torch.tensor([7]), (), range(2)][len(calls) - 1]

    ids = torch.tensor([[5, 1], [5, 2], [6, 1], [6, 2]])
    sets = ValidSets.from_prefix_allowed_tokens_fn(allowed, ids, num_beams=2)
    assert sets.to_lists() == [[4, 1], [7], [], [0, 1]]
    assert calls == [(0, [5, 1]), (0, [5, 2]), (1, [6, 1]), (1, [6, 2])]
    ragged = ValidSets.from_prefix_allowed_tokens_fn(lambda _, ids: ids, [[3, 1], torch.tensor([2]), []])
    assert ragged.to_lists() == [[3, 1], [2], []]
    with pytest.raises(TypeError, match=r"answer 0 must be a sequence of integers \(token ids\), got None"):
        ValidSets.from_prefix_allowed_tokens_fn(lambda _, ids: None, ids)
    with pytest.raises(ValueError, match="token id 1 stands twice in set 0"):
        ValidSets.from_prefix_allowed_tokens_fn(lambda _, ids: [1, 1], ids)
    with pytest.raises(ValueError, match="num_beams must be a positive int, got 0"):
        ValidSets.from_prefix_allowed_tokens_fn(allowed, ids, num_beams=0)


def test_the_same_sets_as_transformers_lets_through():
    generation = pytest.importorskip("transformers.generation.logits_process")

    def allowed(batch_id, input_ids):
        return [int(input_ids[-1]), 10 + batch_id]

    ids = torch.tensor([[5, 1], [5, 2], [6, 1], [6, 2]])
    scores = generation.PrefixConstrainedLogitsProcessor(allowed, num_beams=2)(ids, torch.zeros(4, 20))
    sets = ValidSets.from_prefix_allowed_tokens_fn(allowed, ids, num_beams=2)
    assert torch.equal(sets.to_mask(20), scores == 0)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=5), st.sampled_from([1, 2**40, 2**60]))
def test_an_id_twice_is_found_wherever_it_stands(sets, spread):
    """In sets that rise, where no sort is needed, in others, and where (set, id) fits into no 64 bits."""
    sets = [[i * spread for i in s] for s in sets]
    wrong = [(row, min(i for i in s if s.count(i) > 1)) for row, s in enumerate(sets) if len(set(s)) < len(s)]
    if not wrong:
        assert ValidSets.from_lists(sets).to_lists() == sets
        return
    with pytest.raises(ValueError, match=f"token id {wrong[0][1]} stands twice in set {wrong[0][0]}$"):
        ValidSets.from_lists(sets)


@pytest.mark.parametrize(
    "values, offsets, error, words",
    [
        ([1, 2], [0, 1], ValueError, r"end at the number of values \(2\)"),
        ([1, 2], [1, 2], ValueError, "start at 0"),
        ([1, 2, 3], [0, 2, 1, 3], ValueError, "never decrease"),
        ([1, 2], [], ValueError, "start at 0"),
        ([1, -2], [0, 2], ValueError, r"values\[1\] is -2"),
        ([3, 1, 3], [0, 3], ValueError, "token id 3 stands twice in set 0"),
        ([1, 0, 0], [0, 1, 3], ValueError, "token id 0 stands twice in set 1"),
        ([[1, 2]], [0, 2], ValueError, r"one dimension.*\(1, 2\)"),
        ([1.0, 2.0], [0, 2], TypeError, "values must be int64 or int32.*float32"),
    ],
)
def test_what_is_no_family_of_sets(values, offsets, error, words):
    with pytest.raises(error, match=words):
        ValidSets(torch.tensor(values), torch.tensor(offsets, dtype=torch.int64))


def test_the_same_id_in_two_sets_is_fine():
    assert ValidSets.from_lists([[3], [3], [3, 4]]).to_lists() == [[3], [3], [3, 4]]


def test_int32_and_strided_tensors():
    values = torch.tensor([1, 9, 2, 9, 3, 9], dtype=torch.int32)[::2]
    sets = ValidSets(values, torch.tensor([0, 1, 3], dtype=torch.int32))
    assert sets.to_lists() == [[1], [2, 3]] and sets.values.is_contiguous()


def test_frozen_and_movable():
    sets = ValidSets.from_lists(SETS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sets.values = torch.zeros(1)  # type: ignore[misc]
    assert sets.to("cpu").to_lists() == SETS
    with pytest.raises(TypeError, match=r"from_mask.*float32"):
        ValidSets.from_mask(torch.zeros(2, 3))


def test_every_form_of_the_same_sets_gives_the_same_ranks(backend):
    logits = torch.randn(4, 64)
    ordered = [sorted(s) for s in SETS]
    results = [
        fastcalib.ranks(logits, sets, temperature=1.0, backend=backend)
        for sets in (ValidSets.from_lists(ordered), ValidSets.from_mask(mask_of(SETS, 64)),
                     ValidSets.from_bitmask(bitmask_of(SETS, 64), 64))
    ]  # fmt: skip
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    dense = fastcalib.ranks(logits, torch.arange(64).expand(4, 64), temperature=1.0, backend=backend)
    for ids, row, part in zip(ordered, dense.n_greater, results[0].n_greater.split([len(s) for s in ordered])):
        assert row[ids].tolist() == part.tolist()
