"""One prediction over a vocabulary, with everything known: what a temperature does to precision and recall, and what a
softmax with too few parameters does at the optimum of each loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcalib import losses

from . import exact
from .losses import LOSSES


def zipf(n: int, exponent: float = 1.0) -> Tensor:
    """Probabilities proportional to 1, 1 / 2^e, 1 / 3^e ...: (n,) float64."""
    weights = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def with_wrong_tail(head: Tensor, vocabulary: int, share: float) -> Tensor:
    """Q = (1 - share) head + share spread evenly over the tokens outside of the head: (V,)."""
    outside = vocabulary - head.numel()
    return torch.cat([(1 - share) * head, torch.full((outside,), share / outside, dtype=torch.float64)])


def tempered(q: Tensor, temperature: float) -> Tensor:
    """Q_t, proportional to Q^(1/t)."""
    return (q.log() / temperature).softmax(-1)


def precision_slope(q: Tensor, support: int, temperature: float) -> float:
    """d Q_t(A) / dt, A the first ``support`` tokens.

    With s = -log Q, d log q_t / dt = (s - E_t[s]) / t^2; summed over A: t^-2 Q_t(A) (E_t[s | A] - E_t[s]).
    """
    s, at = -q.log(), tempered(q, temperature)
    inside = at[:support].sum()
    mean_inside = (at[:support] * s[:support]).sum() / inside
    return float(inside * (mean_inside - (at * s).sum())) / temperature**2


def recall_slope(p: Tensor, q: Tensor, lam: float, temperature: float) -> float:
    """d beta_lam / dt = (1 / (lam t^2)) sum_U q_t (s - E_t[s]), U = {q_t < lam p} the tokens that Q_t gives too little.

    P is on the first tokens. Elsewhere p is 0 and no token is in U.
    """
    s, at = -q.log(), tempered(q, temperature)
    first = p.numel()
    short = at[:first] < lam * p
    return float((at[:first] * (s[:first] - (at * s).sum()))[short].sum()) / (lam * temperature**2)


def slopes_by_differences(p: Tensor, q: Tensor, lam: float, t: float, step: float = 1e-5) -> tuple[float, float]:
    """The slopes of precision and of beta_lam again, by central differences."""

    def both(temperature: float) -> tuple[float, float]:
        at = tempered(q, temperature)[: p.numel()]
        return exact.precision(at), float(torch.minimum(p, at / lam).sum())

    (p0, r0), (p1, r1) = both(t - step), both(t + step)
    return (p1 - p0) / (2 * step), (r1 - r0) / (2 * step)


def even_head(support: int, vocabulary: int, gap: float, temperature: float) -> float:
    """Q_t(A) where the logit is ``gap`` on the tokens of A and 0 on the others: 1 / (1 + (V / K - 1) exp(-gap / t)).

    With P even on A, alpha_lam is min(lam, Q_t(A)): whatever lowers Q_t(A) lowers the whole curve.
    """
    logit = torch.tensor(gap / temperature, dtype=torch.float64)
    return float(1 / (1 + (vocabulary / support - 1) * (-logit).exp()))


@dataclass(frozen=True)
class Softmax:
    """A softmax with fewer parameters than tokens: logits = features @ theta; P on the first tokens.

    Attributes:
        features: (V, d) float64. p: (K,) float64.
    """

    features: Tensor
    p: Tensor

    def probabilities(self, theta: Tensor) -> Tensor:
        return (self.features @ theta).softmax(-1)

    def expected_loss(self, name: str, theta: Tensor) -> Tensor:
        """The mean of the loss under P, exactly: a row for each token of the support, weighted by its probability."""
        logits = (self.features @ theta).expand(self.p.numel(), -1)
        target = torch.arange(self.p.numel())
        common: Any = {"weight": self.p, "reduction": "sum"}
        loss = LOSSES[name]()
        if isinstance(loss, losses.TruncLoss | losses.TruncRLoss):  # not a running quantile: the quantile itself
            nll = -logits[0].detach().log_softmax(-1)[: self.p.numel()]
            function = losses.trunc if isinstance(loss, losses.TruncLoss) else losses.trunc_r
            return function(logits, target, threshold=weighted_quantile(nll, self.p, loss.quantile), **common)
        if isinstance(loss, losses.LambdaPRLoss):
            per_token = loss(logits, target, weight=self.p, position=0, length=1)
        else:
            per_token = loss(logits, target, weight=self.p)
        return per_token * self.p.numel()  # the module's mean divides by the rows

    def optimum(self, name: str, start: Tensor, steps: int, rate: float = 0.05) -> tuple[Tensor, float]:
        """Where Adam with a rate falling to 0 ends, and the norm of the gradient there."""
        theta = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([theta], lr=rate)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimiser.zero_grad()
            self._objective(name, theta).backward()
            optimiser.step()
        (gradient,) = torch.autograd.grad(self._objective(name, theta), theta)
        return theta.detach(), float(gradient.norm())

    def _objective(self, name: str, theta: Tensor) -> Tensor:
        if not name.startswith("alpha "):
            return self.expected_loss(name, theta)
        lam = float(name.removeprefix("alpha "))  # alpha_lam itself, to be made as large as can be
        return -torch.minimum(lam * self.p, self.probabilities(theta)[: self.p.numel()]).sum() / max(1.0, lam)


def weighted_quantile(values: Tensor, weights: Tensor, quantile: float) -> Tensor:
    """The smallest value at or below which at least that share of the weight lies."""
    ordered, order = values.sort()
    place = torch.searchsorted(weights[order].cumsum(0), quantile * weights.sum())
    return ordered[min(int(place), ordered.numel() - 1)]


def random_softmax(support: int, vocabulary: int, parameters: int, seed: int) -> Softmax:
    """Gaussian features, so that the support is not separable from the rest; P a Zipf law."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(vocabulary, parameters, generator=generator, dtype=torch.float64)
    return Softmax(features, zipf(support))
