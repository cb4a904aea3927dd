"""Tensors to calls of the CUDA C++ kernels in ``fastcalib._C`` (csrc/cuda/). Not yet run on a GPU.

The functions take and return what their ``_forward_cpu`` and ``_backward_cpu`` siblings do. They enqueue kernels on the
current stream and never wait for the device: a bad token id therefore raises nothing, but gives NaN in ``log_prob`` and
``mass_greater`` and -1 in counts. Scratch memory comes from torch's allocator, so that a call can be captured in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..backends import extension
from ._arguments import row_layout
from .statistics import _allocate as _allocate_statistics
from .statistics import _pointer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is asked for the kernels; the emulator's tests put a module of their own here.
_module: Callable[[], ModuleType] = extension


def _check_dtype(logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(f'backend "cuda" takes float32, bfloat16 or float16 logits, got {logits.dtype}; use "eager"')


def _scratch(size: int, device: torch.device) -> Tensor:
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)


def _launch(name: str, *arguments: Tensor | int | None) -> None:
    """Ask how much scratch memory a call needs, get it, and call on the current stream. The logits come first."""
    logits = arguments[0]
    assert isinstance(logits, Tensor)
    device = logits.device
    numbers = [_pointer(a) if isinstance(a, Tensor) or a is None else a for a in arguments]
    function = getattr(_module(), name)
    index = device.index or 0
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    scratch = _scratch(function(*numbers, 0, index, stream), device)
    function(*numbers, scratch.data_ptr(), index, stream)


def statistics_forward(
    logits: Tensor,
    temperature: Tensor,
    index: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    ranks: bool,
) -> tuple[Tensor, ...]:
    """The packed results of ``fastcalib::statistics``."""
    _check_dtype(logits)
    layout = row_layout(logits)
    out = _allocate_statistics(logits, temperature, index, ranks)
    if layout.n_rows == 0:
        return out
    temperature = temperature.contiguous()
    _launch(
        "cuda_statistics_forward", layout.tensor, *layout.args()[1:], vocab_size,
        temperature, temperature.shape[0], temperature.shape[1],
        index, 0 if index is None else index.shape[0], per_row, offsets, ignore_index, ranks, *out,
    )  # fmt: skip
    return out


def statistics_backward(
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
) -> Tensor:
    """The gradient with respect to the logits, in fresh memory."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward_into(
        out, grad_rows, grad_scalars, grad_log_prob, logits, temperature, index, per_row, offsets, rows, scalars, saved,
        vocab_size, ignore_index,
    )  # fmt: skip
    return out


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
) -> None:
    """Write the gradient into ``out``, which must not overlap the logits: warps read across their borders."""
    _check_dtype(logits)
    layout, target = row_layout(logits), row_layout(out)
    if target.tensor is not out:
        raise ValueError(f"out must have adjacent columns and at most two strides over its rows, got {out.stride()}")
    if layout.n_rows == 0:
        return
    temperature = temperature.contiguous()
    keep = [t.contiguous() for t in (rows, scalars, saved, grad_rows, grad_scalars, grad_log_prob)]
    _launch(
        "cuda_statistics_backward", layout.tensor, *layout.args()[1:], vocab_size, logits.shape[-1],
        temperature, temperature.shape[0], temperature.shape[1], index, per_row, offsets, ignore_index, *keep,
        out, target.inner, target.outer_stride, target.inner_stride,
    )  # fmt: skip


def ranks(
    logits: Tensor,
    index: Tensor | None,
    thresholds: Tensor | None,
    per_row: int,
    offsets: Tensor | None,
    temperature: Tensor | None,
    vocab_size: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of ``fastcalib::ranks``: n_greater, n_equal, mass_greater."""
    _check_dtype(logits)
    given = index if index is not None else thresholds
    assert given is not None
    layout = row_layout(logits)
    count, k = given.shape[0], 0 if temperature is None else temperature.shape[1]
    n_greater = torch.empty(count, dtype=torch.int64, device=logits.device)
    out = (n_greater, torch.empty_like(n_greater), torch.empty(count, k, dtype=torch.float32, device=logits.device))
    if layout.n_rows == 0 or count == 0:
        return out
    thresholds = None if thresholds is None else thresholds.contiguous()
    temperature = None if temperature is None else temperature.contiguous()
    _launch(
        "cuda_ranks", layout.tensor, *layout.args()[1:], vocab_size, index, thresholds, count, per_row, offsets,
        ignore_index, temperature, 0 if temperature is None else temperature.shape[0], k, *out,
    )  # fmt: skip
    return out
