"""``pr_divergence`` against distributions on valid sets: a few lines on the log-probabilities of ``statistics``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..valid_sets import ValidSets
from ._arguments import temperature_a_row
from ._set_arguments import check_sets
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
    check_sets(sets, logits, vocab_size, "teacher")
    stats = statistics(logits, sets, temperature, moments=False, vocab_size=vocab_size, backend=backend)
    assert stats.log_prob is not None
    row_of = _rows(sets)
    log_q = stats.log_prob
    dtype = log_q.dtype
    log_p = _log_weights(sets, weights, row_of, teacher_temperature, logits)
    if ignored is not None:
        log_q = torch.where(ignored[row_of], 0.0, log_q)  # before exp, so that a NaN row sends back no NaN
    q, p = log_q.exp(), torch.where(log_q.detach() == -torch.inf, 0.0, log_p.exp().to(dtype))
    distance = (log_q.detach().double() - log_p) * _LOG2E
    below, rest = _masses(q, p, distance, lam, row_of, sets.offsets)
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


_LOG2E = 1.4426950408889634


def _masses(
    q: Tensor, p: Tensor, distance: Tensor, lam: Tensor, row_of: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """A = sum of q where distance < log2 lam, and B = sum of p elsewhere, for each row and lam: (N, L) each.

    Strictly below, as in the dense kernels: at a tie lam P is taken, which has no gradient. Each token finds its place
    among the sorted lam and is added there; A and B are then sums along lam. So nothing of size (nnz, L) exists on a
    CPU, forward or backward, where a token takes what stands at its place. In float64, in the order of the sets' own
    values: the bits of a row are its own.
    """
    count, n_rows = lam.shape[0], offsets.shape[0] - 1
    thresholds, order = lam.log2().sort(stable=True)
    place = torch.searchsorted(thresholds, distance, right=True)  # so many lam at or below: in A beyond, in B before
    place = torch.where(q.isnan(), 0, place)  # in A for every lam: a NaN is passed on, and its gradient to the logits
    if q.is_cuda:  # scatter_add adds in any order there
        beyond = place[:, None] <= torch.arange(count, device=q.device)
        each = torch.cat((torch.where(beyond, q[:, None], 0.0), torch.where(beyond, 0.0, p[:, None])), -1)
        below, rest = torch.segment_reduce(each, "sum", offsets=offsets, axis=0).chunk(2, -1)
    else:
        both, cell = torch.stack((q, p)).double(), row_of * (count + 1) + place
        bins = both.new_zeros(2, n_rows * (count + 1)).scatter_add(1, cell.expand(2, -1), both)
        bins = bins.view(2, n_rows, count + 1)
        below, rest = bins[0, :, :-1].cumsum(-1), bins[1, :, 1:].flip(-1).cumsum(-1).flip(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(count, device=order.device))
    return below[:, back].to(q.dtype), rest[:, back].to(q.dtype)


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
