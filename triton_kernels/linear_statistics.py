"""Statistics of a linear layer's logits, forward, without the logits: tiles of the product feed row states.

Not yet run on a GPU. At sm_80 the compiled kernels run on the emulated device (tests/test_triton_linear_emulated.py);
from sm_90 on the product compiles to other instructions (wgmma, tcgen05), which are not emulated: there the arithmetic
around it is proven through sm_80's code, and that it compiles.

Two kernels, as in statistics.py. ``_tiles``: a program takes some rows and a segment of the vocabulary, makes a tile of
logits at a time on the tensor cores, in float32, and takes them into the running states of its rows while they are in
registers. ``_finish`` of statistics.py merges the segments in order. What reaches memory is a state of 24 + 16 K bytes
for each row and segment, at most 128 segments: for 128,256 bfloat16 logits 2% of their bytes at one temperature.

Order of programs. A tile reads 128 rows of hidden and of weight, 1 MB each at a depth of 4,096, so the memory must be
kept out of it: programs next to each other take SHARED row blocks of one segment, then those of the next. Some 260 run
at once on an H100: 16 row blocks by 16 segments, that is 16 MB of hidden, which stay in the L2 (50 MB) for all their
tiles, and 16 tiles of weight that are each read from memory once and by 16 programs. All of the weight is read once
for each 2,048 rows.

Bits. A row's logits and their sums do not depend on the other rows of the block, on N or on the order of programs, and
segments depend on V alone: a row has the same bits alone or in any batch. Each step of the layer (product and bias,
scale, cap) is rounded to the dtype of the layer, as the same steps on stored logits would be: backward makes those
again (fastcalib/ops/_linear_chunks.py), and its probabilities must belong to these normalisers.

Accuracy. Half precision goes to the tensor cores as it is. float32 goes as three products of TF32 numbers (tf32x3),
whose error is some 2^-21 of the terms instead of 2^-24; torch's own float32 product (allow_tf32=False) has the latter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .linear_tiles import count_finite, exponentials, logits_of, maximum, pick, product, slices, spread_with
from .row_state import LOG2E, LOWEST, LOWEST_SHIFT, SHRINK, shifted
from .statistics import _finish

# Running sums of more temperatures do not fit beside a tile of logits in the registers.
MAX_TEMPERATURES = 4
# Each selected token of a row is looked for in every tile: one load of the ids of the block's rows.
MAX_TOKENS = 16
MAX_SEGMENTS = 128
SHARED = 16
# Columns of a slice of a tile (linear_tiles.py).
WIDTH = 8
# hidden and weight are read 16 bytes at a time where their strides are multiples of this, as Triton sees it.
STRIDE = 16

# Set to force the choice of ``blocks``: tests, and compiling for another device than is there.
major_override: int | None = None
# Set where CPU tensors are to come here: Triton's interpreter and emulated devices before sm_90.
on_cpu = False


class Blocks(NamedTuple):
    """A tile of logits, how much of the depth is in shared memory at a time, and the registers of a thread."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int

    def segment(self, vocab: int) -> int:
        """Columns of a segment: whole tiles."""
        return self.columns * max(1, -(-vocab // (self.columns * MAX_SEGMENTS)))


def blocks(dtype: torch.dtype, temperatures: int, major: int) -> Blocks:
    """The tile for a compute capability, large enough for the L2 and small enough for two programs to share a
    multiprocessor, so that the sums of one hide behind the products of the other.

    From sm_90 on operands come from shared memory: four warps with all the registers there are hold 128 by 128 logits
    without a spill (one temperature). Before, fragments need registers too: eight warps hold the tile, and their states
    wait in local memory while a product is made; 48 KiB of stages leave room for two programs on every such GPU.
    TF32 fragments are split in registers as well, where the sums of many temperatures are kept, too: half the rows.
    """
    wide, few = dtype == torch.float32, temperatures <= 2
    if major in (9, 10):
        return Blocks(128 if few and not wide else 64, 128, 32 if wide else 64, 4, 3, 255)
    return Blocks(64, 64, 32, 4, 3, 168) if wide else Blocks(128 if few else 64, 128, 32, 8, 4, 128)


@lru_cache(maxsize=64)
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@triton.jit(do_not_specialize=["temperature_stride", "k_count", "per_row", "ignore_index", "n_rows", "vocab",
                               "segments", "segment"])  # fmt: skip
def _tiles(
    hidden,  # (N, D), a row every hidden_stride
    weight,  # (V, D), a row every weight_stride
    bias,  # (V,) or None
    hidden_stride, weight_stride, depth, n_rows, vocab,
    scale, softcap,  # float or None
    temperature,  # float64 (1 or N, K)
    temperature_stride, k_count,
    ids,  # int64 (nnz,) or None
    per_row, offsets, ignore_index,
    reals, integers, sums,  # as in statistics.py, but that integers tell the column of the maximum
    chosen,  # float32 (nnz,): logits of the selected tokens
    segments, segment,
    K: tl.constexpr, MOMENTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SHARED_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    first = number // (SHARED_ROWS * segments) * SHARED_ROWS
    within = number % (SHARED_ROWS * segments)
    shared = tl.minimum((n_rows + BLOCK_N - 1) // BLOCK_N - first, SHARED_ROWS)
    part = within // shared
    row = (first + within % shared).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n_rows
    row = tl.minimum(row, n_rows - 1)  # rows beyond the last are computed as the last, and not stored

    begin = row * 0
    count = begin
    most = 0
    if ids is not None:
        if offsets is None:
            begin = row * per_row
            count = begin * 0 + per_row
        else:
            begin = tl.load(offsets + row)
            count = tl.load(offsets + row + 1) - begin
        most = tl.max(count, 0).to(tl.int32)
        wanted = (count == 0).to(tl.int32)
        for j in tl.range(0, most):
            id = tl.load(ids + begin + j, mask=j < count, other=ignore_index)
            wanted = tl.where(id != ignore_index, 1, wanted)
        if tl.max(wanted, 0) == 0:  # a prompt, say
            return

    c = ()
    state = ()
    for k in tl.static_range(K):
        c = c + ((1.0 / tl.load(temperature + row * temperature_stride + k) * LOG2E).to(tl.float32),)
        for _ in tl.static_range(4 if MOMENTS else 1):
            state = state + (tl.zeros([BLOCK_N], tl.float32),)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK_N], tl.int32)
    n = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    m2 = tl.zeros([BLOCK_N], tl.float32)

    start = part * segment
    end = tl.minimum(start + segment, vocab)
    for at in tl.range(start, end, BLOCK_V):
        column = at + tl.arange(0, BLOCK_V)
        there = tl.minimum(column, vocab - 1)
        acc = product(
            hidden + (row * hidden_stride)[:, None], weight + (there.to(tl.int64) * weight_stride)[None, :], depth,
            BLOCK_D, EVEN, PRECISION, BLOCK_N, BLOCK_V,
        )  # fmt: skip
        z = logits_of(acc, hidden, bias, there, scale, softcap)
        if at + BLOCK_V > vocab:
            z = tl.where((column < vocab)[None, :], z, -float("inf"))
        z = slices(z, WIDTH)

        if ids is not None:
            for j in tl.range(0, most):
                id = tl.load(ids + begin + j, mask=j < count, other=-1)
                hit = (id >= at) & (id < tl.minimum(at + BLOCK_V, vocab)) & (j < count)
                if tl.max(hit.to(tl.int32), 0) > 0:
                    tl.store(chosen + begin + j, pick(z, tl.where(hit, id - at, -1).to(tl.int32)), mask=hit & inside)

        highest, holder = maximum(z)
        where = tl.where(highest > top, at - start + holder, where)
        old = tl.maximum(top, LOWEST)
        top = tl.maximum(top, highest)
        new = tl.maximum(top, LOWEST)
        made = ()
        for k in tl.static_range(K):
            parts = exponentials(z, new, c[k], MOMENTS)
            shift = tl.maximum((old - new) * c[k], LOWEST_SHIFT)
            if MOMENTS:
                s0 = state[4 * k]
                r2 = state[4 * k + 3]
                r, r_squared, s1, s2 = shifted(s0, state[4 * k + 1], state[4 * k + 2], r2, shift)
                made = made + (
                    tl.fma(r, s0, parts[0]),
                    tl.fma(r, s1, parts[1]),
                    tl.fma(r, s2, parts[2]),
                    tl.fma(r_squared, r2, parts[3]),
                )
            else:
                made = made + (tl.fma(tl.exp2(shift), state[k], parts[0]),)
        state = made

        here = count_finite(z)
        if MOMENTS:
            mean, m2 = spread_with(z, here, n, mean, m2)
        n += here

    grow: tl.constexpr = 1.0 / SHRINK
    bad = n != n
    place = row * segments + part
    tl.store(reals + place * 3, top, mask=inside)
    tl.store(reals + place * 3 + 1, tl.where(bad, 0.0, mean * grow), mask=inside)
    tl.store(reals + place * 3 + 2, tl.where(bad, 0.0, m2 * (grow * grow)), mask=inside)
    tl.store(integers + place * 3, where, mask=inside)
    tl.store(integers + place * 3 + 1, tl.where(bad, 0.0, n).to(tl.int32), mask=inside)
    tl.store(integers + place * 3 + 2, bad.to(tl.int32), mask=inside)
    for k in tl.static_range(K):
        to = sums + (place * k_count + k) * 4
        for i in tl.static_range(4):
            if MOMENTS or i == 0:
                tl.store(to + i, state[4 * k + i if MOMENTS else k], mask=inside)
            else:
                tl.store(to + i, tl.zeros([BLOCK_N], tl.float32), mask=inside)


def serves(hidden: Tensor, weight: Tensor, temperatures: int, tokens: int) -> bool:
    """Whether ``forward`` takes these tensors, so many temperatures, and so many selected tokens of all rows; their
    number of rows is no reason, so that it changes no bits.

    A depth and strides that are not multiples of STRIDE would be read number by number. On AMD's GPUs the library's
    product and the kernels on its logits are left to do it: the tiles here are cut for NVIDIA's.
    """
    aligned = all(
        t.stride(1) == 1 and t.stride(0) % STRIDE == 0 and t.data_ptr() % 16 == 0 and t.shape[0] > 0
        for t in (hidden, weight)
    )
    return (
        hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and aligned
        and hidden.shape[1] >= STRIDE
        and temperatures <= MAX_TEMPERATURES
        and tokens <= MAX_TOKENS * hidden.shape[0]
        and torch.version.hip is None
        and (hidden.is_cuda or on_cpu)
    )


def forward(
    out: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    ignore_index: int,
    moments: bool,
) -> None:
    """Fill ``out``, the packed results of ``statistics`` without ranks; all of V takes part.

    Args:
        out: as statistics.forward takes it.
        hidden: (N, D), weight: (V, D); of one dtype, columns adjacent. bias: (V,), contiguous, or None.
        temperature: float64 (1 or N, K), contiguous; K <= MAX_TEMPERATURES.
        index: int64 (nnz,), ``per_row`` of them a row or, if ``per_row`` is 0 and offsets are given, ragged.
        moments: False leaves out what entropy, collision, mean, variance, sum and spread are made of.
    """
    rows, scalars, log_prob, argmax, _, _, _, saved = out
    (n_rows, depth), vocab, k = hidden.shape, weight.shape[0], temperature.shape[1]
    if n_rows == 0:
        return
    device = hidden.device
    major = major_override or (_major(device) if hidden.is_cuda else 8)
    cut = blocks(hidden.dtype, k, major)
    segment = cut.segment(vocab)
    segments = -(-vocab // segment)
    reals = torch.empty(n_rows * segments, 3, dtype=torch.float32, device=device)
    integers = torch.empty(n_rows * segments, 3, dtype=torch.int32, device=device)
    sums = torch.empty(n_rows * segments, k, 4, dtype=torch.float32, device=device)
    chosen = None if index is None else torch.empty(index.shape[0], dtype=torch.float32, device=device)
    stride = k if temperature.shape[0] > 1 else 0
    selection = (index, per_row, offsets, ignore_index)
    _tiles[(-(-n_rows // cut.rows) * segments,)](
        hidden, weight, bias, hidden.stride(0), weight.stride(0), depth, n_rows, vocab, scale, softcap,
        temperature, stride, k, *selection, reals, integers, sums, chosen, segments, segment,
        K=k, MOMENTS=moments, EVEN=depth % cut.depth == 0,
        PRECISION="tf32x3" if hidden.dtype == torch.float32 else "ieee",
        BLOCK_N=cut.rows, BLOCK_V=cut.columns, BLOCK_D=cut.depth, SHARED_ROWS=SHARED, WIDTH=WIDTH,
        num_warps=cut.warps, num_stages=cut.stages, maxnreg=cut.registers, **launch.EXACT,
    )  # fmt: skip
    _finish[(n_rows,)](
        None, 1, 0, 0, vocab, temperature, stride, k, *selection, reals, integers, sums, None, None, segments, segment,
        chosen, rows, scalars, log_prob, argmax, None, None, None, saved, n_rows,
        RANKED=0, VECTOR=1, PARTS=launch.next_power_of_two(segments), COLUMNS=launch.next_power_of_two(k), num_warps=1,
        **launch.EXACT,
    )  # fmt: skip
