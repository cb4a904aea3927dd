"""Statistics of a row and the gradient to its logits in one launch, for upstream gradients known beforehand. Not yet
run on a GPU.

A loss that is linear in log-probability, normaliser, maximum probability and sum of logits has the same gradient in
them at any logits, so nobody needs to see them between forward and backward. A program takes a row through both: one
look sums, a second one writes the gradient (over the logits, if they are the target). From memory each logit comes
once: the second look begins with what the first one read last, and finds the rest in the L2 cache as long as the rows
in flight fit there. So a program is as many warps as there are segments for them, up to 16: one to two share a
multiprocessor, 132 to 264 rows are in flight, 34 to 68 MB of 128,256 bfloat16 logits against 50 MB of L2 on an H100.

Bits are those of statistics.py and statistics_backward.py: the same lanes sum the same segments, only that four
segments are summed at a time, by 128 lanes each. So a batch with fewer rows than multiprocessors, which those serve
better, has the same results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .columns import head_of
from .row_state import LOG2E, LOWEST, LOWEST_SHIFT, NONE, careful_spread, first_equal, row_of, top_of, unzip

# Segments summed at a time, and in a row at most: beyond, they would be merged in another order than by statistics.py.
MAX_GROUPS = 4
MAX_PARTS = 32
# How the gradient of a row comes about.
ZERO = tl.constexpr(0)
UNDEFINED = tl.constexpr(1)
GENERAL = tl.constexpr(2)


@triton.jit
def _load_tiles(pointer, at, active, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
                UNROLL: tl.constexpr, GROUPS: tl.constexpr, SEGMENT: tl.constexpr):  # fmt: skip
    """load_tile of GROUPS neighbouring segments; -inf in lanes that are not active, which is decided by the vector."""
    pointer = tl.multiple_of(pointer + at, ALIGN)
    lane = tl.arange(0, GROUPS * LANES)
    columns = (lane // LANES * SEGMENT + lane % LANES * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    out = ()
    for u in tl.static_range(UNROLL):
        z = tl.load(pointer + u * LANES * VECTOR + columns, mask=active[:, None], other=-float("inf"))
        out = out + unzip(z.to(tl.float32), VECTOR)
    return out


@triton.jit
def _load_tail(pointer, whole, left, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
               GROUPS: tl.constexpr, SEGMENT: tl.constexpr):  # fmt: skip
    """Columns [whole, left), which follow the whole tiles; -inf in the lanes of all others.

    One number says where, not one for each lane: of an unaligned row a thread loads the columns of many lanes.
    """
    lane = tl.arange(0, GROUPS * LANES)
    at = (lane // LANES * SEGMENT + whole % SEGMENT + lane % LANES * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    out = ()
    for u in tl.static_range(UNROLL):
        columns = u * LANES * VECTOR + at
        z = tl.load(pointer + columns, mask=(columns >= whole) & (columns < left), other=-float("inf"))
        out = out + unzip(z.to(tl.float32), VECTOR)
    return out


@triton.jit
def _add_tiles(values, first_vector, top, where, total, c, LANES: tl.constexpr, VECTOR: tl.constexpr,
               UNROLL: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """Maximum, its vector and the sum of exponentials; lanes without a tile hold -inf and change nothing.

    The exponent is not clamped as in add_moments, so that a NaN or +inf makes the sum NaN; the bits are the same, since
    what is clamped is nothing beside the 2^0 of a lane's own maximum.
    """
    tile_top, tile_where = top_of(values, first_vector, GROUPS * LANES, VECTOR, UNROLL)
    # top_of counts the lanes of all groups: back to the vector within the lane's own segment
    lane = tl.arange(0, GROUPS * LANES)
    turn = (tile_where - first_vector) // (GROUPS * LANES)
    where = tl.where(tile_top > top, first_vector + turn * LANES + lane % LANES, where)
    old = tl.maximum(top, LOWEST)
    top = tl.maximum(top, tile_top)
    new = tl.maximum(top, LOWEST)
    here = tl.exp2((values[0] - new) * c)
    for i in tl.static_range(1, len(values)):
        here += tl.exp2((values[i] - new) * c)
    return top, where, tl.fma(tl.exp2(tl.maximum((old - new) * c, LOWEST_SHIFT)), total, here)


@triton.jit
def _near_means(pointer, start, vocab, GROUPS: tl.constexpr, SEGMENT: tl.constexpr):
    """near_mean of each segment, (GROUPS,)."""
    columns = start + (tl.arange(0, GROUPS) * SEGMENT)[:, None] + tl.arange(0, 64)[None, :]
    z = tl.load(pointer + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32)
    finite = tl.abs(z) <= -LOWEST
    n = tl.sum(finite.to(tl.float32), 1)
    return tl.sum(tl.where(finite, z, 0.0) / tl.maximum(n, 1.0)[:, None], 1)


@triton.jit
def _placed(into, numbers, first, PARTS: tl.constexpr, GROUPS: tl.constexpr):
    """``into`` (PARTS,) with the numbers (GROUPS,) at ``first`` and behind."""
    chosen = tl.arange(0, PARTS)[:, None] == (first + tl.arange(0, GROUPS))[None, :]
    own = tl.max(tl.where(chosen, numbers[None, :], -float("inf")), 1)
    # a maximum drops a NaN, a sum keeps it
    bad = tl.sum(tl.where(chosen & (numbers != numbers)[None, :], 1, 0), 1) > 0
    return tl.where(tl.sum(chosen.to(tl.int32), 1) > 0, tl.where(bad, float("nan"), own), into)


@triton.jit
def _gradient_of(z, top, c, constant, unit, SMOOTHING: tl.constexpr):
    """As in statistics_backward.py, for one temperature and nothing but p and 1."""
    flat = 0.0
    if SMOOTHING:
        flat = tl.where(z > -float("inf"), unit, 0.0)
    return tl.fma(tl.exp2((z - top) * c), constant, flat)


@triton.jit
def _write_gradient(source, target, vocab, width, top, c, constant, unit, SMOOTHING: tl.constexpr,
                    X_ALIGN: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
                    TILE: tl.constexpr):  # fmt: skip
    """The whole row, last column to first."""
    columns = tl.arange(0, TILE)
    head = head_of(target, SIZE, VECTOR)
    start = tl.minimum(head, width)
    tiles = tl.maximum(vocab - start, 0) // TILE
    for at in tl.range(start + tiles * TILE, width, TILE):
        z = tl.load(source + at + columns, mask=at + columns < vocab, other=-float("inf")).to(tl.float32)
        value = tl.where(at + columns < vocab, _gradient_of(z, top, c, constant, unit, SMOOTHING), 0.0)
        tl.store(target + at + columns, value.to(target.dtype.element_ty), mask=at + columns < width)
    body = tl.multiple_of(target + start, 16)
    read = tl.multiple_of(source + start, X_ALIGN)
    for i in tl.range(0, tiles):
        at = (tiles - 1 - i) * TILE
        z = tl.load(read + at + columns).to(tl.float32)
        tl.store(body + at + columns, _gradient_of(z, top, c, constant, unit, SMOOTHING).to(target.dtype.element_ty))
    # a thread each: replicated over warps, one could read what another has replaced already
    short = tl.arange(0, LANES)
    z = tl.load(source + short, mask=short < tl.minimum(head, vocab), other=-float("inf")).to(tl.float32)
    value = tl.where(short < vocab, _gradient_of(z, top, c, constant, unit, SMOOTHING), 0.0)
    tl.store(target + short, value.to(target.dtype.element_ty), mask=short < tl.minimum(head, width))


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "out_inner", "out_outer_stride",
                               "out_inner_stride", "vocab", "width", "temperature_stride", "ignore_index", "n_rows",
                               "log_prob_stride"])  # fmt: skip
def _rows(
    x, inner, outer_stride, inner_stride,
    out, out_inner, out_outer_stride, out_inner_stride,
    vocab, width, temperature, temperature_stride,
    ids,  # int64 (N,)
    ignore_index,
    grad_rows,  # float32 (6, N, 1): of logsumexp and max_prob
    grad_scalars,  # float32 (2, N): of sum_logits
    grad_log_prob,  # float32 (N, 1)
    rows,  # float32 (6, N, 1): logsumexp and max_prob are written
    scalars,  # float32 (2, N): sum_logits is written if SMOOTHING
    log_prob,  # float32 (N, 1)
    argmax,  # int64 (N,)
    saved,  # float32 (N, 5): max is written
    n_rows,
    SMOOTHING: tl.constexpr, ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    SUMMED: tl.constexpr = LANES * VECTOR * UNROLL
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row)
    nan = float("nan")
    kind = ZERO
    if id == ignore_index:
        tl.store(rows + row, 0.0)
        tl.store(rows + 2 * n_rows.to(tl.int64) + row, 0.0)
        tl.store(log_prob + row, 0.0)
        tl.store(argmax + row, -1)
        tl.store(saved + row * 5, 0.0)
        if SMOOTHING:
            tl.store(scalars + row, 0.0)
    else:
        source = row_of(x, row, inner, outer_stride, inner_stride)
        good = (id >= 0) & (id < vocab)
        z_target = tl.load(source + id, mask=good, other=nan).to(tl.float64)
        b = 1.0 / tl.load(temperature + row * temperature_stride)
        c64 = b * LOG2E
        c = c64.to(tl.float32)
        lane = tl.arange(0, GROUPS * LANES)
        tops = tl.full([PARTS], -float("inf"), tl.float32)
        sums = tl.zeros([PARTS], tl.float32)
        vectors = tl.zeros([PARTS], tl.float32)  # exact: there are fewer than 2^24 of them in a segment
        numbers = tl.zeros([PARTS], tl.float32)
        means = tl.zeros([PARTS], tl.float32)
        careful = tl.zeros([PARTS], tl.float32)  # 1: the sums over a segment's logits are not finite
        for start in tl.range(0, vocab, GROUPS * SEGMENT):
            part = start // SEGMENT
            left = vocab - start
            whole = left // SUMMED * SUMMED  # behind it follows the one tile that is not
            top = tl.full([GROUPS * LANES], -float("inf"), tl.float32)
            where = lane % LANES
            total = tl.zeros([GROUPS * LANES], tl.float32)
            spread = tl.zeros([GROUPS * LANES], tl.float32)
            square = tl.zeros([GROUPS * LANES], tl.float32)
            center = tl.zeros([GROUPS * LANES], tl.float32)
            centers = tl.zeros([GROUPS], tl.float32)
            if SMOOTHING:
                centers = _near_means(source, start, vocab, GROUPS, SEGMENT)
                center = tl.reshape(tl.broadcast_to(centers[:, None], [GROUPS, LANES]), [GROUPS * LANES])
            for at in tl.range(0, tl.minimum(left, SEGMENT) // SUMMED * SUMMED, SUMMED):
                active = at + lane // LANES * SEGMENT < whole
                values = _load_tiles(source + start, at, active, ALIGN, LANES, VECTOR, UNROLL, GROUPS, SEGMENT)
                top, where, total = _add_tiles(
                    values, at // VECTOR, top, where, total, c, LANES, VECTOR, UNROLL, GROUPS
                )
                if SMOOTHING:
                    d = values[0] - center
                    first, second = d, d * d
                    for i in tl.static_range(1, len(values)):
                        d = values[i] - center
                        first += d
                        second = tl.fma(d, d, second)
                    spread = tl.where(active, spread + first, spread)
                    square = tl.where(active, square + second, square)
            if (start + GROUPS * SEGMENT >= vocab) & (vocab % SUMMED != 0):
                values = _load_tail(source + start, whole, left, LANES, VECTOR, UNROLL, GROUPS, SEGMENT)
                top, where, total = _add_tiles(
                    values, whole % SEGMENT // VECTOR, top, where, total, c, LANES, VECTOR, UNROLL, GROUPS
                )
                if SMOOTHING:
                    here = tl.where(lane // LANES == whole // SEGMENT, left - whole, 0) - lane % LANES * VECTOR
                    for i in tl.static_range(UNROLL * VECTOR):
                        d = tl.where(i // VECTOR * LANES * VECTOR + i % VECTOR < here, values[i] - center, 0.0)
                        spread += d
                        square = tl.fma(d, d, square)
            by_segment = tl.reshape(top, [GROUPS, LANES])
            highest = tl.max(by_segment, 1)
            shift = (tl.maximum(by_segment, LOWEST) - tl.maximum(highest, LOWEST)[:, None]) * c
            lanes_sum = tl.exp2(tl.maximum(shift, LOWEST_SHIFT)) * tl.reshape(total, [GROUPS, LANES])
            there = tl.reshape(where, [GROUPS, LANES])
            vector = tl.min(tl.where(by_segment == highest[:, None], there, NONE), 1)
            tops = _placed(tops, highest, part, PARTS, GROUPS)
            sums = _placed(sums, tl.sum(lanes_sum, 1), part, PARTS, GROUPS)
            vectors = _placed(vectors, vector.to(tl.float32), part, PARTS, GROUPS)
            if SMOOTHING:
                n = tl.minimum(tl.maximum(left - tl.arange(0, GROUPS) * SEGMENT, 0), SEGMENT).to(tl.float32)
                of_lanes = tl.sum(tl.reshape(spread, [GROUPS, LANES]), 1)
                of_squares = tl.sum(tl.reshape(square, [GROUPS, LANES]), 1)
                mean = centers + of_lanes / tl.maximum(n, 1.0)
                numbers = _placed(numbers, n, part, PARTS, GROUPS)
                means = _placed(means, mean, part, PARTS, GROUPS)
                strange = ~((tl.abs(of_lanes) <= -LOWEST) & (of_squares <= -LOWEST)) & (n > 0)
                careful = _placed(careful, strange.to(tl.float32), part, PARTS, GROUPS)

        if SMOOTHING:  # noqa: SIM102 (known at compile time: without it the rest is not there)
            if tl.max(careful, 0) > 0:
                for part in tl.range(0, PARTS):
                    own = tl.arange(0, PARTS) == part
                    if tl.max(tl.where(own, careful, 0.0), 0) > 0:
                        start = part * SEGMENT
                        finite, finite_mean, _, _ = careful_spread(
                            source + start, tl.minimum(vocab - start, SEGMENT), LANES, VECTOR, UNROLL
                        )
                        numbers = tl.where(own, finite.to(tl.float32), numbers)
                        means = tl.where(own, finite_mean, means)

        # The row, merged as by _finish of statistics.py.
        parts = tl.arange(0, PARTS)
        best = tl.max(tops, 0)
        safe = tl.maximum(best, LOWEST).to(tl.float64)
        r = tl.exp2(tl.maximum(c64 * (tops.to(tl.float64) - safe), LOWEST_SHIFT))
        s0 = tl.sum(r * sums.to(tl.float64), 0)
        undefined = s0 != s0
        dead = undefined | (best == -float("inf"))
        s0 = tl.where(dead, 1.0, s0)
        log_s0 = tl.log(s0)
        max_prob = (1.0 / s0).to(tl.float32)
        holder = tl.min(tl.where(tops == best, parts, PARTS - 1), 0)
        column = tl.sum(tl.where(parts == holder, vectors, 0.0), 0).to(tl.int32)
        column = holder * SEGMENT + tl.where(dead, 0, column) * VECTOR
        column += first_equal(source + column, vocab - column, best, VECTOR)
        value = tl.where(dead | (id < 0) | (id >= vocab), nan, b * (z_target - safe) - log_s0)
        tl.store(rows + row, tl.where(dead, nan, tl.fma(b, safe, log_s0)).to(tl.float32))
        tl.store(rows + 2 * n_rows.to(tl.int64) + row, tl.where(dead, nan, max_prob))
        tl.store(log_prob + row, value.to(tl.float32))
        tl.store(argmax + row, tl.where(dead, -1, column).to(tl.int64))
        tl.store(saved + row * 5, tl.where(dead, nan, best))
        if SMOOTHING:
            all_of_them = tl.sum(numbers.to(tl.float64) * means.to(tl.float64), 0)
            masked = tl.sum(numbers, 0) < vocab
            tl.store(scalars + row, tl.where(dead, nan, tl.where(masked, -float("inf"), all_of_them.to(tl.float32))))

        # The coefficients, as by _prepare of statistics_backward.py.
        up_norm = tl.load(grad_rows + row).to(tl.float64)
        up_top = tl.load(grad_rows + 2 * n_rows.to(tl.int64) + row).to(tl.float64)
        up_token = tl.load(grad_log_prob + row).to(tl.float64)
        up_token = tl.where(good, up_token, 0.0)
        unit = tl.full([], 0.0, tl.float64)
        if SMOOTHING:
            unit = tl.load(grad_scalars + row).to(tl.float64)
        asked = (up_norm != 0) | (up_top != 0) | (up_token != 0) | (unit != 0)
        constant = b * (up_norm - up_token) - b * up_top * max_prob.to(tl.float64)
        constant = constant * tl.exp2(-(log_s0.to(tl.float32).to(tl.float64)) * LOG2E)
        kind = tl.where(asked, tl.where(dead, tl.where(undefined, UNDEFINED, ZERO), GENERAL), ZERO)
        if kind == GENERAL:
            target = row_of(out, row, out_inner, out_outer_stride, out_inner_stride)
            tl.debug_barrier()  # every lane has read the row before any of it is replaced
            _write_gradient(
                source, target, vocab, width, best, c, constant.to(tl.float32), unit.to(tl.float32), SMOOTHING,
                X_ALIGN, SIZE, GROUPS * LANES, VECTOR, TILE,
            )  # fmt: skip
            tl.debug_barrier()  # the selected columns come last
            top_gradient = b * up_top * max_prob.to(tl.float64)
            owner = tl.where(top_gradient != 0, column, -1)
            y = tl.where(z_target == -float("inf"), 0.0, z_target - safe)
            own = unit + tl.exp2(tl.maximum(c64 * y, -504.0)) * constant + b * up_token
            own += tl.where(id == owner, top_gradient, 0.0)
            writes = good & (z_target > -float("inf"))
            tl.store(target + tl.where(good, id, 0), own.to(tl.float32).to(out.dtype.element_ty), mask=writes)
            first_of_row = unit + constant + top_gradient
            tl.store(
                target + tl.maximum(owner, 0), first_of_row.to(tl.float32).to(out.dtype.element_ty),
                mask=(owner >= 0) & (owner != id),
            )  # fmt: skip
    if kind != GENERAL:
        tl.debug_barrier()
        target = row_of(out, row, out_inner, out_outer_stride, out_inner_stride)
        columns = tl.arange(0, TILE)
        fill = tl.where(kind == UNDEFINED, nan, 0.0)
        for at in tl.range(0, width, TILE):
            nothing = tl.where(at + columns < vocab, fill, 0.0)
            tl.store(target + at + columns, nothing.to(out.dtype.element_ty), mask=at + columns < width)


def serves(logits: Tensor, n_rows: int, vocab_size: int, temperatures: int) -> bool:
    """Whether one launch is the better way: a program for each multiprocessor, one temperature, no endless rows."""
    segments = launch.tiling(vocab_size, logits.dtype).segments(vocab_size)
    return temperatures == 1 and segments <= MAX_PARTS and n_rows >= launch.processors(logits.device)


def forward_and_backward(
    out: Tensor,
    out_layout: tuple[int, int, int, int],
    made: tuple[Tensor, ...],
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    layout: tuple[int, int, int, int],
    temperature: Tensor,
    index: Tensor,
    vocab_size: int,
    ignore_index: int,
    smoothing: bool,
) -> None:
    """Write the gradient into ``out`` (which may be the logits), and logsumexp, max_prob, log_prob, argmax and the
    maximum into the packed results ``made`` of fastcalib/ops/_statistics.py; the sum of the logits if ``smoothing``.

    What else is in ``made`` is left as it is. One token a row; upstream gradients in anything else are not looked at.
    """
    n_rows, width = layout[0], logits.shape[-1]
    if n_rows == 0:
        return
    rows, scalars, log_prob, argmax, _, _, _, saved = made
    cut = launch.tiling(vocab_size, logits.dtype)
    segments = cut.segments(vocab_size)
    parts = launch.next_power_of_two(segments)
    groups = min(MAX_GROUPS, parts)
    constants = {**cut.constants(), "num_warps": cut.warps * groups, **launch.registers(cut.warps * groups)}
    _rows[(n_rows,)](
        logits, *layout[1:], out, *out_layout[1:], vocab_size, width, temperature,
        1 if temperature.shape[0] > 1 else 0, index, ignore_index, grad_rows, grad_scalars, grad_log_prob, rows,
        scalars, log_prob, argmax, saved, n_rows, SMOOTHING=smoothing,
        ALIGN=launch.alignment(logits, *layout[2:]),
        X_ALIGN=launch.relative_alignment(logits, layout, out, out_layout), SIZE=logits.element_size(),
        TILE=groups * cut.lanes * cut.vector * min(cut.unroll, 2), GROUPS=groups, PARTS=parts, **constants,
    )  # fmt: skip
