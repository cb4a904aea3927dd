"""What each rule keeps, from its definition: probabilities compared token by token. With how close a call it was."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcalib.decoding import Epsilon, Eta, KeepAll, MinP, Rule, SizeOracle, TopK, TopNSigma, TopP


def keeps(z: Tensor, rule: Rule, temperature: float, size: int = 0) -> tuple[Tensor, Tensor]:
    """For one row (V,): which tokens are kept, and how far each is from its border (relative; inf where counted)."""
    z = z.double()
    p = torch.softmax((z - z.max()) / temperature, 0)
    exact = torch.full_like(z, torch.inf)
    finite = z > -torch.inf
    if isinstance(rule, KeepAll):
        keep, distance = finite, exact
    elif isinstance(rule, (TopK, SizeOracle)):
        k = rule.k if isinstance(rule, TopK) else max(size, 1)
        values, counts = z.unique(return_counts=True)
        above = counts.flip(0).cumsum(0).flip(0) - counts
        keep, distance = (above < k)[torch.searchsorted(values, z)], exact
    elif isinstance(rule, TopP):
        values, inverse = z.unique(return_inverse=True)
        masses = torch.zeros_like(values).index_add_(0, inverse, p)
        above = masses.flip(0).cumsum(0).flip(0) - masses
        keep = (above < rule.p) if rule.p < 1 else torch.ones_like(values, dtype=torch.bool)
        keep, distance = keep[inverse], (above - rule.p).abs()[inverse] if rule.p < 1 else exact
    elif isinstance(rule, TopNSigma):
        border = z.max() - rule.n * (z[finite].std() if finite.sum() > 1 else 0.0)
        keep, distance = z >= border, (z - border).abs() / (1 + border.abs())
    else:
        if isinstance(rule, MinP):
            border = rule.p * p.max()
        elif isinstance(rule, Epsilon):
            border = torch.tensor(rule.epsilon, dtype=torch.float64)
        else:
            assert isinstance(rule, Eta)
            entropy = -torch.special.xlogy(p, p).sum()
            border = torch.minimum(
                torch.tensor(rule.epsilon, dtype=torch.float64), rule.epsilon**0.5 * torch.exp(-entropy)
            )
        # in logs, where cold temperatures keep their digits
        log_p = torch.log_softmax((z - z.max()) / temperature, 0)
        keep, distance = log_p >= border.log(), (log_p - border.log()).abs()
        if isinstance(rule, MinP) and rule.p == 0:
            keep, distance = finite, exact
    keep = (keep | (z == z.max())) & finite
    return keep, torch.where(finite & (z < z.max()), distance, torch.inf)


def probabilities(z: Tensor, temperature: float) -> Tensor:
    z = z.double()
    return torch.softmax((z - z.max()) / temperature, 0)
