"""Where the operations leave for an accelerator: Triton kernels, or the CUDA C++ ones of the extension.

The one place that knows both. Everything here allocates on the device of the logits, launches on the current stream of
that device, and never waits for it. Neither has been run on a GPU yet.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import _cuda
from ._arguments import Index, RowLayout, outside, raise_bad_id, row_layout

Layout = tuple[int, int, int, int]
# From so many thresholds a row the automatic choice ranks with the extension's CUDA kernel where it is compiled in: of
# 256 likely tokens it takes 10 instructions a logit and memory is the limit (an H100 leaves 17), Triton's 36; of 16,
# Triton's takes 18 (emulator, sm_90, bfloat16).
CUDA_RANKS_FROM = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(name: str) -> ModuleType:
    """A module of fastcalib.triton_kernels; Triton is imported here at the earliest."""
    return import_module(f"fastcalib.triton_kernels.{name}")


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the device that holds the tensor, whichever one is current."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def rows_of(layout: RowLayout) -> Layout:
    """The layout as Triton kernels take it, without the tensor."""
    return layout.n_rows, layout.inner, layout.outer_stride, layout.inner_stride


def check_dtype(logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"kernels for accelerators take float32, bfloat16 and float16 logits, got {logits.dtype}; "
            'use backend="eager" for it'
        )


def validate_ids(index: Index, vocab_size: int, ignore_index: int) -> None:
    """The error that a CPU kernel raises for a bad token id. Looks at the ids, so it waits for their device."""
    bad = outside(index.ids, vocab_size, ignore_index)
    if bad.any():
        raise_bad_id(index, int(bad.nonzero()[0]), vocab_size, ignore_index)


def serves(logits: Tensor, backend: str) -> bool:
    """Whether a call goes to an accelerator; on CPU tensors that is Triton's interpreter or an emulated device."""
    return logits.is_cuda or backend in ("triton", "cuda")


def statistics_forward(
    out: tuple[Tensor, ...],
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    ranks: bool,
    backend: str,
) -> None:
    """Fill the packed results of ``fastcalib::statistics``."""
    check_dtype(logits)
    layout, temperature = row_layout(logits), temperature.contiguous()
    with on_device(logits):
        if backend == "cuda":
            _cuda.statistics_forward(
                out, logits, temperature, index, per_row, offsets, vocab_size, ignore_index, ranks
            )  # fmt: skip
            return
        rows, saved, k = out[0], out[7], temperature.shape[1]
        statistics, counting = kernels("statistics"), kernels("ranks")
        arguments = (layout.tensor, rows_of(layout))
        choice = (index, per_row, offsets, vocab_size, ignore_index)
        bounds = along = None
        if ranks and out[4].shape[0] > 0:
            bounds = counting.gather(*arguments, *choice)
            along = bounds.view(-1, per_row) if statistics.count_along(per_row, offsets) else None
        statistics.forward(out, *arguments, temperature, *choice, along)
        if bounds is not None and along is None:
            # more tokens than pay in the same read; maxima and 1 / s0 (max_prob) of the rows are known by now
            counting.count(out[4:7], *arguments, bounds, *choice, temperature, saved[:, 0], rows[2].view(-1, k))


def statistics_backward(
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
    argmax: Tensor | None,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
    backend: str,
) -> None:
    """Write the gradient to the logits into ``out``, which may be the logits."""
    check_dtype(logits)
    if argmax is None:
        raise RuntimeError("fastcalib::statistics_backward needs the argmax of forward on an accelerator")
    layout, target, temperature = row_layout(logits), row_layout(out), temperature.contiguous()
    upstream = (grad_rows.contiguous(), grad_scalars.contiguous(), grad_log_prob.contiguous())
    with on_device(logits):
        if backend == "cuda":
            _cuda.statistics_backward(
                out, *upstream, logits, temperature, index, per_row, offsets, rows, scalars, argmax, saved,
                vocab_size, ignore_index,
            )  # fmt: skip
            return
        kernels("statistics_backward").backward(
            target.tensor, rows_of(target), *upstream, layout.tensor, rows_of(layout), temperature, index, per_row,
            offsets, rows, scalars, argmax, saved, vocab_size, ignore_index,
        )  # fmt: skip


def linear_fits(hidden: Tensor, weight: Tensor, temperature: Tensor, index: Tensor | None, backend: str) -> bool:
    """Whether ``linear_statistics_forward`` serves a layer: Triton, and what its kernel is cut for."""
    if backend != "triton" or hidden.dtype not in DTYPES:
        return False
    tokens = 0 if index is None else index.shape[0]
    return bool(kernels("linear_statistics").serves(hidden, weight, temperature.shape[1], tokens))


def linear_statistics_forward(
    out: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: Tensor,
    index: Index | None,
    ignore_index: int,
    moments: bool,
) -> None:
    """Fill the packed results of ``fastcalib::statistics``, without ranks, from a layer whose logits are not stored."""
    ids, per_row, offsets = (None, 0, None) if index is None else (index.ids, index.per_row, index.offsets)
    with on_device(hidden):
        kernels("linear_statistics").forward(
            out, hidden, weight, None if bias is None else bias.contiguous(), scale, softcap, temperature.contiguous(),
            None if ids is None else ids.contiguous(), per_row, offsets, ignore_index, moments,
        )  # fmt: skip


def in_one_launch(logits: Tensor, temperature: Tensor, vocab_size: int, backend: str) -> bool:
    """Whether ``statistics_with_gradient`` serves a call: a row a multiprocessor; with Triton one temperature too."""
    if backend == "cuda":
        return _cuda.fused_serves(logits)
    return backend == "triton" and bool(
        kernels("fused").serves(logits, logits.shape[:-1].numel(), vocab_size, temperature.shape[1])
    )


