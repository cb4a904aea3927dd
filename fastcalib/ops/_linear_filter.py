"""Gradients of a linear layer without the products of what is next to nothing in the logits' gradient.

A trained model leaves a few hundred of 128,256 tokens with a probability above 1e-4, and the gradient of a loss in the
logits is about as large. Cut Cross-Entropy (Wijmans et al., arXiv 2411.09009) skips tiles of them in its backward; here
a tile is one row and ``TILE`` columns, since gathering rows costs next to nothing beside a product of them. Seldom
likely tokens should lie side by side, as they do in vocabularies sorted by frequency (byte-pair merges are).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._arguments import NUMBERS
from ._linear import BLOCK, Gradients, Linear, Wanted

TILE = 128


def check_filter_below(name: str, filter_below: float | None, device: torch.device) -> None:
    if filter_below is None:
        return
    if isinstance(filter_below, bool) or not isinstance(filter_below, NUMBERS):
        raise TypeError(f"{name}: filter_below must be a number or None, got {filter_below!r}")
    if not math.isfinite(filter_below) or filter_below <= 0:
        raise ValueError(
            f"{name}: filter_below must be positive and finite, got {filter_below!r}; None keeps every gradient"
        )
    if device.type != "cpu":
        raise ValueError(
            f"{name}: filter_below skips products on a CPU only (on {device} finding out what to skip would wait for "
            "the device); leave it out"
        )


class FilteredGradients(Gradients):
    """``limit``: tiles whose every entry is smaller in absolute value add exactly nothing to hidden and weight."""

    def __init__(self, layer: Linear, wanted: Wanted, chunks: int, limit: float) -> None:
        super().__init__(layer, wanted, chunks)
        self.limit = limit
        self.skipped = self.tiles = 0
        for sums in ([] if self.whole is None else [self.whole], self.blocks):
            for tensor in sums:
                tensor.zero_()  # what is skipped from first to last is still to be 0

    def add(self, gradient: Tensor, rows: slice) -> None:
        layer, hidden = self.layer, self.layer.hidden[rows]
        self._add_bias(gradient)
        n, wide = gradient.shape[0], torch.promote_types(gradient.dtype, torch.float32)
        to_hidden = None if self.hidden is None else hidden.new_zeros(n, hidden.shape[1], dtype=wide)
        kept = _largest(gradient) >= self.limit
        counts = kept.sum(0).tolist()
        self.tiles += kept.numel()
        for tile, count in enumerate(counts):
            start = tile * TILE
            columns = slice(start, min(start + TILE, layer.width))
            if count == 0:
                self.skipped += n
                continue
            part, used, where = gradient[:, columns], hidden, None
            if count < n:
                self.skipped += n - count
                where = kept[:, tile].nonzero().squeeze(-1)
                part, used = part.index_select(0, where), hidden.index_select(0, where)
            if to_hidden is not None:
                made = torch.mm(part, layer.weight[columns])
                to_hidden.add_(made) if where is None else to_hidden.index_add_(0, where, made.to(wide))
            if self.wanted.weight is not None:
                self._add_weight(part, used, columns)
        if self.hidden is not None and to_hidden is not None:
            self.hidden[rows] = to_hidden
        self.count += 1

    def _add_weight(self, part: Tensor, hidden: Tensor, columns: slice) -> None:
        if not self.blocks:
            assert self.whole is not None
            self.whole[columns].addmm_(part.t(), hidden)
            return
        block = self.blocks[columns.start // BLOCK]
        start = columns.start % BLOCK
        block[start : start + part.shape[1]] += torch.mm(part.t(), hidden)


def _largest(gradient: Tensor) -> Tensor:
    """Largest absolute value of each row in each tile; infinite where there is a NaN, which must not be lost."""
    found = []
    whole = gradient.shape[1] // TILE * TILE
    for part in (gradient[:, :whole].unflatten(1, (-1, TILE)) if whole else None, gradient[:, whole:].unsqueeze(1)):
        if part is not None and part.shape[-1]:
            found.append(torch.maximum(part.amax(-1), -part.amin(-1)))
    return torch.cat(found, 1).nan_to_num(nan=torch.inf, posinf=torch.inf)
