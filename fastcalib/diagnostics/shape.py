"""Shape: how a model spreads its probability over the valid tokens, beside how the answers are spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops._arguments import Temperature, check_logits, normalise_temperature
from ..ops._set_arguments import check_counts, check_sets
from ..ops.statistics import statistics
from ..valid_sets import ValidSets
from . import _segments
from ._segments import Part
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
    then reaches every answer equally often. On an accelerator the host waits for nothing (not yet run on a GPU).

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        sets: N = prod(*) sets of valid tokens.
        counts: (nnz,), w is proportional to them: the answers below each valid token, or any weights >= 0 with a
            positive sum in every set (on an accelerator not looked at: kl and kl_valid are NaN). None: w is uniform.
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
    return shape_and_log_prob(logits, sets, counts, temperature, draws, vocab_size, backend)[0]


def shape_and_log_prob(
    logits: Tensor,
    sets: ValidSets,
    counts: Tensor | None,
    temperature: Temperature,
    draws: int | None,
    vocab_size: int | None,
    backend: str,
) -> tuple[Shape, Tensor]:
    """:func:`shape`, and the log-probabilities of the valid tokens, (nnz,) plus [K], that it is made of."""
    check_sets(sets, logits, check_logits(logits, vocab_size))
    check_draws(draws)
    counts = check_counts(counts, sets)
    stats = statistics(logits, sets, temperature, vocab_size=vocab_size, backend=backend)
    assert stats.log_prob is not None
    temperatures, _ = normalise_temperature(temperature, logits)
    k = temperatures.shape[1]
    log_prob, entropy = stats.log_prob.reshape(sets.values.numel(), k), stats.entropy.reshape(len(sets), k)

    def among(part: Part, log_p: Tensor, log_mass: Tensor) -> Tensor:
        return _among_valid(logits, sets.values[part.tokens], part, temperatures, log_p, log_mass)

    found = spread(lambda part: log_prob[part.tokens].double(), entropy, sets, counts, draws, among)
    return Shape(*(x.reshape((*logits.shape[:-1], *stats.log_prob.shape[1:])) for x in found)), stats.log_prob


def check_draws(draws: int | None) -> None:
    """Raise unless a number of draws makes sense."""
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise ValueError(f"draws must be an int >= 1 or None (as many as valid tokens), got {draws!r}")


Among = Callable[[Part, Tensor, Tensor], Tensor]


def spread(
    log_prob: Callable[[Part], Tensor],
    entropy: Tensor,
    sets: ValidSets,
    counts: Tensor | None,
    draws: int | None,
    among: Among | None,
) -> list[Tensor]:
    """The fields of :class:`Shape`, (N, K) float64 each, from log-probabilities of tokens and entropies (N, K).

    ``log_prob(part)`` is log p, (tokens, K), in float64, and ``among(part, log_p, log_mass)`` log q; None: log p is
    exact in float64, and log q their difference. With a gradient all sets are taken at once.
    """
    weights = _target(counts, sets)

    def work(part: Part) -> tuple[Tensor, ...]:
        return _spread(part, log_prob(part), entropy[part.sets].double(), weights[part.tokens], draws, among)

    return _segments.in_parts(sets, entropy.shape[1], work, whole=entropy.requires_grad)


def _spread(
    part: Part, log_p: Tensor, entropy: Tensor, w: Tensor, draws: int | None, among: Among | None
) -> tuple[Tensor, ...]:
    log_mass = _segments.logsumexp(log_p, part.sizes)
    massless = log_mass == -torch.inf
    if among is not None:
        log_q = among(part, log_p, log_mass)
    else:
        log_q = log_p - torch.where(massless, 0.0, log_mass)[part.rows]
    kl_valid = _segments.reduce(_plogp(w[:, None], w.log()[:, None] - log_q), part.offsets)
    # 0 * log 0 = 0 for w = 0; a valid token of probability 0 has log_p = -inf and makes kl infinite.
    kl = torch.where(massless, torch.inf, kl_valid - log_mass)
    size = part.sizes[:, None].double().expand(entropy.shape)
    evenness = (-_segments.reduce(_plogp(log_q.exp(), log_q), part.offsets)).exp() / size
    times = size if draws is None else torch.full_like(size, draws)
    distinct = _segments.reduce(_hit(log_p, times[part.rows]), part.offsets)
    undefined, nan = entropy.isnan(), torch.nan
    return (
        torch.where((size == 0) | undefined, nan, kl),
        torch.where(massless | undefined, nan, kl_valid),
        torch.where(undefined, nan, log_mass.exp()),
        torch.where(massless | undefined, nan, evenness),
        entropy,
        torch.where(undefined, nan, distinct),
    )


def _target(counts: Tensor | None, sets: ValidSets) -> Tensor:
    """w, (nnz,) float64, with sum 1 in each set."""
    rows, sizes = sets.rows(), sets.counts()
    if counts is None:
        return 1.0 / sizes.double()[rows]
    w = counts.double()
    total = _segments.reduce(w, sets.offsets)
    if total.device.type == "cpu" and not torch.compiler.is_compiling():
        nothing = (total == 0) & (sizes > 0)
        if nothing.any():
            row = int(nothing.nonzero()[0])
            raise ValueError(f"the counts of set {row} add up to 0: at least one valid token needs a count")
    return w / total[rows]


def _among_valid(
    logits: Tensor, ids: Tensor, part: Part, temperatures: Tensor, log_p: Tensor, log_mass: Tensor
) -> Tensor:
    """log q, (tokens, K): softmax over the set alone.

    Its value comes from the logits of the set in float64: a difference of two float32 log-probabilities, in the
    thousands at a low temperature, would not have six digits. Its gradient goes the way of the log-probabilities, so
    that the logits are read and their gradient is written once.
    """
    through = log_p - torch.where(log_mass == -torch.inf, 0.0, log_mass)[part.rows]
    with torch.no_grad():
        # Not logits.reshape(-1, V)[rows]: that would copy the vocabulary where the rows are strided.
        rows = part.rows + part.sets.start
        where = (*(torch.unravel_index(rows, logits.shape[:-1]) if logits.dim() > 1 else ()), ids)
        t = temperatures if temperatures.shape[0] == 1 else temperatures[rows]
        z = logits[where].double()[:, None] / t
        norm = _segments.logsumexp(z, part.sizes)
        log_q = z - torch.where(norm == -torch.inf, 0.0, norm)[part.rows]
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
