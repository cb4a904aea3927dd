"""``cutoffs``: thresholds of many cutoff rules at many temperatures, and what lies above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import resolve
from ..eager.cutoffs import cutoffs as eager_cutoffs
from ..eager.softmax import statistics_dtype
from ..valid_sets import ValidSets
from ._arguments import Index, Temperature, check_ids_eager, normalise_index, normalise_temperature
from ._cutoff_rules import Rule
from ._cutoff_search import search
from .statistics import statistics

# Of (valid tokens, K, R) looked at in one go.
CHUNK = 1 << 20


@dataclass(frozen=True)
class RowCutoffs:
    """(N, K, R) each, but for keeps (nnz, K, R) and total_counts (N,)."""

    threshold: Tensor
    kept: Tensor
    kept_mass: Tensor
    keeps: Tensor | None = None
    kept_valid: Tensor | None = None
    valid_mass: Tensor | None = None
    kept_counts: Tensor | None = None  # float64
    total_counts: Tensor | None = None  # float64 (N,)


def cutoffs(
    logits: Tensor,
    rules: Sequence[tuple[Rule, float]],
    temperature: Temperature,
    *,
    sets: ValidSets | None,
    counts: Tensor | None,
    valid: bool,
    last: bool,
    width: int,
    backend: str,
) -> RowCutoffs:
    """See :func:`fastcalib.decoding.cutoffs`, which checks the arguments."""
    backend = resolve(backend, logits.device, logits.dtype)
    temperatures, _ = normalise_temperature(temperature, logits)
    flat = _several(temperature, temperatures, logits)
    rows = logits[..., :width].detach().reshape(-1, width)
    sizes = ids = None
    if sets is not None:
        ids = normalise_index(sets, logits, "sets")
        sizes = sets.counts().clamp(min=1)
        check_ids_eager(ids, width, -1)
    if backend == "eager":
        found = eager_cutoffs(rows, rules, temperatures, sizes, last)
    else:
        found = search(rows, rules, flat, sizes, last, backend)
    if ids is None or not valid:
        return RowCutoffs(*found)
    assert sets is not None
    return _with_sets(rows, flat, found, sets, ids, counts, backend)


def _with_sets(
    rows: Tensor,
    temperature: list[float] | Tensor,
    found: tuple[Tensor, Tensor, Tensor],
    sets: ValidSets,
    ids: Index,
    counts: Tensor | None,
    backend: str,
) -> RowCutoffs:
    threshold = found[0]
    n_rows, k_count, r_count = threshold.shape
    wide = statistics_dtype(rows.dtype)
    nnz = ids.ids.shape[0]
    row_of = ids.rows(n_rows)
    z = rows[row_of, ids.ids].to(wide)
    log_prob = statistics(rows, sets, temperature, moments=False, backend=backend).log_prob
    assert log_prob is not None
    log_prob = log_prob.reshape(nnz, k_count)
    weights = torch.ones(nnz, dtype=torch.float64, device=rows.device) if counts is None else counts.to(torch.float64)
    keeps = torch.empty(nnz, k_count, r_count, dtype=torch.bool, device=rows.device)
    kept_valid = torch.zeros(threshold.shape, dtype=torch.int64, device=rows.device)
    valid_mass = torch.zeros(threshold.shape, dtype=torch.float64, device=rows.device)
    kept_counts = torch.zeros_like(valid_mass)
    step = max(1, CHUNK // (k_count * r_count))
    for start in range(0, nnz, step):
        part = slice(start, start + step)
        at, value = row_of[part], z[part, None, None]
        keep = (value >= threshold[at]) & (value > -torch.inf)
        keeps[part] = keep
        kept_valid.index_add_(0, at, keep.to(torch.int64))
        kept_counts.index_add_(0, at, torch.where(keep, weights[part, None, None], 0.0))
        p = log_prob[part].to(torch.float64).exp()[:, :, None]
        valid_mass.index_add_(0, at, torch.where(keep, p, 0.0))
    defined = ~threshold.isnan()
    total = torch.zeros(n_rows, dtype=torch.float64, device=rows.device).index_add_(0, row_of, weights)
    mass = torch.where(defined, valid_mass.clamp(max=1.0), torch.nan).to(wide)
    return RowCutoffs(*found, keeps, kept_valid, mass, kept_counts, total)


def _several(temperature: Temperature, normal: Tensor, logits: Tensor) -> list[float] | Tensor:
    """K numbers for all rows, or one for each row as (N,)."""
    if isinstance(temperature, Tensor):
        return normal[:, 0].expand(logits.shape[:-1].numel())
    return [float(t) for t in temperature] if isinstance(temperature, Sequence) else [float(temperature)]
