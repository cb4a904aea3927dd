"""Dense and set-valued precision-recall losses: a whole distribution as the target, at chosen points of the curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import pr_divergence
from ..ops._arguments import check_logits
from ..ops.pr_divergence import normalise_lam
from ..valid_sets import ValidSets
from ._base import broadcast, reduce_loss
from ._options import check_reduction

FORMS = ("divergence", "complement", "relative")
EMPHASES = ("precision", "recall")


def pr(
    logits: Tensor,
    teacher: Tensor | ValidSets,
    *,
    lam: float | Sequence[float] | Tensor = 1.0,
    form: str = "divergence",
    lam_weights: str | Sequence[float] | Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor = 1.0,
    ignored: Tensor | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Precision-recall divergence from a teacher's distribution, or from one on a valid set.

    Per row ``sum_l w_l d(lam_l)`` with alpha, beta of :func:`fastcalib.pr_divergence` and d, by ``form``:

    - "divergence": ``min(1, lam) - alpha``, the PR-divergence; at lam = 1 the total variation.
    - "complement": ``1 - alpha``, the same up to a constant.
    - "relative": ``1 - alpha / min(1, lam)``, that is 1 - precision for lam >= 1 and 1 - recall below: from 0 to 1 at
      every lam, where the divergence fades with lam.

    Its gradient presses down the tokens with Q_v >= lam P_v and lifts the others; it is bounded, unlike that of a
    cross-entropy. lam > 1 asks for precision, lam < 1 for recall; lam = 0 and inf are limits without much gradient.

    Args:
        logits: (*, V), float32, bfloat16, float16 or float64: the student's. Never written to.
        teacher: logits (*, V), or a :class:`fastcalib.ValidSets` of N = prod(*) sets; detach it if it is not to learn.
        lam: >= 0, one number or L of them.
        form: "divergence", "complement" or "relative".
        lam_weights: w, (L,); None is 1 / L each. "precision" is proportional to lam^2 / (1 + lam^2), "recall" to
            1 / (1 + lam^2), the squared sine and cosine of the angle, both with sum 1.
        weights: (nnz,), of the tokens of a ValidSets, as in :func:`fastcalib.pr_divergence`.
        temperature, teacher_temperature: numbers, or tensors that broadcast to (*).
        ignored: bool, broadcasts to (*): rows with loss 0 and gradient exactly 0 that do not count in a mean
            (``target == -100``, say).
        reduction: "mean" (over the rows kept; NaN when there are none), "sum" or "none".
        weight: broadcasts to (*); multiplies each row's loss. A mean still divides by the number of rows kept.
        num_items_in_batch: number or tensor of one element; the result is then sum / num_items_in_batch.
        vocab_size: columns from here on are padding and take no part.
        backend: "auto", "eager", "cpp" or "triton".

    Label smoothing, z-loss and entropy bonus are no part of it: add them from :func:`fastcalib.statistics`. It has no
    :func:`fastcalib.fused_loss`, which computes losses from the statistics of one row of logits; forward and backward
    here cost two reads of both rows and one write.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (*) for reduction="none".

    Raises:
        TypeError, ValueError: as :func:`fastcalib.pr_divergence`; a form, reduction or lam_weights that does not exist
            or does not fit.

    Source: Verine et al., NeurIPS 2023 and ICML 2025 (arXiv 2508.09654); status: code (authors) for the divergence, the
    relative form and the two emphases are derived.

    Example:
        >>> import torch, fastcalib
        >>> student = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
        >>> fastcalib.losses.pr(student, torch.zeros(1, 4))
        tensor(0.5000)
        >>> fastcalib.losses.pr(student, torch.zeros(1, 4), lam=[0.5, 2.0], form="relative", reduction="none")
        tensor([0.2500])
    """
    check_reduction(reduction)
    check_form(form)
    check_logits(logits, vocab_size)
    lams, _ = normalise_lam(lam, logits.device)
    over = spread(lam_weights, lams)
    alpha, beta = pr_divergence(
        logits, teacher, lams, weights=weights, temperature=temperature, teacher_temperature=teacher_temperature,
        vocab_size=vocab_size, ignored=ignored, backend=backend,
    )  # fmt: skip
    per_row = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    kept = per_row if ignored is None else ~ignored.expand(per_row.shape)
    if form == "divergence":
        terms = lams.clamp(max=1.0).to(alpha.dtype) - alpha
    else:
        terms = 1.0 - (alpha if form == "complement" else torch.where(lams < 1, beta, alpha))
    loss = (terms * over.to(alpha.dtype)).sum(-1)
    if weight is not None:
        loss = loss * broadcast("pr", "weight", weight, per_row)
    return reduce_loss(torch.where(kept, loss, 0.0), kept, reduction, num_items_in_batch)


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"pr: form must be one of {FORMS}, got {form!r}")


