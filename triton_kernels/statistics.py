"""statistics, forward: one read of the logits -> everything of TokenStatistics. Not yet run on a GPU.

Two kernels. ``_segments``: one program per segment of a row and group of temperatures; it reads its logits once and
leaves a state of 6 + 4 K numbers. ``_finish``: one warp per row merges the states in the order of the segments, in
float64, gathers the selected logits, and writes all results. A row costs 24 + 16 K bytes of states per 64 KiB read:
under 0.2%.

Because segments depend on V and dtype alone and always merge in the second kernel, a row has the same bits alone or in
any batch, and few long rows still fill the machine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .row_state import (
    LN2,
    LOG2E,
    LOWEST,
    LOWEST_SHIFT,
    NONE,
    add_moments,
    add_spread,
    add_spread_of_tail,
    bounds_of_row,
    careful_spread,
    first_equal,
    is_skipped,
    load_tail,
    load_tile,
    near_mean,
    row_of,
    top_of,
    total_of_lanes,
)

# More selected tokens a row than this are ranked in a read of their own, which compares only what passes the lowest of
# them: cheaper than 4 instructions per element and token here, where an H100 leaves 18 before memory stops being the
# limit.
MAX_RANKED_ALONG = 2


@triton.jit
def _add_tile(values, first_vector, top, where, sums, counts, masses, c, bounds,
              LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Everything that -inf elements do not disturb: maximum, sums of exponentials, counts above thresholds."""
    tile_top, tile_where = top_of(values, first_vector, LANES, VECTOR, UNROLL)
    where = tl.where(tile_top > top, tile_where, where)
    old = tl.maximum(top, LOWEST)
    top = tl.maximum(top, tile_top)
    new = tl.maximum(top, LOWEST)
    new_sums = ()
    for g in tl.static_range(len(c)):
        s0, s1, s2, r2 = add_moments(
            sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3], values, new, old, c[g]
        )
        new_sums = new_sums + (s0, s1, s2, r2)
    new_counts = ()
    new_masses = ()
    for j in tl.static_range(len(bounds)):
        greater = counts[2 * j]
        not_less = counts[2 * j + 1]
        for i in tl.static_range(len(values)):
            greater += (values[i] > bounds[j]).to(tl.int32)
            not_less += (values[i] >= bounds[j]).to(tl.int32)
        new_counts = new_counts + (greater, not_less)
        for g in tl.static_range(len(c)):
            above = tl.zeros([LANES], tl.float32)
            for i in tl.static_range(len(values)):
                # the same exponential as in add_moments: the compiler forms it once
                e = tl.exp2(tl.maximum((values[i] - new) * c[g], -126.0))
                above += tl.where(values[i] > bounds[j], e, 0.0)
            r = tl.exp2(tl.maximum((old - new) * c[g], LOWEST_SHIFT))
            new_masses = new_masses + (tl.fma(r, masses[j * len(c) + g], above),)
    return top, where, new_sums, new_counts, new_masses


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "temperature_stride", "k_count",
                               "per_row", "ignore_index", "segments"])  # fmt: skip
