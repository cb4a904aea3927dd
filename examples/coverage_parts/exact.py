"""Precision and recall of one distribution against another, exactly, where every element of the support of P is listed.

Only those elements are needed: min(lam P, Q) is 0 wherever P is, and Q's mass elsewhere is 1 minus its mass there.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

# A sequence counts as covered where Q gives it at least this share of its probability under P.
COVERED = 0.1
ANGLES = 1000


def alpha_beta(p: Tensor, q: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_lam = sum min(lam P, Q) and beta_lam = alpha_lam / lam.

    Args:
        p: (S,) float64, P of each element of its support.
        q: (S,) float64, Q of the same elements; may sum to less than 1.
        lam: (A,) float64, > 0.
    """
    # With the elements in order of Q / P, those before the first ratio >= lam give Q and the rest lam P.
    ratio, order = (q / p).sort()
    zero = p.new_zeros(1)
    q_below = torch.cat([zero, q[order].cumsum(0)])
    p_from = torch.cat([p[order].flip(0).cumsum(0).flip(0), zero])
    k = torch.searchsorted(ratio, lam)
    alpha = q_below[k] + lam * p_from[k]
    return alpha, alpha / lam


def angles(n: int = ANGLES) -> Tensor:
    """lam = tan(theta) at the middles of n equal parts of (0, pi / 2)."""
    return torch.tan((torch.arange(n, dtype=torch.float64) + 0.5) * (math.pi / 2 / n))


def curve_area(alpha: Tensor, beta: Tensor) -> float:
    """Area below the precision-recall curve given at ``angles(n)``: 1 for Q = P, 0 for disjoint supports.

    In polar coordinates, since alpha / beta = tan(theta): half the integral of alpha^2 + beta^2.
    """
    return float((alpha.square() + beta.square()).sum()) * math.pi / 4 / alpha.numel()


def precision(q: Tensor) -> float:
    """Q(supp P): the limit of alpha_lam for lam to infinity."""
    return float(q.sum())


def recall(p: Tensor, q: Tensor) -> float:
    """P of the elements with Q >= COVERED P. A softmax is positive everywhere, so P(supp Q) itself is always 1."""
    return float(p[q >= COVERED * p].sum())


def soft_recall(p: Tensor, q: Tensor) -> float:
    """beta at lam = COVERED: as :func:`recall`, with an element below the level counted in proportion."""
    return float(torch.minimum(p, q / COVERED).sum())


def recall_at_precision(points: list[tuple[float, float]], level: float) -> float:
    """Best recall on a chain of (precision, recall) points where the precision is at least ``level``; 0 if nowhere.

    Between neighbours the chain is a straight line, so that the answer does not hang on the grid of temperatures.
    """
    best = max((r for p, r in points if p >= level), default=0.0)
    for (p0, r0), (p1, r1) in itertools.pairwise(points):
        if (p0 >= level) != (p1 >= level):
            best = max(best, r0 + (level - p0) / (p1 - p0) * (r1 - r0))
    return best


def plane_area(points: list[tuple[float, float]]) -> float:
    """Area of the plane that some point (precision, recall) is at least as good as in both."""
    area = reached = 0.0
    for p, r in sorted(points, reverse=True):
        if r > reached:
            area += p * (r - reached)
            reached = r
    return area
