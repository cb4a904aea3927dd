"""Precision-recall divergence, backward. Not yet run on a GPU.

    d alpha/dz_v = b Q_v (1[d_v < theta] - A)          teacher: lam b_p P_v (1[d_v >= theta] - B)
(csrc/cpu/pr_divergence.h). ``_upstream`` turns the upstream gradients of a row into one coefficient for each threshold
and side; the element by element pass adds up those whose threshold lies on the right side of d_v. One read of both
rows, and one write for each side that needs a gradient. dT = -1/T sum (z - max) dz, by segments in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pr_divergence import Layout, has_pair, is_ignored, norms_of, place, threshold
from .row_state import LOG2E, row_of

TILE = 1024


@triton.jit(do_not_specialize=["count", "plane", "own_stride", "other_stride"])
def _upstream(
    grad_alpha, grad_beta,  # float32 (N, L)
    lam, log2_lam,  # float64 (L,)
    count, ignored, norms, mass, plane, own, own_stride, other, other_stride,
    thetas,  # float32 (N, L)
    each,  # float32 (2, N, L)
    totals,  # float32 (N, 2); NaN or 0 stands for the gradient of the whole row where there is no softmax
    flags,  # int32 (N,): 0 zero, 1 NaN, 2 computed
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _, log_q, _, log_p = norms_of(norms, row)
    scale_q = tl.exp2(-log_q) / tl.load(own + row * own_stride)
    scale_p = tl.exp2(-log_p) / tl.load(other + row * other_stride)
    total_q = tl.full([], 0.0, tl.float64)
    total_p = tl.full([], 0.0, tl.float64)
    some = tl.full([], 0, tl.int32)
    for k in tl.range(0, count):
        at = row * count + k
        value = tl.load(lam + k)
        a = tl.load(grad_alpha + at).to(tl.float64)
        b = tl.load(grad_beta + at).to(tl.float64)
        some = tl.where((a != 0.0) | (b != 0.0), 1, some)
        none = value == 0.0
        infinite = value == float("inf")
        # alpha_0 = 0 and beta_inf = 0 whatever Q; beta_0 depends on P alone, alpha_inf on Q alone.
        g = tl.where(infinite, a, tl.where(none, 0.0, a + b / tl.where(none, 1.0, value)))
        h = tl.where(infinite, 0.0, tl.fma(a, tl.where(infinite, 0.0, value), b))
        total_q += g * tl.load(mass + at)
        total_p += h * tl.load(mass + plane + at)
        tl.store(each + at, (g * scale_q).to(tl.float32))
        tl.store(each + plane + at, (h * scale_p).to(tl.float32))
        tl.store(thetas + at, threshold(tl.load(log2_lam + k), log_q, log_p))
    tl.store(totals + 2 * row, (total_q * scale_q).to(tl.float32))
    tl.store(totals + 2 * row + 1, (total_p * scale_p).to(tl.float32))
    bad = (log_q != log_q) | (log_p != log_p)
    kind = tl.where(has_pair(log_q, log_p), 2, tl.where(bad, 1, 0))
    tl.store(flags + row, tl.where(is_ignored(ignored, row) | (some == 0), 0, kind))


@triton.jit(do_not_specialize=["inner_q", "outer_stride_q", "inner_stride_q", "inner_p", "outer_stride_p",
                               "inner_stride_p", "vocab", "width_q", "width_p", "own_stride", "other_stride", "count",
                               "plane", "chunks"])  # fmt: skip
def _pair_gradient(
    x, inner_q, outer_stride_q, inner_stride_q, teacher, inner_p, outer_stride_p, inner_stride_p,
    out_q, width_q, out_p, width_p,  # (N, width) contiguous, or None
    vocab, own, own_stride, other, other_stride, norms, thetas, each, plane, totals, flags, count,
    moments,  # float32 (N, chunks, 2), or None
    chunks,
    TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    columns = (program % chunks) * TILE + tl.arange(0, TILE)
    inside = columns < vocab
    flag = tl.load(flags + row)
    dz_q = tl.zeros([TILE], tl.float32)
    dz_p = tl.zeros([TILE], tl.float32)
    moment_q = tl.full([], 0.0, tl.float32)
    moment_p = tl.full([], 0.0, tl.float32)
    if flag == 2:
        max_q, _, max_p, _ = norms_of(norms, row)
        top_q = max_q.to(tl.float32)
        top_p = max_p.to(tl.float32)
        c_q = (LOG2E / tl.load(own + row * own_stride)).to(tl.float32)
        c_p = (LOG2E / tl.load(other + row * other_stride)).to(tl.float32)
        source = row_of(x, row, inner_q, outer_stride_q, inner_stride_q)
        against = row_of(teacher, row, inner_p, outer_stride_p, inner_stride_p)
        z_q = tl.load(source + columns, mask=inside, other=-float("inf")).to(tl.float32)
        z_p = tl.load(against + columns, mask=inside, other=-float("inf")).to(tl.float32)
        q, p, distance = place(z_q, z_p, top_q, top_p, c_q, c_p)
        for k in tl.range(0, count):
            less = distance < tl.load(thetas + row * count + k)
            dz_q += tl.where(less, tl.load(each + row * count + k), 0.0)
            dz_p += tl.where(less, 0.0, tl.load(each + plane + row * count + k))
        dz_q = (dz_q - tl.load(totals + 2 * row)) * q
        dz_p = (dz_p - tl.load(totals + 2 * row + 1)) * p
        if moments is not None:  # a masked token has gradient 0 and must not form 0 * inf
            moment_q = tl.sum(tl.where(z_q > -float("inf"), (z_q - top_q) * dz_q, 0.0), 0)
            moment_p = tl.sum(tl.where(z_p > -float("inf"), (z_p - top_p) * dz_p, 0.0), 0)
    elif flag == 1:
        dz_q += float("nan")
        dz_p += float("nan")
        moment_q += float("nan")
        moment_p += float("nan")
    if moments is not None:
        tl.store(moments + program * 2, moment_q)
        tl.store(moments + program * 2 + 1, moment_p)
    if out_q is not None:
        value = tl.where(inside, dz_q, 0.0).to(out_q.dtype.element_ty)
        tl.store(out_q + row * width_q + columns, value, mask=columns < width_q)
    if out_p is not None:
        value = tl.where(inside, dz_p, 0.0).to(out_p.dtype.element_ty)
        tl.store(out_p + row * width_p + columns, value, mask=columns < width_p)


@triton.jit(do_not_specialize=["chunks", "own_stride", "other_stride"])
def _temperature(moments, chunks, own, own_stride, other, other_stride, grad_temperature):
    row = tl.program_id(0).to(tl.int64)
    total_q = tl.full([], 0.0, tl.float64)
    total_p = tl.full([], 0.0, tl.float64)
    for i in tl.range(0, chunks):
        at = moments + (row * chunks + i) * 2
        total_q += tl.load(at).to(tl.float64)
        total_p += tl.load(at + 1).to(tl.float64)
    tl.store(grad_temperature + 2 * row, -total_q / tl.load(own + row * own_stride))
    tl.store(grad_temperature + 2 * row + 1, -total_p / tl.load(other + row * other_stride))


def backward(
    grad_logits: Tensor | None,
    grad_teacher: Tensor | None,
    grad_temperature: Tensor | None,
    grad_alpha: Tensor,
    grad_beta: Tensor,
    logits: Tensor,
    layout: Layout,
    teacher: Tensor,
    teacher_layout: Layout,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    mass: Tensor,
    norms: Tensor,
) -> None:
    """Fill what is not None: contiguous gradients like the logits, float64 (N, 2) to the two temperatures."""
    n_rows, count = grad_alpha.shape
    if n_rows == 0:
        return
    device = logits.device
    lam = lam.contiguous()
    temperatures = (
        temperature, 1 if temperature.shape[0] > 1 else 0, teacher_temperature,
        1 if teacher_temperature.shape[0] > 1 else 0,
    )  # fmt: skip
    thetas = torch.empty(n_rows, count, dtype=torch.float32, device=device)
    each = torch.empty(2, n_rows, count, dtype=torch.float32, device=device)
    totals = torch.empty(n_rows, 2, dtype=torch.float32, device=device)
    flags = torch.empty(n_rows, dtype=torch.int32, device=device)
    plane = n_rows * count
    _upstream[(n_rows,)](
        grad_alpha, grad_beta, lam, lam.log2(), count, ignored, norms, mass, plane, *temperatures, thetas, each, totals,
        flags, num_warps=1, **launch.EXACT,
    )  # fmt: skip
    chunks = -(-max(logits.shape[-1], teacher.shape[-1]) // TILE)
    moments = None
    if grad_temperature is not None:
        moments = torch.empty(n_rows, chunks, 2, dtype=torch.float32, device=device)
    _pair_gradient[(n_rows * chunks,)](
        logits, *layout[1:], teacher, *teacher_layout[1:], grad_logits, logits.shape[-1], grad_teacher,
        teacher.shape[-1], vocab_size, *temperatures, norms, thetas, each, plane, totals, flags, count, moments, chunks,
        TILE=TILE, num_warps=4, **launch.EXACT,
    )  # fmt: skip
    if moments is not None:
        _temperature[(n_rows,)](moments, chunks, *temperatures, grad_temperature, num_warps=1, **launch.EXACT)
