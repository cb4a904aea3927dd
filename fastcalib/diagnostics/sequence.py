"""Whole answers: exact validity and diversity of a model over a trie, and how order compounds over its depth.

Everything is aligned with the nodes of a :class:`fastcalib.AnswerTrie`: a row belongs to the token that leads to the
node, or to the prefix that the node is. Trailing axes, for temperatures and cutoff rules, are carried through. One
pass over each level of the trie, float64 inside and out; nothing here touches the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..answer_trie import AnswerTrie
from . import _segments
from ._compounding import Compounding, check_rows, compounding

__all__ = [
    "Compounding",
    "SequenceDiagnostics",
    "answer_log_probs",
    "at_nodes",
    "at_prefixes",
    "compounding",
    "log_valid_mass",
    "sequence",
    "truncated_log_prob",
]


@dataclass(frozen=True)
class SequenceDiagnostics:
    """Validity and diversity of whole answers, float64, of the trailing axes of ``log_prob``.

    Fields:
        validity: Val, the probability that the model's output is a valid answer.
        log_validity: its logarithm; exact where ``validity`` underflows.
        diversity: Div, from 1 / answers to 1: exp(entropy) / answers. NaN where validity is 0.
        entropy: of the answers given that the output is valid, in nats. NaN where validity is 0.
    """

    validity: Tensor
    log_validity: Tensor
    diversity: Tensor
    entropy: Tensor


def at_nodes(trie: AnswerTrie, values: Tensor) -> Tensor:
    """Results of the trie's valid sets, one row a valid token, as one row a node: the root's row is put before them.

    Args:
        trie: of whose ``valid_sets()`` the values are.
        values: (nodes - 1, ...).

    Returns:
        (nodes, ...) of the same dtype; the root's row is 0, or True for a bool.

    Raises:
        ValueError: another number of rows.

    Example:
        >>> import torch
        >>> from fastcalib.answer_trie import AnswerTrie
        >>> trie = AnswerTrie.from_token_ids([[5], [7]])
        >>> at_nodes(trie, torch.tensor([-0.5, -1.5]))
        tensor([ 0.0000, -0.5000, -1.5000])
    """
    if not values.dim() or values.shape[0] != len(trie) - 1:
        raise ValueError(
            f"at_nodes: values must have {len(trie) - 1} rows, one for each value of trie.valid_sets(), got shape "
            f"{tuple(values.shape)}"
        )
    root = values.new_full((1, *values.shape[1:]), values.dtype == torch.bool)
    return torch.cat((root, values))


def at_prefixes(trie: AnswerTrie, rows: Tensor) -> Tensor:
    """Results of the trie's prefixes, one row a set, as one row a node: leaves, which have no next token, get 0.

    Args:
        trie: of whose ``inner()`` the rows are.
        rows: (prefixes, ...).

    Returns:
        (nodes, ...) of the same dtype.

    Raises:
        ValueError: another number of rows.
    """
    inner = trie.inner()
    if not rows.dim() or rows.shape[0] != inner.numel():
        raise ValueError(
            f"at_prefixes: rows must have {inner.numel()} rows, one for each node of trie.inner(), got shape "
            f"{tuple(rows.shape)}"
        )
    return rows.new_zeros((len(trie), *rows.shape[1:])).index_copy(0, inner.to(rows.device), rows)


def truncated_log_prob(trie: AnswerTrie, log_prob: Tensor, keeps: Tensor, kept_mass: Tensor) -> Tensor:
    """Log-probabilities under a cutoff rule: -inf for a dropped token, renormalised over the kept ones. Differentiable.

    Args:
        trie: the answers.
        log_prob: (nodes, ...), of the model; axes that only the rule has may be missing at the end.
        keeps: bool (nodes, ...), is the token of the node kept at its parent?
        kept_mass: (nodes, ...), at a prefix the probability of all tokens that the rule keeps, valid or not. Where it
            is 0, no token comes; where it is NaN, nobody knows, and the result is NaN.

    Returns:
        float64 (nodes, ...), 0 at the root.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_rows(trie, log_prob, "truncated_log_prob: log_prob")
    check_rows(trie, keeps, "truncated_log_prob: keeps")
    check_rows(trie, kept_mass, "truncated_log_prob: kept_mass")
    if keeps.dtype != torch.bool or keeps.shape != kept_mass.shape or keeps.shape[: log_prob.dim()] != log_prob.shape:
        raise ValueError(
            "truncated_log_prob: keeps must be bool, kept_mass of its shape, and log_prob of that shape or without its "
            f"last axes; got {keeps.dtype} {tuple(keeps.shape)}, {tuple(kept_mass.shape)} and {tuple(log_prob.shape)}"
        )
    log_prob = log_prob.double().reshape(*log_prob.shape, *(1,) * (keeps.dim() - log_prob.dim()))
    parent = trie.parent.clamp(min=0).to(keeps.device)
    mass = kept_mass.double()[parent]
    keeps = keeps & (mass != 0)  # kept tokens that have no probability, all of them: none of them comes
    # The log of a mass where nothing is kept would put a NaN into the gradient of what is not even selected.
    kept = torch.where(keeps, log_prob, 0.0) - torch.where(keeps, mass, 1.0).log()
    kept = torch.where(mass.isnan(), math.nan, torch.where(keeps, kept, -math.inf))
    return torch.cat((torch.zeros_like(kept[:1]), kept[1:]))


