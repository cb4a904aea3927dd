"""Cutoff rules of sampling: which tokens does each keep, at each temperature, and what is lost by it?

A rule keeps the tokens at or above some logit, its threshold. Nothing here samples; for that use the rules of an
inference engine, whose sets these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cutoff_rules import (
    PAPER_TEMPERATURES,
    Epsilon,
    Eta,
    KeepAll,
    MinP,
    Rule,
    SizeOracle,
    TopK,
    TopNSigma,
    TopP,
    paper_rules,
    parse_rule,
)
from .ops._arguments import Temperature, check_logits, normalise_temperature
from .ops._set_arguments import check_are_sets, check_counts
from .ops.cutoffs import RowCutoffs
from .ops.cutoffs import cutoffs as cutoffs_op
from .valid_sets import ValidSets

__all__ = [
    "PAPER_TEMPERATURES",
    "Cutoffs",
    "Epsilon",
    "Eta",
    "KeepAll",
    "MinP",
    "Rule",
    "SizeOracle",
    "TopK",
    "TopNSigma",
    "TopP",
    "cutoffs",
    "paper_rules",
    "parse_rule",
    "thresholds",
]

ORDERS = ("temperature-first", "temperature-last")
# Of (rows, K, R) divided in one go: 128 KB in float64.
CHUNK = 1 << 14


@dataclass(frozen=True)
class Cutoffs:
    """What rules keep at temperatures, (*, K, R); without the axis of K for one temperature. See :func:`cutoffs`.

    Fields:
        threshold: the smallest logit kept, in the statistics dtype of the logits; -inf for :class:`KeepAll`.
        kept: int64, how many tokens.
        kept_mass: their probability at the temperature, in the statistics dtype.

    With sets, else None:
        keeps: bool (nnz, K, R), whether each valid token is kept.
        kept_valid: int64, how many valid tokens are kept.
        valid_mass: probability of the valid tokens kept, in the statistics dtype.
        precision: float64, kept_valid / kept.
        recall: float64, share of the set's counts that is kept.
        token_recall: float64, share of the set's tokens that is kept.
    """

    threshold: Tensor
    kept: Tensor
    kept_mass: Tensor
    keeps: Tensor | None = None
    kept_valid: Tensor | None = None
    valid_mass: Tensor | None = None
    precision: Tensor | None = None
    recall: Tensor | None = None
    token_recall: Tensor | None = None


def thresholds(
    logits: Tensor,
    rules: Sequence[Rule],
    temperature: Temperature = 1.0,
    *,
    sets: ValidSets | None = None,
    order: str = "temperature-first",
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The smallest logit that each rule keeps at each temperature, (*, K, R): ``logits >= threshold`` are kept.

    Arguments and errors as for :func:`cutoffs`; sets are needed for :class:`SizeOracle` alone.

    Example:
        >>> import torch
        >>> thresholds(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), [TopK(2), TopP(0.5), KeepAll()])
        tensor([[3., 4., -inf]])
    """
    return cutoffs(
        logits, rules, temperature, sets=sets, order=order, vocab_size=vocab_size, backend=backend, valid=False
    ).threshold


def cutoffs(
    logits: Tensor,
    rules: Sequence[Rule],
    temperature: Temperature = 1.0,
    *,
    sets: ValidSets | None = None,
    counts: Tensor | None = None,
    order: str = "temperature-first",
    vocab_size: int | None = None,
    backend: str = "auto",
    valid: bool = True,
) -> Cutoffs:
    """How many tokens, how much probability and which valid tokens each rule keeps at each temperature.

    A token whose logit is -inf cannot be drawn and is never kept; the most likely token, with all its ties, always is.
    The sets are those of transformers' logits warpers in exact arithmetic; where a border falls among tied tokens top-p
    keeps them all, transformers as many as the order of its sort happens to leave.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        rules: R rules, e.g. ``[TopP(0.9), KeepAll()]`` or :func:`paper_rules`.
        temperature: as for :func:`fastcalib.statistics`; a sequence of K adds an axis before that of the rules.
        sets: valid tokens, N = prod(*) sets: adds what is kept of them. :class:`SizeOracle` needs them.
        counts: (nnz,), how many valid outputs continue with each valid token; without it each counts once in
            ``recall``.
        order: "temperature-first" applies a rule to softmax(z / T); "temperature-last" applies it to softmax(z) and
            draws from what is left at T, so only masses depend on T.
        vocab_size: columns from here on are padding: they are neither kept nor counted.
        backend: "auto", "eager", "cpp", "triton" or "cuda".
        valid: False leaves out what is kept of the sets.

    Returns:
        :class:`Cutoffs`. A row without a softmax (any NaN or +inf, or nothing but -inf) keeps 0 tokens; its threshold,
        masses, precision and recall are NaN. An empty set has precision 0 and recall NaN. Not differentiable.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range; the message names argument and value.

    Source: the rules as in transformers (code); the figures of merit as Definition 4.1 of Banayeeanzade et al. 2026
    (arXiv 2605.11128). On the C++ and eager backends a rule's set is exact in float64; elsewhere masses are float32
    sums, and top-p, epsilon and eta may decide otherwise within about 1e-6 of their border.

    On an accelerator thresholds are found by bisection over the numbers of the dtype: some 37 reads of 16-bit logits
    and 69 of float32, however many the rules. The host waits for nothing, and nothing of V numbers is made, but that
    strided rows of more than two dimensions are copied. Not yet run on a GPU.

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
        >>> c = cutoffs(logits, [TopK(2), TopP(0.5)], [0.5, 2.0], sets=fastcalib.ValidSets.from_lists([[0, 3]]))
        >>> c.kept.tolist(), c.precision.tolist()
        ([[[2, 1], [2, 2]]], [[[0.5, 1.0], [0.5, 0.5]]])
    """
    return find_cutoffs(logits, rules, temperature, sets, counts, order, vocab_size, backend, valid)[1]


