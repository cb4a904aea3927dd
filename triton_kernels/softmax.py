"""softmax and log_softmax with a temperature, forward. Not yet run on a GPU.

Two looks at a row: its normaliser, then p = 2^(c (z - max)) / s0. The second look should find the row in the L2 cache:

- With at least one row per multiprocessor, ``_rows`` gives each program (16 warps, so that one or two share a
  multiprocessor) a whole row. Then some 132 to 264 rows are in flight: 34 to 68 MB for 128,256 bfloat16 logits,
  against 50 MB of L2 on an H100. The second look goes backwards, so what was read last, and is surely still there,
  comes first and its lines are not pushed out by the writes before they are used.
- With fewer rows than multiprocessors, segments go to ``_segments``, ``_merge`` and ``_write``: then all logits
  together are at most 34 MB (131 rows as above), and the third kernel finds them in L2 as the first left them.

Both ways sum the same segments in the same order, and give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .columns import chunk_bounds, head_of
from .row_state import LOG2E, merge_normalisers, row_of, segment_normalisers


@triton.jit
def finished(top, total, b):
    """max z (NaN for a row without a softmax), 1 / s0, log s0 and the logsumexp, from a row's sum in float64."""
    undefined = total != total
    dead = undefined | (top == -float("inf"))
    safe = tl.where(dead, 1.0, total)
    log_s0 = tl.log(safe)
    logsumexp = tl.where(undefined, float("nan"), tl.where(dead, -float("inf"), tl.fma(top.to(tl.float64), b, log_s0)))
    top = tl.where(dead, float("nan"), top)
    return top, (1.0 / safe).to(tl.float32), log_s0.to(tl.float32), logsumexp.to(tl.float32)


@triton.jit
def _value(z, top, b, inverse, log_s0, LOG: tl.constexpr):
    if LOG:
        return tl.fma(z - top, b, -log_s0)
    else:
        return tl.exp2((z - top) * (b * LOG2E)) * inverse