def spread(lam_weights: str | Sequence[float] | Tensor | None, lam: Tensor) -> Tensor:
    """w of each lam, float64 (L,)."""
    if lam_weights is None:
        return torch.full_like(lam, 1.0 / lam.shape[0])
    if isinstance(lam_weights, str):
        if lam_weights not in EMPHASES:
            raise ValueError(f"pr: lam_weights must be numbers (L,), None or one of {EMPHASES}, got {lam_weights!r}")
        square = lam.square()
        share = 1 / (1 + square)
        if lam_weights == "precision":
            share = 1 - share
        return share / share.sum()
    value = torch.as_tensor(lam_weights, dtype=torch.float64, device=lam.device)
    if value.shape != lam.shape:
        raise ValueError(
            f"pr: lam_weights must have shape {tuple(lam.shape)}, one for each lam, got {tuple(value.shape)}"
        )
    return value


class PRLoss(nn.Module):
    """Precision-recall divergence from a teacher's distribution, or from one on a valid set.

    The module of :func:`fastcalib.losses.pr`, which gives formula, arguments and source. lam, form, lam_weights,
    temperatures, reduction, vocab_size and backend go to the constructor; logits, teacher, weights, ignored, weight,
    num_items_in_batch and temperatures for this batch alone go to the call.

    Example:
        >>> import torch, fastcalib
        >>> loss = fastcalib.losses.PRLoss([0.5, 2.0], form="relative")
        >>> loss(torch.zeros(2, 4), fastcalib.ValidSets.from_lists([[0], [1, 2]]))
        tensor(0.4375)
        >>> loss
        PRLoss(form='relative', lam=[0.5, 2.0])
    """

    def __init__(
        self,
        lam: float | Sequence[float] | Tensor = 1.0,
        form: str = "divergence",
        lam_weights: str | Sequence[float] | Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        vocab_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_form(form)
        check_reduction(reduction)
        spread(lam_weights, normalise_lam(lam, torch.device("cpu"))[0].cpu())
        self.lam = lam
        self.form = form
        self.lam_weights = lam_weights
        self.options: dict[str, Any] = {
            "temperature": temperature, "teacher_temperature": teacher_temperature, "reduction": reduction,
            "vocab_size": vocab_size, "backend": backend,
        }  # fmt: skip

    def forward(
        self,
        logits: Tensor,
        teacher: Tensor | ValidSets,
        *,
        weights: Tensor | None = None,
        ignored: Tensor | None = None,
        weight: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
    ) -> Tensor:
        given = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        options = self.options | {k: v for k, v in given.items() if v is not None}
        return pr(
            logits, teacher, lam=self.lam, form=self.form, lam_weights=self.lam_weights, weights=weights,
            ignored=ignored, weight=weight, num_items_in_batch=num_items_in_batch, **options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        default = {"temperature": 1.0, "teacher_temperature": 1.0, "reduction": "mean", "vocab_size": None}
        default |= {"backend": "auto", "form": "divergence", "lam_weights": None}
        every = {"lam": self.lam, "form": self.form, "lam_weights": self.lam_weights} | self.options
        changed = {k: v for k, v in every.items() if isinstance(v, Tensor) or k not in default or v != default[k]}
        return ", ".join(f"{k}={v!r}" for k, v in sorted(changed.items()))