def find_cutoffs(
    logits: Tensor,
    rules: Sequence[Rule],
    temperature: Temperature,
    sets: ValidSets | None,
    counts: Tensor | None,
    order: str,
    vocab_size: int | None,
    backend: str,
    valid: bool = True,
    tokens: bool = False,
) -> tuple[RowCutoffs, Cutoffs]:
    """:func:`cutoffs`, and what the operation gave; ``tokens`` (C++ backend): with what it knows of each valid one."""
    width = check_logits(logits, vocab_size)
    rules = _check_rules(rules, sets)
    if order not in ORDERS:
        raise ValueError(f'order must be "temperature-first" or "temperature-last", got {order!r}')
    if sets is not None:
        check_are_sets(sets)
        counts = check_counts(counts, sets)
    elif counts is not None:
        raise ValueError("counts are those of valid tokens and need sets")
    _, has_axis = normalise_temperature(temperature, logits)
    coded = [(rule.code, rule.value) for rule in rules]
    found = cutoffs_op(
        logits,
        coded,
        temperature,
        sets=sets,
        counts=counts,
        valid=valid,
        last=order == ORDERS[1],
        width=width,
        backend=backend,
        tokens=tokens,
    )
    return found, _named(found, sets, logits.shape[:-1], has_axis)


def _named(found: RowCutoffs, sets: ValidSets | None, leading: Sequence[int], has_axis: bool) -> Cutoffs:
    """In the shapes asked for, with the shares."""

    def shaped(values: Tensor) -> Tensor:
        return values.reshape(*leading, *(values.shape[1:] if has_axis else values.shape[2:]))

    threshold, kept, mass = shaped(found.threshold), shaped(found.kept), shaped(found.kept_mass)
    if found.keeps is None or sets is None:
        return Cutoffs(threshold, kept, mass)
    assert found.kept_valid is not None and found.kept_counts is not None and found.total_counts is not None
    assert found.valid_mass is not None
    n_rows, k_count, r_count = found.threshold.shape
    step = max(1, CHUNK // (k_count * r_count)) if found.threshold.device.type == "cpu" else max(1, n_rows)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        # Shares of counts, which nobody else looks at, take their place.
        ratio = (
            part if part.dtype == torch.float64 else torch.empty(part.shape, dtype=torch.float64, device=part.device)
        )
        for start in range(0, len(part), step):
            rows = slice(start, start + step)
            some = part[rows].to(torch.float64) / whole[rows]
            ratio[rows] = some.masked_fill_(found.threshold[rows].isnan(), torch.nan)
        return shaped(ratio)

    return Cutoffs(
        threshold,
        kept,
        mass,
        found.keeps if has_axis else found.keeps[:, 0],
        shaped(found.kept_valid),
        shaped(found.valid_mass),
        precision=share(found.kept_valid, found.kept),
        recall=share(found.kept_counts, found.total_counts[:, None, None]),
        token_recall=share(found.kept_valid, sets.counts()[:, None, None]),
    )


def _check_rules(rules: Sequence[Rule], sets: ValidSets | None) -> Sequence[Rule]:
    if isinstance(rules, Rule):
        raise TypeError(f"rules must be a sequence of rules, got {rules!r}; put it in a list")
    rules = list(rules)
    if not rules:
        raise ValueError("rules is empty; pass at least one, e.g. [KeepAll()]")
    for i, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{i}] is {rule!r}, no cutoff rule; parse_rule makes one of a string")
        if isinstance(rule, SizeOracle) and sets is None:
            raise ValueError(f"rules[{i}] is SizeOracle(), which needs sets to know how many tokens are valid")
    return rules
