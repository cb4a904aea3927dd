"""The running sums of a calibration report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..ops._arguments import INTEGERS
from ..ops.types import TokenStatistics
from .bins import AdaptiveECE, adaptive_error, calibration_error, cell_index
from .mergeable import BinnedState, on_grid
from .temperature import NLLSums

RANK_BINS = 32  # 1, 2, 3-4, 5-8, ...: enough for any vocabulary below 2^31


class CalibrationState(BinnedState):
    """Calibration of the top-1 token and of the target at K temperatures, in O(bins) memory however many tokens.

    States over disjoint tokens merge exactly: the result is the same, bit for bit, in whatever order and grouping
    tokens arrive and states merge (while every sum is below 2^29; float64 rounding beyond that). All estimators return
    float64 of shape (K,), also for one temperature. Means are over the tokens seen; they are NaN before the first.

    Args:
        temperatures: the temperatures given to :func:`fastcalib.statistics`, a number or a sequence of K.
        cells: size of the fine confidence histogram; ``n_bins`` of any estimator must divide it.
        device: where the sums are kept.

    Attributes:
        n_tokens: int64 (), tokens counted.
        n_undefined: int64 (), tokens left out because their row has no softmax (all -inf, a NaN or +inf).
        hits: int64 (), tokens that were the argmax.
        ties: int64 (), ranked tokens whose logit another token shares.
        sum_nll, sum_entropy, sum_brier, sum_var: float64 (K,), sums over tokens (nats; logits squared for ``sum_var``).
        cell_count, cell_hits: int64 (K, cells), cell_confidence: float64 (K, cells).
        rank_count: int64 (32,), target ranks in bins 1, 2, 3-4, 5-8, ..., up to 2^31.

    Example:
        >>> import torch, fastcalib
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> state = CalibrationState([1.0, 2.0])
        >>> state.update(fastcalib.statistics(logits, target, [1.0, 2.0], ranks=True), target)
        >>> state.accuracy.tolist(), state.top_k_accuracy(2).item()
        ([0.5, 0.5], 1.0)
        >>> bool(state.merge(state).nll.equal(state.nll))
        True
    """

    _SCALARS = ("n_tokens", "n_undefined", "hits", "ties")
    _SUMS = ("sum_nll", "sum_entropy", "sum_brier", "sum_var")
    _COUNTS: ClassVar[Mapping[str, int]] = {"rank_count": RANK_BINS}

    hits: Tensor
    ties: Tensor
    sum_nll: Tensor
    sum_entropy: Tensor
    sum_brier: Tensor
    sum_var: Tensor
    rank_count: Tensor

    @torch.no_grad()
    def update(self, stats: TokenStatistics, target: Tensor, ignore_index: int = -100) -> None:
        """Add tokens.

        Args:
            stats: from ``statistics(logits, target, temperatures)``; with ``ranks=True`` target ranks are counted too.
            target: int64 (*), the same targets.
            ignore_index: targets of this value are left out.

        Raises:
            ValueError: statistics without ``log_prob``, or shapes that do not fit the target and the temperatures.
        """
        if not isinstance(stats, TokenStatistics):
            raise TypeError(
                f"update: stats must be what fastcalib.statistics(logits, target, temperatures) returns, got "
                f"{type(stats).__name__}"
            )
        if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"update: target must be a tensor of token ids, the same as for statistics, got {got}")
        if stats.log_prob is None:
            raise ValueError("update: stats has no log_prob; call statistics with the target as its index")
        k, device = len(self.temperatures), self.hits.device
        shape = tuple(target.shape)
        if tuple(stats.log_prob.shape) not in {(*shape, k), shape if k == 1 else (*shape, k)}:
            raise ValueError(
                f"update: stats.log_prob has shape {tuple(stats.log_prob.shape)}, but target {shape} "
                f"and {k} temperatures ask for {(*shape, k)}"
            )

        def rows(x: Tensor) -> Tensor:  # (*[, K]) -> (N, K), on the state's device
            return x.detach().to(device).reshape(-1, k)

        target = target.to(device, torch.int64).reshape(-1)  # a uint8 156 would compare equal to -100
        wanted = target != ignore_index
        defined = rows(stats.entropy).isnan().logical_not().all(-1)
        use = wanted & defined
        keep = use[:, None]
        log_prob = torch.where(keep, rows(stats.log_prob), 0.0).double()
        hit = (stats.argmax.to(device).reshape(-1) == target) & use

        self.n_tokens += use.sum()
        self.n_undefined += (wanted & ~defined).sum()
        self.hits += hit.sum()
        brier = 1.0 - 2.0 * log_prob.exp() + rows(stats.collision).double()
        self.sum_nll += on_grid(-log_prob).sum(0)
        for total, x in ((self.sum_entropy, stats.entropy), (self.sum_var, stats.var_logit)):
            total += on_grid(torch.where(keep, rows(x), 0.0)).sum(0)
        self.sum_brier += on_grid(torch.where(keep, brier, 0.0)).sum(0)

        confidence = torch.where(keep, rows(stats.max_prob), 0.0)
        cell = cell_index(confidence, self.cells).t()
        self.cell_count.scatter_add_(1, cell, use.long().expand(k, -1))
        self.cell_hits.scatter_add_(1, cell, hit.long().expand(k, -1))
        self.cell_confidence.scatter_add_(1, cell, on_grid(confidence).t())

        if stats.n_greater is not None and stats.n_equal is not None:
            n_greater, n_equal = (x.to(device).reshape(-1) for x in (stats.n_greater, stats.n_equal))
            edges = 2 ** torch.arange(RANK_BINS, device=device)
            self.rank_count.index_add_(0, torch.searchsorted(edges, n_greater + 1), use.long())
            self.ties += ((n_equal > 0) & use).sum()

    def nll_sums(self) -> NLLSums:
        """NLL and its first two derivatives in 1/T, summed over tokens; what a temperature fit needs."""
        beta = 1.0 / torch.tensor(self.temperatures, dtype=torch.float64, device=self.sum_nll.device)
        return NLLSums(self.sum_nll, (self.sum_nll - self.sum_entropy) / beta, self.sum_var)

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood of the target, nats."""
        return self.sum_nll / self.n_tokens

    @property
    def perplexity(self) -> Tensor:
        """exp of :attr:`nll`."""
        return self.nll.exp()

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the predictions, nats."""
        return self.sum_entropy / self.n_tokens

    @property
    def entropy_gap(self) -> Tensor:
        """Mean entropy minus NLL, nats: expected surprise minus actual one, negative when overconfident.

        It is -1/T times the derivative of NLL in 1/T, hence 0 exactly at the temperature that minimises NLL (derived).
        """
        return (self.sum_entropy - self.sum_nll) / self.n_tokens

    @property
    def accuracy(self) -> Tensor:
        """Share of tokens that were the argmax (the lowest index among ties); the same at every temperature."""
        return (self.hits.double() / self.n_tokens).expand(len(self.temperatures)).clone()

    @property
    def brier(self) -> Tensor:
        """Mean Brier score ``1 - 2 p_y + sum_v p_v^2``, between 0 and 2."""
        return self.sum_brier / self.n_tokens

    def ece(self, n_bins: int = 15) -> Tensor:
        """Expected calibration error of the top-1 token (l1; Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
        return calibration_error(self.reliability(n_bins), "l1")

    def mce(self, n_bins: int = 15) -> Tensor:
        """Maximum calibration error over the non-empty bins (Guo et al. 2017, eq. 5)."""
        return calibration_error(self.reliability(n_bins), "max")

    def rmsce(self, n_bins: int = 15) -> Tensor:
        """Root mean square calibration error (l2)."""
        return calibration_error(self.reliability(n_bins), "l2")

    def adaptive_ece(self, n_bins: int = 15) -> AdaptiveECE:
        """Equal-mass ECE with the error bound of the histogram: the exact value is within ``value +- bound``."""
        return adaptive_error(self.cell_count, self.cell_hits, self.cell_confidence, n_bins)

    def top_k_accuracy(self, k: int) -> Tensor:
        """Share of ranked targets with fewer than k tokens above them, float64 (); k a power of two (as the bins)."""
        if not isinstance(k, int) or k < 1 or k & (k - 1):
            raise ValueError(f"top_k_accuracy: k must be a power of two, got {k!r}")
        return self.rank_count[: k.bit_length()].sum() / self.rank_count.sum().double()
