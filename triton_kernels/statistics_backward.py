"""statistics, backward: one read of the logits and one write, whatever the upstream gradients. Not yet run on a GPU.

The derivation is in csrc/cpu/statistics_backward.h. With y = z - max z, e = 2^(c y) and everything that depends on the
row alone folded into coefficients,
    dz_v = unit + slope y + sum_k e (constant + t (linear + t square) + power e),   t = c y, clamped where e is 0
    anyway,
and selected tokens, and the token that owns max_prob, get a term of their own.

Three kernels. ``_prepare``: one warp per row turns the upstream gradients into coefficients, in float64, and works out
the whole gradient of the selected columns while the logits are still there (the result may replace them).
``_gradient``: the pass over the row; K is a run-time loop over coefficients, the logits stay in registers.
``_scatter``: the selected columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .columns import chunk_bounds, head_of
from .row_state import LOG2E, bounds_of_row, is_skipped, row_of

# Coefficients of a row: kind, max, unit, slope, and five for each temperature.
ZERO = tl.constexpr(0)
UNDEFINED = tl.constexpr(1)
GENERAL = tl.constexpr(2)
FIXED = tl.constexpr(4)
PER_TEMPERATURE = tl.constexpr(5)
# 2^-504 is 0 in float32 beside any coefficient; the clamp keeps t^2 finite where a logit is -inf or the lowest number.
LOWEST_TERM = tl.constexpr(-504.0)


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "temperature_stride", "k_count",
                               "per_row", "ignore_index", "n_rows"])  # fmt: skip
def _prepare(
    x, inner, outer_stride, inner_stride, vocab, temperature, temperature_stride, k_count,
    ids, per_row, offsets, ignore_index,  # as in statistics.py
    grad_rows,  # float32 (6, N, K)
    grad_scalars,  # float32 (2, N)
    grad_log_prob,  # float32 (nnz, K)
    rows, scalars, argmax, saved,  # results of forward
    terms,  # float32 (N, 4 + 5 K): coefficients of _gradient
    columns,  # int64 (nnz,): the column a token writes, or -1
    values,  # float32 (nnz,): what it writes
    top_columns, top_values,  # the same for the owner of max_prob, (N,)
    n_rows,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    inside = k < k_count
    out = terms + row * (FIXED + PER_TEMPERATURE * k_count)
    begin, end = bounds_of_row(row, per_row, offsets)
    lanes = tl.arange(0, TOKENS)
    skipped = False
    if ids is not None:
        skipped = is_skipped(ids, begin, end, ignore_index)
    kind = 0
    if not skipped:
        t = tl.load(temperature + row * temperature_stride + k, mask=inside, other=1.0)
        b = 1.0 / t
        c = b * LOG2E
        kept = saved + row * (3 + 2 * k_count)
        top = tl.load(kept).to(tl.float64)
        mean = tl.load(kept + 1).to(tl.float64)
        n = tl.load(kept + 2).to(tl.float64)
        log_s0 = tl.load(kept + 3 + k, mask=inside, other=0.0).to(tl.float64)
        y1 = tl.load(kept + 3 + k_count + k, mask=inside, other=0.0).to(tl.float64)
        at = row * k_count + k
        step = n_rows.to(tl.int64) * k_count
        max_prob = tl.load(rows + 2 * step + at, mask=inside, other=0.0).to(tl.float64)
        collision = tl.load(rows + 3 * step + at, mask=inside, other=0.0).to(tl.float64)
        var = tl.load(rows + 5 * step + at, mask=inside, other=0.0).to(tl.float64)
        g_l = tl.load(grad_rows + at, mask=inside, other=0.0).to(tl.float64)
        g_h = tl.load(grad_rows + step + at, mask=inside, other=0.0).to(tl.float64)
        g_m = tl.load(grad_rows + 2 * step + at, mask=inside, other=0.0).to(tl.float64)
        g_c = tl.load(grad_rows + 3 * step + at, mask=inside, other=0.0).to(tl.float64)
        g_e = tl.load(grad_rows + 4 * step + at, mask=inside, other=0.0).to(tl.float64)
        g_v = tl.load(grad_rows + 5 * step + at, mask=inside, other=0.0).to(tl.float64)
        up_sum = tl.load(grad_scalars + row).to(tl.float64)
        up_std = tl.load(grad_scalars + n_rows + row).to(tl.float64)
        std = tl.load(scalars + n_rows + row).to(tl.float64)

        asked = (g_l != 0) | (g_h != 0) | (g_m != 0) | (g_c != 0) | (g_e != 0) | (g_v != 0)
        g_tokens = tl.zeros([COLUMNS], tl.float64)
        if ids is not None:
            for first in tl.range(begin, end, TOKENS):
                j = first + lanes
                id = tl.load(ids + j, mask=j < end, other=ignore_index)
                # an ignored token has no gradient, and an id outside the vocabulary none either (its result is NaN)
                good = (id >= 0) & (id < vocab) & (id != ignore_index)
                up = tl.load(
                    grad_log_prob + j[:, None] * k_count + k[None, :], mask=good[:, None] & inside[None, :], other=0.0
                ).to(tl.float64)
                g_tokens += tl.sum(up, 0)
                asked = asked | (tl.max((up != 0).to(tl.int32), 0) > 0)
        any_asked = (tl.max(asked.to(tl.int32), 0) > 0) | (up_sum != 0) | (up_std != 0)

        # in (y - E), then in t = c y; p = e / s0
        linear = b * g_e - b * b * g_h + 2 * g_v
        square = b * g_v
        constant = b * (g_l - g_tokens) + g_e - 2 * b * g_c * collision - b * g_m * max_prob - b * g_v * var
        constant += -linear * y1 + square * y1 * y1
        in_s0 = tl.exp2(-log_s0 * LOG2E)
        constant = constant * in_s0
        first_order = (linear - 2 * square * y1) / c * in_s0
        second_order = square / (c * c) * in_s0
        power = 2 * b * g_c * in_s0 * in_s0
        slope = tl.where((std > 0) & (up_std != 0), up_std / ((n - 1) * std), 0.0)
        unit = up_sum - slope * mean
        dead = top != top
        kind = tl.where(any_asked, tl.where(dead, tl.where(n == 0, ZERO, UNDEFINED), GENERAL), ZERO).to(tl.int32)
        tl.store(out + 1, top.to(tl.float32))
        tl.store(out + 2, unit.to(tl.float32))
        tl.store(out + 3, slope.to(tl.float32))
        to = out + FIXED + PER_TEMPERATURE * k
        tl.store(to, c.to(tl.float32), mask=inside)
        tl.store(to + 1, constant.to(tl.float32), mask=inside)
        tl.store(to + 2, first_order.to(tl.float32), mask=inside)
        tl.store(to + 3, second_order.to(tl.float32), mask=inside)
        tl.store(to + 4, power.to(tl.float32), mask=inside)

        if kind == GENERAL:
            base = row_of(x, row, inner, outer_stride, inner_stride)
            top_gradient = tl.sum(tl.where(inside, b * g_m * max_prob, 0.0), 0)
            owner = tl.where(top_gradient != 0, tl.load(argmax + row), -1)  # -1: nobody asks for it
            # of the owner: e = 1 and t = 0 for every temperature
            value = unit + tl.sum(tl.where(inside, constant + power, 0.0), 0)
            shared = tl.full([], 0, tl.int32)
            if ids is not None:
                for first in tl.range(begin, end, TOKENS):
                    j = first + lanes
                    id = tl.load(ids + j, mask=j < end, other=ignore_index)
                    good = (id >= 0) & (id < vocab) & (id != ignore_index)
                    z = tl.load(base + id, mask=good, other=-float("inf")).to(tl.float64)
                    masked = z == -float("inf")
                    y = tl.where(masked, 0.0, z - top)
                    term = tl.maximum(c[None, :] * y[:, None], LOWEST_TERM)
                    e = tl.exp2(term)
                    own = e * (constant[None, :] + term * (first_order[None, :] + term * second_order[None, :])
                               + power[None, :] * e)  # fmt: skip
                    own = unit + slope * y + tl.sum(tl.where(inside[None, :], own, 0.0), 1)
                    # A token that stands twice gets the sum of its terms, once, before rounding to the dtype.
                    earlier = tl.zeros([TOKENS], tl.int32)
                    for other in tl.range(begin, end, TOKENS):
                        o = other + lanes
                        other_id = tl.load(ids + o, mask=o < end, other=ignore_index)
                        up = tl.load(
                            grad_log_prob + o[:, None] * k_count + k[None, :],
                            mask=((o < end) & (other_id != ignore_index))[:, None] & inside[None, :], other=0.0,
                        ).to(tl.float64)  # fmt: skip
                        each = tl.sum(tl.where(inside[None, :], b[None, :] * up, 0.0), 1)
                        same = (id[:, None] == other_id[None, :]) & (o < end)[None, :]
                        own += tl.sum(tl.where(same, each[None, :], 0.0), 1)
                        earlier += tl.sum((same & (o[None, :] < j[:, None])).to(tl.int32), 1)
                    is_owner = good & (id == owner)
                    own += tl.where(is_owner, top_gradient, 0.0)
                    shared += tl.sum(is_owner.to(tl.int32), 0)
                    writes = good & (earlier == 0) & (z > -float("inf"))
                    tl.store(columns + j, tl.where(writes, id, -1), mask=j < end)
                    tl.store(values + j, own.to(tl.float32), mask=j < end)
            tl.store(top_columns + row, tl.where(shared == 0, owner, -1))
            tl.store(top_values + row, (value + top_gradient).to(tl.float32))
    tl.store(out, kind)
    if kind != GENERAL:  # nothing is selected: zeros, or NaN throughout
        tl.store(top_columns + row, -1)
        if ids is not None:
            for first in tl.range(begin, end, TOKENS):
                tl.store(columns + first + lanes, -1, mask=first + lanes < end)


@triton.jit
def _gradient_of(z, terms, k_count):
    """The gradient of columns that nothing selected, from the coefficients of the row."""
    y = z - tl.load(terms + 1)
    out = tl.where(z > -float("inf"), tl.fma(y, tl.load(terms + 3), tl.load(terms + 2)), 0.0)
    for k in tl.range(0, k_count):
        at = terms + FIXED + k * PER_TEMPERATURE
        t = tl.maximum(y * tl.load(at), LOWEST_TERM)
        e = tl.exp2(t)
        inner = tl.fma(t, tl.load(at + 3), tl.load(at + 2))
        out = tl.fma(e, tl.fma(t, inner, tl.fma(e, tl.load(at + 4), tl.load(at + 1))), out)
    return out


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "out_inner", "out_outer_stride",
                               "out_inner_stride", "vocab", "width", "k_count", "chunks"])  # fmt: skip
def _gradient(
    x, inner, outer_stride, inner_stride,
    out, out_inner, out_outer_stride, out_inner_stride,
    vocab, width, terms, k_count, chunks,
    X_ALIGN: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    source = row_of(x, row, inner, outer_stride, inner_stride)
    target = row_of(out, row, out_inner, out_outer_stride, out_inner_stride)
    head = head_of(target, SIZE, VECTOR)
    begin, end = chunk_bounds((program % chunks).to(tl.int32), head, width, CHUNK)
    columns = tl.arange(0, TILE)
    terms += row * (FIXED + PER_TEMPERATURE * k_count)
    kind = tl.load(terms)
    if kind != GENERAL:
        fill = tl.where(kind == UNDEFINED, float("nan"), 0.0)
        for at in tl.range(begin, end, TILE):
            value = tl.where(at + columns < vocab, fill, 0.0)
            tl.store(target + at + columns, value.to(out.dtype.element_ty), mask=at + columns < end)
    else:
        if begin == 0:  # a thread each: replicated over warps, one could read what another has replaced already
            short = tl.arange(0, LANES)
            z = tl.load(source + short, mask=short < tl.minimum(head, vocab), other=-float("inf")).to(tl.float32)
            value = tl.where(short < vocab, _gradient_of(z, terms, k_count), 0.0)
            tl.store(target + short, value.to(out.dtype.element_ty), mask=short < tl.minimum(head, width))
            begin = tl.minimum(head, width)
        whole = begin + tl.maximum(tl.minimum(end, vocab) - begin, 0) // TILE * TILE
        # Every tile starts at a boundary: the first one by the head, the others since TILE is a multiple of it.
        body = tl.multiple_of(target + begin, 16)
        read = tl.multiple_of(source + begin, X_ALIGN)
        for at in tl.range(0, whole - begin, TILE):
            z = tl.load(read + at + columns).to(tl.float32)
            tl.store(body + at + columns, _gradient_of(z, terms, k_count).to(out.dtype.element_ty))
        for at in tl.range(whole, end, TILE):  # one masked tail, and padding beyond the vocabulary
            z = tl.load(source + at + columns, mask=at + columns < tl.minimum(vocab, end), other=-float("inf")).to(
                tl.float32
            )
            value = tl.where(at + columns < vocab, _gradient_of(z, terms, k_count), 0.0)
            tl.store(target + at + columns, value.to(out.dtype.element_ty), mask=at + columns < end)


@triton.jit(do_not_specialize=["out_inner", "out_outer_stride", "out_inner_stride", "per_row"])
def _scatter(
    out, out_inner, out_outer_stride, out_inner_stride, per_row, offsets, columns, values, top_columns, top_values,
    TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = row_of(out, row, out_inner, out_outer_stride, out_inner_stride)
    top = tl.load(top_columns + row)
    if top >= 0:
        tl.store(target + top, tl.load(top_values + row).to(out.dtype.element_ty))
    if columns is not None:
        begin, end = bounds_of_row(row, per_row, offsets)
        for first in tl.range(begin, end, TOKENS):
            j = first + tl.arange(0, TOKENS)
            column = tl.load(columns + j, mask=j < end, other=-1)
            value = tl.load(values + j, mask=column >= 0, other=0.0)
            tl.store(target + column, value.to(out.dtype.element_ty), mask=column >= 0)


def backward(
    out: Tensor,
    out_layout: tuple[int, int, int, int],
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    layout: tuple[int, int, int, int],
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    rows: Tensor,
    scalars: Tensor,
    argmax: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
) -> None:
    """Write the gradient to the logits into ``out``, which has their shape and dtype and may be the logits themselves.

    Layouts and the index are those of ``statistics.forward``; all other tensors are contiguous.
    """
    n_rows, k, width = layout[0], temperature.shape[1], logits.shape[-1]
    if n_rows == 0:
        return
    device = logits.device
    nnz = 0 if index is None else index.shape[0]
    terms = torch.empty(n_rows, FIXED.value + PER_TEMPERATURE.value * k, dtype=torch.float32, device=device)
    columns = torch.empty(nnz, dtype=torch.int64, device=device) if index is not None else None
    values = torch.empty(nnz, dtype=torch.float32, device=device) if index is not None else None
    top_columns = torch.empty(n_rows, dtype=torch.int64, device=device)
    top_values = torch.empty(n_rows, dtype=torch.float32, device=device)
    _prepare[(n_rows,)](
        logits, *layout[1:], vocab_size, temperature, k if temperature.shape[0] > 1 else 0, k, index, per_row, offsets,
        ignore_index, grad_rows, grad_scalars, grad_log_prob, rows, scalars, argmax, saved, terms, columns, values,
        top_columns, top_values, n_rows, COLUMNS=launch.next_power_of_two(k), TOKENS=8, num_warps=1, **launch.EXACT,
        **launch.registers(1, 128),
    )  # fmt: skip
    cut = launch.tiling(vocab_size, logits.dtype)
    chunk = launch.chunk(cut)
    chunks = -(-width // chunk)
    _gradient[(n_rows * chunks,)](
        logits, *layout[1:], out, *out_layout[1:], vocab_size, width, terms, k, chunks,
        X_ALIGN=launch.relative_alignment(logits, layout, out, out_layout), SIZE=logits.element_size(),
        LANES=cut.lanes, VECTOR=cut.vector, TILE=cut.tile, CHUNK=chunk, num_warps=cut.warps, **launch.EXACT,
    )  # fmt: skip
    _scatter[(n_rows,)](
        out,
        *out_layout[1:],
        per_row,
        offsets,
        columns,
        values,
        top_columns,
        top_values,
        TOKENS=32,
        num_warps=1,
        **launch.EXACT,
    )
