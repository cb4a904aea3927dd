"""Drop-in replacements for functions people already call: same names, same arguments, one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from .losses._base import reduce_loss
from .losses._options import check_number, check_reduction
from .ops import statistics
from .ops._arguments import FLOATING, INTEGERS, BadTokenId, check_ignore_index, raise_bad_target

IGNORED = -100


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Drop-in for :func:`torch.nn.functional.cross_entropy`: one read of the logits, one more and one write backward.

    The fast path takes class indices with an input of shape (C,), (N, C), or (N, C, d1, ...) whose *class* dimension is
    the contiguous one, which is what ``logits.transpose(1, 2)`` of (N, S, V) logits gives; with ``weight`` or
    ``label_smoothing``, any ``ignore_index`` and any reduction.

    Handed to torch, and so no faster than there:
        - class probabilities as the target;
        - ``weight`` together with ``label_smoothing``;
        - (N, C, d1, ...) inputs whose class dimension is not contiguous (images): a transposing copy costs more than it
          saves;
        - tensor subclasses with their own rules (DTensor and the like), and dtypes other than float32, bfloat16,
          float16 and float64.

    One deliberate difference: the loss of bfloat16 and float16 logits is float32 (torch rounds it to the dtype of the
    input, three digits in bfloat16), on both paths; the gradient has the dtype of the input as ever. The fast path has
    no second derivative.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...).
        target: class indices (), (N,) or (N, d1, ...) in any integer dtype, or class probabilities shaped like input.
        weight: (C,), a factor for each class; a mean then divides by the sum of the factors of the targets.
        size_average, reduce: deprecated in torch, and understood as there.
        ignore_index: tokens with this target count in nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].

    Returns:
        The loss in nats, float32 (float64 for float64 logits): a scalar, or the target's shape with reduction="none".
        A mean over no tokens is NaN, as in torch.

    Raises:
        ValueError: shapes that do not fit, a target outside [0, C), an unknown reduction, smoothing outside [0, 1].

    Source: the documentation of torch.nn.CrossEntropyLoss.

    Example:
        >>> import torch
        >>> from fastcalib.functional import cross_entropy
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if not _has_fast_path(input, target, weight, label_smoothing):
        loss = F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
        return loss.float() if loss.dtype in (torch.bfloat16, torch.float16) else loss
    check_reduction(reduction)
    check_number("label_smoothing", label_smoothing, "[0, 1]")
    check_ignore_index(ignore_index)
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(logits.shape[:-1])} (class indices) or {tuple(input.shape)} (floating "
            f"point: class probabilities) for an input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    try:
        stats = statistics(logits, target, moments=bool(label_smoothing), ignore_index=ignore_index)
    except BadTokenId:
        raise_bad_target(target, logits.shape[-1], ignore_index)
    assert stats.log_prob is not None
    kept = target != ignore_index
    loss = torch.where(kept, -stats.log_prob, 0.0)
    if weight is not None:
        return _class_weighted(loss, kept, target, weight, logits.shape[-1], reduction)
    if label_smoothing:
        uniform = torch.where(kept, stats.logsumexp - stats.sum_logits / logits.shape[-1], 0.0)
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    return reduce_loss(loss, kept, reduction)


def _class_weighted(loss: Tensor, kept: Tensor, target: Tensor, weight: Tensor, classes: int, reduction: str) -> Tensor:
    if weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), one factor a class, got {tuple(weight.shape)}")
    factor = weight.detach().to(loss.dtype)[torch.where(kept, target, 0).long()]
    loss = loss * factor
    if reduction == "mean":
        return loss.sum() / torch.where(kept, factor, 0.0).sum()
    return reduce_loss(loss, kept, reduction)


def _has_fast_path(input: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float) -> bool:
    tensors = [t for t in (input, target, weight) if t is not None]
    return (
        all(isinstance(t, Tensor) for t in tensors)
        and not has_torch_function(tensors)
        and input.dtype in FLOATING
        and target.dtype in INTEGERS
        and input.dim() >= 1
        and not (weight is not None and label_smoothing)
        and (input.dim() < 3 or input.stride(1) == 1)
        and input.shape[0 if input.dim() == 1 else 1] > 0
    )


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What torch makes of its two deprecated arguments, either of which overrides ``reduction``."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Drop-in for TRL's function of this name: log-probabilities of chosen tokens, the others never stored.

    ``log_softmax(logits / temperature, -1).gather(-1, index)``. Differences: the result is float32 for bfloat16 and
    float16 logits (TRL's is float32 from its kernel and the dtype of the logits otherwise), an index of -100 gives 0
    instead of an error, and masked (-inf) logits give no NaN in the gradient.

    Args:
        logits: (*, V).
        index: token ids, (*) or (*, K).
        temperature: > 0.
        row_mask: shaped like the index; where it is 0 (False) the result is 0, without gradient.

    Returns:
        Natural log-probabilities, float32 (float64 for float64 logits), shaped like the index. Differentiable.

    Raises:
        ValueError: shapes that do not fit, an id outside [0, V), a temperature that is not positive.

    Source: trl.trainer.utils, version 1.16.

    Example:
        >>> import torch
        >>> from fastcalib.functional import selective_log_softmax
        >>> selective_log_softmax(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 3]])).exp()
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    if row_mask is not None:
        for name, given in (("index", index), ("row_mask", row_mask)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}; torch.as_tensor makes one")
        if row_mask.shape != index.shape:
            raise ValueError(f"row_mask must have the index's shape {tuple(index.shape)}, got {tuple(row_mask.shape)}")
        index = torch.where(row_mask == 0, IGNORED, index.long())
    log_prob = statistics(logits, index, temperature, moments=False, ignore_index=IGNORED).log_prob
    assert log_prob is not None
    return log_prob


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Drop-in for TRL's function of this name: the entropy of softmax(logits), in nats.

    Differences: the result is float32 for bfloat16 and float16 logits, and masked (-inf) logits count as probability 0
    where TRL's gives NaN.

    Args:
        logits: (*, V).
        chunk_size: accepted and not needed: there are no temporaries to limit.

    Returns:
        Entropy, (*), float32 (float64 for float64 logits). Differentiable.

    Raises:
        TypeError, ValueError: logits that are no (*, V) floating point tensor.

    Source: trl.trainer.utils, version 1.16.

    Example:
        >>> import torch
        >>> from fastcalib.functional import entropy_from_logits
        >>> entropy_from_logits(torch.zeros(2, 4)).exp()
        tensor([4., 4.])
    """
    return statistics(logits).entropy
