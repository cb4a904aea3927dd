"""The monoid of csrc/row_state.h for Triton: what a program keeps of a segment of a row, and how it is added up.

Not yet run on a GPU.

A tile of a row is (UNROLL, LANES, VECTOR) neighbouring columns. Each thread owns one lane: UNROLL vectors of 16 bytes.
It keeps one running state (its own maximum and sums against it), so the main loop has neither a barrier nor a shuffle,
and needs 1 + 1/(UNROLL VECTOR) exponentials per element and temperature.

Bits. A tile is taken apart (``unzip``) into UNROLL VECTOR tensors of one number per lane right after the load, and
added up in the order written here. So the sum of a segment depends on its columns alone: not on how the compiler lays
out the load, hence not on the alignment of the row; not on N, nor on the number of programs. Every multiply-add is an
explicit ``fma``, and kernels are compiled without contraction (launch.EXACT): left to the compiler, two kernels that
share a helper could round differently.

Accuracy. Sums are float32 over at most 32 terms of a tile, then over the tiles of a lane (at most 8 in a segment of
64 KiB), then over 128 lanes in a tree: some 50 roundings in the worst case, 3e-6, and about 3e-7 in practice. Segments
are merged in float64 (statistics.py).
"""

import triton
import triton.language as tl

# Most negative finite float32. It stands in for a maximum of -inf, so that no inf - inf is ever formed.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Exponents are clamped here: 2^-126 is nothing beside the 2^0 of the maximum, and masked tokens form no 0 * inf.
LOWEST_EXPONENT = tl.constexpr(-126.0)
# Below this shift every sum is exactly 0 after rescaling; it keeps the shift finite when a maximum is -inf.
LOWEST_SHIFT = tl.constexpr(-100000.0)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(2147483647)
# Keeps sums of finite numbers of any size finite; a power of two, so it rounds nothing (careful_spread).
SHRINK = tl.constexpr(0.00390625)


