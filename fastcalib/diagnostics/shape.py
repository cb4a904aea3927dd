"""Shape: how a model spreads its probability over the valid tokens, beside how the answers are spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._arguments import Temperature, normalise_temperature
from ..ops.statistics import statistics
from ..valid_sets import ValidSets
from .diversity import diversity_bound, diversity_loss
from .head_tail import HeadTailFit, head_tail_fit

__all__ = ["HeadTailFit", "Shape", "diversity_bound", "diversity_loss", "head_tail_fit", "shape"]


@dataclass(frozen=True)
class Shape:
    """Shape of N distributions on their valid sets: float64, the leading dimensions of the logits, plus [K].

    With p the softmax, G the valid tokens, w the target on G, q = p renormalised over G, all in nats:

    Attributes:
        kl: KL(w || p); inf where a token with w > 0 has probability 0.
        kl_valid: KL(w || q): shape alone, whatever the mass outside G.
        valid_mass: sum of p over G.
        evenness: exp(H(q)) / |G|, from 1 / |G| (all on one token) to 1 (all alike).
        entropy: H(p), over the whole vocabulary.
        expected_distinct: how many different valid tokens K draws from p hit on average, sum over G of 1 - (1 - p)^K.

    An empty set has valid_mass and expected_distinct 0 and the rest NaN, but for entropy. A set of probability 0 has
    kl inf, and kl_valid and evenness NaN. A row without a softmax has NaN everywhere.
    """

    kl: Tensor
    kl_valid: Tensor
    valid_mass: Tensor
    evenness: Tensor
    entropy: Tensor
    expected_distinct: Tensor


def shape(
    logits: Tensor,
    sets: ValidSets,
    *,
    counts: Tensor | None = None,
    temperature: Temperature = 1.0,
    draws: int | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Shape:
    """How the softmax is spread over the valid tokens, from one read of the logits; differentiable.

    A model is shape-calibrated where p is proportional on G to the number of valid answers below each token: sampling
    then reaches every answer equally often.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        sets: N = prod(*) sets of valid tokens.
        counts: (nnz,), w is proportional to them: the answers below each valid token, or any weights >= 0 with a
            positive sum in every set. None: w is uniform.
        temperature: as for :func:`fastcalib.statistics`; a sequence of K adds the axis K.
        draws: K of ``expected_distinct``, >= 1; None: as many draws as the set has tokens.
        vocab_size: columns from here on are padding and take no part in anything.
        backend: "auto", "eager", "cpp", "triton" or "cuda".

    Returns:
        :class:`Shape`.

    Raises:
        TypeError, ValueError: as :func:`fastcalib.statistics`, and for counts or draws that make no sense.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Definition D.1; the scalars are derived from it.

    Example:
        >>> import torch, fastcalib
        >>> sets = fastcalib.ValidSets.from_lists([[0, 1]])
        >>> s = shape(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), sets, counts=torch.tensor([2, 1]))
        >>> f"{s.valid_mass.item():.4f} {s.kl.item():.4f} {s.expected_distinct.item():.4f}"
        '0.7500 0.2877 1.1875'
        >>> abs(s.kl_valid.item()) < 1e-15  # 0.5 and 0.25 are as 2 to 1
        True
    """
    if not isinstance(sets, ValidSets):
        raise TypeError(
            f"shape: sets must be a ValidSets, got {type(sets).__name__}; ValidSets.from_lists takes lists of token ids"
        )
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"shape: draws must be an int >= 1 or None (as many as valid tokens), got {draws!r}")
    stats = statistics(logits, sets, temperature, vocab_size=vocab_size, backend=backend)
    assert stats.log_prob is not None
    leading, axis = logits.shape[:-1], stats.log_prob.shape[1:]
    temperatures, _ = normalise_temperature(temperature, logits)
    k = temperatures.shape[1]
    rows, sizes = sets.rows(), sets.counts()
    w = _target(counts, sets, rows)[:, None]

    log_p = stats.log_prob.double().reshape(sets.values.numel(), k)
    entropy = stats.entropy.double().reshape(len(sets), k)
    undefined = entropy.isnan()
    size = sizes[:, None].double().expand(undefined.shape)

    log_mass = _log_sum_exp(log_p, sets, rows)
    log_q = _among_valid(logits, sets, rows, temperatures, log_p, log_mass)
    kl_valid = _sum(_plogp(w, w.log() - log_q), sets)
    # 0 * log 0 = 0 for w = 0; a valid token of probability 0 has log_p = -inf and makes kl infinite.
    kl = torch.where(log_mass == -torch.inf, torch.inf, kl_valid - log_mass)
    evenness = (-_sum(_plogp(log_q.exp(), log_q), sets)).exp() / size
    times = size if draws is None else torch.full_like(size, draws)
    distinct = _sum(_hit(log_p, times[rows]), sets)

    empty, massless = size == 0, log_mass == -torch.inf
    nan = torch.nan
    results = (
        torch.where(empty | undefined, nan, kl),
        torch.where(massless | undefined, nan, kl_valid),
        torch.where(undefined, nan, log_mass.exp()),
        torch.where(massless | undefined, nan, evenness),
        entropy,
        torch.where(undefined, nan, distinct),
    )
    return Shape(*(x.reshape((*leading, *axis)) for x in results))


def _target(counts: Tensor | None, sets: ValidSets, rows: Tensor) -> Tensor:
    """w, (nnz,) float64, with sum 1 in each set."""
    nnz = sets.values.numel()
    if counts is None:
        return 1.0 / sets.counts().double()[rows]
    if not isinstance(counts, Tensor) or counts.dtype == torch.bool or counts.is_complex():
        got = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"shape: counts must be a tensor of numbers, one a valid token, got {got}")
    if tuple(counts.shape) != (nnz,):
        raise ValueError(f"shape: counts must have shape ({nnz},), one for each value of the sets, got "
                         f"{tuple(counts.shape)}")  # fmt: skip
    w = counts.to(sets.values.device, torch.float64)
    if not bool((w.isfinite() & (w >= 0)).all()):
        position = int((~(w.isfinite() & (w >= 0))).nonzero()[0])
        raise ValueError(f"shape: counts must be finite and >= 0, got {float(w[position])} at counts[{position}]")
    total = _sum(w[:, None], sets)[:, 0]
    if bool(((total == 0) & (sets.counts() > 0)).any()):
        row = int(((total == 0) & (sets.counts() > 0)).nonzero()[0])
        raise ValueError(f"shape: the counts of set {row} add up to 0: at least one valid token needs a count")
    return w / total[rows]


def _among_valid(
    logits: Tensor, sets: ValidSets, rows: Tensor, temperatures: Tensor, log_p: Tensor, log_mass: Tensor
) -> Tensor:
    """log q, (nnz, K): softmax over the set alone.

    Its value comes from the logits of the set in float64: a difference of two float32 log-probabilities, in the
    thousands at a low temperature, would not have six digits. Its gradient goes the way of the log-probabilities, so
    that the logits are read and their gradient is written once.
    """
    through = log_p - torch.where(log_mass == -torch.inf, 0.0, log_mass)[rows]
    with torch.no_grad():
        # Not logits.reshape(-1, V)[rows]: that would copy the vocabulary where the rows are strided.
        where = (*(torch.unravel_index(rows, logits.shape[:-1]) if logits.dim() > 1 else ()), sets.values)
        z = logits[where].double()[:, None] / temperatures.expand(len(sets), -1)[rows]
        norm = _log_sum_exp(z, sets, rows)
        log_q = z - torch.where(norm == -torch.inf, 0.0, norm)[rows]
    if not through.requires_grad:
        return log_q
    return log_q + torch.where(through.isfinite(), through - through.detach(), 0.0)


def _plogp(p: Tensor, x: Tensor) -> Tensor:
    """p x with 0 * inf = 0, and no NaN in the gradient there."""
    return torch.where(p == 0, 0.0, p) * torch.where(p == 0, 0.0, x)


def _hit(log_p: Tensor, draws: Tensor) -> Tensor:
    """1 - (1 - p)^K. log1p and expm1 keep the digits of a small p; p = 1 (rounded) is kept off the pole of log1p."""
    p = log_p.exp().clamp(max=1 - 2**-53)
    return -torch.expm1(draws * torch.log1p(-p))


def _sum(x: Tensor, sets: ValidSets) -> Tensor:
    """(nnz, K) -> (N, K). Each set is added up in its own order: the same bits alone or among others."""
    if x.shape[0] == 0:
        return x.new_zeros(len(sets), x.shape[1])
    return torch.segment_reduce(x.contiguous(), "sum", offsets=sets.offsets, axis=0, unsafe=True, initial=0)


def _log_sum_exp(x: Tensor, sets: ValidSets, rows: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_full((len(sets), x.shape[1]), -torch.inf)
    with torch.no_grad():
        top = torch.segment_reduce(
            x.detach().contiguous(), "max", offsets=sets.offsets, axis=0, unsafe=True, initial=-math.inf
        )
        top = torch.where(top.isfinite(), top, 0.0)
    total = _sum((x - top[rows]).exp(), sets)
    # log's gradient at 0 is infinite, and 0 * inf would reach every logit of the row
    return torch.where(total == 0, -torch.inf, torch.where(total == 0, 1.0, total).log() + top)
