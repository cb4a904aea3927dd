"""Sums, running sums and running maxima inside each set of a ragged collection, without a loop over the sets.

A set's numbers never depend on its neighbours, not even in the last bit: a cumulative sum over all sets with the start
subtracted would lose what a large set before it leaves no digits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..valid_sets import ValidSets

# Numbers of valid tokens looked at in one go: 128 KB in float64 for each of some ten temporaries.
CHUNK = 1 << 14


@dataclass(frozen=True)
class Part:
    """Some neighbouring sets: which they are, which tokens are theirs, and their sizes, offsets and rows."""

    sets: slice
    tokens: slice
    sizes: Tensor
    offsets: Tensor
    rows: Tensor


def in_parts(
    sets: ValidSets, each: int, work: Callable[[Part], tuple[Tensor, ...]], *, of_tokens: int = 0, whole: bool = False
) -> list[Tensor]:
    """Results of ``work``, the first ``of_tokens`` of them with one row a token, the others with one row a set.

    So few sets at a time that ``each`` numbers for every token are small beside logits; all at once if asked, while
    compiling, and on an accelerator, where to ask for offsets would wait.
    """
    nnz, results = sets.values.numel(), list[Tensor]()
    for part in _parts(sets, each, whole or sets.offsets.device.type != "cpu" or torch.compiler.is_compiling()):
        found = work(part)
        if part.sets == slice(0, len(sets)):
            return list(found)
        if not results:
            size = [nnz] * of_tokens + [len(sets)] * (len(found) - of_tokens)
            results = [x.new_empty(n, *x.shape[1:]) for x, n in zip(found, size, strict=True)]
        for i, (result, some) in enumerate(zip(results, found, strict=True)):
            result[part.tokens if i < of_tokens else part.sets] = some
    return results


def _parts(sets: ValidSets, each: int, whole: bool) -> Iterator[Part]:
    sizes, offsets, count = sets.counts(), sets.offsets, len(sets)
    if whole or sets.values.numel() * each <= CHUNK:
        yield Part(slice(0, count), slice(0, sets.values.numel()), sizes, offsets, sets.rows())
        return
    first = 0
    while first < count:
        begin = int(offsets[first])
        last = int(torch.searchsorted(offsets, begin + CHUNK // each, right=True)) - 1
        last = min(max(last, first + 1), count)  # one set at least, however large
        end, own = int(offsets[last]), sizes[first:last]
        rows = torch.repeat_interleave(torch.arange(last - first), own, output_size=end - begin)
        yield Part(slice(first, last), slice(begin, end), own, offsets[first : last + 1] - begin, rows)
        first = last


def reduce(values: Tensor, offsets: Tensor, how: str = "sum") -> Tensor:
    """Sum or maximum (at least 0) of each set: (nnz, ...), offsets (N + 1,) -> (N, ...) float64; 0 for an empty set."""
    if values.shape[0] == 0:
        return torch.zeros(offsets.numel() - 1, *values.shape[1:], dtype=torch.float64, device=values.device)
    values = values.to(torch.float64).contiguous()
    return torch.segment_reduce(values, how, offsets=offsets, axis=0, unsafe=True, initial=0.0)


def logsumexp(x: Tensor, lengths: Tensor) -> Tensor:
    """logsumexp of each set: (nnz, ...), lengths (N,) -> (N, ...); -inf, with gradient 0, for no more than -inf."""
    lengths = lengths.to(x.device)
    if x.shape[0] == 0:
        return x.new_full((lengths.numel(), *x.shape[1:]), -torch.inf)
    x = x.contiguous()
    top = torch.segment_reduce(x.detach(), "max", lengths=lengths, axis=0, unsafe=True, initial=-math.inf)
    top = torch.where(top == -math.inf, 0.0, top)
    each = torch.repeat_interleave(lengths, output_size=x.shape[0])
    total = torch.segment_reduce((x - top[each]).exp(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    some = total != 0  # log's gradient at 0 is infinite, and 0 * inf would reach every number of the set
    return torch.where(some, torch.where(some, total, 1.0).log() + top, -math.inf)


def running_count(flags: Tensor, offsets: Tensor) -> Tensor:
    """Inclusive running sum of integers within each set, int64 (nnz,)."""
    total = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags.to(torch.int64).cumsum(0)])
    return total[1:] - total[offsets[:-1]].repeat_interleave(offsets.diff(), output_size=flags.numel())


def scan(values: Tensor, offsets: Tensor, combine: Callable[[Tensor, Tensor], Tensor], *, back: bool = False) -> Tensor:
    """Inclusive running ``combine`` (torch.add, torch.maximum) within each set; with ``back`` from its end.

    Doubling strides (Hillis and Steele): after step d each place has combined 2 d neighbours. log2(largest set) passes;
    on an accelerator, where its size is not known without waiting, log2(nnz).
    """
    out = values.flip(0) if back else values
    sizes = offsets.diff()
    if back:
        sizes = sizes.flip(0)
    starts = sizes.cumsum(0) - sizes
    size = out.numel()
    inside = torch.arange(size, device=out.device) - starts.repeat_interleave(sizes, output_size=size)
    step, most = 1, int(sizes.max()) if size and out.device.type == "cpu" else size
    while step < most:
        earlier = out[:-step] if step else out
        out = torch.cat([out[:step], torch.where(inside[step:] >= step, combine(out[step:], earlier), out[step:])])
        step *= 2
    return out.flip(0) if back else out
