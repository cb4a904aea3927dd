"""Tensors to calls of the CUDA C++ kernels in ``fastcalib._C`` (csrc/cuda/). Not yet run on a GPU.

The functions fill results that the caller made. They enqueue kernels on the current stream and never wait for the
device: a bad token id therefore raises nothing, but gives NaN in ``log_prob`` and ``mass_greater`` and -1 in counts.
Scratch memory comes from torch's allocator, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..backends import cuda_extension
from ._arguments import row_layout

# What is asked for the kernels; the emulator's tests put a module of their own here.
_module: Callable[[], ModuleType] = cuda_extension


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)


def _launch(name: str, *arguments: Tensor | int | None) -> None:
    """Ask how much scratch memory a call needs, get it, and call on the current stream. The logits come first."""
    logits = arguments[0]
    assert isinstance(logits, Tensor)
    device = logits.device
    numbers = [a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
    function = getattr(_module(), name)
    index = device.index or 0
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    scratch = _scratch(function(*numbers, 0, index, stream), device)
    function(*numbers, scratch.data_ptr(), index, stream)


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
) -> None:
    """The packed results of ``fastcalib::statistics``."""
    layout = row_layout(logits)
    if layout.n_rows == 0:
        return
    _launch(
        "cuda_statistics_forward", layout.tensor, *layout.args()[1:], vocab_size, temperature, *temperature.shape,
        index, 0 if index is None else index.shape[0], per_row, offsets, ignore_index, ranks, *out,
    )  # fmt: skip


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
    argmax: Tensor,
    saved: Tensor,
    vocab_size: int,
    ignore_index: int,
) -> None:
    """The gradient with respect to the logits. Warps read across their borders, so where ``out`` is the logits
    themselves it goes through memory of its own."""
    layout, target = row_layout(logits), row_layout(out)
    if layout.n_rows == 0:
        return
    in_place = out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    if in_place:
        target = row_layout(torch.empty(out.shape, dtype=out.dtype, device=out.device))
    keep = [t.contiguous() for t in (rows, scalars, argmax, saved, grad_rows, grad_scalars, grad_log_prob)]
    _launch(
        "cuda_statistics_backward", layout.tensor, *layout.args()[1:], vocab_size, logits.shape[-1], temperature,
        *temperature.shape, index, per_row, offsets, ignore_index, *keep, target.tensor, target.inner,
        target.outer_stride, target.inner_stride,
    )  # fmt: skip
    if in_place:
        out.copy_(target.tensor)


def fused_serves(logits: Tensor) -> bool:
    """Whether ``fused`` is the better way: a row for each multiprocessor."""
    return logits.shape[:-1].numel() >= _module().cuda_multiprocessors(logits.device.index or 0)


def fused(
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
) -> None:
    """``statistics_forward`` and ``statistics_backward`` in one launch, with the same bits; one token a row. ``out``
    may be the logits."""
    layout, target = row_layout(logits), row_layout(out)
    if layout.n_rows == 0:
        return
    rows, scalars, log_prob, argmax, _, _, _, saved = made
    keep = [t.contiguous() for t in (grad_rows, grad_scalars, grad_log_prob)]
    _launch(
        "cuda_fused", layout.tensor, *layout.args()[1:], vocab_size, logits.shape[-1], temperature, *temperature.shape,
        index, ignore_index, rows, scalars, log_prob, argmax, saved, *keep, target.tensor, target.inner,
        target.outer_stride, target.inner_stride,
    )  # fmt: skip


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
) -> None:
    """The results of ``fastcalib::ranks``: n_greater, n_equal, mass_greater."""
    layout = row_layout(logits)
    count = out[0].shape[0]
    if layout.n_rows == 0 or count == 0:
        return
    _launch(
        "cuda_ranks", layout.tensor, *layout.args()[1:], vocab_size, index, thresholds, count, per_row, offsets,
        ignore_index, temperature, *((0, 0) if temperature is None else temperature.shape), *out,
    )  # fmt: skip


def softmax_forward(
    out: Tensor, logsumexp: Tensor, logits: Tensor, temperature: Tensor, vocab_size: int, log: bool
) -> None:
    """The results of ``fastcalib::softmax``; ``out`` is contiguous."""
    layout = row_layout(logits)
    if layout.n_rows == 0:
        return
    _launch(
        "cuda_softmax_forward", layout.tensor, *layout.args()[1:], vocab_size, logits.shape[-1], temperature,
        temperature.shape[0], out, logsumexp, log,
    )  # fmt: skip


def softmax_backward(
    out: Tensor,
    grad_temperature: Tensor | None,
    grad: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    temperature: Tensor,
    vocab_size: int,
    log: bool,
) -> None:
    """The gradients to the logits, into the contiguous ``out``, and to the temperature of each row unless that is
    None; ``output`` is the contiguous result of forward."""
    layout = row_layout(grad)
    if layout.n_rows == 0:
        return
    _launch(
        "cuda_softmax_backward", layout.tensor, *layout.args()[1:], vocab_size, grad.shape[-1], output, logsumexp,
        temperature, temperature.shape[0], out, grad_temperature, log,
    )  # fmt: skip
