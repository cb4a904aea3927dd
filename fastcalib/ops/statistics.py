"""``statistics``: everything a token loss or a calibration measure needs, from one read of the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import eager
from ..backends import extension, resolve
from ..eager.softmax import statistics_dtype
from ..valid_sets import ValidSets
from . import _gpu
from ._arguments import (
    Index,
    Temperature,
    check_ids_eager,
    check_ignore_index,
    check_logits,
    flat_index,
    normalise_index,
    normalise_temperature,
    raise_bad_id,
    row_layout,
)
from ._library import LIBRARY
from ._memory import empty_like_logits
from .types import TokenStatistics

MAX_RANKED = 16
# Order of the first axis of the packed results, the same in csrc/cpu/statistics.h.
ROW_FIELDS = ("logsumexp", "entropy", "max_prob", "collision", "mean_logit", "var_logit")

# What moments=False leaves out.
MOMENTS = ("entropy", "collision", "mean_logit", "var_logit", "sum_logits", "std_logits")

LIBRARY.define(
    "statistics(Tensor logits, Tensor temperature, Tensor? index, SymInt per_row, Tensor? offsets, SymInt vocab_size, "
    "int ignore_index, bool ranks, str backend='auto', bool moments=True) -> (Tensor rows, Tensor scalars, "
    "Tensor log_prob, Tensor argmax, Tensor n_greater, Tensor n_equal, Tensor mass_greater, Tensor saved)"
)
LIBRARY.define(
    "statistics_backward(Tensor grad_rows, Tensor grad_scalars, Tensor grad_log_prob, Tensor logits, "
    "Tensor temperature, Tensor? index, SymInt per_row, Tensor? offsets, Tensor rows, Tensor scalars, Tensor saved, "
    "SymInt vocab_size, int ignore_index, Tensor? argmax=None, str backend='auto') -> Tensor"
)


def _allocate(logits: Tensor, temperature: Tensor, index: Tensor | None, ranks: bool) -> tuple[Tensor, ...]:
    n_rows, k = math.prod(logits.shape[:-1]), temperature.shape[1]
    nnz = 0 if index is None else index.shape[0]
    dtype, device = statistics_dtype(logits.dtype), logits.device

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counted = nnz if ranks else 0
    return (
        new(len(ROW_FIELDS), n_rows, k),
        new(2, n_rows),  # sum_logits, std_logits
        new(nnz, k),
        new(n_rows, dtype=torch.int64),
        new(counted, dtype=torch.int64),
        new(counted, dtype=torch.int64),
        new(counted, k),
        new(
            n_rows, 3 + 2 * k
        ),  # max z, mean z - max z, finite logits; then log s0 and E[z] - max z of each temperature
    )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward(
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    ranks: bool,
    backend: str = "auto",
    moments: bool = True,
) -> tuple[Tensor, ...]:
    out = _allocate(logits, temperature, index, ranks)
    if _gpu.serves(logits, backend):
        # The moments are computed in any case: they cost no memory traffic, which is what counts there.
        _gpu.statistics_forward(
            out, logits, temperature, index, per_row, offsets, vocab_size, ignore_index, ranks, backend
        )
        return out
    layout = row_layout(logits)
    temperature = temperature.contiguous()
    bad = extension().statistics_forward(
        *layout.args(),
        vocab_size,
        temperature.data_ptr(),
        temperature.shape[0],
        temperature.shape[1],
        _pointer(index),
        per_row,
        _pointer(offsets),
        ignore_index,
        ranks,
        moments,
        *(t.data_ptr() for t in out),
        torch.get_num_threads(),
    )
    if bad >= 0:
        assert index is not None
        raise_bad_id(flat_index(index, per_row, offsets, logits), bad, vocab_size, ignore_index)
    return out


def _forward_fake(
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    ranks: bool,
    backend: str = "auto",
    moments: bool = True,
) -> tuple[Tensor, ...]:
    return _allocate(logits, temperature, index, ranks)


def backward_into(
    out: Tensor,
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    rows: Tensor,
    scalars: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
    argmax: Tensor | None = None,
    backend: str = "auto",
    *,
    nontemporal: bool = False,
) -> None:
    """Write the gradient with respect to the logits into ``out``, which may be the logits themselves.

    The low-level call under autograd and :func:`fastcalib.fused_loss`; arguments are those of the registered operation.
    ``nontemporal`` bypasses the caches: faster into memory that is already mapped, slower into fresh memory.
    Accelerators need the ``argmax`` of forward; the C++ kernel looks for it again, where it matters.
    """
    layout, target = row_layout(logits), row_layout(out)
    if target.tensor is not out:
        raise ValueError(f"out must have adjacent columns and at most two strides over its rows, got {out.stride()}")
    if _gpu.serves(logits, backend):
        _gpu.statistics_backward(
            out, grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, per_row, offsets, rows, scalars,
            argmax, saved, vocab_size, ignore_index, backend,
        )  # fmt: skip
        return
    temperature = temperature.contiguous()
    keep = [t.contiguous() for t in (rows, scalars, saved, grad_rows, grad_scalars, grad_log_prob)]
    extension().statistics_backward(
        *layout.args(),
        vocab_size,
        logits.shape[-1],
        temperature.data_ptr(),
        temperature.shape[0],
        temperature.shape[1],
        _pointer(index),
        per_row,
        _pointer(offsets),
        ignore_index,
        *(t.data_ptr() for t in keep),
        target.tensor.data_ptr(),
        target.inner,
        target.outer_stride,
        target.inner_stride,
        nontemporal,
        torch.get_num_threads(),
    )


def forward_and_backward_into(
    out: Tensor,
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Tensor,
    vocab_size: int,
    ignore_index: int,
    moments: bool,
    backend: str = "cpp",
) -> tuple[Tensor, ...]:
    """The statistics (packed as by the registered operation) and, row by row while it is in the cache, the gradient.

    For upstream gradients that are known before the statistics are: those of a loss that is linear in them. One
    selected token a row. ``out`` may be the logits themselves. C++, or Triton where ``_gpu.in_one_launch`` says so:
    that one knows nothing of the moments but sum_logits, and leaves the others uninitialised.
    """
    layout, target = row_layout(logits), row_layout(out)
    if target.tensor is not out:
        raise ValueError(f"out must have adjacent columns and at most two strides over its rows, got {out.stride()}")
    temperature, index = temperature.contiguous(), index.contiguous()  # kernels take bare pointers
    made = _allocate(logits, temperature, index, False)
    if _gpu.serves(logits, backend):
        _gpu.statistics_with_gradient(
            out, made, grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, vocab_size, ignore_index,
            moments,
        )  # fmt: skip
        return made
    rows, scalars, log_prob, argmax, _, _, _, saved = made
    bad = extension().statistics_with_gradient(
        *layout.args(),
        vocab_size,
        logits.shape[-1],
        temperature.data_ptr(),
        temperature.shape[0],
        temperature.shape[1],
        index.data_ptr(),
        1,
        0,
        ignore_index,
        moments,
        *(t.data_ptr() for t in (rows, scalars, log_prob, argmax, saved, grad_rows, grad_scalars, grad_log_prob, out)),
        target.inner,
        target.outer_stride,
        target.inner_stride,
        torch.get_num_threads(),
    )
    if bad >= 0:
        raise_bad_id(flat_index(index, 1, None, logits), bad, vocab_size, ignore_index)
    return made


def _backward(
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    rows: Tensor,
    scalars: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
    argmax: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    out = empty_like_logits(logits)
    backward_into(
        out, grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, per_row, offsets, rows, scalars, saved,
        vocab_size, ignore_index, argmax, backend,
    )  # fmt: skip
    return out


def _backward_fake(
    grad_rows: Tensor, grad_scalars: Tensor, grad_log_prob: Tensor, logits: Tensor, *_: object
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: object, inputs: tuple, output: tuple) -> None:
    logits, temperature, index, per_row, offsets, vocab_size, ignore_index, _, backend, _ = inputs
    rows, scalars, log_prob, argmax, _, _, _mass_greater, saved = output
    ctx.mark_non_differentiable(*output[3:])  # type: ignore[attr-defined]
    ctx.save_for_backward(logits, temperature, index, offsets, rows, scalars, log_prob, argmax, saved)  # type: ignore[attr-defined]
    ctx.constants = (per_row, vocab_size, ignore_index, backend)  # type: ignore[attr-defined]


def _autograd(ctx: object, grad_rows: Tensor, grad_scalars: Tensor, grad_log_prob: Tensor, *_: object) -> tuple:
    logits, temperature, index, offsets, rows, scalars, log_prob, argmax, saved = ctx.saved_tensors  # type: ignore[attr-defined]
    per_row, vocab_size, ignore_index, backend = ctx.constants  # type: ignore[attr-defined]
    needs_logits, needs_temperature = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    grad_logits = grad_temperature = None
    if needs_logits:
        grad_logits = torch.ops.fastcalib.statistics_backward(
            grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, per_row, offsets, rows, scalars, saved,
            vocab_size, ignore_index, argmax, backend,
        )  # fmt: skip
    if needs_temperature:
        ids = None if index is None else Index(index, per_row, offsets, ())
        grad_temperature = _temperature_gradient(
            grad_rows, grad_log_prob, logits, temperature, ids, rows, log_prob, saved, vocab_size, ignore_index,
            backend,
        )  # fmt: skip
    return grad_logits, grad_temperature, None, None, None, None, None, None, None, None


def _temperature_gradient(
    grad_rows: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Index | None,
    rows: Tensor,
    log_prob: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """Gradient to T. With b = 1/T and y = z - max z, E and Var over p:

    dL/db = E[z], dH/db = -b Var, dE/db = Var, d max_prob/db = -max_prob E[y], d log p_i/db = z_i - E[z],
    dC/db = 2 C (E' - E) with E' the mean logit at T/2 (p^2 renormalised is the softmax there), dVar/db = third
    central moment.
    """
    g_logsumexp, g_entropy, g_max_prob, g_collision, g_mean, g_var = grad_rows.unbind(0)
    _, _, max_prob, collision, mean_logit, var_logit = rows.unbind(0)
    k = temperature.shape[1]
    log_s0, y1 = saved[:, 3 : 3 + k], saved[:, 3 + k :]
    b = (1.0 / temperature).to(rows.dtype)
    half = torch.ops.fastcalib.statistics(
        logits, temperature / 2, None, 0, None, vocab_size, ignore_index, False, backend
    )  # fmt: skip
    third = _third_central_moment(logits, temperature, vocab_size)
    skipped = (log_s0 == 0) & (rows[0] == 0) & (max_prob == 0)  # every statistic of a skipped row is 0
    grad = (
        g_logsumexp * mean_logit
        - g_entropy * b * var_logit
        - g_max_prob * max_prob * y1
        + g_collision * 2 * collision * (half[7][:, 3 + k :] - y1)
        + g_mean * var_logit
        + g_var * third
    )
    grad = torch.where(skipped | grad.isnan(), torch.zeros_like(grad), grad)
    if index is not None:
        row_of = index.rows(saved.shape[0])
        b_of = b.expand(saved.shape[0], k)[row_of]
        per_token = (log_prob + log_s0[row_of]) / b_of - y1[row_of]
        none = (index.ids == ignore_index)[:, None] | ~per_token.isfinite()
        per_token = torch.where(none, torch.zeros_like(per_token), per_token * grad_log_prob)
        grad = grad.index_add(0, row_of, per_token)
    grad = grad.to(torch.float64) * -((1.0 / temperature) ** 2)
    return grad if temperature.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)


def _third_central_moment(logits: Tensor, temperature: Tensor, vocab_size: int) -> Tensor:
    """E[(z - E[z])^3], (N, K): only the gradient of var_logit to T needs it, so no kernel keeps it."""
    z = logits[..., :vocab_size].reshape(-1, vocab_size)
    columns = []
    for k in range(temperature.shape[1]):
        p = eager.softmax(z.to(statistics_dtype(z.dtype)), temperature[:, k : k + 1])
        y = torch.where(p > 0, z.to(p.dtype), torch.zeros_like(p))
        y = y - (p * y).sum(-1, keepdim=True)
        columns.append(torch.where(p > 0, p * y**3, torch.zeros_like(p)).sum(-1))
    return torch.stack(columns, -1)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("statistics", _forward, _device)
    LIBRARY.impl("statistics_backward", _backward, _device)
torch.library.register_fake("fastcalib::statistics", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastcalib::statistics_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("fastcalib::statistics", _autograd, setup_context=_setup_context, lib=LIBRARY)


def statistics(
    logits: Tensor,
    index: Tensor | ValidSets | None = None,
    temperature: Temperature = 1.0,
    *,
    ranks: bool = False,
    moments: bool = True,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    validate: bool = False,
) -> TokenStatistics:
    """Statistics of softmax(logits / temperature) for each row, from one read of the logits; differentiable.

    Whatever is computed from the result, the gradient to the logits costs one more read and one write.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64. Any strides; rows are not copied as long as the columns
            are adjacent and two strides describe the leading dimensions.
        index: token ids whose log-probability is wanted: integers (*) or (*, M), or a :class:`ValidSets` of N = prod(*)
            sets. Entries equal to ``ignore_index`` give 0 everywhere. A row all of whose entries are ignored is
            skipped: every statistic 0, argmax -1, gradient exactly 0.
        temperature: a number; a sequence of K numbers, which adds a trailing axis of K to what depends on it; or a
            tensor that broadcasts to the leading dimensions, one temperature a row. Tensors are differentiable.
        ranks: also count ``n_greater``, ``n_equal`` and ``mass_greater`` of the selected tokens, up to 16 a row, in the
            same read. Larger sets go through :func:`fastcalib.ranks`.
        moments: False leaves out (None) entropy, collision, mean_logit, var_logit, sum_logits and std_logits: half the
            arithmetic, for losses that see only log-probabilities.
        vocab_size: columns from here on are padding and take no part in anything; their gradient is 0.
        ignore_index: an id that stands for "no token".
        backend: "auto", "eager", "cpp", "triton" or "cuda".
        validate: on an accelerator, look whether every id is in the vocabulary, which waits for the device. Without it
            a bad id there has log_prob NaN and counts of -1, and takes no part in the gradient; on a CPU it is always
            an error.

    Returns:
        :class:`TokenStatistics`, in float32 (float64 for float64 logits), natural logarithms.

    Raises:
        TypeError: logits or index of a dtype that makes no sense, a DTensor.
        ValueError: shapes that do not fit, an id outside [0, vocab_size), a temperature that is not positive and
                finite.

    Sources: spec section 1 (derived); temperature scaling after Guo et al. 2017 (arXiv 1706.04599).

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]], requires_grad=True)
        >>> s = fastcalib.statistics(logits, torch.tensor([2]), temperature=[0.5, 1.0])
        >>> s.entropy.exp()
        tensor([[4., 4.]], grad_fn=<ExpBackward0>)
        >>> s.log_prob.sum().backward(); logits.grad
        tensor([[-0.7500, -0.7500,  2.2500, -0.7500]])
    """
    width = check_logits(logits, vocab_size)
    check_ignore_index(ignore_index)
    ids = None if index is None else normalise_index(index, logits)
    temperatures, has_axis = normalise_temperature(temperature, logits)
    if ranks:
        _check_ranked(ids)
    if validate and ids is not None:
        _gpu.validate_ids(ids, width, ignore_index)
    leading = tuple(logits.shape[:-1])
    axis = (temperatures.shape[1],) if has_axis else ()
    selected = () if ids is None else ids.shape
    backend = resolve(backend, logits.device, logits.dtype)
    if backend == "eager":
        every = _shape_eager(_eager(logits, temperatures, ids, width, ignore_index, ranks), leading, selected, axis)
        return every if moments else _without_moments(every)
    packed = torch.ops.fastcalib.statistics(
        logits, temperatures, None if ids is None else ids.ids, 0 if ids is None else ids.per_row,
        None if ids is None else ids.offsets, width, ignore_index, ranks, backend,
        moments or temperatures.requires_grad,
    )  # fmt: skip
    return unpack(packed, leading, selected if ids is not None else None, axis, ranks, moments)


def unpack(
    packed: Sequence[Tensor],
    leading: tuple[int, ...],
    selected: tuple[int, ...] | None,
    axis: tuple[int, ...],
    ranks: bool,
    moments: bool,
) -> TokenStatistics:
    """The operation's packed results in the shapes of the caller. ``selected``: that of the index, None without one."""
    rows, scalars, log_prob, argmax, n_greater, n_equal, mass, saved = packed
    # One view of the packed result, then one unbind: views cost more than the kernel where rows are short.
    every = TokenStatistics._make(
        (
            *rows.reshape(len(ROW_FIELDS), *leading, *axis).unbind(0),
            argmax.reshape(leading),
            *scalars.reshape(2, *leading).unbind(0),
            saved[:, 0].reshape(leading),
            None if selected is None else log_prob.reshape((*selected, *axis)),
            n_greater.reshape(selected) if ranks and selected is not None else None,
            n_equal.reshape(selected) if ranks and selected is not None else None,
            mass.reshape((*selected, *axis)) if ranks and selected is not None else None,
        )
    )
    return every if moments else _without_moments(every)


