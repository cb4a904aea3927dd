"""ranks: for thresholds t_j of a row, count z > t_j and z = t_j and sum the probability of z > t_j. Not yet run on a
GPU.

Thresholds are sorted once, per row (torch.sort: they are few beside V). Then one read of the logits, by one of two
kernels:

- up to 4 thresholds a row and no masses (``_compare``): every element is compared with every threshold, counters stay
  in registers;
- else (``_place``, in ranks_histogram.py): elements below the lowest threshold of the row touch nothing but that
  comparison: a lane picks the largest of those that are left of its 16, together with their like, and only what is
  picked finds its place by binary search among the sorted thresholds (in the L1 cache) and adds to a histogram of
  integers in global memory, 2 (M + 1) bins a row; where many pass, all are searched for at once. ``_finish`` turns
  bins into counts by a suffix sum. Probabilities are added as 64-bit integers, in units of 2^-60. Integer additions
  commute: the order in which programs get there does not show.

With M up to 2 and masses, statistics.py counts in its own read instead. With more, masses need the normaliser of the
row first: a second read of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, softmax, statistics
from . import ranks_histogram as histogram
from .columns import chunk_bounds, head_of
from .row_state import bounds_of_row, row_of

MAX_COMPARED = 4


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "per_row", "ignore_index"])
def _gather(x, inner, outer_stride, inner_stride, vocab, ids, per_row, offsets, ignore_index, bounds):
    """The logits of the selected tokens, float32; NaN, which nothing exceeds, for an ignored or bad id."""
    row = tl.program_id(0).to(tl.int64)
    base = row_of(x, row, inner, outer_stride, inner_stride)
    begin, end = bounds_of_row(row, per_row, offsets)
    for first in tl.range(begin, end, 128):
        j = first + tl.arange(0, 128)
        id = tl.load(ids + j, mask=j < end, other=ignore_index)
        good = (id >= 0) & (id < vocab) & (id != ignore_index)
        tl.store(bounds + j, tl.load(base + id, mask=good, other=float("nan")).to(tl.float32), mask=j < end)


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "chunks"])
def _compare(
    x, inner, outer_stride, inner_stride, vocab,
    bounds,  # float32 (N, M)
    counts,  # int32 (N, M, 2), zero: greater, not less
    chunks,
    M: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    source = row_of(x, row, inner, outer_stride, inner_stride)
    head = head_of(source, SIZE, VECTOR)
    begin, end = chunk_bounds((program % chunks).to(tl.int32), head, vocab, CHUNK)
    STEP: tl.constexpr = LANES * VECTOR
    TILE: tl.constexpr = STEP * UNROLL
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    limits = ()
    tally = ()
    for j in tl.static_range(M):
        limits = limits + (tl.load(bounds + row * M + j),)
        tally = tally + (tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32))
    if begin == 0:
        mask = columns < tl.minimum(head, vocab)
        z = tl.load(source + columns, mask=mask, other=float("nan")).to(tl.float32)
        tally = _tally(tally, limits, z)
        begin = tl.minimum(head, vocab)
    whole = begin + tl.maximum(end - begin, 0) // TILE * TILE
    body = tl.multiple_of(source + begin, 16)
    for at in tl.range(0, whole - begin, TILE):
        for u in tl.static_range(UNROLL):
            tally = _tally(tally, limits, tl.load(body + at + u * STEP + columns).to(tl.float32))
    for at in tl.range(whole, end, STEP):
        # NaN is neither greater nor equal
        z = tl.load(source + at + columns, mask=at + columns < end, other=float("nan")).to(tl.float32)
        tally = _tally(tally, limits, z)
    for j in tl.static_range(M):
        to = counts + (row * M + j) * 2
        tl.atomic_add(to, tl.sum(tally[2 * j], 0), sem="relaxed")
        tl.atomic_add(to + 1, tl.sum(tally[2 * j + 1], 0), sem="relaxed")


@triton.jit
def _tally(tally, limits, z):
    out = ()
    for j in tl.static_range(len(limits)):
        out = out + (
            tally[2 * j] + tl.sum((z > limits[j]).to(tl.int32), 1),
            tally[2 * j + 1] + tl.sum((z >= limits[j]).to(tl.int32), 1),
        )
    return out


@triton.jit(do_not_specialize=["vocab", "ignore_index", "nnz"])
def _finish_compared(vocab, ids, ignore_index, counts, n_greater, n_equal, nnz):
    j = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = j < nnz
    greater = tl.load(counts + 2 * j, mask=inside, other=0).to(tl.int64)
    equal = tl.load(counts + 2 * j + 1, mask=inside, other=0).to(tl.int64) - greater
    if ids is not None:
        id = tl.load(ids + j, mask=inside, other=ignore_index)
        good = (id >= 0) & (id < vocab)
        greater = tl.where(id == ignore_index, 0, tl.where(good, greater, -1))
        equal = tl.where(id == ignore_index, 0, tl.where(good, tl.maximum(equal - 1, 0), -1))
    tl.store(n_greater + j, greater, mask=inside)
    tl.store(n_equal + j, equal, mask=inside)


def gather(
    logits: Tensor, layout: tuple[int, int, int, int], index: Tensor, per_row: int, offsets: Tensor | None,
    vocab_size: int, ignore_index: int,
) -> Tensor:  # fmt: skip
    """float32 (nnz,): logits of the selected tokens, NaN where an id is ignored or outside the vocabulary."""
    bounds = torch.empty(index.shape[0], dtype=torch.float32, device=logits.device)
    _gather[(layout[0],)](
        logits, *layout[1:], vocab_size, index, per_row, offsets, ignore_index, bounds, num_warps=4, **launch.EXACT
    )  # fmt: skip
    return bounds


def _sorted_by_row(bounds: Tensor, n_rows: int, per_row: int, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Thresholds in ascending order within each row, NaN last, and where each of them stood."""
    if offsets is None:
        values, order = torch.sort(bounds.view(n_rows, per_row), dim=1)
        order += torch.arange(n_rows, device=bounds.device)[:, None] * per_row
        return values.reshape(-1), order.reshape(-1)
    each = torch.arange(n_rows, device=bounds.device)
    rows = torch.repeat_interleave(each, offsets.diff(), output_size=bounds.shape[0])
    values, order = torch.sort(bounds, stable=True)
    by_row = torch.sort(rows[order], stable=True).indices
    return values[by_row], order[by_row]


