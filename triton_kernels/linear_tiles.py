"""A tile of a linear layer's logits: made on the tensor cores, and added up row by row while it is in registers.

Not yet run on a GPU. linear_statistics.py says how the tiles make a row.

A tile is taken apart into slices (``slices``), tensors of few columns, and each quantity is first added up over the
slices, number by number, and then over what is left of each row: a few shuffles between four neighbouring threads (and,
on GPUs before sm_90, one exchange between two warps), and a few registers beside the 64 or 128 of the tile.
"""

import triton
import triton.language as tl

from .row_state import LOG2E, LOWEST, LOWEST_EXPONENT, SHRINK, plus_4


@triton.jit
def _rounded(z, like):
    return z.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _tanh(x):
    """To some 4e-7 of its size: by the series near 0, where 1 - 2 / (e^2x + 1) cancels. NaN stays NaN."""
    s = x * x
    near = tl.fma(s * x, tl.fma(s, tl.fma(s, tl.fma(s, 0.021869489, -0.053968254), 0.13333334), -0.33333334), x)
    most = tl.minimum(x * (2 * LOG2E), 126.0, propagate_nan=tl.PropagateNan.ALL)
    far = 1.0 - 2.0 / (tl.exp2(most) + 1.0)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def logits_of(acc, hidden, bias, column, scale, softcap):
    """What the layer makes of the product, each step rounded to its dtype. A division by a number multiplies by its
    reciprocal, as torch does it on a GPU."""
    if bias is not None:
        acc += tl.load(bias + column).to(tl.float32)[None, :]
    z = _rounded(acc, hidden)
    if scale is not None:
        z = _rounded(z * scale, hidden)
    if softcap is not None:
        z = _rounded(z * tl.div_rn(1.0, softcap), hidden)
        z = _rounded(_rounded(_tanh(z), hidden) * softcap, hidden)
    return z


@triton.jit
def product(
    rows, columns, depth, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rows: pointers (BLOCK_N, 1), columns: (1, BLOCK_V), to the first number of each."""
    at = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for d in tl.range(0, depth, BLOCK_D):
        if EVEN:
            h = tl.load(rows + (d + at)[None, :])
            w = tl.load(columns + (d + at)[:, None])
        else:
            h = tl.load(rows + (d + at)[None, :], mask=(d + at < depth)[None, :], other=0.0)
            w = tl.load(columns + (d + at)[:, None], mask=(d + at < depth)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _halves(z, WIDTH: tl.constexpr):
    if z.shape[1] == WIDTH:
        return (z,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, z.shape[1] // 2]), [0, 2, 1]))
        return _halves(left, WIDTH) + _halves(right, WIDTH)


@triton.jit
def slices(z, WIDTH: tl.constexpr):
    """(BLOCK_N, columns) as tensors (BLOCK_N, WIDTH). Slice i has the columns ``_first(i) + 2 arange(WIDTH)``: a thread
    of a matrix instruction holds two neighbours, and with eight columns nothing moves between threads (fewer would).
    """
    even, odd = tl.split(tl.reshape(z, [z.shape[0], z.shape[1] // 2, 2]))
    evens = _halves(even, WIDTH)
    odds = _halves(odd, WIDTH)
    out = ()
    for i in tl.static_range(len(evens)):
        out = out + (evens[i], odds[i])
    return out


@triton.jit
def _first(i: tl.constexpr, WIDTH: tl.constexpr):
    return i // 2 * (2 * WIDTH) + i % 2


@triton.jit
def _higher(a, a_column, b, b_column):
    other = (b > a) | ((b == a) & (b_column < a_column))
    return tl.where(other, b, a), tl.where(other, b_column, a_column)


@triton.jit
def maximum(z):
    """Of each row, and the lowest column of the tile that holds it. A NaN is no maximum."""
    WIDTH: tl.constexpr = z[0].shape[1]
    best = tl.full(z[0].shape, -float("inf"), tl.float32)
    where = tl.zeros(z[0].shape, tl.int32)
    for i in tl.static_range(len(z)):
        where = tl.where(z[i] > best, _first(i, WIDTH), where)
        best = tl.maximum(best, z[i])
    return tl.reduce((best, where + 2 * tl.arange(0, WIDTH)[None, :]), 1, _higher)


@triton.jit
def pick(z, column):
    """The logit in this column of the tile, of each row; 0 where the tile has no such column."""
    WIDTH: tl.constexpr = z[0].shape[1]
    away = column[:, None] - 2 * tl.arange(0, WIDTH)[None, :]
    found = tl.zeros(z[0].shape, tl.float32)
    for i in tl.static_range(len(z)):
        found = tl.where(away == _first(i, WIDTH), z[i], found)
    return tl.sum(found, 1)


@triton.jit
def exponentials(z, top, c, MOMENTS: tl.constexpr):
    """Sums of 2^t, and of 2^t t, 2^t t^2, 2^2t unless they are not asked for, of each row; t = c (z - top)."""
    a0 = tl.zeros(z[0].shape, tl.float32)
    a1 = a0
    a2 = a0
    a3 = a0
    for i in tl.static_range(len(z)):
        t = tl.maximum((z[i] - top[:, None]) * c[:, None], LOWEST_EXPONENT)
        e = tl.exp2(t)
        a0 += e
        if MOMENTS:
            et = e * t
            a1 += et
            a2 = tl.fma(et, t, a2)
            a3 = tl.fma(e, e, a3)
    if MOMENTS:
        return tl.reduce((a0, a1, a2, a3), 1, plus_4)
    else:
        return (tl.sum(a0, 1),)


@triton.jit
def count_finite(z):
    """Finite logits of each row, NaN where one is NaN or +inf."""
    n = tl.zeros(z[0].shape, tl.float32)
    for i in tl.static_range(len(z)):
        n += tl.where(tl.abs(z[i]) <= -LOWEST, 1.0, tl.where(z[i] == -float("inf"), 0.0, float("nan")))
    return tl.sum(n, 1)


@triton.jit
def spread_with(z, here, n, mean, m2):
    """Mean and squares about it of each row, scaled down by SHRINK, merged with those of a tile (Chan)."""
    total = tl.zeros(z[0].shape, tl.float32)
    for i in tl.static_range(len(z)):
        total += tl.where(tl.abs(z[i]) <= -LOWEST, z[i] * SHRINK, 0.0)
    about = tl.sum(total, 1) / tl.maximum(here, 1.0)
    square = tl.zeros(z[0].shape, tl.float32)
    for i in tl.static_range(len(z)):
        d = tl.where(tl.abs(z[i]) <= -LOWEST, tl.fma(z[i], SHRINK, -about[:, None]), 0.0)
        square = tl.fma(d, d, square)
    weight = here / tl.maximum(n + here, 1.0)
    delta = tl.where(here > 0, about - mean, 0.0)
    return tl.fma(delta, weight, mean), m2 + tl.fma(delta * delta, n * weight, tl.sum(square, 1))