def _without_moments(stats: TokenStatistics) -> TokenStatistics:
    return TokenStatistics(**{**stats._asdict(), **dict.fromkeys(MOMENTS)})


def _check_ranked(ids: Index | None) -> None:
    if ids is None:
        raise ValueError("ranks=True needs an index: the tokens whose rank is wanted")
    if ids.offsets is None:
        most = ids.per_row
    elif torch.compiler.is_compiling() or ids.ids.is_cuda:
        return  # to look would be a synchronisation; the kernels for accelerators take any number
    else:
        most = int(ids.offsets.diff().max()) if ids.offsets.numel() > 1 else 0
    if most > MAX_RANKED:
        raise ValueError(
            f"statistics(ranks=True) counts up to {MAX_RANKED} selected tokens a row, got {most}; "
            "use fastcalib.ranks for larger sets"
        )


def _eager(
    logits: Tensor, temperature: Tensor, ids: Index | None, width: int, ignore_index: int, ranks: bool
) -> TokenStatistics:
    flat = logits[..., :width].reshape(-1, width)
    if ids is None:
        return eager.statistics(flat, temperature)
    check_ids_eager(ids, width, ignore_index)
    row_of = ids.rows(flat.shape[0])
    ignored = ids.ids == ignore_index
    total = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    dropped = total.index_add(0, row_of, ignored.to(torch.int64))
    total = total.index_add(0, row_of, torch.ones_like(row_of))
    return eager.statistics(
        flat,
        temperature,
        ids.ids,
        row_of,
        ranks=ranks,
        ignore_index=ignore_index,
        skipped=(total > 0) & (dropped == total),
    )


def _shape_eager(
    result: TokenStatistics, leading: tuple[int, ...], selected: tuple[int, ...], axis: tuple[int, ...]
) -> TokenStatistics:
    """The reference's (N, K), (nnz, K), (N,) and (nnz,) in the shapes of the caller."""
    shapes = dict.fromkeys(ROW_FIELDS, (*leading, *axis))
    shapes |= dict.fromkeys(("log_prob", "mass_greater"), (*selected, *axis))
    shapes |= dict.fromkeys(("n_greater", "n_equal"), selected)
    fields = result._asdict().items()
    return TokenStatistics._make(None if t is None else t.reshape(shapes.get(f, leading)) for f, t in fields)
