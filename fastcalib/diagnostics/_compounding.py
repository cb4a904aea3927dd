"""How the order of single steps compounds over the depth of a trie of answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..answer_trie import AnswerTrie


@dataclass(frozen=True)
class Compounding:
    """How the precision and recall of kept sets multiply over the depth of the trie, float64.

    Fields:
        alpha: (max_depth, ...), alpha_t for t = 1, 2, ...; NaN after one that is 0.
        beta: (max_depth, ...), beta_t; NaN after one that is 0.
        precision: (...), the product of alpha: the probability that tokens drawn evenly from the kept sets spell an
            answer.
        recall: (...), the product of beta: the share of the answers all of whose tokens are kept.
    """

    alpha: Tensor
    beta: Tensor
    precision: Tensor
    recall: Tensor


def compounding(trie: AnswerTrie, keeps: Tensor, kept: Tensor, *, counts: Tensor | None = None) -> Compounding:
    """Precision and recall of the kept sets, depth by depth and of whole answers.

    ``alpha_t = E[Prec_t | valid so far]`` for outputs whose tokens are drawn evenly from the kept sets, and
    ``beta_t = E[Rec_t | kept so far]`` for an answer drawn from all. An answer that has ended stays valid and kept: it
    takes part in the later depths with a factor of 1, so the products are exact for answers of different lengths
    too. Where a prefix keeps no token at all, no output goes on from it and none is valid.

    Args:
        trie: the answers.
        keeps: bool (nodes, ...), is the token of the node kept at its parent? The root's row is not read.
        kept: integer (nodes, ...), at a prefix the number of all kept tokens, valid or not. Leaves are not read.
        counts: (nodes,), how much each node weighs in recall; default ``trie.count``, every sequence alike.
            ``trie.weight`` weighs them.

    Returns:
        :class:`Compounding`.

    Raises:
        TypeError: ``keeps`` that is not bool.
        ValueError: shapes that do not fit, or a prefix with more kept valid tokens than kept tokens.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Theorem E.1; answers of different lengths derived.

    Example:
        >>> import torch
        >>> from fastcalib.answer_trie import AnswerTrie
        >>> trie = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1]])
        >>> keeps = torch.tensor([True, True, False, True, True, True])  # 7 is dropped at the root
        >>> result = compounding(trie, keeps, torch.tensor([2, 4, 1, 0, 0, 0]))
        >>> result.alpha.tolist(), result.beta.tolist()
        ([0.5, 0.5], [0.6666666666666666, 1.0])
    """
    check_rows(trie, keeps, "compounding: keeps")
    check_rows(trie, kept, "compounding: kept")
    if keeps.dtype != torch.bool or kept.is_floating_point() or kept.dtype == torch.bool:
        raise TypeError(f"compounding: keeps must be bool and kept integers, got {keeps.dtype} and {kept.dtype}")
    if keeps.shape != kept.shape:
        raise ValueError(f"compounding: keeps has shape {tuple(keeps.shape)} and kept {tuple(kept.shape)}")
    counts = (trie.count if counts is None else counts).to(keeps.device, torch.float64)
    if counts.shape != (len(trie),):
        raise ValueError(f"compounding: counts must be ({len(trie)},), one a node, got {tuple(counts.shape)}")
    inner, parent = trie.inner().to(keeps.device), trie.parent[1:].to(keeps.device)
    size = trie.first_child.diff()[trie.inner()].to(keeps.device)
    kept_valid = torch.segment_reduce(keeps[1:].double(), "sum", lengths=size, axis=0, unsafe=True)
    if (wrong := kept_valid > kept[inner]).any():
        at = wrong.nonzero()[0].tolist()
        node = int(inner[at[0]])
        raise ValueError(
            f"compounding: node {node} keeps {int(kept_valid[tuple(at)])} valid tokens but "
            f"{int(kept[node][tuple(at[1:])])} tokens in all; keeps and kept must be of one rule and temperature"
        )
    below = torch.segment_reduce(counts[1:], "sum", lengths=size, axis=0, unsafe=True)
    if not torch.allclose(below, counts[inner], rtol=1e-9):
        raise ValueError("compounding: the counts of a node's children must add up to its own")
    drawn = keeps[1:].double() / kept[parent].clamp(min=1)  # what the kept set does not have is not kept: 0 of 1
    told = (counts[1:] / counts[parent]).reshape(-1, *(1,) * (keeps.dim() - 1))
    alpha, precision = _factors(trie, drawn)
    beta, recall = _factors(trie, keeps[1:] * told)
    return Compounding(alpha, beta, precision, recall)


def _factors(trie: AnswerTrie, step: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mass that walks down the trie, what is left at each depth, as a share of the depth before, and in the end.

    ``step`` (nodes - 1, ...) is the share that goes on from the parent of each node to the node. What has reached a
    leaf stays.
    """
    levels, ends = trie.levels().tolist(), (trie.answer >= 0).to(step.device)
    mass = torch.ones_like(step[:1])
    ended = torch.zeros_like(step[0])
    factors = []
    for depth in range(1, trie.max_depth + 1):
        first, last = levels[depth], levels[depth + 1]
        parent = (trie.parent[first:last] - levels[depth - 1]).to(step.device)
        mass = mass[parent] * step[first - 1 : last - 1]
        left = (ended + mass.sum(0)).clamp(max=1)  # over 1 by rounding alone
        factors.append(left)
        # Scaled to what is left, so that no mass underflows however deep the trie.
        scale = torch.where(left > 0, left, 1.0)
        mass = mass / scale
        ended = ended / scale + mass[ends[first:last]].sum(0)
    shares = torch.stack(factors)
    gone = torch.cat((torch.zeros_like(shares[:1]), (shares == 0).cumsum(0)[:-1])) > 0
    return torch.where(gone, math.nan, shares), shares.prod(0)


def check_rows(trie: AnswerTrie, rows: Tensor, what: str) -> None:
    """Raise ValueError unless there is one row a node."""
    if isinstance(rows, Tensor) and rows.dim() and rows.shape[0] == len(trie):
        return
    got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
    hint = "; at_nodes(trie, ...) puts the root's row before the values of trie.valid_sets()"
    raise ValueError(
        f"{what} must have one row for each of the {len(trie)} nodes of the trie, got {got}"
        + (hint if isinstance(rows, Tensor) and rows.dim() and rows.shape[0] == len(trie) - 1 else "")
    )
