"""The head and the tail of a ranking: logit against rank, a line and then a logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD, TAIL = 2, 3  # fewest points on either side of the knee: as many as the side has parameters
SHIFTS = 32  # values of the tail's shift in the first grid
REFINEMENTS, FINER = 6, 8  # rounds of a finer grid around the best shift, and its size
CHUNK = 1 << 16  # points times shifts looked at together: a few arrays of float64 of this size fit into a cache


@dataclass(frozen=True)
class HeadTailFit:
    """``slope k + intercept`` for ranks k up to ``knee``, ``scale + decay log(k + shift)`` beyond.

    Attributes:
        knee: int64 (*), the last rank of the head; -1 where there is no fit.
        slope, intercept: float64 (*), logits a rank, and logits.
        scale, decay: float64 (*), logits.
        shift: float64 (*), >= 0, in ranks.
        r_squared: float64 (*), 1 - (squared error / squared deviation from the mean), over head and tail together.
    """

    knee: Tensor
    slope: Tensor
    intercept: Tensor
    scale: Tensor
    decay: Tensor
    shift: Tensor
    r_squared: Tensor

    def __call__(self, rank: Tensor) -> Tensor:
        """The fitted logit at ranks (*, M), float64 (*, M)."""
        k = rank.double()
        head = self.slope[..., None] * k + self.intercept[..., None]
        tail = self.scale[..., None] + self.decay[..., None] * (k + self.shift[..., None]).log()
        return torch.where(k <= self.knee[..., None], head, tail)


def head_tail_fit(logits: Tensor, rank: Tensor | None = None) -> HeadTailFit:
    """Least squares of a linear head and a logarithmic tail; the knee between them is found by trying every rank.

    For every knee both sides are solved in closed form from running sums, all knees at once; the shift of the tail,
    the one parameter that is not linear, by a grid from 0 to ten times the last rank that is refined around its best
    value, each time for all knees.

    Args:
        logits: (*, M), sorted from the largest, such as those of ``torch.topk``; computed with in float64. Entries
            that are not finite are left out (so that rows may have different lengths).
        rank: (M,) or (*, M), rising, >= 1: the rank of each logit; None: 1, 2, ..., M.

    Returns:
        :class:`HeadTailFit`. Rows with fewer than five finite logits have knee -1 and NaN; rows of equal logits have
        r_squared 1.

    Raises:
        ValueError: logits that rise, ranks that do not, or shapes that do not fit.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), Appendix I, for the two curves and the sweep over the knee;
    reconstructed in one point: how the paper chooses the shift is not known to us, here it is fitted, >= 0.

    Example:
        >>> import torch
        >>> k = torch.arange(1.0, 101.0)
        >>> fit = head_tail_fit(torch.where(k <= 20, 12 - 0.25 * k, 10 - (k + 4).log()))
        >>> fit.knee.item(), f"{fit.slope.item():.3f} {fit.decay.item():.3f} {fit.r_squared.item():.4f}"
        (20, '-0.250 -1.000 1.0000')
    """
    y, k = _points(logits, rank)
    rows = math.prod(y.shape[:-1])
    flat_y, flat_k = y.reshape(rows, y.shape[-1]), k.reshape(rows, y.shape[-1])
    step = max(1, CHUNK // (max(y.shape[-1], 1) * SHIFTS))
    parts = [_fit(flat_y[i : i + step], flat_k[i : i + step]) for i in range(0, flat_y.shape[0], step)]
    leading = y.shape[:-1]
    if not parts:
        nothing = torch.empty(leading, dtype=torch.float64, device=y.device)
        return HeadTailFit(nothing.long(), *(nothing.clone() for _ in range(6)))
    return HeadTailFit(*(torch.cat(column).reshape(leading) for column in zip(*parts)))


def _points(logits: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point or logits.dim() == 0:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"head_tail_fit: logits must be a floating-point tensor (*, M), got {got}")
    y = logits.detach().double()
    if rank is None:
        rank = torch.arange(1, y.shape[-1] + 1, device=y.device)
    if not isinstance(rank, Tensor) or rank.shape not in (y.shape, y.shape[-1:]):
        got = str(tuple(rank.shape)) if isinstance(rank, Tensor) else type(rank).__name__
        raise ValueError(f"head_tail_fit: rank must have shape {tuple(y.shape[-1:])} or {tuple(y.shape)}, got {got}")
    k = rank.to(y.device, torch.float64).expand(y.shape)
    use = y.isfinite()
    # What is left out takes the place of nothing: it is compared with neither neighbour.
    both = use[..., 1:] & use[..., :-1]
    if bool((both & (y[..., 1:] > y[..., :-1])).any()):
        raise ValueError("head_tail_fit: logits must fall along the last axis; torch.topk(logits, m).values does")
    if bool((both & (k[..., 1:] <= k[..., :-1])).any()) or bool((use & (k < 1)).any()):
        raise ValueError("head_tail_fit: ranks must be >= 1 and rise along the last axis")
    return torch.where(use, y, torch.nan), k


class _Sums:
    """Running sums of y over the points of each row, and lines through all points up to, or beyond, each of them.

    y and x are centred by their means over the row: the sums of squares then lose few digits.
    """

    def __init__(self, y: Tensor, use: Tensor, *, tail: bool) -> None:
        self.use, self.tail = use.to(y.dtype), tail
        self.n = self.use.sum(-1, keepdim=True).clamp(min=1)
        self.mean = (y * self.use).sum(-1, keepdim=True) / self.n
        self.v = (y - self.mean) * self.use
        self.count = self._run(self.use).clamp(min=1)
        self.sv = self._run(self.v)
        self.cvv = self._run(self.v * self.v) - self.sv * self.sv / self.count

    def _run(self, x: Tensor) -> Tensor:
        sums = x.cumsum(-1)
        return sums[..., -1:] - sums if self.tail else sums

    def lines(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, intercept and squared error against x."""
        mean = (x * self.use).sum(-1, keepdim=True) / self.n
        u = (x - mean) * self.use
        su = self._run(u)
        share = su / self.count
        cuu = self._run(u * u) - su * share
        cuv = self._run(u * self.v) - self.sv * share
        slope = torch.where(cuu > 0, cuv / torch.where(cuu > 0, cuu, 1.0), 0.0)
        error = (self.cvv - slope * cuv).clamp(min=0)
        return slope, self.mean + self.sv / self.count - slope * (share + mean), error