def answer_log_probs(trie: AnswerTrie, log_prob: Tensor) -> Tensor:
    """Log-probability of each answer, its tokenisations added up. Differentiable.

    Args:
        trie: the answers.
        log_prob: (nodes, ...), log p(token of the node | its parent's prefix), in nats; the root's row is not read.
            -inf is a token that cannot come.

    Returns:
        float64 (answers, ...), in increasing order of ``trie.answer``; for a trie of :meth:`AnswerTrie.from_token_ids`
        without merged duplicates, the order in which the answers were given.

    Raises:
        ValueError: not one row a node.

    Example:
        >>> import torch
        >>> from fastcalib.answer_trie import AnswerTrie
        >>> trie = AnswerTrie.from_token_ids([[7, 2], [5]])
        >>> answer_log_probs(trie, torch.tensor([0.0, 0.5, 0.25, 0.5]).log()).exp()
        tensor([0.1250, 0.5000], dtype=torch.float64)
    """
    check_rows(trie, log_prob, "answer_log_probs: log_prob")
    log_prob = log_prob.double()
    levels = trie.levels().tolist()
    above = torch.zeros_like(log_prob[:1])
    paths = [above]
    for depth in range(1, trie.max_depth + 1):
        first, last = levels[depth], levels[depth + 1]
        parent = (trie.parent[first:last] - levels[depth - 1]).to(log_prob.device)
        above = above[parent] + log_prob[first:last]
        paths.append(above)
    leaves = trie.leaves()
    _, which, sequences = trie.answer[leaves].unique(return_inverse=True, return_counts=True)
    by_answer = leaves[which.argsort(stable=True)].to(log_prob.device)
    ends = torch.cat(paths)[by_answer]
    return ends if sequences.numel() == leaves.numel() else _segments.logsumexp(ends, sequences)


def log_valid_mass(trie: AnswerTrie, log_prob: Tensor) -> Tensor:
    """log M(prefix): of the probability that, after each prefix, the output goes on to a valid answer. Differentiable.

    ``M(u) = sum over children v of p_v M(v)``, 1 at a leaf. The root's is the log of the validity.

    Args:
        trie: the answers.
        log_prob: (nodes, ...), as for :func:`answer_log_probs`.

    Returns:
        float64 (nodes, ...).

    Source: derived.
    """
    check_rows(trie, log_prob, "log_valid_mass: log_prob")
    log_prob = log_prob.double()
    levels, size = trie.levels().tolist(), trie.first_child.diff()
    below = torch.zeros_like(log_prob[levels[-2] :])
    masses = [below]
    for depth in range(trie.max_depth - 1, -1, -1):
        children = size[levels[depth] : levels[depth + 1]]
        inner = children > 0
        mass = _segments.logsumexp(log_prob[levels[depth + 1] : levels[depth + 2]] + below, children[inner])
        below = torch.zeros_like(log_prob[levels[depth] : levels[depth + 1]])
        below = below.index_copy(0, inner.nonzero()[:, 0].to(mass.device), mass)
        masses.append(below)
    return torch.cat(masses[::-1])


def sequence(trie: AnswerTrie, log_prob: Tensor) -> SequenceDiagnostics:
    """Exact validity and diversity of the model's whole outputs. Differentiable, so ``-log_validity`` is a loss.

    ``Val = sum over answers y of p(y)`` and ``Div = exp(H(p given a valid output)) / answers``. Renormalising at every
    prefix over its valid tokens alone is another distribution, and wrong, unless all siblings have the same mass below.

    Args:
        trie: the answers.
        log_prob: (nodes, ...), log p(token of the node | its parent's prefix), in nats, of the model or under a
            cutoff rule (:func:`truncated_log_prob`); the root's row is not read. -inf is a token that cannot come.

    Returns:
        :class:`SequenceDiagnostics`. NaN log-probabilities make the results of their trailing index NaN.

    Raises:
        ValueError: not one row a node.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Definition 3.1; the sum over the trie derived.

    Example:
        >>> import torch
        >>> from fastcalib.answer_trie import AnswerTrie
        >>> trie = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1]])
        >>> p = torch.tensor([1.0, 0.5, 0.25, 0.5, 0.5, 1.0])  # root, 5, 7, 5 1, 5 2, 7 1
        >>> result = sequence(trie, p.log())
        >>> f"{result.validity:.4f} {result.diversity:.4f}"
        '0.7500 1.0000'
    """
    answers = answer_log_probs(trie, log_prob)
    log_validity = _segments.logsumexp(answers, torch.tensor([answers.shape[0]]))[0]
    never = log_validity == -math.inf
    dropped = answers == -math.inf  # not ~isfinite: a NaN has to come through
    share = torch.where(dropped, 0.0, answers) - torch.where(never, 0.0, log_validity)
    entropy = -torch.where(dropped, 0.0, share.exp() * share).sum(0)
    entropy = torch.where(never, math.nan, entropy)
    return SequenceDiagnostics(log_validity.exp(), log_validity, entropy.exp() / answers.shape[0], entropy)
