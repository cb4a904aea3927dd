"""``pr_divergence`` against distributions on valid sets: a few lines on the log-probabilities of ``statistics``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..valid_sets import ValidSets
from ._arguments import temperature_a_row
from .statistics import statistics


def against_sets(
    logits: Tensor,
    sets: ValidSets,
    lam: Tensor,
    weights: Tensor | None,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    vocab_size: int,
    ignored: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """alpha and beta (N, L).

    Outside a set lam P_v = 0, so only the sets' own tokens matter, and Q is known there from one read of the logits.
    Ignored rows hand over empty sets and logits nobody reads.
    """
    stats = statistics(logits, sets, temperature, moments=False, vocab_size=vocab_size, backend=backend)
    assert stats.log_prob is not None
    n_rows, row_of = len(sets), _rows(sets)
    log_q = stats.log_prob
    dtype = log_q.dtype
    log_p = _log_weights(sets, weights, row_of, teacher_temperature, logits)
    if ignored is not None:
        log_q = torch.where(ignored[row_of], 0.0, log_q)  # before exp, so that a NaN row sends back no NaN
    q, p = log_q.exp()[:, None], log_p.exp().to(dtype)[:, None]
    # Q < lam P strictly, as in the dense kernels: at a tie lam P is taken, which has no gradient
    less = lam.log2() + log_p[:, None] / _LN2 > log_q.detach().double()[:, None] / _LN2
    below = torch.where(less | q.isnan(), q, 0.0)
    rest = torch.where(less | (log_q == -torch.inf)[:, None], 0.0, p)
    below, rest = _sum_of_sets(torch.cat((below, rest), -1), row_of, sets.offsets, n_rows).chunk(2, -1)
    unbounded, none = lam.isinf(), lam == 0
    alpha = below + torch.where(unbounded, 0.0, lam).to(dtype) * rest
    alpha = torch.where(none, 0.0 * below, alpha)
    beta = torch.where(none, 0.0 * below, below / torch.where(none, 1.0, lam).to(dtype)) + rest
    beta = torch.where(unbounded, 0.0 * below, beta)
    # an empty set is no distribution; a row without a softmax has NaN log-probabilities already
    empty = (sets.counts() == 0)[:, None]
    alpha, beta = (torch.where(empty, torch.nan, x) for x in (alpha, beta))
    if ignored is not None:
        alpha, beta = (torch.where(ignored[:, None], 0.0, x) for x in (alpha, beta))
    return alpha, beta


_LN2 = 0.6931471805599453


def _sum_of_sets(values: Tensor, row_of: Tensor, offsets: Tensor, n_rows: int) -> Tensor:
    """(nnz, L) -> (N, L), in the order of the sets' own values, so that the bits of a row are its own."""
    if values.is_cuda:  # scatter_add adds in any order there
        return torch.segment_reduce(values, "sum", offsets=offsets, axis=0)
    total = torch.zeros(n_rows, values.shape[1], dtype=values.dtype, device=values.device)
    return total.scatter_add(0, row_of[:, None].expand_as(values), values)  # 5 times as fast as index_add


def _rows(sets: ValidSets) -> Tensor:
    """Row of each value; its size is known beforehand, so nothing waits for a device."""
    each = torch.arange(len(sets), device=sets.values.device)
    return each.repeat_interleave(sets.counts(), output_size=sets.values.shape[0])


def _log_weights(
    sets: ValidSets, weights: Tensor | None, row_of: Tensor, temperature: float | Tensor, logits: Tensor
) -> Tensor:
    """log P of each token, float64 (nnz,): weights to the power 1/T, normalised in each set."""
    t = temperature_a_row("teacher_temperature", temperature, logits)
    if t.requires_grad:
        raise ValueError("teacher_temperature gets no gradient against a ValidSets: pass teacher_temperature.detach()")
    if weights is None:
        return -sets.counts().to(torch.float64).log()[row_of]
    if not isinstance(weights, Tensor) or not (weights.dtype.is_floating_point or not weights.dtype.is_complex):
        raise TypeError(f"weights must be a tensor of numbers (nnz,), got {type(weights).__name__}")
    if weights.shape != sets.values.shape:
        raise ValueError(
            f"weights must have shape {tuple(sets.values.shape)}, one for each value of the sets, got "
            f"{tuple(weights.shape)}"
        )
    if weights.requires_grad:
        raise ValueError("weights are a constant and get no gradient: pass weights.detach()")
    weights = weights.to(logits.device, torch.float64)
    if not torch.compiler.is_compiling() and weights.device.type == "cpu":
        bad = ~(weights >= 0) | weights.isinf()
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"weights must be finite and >= 0, weights[{at}] is {float(weights[at])}")
    log_w = weights.log() / t.expand(len(sets), 1)[row_of, 0]
    top = torch.full((len(sets),), -torch.inf, dtype=torch.float64, device=logits.device)
    top = top.scatter_reduce(0, row_of, log_w, "amax")
    e = (log_w - top[row_of]).exp()  # NaN where all weights of a set are 0: no distribution
    total = torch.zeros_like(top).index_add(0, row_of, e)
    return log_w - (top + total.log())[row_of]