def _segments(
    x,  # (N, V) by strides
    inner, outer_stride, inner_stride, vocab,
    temperature,  # float64 (1 or N, K)
    temperature_stride, k_count,
    ids,  # int64 (nnz,) or None
    per_row, offsets, ignore_index,
    bounds,  # float32 (N, RANKED) or None: logits to count above
    reals,  # float32 (N, S, 3): maximum, mean, sum of squares about it
    integers,  # int32 (N, S, 3): vector of the maximum, finite logits, whether there is a NaN or +inf
    sums,  # float32 (N, S, K, 4)
    counts,  # int32 (N, S, RANKED, 2)
    masses,  # float32 (N, S, RANKED, K)
    segments,
    ALIGN: tl.constexpr, GROUP: tl.constexpr, RANKED: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = LANES * VECTOR * UNROLL
    part = tl.program_id(0).to(tl.int64)
    first_k = tl.program_id(1) * GROUP
    row = part // segments
    start = (part % segments).to(tl.int32) * SEGMENT
    if ids is not None:
        begin, end = bounds_of_row(row, per_row, offsets)
        if is_skipped(ids, begin, end, ignore_index):
            return
    count = tl.minimum(vocab - start, SEGMENT)
    pointer = row_of(x, row, inner, outer_stride, inner_stride) + start
    lane = tl.arange(0, LANES)

    c = ()
    state = ()
    for g in tl.static_range(GROUP):
        k = tl.minimum(first_k + g, k_count - 1)
        b = 1.0 / tl.load(temperature + row * temperature_stride + k)
        c = c + ((b * LOG2E).to(tl.float32),)
        for _ in tl.static_range(4):
            state = state + (tl.zeros([LANES], tl.float32),)
    limits = ()
    tally = ()
    above = ()
    for j in tl.static_range(RANKED):
        limits = limits + (tl.load(bounds + row * RANKED + j),)
        tally = tally + (tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32))
        for _ in tl.static_range(GROUP):
            above = above + (tl.zeros([LANES], tl.float32),)
    top = tl.full([LANES], -float("inf"), tl.float32)
    where = lane
    total = tl.zeros([LANES], tl.float32)
    square = tl.zeros([LANES], tl.float32)
    center = near_mean(pointer, count)

    whole = count // TILE * TILE
    for at in tl.range(0, whole, TILE):
        values = load_tile(pointer, at, ALIGN, LANES, VECTOR, UNROLL)
        total, square = add_spread(total, square, values, center)
        top, where, state, tally, above = _add_tile(
            values, at // VECTOR, top, where, state, tally, above, c, limits, LANES, VECTOR, UNROLL
        )
    if whole < count:
        rest = count - whole
        values = load_tail(pointer + whole, rest, LANES, VECTOR, UNROLL)
        total, square = add_spread_of_tail(total, square, values, center, rest, LANES, VECTOR, UNROLL)
        top, where, state, tally, above = _add_tile(
            values, whole // VECTOR, top, where, state, tally, above, c, limits, LANES, VECTOR, UNROLL
        )

    highest = tl.max(top, 0)
    new = tl.maximum(highest, LOWEST)
    old = tl.maximum(top, LOWEST)
    for g in tl.static_range(GROUP):
        if first_k + g < k_count:
            s0, s1, s2, r2 = total_of_lanes(
                state[4 * g], state[4 * g + 1], state[4 * g + 2], state[4 * g + 3], old, new, c[g]
            )
            to = sums + (part * k_count + first_k + g) * 4
            tl.store(to, s0)
            tl.store(to + 1, s1)
            tl.store(to + 2, s2)
            tl.store(to + 3, r2)
            for j in tl.static_range(RANKED):
                r = tl.exp2(tl.maximum((old - new) * c[g], LOWEST_SHIFT))
                mass = tl.sum(r * above[j * GROUP + g], 0)
                tl.store(masses + (part * RANKED + j) * k_count + first_k + g, mass)
    if first_k == 0:
        n = count
        bad = 0
        sum_of_lanes = tl.sum(total, 0)
        sum_of_squares = tl.sum(square, 0)
        share = sum_of_lanes / n.to(tl.float32)
        mean = center + share
        m2 = tl.maximum(tl.fma(-share, sum_of_lanes, sum_of_squares), 0.0)
        if not ((tl.abs(sum_of_lanes) <= -LOWEST) & (sum_of_squares <= -LOWEST)):
            n, mean, m2, bad = careful_spread(pointer, count, LANES, VECTOR, UNROLL)
        tl.store(reals + part * 3, highest)
        tl.store(reals + part * 3 + 1, mean)
        tl.store(reals + part * 3 + 2, m2)
        tl.store(integers + part * 3, tl.min(tl.where(top == highest, where, NONE), 0))
        tl.store(integers + part * 3 + 1, n)
        tl.store(integers + part * 3 + 2, bad)
        for j in tl.static_range(RANKED):
            # the columns that fill up the last tile are -inf, and a threshold of -inf does not exceed them
            filled = tl.where(
                limits[j] == -float("inf"), (count - whole + TILE - 1) // TILE * TILE - (count - whole), 0
            )
            tl.store(counts + (part * RANKED + j) * 2, tl.sum(tally[2 * j], 0))
            tl.store(counts + (part * RANKED + j) * 2 + 1, tl.sum(tally[2 * j + 1], 0) - filled)


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "temperature_stride", "k_count",
                               "per_row", "ignore_index", "segments", "segment", "n_rows"])  # fmt: skip
