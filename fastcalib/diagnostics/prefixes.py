"""Order, cutoffs and shape of the same prefixes from one look at their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..backends import resolve
from ..cutoff_rules import Rule
from ..decoding import Cutoffs, cutoffs, find_cutoffs
from ..ops._arguments import Temperature, check_logits, normalise_temperature
from ..ops._set_arguments import check_are_sets, check_counts
from ..valid_sets import ValidSets
from ._segments import Part
from .order import Order, check_precision, order_from_ranks, ranks_of_valid
from .shape import Shape, check_draws, shape_and_log_prob, spread


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` finds.

    Fields:
        order, cutoffs, shape: the results of the functions of these names.

    Of each valid token, in the order of the sets:
        n_greater, n_equal: int64 (nnz,), tokens of the vocabulary above it, and others level with it; in a row with a
            NaN n_greater is -1. What :func:`order_from_ranks` takes, for another precision or other counts.
        log_prob: float64 (nnz,), plus [K], its log-probability. What whole answers are made of: :func:`at_nodes`,
            :func:`sequence`.
    """

    order: Order
    cutoffs: Cutoffs
    shape: Shape
    n_greater: Tensor
    n_equal: Tensor
    log_prob: Tensor


@torch.no_grad()
def diagnose(
    logits: Tensor,
    sets: ValidSets,
    rules: Sequence[Rule],
    temperature: Temperature = 1.0,
    *,
    counts: Tensor | None = None,
    precision: float = 0.8,
    draws: int | None = None,
    order: str = "temperature-first",
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Diagnosis:
    """:func:`order`, :func:`fastcalib.decoding.cutoffs` and :func:`shape` of the same rows, for little more than one.

    On the C++ backend each row is cut into groups of neighbouring logits once, from which ranks, thresholds, masses
    and entropies at all temperatures are read off. Others call the three functions one after another.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        sets: valid tokens, N = prod(*) sets.
        rules: R cutoff rules, e.g. :func:`fastcalib.decoding.paper_rules`.
        temperature: of cutoffs and shape, as for :func:`fastcalib.statistics`; a sequence of K adds an axis.
        counts: (nnz,), how many valid outputs continue with each valid token, for recall and the target of shape;
            positive in sum in every set. None: one each.
        precision: where ``order.recall_at_precision`` is read off.
        draws: of ``shape.expected_distinct``.
        order: of rules and temperature, "temperature-first" or "temperature-last".
        vocab_size: columns from here on are padding and take no part in anything.
        backend: "auto", "eager", "cpp", "triton" or "cuda".

    Returns:
        :class:`Diagnosis`. On the C++ backend shape and log_prob are right to 1e-10, beyond the float32 statistics that
        others have. Not differentiable; :func:`shape` is.

    Raises:
        TypeError, ValueError: as the three functions.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Definitions 4.1 and D.1.

    Example:
        >>> import torch, fastcalib
        >>> from fastcalib.decoding import TopK, TopP
        >>> from fastcalib.diagnostics import diagnose
        >>> logits = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
        >>> d = diagnose(logits, fastcalib.ValidSets.from_lists([[0, 3]]), [TopK(2), TopP(0.5)], [0.5, 2.0])
        >>> d.order.r_precision.tolist(), d.cutoffs.precision.tolist(), d.shape.kl.shape
        ([0.5], [[[0.5, 1.0], [0.5, 0.5]]], torch.Size([1, 2]))
        >>> d.n_greater.tolist(), d.log_prob.shape
        ([0, 2], torch.Size([2, 2]))
    """
    width = check_logits(logits, vocab_size)
    check_are_sets(sets)
    check_precision(precision)
    check_draws(draws)
    counts = check_counts(counts, sets)
    if resolve(backend, logits.device, logits.dtype, "cutoffs") != "cpp":
        n_greater, n_equal = ranks_of_valid(logits, sets, width, backend)
        kept = cutoffs(
            logits, rules, temperature, sets=sets, counts=counts, order=order, vocab_size=vocab_size, backend=backend
        )
        spread_over, log_prob = shape_and_log_prob(logits, sets, counts, temperature, draws, vocab_size, backend)
        return Diagnosis(
            order_from_ranks(n_greater, n_equal, sets, counts=counts, vocab_size=width, precision=precision),
            kept,
            spread_over,
            n_greater,
            n_equal,
            log_prob.double(),
        )
    found, kept = find_cutoffs(logits, rules, temperature, sets, counts, order, vocab_size, backend, tokens=True)
    assert found.n_greater is not None and found.n_equal is not None
    assert found.below is not None and found.log_norm is not None and found.entropy is not None
    ranking = order_from_ranks(
        found.n_greater, found.n_equal, sets, counts=counts, vocab_size=width, precision=precision
    )
    axis = kept.kept.shape[:-1]
    temperatures, has_axis = normalise_temperature(temperature, logits)
    log_prob = found.below.new_empty(found.below.shape[0], temperatures.shape[1])
    fill = partial(_log_prob, log_prob, found.below, found.log_norm, temperatures)
    fields = spread(fill, found.entropy, sets, counts, draws, None)
    return Diagnosis(
        ranking,
        kept,
        Shape(*(x.reshape(axis) for x in fields)),
        found.n_greater,
        found.n_equal,
        log_prob if has_axis else log_prob[:, 0],
    )


def _log_prob(out: Tensor, below: Tensor, log_norm: Tensor, temperatures: Tensor, part: Part) -> Tensor:
    """A part of the log-probabilities ``out``, (tokens, K) float64, at most 0, which rounding alone would pass."""
    t = temperatures if temperatures.shape[0] == 1 else temperatures[part.sets][part.rows]
    some = torch.div(below[part.tokens, None], t, out=out[part.tokens])
    return some.sub_(log_norm[part.sets][part.rows]).clamp_(max=0.0)
