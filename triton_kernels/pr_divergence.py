"""Precision-recall divergence between two rows of logits, forward. Not yet run on a GPU.

With t = c (z - max) of each side, ``Q_v < lam P_v`` is ``t_q - t_p < log2 lam + log2 s0_q - log2 s0_p``
(csrc/cpu/pr_divergence.h). The normalisers of both sides come from softmax.py; then each program takes a segment of
both rows, which the L2 cache still holds where they are few, and a group of thresholds, and sums Q below and P at or
above each of them. Groups beyond the first read the segment again. Segments are merged in order, in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .row_state import LOG2E, LOWEST, load_tail, load_tile, row_of
from .softmax import normalisers

Layout = tuple[int, int, int, int]
# Thresholds per program: two sums each, beside two tiles of 16 numbers.
GROUP = 8
LANES = 128


@triton.jit
def norms_of(norms, row):
    """max and log2 s0 of student and teacher; the latter NaN or -inf where there is no softmax."""
    at = norms + row * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def has_pair(log_q, log_p):
    return (tl.abs(log_q) < float("inf")) & (tl.abs(log_p) < float("inf"))


@triton.jit
def is_ignored(ignored, row):
    if ignored is None:
        return tl.full([], 0, tl.int1)
    else:
        return tl.load(ignored + row) != 0


@triton.jit
def threshold(log2_lam, log_q, log_p):
    """What t_q - t_p is held against. Finite: only distances of masked tokens lie beyond those of lam = 0 and inf."""
    theta = tl.minimum(tl.maximum(log2_lam + (log_q - log_p), LOWEST), -LOWEST)
    return theta.to(tl.float32)


@triton.jit
def place(z_q, z_p, max_q, max_p, c_q, c_p):
    """2^t of both sides and the distance t_q - t_p (NaN for a token masked on both, whose 2^t are 0)."""
    t_q = (z_q - max_q) * c_q
    t_p = (z_p - max_p) * c_p
    return tl.exp2(t_q), tl.exp2(t_p), t_q - t_p


@triton.jit
def _add(below, rest, thetas, q_values, p_values, max_q, max_p, c_q, c_p):
    for i in tl.static_range(len(q_values)):
        q, p, distance = place(q_values[i], p_values[i], max_q, max_p, c_q, c_p)
        more_below = ()
        more_rest = ()
        for g in tl.static_range(len(thetas)):
            less = distance < thetas[g]
            more_below = more_below + (below[g] + tl.where(less, q, 0.0),)
            more_rest = more_rest + (rest[g] + tl.where(less, 0.0, p),)
        below = more_below
        rest = more_rest
    return below, rest


@triton.jit(do_not_specialize=["inner_q", "outer_stride_q", "inner_stride_q", "inner_p", "outer_stride_p",
                               "inner_stride_p", "vocab", "own_stride", "other_stride", "count",
                               "segments"])  # fmt: skip
def _pair_segments(
    x, inner_q, outer_stride_q, inner_stride_q,
    teacher, inner_p, outer_stride_p, inner_stride_p,
    vocab, own, own_stride, other, other_stride,  # temperatures, float64 (1 or N, 1)
    log2_lam,  # float64 (L,)
    count,
    ignored,  # bool (N,), or None
    norms,  # float64 (N, 4)
    sums,  # float32 (N, S, 2, L)
    segments,
    ALIGN_Q: tl.constexpr, ALIGN_P: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUP
    row = part // segments
    max_q, log_q, max_p, log_p = norms_of(norms, row)
    if has_pair(log_q, log_p) & (is_ignored(ignored, row) == 0):
        start = (part % segments).to(tl.int32) * SEGMENT
        length = tl.minimum(vocab - start, SEGMENT)
        c_q = (LOG2E / tl.load(own + row * own_stride)).to(tl.float32)
        c_p = (LOG2E / tl.load(other + row * other_stride)).to(tl.float32)
        top_q = max_q.to(tl.float32)
        top_p = max_p.to(tl.float32)
        thetas = ()
        below = ()
        rest = ()
        for g in tl.static_range(GROUP):
            log2 = tl.load(log2_lam + tl.minimum(first + g, count - 1))
            thetas = thetas + (threshold(log2, log_q, log_p),)
            below = below + (tl.zeros([LANES], tl.float32),)
            rest = rest + (tl.zeros([LANES], tl.float32),)
        source = row_of(x, row, inner_q, outer_stride_q, inner_stride_q) + start
        against = row_of(teacher, row, inner_p, outer_stride_p, inner_stride_p) + start
        TILE: tl.constexpr = LANES * VECTOR * UNROLL
        whole = length // TILE * TILE
        for at in tl.range(0, whole, TILE):
            q_values = load_tile(source, at, ALIGN_Q, LANES, VECTOR, UNROLL)
            p_values = load_tile(against, at, ALIGN_P, LANES, VECTOR, UNROLL)
            below, rest = _add(below, rest, thetas, q_values, p_values, top_q, top_p, c_q, c_p)
        if whole < length:
            q_values = load_tail(source + whole, length - whole, LANES, VECTOR, UNROLL)
            p_values = load_tail(against + whole, length - whole, LANES, VECTOR, UNROLL)
            below, rest = _add(below, rest, thetas, q_values, p_values, top_q, top_p, c_q, c_p)
        to = sums + part * 2 * count + first
        for g in tl.static_range(GROUP):
            if first + g < count:
                tl.store(to + g, tl.sum(below[g], 0))
                tl.store(to + count + g, tl.sum(rest[g], 0))


@triton.jit(do_not_specialize=["count", "segments", "plane"])
def _pair_finish(
    lam,  # float64 (L,)
    count, ignored, norms, sums, segments,
    alpha, beta,  # float32 (N, L)
    mass,  # float64 (2, N, L)
    plane,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // count
    k = program % count
    _, log_q, _, log_p = norms_of(norms, row)
    value = tl.load(lam + k)
    if has_pair(log_q, log_p) & (is_ignored(ignored, row) == 0):
        below = tl.full([], 0.0, tl.float64)
        rest = tl.full([], 0.0, tl.float64)
        for s in tl.range(0, segments):
            at = sums + (row * segments + s) * 2 * count + k
            below += tl.load(at).to(tl.float64)
            rest += tl.load(at + count).to(tl.float64)
        below *= tl.exp2(-log_q)
        rest *= tl.exp2(-log_p)
        infinite = value == float("inf")
        none = value == 0.0
        precision = tl.where(infinite, below, tl.fma(tl.where(infinite, 0.0, value), rest, below))
        recall = tl.where(infinite, 0.0, below / tl.where(none, 1.0, value) + rest)
        recall = tl.where(none, rest, recall)
        # The bounds hold exactly for exact sums; rounding may pass them by a unit.
        precision = tl.minimum(precision, tl.minimum(value, 1.0))
        recall = tl.minimum(recall, tl.where(none, 1.0, tl.minimum(1.0 / tl.where(none, 1.0, value), 1.0)))
    else:
        fill = tl.where(is_ignored(ignored, row), 0.0, float("nan")).to(tl.float64)
        below = fill
        rest = fill
        precision = fill
        recall = fill
    tl.store(alpha + program, precision.to(tl.float32))
    tl.store(beta + program, recall.to(tl.float32))
    tl.store(mass + program, below)
    tl.store(mass + plane + program, rest)


def forward(
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    layout: Layout,
    teacher: Tensor,
    teacher_layout: Layout,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
) -> None:
    """Fill alpha, beta float32 (N, L), mass float64 (2, N, L), norms float64 (N, 4); lam float64 (L,) in any order."""
    alpha, beta, mass, norms = out
    n_rows, count = alpha.shape
    if n_rows == 0:
        return
    lam = lam.contiguous()
    cut = launch.tiling(vocab_size, logits.dtype)
    for side, (z, rows, t) in enumerate(
        ((logits, layout, temperature), (teacher, teacher_layout, teacher_temperature))
    ):
        state = normalisers(z, rows, t, vocab_size, cut)[:, 0]
        # log2 s0, or what the row's logsumexp says of one without a softmax: NaN or -inf
        log2 = state[:, 2].to(torch.float64) * 1.4426950408889634
        norms[:, 2 * side] = state[:, 0].nan_to_num(0.0)
        norms[:, 2 * side + 1] = torch.where(
            state[:, 3].isfinite() | state[:, 0].isfinite(), log2, state[:, 3].double()
        )
    cut = cut._replace(unroll=max(1, 16 // cut.vector))
    segments = cut.segments(vocab_size)
    sums = torch.empty(n_rows * segments, 2, count, dtype=torch.float32, device=logits.device)
    group = min(GROUP, launch.next_power_of_two(count))
    _pair_segments[(n_rows * segments, -(-count // group))](
        logits, *layout[1:], teacher, *teacher_layout[1:], vocab_size, temperature,
        1 if temperature.shape[0] > 1 else 0, teacher_temperature, 1 if teacher_temperature.shape[0] > 1 else 0,
        lam.log2(), count, ignored, norms, sums, segments, ALIGN_Q=launch.alignment(logits, *layout[2:]),
        ALIGN_P=launch.alignment(teacher, *teacher_layout[2:]), GROUP=group, **cut.constants(),
    )  # fmt: skip
    _pair_finish[(n_rows * count,)](
        lam, count, ignored, norms, sums, segments, alpha, beta, mass, n_rows * count, num_warps=1, **launch.EXACT
    )  # fmt: skip
