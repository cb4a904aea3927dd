"""The precision-recall curve that :func:`fastcalib.pr_divergence` gives points of: angles, area, F-scores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PRCurve(NamedTuple):
    """A precision-recall curve and the area below it.

    Fields:
        precision: alpha of each point, (*, L).
        recall: beta of each point, (*, L).
        area: of the star of triangles between the origin and neighbouring points, (*). From angles 0 to pi/2 it is at
            most 1, and 1 where the distributions are equal and lam = 1 is among the points.
    """

    precision: Tensor
    recall: Tensor
    area: Tensor


def angles(n: int, *, device: torch.device | str | None = None) -> Tensor:
    """lam = tan(theta) for n angles spread evenly from 0 to pi/2, both ends exact: float64 (n,).

    The first is 0 (the limit recall), the last inf (the limit precision), lam_i lam_(n-1-i) = 1, and an odd n has
    lam = 1, the total variation, in the middle.

    Args:
        n: >= 2.

    Raises:
        ValueError: for any other n.

    Source: Sajjadi et al. 2018 (arXiv 1806.00035).

    Example:
        >>> import fastcalib
        >>> fastcalib.angles(5)
        tensor([0.0000, 0.4142, 1.0000, 2.4142,    inf], dtype=torch.float64)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"angles: n must be an int >= 2, got {n!r}")
    half = torch.tan(torch.arange(n // 2, dtype=torch.float64) * (0.5 * math.pi / (n - 1)))
    middle = torch.ones(n % 2, dtype=torch.float64)
    return torch.cat((half, middle, 1 / half.flip(0))).to(device)  # 1 / 0 is the inf of the other end


def pr_curve(alpha: Tensor, beta: Tensor) -> PRCurve:
    """The curve through the points of :func:`fastcalib.pr_divergence`, and the area below it. Differentiable.

    In the plane (beta, alpha) each lam is a ray from the origin, of slope lam, and meets the curve once. The area is
    that of the triangles between neighbouring rays: ``1/2 sum_i |beta_i alpha_(i+1) - beta_(i+1) alpha_i|``.

    Args:
        alpha, beta: (*, L), L >= 2, for lam that rise or fall along the last axis; :func:`angles` covers all of it.

    Returns:
        :class:`PRCurve`.

    Raises:
        ValueError: shapes that differ, or fewer than two points.

    Source: Sajjadi et al. 2018 (arXiv 1806.00035); the area derived.

    Example:
        >>> import torch, fastcalib
        >>> same = torch.zeros(1, 4)
        >>> fastcalib.pr_curve(*fastcalib.pr_divergence(same, same, fastcalib.angles(11))).area
        tensor([1.])
    """
    _check_points("pr_curve", alpha, beta)
    if alpha.dim() == 0 or alpha.shape[-1] < 2:
        raise ValueError(f"pr_curve needs at least two points along the last axis, got shape {tuple(alpha.shape)}")
    cross = beta[..., :-1] * alpha[..., 1:] - beta[..., 1:] * alpha[..., :-1]
    return PRCurve(alpha, beta, 0.5 * cross.abs().sum(-1))


def f_beta(alpha: Tensor, beta: Tensor, weight: float = 1.0) -> Tensor:
    """F-score of each point, ``(1 + w^2) alpha beta / (w^2 alpha + beta)``; 0 where both are 0. Differentiable.

    Args:
        alpha, beta: precision and recall, of one shape.
        weight: w > 0, how many times as important recall is as precision. Its maximum over the curve summarises it:
            w = 8 for recall and w = 1/8 for precision are those of Sajjadi et al.

    Raises:
        ValueError: shapes that differ, a weight that is not positive and finite.

    Source: van Rijsbergen 1979; on these curves Sajjadi et al. 2018 (arXiv 1806.00035).

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.f_beta(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]))
        tensor([0.6667, 0.0000])
    """
    _check_points("f_beta", alpha, beta)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"f_beta: weight must be a positive number, got {weight!r}")
    square = float(weight) ** 2
    below = square * alpha + beta
    some = below > 0
    score = (1 + square) * alpha * beta / torch.where(some, below, 1.0)
    return torch.where(below.isnan(), below, torch.where(some, score, 0.0))


def _check_points(name: str, alpha: Tensor, beta: Tensor) -> None:
    if not isinstance(alpha, Tensor) or not isinstance(beta, Tensor) or alpha.shape != beta.shape:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (alpha, beta)]
        raise ValueError(f"{name}: alpha and beta must be tensors of one shape, got {shapes[0]} and {shapes[1]}")