@triton.jit
def _write_columns(
    source, target, begin, end, head, vocab, width, top, b, inverse, log_s0,
    LOG: tl.constexpr, X_ALIGN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a row, last to first; padding is 0, or -inf for the logarithm."""
    columns = tl.arange(0, TILE)
    padding = 0.0
    if LOG:
        padding = -float("inf")
    start = begin
    if begin == 0:
        start = tl.minimum(head, width)
    real_end = tl.minimum(end, vocab)
    tiles = tl.maximum(real_end - start, 0) // TILE
    for at in tl.range(start + tiles * TILE, end, TILE):
        z = tl.load(source + at + columns, mask=at + columns < real_end, other=-float("inf")).to(tl.float32)
        value = tl.where(at + columns < vocab, _value(z, top, b, inverse, log_s0, LOG), padding)
        tl.store(target + at + columns, value.to(target.dtype.element_ty), mask=at + columns < end)
    body = tl.multiple_of(target + start, 16)
    read = tl.multiple_of(source + start, X_ALIGN)
    for i in tl.range(0, tiles):
        at = (tiles - 1 - i) * TILE
        z = tl.load(read + at + columns).to(tl.float32)
        tl.store(body + at + columns, _value(z, top, b, inverse, log_s0, LOG).to(target.dtype.element_ty))
    if begin == 0:
        short = tl.arange(0, LANES)
        z = tl.load(source + short, mask=short < tl.minimum(head, vocab), other=-float("inf")).to(tl.float32)
        value = tl.where(short < vocab, _value(z, top, b, inverse, log_s0, LOG), padding)
        tl.store(target + short, value.to(target.dtype.element_ty), mask=short < tl.minimum(head, width))


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "temperature_stride"])
def _rows(
    x, inner, outer_stride, inner_stride,
    out,  # (N, width), contiguous
    logsumexp,  # float32 (N,)
    vocab, width,
    temperature, temperature_stride,  # float64 (1 or N, 1)
    LOG: tl.constexpr, ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = 1.0 / tl.load(temperature + row * temperature_stride)
    c = b * LOG2E
    source = row_of(x, row, inner, outer_stride, inner_stride)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float64)
    for start in tl.range(0, vocab, SEGMENT):
        count = tl.minimum(vocab - start, SEGMENT)
        there, sums = segment_normalisers(source + start, count, (c.to(tl.float32),), ALIGN, LANES, VECTOR, UNROLL)
        top, total = merge_normalisers(top, total, there, sums[0], c)
    top, inverse, log_s0, norm = finished(top, total, b)
    tl.store(logsumexp + row, norm)
    target = out + row * width
    _write_columns(
        source, target, 0, width, head_of(target, SIZE, VECTOR), vocab, width, top, b.to(tl.float32), inverse, log_s0,
        LOG, X_ALIGN, LANES, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "temperature_stride", "k_count",
                               "segments"])  # fmt: skip
def _segments(
    x, inner, outer_stride, inner_stride, vocab, temperature, temperature_stride, k_count,
    tops,  # float32 (N, S)
    sums,  # float32 (N, S, K)
    segments,
    ALIGN: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    first_k = tl.program_id(1) * GROUP
    row = part // segments
    start = (part % segments).to(tl.int32) * SEGMENT
    c = ()
    for g in tl.static_range(GROUP):
        b = 1.0 / tl.load(temperature + row * temperature_stride + tl.minimum(first_k + g, k_count - 1))
        c = c + ((b * LOG2E).to(tl.float32),)
    pointer = row_of(x, row, inner, outer_stride, inner_stride) + start
    top, out = segment_normalisers(pointer, tl.minimum(vocab - start, SEGMENT), c, ALIGN, LANES, VECTOR, UNROLL)
    tl.store(tops + part, top)
    for g in tl.static_range(GROUP):
        if first_k + g < k_count:
            tl.store(sums + part * k_count + first_k + g, out[g])


@triton.jit(do_not_specialize=["temperature_stride", "k_count", "segments"])
def _merge(
    temperature, temperature_stride, k_count, tops, sums, segments,
    state,  # float32 (N, K, 4): max or NaN, 1 / s0, log s0, logsumexp
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // k_count
    k = program % k_count
    b = 1.0 / tl.load(temperature + row * temperature_stride + k)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float64)
    for s in tl.range(0, segments):
        part = row * segments + s
        top, total = merge_normalisers(top, total, tl.load(tops + part), tl.load(sums + part * k_count + k), b * LOG2E)
    top, inverse, log_s0, norm = finished(top, total, b)
    to = state + program * 4
    tl.store(to, top)
    tl.store(to + 1, inverse)
    tl.store(to + 2, log_s0)
    tl.store(to + 3, norm)


@triton.jit(
    do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "temperature_stride", "chunks"]
)
def _write(
    x, inner, outer_stride, inner_stride, out, logsumexp, vocab, width, temperature, temperature_stride, state, chunks,
    LOG: tl.constexpr, X_ALIGN: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    chunk = (program % chunks).to(tl.int32)
    b = 1.0 / tl.load(temperature + row * temperature_stride)
    own = state + row * 4
    if chunk == 0:
        tl.store(logsumexp + row, tl.load(own + 3))
    target = out + row * width
    head = head_of(target, SIZE, VECTOR)
    begin, end = chunk_bounds(chunk, head, width, CHUNK)
    _write_columns(
        row_of(x, row, inner, outer_stride, inner_stride), target, begin, end, head, vocab, width,
        tl.load(own), b.to(tl.float32), tl.load(own + 1), tl.load(own + 2), LOG, X_ALIGN, LANES, TILE,
    )  # fmt: skip


def normalisers(
    logits: Tensor, layout: tuple[int, int, int, int], temperature: Tensor, vocab_size: int, cut: launch.Tiling
) -> Tensor:
    """float32 (N, K, 4): max (NaN for a row without a softmax), 1 / s0, log s0 and logsumexp at every temperature."""
    n_rows, k = layout[0], temperature.shape[1]
    segments = cut.segments(vocab_size)
    tops = torch.empty(n_rows * segments, dtype=torch.float32, device=logits.device)
    sums = torch.empty(n_rows * segments, k, dtype=torch.float32, device=logits.device)
    state = torch.empty(n_rows, k, 4, dtype=torch.float32, device=logits.device)
    stride = k if temperature.shape[0] > 1 else 0
    group, group_count = launch.groups(k)
    _segments[(n_rows * segments, group_count)](
        logits, *layout[1:], vocab_size, temperature, stride, k, tops, sums, segments,
        ALIGN=launch.alignment(logits, *layout[2:]), GROUP=group, **cut.constants(),
    )  # fmt: skip
    _merge[(n_rows * k,)](temperature, stride, k, tops, sums, segments, state, num_warps=1, **launch.EXACT)
    return state


def forward(
    out: Tensor,
    logsumexp: Tensor,
    logits: Tensor,
    layout: tuple[int, int, int, int],
    temperature: Tensor,
    vocab_size: int,
    log: bool,
) -> None:
    """Fill ``out``, contiguous and like the logits (*, V), and ``logsumexp`` float32 (N,); temperature (1 or N, 1)."""
    n_rows, width = layout[0], logits.shape[-1]
    if n_rows == 0:
        return
    cut = launch.tiling(vocab_size, logits.dtype, lanes=launch.ROW_LANES)
    row_tile = cut.lanes * cut.vector * min(cut.unroll, 2)
    flat = (n_rows, n_rows, 0, width)
    constants = {
        "LOG": log, "X_ALIGN": launch.relative_alignment(logits, layout, out, flat), "SIZE": logits.element_size(),
        "TILE": row_tile,
    }  # fmt: skip
    stride = 1 if temperature.shape[0] > 1 else 0
    if cut.segments(vocab_size) == 1 or n_rows >= launch.processors(logits.device):
        _rows[(n_rows,)](
            logits, *layout[1:], out, logsumexp, vocab_size, width, temperature, stride,
            ALIGN=launch.alignment(logits, *layout[2:]), **constants, **cut.constants(),
        )  # fmt: skip
        return
    state = normalisers(logits, layout, temperature, vocab_size, cut)
    chunk = 2 * row_tile
    chunks = -(-width // chunk)
    _write[(n_rows * chunks,)](
        logits, *layout[1:], out, logsumexp, vocab_size, width, temperature, stride, state, chunks,
        LANES=cut.lanes, VECTOR=cut.vector, CHUNK=chunk, num_warps=cut.warps, **launch.EXACT,
        **launch.registers(cut.warps), **constants,
    )  # fmt: skip
