"""Order, cutoffs and shape of the same prefixes from one look at their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import resolve
from ..cutoff_rules import Rule
from ..decoding import Cutoffs, cutoffs, find_cutoffs
from ..ops._arguments import Temperature, check_logits, normalise_temperature
from ..ops._set_arguments import check_are_sets, check_counts
from ..valid_sets import ValidSets
from ._segments import Part
from .order import Order, check_precision, order_from_ranks
from .order import order as order_of
from .shape import Shape, check_draws, shape, spread


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` finds: the results of the three functions of these names."""

    order: Order
    cutoffs: Cutoffs
    shape: Shape


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
        :class:`Diagnosis`. Not differentiable; :func:`shape` is.

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
    """
    width = check_logits(logits, vocab_size)
    check_are_sets(sets)
    check_precision(precision)
    check_draws(draws)
    counts = check_counts(counts, sets)
    if resolve(backend, logits.device, logits.dtype, "cutoffs") != "cpp":
        common: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend}
        return Diagnosis(
            order_of(logits, sets, counts=counts, precision=precision, **common),
            cutoffs(logits, rules, temperature, sets=sets, counts=counts, order=order, **common),
            shape(logits, sets, counts=counts, temperature=temperature, draws=draws, **common),
        )
    found, kept = find_cutoffs(logits, rules, temperature, sets, counts, order, vocab_size, backend, tokens=True)
    assert found.n_greater is not None and found.n_equal is not None
    assert found.below is not None and found.log_norm is not None and found.entropy is not None
    ranking = order_from_ranks(
        found.n_greater, found.n_equal, sets, counts=counts, vocab_size=width, precision=precision
    )
    axis = kept.kept.shape[:-1]
    temperatures, _ = normalise_temperature(temperature, logits)
    log_prob = partial(_log_prob, found.below, found.log_norm, temperatures)
    fields = spread(log_prob, found.entropy, sets, counts, draws, None)
    return Diagnosis(ranking, kept, Shape(*(x.reshape(axis) for x in fields)))


def _log_prob(below: Tensor, log_norm: Tensor, temperatures: Tensor, part: Part) -> Tensor:
    """(tokens, K) float64, at most 0, which rounding alone would pass."""
    t = temperatures if temperatures.shape[0] == 1 else temperatures[part.sets][part.rows]
    return (below[part.tokens, None] / t).sub_(log_norm[part.sets][part.rows]).clamp_(max=0.0)
