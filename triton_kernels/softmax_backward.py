"""softmax and log_softmax, backward. Not yet run on a GPU.

With p (or log p) the result of forward and g its gradient, b = 1/T (csrc/cpu/softmax.h):
    softmax      dz = b p (g - sum g p)          log_softmax   dz = b (g - p sum g)          dT = -sum log p dz
A masked token (p = 0, log p = -inf) takes no part. Two looks at g and the result, one write; where the second look
finds them is settled as in softmax.py: whole rows last to first, or segments while all of it is in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .columns import chunk_bounds, head_of
from .row_state import LN2, LOG2E, load_tail, load_tile, row_of


@triton.jit
def _add_products(total, grads, results, LOG: tl.constexpr):
    """Running sum of g p, or of g over the tokens that are not masked, of each lane."""
    for i in tl.static_range(len(grads)):
        if LOG:
            total += tl.where(results[i] > -float("inf"), grads[i], 0.0)
        else:
            total += tl.where(results[i] > 0.0, grads[i] * results[i], 0.0)
    return total


@triton.jit
def _segment_product(
    grad,
    result,
    count,
    LOG: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VECTOR * UNROLL
    total = tl.zeros([LANES], tl.float32)
    whole = count // TILE * TILE
    for at in tl.range(0, whole, TILE):
        grads = load_tile(grad, at, ALIGN, LANES, VECTOR, UNROLL)
        total = _add_products(total, grads, load_tile(result, at, ALIGN, LANES, VECTOR, UNROLL), LOG)
    if whole < count:  # beyond the row the result is -inf: masked either way
        grads = load_tail(grad + whole, count - whole, LANES, VECTOR, UNROLL)
        total = _add_products(total, grads, load_tail(result + whole, count - whole, LANES, VECTOR, UNROLL), LOG)
    return tl.sum(total, 0)


@triton.jit
def _gradient(g, r, b, total, LOG: tl.constexpr):
    if LOG:
        return tl.where(r > -float("inf"), b * tl.fma(-tl.exp2(r * LOG2E), total, g), 0.0)
    else:
        return b * (r * (g - total))


@triton.jit
def _write_gradient(
    grad, result, target, begin, end, head, vocab, width, norm, b, total,
    LOG: tl.constexpr, G_ALIGN: tl.constexpr, R_ALIGN: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a row, last to first. Padding gets 0, and so does a row of -inf; a NaN row gets NaN."""
    columns = tl.arange(0, TILE)
    start = begin
    if begin == 0:
        start = tl.minimum(head, width)
    real_end = tl.minimum(end, vocab)
    if not (tl.abs(norm) < float("inf")):
        fill = tl.where(norm != norm, float("nan"), 0.0)
        for at in tl.range(begin, end, TILE):
            value = tl.where(at + columns < vocab, fill, 0.0)
            tl.store(target + at + columns, value.to(target.dtype.element_ty), mask=at + columns < end)
    else:
        tiles = tl.maximum(real_end - start, 0) // TILE
        for at in tl.range(start + tiles * TILE, end, TILE):
            inside = at + columns < real_end
            g = tl.load(grad + at + columns, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(result + at + columns, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, _gradient(g, r, b, total, LOG), 0.0)
            tl.store(target + at + columns, value.to(target.dtype.element_ty), mask=at + columns < end)
        body = tl.multiple_of(target + start, 16)
        read_g = tl.multiple_of(grad + start, G_ALIGN)
        read_r = tl.multiple_of(result + start, R_ALIGN)
        for i in tl.range(0, tiles):
            at = (tiles - 1 - i) * TILE
            g = tl.load(read_g + at + columns).to(tl.float32)
            r = tl.load(read_r + at + columns).to(tl.float32)
            tl.store(body + at + columns, _gradient(g, r, b, total, LOG).to(target.dtype.element_ty))
        if begin == 0:
            short = tl.arange(0, LANES)
            inside = short < tl.minimum(head, vocab)
            g = tl.load(grad + short, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(result + short, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, _gradient(g, r, b, total, LOG), 0.0)
            tl.store(target + short, value.to(target.dtype.element_ty), mask=short < tl.minimum(head, width))


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "temperature_stride"])
def _rows(
    grad,  # (N, V) by strides
    inner, outer_stride, inner_stride,
    result, out,  # (N, width), contiguous
    logsumexp,  # float32 (N,): tells a row of -inf and a row with a NaN from the others
    vocab, width,
    temperature, temperature_stride,  # float64 (1 or N, 1)
    totals,  # float64 (N,): sum g p or sum g, for the gradient to the temperature
    LOG: tl.constexpr, G_ALIGN: tl.constexpr, R_ALIGN: tl.constexpr, ALIGN: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = (1.0 / tl.load(temperature + row * temperature_stride)).to(tl.float32)
    g = row_of(grad, row, inner, outer_stride, inner_stride)
    r = result + row * width
    total = tl.full([], 0.0, tl.float64)
    for start in tl.range(0, vocab, SEGMENT):
        count = tl.minimum(vocab - start, SEGMENT)
        total += _segment_product(g + start, r + start, count, LOG, ALIGN, LANES, VECTOR, UNROLL).to(tl.float64)
    tl.store(totals + row, total)
    target = out + row * width
    _write_gradient(
        row_of(grad, row, inner, outer_stride, inner_stride), result + row * width, target, 0, width,
        head_of(target, SIZE, VECTOR), vocab, width, tl.load(logsumexp + row), b, total.to(tl.float32),
        LOG, G_ALIGN, R_ALIGN, LANES, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "segments"])
