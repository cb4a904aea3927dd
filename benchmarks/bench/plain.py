"""What people write today: the competitors, in plain PyTorch, and (in float64) the answers.

Every function upcasts to float32 unless given float64, as careful code does. They are timed as they stand ("eager")
and through torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Outputs

PerToken = Callable[[Tensor, Tensor], Tensor]


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def statistics(logits: Tensor, target: Tensor, temperatures: Sequence[float]) -> Outputs:
    """logsumexp, entropy, confidence and log-probability of the target: (N,), or (N, K) for K > 1 temperatures."""
    z = _up(logits)
    columns: list[tuple[Tensor, ...]] = []
    for t in temperatures:
        scaled = z if t == 1.0 else z / t
        log_p = F.log_softmax(scaled, -1)
        p = log_p.exp()
        columns.append(
            (
                torch.logsumexp(scaled, -1),
                -(p * log_p).sum(-1),
                p.amax(-1),
                log_p.gather(-1, target[:, None]).squeeze(-1),
            )
        )
    stacked = [torch.stack(c, -1) if len(columns) > 1 else c[0] for c in zip(*columns)]
    return dict(zip(("logsumexp", "entropy", "max_prob", "log_prob"), stacked))


def statistics_tuned(logits: Tensor, target: Tensor, temperatures: Sequence[float]) -> Outputs:
    """The same for torch.compile by someone who knows how: one maximum for all temperatures, all sums of one
    exponential, nothing of size V kept. Not safe where logits are -inf."""
    z = _up(logits)
    top = z.amax(-1, keepdim=True)
    y = z - top
    y_target = y.gather(-1, target[:, None]).squeeze(-1)
    columns: list[tuple[Tensor, ...]] = []
    for t in temperatures:
        b = 1.0 / t
        e = torch.exp(y * b)
        s0, s1 = e.sum(-1), (e * y).sum(-1)
        log_s0 = s0.log()
        columns.append((b * top[:, 0] + log_s0, log_s0 - b * s1 / s0, 1 / s0, b * y_target - log_s0))
    stacked = [torch.stack(c, -1) if len(columns) > 1 else c[0] for c in zip(*columns)]
    return dict(zip(("logsumexp", "entropy", "max_prob", "log_prob"), stacked))


def compiled_statistics() -> Callable[[Tensor, Tensor, Sequence[float]], Outputs]:
    """:func:`statistics` through torch.compile: one temperature is compiled and called for each in turn.

    Compiling the loop over several temperatures at once is slower still (the compiler then stores an array of
    logits for each of them).
    """
    plain_one = torch.compile(statistics, dynamic=False)
    scaled_one = torch.compile(_statistics_at, dynamic=False)

    def call(logits: Tensor, target: Tensor, temperatures: Sequence[float]) -> Outputs:
        if len(temperatures) == 1 and temperatures[0] == 1.0:
            return plain_one(logits, target, (1.0,))
        # a tensor, so that another temperature compiles nothing anew
        parts = [scaled_one(logits, target, torch.tensor(t, dtype=torch.float32)) for t in temperatures]
        if len(parts) == 1:
            return parts[0]
        return {name: torch.stack([part[name] for part in parts], -1) for name in parts[0]}

    return call


def _statistics_at(logits: Tensor, target: Tensor, temperature: Tensor) -> Outputs:
    return statistics(_up(logits) / temperature, target, (1.0,))


def ranks_brute(logits: Tensor, index: Tensor) -> Outputs:
    """Counts of greater and equal logits for index (N, M) by comparing with each: N * M * V comparisons."""
    thresholds = logits.gather(-1, index)[..., None]
    rows = logits[:, None, :]
    return {"n_greater": (rows > thresholds).sum(-1), "n_equal": (rows == thresholds).sum(-1) - 1}


def ranks_sorted(logits: Tensor, index: Tensor) -> Outputs:
    """The same by sorting the row and searching: the sensible way for many tokens."""
    ordered = torch.sort(logits, -1).values
    thresholds = logits.gather(-1, index).contiguous()
    above = logits.shape[-1] - torch.searchsorted(ordered, thresholds, right=True)
    below = torch.searchsorted(ordered, thresholds)
    return {"n_greater": above, "n_equal": logits.shape[-1] - above - below - 1}


def pr_dense(logits: Tensor, teacher: Tensor, lam: Tensor) -> Tensor:
    """alpha (N, L) between two softmaxes, one lambda after the other."""
    q, p = F.softmax(_up(logits), -1), F.softmax(_up(teacher), -1)
    return torch.stack([torch.minimum(value * p, q).sum(-1) for value in lam.to(q.dtype)], -1)


def pr_dense_at_once(logits: Tensor, teacher: Tensor, lam: Tensor) -> Tensor:
    """The same for torch.compile: one reduction over N L V terms that are never stored."""
    q, p = F.softmax(_up(logits), -1), F.softmax(_up(teacher), -1)
    return torch.minimum(lam.to(q.dtype)[None, :, None] * p[:, None], q[:, None]).sum(-1)


def pr_dense_sorted(logits: Tensor, teacher: Tensor, lam: Tensor) -> Tensor:
    """The same by sorting the ratios Q / P and adding up from both ends: the sensible way for many lambda."""
    q, p = F.softmax(_up(logits), -1), F.softmax(_up(teacher), -1)
    ratio, order = torch.sort(q / p, -1)
    below = F.pad(q.gather(-1, order).cumsum(-1), (1, 0))
    rest = F.pad(p.gather(-1, order).flip(-1).cumsum(-1).flip(-1), (0, 1))
    at = torch.searchsorted(ratio, lam.to(ratio.dtype).expand(len(q), -1).contiguous())
    return below.gather(-1, at) + lam.to(q.dtype) * rest.gather(-1, at)


def pr_sparse(logits: Tensor, index: Tensor, lam: Tensor) -> Tensor:
    """alpha (N, L) against the uniform distribution on each row's index (N, M)."""
    q = F.log_softmax(_up(logits), -1).gather(-1, index).exp()
    return torch.minimum(lam.to(q.dtype)[:, None] / index.shape[-1], q[:, None]).sum(-1)


