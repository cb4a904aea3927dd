"""Tries of answers and whole sequences by enumeration, in plain Python: what the fast ones are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from hypothesis import strategies as st

Ids = tuple[int, ...]
END = 9


def prefixes_of(answers: Sequence[Ids]) -> list[Ids]:
    """Every prefix of an answer, the answers too, by length and then by ids: the order of a trie's nodes."""
    return sorted({a[:n] for a in answers for n in range(len(a) + 1)}, key=lambda p: (len(p), p))


def below(answers: Sequence[Ids], prefix: Ids) -> list[int]:
    """Which answers begin with the prefix."""
    return [i for i, a in enumerate(answers) if a[: len(prefix)] == prefix]


def next_tokens(answers: Sequence[Ids], prefix: Ids) -> list[int]:
    """What may come after the prefix, ascending."""
    return sorted({answers[i][len(prefix)] for i in below(answers, prefix) if len(answers[i]) > len(prefix)})


def walk(tables: Mapping[Ids, Mapping[int, float]], depth: int) -> Iterator[tuple[Ids, float]]:
    """Every output of at most ``depth`` tokens and its probability: each token is drawn from the prefix's table; an
    output ends at ``END``, at a prefix without a table (nobody knows what comes then: the output is no answer, or just
    complete) and at ``depth``."""
    ahead: list[tuple[Ids, float]] = [((), 1.0)]
    while ahead:
        prefix, p = ahead.pop()
        if prefix not in tables or len(prefix) == depth:
            yield prefix, p
            continue
        ahead += [((*prefix, token), p * q) for token, q in tables[prefix].items()]


def exp_entropy(probabilities: Sequence[float]) -> float:
    """exp(H) of what the numbers are proportional to."""
    total = math.fsum(probabilities)
    return math.exp(-math.fsum(p / total * math.log(p / total) for p in probabilities if p))


def answer_sets(tokens: int = 4, length: int = 3, most: int = 7) -> st.SearchStrategy[list[Ids]]:
    """Distinct answers over ids below ``tokens``, without end token; one may be empty or the beginning of another."""
    answer = st.lists(st.integers(0, tokens - 1), max_size=length).map(tuple)
    return st.lists(answer, min_size=1, max_size=most, unique=True)
