"""Reference temperature-scaled softmax and log-softmax."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for everything but float64, which stays float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shifted(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in statistics dtype minus their row maximum, safe to differentiate.

    Returns:
        y (N, V): z - max z, and 0 where z is -inf (so that no inf - inf is ever formed),
        masked (N, V): where z is -inf, dead (N,): rows that are -inf throughout, m (N,): the maximum, detached.
    """
    z = logits.to(statistics_dtype(logits.dtype))
    masked = z == -torch.inf
    m = z.detach().amax(-1)
    dead = masked.all(-1)
    base = torch.where(dead, 0.0, m)
    y = torch.where(masked, 0.0, z) - torch.where(masked, 0.0, base[:, None])
    return y, masked, dead, m


def log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(logits / temperature); logits (N, V), temperature (1 or N, 1) -> (N, V) in the dtype of the logits.

    A row of -inf throughout is NaN with gradient 0; a masked token is -inf with gradient exactly 0.
    """
    y, masked, dead, _ = shifted(logits)
    x = y / temperature.to(y.dtype)
    total = torch.where(masked, 0.0, x.exp()).sum(-1, keepdim=True)
    out = x - torch.where(dead[:, None], 1.0, total).log()
    out = torch.where(masked, -torch.inf, out)
    return torch.where(dead[:, None], torch.nan, out).to(logits.dtype)


def softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature), same shapes and edge cases as :func:`log_softmax`; masked tokens are exactly 0."""
    y, masked, dead, _ = shifted(logits)
    e = torch.where(masked, 0.0, (y / temperature.to(y.dtype)).exp())
    total = torch.where(dead[:, None], 1.0, e.sum(-1, keepdim=True))
    return torch.where(dead[:, None], torch.nan, e / total).to(logits.dtype)
