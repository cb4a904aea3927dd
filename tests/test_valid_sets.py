"""ValidSets: every converter gives the same sets, and what is no family of sets is refused in words."""

from __future__ import annotations

import dataclasses

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


def test_jagged():
    parts = [torch.tensor([5, 1]), torch.tensor([], dtype=torch.long), torch.tensor([2])]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert ValidSets.from_jagged(nested).to_lists() == [[5, 1], [], [2]]
    padded = torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9]])
    holes = torch.nested.narrow(padded, 1, torch.tensor([0, 0]), torch.tensor([3, 1]), layout=torch.jagged)
    assert ValidSets.from_jagged(holes).to_lists() == [[1, 2, 3], [4]]
    with pytest.raises(TypeError, match=r"layout=torch\.jagged"):
        ValidSets.from_jagged(torch.zeros(2, 2))


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
