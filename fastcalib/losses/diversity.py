"""Losses that keep the model's spread while it learns: two temperatures of one softmax, from one read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..ops import TokenStatistics
from ._base import Formula, TokenLoss, apply, column
from ._modules import module_of
from ._options import documented
from .likelihood import focal_coefficient, log_p, weighted_nll

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import CallOptions, Options


def _gem(stats: TokenStatistics, target: Tensor, *, beta: float) -> Tensor:
    # With q = softmax(z / (beta T)): sum_v q_v (log p_y - log p_v) = (z_y - E_q[z]) / T = beta (log q_y + H(q)). Both
    # terms are free of cancellation, and beta log q_y alone has exactly the gradient (onehot - q) / T that a fixed q
    # gives: so H(q) enters as a value only, and p itself is never needed.
    q = column(stats, -1)
    return -beta * (log_p(q) + q.entropy.detach())


def _tofu(stats: TokenStatistics, target: Tensor, *, gamma: float, beta: float) -> Tensor:
    p, q = column(stats, 0), column(stats, -1)
    return weighted_nll(beta * focal_coefficient(log_p(p).detach(), gamma), log_p(q))


GEM = Formula("gem", _gem, {"beta": "(0, inf)"}, factors=lambda beta: (beta,), moments=True)
TOFU = Formula("tofu", _tofu, {"gamma": "[0, inf)", "beta": "(0, inf)"}, factors=lambda gamma, beta: (1.0, beta))


@documented
def gem(logits: Tensor, target: Tensor, *, beta: float = 0.7, **options: Unpack[CallOptions]) -> Tensor:
    """GEM: game-theoretic entropy maximisation; fits the target while keeping the model's diversity.

    Per token ``-sum_v sg(q_v) (log p_y - log p_v)`` with p = softmax(logits / T), q = softmax(logits / (beta T)), y the
    target (sg: no gradient). The gradient is (q - onehot) / T: c(p) = 1, and q takes the place of the softmax.
    The value may be negative. Only q is computed unless label smoothing, z_loss or the entropy bonus need p
    too; a temperature *tensor* then costs a second read.

    Args:
        beta: > 0; 1 has the gradient of nll, less keeps more of the model's spread.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: Li et al. 2024, arXiv 2408.16673; status: code (authors). The closed form is derived.

    Example:
        >>> import torch, fastcalib
        >>> logits = torch.tensor([[0.0, 2.0]], requires_grad=True)
        >>> fastcalib.losses.gem(logits, torch.tensor([0]), beta=0.5).backward()
        >>> logits.grad, torch.softmax(logits.detach() / 0.5, -1)
        (tensor([[-0.9820,  0.9820]]), tensor([[0.0180, 0.9820]]))
    """
    return apply(GEM, {"beta": beta}, logits, target, options)


@documented
def tofu(
    logits: Tensor, target: Tensor, *, gamma: float = 3.0, beta: float = 0.8, **options: Unpack[CallOptions]
) -> Tensor:
    """ToFU: focal weights on the likelihood at a second temperature.

    Per token ``-sg(c(p)) beta log q`` with c(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p, p and q the
    target's probabilities under softmax(logits / T) and softmax(logits / (beta T)) (sg: no gradient). The gradient is
    ``c(p) (softmax(logits / (beta T)) - onehot) / T``. Both temperatures come from one read; a temperature *tensor*
    costs a second one.

    Args:
        gamma: in [0, inf).
        beta: > 0.

    :class:`fastcalib.losses.Options` lists the other arguments, the shapes and the errors.

    Source: arXiv 2605.00195; status: code (apparently its authors').

    Example:
        >>> import torch, fastcalib
        >>> fastcalib.losses.tofu(torch.zeros(1, 4), torch.tensor([1]), gamma=0.0, beta=0.5)
        tensor(0.6931)
    """
    return apply(TOFU, {"gamma": gamma, "beta": beta}, logits, target, options)


@module_of(gem)
class GEMLoss(TokenLoss):
    def __init__(self, beta: float = 0.7, **options: Unpack[Options]) -> None:
        super().__init__(GEM, {"beta": beta}, options)


@module_of(tofu)
class ToFULoss(TokenLoss):
    def __init__(self, gamma: float = 3.0, beta: float = 0.8, **options: Unpack[Options]) -> None:
        super().__init__(TOFU, {"gamma": gamma, "beta": beta}, options)
