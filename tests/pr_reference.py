"""alpha and beta in float64 by their definition, row by row: sums of minima. Nothing taken from the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import is_undefined


def probabilities(z: Tensor, temperature: float) -> Tensor:
    """softmax(z / T) in float64, the finite logits alone; differentiable."""
    z = z.double()
    out = torch.zeros_like(z)
    finite = z > -torch.inf
    return out.masked_scatter(finite, torch.softmax((z[finite] - z[finite].max()) / temperature, 0))


def points(q: Tensor, p: Tensor, lam: list[float], inside_q: Tensor, inside_p: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta (L,) of distributions (V,), whose supports are given: a tiny probability may round to 0."""
    alpha, beta = [], []
    for value in lam:
        if value == 0:
            alpha.append(q.sum() * 0)
            beta.append(p[inside_q].sum())
        elif math.isinf(value):
            alpha.append(q[inside_p].sum())
            beta.append(q.sum() * 0)
        else:
            # torch.where, not minimum: at a tie lam P is taken
            alpha.append(torch.where(q < value * p, q, value * p).sum())
            beta.append(alpha[-1] / value)
    return torch.stack(alpha), torch.stack(beta)


def pr_divergence(
    logits: Tensor,
    teacher: Tensor,
    lam: list[float],
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(N, L) each, for logits (N, V)."""
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(len(logits))
    u = torch.as_tensor(teacher_temperature, dtype=torch.float64).expand(len(logits))
    rows = []
    for r in range(len(logits)):
        z, w = logits[r, :vocab_size].double(), teacher[r, :vocab_size].double()
        if is_undefined(z) or is_undefined(w):
            nan = torch.full((len(lam),), torch.nan, dtype=torch.float64)
            rows.append((nan, nan))
            continue
        q, p = probabilities(z, t[r]), probabilities(w, u[r])
        rows.append(points(q, p, lam, z > -torch.inf, w > -torch.inf))
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])