def _fit(y: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """(R, M) points -> the seven columns of the fit, each (R,)."""
    use = y.isfinite()
    y, k = torch.where(use, y, 0.0), torch.where(use, k, 1.0)
    seen = use.cumsum(-1)
    total = seen[:, -1:] if y.shape[1] else seen.new_zeros(y.shape[0], 1)
    allowed = use & (seen >= HEAD) & (total - seen >= TAIL)
    enough = allowed.any(-1)
    if y.shape[1] == 0 or not bool(enough.any()):
        nan = torch.full((y.shape[0],), torch.nan, dtype=torch.float64, device=y.device)
        return (torch.full_like(total[:, 0], -1), *(nan.clone() for _ in range(6)))

    slope, intercept, head_error = _Sums(y, use, tail=False).lines(k)
    head_error = torch.where(allowed, head_error, torch.inf)
    behind = _Sums(y[:, None, :], use[:, None, :], tail=True)
    top = k.amax(-1, keepdim=True)

    def best_of(shifts: Tensor) -> tuple[Tensor, ...]:
        """The best knee for each row's shifts (R, S), and of these the best shift: all indexed by row."""
        decay, scale, error = behind.lines((k[:, None, :] + shifts[:, :, None]).log())
        whole = head_error[:, None, :] + error
        at = whole.flatten(1).argmin(-1)
        row, s, m = torch.arange(len(at), device=at.device), at // y.shape[1], at % y.shape[1]
        return shifts[row, s], m, decay[row, s, m], scale[row, s, m], whole[row, s, m], s

    # Geometric from 0.1 ranks to ten times the last: log(k + shift) is all but a line there; 0 is among them.
    ratio = (100 * top).log() / (SHIFTS - 2)
    grid = torch.cat((torch.zeros_like(top), 0.1 * (ratio * torch.arange(SHIFTS - 1, device=y.device)).exp()), 1)
    best = best_of(grid)
    row = torch.arange(len(grid), device=y.device)
    low, high = grid[row, (best[5] - 1).clamp(min=0)], grid[row, (best[5] + 1).clamp(max=SHIFTS - 1)]
    for _ in range(REFINEMENTS):
        steps = torch.linspace(0, 1, FINER, dtype=torch.float64, device=y.device)
        finer = low[:, None] + (high - low)[:, None] * steps
        trial = best_of(finer)
        better = trial[4] < best[4]
        best = tuple(torch.where(better, new, old) for new, old in zip(trial, best))
        s = trial[5]
        low, high = finer[row, (s - 1).clamp(min=0)], finer[row, (s + 1).clamp(max=FINER - 1)]
    shift, m, decay, scale, error, _ = best

    mean = (y * use).sum(-1) / total[:, 0].clamp(min=1)
    spread = (((y - mean[:, None]) * use) ** 2).sum(-1)
    r_squared = torch.where(spread > 0, 1 - error / torch.where(spread > 0, spread, 1.0), 1.0)
    knee = k[row, m].round().long()
    floats = (slope[row, m], intercept[row, m], scale, decay, shift, r_squared)
    return (torch.where(enough, knee, -1), *(torch.where(enough, x, math.nan) for x in floats))
