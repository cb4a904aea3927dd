"""Sums, running sums and running maxima inside each set of a ragged collection, without a loop over the sets.

A set's numbers never depend on its neighbours, not even in the last bit: a cumulative sum over all sets with the start
subtracted would lose what a large set before it leaves no digits for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reduce(values: Tensor, offsets: Tensor, how: str = "sum") -> Tensor:
    """Sum or maximum (at least 0) of each set: values (nnz,), offsets (N + 1,) -> (N,) float64; 0 for an empty set."""
    if values.numel() == 0:
        return torch.zeros(offsets.numel() - 1, dtype=torch.float64, device=values.device)
    return torch.segment_reduce(values.to(torch.float64), how, offsets=offsets, initial=0.0)


def running_count(flags: Tensor, offsets: Tensor) -> Tensor:
    """Inclusive running sum of integers within each set, int64 (nnz,)."""
    total = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.to(torch.int64).cumsum(0)])
    return total[1:] - total[offsets[:-1]].repeat_interleave(offsets.diff(), output_size=flags.numel())


def scan(values: Tensor, offsets: Tensor, combine: Callable[[Tensor, Tensor], Tensor], *, back: bool = False) -> Tensor:
    """Inclusive running ``combine`` (torch.add, torch.maximum) within each set; with ``back`` from its end.

    Doubling strides (Hillis and Steele): after step d each place has combined 2 d neighbours. log2(largest set) passes.
    """
    out = values.flip(0) if back else values
    sizes = offsets.diff()
    if back:
        sizes = sizes.flip(0)
    starts = sizes.cumsum(0) - sizes
    size = out.numel()
    inside = torch.arange(size, device=out.device) - starts.repeat_interleave(sizes, output_size=size)
    step, most = 1, int(sizes.max()) if size else 0
    while step < most:
        earlier = out[:-step] if step else out
        out = torch.cat([out[:step], torch.where(inside[step:] >= step, combine(out[step:], earlier), out[step:])])
        step *= 2
    return out.flip(0) if back else out
