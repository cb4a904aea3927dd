"""Losses that reweight the likelihood of the target by a function of its own probability."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import TokenStatistics
from ._base import Formula, TokenLoss, apply
from ._modules import module_of
from ._options import documented

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import CallOptions, Options


def log_p(stats: TokenStatistics) -> Tensor:
    """Log-probability of the target."""
    assert stats.log_prob is not None
    return stats.log_prob


def p_fixed(stats: TokenStatistics) -> Tensor:
    """Probability of the target, without gradient: the "sg(p)" of the formulas."""
    return log_p(stats).detach().exp()


def weighted_nll(weight: Tensor, log_prob: Tensor) -> Tensor:
    """-w log p, and 0 for w = 0: a target masked to -inf has p = 0 and log p = -inf, whose product is NaN."""
    return torch.where(weight == 0, 0.0, -weight * log_prob)


def focal_rest(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """log p and 1 - p of the focal losses, safe to differentiate at both ends.

    1 - p stops at the smallest normal number, where (1 - p)^(gamma - 1) is still finite and everything it multiplies is
    0; log p stops at -100, beyond which p is nothing and a target masked to -inf would give 0 * inf = NaN.
    """
    floor = log_prob.clamp(min=-100.0)
    return floor, (-torch.expm1(floor)).clamp(min=torch.finfo(log_prob.dtype).tiny)


def focal_coefficient(log_prob: Tensor, gamma: float) -> Tensor:
    """c(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p, from a detached log p."""
    floor, rest = focal_rest(log_prob)
    return rest**gamma - gamma * floor.exp() * floor * rest ** (gamma - 1.0)


def _nll(stats: TokenStatistics, target: Tensor) -> Tensor:
    return -log_p(stats)


def _gold(stats: TokenStatistics, target: Tensor, *, u: float, reward: Tensor | None = None) -> Tensor:
    loss = weighted_nll(p_fixed(stats).clamp(min=u), log_p(stats))
    return loss if reward is None else loss * reward


def _dft(stats: TokenStatistics, target: Tensor) -> Tensor:
    return weighted_nll(p_fixed(stats), log_p(stats))


def _mixce(stats: TokenStatistics, target: Tensor, *, eta: float) -> Tensor:
    return weighted_nll(eta + (1.0 - eta) * p_fixed(stats), log_p(stats))


def _gce(stats: TokenStatistics, target: Tensor, *, k: float) -> Tensor:
    return -torch.expm1(k * log_p(stats)) / k


def _focal(stats: TokenStatistics, target: Tensor, *, gamma: float) -> Tensor:
    _, rest = focal_rest(log_p(stats))
    return -(rest**gamma) * log_p(stats)


NLL = Formula("nll", _nll, linear=True)
GOLD = Formula("gold", _gold, {"u": "[0, 1]"}, token_arguments=("reward",))
DFT = Formula("dft", _dft)
MIXCE = Formula("mixce", _mixce, {"eta": "[0, 1]"})
GCE = Formula("gce", _gce, {"k": "(0, 1]"})
FOCAL = Formula("focal", _focal, {"gamma": "[0, inf)"})


@documented
def nll(logits: Tensor, target: Tensor, **options: Unpack[CallOptions]) -> Tensor:
    """Negative log-likelihood (cross-entropy) of the target tokens.

    Per token ``-log p``, p the probability of the target under softmax(logits / temperature). The gradient is
    ``c(p) (softmax - onehot) / temperature`` with c(p) = 1.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: the definition; the coefficient is derived.

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.nll(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)
    """
    return apply(NLL, {}, logits, target, options)


@documented
def gold(
    logits: Tensor, target: Tensor, *, u: float = 0.1, reward: Tensor | None = None, **options: Unpack[CallOptions]
) -> Tensor:
    """GOLD: the likelihood weighted by the model's own probability, never less than u.

    Per token ``-sg(max(p, u)) reward log p`` (sg: no gradient); c(p) = max(p, u) reward.

    Args:
        u: smallest weight, in [0, 1].
        reward: floating point, broadcasts to the target: (B, 1) is one a sequence. None is the delta reward of the
            paper, 1 for every token of the data.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Pang & He 2021, arXiv 2009.07839; status: code (authors).

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.gold(torch.zeros(1, 4), torch.tensor([1]), u=0.5)
        tensor(0.6931)
    """
    return apply(GOLD, {"u": u}, logits, target, options, reward=reward)


@documented
def dft(logits: Tensor, target: Tensor, **options: Unpack[CallOptions]) -> Tensor:
    """Dynamic fine-tuning: the likelihood weighted by the model's own probability.

    Per token ``-sg(p) log p`` (sg: no gradient); c(p) = p.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: status: code (TRL's loss type "dft").

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.dft(torch.zeros(1, 4), torch.tensor([1]))
        tensor(0.3466)
    """
    return apply(DFT, {}, logits, target, options)


@documented
def mixce(logits: Tensor, target: Tensor, *, eta: float = 0.5, **options: Unpack[CallOptions]) -> Tensor:
    """MixCE: forward cross-entropy mixed with an approximation of the reverse one.

    Per token ``-(eta + (1 - eta) sg(p)) log p`` (sg: no gradient); c(p) = eta + (1 - eta) p.

    Args:
        eta: share of the forward cross-entropy, in [0, 1]; 1 is nll.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Zhang et al. 2023, arXiv 2305.16958; status: code (authors).

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.mixce(torch.zeros(1, 4), torch.tensor([1]), eta=0.2)
        tensor(0.5545)
    """
    return apply(MIXCE, {"eta": eta}, logits, target, options)


@documented
def gce(logits: Tensor, target: Tensor, *, k: float = 0.7, **options: Unpack[CallOptions]) -> Tensor:
    """Generalised cross-entropy: between nll (k -> 0) and the mean absolute error (k = 1), robust to label noise.

    Per token ``(1 - p^k) / k``; c(p) = p^k.

    Args:
        k: in (0, 1]; the paper's q.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Zhang & Sabuncu 2018, arXiv 1805.07836; the coefficient is derived.

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.gce(torch.zeros(1, 4), torch.tensor([1]), k=1.0)
        tensor(0.7500)
    """
    return apply(GCE, {"k": k}, logits, target, options)


@documented
def focal(logits: Tensor, target: Tensor, *, gamma: float = 2.0, **options: Unpack[CallOptions]) -> Tensor:
    """Focal loss: tokens the model already predicts well count less.

    Per token ``-(1 - p)^gamma log p``; c(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p.

    Args:
        gamma: in [0, inf); 0 is nll.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Lin et al. 2017, arXiv 1708.02002; the coefficient is derived.

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.focal(torch.zeros(1, 4), torch.tensor([1]))
        tensor(0.7798)
    """
    return apply(FOCAL, {"gamma": gamma}, logits, target, options)


@module_of(nll)
class NLLLoss(TokenLoss):
    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__(NLL, {}, options)


@module_of(gold)
class GoldLoss(TokenLoss):
    def __init__(self, u: float = 0.1, **options: Unpack[Options]) -> None:
        super().__init__(GOLD, {"u": u}, options)


@module_of(dft)
class DFTLoss(TokenLoss):
    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__(DFT, {}, options)


@module_of(mixce)
class MixCELoss(TokenLoss):
    def __init__(self, eta: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(MIXCE, {"eta": eta}, options)


@module_of(gce)
class GCELoss(TokenLoss):
    def __init__(self, k: float = 0.7, **options: Unpack[Options]) -> None:
        super().__init__(GCE, {"k": k}, options)


@module_of(focal)
class FocalLoss(TokenLoss):
    def __init__(self, gamma: float = 2.0, **options: Unpack[Options]) -> None:
        super().__init__(FOCAL, {"gamma": gamma}, options)
