"""Reference precision-recall divergence between two softmaxes (spec, section 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .softmax import shifted, statistics_dtype


def pr_divergence(
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """alpha and beta (N, L) for logits and teacher (N, V), lam float64 (L,), temperatures (1 or N, 1).

    Rows in ``ignored`` (N,) are 0. alpha = A + lam B with A the student's mass where Q < lam P and B the teacher's mass
    elsewhere. The comparison is made between logits less their maximum, where equal rows are equal to the last bit.
    """
    dtype = statistics_dtype(torch.promote_types(logits.dtype, teacher.dtype))
    z_q, z_p = logits.to(dtype), teacher.to(dtype)
    if ignored is not None:
        z_q, z_p = (torch.where(ignored[:, None], 0.0, z) for z in (z_q, z_p))
    q, t_q, log2_q, nothing_q, bad_q = _side(z_q, temperature)
    p, t_p, log2_p, nothing_p, bad_p = _side(z_p, teacher_temperature)
    distance = t_q - t_p
    offset = log2_q - log2_p
    limit = torch.finfo(dtype).max
    alpha, beta = [], []
    for k in range(lam.shape[0]):
        # lam = 0 and inf: thresholds that only the infinite distances of masked tokens lie beyond
        theta = (lam[k].log2() + offset).clamp(-limit, limit).to(dtype)
        less = distance < theta[:, None]
        below, rest = torch.where(less, q, 0.0).sum(-1), torch.where(less, 0.0, p).sum(-1)
        value = lam[k].to(dtype)
        finite, positive = torch.where(lam[k].isinf(), 1.0, value), torch.where(lam[k] == 0, 1.0, value)
        alpha.append(below + torch.where(lam[k].isinf(), 0.0, finite * rest))
        alpha[-1] = torch.where(lam[k] == 0, 0.0 * rest, alpha[-1])
        beta.append(torch.where(lam[k] == 0, 0.0, below / positive) + rest)
        beta[-1] = torch.where(lam[k].isinf(), 0.0 * below, beta[-1])
    bad, nothing = bad_q | bad_p, (nothing_q | nothing_p) & ~(bad_q | bad_p)
    undefined = (q.sum(-1) + p.sum(-1)) * torch.where(bad, torch.nan, 0.0)  # NaN with a gradient of NaN
    results = []
    for parts in (alpha, beta):
        value = torch.stack(parts, -1)
        value = torch.where(bad[:, None], undefined[:, None], value)
        value = torch.where(nothing[:, None], torch.nan, value)  # NaN with a gradient of 0
        results.append(value if ignored is None else torch.where(ignored[:, None], 0.0, value))
    return results[0], results[1]


def _side(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Probabilities; log2 of them but for the normaliser, and that (float64), both detached; masked rows, bad rows."""
    y, masked, dead, top = shifted(z)
    t = y * (math.log2(math.e) / temperature).to(y.dtype)
    e = torch.where(masked, 0.0, t.exp2())
    total = torch.where(dead, 1.0, e.sum(-1))
    place = torch.where(masked, -torch.inf, t.detach())
    return e / total[:, None], place, total.detach().double().log2(), dead, ~dead & ~top.isfinite()
