"""``cutoffs``: thresholds of many cutoff rules at many temperatures, and what lies above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import extension, resolve
from ..eager.cutoffs import cutoffs as eager_cutoffs
from ..eager.softmax import statistics_dtype
from ..valid_sets import ValidSets
from ._arguments import (
    Index,
    Temperature,
    flat_index,
    normalise_temperature,
    raise_bad_id,
    row_layout,
)
from ._cutoff_rules import Rule
from ._cutoff_search import search
from ._library import LIBRARY
from ._set_arguments import check_sets
from .statistics import statistics

# Of (valid tokens, K, R) looked at in one go.
CHUNK = 1 << 20


@dataclass(frozen=True)
class RowCutoffs:
    """(N, K, R) each, but for keeps (nnz, K, R), total_counts (N,) and what belongs to tokens."""

    threshold: Tensor
    kept: Tensor
    kept_mass: Tensor
    keeps: Tensor | None = None
    kept_valid: Tensor | None = None
    valid_mass: Tensor | None = None
    kept_counts: Tensor | None = None  # float64
    total_counts: Tensor | None = None  # float64 (N,)
    # With tokens: of each valid one how many lie above it (-1 next to a NaN) and are tied with it, and its logit less
    # the row's maximum, (nnz,); logsumexp of these differences over T, and the entropy, (N, K); all but counts float64.
    n_greater: Tensor | None = None
    n_equal: Tensor | None = None
    below: Tensor | None = None
    log_norm: Tensor | None = None
    entropy: Tensor | None = None


LIBRARY.define(
    "cutoffs(Tensor logits, Tensor temperature, Tensor rules, bool last, Tensor? values, Tensor? offsets, "
    "Tensor? counts, bool valid, SymInt vocab_size, bool tokens=False) -> (Tensor threshold, Tensor kept, "
    "Tensor kept_mass, Tensor keeps, Tensor kept_valid, Tensor valid_mass, Tensor kept_counts, Tensor total_counts, "
    "Tensor n_greater, Tensor n_equal, Tensor below, Tensor log_norm, Tensor entropy)"
)


def _allocate(
    logits: Tensor,
    temperature: Tensor,
    rules: Tensor,
    last: bool,
    values: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    valid: bool,
    vocab_size: int,
    tokens: bool = False,
) -> tuple[Tensor, ...]:
    rows, wide = logits.shape[:-1].numel(), statistics_dtype(logits.dtype)
    k = temperature.shape[1]
    shape = (rows, k, rules.shape[0])
    nnz = values.shape[0] if values is not None and valid else 0
    of_sets = shape if valid else (0, *shape[1:])
    new = logits.new_empty
    return (
        new(shape, dtype=wide), new(shape, dtype=torch.int64), new(shape, dtype=wide),
        new((nnz, *shape[1:]), dtype=torch.bool), new(of_sets, dtype=torch.int64), new(of_sets, dtype=wide),
        new(of_sets, dtype=torch.float64), new(of_sets[:1], dtype=torch.float64),
        new(nnz if tokens else 0, dtype=torch.int64), new(nnz if tokens else 0, dtype=torch.int64),
        new(nnz if tokens else 0, dtype=torch.float64), new(rows if tokens else 0, k, dtype=torch.float64),
        new(rows if tokens else 0, k, dtype=torch.float64),
    )  # fmt: skip


def _forward(
    logits: Tensor,
    temperature: Tensor,
    rules: Tensor,
    last: bool,
    values: Tensor | None,
    offsets: Tensor | None,
    counts: Tensor | None,
    valid: bool,
    vocab_size: int,
    tokens: bool = False,
) -> tuple[Tensor, ...]:
    out = _allocate(logits, temperature, rules, last, values, offsets, counts, valid, vocab_size, tokens)
    layout = row_layout(logits)
    temperature, rules = temperature.contiguous(), rules.contiguous()
    counts = None if counts is None else counts.to(torch.float64).contiguous()
    threshold, kept, mass, *of_sets = (t.data_ptr() for t in out[:8])
    bad = extension().cutoffs(
        *layout.args(),
        vocab_size,
        temperature.data_ptr(),
        temperature.shape[0],
        temperature.shape[1],
        rules.data_ptr(),
        rules.shape[0],
        last,
        0 if values is None else values.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        0 if counts is None else counts.data_ptr(),
        threshold,
        kept,
        mass,
        valid,
        *of_sets,
        tokens,
        *(t.data_ptr() for t in out[8:]),
        torch.get_num_threads(),
    )
    if bad >= 0:
        assert values is not None
        raise_bad_id(flat_index(values, 0, offsets, logits), bad, vocab_size, None, "sets")
    return out


def _setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output)  # type: ignore[attr-defined]


def _autograd(ctx: object, *_: object) -> tuple:
    return (None,) * 10  # which tokens are kept has no gradient


LIBRARY.impl("cutoffs", _forward, "CPU")
torch.library.register_fake("fastcalib::cutoffs", _allocate, lib=LIBRARY)
torch.library.register_autograd("fastcalib::cutoffs", _autograd, setup_context=_setup_context, lib=LIBRARY)


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
    tokens: bool = False,
) -> RowCutoffs:
    """See :func:`fastcalib.decoding.cutoffs`, which checks the arguments. ``tokens``: on the C++ backend alone."""
    ids = None if sets is None else check_sets(sets, logits, width)
    backend = resolve(backend, logits.device, logits.dtype, "cutoffs")
    temperatures, _ = normalise_temperature(temperature, logits)
    if backend == "cpp":
        values, offsets = (None, None) if sets is None else (sets.values, sets.offsets)
        coded = torch.tensor([(int(rule), value) for rule, value in rules], dtype=torch.float64)
        valid = valid and sets is not None
        out = torch.ops.fastcalib.cutoffs(
            logits, temperatures.detach(), coded, last, values, offsets, counts, valid, width, valid and tokens
        )
        return RowCutoffs(*(out[: 13 if valid and tokens else 8 if valid else 3]))
    flat = _several(temperature, temperatures, logits)
    rows = logits[..., :width].detach().reshape(-1, width)
    sizes = None if sets is None else sets.counts().clamp(min=1)
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
