"""``fused_loss``: loss and gradient of any additive token loss in one go, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._fused_job import Job, check_ids_first, make_job
from .losses._base import TokenLoss
from .ops._arguments import BadTokenId, raise_bad_target, row_layout
from .ops._linear import check_chunk_size
from .ops._memory import empty_like_logits

# Bytes of logits per chunk. Measured at 256 x 128,256 float32 in place, 2 threads, 48 MB of last-level cache: 34 ms in
# chunks of 8 MB, 22 of 32, 20 of 64, 18 in one. The autograd of one chunk's small tensors (some 0.6 ms) costs more than
# the second read that a warm chunk saves, so chunks are few; a smaller chunk_size pays where memory is slow.
CHUNK_BYTES = 256 << 20


def fused_loss(
    logits: Tensor,
    target: Tensor,
    loss_fn: TokenLoss | Callable[..., Tensor],
    *,
    temperature: float | Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str | None = None,
    num_items_in_batch: int | Tensor | None = None,
    inplace_backward: bool = False,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    **token_args: Any,
) -> Tensor:
    """Loss over all tokens whose gradient is computed along with it, while each chunk of rows is still in cache.

    The same number and the same gradient as the loss module (or the callable) on :func:`fastcalib.statistics`, for
    every loss that is a sum over tokens. With ``inplace_backward=True`` the gradient needs no memory either. The
    gradient is stored in the dtype of the logits before the upstream gradient multiplies it: with float16 logits and a
    loss scaler use the loss itself. torch.compile breaks its graph here, as at any call that runs autograd inside.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64.
        target: integer token ids, (*).
        loss_fn: a module of :mod:`fastcalib.losses`, one of its functions or a partial of one (``losses.nll``,
            ``partial(losses.tailr, gamma=1e-3)``), or any callable
            ``loss_fn(stats: TokenStatistics, target, **token_args) -> loss``, all shaped (n,), that treats tokens one
            by one and is differentiable in the statistics. The values that it gives to ignored tokens do not matter. An
            attribute ``temperatures`` (K numbers) on a callable asks for statistics at these multiples of
            ``temperature``, with a trailing axis of K; an attribute ``moments = False`` says that it reads none of what
            :func:`fastcalib.statistics` leaves out then, ``linear = True`` that it is linear in the statistics, so that
            its gradient needs none of them: both are faster (the latter reads the logits once instead of twice).
        temperature, ignore_index, reduction, vocab_size, backend: None takes the module's setting, for another callable
            1.0, -100, "mean", None and "auto". As in :class:`fastcalib.losses.Options`; a callable may also have a
            sequence of K temperatures, which gives the trailing axis too.
        reduction: "mean" (over the tokens kept) or "sum".
        num_items_in_batch: the result is then sum / num_items_in_batch.
        inplace_backward: write the gradient over the logits, which then hold no logits any more: do not use them, nor
            any view of them, afterwards. Their version counter is bumped, so that autograd notices where it needs them.
        chunk_size: rows at a time; None chooses by bytes.
        **token_args: tensors that broadcast to the target are cut like it and handed to the loss (``weight``,
            ``position``, ...); anything else is handed over as it is.

    Returns:
        A scalar, float32 (float64 for float64 logits), in nats. It can go through ``backward`` once: the gradient is
        computed already and is handed out, not copied. Only the logits receive a gradient.

    Raises:
        ValueError: reduction="none"; shapes that do not fit; a temperature, token argument or parameter of the loss
            that requires a gradient (it would get none); for inplace_backward, logits that are a leaf or whose rows
            share memory.
        RuntimeError: a second backward through one result.

    Source: derived (spec section 1, gradient of any function of the row state).

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> target = torch.tensor([1, 3])
        >>> fastcalib.fused_loss(logits, target, fastcalib.losses.NLLLoss()).backward()
        >>> logits.grad
        tensor([[ 0.1250, -0.3750,  0.1250,  0.1250],
                [ 0.1250,  0.1250,  0.1250, -0.3750]])
        >>> def brier(stats, target):
        ...     return 1 - 2 * stats.log_prob.exp() + stats.collision
        >>> fastcalib.fused_loss(logits, target, brier)
        tensor(0.7500, grad_fn=<_FusedLossBackward>)
    """
    given = (temperature, ignore_index, reduction, vocab_size, backend)
    check_chunk_size("fused_loss", chunk_size, "rows")
    differentiate = logits.requires_grad and torch.is_grad_enabled()
    job = make_job(
        "fused_loss", logits, target, loss_fn, given, num_items_in_batch, token_args,
        "the logits" if differentiate else "",
        chunk_size or max(1, CHUNK_BYTES // (logits.shape[-1] * logits.element_size())),
    )  # fmt: skip
    if differentiate and inplace_backward:
        _check_inplace(logits)
        check_ids_first(target, job)
    try:
        return _FusedLoss.apply(logits, job, inplace_backward) if differentiate else job.run(logits, None)
    except BadTokenId:  # which counts within its chunk
        raise_bad_target(target.to(torch.int64), job.width, job.settings.ignore_index)


def _check_inplace(logits: Tensor) -> None:
    base = logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "fused_loss: inplace_backward=True would replace the values of a leaf tensor by its own gradient; give it "
            "the output of a computation (a model's logits), or leave inplace_backward=False"
        )
    layout = row_layout(logits)
    if layout.tensor is not logits:
        raise ValueError(
            "fused_loss: inplace_backward=True needs adjacent columns and at most two strides over the rows, got "
            f"strides {logits.stride()} for shape {tuple(logits.shape)}"
        )
    reach = logits.shape[-1]  # elements spanned so far; a larger step keeps rows apart
    steps = [(layout.inner, layout.inner_stride), (layout.n_rows // max(layout.inner, 1), layout.outer_stride)]
    for size, stride in sorted(steps, key=lambda step: step[1]):
        if size > 1 and stride < reach:
            raise ValueError(
                f"fused_loss: rows of the logits share memory (shape {tuple(logits.shape)}, strides "
                f"{logits.stride()}), so their gradients cannot be written in place; leave inplace_backward=False"
            )
        reach += (size - 1) * stride


class _FusedLoss(torch.autograd.Function):
    """The reduced loss, with its gradient in hand already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, job: Job, inplace: bool) -> Tensor:
        values = logits.detach()
        gradient = values if inplace else empty_like_logits(values)
        loss = job.run(values, gradient)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        # Not save_for_backward: the gradient must be let go when it is handed out, so that the logits' accumulator can
        # take the memory over instead of copying it.
        ctx.gradient, ctx.version = gradient, gradient._version
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "fused_loss: backward through this result a second time; its gradient was handed out the first time. "
                "Call fused_loss again, or use the loss without it where a graph is retained"
            )
        if gradient._version != ctx.version:
            raise RuntimeError(
                "fused_loss: with inplace_backward=True the logits hold the gradient, and they were modified in place "
                "before backward"
            )
        # On a CPU looking at the number is free; on an accelerator it would be a synchronisation.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradient.mul_(upstream)
        return gradient, None, None
