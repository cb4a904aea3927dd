"""Confidence bins: filling them, and the calibration errors they give.

Everything here works on a fine histogram of C equal cells of [0, 1]: how many tokens fell into each cell, how many of
those were hits, and the sum of their confidences. The coarse bins of a reliability diagram are unions of cells, so one
histogram serves any number of bins that divides C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reliability:  # a NamedTuple could not have a field called count
    """A reliability diagram: one entry a bin, shape (K, n_bins).

    Fields:
        count: int64, tokens in the bin.
        accuracy: float64, share of them whose most probable token was the target; NaN where the bin is empty.
        confidence: float64, mean probability of the most probable token; NaN where the bin is empty.
    """

    count: Tensor
    accuracy: Tensor
    confidence: Tensor


class AdaptiveECE(NamedTuple):
    """An equal-mass calibration error with what the histogram cannot tell, each float64 (K,).

    The value that sorting every confidence would give lies in ``value - bound .. value + bound``.
    """

    value: Tensor
    bound: Tensor


def check_count(argument: str, value: int) -> None:
    """Raise unless it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument} must be an int, at least 1, got {value!r}")


def cell_index(confidence: Tensor, cells: int) -> Tensor:
    """Cell of each confidence, int64. Cells are ``(i / cells, (i + 1) / cells]``; the first one also holds exactly 0.

    A float32 confidence times a cell count below 2^29 is exact in float64, so nothing falls on the wrong side of an
    edge, and exactly 0 and exactly 1 have their place (in other libraries they drop out of every bin).

    Example:
        >>> cell_index(torch.tensor([0.0, 0.25, 0.2500001, 1.0]), 4).tolist()
        [0, 0, 1, 3]
    """
    return (confidence.double() * cells).ceil().long().sub_(1).clamp_(0, cells - 1)


def coarsen(cells: Tensor, n_bins: int) -> Tensor:
    """Sum neighbouring cells: (K, C) -> (K, n_bins).

    Raises:
        ValueError: if n_bins does not divide C.
    """
    total = cells.shape[-1]
    check_count("n_bins", n_bins)
    if total % n_bins:
        raise ValueError(
            f"n_bins must divide the {total} cells of this state, got {n_bins}; "
            f"choose a divisor or create the state with cells={n_bins * max(1, round(total / n_bins))}"
        )
    return cells.unflatten(-1, (n_bins, total // n_bins)).sum(-1)


def reliability(count: Tensor, hits: Tensor, confidence: Tensor, n_bins: int) -> Reliability:
    """Reliability diagram with equal-width bins from cells of shape (K, C)."""
    count, hits, confidence = (coarsen(x, n_bins) for x in (count, hits, confidence))
    return Reliability(count, hits.double() / count, confidence / count)  # integers alone would divide in float32


def calibration_error(diagram: Reliability, norm: str) -> Tensor:
    """Distance between accuracy and confidence over the bins, float64 (K,); NaN without tokens.

    ``"l1"`` weighs bins by their tokens (ECE: Guo et al. 2017, arXiv 1706.04599, eq. 3), ``"max"`` is the worst bin
    (MCE, eq. 5), ``"l2"`` the root mean square (RMSCE).
    """
    gap = (diagram.accuracy - diagram.confidence).abs().nan_to_num(0.0)
    share = diagram.count.double() / diagram.count.sum(-1, keepdim=True)
    if norm == "l1":
        return (share * gap).sum(-1)
    if norm == "l2":
        return (share * gap**2).sum(-1).sqrt()
    if norm == "max":
        return torch.where(share.isnan().any(-1), torch.nan, gap.amax(-1))
    raise ValueError(f'norm must be "l1", "l2" or "max", got {norm!r}')


def adaptive_error(count: Tensor, hits: Tensor, confidence: Tensor, n_bins: int) -> AdaptiveECE:
    """Equal-mass ECE from cells (K, C): tokens sorted by confidence, group m holds positions m n/B to (m + 1) n/B.

    Positions are rounded down. A cell that lies across the border of two groups is shared out in proportion. Which of
    its c tokens (h hits) are the k on one side is unknown; the hits among them are between max(0, h - (c - k)) and
    min(k, h), and their confidences differ by at most the cell's width, so the error of that piece is bounded (derived)
    and the bounds of all pieces add up.
    """
    check_count("n_bins", n_bins)
    results = [_adaptive_row(c, h, s, n_bins) for c, h, s in zip(count, hits, confidence, strict=True)]
    value = torch.stack([r[0] for r in results])
    return AdaptiveECE(value, torch.stack([r[1] for r in results]))


def _adaptive_row(count: Tensor, hits: Tensor, confidence: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    n, width = int(count.sum()), 1.0 / count.numel()
    if n == 0:
        return (torch.tensor(torch.nan, dtype=torch.float64),) * 2
    cell_edges = count.cumsum(0)
    group_edges = torch.arange(1, n_bins + 1, device=count.device) * n // n_bins
    # Pieces: the intervals between all borders, each within one cell and one group.
    ends = torch.cat([cell_edges, group_edges]).unique()
    sizes = ends.diff(prepend=ends.new_zeros(1))
    ends, sizes = ends[sizes > 0], sizes[sizes > 0]
    cell = torch.searchsorted(cell_edges, ends)
    group = torch.searchsorted(group_edges, ends)
    c, h, k = count[cell].double(), hits[cell].double(), sizes.double()
    share = k / c
    gap = share * (h - confidence[cell])
    most = torch.minimum(k, h) - share * h
    least = share * h - (h - (c - k)).clamp(min=0)
    unknown = torch.maximum(most, least) + share * (c - k) * width
    total = torch.zeros(n_bins, dtype=torch.float64, device=count.device)
    return total.index_add(0, group, gap).abs().sum() / n, unknown.sum() / n