def count(
    out: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    layout: tuple[int, int, int, int],
    bounds: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    temperature: Tensor | None = None,
    tops: Tensor | None = None,
    inverses: Tensor | None = None,
) -> None:
    """Fill n_greater, n_equal and mass_greater from thresholds; one read of the logits.

    Args:
        bounds: float32 (nnz,), dealt to rows by ``per_row`` or offsets.
        temperature, tops, inverses: for masses: float64 (1 or N, K); the maxima of the rows (N,) and 1/s0 (N, K), any
        strides.
    """
    n_rows, nnz = layout[0], bounds.shape[0]
    n_greater, n_equal, mass_greater = out
    if n_rows == 0 or nnz == 0:
        return
    device, size = logits.device, logits.element_size()
    cut = launch.tiling(vocab_size, logits.dtype)
    chunk = launch.chunk(cut)
    chunks = -(-vocab_size // chunk)
    if offsets is None and per_row <= MAX_COMPARED and temperature is None:
        counts = torch.zeros(nnz, 2, dtype=torch.int32, device=device)
        _compare[(n_rows * chunks,)](
            logits, *layout[1:], vocab_size, bounds, counts, chunks, M=per_row, SIZE=size, LANES=cut.lanes,
            VECTOR=cut.vector, UNROLL=cut.unroll, CHUNK=chunk, num_warps=cut.warps, **launch.EXACT,
        )  # fmt: skip
        _finish_compared[(-(-nnz // 128),)](
            vocab_size, index, ignore_index, counts, n_greater, n_equal, nnz, num_warps=4, **launch.EXACT
        )
        return
    values, order = _sorted_by_row(bounds, n_rows, per_row, offsets)
    copies = 8 if nnz <= 64 * n_rows else 1
    k = 0 if temperature is None else temperature.shape[1]
    bins = torch.zeros(2 * copies * (nnz + n_rows), dtype=torch.int32, device=device)
    mass_step = copies * (nnz + n_rows)
    masses = torch.zeros(k, mass_step, dtype=torch.int64, device=device) if temperature is not None else None
    stride = k if temperature is not None and temperature.shape[0] > 1 else 0
    top_stride = 0 if tops is None else tops.stride(0)
    strides = (0, 0) if inverses is None else inverses.stride()
    histogram._place[(n_rows * chunks,)](
        logits, *layout[1:], vocab_size, values, per_row, offsets, bins, temperature, stride, k, tops, top_stride,
        inverses, *strides, masses, mass_step, chunks, SIZE=size, LANES=cut.lanes, VECTOR=cut.vector,
        UNROLL=histogram.PICKED_FROM // cut.vector, CHUNK=chunk, COPIES=copies, num_warps=cut.warps, **launch.EXACT,
    )  # fmt: skip
    histogram._finish[(n_rows,)](
        vocab_size, values, order, index, per_row, offsets, ignore_index, bins, k, tops, top_stride, masses, mass_step,
        n_greater, n_equal, mass_greater, COPIES=copies, BLOCK=128, num_warps=1, **launch.EXACT,
    )  # fmt: skip


def forward(
    out: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    layout: tuple[int, int, int, int],
    index: Tensor | None,
    thresholds: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    temperature: Tensor | None,
    vocab_size: int,
    ignore_index: int,
) -> None:
    """Fill n_greater, n_equal int64 (nnz,) and mass_greater float32 (nnz, K), for selected tokens or thresholds.

    Thresholds are float32 (N per_row,), contiguous. Ragged sets have offsets; how many tokens a row has is then known
    on the device alone, and never asked for.
    """
    if layout[0] == 0 or out[0].shape[0] == 0:
        return
    if thresholds is None:
        assert index is not None
        bounds = gather(logits, layout, index, per_row, offsets, vocab_size, ignore_index)
    else:
        bounds = thresholds
    if temperature is None:
        count(out, logits, layout, bounds, index, per_row, offsets, vocab_size, ignore_index)
    elif statistics.count_along(per_row, offsets):
        _along(out, logits, layout, bounds, index, per_row, temperature, vocab_size, ignore_index)
    else:
        state = softmax.normalisers(
            logits, layout, temperature, vocab_size, launch.tiling(vocab_size, logits.dtype)
        )  # fmt: skip
        count(
            out, logits, layout, bounds, index, per_row, offsets, vocab_size, ignore_index, temperature,
            state[:, 0, 0], state[:, :, 1],
        )  # fmt: skip


def _along(
    out: tuple[Tensor, Tensor, Tensor], logits: Tensor, layout: tuple[int, int, int, int], bounds: Tensor,
    index: Tensor | None, per_row: int, temperature: Tensor, vocab_size: int, ignore_index: int,
) -> None:  # fmt: skip
    """Counts and masses above one or two thresholds a row, in the read that finds the normaliser."""
    n_rows, k, device = layout[0], temperature.shape[1], logits.device

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    selected = new(0 if index is None else index.shape[0], k)
    packed = (
        new(6, n_rows, k), new(2, n_rows), selected, new(n_rows, dtype=torch.int64), *out, new(n_rows, 3 + 2 * k)
    )  # fmt: skip
    statistics.forward(
        packed, logits, layout, temperature, index, per_row, None, vocab_size, ignore_index,
        bounds.view(n_rows, per_row),
    )  # fmt: skip
