"""The temperature that minimises NLL (Guo et al. 2017, arXiv 1706.04599, section 4.2).

With b = 1/T the NLL of a token is ``L(b) - b z_y``, convex in b. Its derivatives need nothing beyond the statistics:
``E[z] - z_y = (NLL - H) / b`` (derived: with H = L - b E[z] the normaliser is gone before it is formed) and ``Var[z]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops._arguments import BadTokenId, check_target, raise_bad_target
from ..ops.statistics import statistics
from ..ops.types import TokenStatistics

if TYPE_CHECKING:
    from .state import CalibrationState


class NLLSums(NamedTuple):
    """NLL and its derivatives in b = 1/T at K temperatures, each float64 (K,); sums over tokens, or means.

    Fields: nll (nats), slope (d NLL / db), curvature (d^2 NLL / db^2).
    """

    nll: Tensor
    slope: Tensor
    curvature: Tensor

    @classmethod
    def from_statistics(
        cls, stats: TokenStatistics, target: Tensor, temperatures: Sequence[float], ignore_index: int = -100
    ) -> NLLSums:
        """Sums over the tokens of ``statistics(logits, target, temperatures)``, ignored ones left out."""
        if stats.log_prob is None:
            raise ValueError("from_statistics: stats has no log_prob; call statistics(logits, target, temperatures)")
        keep = (target.to(torch.int64) != ignore_index)[..., None]  # a uint8 156 would compare equal to -100
        k = len(temperatures)

        def total(x: Tensor) -> Tensor:
            return torch.where(keep, x.detach(), 0.0).double().reshape(-1, k).sum(0)

        temperature = torch.tensor(temperatures, dtype=torch.float64, device=target.device)
        nll = -total(stats.log_prob)
        return cls(nll, (nll - total(stats.entropy)) * temperature, total(stats.var_logit))

    def __add__(self, other: object) -> NLLSums:  # sums of two batches, not the concatenation of two tuples
        if not isinstance(other, NLLSums):
            return NotImplemented
        return NLLSums(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class TemperatureFit:
    """Result of a temperature fit.

    Attributes:
        temperature: the minimiser.
        nll: NLL there, in the units ``evaluate`` gave (a mean per token from :func:`fit_temperature`).
        nll_before: NLL at T = 1; NaN if T = 1 lies outside the bounds.
        passes: how often the data were read.
        at_bound: True if NLL still falls at ``temperature``, which is then one of the bounds and not a minimum.
        converged: False if ``max_passes`` ended the search first.
    """

    temperature: float
    nll: float
    nll_before: float
    passes: int
    at_bound: bool
    converged: bool = True


class _Node(NamedTuple):
    beta: float
    nll: float
    slope: float
    curvature: float


def fit_temperature_from(
    evaluate: Callable[[tuple[float, ...]], NLLSums],
    *,
    bounds: tuple[float, float] = (0.05, 20.0),
    n_temperatures: int = 9,
    tolerance: float = 1e-6,
    max_passes: int = 10,
) -> TemperatureFit:
    """Minimise NLL over the temperature, reading the data a few times (typically three) at K temperatures each.

    The first pass brackets the minimum on a geometric grid; each next one places its temperatures around the root of
    the cubic Hermite interpolant of the slope (Newton's method from both ends of the bracket at once).

    Args:
        evaluate: takes a tuple of temperatures, reads all the data once, returns :class:`NLLSums`.
        bounds: smallest and largest temperature considered.
        n_temperatures: K, at least 3.
        tolerance: stop when the Newton step is below this relative to 1/T.
        max_passes: give up (``converged=False``) after this many reads.

    Raises:
        ValueError: bad bounds or K, or an NLL that is not finite (no tokens, or a target of probability zero).

    Example:
        >>> fit = fit_temperature_from(lambda ts: NLLSums(*(torch.tensor(x, dtype=torch.float64) for x in (
        ...     [(1 / t - 0.5) ** 2 for t in ts], [2 * (1 / t - 0.5) for t in ts], [2.0 for t in ts]))))
        >>> round(fit.temperature, 9), fit.at_bound
        (2.0, False)
    """
    try:
        low, high = (float(t) for t in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        raise ValueError(f"bounds must be two finite temperatures, 0 < low < high, got {bounds!r}")
    if n_temperatures < 3:
        raise ValueError(f"n_temperatures must be at least 3, got {n_temperatures}")

    nodes: list[_Node] = []
    betas = _first_grid(1.0 / high, 1.0 / low, n_temperatures)
    for passes in range(1, max_passes + 1):
        sums = evaluate(tuple(1.0 / b for b in betas))
        new = zip(betas, *(x.tolist() for x in sums), strict=True)
        nodes = sorted([*nodes, *(_Node(*values) for values in new)])
        _require_finite(nodes)
        bound = _at_bound(nodes)
        if bound is not None:
            return _result(bound, nodes, passes, at_bound=True)
        best = min(nodes, key=lambda n: (abs(n.slope), abs(math.log(n.beta))))
        if abs(best.slope) <= tolerance * best.beta * best.curvature or best.slope == 0:
            return _result(best, nodes, passes)
        left, right = _bracket(nodes)
        if right.beta - left.beta <= 4e-15 * right.beta:
            return _result(best, nodes, passes)
        betas = _next_grid(left, right, n_temperatures)
    return _result(best, nodes, max_passes, converged=False)


def fit_temperature(
    logits: Tensor,
    target: Tensor,
    *,
    bounds: tuple[float, float] = (0.05, 20.0),
    ignore_index: int = -100,
    vocab_size: int | None = None,
    tolerance: float = 1e-6,
    backend: str = "auto",
) -> TemperatureFit:
    """Temperature scaling of logits held in memory: the T > 0 that minimises the mean NLL of the targets.

    Args:
        logits: (*, V), any floating dtype.
        target: int64 (*).
        bounds, tolerance: see :func:`fit_temperature_from`, which also serves data that must be streamed.
        ignore_index: targets left out.
        vocab_size: columns from here on are padding.
        backend: as in :func:`fastcalib.statistics`.

    Raises:
        ValueError: no target left, or an NLL that is not finite.

    Example:
        >>> import fastcalib
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
        >>> fit = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))    # right three times in four: p = 3/4
        >>> abs(fit.temperature - 4 / math.log(3)) < 1e-5
        True
    """
    width = check_target("fit_temperature", logits, target, vocab_size)
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    n = int((target != ignore_index).sum())
    if n == 0:
        raise ValueError(f"fit_temperature: no target differs from ignore_index={ignore_index}")

    @torch.no_grad()
    def evaluate(temperatures: tuple[float, ...]) -> NLLSums:
        try:
            stats = statistics(
                logits, target, temperatures, vocab_size=vocab_size, ignore_index=ignore_index, backend=backend
            )
        except BadTokenId:
            raise_bad_target(target, width, ignore_index)
        sums = NLLSums.from_statistics(stats, target, temperatures, ignore_index)
        return NLLSums(*(x / n for x in sums))

    return fit_temperature_from(evaluate, bounds=bounds, tolerance=tolerance)


def interpolate_temperature(state: CalibrationState) -> TemperatureFit:
    """The minimiser of mean NLL from a state alone, no data read again.

    Between two temperatures of the state NLL, slope and curvature are known at both ends, which determine a quintic;
    its minimum is off by O(h^5) in the distance h of the two 1/T. The state's range of temperatures is the bound.

    Raises:
        ValueError: fewer than two temperatures, or an NLL that is not finite.
    """
    if len(state.temperatures) < 2:
        raise ValueError("interpolate_temperature: the state needs at least two temperatures")
    sums = (x / state.n_tokens for x in state.nll_sums())
    betas = [1.0 / t for t in state.temperatures]
    nodes = sorted(_Node(*values) for values in zip(betas, *(x.tolist() for x in sums), strict=True))
    _require_finite(nodes)
    bound = _at_bound(nodes)
    if bound is not None:
        return _result(bound, nodes, 0, at_bound=True)
    flat = [n for n in nodes if n.slope == 0]
    if flat:
        return _result(min(flat, key=lambda n: abs(math.log(n.beta))), nodes, 0)
    left, right = _bracket(nodes)
    beta = _root(lambda b: _quintic(left, right, b)[1], left.beta, right.beta)
    return _result(_Node(beta, _quintic(left, right, beta)[0], 0.0, 0.0), nodes, 0)


def _first_grid(low: float, high: float, k: int) -> list[float]:
    ratio = (high / low) ** (1 / (k - 1))
    grid = [low * ratio**i for i in range(k - 1)] + [high]
    if low < 1 < high:  # T = 1 is reported as the state of things before the fit
        nearest = min(range(1, k - 1), key=lambda i: abs(math.log(grid[i])))
        grid[nearest] = 1.0
    return sorted(grid)


def _next_grid(left: _Node, right: _Node, k: int) -> list[float]:
    """The predicted root, and points that close in on it from both ends of the bracket by factors of 16."""
    root = _root(lambda b: _hermite_slope(left, right, b), left.beta, right.beta)
    steps = [16.0**-i for i in range(1, (k - 1) // 2 + 1)]
    grid = {root, *(root + (right.beta - root) * s for s in steps), *(root - (root - left.beta) * s for s in steps)}
    return sorted(b for b in grid if left.beta < b < right.beta) or [0.5 * (left.beta + right.beta)]


def _bracket(nodes: list[_Node]) -> tuple[_Node, _Node]:
    right = next(n for n in nodes if n.slope >= 0)
    left = [n for n in nodes if n.beta < right.beta][-1]
    return left, right


def _at_bound(nodes: list[_Node]) -> _Node | None:
    if nodes[-1].slope < 0:
        return nodes[-1]
    return nodes[0] if nodes[0].slope > 0 else None


def _require_finite(nodes: list[_Node]) -> None:
    if not all(math.isfinite(n.nll) and math.isfinite(n.slope) for n in nodes):
        raise ValueError(
            "temperature fit: NLL is not finite; there are no tokens, a target has probability zero (its logit is "
            "-inf), or the logits hold NaN"
        )


def _result(
    best: _Node, nodes: list[_Node], passes: int, *, at_bound: bool = False, converged: bool = True
) -> TemperatureFit:
    before = next((n.nll for n in nodes if n.beta == 1.0), math.nan)
    return TemperatureFit(1.0 / best.beta, best.nll, before, passes, at_bound, converged)


def _hermite_slope(left: _Node, right: _Node, beta: float) -> float:
    """Cubic through slope and curvature at both ends."""
    h = right.beta - left.beta
    u = (beta - left.beta) / h
    return (
        (1 + 2 * u) * (1 - u) ** 2 * left.slope
        + u * (1 - u) ** 2 * h * left.curvature
        + u * u * (3 - 2 * u) * right.slope
        + u * u * (u - 1) * h * right.curvature
    )


def _quintic(left: _Node, right: _Node, beta: float) -> tuple[float, float]:
    """Value and slope of the quintic through NLL, slope and curvature at both ends, in Newton's divided differences."""
    h = right.beta - left.beta
    u = (beta - left.beta) / h
    f0, d0, c0 = left.nll, left.slope * h, left.curvature * h * h / 2
    f1, d1, c1 = right.nll - f0 - d0 - c0, right.slope * h - d0 - 2 * c0, right.curvature * h * h / 2 - c0
    # remainder u^3 (a + b (u-1) + c (u-1)^2) with value f1, slope d1 and half-curvature c1 at u = 1
    a = f1
    b = d1 - 3 * a
    c = c1 - 3 * a - 3 * b
    v = u - 1
    tail, tail_slope = a + b * v + c * v * v, b + 2 * c * v
    value = f0 + d0 * u + c0 * u * u + u**3 * tail
    slope = d0 + 2 * c0 * u + 3 * u * u * tail + u**3 * tail_slope
    return value, slope / h


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Bisection for a function that is negative at low and not at high; plain floats, so to the last bit."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle <= low or middle >= high:
            break
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return high