def statistics_with_gradient(
    out: Tensor,
    made: tuple[Tensor, ...],
    grad_rows: Tensor,
    grad_scalars: Tensor,
    grad_log_prob: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Tensor,
    vocab_size: int,
    ignore_index: int,
    sum_logits: bool,
    backend: str,
) -> None:
    """Write the gradient into ``out``, which may be the logits, and fill the packed results. Triton knows only what a
    loss may read that is linear in log_prob, logsumexp, max_prob and, if asked for, sum_logits: those, argmax and the
    maximum."""
    check_dtype(logits)
    layout, target, temperature = row_layout(logits), row_layout(out), temperature.contiguous()
    upstream = (grad_rows.contiguous(), grad_scalars.contiguous(), grad_log_prob.contiguous())
    with on_device(logits):
        if backend == "cuda":
            _cuda.fused(
                out, made, *upstream, logits, temperature, index.contiguous(), vocab_size, ignore_index
            )  # fmt: skip
            return
        kernels("fused").forward_and_backward(
            target.tensor, rows_of(target), made, *upstream, layout.tensor, rows_of(layout), temperature,
            index.contiguous(), vocab_size, ignore_index, sum_logits,
        )  # fmt: skip


def backend_for_ranks(asked: str, chosen: str, per_row: int) -> str:
    """The backend of ``ranks`` for about so many thresholds a row: what was chosen, unless nobody asked for it by name
    and it is Triton where the extension's kernel does better (CUDA_RANKS_FROM)."""
    automatic = asked == "auto" and backends._forced == "auto"
    if automatic and chosen == "triton" and per_row >= CUDA_RANKS_FROM and hasattr(backends._C, "cuda_ranks"):
        return "cuda"
    return chosen


def ranks(
    out: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    index: Tensor | None,
    thresholds: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    temperature: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    backend: str,
) -> None:
    """Fill n_greater, n_equal and mass_greater."""
    check_dtype(logits)
    layout = row_layout(logits)
    thresholds = None if thresholds is None else thresholds.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    with on_device(logits):
        if backend == "cuda":
            _cuda.ranks(
                out, logits, index, thresholds, per_row, offsets, temperature, vocab_size, ignore_index
            )  # fmt: skip
            return
        kernels("ranks").forward(
            out, layout.tensor, rows_of(layout), index, thresholds, per_row, offsets, temperature, vocab_size,
            ignore_index,
        )  # fmt: skip


def softmax_forward(
    out: Tensor, logsumexp: Tensor, logits: Tensor, temperature: Tensor, vocab_size: int, log: bool, backend: str
) -> None:
    """Fill the probabilities (or their logarithms) and the logsumexp of each row; ``out`` is contiguous."""
    check_dtype(logits)
    layout, temperature = row_layout(logits), temperature.contiguous()
    with on_device(logits):
        if backend == "cuda":
            _cuda.softmax_forward(out, logsumexp, logits, temperature, vocab_size, log)
            return
        kernels("softmax").forward(out, logsumexp, layout.tensor, rows_of(layout), temperature, vocab_size, log)


def softmax_backward(
    out: Tensor,
    grad_temperature: Tensor | None,
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    temperature: Tensor,
    vocab_size: int,
    log: bool,
    backend: str,
) -> None:
    """Fill the gradient to the logits and, unless it is None, that to the temperature of each row."""
    check_dtype(grad)
    layout, output, temperature = row_layout(grad), output.contiguous(), temperature.contiguous()
    with on_device(grad):
        if backend == "cuda":
            _cuda.softmax_backward(out, grad_temperature, grad, output, logsumexp, temperature, vocab_size, log)
            return
        kernels("softmax_backward").backward(
            out, grad_temperature, layout.tensor, rows_of(layout), output, logsumexp, temperature, vocab_size, log
        )


def pr_divergence_forward(
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    backend: str,
) -> None:
    """Fill alpha, beta, and what backward needs: mass and norms."""
    check_dtype(logits)
    backends.check_has(backend, "pr_divergence")
    student, other = row_layout(logits), row_layout(teacher)
    with on_device(logits):
        kernels("pr_divergence").forward(
            out, student.tensor, rows_of(student), other.tensor, rows_of(other), lam, temperature.contiguous(),
            teacher_temperature.contiguous(), ignored, vocab_size,
        )  # fmt: skip


def pr_divergence_backward(
    grad_logits: Tensor | None,
    grad_teacher: Tensor | None,
    grad_temperature: Tensor | None,
    grad_alpha: Tensor,
    grad_beta: Tensor,
    logits: Tensor,
    teacher: Tensor,
    lam: Tensor,
    temperature: Tensor,
    teacher_temperature: Tensor,
    ignored: Tensor | None,
    vocab_size: int,
    mass: Tensor,
    norms: Tensor,
    backend: str,
) -> None:
    """Fill the gradients that are not None: contiguous ones to both logits, float64 (N, 2) to the temperatures."""
    check_dtype(logits)
    backends.check_has(backend, "pr_divergence")
    student, other = row_layout(logits), row_layout(teacher)
    with on_device(logits):
        kernels("pr_divergence_backward").backward(
            grad_logits, grad_teacher, grad_temperature, grad_alpha, grad_beta, student.tensor, rows_of(student),
            other.tensor, rows_of(other), lam, temperature.contiguous(), teacher_temperature.contiguous(), ignored,
            vocab_size, mass, norms,
        )  # fmt: skip
