"""Reference cutoffs: sort every row, add up its probabilities (spec, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._cutoff_rules import Rule
from .softmax import statistics_dtype

# Logits in float64 held at a time: the reference is allowed temporaries, not gigabytes.
CHUNK = 1 << 22


@torch.no_grad()
def cutoffs(
    logits: Tensor, rules: Sequence[tuple[Rule, float]], temperature: Tensor, sizes: Tensor | None, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, number and mass of the tokens kept, each (N, K, R), in float64 throughout.

    Logits (N, V), temperature (1 or N, K), sizes (N,) of the sets for the size oracle. With ``last`` the rules look at
    temperature 1 and masses alone at the given ones. A row without a softmax has threshold and mass NaN, kept 0.
    """
    n_rows, vocab = logits.shape
    k_count = temperature.shape[1]
    dtype = statistics_dtype(logits.dtype)
    shape = (n_rows, k_count, len(rules))
    threshold = torch.empty(shape, dtype=dtype, device=logits.device)
    kept = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    mass = torch.empty(shape, dtype=dtype, device=logits.device)
    step = max(1, CHUNK // vocab)
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        z = logits[part].double().sort(-1, descending=True).values
        for k in range(k_count):
            t = temperature[part, k : k + 1] if temperature.shape[0] > 1 else temperature[:, k : k + 1]
            p = torch.softmax((z - z[:, :1]) / t, -1)
            looked = p if not last else torch.softmax(z - z[:, :1], -1)
            scale = t if not last else torch.ones_like(t)
            for r, (rule, value) in enumerate(rules):
                n = _kept(rule, value, z, looked, scale, None if sizes is None else sizes[part])
                border = z.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0]
                if rule is Rule.NONE:
                    border = torch.full_like(border, -torch.inf)
                defined = ~p.isnan().any(-1)
                threshold[part, k, r] = torch.where(defined, border, torch.nan).to(dtype)
                kept[part, k, r] = torch.where(defined, n, 0)
                among = torch.arange(vocab, device=z.device) < n[:, None]
                mass[part, k, r] = torch.where(among | ~defined[:, None], p, 0.0).sum(-1).clamp(max=1.0).to(dtype)
    return threshold, kept, mass


def _kept(rule: Rule, value: float, z: Tensor, p: Tensor, t: Tensor, sizes: Tensor | None) -> Tensor:
    """How many of the tokens, sorted by z (N, V) with probabilities p at temperatures t (N, 1), a rule keeps, (N,)."""
    finite = (z > -torch.inf).sum(-1)
    if rule is Rule.NONE:
        return finite
    if rule in (Rule.TOP_K, Rule.SIZE_ORACLE):
        k = torch.full_like(finite, int(value)) if rule is Rule.TOP_K else _of(sizes)
        keep = z >= z.gather(1, (torch.minimum(k, finite) - 1).clamp(min=0)[:, None])
    elif rule is Rule.TOP_P:
        places = torch.arange(z.shape[1], device=z.device)
        begins = torch.ones_like(z, dtype=torch.bool)
        begins[:, 1:] = z[:, 1:] != z[:, :-1]
        above = (p.cumsum(-1) - p).gather(1, torch.where(begins, places, 0).cummax(-1).values)  # tied tokens together
        keep = (above < value) if value < 1 else torch.ones_like(begins)
    else:
        keep = z >= _border(rule, value, z, p, t)
    keep = (keep | (z == z[:, :1])) & (z > -torch.inf)  # at least the most likely
    return keep.sum(-1)


def _border(rule: Rule, value: float, z: Tensor, p: Tensor, t: Tensor) -> Tensor:
    """The lowest logit kept, (N, 1): p >= q is z >= max + T log(q / p_max)."""
    top, log_value = z[:, :1], torch.tensor(value, dtype=torch.float64, device=z.device).log()
    if rule is Rule.TOP_N_SIGMA:
        finite = z > -torch.inf
        n = finite.sum(-1, keepdim=True)
        mean = torch.where(finite, z, 0.0).sum(-1, keepdim=True) / n
        square = torch.where(finite, (z - mean) ** 2, 0.0).sum(-1, keepdim=True)
        return top - value * torch.where(n > 1, square / (n - 1).clamp(min=1), 0.0).sqrt()
    if rule is Rule.MIN_P:
        return top + t * log_value
    log_p_max = p[:, :1].log()
    if rule is Rule.ETA:
        entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
        log_value = torch.minimum(log_value, log_value / 2 - entropy)
    return top + t * (log_value - log_p_max)


def _of(sizes: Tensor | None) -> Tensor:
    assert sizes is not None
    return sizes
