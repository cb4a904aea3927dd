"""What the operations return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """Statistics of ``softmax(logits / temperature)``, one set per row of logits.

    ``*`` stands for the leading dimensions of the logits; ``[K]`` is there when K temperatures were given as a
    sequence. Entropies and log-probabilities are in nats. The dtype is float32 (float64 for float64 logits).

    Fields:
        logsumexp: ``log sum_v exp(z_v / T)``, shape (*[, K]).
        entropy: ``-sum_v p_v log p_v``, shape (*[, K]).
        max_prob: the largest probability ("confidence"), shape (*[, K]).
        collision: ``sum_v p_v^2``, shape (*[, K]).
        mean_logit: ``E_p[z]``, shape (*[, K]).
        var_logit: ``Var_p[z]``, shape (*[, K]).
        argmax: int64, (*); the lowest index of the largest logit, -1 for an undefined or skipped row.
        sum_logits: ``sum_v z_v``, (*); -inf where a logit is -inf.
        std_logits: sample standard deviation of the finite logits, (*); 0 where fewer than two are finite.
        max_logit: the largest logit, (*). Not differentiable.
        log_prob: log-probability of the selected tokens, shaped like the index plus [K]; None without an index.
        n_greater: int64, number of tokens with a larger logit than the selected one; None unless ``ranks=True``.
        n_equal: int64, number of *other* tokens with the same logit; None unless ``ranks=True``.
        mass_greater: probability of the tokens counted by ``n_greater``, plus [K]; None unless ``ranks=True``.

    A row that has no softmax (all -inf, or any NaN or +inf) has NaN statistics. With ``moments=False`` entropy,
    collision, mean_logit, var_logit, sum_logits and std_logits are None.
    """

    logsumexp: Tensor
    entropy: Tensor
    max_prob: Tensor
    collision: Tensor
    mean_logit: Tensor
    var_logit: Tensor
    argmax: Tensor
    sum_logits: Tensor
    std_logits: Tensor
    max_logit: Tensor
    log_prob: Tensor | None
    n_greater: Tensor | None
    n_equal: Tensor | None
    mass_greater: Tensor | None


class PRDivergence(NamedTuple):
    """Points of the precision-recall curve of one distribution Q against another, P: (*) or (*, L) for L values of lam.

    Fields:
        alpha: ``sum_v min(lam P_v, Q_v)``, the precision; between 0 and min(1, lam).
        beta: ``alpha / lam``, the recall; between 0 and min(1, 1 / lam). At lam = 0 its limit.
    """

    alpha: Tensor
    beta: Tensor


class TokenRanks(NamedTuple):
    """Exact counts around selected tokens (or thresholds).

    Fields:
        n_greater: int64, number of tokens whose logit is greater.
        n_equal: int64, number of tokens whose logit is equal; a selected token does not count itself.
        mass_greater: probability of the tokens counted by ``n_greater``, with a trailing axis of K for a sequence of K
            temperatures; None when no temperature was given.
    """

    n_greater: Tensor
    n_equal: Tensor
    mass_greater: Tensor | None

    def rank(self, method: str = "min") -> Tensor:
        """Rank of each selected token, 1 for the largest logit, by the names of :func:`scipy.stats.rankdata`.

        Args:
            method: ``"min"`` is 1 + n_greater, ``"max"`` is 1 + n_greater + n_equal, ``"average"`` their mean
                (float64).

        Raises:
            ValueError: for any other method.

        Example:
            >>> import torch, fastcalib
            >>> r = fastcalib.ranks(torch.tensor([[3.0, 1.0, 3.0, 0.0]]), torch.tensor([2]))
            >>> r.rank().item(), r.rank("max").item(), r.rank("average").item()
            (1, 2, 1.5)
        """
        if method == "min":
            return self.n_greater + 1
        if method == "max":
            return self.n_greater + self.n_equal + 1
        if method == "average":
            return self.n_greater.to(torch.float64) + 1 + self.n_equal.to(torch.float64) / 2
        raise ValueError(f'method must be "min", "max" or "average", got {method!r}')