def _finish(
    x, inner, outer_stride, inner_stride, vocab, temperature, temperature_stride, k_count,
    ids, per_row, offsets, ignore_index, reals, integers, sums, counts, masses, segments,  # as in _segments
    segment,  # columns of each
    picked,  # float32 (nnz,): logits of the selected tokens where x is None; integers then tell columns, not vectors
    rows,  # float32 (6, N, K): ROW_FIELDS of fastcalib/ops/_statistics.py
    scalars,  # float32 (2, N): sum_logits, std_logits
    log_prob,  # float32 (nnz, K)
    argmax,  # int64 (N,)
    n_greater, n_equal,  # int64 (nnz,) or None
    mass_greater,  # float32 (nnz, K) or None
    saved,  # float32 (N, 3 + 2 K): max, mean - max, finite logits, then log s0 and E[z] - max of each temperature
    n_rows,
    RANKED: tl.constexpr, VECTOR: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,  # tiles of segments and of temperatures
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of_row(row, per_row, offsets)
    skipped = False
    if ids is not None:
        skipped = is_skipped(ids, begin, end, ignore_index)
    nan = float("nan")
    width = 3 + 2 * k_count
    lanes = tl.arange(0, COLUMNS)
    tokens = tl.arange(0, 32)
    if skipped:
        tl.store(scalars + row, 0.0)
        tl.store(scalars + n_rows + row, 0.0)
        tl.store(argmax + row, -1)
        for at in tl.range(0, width, COLUMNS):
            tl.store(saved + row * width + at + lanes, 0.0, mask=at + lanes < width)
        for at in tl.range(0, k_count, COLUMNS):
            for f in tl.static_range(6):
                tl.store(rows + (f * n_rows + row) * k_count + at + lanes, 0.0, mask=at + lanes < k_count)
        for at in tl.range(begin, end, 32):
            inside = at + tokens < end
            for k in tl.range(0, k_count):
                tl.store(log_prob + (at + tokens) * k_count + k, 0.0, mask=inside)
                if n_greater is not None:
                    tl.store(mass_greater + (at + tokens) * k_count + k, 0.0, mask=inside)
            if n_greater is not None:
                tl.store(n_greater + at + tokens, 0, mask=inside)
                tl.store(n_equal + at + tokens, 0, mask=inside)
    else:
        part = tl.arange(0, PARTS)
        inside_parts = part < segments
        first_part = row * segments
        tops = tl.load(reals + (first_part + part) * 3, mask=inside_parts, other=-float("inf"))
        highest = tl.max(tops, 0)
        safe = tl.maximum(highest, LOWEST).to(tl.float64)
        finite = tl.load(integers + (first_part + part) * 3 + 1, mask=inside_parts, other=0)
        undefined = tl.max(tl.load(integers + (first_part + part) * 3 + 2, mask=inside_parts, other=0), 0) > 0
        n = tl.sum(finite, 0)
        dead = undefined | (n == 0)

        # Spread: mean and squares about it, merged about the common mean (Chan et al.).
        each = finite.to(tl.float64)
        means = tl.load(reals + (first_part + part) * 3 + 1, mask=inside_parts, other=0.0).to(tl.float64)
        squares = tl.load(reals + (first_part + part) * 3 + 2, mask=inside_parts, other=0.0).to(tl.float64)
        total = tl.sum(each * means, 0)
        mean = total / tl.maximum(n, 1).to(tl.float64)
        away = means - mean
        m2 = tl.sum(squares + each * away * away, 0)
        std = tl.sqrt(m2 / tl.maximum(n - 1, 1).to(tl.float64))
        masked = n < vocab
        tl.store(scalars + row, tl.where(dead, nan, tl.where(masked, -float("inf"), total.to(tl.float32))))
        tl.store(scalars + n_rows + row, tl.where(dead, nan, std.to(tl.float32)))

        # Lowest column of the maximum: the first segment that has it, its first vector, and the place within that.
        holder = tl.min(tl.where(tops == highest, part, PARTS - 1), 0)
        vector = tl.load(integers + (first_part + holder) * 3)
        column = holder * segment + tl.where(dead, 0, vector) * VECTOR
        if x is not None:
            base = row_of(x, row, inner, outer_stride, inner_stride)
            column += first_equal(base + column, vocab - column, highest, VECTOR)
        tl.store(argmax + row, tl.where(dead, -1, column).to(tl.int64))
        out = saved + row * width
        tl.store(out, tl.where(dead, nan, highest))
        tl.store(out + 1, tl.where(dead, nan, (mean - safe).to(tl.float32)))
        # A dead row keeps 0 or NaN here: backward tells "all -inf" (gradient 0) from NaN (gradient NaN) by it.
        tl.store(out + 2, tl.where(undefined, nan, n.to(tl.float32)))

        for first_k in tl.range(0, k_count, COLUMNS):
            k = first_k + lanes
            inside = k < k_count
            t = tl.load(temperature + row * temperature_stride + k, mask=inside, other=1.0)
            b = 1.0 / t
            c = b * LOG2E
            r = tl.exp2(tl.maximum(c[None, :] * (tops.to(tl.float64) - safe)[:, None], LOWEST_SHIFT))
            at = ((first_part + part)[:, None] * k_count + k[None, :]) * 4
            both = inside_parts[:, None] & inside[None, :]
            p0 = tl.load(sums + at, mask=both, other=0.0).to(tl.float64)
            p1 = tl.load(sums + at + 1, mask=both, other=0.0).to(tl.float64)
            p2 = tl.load(sums + at + 2, mask=both, other=0.0).to(tl.float64)
            p3 = tl.load(sums + at + 3, mask=both, other=0.0).to(tl.float64)
            d = tl.maximum(c[None, :] * (tops.to(tl.float64) - safe)[:, None], LOWEST_SHIFT)
            s0 = tl.where(inside, tl.sum(r * p0, 0), 1.0)
            s1 = tl.sum(r * (p1 + d * p0), 0)
            s2 = tl.sum(r * (p2 + d * (2 * p1 + d * p0)), 0)
            r2 = tl.sum(r * r * p3, 0)
            log_s0 = tl.log(s0)
            t1 = s1 / s0
            y1 = t1 / c
            var = tl.maximum(s2 / s0 - t1 * t1, 0.0) / (c * c)
            to = rows + row * k_count + k
            step = n_rows.to(tl.int64) * k_count
            tl.store(to, tl.where(dead, nan, b * safe + log_s0).to(tl.float32), mask=inside)
            tl.store(to + step, tl.where(dead, nan, log_s0 - t1 * LN2).to(tl.float32), mask=inside)
            tl.store(to + 2 * step, tl.where(dead, nan, 1.0 / s0).to(tl.float32), mask=inside)
            tl.store(to + 3 * step, tl.where(dead, nan, r2 / (s0 * s0)).to(tl.float32), mask=inside)
            tl.store(to + 4 * step, tl.where(dead, nan, safe + y1).to(tl.float32), mask=inside)
            tl.store(to + 5 * step, tl.where(dead, nan, var).to(tl.float32), mask=inside)
            tl.store(out + 3 + k, tl.where(dead, nan, log_s0).to(tl.float32), mask=inside)
            tl.store(out + 3 + k_count + k, tl.where(dead, nan, y1).to(tl.float32), mask=inside)
            if ids is not None:
                for first in tl.range(begin, end, 32):
                    j = first + tokens
                    id = tl.load(ids + j, mask=j < end, other=ignore_index)
                    good = (id >= 0) & (id < vocab) & (id != ignore_index)
                    place = picked + j if x is None else base + id
                    z = tl.load(place, mask=good, other=float("nan")).to(tl.float64)
                    value = b[None, :] * (z - safe)[:, None] - log_s0[None, :]
                    value = tl.where(dead, nan, value)
                    value = tl.where((id == ignore_index)[:, None], 0.0, value)  # a bad id reads nothing and is NaN
                    chosen = (j < end)[:, None] & inside[None, :]
                    tl.store(log_prob + j[:, None] * k_count + k[None, :], value.to(tl.float32), mask=chosen)
            for j in tl.static_range(RANKED):
                at_mass = ((first_part + part)[:, None] * RANKED + j) * k_count + k[None, :]
                mass = tl.sum(r * tl.load(masses + at_mass, mask=both, other=0.0).to(tl.float64), 0) / s0
                mass = tl.where(dead, nan, tl.minimum(mass, 1.0))
                if ids is not None:
                    id = tl.load(ids + begin + j)
                    mass = tl.where((id >= 0) & (id < vocab), mass, nan)
                    mass = tl.where(id == ignore_index, 0.0, mass)
                tl.store(mass_greater + (begin + j) * k_count + k, mass.to(tl.float32), mask=inside)
        for j in tl.static_range(RANKED):
            at_count = ((first_part + part) * RANKED + j) * 2
            greater = tl.sum(tl.load(counts + at_count, mask=inside_parts, other=0), 0)
            equal = tl.sum(tl.load(counts + at_count + 1, mask=inside_parts, other=0), 0) - greater
            if ids is not None:
                id = tl.load(ids + begin + j)
                good = (id >= 0) & (id < vocab)
                greater = tl.where(id == ignore_index, 0, tl.where(good, greater, -1))
                # a selected token does not count itself; a NaN does not even equal itself
                equal = tl.where(id == ignore_index, 0, tl.where(good, tl.maximum(equal - 1, 0), -1))
            tl.store(n_greater + begin + j, greater.to(tl.int64))
            tl.store(n_equal + begin + j, equal.to(tl.int64))


def forward(
    out: tuple[Tensor, ...],
    logits: Tensor,
    layout: tuple[int, int, int, int],
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    bounds: Tensor | None = None,
) -> None:
    """Fill ``out``, the packed results of the registered operation, from the logits.

    Args:
        out: rows, scalars, log_prob, argmax, n_greater, n_equal, mass_greater, saved, as fastcalib/ops/_statistics.py
            allocates them, on the device of the logits.
        logits: float32, bfloat16 or float16; columns are adjacent.
        layout: number of rows, then inner, outer stride, inner stride of ``RowLayout``.
        temperature: float64 (1 or N, K), contiguous.
        index: int64 (nnz,), ``per_row`` of them a row or, if ``per_row`` is 0 and offsets are given, ragged.
        bounds: float32 (N, 1 or 2) logits to count above in the same read, or None. They are those of the index if
            there is one.
    """
    rows, scalars, log_prob, argmax, n_greater, n_equal, mass_greater, saved = out
    n_rows, k = layout[0], temperature.shape[1]
    if n_rows == 0:
        return
    ranked = 0 if bounds is None else bounds.shape[1]
    if ranked not in range(MAX_RANKED_ALONG + 1):
        raise ValueError(f"bounds must have at most {MAX_RANKED_ALONG} columns, got {ranked}")
    cut = launch.tiling(vocab_size, logits.dtype)
    segments = cut.segments(vocab_size)
    device, parts = logits.device, n_rows * segments
    reals = torch.empty(parts, 3, dtype=torch.float32, device=device)
    integers = torch.empty(parts, 3, dtype=torch.int32, device=device)
    sums = torch.empty(parts, k, 4, dtype=torch.float32, device=device)
    counts = torch.empty(parts, ranked, 2, dtype=torch.int32, device=device) if ranked else None
    masses = torch.empty(parts, ranked, k, dtype=torch.float32, device=device) if ranked else None
    stride = k if temperature.shape[0] > 1 else 0
    group, group_count = launch.groups(k)
    common = (
        logits, *layout[1:], vocab_size, temperature, stride, k, index, per_row, offsets, ignore_index,
    )  # fmt: skip
    _segments[(parts, group_count)](
        *common, bounds, reals, integers, sums, counts, masses, segments,
        ALIGN=launch.alignment(logits, *layout[2:]), GROUP=group, RANKED=ranked,
        **{**cut.constants(), **(launch.registers(cut.warps, 168) if ranked else {})},
    )  # fmt: skip
    _finish[(n_rows,)](
        *common, reals, integers, sums, counts, masses, segments, cut.segment, None, rows, scalars, log_prob, argmax,
        n_greater if ranked else None, n_equal if ranked else None, mass_greater if ranked else None, saved, n_rows,
        RANKED=ranked, VECTOR=cut.vector, PARTS=launch.next_power_of_two(segments),
        COLUMNS=min(launch.next_power_of_two(k), 16), num_warps=1, **launch.EXACT,
    )  # fmt: skip


def count_along(per_row: int, offsets: Tensor | None) -> bool:
    """Whether the ranks of so many tokens a row are counted in the read of ``forward``."""
    return offsets is None and 1 <= per_row <= MAX_RANKED_ALONG