@triton.jit
def unzip(tile, COUNT: tl.constexpr):
    """(LANES, COUNT) -> COUNT tensors (LANES,), in order; nothing moves where a thread holds a whole vector."""
    if COUNT == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], COUNT // 2, 2]))
        evens = unzip(even, COUNT // 2)
        odds = unzip(odd, COUNT // 2)
        out = ()
        for i in tl.static_range(COUNT // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def load_tile(pointer, at, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """The tile from column ``at`` as UNROLL VECTOR tensors (LANES,) of float32: mask-free, in 128-bit loads if aligned.

    ALIGN is the alignment of every row, and so of every tile, in bytes. It is said of this very addition: Triton keeps
    the hint on the operation that makes the pointer, and forgets one on an argument or on a function's result.
    """
    pointer = tl.multiple_of(pointer + at, ALIGN)
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    out = ()
    for u in tl.static_range(UNROLL):
        out = out + unzip(tl.load(pointer + u * LANES * VECTOR + columns).to(tl.float32), VECTOR)
    return out


@triton.jit
def load_tail(pointer, count, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """The first ``count`` columns of a tile; the others are -inf."""
    columns = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    out = ()
    for u in tl.static_range(UNROLL):
        at = u * LANES * VECTOR + columns
        out = out + unzip(tl.load(pointer + at, mask=at < count, other=-float("inf")).to(tl.float32), VECTOR)
    return out


@triton.jit
def column_of(i: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Column within the tile of element i of each lane, (LANES,)."""
    return (i // VECTOR * LANES + tl.arange(0, LANES)) * VECTOR + i % VECTOR


@triton.jit
def top_of(values, first_vector, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """Maximum of each lane, and the number of the first vector of the segment that holds it."""
    for u in tl.static_range(UNROLL):
        best = values[u * VECTOR]
        for i in tl.static_range(1, VECTOR):
            best = tl.maximum(best, values[u * VECTOR + i])
        at = first_vector + u * LANES + tl.arange(0, LANES)
        if u == 0:
            top, where = best, at
        else:
            where = tl.where(best > top, at, where)
            top = tl.maximum(top, best)
    return top, where


@triton.jit
def add_exponentials(total, values, top, old, c):
    """Running sum 2^(c (z - max)) of each lane, moved from the maximum ``old`` to ``top``.

    Nothing is clamped, so that a NaN or +inf makes the sum NaN: there is no other mark of it where only this is summed.
    """
    here = tl.exp2((values[0] - top) * c)
    for i in tl.static_range(1, len(values)):
        here += tl.exp2((values[i] - top) * c)
    return tl.fma(tl.exp2(tl.maximum((old - top) * c, LOWEST_SHIFT)), total, here)


@triton.jit
def segment_normalisers(
    pointer, count, c, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr
):
    """Maximum of a segment, and for each of the temperatures ``c`` the sum 2^(c (z - max)); float32 scalars."""
    TILE: tl.constexpr = LANES * VECTOR * UNROLL
    top = tl.full([LANES], -float("inf"), tl.float32)
    sums = ()
    for _ in tl.static_range(len(c)):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    whole = count // TILE * TILE
    for at in tl.range(0, whole, TILE):
        top, sums = add_normalisers(top, sums, load_tile(pointer, at, ALIGN, LANES, VECTOR, UNROLL), c)
    if whole < count:
        top, sums = add_normalisers(top, sums, load_tail(pointer + whole, count - whole, LANES, VECTOR, UNROLL), c)
    highest = tl.max(top, 0)
    out = ()
    for g in tl.static_range(len(c)):
        shift = (tl.maximum(top, LOWEST) - tl.maximum(highest, LOWEST)) * c[g]
        out = out + (tl.sum(tl.exp2(tl.maximum(shift, LOWEST_SHIFT)) * sums[g], 0),)
    return highest, out


@triton.jit
def add_normalisers(top, sums, values, c):
    old = tl.maximum(top, LOWEST)
    for i in tl.static_range(len(values)):
        top = tl.maximum(top, values[i])
    new = tl.maximum(top, LOWEST)
    out = ()
    for g in tl.static_range(len(c)):
        out = out + (add_exponentials(sums[g], values, new, old, c[g]),)
    return top, out


@triton.jit
def merge_normalisers(top, total, other_top, other, c):
    """Maximum and sum (float64) of two neighbouring subsets of a row; c in float64."""
    new = tl.maximum(top, other_top)
    safe = tl.maximum(new, LOWEST).to(tl.float64)
    mine = tl.exp2(tl.maximum((tl.maximum(top, LOWEST).to(tl.float64) - safe) * c, LOWEST_SHIFT))
    theirs = tl.exp2(tl.maximum((tl.maximum(other_top, LOWEST).to(tl.float64) - safe) * c, LOWEST_SHIFT))
    return new, tl.fma(total, mine, other.to(tl.float64) * theirs)


@triton.jit
def shifted(s0, s1, s2, r2, shift):
    """The sums after the maximum rose by -shift / c: ``Sums::shift`` of row_state.h, without the additions."""
    r = tl.exp2(shift)
    return r, r * r, tl.fma(shift, s0, s1), tl.fma(shift, tl.fma(shift, s0, s1 + s1), s2)


@triton.jit
def add_moments(s0, s1, s2, r2, values, top, old, c):
    """The four running sums of each lane (row_state.h), moved from the maximum ``old`` to ``top``."""
    for i in tl.static_range(len(values)):
        t = tl.maximum((values[i] - top) * c, LOWEST_EXPONENT)
        e = tl.exp2(t)
        et = e * t
        if i == 0:
            a0, a1, a2, a3 = e, et, et * t, e * e
        else:
            a0 += e
            a1 += et
            a2 = tl.fma(et, t, a2)
            a3 = tl.fma(e, e, a3)
    r, r_squared, first, second = shifted(s0, s1, s2, r2, tl.maximum((old - top) * c, LOWEST_SHIFT))
    return tl.fma(r, s0, a0), tl.fma(r, first, a1), tl.fma(r, second, a2), tl.fma(r_squared, r2, a3)


@triton.jit
def plus_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def plus_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def total_of_lanes(s0, s1, s2, r2, top, highest, c):
    """The four sums of a segment from those of its lanes: one reduction, hence one exchange between warps."""
    r, r_squared, first, second = shifted(s0, s1, s2, r2, tl.maximum((top - highest) * c, LOWEST_SHIFT))
    return tl.reduce((r * s0, r * first, r * second, r_squared * r2), 0, plus_4)


@triton.jit
def near_mean(pointer, count):
    """Mean of the finite ones among the first 64 columns: the spread is measured from there, so nothing cancels."""
    columns = tl.arange(0, 64)
    z = tl.load(pointer + columns, mask=columns < count, other=-float("inf")).to(tl.float32)
    finite = tl.abs(z) <= -LOWEST
    n = tl.sum(finite.to(tl.float32), 0)
    # divided first: the sum of 64 finite numbers may not be finite
    return tl.sum(tl.where(finite, z, 0.0) / tl.maximum(n, 1.0), 0)


@triton.jit
def add_spread(total, square, values, center):
    """Running sums of z - center and its square; NaN or infinite wherever a logit is."""
    for i in tl.static_range(len(values)):
        d = values[i] - center
        if i == 0:
            a, b = d, d * d
        else:
            a += d
            b = tl.fma(d, d, b)
    return total + a, square + b


@triton.jit
def add_spread_of_tail(
    total, square, values, center, count, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr
):
    for i in tl.static_range(UNROLL * VECTOR):
        d = tl.where(column_of(i, LANES, VECTOR) < count, values[i] - center, 0.0)
        total += d
        square = tl.fma(d, d, square)
    return total, square


@triton.jit
def careful_spread(pointer, count, LANES: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr):
    """Spread of a segment with -inf, NaN or overflow in it: one more look, from the L2 cache, at the finite logits.

    Each lane takes mean and squares of a tile about that tile's own mean and merges them (Chan), scaled down so that no
    sum of finite logits overflows. Returns their number, mean, sum of squares, and whether there is a NaN or +inf.
    """
    n = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES], tl.float32)
    m2 = tl.zeros([LANES], tl.float32)
    bad = tl.zeros([LANES], tl.int32)
    for start in tl.range(0, count, LANES * VECTOR * UNROLL):
        z = load_tail(pointer + start, count - start, LANES, VECTOR, UNROLL)
        here = tl.zeros([LANES], tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for i in tl.static_range(UNROLL * VECTOR):
            finite = tl.abs(z[i]) <= -LOWEST
            bad = tl.where(finite | (z[i] == -float("inf")), bad, 1)
            here += finite.to(tl.float32)
            total += tl.where(finite, z[i] * SHRINK, 0.0)
        about = total / tl.maximum(here, 1.0)
        rest = tl.zeros([LANES], tl.float32)
        square = tl.zeros([LANES], tl.float32)
        for i in tl.static_range(UNROLL * VECTOR):
            d = tl.where(tl.abs(z[i]) <= -LOWEST, tl.fma(z[i], SHRINK, -about), 0.0)
            rest += d
            square = tl.fma(d, d, square)
        share = rest / tl.maximum(here, 1.0)
        square = tl.maximum(tl.fma(-share, rest, square), 0.0)
        about += share
        both = n + here
        weight = here / tl.maximum(both, 1.0)
        delta = tl.where(here > 0, about - mean, 0.0)
        mean = tl.fma(delta, weight, mean)
        m2 += tl.fma(delta * delta, n * weight, square)
        n = both
    finite_count = tl.sum(n, 0)
    center = tl.sum(mean * (n / tl.maximum(finite_count, 1.0)), 0)
    away = mean - center
    squares = tl.sum(tl.fma(n * away, away, m2), 0)
    grow: tl.constexpr = 1.0 / SHRINK
    return tl.sum(n.to(tl.int32), 0), center * grow, squares * (grow * grow), tl.max(bad, 0)


@triton.jit
def first_equal(pointer, limit, value, VECTOR: tl.constexpr):
    """Lowest of VECTOR columns that holds ``value`` (as float32)."""
    columns = tl.arange(0, VECTOR)
    z = tl.load(pointer + columns, mask=columns < limit, other=-float("inf")).to(tl.float32)
    return tl.min(tl.where(z == value, columns, VECTOR), 0)


@triton.jit
def bounds_of_row(row, per_row, offsets):
    """Where the selected tokens of a row begin and end in the flat list; int64."""
    if offsets is None:
        begin = row * per_row
        end = begin + per_row
    else:
        begin = tl.load(offsets + row)
        end = tl.load(offsets + row + 1)
    return begin, end


@triton.jit
def is_skipped(ids, begin, end, ignore_index):
    """Whether a row has selected tokens and all of them are ignored. Stops at the first that is not."""
    kept = tl.full([], 0, tl.int32)
    at = begin
    while (kept == 0) & (at < end):
        j = at + tl.arange(0, 32)
        inside = j < end
        id = tl.load(ids + j, mask=inside, other=0)
        kept = tl.sum((inside & (id != ignore_index)).to(tl.int32), 0)
        at += 32
    return (kept == 0) & (begin < end)


@triton.jit
def row_of(x, row, inner, outer_stride, inner_stride):
    """First column of a row; 64-bit throughout, since N V passes 2^31 in ordinary use."""
    return x + (row // inner) * outer_stride + (row % inner) * inner_stride
