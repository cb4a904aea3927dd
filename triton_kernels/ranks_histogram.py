"""The kernels of ranks for many thresholds or masses: elements find their place among the sorted thresholds and add to
a histogram, which a suffix sum turns into counts. ranks.py says when, and why; not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import chunk_bounds, head_of
from .row_state import LOG2E, bounds_of_row, row_of

# Elements of a lane between two searches, and the rounds of picking from which searching for all of them is cheaper: a
# search is some 30 + 8 log2 M instructions an element; a round is one search and 80 more, shared by 16 elements.
PICKED_FROM = 16
MAX_ROUNDS = tl.constexpr(8)
# Probabilities are added in units of 2^-60: finer than the last place of any float32 above 2^-36, and 8.0 still fits.
UNIT = tl.constexpr(1152921504606846976.0)


@triton.jit
def _places(sorted_bounds, begin, m, z):
    """How many of the m > 0 sorted thresholds are below each z, by binary search; 0 for a NaN."""
    place = tl.zeros(z.shape, tl.int32)
    left = m
    bounds = sorted_bounds + begin
    while left > 1:
        half = left // 2
        place = tl.where(tl.load(bounds + (half - 1) + place) < z, place + half, place)
        left -= half
    return place + (tl.load(bounds + place) < z).to(tl.int32)


@triton.jit
def _drop(
    z, times, copy, sorted_bounds, begin, m, bins, masses, c_of_row, inverse_of_row, top, inverse_step, k_count,
    mass_step, COPIES: tl.constexpr,
):  # fmt: skip
    """Add each z so many times to the histogram of its row."""
    passes = times > 0
    place = _places(sorted_bounds, begin, m, z)
    at_bound = tl.load(sorted_bounds + begin + place, mask=passes & (place < m), other=float("nan"))
    own = copy * (m + 1) + place
    tl.atomic_add(bins + 2 * own + (at_bound == z).to(tl.int32), times, mask=passes, sem="relaxed")
    if masses is not None:
        for k in tl.range(0, k_count):
            c = ((1.0 / tl.load(c_of_row + k)) * LOG2E).to(tl.float32)
            p = tl.exp2((z - top) * c) * tl.load(inverse_of_row + k * inverse_step)
            amount = (tl.where(passes & (place > 0), p, 0.0) * UNIT).to(tl.int64) * times
            # adding 0 would be a wasted trip
            tl.atomic_add(masses + k * mass_step + own, amount, mask=amount > 0, sem="relaxed")


@triton.jit
def _drop_those_above(
    z, lowest, columns, sorted_bounds, begin, m, bins, masses, c_of_row, inverse_of_row, top, inverse_step, k_count,
    mass_step, COPIES: tl.constexpr,
):  # fmt: skip
    """Add the elements at or above the lowest threshold of a tile, given as tensors (LANES, VECTOR). A NaN counts
    nowhere."""
    left = tl.zeros([columns.shape[0]], tl.int32)
    for u in tl.static_range(len(z)):
        left += tl.sum((z[u] >= lowest).to(tl.int32), 1)
    rounds = tl.max(left, 0)
    if (rounds > MAX_ROUNDS) | ((rounds > 0) & (lowest == -float("inf"))):
        for u in tl.static_range(len(z)):
            _drop(z[u], (z[u] >= lowest).to(tl.int32), columns % COPIES, sorted_bounds, begin, m, bins, masses,
                  c_of_row, inverse_of_row, top, inverse_step, k_count, mass_step, COPIES)  # fmt: skip
    elif rounds > 0:
        rest = ()
        for u in tl.static_range(len(z)):
            rest = rest + (tl.where(z[u] >= lowest, z[u], -float("inf")),)
        # Neighbours that fall into one bin do not queue for one address: there are several copies of a small histogram.
        copy = tl.arange(0, columns.shape[0]) % COPIES
        for _ in tl.range(0, rounds):
            pick = tl.max(rest[0], 1)
            for u in tl.static_range(1, len(z)):
                pick = tl.maximum(pick, tl.max(rest[u], 1))
            times = tl.zeros([columns.shape[0]], tl.int32)
            others = ()
            for u in tl.static_range(len(z)):
                same = rest[u] == pick[:, None]
                times += tl.sum(same.to(tl.int32), 1)
                others = others + (tl.where(same, -float("inf"), rest[u]),)
            rest = others
            times = tl.where(pick > -float("inf"), times, 0)
            _drop(pick, times, copy, sorted_bounds, begin, m, bins, masses, c_of_row, inverse_of_row, top,
                  inverse_step, k_count, mass_step, COPIES)  # fmt: skip


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride", "vocab", "per_row", "temperature_stride",
                               "k_count", "top_stride", "inverse_stride", "inverse_step", "mass_step",
                               "chunks"])  # fmt: skip
def _place(
    x, inner, outer_stride, inner_stride, vocab,
    sorted_bounds,  # float32 (nnz,), ascending within a row, NaN last
    per_row, offsets,
    bins,  # int32 (2 COPIES (nnz + N),), zero
    temperature, temperature_stride, k_count,
    tops, top_stride,  # max z of row r at tops[r top_stride], NaN for a row without a softmax; or None
    inverses, inverse_stride, inverse_step,  # 1 / s0 of row r and temperature k
    masses,  # int64 (K, COPIES (nnz + N)), zero; or None
    mass_step, chunks,
    SIZE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    first_bound, last_bound = bounds_of_row(row, per_row, offsets)
    m = (last_bound - first_bound).to(tl.int32)
    if m == 0:
        return
    lowest = tl.load(sorted_bounds + first_bound)
    source = row_of(x, row, inner, outer_stride, inner_stride)
    head = head_of(source, SIZE, VECTOR)
    begin, end = chunk_bounds((program % chunks).to(tl.int32), head, vocab, CHUNK)
    STEP: tl.constexpr = LANES * VECTOR
    TILE: tl.constexpr = STEP * UNROLL
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    mine = (first_bound + row) * COPIES
    bins += 2 * mine
    c_of_row = temperature
    inverse_of_row = inverses
    top = 0.0
    if masses is not None:
        c_of_row += row * temperature_stride
        inverse_of_row += row * inverse_stride
        masses += mine
        top = tl.load(tops + row * top_stride)
        if top != top:  # no softmax: counts matter, masses are NaN and whatever is added is thrown away
            k_count = 0
    if begin == 0:
        begin = tl.minimum(head, vocab)
        z = tl.load(source + columns, mask=columns < begin, other=float("nan")).to(tl.float32)
        _drop_those_above((z,), lowest, columns, sorted_bounds, first_bound, m, bins, masses, c_of_row,
                          inverse_of_row, top, inverse_step, k_count, mass_step, COPIES)  # fmt: skip
    whole = begin + tl.maximum(end - begin, 0) // TILE * TILE
    body = tl.multiple_of(source + begin, 16)
    for at in tl.range(0, whole - begin, TILE):
        values = ()
        for u in tl.static_range(UNROLL):
            values = values + (tl.load(body + at + u * STEP + columns).to(tl.float32),)
        _drop_those_above(values, lowest, columns, sorted_bounds, first_bound, m, bins, masses, c_of_row,
                          inverse_of_row, top, inverse_step, k_count, mass_step, COPIES)  # fmt: skip
    for at in tl.range(whole, end, STEP):
        z = tl.load(source + at + columns, mask=at + columns < end, other=float("nan")).to(tl.float32)
        _drop_those_above((z,), lowest, columns, sorted_bounds, first_bound, m, bins, masses, c_of_row,
                          inverse_of_row, top, inverse_step, k_count, mass_step, COPIES)  # fmt: skip


@triton.jit(do_not_specialize=["vocab", "per_row", "ignore_index", "k_count", "top_stride", "mass_step"])
def _finish(
    vocab, sorted_bounds,
    order,  # int64 (nnz,): where each sorted threshold stood
    ids,  # int64 (nnz,) or None
    per_row, offsets, ignore_index, bins, k_count, tops, top_stride, masses, mass_step,
    n_greater, n_equal,  # int64 (nnz,)
    mass_greater,  # float32 (nnz, K)
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of_row(row, per_row, offsets)
    m = (end - begin).to(tl.int32)
    mine = (begin + row) * COPIES
    blocks = (m + BLOCK - 1) // BLOCK
    lanes = tl.arange(0, BLOCK)
    above = tl.full([], 0, tl.int64)
    for i in tl.range(0, blocks):
        j = (blocks - 1 - i) * BLOCK + lanes
        inside = j < m
        t = tl.load(sorted_bounds + begin + j, mask=inside, other=float("nan"))
        # Equal thresholds share the bin of the first of them.
        first = _places(sorted_bounds, begin, m, t)
        beyond = tl.zeros([BLOCK], tl.int64)
        equal = tl.zeros([BLOCK], tl.int64)
        for copy in tl.static_range(COPIES):
            own = bins + 2 * (mine + copy * (m + 1))
            beyond += tl.load(own + 2 * (j + 1), mask=inside, other=0).to(tl.int64)
            beyond += tl.load(own + 2 * (j + 1) + 1, mask=inside, other=0).to(tl.int64)
            equal += tl.load(own + 2 * first + 1, mask=inside & (t == t), other=0).to(tl.int64)
        greater = above + tl.cumsum(beyond, 0, reverse=True)
        above += tl.sum(beyond, 0)
        to = tl.load(order + begin + j, mask=inside, other=0)
        if ids is not None:
            id = tl.load(ids + to, mask=inside, other=ignore_index)
            good = (id >= 0) & (id < vocab)
            greater = tl.where(id == ignore_index, 0, tl.where(good, greater, -1))
            equal = tl.where(id == ignore_index, 0, tl.where(good, tl.maximum(equal - 1, 0), -1))
        tl.store(n_greater + to, greater, mask=inside)
        tl.store(n_equal + to, equal, mask=inside)
    if masses is not None:
        top = tl.load(tops + row * top_stride)
        for k in tl.range(0, k_count):
            total = tl.full([], 0, tl.int64)
            for i in tl.range(0, blocks):
                j = (blocks - 1 - i) * BLOCK + lanes
                inside = j < m
                beyond = tl.zeros([BLOCK], tl.int64)
                for copy in tl.static_range(COPIES):
                    beyond += tl.load(masses + k * mass_step + mine + copy * (m + 1) + j + 1, mask=inside, other=0)
                mass = (total + tl.cumsum(beyond, 0, reverse=True)).to(tl.float64) * (1.0 / UNIT)
                total += tl.sum(beyond, 0)
                to = tl.load(order + begin + j, mask=inside, other=0)
                mass = tl.where(top != top, float("nan"), tl.minimum(mass, 1.0)).to(tl.float32)
                if ids is not None:
                    id = tl.load(ids + to, mask=inside, other=ignore_index)
                    mass = tl.where((id >= 0) & (id < vocab), mass, float("nan"))
                    mass = tl.where(id == ignore_index, 0.0, mass)
                tl.store(mass_greater + to * k_count + k, mass, mask=inside)
