"""Checks of sets and of the counts that come with their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..valid_sets import ValidSets
from ._arguments import Index, check_ids, normalise_index


def check_sets(sets: ValidSets, logits: Tensor, vocab_size: int, name: str = "sets") -> Index:
    """Sets of token ids, one for each row of the logits, flat; ``name`` is the argument's."""
    check_are_sets(sets)
    ids = normalise_index(sets, logits, name)
    check_ids(ids, vocab_size, None, name)
    return ids


def check_are_sets(sets: ValidSets) -> None:
    """Raise unless these are sets; a tensor of ids would be taken for one token a row."""
    if not isinstance(sets, ValidSets):
        raise TypeError(f"sets must be a ValidSets, got {type(sets).__name__}; ValidSets.from_lists makes one of lists")


def check_counts(counts: Tensor | None, sets: ValidSets) -> Tensor | None:
    """Counts of the valid tokens as int64 or float64 (nnz,), or None for one each."""
    if counts is None:
        return None
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a tensor, one number for each value of the sets, got {type(counts).__name__}")
    if counts.shape != sets.values.shape:
        raise ValueError(
            f"counts must have shape {tuple(sets.values.shape)}, one number for each value of the sets, got "
            f"{tuple(counts.shape)}"
        )
    if counts.dtype == torch.bool or counts.dtype.is_complex:
        raise TypeError(f"counts must be integers or floating point, got {counts.dtype}")
    if counts.device != sets.values.device:
        raise ValueError(f"counts are on {counts.device}, the sets are on {sets.values.device}")
    counts = counts.detach().to(torch.float64 if counts.dtype.is_floating_point else torch.int64)
    if counts.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~((counts >= 0) & (counts != torch.inf))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise ValueError(f"counts must be finite and >= 0, but counts[{at}] is {counts[at].item()}")
    return counts
