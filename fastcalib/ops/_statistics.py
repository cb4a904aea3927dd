"""The registered operation ``fastcalib::statistics`` and its gradient: packed tensors in and out, for all kernels.

:func:`fastcalib.statistics` is what people call; the fused losses and linear layers use what is here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import extension
from ..eager.softmax import statistics_dtype
from . import _gpu
from ._arguments import Index, flat_index, raise_bad_id, row_layout
from ._library import LIBRARY
from ._memory import empty_like_logits
from ._statistics_temperature import temperature_gradient

# Order of the first axis of the packed results, the same in csrc/cpu/statistics.h.
ROW_FIELDS = ("logsumexp", "entropy", "max_prob", "collision", "mean_logit", "var_logit")

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


def allocate(logits: Tensor, temperature: Tensor, index: Tensor | None, ranks: bool) -> tuple[Tensor, ...]:
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


def pointer(tensor: Tensor | None) -> int:
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
    out = allocate(logits, temperature, index, ranks)
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
        pointer(index),
        per_row,
        pointer(offsets),
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
    return allocate(logits, temperature, index, ranks)


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
        pointer(index),
        per_row,
        pointer(offsets),
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
    selected token a row. ``out`` may be the logits themselves. C++, or an accelerator where ``_gpu.in_one_launch``
    says so: Triton knows nothing of the moments but sum_logits, and leaves the others uninitialised.
    """
    layout, target = row_layout(logits), row_layout(out)
    if target.tensor is not out:
        raise ValueError(f"out must have adjacent columns and at most two strides over its rows, got {out.stride()}")
    temperature, index = temperature.contiguous(), index.contiguous()  # kernels take bare pointers
    made = allocate(logits, temperature, index, False)
    if _gpu.serves(logits, backend):
        _gpu.statistics_with_gradient(
            out, made, grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, vocab_size, ignore_index,
            moments, backend,
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
        grad_temperature = temperature_gradient(
            grad_rows, grad_log_prob, logits, temperature, ids, rows, log_prob, saved, vocab_size, ignore_index,
            backend,
        )  # fmt: skip
    return grad_logits, grad_temperature, None, None, None, None, None, None, None, None


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("statistics", _forward, _device)
    LIBRARY.impl("statistics_backward", _backward, _device)
torch.library.register_fake("fastcalib::statistics", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastcalib::statistics_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("fastcalib::statistics", _autograd, setup_context=_setup_context, lib=LIBRARY)
