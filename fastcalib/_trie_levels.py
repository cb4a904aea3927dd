"""From token sequences to the levels of their trie: numpy alone, a few passes over the tokens, no loop over answers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass
class Levels:
    """The nodes of a trie in breadth-first order; see :class:`fastcalib.AnswerTrie` for each field."""

    token: Ints
    parent: Ints
    count: Ints
    weight: NDArray[np.float64]
    depth: Ints
    answer: Ints


def append_token(values: Ints, offsets: Ints, token: int) -> tuple[Ints, Ints]:
    """Every sequence with one more token at its end."""
    new_offsets = offsets + np.arange(offsets.size)
    longer = np.empty(new_offsets[-1], np.int64)
    inside = np.ones(longer.size, bool)
    inside[new_offsets[1:] - 1] = False
    longer[inside] = values
    longer[~inside] = token
    return longer, new_offsets


def lexicographic_order(values: Ints, offsets: Ints) -> Ints:
    """The permutation that sorts the sequences as words of a dictionary; equal ones in no particular order."""
    lengths = np.diff(offsets)
    codes, bits = _dense_codes(values)
    order = np.arange(lengths.size)
    # Sequences that agree so far form groups; `tied` are the places in the order where groups of two or more stand. A
    # sort of (group, next tokens), as many tokens as 63 bits hold, splits them; whoever is alone in a group is done.
    tied, group, depth = order.copy(), np.zeros(order.size, np.int64), 0
    while tied.size:
        sequence = order[tied]
        start, length = offsets[sequence], lengths[sequence]
        key = group
        for _ in range(max(1, (63 - int(group[-1]).bit_length()) // bits)):
            place = np.minimum(start + depth, codes.size - 1)
            key = (key << bits) | np.where(depth < length, codes[place], 0)  # 0, the end, comes before any token
            depth += 1
            if depth >= length.max():
                break
        by_key = np.argsort(key)
        key, sequence, length = key[by_key], sequence[by_key], length[by_key]
        order[tied] = sequence
        first = np.append(True, key[1:] != key[:-1])
        last = np.append(first[1:], True)
        # A sequence of just this length stays: it may have to come before longer ones of its group.
        again = ~(first & last) & (length >= depth)
        tied, group = tied[again], np.cumsum(first[again]) - 1
    return order


def _dense_codes(values: Ints) -> tuple[NDArray[np.int32], int]:
    """The rank, from 1, of each token among those that occur, and the bits that such a rank needs."""
    if not values.size:
        return np.zeros(1, np.int32), 1
    largest = int(values.max())
    if largest < (1 << 24):  # a table of the vocabulary is cheaper than a sort
        occurs = np.zeros(largest + 1, bool)
        occurs[values] = True
        rank = np.cumsum(occurs, dtype=np.int32)
        return rank[values], int(rank[-1]).bit_length()
    distinct, inverse = np.unique(values, return_inverse=True)
    return (inverse + 1).astype(np.int32), int(distinct.size).bit_length()


def equal_to_previous(values: Ints, offsets: Ints, order: Ints) -> NDArray[np.bool_]:
    """For each place in a lexicographic order: is the sequence equal to the one before it?"""
    lengths, starts = np.diff(offsets)[order], offsets[order]
    places = 1 + np.flatnonzero(lengths[1:] == lengths[:-1])
    depth = 0
    equal = np.zeros(order.size, bool)
    while places.size:
        ended = lengths[places] <= depth
        equal[places[ended]] = True
        places = places[~ended]
        places = places[values[starts[places] + depth] == values[starts[places - 1] + depth]]
        depth += 1
    return equal


def build_levels(values: Ints, offsets: Ints, order: Ints, answer: Ints, weight: NDArray[np.float64] | None) -> Levels:
    """The trie of distinct, non-empty sequences.

    Args:
        values, offsets: the sequences.
        order: their lexicographic order.
        answer, weight: of each place in that order.

    Raises:
        PrefixOfAnother: a sequence ends where others go on.
    """
    lengths, starts = np.diff(offsets)[order], offsets[order]
    columns: dict[str, list[Any]] = {f.name: [] for f in fields(Levels)}

    def add(**level: Any) -> None:
        for name, column in level.items():
            columns[name].append(column)

    total = float(order.size) if weight is None else weight.sum(keepdims=True)
    minus_one = np.full(1, -1)
    add(token=minus_one, parent=minus_one, count=np.array([order.size]), depth=np.zeros(1, np.int64), answer=minus_one)
    add(weight=np.atleast_1d(total))
    place, parent, nodes, depth = np.arange(order.size), np.zeros(order.size, np.int64), 1, 0
    while place.size:
        token = values[starts[place] + depth]
        depth += 1
        new = np.append(True, (token[1:] != token[:-1]) | (parent[1:] != parent[:-1]))
        first = np.flatnonzero(new)
        count = np.diff(first, append=place.size)
        ends = lengths[place] == depth
        at_first = ends[first]  # a shorter sequence comes first
        if (count[at_first] > 1).any():
            at = first[at_first][np.flatnonzero(count[at_first] > 1)[0]]
            raise PrefixOfAnother(int(order[place[at]]), int(order[place[at + 1]]))
        add(token=token[new], parent=parent[new], count=count, depth=np.full(first.size, depth))
        add(answer=np.where(at_first, answer[place[first]], -1))
        add(weight=count.astype(np.float64) if weight is None else np.add.reduceat(weight[place], first))
        node = nodes + np.cumsum(new) - 1
        nodes += first.size
        place, parent = place[~ends], node[~ends]
    # Each column's parts go as soon as it is whole: both together are several gigabytes for millions of answers.
    return Levels(**{name: np.concatenate(columns.pop(name)) for name in [*columns]})


class PrefixOfAnother(Exception):
    """Sequence ``args[0]`` is a proper prefix of sequence ``args[1]``."""