def _segments(
    grad, inner, outer_stride, inner_stride, result, vocab, width,
    products,  # float32 (N, S)
    segments,
    LOG: tl.constexpr, ALIGN: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    row = part // segments
    start = (part % segments).to(tl.int32) * SEGMENT
    g = row_of(grad, row, inner, outer_stride, inner_stride) + start
    r = result + row * width + start
    count = tl.minimum(vocab - start, SEGMENT)
    tl.store(products + part, _segment_product(g, r, count, LOG, ALIGN, LANES, VECTOR, UNROLL))


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "temperature_stride",
                               "segments", "chunks"])  # fmt: skip
def _write(
    grad, inner, outer_stride, inner_stride, result, out, logsumexp, vocab, width, temperature, temperature_stride,
    products, segments, totals, chunks,
    LOG: tl.constexpr, G_ALIGN: tl.constexpr, R_ALIGN: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    chunk = (program % chunks).to(tl.int32)
    total = tl.full([], 0.0, tl.float64)
    for s in tl.range(0, segments):
        total += tl.load(products + row * segments + s).to(tl.float64)
    if chunk == 0:
        tl.store(totals + row, total)
    b = (1.0 / tl.load(temperature + row * temperature_stride)).to(tl.float32)
    target = out + row * width
    head = head_of(target, SIZE, VECTOR)
    begin, end = chunk_bounds(chunk, head, width, CHUNK)
    _write_gradient(
        row_of(grad, row, inner, outer_stride, inner_stride), result + row * width, target, begin, end, head, vocab,
        width, tl.load(logsumexp + row), b, total.to(tl.float32), LOG, G_ALIGN, R_ALIGN, LANES, TILE,
    )  # fmt: skip


@triton.jit
def _add_temperature(sum, grads, results, b, total, LOG: tl.constexpr):
    for i in tl.static_range(len(grads)):
        r = results[i]
        if LOG:
            present = r > -float("inf")
            log_p = r
        else:
            present = r > 0.0
            log_p = tl.log2(r) * LN2
        term = tl.where(present, _gradient(grads[i], r, b, total, LOG), 0.0)
        sum = tl.fma(tl.where(present, -log_p, 0.0), term, sum)
    return sum


@triton.jit(
    do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "width", "temperature_stride", "segments"]
)
def _temperature_segments(
    grad, inner, outer_stride, inner_stride, result, vocab, width, temperature, temperature_stride, totals,
    sums,  # float32 (N, S)
    segments,
    LOG: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    row = part // segments
    start = (part % segments).to(tl.int32) * SEGMENT
    g = row_of(grad, row, inner, outer_stride, inner_stride) + start
    r = result + row * width + start
    b = (1.0 / tl.load(temperature + row * temperature_stride)).to(tl.float32)
    total = tl.load(totals + row).to(tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    count = tl.minimum(vocab - start, SEGMENT)
    for at in tl.range(0, count, LANES * VECTOR * UNROLL):
        grads = load_tail(g + at, count - at, LANES, VECTOR, UNROLL)
        sum = _add_temperature(sum, grads, load_tail(r + at, count - at, LANES, VECTOR, UNROLL), b, total, LOG)
    tl.store(sums + part, tl.sum(sum, 0))


@triton.jit(do_not_specialize=["segments"])
def _temperature(sums, segments, logsumexp, grad_temperature):
    row = tl.program_id(0).to(tl.int64)
    total = tl.full([], 0.0, tl.float64)
    for s in tl.range(0, segments):
        total += tl.load(sums + row * segments + s).to(tl.float64)
    norm = tl.load(logsumexp + row)
    total = tl.where(norm != norm, float("nan"), tl.where(tl.abs(norm) < float("inf"), total, 0.0))
    tl.store(grad_temperature + row, total)


def backward(
    out: Tensor,
    grad_temperature: Tensor | None,
    grad: Tensor,
    layout: tuple[int, int, int, int],
    result: Tensor,
    logsumexp: Tensor,
    temperature: Tensor,
    vocab_size: int,
    log: bool,
) -> None:
    """Fill ``out``, contiguous, with the gradient to the logits, and float64 (N,) with that to the temperature of each
    row.

    Args:
        grad: upstream, columns adjacent, rows by ``layout``; ``result`` is the contiguous output of forward.
    """
    n_rows, width = layout[0], grad.shape[-1]
    if n_rows == 0:
        return
    cut = launch.tiling(vocab_size, grad.dtype, lanes=launch.ROW_LANES)
    # two tensors at a time: the bytes in flight, and the registers for them, are those of a whole tile of one
    cut = cut._replace(unroll=max(1, cut.unroll // 2))
    segments = cut.segments(vocab_size)
    device = grad.device
    flat = (n_rows, n_rows, 0, width)
    row_tile = cut.lanes * cut.vector * min(cut.unroll, 2)
    align = min(launch.alignment(grad, *layout[2:]), launch.alignment(result, width))
    constants = {
        "LOG": log, "G_ALIGN": launch.relative_alignment(grad, layout, out, flat),
        "R_ALIGN": launch.relative_alignment(result, flat, out, flat), "SIZE": grad.element_size(), "TILE": row_tile,
    }  # fmt: skip
    stride = 1 if temperature.shape[0] > 1 else 0
    totals = torch.empty(n_rows, dtype=torch.float64, device=device)
    if segments == 1 or n_rows >= launch.processors(device):
        _rows[(n_rows,)](
            grad, *layout[1:], result, out, logsumexp, vocab_size, width, temperature, stride, totals, ALIGN=align,
            **constants, **cut.constants(),
        )  # fmt: skip
    else:
        products = torch.empty(n_rows * segments, dtype=torch.float32, device=device)
        _segments[(n_rows * segments,)](
            grad, *layout[1:], result, vocab_size, width, products, segments, LOG=log, ALIGN=align, **cut.constants()
        )
        chunk = 2 * row_tile
        chunks = -(-width // chunk)
        _write[(n_rows * chunks,)](
            grad, *layout[1:], result, out, logsumexp, vocab_size, width, temperature, stride, products, segments,
            totals, chunks, LANES=cut.lanes, VECTOR=cut.vector, CHUNK=chunk, num_warps=cut.warps,
            **launch.EXACT, **launch.registers(cut.warps), **constants,
        )  # fmt: skip
    if grad_temperature is not None:
        sums = torch.empty(n_rows * segments, dtype=torch.float32, device=device)
        _temperature_segments[(n_rows * segments,)](
            grad, *layout[1:], result, vocab_size, width, temperature, stride, totals, sums, segments, LOG=log,
            **cut._replace(unroll=1).constants(),
        )  # fmt: skip
        _temperature[(n_rows,)](sums, segments, logsumexp, grad_temperature, num_warps=1, **launch.EXACT)