def _target_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(_up(logits), target, reduction="none")  # faster than log_softmax and gather, both ways


def nll(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(_up(logits), target, reduction="none")


def _of_log_prob(formula: Callable[[Tensor], Tensor]) -> PerToken:
    return lambda logits, target: formula(_target_log_prob(logits, target))


def _tailr(log_p: Tensor, gamma: float, w_min: float) -> Tensor:
    p = log_p.detach().exp()
    return -(p / (gamma + (1 - gamma) * p)).clamp(w_min, 1.0) * log_p


def _lambda_pr(log_p: Tensor, gamma: float, lam: float, position: float, length: float) -> Tensor:
    p = log_p.detach().exp()
    root = lam ** (1.0 / length)
    delta = gamma * root / (1 - (1 - gamma) * root)
    w = lam ** (position / (length - 1)) * p / (gamma + (1 - gamma) * p)
    return -torch.where(p <= delta, w, 0.0) * log_p


def _gem(logits: Tensor, target: Tensor, beta: float) -> Tensor:
    z = _up(logits)
    log_p = F.log_softmax(z, -1)
    q = F.softmax(z.detach() / beta, -1)
    return -(log_p.gather(-1, target[:, None]).squeeze(-1) - (q * log_p).sum(-1))


def _tofu(logits: Tensor, target: Tensor, gamma: float, beta: float) -> Tensor:
    z = _up(logits)
    log_p = F.log_softmax(z.detach(), -1).gather(-1, target[:, None]).squeeze(-1)
    p = log_p.exp()
    coefficient = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * log_p
    return -coefficient * beta * F.log_softmax(z / beta, -1).gather(-1, target[:, None]).squeeze(-1)


def _kept(loss: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.where(rule(loss.detach()), loss, 0.0)


# Name in fastcalib.losses -> (its arguments, the same loss per token written out). The threshold of trunc and trunc_r
# is about the median loss of our random targets.
LOSSES: dict[str, tuple[dict[str, float], PerToken]] = {
    "nll": ({}, nll),
    "tailr": ({"gamma": 1e-5, "w_min": 0.0}, _of_log_prob(lambda lp: _tailr(lp, 1e-5, 0.0))),
    "lambda_pr": (
        {"gamma": 1e-5, "lam": 0.5, "position": 10, "length": 100},
        _of_log_prob(lambda lp: _lambda_pr(lp, 1e-5, 0.5, 10, 100)),
    ),
    "trunc": ({"threshold": 13.0}, lambda z, t: _kept(nll(z, t), lambda x: x < 13.0)),
    "trunc_r": ({"threshold": 13.0}, lambda z, t: _kept(nll(z, t), lambda x: x > 13.0)),
    "c_div": ({"alpha": 0.5}, _of_log_prob(lambda lp: ((0.5 * lp).exp() - 1) / (0.5 * -0.5))),
    "gold": ({}, _of_log_prob(lambda lp: -lp.detach().exp().clamp(min=0.1) * lp)),
    "dft": ({}, _of_log_prob(lambda lp: -lp.detach().exp() * lp)),
    "mixce": ({"eta": 0.5}, _of_log_prob(lambda lp: -(0.5 + 0.5 * lp.detach().exp()) * lp)),
    "gce": ({"k": 0.7}, _of_log_prob(lambda lp: (1 - (0.7 * lp).exp()) / 0.7)),
    "focal": ({"gamma": 2.0}, _of_log_prob(lambda lp: -((1 - lp.exp()) ** 2) * lp)),
    "gem": ({"beta": 0.7}, lambda z, t: _gem(z, t, 0.7)),
    "tofu": ({"gamma": 3.0, "beta": 0.8}, lambda z, t: _tofu(z, t, 3.0, 0.8)),
}
