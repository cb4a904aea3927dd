"""Losses that move a model along the precision-recall curve: trade quality of samples against their diversity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import TokenStatistics
from ..ops._arguments import is_fake
from ._base import Formula, TokenLoss, apply, broadcast
from ._modules import module_of
from ._options import check_number, documented
from .likelihood import log_p, p_fixed, weighted_nll

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import CallOptions, Options


def _mixture_weight(p: Tensor, gamma: float) -> Tensor:
    """p / (gamma + (1 - gamma) p): how much of the mixture of data and model at this token is the model's."""
    return p / (gamma + (1.0 - gamma) * p)


def _tailr(stats: TokenStatistics, target: Tensor, *, gamma: float, w_min: float) -> Tensor:
    return weighted_nll(_mixture_weight(p_fixed(stats), gamma).clamp(w_min, 1.0), log_p(stats))


def _lambda_pr(
    stats: TokenStatistics,
    target: Tensor,
    *,
    lam: float,
    gamma: float,
    position: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    p = p_fixed(stats)
    weight = _mixture_weight(p, gamma)
    if position is not None and length is not None:  # they are there unless lam = 1
        position, length = position.to(p.dtype), length.to(p.dtype)
        per_token = math.log(lam) / length  # log of lam^(1/L)
        # 1 - (1 - g) r = (1 - r) + g r, and 1 - r by expm1: g may be 1e-7 and r within 1e-4 of 1.
        numerator = gamma * per_token.exp()
        denominator = numerator - torch.expm1(per_token)
        cutoff = torch.where(denominator > 0, numerator / denominator, torch.inf)  # lam > 1 drops nothing
        decay = torch.exp(math.log(lam) * position / (length - 1.0).clamp(min=1.0))
        weight = torch.where(p <= cutoff, weight * decay, 0.0)
    return weighted_nll(weight, log_p(stats))


def _positions(
    target: Tensor, ignore_index: int, own: Mapping[str, Any], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """position and length of each token; by default those of a (batch, sequence) layout."""
    if own["lam"] == 1:
        return {k: v for k, v in given.items() if k not in ("position", "length")}
    if target.dim() < 2 and not ("position" in given and "length" in given):
        raise ValueError(
            f"lambda_pr: with lam={own['lam']} and a target of shape {tuple(target.shape)} pass position (of each "
            "token in its sequence, from 0) and length (of that sequence); only a target (batch, sequence) has them "
            "by itself"
        )
    if "position" not in given:
        steps = torch.arange(target.shape[-1], device=target.device)
        given["position"] = broadcast("lambda_pr", "position", steps, target)
    if "length" not in given:
        given["length"] = broadcast("lambda_pr", "length", target.shape[-1], target)
    _check_positions(given["position"], given["length"], target != ignore_index)
    return given


def _check_positions(position: Tensor, length: Tensor, kept: Tensor) -> None:
    """0 <= position < length of the kept tokens. On a CPU: on an accelerator to look would be a synchronisation."""
    if torch.compiler.is_compiling() or position.device.type != "cpu" or is_fake(position):
        return
    bad = kept & ~((position >= 0) & (position < length))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        where = list(at) if at else ""
        raise ValueError(
            f"lambda_pr: position{where} is {position[at].item()} in a sequence of length {length[at].item()}; "
            "positions count from 0, so they must lie in [0, length)"
        )


def _trunc(stats: TokenStatistics, target: Tensor, *, threshold: float | Tensor) -> Tensor:
    nll = -log_p(stats)
    return torch.where(nll.detach() < threshold, nll, 0.0)


def _trunc_r(stats: TokenStatistics, target: Tensor, *, threshold: float | Tensor) -> Tensor:
    nll = -log_p(stats)
    return torch.where(nll.detach() > threshold, nll, 0.0)


def _check_threshold(threshold: float | Tensor, loss: str) -> None:
    if not isinstance(threshold, Tensor):
        check_number("threshold", threshold, "[-inf, inf]", loss)


def _c_div(stats: TokenStatistics, target: Tensor, *, alpha: float, w_max: float) -> Tensor:
    nll = -log_p(stats)
    slope = alpha - 1.0

    def divergence(x: Tensor) -> Tensor:
        return x if slope == 0 else torch.expm1(slope * x) / (alpha * slope)

    if math.isinf(w_max):
        return divergence(nll)
    # c = exp(slope x) / alpha at x = -log p meets w_max at x = bend; the loss is the integral of min(c, w_max).
    bend = math.log(alpha * w_max)
    bend = max(0.0, bend / slope) if slope else (math.inf if bend >= 0 else 0.0)
    if math.isinf(bend):
        return divergence(nll)
    below, beyond = nll.clamp(max=bend), torch.relu(nll - bend)
    if slope >= 0:  # the coefficient grows with x: straight line beyond the bend
        return divergence(below) + w_max * beyond
    start = -math.expm1(slope * bend) / (alpha * slope)
    return w_max * below + divergence(bend + beyond) + start


TAILR = Formula("tailr", _tailr, {"gamma": "(0, 1]", "w_min": "[0, 1]"})
LAMBDA_PR = Formula(
    "lambda_pr",
    _lambda_pr,
    {"lam": "(0, inf)", "gamma": "(0, 1]"},
    prepare=_positions,
    token_arguments=("position", "length"),
)
TRUNC = Formula("trunc", _trunc)
TRUNC_R = Formula("trunc_r", _trunc_r)
C_DIV = Formula("c_div", _c_div, {"alpha": "(0, inf)", "w_max": "(0, inf]"})


@documented
def tailr(
    logits: Tensor, target: Tensor, *, gamma: float = 1e-5, w_min: float = 0.0, **options: Unpack[CallOptions]
) -> Tensor:
    """TaiLr: total-variation guided training; tokens the model finds nearly impossible count less.

    Per token ``-sg(w) log p`` with ``w = clamp(p / (gamma + (1 - gamma) p), w_min, 1)`` (sg: no gradient); c(p) = w.

    Args:
        gamma: in (0, 1]; towards 0 it is nll, at 1 the weight is p. Usual 1e-7 to 1.
        w_min: smallest weight, in [0, 1]. Usual 0 to 0.2.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Ji et al. 2023, arXiv 2302.13344; status: code (authors).

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.tailr(torch.zeros(1, 4), torch.tensor([1]), gamma=1.0)
        tensor(0.3466)
    """
    return apply(TAILR, {"gamma": gamma, "w_min": w_min}, logits, target, options)


@documented
def lambda_pr(
    logits: Tensor,
    target: Tensor,
    *,
    lam: float,
    gamma: float = 1e-5,
    position: Tensor | int | None = None,
    length: Tensor | int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """lambda-PR: TaiLr that drops the tokens already likely enough and lets its weight fall along the sequence.

    Per token ``-sg(w) log p`` with ``w = lam^(l / (L - 1)) 1[p <= delta] p / (gamma + (1 - gamma) p)`` and
    ``delta = gamma lam^(1/L) / (1 - (1 - gamma) lam^(1/L))``, l the position and L the length of the sequence (sg: no
    gradient); c(p) = w. lam = 1 is tailr with w_min = 0; smaller lam favours recall.

    Args:
        lam: > 0; where on the precision-recall curve. Usual 0.1 to 1.
        gamma: in (0, 1]. Usual 1e-7 to 1e-5.
        position: l from 0 to L - 1, broadcasts to the target; by default the place along the target's last dimension.
            Not needed for lam = 1. On a CPU a kept token with another one is an error.
        length: L, broadcasts to the target; by default the size of the target's last dimension, padding included.
            With a target of one dimension (packed sequences) give both.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Verine et al., ICML 2025, arXiv 2508.09654; status: code (a third party's that cites the paper).

    Example:
        >>> import torch, fastcalib
        >>> logits, target = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
        >>> fastcalib.losses.lambda_pr(logits, target, lam=0.5, gamma=0.5, reduction="none")
        tensor([[0.5545, 0.2773]])
    """
    own = {"lam": lam, "gamma": gamma}
    return apply(LAMBDA_PR, own, logits, target, options, position=position, length=length)


@documented
def trunc(logits: Tensor, target: Tensor, *, threshold: float | Tensor, **options: Unpack[CallOptions]) -> Tensor:
    """Loss truncation: tokens with a large loss are dropped, as likely noise; favours precision.

    Per token ``-log p`` where ``-log p < threshold``, else 0; c(p) = 1 or 0. A mean divides by all kept targets, the
    dropped ones included. :class:`TruncLoss` keeps the threshold, a running quantile, by itself.

    Args:
        threshold: in nats; a number or a tensor that broadcasts to the target.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Kang & Hashimoto 2020, arXiv 2004.14589; status: code (authors).

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> fastcalib.losses.trunc(logits, torch.tensor([0, 0]), threshold=5.0, reduction="none")
        tensor([0.6931, 0.0000])
    """
    _check_threshold(threshold, "trunc")
    return apply(TRUNC, {"threshold": threshold}, logits, target, options)


@documented
def trunc_r(logits: Tensor, target: Tensor, *, threshold: float | Tensor, **options: Unpack[CallOptions]) -> Tensor:
    """Mirror image of loss truncation: tokens with a *small* loss are dropped; favours recall. Reconstructed: the paper
    names it in a figure, as raising recall at fixed precision, and its formula was not available to us.

    Per token ``-log p`` where ``-log p > threshold``, else 0; c(p) = 1 or 0. A mean divides by all kept targets, the
    dropped ones included. :class:`TruncRLoss` keeps the threshold, a running quantile, by itself.

    Args:
        threshold: in nats; a number or a tensor that broadcasts to the target.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: named in Verine et al., ICML 2025, arXiv 2508.09654; status: reconstructed.

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> fastcalib.losses.trunc_r(logits, torch.tensor([0, 0]), threshold=5.0, reduction="none")
        tensor([0.0000, 9.0001])
    """
    _check_threshold(threshold, "trunc_r")
    return apply(TRUNC_R, {"threshold": threshold}, logits, target, options)


@documented
def c_div(
    logits: Tensor, target: Tensor, *, alpha: float, w_max: float = 10.0, **options: Unpack[CallOptions]
) -> Tensor:
    """Alpha-divergence to the one-hot target: alpha < 1 favours precision, 1 is nll, alpha > 1 favours recall.
    Reconstructed: the paper names it in a figure, as weighting the whole precision-recall curve, and its formula was
    not available to us; the clamp of the coefficient is ours in form and value.

    Per token ``(p^(1 - alpha) - 1) / (alpha (alpha - 1))``; c(p) = p^(1 - alpha) / alpha, clamped to at most w_max.
    Where the clamp acts, the loss is a straight line in -log p, so that value and gradient agree.

    Args:
        alpha: > 0.
        w_max: largest coefficient, > 0; ``float("inf")`` for no clamp.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: named in Verine et al., ICML 2025, arXiv 2508.09654; status: reconstructed.

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.c_div(torch.zeros(1, 4), torch.tensor([1]), alpha=2.0)
        tensor(1.5000)
    """
    return apply(C_DIV, {"alpha": alpha, "w_max": w_max}, logits, target, options)


@module_of(tailr)
class TailrLoss(TokenLoss):
    def __init__(self, gamma: float = 1e-5, w_min: float = 0.0, **options: Unpack[Options]) -> None:
        super().__init__(TAILR, {"gamma": gamma, "w_min": w_min}, options)


@module_of(lambda_pr)
class LambdaPRLoss(TokenLoss):
    def __init__(self, lam: float, gamma: float = 1e-5, **options: Unpack[Options]) -> None:
        super().__init__(LAMBDA_PR, {"lam": lam, "gamma": gamma}, options)


@module_of(c_div)
class CDivLoss(TokenLoss):
    def __init__(self, alpha: float, w_max: float = 10.0, **options: Unpack[Options]) -> None:
        super().__init__(C_DIV, {"alpha": alpha, "w_max": w_max}, options)
